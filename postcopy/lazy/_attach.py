# SPDX-License-Identifier: Apache-2.0
"""Memory of another host, and of a page source, mapped here.

`attach` is a migration of a machine without a CPU, seen from its end: the same protocol, the same engine
(`migration.destination`), the same pager in C on the path of a fault. Two things differ. Unless the caller wants it
there is no background push: the attachment has no bulk channels, and costs nothing while no page is touched. (A source
that speaks version 2 of the protocol must have one, and pushes.) And the memory outlives machine and engine for as long
as there are views of it.

`attach_source` has the same pager on one end of a socket pair and `_bridge.Bridge` on the other, where a Python
coroutine answers instead of a page server.

Resource handling: everything belongs to the ``async with`` block and is closed with it, in the order that faults allow:
no new views, tasks, engine, pager. The mapping itself is removed with the last view of it.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from postcopy._trio import require_trio
from postcopy.dataplane.pager import EventType, Pager
from postcopy.errors import ConfigurationError, PeerError, PostcopyError
from postcopy.lazy._bridge import Bridge
from postcopy.lazy._memory import LazyMemory
from postcopy.lazy._source import PageSource, check_layout
from postcopy.lazy._tasks import background_tasks
from postcopy.machines import BlockLayout, Machine
from postcopy.machines.image import ImageMachine
from postcopy.memory import Memory, page_bytes_of
from postcopy.migration.connection import HEARTBEAT_S
from postcopy.migration.destination import DestinationMigration
from postcopy.net import Address, CallingLink, Protection, Route, parse_address
from postcopy.uffd import How
from postcopy.wire import State

log = logging.getLogger(__name__)

RECOVER_S = 30.0


@asynccontextmanager
async def attach(
    address: str | Address,
    *,
    backing: str = "memfd",
    background: bool = False,
    recover_for_s: float = RECOVER_S,
    heartbeat_s: float = HEARTBEAT_S,
    how: How | str = How.ANY,
    busy_poll_us: int = 0,
    tls: str | None = None,
    tls_hostname: str | None = None,
    tls_authz: Sequence[str] = (),
    insecure: bool = False,
) -> AsyncIterator[LazyMemory]:
    """``async with postcopy.attach("host:7777") as memory``: memory that a remote source serves, mapped here; its pages
    come when they are touched, prefetched or ensured.

    The source is a ``postcopy source --machine image --image FILE --listen ...`` or a process that runs
    `postcopy.serve`. `background`: let the source push all of it meanwhile; requested pages overtake that. When every
    page has come the connection is closed in order and the memory stays.

    `heartbeat_s`: how often each side sends a heartbeat; a source of which nothing was received for three times as long
    is lost, for the time being. `recover_for_s`: a source that cannot be reached any more is looked for so long, while
    threads and tasks go on waiting for pages; then it is lost. A source that proves that it has ended this attachment
    is lost at once; any other refusal may come from another program.

    `backing` is the kind of memory here (``memfd``, ``anon``, ``hugetlb``), `how` the way to a userfaultfd: with
    `How.USER_ONLY`, which needs no rights, code may touch missing pages, but a system call that does gets EFAULT.

    `tls` is a directory with ``ca-cert.pem``, ``client-cert.pem`` and ``client-key.pem``: the source is then one with
    ``--tls``, whose certificate names the host that is connected to, or `tls_hostname`, and is one that `tls_authz`
    allows (patterns as ``--tls-authz`` has them; without any, all that the authority has signed). A source on another
    host without it is refused, unless `insecure` says that whoever is on the network may read and change the memory.

    Errors on the way in: `ConfigurationError`, `ResourceError`, and `PeerError` or `ProtocolError` when the source
    cannot be reached or refuses. Afterwards: see `LazyMemory`. Cancellable; closing is shielded and bounded in time.
    """
    require_trio("postcopy.attach", "postcopy.lazy.blocking.attach")
    where = parse_address(address) if isinstance(address, str) else address
    protection = Protection.of(tls, tls_hostname, tls_authz, insecure)

    def make_machine(kind: str, config: Mapping[str, Any], layout: Sequence[BlockLayout]) -> Machine:
        if kind != ImageMachine.kind:
            raise ConfigurationError(
                f"{where}: offers a machine of kind {kind[:40]!r}; only memory can be attached: start the source with"
                " --machine image, or serve memory with postcopy.serve"
            )
        return ImageMachine.for_destination(config, layout, backing)

    memory: LazyMemory | None = None
    attached = trio.Event()  # or failed

    def changed() -> None:
        if migration.over or migration.state in (State.POSTCOPY, State.CLOSING, State.COMPLETED):
            attached.set()
        if memory is None or not migration.over:
            return
        if migration.failure is not None:
            memory._fail(_lost(where, migration.failure))
        elif migration.state is State.COMPLETED:
            memory._completed()

    async with Pager() as pager:
        migration = DestinationMigration(
            await CallingLink.open(Route(where, tls_hostname=tls_hostname), "dest", protection=protection),
            background=background,
            busy_poll_us=busy_poll_us,
            how=how,
            heartbeat_s=heartbeat_s,
            recover_for_s=recover_for_s,
            make_machine=make_machine,
            make_pager=lambda: pager,
            on_change=changed,
        )
        try:
            async with background_tasks() as nursery:
                nursery.start_soon(migration.run, trio.Event())
                await attached.wait()
                if migration.over and migration.failure is not None:
                    raise migration.failure
                machine = migration.machine
                assert isinstance(machine, ImageMachine)
                memory = LazyMemory(pager, [(machine.blocks[0].name, machine.detach_memory(), machine.file_bytes)])
                changed()
                try:
                    yield memory
                finally:
                    memory._close()
        finally:
            await migration.close()


def _lost(where: Address, reason: PostcopyError) -> PeerError:
    error = PeerError(f"{where}: the source is lost: {reason}")
    error.__cause__ = reason
    return error


@asynccontextmanager
async def attach_source(
    source: PageSource,
    *,
    max_fetches: int = 8,
    max_fetch_pages: int = 256,
    fault_around_pages: int = 1,
    backing: str = "memfd",
    how: How | str = How.ANY,
    busy_poll_us: int = 0,
) -> AsyncIterator[LazyMemory]:
    """``async with postcopy.attach_source(source) as memory``: memory in this process that `source` fills on demand.

    At most `max_fetches` calls of `PageSource.fetch` are under way at a time; while that is more than one, the last
    place is kept for pages that a thread has touched. Neighbouring pages that are wanted at the same time are fetched
    by one call, of `max_fetch_pages` at most. `fault_around_pages`, a power of two: what is fetched for one page is all
    of the aligned group of so many pages around it that has not come yet.

    A source that fails is lost, see `LazyMemory`. Python code is on the path of a fault here: a thread that touches
    a missing page while it holds the GIL waits for ever.

    `ConfigurationError` for a layout or numbers that make no sense, `ResourceError` where the host lacks memory or the
    right to a userfaultfd. Cancellable. Closing cancels the fetches and waits until they have ended; the rest of it is
    shielded and bounded in time.
    """
    require_trio("postcopy.attach_source", "postcopy.lazy.blocking.attach_source")
    layout = check_layout(source.blocks)
    for block in layout:
        if block.unit_bytes != page_bytes_of(backing):
            raise ConfigurationError(
                f"block {block.name!r} has pages of {block.unit_bytes} bytes,"
                f" {backing} memory of {page_bytes_of(backing)}"
            )
    bridge = Bridge(
        source,
        layout,
        max_fetches=max_fetches,
        max_fetch_pages=max_fetch_pages,
        fault_around_pages=fault_around_pages,
        asks_again=True,
        on_failure=lambda error: memory._fail(error),
    )
    async with Pager() as pager:
        parts = [
            (block.name, Memory.create(backing, block.pages * block.unit_bytes), block.size_bytes) for block in layout
        ]
        for _, part, _ in parts:
            pager.add_block(part)
        shard = pager.add_shard(how, busy_poll_us)
        for number, block in enumerate(layout):
            pager.arm(shard, number, 0, block.pages)
        ours, theirs = socket.socketpair()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        pager.ask_again()
        pager.attach_urgent(shard, theirs.detach())
        memory = LazyMemory(pager, parts)
        del parts, part

        async def run_bridge() -> None:
            try:
                await bridge.run(stream)
            except PostcopyError as error:
                memory._fail(error)

        async def watch_pager() -> None:
            async for event in pager.events():
                if event.type is EventType.COMPLETE:
                    memory._completed()
                    try:
                        await pager.disarm()
                    except PostcopyError as error:  # costs a little on each first touch of a zero page, no more
                        log.warning("%s", error)
                elif event.type is EventType.FATAL:
                    memory._fail(PeerError(f"the pager cannot go on: {event.text}"))
                elif event.type is EventType.CHANNEL_DOWN:
                    memory._fail(PeerError(f"the pager has lost the page source: {event.text}"))

        async with stream, background_tasks() as nursery:
            nursery.start_soon(watch_pager)
            nursery.start_soon(run_bridge)
            try:
                yield memory
            finally:
                memory._close()
