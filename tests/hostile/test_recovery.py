# SPDX-License-Identifier: Apache-2.0
"""What happens to a migration that is past its point of no return, when the other side is wrong, or gone, or done."""

from __future__ import annotations

import contextlib
import os
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from hostile import _wire as wire
from hostile._peer import Closed, Destination, Line, Listener, Machine, Refused, Source
from hostile._program import RV64, Control, Program, Refusal, verify, wait_until

Start = Callable[..., Program]
Daemon = Callable[..., tuple[Program, Control]]
Json = dict[str, object]


@pytest.mark.parametrize("way", ["hangs up", "nonsense", "wrong digest"])
def test_recovery_that_fails_again_and_again(start: Start, tmp_path: Path, version: int, way: str) -> None:
    """It connects, is welcome, and then fails: not hundreds of times a second, and not a log line each. Where it gives
    that up, it says so, and tries again on request."""
    seconds = 3.0
    with Listener(version) as listener:
        source = start("source", "--json", *RV64, "--connect", listener.where, "--control", tmp_path / "s")
        dest = listener.destination().until("run")
        dest.lose()
        attempts, said = 0, source.error_bytes()
        cpu_s = source.cpu_s()
        deadline = time.monotonic() + seconds
        with contextlib.suppress(TimeoutError):
            while time.monotonic() < deadline:
                line = listener.control(timeout_s=seconds)
                attempts += 1
                with contextlib.suppress(Closed):
                    if way == "nonsense":
                        line.say("commit")
                    elif way == "wrong digest":
                        dest.taken_back(line).say_what_is_here(damage=1)
                        dest.control.wait_closed()
                line.close()
        assert attempts < 20 * seconds, f"{attempts / seconds:.0f} attempts/s"
        assert source.error_bytes() - said < 4096 * seconds, (
            f"{(source.error_bytes() - said) / seconds:.0f} bytes/s of log"
        )
        assert source.cpu_s() - cpu_s < 0.7 * seconds
        status = [line["status"] for line in source.lines() if "status" in line][-1]
        if status == "postcopy-failed":
            Control(tmp_path / "s").ask("migrate-recover")
        dest.taken_back(listener.control()).say_what_is_here().recovered().take_all()
        assert source.end() == 0, source.tail()


def test_a_destination_that_fails_again_and_again(start: Start, version: int) -> None:
    seconds = 3.0
    with Listener(version) as listener:
        dest = start("dest", "--json", "--no-verify", "--connect", listener.where)
        source = listener.source(Machine.image(1 << 20)).until("running")
        source.lose()
        attempts, said = 0, dest.error_bytes()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            line = listener.control()
            attempts += 1
            with contextlib.suppress(Closed):
                line.say("running", resume_ns=1)
            line.close()
        assert attempts < 20 * seconds, f"{attempts / seconds:.0f} attempts/s"
        assert dest.error_bytes() - said < 4096 * seconds
        source.come_back().recovered().finish()
        assert dest.end() == 0, dest.tail()


def test_what_was_acknowledged_is_not_there(start: Start, version: int) -> None:
    """The source has freed it, as the acknowledgement allowed: no recovery can ever succeed, and that is said, once."""
    with Listener(version) as listener:
        source = start("source", "--json", *RV64, "--connect", listener.where, "--release-ram")
        dest = listener.destination().until("run")
        for line in dest.bulk:
            while line.take_frame().type != wire.END:
                pass
        for number, block in enumerate(dest.offer["blocks"]):
            pages = block["size-bytes"] // 4096
            dest.control.say("placed", block=number, first_page=0, pages=pages, runs=wire.all_pages(pages))
        source.wait_for("released", lambda line: (line.get("ram") or {}).get("released", 0) > 0)
        dest.lose()
        attempts = 0
        deadline = time.monotonic() + 4
        with contextlib.suppress(TimeoutError):
            while time.monotonic() < deadline:
                line = listener.control(timeout_s=3)
                attempts += 1
                dest.taken_back(line)
                with contextlib.suppress(Closed):
                    dest.say_what_is_here()
                    dest.control.wait_closed()
        assert attempts < 60
        assert source.error_bytes() < 16384
        status = [line["status"] for line in source.lines() if "status" in line][-1]
        assert status == "postcopy-failed"
        source.abandon()  # the machine could be reclaimed
        assert source.end() == 1


# ---- In doubt


def test_in_doubt_is_said_everywhere(daemon: Daemon, version: int, rv64: Machine) -> None:
    """Prepared, and the source is gone: nothing may take it for the owner of the machine."""
    program, control = daemon("d", "--metrics", "127.0.0.1:0", "-v")
    where = program.wait_for("metrics", lambda line: line["event"] == "metrics")["address"]
    source = Source(program.address, rv64, version).until("prepared")
    (name,) = control.machines()
    source.lose()
    control.wait_status(name, "in-doubt")
    program.wait_for("in doubt", lambda line: line["event"] == "migration-status" and line["status"] == "in-doubt")
    with urllib.request.urlopen(f"http://{where}/metrics", timeout=60) as answer:
        lines = [line for line in answer.read().decode().splitlines() if "postcopy_migration_status" in line]
    assert [line for line in lines if 'status="in-doubt"' in line and line.endswith(" 1.0")], lines
    assert control.machines()[name]["guest"]["state"] != "running"
    source.come_back()
    source.recovered().running().finish()  # it had decided: this is its COMMIT
    control.wait_status(name, "completed")


def test_in_doubt_and_the_source_had_not_decided(start: Start, version: int, tmp_path: Path) -> None:
    """A destination that calls: the source proves that it ended, and so does the destination."""
    if version < 3:
        pytest.skip("no proofs before version 3")
    with Listener(version) as listener:
        dest = start("dest", "--json", "--no-verify", "--connect", listener.where)
        source = listener.source(Machine.image(1 << 20)).until("prepared")
        source.lose()
        dest.wait_status("in-doubt")
        line, hello = listener.hello()
        fields = wire.refused("aborted", migration=source.migration, epoch=hello["epoch"], token=source.token)
        line.say("refused", **fields)
        assert dest.end() == 1
        assert dest.result()["status"] == "failed"


def test_a_source_that_had_not_decided(start: Start, version: int) -> None:
    """The same from the other side: a destination in doubt comes back to a source whose machine runs on."""
    if version < 3:
        pytest.skip("no proofs before version 3")
    source = start("source", "--json", *RV64, "--listen", "127.0.0.1:0", "--migrate-after", "0")
    dest = Destination.connect(source.address, version).until("handed")
    dest.lose()  # before `prepared` has been heard
    source.wait_for("failure", lambda line: line["event"] == "migration-ended")
    with pytest.raises(Refused) as refused:
        dest.come_back(source.address, version)
    fields = refused.value.fields
    assert fields["code"] == "aborted"
    assert fields["proof"] == wire.refused("aborted", migration=dest.migration, epoch=1, token=dest.token)["proof"]
    source.operations_go_on()


# ---- Endings are remembered


def test_a_source_that_never_heard_of_the_end(daemon: Daemon, version: int, rv64: Machine) -> None:
    """It comes back when all is over, and gets the outcome with a proof; a peer without the token does not."""
    if version < 3:
        pytest.skip("no proofs before version 3")
    program, control = daemon()
    source = Source(program.address, rv64, version).until("running")
    (name,) = control.machines()
    source.serve()
    source.push_all()
    source.control.hear("complete")
    source.lose()  # the acknowledgement never comes
    control.wait_status(name, "completed")
    for token in (os.urandom(16), source.token):
        line = Line.open(program.address, version)
        epoch = 1 if token == source.token else 7
        with pytest.raises(Refused) as refused:
            line.greet("control", "source", migration=source.migration, epoch=epoch, token=token)
        proof = wire.refused("completed", migration=source.migration, epoch=epoch, token=source.token)["proof"]
        assert (refused.value.fields.get("code") == "completed") is (token == source.token)
        assert (refused.value.fields.get("proof") == proof) is (token == source.token)
        line.close()


def test_a_process_that_ends_stays_until_its_source_knows(start: Start, version: int) -> None:
    """No other process remembers how it ended."""
    if version < 3:
        pytest.skip("no proofs before version 3")
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0")
    source = Source(dest.address, Machine.image(1 << 20), version).until("running")
    source.serve()
    source.push_all()
    source.control.hear("complete")
    source.lose()  # the acknowledgement never comes
    assert dest.wait_for("end", lambda line: line["event"] == "migration-ended")["status"] == "completed"
    for token, code in ((os.urandom(16), "wrong-token"), (source.token, "completed")):
        line = Line.open(dest.address, version)
        with pytest.raises(Refused) as refused:
            line.greet("control", "source", migration=source.migration, epoch=9, token=token)
        assert refused.value.fields["code"] == code
        line.close()
    assert dest.end() == 0, dest.tail()


def test_a_real_source_that_never_heard_of_the_end(start: Start, version: int) -> None:
    """It calls, and gets the outcome with a proof: then it has completed, as the destination has."""
    if version < 3:
        pytest.skip("no proofs before version 3")
    with Listener(version) as listener:
        source = start("source", "--json", *RV64, "--connect", listener.where)
        dest = listener.destination().until("run")
        dest.lose()
        line, hello = listener.hello()
        fields = wire.refused("completed", migration=dest.migration, epoch=hello["epoch"], token=os.urandom(16))
        line.say("refused", **fields)  # by a peer that does not know the token
        line.close()
        line, hello = listener.hello()
        fields = wire.refused("completed", migration=dest.migration, epoch=hello["epoch"], token=dest.token)
        line.say("refused", **fields)
        assert source.end() == 0, source.tail()
        assert source.result()["status"] == "completed"


# ---- Reclaim


def reclaimable(daemon: Daemon, version: int) -> tuple[Program, Control, Listener]:
    program, control = daemon("d", *RV64, "--name", "x")
    listener = Listener(version)
    with listener:
        asked = control.begin("migrate", machine="x", to=listener.where)
        dest = listener.destination().until("run")
        dest.lose()
    with contextlib.suppress(Refusal, AssertionError):
        asked.answer(0.01)
    control.wait_status("x", "postcopy-paused")
    return program, control, listener


def test_reclaim(daemon: Daemon, start: Start, version: int) -> None:
    """The destination is dead for good: the machine goes on here from the switchover, when that is forced."""
    _, control, _ = reclaimable(daemon, version)
    assert control.refused("reclaim", machine="x")
    paused = control.machines()["x"]["guest"]
    assert paused["state"] == "paused"
    control.ask("reclaim", machine="x", force=True)
    wait_until("operations", lambda: control.machines()["x"]["guest"]["operations"] > paused["operations"])
    verify(start, control, "x")


def test_reclaim_while_the_destination_answers(daemon: Daemon, version: int) -> None:
    program, control = daemon("d", *RV64, "--name", "x")
    with Listener(version) as listener:
        control.begin("migrate", machine="x", to=listener.where)
        dest = listener.destination().until("run")
        assert control.refused("reclaim", machine="x", force=True)
        dest.lose()
        control.wait_status("x", "postcopy-paused")
        dest.taken_back(listener.control()).say_what_is_here()
        assert control.refused("reclaim", machine="x", force=True)
    assert control.machines()["x"]["guest"]["state"] == "paused"
    assert program.alive()


def test_a_destination_that_comes_back_after_the_reclaim(start: Start, version: int, tmp_path: Path) -> None:
    """It was alive: it gets the answer that the machine is not its own any more."""
    if version < 3:
        pytest.skip("no proofs before version 3")
    path = tmp_path / "s"
    source = start("source", "--json", *RV64, "--listen", "127.0.0.1:0", "--control", path)
    dest = Destination.connect(source.address, version).until("run")
    dest.lose()
    source.wait_status("postcopy-paused")
    Control(path).ask("reclaim", force=True)
    with pytest.raises(Refused) as refused:
        dest.come_back(source.address, version)
    proof = wire.refused("reclaimed", migration=dest.migration, epoch=1, token=dest.token)["proof"]
    assert (refused.value.fields["code"], refused.value.fields["proof"]) == ("reclaimed", proof)


# ---- Versions


@pytest.mark.parametrize("spoken", [2, 3])
def test_every_version_that_is_spoken(start: Start, version: int, spoken: int, tmp_path: Path) -> None:
    """A peer of the version before, in every role: a whole migration, with a recovery in it."""
    if spoken > version:
        pytest.skip(f"the program speaks no version {spoken}")
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0")
    source = Source(dest.address, Machine.image(1 << 20), spoken).until("running")
    source.lose()
    source.come_back().recovered().finish()
    assert dest.end() == 0, dest.tail()

    real = start("source", "--json", *RV64, "--listen", "127.0.0.1:0")
    there = Destination.connect(real.address, spoken).until("run")
    there.lose()
    there.come_back(real.address, spoken).say_what_is_here().recovered().take_all()
    assert real.end() == 0, real.tail()

    with Listener(spoken) as listener:
        real = start("source", "--json", *RV64, "--connect", listener.where)
        there = listener.destination().until("run")
        there.lose()
        there.taken_back(listener.control()).say_what_is_here().recovered().take_all()
        assert real.end() == 0, real.tail()

        dest = start("dest", "--json", "--no-verify", "--connect", listener.where)
        source = listener.source(Machine.image(1 << 20)).until("running")
        source.lose()
        source.come_back().recovered().finish()
        assert dest.end() == 0, dest.tail()


@pytest.mark.parametrize("spoken", [0, 1])
def test_versions_that_are_not_spoken(start: Start, spoken: int) -> None:
    """Refused by name, and nothing else happens."""
    dest = start("dest", "--json", "--listen", "127.0.0.1:0")
    line = Line.open(dest.address, spoken)
    line.send(wire.preamble(spoken) + wire.hello("control", "source", version=2))
    assert line.closed_within(15)
    dest.wait_errors("version")
    assert dest.alive()


def test_a_newer_version(start: Start, version: int) -> None:
    """Answered with the newest that is known here."""
    if version < 3:
        pytest.skip("the preamble was not answered but said")
    dest = start("dest", "--json", "--listen", "127.0.0.1:0", "--run-for", "0")
    line = Line.open(dest.address, 9)
    line.send(wire.preamble(9) + wire.hello("control", "source"))
    assert line.take(8) == wire.preamble(version)
    line.close()
    with Listener(2) as listener:  # a listener of the version before is called again, in its language
        source = start("source", "--json", *RV64, "--connect", listener.where)
        listener.destination().until("run").take_all()
        assert source.end() == 0, source.tail()


def test_unknown_fields(start: Start, version: int) -> None:
    if version < 3:
        pytest.skip("an error before version 3")
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0")
    source = Source(dest.address, Machine.image(1 << 20), version, more={"colour": "blue", "shape": [1, {"a": None}]})
    source.until("running").finish()
    assert dest.end() == 0, dest.tail()


@pytest.mark.parametrize("channels", [0, 1, 16])
def test_numbers_of_bulk_channels(start: Start, version: int, channels: int) -> None:
    """None at all, too: then everything is asked for."""
    if version < 3 and not channels:
        pytest.skip("at least one before version 3")
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0")
    Source(dest.address, Machine.image(1 << 20), version, bulk_channels=channels).until("running").finish()
    assert dest.end() == 0, dest.tail()
