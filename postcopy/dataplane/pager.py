# SPDX-License-Identifier: Apache-2.0
"""The destination's engine, as Python sees it.

All that happens for each page happens in C (csrc/pager/pager.c): this class opens, hands over connected sockets, reads
counters and closes. No Python code is ever on the path of a fault, and no method here touches guest memory.

Resource handling: the pager keeps every `Memory` given to it in use until `close()` has ended its threads. Descriptors
given to `attach_*` belong to the core from then on, whatever happens; take them from a Trio socket with
``socket.detach()``.

Threads and cancellation: use a pager from the Trio thread only. The plain methods take microseconds and do not block.
The asynchronous ones run the core's blocking call in a worker thread and see it through, shielded from cancellation but
bounded in time (`_blocking.END_TIMEOUT_S`): a pager is never left half closed. When even that time passes,
`MigrationError` is raised and everything the stuck thread may touch is kept for the rest of the process's life.
"""

from __future__ import annotations

import enum
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from postcopy._blocking import run_to_end
from postcopy._native import ffi, lib
from postcopy.dataplane._events import ChannelKind, Event, EventQueue, EventStream, EventType
from postcopy.dataplane.histogram import Histogram
from postcopy.errors import CoreError, ErrorLine, MigrationError, check
from postcopy.memory import Memory
from postcopy.memory.bitmap import Bitmap
from postcopy.uffd import How, parse_how, probe

__all__ = ["ChannelKind", "Event", "EventStream", "EventType", "Pager", "PagerStatistics", "Stage"]


class Stage(enum.IntEnum):
    """Parts of a fault's latency; each begins where the one before ended."""

    SENT = 0  # fault event read -> request sent
    RECEIVED = 1  # -> page received
    PLACED = 2  # -> page placed, thread woken
    TOTAL = 3  # all of it


@dataclass(frozen=True)
class PagerStatistics:
    """`struct pc_pager_stats`: counters since the pager was made."""

    total_pages: int
    total_bytes: int
    resident_pages: int  # received or known to be zero
    resident_bytes: int
    demand_pages: int  # placed in answer to a fault
    background_pages: int  # placed by push, content not zero
    zero_pages: int  # known to be zero: never sent as content
    duplicate_pages: int  # arrived again and dropped
    requests: int  # request frames
    faults: int  # fault events read
    repeated_faults: int  # of them, on a page already requested or already there
    event_reads: int  # read(2) calls on userfaultfds that returned events
    bytes_received: int  # on data channels, headers included
    bytes_sent: int
    pending_faults: int  # threads blocked now, as far as events were read
    oldest_pending_ns: int  # for how long the first of them has been, 0 when there is none
    frames_refused: int  # bad frames, each of which ended its channel


_STATISTICS_FIELDS = tuple(PagerStatistics.__dataclass_fields__)


@dataclass(frozen=True)
class ForeignMemory:
    """Memory of another process: where it is there, and the memfd it is made of (-1: anonymous), which stays the
    caller's."""

    address: int
    size_bytes: int
    page_bytes: int
    kind: int  # enum pc_memory_kind
    fd: int = -1

    @property
    def pages(self) -> int:
        return self.size_bytes // self.page_bytes

    @property
    def struct(self) -> Any:
        """A `struct pc_memory`, through which nothing may be touched here."""
        base = ffi.cast("void *", self.address)
        return ffi.new("struct pc_memory *", [base, self.size_bytes, self.page_bytes, self.kind, self.fd])


class Pager:
    """Make it, `add_block` each RAM block in order, `set_zero` what is known to be zero, `add_shard`, `attach_*` the
    connections, `arm`; then let the machine run and follow `events()` until `EventType.COMPLETE`; `disarm`, `close`.

    An asynchronous context manager: leaving it closes it.
    """

    def __init__(self) -> None:
        pointer: Any = ffi.new("struct pc_pager **")
        check(lib.pc_pager_new(pointer), "making a pager")
        try:
            self._events = EventQueue(lib.pc_pager_event_fd(pointer[0]), self._next_event)
        except OSError as error:
            lib.pc_pager_free(pointer[0])
            raise CoreError(error.errno or 0, "making a pager") from error
        self._pager: Any = pointer[0]
        self._blocks: list[Memory | ForeignMemory] = []
        self._slots = 0
        self._ending = trio.Lock()
        self._stuck = False

    # ---- setting it up

    def add_block(self, memory: Memory) -> int:
        """Adds the next RAM block; its index. The memory is in use until the pager is closed."""
        pager = self._alive()
        memory.acquire("pager")
        try:
            index = check(lib.pc_pager_add_block(pager, memory.struct), "giving memory to the pager")
        except BaseException:
            memory.release("pager")
            raise
        self._blocks.append(memory)
        return index

    def add_block_with_states(self, block: Memory | ForeignMemory, states_fd: int) -> int:
        """Adds the next RAM block with page states that outlive this pager (csrc/memory/states.c); its index. What
        they say is there is not missing. The descriptor stays the caller's.

        A `ForeignMemory` is that of another process, whose userfaultfd `adopt_shard` gets; it must exist for as
        long."""
        pager = self._alive()
        if isinstance(block, Memory):
            block.acquire("pager")
        try:
            index = check(
                lib.pc_pager_add_block_with_states(pager, block.struct, states_fd), "giving memory to the pager"
            )
        except BaseException:
            if isinstance(block, Memory):
                block.release("pager")
            raise
        self._blocks.append(block)
        return index

    def set_zero(self, block: int, zero: Bitmap) -> None:
        """Tells which pages of a block are zero at the source (`Bitmap.inverted` of those present): they are never
        requested, a fault on them is answered at once. Before arming."""
        pager = self._alive()
        self._check_length(block, zero)
        check(lib.pc_pager_set_zero(pager, block, zero.words), "marking zero pages")

    def add_shard(self, how: How | str = How.ANY, busy_poll_us: int = 0) -> int:
        """Opens a userfaultfd and starts its fault thread; its index. `busy_poll_us`: how long the thread spins after
        each event before it sleeps, which saves a wake-up on the path of a fault and costs a CPU meanwhile.

        `ResourceError` with the remedy where the user may not have a userfaultfd (see `uffd.explain_unavailable`).
        """
        wanted = parse_how(how)
        pager = self._alive()
        line = ErrorLine()
        result = lib.pc_pager_add_shard(pager, wanted, busy_poll_us, line.buffer, line.size)
        if result < 0:
            probe(wanted)  # says more, where the reason is a right or a kernel without userfaultfd
        return line.check(result, "opening a userfaultfd")

    def adopt_shard(self, uffd: int, features: int, busy_poll_us: int = 0) -> int:
        """Starts the fault thread of a userfaultfd that exists, non-blocking and opened with `features`, of this or
        another process; its index. The descriptor is the core's from now on: whoever made it keeps a copy, since
        closing the last one would show zeros to all who wait."""
        line = ErrorLine()
        result = lib.pc_pager_adopt_shard(self._alive(), uffd, features, busy_poll_us, line.buffer, line.size)
        return line.check(result, "taking over a userfaultfd")

    def arm(self, shard: int, block: int, first_page: int, pages: int) -> None:
        """Registers pages with a shard: from here on the first touch of a missing one waits for it."""
        pager = self._alive()
        line = ErrorLine()
        result = lib.pc_pager_arm(pager, shard, block, first_page, pages, line.buffer, line.size)
        line.check(result, "registering memory with a userfaultfd")

    def attach_urgent(self, shard: int, fd: int) -> None:
        """Gives a shard its connected socket, the core's from now on. After the old one went down: all that is pending
        is requested again."""
        self._attach(lib.pc_pager_attach_urgent, shard, fd, "urgent")

    def attach_bulk(self, channel: int, fd: int) -> None:
        """Adds a connected socket on which pages are pushed, the core's from now on."""
        self._attach(lib.pc_pager_attach_bulk, channel, fd, "bulk")

    def track_thread(self, slot: int, tid: int) -> None:
        """Accounts the faults of kernel thread `tid` to `slot` (a vCPU number), see `blocktime_ns`."""
        check(lib.pc_pager_track_thread(self._alive(), slot, tid), "tracking a thread")
        self._slots = max(self._slots, slot + 1)

    async def confirm(self) -> None:
        """Everything asked of the pager so far has been done, or what went wrong is raised. Here each method has said
        so itself; those of `ProcessPager` do not wait. To be awaited before anything is promised: after `arm`, after
        `attach_urgent` and `attach_bulk`."""
        self._alive()
        await trio.lowlevel.checkpoint()

    # ---- while it runs

    def request_missing(self, limit: int) -> int:
        """Asks, on the urgent channels, for up to `limit` pages that are missing and were not asked for; how many."""
        return check(lib.pc_pager_request_missing(self._alive(), limit), "requesting missing pages")

    def request_range(self, block: int, first_page: int, pages: int) -> int:
        """Asks, on the urgent channels, for the pages of a range that are missing and were not asked for, a window at a
        time beside what threads wait for; how many of the range are not there yet."""
        self._check_range(block, first_page, pages)
        return check(lib.pc_pager_request_range(self._alive(), block, first_page, pages), "requesting pages")

    def watch(self, block: int, first_page: int, pages: int, event_fd: int) -> int:
        """Has 1 added to an eventfd, once, when every page of a range is there; requests nothing. A ticket for
        `unwatch`, or 0 when they are there already and nothing will be written. The descriptor stays the caller's."""
        self._check_range(block, first_page, pages)
        return check(lib.pc_pager_watch(self._alive(), block, first_page, pages, event_fd), "watching pages")

    def unwatch(self, ticket: int) -> None:
        """Nothing is written any more from here on. Harmless when it was written already, or the pager is closed."""
        if self._pager is not None:
            lib.pc_pager_unwatch(self._pager, ticket)

    def statistics(self) -> PagerStatistics:
        """Counters, each exact, but not of one instant."""
        stats: Any = ffi.new("struct pc_pager_stats *")
        check(lib.pc_pager_stats(self._alive(), stats), "reading the pager's counters")
        return PagerStatistics(**{name: int(getattr(stats, name)) for name in _STATISTICS_FIELDS})

    def latency(self, stage: Stage = Stage.TOTAL) -> Histogram:
        """Latencies of demand faults, all shards together."""
        histogram = Histogram()
        check(lib.pc_pager_latency(self._alive(), stage, histogram.struct), "reading the pager's latencies")
        return histogram

    def blocktime_ns(self) -> list[int]:
        """How long each tracked slot has been blocked on missing pages, faults still pending counted up to now."""
        pager = self._alive()
        times: Any = ffi.new("uint64_t[]", max(1, self._slots))
        slots = check(lib.pc_pager_blocktime(pager, times, self._slots), "reading blocktimes")
        return [int(times[slot]) for slot in range(min(slots, self._slots))]

    def received(self, block: int) -> Bitmap:
        """A copy of the map of pages that are there (received or known to be zero)."""
        pager = self._alive()
        bitmap = Bitmap(self._block(block).pages)
        check(lib.pc_pager_received(pager, block, bitmap.words), "reading the received map")
        return bitmap

    def events(self) -> EventStream:
        """What happens, as it happens: ``async for event in pager.events()``. One task at a time; see `EventStream`."""
        self._alive()
        return self._events.stream()

    def drain_events(self) -> list[Event]:
        """What `events()` has not told yet, as after `disconnect`: the end of a channel must not be taken for that of
        the next one. Never blocks."""
        return self._events.drain()

    async def watch_over(self) -> None:
        """Never returns: this pager is part of the process that has the machine. (`ProcessPager` is not.)"""
        await trio.sleep_forever()

    @property
    def process(self) -> tuple[int, int] | None:
        """None: the threads are this process's. (`ProcessPager`: its process, and how many have died before.)"""
        return None

    # ---- the end

    async def disconnect(self) -> None:
        """Closes every data channel and waits for their threads. Memory stays armed, faults stay blocked; new channels
        may be attached afterwards."""
        async with self._ending:
            await self._run(lib.pc_pager_disconnect, self._alive(), "closing the pager's channels")

    async def disarm(self) -> None:
        """Unregisters all memory. `BusyError` while a page is missing: unregistering would show zeros in its place."""
        async with self._ending:
            await self._run(lib.pc_pager_disarm, self._alive(), "unregistering memory")

    async def close(self) -> None:
        """Ends all threads, closes channels and userfaultfds, frees the pager, lets go of the memory. Twice does no
        harm.

        While pages are missing they are poisoned first: whoever touches one gets SIGBUS, never zeros. Where the kernel
        cannot poison, the userfaultfds stay open, the memory stays in use, and `BusyError` says so.
        """
        with trio.CancelScope(shield=True):  # bounded: all that runs under the lock is
            async with self._ending:
                if self._pager is None:
                    return
                pager, self._pager = self._pager, None
                self._events.close()
                await self._run(lib.pc_pager_free, pager, "ending the pager")
                for memory in self._blocks:
                    if isinstance(memory, Memory):
                        memory.release("pager")
                self._blocks.clear()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def __aenter__(self) -> Pager:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if getattr(self, "_pager", None) is not None:
            # Its threads run on, and its memory stays mapped: never free what may still be written to.
            warnings.warn("a pager was never closed", ResourceWarning, stacklevel=2, source=self)

    # ---- private

    def _alive(self) -> Any:
        if self._pager is None:
            raise trio.ClosedResourceError("this pager was closed")
        return self._pager

    def _next_event(self, event: Any) -> int:
        return int(lib.pc_pager_next_event(self._alive(), event))

    def _attach(self, function: Callable[[Any, int, int], int], index: int, fd: int, what: str) -> None:
        if self._pager is None or index < 0:
            os.close(fd)  # ours to close from the call on, also when it cannot reach the core
            self._alive()
            raise ValueError(f"there is no {what} channel {index}")
        check(function(self._pager, index, fd), f"attaching {what} channel {index}")

    def _block(self, block: int) -> Memory | ForeignMemory:
        if not 0 <= block < len(self._blocks):
            raise IndexError(f"there is no RAM block {block}")
        return self._blocks[block]

    def _check_range(self, block: int, first_page: int, pages: int) -> None:
        self._alive()
        if first_page < 0 or pages < 0 or first_page + pages > self._block(block).pages:
            raise IndexError(f"RAM block {block} has no pages {first_page} to {first_page + pages}")

    def _check_length(self, block: int, bitmap: Bitmap) -> None:
        if len(bitmap) != self._block(block).pages:  # the core would read past its end
            raise ValueError(f"a map of {len(bitmap)} pages for a block of {self._block(block).pages}")

    async def _run(self, function: Callable[[Any], int], pager: Any, what: str) -> None:
        if self._stuck:
            raise MigrationError("a thread of the pager hangs; its memory is kept")
        try:
            result = await run_to_end(lambda: function(pager), what)
        except MigrationError:
            self._stuck = True
            raise
        check(result, what)
