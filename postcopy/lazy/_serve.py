# SPDX-License-Identifier: Apache-2.0
"""Memory of this process, served to whoever attaches: the other end of `attach`.

For each attacher one migration of an image (`migration.source`), with a page server of its own, all of the same memory.
C threads answer; Python is only needed when somebody comes or goes. A page source takes the place of the memory, and a
`_bridge.Bridge` at the end of the attacher's own connection the place of the page server: the frames are the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import trio

from postcopy._native import ffi, lib
from postcopy.dataplane.pageserver import PageServer
from postcopy.errors import ConfigurationError, PostcopyError
from postcopy.lazy._bridge import Bridge, pack_frame
from postcopy.lazy._source import PageSource, SourceBlock, check_layout
from postcopy.machines.base import CLOSE_TIMEOUT_S
from postcopy.machines.image import ImageMachine
from postcopy.memory import Memory, MemoryKind
from postcopy.memory.bitmap import Bitmap
from postcopy.migration.connection import HEARTBEAT_S
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.net import Acceptor, Address, parse_address
from postcopy.wire import State

log = logging.getLogger(__name__)

DEFAULT_LISTEN = "127.0.0.1:0"
MAX_ATTACHERS = 16


class Server:
    """What `serve` tells about itself. For the Trio thread."""

    def __init__(self, acceptor: Acceptor) -> None:
        self.served = 0  # attachers that have gone for good
        self.completed = 0  # of them, with every page
        self._migrations: set[SourceMigration] = set()
        self.addresses = [str(address) for address in acceptor.addresses]  # as `attach` takes them

    @property
    def attached(self) -> int:
        """Attachers there are now. One that went away before it had every page may come back for a minute."""
        return sum(migration.state is not State.PAUSED for migration in self._migrations)

    @property
    def address(self) -> str:
        """The first one."""
        return self.addresses[0]


async def serve(
    memory: Any,
    listen: str | Address = DEFAULT_LISTEN,
    *,
    max_attachers: int = MAX_ATTACHERS,
    max_bandwidth_bytes_per_s: int = 0,
    max_fetches: int = 8,
    max_fetch_pages: int = 256,
    fault_around_pages: int = 1,
    heartbeat_s: float = HEARTBEAT_S,
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves `memory` to any number of attachers, one after the other and `max_attachers` at a time, until cancelled:
    ``server = await nursery.start(postcopy.serve, memory)``, then ``server.address``.

    `memory` is a `Memory`, or anything with a C-contiguous buffer: a numpy array, an mmap, bytes. A buffer of whole
    pages (4 KiB) is served in place, any other is copied first. **Its content must not change while it is served**:
    pages are read when they are asked for, and an attacher would see some from before and some from after.

    It may also be a page source of one block, which then answers the attachers; the last three options are those of
    `attach_source` and hold for each of them. When a fetch fails, that attacher's source is lost. Nothing is pushed.

    `listen` is HOST:PORT, port 0 lets the system choose; without it only this host can attach. Whoever can reach the
    port can read the memory, and pages travel in clear. `max_bandwidth_bytes_per_s` limits what is pushed to those who
    attach with `background`, 0 is no limit; requested pages are never held up. `heartbeat_s` as with `attach`.

    Errors: `ConfigurationError` for memory that cannot be served or an address that makes no sense, `ResourceError` for
    one that cannot be listened on. Trouble with one attacher is logged and ends only that one.
    """
    where = parse_address(listen, listening=True) if isinstance(listen, str) else listen
    with _served(memory) as (served, size_bytes):
        machine = _ServedImage(served, size_bytes, verify=False, path="(served memory)")
        options = SourceOptions(max_bandwidth_bytes_per_s=max_bandwidth_bytes_per_s, heartbeat_s=heartbeat_s)
        server: Server

        def make_bridge(on_failure: Callable[[PostcopyError], None]) -> Bridge:
            assert isinstance(served, _SourceMemory)
            return Bridge(
                served.source,
                [served.layout],
                max_fetches=max_fetches,
                max_fetch_pages=max_fetch_pages,
                fault_around_pages=fault_around_pages,
                on_failure=on_failure,
            )

        def make_server(bandwidth: int) -> PageServer:
            if isinstance(served, _SourceMemory):
                return _BridgeServer(served, make_bridge, nursery)
            return PageServer(bandwidth)

        if isinstance(served, _SourceMemory):
            make_bridge(_ignore)  # for the errors in its arguments

        def why_refused(waiting: int) -> str:
            return "too many attachers at the same time" if server.attached + waiting >= max_attachers else ""

        acceptor = await Acceptor.open(where, "source", why_refused)
        server = Server(acceptor)
        try:
            await machine.boot()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(acceptor.serve)
                task_status.started(server)
                while True:
                    link = await acceptor.next_link()
                    migration = SourceMigration(machine, link, options, make_server=make_server)
                    server._migrations.add(migration)
                    nursery.start_soon(_attacher, server, migration)
        finally:
            with trio.CancelScope(shield=True):
                await acceptor.close()
                await machine.close()


async def _attacher(server: Server, migration: SourceMigration) -> None:
    go = trio.Event()
    go.set()
    try:
        await migration.run(go, trio.Event(), hold=False)
    finally:
        server._migrations.discard(migration)
        server.served += 1
    if migration.state is State.COMPLETED:
        server.completed += 1
    elif migration.state is State.PAUSED:
        log.info("%s: detached: %s", migration.peer, migration.failure)
    else:
        log.warning("%s: could not attach: %s", migration.peer, migration.failure)


class _ServedImage(ImageMachine):
    """Of memory that is somebody else's."""

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        self._closed.set()
        await trio.lowlevel.checkpoint()


@contextmanager
def _served(memory: Any) -> Iterator[tuple[Memory, int]]:
    """`memory` as the page server takes it, and its true size."""
    if isinstance(memory, Memory):
        with memory.in_use("serve"):
            yield memory, memory.file_bytes
        return
    if hasattr(memory, "fetch") and hasattr(memory, "blocks"):
        layout = check_layout(memory.blocks)
        if len(layout) != 1:
            raise ConfigurationError(f"a page source of {len(layout)} blocks cannot be served: it must have one")
        yield _SourceMemory(memory, layout[0]), layout[0].size_bytes
        return
    try:
        view = memoryview(memory).cast("B")
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{type(memory).__name__} cannot be served: it must be a Memory or have a C-contiguous buffer"
            f" ({error}); for a numpy array: numpy.ascontiguousarray"
        ) from error
    if not len(view):
        raise ConfigurationError("there is nothing to serve: the buffer is empty")
    page_bytes = int(lib.pc_page_bytes())
    if len(view) % page_bytes == 0:
        served: Memory = _BufferMemory(view)
    else:
        served = Memory.create("memfd", -(-len(view) // page_bytes) * page_bytes)
        ffi.memmove(ffi.cast("char *", served.address), view, len(view))
    try:
        yield served, len(view)
    finally:
        served.drop()  # a page server that did not end keeps it


class _BufferMemory(Memory):
    """A buffer that belongs to somebody else, at any address: read in place, never unmapped."""

    def __init__(self, view: memoryview) -> None:
        self._buffer: Any = ffi.from_buffer("char[]", view)  # holds the export
        struct: Any = ffi.new("struct pc_memory *")
        struct.base = self._buffer
        struct.size_bytes = len(view)
        struct.page_bytes = lib.pc_page_bytes()
        struct.kind = lib.PC_MEMORY_ANON
        struct.fd = -1
        super().__init__(struct, MemoryKind.ANON, len(view))

    def present(self, page_bytes: int | None = None) -> Bitmap:
        """Every page: looking for holes would mean reading it all."""
        unit = page_bytes or self.page_bytes
        return Bitmap.full(-(-self.size_bytes // unit))

    def close(self) -> None:
        if not self._users:
            self._closed = True
            self._buffer = None


class _SourceMemory(Memory):
    """Says how large the memory of a page source is. There is nothing behind it."""

    def __init__(self, source: PageSource, layout: SourceBlock) -> None:
        self.source = source
        self.layout = layout
        struct: Any = ffi.new("struct pc_memory *")
        struct.size_bytes = layout.size_bytes
        struct.page_bytes = layout.unit_bytes
        struct.fd = -1
        super().__init__(struct, MemoryKind.ANON, layout.size_bytes)

    def present(self, page_bytes: int | None = None) -> Bitmap:
        return Bitmap.full(self.pages)  # for all that is known

    def close(self) -> None:
        self._closed = True


def _ignore(error: PostcopyError) -> None:
    """What the destination is told by an error frame needs no second way."""


class _BridgeServer(PageServer):
    """In the place of a page server: one bridge for each urgent channel, and bulk channels that offer nothing.

    The C page server below it stays without blocks and channels: it gives the events, of which there are none.
    """

    def __init__(
        self,
        memory: _SourceMemory,
        make_bridge: Callable[[Callable[[PostcopyError], None]], Bridge],
        nursery: trio.Nursery,
    ) -> None:
        super().__init__()
        self._memory = memory
        self._make_bridge = make_bridge
        self._nursery = nursery
        self._urgent: list[trio.SocketStream] = []
        self._bulk: list[socket.socket] = []
        self._running: set[trio.CancelScope] = set()
        self._started = False
        self._ended = trio.Event()

    def add_block(self, memory: Memory, page_bytes: int | None = None) -> int:
        if page_bytes not in (None, self._memory.page_bytes):
            raise ConfigurationError(
                f"the page source has pages of {self._memory.page_bytes} bytes, the attacher wants {page_bytes}"
            )
        return 0

    def block_pages(self, block: int) -> int:
        return self._memory.pages

    def set_present(self, block: int, present: Bitmap) -> None:
        pass  # it is the source that knows

    def set_received(self, block: int, received: Bitmap) -> None:
        pass  # nothing is pushed, and what is asked for is answered

    def attach_urgent(self, shard: int, fd: int, busy_poll_us: int = 0) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=fd)))
        self._urgent.append(stream)
        if self._started:
            self._serve(stream)

    def attach_bulk(self, channel: int, fd: int) -> None:
        os.set_blocking(fd, False)
        bulk = socket.socket(fileno=fd)
        self._bulk.append(bulk)
        if self._started:
            self._offer_nothing(bulk)

    def start(self) -> None:
        """Requests are answered from here on. What is not asked for is not offered: the destination may ask."""
        self._started = True
        for bulk in self._bulk:
            self._offer_nothing(bulk)
        for stream in self._urgent:
            self._serve(stream)

    def _offer_nothing(self, bulk: socket.socket) -> None:
        end = bytearray()
        pack_frame(end, lib.PC_FRAME_END, 0, 0, 0, None, b"")
        with contextlib.suppress(OSError):  # gone already, which the control connection tells
            bulk.send(end)  # the first bytes of a connection always fit

    def _serve(self, stream: trio.SocketStream) -> None:
        if not self._running:
            self._ended = trio.Event()
        scope = trio.CancelScope()
        self._running.add(scope)
        self._nursery.start_soon(self._answer, stream, scope)

    async def _answer(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        try:
            with scope:
                async with stream:
                    await self._make_bridge(_ignore).run(stream)
        except PostcopyError as error:
            log.warning("a page source is lost for one attacher: %s", error)
        finally:
            self._running.discard(scope)
            if not self._running:
                self._ended.set()

    async def disconnect(self) -> None:
        for scope in self._running:
            scope.cancel()
        with trio.CancelScope(shield=True):
            if self._running:
                await self._ended.wait()
        for bulk in self._bulk:
            bulk.close()
        for stream in self._urgent:
            stream.socket.close()  # those that were never started
        self._bulk.clear()
        self._urgent.clear()

    async def close(self) -> None:
        await self.disconnect()
        await super().close()
