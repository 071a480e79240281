# SPDX-License-Identifier: Apache-2.0
"""The output of the program is read late or never: no migration waits for that."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lines import parse_line

from hostile._program import DEADLINE_S, RV64, Control, Program, Pulse, verify, wait_until

Start = Callable[..., Program]
END_S = 25.0
"""How long an end may take that waits for no reader."""


class Stalled:
    """A pipe, as small as there are any and full already, whose reader does nothing until the test asks it to."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(self.writing, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.writing, b"\n" * 4096)
        os.set_blocking(self.writing, True)

    def read_all(self) -> bytes:
        """To its end, once the program has it alone."""
        self.leave()
        data = bytearray()
        while part := os.read(self.reading, 65536):
            data += part
        return bytes(data)

    def leave(self) -> None:
        if self.writing >= 0:
            os.close(self.writing)
            self.writing = -1

    def close(self) -> None:
        self.leave()
        os.close(self.reading)


@pytest.fixture
def stalled() -> Iterator[Callable[[], Stalled]]:
    with contextlib.ExitStack() as stack:

        def make() -> Stalled:
            pipe = Stalled()
            stack.callback(pipe.close)
            return pipe

        yield make


def free_port() -> str:
    """For a process that cannot say where it listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize("log", ["-v", "--log-json"])
def test_stalled_daemon(start: Start, stalled: Callable[[], Stalled], tmp_path: Path, log: str) -> None:
    """It takes a machine, answers, sends it away, and ends at SIGTERM."""
    out, err, address = stalled(), stalled(), free_port()
    more = ("-v",) if log == "-v" else ("--log-json", "--log-level", "debug")
    path = tmp_path / "d"
    program = start(
        "daemon",
        "--json",
        *more,
        "--control",
        path,
        "--listen",
        address,
        stdout=out.writing,
        stderr=err.writing,
    )
    control = Control(path)
    wait_until("control socket", path.exists)
    with Pulse(control) as pulse:
        source = start("source", "--json", *RV64, "--connect", address)
        assert source.end() == 0, source.tail()
        (name,) = control.machines()
        control.wait_status(name, "completed")
        verify(start, control, name)
        for _ in range(200):
            with contextlib.suppress(Exception):
                control.ask("end", machine="nobody")
    pulse.check(3.0)
    program.signal(signal.SIGTERM)
    assert program.end(END_S) == 0


@pytest.mark.parametrize("side", ["source", "dest"])
def test_stalled_side(start: Start, stalled: Callable[[], Stalled], tmp_path: Path, side: str) -> None:
    """The migration is completed, though neither can say so; the result is not lost when it is read at last."""
    out, err = stalled(), stalled()
    pipes = {"stdout": out.writing, "stderr": err.writing}
    if side == "source":
        dest = start("dest", "--json", "--listen", "127.0.0.1:0", "--run-for", "0")
        source = start("source", "--json", "-v", *RV64, "--connect", dest.where, **pipes)
        slow, quick = source, dest
    else:
        source = start("source", "--json", *RV64, "--listen", "127.0.0.1:0")
        dest = start("dest", "--json", "-v", "--connect", source.where, "--run-for", "0", **pipes)
        slow, quick = dest, source
    assert quick.end() == 0, quick.tail()
    said = out.read_all()
    err.read_all()
    assert slow.end() == 0
    lines = [parse_line(line) for line in said.split(b"\n") if line]
    assert [line["status"] for line in lines if line["event"] == "result"] == ["completed"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stalled_side_is_ended(
    start: Start, stalled: Callable[[], Stalled], tmp_path: Path, number: signal.Signals
) -> None:
    """A reader that reads nothing cannot keep a process from ending."""
    out, err = stalled(), stalled()
    path = tmp_path / "d"
    dest = start(
        "dest", "--json", "-v", "--listen", "127.0.0.1:0", "--control", path, stdout=out.writing, stderr=err.writing
    )
    wait_until("control socket", path.exists)
    dest.signal(number)
    assert dest.end(END_S) == 1


def test_closed_outputs(start: Start, tmp_path: Path) -> None:
    """Readers that have gone (EPIPE), and descriptors that were never there."""
    address = free_port()
    reading, writing = os.pipe()
    os.close(reading)
    dest = start(
        "dest",
        "--json",
        "-v",
        "--listen",
        address,
        "--control",
        tmp_path / "d",
        "--run-for",
        "0",
        stdout=writing,
        stderr=writing,
    )
    os.close(writing)
    wait_until("control socket", (tmp_path / "d").exists)
    source = start("source", "--json", *RV64, "--connect", address)
    assert source.end() == 0, source.tail()
    assert dest.end() == 0
    silent = start(
        "source", *RV64, "--connect", "127.0.0.1:1", "--json", before=["sh", "-c", 'exec "$0" "$@" >&- 2>&-']
    )
    assert silent.end() == 1


def test_terminal_that_hangs_up(start: Start, tmp_path: Path) -> None:
    """The terminal is closed: the destination goes on without it."""
    address = free_port()
    controlling, terminal = pty.openpty()
    try:
        dest = start(
            "dest",
            "--listen",
            address,
            "--control",
            tmp_path / "d",
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        )
    finally:
        os.close(terminal)
    wait_until("control socket", (tmp_path / "d").exists)
    os.close(controlling)  # writing there is EIO from now on
    source = start("source", "--json", *RV64, "--connect", address)
    assert source.end() == 0, source.tail()
    Control(tmp_path / "d").wait_status("rv64", "completed")
    Control(tmp_path / "d").ask("quit")
    assert dest.end() == 0


def test_full_disk_under_the_outputs(start: Start, tmp_path: Path, node: Callable[[str, int], Path]) -> None:
    """Every write is ENOSPC, as at /dev/full."""
    address = free_port()
    with open(node("full", 7), "wb") as full:
        dest = start(
            "dest",
            "--json",
            "-v",
            "--listen",
            address,
            "--control",
            tmp_path / "d",
            "--run-for",
            "0",
            stdout=full.fileno(),
            stderr=full.fileno(),
        )
    wait_until("control socket", (tmp_path / "d").exists)
    source = start("source", "--json", *RV64, "--connect", address)
    assert source.end() == 0, source.tail()
    assert dest.end(DEADLINE_S) == 0
