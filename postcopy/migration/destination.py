# SPDX-License-Identifier: Apache-2.0
"""The destination's engine: one machine received, from the offer until its last page is here.

The plan: make the machine that is offered, or say why not; connect the data channels; take the page maps, and register
all memory with userfaultfds. (A machine whose memory is another process's lends the userfaultfds of that:
`Machine.lend`. Memory that is mapped only while the state is loaded is lent then, by `Machine.load_and_map`, and its
pages are staged until then.) In each round that follows pages come, and those that have changed since are forgotten:
they are missing again, so that no old page is ever seen. Then take the state, with all pages that are to be here before
the machine runs, and say `prepared`. From then on this side waits for a decision that is not its own. On `commit` the
machine runs, and every page comes: because it was touched, because the source pushed it, or because this side asked for
what was left when the source had nothing more to push.

Resource handling: machine and pager belong to the engine. `close` ends them in the order that the state demands: a
machine whose memory is not complete is closed first, since its vCPUs may be blocked on pages that only the pager can
bring; a complete one can outlive its pager, and its owner's (`hand_over`).

When the source or the network is lost after `commit`, the machine is *kept*: it runs until it touches a page that is
missing, that thread then waits, and nothing is ever filled with zeros. The state is `PAUSED` until the two sides have
found each other again, or the user ends it. Lost between `prepared` and `commit` it is `IN_DOUBT`: the machine does not
run, and the source is asked, for a limited time: an arrival that is never decided must not keep its place. Lost
when every page is here it is as good as completed: the machine is the caller's after a moment, and the source can
learn of it later (`announce`).
"""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import trio

from postcopy import wire
from postcopy._blocking import run_sync
from postcopy._fd import FdHolder
from postcopy.dataplane import compression
from postcopy.dataplane.histogram import Histogram, RecentWindow
from postcopy.dataplane.pager import ChannelKind, Event, EventType
from postcopy.errors import MigrationError, PostcopyError, ProtocolError
from postcopy.machines import BlockLayout, Extent, Machine, MachineState, MachineStatistics
from postcopy.memory import Memory
from postcopy.memory.bitmap import Bitmap
from postcopy.migration.acknowledgements import PlacedReporter
from postcopy.migration.ahead import Ahead
from postcopy.migration.connection import HEARTBEAT_S, MISSED_HEARTBEATS, STEP_TIMEOUT_S, Control
from postcopy.migration.engine import Engine
from postcopy.migration.maps import digest_of, receive_maps, send_maps
from postcopy.migration.statistics import Breakdown, Latency, Statistics
from postcopy.migration.tasks import explained, now_ns
from postcopy.net import Link, OpenChannels, Session
from postcopy.tls import DataChannel
from postcopy.uffd import How
from postcopy.wire import DestinationProtocol, EndedElsewhere, State

if TYPE_CHECKING:
    from postcopy.dataplane.pager import Pager
    from postcopy.dataplane.pager_process import ProcessPager

AnyPager: TypeAlias = "Pager | ProcessPager"
MakeMachine = Callable[[str, Mapping[str, Any], Sequence[BlockLayout]], Machine]
"""Makes the machine that a source offers (its kind, configuration and RAM blocks), or raises the reason why not."""

REQUEST_WINDOW_PAGES = 4096
"""Pages asked for at a time, when the background push has ended and pages are still missing."""
REQUEST_PERIOD_S = 0.05
SLOWEST_BYTES_PER_S = 1 << 20
"""What a connection must bring at least for a page, which is counted as a whole, not to look like silence."""
FIRST_RUN_S = 0.05
"""How long `running` may be held back until a vCPU has really entered the machine; only a measurement depends on it."""
ACK_TIMEOUT_S = 10.0
LAST_WORD_S = 1.0
"""How long a machine that has every page waits for a source that was lost and could still say what it has counted."""
STOP_TIMEOUT_S = 2.0
IN_DOUBT_FOR_S = 60.0
"""How long a destination that does not know whether it was given the machine looks for the one who does."""

log = logging.getLogger(__name__)


class DestinationMigration(Engine[DestinationProtocol, AnyPager]):
    """One migration to this host. Make it, `run` it once, `close` it; everything else may be looked at meanwhile."""

    SIDE = DestinationProtocol.SIDE

    def __init__(
        self,
        link: Link,
        *,
        make_machine: MakeMachine,
        make_pager: Callable[[], AnyPager],
        make_ahead: Callable[[], Ahead] = Ahead,
        background: bool = True,
        busy_poll_us: int = 0,
        how: How | str = How.ANY,
        heartbeat_s: float = HEARTBEAT_S,
        recover_for_s: float = math.inf,
        doubt_for_s: float = IN_DOUBT_FOR_S,
        kill_when_lost: bool = False,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`make_ahead`: makes, once the machine is there, what is asked for before it is touched. `background`: whether
        pages are pushed, and asked for, that were not touched; without it there are no bulk channels, unless the source
        is too old for that. `doubt_for_s`: how long a source is looked for that was lost when this side had said
        `prepared`, and does not know what was decided."""
        super().__init__(
            DestinationProtocol(link.version),
            link,
            link.peer,
            heartbeat_s=heartbeat_s,
            recover_for_s=recover_for_s,
            on_change=on_change,
        )
        self.machine: Machine | None = None
        self.machine_failure = ""  # what the guest, or its vCPUs, found wrong here
        self.at_switchover: MachineStatistics | None = None
        self.latency = Histogram()  # of demand faults, as `statistics` has seen it last
        self._window = RecentWindow()
        self._make_machine = make_machine
        self._make_pager = make_pager
        self._make_ahead = make_ahead
        self._ahead = Ahead()
        self._background = background
        self._busy_poll_us = busy_poll_us
        self._how = how
        self._kill_when_lost = kill_when_lost
        self._counted = Statistics.from_wire({})
        self._pager_process: tuple[int, int] | None = None
        self._placed_every_s = 0.0  # as the offer has asked for
        self._placed = PlacedReporter()
        self._all_here = trio.Event()
        self._zero: list[Bitmap] = []  # what the source has no content of
        self._rounds = 0  # that have ended
        self._forgets = True  # pages that are here may still have to be forgotten
        self._of_source: Mapping[str, Any] = {}  # what that has counted, at the end
        self._bulk_channels = 0
        self._pushing: set[int] = set()  # bulk channels that have not sent the `end` of this push
        self._doubt_for_s = doubt_for_s
        self._lent = 0  # shards whose userfaultfd was lent
        self._process_ended = False  # that of a machine whose memory is another process's
        self._held: dict[int, DataChannel] = {}  # urgent connections of those that were not yet, by shard
        self._last_word_s = LAST_WORD_S if link.version >= 3 else ACK_TIMEOUT_S

    # ---- looking at it

    @property
    def complete(self) -> bool:
        """Every page is here, and the machine does not depend on the pager any more."""
        return self.completed_ns > 0

    @property
    def pager_process(self) -> tuple[int, int] | None:
        """Where the pager is a process of its own: its number, 0 when it has ended, and how many have died before."""
        if self._data is not None:
            self._pager_process = self._data.process
        elif self._pager_process is not None:
            self._pager_process = (0, self._pager_process[1])
        return self._pager_process

    def _count(self, data: AnyPager) -> Statistics:
        counted, self.latency = data.statistics(), data.latency()
        return Statistics.of(
            counted,
            page_bytes=self.machine.blocks[0].memory.page_bytes if self.machine is not None else 0,
            latency=Latency.of(self.latency),
            recent=self._window.look(self.latency),
            blocktime_ns=tuple(data.blocktime_ns()),
            bins=data.bins(),
            iteration=self.iteration,
        )

    def statistics(self) -> Statistics:
        return super().statistics().with_source(self._of_source)

    # ---- steering it

    def _search_for_s(self) -> float:
        if self.complete:
            return self._last_word_s
        return self._doubt_for_s if self.state is State.IN_DOUBT else self._recover_for_s

    # ---- doing it

    async def run(self, stop: trio.Event) -> None:
        """Returns when every page is here, or when it has failed; a migration that is `PAUSED` goes on when the source
        is back. When that is looked for no more it stays so until `stop`, or ends at once (`kill_when_lost`).

        After it, `machine` runs when the state is COMPLETED. Always `close` afterwards.
        """
        await self._run(stop, self._receive)

    def _watchers(self, control: Control[DestinationProtocol]) -> Sequence[Callable[[], Awaitable[None]]]:
        async def acknowledgements() -> None:
            await self._until(lambda: self._data is not None)
            if self._placed_every_s and self._data is not None:
                await self._placed.run(control, self._data.received, self._placed_every_s)

        return self._watch_answers, self._watch_machine, acknowledgements

    async def _suspend(self) -> None:
        """Faults stay blocked, memory stays armed."""
        assert self._data is not None
        log.warning("%s: %s", "in doubt" if self.state is State.IN_DOUBT else "paused", self.failure)
        try:
            await self._disconnect(self._data)
            if self.state is State.PAUSED and not self.running_ns:  # lost in the very moment in which it became ours
                assert self.machine is not None
                await self._run_machine(self.machine)
            self._look_for_all()  # the last page may have come in precopy
            if self._all_here.is_set() and self.state is State.PAUSED:
                await self._disarm(self._data)
        finally:
            self.paused.set()

    def _peer_lost(self, until: str) -> bool:
        keep = not self.complete and not self._kill_when_lost and self.state is not State.IN_DOUBT
        if self._process_ended and self.state is State.PAUSED:
            keep = False
            self.failure = MigrationError(
                "the machine was given to this host, and is lost: its process has ended before its memory was whole"
            )
            log.error("%s", self.failure)
        elif keep:
            log.error("the source is lost for good (%s); the machine is kept %s", self.failure, until)
        elif self.state is State.IN_DOUBT:
            self.failure = MigrationError(
                f"the source is lost ({self.failure}), and did not say within {self._doubt_for_s:g} s whether the"
                " machine was given to this host, which does not run it; if the source is postcopy-paused, the machine"
                " can go on there: `postcopy ctl reclaim --force`"
            )
            log.error("%s", self.failure)
        elif not self.complete:
            # `close` ends it, and poisons its missing pages here: nothing of it is ever filled with zeros.
            self.failure = MigrationError(f"the source is lost for good ({self.failure}), and the machine with it")
            log.error("%s", self.failure)
        return keep

    async def _ended_elsewhere(self, error: EndedElsewhere, state: State) -> None:
        log.error("%s", error)
        if state is State.ABORTED and self.running_ns:
            # It runs at the source again. Whatever becomes of it here, it must not be seen any more.
            await self._contained(self._stop_machine)

    async def _stop_machine(self) -> None:
        """At once: what blocks on a missing page does not run either, and is ended by `close`."""
        machine = self.machine
        if machine is None:
            return
        with trio.CancelScope(shield=True):
            try:
                await machine.pause(STOP_TIMEOUT_S)
                await machine.release_network()
            except PostcopyError as error:
                log.error("the machine is ended, since it does not stop: %s", error)
                await machine.destroy()  # also one that would live on without this process

    def _while_lost(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """A pager that dies is replaced, for the pages that need no source."""
        return () if self._data is None or self.complete else (self._data.watch_over,)

    # ---- the plans

    async def _go_on(self, control: Control[DestinationProtocol], link: Link) -> None:
        """The source is back: tells it what is here, connects the data channels, and gathers the rest."""
        protocol, machine, pager = self._protocol, self.machine, self._data
        assert machine is not None
        assert pager is not None
        assert self._session is not None
        here = [await run_sync(pager.received, number) for number in range(len(machine.blocks))]
        self._placed.acknowledged(here)
        digest = await digest_of(here)
        with link.channel_set(self._session) as open_channels:
            await send_maps(control, wire.ReceivedMap, here, lambda maps: wire.Recover(self._resume_ns, maps, digest))
            await control.receive(wire.Recovered, STEP_TIMEOUT_S)
            self._change()
            await self._attach_all(open_channels, machine, pager)
        self._recovered()
        if protocol.state is State.COMMITTED:
            await self._start(control, machine)
        await self._finish(control, pager)

    @property
    def _resume_ns(self) -> int:
        """From `commit` to the machine running; at least 1 when it runs."""
        return max(1, self.running_ns - self.committed_ns) if self.running_ns else 0

    async def _receive(self, control: Control[DestinationProtocol], link: Link) -> None:
        protocol = self._protocol
        offer = await control.receive(wire.Offer, STEP_TIMEOUT_S)
        try:
            machine, pager = await self._take_offer(link, offer)
        except Exception as error:  # noqa: BLE001  # `explained` logs what it does not know
            # Kept as the reason first: the source may hang up, and that be noticed, before the sending has returned.
            refusal = self._scope.failure = explained(error)
            await control.send(protocol.send(wire.Reject(str(refusal))))
            raise refusal from None  # (it may be the same error)
        units = tuple(block.memory.page_bytes for block in machine.blocks)
        self._bulk_channels = offer.bulk_channels
        if not self._background:
            if link.version >= 3:
                self._bulk_channels = 0
            else:
                log.warning(
                    "the source speaks version %d of the protocol, which knows no migration without background: all"
                    " pages are taken, as they are pushed",
                    link.version,
                )
        assert self._session is not None
        with link.channel_set(self._session) as open_channels:
            ways = compression.available(compression.named(offer.compress))
            pager.accept_compression(ways)
            accept = wire.Accept(units, machine.shards, self._bulk_channels, compression.names(ways))
            await control.send(protocol.send(accept))
            self._change()
            await self._attach_all(open_channels, machine, pager)
        await control.send(protocol.send(wire.Ready()))
        self._change()

        await self._take_machine(control, machine, pager)
        self._placed.acknowledged(self._zero)
        self._check_wanted()  # in one step with `prepared`: `cancel` promises that it will not be decided
        self.at_switchover = machine.statistics()
        if self.at_switchover.state is MachineState.FAILED:
            raise MigrationError(self.at_switchover.failure_text)
        control.hurry()
        await control.send(protocol.send(wire.Prepared()))
        self._mark("prepared")
        self._count_precopy()
        await control.receive(wire.Commit, STEP_TIMEOUT_S)
        await self._start(control, machine)
        await self._finish(control, pager)

    async def _attach_all(self, open_channels: OpenChannels, machine: Machine, pager: AnyPager) -> None:
        """What is pending is requested (again) at once."""
        self._pushing = set(range(self._bulk_channels))

        def attach_urgent(shard: int, fd: int, *, tls: Any) -> None:
            if machine.lends and shard >= self._lent:
                self._held[shard] = DataChannel(FdHolder(fd), tls)
            else:
                pager.attach_urgent(shard, fd, tls=tls)

        await self._attach(open_channels, machine.shards, self._bulk_channels, attach_urgent, pager.attach_bulk)

    async def _adopt(self, pager: AnyPager, uffd: int, features: int, extents: Sequence[Extent]) -> None:
        """Memory of the machine's process is there, and is registered with a userfaultfd of that."""
        pager = cast("Pager", pager)  # one in a process of its own is not for such machines
        shard = pager.adopt_shard(uffd, features, self._busy_poll_us)
        self._lent += 1  # also when it cannot be armed: `close`
        for extent in extents:
            pager.arm_at(shard, extent.block, extent.first_page, extent.pages, extent.address)
        fd, tls = self._held.pop(shard).detach()
        pager.attach_urgent(shard, fd, tls=tls)
        await pager.confirm()

    async def _start(self, control: Control[DestinationProtocol], machine: Machine) -> None:
        """The machine has been committed to us."""
        await self._run_machine(machine)
        await control.send(self._protocol.send(wire.Running(self._resume_ns, max(0, now_ns() - self.running_ns))))
        control.no_hurry()
        self._change()

    async def _run_machine(self, machine: Machine) -> None:
        """Shielded: a machine that was committed to us runs, whatever else happens meanwhile. Where it cannot, no
        connection would help."""
        self.committed_ns = now_ns()
        self._mark("commit", at_ns=self.committed_ns)
        self._searching_since_s = None  # it is in doubt no more
        with trio.CancelScope(shield=True):
            await machine.resume()
            await machine.claim_network()
            self.running_ns = await self._first_run(machine)
        self._mark("running", at_ns=self.running_ns)
        self.breakdown = replace(self.breakdown, first_run_ns=self._resume_ns)

    async def _finish(self, control: Control[DestinationProtocol], pager: AnyPager) -> None:
        """Gathers what is missing, and says so when nothing is."""
        self._ahead.ask(pager)
        await self._gather(pager)
        await self._disarm(pager)
        stats = self.statistics().to_wire() | {"breakdown": self.breakdown.to_wire()}
        await control.send(self._protocol.send(wire.Complete(stats)))
        acknowledgement = await control.receive(wire.CompleteAck, ACK_TIMEOUT_S)
        self.breakdown = self.breakdown.with_wire(acknowledgement.stats.get("breakdown"))
        self._of_source = acknowledgement.stats
        await self._ahead.record()

    async def _disarm(self, pager: AnyPager) -> None:
        """Nothing is missing: the machine does not depend on the pager any more."""
        if not self.complete:
            now = now_ns()
            await pager.disarm()
            self.completed_ns = now
            self._mark("all-there", at_ns=now, begins=True)
            assert self.machine is not None
            with trio.CancelScope(shield=True):
                await self._contained(self.machine.made_whole)
            self._searching_since_s = None  # the source is looked for anew, for `_last_word_s`
        if self._protocol.state is State.PAUSED:
            self._protocol.every_page_is_here()

    async def _take_offer(self, link: Link, offer: wire.Offer) -> tuple[Machine, AnyPager]:
        layout = [BlockLayout(block.name, block.size_bytes, block.page_bytes) for block in offer.blocks]
        machine = self.machine = self._make_machine(offer.machine, offer.config, layout)
        self._placed_every_s = offer.placed_every_ms / 1000
        self._join(link, Session(offer.migration, offer.token, epoch=0))
        self._mark("offer")
        await machine.prepare()
        pager = self._data = self._make_pager()
        if self.recorder is not None:
            self.recorder.follow(pager, [(block.name, block.size_bytes, block.page_bytes) for block in machine.layout])
            machine.be_recorded(self.recorder)
        for block in machine.blocks:
            pager.add_block(block.memory)
        for _ in range(0 if machine.lends else machine.shards):
            # ANY prefers one that stops the kernel's faults too; a machine that needs that has refused a host without.
            pager.add_shard(self._how, self._busy_poll_us)
        self._ahead = self._make_ahead()
        await self._ahead.begin(machine, pager)
        return machine, pager

    async def _take_machine(self, control: Control[DestinationProtocol], machine: Machine, pager: AnyPager) -> None:
        """Page maps, rounds and state; when it returns, the machine could run and every missing page would fault."""
        pages = [block.memory.pages for block in machine.blocks]
        ends: tuple[type[wire.Round | wire.Switchover], ...] = (wire.Round, wire.Switchover)

        async def early(state: bytes) -> None:
            control.hurry()
            await machine.load_early(state)
            control.hurry()

        # For the first part there is no limit: until then the machine runs at the source, as long as that likes.
        maps, message = await receive_maps(control, wire.PageMap, ends, pages, math.inf)
        began_ns = now_ns()
        await self._arm(machine, pager, maps)
        while isinstance(message, wire.Round):
            await self._end_round(control, pager, message)
            maps, message = await receive_maps(control, wire.StaleMap, ends, pages, math.inf, early)
            began_ns = now_ns()
            if isinstance(message, wire.Round) and message.pushed:
                await self._until(lambda: not self._pushing)  # nothing that is older can arrive from here on
            await self._forget(pager, maps)
        assert isinstance(message, wire.Switchover)
        self._forgets = False
        armed_ns = now_ns()
        self._mark("switchover", at_ns=began_ns, begins=True)
        await machine.load_and_map(message.state, partial(self._adopt, pager))
        self.breakdown = Breakdown(arm_ns=armed_ns - began_ns, load_ns=now_ns() - armed_ns)
        if message.whole:  # after it: pages that were staged can be placed only now
            await self._gather(pager)

    async def _arm(self, machine: Machine, pager: AnyPager, present: Sequence[Bitmap]) -> None:
        """From here on every page that is missing would fault."""
        zero = [bitmap.inverted() for bitmap in present]
        for number, bitmap in enumerate(zero):
            pager.set_zero(number, bitmap)
        self._zero = zero
        if machine.lends:
            await machine.lend(partial(self._adopt, pager))
        for number, block in enumerate(machine.blocks):
            if not machine.lends:
                pager.arm(block.shard, number, 0, block.memory.pages)
            elif block.shard >= self._lent:
                with Memory.create("memfd", block.memory.size_bytes) as staged:
                    cast("Pager", pager).stage(number, staged.fd)
        for vcpu, tid in enumerate(machine.vcpu_threads()):
            pager.track_thread(vcpu, tid)
        await pager.confirm()  # before the first touch, and before anything is promised

    async def _end_round(self, control: Control[DestinationProtocol], pager: AnyPager, message: wire.Round) -> None:
        if message.number != self._rounds:
            raise ProtocolError(f"round: number {message.number} came, {self._rounds} was due")
        self._rounds += 1
        if message.pushed:
            self.iteration += 1
            self._mark("round", str(self.iteration))
            self._pushing = set(range(self._bulk_channels))
            pager.expect_push()
            await pager.confirm()  # the source pushes as soon as it has heard of it
        control.hurry()  # the last round is just before the pause
        await control.send(self._protocol.send(wire.RoundDone(message.number)))

    async def _forget(self, pager: AnyPager, stale: Sequence[Bitmap]) -> None:
        """These pages have changed at the source: whatever is here of them is gone when this returns."""
        for number, bitmap in enumerate(stale):
            if bitmap.next(0) < len(bitmap):
                await pager.forget(number, bitmap)
                self._zero[number] = self._zero[number].without(bitmap)

    def _look_for_all(self) -> None:
        """Whether every page is here, for good."""
        if not self._forgets and self._data is not None:
            counted = self._data.statistics()
            if counted.resident_pages >= counted.total_pages:
                self._all_here.set()

    async def _first_run(self, machine: Machine) -> int:
        resumed_ns = now_ns()
        if not machine.live:
            return resumed_ns
        with trio.move_on_after(FIRST_RUN_S):
            while True:
                first_run_ns = machine.statistics().first_run_ns
                if first_run_ns >= self.committed_ns:
                    return first_run_ns
                await machine.wait_changed()
        return resumed_ns

    async def _gather(self, pager: AnyPager) -> None:
        """Until nothing is missing any more."""
        self._look_for_all()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._request_the_rest, pager)
            await self._all_here.wait()
            nursery.cancel_scope.cancel()

    async def _request_the_rest(self, pager: AnyPager) -> None:
        """When the push has ended: pages whose frames were refused, and those that a source left out."""
        await self._until(lambda: self._background and not self._pushing)
        assert self.machine is not None
        unit_bytes = max(block.memory.page_bytes for block in self.machine.blocks)
        silence_s = MISSED_HEARTBEATS * self._heartbeat_s + unit_bytes / SLOWEST_BYTES_PER_S
        here, since_s = (0, 0), trio.current_time()
        while True:
            asked = pager.request_missing(REQUEST_WINDOW_PAGES)
            if asked:
                log.info("asked for %d pages that were not pushed", asked)
            before, counted = here, pager.statistics()
            here = counted.resident_pages, counted.bytes_received
            if here != before:
                since_s = trio.current_time()
            elif trio.current_time() - since_s > silence_s:
                raise MigrationError(f"no page that was asked for has come within {silence_s:g} s")
            await trio.sleep(REQUEST_PERIOD_S)

    def _note(self, event: Event) -> None:
        if event.type is EventType.FATAL and event.error == errno.ESRCH:
            self._process_ended = True
        super()._note(event)
        if event.type is EventType.COMPLETE:
            self._look_for_all()
        elif event.type is EventType.BULK_END:
            self._pushing.discard(event.channel)
            self._wake()
        elif event.type is EventType.DIED:
            self._mark("pager-died", event.text)
            raise MigrationError(event.text)

    def _needs(self, event: Event) -> bool:
        # A bulk channel that is closed in order after its `end` takes nothing with it.
        ended = event.channel_kind is ChannelKind.BULK and event.channel not in self._pushing and not event.error
        return not ended and not self._all_here.is_set()

    async def _watch_answers(self) -> None:
        """A data connection can be dead while the control connection lives: a page is waited for no longer than a dead
        peer would take to be noticed."""
        connected_ns = now_ns()
        await self._until(lambda: self._data is not None)
        silence_s = MISSED_HEARTBEATS * self._heartbeat_s
        while self._data is not None:
            waiting_ns = min(self._data.statistics().oldest_pending_ns, now_ns() - connected_ns)
            if waiting_ns > silence_s * 1e9 and self._protocol.state is State.POSTCOPY:
                raise MigrationError(f"a page request has not been answered within {waiting_ns / 1e9:.1f} s")
            await trio.sleep(self._heartbeat_s)

    async def _watch_machine(self) -> None:
        await self._until(lambda: self._data is not None)
        assert self.machine is not None
        while True:
            self.check_machine()
            await self.machine.wait_changed()

    # ---- after it

    def received(self) -> list[Bitmap]:
        """What has arrived of each RAM block, in the memory's own pages. Until `close`."""
        assert self.machine is not None
        assert self._data is not None
        return [self._data.received(number) for number in range(len(self.machine.blocks))]

    async def hand_over(self) -> Machine:
        """Ends the pager of a migration that has completed, and hands over the machine, the caller's from then on: also
        when the pager does not end, on which nothing depends any more. `MigrationError` when not everything is here."""
        machine, pager = self.machine, self._data
        if self.state is not State.COMPLETED or not self.complete or machine is None or pager is None:
            raise MigrationError("the machine is not complete here")
        self.check_machine()
        self.statistics()
        self.machine = self._data = None  # `statistics` has the last numbers meanwhile
        with trio.CancelScope(shield=True):  # bounded by the pager
            await self._contained(pager.close)
        return machine

    async def close(self) -> None:
        """Ends machine and pager. Shielded, bounded in time; what does not end is logged and kept by its owner."""
        with trio.CancelScope(shield=True):
            self.check_machine()
            self.statistics()
            _ = self.pager_process
            machine, pager = self.machine, self._data
            self._data = None  # `statistics` has the last numbers meanwhile
            await self._contained(partial(self._ahead.close, self.running_ns > 0))
            while self._held:
                self._held.popitem()[1].close()
            # Again after the pager, which has freed whatever waited for a page; closing twice does no harm.
            for what in (pager, machine) if self.complete else (machine, pager, machine):
                if what is pager and self._lent and not self.complete:
                    # Nothing is poisoned: by now the machine has killed its process, or has given the memory back to
                    # it; where both have failed, that process has a copy of the userfaultfd, and waits.
                    await self._contained(cast("Pager", pager).leave)
                elif what is not None:
                    await self._contained(what.close)

    def check_machine(self) -> None:
        """Looks whether the machine has found something wrong; sets `machine_failure`. The migration goes on: to find
        out why the machine failed one needs its memory."""
        if self.machine is not None and not self.machine_failure:
            statistics = self.machine.statistics()
            if statistics.failures or statistics.state is MachineState.FAILED:
                self.machine_failure = statistics.failure_text or "a vCPU stopped"
                log.error("the machine reports a failure: %s", self.machine_failure)
