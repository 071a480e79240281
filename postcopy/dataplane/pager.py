# SPDX-License-Identifier: Apache-2.0
"""The destination's engine, as Python sees it: a `struct pc_pager`.

All that happens for each page happens in C (csrc/pager): this class opens, hands over connected sockets, reads counters
and closes. No Python code is ever on the path of a fault, and no method here touches guest memory. `_base` says what
holds for resources, threads, cancellation.
"""

from __future__ import annotations

import abc
import enum
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import trio

from postcopy._blocking import run_to_end
from postcopy._native import ffi, lib
from postcopy.dataplane._base import CoreDataPlane, DataPlane, ForeignMemory
from postcopy.dataplane._events import ChannelKind, Event, EventStream, EventType
from postcopy.dataplane.ahead import Prefetch
from postcopy.dataplane.compression import Compression
from postcopy.dataplane.counters import PagerStatistics, read
from postcopy.dataplane.histogram import Histogram
from postcopy.errors import ErrorLine, PostcopyError, check
from postcopy.memory import Memory
from postcopy.memory.bitmap import Bitmap
from postcopy.memory.workingset import Run
from postcopy.uffd import How, parse_how, probe

_RUNS_AT_ONCE = 4096
DISCARDED_AT_ONCE = 64
"""Discarding so many pages takes no longer than having another thread do it, and the machine may be waiting for it."""

__all__ = [
    "ChannelKind",
    "Event",
    "EventStream",
    "EventType",
    "ForeignMemory",
    "Pager",
    "PagerStatistics",
    "Stage",
    "new_metrics",
    "new_states",
    "new_touches",
    "read_touches",
]


class Stage(enum.IntEnum):
    """Parts of a fault's latency; each begins where the one before ended."""

    SENT = 0  # fault event read -> request sent
    RECEIVED = 1  # -> page received
    PLACED = 2  # -> page placed, thread woken
    TOTAL = 3  # all of it


class PagerCounters(DataPlane):
    """What `Pager` and `ProcessPager` count, each in its own struct."""

    NAME = "pager"
    COUNTERS: ClassVar[str]  # the prefix of the functions that read it

    _counters: Any  # the struct
    _slots = 0

    async def forget(self, block: int, stale: Bitmap) -> None:
        """Precopy, before the machine runs here: these pages of a block have changed at the source. What was received
        of them is discarded and missing again, and `EventType.COMPLETE` will be reported again.

        Only when every bulk channel has ended its push (`EventType.BULK_END`) and nothing has been requested, so that
        no old page is under way. `BusyError` while there is a watch. Seen through when cancelled.
        """
        self._check_length(block, stale)
        memory = self._block(block).memory
        await self._forget(block, stale)
        if not isinstance(memory, Memory) or (memory.struct.base == ffi.NULL and memory.fd < 0):
            return  # nothing of it has been placed (the core has checked that): it is not armed
        # After it: a pager that dies in between has content too much, which stops it, and never too little.
        if stale.count() <= DISCARDED_AT_ONCE:
            memory.discard_pages(stale)
        else:
            await run_to_end(lambda: memory.discard_pages(stale), "discarding pages that have changed at the source")

    @abc.abstractmethod
    async def _forget(self, block: int, stale: Bitmap) -> None:
        """In the pager's maps."""

    def track_thread(self, slot: int, tid: int) -> None:
        """Accounts the faults of kernel thread `tid` to `slot` (a vCPU number), see `blocktime_ns`."""
        self._count("tracking a thread", "track_thread", slot, tid)
        self._slots = max(self._slots, slot + 1)

    def statistics(self) -> PagerStatistics:
        """Counters, each exact, but not of one instant."""
        return read(PagerStatistics, lambda struct: self._count("reading the pager's counters", "stats", struct))

    def latency(self, stage: Stage = Stage.TOTAL) -> Histogram:
        """Latencies of demand faults, all shards together."""
        histogram = Histogram()
        self._count("reading the pager's latencies", "latency", stage, histogram.struct)
        return histogram

    def stages(self) -> list[Histogram]:
        return [self.latency(stage) for stage in Stage]

    def blocktime_ns(self) -> list[int]:
        """How long each tracked slot has been blocked on missing pages, faults still pending counted up to now."""
        times: Any = ffi.new("uint64_t[]", max(1, self._slots))
        slots = self._count("reading blocktimes", "blocktime", times, self._slots)
        return [int(times[slot]) for slot in range(min(slots, self._slots))]

    def _count(self, what: str, name: str, *arguments: Any) -> int:
        self._check_open()
        return check(getattr(lib, f"{self.COUNTERS}_{name}")(self._counters, *arguments), what)


class Pager(CoreDataPlane, PagerCounters):
    """Make it, `add_block` each RAM block in order, `set_zero` what is known to be zero, `add_shard`, `attach_*` the
    connections, `arm`; then let the machine run and follow `events()` until `EventType.COMPLETE`; `disarm`, `close`.
    """

    PREFIX = COUNTERS = "pc_pager"

    def __init__(self, metrics_fd: int = -1) -> None:
        """`metrics_fd`: where it counts (`new_metrics`), so that its successor goes on counting; stays the caller's."""
        super().__init__(metrics_fd)
        self._counters = self._struct
        self._staged: set[int] = set()  # blocks

    # ---- setting it up

    def add_block(self, memory: Memory | ForeignMemory, states_fd: int = -1) -> int:
        """Adds the next RAM block; its index.

        `states_fd`: page states that outlive this pager (csrc/memory/states.c): what they say is there is not missing.
        The descriptor stays the caller's. A `ForeignMemory`, whose userfaultfd `adopt_shard` gets, needs them, and must
        exist for as long as the pager.
        """
        what = "giving memory to the pager"

        def give() -> None:
            self._call(what, "add_block", memory.struct, states_fd)

        return self._add_block(memory, memory.pages, give, states_fd)

    def set_zero(self, block: int, zero: Bitmap) -> None:
        """Says which pages of a block are zero at the source (`Bitmap.inverted` of those present): they are never
        requested, a fault on them is answered at once."""
        self._check_length(block, zero)
        self._call("marking zero pages", "set_zero", block, zero.words)

    def add_shard(self, how: How | str = How.ANY, busy_poll_us: int = 0) -> int:
        """Opens a userfaultfd and starts its fault thread; its index. `busy_poll_us`: how long the thread busy-waits
        after each event before it sleeps, which saves a wake-up on the path of a fault and costs a CPU meanwhile.

        `ResourceError` with the remedy where the user may not have a userfaultfd (see `uffd.explain_unavailable`).
        """
        wanted = parse_how(how)
        try:
            return self._call_explained("opening a userfaultfd", "add_shard", wanted, busy_poll_us)
        except PostcopyError:
            probe(wanted)  # says more, where the reason is a right or a kernel without userfaultfd
            raise

    def adopt_shard(self, uffd: int, features: int, busy_poll_us: int = 0) -> int:
        """Starts the fault thread of a userfaultfd that exists, non-blocking and opened with `features`, of this or
        another process; its index. The descriptor is the core's from now on: its maker keeps a copy, since
        closing the last one would show zeros to all threads that wait."""
        return self._call_explained("taking over a userfaultfd", "adopt_shard", uffd, features, busy_poll_us)

    def arm(self, shard: int, block: int, first_page: int, pages: int) -> None:
        """Registers pages with a shard: from here on the first touch of a missing one waits for it."""
        self._call_explained("registering memory with a userfaultfd", "arm", shard, block, first_page, pages)

    def arm_at(self, shard: int, block: int, first_page: int, pages: int, address: int) -> None:
        """The same where they lie at `address` of the process whose userfaultfd the shard has: a block that was added
        without an address (`ForeignMemory.address` 0) may lie there in several parts. `BusyError` where the pages, or
        the addresses, are armed already."""
        what = "registering memory with a userfaultfd"
        self._call_explained(what, "arm_at", shard, block, first_page, pages, address)

    async def set_local(self, block: int, fd: int, offset: int = 0, pages: Bitmap | None = None) -> None:
        """Says that pages of a block (all, or those of `pages`) are read from a file, in which the block's content
        begins at `offset`; they are never requested. Its holes, and pages of zeros, are zero. The descriptor stays the
        caller's, and `O_RDONLY` is enough. At any time.

        A file that is too short is a `CoreError` (`ENODATA`). When it cannot be read later that is `EventType.FATAL`;
        who waits goes on waiting, until `set_local` is called again. Runs in a worker thread, seen through."""
        if pages is not None:
            self._check_length(block, pages)
        self._block(block)
        line = ErrorLine()
        words = ffi.NULL if pages is None else pages.words
        arguments = (self._struct, block, fd, offset, words, line.buffer, line.size)
        async with self._ending:
            self._check_open()
            line.check(
                await run_to_end(lambda: lib.pc_pager_set_local(*arguments), "looking at a memory file"),
                "giving the pager a file to read from",
            )

    def stage(self, block: int, fd: int) -> None:
        """What arrives for pages of this block that are not armed waits in this memfd, which is as large as the block;
        once they are armed, it is placed. What the memfd holds now counts as staged: pass the same one to a pager that
        takes over. The descriptor stays the caller's."""
        self._call("giving the pager a file to stage pages in", "stage", block, fd)
        self._staged.add(block)

    def ask_again(self) -> None:
        """The source is told when a thread comes to wait for a page that was asked for ahead: one that answers first
        what is waited for, as a `Bridge` does."""
        self._call("having the source told of late pages", "ask_again")

    def set_readers(self, demand: int, background: int) -> None:
        """How many threads read local pages that the page cache does not have, and how many prefetch; at first 2 of
        each. `BusyError` once there are any."""
        self._call("setting the number of readers", "set_readers", demand, background)

    def record_touches(self, fd: int) -> None:
        """Logs each page at its first demand fault, in a memfd from `new_touches`, which stays the caller's."""
        self._call("recording first touches", "record_touches", fd)

    def expect_push(self) -> None:
        """The source may begin another push: each bulk channel may end once more. One that ends twice in one push goes
        down."""
        self._call("expecting a push", "expect_push")

    def accept_compression(self, ways: Compression) -> None:
        """Says how pages that are pushed may be compressed, from now on; at first in no way. A channel on which another
        one comes goes down. `CoreError` for what this host has no library for (`postcopy.dataplane.compression`)."""
        self._call("accepting compression", "accept_compression", ways.value)

    async def _forget(self, block: int, stale: Bitmap) -> None:
        what = "forgetting pages"
        if block not in self._staged or stale.count() <= DISCARDED_AT_ONCE:
            self._call(what, "forget", block, stale.words)
            return
        async with self._ending:  # they are removed from the staging file
            self._check_open()
            struct = self._struct
            check(await run_to_end(lambda: lib.pc_pager_forget(struct, block, stale.words), what), what)

    def attach_urgent(self, shard: int, fd: int, *, tls: Any = None) -> None:
        """Gives a shard its connected socket, with its TLS where it has that; the core's from now on. After the old one
        went down: all that is pending is requested again."""
        self._attach("urgent", shard, fd, tls)

    def attach_bulk(self, channel: int, fd: int, *, tls: Any = None) -> None:
        """Adds a connected socket on which pages are pushed, the core's from now on."""
        self._attach("bulk", channel, fd, tls)

    async def confirm(self) -> None:
        """Everything asked of the pager so far has been done, or what went wrong is raised. Here each method has said
        so itself; those of `ProcessPager` do not wait. To be awaited before anything is promised: after `arm`, after
        `attach_urgent` and `attach_bulk`."""
        self._check_open()
        await trio.lowlevel.checkpoint()

    # ---- while it runs

    def request_missing(self, limit: int) -> int:
        """Asks, on the urgent channels, for up to `limit` pages that are missing and were not asked for; how many."""
        return self._call("requesting missing pages", "request_missing", limit)

    def request_range(self, block: int, first_page: int, pages: int) -> int:
        """Asks, on the urgent channels, for the pages of a range that are missing and were not asked for, a window at a
        time beside what threads wait for; how many of the range are not there yet."""
        self._check_range(block, first_page, pages)
        return self._call("requesting pages", "request_range", block, first_page, pages)

    def request_runs(self, runs: Any) -> None:
        """Asks for the pages of these `page_runs` that are armed, missing, and were not asked for, in their order, a
        window at a time beside what threads wait for: a working set that the source has."""
        self._call("requesting pages", "request_runs", runs, len(runs))

    def set_prefetch(self, policy: Prefetch) -> None:
        """What is asked for ahead of faults from now on; at first nothing."""
        self._call("setting the prefetch policy", "set_prefetch", policy.way, policy.pages)

    def prefetch_all(self) -> None:
        """Places all local pages that are armed, in the background, behind what threads wait for."""
        self._call("prefetching", "prefetch_all")

    def prefetch_runs(self, runs: Sequence[Run]) -> None:
        """Places the local pages of these runs in their order and ahead of `prefetch_all`: a working set. Zero pages
        among them are placed too, and cost no fault then."""
        self._call("prefetching", "prefetch_runs", page_runs(runs), len(runs))

    def prefetch_stop(self) -> None:
        """Ends both; pages that are staged are placed none the less."""
        self._call("ending the prefetch", "prefetch_stop")

    @property
    def prefetching(self) -> bool:
        """Whether something is being placed in the background, or will be."""
        return bool(self._call("looking at the prefetch", "prefetching"))

    def watch(self, block: int, first_page: int, pages: int, event_fd: int) -> int:
        """Has 1 added to an eventfd, once, when every page of a range is there; requests nothing. A ticket for
        `unwatch`, or 0 when they are there already and nothing will be written. The descriptor stays the caller's."""
        self._check_range(block, first_page, pages)
        return self._call("watching pages", "watch", block, first_page, pages, event_fd)

    def unwatch(self, ticket: int) -> None:
        """Nothing is written any more from here on. Harmless when it was written already, or the pager is closed."""
        if not self._closed:
            lib.pc_pager_unwatch(self._struct, ticket)

    def received(self, block: int) -> Bitmap:
        """A copy of the map of pages that are there (received or known to be zero)."""
        bitmap = Bitmap(self._block(block).pages)
        self._call("reading the received map", "received", block, bitmap.words)
        return bitmap

    async def watch_over(self) -> None:
        """Never returns: this pager is part of the process that has the machine. (`ProcessPager` is not.)"""
        await trio.sleep_forever()

    @property
    def process(self) -> tuple[int, int] | None:
        """None: the threads are this process's. (`ProcessPager`: its process, and how many have died before.)"""
        return None

    # ---- the end

    async def disarm(self) -> None:
        """Unregisters all memory. `BusyError` while a page is missing: unregistering would show zeros in its place."""
        await self._see_through("disarm", "unregistering memory")

    async def close(self) -> None:
        """Ends all threads, closes channels and userfaultfds, frees the pager, releases the memory. Twice does no
        harm.

        While pages are missing they are poisoned first: a thread that touches one gets SIGBUS, never zeros. Where the
        kernel cannot poison, the userfaultfds stay open, the memory stays in use, and `BusyError` says so.
        """
        await super().close()

    async def leave(self) -> None:
        """Ends all threads and frees the pager, as `close`, but memory stays registered and nothing is poisoned: others
        hold the userfaultfds, and what waits for a page waits for the next pager that has them. Nothing is being placed
        from here on. Closed already: no effect."""
        self._end_by = "leave"
        await self.close()


def page_runs(runs: Sequence[Run]) -> Any:
    """For the core. A million of them take some tenths of a second, in which other threads of Python run too."""
    packed: Any = ffi.new("struct pc_page_run[]", len(runs))
    for at in range(0, len(runs), _RUNS_AT_ONCE):
        some = runs[at : at + _RUNS_AT_ONCE]
        packed[at : at + len(some)] = [(first_page, pages, block) for block, first_page, pages in some]
    return packed


def new_metrics() -> int:
    """A memfd for what pagers count, one after the other, which outlives them."""
    pointer: Any = ffi.new("struct pc_metrics **")
    check(lib.pc_metrics_new(pointer), "making counters")
    try:
        return os.dup(lib.pc_metrics_fd(pointer[0]))
    finally:
        lib.pc_metrics_free(pointer[0])


def new_states(pages: int) -> int:
    """A memfd for the states of so many pages, which outlives pagers."""
    return check(lib.pc_states_new(pages), "making page states")


def new_touches(pages: int) -> int:
    """A memfd for the order in which pages are first touched (`Pager.record_touches`), which outlives pagers; `pages`:
    of all blocks together."""
    return check(lib.pc_touches_new(pages), "making a log of first touches")


def read_touches(fd: int) -> list[tuple[int, int]]:
    """Blocks and pages in the order in which they were first touched. A page may be in it twice when a pager died: the
    first one counts."""
    count = check(int(lib.pc_touches_read(fd, ffi.NULL, 0)), "reading the log of first touches")
    words: Any = ffi.new("uint64_t[]", max(1, count))
    count = check(int(lib.pc_touches_read(fd, words, count)), "reading the log of first touches")
    return [(words[i] >> 40, words[i] & (1 << 40) - 1) for i in range(count)]
