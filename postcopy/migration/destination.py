# SPDX-License-Identifier: Apache-2.0
"""The destination's engine: one machine received, from the offer until its last page is here.

The plan: make the machine that is offered, or say why not; connect the data channels; take the page maps and the
state; register all memory with userfaultfds; say `prepared`. From then on this side waits for a decision that is
not its own. On `commit` the machine runs, and every page comes: because somebody touched it, because the source
pushed it, or because we asked for what was left when the source had nothing more to push.

Resource handling: machine and pager belong to the engine. `close` ends them in the order that the state demands: a
machine whose memory is not complete goes first, since its vCPUs may be blocked on pages that only the pager can
bring; a complete one can outlive its pager.

Error handling: as for the source, `run` raises nothing that is a matter of the migration. When the source or the
network is lost after `commit`, the machine is *kept*: it runs until it touches a page that is missing, that thread
then waits, and nothing is ever filled with zeros. The state is `PAUSED` until the two sides have found each other
again (`protocol`, "Recovery"), or the user ends it. Lost between `prepared` and `commit` it is `IN_DOUBT`: the machine
does not run, and the source is asked, for a time of its own: an arrival that nobody decides must not keep its place for
ever. Lost when every page is here it is as good as completed: the machine is the caller's after a moment, and the
source can be told later (`announce`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeAlias

import trio

from postcopy._blocking import run_sync
from postcopy._log import about
from postcopy.dataplane.histogram import Histogram
from postcopy.dataplane.pager import ChannelKind, EventType, Pager
from postcopy.errors import MigrationError, PostcopyError, ProtocolError, ResourceError
from postcopy.machines import BlockLayout, Machine, MachineEventType, MachineState, MachineStatistics
from postcopy.machines.kinds import create_destination
from postcopy.memory.bitmap import Bitmap
from postcopy.migration._engine import Engine, Hopeless
from postcopy.migration._session import (
    HEARTBEAT_S,
    IN_DOUBT_FOR_S,
    MISSED_HEARTBEATS,
    STEP_TIMEOUT_S,
    UNDECIDED,
    Control,
    MapCollector,
    Patience,
    data_silence_s,
    explained,
    if_heavy,
    now_ns,
)
from postcopy.migration.figures import Figures, natural
from postcopy.migration.release import PlacedReporter
from postcopy.net import ChannelSet, Link, Session, keep_alive
from postcopy.uffd import How
from postcopy.wire import (
    PAGE_MAP_PAGES,
    Accept,
    Commit,
    Complete,
    CompleteAck,
    DestinationProtocol,
    EndedElsewhere,
    Offer,
    PageMap,
    Prepared,
    Ready,
    ReceivedMap,
    Recover,
    Recovered,
    Reject,
    Running,
    State,
    Switchover,
)

if TYPE_CHECKING:
    from postcopy.dataplane.pager_process import ProcessPager

AnyPager: TypeAlias = "Pager | ProcessPager"

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

log = logging.getLogger(__name__)


class DestinationMigration(Engine[DestinationProtocol]):
    """One migration to this host. Make it, `run` it once, `close` it; everything else may be looked at meanwhile."""

    SIDE = "destination"
    PEER = "source"

    def __init__(
        self,
        link: Link,
        *,
        backing: str = "memfd",
        disk: str | None = None,
        net: str | None = None,
        background: bool = True,
        busy_poll_us: int = 0,
        how: How | str = How.ANY,
        heartbeat_s: float = HEARTBEAT_S,
        recover_for_s: float = math.inf,
        doubt_for_s: float = IN_DOUBT_FOR_S,
        kill_when_lost: bool = False,
        make_machine: Callable[..., Machine] = create_destination,
        make_pager: Callable[[], AnyPager] = Pager,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`background`: whether pages are pushed, and asked for, that nobody has touched; without it there are no bulk
        channels, unless the source is too old for that. `doubt_for_s`: how long a source is looked for that was lost
        when this side had said `prepared`, and does not know what was decided."""
        super().__init__(
            DestinationProtocol(link.version),
            link,
            heartbeat_s=heartbeat_s,
            recover_for_s=recover_for_s,
            on_change=on_change,
        )
        self.machine: Machine | None = None
        self.peer = link.peer
        self.machine_failure = ""  # what the guest, or its vCPUs, found wrong here
        self.at_switchover: MachineStatistics | None = None
        self.committed_ns = self.running_ns = self.completed_ns = 0
        self.latency = Histogram()  # of demand faults, as `figures` has seen it last
        self.downtime_ns = self.total_ns = 0  # as the source has measured them
        self._first_link = link
        self._backing = backing
        self._disk = disk
        self._net = net
        self._background = background
        self._busy_poll_us = busy_poll_us
        self._how = how
        self._kill_when_lost = kill_when_lost
        self._make_machine = make_machine
        self._make_pager = make_pager
        self._pager: AnyPager | None = None
        self._pager_process: tuple[int, int] | None = None
        self._offer: Offer | None = None
        self._refusal: PostcopyError | None = None
        self._last_figures = Figures()
        self._machine_made = trio.Event()
        self._all_here = trio.Event()
        self._pushing: set[int] = set()  # bulk channels that have not said `end`
        self._pushed_all = trio.Event()
        self._bulk_channels = 0
        self._placed = PlacedReporter()
        self._stack = ExitStack()  # of the reconnector, while it is run
        self._doubt = Patience(doubt_for_s)
        self._last_word = Patience(LAST_WORD_S if link.version >= 3 else ACK_TIMEOUT_S)
        self._kept = False  # the memory is complete and nobody needs the pager

    # ---- looking at it

    @property
    def migration_id(self) -> str:
        return self._offer.migration.hex() if self._offer else ""

    @property
    def pager_process(self) -> tuple[int, int] | None:
        """Where the pager is a process of its own: its number, 0 when it has ended, and how many have died before."""
        pager = self._pager
        if pager is not None:
            self._pager_process = pager.process
        elif self._pager_process is not None:
            self._pager_process = (0, self._pager_process[1])
        return self._pager_process

    def figures(self) -> Figures:
        """The counters as they are now; the last ones when the pager has ended."""
        if self._pager is not None and self.machine is not None:
            self.latency = self._pager.latency()
            self._last_figures = Figures.of(
                self.machine.blocks[0].memory.page_bytes,
                self._pager.statistics(),
                self.latency,
                self._pager.blocktime_ns(),
            )
        return self._last_figures

    # ---- steering it

    @property
    def cancellable(self) -> bool:
        return self.state in UNDECIDED

    def _patiences(self) -> list[Patience]:
        return [self._patience, self._doubt, self._last_word]

    def _patience_now(self) -> Patience:
        if self._kept:
            return self._last_word
        return self._doubt if self.state is State.IN_DOUBT else self._patience

    # ---- doing it

    async def run(self, stop: trio.Event) -> None:
        """Returns when every page is here, or when it has failed; a migration that is `PAUSED` goes on when the source
        is back. When nobody looks for it any more it stays so until `stop`, or ends at once (`kill_when_lost`).

        After it, `machine` runs when the state is COMPLETED. Always `close` afterwards.
        """
        self._stop = stop
        with about(self):
            try:
                await self._run()
            except Exception as error:  # noqa: BLE001  # `explained` logs what it does not know
                self.failure = self.failure or explained(error)
                log.error("%s", self.failure)
                self._protocol.connection_lost(str(self.failure))
            finally:
                self.over = True
                self._change()

    async def _run(self) -> None:
        try:
            workers = self._open_workers()
        except ResourceError as error:
            self._refusal = error  # the source is told why
            await self._connected(self._first_link, self._receive)
            return
        try:
            with workers.serving(), ExitStack() as self._stack:
                try:
                    await self._connected(self._first_link, self._receive)
                    await self._recover()
                finally:
                    if self._protocol.give_up(str(self.failure)) is State.COMPLETED:
                        self.failure = None  # every page is here: whether the source has heard of it changes nothing
                    if self._reconnector is not None:
                        self._reconnector.ended(self._protocol.ending)
        finally:
            await workers.close()

    def _watchers(self, control: Control[DestinationProtocol]) -> Sequence[Callable[[], Awaitable[None]]]:
        async def acknowledgements() -> None:
            await self._machine_made.wait()
            assert self._offer is not None
            assert self._pager is not None
            if self._offer.placed_every_ms:
                await self._placed.run(control, self._pager.received, self._offer.placed_every_ms / 1000)

        return self._watch_pager, self._watch_answers, self._watch_machine, acknowledgements

    async def _settle(self, control: Control[DestinationProtocol]) -> None:
        # A refusal of ours first: the source may hang up, and be heard, before its sending has returned.
        self.failure = self._refusal or self.failure
        if self.failure is None:
            return
        await control.say_goodbye(str(self.failure))
        if self._protocol.recoverable:
            await self._pause()

    async def _pause(self) -> None:
        """Keeps everything as it is: faults stay blocked, memory stays armed."""
        pager = self._pager
        assert pager is not None
        log.warning("%s: %s", "in doubt" if self.state is State.IN_DOUBT else "paused", self.failure)
        try:
            await pager.disconnect()  # bounded by the pager
            for event in pager.drain_events():
                if event.type is EventType.COMPLETE:
                    self._all_here.set()
                elif event.type is EventType.FATAL:
                    raise Hopeless(f"the pager cannot go on: {event.text}")
            if self.state is State.PAUSED and not self.running_ns:  # lost in the very moment in which it became ours
                assert self.machine is not None
                await self._run_machine(self.machine)
            if self._all_here.is_set() and self.state is State.PAUSED:
                await self._disarm(pager)
        finally:
            self.paused.set()

    def _give_up(self) -> bool:
        if self.state is State.IN_DOUBT:
            self.failure = MigrationError(
                f"the source is lost ({self.failure}), and did not say within {self._doubt.seconds:g} s whether the"
                " machine was given to this host, which does not run it; if the source is postcopy-paused, the machine"
                " can go on there: `postcopy ctl reclaim --force`"
            )
            log.error("%s", self.failure)
            return False
        if self._kept:
            return False
        if self._kill_when_lost:
            # Its missing pages are poisoned by `close`: nothing of it is ever filled with zeros.
            self.failure = MigrationError(f"the source is lost for good ({self.failure}), and the machine with it")
            log.error("%s", self.failure)
            return False
        until = "until this is ended" if self._protocol.peer_gone else "until it is back, or this is ended"
        log.error("the source is lost for good (%s); the machine is kept %s", self.failure, until)
        return True

    async def _ended_elsewhere(self, error: EndedElsewhere) -> None:
        state = self._protocol.peer_ended(error.how)
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
                await machine.close()

    def _while_lost(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """A pager that dies is replaced, for the pages that need no source."""
        pager = self._pager
        return () if pager is None or self._kept else (pager.watch_over,)

    async def _go_on(self, control: Control[DestinationProtocol], link: Link) -> None:
        """The source is back: tells it what is here, connects the data channels, and gathers the rest."""
        protocol, machine, pager = self._protocol, self.machine, self._pager
        assert machine is not None
        assert pager is not None
        assert self._session is not None
        maps = digest = 0
        told = []
        for number, _ in enumerate(machine.blocks):
            received = await run_sync(pager.received, number)
            told.append(received)
            digest = await if_heavy(len(received), received.crc32c, digest)
            for first_page, part in received.parts(PAGE_MAP_PAGES):
                runs = await if_heavy(len(part), part.rle_encode)
                await control.send(protocol.send(ReceivedMap(number, first_page, len(part), runs)))
                maps += 1
        self._placed.told(told)
        with link.channel_set(self._session) as channel_set:
            await control.send(protocol.send(Recover(self._resume_ns, maps, digest)))
            await control.receive(Recovered, STEP_TIMEOUT_S)
            self._change()
            await self._attach(channel_set, machine, pager)
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
        offer = self._offer = await control.receive(Offer, STEP_TIMEOUT_S)
        try:
            if self._refusal is not None:
                raise self._refusal
            machine, pager = self._take_offer(offer)
        except Exception as error:
            self._refusal = explained(error)
            await control.send(protocol.send(Reject(str(self._refusal))))
            raise self._refusal from error
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
        with link.channel_set(self._session) as channel_set:
            await control.send(protocol.send(Accept(units, machine.shards, self._bulk_channels)))
            self._change()
            await self._attach(channel_set, machine, pager)
        await control.send(protocol.send(Ready()))
        self._change()

        await self._take_machine(control, machine, pager)
        self._check_wanted()  # in one step: whoever was told that it is cancelled can rely on it
        await control.send(protocol.send(Prepared()))
        await control.receive(Commit, STEP_TIMEOUT_S)
        await self._start(control, machine)
        await self._finish(control, pager)

    async def _attach(self, channel_set: ChannelSet, machine: Machine, pager: AnyPager) -> None:
        """Gives the pager its connections: what is pending is requested (again) at once."""
        self._pushing = set(range(self._bulk_channels))
        self._pushed_all = trio.Event()
        if not self._pushing and self._background:
            self._pushed_all.set()  # nobody pushes: all is asked for
        channels = await channel_set.channels(machine.shards, self._bulk_channels)
        try:
            for (kind, index), fd in channels.items():
                keep_alive(fd, data_silence_s(kind, self._heartbeat_s))
                if kind == "urgent":
                    pager.attach_urgent(index, fd.detach())
                else:
                    pager.attach_bulk(index, fd.detach())
        finally:
            for fd in channels.values():
                fd.close()  # those that were not given away

    async def _start(self, control: Control[DestinationProtocol], machine: Machine) -> None:
        """The machine has been committed to us."""
        await self._run_machine(machine)
        await control.send(self._protocol.send(Running(self._resume_ns)))
        self._change()

    async def _run_machine(self, machine: Machine) -> None:
        """Shielded: a machine that was committed to us runs, whatever else happens meanwhile. Where it cannot, no
        connection would help."""
        self.committed_ns = now_ns()
        self._change()
        with trio.CancelScope(shield=True):
            await machine.resume()
            await machine.claim_network()
            self.running_ns = await self._first_run(machine)

    async def _finish(self, control: Control[DestinationProtocol], pager: AnyPager) -> None:
        """Gathers what is missing, and says so when nothing is."""
        await self._gather(pager)
        await self._disarm(pager)
        figures = self.figures()
        await control.send(self._protocol.send(Complete(figures.to_wire())))
        acknowledgement = await control.receive(CompleteAck, ACK_TIMEOUT_S)
        self.downtime_ns = natural(acknowledgement.stats.get("downtime_ns"))
        self.total_ns = natural(acknowledgement.stats.get("total_ns"))

    async def _disarm(self, pager: AnyPager) -> None:
        """Nothing is missing: the machine does not depend on the pager any more."""
        if not self._kept:
            self.completed_ns = self.completed_ns or now_ns()
            await pager.disarm()
            self._kept = True
        if self._protocol.state is State.PAUSED:
            self._protocol.every_page_is_here()

    def _take_offer(self, offer: Offer) -> tuple[Machine, AnyPager]:
        layout = [BlockLayout(block.name, block.size_bytes, block.page_bytes) for block in offer.blocks]
        machine = self.machine = self._make_machine(
            offer.machine, offer.config, layout, self._backing, disk=self._disk, net=self._net
        )
        pager = self._pager = self._make_pager()
        for block in machine.blocks:
            pager.add_block(block.memory)
        for _ in range(machine.shards):
            # ANY prefers one that stops the kernel's faults too; a machine that needs that has refused a host without.
            pager.add_shard(self._how, self._busy_poll_us)
        self._session = Session(offer.migration, offer.token, epoch=0)
        self._reconnector = self._stack.enter_context(self._first_link.reconnector(self._session))
        self._machine_made.set()
        return machine, pager

    async def _take_machine(self, control: Control[DestinationProtocol], machine: Machine, pager: AnyPager) -> None:
        """Page maps and state; when it returns, the machine could run and every missing page would fault."""
        collector = MapCollector([block.memory.pages for block in machine.blocks])
        first = True  # until then the machine runs at the source, as long as that likes
        while isinstance(message := await control.receive_any(math.inf if first else STEP_TIMEOUT_S), PageMap):
            first = False
            await if_heavy(message.pages, collector.add, message)
        if not isinstance(message, Switchover):
            raise ProtocolError(f"{message.TYPE} came where switchover was due")
        collector.finish(message.TYPE, message.maps)
        zero = [bitmap.inverted() for bitmap in collector.bitmaps]
        for number, bitmap in enumerate(zero):
            pager.set_zero(number, bitmap)
        self._placed.told(zero)
        for number, block in enumerate(machine.blocks):
            pager.arm(block.shard, number, 0, block.memory.pages)
        for vcpu, tid in enumerate(machine.vcpu_threads()):
            pager.track_thread(vcpu, tid)
        await pager.confirm()  # before the first touch, and before anything is promised
        await machine.load_state(message.state)
        self.at_switchover = machine.statistics()

    @property
    def _unit_bytes(self) -> int:
        """The largest unit of transfer."""
        return max(block.memory.page_bytes for block in self.machine.blocks) if self.machine is not None else 0

    async def _first_run(self, machine: Machine) -> int:
        resumed_ns = now_ns()
        if not machine.live:
            return resumed_ns
        with trio.move_on_after(FIRST_RUN_S):
            while True:
                first_run_ns = machine.statistics().first_run_ns
                if first_run_ns >= self.committed_ns:
                    return first_run_ns
                await trio.sleep(0.0005)
        return resumed_ns

    async def _gather(self, pager: AnyPager) -> None:
        """Until nothing is missing any more."""
        async with trio.open_nursery() as nursery:

            async def ask_for_the_rest() -> None:
                await self._pushed_all.wait()
                silence_s = MISSED_HEARTBEATS * self._heartbeat_s + self._unit_bytes / SLOWEST_BYTES_PER_S
                here, since_s = (0, 0), trio.current_time()
                while True:
                    # Refused frames, and whatever a source forgot: what was pushed in vain is asked for.
                    asked = pager.request_missing(REQUEST_WINDOW_PAGES)
                    if asked:
                        log.info("asked for %d pages that were not pushed", asked)
                    before, statistics = here, pager.statistics()
                    here = statistics.resident_pages, statistics.bytes_received
                    if here != before:
                        since_s = trio.current_time()
                    elif trio.current_time() - since_s > silence_s:
                        raise MigrationError(f"no page that was asked for has come within {silence_s:g} s")
                    await trio.sleep(REQUEST_PERIOD_S)

            nursery.start_soon(ask_for_the_rest)
            await self._all_here.wait()
            nursery.cancel_scope.cancel()

    async def _watch_pager(self) -> None:
        await self._machine_made.wait()
        pager = self._pager
        assert pager is not None
        async for event in pager.events():
            if event.type is EventType.COMPLETE:
                self._all_here.set()
            elif event.type is EventType.BULK_END:
                self._pushing.discard(event.channel)
                if not self._pushing:
                    self._pushed_all.set()
            elif event.type is EventType.FATAL:
                raise Hopeless(f"the pager cannot go on: {event.text}")
            elif event.type is EventType.DIED:
                raise MigrationError(event.text)
            elif self._all_here.is_set():
                pass  # a channel that nobody needs any more
            elif event.channel_kind is not ChannelKind.BULK or event.channel in self._pushing or event.error:
                # (a bulk channel that is closed in order after its `end` takes nothing with it)
                await self._let_peer_say_why()
                why = f"({event.text})" if event.text else "(closed by the source)"
                raise MigrationError(f"data channel lost: {event.channel_kind.name.lower()} {event.channel} {why}")

    async def _watch_answers(self) -> None:
        """A data connection can be dead while the control connection lives: nobody who waits for a page is to wait for
        longer than a dead peer would take to be noticed."""
        connected_ns = now_ns()
        await self._machine_made.wait()
        silence_s = MISSED_HEARTBEATS * self._heartbeat_s
        while self._pager is not None:
            waiting_ns = min(self._pager.statistics().oldest_pending_ns, now_ns() - connected_ns)
            if waiting_ns > silence_s * 1e9 and self._protocol.state is State.POSTCOPY:
                raise MigrationError(f"a page request has not been answered within {waiting_ns / 1e9:.1f} s")
            await trio.sleep(self._heartbeat_s)

    async def _watch_machine(self) -> None:
        await self._machine_made.wait()
        assert self.machine is not None
        async for event in self.machine.events():
            if event.type in (MachineEventType.FAILURE, MachineEventType.FAILED):
                self._machine_failed(event.text)

    def _machine_failed(self, text: str) -> None:
        # The migration goes on: whoever wants to know why it failed needs its memory.
        if not self.machine_failure:
            self.machine_failure = text or "a vCPU stopped"
            log.error("the machine reports a failure: %s", self.machine_failure)

    # ---- after it

    def received(self) -> list[Bitmap]:
        """What has arrived of each RAM block, in the memory's own pages. Until `close`."""
        assert self.machine is not None
        assert self._pager is not None
        return [self._pager.received(number) for number in range(len(self.machine.blocks))]

    async def release(self) -> Machine:
        """Ends the pager of a migration that has completed, and hands over the machine, the caller's from then on: also
        when the pager does not end, on which nothing depends any more. `MigrationError` when not everything is here."""
        machine, pager = self.machine, self._pager
        if self.state is not State.COMPLETED or not self._kept or machine is None or pager is None:
            raise MigrationError("the machine is not complete here")
        self.check_machine()
        self.figures()
        self._pager = None  # whoever looks meanwhile finds the last figures
        self.machine = None
        with trio.CancelScope(shield=True):  # bounded by the pager
            await self._contained(pager.close, fatal=False)
        return machine

    async def close(self) -> None:
        """Ends machine and pager. Shielded, bounded in time; what does not end is logged and kept by its owner."""
        with trio.CancelScope(shield=True):
            self.check_machine()
            self.figures()
            _ = self.pager_process
            machine, pager = self.machine, self._pager
            self._pager = None  # whoever looks meanwhile finds the last figures
            # Again after the pager, which has let go of whatever waited for a page; one that has ended does not mind.
            for what in (pager, machine) if self._kept else (machine, pager, machine):
                if what is not None:
                    await self._contained(what.close, fatal=False)

    def check_machine(self) -> None:
        """Looks once more whether the machine has found something wrong; sets `machine_failure`."""
        if self.machine is not None:
            statistics = self.machine.statistics()
            if statistics.failures or statistics.state is MachineState.FAILED:
                self._machine_failed(statistics.failure_text)
