# SPDX-License-Identifier: Apache-2.0
"""Chance against real processes. Each test prints its seed: POSTCOPY_SEED=N repeats it, POSTCOPY_FUZZ_SECONDS says
how long each goes on.

After every round the process lives and answers; at the end its memory is bounded, it has shown no traceback, and a
machine that was on its way meanwhile has arrived whole.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hostile import _fuzz as fuzz
from hostile._peer import Closed, Destination, Listener, Machine, Neighbour, Refused, Source, calling_from, close_all
from hostile._program import MIB, Control, Program, Refusal, wait_until

Start = Callable[..., Program]
Daemon = Callable[..., tuple[Program, Control]]
Beside = Callable[[Program, Control], Neighbour]
SECONDS = float(os.environ.get("POSTCOPY_FUZZ_SECONDS", "2.5"))
GROWTH_BYTES = 128 * MIB
ANSWER_S = 10.0

pytestmark = pytest.mark.timeout(SECONDS + 180)


def rounds(program: Program, control: Control, one: Callable[[], None]) -> None:
    """As many as there is time for."""
    before = program.forget_peak()
    deadline = time.monotonic() + SECONDS
    count = 0
    while time.monotonic() < deadline:
        with calling_from(f"127.1.{count >> 8 & 255}.{count & 255}"):  # one peer may not come to nothing so often
            one()
        count += 1
        control.machines(ANSWER_S)
        program.check()
    grown = program.peak_bytes() - before
    print(f"{count} rounds, {grown / MIB:.0f} MiB more at most")
    assert grown < GROWTH_BYTES


def test_sessions_of_a_source(
    daemon: Daemon, start: Start, neighbour: Beside, version: int, rv64: Machine, seeded: random.Random
) -> None:
    program, control = daemon("d", "--heartbeat", "0.5", "--recover-for", "1")
    beside = neighbour(program, control)

    def one() -> None:
        fuzz.source_session(seeded, program.address, rv64, version)
        forget(control, beside.name)

    rounds(program, control, one)
    beside.finish(start)


def forget(control: Control, spared: str) -> None:
    """Ends the machines that have come by chance."""
    for name in control.machines(ANSWER_S):
        if name != spared:
            with contextlib.suppress(Refusal):
                control.ask("end", ANSWER_S, machine=name, force=True)


def test_sessions_of_a_destination(start: Start, version: int, tmp_path: Path, seeded: random.Random) -> None:
    (tmp_path / "image").write_bytes(seeded.randbytes(1 << 20))
    image = ("--machine", "image", "--image", tmp_path / "image", "--serve", "forever", "--control", tmp_path / "s")
    source = start("source", "--json", *image, "--listen", "127.0.0.1:0", "--heartbeat", "0.5")
    address = source.address
    rounds(source, Control(tmp_path / "s"), lambda: fuzz.destination_session(seeded, address, version))
    honest = start("dest", "--json", "--connect", source.where, "--dump", tmp_path / "copy")
    assert honest.end() == 0, honest.tail()
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "image").read_bytes()


def test_sessions_of_a_destination_of_a_machine(
    daemon: Daemon, start: Start, version: int, seeded: random.Random
) -> None:
    """A daemon that sends: whatever the destination does before COMMIT, the machine is where it was, or goes there."""
    program, control = daemon(
        "d", "--heartbeat", "0.5", "--recover-for", "1", "--machine", "rv64", "--memory", "16MiB", "--name", "x"
    )

    def one() -> None:
        with Listener(version) as listener:
            asked = control.begin("migrate", machine="x", to=listener.where)
            wait_until("a connection, or a refusal", lambda: listener.backlog() or not asked.is_alive())
            if not listener.backlog():
                return  # the one before is not quite over
            with contextlib.suppress(Closed, Refused, AssertionError, TimeoutError):
                dest = listener.destination()
                dest.until(seeded.choice(("offered", "accept", "ready", "handed")))
                for _ in range(seeded.randrange(1, 4)):
                    dest.control.line.send(fuzz.packed(seeded, seeded.choice(fuzz.OTHERS[:8])))
                dest.lose()
            with contextlib.suppress(Refusal, AssertionError):
                asked.answer(ANSWER_S)
        close_all()
        status = control.migration("x").get("status")
        if status in ("postcopy-paused", "postcopy-active", "postcopy-failed"):
            control.ask("reclaim", machine="x", force=True)  # by chance it had said `prepared`

    rounds(program, control, one)
    guest = control.machines()["x"]["guest"]
    assert (guest["state"], guest["failures"]) == ("running", 0)


def test_frames(
    daemon: Daemon, start: Start, neighbour: Beside, version: int, rv64: Machine, seeded: random.Random
) -> None:
    program, control = daemon("d", "--recover-for", "1")
    beside = neighbour(program, control)

    def one() -> None:
        fuzz.frames_session(seeded, Source(program.address, rv64, version).until("running"))
        forget(control, beside.name)

    rounds(program, control, one)
    beside.finish(start)


def test_frames_to_a_source(start: Start, version: int, tmp_path: Path, seeded: random.Random) -> None:
    (tmp_path / "image").write_bytes(seeded.randbytes(1 << 20))
    image = ("--machine", "image", "--image", tmp_path / "image", "--serve", "forever", "--control", tmp_path / "s")
    source = start("source", "--json", *image, "--listen", "127.0.0.1:0")

    def one() -> None:
        dest = Destination.connect(source.address, version).until("run")
        with contextlib.suppress(Closed, OSError):
            for _ in range(seeded.randrange(1, 40)):
                seeded.choice([*dest.urgent, *dest.bulk]).send(fuzz.frame(seeded))
        dest.lose()

    rounds(source, Control(tmp_path / "s"), one)
    honest = start("dest", "--json", "--connect", source.where)
    assert honest.end() == 0, honest.tail()


def test_control_socket(daemon: Daemon, start: Start, neighbour: Beside, seeded: random.Random) -> None:
    program, control = daemon("d")
    beside = neighbour(program, control)

    def one() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(control.path))
            client.settimeout(1.0)
            with contextlib.suppress(OSError):
                for _ in range(seeded.randrange(1, 8)):
                    client.sendall(fuzz.request(seeded) + b"\n")
                if seeded.random() < 0.5:
                    client.recv(65536)

    rounds(program, control, one)
    for name in control.machines():
        if name != beside.name:
            control.ask("end", machine=name, force=True)
    control.ask("set", max_bandwidth="none", recover_for="forever")
    beside.finish(start)


def test_command_line(start: Start, tmp_path: Path, node: Callable[[str, int], Path], seeded: random.Random) -> None:
    """Every command ends, or waits for a peer and ends by a signal; whatever is wrong is said in one line. What it
    names and is no file (`null` in VALUES) is not replaced."""
    null = node("null", 3)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        line = fuzz.command_line(seeded)
        program = start(*line, cwd=tmp_path)
        try:
            program.process.wait(3)
        except subprocess.TimeoutExpired:  # it waits for a peer
            program.signal(15)
        status = program.end(30)
        said = program.errors()
        if status == -15 and said.count("\n") == 1:
            continue  # on a busy host: the signal met the interpreter at its end, after what was wrong had been said
        assert status in (0, 1, 2), f"{line}: {status}\n{said}"
        if status == 2:
            assert said.count("\n") == 1, f"{line}:\n{said}"
        assert stat.S_ISCHR(os.lstat(null).st_mode), line
