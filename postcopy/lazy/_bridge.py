# SPDX-License-Identifier: Apache-2.0
"""Answers a pager's page requests by calling a Python coroutine.

The pager, in C, is at the other end of a socket and does not know that this is no page server: it asks for single pages
by request frames, each with an id, and gets frames back (docs/protocol.md). So faults are read, content verified and
pages placed by C threads as always, and what Python does for a page is: unpack its request, call `fetch` together
with its neighbours', pack the answer.

**Two queues.** A request with PC_PAGER_REQUEST_AHEAD in its id was made ahead of any fault; no thread waits for it
yet. Those come second, and never take the last place of `max_fetches`. When a thread
comes to wait for such a page, the pager says so by another request (`Pager.ask_again`), and it is one of the others.

**Runs.** A fetch takes the page that is due, its neighbours that are wanted too, and the rest of its aligned group
(fault-around). Pages that were not requested are sent without the mark of an answer. Each *request* is answered by a
frame with its own id, since the pager counts what it has under way. A request for a page that is being fetched already,
as a neighbour, joins that fetch; one that crosses its page on the way is fetched again, and the pager drops the copy.

**Errors.** When `fetch` fails, or gives another number of bytes than it was asked for, the pages that were requested
are answered by error frames and `run` raises `PeerError`: the owner of the memory decides what that means. Nothing else
is ever sent in place of a page.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import fields
from typing import Any

import trio

from postcopy._fd import FdHolder
from postcopy._native import ffi, lib
from postcopy.dataplane._base import DataPlane
from postcopy.dataplane._events import Event
from postcopy.dataplane.pageserver import PageServerStatistics
from postcopy.errors import ConfigurationError, ErrorLine, PeerError, PostcopyError, ProtocolError
from postcopy.lazy._source import PageSource, SourceBlock
from postcopy.memory import Memory
from postcopy.memory.bitmap import Bitmap
from postcopy.tls import DataChannel, stream_of

log = logging.getLogger(__name__)

HEADER_BYTES: int = lib.PC_FRAME_HEADER_BYTES
RECEIVE_BYTES = 1024 * HEADER_BYTES
MAX_REASON_BYTES = 500

Key = tuple[int, int]  # block, page


def plan_run(
    page: int,
    pages: int,
    *,
    wanted: Callable[[int], bool],
    taken: Callable[[int], bool],
    around: int,
    limit: int,
) -> tuple[int, int]:
    """(first, count) of what to fetch for `page` of a block of `pages`: with it come, without a gap and up to `limit`,
    neighbours that are `wanted`, and those of its aligned group of `around` pages that are not `taken` (there, or on
    their way). Upwards first."""
    group = page // around * around

    def belongs(other: int) -> bool:
        return wanted(other) or (group <= other < group + around and not taken(other))

    first = end = page
    end += 1
    while end < pages and end - first < limit and belongs(end):
        end += 1
    while first > 0 and end - first < limit and belongs(first - 1):
        first -= 1
    return first, end - first


class Bridge:
    """Between one pager and one page source. `run` it in a task, once; the stream is the caller's to close."""

    _stream: trio.abc.Stream

    def __init__(
        self,
        source: PageSource,
        layout: Sequence[SourceBlock],
        *,
        max_fetches: int,
        max_fetch_pages: int,
        fault_around_pages: int,
        asks_again: bool = False,
        on_failure: Callable[[PeerError], None] = lambda error: None,
    ) -> None:
        """`asks_again`: the pager is one of this process with `Pager.ask_again`; of a peer's request only the highest
        bit of its id means anything.
        `on_failure` is called before the pager gets the error frames of a failed fetch."""
        if max_fetches < 1 or max_fetch_pages < 1:
            raise ConfigurationError("at least one fetch, of at least one page, must be allowed at a time")
        if fault_around_pages < 1 or fault_around_pages & (fault_around_pages - 1):
            raise ConfigurationError(f"fault-around of {fault_around_pages} pages: it must be a power of two")
        self._again = lib.PC_PAGER_REQUEST_AGAIN if asks_again else 0
        self._on_failure = on_failure
        self._source = source
        self._layout = layout
        self._max_fetches = max_fetches
        self._max_fetch_pages = max_fetch_pages
        self._around = fault_around_pages
        self._sent = [Bitmap(block.pages) for block in layout]
        # Requests that wait for a place, and those (with the pages fetched beside them) that are being fetched.
        self._demand: dict[Key, list[int]] = {}
        self._ahead: dict[Key, list[int]] = {}
        self._under_way: dict[Key, list[int]] = {}
        self._fetches = 0
        self._sending = trio.Lock()
        self._failure: PeerError | None = None

    async def run(self, stream: trio.abc.Stream) -> None:
        """Until the pager closes its end, or something fails: then `PeerError` or `ProtocolError`."""
        self._stream = stream
        async with trio.open_nursery() as nursery:
            failure: PeerError | ProtocolError | None = None
            try:
                await self._receive(nursery)
            except (PeerError, ProtocolError) as error:
                failure = error
            nursery.cancel_scope.cancel()
        if self._failure is not None or failure is not None:
            raise self._failure or failure  # type: ignore[misc]  # one of them is there

    async def _receive(self, nursery: trio.Nursery) -> None:
        buffer = bytearray()
        while True:
            try:
                data = await self._stream.receive_some(RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise PeerError("the pager has gone away") from error
            if not data:
                return
            buffer += data
            whole = len(buffer) // HEADER_BYTES * HEADER_BYTES
            for at in range(0, whole, HEADER_BYTES):
                self._take_request(bytes(buffer[at : at + HEADER_BYTES]))
            del buffer[:whole]
            self._dispatch(nursery)

    def _take_request(self, header: bytes) -> None:
        frame = ffi.new("struct pc_frame *")
        line = ErrorLine()
        if lib.pc_frame_decode(header, frame, line.buffer, line.size) < 0:
            raise ProtocolError(str(line))
        if frame.type != lib.PC_FRAME_REQUEST or frame.block >= len(self._layout):
            raise ProtocolError(f"a frame of type {frame.type} for block {frame.block} is no request")
        if frame.first_page + frame.pages > self._layout[frame.block].pages:
            raise ProtocolError(f"block {frame.block} has no pages {frame.first_page}+{frame.pages}")
        queue = self._ahead if frame.request_id & lib.PC_PAGER_REQUEST_AHEAD else self._demand
        for page in range(frame.first_page, frame.first_page + frame.pages):
            key = (int(frame.block), page)
            if frame.request_id & self._again:
                if key in self._ahead:
                    self._demand[key] = self._ahead.pop(key)
                continue
            for place in (self._under_way, self._demand, self._ahead):
                if key in place:
                    place[key].append(int(frame.request_id))
                    break
            else:
                queue[key] = [int(frame.request_id)]

    def _dispatch(self, nursery: trio.Nursery) -> None:
        """Starts as many fetches as there are places."""
        while self._fetches < self._max_fetches:
            free = self._max_fetches - self._fetches
            if self._demand:
                queue = self._demand
            elif self._ahead and (free > 1 or self._max_fetches == 1):
                queue = self._ahead
            else:
                return
            block, page = next(iter(queue))
            first, count = self._plan(block, page)
            for number in range(first, first + count):
                key = (block, number)
                self._under_way[key] = self._demand.pop(key, []) or self._ahead.pop(key, [])
            self._fetches += 1
            nursery.start_soon(self._fetch, nursery, block, first, count)

    def _plan(self, block: int, page: int) -> tuple[int, int]:
        layout, sent = self._layout[block], self._sent[block]
        return plan_run(
            page,
            layout.pages,
            wanted=lambda other: (block, other) in self._demand or (block, other) in self._ahead,
            taken=lambda other: sent[other] or (block, other) in self._under_way,
            around=self._around,
            limit=min(self._max_fetch_pages, lib.PC_FRAME_MAX_PAYLOAD_BYTES // layout.unit_bytes),
        )

    async def _fetch(self, nursery: trio.Nursery, block: int, first: int, count: int) -> None:
        where = f"pages {first} to {first + count - 1} of block {self._layout[block].name!r}"
        expected = self._layout[block].bytes_of(first, count)
        failure: PeerError
        try:
            content = memoryview(await self._source.fetch(block, first, count)).cast("B")
        except Exception as error:  # noqa: BLE001  # the user's code: whatever it raises is the reason
            failure = PeerError(f"the page source failed to fetch {where}: {type(error).__name__}: {error}")
            failure.__cause__ = error
        else:
            if len(content) == expected:
                await self._answer(block, first, count, content)
                self._fetches -= 1
                self._dispatch(nursery)
                return
            failure = PeerError(f"the page source gave {len(content)} bytes for {where}, which have {expected}")
        if self._failure is None:
            self._failure = failure
            self._on_failure(failure)
        await self._refuse(block, first, count, str(failure))
        nursery.cancel_scope.cancel()

    async def _answer(self, block: int, first: int, count: int, content: memoryview) -> None:
        unit = self._layout[block].unit_bytes
        out = bytearray()
        run_of_others = 0  # pages before `page` with content that were not requested, still to be packed
        for page in range(first, first + count + 1):
            ids = self._under_way.pop((block, page), []) if page < first + count else []
            part = self._part(content, (page - first) * unit, unit) if page < first + count else None
            zero = part is not None and bool(lib.pc_is_zero(ffi.from_buffer("char[]", part), unit))
            if part is not None and not ids and not zero:
                run_of_others += 1
                continue
            if run_of_others:
                start = (page - run_of_others - first) * unit
                whole = self._part(content, start, run_of_others * unit)
                pack_frame(out, lib.PC_FRAME_PAGES, block, page - run_of_others, run_of_others, None, whole)
                run_of_others = 0
            if part is None:
                break
            answers: list[int | None] = [*ids] or [None]
            for request_id in answers:
                if zero:
                    pack_frame(out, lib.PC_FRAME_ZERO, block, page, 1, request_id, b"")
                else:
                    pack_frame(out, lib.PC_FRAME_PAGES, block, page, 1, request_id, part)
        self._sent[block].set_range(first, count)
        await self._send(out)

    @staticmethod
    def _part(content: memoryview, start: int, size: int) -> bytes | memoryview:
        """A part of the content, filled up with zeros behind the end of a block."""
        part = content[start : start + size]
        return part if len(part) == size else bytes(part) + bytes(size - len(part))

    async def _refuse(self, block: int, first: int, count: int, reason: str) -> None:
        text = reason.encode()[:MAX_REASON_BYTES]
        out = bytearray()
        for page in range(first, first + count):
            for request_id in self._under_way.pop((block, page), []):
                pack_frame(out, lib.PC_FRAME_ERROR, block, page, 1, request_id, text)
        await self._send(out)

    async def _send(self, data: bytearray) -> None:
        async with self._sending:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self._stream.send_all(data)  # the receiving task sees it too, and says so


class BridgeServer(DataPlane):
    """In the place of a page server, for one attacher: a `Bridge` for each urgent channel; bulk channels offer nothing.

    It has what a migration uses of `PageServer`. Its channels are tasks in the nursery that it is given.
    """

    NAME = "page source"

    def __init__(self, make_bridge: Callable[[], Bridge], nursery: trio.Nursery) -> None:
        super().__init__()
        self._make_bridge = make_bridge
        self._nursery = nursery
        self._started = trio.Event()
        self._closing = trio.Event()
        self._channels: dict[trio.CancelScope, trio.Event] = {}  # the event: it has ended

    def add_block(self, memory: Memory, page_bytes: int | None = None) -> int:
        if page_bytes not in (None, memory.page_bytes):
            raise ConfigurationError(
                f"the page source has pages of {memory.page_bytes} bytes, the attacher wants {page_bytes}"
            )
        return self._add_block(memory, memory.pages, lambda: None)

    def block_pages(self, block: int) -> int:
        return self._block(block).pages

    def set_present(self, block: int, present: Bitmap) -> None:
        """Only the source knows."""

    def set_received(self, block: int, received: Bitmap) -> None:
        """Nothing is pushed, and every request is answered."""

    def attach_urgent(self, shard: int, fd: int, busy_poll_us: int = 0, *, tls: Any = None) -> None:
        self._attach(fd, tls, self._answer)

    def attach_bulk(self, channel: int, fd: int, *, tls: Any = None) -> None:
        self._attach(fd, tls, self._offer_nothing)

    def set_stale(self, block: int, stale: Bitmap) -> None:
        """A page of the source does not change."""

    def serve(self) -> None:
        """Requests are answered from here on. What is not asked for is not offered: the destination may ask."""
        self._started.set()

    def start(self) -> None:
        """The same: there is no push that could begin."""
        self.serve()

    def statistics(self) -> PageServerStatistics:
        """All zero: nothing is counted here."""
        return PageServerStatistics(*(0 for _ in fields(PageServerStatistics)))

    def take_event(self) -> Event | None:
        """There are none: the control connection shows the end of a channel, too."""
        self._check_open()
        return None

    async def wait_event(self) -> None:
        await self._closing.wait()
        self._check_open()

    async def disconnect(self) -> None:
        channels = dict(self._channels)
        for scope in channels:
            scope.cancel()
        with trio.CancelScope(shield=True):
            for ended in channels.values():
                await ended.wait()

    async def _end(self) -> None:
        await self.disconnect()
        self._closing.set()

    def _attach(self, fd: int, tls: Any, serve: Callable[[trio.abc.Stream], Awaitable[None]]) -> None:
        if self._closed:
            DataChannel(FdHolder(fd), tls).close()  # ours from the call on
            self._check_open()
        stream = stream_of(fd, tls)
        scope = trio.CancelScope()
        self._channels[scope] = trio.Event()
        self._nursery.start_soon(self._channel, scope, stream, serve)

    async def _channel(
        self,
        scope: trio.CancelScope,
        stream: trio.abc.Stream,
        serve: Callable[[trio.abc.Stream], Awaitable[None]],
    ) -> None:
        try:
            with scope:
                async with stream:
                    await self._started.wait()
                    await serve(stream)
        except PostcopyError as error:
            log.warning("a page source is lost for one attacher: %s", error)
        finally:
            self._channels.pop(scope).set()

    async def _answer(self, stream: trio.abc.Stream) -> None:
        await self._make_bridge().run(stream)

    async def _offer_nothing(self, stream: trio.abc.Stream) -> None:
        end = bytearray()
        pack_frame(end, lib.PC_FRAME_END, 0, 0, 0, None, b"")
        with contextlib.suppress(trio.BrokenResourceError):  # the control connection shows it, too
            await stream.send_all(end)
        await trio.sleep_forever()


def pack_frame(
    out: bytearray, kind: int, block: int, first: int, pages: int, request_id: int | None, payload: bytes | memoryview
) -> None:
    """Appends one frame; `request_id` None: it answers no request."""
    frame = ffi.new("struct pc_frame *")
    frame.type = kind
    frame.flags = 0 if request_id is None else lib.PC_FRAME_DEMAND
    frame.block = block
    frame.first_page = first
    frame.pages = pages
    frame.request_id = request_id or 0
    frame.payload_bytes = len(payload)
    frame.payload_crc = lib.pc_crc32c(0, ffi.from_buffer("char[]", payload), len(payload)) if len(payload) else 0
    header = ffi.new("uint8_t[]", HEADER_BYTES)
    lib.pc_frame_encode(frame, header)
    out += ffi.buffer(header)
    out += payload
