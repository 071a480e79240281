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
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import trio

from postcopy.dataplane._events import EventStream
from postcopy.dataplane.pager import Event, EventType, Pager
from postcopy.errors import ConfigurationError, MigrationError, PeerError, PostcopyError
from postcopy.handler._source import Source
from postcopy.machines import BlockLayout, Machine
from postcopy.machines.image import ImageMachine
from postcopy.memory import Memory
from postcopy.migration.destination import DestinationMigration
from postcopy.net import CallingLink, Route
from postcopy.units import format_size
from postcopy.wire import State

if TYPE_CHECKING:
    from postcopy.handler._vm import About, Vm

AGAIN_S, AGAIN_MAX_S = 0.1, 5.0
"""Between attempts to connect, twice as long each time."""
CONNECT_S = 10.0
MAX_EVENTS = 1024
"""Of a pager, that no migration has looked at."""

log = logging.getLogger(__name__)


class _LentPager:
    """A pager as a migration has it: set up already, and not ended with it. All else is the pager's."""

    def __init__(self, pager: Pager) -> None:
        self._pager = pager
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
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
        return list(iter(self.take_event, None))

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
        await self._pager.disconnect()


class ConnectSource(Source):
    """A `postcopy source --machine image` at an address."""

    def __init__(self, route: Route, *, recover_for_s: float, background: bool) -> None:
        """`background`: pages are pushed, and asked for, that were not touched."""
        self._route = route
        self._recover_for_s = recover_for_s
        self._background = background
        self._lent: _LentPager | None = None
        self._connected = False  # whether the present migration has brought pages
        self._lost_at = math.inf  # since when there is none that does
        self._pause_s = AGAIN_S

    def check(self, about: About) -> None:
        """When there is an offer."""

    async def run(self, vm: Vm, pager: Pager) -> None:
        """One migration after the other, until one has brought everything."""
        lent = self._lent = _LentPager(pager)
        while True:
            lost_at = trio.current_time()
            failure = await self._migrate(vm, lent)
            if failure is None:
                await trio.sleep_forever()
            if self._connected:  # which has then looked for its source for as long as it should
                lost_at = -math.inf
                self._pause_s = AGAIN_S
            self._lost_at = min(self._lost_at, lost_at)
            if trio.current_time() - self._lost_at >= self._recover_for_s:
                vm.lose(str(failure))
            log.info("%s: %s; trying again", vm.about.name, failure)
            await trio.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, AGAIN_MAX_S)

    async def _migrate(self, vm: Vm, lent: _LentPager) -> PostcopyError | None:
        """One migration; why it has ended, None when it is complete."""
        self._connected = False
        try:
            with trio.fail_after(CONNECT_S):
                link = await CallingLink.open(self._route, "dest")
        except trio.TooSlowError:
            return PeerError(f"{self._route.address}: no answer within {CONNECT_S:g} s")
        except PostcopyError as error:
            return error

        def changed() -> None:
            if migration.running_ns and migration.state is State.POSTCOPY:
                self._connected = True
                self._lost_at = math.inf
                vm.recoveries = migration.recoveries.count
                vm.found_again()

        migration = self._make(link, vm, lent, changed)
        try:
            await migration.run(trio.Event())
        except PostcopyError as error:
            return error
        finally:
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
            memory = Memory.without_content(about.memory_bytes, about.page_bytes)
            return ImageMachine(memory, about.memory_bytes, False, "")

        return DestinationMigration(
            link,
            background=self._background,
            recover_for_s=self._recover_for_s,
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
