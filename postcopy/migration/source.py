# SPDX-License-Identifier: Apache-2.0
"""The source's engine: one migration, from the offer to the last page.

The plan: offer the machine, connect the data channels, wait until it is time. While the machine runs: tell which pages
there are, so that the destination arms all of its memory; with precopy, send pages in rounds (`precopy` says how many),
each time followed by what was written meanwhile, which the destination forgets. Then pause the machine, tell what has
changed since, hand its state over; and when the destination says that it is prepared, decide. Nothing is done in the
pause that could be done before (a peer of an older version gets the maps then). Up to that decision every failure ends
the same way: the machine is resumed *first*, then the peer gets the reason, then the rest is cleaned up. After it the
machine never runs here again. A connection that is lost then leaves its memory as it is (but for pages that the
destination has acknowledged, with `release_ram`: see `acknowledgements`), in the state `PAUSED`, and the two sides look
for each other again: the destination says what it has, the rest is offered anew.

Resource handling: the machine stays the caller's, and is paused when the migration has been committed, else as it
was before. The link's control connection and the page server are closed when `run` returns.

**Taking it back.** A destination can die for good when the machine is its own. The operator, who knows that, has the
machine go on here from the switchover (`reclaim`), unless a part of its memory has been given back. Should the
destination live, there would be two machines: so it is looked for once more before, and refused with that reason when
it comes back later.

**Requests** are answered from the moment in which the destination gets the state, since a machine may touch its memory
while it is loaded. Nothing changes that memory any more, unless the migration is aborted; then all that was sent is
thrown away.

Cancelling `run` before the decision resumes the machine; after it the pages are lost.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import trio

from postcopy import wire
from postcopy.dataplane import compression
from postcopy.dataplane.compression import Compression
from postcopy.dataplane.pageserver import ChannelKind, Event, EventType, PageServer
from postcopy.errors import ConfigurationError, MigrationError, PeerError, PostcopyError, ProtocolError
from postcopy.machines import Machine, MachineState, MachineStatistics
from postcopy.memory import MemoryKind
from postcopy.memory.bitmap import Bitmap
from postcopy.migration.acknowledgements import PLACED_EVERY_MS, Releaser
from postcopy.migration.changes import Changes
from postcopy.migration.connection import HEARTBEAT_S, MISSED_HEARTBEATS, STEP_TIMEOUT_S, Control
from postcopy.migration.engine import Engine, Unrecoverable
from postcopy.migration.maps import Disagreement, Part, digest_of, receive_maps, send_maps
from postcopy.migration.precopy import ROUND_S, Mode, Policy
from postcopy.migration.statistics import Breakdown, Statistics
from postcopy.migration.tasks import first_of, now_ns
from postcopy.net import Address, Link, OpenChannels, Session
from postcopy.wire import EndedElsewhere, SourceProtocol, State

DEFAULT_BULK_CHANNELS = 2  # while one of its threads copies a page into place, the other receives

PREPARE_TIMEOUT_S = 10.0
"""How long a paused machine waits for the destination's `prepared` before it goes on here; where the rest of its memory
is sent first, how long nothing of that may be taken."""
SLOWEST_BYTES_PER_S = 1 << 20
"""How fast the rest has to be taken at least, unless it is sent more slowly than that."""
RUNS_WITHIN_S = 0.05
"""How long the news of the commit is held back for that of the machine running: see `_after_commit`."""
ROUND_TIMEOUT_S = 30.0
"""How long a destination may take over a round, which costs it milliseconds; beside the time for what is under way."""
UNDER_WAY_BYTES = 64 << 20
"""So much of a push that has ended may still be in the queues of both systems."""

RESUME_TIMEOUT_S = 10.0
RECOVER_UNOWNED_S = 60.0
"""How long a destination is waited for on which nothing depends: that of an image, which can begin anew."""
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
    name: str = ""  # of the machine, sent with its configuration
    mode: Mode = Mode.POSTCOPY
    precopy_s: float = 0.0  # for how long pages are sent in rounds (precopy, hybrid); inf: as long as it makes sense
    max_downtime_s: float = 0.3  # what is left after a round and fits is sent while the machine is paused
    precopy_rounds: int = 30  # at most, where `precopy_s` is inf
    compress: str = "off"  # background pages: off, lz4, zstd, auto
    push_after_s: float = 0.0  # from the switchover on; inf: not at all, but when this side is told to


class SourceMigration(Engine[SourceProtocol, PageServer]):
    """One migration away from this host. Make it, `run` it once; everything else may be looked at meanwhile."""

    SIDE = SourceProtocol.SIDE

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
        `ConfigurationError` for `release_ram` with a machine whose memory is a file of the user."""
        if options.release_ram:
            check_releasable(machine)
        if options.mode.has_rounds and not machine.live:
            raise ConfigurationError(
                f"--mode {options.mode}: a machine of kind {machine.kind} does not run, so that nothing of it changes"
                " while it is sent; use --mode postcopy or stop-and-copy"
            )
        if options.mode is not Mode.POSTCOPY and not options.bulk_channels:
            raise ConfigurationError(
                f"--mode {options.mode}: pages are sent on bulk channels; allow one (--bulk-channels)"
            )
        given = link if isinstance(link, Link) else None
        super().__init__(
            SourceProtocol(),
            given,
            given.peer if given is not None else peer or Address("", 0),
            heartbeat_s=options.heartbeat_s,
            recover_for_s=options.recover_for_s,
            on_change=on_change,
        )
        self.machine = machine
        self.machine_name = options.name
        self.connected = trio.Event()  # the connection is there, or will not be: see `failure`
        self.at_pause: MachineStatistics | None = None
        self.ready_ns = self.paused_ns = 0  # when; 0: not yet
        self.downtime_ns: int | None = None  # None: not known
        self.total_ns: int | None = None
        self._open_link = link if not isinstance(link, Link) else None
        self._options = options
        self._make_server = make_server
        self._session = Session(secrets.token_bytes(wire.ID_BYTES), secrets.token_bytes(wire.ID_BYTES), epoch=0)
        self._counted = offered(machine)
        self._reported: Statistics | None = None  # by the destination, when it has completed
        self._releaser: Releaser | None = None  # with `release_ram`
        self._discarded: list[Bitmap] | None = None  # as it was when the page server ended
        self._accepted: wire.Accept | None = None
        self._keep = True
        self._changes: Changes | None = None  # until the machine is the destination's, or goes on here
        self._pushing: set[int] = set()  # bulk channels that have not ended the present push
        self._resuming = trio.Lock()
        self._early = deque[bytes]()  # pieces of the machine's state that have to be sent
        self._prepared_ns = 0  # when the destination was
        self._rounds = 0  # that were told
        self._left_pages = 0  # that the destination does not have, some perhaps counted twice,
        self._left_at: int | None = None  # when the page server had sent so many; None: this was not told yet
        self._synchronised = self._dirty_rate = 0
        self._push_after_s = options.push_after_s
        self._policy = Policy(options.mode, options.precopy_s, options.max_downtime_s, options.precopy_rounds)
        self._policy.limit_bytes_per_s = options.max_bandwidth_bytes_per_s

    # ---- looking at it

    @property
    def mode(self) -> Mode:
        return self._policy.mode

    def _count(self, data: PageServer) -> Statistics:
        counted = data.statistics()
        mine: dict[str, Any] = {
            "bins": data.bins(),
            "iteration": self.iteration,
            "dirty_sync_count": self._synchronised,
            "dirty_pages_rate": self._dirty_rate,
            **{name: getattr(counted, name, None) for name in ("compressed_bytes", "uncompressed_bytes")},
        }
        if self._reported is not None:
            return replace(self._reported, released_bytes=counted.released_bytes, **mine)
        before = offered(self.machine)
        if self._left_at is not None and self._accepted is not None and not self.committed_ns:
            left_pages = max(0, self._left_pages + self._left_at - counted.sent_pages)
            left_bytes = left_pages * min(self._accepted.page_bytes)
            mine["resident_bytes"] = max(0, self.machine.memory_bytes - left_bytes)
        both = Statistics.of(counted, total_bytes=before.total_bytes, page_bytes=before.page_bytes)
        return replace(both, **mine)

    def statistics(self) -> Statistics:
        return replace(super().statistics(), downtime_ns=self.downtime_ns, total_ns=self.total_ns)

    def kept(self) -> list[Bitmap]:
        """For each RAM block what is (still) here, in the memory's own pages: all of it, but for what `release_ram` has
        given back. After `run`."""
        memories = [block.memory for block in self.machine.blocks]
        if self._discarded is None or self._accepted is None:
            return [Bitmap.full(memory.pages) for memory in memories]
        return [
            gone.rescaled(unit, memory.page_bytes).inverted()
            for gone, unit, memory in zip(self._discarded, self._accepted.page_bytes, memories, strict=True)
        ]

    # ---- steering it

    def set_bandwidth(self, max_bandwidth_bytes_per_s: int) -> None:
        """Limits the background push from now on; 0: no limit."""
        if max_bandwidth_bytes_per_s != self._options.max_bandwidth_bytes_per_s:
            self._options = replace(self._options, max_bandwidth_bytes_per_s=max_bandwidth_bytes_per_s)
            self._policy.limit_bytes_per_s = max_bandwidth_bytes_per_s
            if self._data is not None:
                self._data.set_bandwidth(max_bandwidth_bytes_per_s)

    def set_precopy(self, precopy_s: float) -> None:
        """For how long pages are sent in rounds, from the first one on; 0: no other round. `MigrationError` where the
        migration is of a mode without rounds."""
        if precopy_s and not self._policy.mode.has_rounds:
            raise MigrationError(
                f"this migration is of mode {self._policy.mode}, in which no page is sent before the switchover; cancel"
                " it, and migrate with --precopy"
            )
        self._policy.precopy_s = precopy_s
        self._wake()

    def set_max_downtime(self, max_downtime_s: float) -> None:
        """How much may be sent while the machine is paused, see `SourceOptions`."""
        self._policy.max_downtime_s = max_downtime_s
        self._wake()

    def set_push_after(self, push_after_s: float) -> None:
        """How long after the switchover the push of the rest is held back; 0: it begins now. One that has begun goes
        on."""
        self._push_after_s = push_after_s
        self._wake()

    def switch_over(self) -> None:
        """Ends precopy: the machine is paused as soon as what has been sent is there. `MigrationError` where that has
        been done, or the migration is of a mode without precopy."""
        if not self._policy.mode.has_rounds or self.paused_ns or self.over:
            raise MigrationError(f"there is no precopy to end: the migration is {self.status}")
        self._policy.ended = True
        self._wake()

    def set_recover_for(self, recover_for_s: float) -> None:
        super().set_recover_for(recover_for_s if self._keep else min(recover_for_s, RECOVER_UNOWNED_S))

    # ---- doing it

    async def run(self, go: trio.Event, stop: trio.Event, *, keep: bool = True) -> None:
        """Migrates when `go` is set, and gives up when `stop` is.

        Returns when the migration has completed or aborted, or was reclaimed. One that is `PAUSED` goes on when the
        destination is back, and otherwise stays so until `stop`; unless `keep` is false: what it could serve is then in
        a file, nothing is lost by its end, and a minute is enough to come back.
        """
        self._keep = keep
        self.set_recover_for(self._recover_for_s)
        if self.recorder is not None:
            self.machine.be_recorded(self.recorder)
        try:
            await self._run(stop, partial(self._migrate, go=go))
        finally:
            with trio.CancelScope(shield=True):  # bounded by `_resume`
                async with self._resuming:  # by `reclaim`, which ends this: its owner may close the machine then
                    pass
            if self.recorder is not None:
                self.recorder.stop()
            self.connected.set()

    async def _connect(self) -> Link | None:
        if self._open_link is not None:
            open_link, found = self._open_link, list[Link]()

            async def connect() -> None:
                found.append(await open_link())

            self._change()
            try:
                await first_of(connect, self._stop.wait, self._cancelled.wait)
                self._check_wanted()
            except BaseException as error:  # also when this is cancelled in the moment in which the peer answers
                for link in found:
                    link.control.socket.close()
                if not isinstance(error, PostcopyError):
                    raise
                self.failure = error
                self._protocol.connection_lost(str(error))
                return None
            finally:
                self._open_link = None  # what it holds may be wanted free
            self._link = found[0]
        assert self._link is not None
        self.peer = self._link.peer
        self._protocol.version = self._link.version
        self.connected.set()
        self._change()
        return self._link

    def _watchers(self, control: Control[SourceProtocol]) -> Sequence[Callable[[], Awaitable[None]]]:
        return self._watch_machine, self._release_acknowledged, self._after_commit, partial(self._send_early, control)

    def _peer_lost(self, until: str) -> bool:
        log.log(
            logging.WARNING if self.machine.live else logging.INFO,
            "the destination is lost for good (%s); what it has not got is kept here%s",
            self.failure,
            f" {until}" if self._keep else "",
        )
        return self._keep

    async def _ended_elsewhere(self, error: EndedElsewhere, state: State) -> None:
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
            async with self._resuming:
                await self.machine.resume()
                if self.committed_ns:  # it had been taken from the network
                    await self.machine.claim_network()
        if scope.cancelled_caught:
            raise MigrationError(f"the machine could not be resumed at the source within {RESUME_TIMEOUT_S:g} s")

    # ---- taking it back

    def check_reclaimable(self) -> None:
        """`MigrationError`, with the reason, where the machine cannot go on here. Whether the destination answers is
        found out by `reclaim`."""
        if not self.machine.live:
            raise MigrationError("there is nothing to reclaim: an image does not run, and can be fetched again")
        if self.state is not State.PAUSED or not self._reachable:
            raise MigrationError(
                f"a machine can be reclaimed when its destination was lost after the switchover (postcopy-paused or"
                f" postcopy-failed); this migration is {self.status}"
            )
        if self._releaser is not None:
            gone = sum(discarded.count() for discarded in self._releaser.discarded())
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
        goes on where it can. One that comes back later learns of it, and stops. `MigrationError` where it cannot be
        done; nothing has changed then. May be cancelled until that is decided.
        """
        self.check_reclaimable()
        assert self._reconnector is not None
        reconnector = self._reconnector
        if not (isinstance(self.failure, EndedElsewhere) and self.failure.how is wire.Ended.LOST):  # it has said so
            self._probing, reconnector.answered = True, trio.Event()
            try:
                self._search_again(reconnector)
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

    # ---- the plans

    async def _go_on(self, control: Control[SourceProtocol], link: Link) -> None:
        """The destination is back: takes what it has, offers what it does not have, and follows it to its end."""
        assert self._data is not None
        assert self._session is not None
        resume_ns = await self._receive_what_arrived(control, self._data)
        with link.channel_set(self._session) as open_channels:
            await control.send(self._protocol.send(wire.Recovered()))
            await self._attach_all(open_channels)
        if resume_ns and not self.running_ns:
            self._runs_there(self.committed_ns + resume_ns)
        self._recovered()
        await self._follow(control)

    async def _receive_what_arrived(self, control: Control[SourceProtocol], server: PageServer) -> int:
        """What the destination has, to the page server; returns `resume_ns`. `Disagreement` where that cannot be."""
        pages = [server.block_pages(number) for number in range(len(self.machine.blocks))]
        bitmaps, message = await receive_maps(control, wire.ReceivedMap, (wire.Recover,), pages, STEP_TIMEOUT_S)
        if await digest_of(bitmaps) != message.digest:
            raise Disagreement("recover: the received maps do not have the digest that was sent with them")
        if self._releaser is not None:
            try:
                self._releaser.check(bitmaps)
            except ProtocolError as error:
                raise Unrecoverable(str(error)) from error  # what was given back is nowhere
            self._releaser.take_maps(bitmaps)
        for number, bitmap in enumerate(bitmaps):
            server.set_received(number, bitmap)
        return message.resume_ns

    async def _migrate(self, control: Control[SourceProtocol], link: Link, go: trio.Event) -> None:
        machine, protocol, session = self.machine, self._protocol, self._session
        assert session is not None
        if self._options.mode is not Mode.POSTCOPY and link.version < 4:
            raise MigrationError(
                f"--mode {self._options.mode}: the destination speaks version {link.version} of the protocol, in which"
                " all pages are sent after the switchover; use --mode postcopy, or a newer release there"
            )
        self._join(link, session)
        wanted = self._compression()
        blocks = tuple(wire.Block(block.name, block.size_bytes, block.page_bytes) for block in machine.layout)
        with link.channel_set(session) as open_channels:
            offer = wire.Offer(
                session.migration,
                session.token,
                machine.kind,
                {**machine.config(), "name": self._options.name} if self._options.name else machine.config(),
                blocks,
                self._options.bulk_channels,
                PLACED_EVERY_MS if self._options.release_ram else 0,
                compression.names(wanted),
            )
            await control.send(protocol.send(offer))
            self._mark("offer", at_ns=now_ns())
            self._change()
            accept = self._accepted = await control.receive(wire.Accept, STEP_TIMEOUT_S)
            self._check_accept(accept, blocks)
            server = self._data = self._make_server(self._options.max_bandwidth_bytes_per_s)
            if how := wanted & compression.named(accept.compress):
                server.set_compression(how, adaptive=self._options.compress == "auto")
            elif self._options.compress not in ("off", "auto"):
                raise MigrationError(
                    f"--compress {self._options.compress}: the destination cannot take that; install its library there,"
                    " or use --compress auto"
                )
            for block, unit in zip(machine.blocks, accept.page_bytes, strict=True):
                server.add_block(block.memory, unit)
            if self.recorder is not None:
                self.recorder.follow(
                    server,
                    [
                        (block.name, block.size_bytes, unit)
                        for block, unit in zip(machine.layout, accept.page_bytes, strict=True)
                    ],
                )
            if self._options.release_ram:
                self._releaser = Releaser(server, len(blocks))
            self._change()
            await self._attach_all(open_channels)
        await control.receive(wire.Ready, STEP_TIMEOUT_S)
        self.ready_ns = now_ns()
        self._change()
        await go.wait()
        self._begin_detail()
        if link.version >= 4:
            await self._tell(control, server)
            await self._precopy(control, server)
        await self._switch_over(control, server)
        await self._follow(control)

    def _compression(self) -> Compression:
        """What pages may be compressed with, as far as it depends on this host. `ResourceError` where that has not what
        the user wants."""
        asked = self._options.compress
        if asked == "off":
            return Compression(0)
        if asked == "auto":
            return compression.available()
        wanted = compression.named((asked,))
        compression.require(wanted)
        return wanted

    async def _attach_all(self, open_channels: OpenChannels) -> None:
        assert self._data is not None
        assert self._accepted is not None
        urgent = partial(self._data.attach_urgent, busy_poll_us=self._options.busy_poll_us)
        counts = self._accepted.shards, self._accepted.bulk_channels
        await self._attach(open_channels, *counts, urgent, self._data.attach_bulk)

    def _runs_there(self, since_ns: int) -> None:
        self.running_ns = since_ns
        self._mark("running", at_ns=since_ns)
        self.downtime_ns = since_ns - self.paused_ns
        self._push_the_rest()
        self.breakdown = replace(self.breakdown, commit_ns=since_ns - self._prepared_ns)
        self._change()

    async def _follow(self, control: Control[SourceProtocol]) -> None:
        """The machine is the destination's: follows it until its last page has arrived."""
        message = await control.receive_any()
        control.no_hurry()
        if isinstance(message, wire.Running):
            self._runs_there(max(self.committed_ns, control.received_ns - message.ago_ns))
            log.info("the machine runs at the destination, %.3f ms after `commit`", message.resume_ns / 1e6)
            message = await control.receive_any()
        while isinstance(message, wire.Placed) and self._releaser is not None:
            self._releaser.take(message)
            message = await control.receive_any()
        if not isinstance(message, wire.Complete):
            raise ProtocolError(f"{message.TYPE} came where complete was due")
        self.completed_ns = now_ns()
        self._mark("all-there", at_ns=self.completed_ns)
        self.total_ns = self.completed_ns - self.paused_ns
        self._reported = replace(Statistics.from_wire(message.stats), pending_faults=None)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + STEP_TIMEOUT_S):
            stats = {**self.statistics().told_by_source(), "breakdown": self.breakdown.to_wire()}
            self.breakdown = self.breakdown.with_wire(message.stats.get("breakdown"))
            await control.send(self._protocol.send(wire.CompleteAck(stats)))

    # ---- while the machine runs here

    async def _tell(self, control: Control[SourceProtocol], server: PageServer) -> None:
        """Which pages there are."""
        assert self._accepted is not None
        policy, units = self._policy, self._accepted.page_bytes
        logged = policy.mode.has_rounds and policy.precopy_s > 0
        if not self.machine.live:  # an image that has changed says so best before its memory is looked at
            await self.machine.save_state()
        changes = self._changes = await Changes.open(self.machine, units, logged)
        began_s = trio.current_time()
        present = await changes.begin()
        for number, bitmap in enumerate(present):
            server.set_present(number, bitmap)
        await self._round(control, wire.PageMap, present, timeout_s=_time_for(0))
        policy.telling_s = trio.current_time() - began_s
        self._left(_count(present), server)

    def _left(self, pages: int, server: PageServer) -> None:
        """So many are left now."""
        self._left_pages, self._left_at = pages, server.statistics().sent_pages

    async def _precopy(self, control: Control[SourceProtocol], server: PageServer) -> None:
        """Sends pages in rounds, as long as the policy wants."""
        assert self._accepted is not None
        assert self._changes is not None
        if not self._changes.logged:
            return
        policy, unit_bytes = self._policy, min(self._accepted.page_bytes)
        began_s = looked_s = trio.current_time()

        def since_s() -> float:
            return trio.current_time() - began_s

        while not (why := policy.why_no_other(since_s())):
            before = server.statistics()
            self.iteration += 1
            self._mark("round", str(self.iteration))
            self._change()
            push_s = await self._push(server, since_s)
            pushed = server.statistics()
            sent = pushed.sent_pages - before.sent_pages
            content_bytes = (pushed.background_pages - before.background_pages) * unit_bytes
            ended_s = trio.current_time()
            async with self.machine.settled():
                changed = await self._changes.collect()
            before_s, looked_s = looked_s, trio.current_time()
            await self._round(control, wire.StaleMap, changed, pushed=True, timeout_s=_time_for(content_bytes))
            for number, bitmap in enumerate(changed):
                server.set_stale(number, bitmap)
            answer_s = trio.current_time() - ended_s
            dirty = _count(changed)
            self._synchronised += 1
            self._dirty_rate = round(dirty / max(looked_s - before_s, 1e-3))
            self._left(max(0, self._left_pages - sent) + dirty, server)
            policy.round_ended(sent * unit_bytes, self._left_pages * unit_bytes, push_s, answer_s, content_bytes)
        log.info("precopy ends after %d rounds, with %d pages left: %s", policy.rounds, self._left_pages, why)

    async def _push(self, server: PageServer, since_s: Callable[[], float]) -> float:
        """One push of what the destination does not have, which ends early where precopy does: how long it took. A
        precopy of a given time does not begin the next one at once."""
        assert self._accepted is not None
        policy, began_s = self._policy, trio.current_time()
        self._pushing = set(range(self._accepted.bulk_channels))
        server.push()
        while self._pushing:
            left_s = policy.time_left_s(since_s())
            if not left_s:
                server.stop_push()
            with trio.move_on_after(left_s or math.inf):
                await self._changed.wait()
        push_s = trio.current_time() - began_s
        while policy.precopy_s < math.inf:
            left_s = min(policy.time_left_s(since_s()), began_s + ROUND_S - trio.current_time())
            if left_s <= 0:
                break
            with trio.move_on_after(left_s):
                await self._changed.wait()
        return push_s

    async def _round(
        self,
        control: Control[SourceProtocol],
        part: type[Part],
        maps: Sequence[Bitmap],
        pushed: bool = False,
        *,
        timeout_s: float,
    ) -> None:
        """Tells the destination what there is, or what has changed, and waits until it has taken note of that."""
        number = self._rounds
        self._rounds += 1
        await send_maps(control, part, maps, lambda count: wire.Round(number, count, pushed))
        done = await control.receive(wire.RoundDone, timeout_s)
        if done.number != number:
            raise ProtocolError(f"round-done: of round {done.number}, {number} was due")

    # ---- the pause

    async def _switch_over(self, control: Control[SourceProtocol], server: PageServer) -> None:
        """In the pause nothing is done that could be done before or after: no statistics, no callback."""
        machine, protocol, options = self.machine, self._protocol, self._options
        assert self._accepted is not None

        def early(state: bytes) -> None:
            most = wire.EARLY_STATE_BYTES
            self._early.extend(state[at : at + most] for at in range(0, max(1, len(state)), most))
            control.hurry()
            self._wake()

        began_ns = now_ns()
        await machine.before_pause(early if protocol.version >= wire.EarlyState.SINCE else None)
        control.hurry()
        parts = {"paused": now_ns()}
        if began_ns <= (stopped_ns := machine.statistics().paused_ns) < parts["paused"]:  # it was then already
            parts["paused"] = stopped_ns
        self.paused_ns = parts["paused"]
        self._begin_detail()
        await machine.pause()
        parts["stop_ns"] = now_ns()
        part: type[Part] = wire.StaleMap
        tell: Callable[[int, Bitmap], None] = server.set_stale
        if (changes := self._changes) is None:  # the peer is of a version without rounds
            part, changes = wire.PageMap, await Changes.open(machine, self._accepted.page_bytes, logged=False)
            changed, tell = await changes.begin(), server.set_present
        else:
            changed = await changes.collect()
            self._synchronised += changes.logged
        for number, bitmap in enumerate(changed):
            tell(number, bitmap)
        server.serve()
        dirty = _count(changed)
        rest_bytes = (self._left_pages + dirty) * max(self._accepted.page_bytes)
        whole = protocol.version >= 4 and self._policy.whole(rest_bytes)
        parts["dirty_ns"] = now_ns()
        state = await machine.save_state()
        parts["state_ns"] = now_ns()
        await self._until(lambda: not self._early)
        if whole:
            # What has changed is forgotten before the rest can arrive.
            await self._round(control, part, changed, timeout_s=options.prepare_timeout_s)
            server.push()
            await control.send(protocol.send(wire.Switchover(state, 0, whole=True)))
        elif part is wire.StaleMap and not dirty:
            await control.send(protocol.send(wire.Switchover(state, 0)))
        else:
            await send_maps(control, part, changed, lambda maps: wire.Switchover(state, maps))
        parts["send_ns"] = now_ns()
        control.hurry()
        self.at_pause = machine.statistics()
        await self._until_prepared(control, server, rest_bytes if whole else 0)
        parts["prepared_ns"] = now_ns()
        # Checked in one step with the decision: `cancel` promises that it will not be decided. From
        # `Commit` on the machine belongs to the destination, whether `commit` arrives or not.
        self._check_wanted()
        commit = protocol.send(wire.Commit())
        try:
            self.committed_ns = now_ns()
            control.hurry()
            await control.send(commit)
        finally:  # whether it arrives or not, the machine never answers here again
            self._count_precopy()
            self._took(parts)
            with trio.CancelScope(shield=True):
                await machine.release_network()
            self._wake()

    async def _send_early(self, control: Control[SourceProtocol]) -> None:
        """Nothing waits for it that the machine does meanwhile."""
        while not self._protocol.ended:  # else whoever receives says why
            if self._early:
                await control.send(self._protocol.send(wire.EarlyState(self._early[0])))
                self._early.popleft()
                self._wake()
            else:
                await self._until(lambda: bool(self._early))

    async def _until_prepared(self, control: Control[SourceProtocol], server: PageServer, rest_bytes: int) -> None:
        """Until the destination is prepared, which has `rest_bytes` to gather before. It has some time for that, and no
        longer than some time without taking anything."""
        timeout_s = self._options.prepare_timeout_s
        if not rest_bytes:
            await control.receive(wire.Prepared, timeout_s)
            return
        limit = self._options.max_bandwidth_bytes_per_s
        slowest = min(SLOWEST_BYTES_PER_S, limit) if limit else SLOWEST_BYTES_PER_S

        async def progress() -> None:
            seen = -1
            while (now := server.statistics().bytes_sent) != seen:
                seen = now
                await trio.sleep(timeout_s)
            raise PeerError(f"the destination has taken no page within {timeout_s:g} s, and did not say prepared")

        async def prepared() -> None:
            await control.receive(wire.Prepared, timeout_s + rest_bytes / slowest)

        await first_of(prepared, progress)

    def _took(self, at_ns: dict[str, int]) -> None:
        """The parts of the downtime up to the commit, from when each ended."""
        ends = list(at_ns.values())
        parts = {name: end - begin for name, begin, end in zip(list(at_ns)[1:], ends, ends[1:], strict=False)}
        self._prepared_ns = ends[-1]
        self.breakdown = Breakdown(**parts)
        for what, at in (("pause", "paused"), ("switchover", "send_ns"), ("prepared", "prepared_ns")):
            self._mark(what, at_ns=at_ns[at])
        self._mark("commit", at_ns=self.committed_ns)

    def _check_accept(self, accept: wire.Accept, blocks: tuple[wire.Block, ...]) -> None:
        if len(accept.page_bytes) != len(blocks):
            raise ProtocolError(f"accept: {len(accept.page_bytes)} page sizes for {len(blocks)} blocks")
        if accept.shards != self.machine.shards and self._protocol.version < 4:
            raise ProtocolError(f"accept: {accept.shards} shards for a machine of {self.machine.shards}")
        if accept.bulk_channels > self._options.bulk_channels:
            raise ProtocolError(
                f"accept: {accept.bulk_channels} bulk channels, {self._options.bulk_channels} were offered"
            )
        if self._options.mode is not Mode.POSTCOPY and not accept.bulk_channels:
            raise MigrationError(
                f"--mode {self._options.mode}: the destination takes no page that is not asked for (--no background);"
                " leave that out there, or use --mode postcopy"
            )

    async def _after_commit(self) -> None:
        """What can wait until the machine runs there: it would compete with that, on this host or in this thread."""
        await self._until(lambda: self.committed_ns > 0)
        with trio.move_on_after(RUNS_WITHIN_S):
            await self._until(lambda: self.running_ns > 0)
        self._push_the_rest()
        await self._close_changes()
        self._change()
        while (left_s := self._held_for_s) > 0:
            with trio.move_on_after(left_s):
                await self._changed.wait()
        self._push_the_rest()

    @property
    def _held_for_s(self) -> float:
        """How long the push of the rest is still held back."""
        return self._push_after_s - (now_ns() - self.committed_ns) / 1e9

    def _push_the_rest(self) -> None:
        """What has not been sent, and was not asked for; also on the connections of a recovery. No effect when that
        has begun, or while it is held back."""
        assert self._data is not None
        if self._held_for_s <= 0:
            self._data.start()

    def _note(self, event: Event) -> None:
        super()._note(event)
        if event.type is EventType.BULK_END and event.channel_kind is ChannelKind.BULK:
            self._pushing.discard(event.channel)
            self._wake()

    async def _release_acknowledged(self) -> None:
        await self._until(lambda: self._data is not None)
        if self._releaser is not None:
            await self._releaser.run()

    async def _watch_machine(self) -> None:
        while not self._protocol.committed:
            statistics = self.machine.statistics()
            if statistics.state is MachineState.FAILED:
                raise MigrationError(f"the machine has failed: {statistics.failure_text}")
            await self.machine.wait_changed()

    # ---- when it ends

    async def _take_back(self) -> None:
        if self.may_run and self.paused_ns:
            await self._contained(self._resume)
        await self._close_changes()

    async def _close_changes(self) -> None:
        changes, self._changes = self._changes, None
        if changes is not None:
            await self._contained(changes.close)

    async def _suspend(self) -> None:
        assert self._data is not None
        self._push_the_rest()
        self.statistics()
        self.paused.set()
        # An image's destination may leave when it has what it wanted.
        log.log(logging.WARNING if self.machine.live else logging.INFO, "paused: %s", self.failure)
        self._change()
        await self._disconnect(self._data)  # so that the destination notices it on every channel

    async def _close_data(self) -> None:
        await self._close_changes()
        if (server := self._data) is None:
            return
        try:
            if self._releaser is not None and self.state is State.COMPLETED:  # what stays behind here is empty
                await self._contained(server.disconnect)  # so that nothing is under way
                await self._contained(self._releaser.release_all)
        finally:
            self.statistics()
            if self._releaser is not None:
                self._discarded = self._releaser.discarded()
            self._data = None
            await self._contained(server.close)


def _time_for(sent_bytes: int) -> float:
    """How long the destination may take to answer a round in which so much was sent."""
    return ROUND_TIMEOUT_S + min(sent_bytes, UNDER_WAY_BYTES) / SLOWEST_BYTES_PER_S


def _count(bitmaps: Sequence[Bitmap]) -> int:
    return sum(bitmap.count() for bitmap in bitmaps)


def bulk_channels_for_host(cpus: int | None = None) -> int:
    """One for each processor of this host, and two at least: while the thread of one waits, that of the other works."""
    found = len(os.sched_getaffinity(0)) if cpus is None else cpus
    return min(max(DEFAULT_BULK_CHANNELS, found), wire.MAX_BULK_CHANNELS)


def offered(machine: Machine) -> Statistics:
    """What can be said of a migration before it has begun."""
    return Statistics(total_bytes=machine.memory_bytes, page_bytes=machine.blocks[0].memory.page_bytes)


def check_releasable(machine: Machine) -> None:
    """`ConfigurationError` unless the memory is the machine's own, to be thrown away when it is elsewhere."""
    if machine.outlives:
        raise ConfigurationError(
            f"--release-ram: the memory of a machine of kind {machine.kind} belongs to another process, which gives it"
            " back as a whole when all of it has arrived; leave the option out"
        )
    if any(block.memory.kind is MemoryKind.FILE for block in machine.blocks):
        raise ConfigurationError(
            f"--release-ram: the memory of a machine of kind {machine.kind} is a file of yours, which stays as it is;"
            " leave the option out"
        )
