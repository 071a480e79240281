# SPDX-License-Identifier: Apache-2.0
"""Pager and page server, over loopback TCP in one process.

What touches missing memory runs in a child process with a deadline, over a pager in threads of that process and over
one in a process of its own.
"""

from __future__ import annotations

import dataclasses
import errno
import faulthandler
import os
import random
import signal
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from postcopy._native import ffi, lib
from postcopy.dataplane.compression import Compression, available
from postcopy.dataplane.pager import ChannelKind, Event, EventType, Pager, PagerStatistics, Stage
from postcopy.dataplane.pager_process import DEATHS_IN_A_ROW, ProcessPager
from postcopy.dataplane.pageserver import PageServer, PageServerStatistics
from postcopy.errors import BusyError, CoreError, MigrationError
from postcopy.memory import DirtyLog, Memory, page_bytes_of
from postcopy.memory.bitmap import Bitmap
from postcopy.migration.destination import AnyPager

pytestmark = pytest.mark.slow

PAGE = page_bytes_of("memfd")

PAGERS: dict[str, Callable[[], AnyPager]] = {"thread": Pager, "process": ProcessPager}
Passes = Callable[..., None]


def tcp_pair() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        two, _ = listener.accept()
        return one.detach(), two.detach()


def touch(memory: Memory, page: int) -> int:
    """CRC32C of a page, read by C without the GIL: faults where it is missing, in the calling thread."""
    address = ffi.cast("char *", memory.address + page * PAGE)
    return int(lib.pc_crc32c(0, address, PAGE))


async def touch_in_thread(memory: Memory, page: int) -> int:
    return await trio.to_thread.run_sync(touch, memory, page, abandon_on_cancel=True)


def fill(memory: Memory, pages: dict[int, bytes]) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(memory.size_bytes)
        for page, content in pages.items():
            file.seek(page * PAGE)
            file.write(content)
        file.flush()
        memory.load(file.fileno())


def content(pages: int, seed: int = 1) -> dict[int, bytes]:
    """Every third page has something in it."""
    source = random.Random(seed)
    return {page: source.randbytes(PAGE) for page in range(0, pages, 3)}


@dataclasses.dataclass
class Pair:
    source: Memory
    destination: Memory
    server: PageServer
    pager: AnyPager

    def connect_urgent(self) -> None:
        ours, theirs = tcp_pair()
        self.pager.attach_urgent(0, ours)
        self.server.attach_urgent(0, theirs)

    def connect_bulk(self) -> None:
        ours, theirs = tcp_pair()
        self.pager.attach_bulk(0, ours)
        self.server.attach_bulk(0, theirs)


@asynccontextmanager
async def pair(where: str, pages: int, *, kind: str = "memfd", present: bool = True) -> AsyncIterator[Pair]:
    """Armed memory beside its source, no channel yet."""
    source, destination = Memory.create("memfd", pages * PAGE), Memory.create(kind, pages * PAGE)
    fill(source, content(pages))
    async with PageServer() as server, PAGERS[where]() as pager:
        assert server.add_block(source) == pager.add_block(destination) == 0
        if present:
            server.set_present(0, source.present())
            pager.set_zero(0, source.present().inverted())
        assert pager.add_shard() == 0
        pager.arm(0, 0, 0, pages)
        await pager.confirm()
        yield Pair(source, destination, server, pager)
    source.close()
    destination.close()


async def next_event(events: AsyncIterator[Event], wanted: EventType) -> Event:
    async for event in events:
        if event.type is wanted:
            return event
    raise AssertionError("the stream of events has ended")


# ---- in the child


async def everything_arrives(where: str, kind: str, present: str) -> None:
    pages = 3000
    async with pair(where, pages, kind=kind, present=present == "present") as both:
        expected = [lib.pc_crc32c(0, bytes(page), PAGE) for page in (content(pages)[0], bytes(PAGE))]
        both.pager.track_thread(0, 0)
        both.connect_urgent()

        def tracked() -> list[int]:
            both.pager.track_thread(0, threading.get_native_id())
            return [touch(both.destination, page) for page in (0, 1)]

        # Requests wait until the source has been started.
        async with trio.open_nursery() as nursery:

            async def check_first() -> None:
                assert await trio.to_thread.run_sync(tracked) == expected

            nursery.start_soon(check_first)
            both.server.start()
        statistics = both.pager.statistics()
        assert statistics.demand_pages >= 1
        assert statistics.faults >= 2
        assert statistics.pending_faults == 0
        assert both.pager.received(0)[0]
        assert both.pager.latency(Stage.TOTAL).count >= 1
        assert 0 < both.pager.latency(Stage.RECEIVED).percentile(50) <= both.pager.latency().max_ns
        assert both.pager.blocktime_ns()[0] > 0

        both.connect_bulk()
        await next_event(both.pager.events(), EventType.COMPLETE)
        statistics = both.pager.statistics()
        assert statistics.resident_pages == statistics.total_pages == pages
        assert statistics.resident_bytes == statistics.total_bytes == pages * PAGE
        assert statistics.demand_pages + statistics.background_pages == len(content(pages))
        assert both.pager.received(0) == Bitmap.full(pages)
        await both.pager.disarm()
        assert both.destination.digest() == both.source.digest()
        # What is zero costs no memory.
        assert both.destination.resident_bytes() <= (len(content(pages)) + 1) * PAGE
        assert both.server.statistics().bytes_sent >= statistics.bytes_received


async def missing_pages_can_be_asked_for(where: str) -> None:
    async with pair(where, 600) as both:
        both.connect_urgent()
        both.server.start()
        assert both.pager.request_missing(10_000) > 0
        await next_event(both.pager.events(), EventType.COMPLETE)
        await both.pager.disarm()
        assert both.destination.digest() == both.source.digest()


async def rounds_before_the_rest(where: str) -> None:
    """Precopy: pushed while it is written, forgotten where it was, and the end of it as ever."""
    pages = 600
    async with pair(where, pages) as both:
        server, pager = both.server, both.pager
        with DirtyLog([both.source]) as dirty:
            both.connect_urgent()
            both.connect_bulk()
            for number, many in enumerate((1, 100, 1)):
                server.push()
                await next_event(server.events(), EventType.BULK_END)
                await next_event(pager.events(), EventType.BULK_END)
                assert pager.received(0) == Bitmap.full(pages)
                both.source.write(number * PAGE, bytes([number + 1]))
                both.source.write(400 * PAGE, b"new" * (many * PAGE // 3))
                stale = dirty.collect(0)
                assert list(stale.runs()) == [(number, 1), (400, many)]
                pager.expect_push()
                await pager.forget(0, stale)
                assert pager.received(0) == stale.inverted()
                assert both.destination.present().without(stale.inverted()) == Bitmap(pages)
                server.set_stale(0, stale)
            pager.drain_events()
            server.serve()
            with pytest.raises(BusyError):
                server.set_stale(0, stale)
            assert await trio.to_thread.run_sync(both.destination.read, 400 * PAGE, 3) == b"new"
            server.push()
            await next_event(pager.events(), EventType.COMPLETE)
        with pytest.raises(ValueError, match="a map of"):
            await pager.forget(0, Bitmap(pages - 1))
        await pager.disarm()
        assert both.destination.digest() == both.source.digest()
        assert server.statistics().sent_pages == pager.statistics().resident_pages - pager.statistics().zero_pages


async def a_second_end_in_one_push_is_refused(where: str) -> None:
    async with pair(where, 10) as both:
        ours, theirs = tcp_pair()
        both.pager.attach_bulk(0, ours)
        end: Any = ffi.new("uint8_t[]", lib.PC_FRAME_HEADER_BYTES)
        lib.pc_frame_encode(ffi.new("struct pc_frame *", {"type": lib.PC_FRAME_END}), end)
        with socket.socket(fileno=theirs) as source:
            for _ in range(2):
                source.sendall(ffi.buffer(end))
                await next_event(both.pager.events(), EventType.BULK_END)
                both.pager.expect_push()
                await both.pager.confirm()
            source.sendall(2 * bytes(ffi.buffer(end)))
            event = await next_event(both.pager.events(), EventType.CHANNEL_DOWN)
            assert (event.error, event.channel) == (errno.EBADMSG, 0)
        both.pager.set_zero(0, Bitmap.full(10))
        await both.pager.confirm()


async def compressed_pages_have_to_be_accepted(where: str) -> None:
    async with pair(where, 10) as both:
        server, pager = both.server, both.pager

        async def accept() -> None:
            pager.accept_compression(Compression.LZ4)
            await pager.confirm()

        if not available(Compression.LZ4):
            with pytest.raises(CoreError):
                await accept()
            return
        both.source.write(0, b"text" * (PAGE // 4))
        server.set_compression(Compression.LZ4)
        both.connect_bulk()
        server.start()
        event = await next_event(pager.events(), EventType.CHANNEL_DOWN)
        assert event.error == errno.EBADMSG
        assert "not accepted" in event.text
        assert not pager.received(0).part(0, 1).count()
        await accept()
        await pager.disconnect()
        await server.disconnect()
        server.set_received(0, pager.received(0))
        both.connect_bulk()
        await next_event(pager.events(), EventType.COMPLETE)
        await pager.disarm()
        assert both.destination.digest() == both.source.digest()
        assert server.statistics().compressed_bytes < server.statistics().uncompressed_bytes


async def a_lost_channel_can_be_replaced(where: str) -> None:
    async with pair(where, 600) as both:
        both.connect_urgent()
        events = both.pager.events()
        async with trio.open_nursery() as nursery:
            found: list[int] = []

            async def toucher() -> None:
                found.append(await touch_in_thread(both.destination, 3))

            nursery.start_soon(toucher)
            # The server is not started, so the request is on its way when the channel ends.
            while not both.pager.statistics().requests:
                await trio.lowlevel.checkpoint()
            await both.server.disconnect()
            event = await next_event(events, EventType.CHANNEL_DOWN)
            assert event.channel_kind is ChannelKind.URGENT
            assert event.channel == 0
            assert both.pager.statistics().pending_faults == 1
            assert not found
            both.connect_urgent()
            both.server.start()
        assert found == [lib.pc_crc32c(0, content(600)[3], PAGE)]


async def unregistering_what_is_missing_is_refused(where: str) -> None:
    async with pair(where, 30) as both:
        with pytest.raises(BusyError):
            await both.pager.disarm()
        with pytest.raises(BusyError):
            both.destination.close()


async def what_never_comes_is_poisoned(where: str) -> None:
    async with pair(where, 30) as both:
        with pytest.raises(BusyError):
            await both.pager.disarm()
        both.destination.acquire("test")  # keep it mapped
        await both.pager.close()
        assert touch(both.destination, 1) == lib.pc_crc32c(0, bytes(PAGE), PAGE)  # known to be zero
        faulthandler.disable()  # it looks at threads that run, and may crash of that: then it is another signal
        touch(both.destination, 3)  # SIGBUS
        os._exit(3)


async def blocked_threads_are_released_by_close_with_an_error(where: str) -> None:
    """A system call, that is, whose fault cannot be served any more: EFAULT, not zeros."""
    async with pair(where, 30) as both:
        results: list[int] = []
        pipe_out, pipe_in = os.pipe()

        def write_missing() -> None:
            try:
                results.append(os.write(pipe_in, ffi.buffer(ffi.cast("char *", both.destination.address), PAGE)))
            except OSError as error:
                results.append(-(error.errno or 0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, write_missing)
            while not both.pager.statistics().pending_faults:
                await trio.lowlevel.checkpoint()
            await both.pager.close()
        assert results == [-errno.EFAULT]
        os.close(pipe_in)
        os.close(pipe_out)


async def a_cancelled_close_still_closes(where: str) -> None:
    source = Memory.create("memfd", PAGE)
    pager, server = PAGERS[where](), PageServer()
    pager.add_block(source)
    server.add_block(source)
    pager.add_shard()
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await pager.close()
        finally:
            await server.close()
    assert scope.cancelled_caught
    source.close()
    await pager.close()
    await server.close()


async def a_shrinking_image_is_a_named_error(where: str) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(64 * PAGE + 5))
        file.flush()
        source = Memory.from_file(file.name)
        destination = Memory.create("memfd", source.size_bytes)
        async with PageServer() as server, PAGERS[where]() as pager:
            server.add_block(source, PAGE)
            pager.add_block(destination)
            pager.add_shard()
            pager.arm(0, 0, 0, 65)
            await pager.confirm()
            both = Pair(source, destination, server, pager)
            both.connect_urgent()
            server.start()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(touch_in_thread, destination, 64)  # the last page, which is 5 bytes long
                while not pager.received(0)[64]:
                    await trio.lowlevel.checkpoint()
            os.truncate(file.name, PAGE)
            both.connect_bulk()
            event = await next_event(server.events(), EventType.FATAL)
            assert "shorter" in event.text
            assert event.error == errno.EIO
        source.close()
        destination.close()


async def a_pager_that_dies_is_replaced(where: str) -> None:
    async with pair(where, 3000) as both:
        pager = both.pager
        assert isinstance(pager, ProcessPager)
        events = pager.events()
        async with trio.open_nursery() as nursery:
            found: list[int] = []

            async def toucher(page: int) -> None:
                found.append(await touch_in_thread(both.destination, page))

            nursery.start_soon(toucher, 3)
            while not pager.statistics().pending_faults:  # its event has been read, by one who will not live to tell
                await trio.lowlevel.checkpoint()
            os.kill(pager.pid, signal.SIGKILL)
            event = await next_event(events, EventType.DIED)
            assert "SIGKILL" in event.text
            nursery.start_soon(toucher, 6)
            with pytest.raises(MigrationError, match="has died"):
                pager.request_missing(1)
            before = pager.statistics()
            assert pager.received(0).count() == 3000 - len(content(3000))
            await pager.disconnect()
            assert not found
            both.connect_urgent()
            both.server.start()
        assert set(found) == {lib.pc_crc32c(0, content(3000)[page], PAGE) for page in (3, 6)}
        assert pager.statistics().faults >= before.faults + 2
        assert pager.latency().count >= 2
        both.connect_bulk()
        await next_event(events, EventType.COMPLETE)
        assert pager.deaths == 1
        os.kill(pager.pid, signal.SIGKILL)  # as a fault thread that crashes when all is done
        await pager.disarm()
        assert both.destination.digest() == both.source.digest()
        assert pager.statistics().resident_pages == 3000


async def a_pager_that_always_dies_is_given_up(where: str) -> None:
    async with pair(where, 30) as both:
        pager = both.pager
        assert isinstance(pager, ProcessPager)
        for _ in range(DEATHS_IN_A_ROW):
            os.kill(pager.pid, signal.SIGKILL)
            await pager.disconnect()
        os.kill(pager.pid, signal.SIGKILL)
        with pytest.raises(MigrationError, match="as did those before it"):
            await pager.disconnect()
        assert pager.deaths == DEATHS_IN_A_ROW + 1


async def it_is_watched_over_while_nobody_follows_its_events(where: str) -> None:
    async with pair(where, 30) as both:
        pager = both.pager
        assert isinstance(pager, ProcessPager)
        both.connect_urgent()
        await both.server.disconnect()
        await pager.wait_event()  # one that is not about its end, and that no task takes
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pager.watch_over)
            for death in range(3):
                os.kill(pager.pid, signal.SIGKILL)
                # Zero pages need the pager only.
                assert await touch_in_thread(both.destination, 4 + 3 * death) == lib.pc_crc32c(0, bytes(PAGE), PAGE)
            nursery.cancel_scope.cancel()
        assert 1 <= pager.deaths <= 3


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("where", PAGERS)
@pytest.mark.parametrize("kind", ["memfd", "anon"])
@pytest.mark.parametrize("present", ["present", "unknown"])
def test_everything_arrives(passes: Passes, where: str, kind: str, present: str) -> None:
    passes(everything_arrives, where, kind, present)


@pytest.mark.needs("uffd")
@pytest.mark.parametrize(
    "case",
    [
        a_pager_that_dies_is_replaced,
        a_pager_that_always_dies_is_given_up,
        it_is_watched_over_while_nobody_follows_its_events,
    ],
)
def test_pager_process(passes: Passes, case: Callable[..., Any]) -> None:
    passes(case, "process")


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("where", PAGERS)
@pytest.mark.parametrize(
    "case",
    [
        missing_pages_can_be_asked_for,
        rounds_before_the_rest,
        a_second_end_in_one_push_is_refused,
        compressed_pages_have_to_be_accepted,
        a_lost_channel_can_be_replaced,
        a_cancelled_close_still_closes,
        a_shrinking_image_is_a_named_error,
    ],
)
def test_case(passes: Passes, where: str, case: Callable[..., Any]) -> None:
    passes(case, where)


@pytest.mark.needs("uffd", "uffd-poison")
@pytest.mark.parametrize("where", PAGERS)
def test_what_never_comes_is_never_zeros(run_in_child: Callable[..., Any], passes: Passes, where: str) -> None:
    result = run_in_child(what_never_comes_is_poisoned, where, deadline_s=60)
    assert result.returncode == -signal.SIGBUS, result.stderr
    passes(blocked_threads_are_released_by_close_with_an_error, where)
    passes(unregistering_what_is_missing_is_refused, where)


# ---- without faults


@pytest.mark.parametrize(
    ("struct", "mirror"),
    [("struct pc_pager_stats", PagerStatistics), ("struct pc_pageserver_stats", PageServerStatistics)],
)
def test_statistics_mirror_the_struct(struct: str, mirror: type) -> None:
    names = [name for name, _ in ffi.typeof(struct).fields]
    assert names == [field.name for field in dataclasses.fields(mirror)]


async def test_waiting_for_events_ends_with_the_pager(autojump_clock: trio.testing.MockClock) -> None:
    pager, server = Pager(), PageServer()
    ended: list[str] = []

    async def follow(owner: Pager | PageServer) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await owner.events().__anext__()
        ended.append(type(owner).__name__)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, pager)
        nursery.start_soon(follow, server)
        await trio.testing.wait_all_tasks_blocked()
        await pager.close()
        await server.close()
    assert sorted(ended) == ["PageServer", "Pager"]
    for owner in (pager, server):
        with pytest.raises(trio.ClosedResourceError):
            owner.events()
        with pytest.raises(trio.ClosedResourceError):
            owner.statistics()
        with pytest.raises(trio.ClosedResourceError):
            await owner.disconnect()


async def test_a_descriptor_that_cannot_be_attached_is_closed() -> None:
    async def is_closed(attach: Callable[[int], None], error: type[Exception]) -> None:
        ours, theirs = tcp_pair()
        with pytest.raises(error):
            attach(ours)
        with pytest.raises(OSError) as caught:
            os.fstat(ours)
        assert caught.value.errno == errno.EBADF
        os.close(theirs)

    async with Pager() as pager, PageServer() as server:
        await is_closed(lambda fd: pager.attach_urgent(0, fd), CoreError)  # no such shard
        await is_closed(lambda fd: pager.attach_urgent(-1, fd), ValueError)
        await is_closed(lambda fd: pager.attach_bulk(10_000, fd), CoreError)
        await is_closed(lambda fd: server.attach_urgent(10_000, fd), CoreError)
        await is_closed(lambda fd: server.attach_bulk(-1, fd), ValueError)
    await is_closed(lambda fd: pager.attach_bulk(0, fd), trio.ClosedResourceError)
    await is_closed(lambda fd: server.attach_bulk(0, fd), trio.ClosedResourceError)


async def test_maps_of_another_length_never_reach_the_core() -> None:
    with Memory.create("memfd", 10 * PAGE) as memory:
        async with Pager() as pager, PageServer(1 << 20) as server:
            pager.add_block(memory)
            server.add_block(memory)
            server.set_bandwidth(0)
            for length in (9, 11):
                with pytest.raises(ValueError, match=f"{length} pages"):
                    pager.set_zero(0, Bitmap(length))
                with pytest.raises(ValueError, match=f"{length} pages"):
                    server.set_present(0, Bitmap(length))
            for block in (-1, 1):
                for ask in (pager.received, server.block_pages):
                    with pytest.raises(IndexError):
                        ask(block)
            with pytest.raises(CoreError):
                server.add_block(memory, 3000)


async def test_events_read_well() -> None:
    event = Event(EventType.CHANNEL_DOWN, ChannelKind.BULK, 2, errno.EPIPE, "Broken pipe")
    assert str(event) == "channel-down bulk 2: Broken pipe"
    assert str(Event(EventType.COMPLETE)) == "complete"


async def test_memory_given_back(tmp_path: Path) -> None:
    """What is released is neither resident nor to be had; the rest is there as it was."""
    with Memory.create("memfd", 8 * PAGE) as memory:
        memory.write(0, b"x" * 8 * PAGE)
        some = Bitmap(2)
        some.set_range(1, 1)
        async with PageServer() as server:
            server.add_block(memory)
            with pytest.raises(BusyError):
                server.release(0, 0, some)
            server.start()
            for first_page in (-1, 7, 1 << 62):
                with pytest.raises(IndexError):
                    server.release(0, first_page, some)
            with pytest.raises(IndexError):
                server.release(1, 0, some)
            server.release(0, 3, some)
            assert memory.resident_bytes() == 7 * PAGE
            assert server.statistics().released_bytes == PAGE
            assert [list(map_.runs()) for map_ in (server.released(0), server.discarded(0))] == [[(4, 1)]] * 2
            with pytest.raises(CoreError):
                server.set_received(0, Bitmap(8))
            server.set_received(0, server.released(0))
        assert memory.read(0, 8 * PAGE) == b"x" * 4 * PAGE + bytes(PAGE) + b"x" * 3 * PAGE
    image = tmp_path / "image"
    image.write_bytes(b"x" * PAGE)
    with Memory.from_file(image) as memory:
        async with PageServer() as server:
            server.add_block(memory)
            server.start()
            with pytest.raises(CoreError) as raised:
                server.release(0, 0, Bitmap.full(1))
            assert raised.value.errno == errno.ENOTSUP
    assert image.read_bytes() == b"x" * PAGE
