# SPDX-License-Identifier: Apache-2.0
"""Lazily filled memory, as Python may use it.

Touching a page that is not there makes the thread sleep in the kernel. When that thread is Python's and holds the GIL,
every other Python thread sleeps with it: where the page is brought by Python code, that is a deadlock; where C brings
it, it is a stand-still of the whole program, heartbeats of the connection included. An ordinary numpy array or
memoryview over all of it would do exactly that at its first index. So Python code gets at the content in one way only:
`ensure` first makes a range *resident*, by C threads and while other tasks go on, and only then is there a view of it.

A page that is resident stays so: its content is placed once, and nothing in this package ever takes it away again (that
takes an madvise(2) or a munmap(2) by code that has the address). A page that is known to be zero is resident without
being populated; its first touch is a fault that the C fault thread answers by itself, without the GIL and without the
source.

C code that runs without the GIL may touch any address at any time: that is what the memory is for.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from postcopy._fd import FdHolder
from postcopy._native import ffi
from postcopy._trio import require_trio
from postcopy.dataplane.histogram import Histogram
from postcopy.dataplane.pager import Pager, PagerStatistics, Stage
from postcopy.errors import PostcopyError
from postcopy.memory import Memory


@dataclass(frozen=True)
class LazyBlock:
    """One mapping."""

    name: str
    size_bytes: int
    page_bytes: int  # what one fault brings
    address: int  # in this process; valid until the memory is closed


def page_range(offset: int, size: int | None, size_bytes: int, page_bytes: int) -> tuple[int, int, int]:
    """(first page, pages, bytes) of the bytes from `offset` on, all to the end when `size` is None. `IndexError` for a
    range that is not inside."""
    if size is None:
        size = size_bytes - offset
    if offset < 0 or size < 0 or offset + size > size_bytes:
        raise IndexError(f"bytes {offset} to {offset + size} of memory of {size_bytes} bytes")
    if not size:
        return 0, 0, 0
    first = offset // page_bytes
    return first, -(-(offset + size) // page_bytes) - first, size


class LazyMemory:
    """Made by `attach` and `attach_source`, which also close it.

    One mapping for each block of the source; most sources have one, which is what every method means unless `block`
    (a number or a name) says otherwise. Use it from the Trio thread only; the views and `address` may be used anywhere.

    **When the source is lost** (`failure`, `wait_lost`): tasks that wait for a missing page raise `PeerError`, now and
    later; what is resident stays readable; threads that touch a missing page stay blocked, since there is nothing that
    could be shown to them. Closing poisons what is missing: a blocked thread then gets SIGBUS, which ends the process,
    and a blocked system call EFAULT. No thread ever gets zeros instead.
    """

    def __init__(self, pager: Pager, blocks: Sequence[tuple[str, Memory, int]]) -> None:
        self._pager = pager
        self._memories = [memory for _, memory, _ in blocks]
        self._blocks = tuple(
            LazyBlock(name, size_bytes, memory.page_bytes, memory.address) for name, memory, size_bytes in blocks
        )
        self._numbers = {block.name: number for number, block in enumerate(self._blocks)}
        self._failure: PostcopyError | None = None
        self._lost = trio.Event()
        self._complete = trio.Event()
        self._closed = False
        self._last_statistics: PagerStatistics | None = None
        self._waiting: set[trio.CancelScope] = set()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "lost" if self._failure else "complete" if self.complete else "attached"
        return f"<LazyMemory: {', '.join(f'{block.name} {block.size_bytes}' for block in self._blocks)}, {state}>"

    # ---- what it is

    @property
    def blocks(self) -> tuple[LazyBlock, ...]:
        return self._blocks

    @property
    def size_bytes(self) -> int:
        """Of the first block, without what fills up its last page."""
        return self._blocks[0].size_bytes

    @property
    def address(self) -> int:
        """Where the first block is mapped, for C code that touches it lazily: in a call that has released the GIL (CFFI
        and ctypes.CDLL do, ctypes.PyDLL and most extension modules do not), in a worker thread, since it may block."""
        return self._blocks[0].address

    @property
    def complete(self) -> bool:
        """Every page is resident and the source is not needed any more."""
        return self._complete.is_set()

    @property
    def failure(self) -> PostcopyError | None:
        """Why the source is lost; None while it is not."""
        return self._failure

    async def wait_lost(self) -> PostcopyError:
        """Waits until the source is lost; why. For ever when it is not."""
        await self._lost.wait()
        assert self._failure is not None
        return self._failure

    async def wait_complete(self) -> None:
        """Waits until every page is resident; requests nothing. Errors as for `ensure`."""
        if self.complete:
            await trio.lowlevel.checkpoint()
            return
        self._check_open()
        self._check_lost()
        await self._wait(self._complete.wait)

    def statistics(self) -> PagerStatistics:
        """The pager's counters; once closed, the last ones."""
        if not self._closed:
            self._last_statistics = self._pager.statistics()
        assert self._last_statistics is not None
        return self._last_statistics

    def latency(self, stage: Stage = Stage.TOTAL) -> Histogram:
        """How long touchers have waited, of faults that were served."""
        return self._pager.latency(stage)

    # ---- making pages resident

    def prefetch(self, offset: int = 0, size: int | None = None, *, block: int | str = 0) -> int:
        """Asks for what is missing of a range, each page once, and does not wait; how many pages of it are not resident
        yet. A page that a thread has touched never stands behind more than a window of pages asked for here."""
        number, first, pages, _ = self._locate(offset, size, block)
        self._check_open()
        return self._pager.request_range(number, first, pages)

    async def ensure(self, offset: int = 0, size: int | None = None, *, block: int | str = 0) -> None:
        """Returns when every page of a range is resident, having asked for those that were missing. From then on
        anything may touch the range, Python code too.

        Any number of tasks at once, for overlapping ranges too. Cancellable: what was asked for then still comes.
        `PeerError` when a page is missing and the source lost, `trio.ClosedResourceError` when closed meanwhile.
        """
        require_trio("LazyMemory.ensure", "postcopy.lazy.blocking")
        number, first, pages, _ = self._locate(offset, size, block)
        self._check_open()
        await trio.lowlevel.checkpoint_if_cancelled()
        if not self._pager.request_range(number, first, pages):
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        self._check_lost()
        with FdHolder(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)) as arrived:
            ticket = self._pager.watch(number, first, pages, arrived.fd)
            try:
                if ticket:
                    await self._wait(arrived.wait_readable)
            finally:
                self._pager.unwatch(ticket)

    @asynccontextmanager
    async def resident(
        self, offset: int = 0, size: int | None = None, *, block: int | str = 0, writable: bool = False
    ) -> AsyncIterator[memoryview]:
        """``async with memory.resident(offset, size) as view``: `ensure`, then a view of the bytes, in place.

        ``numpy.frombuffer(view, dtype)`` makes an array of it without a copy. An array may be kept after the block, and
        after the memory was closed: the mapping stays as long as anything looks at it. With `writable` the view can be
        written to; that changes this process's memory only and never reaches the source.
        """
        await self.ensure(offset, size, block=block)
        view = self._view(offset, size, block, writable)
        try:
            yield view
        finally:
            with contextlib.suppress(BufferError):  # something still looks at it, and may go on
                view.release()

    async def read(self, offset: int = 0, size: int | None = None, *, block: int | str = 0) -> bytes:
        """A copy of the bytes, when they are resident. Errors and cancellation as for `ensure`."""
        async with self.resident(offset, size, block=block) as view:
            return bytes(view)

    # ---- for the owner of the tasks that fill it

    def _fail(self, error: PostcopyError) -> None:
        """The source is lost. The first reason counts."""
        if self._failure is None and not self._closed and not self.complete:
            self._failure = error
            self._lost.set()
            self._cancel_waits()

    def _completed(self) -> None:
        self._complete.set()

    def _close(self) -> None:
        """No new views from here on. The pager is still to be closed; mappings go with the last view."""
        if not self._closed:
            self.statistics()
            self._closed = True
            self._memories.clear()
            self._cancel_waits()

    # ---- private

    async def _wait(self, wait: Callable[[], Awaitable[None]]) -> None:
        """Waits, unless the source is lost or the memory closed meanwhile."""
        scope = trio.CancelScope()
        self._waiting.add(scope)
        try:
            with scope:
                await wait()
                return
        finally:
            self._waiting.discard(scope)
        self._check_open()
        self._check_lost()
        raise AssertionError("a wait was cancelled for no reason")

    def _cancel_waits(self) -> None:
        for scope in self._waiting:
            scope.cancel()

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this memory was closed")

    def _check_lost(self) -> None:
        if self._failure is not None:
            # A new object each time: one that is raised in several tasks would collect all their tracebacks.
            raise type(self._failure)(*self._failure.args) from (self._failure.__cause__ or self._failure)

    def _locate(self, offset: int, size: int | None, block: int | str) -> tuple[int, int, int, int]:
        number = self._numbers.get(block, -1) if isinstance(block, str) else block
        if not 0 <= number < len(self._blocks):
            raise IndexError(f"there is no block {block!r}")
        found = self._blocks[number]
        return number, *page_range(offset, size, found.size_bytes, found.page_bytes)

    def _view(self, offset: int, size: int | None, block: int | str, writable: bool) -> memoryview:
        number, _, _, size_bytes = self._locate(offset, size, block)
        self._check_open()
        # The view refers to the buffer, that to the pointer, that to the destructor, and that to the memory, which
        # unmaps itself with the last reference.
        destructor = functools.partial(_keep_until_here, self._memories[number])
        pointer = ffi.gc(ffi.cast("char *", self._blocks[number].address + offset), destructor)
        view = memoryview(ffi.buffer(pointer, size_bytes))
        return view if writable else view.toreadonly()


def _keep_until_here(memory: Memory, pointer: object) -> None:
    """Does nothing: its reference to the memory ends with the pointer."""
