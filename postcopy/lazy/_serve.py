# SPDX-License-Identifier: Apache-2.0
"""Memory of this process, served to every attacher: the other end of `attach`.

For each attacher one migration of an image (`migration.source`), with a page server of its own, all of the same memory.
C threads answer; Python is only needed when an attacher comes or goes. A page source takes the place of the memory, and
a `_bridge.Bridge` at the end of the attacher's own connection the place of the page server: the frames are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import trio

from postcopy._native import ffi, lib
from postcopy._trio import require_trio
from postcopy.dataplane.pageserver import PageServer
from postcopy.errors import ConfigurationError
from postcopy.lazy._bridge import Bridge, BridgeServer
from postcopy.lazy._source import check_layout
from postcopy.machines.image import ImageMachine
from postcopy.memory import Memory
from postcopy.migration.connection import HEARTBEAT_S
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.net import Acceptor, Address, Asking, Protection, parse_address
from postcopy.wire import State

log = logging.getLogger(__name__)

DEFAULT_LISTEN = "127.0.0.1:0"
MAX_ATTACHERS = 16


class Server:
    """What `serve` gives its caller. For the Trio thread."""

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
    tls: str | None = None,
    tls_authz: Sequence[str] = (),
    insecure: bool = False,
    task_status: trio.TaskStatus[Server] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves `memory` to any number of attachers, one after the other and `max_attachers` at a time, until cancelled:
    ``server = await nursery.start(postcopy.serve, memory)``, then ``server.address``.

    `memory` is a `Memory`, or anything with a C-contiguous buffer: a numpy array, an mmap, bytes. A buffer of whole
    pages (4 KiB) is served in place, any other is copied first. **Its content must not change while it is served**:
    pages are read when they are asked for, and an attacher would see some from before and some from after.

    It may also be a page source of one block, which then answers the attachers; the last three options are those of
    `attach_source` and hold for each of them. When a fetch fails, that attacher's source is lost. Nothing is pushed.

    `listen` is HOST:PORT, port 0 lets the system choose; without it only this host can attach. For other hosts `tls` is
    a directory with ``ca-cert.pem``, ``server-cert.pem`` and ``server-key.pem``: an attacher needs a certificate of the
    same authority, and one that `tls_authz` allows, where there are such patterns (as ``--tls-authz`` has them).
    Without it an address beyond this host is refused, unless `insecure` says that everyone who can reach the port may
    read the memory. `max_bandwidth_bytes_per_s` limits what is pushed
    to those that attach with `background`, 0 is no limit; requested pages are never held up. `heartbeat_s` as with
    `attach`.

    Errors: `ConfigurationError` for memory that cannot be served or an address that makes no sense, `ResourceError` for
    one that cannot be listened on. Trouble with one attacher is logged and ends only that one.
    """
    require_trio("postcopy.serve", "postcopy.lazy.blocking.serve")
    where = parse_address(listen, listening=True) if isinstance(listen, str) else listen
    protection = Protection.of(tls, authz=tls_authz, insecure=insecure)
    with _served(memory) as (served, size_bytes):
        machine = ImageMachine(served, size_bytes, verify=False, path="(served memory)")
        machine.detach_memory()  # `_served` has it
        options = SourceOptions(max_bandwidth_bytes_per_s=max_bandwidth_bytes_per_s, heartbeat_s=heartbeat_s)
        server: Server
        make_server: Callable[[int], PageServer] = PageServer
        if _is_source(memory):
            make_bridge = partial(
                Bridge,
                memory,
                check_layout(memory.blocks),
                max_fetches=max_fetches,
                max_fetch_pages=max_fetch_pages,
                fault_around_pages=fault_around_pages,
            )
            make_bridge()  # for the errors in its arguments

            def make_server(_: int) -> PageServer:
                return cast(PageServer, BridgeServer(make_bridge, nursery))  # which has what a migration uses

        def why_refused(asking: Asking) -> str:
            return (
                "too many attachers at the same time" if server.attached + len(asking.waiting) >= max_attachers else ""
            )

        acceptor = await Acceptor.open(where, "source", why_refused, protection=protection)
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
        await migration.run(go, trio.Event(), keep=False)
    finally:
        server._migrations.discard(migration)
        server.served += 1
    if migration.state is State.COMPLETED:
        server.completed += 1
    elif migration.state is State.PAUSED:
        log.info("%s: detached: %s", migration.peer, migration.failure)
    else:
        log.warning("%s: could not attach: %s", migration.peer, migration.failure)


def _is_source(memory: Any) -> bool:
    return hasattr(memory, "fetch") and hasattr(memory, "blocks")


@contextmanager
def _served(memory: Any) -> Iterator[tuple[Memory, int]]:
    """`memory` as the page server takes it, and its true size."""
    if isinstance(memory, Memory):
        with memory.in_use("serve"):
            yield memory, memory.file_bytes
        return
    if _is_source(memory):
        layout = check_layout(memory.blocks)
        if len(layout) != 1:
            raise ConfigurationError(f"a page source of {len(layout)} blocks cannot be served: it must have one")
        with Memory.without_content(layout[0].size_bytes, layout[0].unit_bytes) as nothing:
            yield nothing, layout[0].size_bytes
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
        served = Memory.from_buffer(view)
    else:
        served = Memory.create("memfd", -(-len(view) // page_bytes) * page_bytes)
        ffi.memmove(ffi.cast("char *", served.address), view, len(view))
    try:
        yield served, len(view)
    finally:
        served.drop()  # a page server that did not end keeps it
