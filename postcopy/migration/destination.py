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
then waits, and nothing is ever filled with zeros. The state is `PAUSED` until the user ends it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from postcopy._errors import MigrationError, PostcopyError, ProtocolError
from postcopy.bitmap import Bitmap
from postcopy.machines import (
    BlockLayout,
    Machine,
    MachineEventType,
    MachineState,
    MachineStatistics,
    create_destination,
)
from postcopy.migration._session import STEP_TIMEOUT_S, Control, FirstFailure, Interrupted, now_ns, status_of
from postcopy.migration.channels import Link, Session
from postcopy.migration.figures import Figures, natural
from postcopy.migration.protocol import (
    Commit,
    CompleteAck,
    DestinationProtocol,
    Offer,
    PageMap,
    State,
    Switchover,
)
from postcopy.pager import ChannelKind, EventType, Pager
from postcopy.uffd import How

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
        busy_poll_us: int = 0,
        how: How | str = How.ANY,
        make_machine: Callable[..., Machine] = create_destination,
        make_pager: Callable[[], Pager] = Pager,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.machine: Machine | None = None
        self.peer = link.peer
        self.failure: PostcopyError | None = None
        self.paused = trio.Event()  # set when the source was lost after `commit`
        self.machine_failure = ""  # what the guest, or its vCPUs, found wrong here
        self.at_switchover: MachineStatistics | None = None
        self.started_ns = now_ns()
        self.committed_ns = self.running_ns = self.completed_ns = 0
        self.downtime_ns = self.total_ns = 0  # as the source has measured them
        self._link = link
        self._backing = backing
        self._disk = disk
        self._busy_poll_us = busy_poll_us
        self._how = how
        self._make_machine = make_machine
        self._make_pager = make_pager
        self._on_change = on_change
        self._protocol = DestinationProtocol()
        self._pager: Pager | None = None
        self._offer: Offer | None = None
        self._last_figures = Figures()
        self._machine_made = trio.Event()
        self._all_here = trio.Event()
        self._pushing: set[int] = set()  # bulk channels that have not said `end`
        self._pushed_all = trio.Event()
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

    def figures(self) -> Figures:
        """The counters as they are now; the last ones when the pager has ended."""
        if self._pager is not None and self.machine is not None:
            self._last_figures = Figures.of(
                self.machine.blocks[0].memory.page_bytes,
                self._pager.statistics(),
                self._pager.latency(),
                self._pager.blocktime_ns(),
            )
        return self._last_figures

    # ---- doing it

    async def run(self, stop: trio.Event) -> None:
        """Returns when every page is here, or when it has failed; a migration that is `PAUSED` stays so until `stop`.

        After it, `machine` runs when the state is COMPLETED. Always `close` afterwards.
        """
        control = Control(self._link.control, self._protocol)
        scope = FirstFailure()

        async def main() -> None:
            await self._receive(control)

        async def interruption() -> None:
            await stop.wait()
            raise Interrupted("interrupted at the destination")

        try:
            await scope.run(main, control.run, self._watch_pager, self._watch_machine, interruption)
            if self.state is not State.COMPLETED:
                self.failure = scope.failure or Interrupted("interrupted at the destination")
        except BaseException:
            self.failure = Interrupted("ended at the destination")
            raise
        finally:
            if self.failure is not None:
                await control.say_goodbye(str(self.failure))
            if self.state is State.COMPLETED:
                self.failure = None  # every page is here: whether the source has heard of it changes nothing
            await control.close()
            self._on_change()
        if self.state is State.PAUSED:
            await self._hold(stop)

    async def _receive(self, control: Control[DestinationProtocol]) -> None:
        protocol = self._protocol
        offer = self._offer = await control.receive(Offer, STEP_TIMEOUT_S)
        try:
            machine, pager = self._take_offer(offer)
        except PostcopyError as error:
            await control.send(protocol.send_reject(str(error)))
            raise
        units = tuple(block.memory.page_bytes for block in machine.blocks)
        with self._link.door(Session(offer.migration, offer.token, epoch=0)) as door:
            await control.send(protocol.send_accept(units, machine.shards, offer.bulk_channels))
            self._on_change()
            channels = await door.channels(machine.shards, offer.bulk_channels)
        self._pushing = set(range(offer.bulk_channels))
        try:
            for (kind, index), fd in channels.items():
                if kind == "urgent":
                    pager.attach_urgent(index, fd.detach())
                else:
                    pager.attach_bulk(index, fd.detach())
        finally:
            for fd in channels.values():
                fd.close()  # those that were not given away
        await control.send(protocol.send_ready())
        self._on_change()

        await self._take_machine(control, machine, pager)
        await control.send(protocol.send_prepared())
        await control.receive(Commit)
        self.committed_ns = now_ns()
        self._on_change()
        # Shielded: a machine that was committed to us runs, whatever else happens meanwhile.
        with trio.CancelScope(shield=True):
            await machine.resume()
            self.running_ns = await self._first_run(machine)
        await control.send(protocol.send_running(max(0, self.running_ns - self.committed_ns)))
        self._on_change()

        await self._gather(pager)
        self.completed_ns = now_ns()
        await pager.disarm()
        self._kept = True
        figures = self.figures()
        await control.send(protocol.send_complete(figures.to_wire()))
        acknowledgement = await control.receive(CompleteAck, ACK_TIMEOUT_S)
        self.downtime_ns = natural(acknowledgement.stats.get("downtime_ns"))
        self.total_ns = natural(acknowledgement.stats.get("total_ns"))

    def _take_offer(self, offer: Offer) -> tuple[Machine, Pager]:
        layout = [BlockLayout(block.name, block.size_bytes, block.page_bytes) for block in offer.blocks]
        machine = self.machine = self._make_machine(offer.machine, offer.config, layout, self._backing, disk=self._disk)
        pager = self._pager = self._make_pager()
        for block in machine.blocks:
            pager.add_block(block.memory)
        for _ in range(machine.shards):
            # ANY prefers one that stops the kernel's faults too; a machine that needs that has refused a host without.
            pager.add_shard(self._how, self._busy_poll_us)
        self._machine_made.set()
        return machine, pager

    async def _take_machine(self, control: Control[DestinationProtocol], machine: Machine, pager: Pager) -> None:
        """Page maps and state; when it returns, the machine could run and every missing page would fault."""
        present = [Bitmap(block.memory.pages) for block in machine.blocks]
        described = [0] * len(present)  # pages; maps of a block come in order and without gaps
        maps = 0
        while isinstance(message := await control.receive_any(), PageMap):
            maps += 1
            if message.block >= len(present):
                raise ProtocolError(f"page-map: there is no block {message.block}")
            if message.first_page != described[message.block]:
                raise ProtocolError(
                    f"page-map: block {message.block} goes on at page {message.first_page},"
                    f" not at {described[message.block]}"
                )
            whole = present[message.block]
            if message.pages > len(whole) - message.first_page:
                raise ProtocolError(f"page-map: block {message.block} has {len(whole)} pages only")
            whole.paste(message.first_page, Bitmap.rle_decode(message.runs, message.pages))
            described[message.block] += message.pages
        if not isinstance(message, Switchover):
            raise ProtocolError(f"{message.TYPE} came where switchover was due")
        if message.maps != maps:
            raise ProtocolError(f"switchover: speaks of {message.maps} page maps, {maps} came")
        for number, bitmap in enumerate(present):
            if described[number] != len(bitmap):
                raise ProtocolError(f"switchover: the page map of block {number} ends at {described[number]}")
            pager.set_zero(number, bitmap.inverted())
        for number, block in enumerate(machine.blocks):
            pager.arm(block.shard, number, 0, block.memory.pages)
        for vcpu, tid in enumerate(machine.vcpu_threads()):
            pager.track_thread(vcpu, tid)
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

    async def _gather(self, pager: Pager) -> None:
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
                raise MigrationError(f"the pager cannot go on: {event.text}")
            elif self._all_here.is_set():
                pass  # a channel that nobody needs any more
            elif event.channel_kind is not ChannelKind.BULK or event.channel in self._pushing or event.error:
                # (a bulk channel that is closed in order after its `end` takes nothing with it)
                why = f"({event.text})" if event.text else "(closed by the source)"
                raise MigrationError(f"data channel lost: {event.channel_kind.name.lower()} {event.channel} {why}")

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

    async def _hold(self, stop: trio.Event) -> None:
        """Keeps everything as it is until the user ends it."""
        pager = self._pager
        assert pager is not None
        try:
            await pager.disconnect()  # faults stay blocked, memory stays armed
        except PostcopyError as error:
            log.error("%s", error)
        self.paused.set()
        self._on_change()
        await stop.wait()

    async def close(self) -> None:
        """Ends machine and pager. Shielded, bounded in time; what does not end is logged and kept by its owner."""
        with trio.CancelScope(shield=True):
            self.check_machine()
            self.figures()
            machine, pager = self.machine, self._pager
            for what in (pager, machine) if self._kept else (machine, pager):
                if what is None:
                    continue
                try:
                    await what.close()
                except PostcopyError as error:
                    log.error("%s", error)
            self._pager = None

    def check_machine(self) -> None:
        """Looks once more whether the machine has found something wrong; sets `machine_failure`."""
        if self.machine is not None:
            statistics = self.machine.statistics()
            if statistics.failures or statistics.state is MachineState.FAILED:
                self._machine_failed(statistics.failure_text)
