# SPDX-License-Identifier: Apache-2.0
"""Every way in which a command can be ended, at every stage: the machine is where the state says, and so is the status.

(Connecting: test_listening. Output that is not read: test_output. Losing the peer: test_migration.)
"""

from __future__ import annotations

import fcntl
import os
import pty
import random
import secrets
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., Any]
POSTCOPY = [sys.executable, "-m", "postcopy"]
DEADLINE_S = 60.0
RV64 = ("--machine", "rv64", "--memory", "24MiB", "--workload", "random")
# So much that not all of it is there when it is ended: it asks for tens of megabytes a second.
LARGE = ("--machine", "rv64", "--memory", "192MiB", "--workload", "random", "--max-bandwidth", "64KiB/s")

pytestmark = pytest.mark.needs("uffd-user")

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def _ended(one: Any, *statuses: str, exit_status: int = 1) -> dict[str, Any]:
    returncode, result, errors = one.end()
    assert returncode == exit_status, errors
    assert result["status"] in statuses, result
    # (One that is lost for good says so at once, and at its end again.)
    expected = (1, 2) if result["status"] == "postcopy-failed" else (1 if exit_status else 0,)
    assert errors.count("postcopy: error:") in expected, errors
    return dict(result)


def _moving(side: Start, at: Path, *more: Any, to: tuple[Any, ...] = (), listens: str = "dest") -> dict[str, Any]:
    """Both sides in the middle of a migration that takes long; `at` is the source's control socket."""
    sending = ("source", "--json", *LARGE, "--control", at, *more)
    if listens == "dest":
        dest = side("dest", "--json", "--listen", "127.0.0.1:0", *to)
        source = side(*sending, "--connect", dest.address)
    else:
        source = side(*sending, "--listen", "127.0.0.1:0")
        dest = side("dest", "--json", "--connect", source.address, *to)
    for one in (dest, source):
        one.wait_status("postcopy-active")
    return {"source": source, "dest": dest}


def _quickly(operator: Callable[[str], Any]) -> None:
    """The rest may come at once."""
    operator("s").ask("set", "--max-bandwidth", "none")


def _signal_together(one: Any, *numbers: signal.Signals) -> None:
    """However long this host keeps the test from sending the next one."""
    for number in (signal.SIGSTOP, *numbers, signal.SIGCONT):
        one.signal(number)


def _goes_on(one: Any) -> None:
    seen = one.lines[-1]["elapsed-ms"]
    one.wait_for("later", lambda line: line["event"] == "progress" and line["elapsed-ms"] > seen)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_anybody_has_come(side: Start, number: signal.Signals) -> None:
    listens = ("--json", "--listen", "127.0.0.1:0")
    for one in (side("source", *RV64, *listens), side("dest", *listens)):
        assert one.address
        one.signal(number)
        result = _ended(one, "failed")
        assert "interrupted" in result["error"]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("who", ["source", "dest"])
def test_before_the_decision(side: Start, who: str, number: signal.Signals) -> None:
    """The machine stays at the source, which goes on with it when it is not the one that ends."""
    dest = side("dest", "--json", "--listen", "127.0.0.1:0")
    source = side("source", "--json", *RV64, "--connect", dest.address, "--migrate-after", "600")
    source.wait_status("active")
    dest.wait_status("active")
    one = source if who == "source" else dest
    one.signal(number)
    if who == "source":
        _ended(source, "cancelled")
        dest.wait_for_errors("waiting for the next one")
        return
    _ended(dest, "cancelled")
    failed = source.wait_for("failure", lambda line: line["event"] == "migration-ended")
    later = source.wait_for(
        "progress", lambda line: line["event"] == "progress" and line["elapsed-ms"] > failed["elapsed-ms"]
    )
    source.operations_after(later)
    source.signal(number)
    _ended(source, "failed")


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM], SIGNALS], ids=["SIGINT", "SIGTERM", "both"])
@pytest.mark.parametrize("who", ["source", "dest"])
def test_one_signal_after_the_decision(
    side: Start, operator: Callable[[str], Any], tmp_path: Path, who: str, numbers: list[signal.Signals]
) -> None:
    """It says what is still needed, and how to insist; and sees it through. Signals that come together are one."""
    sides = _moving(side, tmp_path / "s")
    one = sides[who]
    _signal_together(one, *numbers)
    missing = {"source": "the destination has not received all of the memory", "dest": "MiB have not arrived"}[who]
    one.wait_for_errors(missing)
    # Of signals that come together either is taken first: each of two threads may get one.
    by = "Ctrl-C" if numbers == [signal.SIGINT] else "SIGTERM" if numbers == [signal.SIGTERM] else ""
    one.wait_for_errors(f"{by} again within 10 s")
    if who == "source":
        one.wait_for_errors(f"`postcopy ctl --control {tmp_path / 's'} quit --force`")
    _goes_on(one)
    _quickly(operator)
    _ended(sides["source"], "completed", exit_status=0)
    sides["dest"].wait_status("completed")
    if who == "source":
        sides["dest"].signal(numbers[0])
    assert _ended(sides["dest"], "completed", exit_status=0)["verified"] is True


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("who", ["source", "dest"])
def test_insisting_after_the_decision(side: Start, tmp_path: Path, who: str, number: signal.Signals) -> None:
    """It is ended as it was asked for; what it has is in its salvage, and the other side keeps the rest, paused. There
    one signal is enough: what is there is not lost, but written."""
    salvages = {name: ("--salvage", tmp_path / name) for name in ("source", "dest")}
    sides = _moving(side, tmp_path / "s", *salvages["source"], to=salvages["dest"])
    one, other = sides[who], sides["dest" if who == "source" else "source"]
    one.abandon(number)
    assert "abandoned: " in _ended(one, "postcopy-paused")["error"]
    assert (tmp_path / who / "manifest.json").exists()
    other.wait_status("postcopy-paused")
    other.wait_for_errors("PAUSED")
    other.signal(number)
    # A source that calls again in time is told by the destination that it has ended.
    _ended(other, "postcopy-paused", "postcopy-failed")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "dest"}


@pytest.mark.parametrize("listens", ["source", "dest"])
@pytest.mark.parametrize("who", ["source", "dest"])
def test_a_signal_while_the_peer_is_lost(side: Start, tmp_path: Path, who: str, listens: str) -> None:
    """The machine's memory is kept until the signal is sent again."""
    sides = _moving(side, tmp_path / "s", listens=listens)
    lost = sides.pop("dest" if who == "source" else "source")
    (one,) = sides.values()
    lost.signal(signal.SIGKILL)
    one.wait_status("postcopy-paused")
    one.abandon()
    _ended(one, "postcopy-paused")


def test_quit_by_force(side: Start, operator: Callable[[str], Any], tmp_path: Path) -> None:
    sides = _moving(side, tmp_path / "s")
    assert "say quit --force" in operator("s").ask("quit", status=1)[1]
    sides["source"].signal(signal.SIGTERM)
    sides["source"].wait_for_errors("again within")
    operator("s").ask("quit", "--force")
    _ended(sides["source"], "postcopy-paused")


@pytest.mark.parametrize("number", SIGNALS)
def test_when_all_of_it_is_there(side: Start, number: signal.Signals) -> None:
    """A destination without a time to run is ended so, and that is how it succeeds."""
    dest = side("dest", "--json", "--listen", "127.0.0.1:0")
    source = side("source", "--json", *RV64, "--connect", dest.address)
    _ended(source, "completed", exit_status=0)
    dest.wait_status("completed")
    dest.signal(number)
    assert _ended(dest, "completed", exit_status=0)["verified"] is True


def test_before_it_has_run_for_as_long_as_it_should(side: Start) -> None:
    dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--run-for", "600")
    source = side("source", "--json", *RV64, "--connect", dest.address)
    _ended(source, "completed", exit_status=0)
    dest.wait_status("completed")
    dest.signal(signal.SIGTERM)
    assert "interrupted before it had run here for 600 s" in _ended(dest, "completed")["error"]


@pytest.mark.parametrize("who", ["source", "dest"])
def test_a_signal_at_any_instant(side: Start, who: str) -> None:
    """Around COMMIT: the machine stays where it was, and that is told; or all of it arrives. It is never in between."""
    seed = int(os.environ.get("POSTCOPY_SEED", "0"), 0) or secrets.randbits(32)
    print(f"POSTCOPY_SEED={seed}")
    choose = random.Random(seed)
    for _ in range(4):
        dest = side("dest", "--json", "--listen", "127.0.0.1:0")
        source = side(
            "source", "--json", *RV64, "--max-bandwidth", "64MiB/s", "--connect", dest.address, "--migrate-after", "0.1"
        )
        source.wait_status("active")
        time.sleep(choose.uniform(0, 0.4))  # the instant is what is tested
        one = source if who == "source" else dest
        _signal_together(one, *choose.choice([[signal.SIGINT], [signal.SIGTERM], SIGNALS]))
        status, result, errors = one.end()
        assert "again within" not in errors or status == 0, errors
        if status == 0:
            assert result["status"] == "completed"
            _ended(source, "completed", exit_status=0)
            dest.signal(signal.SIGTERM)
            assert _ended(dest, "completed", exit_status=0)["verified"] is True
        elif who == "source":
            assert result["status"] == "cancelled"
            dest.wait_for_errors("waiting for the next one")
        else:
            assert result["status"] == "cancelled"
            failed = source.wait_for(
                "failure", lambda line: line["event"] == "progress" and line["status"] in ("failed", "cancelled")
            )
            source.operations_after(failed)


def test_a_daemon_names_the_machines_that_end_with_it(side: Start, tmp_path: Path) -> None:
    daemon = side("daemon", "--json", "--control", tmp_path / "d", *RV64, "--name", "vm1")
    daemon.wait_for("vm1", lambda line: line["event"] == "machine-started")
    daemon.signal(signal.SIGTERM)
    status, _, errors = daemon.end()
    assert status == 0
    assert "machines that end with this process: vm1" in errors


def test_an_image_can_be_had_again(side: Start, tmp_path: Path) -> None:
    """Nothing is lost with a copy of a file: one signal ends either side, which says that it was interrupted."""
    image = tmp_path / "image"
    image.write_bytes(os.urandom(8 << 20))
    what = ("--machine", "image", "--image", image, "--max-bandwidth", "64KiB/s", "--listen", "127.0.0.1:0")
    source = side("source", "--json", *what, "--serve", "forever")
    for _ in range(2):
        dest = side("dest", "--json", "--connect", source.address)
        dest.wait_status("postcopy-active")
    dest.signal(signal.SIGINT)
    assert "interrupted" in _ended(dest, "postcopy-paused")["error"]
    source.signal(signal.SIGINT)
    assert source.end()[0] == 0  # which is how one that serves for ever ends


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_while_the_first_one_is_followed(side: Start, number: signal.Signals) -> None:
    """Nothing is lost by it: it says nothing, and ends, whenever the next one comes."""
    dest = side("dest", "--json", "--listen", "127.0.0.1:0")
    source = side("source", "--json", *RV64, "--connect", dest.address, "--migrate-after", "600")
    source.wait_status("active")
    while not source.events("result"):
        source.signal(number)
    for _ in range(1000):
        source.signal(number)
    _ended(source, "cancelled")


# ---- a closed terminal


class Terminal:
    """`postcopy` at a terminal of its own, as its session's leader, as a login shell's command is."""

    def __init__(self, *arguments: Any) -> None:
        self.master, slave = pty.openpty()

        def take_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [*POSTCOPY, *map(str, arguments)],
            stdin=slave, stdout=slave, stderr=slave, preexec_fn=take_terminal,
        )  # fmt: skip
        os.close(slave)

    def wait_for(self, text: str) -> None:
        os.set_blocking(self.master, False)
        shown, deadline = b"", time.monotonic() + DEADLINE_S
        while text.encode() not in shown:
            assert time.monotonic() < deadline, shown[-2000:]
            try:
                shown += os.read(self.master, 65536)
            except BlockingIOError:
                time.sleep(0.01)

    def close(self) -> None:
        """The kernel sends SIGHUP, and every write is EIO from now on."""
        if self.master >= 0:
            os.close(self.master)
            self.master = -1


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def make(*arguments: Any) -> Terminal:
        made.append(Terminal(*arguments))
        return made[-1]

    yield make
    for one in made:
        one.process.kill()
        one.process.wait()
        one.close()


@pytest.mark.parametrize("who", ["source", "dest"])
def test_closed_terminal(
    terminal: Callable[..., Terminal], side: Start, operator: Callable[[str], Any], tmp_path: Path, who: str
) -> None:
    """In the middle of a migration, with the live view on it: it goes on without the terminal, to the end."""
    sockets = {name: ("--control", tmp_path / name[0]) for name in ("source", "dest")}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    to = ("dest", "--listen", f"127.0.0.1:{port}", *sockets["dest"])
    source = ("source", *LARGE, *sockets["source"], "--connect", f"127.0.0.1:{port}")
    if who == "dest":
        shown = terminal(*to)
        shown.wait_for("listening")
        other = side(*source, "--json")
    else:
        other = side(*to, "--json")
        assert other.address
        shown = terminal(*source)
    other.wait_status("postcopy-active")
    at = operator(who[0])
    at.wait("it", lambda here: any(one["migration"]["status"] == "postcopy-active" for one in here.values()))
    shown.close()
    _goes_on(other)
    assert shown.process.poll() is None
    _quickly(operator)
    if who == "dest":
        assert other.end()[0] == 0
        at.wait("end", lambda here: here["rv64"]["migration"]["status"] == "completed")
        assert shown.process.poll() is None
        at.ask("quit")
    assert shown.process.wait(DEADLINE_S) == 0
    if who == "source":
        other.wait_status("completed")


def test_closed_terminal_of_a_daemon(
    terminal: Callable[..., Terminal], operator: Callable[[str], Any], tmp_path: Path
) -> None:
    daemon = terminal("daemon", "--control", tmp_path / "d", *RV64, "--name", "x")
    daemon.wait_for("1 machine")
    daemon.close()
    at = operator("d")
    before = at.machines()["x"]["guest"]["operations"]
    at.wait("work", lambda here: here["x"]["guest"]["operations"] > before)
    assert daemon.process.poll() is None
    daemon.process.send_signal(signal.SIGHUP)
    at.wait("work", lambda here: here["x"]["guest"]["operations"] > before)
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("before", [(), ("nohup",)], ids=["plain", "nohup"])
def test_hangup_before_anybody_has_come(side: Start, before: tuple[str, ...]) -> None:
    for arguments in (("source", *RV64), ("dest",)):
        one = side(*arguments, "--json", "--listen", "127.0.0.1:0", command=(*before, *POSTCOPY))
        assert one.address
        for _ in range(3):
            one.signal(signal.SIGHUP)
        one.signal(signal.SIGTERM)
        _ended(one, "failed")


def test_hangup_ends_what_keeps_nothing(side: Start) -> None:
    proxy = side("chaos", "none", "--json", "--listen", "127.0.0.1:0", "--to", "127.0.0.1:1")
    assert proxy.address
    proxy.signal(signal.SIGHUP)
    assert proxy.end()[0] == 0


# ---- a service manager


@pytest.mark.parametrize("who", ["source", "dest"])
def test_what_systemd_does(
    side: Start, operator: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """`systemctl stop`: SIGTERM, then SIGKILL when the time is over that the process has not extended."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(DEADLINE_S)
        at_source, at_dest = ("--control", tmp_path / "s"), ("--control", tmp_path / "d")
        where = {name: str(tmp_path / "notify") if name == who else "" for name in ("source", "dest")}
        monkeypatch.setenv("NOTIFY_SOCKET", where["dest"])
        dest = side("dest", "--json", "--listen", "127.0.0.1:0", *at_dest)
        address = dest.address
        monkeypatch.setenv("NOTIFY_SOCKET", where["source"])
        source = side("source", "--json", *LARGE, "--connect", address, *at_source)
        sides = {"source": source, "dest": dest}
        for one in sides.values():
            one.wait_status("postcopy-active")
        operator("s").ask("migrate-pause")  # it takes as long as the test does
        for one in sides.values():
            one.wait_status("postcopy-paused")
        sides[who].signal(signal.SIGTERM)

        def until(begin: bytes, holds: bytes = b"") -> bytes:
            while not ((said := manager.recv(4096)).startswith(begin) and holds in said):
                pass
            return said

        until(b"STOPPING=1")
        extended_us = int(until(b"EXTEND_TIMEOUT_USEC=").partition(b"=")[2])
        assert extended_us >= 30e6
        until(b"STATUS=ending, still needed: ")
        until(b"EXTEND_TIMEOUT_USEC=")  # again, as long as it takes
        operator("s").ask("migrate-recover")
        _quickly(operator)
        _ended(source, "completed", exit_status=0)
        if who == "source":
            dest.wait_status("completed")
            dest.signal(signal.SIGTERM)
        assert _ended(dest, "completed", exit_status=0)["verified"] is True
