# SPDX-License-Identifier: Apache-2.0
"""More of everything than anybody needs: memory and the time of other machines stay bounded."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hostile import _wire as wire
from hostile._peer import Closed, Destination, Line, Listener, Machine, Neighbour, Source
from hostile._program import MIB, RV64, Control, Program, Pulse

Start = Callable[..., Program]
Daemon = Callable[..., tuple[Program, Control]]
Beside = Callable[[Program, Control], Neighbour]

GROWTH_BYTES = 64 * MIB
"""What any number of unproven peers may cost at the same time, a few messages in buffers among it."""
LATENCY_S = 2.0
"""How long a client may wait meanwhile, with both cores busy."""
FLOOD_S = 2.0


def text(value: str) -> bytes:
    return bytes([0xA0 + len(value)]) + value.encode()


def bomb(kind: str, field: str, value: bytes) -> bytes:
    """The largest message there may be, whose `field` is `value`, again and again in lists of 4096."""
    room = wire.MAX_MESSAGE_BYTES - 200
    inner = b"\xdc\x10\x00" + value * 4096
    outer = max(1, min(4096, room // len(inner)))
    return b"\x82" + text("type") + text(kind) + text(field) + b"\xdc" + struct.pack(">H", outer) + inner * outer


def nested(kind: str, field: str, opening: bytes, depth: int) -> bytes:
    return b"\x82" + text("type") + text(kind) + text(field) + opening * depth + b"\xc0"


BOMBS: dict[str, Callable[[], bytes]] = {
    "empty lists": lambda: bomb("offer", "config", b"\x90"),
    "empty maps": lambda: bomb("offer", "config", b"\x80"),
    "numbers": lambda: bomb("offer", "blocks", b"\x2a"),
    "short texts": lambda: bomb("ping", "nonce", b"\xa3abc"),
    "deep lists": lambda: nested("offer", "config", b"\x91", 1_000_000),
    "deep maps": lambda: nested("offer", "config", b"\x81\xa1x", 500_000),
    "a map of many": lambda: (
        b"\xdf\x00\x40\x00\x00" + b"".join(b"\xa4" + struct.pack(">I", n) + b"\xc0" for n in range(10**6))
    ),
    "one text": lambda: b"\x81" + text("type") + b"\xdb" + struct.pack(">I", 15 << 20) + b"x" * (15 << 20),
    "an endless list": lambda: b"\xdd\xff\xff\xff\xff" + b"\xc0" * (8 << 20),
    "an extension": lambda: b"\xc9" + struct.pack(">I", 12 << 20) + b"\x05" * ((12 << 20) + 1),
}


@pytest.mark.parametrize("what", BOMBS)
def test_messages_that_unfold(daemon: Daemon, neighbour: Beside, version: int, what: str) -> None:
    program, control = daemon()
    beside = neighbour(program, control)
    message = wire.frame_message(BOMBS[what]())
    lines = []
    before = program.forget_peak()
    with Pulse(control) as pulse:
        for _ in range(4):
            line = Line.open(program.address, version)
            line.greet("control", "source")
            lines.append(line)
            with contextlib.suppress(Closed):
                line.send(message)
        for line in lines:
            assert line.closed_within(30), "it is still listened to"
    pulse.check(LATENCY_S)
    grown = program.peak_bytes() - before
    assert grown < GROWTH_BYTES, f"{grown / MIB:.0f} MiB for {what}"
    beside.finish()


def test_a_message_that_never_ends(daemon: Daemon, version: int) -> None:
    """Announced as large as may be, on many connections, and then nothing comes, or a byte at a time."""
    program, _ = daemon("d", "--heartbeat", "0.2")
    before = program.forget_peak()
    lines = []
    for _ in range(12):
        line = Line.open(program.address, version)
        line.greet("control", "source")
        with contextlib.suppress(Closed):
            line.send(struct.pack(">II", wire.MAX_MESSAGE_BYTES, 0) + bytes(100))
        lines.append(line)
    assert all(line.closed_within(60) for line in lines)
    assert program.peak_bytes() - before < GROWTH_BYTES


def flood(line: Line, data: bytes, seconds: float = FLOOD_S, limit_bytes: int = 1 << 40) -> int:
    """So much of it until the other side ends the connection. How many bytes it has taken."""
    data *= max(1, (256 << 10) // len(data))
    sent = 0
    line.sock.settimeout(seconds)
    deadline = time.monotonic() + seconds
    with contextlib.suppress(Closed, OSError):
        while time.monotonic() < deadline and sent < limit_bytes:
            line.send(data)
            sent += len(data)
    return sent


FRAMES: dict[str, Callable[[], wire.Frame]] = {
    "end": lambda: wire.Frame(wire.END, 0, 0, 0),
    "error": lambda: wire.Frame(wire.ERROR, 0, 5, 1, 7, b"no " * 200, wire.ANSWERS),
    "error that answers nothing": lambda: wire.Frame(wire.ERROR, 0, 5, 1, 7, b"x"),
    "a page again and again": lambda: wire.Frame(wire.PAGES, 0, 5, 1, 0, bytes(range(256)) * 16),
    "answers without a request": lambda: wire.Frame(wire.PAGES, 0, 5, 1, 7, b"\1" * 4096, wire.ANSWERS),
    "zeros": lambda: wire.Frame(wire.ZERO, 0, 0, 2048),
    "a request to the one who asks": lambda: wire.Frame(wire.REQUEST, 0, 5, 1, 7),
}


@pytest.mark.parametrize("channel", ["bulk", "urgent"])
@pytest.mark.parametrize("what", FRAMES)
def test_frames_without_end(
    daemon: Daemon, neighbour: Beside, version: int, rv64: Machine, what: str, channel: str
) -> None:
    """To a destination that runs the machine. Its own migration may be lost by that; no other one may be slowed."""
    program, control = daemon()
    beside = neighbour(program, control)
    source = Source(program.address, rv64, version).until("running")
    line = (source.bulk if channel == "bulk" else source.urgent)[0]
    before = program.forget_peak()
    with Pulse(control) as pulse:
        sent = flood(line, FRAMES[what]().pack())
    pulse.check(LATENCY_S)
    grown = program.peak_bytes() - before
    # Pages of the machines themselves come in meanwhile.
    assert grown < GROWTH_BYTES, f"{grown / MIB:.0f} MiB after {sent / MIB:.0f} MiB of frames"
    beside.finish()
    source.lose()
    assert program.alive()


def test_requests_without_end(start: Start, version: int, tmp_path: Path) -> None:
    """To a source, by a destination that does not read the answers."""
    (tmp_path / "image").write_bytes(os.urandom(4 * MIB))
    image = ("--machine", "image", "--image", tmp_path / "image", "--serve", "forever", "--control", tmp_path / "s")
    source = start("source", "--json", *image, "--listen", "127.0.0.1:0")
    greedy = [Destination.connect(source.address, version).until("run") for _ in range(3)]
    before = source.forget_peak()
    with Pulse(Control(tmp_path / "s")) as pulse:
        for dest in greedy:
            flood(dest.urgent[0], wire.Frame(wire.REQUEST, 0, 3, 1, 9).pack(), 2.0)
        honest = start("dest", "--json", "--connect", source.where, "--dump", tmp_path / "copy")
        assert honest.end() == 0, honest.tail()
    pulse.check(LATENCY_S)
    assert source.peak_bytes() - before < GROWTH_BYTES
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "image").read_bytes()


@pytest.mark.parametrize("kind", ["ping", "pong", "placed"])
def test_control_messages_without_end(start: Start, version: int, tmp_path: Path, kind: str) -> None:
    """To a source, by a destination that does not read: pongs must not pile up, nor delay anything."""
    (tmp_path / "image").write_bytes(os.urandom(4 * MIB))
    image = ("--machine", "image", "--image", tmp_path / "image", "--serve", "forever", "--control", tmp_path / "s")
    source = start("source", "--json", *image, "--listen", "127.0.0.1:0")
    line = Line.open(source.address, version)
    line.greet("control", "dest")
    message = (
        wire.message("placed", {"block": 0, "first-page": 0, "pages": 1, "runs": wire.all_pages(1)})
        if kind == "placed"
        else wire.message(kind, {"nonce": 1})
    )
    before = source.forget_peak()
    with Pulse(Control(tmp_path / "s")) as pulse:
        flood(line, message)
    pulse.check(LATENCY_S)
    assert source.peak_bytes() - before < GROWTH_BYTES
    line.reset()
    honest = start("dest", "--json", "--connect", source.where)
    assert honest.end() == 0, honest.tail()


def test_connections_without_end(daemon: Daemon, neighbour: Beside, version: int) -> None:
    """Opened and left, as fast as it goes; and as many as there may be, kept open."""
    program, control = daemon()
    beside = neighbour(program, control)
    before = program.descriptors()
    with Pulse(control) as pulse:
        deadline = time.monotonic() + FLOOD_S
        while time.monotonic() < deadline:
            line = Line.open(program.address, version)
            line.greet("control", "source")
            line.reset()
        kept = []
        for _ in range(400):
            line = Line.open(program.address, version)
            with contextlib.suppress(Closed):
                line.send(wire.preamble(version))
            kept.append(line)
        kept[-1].take(8)  # all have been accepted
        assert program.descriptors() < before + 300  # 256 may be in a handshake
    pulse.check(LATENCY_S)
    for line in kept:
        line.reset()
    beside.finish()
    assert program.alive()


def test_a_source_that_takes_no_answers(daemon: Daemon, neighbour: Beside, version: int) -> None:
    """A real one whose peer asks for every page and reads none: it is not blocked for others."""
    program, control = daemon("d", *RV64, "--name", "x")
    with Listener(version) as listener:
        control.begin("migrate", machine="x", to=listener.where)
        dest = listener.destination().until("run")
        with Pulse(control) as pulse:
            flood(dest.urgent[0], wire.Frame(wire.REQUEST, 0, 3, 1, 9).pack(), 2.0)
            beside = neighbour(program, control)
            beside.finish()
        pulse.check(LATENCY_S)
