# SPDX-License-Identifier: Apache-2.0
"""Memory of this process, served to whoever attaches: the other end of `attach`.

For each attacher one migration of an image (`migration.source`), with a page server of its own, all of the same memory.
C threads answer; Python is only needed when somebody comes or goes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio

from postcopy._errors import ConfigurationError
from postcopy._native import ffi, lib
from postcopy.bitmap import Bitmap
from postcopy.machines.base import CLOSE_TIMEOUT_S
from postcopy.machines.image import ImageMachine
from postcopy.memory import Memory, MemoryKind
from postcopy.migration.channels import Address, Link, Reception, parse_address
from postcopy.migration.protocol import State
from postcopy.migration.source import SourceMigration, SourceOptions

log = logging.getLogger(__name__)

DEFAULT_LISTEN = "127.0.0.1:0"
MAX_ATTACHERS = 16


class Server:
    """What `serve` tells about itself. For the Trio thread."""

    def __init__(self, reception: Reception) -> None:
        self.attached = 0  # attachers there are now
        self.served = 0  # attachers that have gone again
        self.completed = 0  # of them, with every page
        self.addresses = [str(address) for address in reception.addresses]  # as `attach` takes them

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
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves `memory` to any number of attachers, one after the other and `max_attachers` at a time, until cancelled:
    ``server = await nursery.start(postcopy.serve, memory)``, then ``server.address``.

    `memory` is a `Memory`, or anything with a C-contiguous buffer: a numpy array, an mmap, bytes. A buffer of whole
    pages (4 KiB) is served in place, any other is copied first. **Its content must not change while it is served**:
    pages are read when they are asked for, and an attacher would see some from before and some from after.

    `listen` is HOST:PORT, port 0 lets the system choose; without it only this host can attach. Whoever can reach the
    port can read the memory, and pages travel in clear. `max_bandwidth_bytes_per_s` limits what is pushed to those who
    attach with `background`, 0 is no limit; requested pages are never held up.

    Errors: `ConfigurationError` for memory that cannot be served or an address that makes no sense, `ResourceError` for
    one that cannot be listened on. Trouble with one attacher is logged and ends only that one.
    """
    where = parse_address(listen, listening=True) if isinstance(listen, str) else listen
    with _served(memory) as (served, size_bytes):
        machine = _ServedImage(served, size_bytes, verify=False, path="(served memory)")
        options = SourceOptions(max_bandwidth_bytes_per_s=max_bandwidth_bytes_per_s)
        server: Server

        def vacancy(waiting: int) -> str:
            return "too many attachers at the same time" if server.attached + waiting >= max_attachers else ""

        reception = await Reception.open(where, "source", vacancy)
        server = Server(reception)
        try:
            await machine.boot()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reception.serve)
                task_status.started(server)
                while True:
                    link = await reception.next_link()
                    server.attached += 1
                    nursery.start_soon(_attacher, server, machine, link, options)
        finally:
            with trio.CancelScope(shield=True):
                await reception.close()
                await machine.close()


async def _attacher(server: Server, machine: ImageMachine, link: Link, options: SourceOptions) -> None:
    go = trio.Event()
    go.set()
    migration = SourceMigration(machine, link, options)
    try:
        await migration.run(go, trio.Event(), hold=False)
    finally:
        server.attached -= 1
        server.served += 1
    if migration.state is State.COMPLETED:
        server.completed += 1
    elif migration.state is State.PAUSED:
        log.info("%s: detached: %s", link.peer, migration.failure)
    else:
        log.warning("%s: could not attach: %s", link.peer, migration.failure)


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
