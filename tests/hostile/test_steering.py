# SPDX-License-Identifier: Apache-2.0
"""What an operator may do, in unusual states."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hostile._peer import Closed, Listener, Machine, Source
from hostile._program import RV64, Control, Program, Pulse, Refusal, wait_until

Start = Callable[..., Program]
Daemon = Callable[..., tuple[Program, Control]]
AT_ONCE_S = 8.0
"""Milliseconds on an idle host; less than any time limit that might be waited for instead."""


@pytest.fixture(params=["silent", "frozen"])
def silent(request: pytest.FixtureRequest, version: int) -> Listener:
    """A port that takes connections and says nothing; or whose process does not even take them."""
    listener = Listener(version)
    if request.param == "silent":
        listener.keep_silent()
    return listener


def test_cancel_while_connecting(daemon: Daemon, silent: Listener) -> None:
    program, control = daemon("d", *RV64, "--name", "x")
    with silent:
        asked = control.begin("migrate", machine="x", to=silent.where)
        wait_until("a migration that is shown", lambda: control.migration("x"))
        began = time.monotonic()
        assert control.ask("migrate-cancel", machine="x")
        control.wait_status("x", "cancelled", "failed", deadline_s=AT_ONCE_S)
        with contextlib.suppress(Refusal):
            asked.answer(AT_ONCE_S)
        assert time.monotonic() - began < AT_ONCE_S
        assert control.machines()["x"]["guest"]["state"] == "running"
        assert program.alive()


def test_cancel_while_connecting_again(daemon: Daemon, start: Start, silent: Listener) -> None:
    """Not the previous migration, and the machine does not leave."""
    _, control = daemon("d", *RV64, "--name", "x")
    with Listener(silent.version) as decliner:
        first = control.begin("migrate", machine="x", to=decliner.where)
        line = decliner.control()
        line.hear()
        line.say("reject", reason="no")
        with contextlib.suppress(Refusal):
            first.answer()
        line.close()
    control.wait_status("x", "failed", "cancelled")
    before = control.migration("x").get("migration-id")
    with silent:
        control.begin("migrate", machine="x", to=silent.where)
        wait_until("a new migration that is shown", lambda: control.migration("x").get("migration-id") != before)
        control.ask("migrate-cancel")
        control.wait_status("x", "cancelled", "failed", deadline_s=AT_ONCE_S)
    assert control.machines()["x"]["guest"]["state"] == "running"


@pytest.mark.parametrize("how", ["end", "quit", "SIGTERM", "SIGINT"])
def test_end_while_connecting(daemon: Daemon, silent: Listener, how: str) -> None:
    program, control = daemon("d", *RV64, "--name", "x")
    with silent:
        control.begin("migrate", machine="x", to=silent.where)
        wait_until("connection", lambda: silent.backlog() or control.migration("x"))
        if how == "end":
            control.ask("end", AT_ONCE_S, machine="x", force=True)
            assert control.machines() == {}
            return
        if how == "quit":
            with contextlib.suppress(Refusal, OSError):
                control.ask("quit", AT_ONCE_S, force=True)
        else:
            program.signal(signal.Signals[how])
        assert program.end(AT_ONCE_S) == 0


def test_connecting_delays_nothing_else(daemon: Daemon, start: Start, silent: Listener) -> None:
    """Another machine comes and goes meanwhile."""
    program, control = daemon("d", *RV64, "--name", "x")
    with silent:
        control.begin("migrate", machine="x", to=silent.where)
        with Pulse(control) as pulse:
            source = start("source", "--json", *RV64, "--connect", program.where)
            assert source.end() == 0, source.tail()
        pulse.check(2.0)


@pytest.mark.parametrize("step", ["offered", "accept", "ready", "handed"])
def test_cancel_with_a_frozen_destination(daemon: Daemon, version: int, step: str) -> None:
    """In each state before the point of no return: at once, whether or not the other side listens."""
    _, control = daemon("d", *RV64, "--name", "x")
    with Listener(version) as listener:
        asked = control.begin("migrate", machine="x", to=listener.where)
        dest = listener.destination().until(step)
        dest.control.frozen.set()
        assert control.ask("migrate-cancel", AT_ONCE_S, machine="x")
        control.wait_status("x", "cancelled", deadline_s=AT_ONCE_S)
        with contextlib.suppress(Refusal):
            asked.answer(AT_ONCE_S)
        wait_until("it goes on", lambda: control.machines()["x"]["guest"]["state"] == "running", AT_ONCE_S)


@pytest.mark.parametrize("step", ["accepted", "ready"])
def test_cancel_with_a_frozen_source(daemon: Daemon, version: int, rv64: Machine, step: str) -> None:
    _, control = daemon("d")
    source = Source(daemon_address(control), rv64, version).until(step)
    source.control.frozen.set()
    wait_until("arrival", control.machines)
    with contextlib.suppress(Refusal):
        control.ask("migrate-cancel", AT_ONCE_S)
    wait_until("end", lambda: not control.machines(), AT_ONCE_S)


def daemon_address(control: Control) -> tuple[str, int]:
    host, _, port = str(control.ask("status")["listening"][0]).rpartition(":")
    return host, int(port)


# ---- Recovery, and how long it is tried


def lost_source(start: Start, listener: Listener, directory: Path, *arguments: object) -> tuple[Program, Control]:
    """A source past its point of no return, whose destination is gone."""
    path = directory / "s"
    source = start("source", "--json", *RV64, "--connect", listener.where, "--control", path, *arguments)
    listener.destination().until("run").lose()
    source.wait_status("postcopy-paused")
    return source, Control(path)


def says_or_does(control: Control, listener: Listener) -> None:
    """`ctl migrate-recover` connects, or says why it does not."""
    with contextlib.suppress(Refusal):
        control.ask("migrate-recover")
        listener.accept().close()


def test_recover_when_the_search_has_ended(start: Start, tmp_path: Path, version: int) -> None:
    with Listener(version) as listener:
        source, control = lost_source(start, listener, tmp_path, "--recover-for", "1")
        source.wait_errors("lost for good")
        listener.take_what_waits()
        says_or_does(control, listener)


def test_recover_when_a_destination_has_no_patience_left(start: Start, tmp_path: Path, version: int) -> None:
    with Listener(version) as listener:
        dest = start(
            "dest",
            "--json",
            "--no-verify",
            "--connect",
            listener.where,
            "--recover-for",
            "1",
            "--control",
            tmp_path / "d",
        )
        listener.source(Machine.image(1 << 20)).until("running").lose()
        dest.wait_status("postcopy-paused")
        dest.wait_errors("lost for good")
        listener.take_what_waits()
        says_or_does(Control(tmp_path / "d"), listener)


def test_recover_for_that_is_set_after_the_loss(start: Start, tmp_path: Path, version: int) -> None:
    with Listener(version) as listener:
        source, control = lost_source(start, listener, tmp_path)
        control.ask("set", recover_for=1)
        source.wait_errors("lost for good", 20)


def test_patience_that_is_taken_back(start: Start, tmp_path: Path, version: int) -> None:
    with Listener(version) as listener:
        source, control = lost_source(start, listener, tmp_path, "--recover-for", "4")
        control.ask("set", recover_for="forever")
        began = time.monotonic()
        while time.monotonic() < began + 6:
            listener.accept().close()
        assert "lost for good" not in source.errors()


def test_answers_that_never_come_after_the_push(start: Start, version: int, tmp_path: Path) -> None:
    """Everything has been pushed, says the source; but it has not, and what is asked for is never answered."""
    dest = start(
        "dest", "--json", "--no-verify", "--listen", "127.0.0.1:0", "--dump", tmp_path / "copy", "--heartbeat", "0.3"
    )
    machine = Machine.image(1 << 20)
    source = Source(dest.address, machine, version, bulk_channels=1).until("running")
    machine.maps, maps = [], machine.maps
    source.push_all()  # nothing, and END
    dest.wait_status("postcopy-paused", deadline_s=30)
    source.lose()
    machine.maps = maps
    source.come_back().recovered().finish()
    assert dest.end() == 0, dest.tail()


@pytest.mark.parametrize(
    "command", ["migrate-pause", "migrate-recover", "migrate-cancel", "end", "quit", "migrate", "reclaim"]
)
def test_anything_may_be_asked_of_an_idle_daemon(daemon: Daemon, command: str) -> None:
    _, control = daemon()
    arguments = {"to": "127.0.0.1:9"} if command == "migrate" else {}
    with contextlib.suppress(Refusal, Closed):
        control.ask(command, 20, **arguments)
