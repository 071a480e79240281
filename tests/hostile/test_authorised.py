# SPDX-License-Identifier: Apache-2.0
"""Authorised peers that attack: a source that may send, a destination that may take. docs/security.md names the test
of each line; many of them are here."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tls

from hostile import _wire as wire
from hostile._peer import PAGE, Closed, Destination, Listener, Machine, Refused, Source, calling_from
from hostile._program import RV64, Control, Program, wait_until
from hostile._wire import Frame

Start = Callable[..., Program]
Daemon = Callable[..., tuple[Program, Control]]
OTHER = "127.0.0.2"


def rejected(source: Source) -> str:
    """The reason."""
    return "; ".join(said["reason"] for said in source.control.wait_closed())


def test_one_peer_does_not_take_all_places(daemon: Daemon, version: int, rv64: Machine) -> None:
    """Its sources wait, and show signs of life, for ever. Another one's machine comes through; theirs leave places when
    they go."""
    program, control = daemon()
    waiting = [Source(program.address, rv64, version).until("ready") for _ in range(16)]
    with pytest.raises(Refused, match="too many machines of this peer are on their way to here: 16"):
        Source(program.address, rv64, version).connect()
    with calling_from(OTHER):
        Source(program.address, rv64, version).until("running").finish()
    waiting.pop().lose()
    wait_until("a place", lambda: len(control.machines()) == 16)
    Source(program.address, rv64, version).until("ready")


def test_one_peer_does_not_take_all_places_of_an_image(start: Start, version: int, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(os.urandom(1 << 20))
    image = ("--machine", "image", "--image", tmp_path / "image", "--serve", "forever")
    source = start("source", "--json", *image, "--listen", "127.0.0.1:0")
    for _ in range(16):
        Destination.connect(source.address, version).until("offered")
    with pytest.raises(Refused, match="too many destinations"):
        Destination.connect(source.address, version)
    with calling_from(OTHER):
        Destination.connect(source.address, version).until("run").take_all()


def test_what_one_peer_may_have_here(daemon: Daemon, version: int, rv64: Machine) -> None:
    """It counts what has arrived, and what was committed and is lost."""
    program, _ = daemon("m", "--max-machines-per-peer", "2")
    Source(program.address, rv64, version).until("running").finish()
    Source(program.address, rv64, version).until("running").lose()
    with pytest.raises(Refused, match=r"this peer has 2 machines here already \(--max-machines-per-peer\)"):
        Source(program.address, rv64, version).connect()
    with calling_from(OTHER):
        Source(program.address, rv64, version).until("running").finish()


def test_a_peer_is_who_its_certificate_says(daemon: Daemon, start: Start) -> None:
    """Wherever it calls from; and who has another one is another peer, also from the same host."""
    vm1, vm2 = tls.site().issue("vm1", "vm1.example"), tls.site().issue("vm2", "vm2.example", "127.0.0.1")
    program, control = daemon("m", "--max-machines-per-peer", "1", "--tls", tls.site().issue("here", "127.0.0.1"))

    def send(directory: Path, name: str) -> Program:
        to = ("--connect", program.where, "--tls", directory, "--on-failure", "exit")
        return start("source", "--json", *RV64, *to)

    assert send(vm1, "a").end() == 0
    again = send(vm1, "b")
    assert again.end() == 1
    assert "this peer has 1 machines here already" in again.errors()
    assert send(vm2, "c").end() == 0
    assert len(control.machines()) == 2


def test_what_memory_one_peer_may_have_here(daemon: Daemon, version: int, rv64: Machine) -> None:
    size = sum(block["size-bytes"] for block in rv64.blocks)
    program, _ = daemon("m", "--max-memory-per-peer", f"{2 * size}B")
    Source(program.address, rv64, version).until("running").finish()
    Source(program.address, rv64, version).until("ready")
    assert "may have" in rejected(Source(program.address, rv64, version).until("offer"))
    with calling_from(OTHER):
        Source(program.address, rv64, version).until("ready")


def test_offers_for_nothing(daemon: Daemon, version: int, rv64: Machine) -> None:
    """Each would be a line in the log: after some of them one more is let in each second."""
    program, _ = daemon()
    image = Machine.image(1 << 20)

    def offer_again_and_again() -> None:
        for _ in range(400):
            source = Source(program.address, image, version).until("offer")
            rejected(source)
            source.control.close()

    with pytest.raises(Refused, match="come to nothing"):
        offer_again_and_again()
    said, began_s, let_in = program.error_bytes(), time.monotonic(), 0
    for _ in range(50):
        with contextlib.suppress(Refused):
            rejected(Source(program.address, image, version).until("offer"))
            let_in += 1
    assert let_in <= time.monotonic() - began_s + 5
    assert program.error_bytes() - said < (10 + let_in) * 400
    with calling_from(OTHER):
        Source(program.address, rv64, version).until("running").finish()


HOLD_S = 9.0  # less than a source waits for `prepared`


def test_a_destination_that_is_lost_in_each_pause(start: Start, version: int) -> None:
    """It takes the state, shows signs of life until just before the source would give up, and is lost; and that again
    and again. The machine does not stand still for ever: after some attempts it stays, and runs."""
    paused = 0

    def gone() -> bool:
        return source.errors().count("not begun again") > 0

    with Listener(version) as listener:
        source = start("source", "--json", *RV64, "--connect", listener.where)
        while paused < 10:
            wait_until("a connection, or the end", lambda: gone() or listener.backlog(), 60)
            if gone():
                break
            try:
                destination = listener.destination().until("handed")
            except Closed:  # it came to say that the last one has ended
                continue
            paused += 1
            threading.Event().wait(HOLD_S)
            destination.lose()
        source.operations_go_on()
    assert 3 <= paused < 10


def test_requests_for_what_is_not_offered(start: Start, version: int, tmp_path: Path) -> None:
    """A destination gets the pages of its blocks, and nothing else that the source has in its memory: not what is
    behind the end of a file, not another machine's."""
    content = os.urandom(5 * PAGE - 100)
    (tmp_path / "image").write_bytes(content)
    image = ("--machine", "image", "--image", tmp_path / "image", "--serve", "forever")
    source = start("source", "--json", *image, "--listen", "127.0.0.1:0")

    def answer_to(request: Frame) -> Frame | None:
        """None when the source hangs up."""
        with contextlib.closing(Destination.connect(source.address, version).until("run").urgent[0]) as urgent:
            urgent.send(request.pack())
            with contextlib.suppress(Closed):
                return urgent.take_frame()
        return None

    def request(block: int, page: int, pages: int = 1) -> Frame:
        return Frame(wire.REQUEST, block, page, pages, 7)

    last = answer_to(request(0, 4))
    assert last is not None
    assert last.payload == content[4 * PAGE :] + bytes(100)
    for what in (
        request(0, 5),
        request(0, 1 << 63),
        request(1, 0),
        request(0xFFFF, 0),
        request(0, 4, 2),
        request(0, 0, 1 << 31),
        request(0, 0, 0),
        Frame(wire.PAGES, 0, 0, 1, 7, bytes(PAGE), wire.ANSWERS),
        Frame(wire.END, 0, 0, 0),
    ):
        answer = answer_to(what)
        assert answer is None or answer.type == wire.ERROR, what
