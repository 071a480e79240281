# SPDX-License-Identifier: Apache-2.0
"""Anybody who can reach the port can say anything: no migration but that peer's own suffers, and no other machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tls

from hostile import _wire as wire
from hostile._peer import Closed, Destination, Line, Listener, Machine, Neighbour, Refused, Source
from hostile._program import RV64, Control, Program, verify, wait_until
from hostile._wire import Fields

Start = Callable[..., Program]
Daemon = Callable[..., tuple[Program, Control]]
Beside = Callable[[Program, Control], Neighbour]


def test_two_offers_of_one_migration(daemon: Daemon, neighbour: Beside, version: int, rv64: Machine) -> None:
    program, control = daemon()
    beside = neighbour(program, control)
    for _ in range(3):
        first = Source(program.address, rv64, version).until("accepted")
        second = Source(program.address, rv64, version).connect()
        second.migration = first.migration
        second.token = first.token
        second.offer()
        with contextlib.suppress(Closed):
            assert second.control.hear()["type"] != "accept", "two machines under one migration id"
        for one in (first, second):
            one.control.close()
    beside.finish()
    wait_until("end of what was offered", lambda: list(control.machines()) == [beside.name])
    assert program.alive()


@pytest.mark.parametrize("step", ["accepted", "ready", "prepared", "running"])
def test_the_id_of_a_machine_that_is_here(daemon: Daemon, start: Start, version: int, rv64: Machine, step: str) -> None:
    """A peer that has read it in a log offers under it, and leaves. The migration goes on where it was."""
    program, control = daemon()
    source = Source(program.address, rv64, version).until(step)
    for _ in range(2):
        other = Source(program.address, rv64, version).connect()
        other.migration = source.migration
        other.offer()
        with contextlib.suppress(Closed):
            assert other.control.hear()["type"] != "accept"
        other.control.close()
    if step == "accepted":
        source.ready().switch().prepared().commit().running()
    elif step == "ready":
        source.switch().prepared().commit().running()
    elif step == "prepared":
        source.commit().running()
    else:  # and when the source is away
        source.lose()
        source.come_back().recovered()
    source.finish()
    (name,) = control.machines()
    control.wait_status(name, "completed")
    verify(start, control, name)


def test_the_id_of_a_machine_whose_source_is_away(
    daemon: Daemon, start: Start, tmp_path: Path, version: int, rv64: Machine
) -> None:
    """As above, with a real source, which must not be answered that there is no such migration."""
    program, control = daemon()
    # So much that the guest, which no limit of the push keeps from asking, is far from having it all by the pause.
    large = ("--machine", "rv64", "--memory", "192MiB", "--workload", "random", "--max-bandwidth", "64KiB/s")
    source = start("source", "--json", "--control", tmp_path / "s", *large, "--connect", program.where)
    source.wait_status("postcopy-active")
    Control(tmp_path / "s").ask("migrate-pause")
    (name,) = control.machines()
    other = Source(program.address, rv64, version).connect()
    other.migration = bytes.fromhex(control.wait_status(name, "postcopy-paused")["migration-id"])
    other.offer()
    with contextlib.suppress(Closed):
        assert other.control.hear()["type"] != "accept"
    other.control.close()
    Control(tmp_path / "s").ask("migrate-recover")
    Control(tmp_path / "s").ask("set", max_bandwidth="none")
    assert source.end() == 0, source.tail()
    control.wait_status(name, "completed")
    verify(start, control, name)


def test_refused_by_an_impostor(start: Start, version: int) -> None:
    """Another program listens where the destination was, and answers without proof that there is no such migration."""
    with Listener(version) as listener:
        source = start("source", "--json", *RV64, "--connect", listener.where)
        dest = listener.destination().until("run")
        dest.lose()
        for _ in range(5):
            line, _ = listener.hello()
            line.say("refused", **refusal(version))
            line.close()
        dest.taken_back(listener.control()).say_what_is_here().recovered().take_all()
        assert source.end() == 0, source.tail()


def test_refused_by_an_impostor_in_doubt(start: Start, version: int, tmp_path: Path) -> None:
    """The same, to a destination that waits for COMMIT: it does not give the machine up."""
    with Listener(version) as listener:
        dest = start("dest", "--json", "--no-verify", "--connect", listener.where, "--dump", tmp_path / "copy")
        source = listener.source(Machine.image(1 << 20)).until("prepared")
        source.lose()
        for _ in range(3):
            line, _ = listener.hello()
            line.say("refused", **refusal(version))
            line.close()
        source.come_back().recovered().running().finish()
        assert dest.end() == 0, dest.tail()


def unproven(listener: Listener, way: str) -> Line:
    """The next connection, welcomed by a peer that does not know the token."""
    line = listener.speaker(30)
    line.take(8)
    line.send(wire.preamble(2 if way == "older version" else 3))
    if way == "older version":
        line.say("welcome")  # to a hello that it has not understood
        return line
    hello = line.hear()
    line.say("welcome", proof=b"" if way == "no proof" else wire.welcome(hello, os.urandom(16))["proof"])
    return line


UNPROVEN = ["no proof", "wrong proof", "older version"]


@pytest.mark.parametrize("way", UNPROVEN)
def test_welcomed_by_an_impostor(start: Start, version: int, way: str) -> None:
    """The impostor listens where the destination was, welcomes, and disagrees about everything, again and again. That
    ends nothing: the destination is found when it is back."""
    with Listener(version) as listener:
        source = start("source", "--json", *RV64, "--connect", listener.where)
        dest = listener.destination().until("run")
        dest.lose()
        for _ in range(5):
            line = unproven(listener, way)
            with contextlib.suppress(Closed):
                for number, block in enumerate(dest.machine.blocks):
                    line.say("received-map", block=number, first_page=0, pages=block["size-bytes"] // 4096, runs=b"")
                line.say("recover", resume_ns=1, maps=len(dest.machine.blocks), digest=0xDEAD)
                line.say("complete", stats={})
            assert line.closed_within(10), "the source listens to a peer that has proven nothing"
            line.close()
        statuses = {line["status"] for line in source.lines() if "status" in line}
        assert not statuses & {"postcopy-failed", "completed"}, statuses
        dest.taken_back(listener.control()).say_what_is_here().recovered().take_all()
        assert source.end() == 0, source.tail()


@pytest.mark.parametrize("way", UNPROVEN)
def test_welcomed_by_an_impostor_in_doubt(start: Start, version: int, tmp_path: Path, way: str) -> None:
    """The impostor's `recovered` would be a COMMIT: a second owner, if the real source runs the machine."""
    with Listener(version) as listener:
        dest = start("dest", "--json", "--no-verify", "--connect", listener.where)
        source = listener.source(Machine.image(1 << 20)).until("prepared")
        source.lose()
        for _ in range(4):
            line = unproven(listener, way)
            with contextlib.suppress(Closed):
                line.say("recovered")
                line.say("commit")
            assert line.closed_within(10)
            line.close()
        assert dest.wait_status("in-doubt")
        assert not dest.events("result")
        assert not {"postcopy-active", "postcopy-recover"} & {line.get("status") for line in dest.lines()}
        source.come_back().recovered().running().finish()
        assert dest.end() == 0, dest.tail()


def refusal(version: int) -> Fields:
    return {"reason": "no such migration here"} if version < 3 else wire.refused("unknown")


def test_dest_goes_on_listening(start: Start, version: int, tmp_path: Path) -> None:
    """A hello and no more, an offer that makes no sense, and another one: none of them is the source."""
    dest = start("dest", "--json", "--listen", "127.0.0.1:0", "--run-for", "0")
    address = dest.address
    Line.open(address, version).reset()
    line = Line.open(address, version)
    line.greet("control", "source")
    line.reset()
    line = Line.open(address, version)
    line.greet("control", "source")
    line.say(
        "offer",
        migration=os.urandom(16),
        token=os.urandom(16),
        machine="tape",
        config={},
        blocks=[{"name": "x", "size-bytes": 4096, "page-bytes": 4096}],
        bulk_channels=1,
        placed_every_ms=0,
    )
    assert line.closed_within(20)
    unfit = Machine.image(1 << 20)
    unfit.config = {}

    def connected(source: Source) -> bool:
        with contextlib.suppress(Refused):  # the connection before has not quite ended
            source.connect()
            return True
        return False

    source = Source(address, unfit, version)
    wait_until("place", lambda: connected(source))
    source.offer().control.wait_closed()

    def moved() -> bool:
        return start("source", "--json", *RV64, "--connect", dest.where, "--on-failure", "exit").end() == 0

    wait_until("place", moved)
    assert dest.end() == 0, dest.tail()
    assert dest.result()["verified"] is True


def test_a_silent_source(start: Start, version: int) -> None:
    """It is welcomed and offers nothing: the place is free again in bounded time."""
    dest = start("dest", "--json", "--listen", "127.0.0.1:0", "--run-for", "0")
    Source(dest.address, Machine.image(1 << 20), version).connect()

    def moved() -> bool:
        return start("source", "--json", *RV64, "--connect", dest.where, "--on-failure", "exit").end() == 0

    wait_until("place", moved, 60)
    assert dest.end() == 0, dest.tail()


@pytest.mark.timeout(240)
def test_sources_that_die_at_prepared(daemon: Daemon, start: Start, version: int, rv64: Machine) -> None:
    """They have taken every place of their host. An undecided machine has a time limit, after which its place is free
    again."""
    program, control = daemon()
    for _ in range(16):
        Source(program.address, rv64, version).until("prepared").lose()
    words = {(machine.get("migration") or {}).get("status") for machine in control.machines().values()}
    assert words == {"in-doubt"}

    def moved() -> bool:
        source = start("source", "--json", *RV64, "--connect", program.where, "--on-failure", "exit")
        return source.end() == 0

    wait_until("a place", moved, 150)


def test_sources_that_fall_silent_before_commit(daemon: Daemon, version: int, rv64: Machine) -> None:
    """They are connected, and say nothing any more: lost after three heartbeats, and their places are free."""
    program, control = daemon("d", "--heartbeat", "0.2")
    for step in ("connect", "offer", "accepted", "ready"):
        Source(program.address, rv64, version).until(step).control.frozen.set()
    wait_until("all gone", lambda: not control.machines(), 60)
    assert program.alive()


def test_lost_destinations_of_an_image(start: Start, version: int, tmp_path: Path) -> None:
    """Each may come back; until then none of them takes the place of another."""
    (tmp_path / "image").write_bytes(os.urandom(1 << 20))
    image = ("--machine", "image", "--image", tmp_path / "image", "--serve", "forever")
    source = start("source", "--json", *image, "--listen", "127.0.0.1:0")
    for _ in range(17):
        Destination.connect(source.address, version).until("run").lose()
    copy = tmp_path / "copy"
    dest = start("dest", "--json", "--connect", source.where, "--dump", copy)
    assert dest.end() == 0, dest.tail()
    assert copy.read_bytes() == (tmp_path / "image").read_bytes()


def test_bad_handshakes_of_all_kinds(daemon: Daemon, neighbour: Beside, version: int) -> None:
    """Garbage, other protocols, half a hello, hellos for migrations that do not exist."""
    program, control = daemon()
    beside = neighbour(program, control)
    for said in (
        b"",
        b"\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01" + os.urandom(200),
        b"postcpy",
        b"postcpy\xff",
        b"postcpy\x00",
        b"postcpy\x02\xff\xff\xff\xff",
        b"postcpy\x03\x00\x00\x00\x00",
        os.urandom(4096),
    ):
        line = Line.open(program.address, version)
        with contextlib.suppress(Closed):
            line.send(said)
        line.reset()
    for fields in (
        {"index": 63, "migration": os.urandom(16), "token": os.urandom(16)},
        {"epoch": 2**32 - 1, "migration": os.urandom(16), "token": os.urandom(16)},
        {"epoch": 1},
    ):
        for channel in ("control", "urgent", "bulk"):
            line = Line.open(program.address, version)
            with contextlib.suppress(Refused, Closed):
                line.greet(channel, "source", **fields)
                raise AssertionError(f"welcome: {channel} {fields}")
    half = [Line.open(program.address, version) for _ in range(300)]  # more than may be in that state
    beside.finish()
    for line in half:
        line.close()


def test_bad_handshakes_of_tls(daemon: Daemon, start: Start, version: int) -> None:
    """Of hosts without a certificate: what is no TLS, what TLS has too much of, and more half handshakes than there are
    places. Who has one comes in beside all of them, and the log has a few lines."""
    program, _ = daemon("d", "--tls", tls.directory())
    hello = tls.client_hello()
    one_byte = b"".join(b"\x16\x03\x01\x00\x01" + hello[at : at + 1] for at in range(5, len(hello)))
    nothing_said = program.error_bytes()
    for said in (
        wire.preamble(version) + wire.hello("control", "source", version=version),
        b"\x16" + os.urandom(4096),
        b"\x16\x03\x01\xff\xff" + bytes(70000),  # longer than a record may be
        b"\x16\x03\x01\x00\x00" * 5000,  # records of nothing
        b"\x16\x03\x01\x40\x00\x01\xff\xff\xff" + bytes(16380) + (b"\x16\x03\x01\x40\x00" + bytes(16384)) * 9,
        one_byte,
        hello + hello,
        hello + b"\x14\x03\x03\x00\x01\x01" * 5000,
        hello + b"\x15\x03\x03\x00\x02\x01\x5a" * 5000,  # alerts that mean nothing
        *(hello[:cut] for cut in range(1, len(hello), 40)),
    ):
        line = Line.open(program.address, version)
        with contextlib.suppress(Closed):
            line.send(said)
        line.reset()
    half = [Line.open(program.address, version) for _ in range(300)]
    for line in half:
        with contextlib.suppress(Closed):
            line.send(hello)
    half[-1].take(1)  # all have been accepted
    to = ("--connect", program.where, "--tls", tls.directory(), "--on-failure", "exit")
    source = start("source", "--json", *RV64, *to)
    assert source.end() == 0, source.tail()
    assert program.error_bytes() - nothing_said < 4000, program.errors()


def test_another_token(daemon: Daemon, neighbour: Beside, version: int) -> None:
    """Wrong tokens and stale epochs, for a migration that exists."""
    program, control = daemon()
    beside = neighbour(program, control)
    migration = bytes.fromhex(control.migration(beside.name)["migration-id"])
    for channel in ("control", "urgent", "bulk"):
        for epoch in (0, 1, 7, 2**32 - 1):
            for token in (b"", os.urandom(16)):
                line = Line.open(program.address, version)
                with pytest.raises((Refused, Closed)):
                    line.greet(channel, "source", migration=migration, epoch=epoch, token=token)
                line.close()
    beside.finish()
