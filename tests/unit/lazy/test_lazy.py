# SPDX-License-Identifier: Apache-2.0
"""Lazily mapped memory: attached, served, and filled by a page source.

What touches missing memory runs in a child process with a deadline.
"""

from __future__ import annotations

import errno
import faulthandler
import gc
import inspect
import os
import random
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

import postcopy
from postcopy import LazyMemory, SourceBlock
from postcopy._native import ffi, lib
from postcopy.dataplane.pager import Pager
from postcopy.dataplane.pageserver import PageServer
from postcopy.errors import ConfigurationError, CoreError, PeerError, ProtocolError, ResourceError
from postcopy.lazy import Server
from postcopy.lazy._bridge import HEADER_BYTES, Bridge, BridgeServer, plan_run
from postcopy.lazy._memory import page_range
from postcopy.memory import Memory, page_bytes_of
from postcopy.net import parse_address
from postcopy.testbed.chaos import open_chaos_proxy

pytestmark = pytest.mark.slow

PAGE = page_bytes_of("memfd")
DEADLINE_S = 60

Passes = Callable[..., None]


def make_content(size: int) -> bytes:
    """Every third page is zero, no two others are the same."""
    source = random.Random(7)
    return b"".join(bytes(PAGE) if page % 3 == 1 else source.randbytes(PAGE) for page in range(-(-size // PAGE)))[:size]


def crc_at(address: int, size: int) -> int:
    """Read by C without the GIL: faults where it is missing, in the calling thread."""
    return int(lib.pc_crc32c(0, ffi.cast("char *", address), size))


async def touch(memory: LazyMemory, offset: int, size: int = 1) -> int:
    return await trio.to_thread.run_sync(crc_at, memory.address + offset, size, abandon_on_cancel=True)


def crc(data: bytes) -> int:
    return int(lib.pc_crc32c(0, data, len(data)))


def mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return True
    return False


class Content:
    """A page source over bytes; notes its calls, and fetches only while it is `open`."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.blocks: Sequence[SourceBlock] = (SourceBlock("content", len(content)),)
        self.calls: list[tuple[int, int]] = []
        self.under_way = self.most = 0
        self.cancelled = 0
        self.open = trio.Event()
        self.open.set()
        self.called = trio.Event()
        self.answer: Callable[[int, int], bytes] = self.right

    def right(self, first: int, count: int) -> bytes:
        return self.content[first * PAGE : (first + count) * PAGE]

    async def fetch(self, block: int, first_page: int, count: int) -> bytes:
        assert block == 0
        self.calls.append((first_page, count))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.called.set()
        try:
            await self.open.wait()
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.under_way -= 1
        return self.answer(first_page, count)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.lowlevel.checkpoint()


# ---- in the child: attached memory


async def what_is_served_arrives(kind: str, backing: str, how: str) -> None:
    size = 700 * PAGE + (0 if kind == "buffer" else 5)
    content = make_content(size)
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        served = Memory.from_file(file.name) if kind == "memory" else bytearray(content)
        async with trio.open_nursery() as nursery:
            server = await nursery.start(postcopy.serve, served)
            async with postcopy.attach(server.address, backing=backing, how=how) as memory:
                assert memory.size_bytes == size
                assert memory.statistics().bytes_received == 0
                assert await memory.read(3 * PAGE - 2, 5) == content[3 * PAGE - 2 : 3 * PAGE + 3]
                assert await memory.read(size - 3) == content[-3:]
                assert await memory.read(5, 0) == b""
                arrived = memory.statistics()
                assert arrived.demand_pages <= 3  # and nothing was pushed
                assert arrived.background_pages == 0
                async with memory.resident(PAGE, 4 * PAGE) as view:
                    assert view.readonly
                    assert view == content[PAGE : 5 * PAGE]
                with pytest.raises(ValueError, match="released"):
                    len(view)
                async with memory.resident(0, 8, writable=True) as view:
                    view[0] ^= 255
                assert await memory.read(0, 1) == bytes([content[0] ^ 255])  # here, and nowhere else
                assert not memory.complete
                # Code that knows nothing of it.
                assert await touch(memory, PAGE, size - PAGE) == crc(content[PAGE:])
                await memory.ensure()
                await until(lambda: memory.complete and server.completed == 1)
                assert await memory.read(PAGE) == content[PAGE:]
                assert memory.statistics().resident_pages == memory.statistics().total_pages
                assert memory.statistics().requests <= memory.statistics().total_pages
            assert server.attached == 0
            assert bytes(served) == content if isinstance(served, bytearray) else True
            nursery.cancel_scope.cancel()
        if isinstance(served, Memory):
            served.close()
        else:
            served.clear()  # its buffer has no user any more


async def everything_can_be_pushed() -> None:
    content = make_content(3000 * PAGE)
    async with trio.open_nursery() as nursery:
        server = await nursery.start(postcopy.serve, content)
        async with postcopy.attach(server.address, background=True) as memory:
            await memory.wait_complete()
            assert memory.statistics().requests == 0
            assert await memory.read() == content
        nursery.cancel_scope.cancel()


async def many_threads_and_tasks(where: str) -> None:
    """Threads that touch, and tasks that ensure overlapping ranges, at the same time; each page is asked for once."""
    pages = 2000
    content = make_content(pages * PAGE)
    source = random.Random(3)

    async def use(memory: LazyMemory) -> None:
        async def ensure(first: int, count: int) -> None:
            await memory.ensure(first * PAGE, count * PAGE)
            async with memory.resident(first * PAGE, count * PAGE) as view:
                assert view == content[first * PAGE : (first + count) * PAGE]

        async def wander(order: list[int]) -> None:
            def run() -> None:
                for page in order:
                    found = crc_at(memory.address + page * PAGE, PAGE)
                    assert found == crc(content[page * PAGE : (page + 1) * PAGE]), page

            await trio.to_thread.run_sync(run)

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(wander, source.sample(range(pages), pages // 4))
            for _ in range(30):
                first = source.randrange(pages)
                nursery.start_soon(ensure, first, source.randint(1, min(400, pages - first)))
        await memory.ensure()
        statistics = memory.statistics()
        assert statistics.requests <= pages
        assert statistics.pending_faults == 0
        assert await memory.read() == content

    if where == "remote":
        async with trio.open_nursery() as nursery:
            server = await nursery.start(postcopy.serve, content)
            async with postcopy.attach(server.address) as memory, postcopy.attach(server.address) as other:
                await use(memory)
                await use(other)
            nursery.cancel_scope.cancel()
    else:
        page_source = Content(content)
        async with postcopy.attach_source(page_source, max_fetches=3) as memory:
            await use(memory)
            await until(lambda: memory.complete)
        assert sum(count for _, count in page_source.calls) == pages
        assert page_source.most == 3


async def a_lost_source_is_an_error_and_never_zeros() -> None:
    content = make_content(100 * PAGE)
    serving = trio.CancelScope()

    async def serve(task_status: trio.TaskStatus[Server]) -> None:
        with serving:
            await postcopy.serve(content, task_status=task_status)

    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(serve)
        async with postcopy.attach(server.address, recover_for_s=0) as memory:
            assert await memory.read(0, 2 * PAGE) == content[: 2 * PAGE]
            serving.cancel()
            failure = await memory.wait_lost()
            assert isinstance(failure, PeerError)
            assert server.address in str(failure)
            for _ in range(2):
                with pytest.raises(PeerError, match="lost"):
                    await memory.ensure(50 * PAGE, PAGE)
            with pytest.raises(PeerError, match="lost"):
                await memory.wait_complete()
            assert await memory.read(0, 2 * PAGE) == content[: 2 * PAGE]
            # A thread that touches a missing page waits, and gets an error in the end, see below.
            with trio.move_on_after(0.05) as scope:
                await trio.to_thread.run_sync(write_to_pipe, memory.address + 9 * PAGE, abandon_on_cancel=True)
            assert scope.cancelled_caught
            await until(lambda: memory.statistics().pending_faults == 1)
            assert not memory.complete


def write_to_pipe(address: int, size: int = PAGE) -> int:
    """A system call that meets a missing page: the errno that it ends with, or 0."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    reader, writer = os.pipe()
    try:
        if libc.write(writer, ctypes.c_void_p(address), size) == -1:
            return ctypes.get_errno()
        return 0
    finally:
        os.close(reader)
        os.close(writer)


async def closing_releases_who_waits() -> None:
    source = Content(make_content(64 * PAGE))
    source.open = trio.Event()
    results: list[object] = []
    async with trio.open_nursery() as nursery:

        async def ensure() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await memory.ensure(3 * PAGE, PAGE)
            results.append("lost")

        async def system_call() -> None:
            results.append(await trio.to_thread.run_sync(write_to_pipe, memory.address + 5 * PAGE))

        async with postcopy.attach_source(source) as memory:
            nursery.start_soon(ensure)
            nursery.start_soon(system_call)
            await until(lambda: memory.statistics().pending_faults == 1 and len(source.calls) == 2)
    assert sorted(map(str, results)) == [str(errno.EFAULT), "lost"]
    assert source.cancelled == 2
    for use in (memory.ensure, memory.read):
        with pytest.raises(trio.ClosedResourceError):
            await use()
    with pytest.raises(trio.ClosedResourceError):
        memory.prefetch()
    assert memory.statistics().resident_pages == 0


async def a_blocked_thread_dies_with_a_closed_memory() -> None:
    faulthandler.disable()  # it would look at the stack of the thread that died
    source = Content(make_content(64 * PAGE))
    source.open = trio.Event()
    async with trio.open_nursery() as nursery, postcopy.attach_source(source) as memory:
        nursery.start_soon(touch, memory, 0)
        await until(lambda: memory.statistics().pending_faults == 1)


async def views_outlive_the_memory() -> None:
    content = make_content(10 * PAGE)
    async with postcopy.attach_source(Content(content)) as memory:
        address = memory.address
        async with memory.resident(PAGE, 3 * PAGE) as view:
            kept = memoryview(view)[PAGE:]  # as numpy.frombuffer does
        part = ffi.from_buffer("char[]", kept)
    gc.collect()
    assert mapped(address)
    assert kept == content[2 * PAGE : 4 * PAGE]
    del part, kept, view
    gc.collect()
    assert not mapped(address)
    # And without views, nothing stays, whatever the end was.
    for complete in (False, True):
        async with postcopy.attach_source(Content(content)) as memory:
            address = memory.address
            await memory.ensure(0, None if complete else PAGE)
        assert not mapped(address)
    async with trio.open_nursery() as nursery:
        server = await nursery.start(postcopy.serve, content)
        for complete in (False, True):
            async with postcopy.attach(server.address) as memory:
                address = memory.address
                await memory.ensure(0, None if complete else PAGE)
            assert not mapped(address)  # without waiting for a garbage collection
        nursery.cancel_scope.cancel()


async def a_cut_network_costs_nothing_but_time(kind: str) -> None:
    """Cut again and again while threads touch and tasks wait: everything comes, whatever serves it."""
    content = make_content(1500 * PAGE)
    served = Content(content) if kind == "source" else content
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(postcopy.serve, served)
        async with (
            open_chaos_proxy(parse_address(server.address)) as proxy,
            postcopy.attach(str(proxy.address)) as memory,
        ):
            (migration,) = server._migrations
            expected = crc(content)
            for cut in range(4):
                before = memory.statistics().resident_pages
                async with trio.open_nursery() as waiting:
                    waiting.start_soon(memory.ensure, 300 * cut * PAGE, 400 * PAGE)
                    waiting.start_soon(touch, memory, (1499 - cut) * PAGE)
                    await until(lambda before=before: memory.statistics().resident_pages > before)  # type: ignore[misc]
                    proxy.cut()
                    proxy.heal()
            assert memory.failure is None
            assert await touch(memory, 0, len(content)) == expected
            await memory.wait_complete()
            assert await memory.read() == content
            assert migration.recoveries.count >= 1
        nursery.cancel_scope.cancel()


async def memory_of_zeros_costs_nothing() -> None:
    with Memory.create("memfd", 1 << 30) as zeros:
        async with trio.open_nursery() as nursery:
            server = await nursery.start(postcopy.serve, zeros)
            async with postcopy.attach(server.address) as memory:
                await memory.wait_complete()
                assert await memory.read(1 << 29, PAGE) == bytes(PAGE)
                assert memory.statistics().requests == 0
                assert memory.statistics().bytes_received < 1000
            nursery.cancel_scope.cancel()
        assert zeros.resident_bytes() == 0


async def a_full_house_says_so() -> None:
    content = make_content(8 * PAGE)
    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(postcopy.serve, content, max_attachers=1))
        async with postcopy.attach(server.address):
            with pytest.raises(PeerError, match="too many attachers"):
                async with postcopy.attach(server.address):
                    pass
        await until(lambda: server.attached == 0)
        async with postcopy.attach(server.address) as memory:
            assert await memory.read() == content
        nursery.cancel_scope.cancel()
    with pytest.raises(PeerError, match="refused"):
        async with postcopy.attach(server.address):
            pass


async def huge_pages() -> None:
    huge = page_bytes_of("hugetlb")
    content = make_content(2 * huge)
    async with trio.open_nursery() as nursery:
        server = await nursery.start(postcopy.serve, content)
        async with postcopy.attach(server.address, backing="hugetlb") as memory:
            assert memory.blocks[0].page_bytes == huge
            assert await memory.read(huge - 5, 10) == content[huge - 5 : huge + 5]
        nursery.cancel_scope.cancel()

    class Huge:
        blocks = (SourceBlock("huge", huge + 1, huge),)

        async def fetch(self, block: int, first_page: int, count: int) -> bytes:
            start = first_page * huge
            return content[start : start + self.blocks[0].bytes_of(first_page, count)]

    async with postcopy.attach_source(Huge(), backing="hugetlb") as memory:
        assert await memory.read() == content[: huge + 1]


# ---- in the child: page sources


async def pages_of_several_blocks() -> None:
    class Two:
        blocks = (SourceBlock("small", 10), SourceBlock("large", 5 * PAGE + 1))

        async def fetch(self, block: int, first_page: int, count: int) -> bytearray:
            await trio.lowlevel.checkpoint()
            return bytearray([block + 1]) * self.blocks[block].bytes_of(first_page, count)

    async with postcopy.attach_source(Two()) as memory:
        assert [block.size_bytes for block in memory.blocks] == [10, 5 * PAGE + 1]
        assert await memory.read() == b"\1" * 10
        assert await memory.read(block="large") == await memory.read(block=1) == b"\2" * (5 * PAGE + 1)
        assert memory.blocks[1].address != memory.address == memory.blocks[0].address
        # Behind the end there are zeros, to the end of the page.
        assert await touch(memory, 10, PAGE - 10) == crc(bytes(PAGE - 10))
        for wrong in (2, -1, "medium"):
            with pytest.raises(IndexError):
                await memory.read(block=wrong)
        with pytest.raises(IndexError):
            await memory.read(0, 11)
        await until(lambda: memory.complete)


async def neighbours_are_fetched_together() -> None:
    source = Content(make_content(500 * PAGE))
    async with postcopy.attach_source(source, fault_around_pages=16, max_fetch_pages=64) as memory:
        assert await touch(memory, 100 * PAGE, PAGE) == crc(source.right(100, 1))
        assert source.calls == [(96, 16)]
        await memory.ensure(96 * PAGE, 16 * PAGE)  # it is all there
        assert await memory.read(99 * PAGE, 4 * PAGE) == source.right(99, 4)
        assert len(source.calls) == 1
        statistics = memory.statistics()
        assert statistics.requests == 1
        assert statistics.background_pages + statistics.zero_pages == 15 + (100 % 3 == 1)
        assert statistics.zero_pages == sum(page % 3 == 1 for page in range(96, 112))
        await memory.ensure()
        assert await memory.read() == source.content
        # In far fewer calls than pages. A page that was asked for while it was on its way unasked comes twice.
        assert len(source.calls) < 100
        fetched = sum(count for _, count in source.calls)
        await until(lambda: memory.statistics().duplicate_pages == fetched - 500)
        assert all(count <= 64 for _, count in source.calls)


async def what_a_thread_waits_for_comes_first() -> None:
    source = Content(make_content(1000 * PAGE))
    source.open = trio.Event()
    async with postcopy.attach_source(source, max_fetches=3, max_fetch_pages=2) as memory:
        assert memory.prefetch(0, 500 * PAGE) == 500
        await until(lambda: len(source.calls) == 2)
        await trio.testing.wait_all_tasks_blocked()
        assert len(source.calls) == 2  # one place is kept ...
        async with trio.open_nursery() as nursery:
            nursery.start_soon(touch, memory, 900 * PAGE)
            await until(lambda: len(source.calls) == 3)
            assert source.calls[-1] == (900, 1)  # ... for this one
            source.open.set()
        await memory.ensure(0, 500 * PAGE)
        assert source.most == 3
        assert memory.statistics().requests == 501


async def what_was_asked_for_ahead_is_not_waited_for() -> None:
    """A thread touches one of many pages that were asked for ahead, far from each other, of a source that gives none
    back: it is fetched as the next one."""
    source = Content(make_content(1000 * PAGE))
    source.open = trio.Event()
    async with trio.open_nursery() as nursery, postcopy.attach_source(source, max_fetches=4) as memory:
        for page in range(0, 180, 3):
            memory.prefetch(page * PAGE, PAGE)
        await until(lambda: len(source.calls) == 3)  # one place is left for what is waited for
        await until(lambda: memory.statistics().requests == 60)
        late = max(set(range(0, 180, 3)) - {first for first, _ in source.calls})
        nursery.start_soon(touch, memory, late * PAGE)
        await until(lambda: len(source.calls) == 4)
        assert source.calls[3] == (late, 1)
        source.open.set()
        await memory.ensure(0, 180 * PAGE)
        assert await memory.read(0, 180 * PAGE) == source.right(0, 180)


async def a_cancelled_wait_takes_nothing_with_it() -> None:
    source = Content(make_content(300 * PAGE))
    source.open = trio.Event()
    async with postcopy.attach_source(source) as memory:
        with trio.move_on_after(0.01) as scope:
            await memory.ensure(0, 200 * PAGE)
        assert scope.cancelled_caught
        with trio.CancelScope() as scope:
            scope.cancel()
            await memory.ensure(0, PAGE)
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            for first in range(0, 200, 10):
                nursery.start_soon(memory.ensure, first * PAGE, 20 * PAGE)
            await source.called.wait()
            nursery.cancel_scope.cancel()
        source.open.set()
        assert await memory.read() == source.content
        assert sum(count for _, count in source.calls) == 300


async def a_source_that_fails_is_lost(how: str) -> None:
    source = Content(make_content(100 * PAGE))

    def answer(first: int, count: int) -> bytes:
        if first + count <= 50:
            return source.right(first, count)
        if how == "raises":
            raise OSError(errno.EIO, "the disk is on fire")
        if how == "nothing":
            return None  # type: ignore[return-value]
        return source.right(first, count)[:-1] if how == "short" else source.right(first, count) + b"x"

    source.answer = answer
    async with postcopy.attach_source(source) as memory:
        assert await memory.read(0, PAGE) == source.right(0, 1)
        with pytest.raises(PeerError) as caught:
            await memory.ensure(60 * PAGE, PAGE)
        text = str(caught.value)
        assert "block 'content'" in text
        assert "pages 60 to 60" in text
        if how == "raises":
            assert "the disk is on fire" in text
            assert isinstance(caught.value.__cause__, OSError)
        elif how != "nothing":
            assert f"{PAGE + (1 if how == 'long' else -1)} bytes" in text
        assert memory.failure is not None
        with pytest.raises(PeerError):  # it stays so, for every page that is not here
            await memory.ensure(10 * PAGE, PAGE)
        assert await memory.read(0, PAGE) == source.right(0, 1)
        with trio.move_on_after(0.05) as scope:
            await trio.to_thread.run_sync(write_to_pipe, memory.address + 60 * PAGE, abandon_on_cancel=True)
        assert scope.cancelled_caught


async def a_source_is_served_over_the_network() -> None:
    source = Content(make_content(300 * PAGE + 3))
    async with trio.open_nursery() as nursery:
        server: Server = await nursery.start(partial(postcopy.serve, source, fault_around_pages=4))
        async with postcopy.attach(server.address) as memory, postcopy.attach(server.address) as other:
            assert memory.size_bytes == len(source.content)
            assert await memory.read(9 * PAGE, PAGE) == source.right(9, 1)
            assert source.calls == [(8, 4)]
            assert await touch(other, 20 * PAGE, PAGE) == crc(source.right(20, 1))
            await memory.ensure()
            await memory.wait_complete()
            assert await memory.read() == source.content
            assert not other.complete

            def answer(first: int, count: int) -> bytes:
                raise OSError(errno.EIO, "the disk is on fire")

            source.answer = answer
            with pytest.raises(PeerError, match="the disk is on fire"):
                await other.ensure()
            assert await other.read(20 * PAGE, PAGE) == source.right(20, 1)
        source.answer = source.right
        # With `background`: nothing is pushed, so the destination asks for all of it.
        async with postcopy.attach(server.address, background=True) as memory:
            await memory.wait_complete()
            assert await memory.read() == source.content
        nursery.cancel_scope.cancel()
    assert source.under_way == 0


async def what_the_block_raises_comes_out_as_it_is() -> None:
    source = Content(make_content(10 * PAGE))
    with pytest.raises(KeyError, match="mine"):
        async with postcopy.attach_source(source):
            raise KeyError("mine")
    async with trio.open_nursery() as nursery:
        server = await nursery.start(postcopy.serve, source.content)
        with pytest.raises(KeyError, match="mine"):
            async with postcopy.attach(server.address):
                raise KeyError("mine")
        with trio.CancelScope() as scope:
            async with postcopy.attach(server.address) as memory:
                scope.cancel()
                await memory.ensure()
        assert scope.cancelled_caught
        nursery.cancel_scope.cancel()


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("kind", ["memory", "buffer", "odd-buffer"])
@pytest.mark.parametrize("backing", ["memfd", "anon"])
def test_what_is_served_arrives(passes: Passes, kind: str, backing: str) -> None:
    passes(what_is_served_arrives, kind, backing, "any")


@pytest.mark.needs("uffd-user")
def test_without_any_rights(passes: Passes) -> None:
    passes(what_is_served_arrives, "buffer", "memfd", "user-only")


@pytest.mark.needs("uffd", "hugetlb")
def test_huge_pages(passes: Passes) -> None:
    passes(huge_pages)


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("where", ["remote", "source"])
def test_many_threads_and_tasks(passes: Passes, where: str) -> None:
    passes(many_threads_and_tasks, where)


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("kind", ["memory", "source"])
def test_a_cut_network_costs_nothing_but_time(passes: Passes, kind: str) -> None:
    passes(a_cut_network_costs_nothing_but_time, kind)


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("how", ["raises", "short", "long", "nothing"])
def test_a_source_that_fails_is_lost(passes: Passes, how: str) -> None:
    passes(a_source_that_fails_is_lost, how)


@pytest.mark.needs("uffd", "uffd-poison")
@pytest.mark.parametrize(
    "case",
    [
        everything_can_be_pushed,
        a_lost_source_is_an_error_and_never_zeros,
        closing_releases_who_waits,
        views_outlive_the_memory,
        a_full_house_says_so,
        memory_of_zeros_costs_nothing,
        pages_of_several_blocks,
        neighbours_are_fetched_together,
        what_a_thread_waits_for_comes_first,
        what_was_asked_for_ahead_is_not_waited_for,
        a_cancelled_wait_takes_nothing_with_it,
        what_the_block_raises_comes_out_as_it_is,
        a_source_is_served_over_the_network,
    ],
)
def test_case(passes: Passes, case: Callable[..., Any]) -> None:
    passes(case)


@pytest.mark.needs("uffd", "uffd-poison")
def test_a_blocked_thread_dies_with_a_closed_memory(run_in_child: Callable[..., Any]) -> None:
    result = run_in_child(a_blocked_thread_dies_with_a_closed_memory, deadline_s=60)
    # A thread that is woken and runs only after the memory has been unmapped meets no poison, and no zeros either.
    assert result.returncode in (-signal.SIGBUS, -signal.SIGSEGV), result.stderr


# ---- without faults


@given(st.integers(0, 20 * PAGE), st.integers(0, 20 * PAGE) | st.none(), st.integers(1, 20 * PAGE))
def test_the_pages_of_a_range_cover_it(offset: int, size: int | None, size_bytes: int) -> None:
    end = size_bytes if size is None else offset + size
    if end > size_bytes or offset > end:
        with pytest.raises(IndexError):
            page_range(offset, size, size_bytes, PAGE)
        return
    first, pages, found = page_range(offset, size, size_bytes, PAGE)
    assert found == end - offset
    assert {offset // PAGE, (end - 1) // PAGE} <= set(range(first, first + pages)) if found else pages == 0
    # Not one page too many.
    assert pages == len({byte // PAGE for byte in (offset, end - 1, *range(offset, end, PAGE))}) if found else True


@given(
    st.data(),
    st.integers(1, 60),
    st.sets(st.integers(0, 59)),
    st.sets(st.integers(0, 59)),
    st.sampled_from([1, 2, 4, 16]),
    st.integers(1, 20),
)
def test_a_run_takes_what_it_may(
    data: st.DataObject, pages: int, wanted: set[int], taken: set[int], around: int, limit: int
) -> None:
    page = data.draw(st.integers(0, pages - 1))
    first, count = plan_run(
        page, pages, wanted=wanted.__contains__, taken=taken.__contains__, around=around, limit=limit
    )
    run = range(first, first + count)
    assert page in run
    assert set(run) <= set(range(pages))
    assert count <= limit
    group = range(page // around * around, page // around * around + around)

    def belongs(other: int) -> bool:
        return other in wanted or (other in group and other not in taken)

    assert all(belongs(other) for other in run if other != page)
    # It stops for a reason.
    for other in (first - 1, first + count):
        assert count == limit or not 0 <= other < pages or not belongs(other)


def frame(**fields: int) -> bytes:
    struct = ffi.new("struct pc_frame *", {"type": lib.PC_FRAME_REQUEST, "pages": 1, **fields})
    header = ffi.new("uint8_t[]", HEADER_BYTES)
    lib.pc_frame_encode(struct, header)
    return bytes(ffi.buffer(header))


async def run_bridge(source: Content, requests: bytes) -> bytes:
    """What it answers until the pager, a peer's, hangs up."""
    ours, theirs = trio.testing.memory_stream_pair()
    bridge = Bridge(source, source.blocks, max_fetches=4, max_fetch_pages=8, fault_around_pages=1, on_failure=print)
    answers = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bridge.run, theirs)
        for at in range(0, len(requests), 7):  # frames cut anywhere
            await ours.send_all(requests[at : at + 7])
        await trio.testing.wait_all_tasks_blocked()
        await ours.send_eof()
    await theirs.aclose()
    async for data in ours:
        answers += data
    return bytes(answers)


async def test_each_request_is_answered_with_its_id() -> None:
    source = Content(make_content(20 * PAGE + 9))
    ids = {5: 0x80000001, 6: 2, 7: 3, 20: 0x40000004, 1: 0xFFFFFFFF}
    answers = await run_bridge(source, b"".join(frame(first_page=page, request_id=ids[page]) for page in ids))
    found = {}
    while answers:
        struct = ffi.new("struct pc_frame *")
        assert lib.pc_frame_decode(answers, struct, ffi.NULL, 0) == 0
        payload = answers[HEADER_BYTES : HEADER_BYTES + struct.payload_bytes]
        answers = answers[HEADER_BYTES + struct.payload_bytes :]
        assert struct.flags == lib.PC_FRAME_DEMAND
        assert struct.pages == 1
        assert struct.payload_crc == (crc(payload) if payload else 0)
        assert struct.request_id == ids[struct.first_page]
        zero = struct.first_page % 3 == 1
        assert struct.type == (lib.PC_FRAME_ZERO if zero else lib.PC_FRAME_PAGES)
        found[struct.first_page] = payload
    expected = {page: b"" if page % 3 == 1 else source.right(page, 1).ljust(PAGE, b"\0") for page in ids}
    assert found == expected


@pytest.mark.parametrize(
    ("request_bytes", "match"),
    [
        (bytes(HEADER_BYTES), "magic"),
        (frame(type=lib.PC_FRAME_ZERO), "no request"),
        (frame(block=1), "no request"),
        (frame(first_page=1), "no pages"),
        (frame(pages=2), "no pages"),
    ],
)
async def test_a_bad_request_ends_it(request_bytes: bytes, match: str) -> None:
    source = Content(make_content(PAGE))
    with pytest.RaisesGroup(pytest.RaisesExc(ProtocolError, match=match)):
        await run_bridge(source, request_bytes)
    assert source.calls == []


def test_a_page_source_is_called_as_a_page_server() -> None:
    """`serve` gives it to a migration as one, which mypy cannot see."""
    for name, method in vars(BridgeServer).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            assert inspect.signature(method) == inspect.signature(getattr(PageServer, name)), name


async def test_a_closed_page_source_closes_a_descriptor_that_it_is_given() -> None:
    async with trio.open_nursery() as nursery:
        server = BridgeServer(cast(Any, None), nursery)
        await server.close()
        ours, theirs = socket.socketpair()
        with ours:
            for attach in (server.attach_urgent, server.attach_bulk):
                with pytest.raises(trio.ClosedResourceError):
                    attach(0, os.dup(theirs.fileno()))
            theirs.close()
            assert ours.recv(1) == b""  # no copy is left


async def test_bad_arguments_are_named() -> None:
    async def refused(match: str, **arguments: object) -> None:
        source = Content(make_content(PAGE))
        source.blocks = arguments.pop("blocks", source.blocks)  # type: ignore[assignment]
        with pytest.raises((ConfigurationError, ResourceError), match=match):
            async with postcopy.attach_source(source, **arguments):  # type: ignore[arg-type]
                pass

    await refused("at least one", max_fetches=0)
    await refused("at least one", max_fetch_pages=0)
    await refused("power of two", fault_around_pages=3)
    await refused("1 to 64 blocks", blocks=())
    await refused("same name", blocks=(SourceBlock("a", 1), SourceBlock("a", 1)))
    await refused("cannot have 0 bytes", blocks=(SourceBlock("a", 0),))
    await refused("page size", blocks=(SourceBlock("a", 1, 3000),))
    await refused("has pages of 8192", blocks=(SourceBlock("a", 1, 8192),))
    await refused("unknown kind", backing="paper")
    with pytest.raises(ConfigurationError, match="cannot be served"):
        await postcopy.serve(object())
    with pytest.raises(ConfigurationError, match="cannot be served"):
        await postcopy.serve(memoryview(bytes(64))[::2])
    two = Content(make_content(PAGE))
    two.blocks = (SourceBlock("a", 1), SourceBlock("b", 1))
    with pytest.raises(ConfigurationError, match="it must have one"):
        await postcopy.serve(two)
    with pytest.raises(ConfigurationError, match="power of two"):
        await postcopy.serve(Content(bytes(PAGE)), fault_around_pages=5)
    with pytest.raises(ConfigurationError, match="empty"):
        await postcopy.serve(b"")
    with pytest.raises(ConfigurationError, match="not an address"):
        await postcopy.serve(b"x", "here")
    with pytest.raises(ConfigurationError, match="not an address"):
        async with postcopy.attach("there"):
            pass
    with pytest.raises(ValueError, match="unknown way"):
        async with postcopy.attach_source(Content(bytes(PAGE)), how="magic"):
            pass


async def test_ranges_that_are_not_there_never_reach_the_core() -> None:
    with Memory.create("memfd", 10 * PAGE) as memory:
        async with Pager() as pager:
            pager.add_block(memory)
            for block, first, pages in ((1, 0, 1), (0, -1, 2), (0, 0, -1), (0, 5, 6), (0, 11, 0)):
                with pytest.raises(IndexError):
                    pager.request_range(block, first, pages)
                with pytest.raises(IndexError):
                    pager.watch(block, first, pages, 0)
            # Nothing is armed: not there, and never to come.
            assert pager.request_range(0, 2, 3) == 3
            with pytest.raises(CoreError):
                pager.watch(0, 0, 1, -1)
            pager.unwatch(12345)
        pager.unwatch(1)
        with pytest.raises(trio.ClosedResourceError):
            pager.request_range(0, 0, 1)


def test_names_come_when_they_are_asked_for() -> None:
    assert {name for name in postcopy.__all__ if hasattr(postcopy, name)} == set(postcopy.__all__)
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = postcopy.nothing_of_that_name
