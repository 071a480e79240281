# SPDX-License-Identifier: Apache-2.0
"""A signal, in each state, on each side: how the process ends, who has the machine then, and what the other side hears.

What is true today is written here; docs/failures.md has it as a table.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from hostile._peer import Destination, Listener, Machine, Source
from hostile._program import RV64, Control, Program, Refusal, verify, wait_until

Start = Callable[..., Program]
Daemon = Callable[..., tuple[Program, Control]]
SIGNALS = [signal.SIGINT, signal.SIGTERM]
END_S = 25.0
BEFORE_AT_SOURCE = ["offered", "accept", "ready", "handed"]
BEFORE_AT_DEST = ["connect", "offer", "accepted", "ready"]


def ended_as_told(program: Program) -> None:
    """In order."""
    assert program.end(END_S) == 1
    assert program.result()["status"] in ("cancelled", "failed"), program.result()


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("step", BEFORE_AT_SOURCE)
def test_source_before_commit(start: Start, version: int, step: str, number: signal.Signals) -> None:
    """The migration is called off; the machine, which was the source's, ends with it. The destination hears it."""
    source = start("source", "--json", *RV64, "--listen", "127.0.0.1:0", "--migrate-after", "0")
    dest = Destination.connect(source.address, version).until(step)
    source.signal(number)
    said = [fields["type"] for fields in dest.control.wait_closed(END_S)]
    assert "commit" not in said
    assert said[-1:] == ["abort"], said
    ended_as_told(source)


@pytest.mark.parametrize("number", SIGNALS)
def test_source_after_commit(start: Start, version: int, tmp_path: Path, number: signal.Signals) -> None:
    """The machine is the destination's: the source waits until all of it is there; when the signal is sent again
    it says what is lost, and salvages what it has."""
    for insist in (False, True):
        salvage = tmp_path / "s"
        source = start("source", "--json", *RV64, "--listen", "127.0.0.1:0", "--salvage", salvage)
        dest = Destination.connect(source.address, version).until("run")
        source.wait_status("postcopy-active")
        if insist:
            source.abandon(number)
            continue
        source.signal(signal.SIGHUP)  # of a terminal that was closed: nothing ends
        source.signal(number)
        source.wait_errors("has not received all of the memory")
        dest.take_all()
        assert source.end(END_S) == 0
    assert source.end(END_S) == 1
    assert "abandoned" in source.result()["error"]
    assert source.result()["status"] == "postcopy-paused"
    assert (salvage / "manifest.json").exists()


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("step", BEFORE_AT_DEST)
def test_dest_before_commit(start: Start, version: int, rv64: Machine, step: str, number: signal.Signals) -> None:
    dest = start("dest", "--json", "--listen", "127.0.0.1:0")
    source = Source(dest.address, rv64, version).until(step)
    dest.signal(number)
    said = [fields["type"] for fields in source.control.wait_closed(END_S)]
    assert "prepared" not in said
    assert set(said) & {"abort", "reject"} or step in ("connect", "offer"), said
    ended_as_told(dest)


@pytest.mark.parametrize("number", SIGNALS)
def test_dest_in_doubt(start: Start, version: int, rv64: Machine, number: signal.Signals) -> None:
    """It does not know whether the machine is its own: it goes on asking, unless the signal is sent again."""
    dest = start("dest", "--json", "--listen", "127.0.0.1:0")
    source = Source(dest.address, rv64, version).until("prepared")
    source.lose()
    dest.wait_status("in-doubt")
    dest.abandon(number)
    assert "not known yet whether the machine was given to this host" in dest.errors()
    assert dest.end(END_S) == 1
    assert dest.result()["status"] in ("failed", "cancelled", "in-doubt")


@pytest.mark.parametrize("number", SIGNALS)
def test_dest_after_commit(start: Start, version: int, rv64: Machine, tmp_path: Path, number: signal.Signals) -> None:
    """Pages are missing: it waits for them; when the signal is sent again the machine ends with the process, what is
    there is salvaged, the source keeps the rest."""
    for insist in (False, True):
        salvage = tmp_path / "s"
        dest = start("dest", "--json", "--listen", "127.0.0.1:0", "--salvage", salvage)
        source = Source(dest.address, rv64, version).until("running")
        dest.wait_status("postcopy-active")
        if insist:
            dest.abandon(number)
            continue
        dest.signal(signal.SIGHUP)
        dest.signal(number)
        dest.wait_errors("have not arrived")
        source.finish()
        assert dest.end(END_S) == 0
        assert dest.result()["verified"] is True
    assert dest.end(END_S) == 1
    assert dest.result()["status"] == "postcopy-paused"
    assert (salvage / "manifest.json").exists()
    source.control.wait_closed()


@pytest.mark.parametrize("number", SIGNALS)
def test_dest_when_all_is_there(start: Start, tmp_path: Path, version: int, number: signal.Signals) -> None:
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0", "--dump", tmp_path / "copy")
    Source(dest.address, Machine.image(1 << 20), version).until("running").finish()
    dest.signal(number)  # an image ends by itself; a signal meanwhile changes nothing of what has happened
    assert dest.end(END_S) in (0, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", BEFORE_AT_SOURCE)
def test_daemon_that_sends_before_commit(daemon: Daemon, version: int, step: str, number: signal.Signals) -> None:
    program, control = daemon("d", *RV64, "--name", "x")
    with Listener(version) as listener:
        control.begin("migrate", machine="x", to=listener.where)
        dest = listener.destination().until(step)
        program.signal(number)
        said = [fields["type"] for fields in dest.control.wait_closed(END_S)]
        assert "commit" not in said
        assert program.end(END_S) == 0


def test_daemon_that_sends_after_commit(daemon: Daemon, version: int) -> None:
    """The first signal waits until the machine has moved; the second one does not."""
    for signals in (1, 2):
        program, control = daemon(f"d{signals}", *RV64, "--name", "x")
        with Listener(version) as listener:
            control.begin("migrate", machine="x", to=listener.where)
            dest = listener.destination().until("run")
            if signals == 2:
                program.abandon()
                assert program.end(END_S) == 0
                continue
            program.signal(signal.SIGTERM)
            program.wait_errors("x: the destination has not received all of the memory")
            assert program.alive()
            dest.take_all()
            assert program.end(END_S) == 0
            assert program.result()["machines-sent"] == 1


def test_daemon_that_receives(daemon: Daemon, version: int, rv64: Machine) -> None:
    """Before COMMIT it gives up; after it, it waits until all pages are there, unless there is a second signal."""
    program, control = daemon("d0")
    source = Source(program.address, rv64, version).until("ready")
    program.signal(signal.SIGTERM)
    assert "prepared" not in [fields["type"] for fields in source.control.wait_closed(END_S)]
    assert program.end(END_S) == 0
    for signals in (1, 2):
        program, control = daemon(f"d{signals}")
        source = Source(program.address, rv64, version).until("running")
        wait_until("arrival", control.machines)
        if signals == 2:
            program.abandon()
            assert program.end(END_S) == 0
            continue
        program.signal(signal.SIGTERM)
        program.wait_errors("have not arrived")
        source.finish()
        assert program.end(END_S) == 0
        assert program.result()["machines-received"] == 1


@pytest.mark.parametrize("step", BEFORE_AT_DEST)
def test_quit_of_a_daemon_that_receives(daemon: Daemon, version: int, rv64: Machine, step: str) -> None:
    program, control = daemon()
    Source(program.address, rv64, version).until(step)
    wait_until("arrival", lambda: step == "connect" or control.machines())
    try:
        control.ask("quit", force=True)
    except Refusal as refusal:
        raise AssertionError(str(refusal)) from refusal
    assert program.end(END_S) == 0


@pytest.mark.parametrize("step", BEFORE_AT_SOURCE)
@pytest.mark.parametrize("side", ["source", "daemon"])
def test_cancel_before_commit(daemon: Daemon, start: Start, tmp_path: Path, version: int, step: str, side: str) -> None:
    """In each state: the machine goes on at the source, and can be sent away again."""
    with Listener(version) as listener:
        if side == "daemon":
            _, control = daemon("d", *RV64, "--name", "rv64")
            control.begin("migrate", machine="rv64", to=listener.where)
        else:
            start("source", "--json", *RV64, "--connect", listener.where, "--control", tmp_path / "s")
            control = Control(tmp_path / "s")
        dest = listener.destination().until(step)
        control.ask("migrate-cancel")
        assert "commit" not in [fields["type"] for fields in dest.control.wait_closed(END_S)]
    before = wait_until(
        "it runs", lambda: (guest := control.machines()["rv64"]["guest"])["state"] == "running" and guest["operations"]
    )
    wait_until("operations", lambda: control.machines()["rv64"]["guest"]["operations"] > before)
    if side == "daemon":
        verify(start, control, "rv64")


@pytest.mark.parametrize("step", BEFORE_AT_DEST)
@pytest.mark.parametrize("side", ["dest", "daemon"])
def test_cancel_before_commit_at_the_destination(
    daemon: Daemon, start: Start, tmp_path: Path, version: int, rv64: Machine, step: str, side: str
) -> None:
    if side == "daemon":
        program, control = daemon()
    else:
        program = start("dest", "--json", "--listen", "127.0.0.1:0", "--control", tmp_path / "d")
        control = Control(tmp_path / "d")
    source = Source(program.address, rv64, version).until(step)
    if step == "connect":
        source.control.close()  # nothing to be cancelled yet
        return
    wait_until("migration", lambda: control.machines())
    control.ask("migrate-cancel")
    assert "prepared" not in [fields["type"] for fields in source.control.wait_closed(END_S)]
    if side == "dest":
        assert program.end(END_S) == 1
    else:
        wait_until("end", lambda: not control.machines())


@pytest.mark.parametrize("side", ["source", "dest"])
def test_cancel_after_commit(start: Start, tmp_path: Path, version: int, rv64: Machine, side: str) -> None:
    """It is refused, and changes nothing."""
    path = tmp_path / side
    if side == "source":
        program = start("source", "--json", *RV64, "--listen", "127.0.0.1:0", "--control", path)
        dest = Destination.connect(program.address, version).until("run")
        program.wait_status("postcopy-active")
        assert "NotNow" in Control(path).refused("migrate-cancel")
        dest.take_all()
        assert program.end() == 0
    else:
        program = start("dest", "--json", "--listen", "127.0.0.1:0", "--control", path, "--run-for", "0")
        source = Source(program.address, rv64, version).until("running")
        assert "NotNow" in Control(path).refused("migrate-cancel")
        source.finish()
        assert program.end() == 0, program.tail()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("side", ["source", "dest"])
def test_frozen_peer_and_a_signal(start: Start, version: int, rv64: Machine, side: str, number: signal.Signals) -> None:
    """A peer that does not answer is not waited for, before COMMIT or, when the signal is sent again, after it."""
    if side == "source":
        for step in ("ready", "run"):
            program = start("source", "--json", *RV64, "--listen", "127.0.0.1:0")
            Destination.connect(program.address, version).until(step).control.frozen.set()
            program.signal(number) if step == "ready" else program.abandon(number)
            assert program.end(END_S) == 1
    else:
        for step in ("ready", "running"):
            program = start("dest", "--json", "--listen", "127.0.0.1:0")
            Source(program.address, rv64, version).until(step).control.frozen.set()
            program.signal(number) if step == "ready" else program.abandon(number)
            assert program.end(END_S) == 1
