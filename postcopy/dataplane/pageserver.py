# SPDX-License-Identifier: Apache-2.0
"""The source's engine, as Python sees it: a `struct pc_pageserver`.

Requests are answered, and pages pushed in the background, by C threads (csrc/pageserver). Until `serve()` they answer
nothing, since the machine may still change its memory; what is pushed before may have to be pushed again. `_base` says
what holds for resources, threads, cancellation.
"""

from __future__ import annotations

from typing import Any

from postcopy._native import ffi
from postcopy.dataplane._base import CoreDataPlane
from postcopy.dataplane._events import ChannelKind, Event, EventStream, EventType
from postcopy.dataplane.compression import Compression
from postcopy.dataplane.counters import PageServerStatistics, read
from postcopy.memory import Memory
from postcopy.memory.bitmap import Bitmap

__all__ = ["ChannelKind", "Event", "EventStream", "EventType", "PageServer", "PageServerStatistics"]


class PageServer(CoreDataPlane):
    """Make it, `add_block` each RAM block in order, `attach_*` the connections; with the machine paused `set_present`
    each block and `start`; follow `events()`; `close`.

    Precopy, while the machine runs: `set_present`, then in each round `push`, wait until every bulk channel has ended
    it (`EventType.BULK_END`), `set_stale` what was written since. With the machine paused: `set_stale`, `serve`, and
    `push` for what is left.

    Several page servers may serve the same memory, for several destinations.
    """

    NAME = "page server"
    PREFIX = "pc_pageserver"

    def __init__(self, max_bandwidth_bytes_per_s: int = 0) -> None:
        """`max_bandwidth_bytes_per_s` limits what is pushed, 0 is no limit; requested pages are never held up."""
        super().__init__(max_bandwidth_bytes_per_s)

    # ---- setting it up

    def add_block(self, memory: Memory, page_bytes: int | None = None) -> int:
        """Adds the next RAM block; its index. `page_bytes` is the unit of transfer, by default the memory's page; a
        last page that the memory fills in part is sent padded with zeros."""
        unit = page_bytes or memory.page_bytes
        what = f"giving memory to the page server in pages of {unit} bytes"
        pages = -(-memory.size_bytes // unit)
        return self._add_block(memory, pages, lambda: self._call(what, "add_block", memory.struct, unit))

    def block_pages(self, block: int) -> int:
        """How many pages of transfer a block has."""
        return self._block(block).pages

    def set_present(self, block: int, present: Bitmap) -> None:
        """Says which pages (of transfer) may hold something but zeros; the others are never read. Without it: all."""
        self._check_length(block, present)
        self._call("setting the map of present pages", "set_present", block, present.words)

    def set_received(self, block: int, received: Bitmap) -> None:
        """Recovery: the destination has these pages (of transfer) and no others, all others are offered again.
        `BusyError` while a channel is attached: `disconnect` first. `CoreError` when a page that was released is not
        among them: it is nowhere else, so nothing could be right any more."""
        self._check_length(block, received)
        self._call("setting the map of received pages", "set_received", block, received.words)

    def attach_urgent(self, shard: int, fd: int, busy_poll_us: int = 0, *, tls: Any = None) -> None:
        """Gives the shard's connected socket, with its TLS where it has that, to the core, which owns both from now on,
        also on failure. `ResourceError` when there is no memory or no thread for it: it is then as if it had not been
        tried."""
        self._attach("urgent", shard, fd, tls, busy_poll_us)

    def attach_bulk(self, channel: int, fd: int, *, tls: Any = None) -> None:
        """Adds a connected socket for pushing pages; the core owns it from now on, also on failure."""
        self._attach("bulk", channel, fd, tls)

    # ---- while it runs

    def set_stale(self, block: int, stale: Bitmap) -> None:
        """Says which pages (of transfer) were written since they were pushed, or since `set_present`: the next push
        offers them again. Before `serve`. `BusyError` during a push."""
        self._check_length(block, stale)
        self._call("setting the map of stale pages", "set_stale", block, stale.words)

    def push(self) -> None:
        """Has each bulk channel push what has not been sent, and end the push (`EventType.BULK_END`).

        Before `serve` the memory may be written meanwhile: what was is then to be named by `set_stale`. A channel that
        is attached later joins the next push, or this one when the server serves. `BusyError` during a push."""
        self._call("pushing pages", "push")

    def stop_push(self) -> None:
        """Has a push before `serve` end soon: what it has not sent is left to the next one. The channels end it as
        always."""
        self._call("stopping a push", "stop_push")

    def serve(self) -> None:
        """From here on memory must not change: requests are answered. Twice does no harm. `BusyError` during a push."""
        self._call("starting to serve pages", "serve")

    def start(self) -> None:
        """`serve` and `push`, as after the pause of postcopy. Twice does no harm."""
        self._call("starting the page server", "start")

    def release(self, block: int, first_page: int, placed: Bitmap) -> None:
        """Gives back the memory of pages (of transfer, from `first_page` on) that the destination has for good.

        None of them is read again, a request for one is never answered with content. What a channel is sending right
        now, and what shares a larger page of memory with a page that is not released, stays until a later call. After
        `serve` only. Takes as long as the kernel needs, without the GIL: call it in a worker thread. `CoreError` for
        memory that is a file (ENOTSUP) and where the kernel does not take it back: it is then kept.
        """
        self._check_range(block, first_page, len(placed))
        self._call("giving memory back", "release", block, first_page, len(placed), placed.words)

    def released(self, block: int) -> Bitmap:
        """The pages (of transfer) that were released: they can be had from the destination only."""
        released = Bitmap(self.block_pages(block))
        self._call("reading the map of released pages", "released", block, released.words, ffi.NULL)
        return released

    def discarded(self, block: int) -> Bitmap:
        """Those of the released pages whose memory is gone: the content of the others is still here."""
        discarded = Bitmap(self.block_pages(block))
        self._call("reading the map of released pages", "released", block, ffi.NULL, discarded.words)
        return discarded

    def set_bandwidth(self, max_bandwidth_bytes_per_s: int) -> None:
        """Changes the limit on what is pushed; 0 is none."""
        self._call("setting the bandwidth", "set_bandwidth", max_bandwidth_bytes_per_s)

    def set_compression(self, how: Compression, *, adaptive: bool = False) -> None:
        """How pages are pushed from now on; the destination must know it. `adaptive`: `how` is a set, and each channel
        sends in the way, compressed or not, by which most content goes out. Pages that do not become smaller are sent
        as they are, requested ones always. `CoreError` for what this host has no library for
        (`postcopy.dataplane.compression`), and for a set that is not `adaptive`."""
        self._call("setting the compression", "set_compression", how.value, adaptive)

    def statistics(self) -> PageServerStatistics:
        """Counters, each exact, but not of one instant."""
        return read(PageServerStatistics, lambda struct: self._call("reading the counters", "stats", struct))
