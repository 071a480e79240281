# SPDX-License-Identifier: Apache-2.0
"""The source's engine: one migration, from the offer to the last page, over one link.

The plan: offer the machine, connect the data channels, wait until it is time; pause it, tell which pages there are,
hand its state over; and when the destination says that it is prepared, decide. Up to that decision every failure ends
the same way: the machine is resumed *first*, then the peer is told, then the rest is cleaned up. After it the machine
never runs here again; a connection that is lost then leaves its memory as it is (but for pages that the destination has
acknowledged, with `release_ram`: see `release`), in the state `PAUSED`, and the two sides look for each other again
(`protocol`, "Recovery"): the destination says what it has, the rest is offered anew.

Resource handling: the machine stays the caller's, and is paused when the migration has been committed, else as it
was before. The link's control connection and the page server belong to the engine and are closed when `run`
returns.

Error handling: `run` raises nothing that is a matter of the migration; `state`, `failure` and `status` say how it
ended. Cancelling `run` is an interruption by the user: before the decision the machine is resumed, after it the
pages are lost.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial

import trio

from postcopy._errors import ConfigurationError, MigrationError, PeerError, PostcopyError, ProtocolError
from postcopy._logs import about
from postcopy.bitmap import Bitmap
from postcopy.machines import Machine, MachineEventType, MachineStatistics
from postcopy.memory import MemoryKind
from postcopy.migration._session import (
    HEARTBEAT_S,
    RECOVER_UNOWNED_S,
    SILENCES,
    STEP_TIMEOUT_S,
    UNDECIDED,
    Control,
    FirstFailure,
    Interrupted,
    MapCollector,
    Recoveries,
    next_link,
    now_ns,
    status_of,
    steered,
)
from postcopy.migration.channels import Address, Door, Link, Membership, Session, keep_alive
from postcopy.migration.figures import Figures
from postcopy.migration.protocol import (
    ID_BYTES,
    PAGE_MAP_PAGES,
    Accept,
    Block,
    Complete,
    EndedElsewhere,
    Offer,
    Placed,
    Prepared,
    Ready,
    ReceivedMap,
    Recover,
    Running,
    SourceProtocol,
    State,
)
from postcopy.migration.release import PLACED_EVERY_MS, Releaser
from postcopy.pageserver import EventType, PageServer, PageServerStatistics

DEFAULT_BULK_CHANNELS = 2  # while one of its threads copies a page into place, the other receives
PREPARE_TIMEOUT_S = 10.0
"""How long a paused machine waits for the destination's `prepared` before it goes on here."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceOptions:
    bulk_channels: int = DEFAULT_BULK_CHANNELS
    busy_poll_us: int = 0
    max_bandwidth_bytes_per_s: int = 0  # of the background push; 0: no limit
    prepare_timeout_s: float = PREPARE_TIMEOUT_S
    heartbeat_s: float = HEARTBEAT_S
    recover_for_s: float = math.inf  # how long a lost destination is waited for
    release_ram: bool = False  # give memory back as the destination acknowledges it, after `commit`
    name: str = ""  # of the machine, told to the destination with its configuration


class SourceMigration:
    """One migration away from this host. Make it, `run` it once; everything else may be looked at meanwhile."""

    def __init__(
        self,
        machine: Machine,
        link: Link,
        options: SourceOptions,
        *,
        make_server: Callable[[int], PageServer] = PageServer,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is called, in the Trio thread, whenever `status` may have changed. `ConfigurationError` for
        `release_ram` with a machine whose memory is somebody's file."""
        if options.release_ram:
            check_releasable(machine)
        self.machine = machine
        self.machine_name = options.name
        self.peer = link.peer
        self.failure: PostcopyError | None = None
        self.figures: Figures | None = None  # of the destination, when it has completed
        self.paused = trio.Event()  # set when the destination was lost after `commit`
        self.at_pause: MachineStatistics | None = None
        self.ready_ns = self.paused_ns = self.running_ns = self.completed_ns = 0
        self.started_ns = now_ns()
        self.was_ready = False
        self.recoveries = Recoveries()
        self._link = link
        self._options = options
        self._make_server = make_server
        self._on_change = on_change
        self._server: PageServer | None = None
        self._server_made = trio.Event()
        self._releaser: Releaser | None = None  # with `release_ram`
        self._discarded: list[Bitmap] | None = None  # as it was when the server ended
        self._last_statistics: PageServerStatistics | None = None
        self._protocol = SourceProtocol(link.version)
        self._session = Session(secrets.token_bytes(ID_BYTES), secrets.token_bytes(ID_BYTES), epoch=0)
        self._units: tuple[int, ...] = ()
        self._shards = self._bulk_channels = 0
        self._committed_ns = 0
        self._fatal = False  # the page server cannot go on: no other connection would help
        self._membership: Membership | None = None
        self._cancelled = trio.Event()

    # ---- looking at it

    @property
    def migration_id(self) -> str:
        return self._session.migration.hex()

    @property
    def state(self) -> State:
        return self._protocol.state

    @property
    def status(self) -> str:
        """QEMU's word for the state."""
        return status_of(self.state, interrupted=isinstance(self.failure, Interrupted))

    @property
    def may_run(self) -> bool:
        """Whether this side still owns the machine."""
        return self._protocol.may_run

    @property
    def downtime_ns(self) -> int:
        """From the request to pause until the destination said that it runs; 0 when it has not."""
        return self.running_ns - self.paused_ns if self.running_ns else 0

    @property
    def total_ns(self) -> int:
        """From the request to pause until every page had arrived."""
        return self.completed_ns - self.paused_ns if self.completed_ns else 0

    def statistics(self) -> PageServerStatistics | None:
        """The page server's counters; those at its end afterwards; None before there is one."""
        if self._server is not None:
            self._last_statistics = self._server.statistics()
        return self._last_statistics

    def kept(self) -> list[Bitmap]:
        """For each RAM block what is (still) here, in the memory's own pages: all of it, but for what `release_ram` has
        given back. After `run`."""
        memories = [block.memory for block in self.machine.blocks]
        if self._discarded is None:
            return [Bitmap.full(memory.pages) for memory in memories]
        return [
            gone.rescaled(unit, memory.page_bytes).inverted()
            for gone, unit, memory in zip(self._discarded, self._units, memories, strict=True)
        ]

    # ---- steering it

    @property
    def cancellable(self) -> bool:
        """Whether giving it up now would lose nothing."""
        return self.state in UNDECIDED or self.state is State.PREPARED

    def cancel(self) -> None:
        """Gives it up if it is still `cancellable` when that is done: unlike `stop`, which ends it in any case, it does
        nothing to a migration that has been decided meanwhile."""
        self._cancelled.set()

    def set_bandwidth(self, max_bandwidth_bytes_per_s: int) -> None:
        """Limits the background push from now on; 0: no limit."""
        if max_bandwidth_bytes_per_s != self._options.max_bandwidth_bytes_per_s:
            self._options = replace(self._options, max_bandwidth_bytes_per_s=max_bandwidth_bytes_per_s)
            if self._server is not None:
                self._server.set_bandwidth(max_bandwidth_bytes_per_s)

    def set_recover_for(self, recover_for_s: float) -> None:
        """How long a destination is waited for that is lost from now on."""
        self._options = replace(self._options, recover_for_s=recover_for_s)

    def hold(self) -> None:
        """Gives the connection up, as a network that fails would, and takes no other one until `let_go`.
        `MigrationError` where nothing could be gone on with."""
        steered(self._membership, self.state).hold()

    def let_go(self, address: Address | None = None) -> None:
        """Looks for the destination (again), at this address where one is given; see `reconnect_to`."""
        membership = steered(self._membership, self.state)
        if address is not None:
            self.reconnect_to(address)
        membership.let_go()

    # ---- doing it

    def reconnect_to(self, address: Address) -> None:
        """The destination is looked for there when the connection is lost, or at once when it has been. A connection
        that works is left alone. `ConfigurationError` on the side that listens."""
        self._link.reconnect_to(address)

    async def run(self, go: trio.Event, stop: trio.Event, *, hold: bool = True) -> None:
        """Migrates when `go` is set, and gives up when `stop` is.

        Returns when the migration has completed or aborted. One that is `PAUSED` goes on when the destination is back,
        and otherwise stays so until `stop`; unless `hold` is false: what it could serve is then in a file, nothing is
        lost by its end, and a minute is enough to come back.
        """
        with about(self):
            await self._run(go, stop, hold)

    async def _run(self, go: trio.Event, stop: trio.Event, hold: bool) -> None:
        try:
            with self._link.membership(self._session) as membership:
                self._membership = membership
                await self._connected(self._link, partial(self._migrate, go=go), membership, stop)
                if self._protocol.recoverable and not self._fatal:
                    await self._recover(membership, stop, self._options.recover_for_s if hold else RECOVER_UNOWNED_S)
                if self.state is not State.PAUSED:
                    membership.ended(self._protocol.ending)
            if self.state is State.COMPLETED and self._releaser is not None:
                await self._release_rest(self._releaser)
            if self.state is State.PAUSED and hold:
                await stop.wait()
        finally:
            await self._close_server()

    async def _connected(
        self,
        link: Link,
        plan: Callable[[Control[SourceProtocol], Link], Awaitable[None]],
        membership: Membership,
        stop: trio.Event,
    ) -> None:
        """The life of one connection: follows the plan, and settles where its end has left the machine."""
        control = Control(link.control, self._protocol, self._options.heartbeat_s)
        scope = FirstFailure()
        self.failure = None

        async def main() -> None:
            await plan(control, link)

        async def interruption() -> None:
            await stop.wait()
            raise Interrupted("interrupted at the source")

        async def cancellation() -> None:
            await self._cancelled.wait()
            if not self.cancellable:
                await trio.sleep_forever()
            raise Interrupted("cancelled at the source")

        async def replacement() -> None:
            await membership.superseded()
            raise PeerError("the destination has come back on another connection")

        try:
            watchers = (self._watch_server, self._watch_machine, interruption, cancellation, replacement, self._release)
            await scope.run(main, control.run, *watchers)
            if self._protocol.ended and self.state is State.COMPLETED:
                return
            self.failure = scope.failure or Interrupted("interrupted at the source")
        except BaseException:
            self.failure = Interrupted("ended at the source")  # cancelled, or a mistake of ours: never keep it stopped
            raise
        finally:
            if self.state is not State.COMPLETED:
                assert self.failure is not None
                await self._fail(control, self.failure)
            if self.state is State.COMPLETED:
                self.failure = (
                    None  # the destination has every page; that it did not hear our last word changes nothing
                )
            await control.close()
            self._on_change()

    async def _recover(self, membership: Membership, stop: trio.Event, recover_for_s: float) -> None:
        """Goes on with the destination, as often as it takes."""
        lost_ns = now_ns()
        while self._protocol.recoverable and not self._fatal and not stop.is_set():
            found = await next_link(membership, stop, recover_for_s)
            if found is None or isinstance(found, PeerError):
                if isinstance(found, EndedElsewhere):
                    self._protocol.peer_ended(found.how)
                if found is not None:
                    log.error("the destination does not take us back: %s", found)
                    self.failure = found
                return
            link, self._session = found
            self.peer = link.peer
            self._protocol.reconnected()
            self._on_change()
            recovered = self.recoveries.count
            await self._connected(link, partial(self._go_on, lost_ns=lost_ns), membership, stop)
            if self.recoveries.count > recovered:
                lost_ns = now_ns()

    async def _go_on(self, control: Control[SourceProtocol], link: Link, lost_ns: int) -> None:
        """The destination is back: hears what it has, offers what it does not have, and follows it to its end."""
        protocol, server = self._protocol, self._server
        assert server is not None
        collector = MapCollector([server.block_pages(number) for number in range(len(self._units))])
        while isinstance(message := await control.receive_any(STEP_TIMEOUT_S), ReceivedMap):
            collector.add(message)
        if not isinstance(message, Recover):
            raise ProtocolError(f"{message.TYPE} came where recover was due")
        collector.finish(message.TYPE, message.maps)
        digest = 0
        for bitmap in collector.bitmaps:
            digest = bitmap.crc32c(digest)
        if digest != message.digest:
            raise ProtocolError("recover: the received maps do not have the digest that was told")
        if self._releaser is not None:
            self._releaser.check(collector.bitmaps)
            self._releaser.take_maps(collector.bitmaps)
        for number, bitmap in enumerate(collector.bitmaps):
            server.set_received(number, bitmap)
        with link.door(self._session) as door:
            await control.send(protocol.send_recovered())
            await self._attach(door)
        if message.resume_ns and not self.running_ns:
            self.running_ns = self._committed_ns + message.resume_ns
        self.recoveries.add(now_ns() - lost_ns)
        if self._membership is not None:
            self._membership.went_on()
        log.warning("recovered: the destination is back after %.0f ms", self.recoveries.last_ns / 1e6)
        self._on_change()
        await self._follow(control)

    async def _migrate(self, control: Control[SourceProtocol], link: Link, go: trio.Event) -> None:
        machine, protocol = self.machine, self._protocol
        blocks = tuple(Block(block.name, block.size_bytes, block.page_bytes) for block in machine.layout)
        with link.door(self._session) as door:
            offer = Offer(
                self._session.migration,
                self._session.token,
                machine.kind,
                {**machine.config(), "name": self._options.name} if self._options.name else machine.config(),
                blocks,
                self._options.bulk_channels,
                PLACED_EVERY_MS if self._options.release_ram else 0,
            )
            await control.send(protocol.send_offer(offer))
            self._on_change()
            accept = await control.receive(Accept, STEP_TIMEOUT_S)
            self._check_accept(accept, blocks)
            self._units = accept.page_bytes
            self._server = self._make_server(self._options.max_bandwidth_bytes_per_s)
            for block, unit in zip(machine.blocks, accept.page_bytes, strict=True):
                self._server.add_block(block.memory, unit)
            if self._options.release_ram:
                self._releaser = Releaser(self._server, len(blocks))
            self._server_made.set()
            self._shards, self._bulk_channels = accept.shards, accept.bulk_channels
            await self._attach(door)
        await control.receive(Ready, STEP_TIMEOUT_S)
        self.ready_ns = now_ns()
        self.was_ready = True
        self._on_change()
        await go.wait()
        await self._switch_over(control)
        await self._follow(control)

    async def _attach(self, door: Door) -> None:
        """Gives the page server its connections."""
        server = self._server
        assert server is not None
        channels = await door.channels(self._shards, self._bulk_channels)
        try:
            for (kind, index), fd in channels.items():
                keep_alive(fd, SILENCES * self._options.heartbeat_s)
                if kind == "urgent":
                    server.attach_urgent(index, fd.detach(), self._options.busy_poll_us)
                else:
                    server.attach_bulk(index, fd.detach())
        finally:
            for fd in channels.values():
                fd.close()  # those that were not given away

    async def _follow(self, control: Control[SourceProtocol]) -> None:
        """The machine is the destination's: hears of it until its last page has arrived."""
        protocol = self._protocol
        message = await control.receive_any()
        if isinstance(message, Running):
            self.running_ns = now_ns()
            log.info("the machine runs at the destination, %.3f ms after `commit`", message.resume_ns / 1e6)
            self._on_change()
            message = await control.receive_any()
        while isinstance(message, Placed) and self._releaser is not None:
            self._releaser.take(message)
            message = await control.receive_any()
        if not isinstance(message, Complete):
            raise ProtocolError(f"{message.TYPE} came where complete was due")
        self.completed_ns = now_ns()
        self.figures = Figures.from_wire(message.stats)
        self.statistics()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + STEP_TIMEOUT_S):
            stats = {"downtime_ns": self.downtime_ns, "total_ns": self.total_ns}
            await control.send(protocol.send_complete_ack(stats))

    async def _switch_over(self, control: Control[SourceProtocol]) -> None:
        machine, protocol, server = self.machine, self._protocol, self._server
        assert server is not None
        self.paused_ns = now_ns()
        await machine.pause()
        self.at_pause = machine.statistics()
        # Before the memory is looked at: a machine that cannot be moved (an image that has changed) says best why.
        state = await machine.save_state()
        maps = 0
        for number, (block, unit) in enumerate(zip(machine.blocks, self._units, strict=True)):
            memory = block.memory
            present: Bitmap = await trio.to_thread.run_sync(memory.present, unit)
            server.set_present(number, present)
            for first_page, part in present.parts(PAGE_MAP_PAGES):
                await control.send(protocol.send_page_map(number, first_page, len(part), part.rle_encode()))
                maps += 1
        await control.send(protocol.send_switchover(state, maps))
        self._on_change()
        await control.receive(Prepared, self._options.prepare_timeout_s)
        # From the next line on the machine belongs to the destination, whether it hears of it or not. The page
        # server is started before the bytes leave, so that the first fault finds it answering.
        commit = protocol.send_commit()
        try:
            self._committed_ns = now_ns()
            server.start()
            self._on_change()
            await control.send(commit)
        finally:  # heard or not, it never answers here again
            with trio.CancelScope(shield=True):
                await machine.release_network()

    def _check_accept(self, accept: Accept, blocks: tuple[Block, ...]) -> None:
        if len(accept.page_bytes) != len(blocks):
            raise ProtocolError(f"accept: {len(accept.page_bytes)} page sizes for {len(blocks)} blocks")
        if accept.shards != self.machine.shards:
            raise ProtocolError(f"accept: {accept.shards} shards for a machine of {self.machine.shards}")
        if accept.bulk_channels > self._options.bulk_channels:
            raise ProtocolError(
                f"accept: {accept.bulk_channels} bulk channels, {self._options.bulk_channels} were offered"
            )

    async def _watch_server(self) -> None:
        await self._server_made.wait()
        assert self._server is not None
        async for event in self._server.events():
            if event.type is EventType.CHANNEL_DOWN:
                # In order, a destination closes its data channels only when it has our `complete-ack`.
                raise MigrationError(
                    f"data channel lost: {event.channel_kind.name.lower()} {event.channel} {_why(event.text)}"
                )
            if event.type is EventType.FATAL:
                self._fatal = True
                raise MigrationError(f"the page server cannot go on: {event.text}")

    async def _release(self) -> None:
        await self._server_made.wait()
        if self._releaser is not None:
            await self._releaser.run()

    async def _release_rest(self, releaser: Releaser) -> None:
        """Every page has arrived: the machine that stays behind here is empty."""
        assert self._server is not None
        try:
            await self._server.disconnect()  # so that nothing is under way
            await releaser.release_all()
        except PostcopyError as error:
            log.error("%s", error)

    async def _watch_machine(self) -> None:
        async for event in self.machine.events():
            if event.type is MachineEventType.FAILED and not self._protocol.committed:
                raise MigrationError(f"the machine has failed: {event.text}")

    # ---- when it fails

    async def _fail(self, control: Control[SourceProtocol], failure: PostcopyError) -> None:
        """Before the decision: the machine goes on here. After it: everything is kept, and nothing runs."""
        if self._protocol.may_run:
            paused = self.paused_ns
            try:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
                    if paused:
                        await self.machine.resume()
            except PostcopyError as error:
                log.error("the machine cannot be resumed at the source: %s", error)
            await control.say_goodbye(str(failure))
            return
        self._protocol.connection_lost(str(failure))
        if self._server is not None and self.state is State.PAUSED:
            self.statistics()
            self.paused.set()
            # Whoever pulls an image may leave when he has what he wanted.
            log.log(logging.WARNING if self.machine.live else logging.INFO, "paused: %s", failure)
            self._on_change()
            with trio.CancelScope(shield=True):  # bounded by the page server
                try:
                    await self._server.disconnect()  # so that the destination hears of it on every channel
                    self._fatal |= any(event.type is EventType.FATAL for event in self._server.drain_events())
                except PostcopyError as error:
                    self._fatal = True  # its threads hang: it can take no new connections
                    log.error("%s", error)

    async def _close_server(self) -> None:
        if self._server is None:
            return
        self.statistics()
        if self._releaser is not None:
            self._discarded = [self._server.discarded(number) for number in range(len(self._units))]
        server, self._server = self._server, None
        try:
            await server.close()
        except PostcopyError as error:
            log.error("%s", error)


def check_releasable(machine: Machine) -> None:
    """`ConfigurationError` unless the memory is the machine's own, to be thrown away when it is elsewhere."""
    if any(block.memory.kind is MemoryKind.FILE for block in machine.blocks):
        raise ConfigurationError(
            f"--release-ram: the memory of a machine of kind {machine.kind} is a file of yours, which stays as it is;"
            " leave the option out"
        )


def _why(text: str) -> str:
    return f"({text})" if text else "(closed by the destination)"
