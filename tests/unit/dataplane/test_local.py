# SPDX-License-Identifier: Apache-2.0
"""Pagers whose pages are on this host: an image file, a staging memfd, memory that is somewhere else.

The core's tests (csrc/tests/pager/test_local.c) have the cases; here it is what Python makes of them. What touches
missing memory runs in a child process with a deadline.
"""

from __future__ import annotations

import errno
import os
import random
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from postcopy._native import ffi, lib
from postcopy.dataplane.pager import EventType, ForeignMemory, Pager, new_touches, read_touches
from postcopy.errors import BusyError, CoreError
from postcopy.memory import Memory, page_bytes_of
from postcopy.memory.bitmap import Bitmap
from postcopy.uffd import Userfaultfd

PAGE = page_bytes_of("anon")
PAGES = 96
ANON = 2  # PC_MEMORY_ANON
Passes = Callable[..., None]


def image() -> tuple[int, dict[int, bytes]]:
    """A file with something in every third page, and holes between."""
    source = random.Random(7)
    pages = {page: source.randbytes(PAGE) for page in range(0, PAGES, 3)}
    fd, path = tempfile.mkstemp()
    os.unlink(path)
    for page, content in pages.items():
        os.pwrite(fd, content, page * PAGE)
    os.ftruncate(fd, PAGES * PAGE)
    return fd, pages


def nowhere() -> ForeignMemory:
    return ForeignMemory(0, PAGES * PAGE, PAGE, ANON)


async def touched(memory: Memory, page: int) -> int:
    """CRC32C of a page, read by C without the GIL: faults where it is missing, in a thread of its own."""
    address = ffi.cast("char *", memory.address + page * PAGE)
    return await trio.to_thread.run_sync(lib.pc_crc32c, 0, address, PAGE)


def crc(content: bytes) -> int:
    return int(lib.pc_crc32c(0, content, PAGE))


@asynccontextmanager
async def halves(pager: Pager) -> AsyncIterator[tuple[Memory, Memory]]:
    """A block in two parts, of which the second one is armed first."""
    with Memory.create("anon", PAGES // 2 * PAGE) as low, Memory.create("anon", PAGES // 2 * PAGE) as high:
        uffd = Userfaultfd.open()
        shard = pager.adopt_shard(os.dup(uffd.fileno()), uffd.features)
        pager.arm_at(shard, 0, PAGES // 2, PAGES // 2, high.address)
        pager.arm_at(shard, 0, 0, PAGES // 2, low.address)
        with pytest.raises(BusyError, match="armed already"):
            pager.arm_at(shard, 0, 0, 1, low.address)
        yield low, high
        uffd.close()


async def an_image_is_served_and_its_first_touches_are_logged() -> None:
    fd, pages = image()
    log = new_touches(PAGES)
    async with Pager() as pager:
        pager.add_block(nowhere())
        with pytest.raises(CoreError) as error:
            await pager.set_local(0, fd, PAGE)
        assert error.value.errno == errno.ENODATA
        await pager.set_local(0, fd)
        with pytest.raises(BusyError):
            pager.set_readers(1, 1)
        pager.record_touches(log)
        async with halves(pager) as (low, high):
            order = [3, 90, 1, 50, 47]
            for page in order:
                memory, at = (low, page) if page < PAGES // 2 else (high, page - PAGES // 2)
                assert await touched(memory, at) == crc(pages.get(page, bytes(PAGE)))
            assert read_touches(log) == [(0, page) for page in order]
            while pager.statistics().demand_pages < 2:  # noqa: ASYNC110 (counted after the thread has been woken)
                await trio.sleep(0.001)
            pager.prefetch_runs([(0, 6, 3), (0, 93, 1)])
            pager.prefetch_all()
            async for event in pager.events():
                assert event.type is EventType.COMPLETE, event
                break
            while pager.prefetching:  # noqa: ASYNC110 (no event tells)
                await trio.sleep(0.001)
            assert pager.statistics().prefetched_pages == len(pages) - 2 + 2  # those of the runs that are zero, too
            pager.prefetch_stop()
            await pager.disarm()
    os.close(fd)
    os.close(log)


async def an_image_that_is_cut_short_is_an_error_and_a_whole_one_goes_on() -> None:
    fd, pages = image()
    async with Pager() as pager:
        pager.add_block(nowhere())
        await pager.set_local(0, fd)
        os.ftruncate(fd, PAGE)
        async with halves(pager) as (low, _), trio.open_nursery() as nursery:
            results = []

            async def touch() -> None:
                results.append(await touched(low, 3))

            nursery.start_soon(touch)
            async for event in pager.events():
                assert (event.type, event.error) == (EventType.FATAL, errno.ENODATA)
                assert "ends before" in event.text
                break
            assert not results
            os.close(fd)
            fd, pages = image()
            await pager.set_local(0, fd, pages=Bitmap.full(PAGES))
        assert results == [crc(pages[3])]
        pager.prefetch_all()
        async for event in pager.events():
            assert event.type is EventType.COMPLETE, event
            break
    os.close(fd)


async def a_pager_leaves_and_the_next_one_has_what_is_staged() -> None:
    _, pages = image()
    states = int(lib.pc_states_new(PAGES))
    staged = os.memfd_create("staged")
    os.ftruncate(staged, PAGES * PAGE)
    for page, content in pages.items():
        os.pwrite(staged, content, page * PAGE)
    zero = Bitmap.full(PAGES)
    for page in pages:
        zero.clear_range(page, 1)
    with Memory.create("anon", PAGES * PAGE) as memory:
        uffd = Userfaultfd.open()
        for turn in range(3):
            pager = Pager()
            pager.add_block(nowhere(), states)
            pager.set_zero(0, zero)
            pager.stage(0, staged)
            assert pager.received(0) == Bitmap.full(PAGES)
            if turn == 0:  # a round of precopy: none of it is there any more
                stale = Bitmap(PAGES)
                stale.set_range(0, 6)
                await pager.forget(0, stale)
                assert list(pager.received(0).runs()) == [(6, PAGES - 6)]
                for page in range(6):
                    os.pwrite(staged, pages.get(page, bytes(PAGE)), page * PAGE)
            else:
                shard = pager.adopt_shard(os.dup(uffd.fileno()), uffd.features)
                pager.arm_at(shard, 0, 0, PAGES, memory.address)
                with pytest.raises(BusyError):
                    await pager.forget(0, zero)
                assert await touched(memory, 30 * turn) == crc(pages[30 * turn])
            await pager.leave()
            await pager.close()  # twice does no harm
        async with Pager() as pager:
            pager.add_block(nowhere(), states)
            pager.stage(0, staged)
            pager.arm_at(pager.adopt_shard(os.dup(uffd.fileno()), uffd.features), 0, 0, PAGES, memory.address)
            while pager.statistics().resident_pages < PAGES or pager.prefetching:  # noqa: ASYNC110 (no event tells)
                await trio.sleep(0.001)
            assert os.fstat(staged).st_blocks == 0
        uffd.close()
    os.close(staged)
    os.close(states)


@pytest.mark.needs("uffd")
@pytest.mark.parametrize(
    "case",
    [
        an_image_is_served_and_its_first_touches_are_logged,
        an_image_that_is_cut_short_is_an_error_and_a_whole_one_goes_on,
        a_pager_leaves_and_the_next_one_has_what_is_staged,
    ],
)
def test_case(passes: Passes, case: Callable[..., None]) -> None:
    passes(case)


async def test_maps_of_another_length_never_reach_the_core() -> None:
    async with Pager() as pager:
        pager.add_block(nowhere())
        with pytest.raises(ValueError, match="a map of 5 pages"):
            await pager.set_local(0, 0, pages=Bitmap(5))
        with pytest.raises(IndexError):
            await pager.set_local(1, 0)
        with pytest.raises(CoreError):
            pager.prefetch_runs([(0, PAGES - 1, 2)])
        pager.prefetch_runs([])
        assert not pager.prefetching


def test_a_log_of_touches_is_told_from_other_files() -> None:
    with tempfile.TemporaryFile() as file, pytest.raises(CoreError):
        read_touches(file.fileno())
