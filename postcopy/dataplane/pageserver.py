# SPDX-License-Identifier: Apache-2.0
"""The source's engine, as Python sees it: the twin of `pager`, with the same rules for resources, threads and
cancellation.

Requests are answered, and pages pushed in the background, by C threads (csrc/pageserver/pageserver.c). Until `start()` they send
nothing, since the machine may still change its memory.
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from postcopy._blocking import no_thread, run_to_end
from postcopy._native import ffi, lib
from postcopy.dataplane._events import ChannelKind, Event, EventQueue, EventStream, EventType
from postcopy.errors import CoreError, MigrationError, check
from postcopy.memory import Memory
from postcopy.memory.bitmap import Bitmap

__all__ = ["ChannelKind", "Event", "EventStream", "EventType", "PageServer", "PageServerStatistics"]


@dataclass(frozen=True)
class PageServerStatistics:
    """`struct pc_pageserver_stats`: counters since the page server was made."""

    total_pages: int
    sent_pages: int  # offered at least once, zero pages included
    demand_pages: int  # sent in answer to a request
    background_pages: int
    zero_pages: int  # told as a run of nothing
    requests: int
    repeated_requests: int  # asked again after having been answered on demand
    bytes_sent: int  # on data channels, headers included
    bytes_received: int
    released_bytes: int  # content whose memory has been given back, see `PageServer.release`


_STATISTICS_FIELDS = tuple(PageServerStatistics.__dataclass_fields__)


class PageServer:
    """Make it, `add_block` each RAM block in order, `attach_*` the connections; with the machine paused `set_present`
    each block and `start`; follow `events()`; `close`. Memory of a block is in use until then.

    Several page servers may serve the same memory, for several destinations. An asynchronous context manager.
    """

    def __init__(self, max_bandwidth_bytes_per_s: int = 0) -> None:
        """`max_bandwidth_bytes_per_s` limits what is pushed, 0 is no limit; requested pages are never held up."""
        pointer: Any = ffi.new("struct pc_pageserver **")
        check(lib.pc_pageserver_new(max_bandwidth_bytes_per_s, pointer), "making a page server")
        try:
            self._events = EventQueue(lib.pc_pageserver_event_fd(pointer[0]), self._next_event)
        except OSError as error:
            lib.pc_pageserver_free(pointer[0])
            raise CoreError(error.errno or 0, "making a page server") from error
        self._server: Any = pointer[0]
        self._blocks: list[tuple[Memory, int]] = []
        self._ending = trio.Lock()
        self._stuck = False

    # ---- setting it up

    def add_block(self, memory: Memory, page_bytes: int | None = None) -> int:
        """Adds the next RAM block; its index. `page_bytes` is the unit of transfer, by default the memory's page; a
        last page that the memory fills in part is sent padded with zeros."""
        server = self._alive()
        unit = page_bytes or memory.page_bytes
        memory.acquire("page server")
        try:
            index = check(
                lib.pc_pageserver_add_block(server, memory.struct, unit),
                f"giving memory to the page server in pages of {unit} bytes",
            )
        except BaseException:
            memory.release("page server")
            raise
        self._blocks.append((memory, -(-memory.size_bytes // unit)))
        return index

    def block_pages(self, block: int) -> int:
        """How many pages of transfer a block has."""
        if not 0 <= block < len(self._blocks):
            raise IndexError(f"there is no RAM block {block}")
        return self._blocks[block][1]

    def set_present(self, block: int, present: Bitmap) -> None:
        """Tells which pages (of transfer) may hold something but zeros; the others are never read. Without it: all."""
        server = self._alive()
        if len(present) != self.block_pages(block):  # the core would read past its end
            raise ValueError(f"a map of {len(present)} pages for a block of {self.block_pages(block)}")
        check(lib.pc_pageserver_set_present(server, block, present.words), "telling the page server what is present")

    def set_received(self, block: int, received: Bitmap) -> None:
        """Recovery: the destination has these pages (of transfer) and no others, all others are offered again.
        `BusyError` while a channel is attached: `disconnect` first. `CoreError` when a page that was released is not
        among them: it is nowhere else, so nothing could be right any more."""
        server = self._alive()
        if len(received) != self.block_pages(block):  # the core would read past its end
            raise ValueError(f"a map of {len(received)} pages for a block of {self.block_pages(block)}")
        check(lib.pc_pageserver_set_received(server, block, received.words), "telling the page server what has arrived")

    def attach_urgent(self, shard: int, fd: int, busy_poll_us: int = 0) -> None:
        """Gives the shard's connected socket to the core, which owns it from now on, also on failure. `ResourceError`
        when there is no memory or no thread for it: it is then as if it had not been tried."""
        self._attach(
            lambda server: lib.pc_pageserver_attach_urgent(server, shard, fd, busy_poll_us), shard, fd, "urgent"
        )

    def attach_bulk(self, channel: int, fd: int) -> None:
        """Adds a connected socket for pushing pages; the core owns it from now on, also on failure."""
        self._attach(lambda server: lib.pc_pageserver_attach_bulk(server, channel, fd), channel, fd, "bulk")

    # ---- while it runs

    def start(self) -> None:
        """From here on memory must not change: requests are answered, the rest is pushed."""
        check(lib.pc_pageserver_start(self._alive()), "starting the page server")

    def release(self, block: int, first_page: int, placed: Bitmap) -> None:
        """Gives back the memory of pages (of transfer, from `first_page` on) that the destination has for good.

        None of them is read again, a request for one is never answered with content. What a channel is sending right
        now, and what shares a larger page of memory with a page that is not released, stays until a later call. After
        `start` only. Takes as long as the kernel needs, without the GIL: call it in a worker thread. `CoreError` for
        memory that is a file (ENOTSUP) and where the kernel does not take it back: it is then kept.
        """
        server = self._alive()
        if first_page < 0 or first_page + len(placed) > self.block_pages(block):
            raise IndexError(f"RAM block {block} has no pages {first_page} to {first_page + len(placed)}")
        check(lib.pc_pageserver_release(server, block, first_page, len(placed), placed.words), "giving memory back")

    def released(self, block: int) -> Bitmap:
        """The pages (of transfer) that were released: they can be had from the destination only."""
        released = Bitmap(self.block_pages(block))
        result = lib.pc_pageserver_released(self._alive(), block, released.words, ffi.NULL)
        check(result, "reading the map of released pages")
        return released

    def discarded(self, block: int) -> Bitmap:
        """Those of the released pages whose memory is gone: the content of the others is still here."""
        discarded = Bitmap(self.block_pages(block))
        result = lib.pc_pageserver_released(self._alive(), block, ffi.NULL, discarded.words)
        check(result, "reading the map of released pages")
        return discarded

    def set_bandwidth(self, max_bandwidth_bytes_per_s: int) -> None:
        """Changes the limit on what is pushed; 0 is none."""
        check(lib.pc_pageserver_set_bandwidth(self._alive(), max_bandwidth_bytes_per_s), "setting the bandwidth")

    def statistics(self) -> PageServerStatistics:
        """Counters, each exact, but not of one instant."""
        stats: Any = ffi.new("struct pc_pageserver_stats *")
        check(lib.pc_pageserver_stats(self._alive(), stats), "reading the page server's counters")
        return PageServerStatistics(**{name: int(getattr(stats, name)) for name in _STATISTICS_FIELDS})

    def events(self) -> EventStream:
        """What happens, as it happens. One task at a time; see `EventStream`."""
        self._alive()
        return self._events.stream()

    def drain_events(self) -> list[Event]:
        """What `events()` has not told yet, as after `disconnect`: the end of a channel must not be taken for that of
        the next one. Never blocks."""
        return self._events.drain()

    # ---- the end

    async def disconnect(self) -> None:
        """Closes every data channel and waits for their threads; new ones may be attached afterwards."""
        async with self._ending:
            await self._run(lib.pc_pageserver_disconnect, self._alive(), "closing the page server's channels")

    async def close(self) -> None:
        """Ends all threads, closes the channels, frees the server, lets go of the memory. Twice does no harm."""
        with trio.CancelScope(shield=True):  # bounded: all that runs under the lock is
            async with self._ending:
                if self._server is None:
                    return
                server, self._server = self._server, None
                self._events.close()
                await self._run(_free, server, "ending the page server")
                for memory, _ in self._blocks:
                    memory.release("page server")
                self._blocks.clear()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def __aenter__(self) -> PageServer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if getattr(self, "_server", None) is not None:
            # Its threads run on, and its memory stays mapped: never free what may still be written to.
            warnings.warn("a page server was never closed", ResourceWarning, stacklevel=2, source=self)

    # ---- private

    def _alive(self) -> Any:
        if self._server is None:
            raise trio.ClosedResourceError("this page server was closed")
        return self._server

    def _next_event(self, event: Any) -> int:
        return int(lib.pc_pageserver_next_event(self._alive(), event))

    def _attach(self, attach: Callable[[Any], int], index: int, fd: int, what: str) -> None:
        if self._server is None or index < 0:
            os.close(fd)  # ours to close from the call on, also when it cannot reach the core
            self._alive()
            raise ValueError(f"there is no {what} channel {index}")
        result = attach(self._server)
        if result == -errno.EAGAIN:
            raise no_thread(f"{what} channel {index} of the page server")
        check(result, f"attaching {what} channel {index}")

    async def _run(self, function: Callable[[Any], int], server: Any, what: str) -> None:
        if self._stuck:
            raise MigrationError("a thread of the page server hangs; its memory is kept")
        try:
            result = await run_to_end(lambda: function(server), what)
        except MigrationError:
            self._stuck = True
            raise
        check(result, what)


def _free(server: Any) -> int:
    lib.pc_pageserver_free(server)
    return 0
