# SPDX-License-Identifier: Apache-2.0
"""Pages from another host, for a virtual machine that is served already.

A migration of a memory image brings them, as `postcopy.attach` does: a `postcopy source --machine image --listen`, or
`postcopy.serve`, is at the other end, with recovery as for any migration. What differs: the pager is the virtual
machine's, is there before the migration, and outlives it. So events of the userfaultfd are read while there is no
connection, and a migration that has ended for good, as when the source was started anew, is followed by another one;
pages that are there are not placed again. After another process has taken over it is a new migration too: the source
must serve more than one destination (``--serve``).
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import trio

from postcopy._fd import FdHolder
from postcopy.dataplane._events import EventStream
from postcopy.dataplane.ahead import Prefetch
from postcopy.dataplane.pager import Event, EventType, Pager
from postcopy.errors import ConfigurationError, MigrationError, PeerError, PostcopyError
from postcopy.handler._source import Source
from postcopy.machines import BlockLayout, Machine
from postcopy.machines.image import ImageMachine
from postcopy.memory import Memory
from postcopy.migration.destination import IN_DOUBT_FOR_S, DestinationMigration
from postcopy.net import CallingLink, Protection, Route
from postcopy.tls import DataChannel
from postcopy.units import format_size
from postcopy.wire import State

if TYPE_CHECKING:
    from postcopy.handler._vm import About, Vm

AGAIN_S, AGAIN_MAX_S = 0.1, 5.0
"""Between attempts to connect, twice as long each time."""
CONNECT_S = 10.0
HOSTS = 16
"""So many times the memory of this host a virtual machine may have."""
MAX_EVENTS = 1024
"""Of a pager, that no migration has looked at."""

log = logging.getLogger(__name__)


class _LentPager:
    """A pager as a migration has it: set up already, and not ended with it. All else is the pager's."""

    def __init__(self, pager: Pager, take: Callable[[Event], None]) -> None:
        """`take`: how the virtual machine takes an event that it has not read yet."""
        self._pager = pager
        self._take = take
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._held: list[tuple[Callable[..., None], int, DataChannel]] | None = []
        self._arrived = trio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pager, name)

    # ---- events: the virtual machine reads them, and passes them on

    def pass_on(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()

    def take_event(self) -> Event | None:
        return self._events.popleft() if self._events else None

    async def wait_event(self) -> None:
        while not self._events:
            self._arrived = trio.Event()
            await self._arrived.wait()

    def events(self) -> EventStream:
        return EventStream(self.take_event, self.wait_event)

    def drain_events(self) -> list[Event]:
        for event in self._pager.drain_events():
            self._take(event)  # which passes it on
        return list(iter(self.take_event, None))

    # ---- connections: until it is known that the image is the right one, no page is asked for, or taken

    def attach_urgent(self, shard: int, fd: int, *, tls: Any = None) -> None:
        self._attach(self._pager.attach_urgent, shard, DataChannel(FdHolder(fd), tls))

    def attach_bulk(self, channel: int, fd: int, *, tls: Any = None) -> None:
        self._attach(self._pager.attach_bulk, channel, DataChannel(FdHolder(fd), tls))

    def _attach(self, attach: Callable[..., None], index: int, channel: DataChannel) -> None:
        if self._held is None:
            fd, tls = channel.detach()
            attach(index, fd, tls=tls)
        else:
            self._held.append((attach, index, channel))

    def image_is_known(self) -> None:
        while self._held:  # one after the other: those that are left after an error are closed by `close`
            attach, index, channel = self._held.pop(0)
            fd, tls = channel.detach()
            attach(index, fd, tls=tls)
        self._held = None

    # ---- what has been done already, and what is not the migration's to do

    def add_block(self, memory: Memory) -> int:
        return 0

    def add_shard(self, how: object, busy_poll_us: int = 0) -> int:
        return 0

    def arm(self, shard: int, block: int, first_page: int, pages: int) -> None:
        """It is."""

    async def disarm(self) -> None:
        """The virtual machine may still throw pages away."""
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        for _, _, channel in self._held or ():
            channel.close()
        self._held = []
        await self._pager.disconnect()
        self.drain_events()  # the end of these channels is not that of the next migration's


class _KnownImage(ImageMachine):
    """What a source offers. It must be what it has offered before: pages of two images would make no memory."""

    def __init__(self, about: About, digests: set[int | None], known: Callable[[], None]) -> None:
        """`digests`: of what has been taken from it. `known`: called when this is the same."""
        memory = Memory.without_content(about.memory_bytes, about.page_bytes)
        super().__init__(memory, about.memory_bytes, False, "")
        self._digests, self._known = digests, known

    async def load_state(self, state: bytes) -> None:
        await super().load_state(state)
        if self._digests - {self.digest}:
            raise ConfigurationError("the source has another image than before: have it serve that one again")
        self._digests.add(self.digest)
        self._known()


class ConnectSource(Source):
    """A `postcopy source --machine image` at an address."""

    def __init__(
        self, route: Route, protection: Protection, *, recover_for_s: float, background: bool, policy: Prefetch
    ) -> None:
        """`background`: pages are pushed, and asked for, that were not touched. `policy`: what is asked for ahead of
        faults."""
        self._route = route
        self._protection = protection
        self._recover_for_s = recover_for_s
        self._background = background
        self._policy = policy
        self._lent: _LentPager | None = None
        self._lost_at = math.inf  # since when there is none that does
        self._pause_s = AGAIN_S
        self._digests: set[int | None] = set()
        self._recoveries = 0  # of migrations before the present one

    def check(self, about: About) -> None:
        """How much the source has is known when it offers it. What is set up before costs a 16,000th of the memory that
        the virtual machine says it has, and it may have mapped what no host has."""
        if about.memory_bytes != sum(size_bytes for _, size_bytes, _ in about.regions):
            raise ConfigurationError("its regions are not the whole of a memory file: there are gaps between offsets")
        limit_bytes = HOSTS * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if about.memory_bytes > limit_bytes:
            raise ConfigurationError(
                f"it has {format_size(about.memory_bytes)} of memory, more than {HOSTS} times what this host has"
            )

    async def prepare(self, pager: Pager) -> None:
        pager.set_prefetch(self._policy)

    async def run(self, vm: Vm, pager: Pager) -> None:
        """One migration after the other, until one has brought everything."""
        lent = self._lent = _LentPager(pager, vm.take)
        self._lost_at = trio.current_time()
        while not vm.complete:
            began_at = trio.current_time()
            failure = await self._migrate(vm, lent)
            if failure is None:
                return
            self._note_loss()
            if trio.current_time() - self._lost_at >= self._recover_for_s and not vm.complete:
                vm.lose(str(failure))
            log.info("%s: %s; trying again", vm.about.name, failure)
            if trio.current_time() - began_at > AGAIN_MAX_S:  # it has been of use, or waited long enough
                self._pause_s = AGAIN_S
            await trio.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, AGAIN_MAX_S)

    def _note_loss(self) -> None:
        self._lost_at = min(self._lost_at, trio.current_time())

    async def _migrate(self, vm: Vm, lent: _LentPager) -> PostcopyError | None:
        """One migration; why it has ended, None when it is complete."""
        try:
            with trio.fail_after(CONNECT_S):
                link = await CallingLink.open(self._route, "dest", replaceable=True, protection=self._protection)
        except trio.TooSlowError:
            return PeerError(f"{self._route.address}: no answer within {CONNECT_S:g} s")
        except PostcopyError as error:
            return error

        def changed() -> None:
            if migration.running_ns and migration.state is State.POSTCOPY:
                self._lost_at = math.inf
                vm.recoveries = self._recoveries + migration.recoveries.count
                vm.encrypted = migration.certificate is not None
                vm.found_again()
            else:
                self._note_loss()

        migration = self._make(link, vm, lent, changed)
        try:
            await migration.run(trio.Event())
        except PostcopyError as error:
            return error
        finally:
            if migration.running_ns:
                self._recoveries += migration.recoveries.count + 1  # the next one replaces its last connection
            await migration.close()
        if migration.complete:
            return None
        return migration.failure or MigrationError(f"{self._route.address}: the migration is {migration.status}")

    def _make(self, link: CallingLink, vm: Vm, lent: _LentPager, changed: Callable[[], None]) -> DestinationMigration:
        about = vm.about

        def make_machine(kind: str, config: Mapping[str, Any], layout: Sequence[BlockLayout]) -> Machine:
            if kind != ImageMachine.kind or len(layout) != 1:
                raise ConfigurationError(
                    f"{self._route.address}: offers a machine of kind {kind[:40]!r}: start the source with --machine"
                    " image"
                )
            if layout[0].size_bytes != about.memory_bytes:
                raise ConfigurationError(
                    f"{self._route.address}: its image has {format_size(layout[0].size_bytes)}, and the virtual machine"
                    f" {format_size(about.memory_bytes)}: it is of another snapshot"
                )
            return _KnownImage(about, self._digests, lent.image_is_known)

        return DestinationMigration(
            link,
            background=self._background,
            recover_for_s=self._recover_for_s,
            doubt_for_s=min(IN_DOUBT_FOR_S, self._recover_for_s),
            kill_when_lost=True,  # the migration ends then; what becomes of the virtual machine is told by `Vm.lose`
            make_machine=make_machine,
            make_pager=lambda: cast(Pager, lent),
            on_change=changed,
        )

    def take(self, event: Event, vm: Vm) -> None:
        if event.type is EventType.FATAL:
            super().take(event, vm)
        if self._lent is not None:
            self._lent.pass_on(event)

    def prefetch_all(self, pager: Pager) -> None:
        """The source pushes."""
