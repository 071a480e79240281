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
does not run, and the source is asked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import trio

from postcopy._errors import MigrationError, PeerError, PostcopyError, ProtocolError
from postcopy._logs import about
from postcopy.bitmap import Bitmap
from postcopy.histogram import Histogram
from postcopy.machines import (
    BlockLayout,
    Machine,
    MachineEventType,
    MachineState,
    MachineStatistics,
    create_destination,
)
from postcopy.migration._session import (
    HEARTBEAT_S,
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
from postcopy.migration.figures import Figures, natural
from postcopy.migration.protocol import (
    PAGE_MAP_PAGES,
    Commit,
    CompleteAck,
    DestinationProtocol,
    Offer,
    PageMap,
    Recovered,
    State,
    Switchover,
)
from postcopy.migration.release import PlacedReporter
from postcopy.pager import ChannelKind, EventType, Pager
from postcopy.uffd import How

if TYPE_CHECKING:
    from postcopy.pager_process import ProcessPager

AnyPager: TypeAlias = "Pager | ProcessPager"

REQUEST_WINDOW_PAGES = 4096
"""Pages asked for at a time, when the background push has ended and pages are still missing."""
REQUEST_PERIOD_S = 0.05
FIRST_RUN_S = 0.05
"""How long `running` may be held back until a vCPU has really entered the machine; only a measurement depends on it."""
ACK_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


class DestinationMigration:
    """One migration to this host. Make it, `run` it once, `close` it; everything else may be looked at meanwhile."""

    def __init__(
        self,
        link: Link,
        *,
        backing: str = "memfd",
        disk: str | None = None,
        net: str | None = None,
        busy_poll_us: int = 0,
        how: How | str = How.ANY,
        heartbeat_s: float = HEARTBEAT_S,
        recover_for_s: float = math.inf,
        kill_when_lost: bool = False,
        make_machine: Callable[..., Machine] = create_destination,
        make_pager: Callable[[], AnyPager] = Pager,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.machine: Machine | None = None
        self.machine_name = ""  # for logs; `make_machine` may set it
        self.peer = link.peer
        self.failure: PostcopyError | None = None
        self.paused = trio.Event()  # set when the source was lost after `commit`, the first time
        self.over = False  # there is no connection, and none is waited for
        self.recoveries = Recoveries()
        self.machine_failure = ""  # what the guest, or its vCPUs, found wrong here
        self.at_switchover: MachineStatistics | None = None
        self.started_ns = now_ns()
        self.committed_ns = self.running_ns = self.completed_ns = 0
        self.latency = Histogram()  # of demand faults, as `figures` has seen it last
        self.downtime_ns = self.total_ns = 0  # as the source has measured them
        self._link = link
        self._backing = backing
        self._disk = disk
        self._net = net
        self._busy_poll_us = busy_poll_us
        self._how = how
        self._heartbeat_s = heartbeat_s
        self._recover_for_s = recover_for_s
        self._kill_when_lost = kill_when_lost
        self._make_machine = make_machine
        self._make_pager = make_pager
        self._on_change = on_change
        self._protocol = DestinationProtocol()
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
        self._session: Session | None = None
        self._membership: Membership | None = None
        self._cancelled = trio.Event()
        self._stack = ExitStack()  # of the membership
        self._fatal = False  # the pager cannot go on: no other connection would help
        self._kept = False  # the memory is complete and nobody needs the pager

    # ---- looking at it

    @property
    def migration_id(self) -> str:
        return self._offer.migration.hex() if self._offer else ""

    @property
    def state(self) -> State:
        return self._protocol.state

    @property
    def status(self) -> str:
        """QEMU's word for the state."""
        return status_of(self.state, interrupted=isinstance(self.failure, Interrupted))

    @property
    def may_run(self) -> bool:
        return self._protocol.may_run

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
        """Whether giving it up now would lose nothing."""
        return self.state in UNDECIDED

    def cancel(self) -> None:
        """Gives it up if it is still `cancellable` when that is done: unlike `stop`, which ends it in any case, it does
        nothing to a migration that has been decided meanwhile."""
        self._cancelled.set()

    def set_recover_for(self, recover_for_s: float) -> None:
        """How long a source is looked for that is lost from now on."""
        self._recover_for_s = recover_for_s

    def hold(self) -> None:
        """Gives the connection up, as a network that fails would, and takes no other one until `let_go`.
        `MigrationError` where nothing could be gone on with."""
        steered(self._membership, self.state).hold()

    def let_go(self, address: Address | None = None) -> None:
        """Looks for the source (again), at this address where one is given; see `reconnect_to`."""
        membership = steered(self._membership, self.state)
        if address is not None:
            self.reconnect_to(address)
        membership.let_go()

    # ---- doing it

    def reconnect_to(self, address: Address) -> None:
        """As `SourceMigration.reconnect_to`."""
        self._link.reconnect_to(address)

    async def run(self, stop: trio.Event) -> None:
        """Returns when every page is here, or when it has failed; a migration that is `PAUSED` goes on when the source
        is back. When nobody looks for it any more it stays so until `stop`, or ends at once (`kill_when_lost`).

        After it, `machine` runs when the state is COMPLETED. Always `close` afterwards.
        """
        with about(self):
            await self._run(stop)

    async def _run(self, stop: trio.Event) -> None:
        with self._stack:
            await self._connected(self._link, self._receive, stop)
            await self._recover(stop)
        if self._protocol.give_up(str(self.failure)) is State.COMPLETED:
            self.failure = None  # every page is here: whether the source has heard of it changes nothing
        self.over = True
        self._on_change()
        if self.state is not State.PAUSED or stop.is_set():
            return
        if self._kill_when_lost:
            # Its missing pages are poisoned by `close`: nothing of it is ever filled with zeros.
            self.failure = MigrationError(f"the source is lost for good ({self.failure}), and the machine with it")
            log.error("%s", self.failure)
            return
        log.error(
            "the source is lost for good (%s); the machine is kept until this process is interrupted", self.failure
        )
        await stop.wait()

    async def _connected(
        self,
        link: Link,
        plan: Callable[[Control[DestinationProtocol], Link], Awaitable[None]],
        stop: trio.Event,
    ) -> None:
        """The life of one connection: follows the plan, and settles where its end has left the machine."""
        control = Control(link.control, self._protocol, self._heartbeat_s)
        scope = FirstFailure()
        self.failure = None

        async def main() -> None:
            await plan(control, link)

        async def interruption() -> None:
            await stop.wait()
            raise Interrupted("interrupted at the destination")

        async def cancellation() -> None:
            await self._cancelled.wait()
            if not self.cancellable:
                await trio.sleep_forever()
            raise Interrupted("cancelled at the destination")

        async def replacement() -> None:
            await self._machine_made.wait()
            assert self._membership is not None
            await self._membership.superseded()
            raise PeerError("the source has come back on another connection")

        async def acknowledgements() -> None:
            await self._machine_made.wait()
            assert self._offer is not None
            assert self._pager is not None
            if self._offer.placed_every_ms:
                await self._placed.run(control, self._pager.received, self._offer.placed_every_ms / 1000)

        watchers = (
            self._watch_pager,
            self._watch_answers,
            self._watch_machine,
            interruption,
            cancellation,
            replacement,
        )
        try:
            await scope.run(main, control.run, *watchers, acknowledgements)
            if self.state is not State.COMPLETED:
                # A refusal of ours first: the source may hang up, and be heard, before its sending has returned.
                self.failure = self._refusal or scope.failure or Interrupted("interrupted at the destination")
        except BaseException:
            self.failure = Interrupted("ended at the destination")
            raise
        finally:
            if self.failure is not None:
                await control.say_goodbye(str(self.failure))
            if self.state is State.COMPLETED:
                self.failure = None  # every page is here: whether the source has heard of it changes nothing
            await control.close()
            if self._protocol.recoverable:
                await self._pause()
            self._on_change()

    async def _pause(self) -> None:
        """Keeps everything as it is: faults stay blocked, memory stays armed."""
        pager = self._pager
        assert pager is not None
        log.warning("paused: %s", self.failure)
        with trio.CancelScope(shield=True):  # bounded by the pager
            try:
                await pager.disconnect()
                for event in pager.drain_events():
                    if event.type is EventType.COMPLETE:
                        self._all_here.set()
                    self._fatal |= event.type is EventType.FATAL
            except PostcopyError as error:
                self._fatal = True  # its threads hang: it can take no new connections
                log.error("%s", error)
        self.paused.set()

    async def _recover(self, stop: trio.Event) -> None:
        """Goes on with the source, as often as it takes."""
        lost_ns = now_ns()
        while self._protocol.recoverable and not self._fatal and not stop.is_set():
            assert self._membership is not None
            found = await self._next_link(self._membership, stop)
            if found is None or isinstance(found, PeerError):
                if found is not None and not self._kept:
                    log.error("the source does not take us back: %s", found)
                    self.failure = found
                return
            link, self._session = found
            self.peer = link.peer
            self._protocol.reconnected()
            self._on_change()
            recovered = self.recoveries.count
            await self._connected(link, partial(self._go_on, lost_ns=lost_ns), stop)
            if self.recoveries.count > recovered:
                lost_ns = now_ns()

    async def _next_link(self, membership: Membership, stop: trio.Event) -> tuple[Link, Session] | PeerError | None:
        """The source, when it is back; meanwhile a pager that dies is replaced, for the pages that need no source."""
        found: tuple[Link, Session] | PeerError | None = None

        async def watch_over(pager: AnyPager) -> None:
            try:
                await pager.watch_over()
            except PostcopyError as error:
                log.error("%s", error)
                self.failure = error
                self._fatal = True
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            if self._pager is not None and not self._kept:
                nursery.start_soon(watch_over, self._pager)
            # One that has every page only wants to say so.
            found = await next_link(membership, stop, ACK_TIMEOUT_S if self._kept else self._recover_for_s)
            nursery.cancel_scope.cancel()
        return found

    async def _go_on(self, control: Control[DestinationProtocol], link: Link, lost_ns: int) -> None:
        """The source is back: tells it what is here, connects the data channels, and gathers the rest."""
        protocol, machine, pager = self._protocol, self.machine, self._pager
        assert machine is not None
        assert pager is not None
        assert self._session is not None
        maps = digest = 0
        told = []
        for number, _ in enumerate(machine.blocks):
            received = await trio.to_thread.run_sync(pager.received, number)
            told.append(received)
            digest = received.crc32c(digest)
            for first_page, part in received.parts(PAGE_MAP_PAGES):
                runs = part.rle_encode()
                await control.send(protocol.send_received_map(number, first_page, len(part), runs))
                maps += 1
        self._placed.told(told)
        with link.door(self._session) as door:
            await control.send(protocol.send_recover(self._resume_ns, maps, digest))
            await control.receive(Recovered, STEP_TIMEOUT_S)
            self._on_change()
            await self._attach(door, machine, pager)
        self.recoveries.add(now_ns() - lost_ns)
        log.warning("recovered: the source is back after %.0f ms", self.recoveries.last_ns / 1e6)
        self._on_change()
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
            machine, pager = self._take_offer(offer)
        except PostcopyError as error:
            self._refusal = error
            await control.send(protocol.send_reject(str(error)))
            raise
        units = tuple(block.memory.page_bytes for block in machine.blocks)
        self._bulk_channels = offer.bulk_channels
        assert self._session is not None
        with link.door(self._session) as door:
            await control.send(protocol.send_accept(units, machine.shards, offer.bulk_channels))
            self._on_change()
            await self._attach(door, machine, pager)
        await control.send(protocol.send_ready())
        self._on_change()

        await self._take_machine(control, machine, pager)
        await control.send(protocol.send_prepared())
        await control.receive(Commit)
        await self._start(control, machine)
        await self._finish(control, pager)

    async def _attach(self, door: Door, machine: Machine, pager: AnyPager) -> None:
        """Gives the pager its connections: what is pending is requested (again) at once."""
        self._pushing = set(range(self._bulk_channels))
        self._pushed_all = trio.Event()
        channels = await door.channels(machine.shards, self._bulk_channels)
        try:
            for (kind, index), fd in channels.items():
                keep_alive(fd, SILENCES * self._heartbeat_s)
                if kind == "urgent":
                    pager.attach_urgent(index, fd.detach())
                else:
                    pager.attach_bulk(index, fd.detach())
        finally:
            for fd in channels.values():
                fd.close()  # those that were not given away

    async def _start(self, control: Control[DestinationProtocol], machine: Machine) -> None:
        """The machine has been committed to us."""
        self.committed_ns = now_ns()
        self._on_change()
        # Shielded: a machine that was committed to us runs, whatever else happens meanwhile.
        with trio.CancelScope(shield=True):
            await machine.resume()
            await machine.claim_network()
            self.running_ns = await self._first_run(machine)
        await control.send(self._protocol.send_running(self._resume_ns))
        self._on_change()

    async def _finish(self, control: Control[DestinationProtocol], pager: AnyPager) -> None:
        """Gathers what is missing, and says so when nothing is."""
        await self._gather(pager)
        if not self._kept:
            self.completed_ns = now_ns()
            await pager.disarm()
            self._kept = True
        figures = self.figures()
        await control.send(self._protocol.send_complete(figures.to_wire()))
        acknowledgement = await control.receive(CompleteAck, ACK_TIMEOUT_S)
        self.downtime_ns = natural(acknowledgement.stats.get("downtime_ns"))
        self.total_ns = natural(acknowledgement.stats.get("total_ns"))

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
        self._membership = self._stack.enter_context(self._link.membership(self._session))
        self._machine_made.set()
        return machine, pager

    async def _take_machine(self, control: Control[DestinationProtocol], machine: Machine, pager: AnyPager) -> None:
        """Page maps and state; when it returns, the machine could run and every missing page would fault."""
        collector = MapCollector([block.memory.pages for block in machine.blocks])
        while isinstance(message := await control.receive_any(), PageMap):
            collector.add(message)
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
                while True:
                    # Refused frames, and whatever a source forgot: what was pushed in vain is asked for.
                    asked = pager.request_missing(REQUEST_WINDOW_PAGES)
                    if asked:
                        log.info("asked for %d pages that were not pushed", asked)
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
                self._fatal = True
                raise MigrationError(f"the pager cannot go on: {event.text}")
            elif event.type is EventType.DIED:
                raise MigrationError(event.text)
            elif self._all_here.is_set():
                pass  # a channel that nobody needs any more
            elif event.channel_kind is not ChannelKind.BULK or event.channel in self._pushing or event.error:
                # (a bulk channel that is closed in order after its `end` takes nothing with it)
                why = f"({event.text})" if event.text else "(closed by the source)"
                raise MigrationError(f"data channel lost: {event.channel_kind.name.lower()} {event.channel} {why}")

    async def _watch_answers(self) -> None:
        """A data connection can be dead while the control connection lives: nobody who waits for a page is to wait for
        longer than a dead peer would take to be noticed."""
        connected_ns = now_ns()
        await self._machine_made.wait()
        silence_s = SILENCES * self._heartbeat_s
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
        """Ends the pager of a migration that has completed, and hands over the machine, which runs on as the caller's.
        `MigrationError` when the pager does not end, or not everything is here."""
        machine, pager = self.machine, self._pager
        if self.state is not State.COMPLETED or not self._kept or machine is None or pager is None:
            raise MigrationError("the machine is not complete here")
        self.check_machine()
        self.figures()
        self._pager = None  # whoever looks meanwhile finds the last figures
        with trio.CancelScope(shield=True):  # bounded by the pager
            await pager.close()
        self.machine = None
        return machine

    async def close(self) -> None:
        """Ends machine and pager. Shielded, bounded in time; what does not end is logged and kept by its owner."""
        with trio.CancelScope(shield=True):
            self.check_machine()
            self.figures()
            _ = self.pager_process
            machine, pager = self.machine, self._pager
            self._pager = None  # whoever looks meanwhile finds the last figures
            for what in (pager, machine) if self._kept else (machine, pager):
                if what is None:
                    continue
                try:
                    await what.close()
                except PostcopyError as error:
                    log.error("%s", error)

    def check_machine(self) -> None:
        """Looks once more whether the machine has found something wrong; sets `machine_failure`."""
        if self.machine is not None:
            statistics = self.machine.statistics()
            if statistics.failures or statistics.state is MachineState.FAILED:
                self._machine_failed(statistics.failure_text)
