# SPDX-License-Identifier: Apache-2.0
"""The peer of these tests does right what it does right: else what it does wrong would show nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import _wire as wire
from hostile._peer import Destination, Listener, Machine, Source
from hostile._program import RV64, Control, Program, verify

Start = Callable[..., Program]
Daemon = Callable[..., tuple[Program, Control]]


def test_checksum() -> None:
    assert wire.crc32c(b"123456789") == 0xE3069283  # RFC 3720, B.4
    data = bytes(range(256)) * 40
    assert wire.crc32c(data) == wire._update(0xFFFFFFFF, data) ^ 0xFFFFFFFF


def test_source(start: Start, tmp_path: Path, version: int) -> None:
    dest = start("dest", "--json", "--listen", "127.0.0.1:0", "--dump", tmp_path / "copy", "--no-verify")
    machine = Machine.image(1 << 20)
    Source(dest.address, machine, version).until("running").finish()
    assert dest.end() == 0, dest.tail()
    assert (tmp_path / "copy").read_bytes() == b"".join(machine.page(0, page) for page in range(256))


def test_source_that_is_lost(start: Start, tmp_path: Path, version: int) -> None:
    dest = start("dest", "--json", "--listen", "127.0.0.1:0", "--dump", tmp_path / "copy", "--no-verify")
    source = Source(dest.address, Machine.image(1 << 20), version).until("running")
    source.lose()
    dest.wait_status("postcopy-paused")
    source.come_back().recovered().finish()
    assert dest.end() == 0, dest.tail()
    assert (tmp_path / "copy").stat().st_size == 1 << 20


def test_machine_that_was_taken(daemon: Daemon, start: Start, version: int, rv64: Machine) -> None:
    """It computes on in a daemon, and everything that it has ever done can be replayed."""
    program, control = daemon()
    Source(program.address, rv64, version).until("running").finish()
    (name,) = control.machines()
    control.wait_status(name, "completed")
    verify(start, control, name)


def test_destination(start: Start, version: int) -> None:
    with Listener(version) as listener:
        source = start("source", "--json", *RV64, "--connect", listener.where)
        machine = listener.destination().until("run").take_all()
        assert source.end() == 0, source.tail()
    assert machine.kind == "rv64"
    assert len(machine.pages) > 1000


def test_destination_asks(start: Start, tmp_path: Path, version: int) -> None:
    content = bytes(range(256)) * 4096
    (tmp_path / "image").write_bytes(content)
    arguments: tuple[Any, ...] = ("--machine", "image", "--image", tmp_path / "image", "--listen", "127.0.0.1:0")
    source = start("source", "--json", *arguments)
    dest = Destination.connect(source.address, version).until("run")
    answer = dest.request(0, 7)
    assert (answer.type, answer.first_page, answer.payload) == (wire.PAGES, 7, content[7 * 4096 : 8 * 4096])
    dest.take_all()
    assert source.end() == 0
