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

**Taking it back.** A destination can die for good when the machine is its own. The operator, who knows that, has the
machine go on here from the switchover (`reclaim`), unless a part of its memory has been given back. Should the
destination live, there would be two machines: so it is looked for once more before, and told when it comes back after
all.

Error handling: `run` raises nothing that is a matter of the migration; `state`, `failure` and `status` say how it
ended. Cancelling `run` is an interruption by the user: before the decision the machine is resumed, after it the
pages are lost.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import trio

from postcopy._blocking import run_sync
from postcopy._log import about
from postcopy.dataplane.pageserver import EventType, PageServer, PageServerStatistics
from postcopy.errors import ConfigurationError, MigrationError, PostcopyError, ProtocolError, ResourceError
from postcopy.machines import Machine, MachineEventType, MachineStatistics
from postcopy.memory import MemoryKind
from postcopy.memory.bitmap import Bitmap
from postcopy.migration._engine import Engine, Hopeless, disagreeing
from postcopy.migration._session import (
    HEARTBEAT_S,
    MISSED_HEARTBEATS,
    RECOVER_UNOWNED_S,
    STEP_TIMEOUT_S,
    UNDECIDED,
    Control,
    MapCollector,
    data_silence_s,
    explained,
    first_of,
    if_heavy,
    now_ns,
)
from postcopy.migration.figures import Figures
from postcopy.migration.release import PLACED_EVERY_MS, Releaser
from postcopy.net import Address, ChannelSet, Link, Session, keep_alive
from postcopy.wire import (
    ID_BYTES,
    PAGE_MAP_PAGES,
    Accept,
    Block,
    Commit,
    Complete,
    CompleteAck,
    Ended,
    EndedElsewhere,
    Offer,
    PageMap,
    Placed,
    Prepared,
    Ready,
    ReceivedMap,
    Recover,
    Recovered,
    Running,
    SourceProtocol,
    State,
    Switchover,
)

DEFAULT_BULK_CHANNELS = 2  # while one of its threads copies a page into place, the other receives
PREPARE_TIMEOUT_S = 10.0
"""How long a paused machine waits for the destination's `prepared` before it goes on here."""

RESUME_TIMEOUT_S = 10.0
RECLAIM_PROBE_S = 4.0
"""How long a destination is looked for before its machine is taken back. One that calls does so every 2 s."""

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


class SourceMigration(Engine[SourceProtocol]):
    """One migration away from this host. Make it, `run` it once; everything else may be looked at meanwhile."""

    SIDE = "source"
    PEER = "destination"

    def __init__(
        self,
        machine: Machine,
        link: Link | Callable[[], Awaitable[Link]],
        options: SourceOptions,
        *,
        peer: Address | None = None,
        make_server: Callable[[int], PageServer] = PageServer,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`link`: the connection, or how to make it: `run` then begins with that, in the status ``connecting``, and
        `peer` says where it goes. `on_change` is called, in the Trio thread, whenever `status` may have changed.
        `ConfigurationError` for `release_ram` with a machine whose memory is somebody's file."""
        if options.release_ram:
            check_releasable(machine)
        there = link if isinstance(link, Link) else None
        super().__init__(
            SourceProtocol(),
            there,
            heartbeat_s=options.heartbeat_s,
            recover_for_s=options.recover_for_s,
            on_change=on_change,
        )
        self.machine = machine
        self.machine_name = options.name
        self.peer = there.peer if there is not None else peer or Address("", 0)
        self.connected = trio.Event()  # the connection is there, or will not be: see `failure`
        self.figures: Figures | None = None  # of the destination, when it has completed
        self.at_pause: MachineStatistics | None = None
        self.ready_ns = self.paused_ns = self.running_ns = self.completed_ns = 0
        self.was_ready = False
        self._open_link = link if not isinstance(link, Link) else None
        self._options = options
        self._make_server = make_server
        self._server: PageServer | None = None
        self._server_made = trio.Event()
        self._releaser: Releaser | None = None  # with `release_ram`
        self._discarded: list[Bitmap] | None = None  # as it was when the server ended
        self._last_statistics: PageServerStatistics | None = None
        self._session: Session = Session(secrets.token_bytes(ID_BYTES), secrets.token_bytes(ID_BYTES), epoch=0)
        self._units: tuple[int, ...] = ()
        self._shards = self._bulk_channels = 0
        self._committed_ns = 0
        self._hold = True
        self._conversing = False  # the destination may come back

    # ---- looking at it

    @property
    def migration_id(self) -> str:
        return self._session.migration.hex()

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
        return self.state in UNDECIDED or self.state is State.PREPARED

    def set_bandwidth(self, max_bandwidth_bytes_per_s: int) -> None:
        """Limits the background push from now on; 0: no limit."""
        if max_bandwidth_bytes_per_s != self._options.max_bandwidth_bytes_per_s:
            self._options = replace(self._options, max_bandwidth_bytes_per_s=max_bandwidth_bytes_per_s)
            if self._server is not None:
                self._server.set_bandwidth(max_bandwidth_bytes_per_s)

    def set_recover_for(self, recover_for_s: float) -> None:
        super().set_recover_for(recover_for_s if self._hold else min(recover_for_s, RECOVER_UNOWNED_S))

    # ---- doing it

    async def run(self, go: trio.Event, stop: trio.Event, *, hold: bool = True) -> None:
        """Migrates when `go` is set, and gives up when `stop` is.

        Returns when the migration has completed or aborted, or was reclaimed. One that is `PAUSED` goes on when the
        destination is back, and otherwise stays so until `stop`; unless `hold` is false: what it could serve is then in
        a file, nothing is lost by its end, and a minute is enough to come back.
        """
        self._stop, self._hold = stop, hold
        self.set_recover_for(self._patience.seconds)
        with about(self):
            try:
                await self._run(go)
            except Exception as error:  # noqa: BLE001  # `explained` logs what it does not know
                # Nothing below lets an error out that belongs to a connection: this is of the beginning or the end.
                self.failure = self.failure or explained(error)
                log.error("%s", self.failure)
                self._protocol.connection_lost(str(self.failure))
            finally:
                self.connected.set()
                self._change()

    async def _run(self, go: trio.Event) -> None:
        try:
            workers = self._open_workers()
        except ResourceError as error:
            if self._link is not None:  # the destination is told why
                await self._connected(self._link, partial(_refuse, error))
            raise
        try:
            with workers.serving():
                link = await self._connect()
                if link is None:
                    return
                try:
                    await self._converse(link, go)
                finally:
                    await self._close_server()
        finally:
            await workers.close()

    async def _connect(self) -> Link | None:
        """The first connection; None when there is none, and `failure` says why."""
        if self._open_link is not None:
            open_link, found = self._open_link, list[Link]()

            async def connect() -> None:
                found.append(await open_link())

            self._change()
            try:
                await first_of(connect, self._stop.wait, self._cancelled.wait)
                self._check_wanted()
                self._link = found[0]
            except PostcopyError as error:
                for link in found:
                    await trio.aclose_forcefully(link.control)
                self.failure = error
                self._protocol.connection_lost(str(error))
                return None
            finally:
                self._open_link = None  # what it holds may be wanted free
        assert self._link is not None
        self.peer = self._link.peer
        self._protocol.version = self._link.version
        self.connected.set()
        self._change()
        return self._link

    async def _converse(self, link: Link, go: trio.Event) -> None:
        """One connection after the other."""
        with link.reconnector(self._session) as reconnector:
            self._reconnector = reconnector
            self._conversing = True
            try:
                await self._connected(link, partial(self._migrate, go=go))
                await self._recover()
            finally:
                self._conversing = False
                reconnector.ended(self._protocol.ending)
        if self.state is State.COMPLETED and self._releaser is not None:
            await self._release_rest(self._releaser)

    def _watchers(self, control: Control[SourceProtocol]) -> Sequence[Callable[[], Awaitable[None]]]:
        return self._watch_server, self._watch_machine, self._release

    def _give_up(self) -> bool:
        until = "until this is ended" if self._protocol.peer_gone else "until it is back, or this is ended"
        log.log(
            logging.WARNING if self.machine.live else logging.INFO,
            "the destination is lost for good (%s); what it has not got is kept here%s",
            self.failure,
            f" {until}" if self._hold else "",
        )
        return self._hold

    async def _ended_elsewhere(self, error: EndedElsewhere) -> None:
        state = self._protocol.peer_ended(error.how)
        self.failure = error
        if state is State.ABORTED:
            await self._contained(self._resume)
        elif state is State.COMPLETED:
            self.failure = None
            log.warning("the destination has every page: %s", error)
        else:
            log.error("%s; the machine can go on here from the switchover: `postcopy ctl reclaim --force`", error)

    async def _resume(self) -> None:
        """The machine goes on here."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + RESUME_TIMEOUT_S) as scope:
            await self.machine.resume()
            if self._committed_ns:  # it had been taken from the network
                await self.machine.claim_network()
        if scope.cancelled_caught:
            raise MigrationError(f"the machine could not be resumed at the source within {RESUME_TIMEOUT_S:g} s")

    # ---- taking it back

    def check_reclaimable(self) -> None:
        """`MigrationError`, with the reason, where the machine cannot go on here. Whether the destination answers is
        found out by `reclaim`."""
        if not self.machine.live:
            raise MigrationError("there is nothing to reclaim: an image does not run, and can be fetched again")
        if self.state is not State.PAUSED or not self._conversing:
            raise MigrationError(
                f"a machine can be reclaimed when its destination was lost after the switchover (postcopy-paused or"
                f" postcopy-failed); this migration is {self.status}"
            )
        if self._server is not None and self._releaser is not None:
            gone = sum(self._server.discarded(number).count() for number in range(len(self._units)))
            if gone:
                raise MigrationError(
                    f"the machine cannot go on here: {gone} pages of its memory have been given back (--release-ram),"
                    " and are at the destination only"
                )

    def reclaim_loses(self) -> str:
        """What is lost when the machine is taken back now: one line."""
        ago_s = (now_ns() - self.paused_ns) / 1e9
        ran = "it was running there when it was last heard of" if self.running_ns else "it may have run there"
        return (
            f"the machine goes on as it was at the switchover, {ago_s:.1f} s ago; all that it has done at"
            f" {self.peer} since is lost ({ran})"
        )

    async def reclaim(self) -> str:
        """For an operator who knows that the destination is dead: the machine goes on here, as it was at the
        switchover. Returns what is lost by that, one line.

        The destination is looked for before, for some seconds: one that answers keeps its machine, and the migration
        goes on where it can. One that comes back later is told, and stops. `MigrationError` where it cannot be done;
        nothing has changed then. May be cancelled until that is decided.
        """
        self.check_reclaimable()
        assert self._reconnector is not None
        reconnector = self._reconnector
        if self._gone_for is not Ended.LOST:
            self._probing, reconnector.answered = True, trio.Event()
            try:
                self._again(reconnector)
                with trio.move_on_after(max(MISSED_HEARTBEATS * self._heartbeat_s, RECLAIM_PROBE_S)):
                    back = partial(self._until, lambda: self.state is not State.PAUSED)
                    await first_of(back, reconnector.answered.wait)
                    raise MigrationError(
                        f"the destination answers: the machine is there ({self.status}); it can be reclaimed when the"
                        " destination is dead"
                    )
            finally:
                self._probing = False
        # From here to the protocol's word there is no step at which anything else could happen.
        self.check_reclaimable()
        lost = self.reclaim_loses()
        self._protocol.reclaim()
        reconnector.ended(self._protocol.ending)
        self.failure = None
        log.warning("reclaimed: %s", lost)
        self._change()
        await self._resume()
        return lost

    async def _go_on(self, control: Control[SourceProtocol], link: Link) -> None:
        """The destination is back: hears what it has, offers what it does not have, and follows it to its end."""
        protocol, server = self._protocol, self._server
        assert server is not None
        resume_ns = await self._hear_maps(control, server)
        with link.channel_set(self._session) as channel_set:
            await control.send(protocol.send(Recovered()))
            await self._attach(channel_set)
        if resume_ns and not self.running_ns:
            self.running_ns = self._committed_ns + resume_ns
        self._recovered()
        await self._follow(control)

    async def _hear_maps(self, control: Control[SourceProtocol], server: PageServer) -> int:
        """What the destination has, to the page server; `resume_ns`. `Disagreement` where it cannot be."""
        collector = MapCollector([server.block_pages(number) for number in range(len(self._units))])
        while isinstance(message := await control.receive_any(STEP_TIMEOUT_S), ReceivedMap):
            with disagreeing():
                await if_heavy(message.pages, collector.add, message)
        if not isinstance(message, Recover):
            raise ProtocolError(f"{message.TYPE} came where recover was due")
        digest = 0
        with disagreeing():
            collector.finish(message.TYPE, message.maps)
            for bitmap in collector.bitmaps:
                digest = await if_heavy(len(bitmap), bitmap.crc32c, digest)
            if digest != message.digest:
                raise ProtocolError("recover: the received maps do not have the digest that was told")
        if self._releaser is not None:
            try:
                self._releaser.check(collector.bitmaps)
            except ProtocolError as error:
                raise Hopeless(str(error)) from error  # what was given back is nowhere
            self._releaser.take_maps(collector.bitmaps)
        for number, bitmap in enumerate(collector.bitmaps):
            server.set_received(number, bitmap)
        return message.resume_ns

    async def _migrate(self, control: Control[SourceProtocol], link: Link, go: trio.Event) -> None:
        machine, protocol = self.machine, self._protocol
        blocks = tuple(Block(block.name, block.size_bytes, block.page_bytes) for block in machine.layout)
        with link.channel_set(self._session) as channel_set:
            offer = Offer(
                self._session.migration,
                self._session.token,
                machine.kind,
                {**machine.config(), "name": self._options.name} if self._options.name else machine.config(),
                blocks,
                self._options.bulk_channels,
                PLACED_EVERY_MS if self._options.release_ram else 0,
            )
            await control.send(protocol.send(offer))
            self._change()
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
            await self._attach(channel_set)
        await control.receive(Ready, STEP_TIMEOUT_S)
        self.ready_ns = now_ns()
        self.was_ready = True
        self._change()
        await go.wait()
        await self._switch_over(control)
        await self._follow(control)

    async def _attach(self, channel_set: ChannelSet) -> None:
        """Gives the page server its connections."""
        server = self._server
        assert server is not None
        channels = await channel_set.channels(self._shards, self._bulk_channels)
        try:
            for (kind, index), fd in channels.items():
                keep_alive(fd, data_silence_s(kind, self._options.heartbeat_s))
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
            self._change()
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
            await control.send(protocol.send(CompleteAck(stats)))

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
            present: Bitmap = await run_sync(block.memory.present, unit)
            server.set_present(number, present)
            for first_page, part in present.parts(PAGE_MAP_PAGES):
                runs = await if_heavy(len(part), part.rle_encode)
                await control.send(protocol.send(PageMap(number, first_page, len(part), runs)))
                maps += 1
        await control.send(protocol.send(Switchover(state, maps)))
        self._change()
        await control.receive(Prepared, self._options.prepare_timeout_s)
        # Asked in one step with the decision: whoever was told that it is cancelled can rely on it. From `Commit`
        # on the machine belongs to the destination, whether it hears of it or not. The page server is started before
        # the bytes leave, so that the first fault finds it answering.
        self._check_wanted()
        commit = protocol.send(Commit())
        try:
            self._committed_ns = now_ns()
            server.start()
            self._change()
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
                await self._let_peer_say_why()
                raise MigrationError(
                    f"data channel lost: {event.channel_kind.name.lower()} {event.channel} {_why(event.text)}"
                )
            if event.type is EventType.FATAL:
                raise Hopeless(f"the page server cannot go on: {event.text}")

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

    async def _settle(self, control: Control[SourceProtocol]) -> None:
        """Before the decision: the machine goes on here. After it: everything is kept, and nothing runs."""
        failure = self.failure
        if failure is None:
            return
        if self._protocol.may_run:
            if self.paused_ns:
                await self._contained(self._resume)
            await control.say_goodbye(str(failure))
            return
        self._protocol.connection_lost(str(failure))
        if self._server is None or self.state is not State.PAUSED:
            return
        self.statistics()
        self.paused.set()
        # Whoever pulls an image may leave when he has what he wanted.
        log.log(logging.WARNING if self.machine.live else logging.INFO, "paused: %s", failure)
        self._change()
        await self._server.disconnect()  # so that the destination hears of it on every channel
        for event in self._server.drain_events():
            if event.type is EventType.FATAL:
                raise Hopeless(f"the page server cannot go on: {event.text}")

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


async def _refuse(error: PostcopyError, control: Control[SourceProtocol], link: Link) -> None:
    raise error


def _why(text: str) -> str:
    return f"({text})" if text else "(closed by the destination)"
