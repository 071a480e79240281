# SPDX-License-Identifier: Apache-2.0
"""A source that gives its memory back as the destination acknowledges it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from postcopy import wire as p
from postcopy.dataplane.pager import ChannelKind, EventType
from postcopy.errors import ConfigurationError, CoreError
from postcopy.memory import Memory
from postcopy.memory.bitmap import Bitmap
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.wire import State
from tests.unit.migration._engines import (
    PAGES,
    UNIT,
    FakeLink,
    FakeMachine,
    FakeServer,
    Meeting,
    Peer,
    bits,
    lone_destination,
    lone_source,
    make_pair,
    recover,
    running,
)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.slow
async def test_destination_tells_what_has_arrived(wanted: bool) -> None:
    """Once, only what the source does not know already, and only where the source has asked."""
    async with lone_destination(placed_every_ms=200 * wanted) as (peer, dest, _):
        # The first page of block 0 is known to be zero; the pager has five pages of each from the block's number on.
        await peer.say(p.PageMap(0, 0, PAGES, bits(PAGES, (1, PAGES - 1)).rle_encode()))
        await peer.say(p.PageMap(1, 0, 2 * PAGES, Bitmap.full(2 * PAGES).rle_encode()))
        await peer.say(p.Switchover(b"state", 2))
        await peer.read(p.Prepared)
        await peer.say(p.Commit())
        await peer.read(p.Running)
        if wanted:
            for block, pages, runs in ((0, PAGES, (1, 4)), (1, 2 * PAGES, (1, 5))):
                told = await peer.read(p.Placed)
                assert told.block == block
                placed = Bitmap.rle_decode(told.runs, told.pages)
                assert [(told.first_page + first, count) for first, count in placed.runs()] == [runs]
                assert told.first_page + told.pages <= pages
        for _ in range(2):  # nothing is told twice: `read` takes pings only
            await peer.read(p.Ping)
            await peer.say(p.Ping(1))
        assert dest.state is State.POSTCOPY


async def test_released_as_acknowledged() -> None:
    """The whole way with both sides: what the destination has is freed, a moment later, and then all of it."""
    pair = make_pair(release_ram=True)
    pair.machine.memories[0].write(0, b"x" * PAGES * UNIT)
    pair.machine.memories[1].write(0, b"x" * 2 * PAGES * UNIT)
    async with running(pair):
        await pair.move()
        server = pair.servers[0]
        await server.until_gone(2)
        assert server.gone == {0: bits(PAGES, (0, 5)), 1: bits(2 * PAGES, (1, 5))}
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is State.COMPLETED
    assert server.gone == {0: Bitmap.full(PAGES), 1: Bitmap.full(2 * PAGES)}
    assert server.log == ["disconnected", "closed"]
    assert [kept.count() for kept in pair.source.kept()] == [0, 0]


async def test_lost_acknowledgement_is_in_the_received_maps_of_the_recovery() -> None:
    pair = make_pair(release_ram=True)
    pair.machine.memories[0].write(0, b"x" * PAGES * UNIT)
    pair.machine.memories[1].write(0, b"x" * 2 * PAGES * UNIT)
    async with running(pair):
        await pair.move()
        server = pair.servers[0]
        server.channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 0, "reset")
        await pair.until(lambda: pair.source.status == pair.dest.status == "postcopy-paused")
        assert not server.gone  # nothing was acknowledged in time
        pair.meeting.open.set()
        await server.until_gone(2)
        # All that the pager has; zero pages are among what the page map had told.
        assert server.gone == {0: bits(PAGES, (0, 5)), 1: bits(2 * PAGES, (1, 5))}
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is pair.dest.state is State.COMPLETED


@pytest.mark.parametrize("keeps_its_word", [True, False])
async def test_recovery_after_release(keeps_its_word: bool) -> None:
    """A destination that comes back without what it had acknowledged is refused by name, once and for all: what was
    given back is nowhere. One that has it is served."""
    meeting, server = Meeting(), FakeServer(0)
    meeting.open.set()
    async with lone_source(meeting, server) as (peer, source, machine):
        await peer.commit()
        await peer.say(p.Running(5))
        first = 3 if keeps_its_word else 2
        await peer.say(p.Placed(0, first, 5, bits(5, (0, 5)).rle_encode()))
        await server.until_gone(1)
        assert server.gone == {0: bits(PAGES, (first, 5))}
        await trio.aclose_forcefully(peer.stream)
        await source.paused.wait()
        for attempt in range(3 if keeps_its_word else 1):
            again = Peer(await meeting.join())
            for message in recover(5):  # which has pages 3 to 7
                await again.say(message)
            if keeps_its_word:
                await again.read(p.Recovered)
                if attempt == 2:
                    await again.say(p.Complete({}))
                    await again.read(p.CompleteAck)
                await again.stream.aclose()
                continue
            while await again.stream.receive_some():
                pass
            assert source.state is State.PAUSED
            assert "the received map of block 0 lacks 1 pages that were acknowledged as placed" in str(source.failure)
            assert "the first of them page 2" in str(source.failure)
            assert not server.received
            await again.stream.aclose()
            with trio.fail_after(10):
                await source._until(lambda: source.status == "postcopy-failed")
    assert source.state is (State.COMPLETED if keeps_its_word else State.PAUSED)
    assert machine.resumed == 0
    if not keeps_its_word:
        assert source.kept() == [bits(PAGES, (2, 5)).inverted(), Bitmap.full(2 * PAGES)]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (p.Placed(2, 0, 1, b"\x00\x01"), "placed: there is no block 2"),
        (p.Placed(0, PAGES, 1, b"\x00\x01"), "placed: block 0 has 40 pages only"),
        (p.Placed(0, 2**63 - 1, 1, b"\x00\x01"), "placed: block 0 has 40 pages only"),
        (p.Placed(0, 0, 5, b"\x00\x06"), "malformed page map"),
    ],
)
async def test_acknowledgement_of_what_there_is_not(message: p.Message, reason: str) -> None:
    server = FakeServer(0)
    async with lone_source(None, server) as (peer, source, _):
        await peer.commit()
        await peer.say(p.Running(5))
        await peer.say(message)
        await source.paused.wait()
        assert reason in str(source.failure)
        assert not server.gone


@pytest.mark.slow
async def test_memory_that_cannot_be_given_back() -> None:
    """The migration goes on, and the memory is kept."""
    server = FakeServer(0)
    server.release_error = CoreError(1, "giving memory back")
    async with lone_source(None, server) as (peer, source, _):
        await peer.commit()
        await peer.say(p.Running(5))
        for _ in range(2):
            await peer.say(p.Placed(0, 0, 5, b"\x00\x05"))
            await peer.read(p.Ping)
        await peer.say(p.Complete({}))
        await peer.read(p.CompleteAck)
    assert source.state is State.COMPLETED
    assert not server.gone


async def test_a_file_is_never_released(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * PAGES * UNIT)
    machine = FakeMachine()
    machine.memories.append(Memory.from_file(image))
    here, there = socket.socketpair()
    with pytest.raises(
        ConfigurationError, match="--release-ram: the memory of a machine of kind fake is a file of yours"
    ):
        SourceMigration(machine, FakeLink(here), SourceOptions(release_ram=True))
    there.close()
    here.close()
    await machine.close()
