# SPDX-License-Identifier: Apache-2.0
"""Source and destination against each other, with everything beneath them replaced: whatever fails, and whenever, there
is one owner or a state that says why not."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from postcopy import wire as p
from postcopy._fd import FdHolder
from postcopy.dataplane.histogram import Histogram
from postcopy.dataplane.pager import ChannelKind, Event, EventType, Pager, PagerStatistics
from postcopy.dataplane.pageserver import PageServer, PageServerStatistics
from postcopy.errors import ConfigurationError, CoreError, PeerError, ProtocolError, ResourceError
from postcopy.machines import BlockLayout, Check, Machine, MachineEvent, MachineState, MachineStatistics, RamBlock
from postcopy.memory import Memory
from postcopy.memory.bitmap import Bitmap
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.source import PREPARE_TIMEOUT_S, SourceMigration, SourceOptions
from postcopy.net import Address, ChannelKey, ChannelSet, Link, Reconnector, Session
from postcopy.wire import State

PAGES = 40
UNIT = 4096


class FakeMachine(Machine):
    kind = "fake"
    live = True

    def __init__(self) -> None:
        self.memories = [Memory.create("memfd", PAGES * UNIT), Memory.create("memfd", 2 * PAGES * UNIT)]
        self.state = MachineState.CREATED
        self.loaded: bytes | None = None
        self.refuses: Exception | None = None
        self.runs_again = trio.Event()
        self.resumed = 0
        self.closed = False
        self.log: list[str] = []
        self.network_log: list[str] = []

    @property
    def blocks(self) -> Sequence[RamBlock]:
        return [RamBlock(f"block{number}", memory, number) for number, memory in enumerate(self.memories)]

    def config(self) -> dict[str, Any]:
        return {"colour": "blue"}

    async def boot(self) -> None:
        self.state = MachineState.PAUSED

    async def resume(self) -> None:
        await trio.lowlevel.checkpoint()
        self.state = MachineState.RUNNING
        self.resumed += 1
        self.runs_again.set()

    async def pause(self, timeout_s: float = 10.0) -> None:
        await trio.lowlevel.checkpoint()
        self.state = MachineState.PAUSED

    async def claim_network(self) -> None:
        assert self.state is MachineState.RUNNING
        self.network_log.append("claimed")

    async def release_network(self) -> None:
        assert self.state is MachineState.PAUSED
        self.network_log.append("released")

    async def save_state(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return b"registers"

    async def load_state(self, state: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.refuses is not None:
            raise self.refuses
        self.loaded = state
        self.state = MachineState.PAUSED

    def vcpu_threads(self) -> list[int]:
        return [1]

    def statistics(self) -> MachineStatistics:
        return MachineStatistics(self.state, first_run_ns=1 << 62 if self.state is MachineState.RUNNING else 0)

    async def verify(self) -> Check:
        return Check(True, "nothing", "not at all")

    async def wait_ready(self) -> None:
        await trio.lowlevel.checkpoint()

    async def events(self) -> AsyncIterator[MachineEvent]:
        await trio.sleep_forever()
        yield MachineEvent(cast(Any, None))

    async def close(self, timeout_s: float = 5.0) -> None:
        self.log.append("machine closed")
        self.closed = True
        for memory in self.memories:
            memory.close()


class FakeEvents:
    def __init__(self) -> None:
        self.send, self.receive = trio.open_memory_channel[Event](100)

    def tell(self, type_: EventType, kind: ChannelKind = ChannelKind.NONE, channel: int = 0, text: str = "") -> None:
        self.send.send_nowait(Event(type_, kind, channel, 0, text))


class FakeEngine:
    """What pager and page server have in common."""

    def __init__(self) -> None:
        self.fds: dict[ChannelKey, FdHolder] = {}
        self.channel = FakeEvents()
        self.log: list[str] = []

    def attach_urgent(self, shard: int, fd: int, busy_poll_us: int = 0) -> None:
        self.fds["urgent", shard] = FdHolder(fd)

    def attach_bulk(self, channel: int, fd: int) -> None:
        self.fds["bulk", channel] = FdHolder(fd)

    def events(self) -> AsyncIterator[Event]:
        return self.channel.receive.__aiter__()

    def drain_events(self) -> list[Event]:
        events = []
        with contextlib.suppress(trio.WouldBlock):
            while True:
                events.append(self.channel.receive.receive_nowait())
        return events

    async def disconnect(self) -> None:
        self.log.append("disconnected")
        for fd in self.fds.values():
            fd.close()
        self.fds.clear()
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        self.log.append("closed")
        for fd in self.fds.values():
            fd.close()


class FakePager(FakeEngine):
    process = None

    def __init__(self) -> None:
        super().__init__()
        self.zero: dict[int, Bitmap] = {}
        self.armed: list[tuple[int, int, int, int]] = []
        self.requested = 0
        self.oldest_pending_ns = 0

    async def watch_over(self) -> None:
        await trio.sleep_forever()

    def add_block(self, memory: Memory) -> int:
        return 0

    def add_shard(self, how: object, busy_poll_us: int) -> int:
        return 0

    def set_zero(self, block: int, zero: Bitmap) -> None:
        self.zero[block] = zero

    def arm(self, shard: int, block: int, first_page: int, pages: int) -> None:
        self.armed.append((shard, block, first_page, pages))

    def track_thread(self, slot: int, tid: int) -> None:
        self.log.append(f"thread {tid} is vcpu {slot}")

    async def confirm(self) -> None:
        await trio.lowlevel.checkpoint()

    def request_missing(self, limit: int) -> int:
        self.requested += 1
        self.channel.tell(EventType.COMPLETE)
        return 3

    def statistics(self) -> PagerStatistics:
        return replace(PagerStatistics(*range(1, 18)), oldest_pending_ns=self.oldest_pending_ns)

    def received(self, block: int) -> Bitmap:
        bitmap = Bitmap((block + 1) * PAGES)
        bitmap.set_range(block, 5)
        return bitmap

    def latency(self) -> Histogram:
        return Histogram()

    def blocktime_ns(self) -> list[int]:
        return [77]

    async def disarm(self) -> None:
        self.log.append("disarmed")
        await trio.lowlevel.checkpoint()


class FakeServer(FakeEngine):
    def __init__(self, bandwidth: int) -> None:
        super().__init__()
        self.units: list[int] = []
        self.present: dict[int, Bitmap] = {}
        self.received: dict[int, Bitmap] = {}
        self.gone: dict[int, Bitmap] = {}
        self.changed = trio.Event()
        self.release_error: CoreError | None = None
        self.started = False
        self.token = trio.lowlevel.current_trio_token()

    def add_block(self, memory: Memory, unit: int) -> int:
        self.units.append(unit)
        return len(self.units) - 1

    def set_present(self, block: int, present: Bitmap) -> None:
        self.present[block] = present

    def block_pages(self, block: int) -> int:
        return (block + 1) * PAGES

    def set_received(self, block: int, received: Bitmap) -> None:
        assert not self.fds  # the core says EBUSY
        self.received[block] = received

    def start(self) -> None:
        self.started = True

    def release(self, block: int, first_page: int, placed: Bitmap) -> None:
        if self.release_error is not None:
            raise self.release_error
        for first, count in placed.runs():
            self.gone.setdefault(block, Bitmap(self.block_pages(block))).set_range(first_page + first, count)
        trio.from_thread.run_sync(self._changed, trio_token=self.token)

    def _changed(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def until_gone(self, blocks: int) -> None:
        """Until something of so many blocks was released."""
        with trio.fail_after(20):
            while len(self.gone) < blocks:
                await self.changed.wait()

    def released(self, block: int) -> Bitmap:
        return self.gone.get(block, Bitmap(self.block_pages(block)))

    discarded = released

    def statistics(self) -> PageServerStatistics:
        return PageServerStatistics(*range(10))


class FakeChannelSet(ChannelSet):
    def __init__(self, take: Callable[[], dict[ChannelKey, FdHolder]]) -> None:
        self._take = take

    async def channels(self, shards: int, bulk_channels: int) -> dict[ChannelKey, FdHolder]:
        await trio.lowlevel.checkpoint()
        assert (shards, bulk_channels) == (2, 1)
        return self._take()


class Meeting:
    """Where two sides that have lost each other wait for each other; or one of them for a hand-made peer."""

    def __init__(self) -> None:
        self.open = trio.Event()
        self.refusal: PeerError | None = None
        self.epoch = 0
        self._waiting: list[trio.MemorySendChannel[socket.socket]] = []

    def refuse(self, refusal: PeerError) -> None:
        """From now on, and to whoever waits already."""
        self.refusal = refusal
        for send in self._waiting:
            send.close()

    async def join(self) -> socket.socket:
        await self.open.wait()
        if self.refusal is not None:
            raise self.refusal
        if self._waiting:
            here, there = socket.socketpair()
            self.epoch += 1
            self._waiting.pop().send_nowait(there)
            return here
        send, receive = trio.open_memory_channel[socket.socket](1)
        self._waiting.append(send)
        try:
            return await receive.receive()
        except trio.EndOfChannel:
            assert self.refusal is not None
            raise self.refusal from None
        except trio.Cancelled:
            with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
                receive.receive_nowait().close()  # which came in this very moment
            raise
        finally:
            if send in self._waiting:
                self._waiting.remove(send)


class FakeReconnector(Reconnector):
    def __init__(self, meeting: Meeting, session: Session) -> None:
        super().__init__()
        self._meeting = meeting
        self._session = session

    async def next_link(self) -> tuple[Link, Session]:
        control = await self._meeting.join()
        return FakeLink(control, self._meeting), replace(self._session, epoch=self._meeting.epoch)

    async def superseded(self) -> None:
        await trio.sleep_forever()


class FakeLink(Link):
    """A real connection for control; data channels are sockets of which the other end is closed."""

    def __init__(self, control: socket.socket, meeting: Meeting | None = None) -> None:
        super().__init__(trio.SocketStream(trio.socket.from_stdlib_socket(control)), Address("fake", 1))
        self.session: Session | None = None
        self.meeting = meeting or Meeting()

    @contextlib.contextmanager
    def reconnector(self, session: Session) -> Iterator[Reconnector]:
        yield FakeReconnector(self.meeting, session)

    @contextlib.contextmanager
    def channel_set(self, session: Session) -> Iterator[ChannelSet]:
        self.session = session

        def take() -> dict[ChannelKey, FdHolder]:
            result = {}
            for key in (("urgent", 0), ("urgent", 1), ("bulk", 0)):
                here, there = socket.socketpair()
                there.close()
                result[key] = FdHolder(here.detach())
            return result

        yield FakeChannelSet(take)


@dataclass
class Pair:
    """Both sides on one machine's two halves, and what they ran on."""

    source: SourceMigration
    dest: DestinationMigration
    machine: FakeMachine
    twin: FakeMachine
    pager: FakePager
    servers: list[FakeServer]
    meeting: Meeting
    go: trio.Event = field(default_factory=trio.Event)
    stop_source: trio.Event = field(default_factory=trio.Event)
    stop_dest: trio.Event = field(default_factory=trio.Event)
    owners: list[tuple[bool, bool]] = field(default_factory=list)
    changed: trio.Event = field(default_factory=trio.Event)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.changed.wait()

    def look(self) -> None:
        assert not (self.source.may_run and self.dest.may_run)
        running = [side for side in (self.machine, self.twin) if side.state is MachineState.RUNNING]
        assert len(running) <= 1
        if self.machine.network_log or self.twin.network_log:
            assert not self.source.may_run  # it answers there until it is another's
        self.changed.set()
        self.changed = trio.Event()


def make_pair(
    make_machine: Callable[..., Machine] | None = None,
    controls: tuple[socket.socket, socket.socket] | None = None,
    release_ram: bool = False,
) -> Pair:
    here, there = controls or socket.socketpair()
    machine, twin, pager, meeting = FakeMachine(), FakeMachine(), FakePager(), Meeting()
    machine.state = MachineState.RUNNING
    servers: list[FakeServer] = []

    def make_server(bandwidth: int) -> PageServer:
        servers.append(FakeServer(bandwidth))
        return cast(PageServer, servers[-1])

    def make_twin(
        kind: str, config: Mapping[str, Any], layout: Sequence[BlockLayout], backing: str, **on_this_host: str | None
    ) -> Machine:
        assert (kind, config) == ("fake", {"colour": "blue"})
        assert [block.size_bytes for block in layout] == [PAGES * UNIT, 2 * PAGES * UNIT]
        return twin

    pair: Pair

    def look() -> None:
        pair.look()

    pair = Pair(
        SourceMigration(
            machine,
            FakeLink(here, meeting),
            SourceOptions(bulk_channels=1, release_ram=release_ram),
            make_server=make_server,
            on_change=look,
        ),
        DestinationMigration(
            FakeLink(there, meeting),
            make_machine=make_machine or make_twin,
            make_pager=lambda: cast(Pager, pager),
            on_change=look,
        ),
        machine,
        twin,
        pager,
        servers,
        meeting,
    )
    return pair


@contextlib.asynccontextmanager
async def running(pair: Pair) -> AsyncIterator[Pair]:
    """Both sides at work; at the end of the block both must have come to an end by themselves."""
    try:
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.source.run, pair.go, pair.stop_source)
                nursery.start_soon(pair.dest.run, pair.stop_dest)
                yield pair
    finally:
        await pair.dest.close()
        await pair.machine.close()
        if not pair.twin.closed:
            await pair.twin.close()


def assert_back_at_source(pair: Pair) -> None:
    assert pair.source.state is State.ABORTED
    assert pair.dest.state is State.ABORTED
    assert pair.source.may_run
    assert not pair.dest.may_run
    assert pair.machine.state is MachineState.RUNNING
    assert pair.twin.resumed == 0
    assert pair.machine.network_log == pair.twin.network_log == []


async def test_the_whole_way() -> None:
    async with running(make_pair()) as pair:
        await pair.until(lambda: pair.source.state is State.READY)
        assert pair.machine.state is MachineState.RUNNING
        pair.go.set()
        await pair.until(lambda: pair.dest.state is State.POSTCOPY)
        assert pair.servers[0].started
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is State.COMPLETED
    assert pair.dest.state is State.COMPLETED
    assert pair.source.failure is None
    assert pair.dest.failure is None
    assert pair.machine.statistics().state is MachineState.PAUSED
    assert pair.machine.resumed == 0
    assert pair.twin.loaded == b"registers"
    assert pair.twin.resumed == 1
    assert pair.machine.network_log == ["released"]
    assert pair.twin.network_log == ["claimed"]
    assert pair.servers[0].units == [UNIT, UNIT]
    assert set(pair.servers[0].fds) == {("urgent", 0), ("urgent", 1), ("bulk", 0)}
    assert pair.pager.armed == [(0, 0, 0, PAGES), (1, 1, 0, 2 * PAGES)]
    assert {block: zero.count() for block, zero in pair.pager.zero.items()} == {0: PAGES, 1: 2 * PAGES}
    assert pair.pager.log == ["thread 1 is vcpu 0", "disarmed", "closed"]
    assert pair.source.figures == replace(pair.dest.figures())
    assert pair.source.downtime_ns == pair.dest.downtime_ns > 0
    assert pair.dest.total_ns >= pair.dest.downtime_ns


async def test_what_was_not_pushed_is_asked_for() -> None:
    async with running(make_pair()) as pair:
        pair.go.set()
        await pair.until(lambda: pair.dest.state is State.POSTCOPY)
        pair.pager.channel.tell(EventType.BULK_END, ChannelKind.BULK, 0)
    assert pair.pager.requested == 1
    assert pair.dest.state is State.COMPLETED


async def test_destination_has_no_room() -> None:
    def refuse(*_: object, **__: object) -> Machine:
        raise ResourceError("no memory left", "buy some")

    async with running(make_pair(refuse)) as pair:
        pass
    assert_back_at_source(pair)
    assert str(pair.source.failure) == "the destination declined: no memory left (remedy: buy some)"
    assert str(pair.dest.failure) == "no memory left (remedy: buy some)"


@pytest.mark.parametrize("error", [ProtocolError("damaged"), ResourceError("no such CPU"), OSError(12, "no memory")])
async def test_state_is_refused(error: Exception) -> None:
    pair = make_pair()
    pair.twin.refuses = error
    async with running(pair):
        pair.go.set()
    assert_back_at_source(pair)
    assert pair.machine.resumed == 1
    assert str(pair.source.failure).startswith("the destination aborted: ")
    assert str(error) in str(pair.source.failure)


@pytest.mark.parametrize("who", ["source", "dest"])
@pytest.mark.parametrize("when", [State.OFFERED, State.READY])
@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_interrupted_before_commit(who: str, when: State, how: str) -> None:
    async with running(make_pair()) as pair:
        await pair.until(lambda: pair.source.state is when)
        if how == "cancel":
            assert (pair.source if who == "source" else pair.dest).cancellable
            (pair.source if who == "source" else pair.dest).cancel()
        else:
            (pair.stop_source if who == "source" else pair.stop_dest).set()
    assert_back_at_source(pair)
    other, me = (pair.dest, pair.source) if who == "source" else (pair.source, pair.dest)
    assert me.status == "cancelled"
    assert other.status == "failed"
    assert f"{'interrupted' if how == 'stop' else 'cancelled'} at the" in str(other.failure)


async def cancelled_after(who: str, moment: int) -> Pair:
    """A migration that one side cancels so many steps of the scheduler after the machine may be paused, at its end."""
    pair = make_pair()
    pair.meeting.open.set()  # whoever is lost is found again

    async def bring_all_pages() -> None:
        await pair.until(lambda: pair.dest.state in (State.POSTCOPY, State.ABORTED))
        pair.pager.channel.tell(EventType.COMPLETE)

    async with running(pair), trio.open_nursery() as nursery:
        nursery.start_soon(bring_all_pages)
        await pair.until(lambda: pair.source.state is State.READY)
        pair.go.set()
        for _ in range(moment):
            await trio.lowlevel.checkpoint()
        (pair.source if who == "source" else pair.dest).cancel()
        await pair.until(lambda: pair.source.state in (State.COMPLETED, State.ABORTED))
        nursery.cancel_scope.cancel()
        pair.meeting.refuse(p.EndedElsewhere(p.Ended.ABORTED))  # to one that is in doubt and asks
    return pair


@pytest.mark.parametrize("who", ["source", "dest"])
async def test_cancelled_at_any_moment(who: str) -> None:
    """Also in the very moment of the decision: the machine is then at the one side or at the other one, with all its
    pages. A `stop` would end this side in any case."""
    ends = set()
    for moment in range(0, 120, 2):
        pair = await cancelled_after(who, moment)
        assert pair.source.state is pair.dest.state
        ends.add(pair.source.state)
        if pair.source.state is State.ABORTED:
            assert_back_at_source(pair)
        else:
            assert pair.twin.resumed == 1
            assert pair.machine.resumed == 0
    assert ends == {State.COMPLETED, State.ABORTED}  # the moments were on both sides of the decision


@pytest.mark.parametrize("who", ["source", "dest"])
async def test_data_channel_lost_before_commit(who: str) -> None:
    async with running(make_pair()) as pair:
        await pair.until(lambda: pair.source.state is State.READY)
        engine: FakeEngine = pair.servers[0] if who == "source" else pair.pager
        engine.channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 1, "reset by peer")
    assert_back_at_source(pair)
    for side in (pair.source, pair.dest):
        assert "data channel lost: urgent 1 (reset by peer)" in str(side.failure)


@pytest.mark.parametrize("who", ["source", "dest"])
async def test_data_channel_lost_after_commit(who: str) -> None:
    """Both pause, keep everything and wait; the machine stays at the destination."""
    async with running(make_pair()) as pair:
        pair.go.set()
        await pair.until(lambda: pair.source.state is State.POSTCOPY)
        engine: FakeEngine = pair.servers[0] if who == "source" else pair.pager
        engine.channel.tell(EventType.CHANNEL_DOWN, ChannelKind.BULK, 0)
        await pair.source.paused.wait()
        await pair.dest.paused.wait()
        assert (pair.twin.state, pair.machine.state) == (MachineState.RUNNING, MachineState.PAUSED)
        assert pair.source.status == pair.dest.status == "postcopy-paused"
        assert "closed" not in pair.pager.log + pair.servers[0].log
        assert not pair.source.may_run
        pair.stop_source.set()
        pair.stop_dest.set()
    assert pair.machine.resumed == 0
    assert not pair.source.may_run


async def test_machine_goes_before_a_pager_with_missing_pages() -> None:
    pair = make_pair()
    pair.twin.log = pair.pager.log
    async with running(pair):
        pair.go.set()
        await pair.until(lambda: pair.source.state is State.POSTCOPY)
        pair.stop_dest.set()
        await pair.source.paused.wait()
        pair.stop_source.set()
    # And once more after it: a vCPU that was blocked on a page is free only now.
    assert pair.pager.log[-3:] == ["machine closed", "closed", "machine closed"]


@pytest.mark.parametrize("times", [1, 5])
async def test_lost_and_found(times: int) -> None:
    """Both go on by themselves, as often as it takes; the source hears what has arrived."""

    def recovered(count: int) -> bool:
        return pair.source.recoveries.count == pair.dest.recoveries.count == count

    async with running(make_pair()) as pair:
        pair.go.set()
        await pair.until(lambda: pair.source.state is State.POSTCOPY)
        for number in range(times):
            pair.servers[0].channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 0, "reset")
            await pair.until(lambda: pair.source.status == pair.dest.status == "postcopy-paused")
            assert not pair.source.may_run
            assert pair.dest.may_run
            pair.meeting.open.set()
            await pair.until(partial(recovered, number + 1))
            pair.meeting.open = trio.Event()
            assert set(pair.pager.fds) == set(pair.servers[0].fds) == {("urgent", 0), ("urgent", 1), ("bulk", 0)}
            assert pair.source.state is pair.dest.state is State.POSTCOPY
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is pair.dest.state is State.COMPLETED
    assert pair.source.failure is None
    assert pair.dest.failure is None
    assert {block: map_.count() for block, map_ in pair.servers[0].received.items()} == {0: 5, 1: 5}
    assert pair.twin.resumed == 1
    assert pair.machine.resumed == 0


async def test_complete_that_nobody_hears(autojump_clock: MockClock) -> None:
    """A machine that has every page does not depend on its source any more, whatever that knows."""
    autojump_clock.autojump_threshold = 0.05
    async with running(make_pair()) as pair:
        pair.go.set()
        await pair.until(lambda: pair.source.state is State.POSTCOPY)
        pair.pager.channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 0, "reset")
        pair.pager.channel.tell(EventType.COMPLETE)
        await pair.until(lambda: pair.source.status == pair.dest.status == "postcopy-paused")
        pair.stop_source.set()
        pair.meeting.open.set()  # and nobody there

        async def complete() -> None:
            peer = Peer(await pair.meeting.join())
            await peer.read(p.Recover)
            await peer.say(p.Recovered())
            await peer.read(p.Complete)
            pair.meeting.open = trio.Event()
            await trio.aclose_forcefully(peer.stream)

        await complete()
    assert pair.dest.state is State.COMPLETED
    assert pair.dest.failure is None
    assert pair.twin.state is MachineState.RUNNING


async def test_complete_while_the_network_is_away() -> None:
    """The last page came with the cut: the destination has nothing to wait for but to say so."""
    async with running(make_pair()) as pair:
        pair.go.set()
        await pair.until(lambda: pair.source.state is State.POSTCOPY)
        pair.pager.channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 0, "reset")
        pair.pager.channel.tell(EventType.COMPLETE)
        pair.meeting.open.set()
    assert pair.source.state is pair.dest.state is State.COMPLETED


@pytest.mark.parametrize("who", ["source", "dest"])
async def test_what_cannot_go_on_is_not_tried_again(who: str) -> None:
    async with running(make_pair()) as pair:
        pair.go.set()
        await pair.until(lambda: pair.source.state is State.POSTCOPY)
        engine: FakeEngine = pair.servers[0] if who == "source" else pair.pager
        engine.channel.tell(EventType.FATAL, text="out of everything")
        lost, other = (pair.source, pair.dest) if who == "source" else (pair.dest, pair.source)
        await pair.until(lambda: lost.status == "postcopy-failed" and other.status == "postcopy-paused")
        pair.meeting.open.set()
        assert "out of everything" in str(lost.failure)
        assert lost.recoveries.count == 0
        pair.stop_source.set()
        pair.stop_dest.set()


async def test_request_that_is_never_answered(mock_clock: MockClock) -> None:
    """A data connection that is dead behind a control connection that lives."""
    async with running(make_pair()) as pair:
        pair.go.set()
        await pair.until(lambda: pair.source.state is State.POSTCOPY)
        pair.pager.oldest_pending_ns = 1 << 62
        with trio.fail_after(50):
            mock_clock.rate = 5
            await pair.until(lambda: pair.dest.status == "postcopy-paused")
        mock_clock.rate = 0
        assert "has not been answered" in str(pair.dest.failure)
        pair.pager.oldest_pending_ns = 0
        pair.meeting.open.set()
        await pair.until(lambda: pair.dest.recoveries.count == 1)
        pair.pager.channel.tell(EventType.COMPLETE)


ENDS = (State.COMPLETED, State.ABORTED)


class Cable:
    """Carries the first control connection, and breaks when `limit` bytes have gone one way."""

    def __init__(self, direction: str, limit: int | None) -> None:
        self.ends = [socket.socketpair() for _ in range(2)]
        self.scope = trio.CancelScope()
        self.passed = {"to-dest": 0, "to-source": 0}
        self._limits = {direction: limit}

    async def run(self) -> None:
        left, right = (trio.SocketStream(trio.socket.from_stdlib_socket(inner)) for _, inner in self.ends)
        async with left, right:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._carry, left, right, "to-dest")
                    nursery.start_soon(self._carry, right, left, "to-source")

    async def _carry(self, source: trio.SocketStream, sink: trio.SocketStream, direction: str) -> None:
        limit = self._limits.get(direction)
        try:
            while data := await source.receive_some(4096):
                if limit is not None and self.passed[direction] + len(data) > limit:
                    await sink.send_all(data[: limit - self.passed[direction]])
                    self.scope.cancel()
                    return
                await sink.send_all(data)
                self.passed[direction] += len(data)
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.scope.cancel()


async def over_a_cable(direction: str, limit: int | None) -> tuple[Pair, Cable]:
    """A whole migration; whoever comes back to one that is over is told so, as a listener would."""
    cable = Cable(direction, limit)
    pair = make_pair(controls=(cable.ends[0][0], cable.ends[1][0]))
    pair.meeting.open.set()
    pair.go.set()

    async def last_page() -> None:
        await pair.until(lambda: pair.dest.state is State.POSTCOPY)
        pair.pager.channel.tell(EventType.COMPLETE)

    def over() -> bool:
        if pair.source.state in ENDS:
            pair.meeting.refuse(p.EndedElsewhere(p.Ended.ABORTED))
        return pair.source.state in ENDS and pair.dest.state in ENDS

    async with running(pair), trio.open_nursery() as nursery:
        nursery.start_soon(cable.run)
        nursery.start_soon(last_page)
        await pair.until(over)
        nursery.cancel_scope.cancel()
    return pair, cable


@pytest.mark.parametrize("direction", ["to-dest", "to-source"])
async def test_cut_everywhere(direction: str) -> None:
    """The first connection breaks at any byte, in the middle of a message or between two: one side has the machine, and
    runs it; behind the point of no return everything comes all the same."""
    pair, cable = await over_a_cable(direction, None)
    assert pair.source.state is pair.dest.state is State.COMPLETED
    ends = []
    for limit in range(cable.passed[direction]):
        pair, _ = await over_a_cable(direction, limit)
        assert pair.source.state is pair.dest.state, limit
        here, there = pair.machine.state is MachineState.RUNNING, pair.twin.resumed == 1
        assert (here, there) == ((True, False) if pair.source.state is State.ABORTED else (False, True)), limit
        assert pair.source.may_run == here
        assert pair.machine.network_log == ([] if here else ["released"]), limit
        assert pair.twin.network_log == ([] if here else ["claimed"]), limit
        ends.append(pair.source.state)
    moment = ends.index(State.COMPLETED)
    assert moment > 10
    assert set(ends[:moment]) == {State.ABORTED}
    assert set(ends[moment:]) == {State.COMPLETED}


class Peer:
    """A hand-made other side."""

    def __init__(self, side: socket.socket) -> None:
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(side))
        self._buffer = b""

    async def read(self, kind: type[p.Message]) -> p.Message:
        while True:
            size = p.HEADER_BYTES + int.from_bytes(self._buffer[:4], "big")
            if len(self._buffer) >= max(size, p.HEADER_BYTES + 1):
                message = p.decode(self._buffer[p.HEADER_BYTES : size])
                self._buffer = self._buffer[size:]
                if isinstance(message, kind):
                    return message
                assert isinstance(message, p.Ping | p.Pong | p.PageMap | p.ReceivedMap), message
                continue
            data = await self.stream.receive_some()
            assert data
            self._buffer += data

    async def say(self, message: p.Message) -> None:
        await self.stream.send_all(p.encode(message))


@contextlib.asynccontextmanager
async def lone_source(
    meeting: Meeting | None = None, server: FakeServer | None = None
) -> AsyncIterator[tuple[Peer, SourceMigration, FakeMachine]]:
    """With a `server` of the caller's: one that gives memory back."""
    here, there = socket.socketpair()
    machine = FakeMachine()
    machine.state = MachineState.RUNNING
    source = SourceMigration(
        machine,
        FakeLink(here, meeting),
        SourceOptions(bulk_channels=1, release_ram=server is not None),
        make_server=lambda bandwidth: cast(PageServer, server or FakeServer(bandwidth)),
    )
    peer, stop, go = Peer(there), trio.Event(), trio.Event()
    go.set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.run, go, stop)
        await peer.read(p.Offer)
        await peer.say(p.Accept((UNIT, UNIT), 2, 1))
        await peer.say(p.Ready())
        await peer.read(p.Switchover)
        assert machine.state is MachineState.PAUSED
        yield peer, source, machine
        stop.set()
    await peer.stream.aclose()
    await machine.close()


async def test_destination_that_dies_in_the_switchover() -> None:
    async with lone_source() as (peer, source, machine):
        await trio.aclose_forcefully(peer.stream)
        with trio.fail_after(1):
            await machine.runs_again.wait()  # at once: its users are waiting
    assert source.state is State.ABORTED
    assert "destination closed the control connection" in str(source.failure)


async def test_destination_that_never_answers(mock_clock: MockClock) -> None:
    async with lone_source() as (peer, source, machine):
        # Not before: time must not jump while a worker thread looks at the memory.
        mock_clock.autojump_threshold = 0.1
        began = trio.current_time()

        async def keep_talking() -> None:  # it lives, it only never gets ready
            while True:
                with contextlib.suppress(trio.BrokenResourceError):
                    await peer.say(p.Ping(1))
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_talking)
            await machine.runs_again.wait()
            nursery.cancel_scope.cancel()
        assert trio.current_time() - began <= PREPARE_TIMEOUT_S + 1
    assert str(source.failure) == f"the destination did not say prepared within {PREPARE_TIMEOUT_S:g} s"


async def test_network_that_swallows_everything(mock_clock: MockClock) -> None:
    async with lone_source() as (_, source, machine):
        mock_clock.autojump_threshold = 0.1
        await machine.runs_again.wait()
    assert isinstance(source.failure, PeerError)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (p.Running(1), "running must not be received by the source in state handed"),
        (p.Complete({}), "complete must not be received"),
        (p.Ready(), "ready must not be received"),
    ],
)
async def test_destination_that_is_ahead_of_itself(message: p.Message, reason: str) -> None:
    async with lone_source() as (peer, source, machine):
        await peer.say(message)
        told = await peer.read(p.Abort)
        assert isinstance(told, p.Abort)
        assert reason in told.reason
        assert machine.state is MachineState.RUNNING
    assert reason in str(source.failure)


@contextlib.asynccontextmanager
async def lone_destination(
    on_end: Callable[[], None] = lambda: None,
    meeting: Meeting | None = None,
    placed_every_ms: int = 0,
) -> AsyncIterator[tuple[Peer, DestinationMigration, FakeMachine]]:
    here, there = socket.socketpair()
    twin, pager = FakeMachine(), FakePager()
    dest = DestinationMigration(
        FakeLink(here, meeting), make_machine=lambda *_, **__: twin, make_pager=lambda: cast(Pager, pager)
    )
    peer, stop = Peer(there), trio.Event()
    blocks = tuple(p.Block(block.name, block.size_bytes, block.page_bytes) for block in twin.layout)
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            await dest.run(stop)
            on_end()

        nursery.start_soon(run)
        await peer.say(p.Offer(b"m" * 16, b"t" * 16, "fake", {}, blocks, 1, placed_every_ms))
        await peer.read(p.Accept)
        await peer.read(p.Ready)
        yield peer, dest, twin
        stop.set()
    await peer.stream.aclose()
    await dest.close()


FULL = [p.PageMap(0, 0, PAGES, b""), p.PageMap(1, 0, 2 * PAGES, b"")]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([p.PageMap(2, 0, 1, b"")], "there is no block 2"),
        ([p.PageMap(0, 1, 1, b"")], "goes on at page 1, not at 0"),
        ([p.PageMap(0, 0, 10, b""), p.PageMap(0, 0, 10, b"")], "goes on at page 0, not at 10"),
        ([p.PageMap(0, 0, PAGES + 1, b"")], "has 40 pages only"),
        ([p.PageMap(0, 0, PAGES, b"\xff\xff\xff")], "malformed page map"),
        ([FULL[0], p.Switchover(b"", 1)], "the page map of block 1 ends at 0"),
        ([*FULL, p.Switchover(b"", 3)], "speaks of 3 page maps, 2 came"),
        ([p.Commit()], "commit must not be received by the destination in state ready"),
        ([*FULL, p.Commit()], "commit must not be received by the destination in state switchover"),
    ],
)
async def test_source_that_makes_no_sense(messages: list[p.Message], reason: str) -> None:
    async with lone_destination() as (peer, dest, twin):
        for message in messages:
            await peer.say(message)
        told = await peer.read(p.Abort)
        assert isinstance(told, p.Abort)
        assert reason in told.reason
    assert reason in str(dest.failure)
    assert twin.resumed == 0
    assert not dest.may_run


async def prepared(peer: Peer) -> None:
    for message in [*FULL, p.Switchover(b"state", 2)]:
        await peer.say(message)
    await peer.read(p.Prepared)


async def test_source_that_never_decided() -> None:
    """Lost between `prepared` and `commit`: the machine does not run until the source has been asked, and never when it
    answers that it knows of nothing."""
    ended, meeting = trio.Event(), Meeting()
    async with lone_destination(ended.set, meeting) as (peer, dest, twin):
        await prepared(peer)
        await trio.aclose_forcefully(peer.stream)
        await dest.paused.wait()
        assert dest.status == "in-doubt"
        assert not dest.may_run
        meeting.refusal = p.EndedElsewhere(p.Ended.ABORTED)
        meeting.open.set()
        with trio.fail_after(10):
            await ended.wait()
    assert dest.state is State.ABORTED
    assert twin.resumed == 0
    assert isinstance(dest.failure, PeerError)


async def test_interrupted_in_doubt() -> None:
    async with lone_destination() as (peer, dest, twin):
        await prepared(peer)
        await trio.aclose_forcefully(peer.stream)
        await dest.paused.wait()
    assert dest.state is State.ABORTED
    assert twin.resumed == 0


async def test_commit_that_was_lost() -> None:
    """The source had decided, and the destination hears of it on the next connection, or the one after."""
    meeting = Meeting()
    meeting.open.set()
    async with lone_destination(meeting=meeting) as (peer, dest, twin):
        await prepared(peer)
        await trio.aclose_forcefully(peer.stream)
        again = Peer(await meeting.join())
        await again.read(p.Recover)
        assert not dest.may_run
        await trio.aclose_forcefully(again.stream)  # once more
        again = Peer(await meeting.join())
        told = await again.read(p.Recover)
        assert isinstance(told, p.Recover)
        assert (told.resume_ns, told.maps) == (0, 2)
        assert twin.resumed == 0
        await again.say(p.Recovered())
        await again.read(p.Running)
        assert twin.resumed == 1
        await again.stream.aclose()


def recover(resume_ns: int) -> list[p.Message]:
    """What a destination says that has five pages of the first block."""
    first = Bitmap(PAGES)
    first.set_range(3, 5)
    maps = [first, Bitmap(2 * PAGES)]
    digest = maps[1].crc32c(maps[0].crc32c())
    parts = [p.ReceivedMap(number, 0, len(map_), map_.rle_encode()) for number, map_ in enumerate(maps)]
    return [*parts, p.Recover(resume_ns, 2, digest)]


@pytest.mark.parametrize("ran", [False, True])
async def test_destination_that_comes_back(ran: bool) -> None:
    meeting = Meeting()
    meeting.open.set()
    async with lone_source(meeting) as (peer, source, machine):
        await peer.say(p.Prepared())
        await peer.read(p.Commit)
        await trio.aclose_forcefully(peer.stream)  # whether it has heard `commit` the source cannot know
        await source.paused.wait()
        assert machine.state is MachineState.PAUSED
        again = Peer(await meeting.join())
        for message in recover(1234 if ran else 0):
            await again.say(message)
        await again.read(p.Recovered)
        if not ran:
            await again.say(p.Running(1234))
        await again.say(p.Complete({}))
        await again.read(p.CompleteAck)
        await again.stream.aclose()
    assert source.state is State.COMPLETED
    assert source.recoveries.count == 1
    assert source.downtime_ns > 0
    assert machine.resumed == 0


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([p.ReceivedMap(2, 0, 1, b"")], "there is no block 2"),
        (recover(0)[:1] + recover(0)[2:], "speaks of 2 page maps, 1 came"),
        ([*recover(0)[:2], p.Recover(0, 2, 1)], "do not have the digest that was told"),
        ([p.Running(1)], "running must not be received by the source in state recover"),
        ([p.Commit()], "commit must not be received by the source in state recover"),
    ],
)
async def test_destination_that_comes_back_with_nonsense(messages: list[p.Message], reason: str) -> None:
    """It is shown out, the machine's memory is kept, and the next one that makes sense is served."""
    meeting = Meeting()
    meeting.open.set()
    async with lone_source(meeting) as (peer, source, machine):
        await peer.say(p.Prepared())
        await peer.read(p.Commit)
        await trio.aclose_forcefully(peer.stream)
        for bad in (True, False):
            again = Peer(await meeting.join())
            for message in messages if bad else recover(5):
                await again.say(message)
            if bad:
                while await again.stream.receive_some():
                    pass
                assert reason in str(source.failure)
                assert source.state is State.PAUSED
            else:
                await again.read(p.Recovered)
                await again.say(p.Complete({}))
                await again.read(p.CompleteAck)
            await again.stream.aclose()
    assert source.state is State.COMPLETED
    assert machine.resumed == 0


# ---- a source that gives its memory back


def bits(pages: int, *runs: tuple[int, int]) -> Bitmap:
    bitmap = Bitmap(pages)
    for first, count in runs:
        bitmap.set_range(first, count)
    return bitmap


@pytest.mark.parametrize("wanted", [True, False])
async def test_destination_tells_what_has_arrived(wanted: bool) -> None:
    """Once, only what the source does not know already, and only where the source has asked."""
    async with lone_destination(placed_every_ms=200 * wanted) as (peer, dest, _):
        # The first page of block 0 is known to be zero; the pager has five pages of each from the block's number on.
        await peer.say(p.PageMap(0, 0, PAGES, bits(PAGES, (1, PAGES - 1)).rle_encode()))
        await peer.say(p.PageMap(1, 0, 2 * PAGES, Bitmap.full(2 * PAGES).rle_encode()))
        await peer.say(p.Switchover(b"state", 2))
        await peer.read(p.Prepared)
        await peer.say(p.Commit())
        await peer.read(p.Running)
        if wanted:
            for block, pages, runs in ((0, PAGES, (1, 4)), (1, 2 * PAGES, (1, 5))):
                told = await peer.read(p.Placed)
                assert isinstance(told, p.Placed)
                assert told.block == block
                placed = Bitmap.rle_decode(told.runs, told.pages)
                assert [(told.first_page + first, count) for first, count in placed.runs()] == [runs]
                assert told.first_page + told.pages <= pages
        for _ in range(2):  # nothing is told twice: `read` takes pings only
            await peer.read(p.Ping)
            await peer.say(p.Ping(1))
        assert dest.state is State.POSTCOPY


async def test_released_as_acknowledged() -> None:
    """The whole way with both sides: what the destination has is freed, a moment later, and then all of it."""
    pair = make_pair(release_ram=True)
    pair.machine.memories[0].write(0, b"x" * PAGES * UNIT)
    pair.machine.memories[1].write(0, b"x" * 2 * PAGES * UNIT)
    async with running(pair):
        pair.go.set()
        await pair.until(lambda: pair.source.state is State.POSTCOPY)
        server = pair.servers[0]
        await server.until_gone(2)
        assert server.gone == {0: bits(PAGES, (0, 5)), 1: bits(2 * PAGES, (1, 5))}
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is State.COMPLETED
    assert server.gone == {0: Bitmap.full(PAGES), 1: Bitmap.full(2 * PAGES)}
    assert server.log == ["disconnected", "closed"]
    assert [kept.count() for kept in pair.source.kept()] == [0, 0]


async def test_lost_acknowledgement_is_told_by_the_recovery() -> None:
    pair = make_pair(release_ram=True)
    pair.machine.memories[0].write(0, b"x" * PAGES * UNIT)
    pair.machine.memories[1].write(0, b"x" * 2 * PAGES * UNIT)
    async with running(pair):
        pair.go.set()
        await pair.until(lambda: pair.source.state is State.POSTCOPY)
        server = pair.servers[0]
        server.channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 0, "reset")
        await pair.until(lambda: pair.source.status == pair.dest.status == "postcopy-paused")
        assert not server.gone  # nothing was acknowledged in time
        pair.meeting.open.set()
        await server.until_gone(2)
        # All that the pager has; zero pages are among what the page map had told.
        assert server.gone == {0: bits(PAGES, (0, 5)), 1: bits(2 * PAGES, (1, 5))}
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is pair.dest.state is State.COMPLETED


@pytest.mark.parametrize("keeps_its_word", [True, False])
async def test_recovery_after_release(keeps_its_word: bool) -> None:
    """A destination that comes back without what it had acknowledged is refused by name, once and for all: what was
    given back is nowhere. One that has it is served."""
    meeting, server = Meeting(), FakeServer(0)
    meeting.open.set()
    async with lone_source(meeting, server) as (peer, source, machine):
        await peer.say(p.Prepared())
        await peer.read(p.Commit)
        await peer.say(p.Running(5))
        first = 3 if keeps_its_word else 2
        await peer.say(p.Placed(0, first, 5, bits(5, (0, 5)).rle_encode()))
        await server.until_gone(1)
        assert server.gone == {0: bits(PAGES, (first, 5))}
        await trio.aclose_forcefully(peer.stream)
        await source.paused.wait()
        for attempt in range(3 if keeps_its_word else 1):
            again = Peer(await meeting.join())
            for message in recover(5):  # which has pages 3 to 7
                await again.say(message)
            if keeps_its_word:
                await again.read(p.Recovered)
                if attempt == 2:
                    await again.say(p.Complete({}))
                    await again.read(p.CompleteAck)
                await again.stream.aclose()
                continue
            while await again.stream.receive_some():
                pass
            assert source.state is State.PAUSED
            assert "the received map of block 0 lacks 1 pages that were acknowledged as placed" in str(source.failure)
            assert "the first of them page 2" in str(source.failure)
            assert not server.received
            await again.stream.aclose()
            with trio.fail_after(10):
                await source._until(lambda: source.status == "postcopy-failed")
    assert source.state is (State.COMPLETED if keeps_its_word else State.PAUSED)
    assert machine.resumed == 0
    if not keeps_its_word:
        assert source.kept() == [bits(PAGES, (2, 5)).inverted(), Bitmap.full(2 * PAGES)]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (p.Placed(2, 0, 1, b"\x00\x01"), "placed: there is no block 2"),
        (p.Placed(0, PAGES, 1, b"\x00\x01"), "placed: block 0 has 40 pages only"),
        (p.Placed(0, 2**63 - 1, 1, b"\x00\x01"), "placed: block 0 has 40 pages only"),
        (p.Placed(0, 0, 5, b"\x00\x06"), "malformed page map"),
    ],
)
async def test_acknowledgement_of_what_there_is_not(message: p.Message, reason: str) -> None:
    server = FakeServer(0)
    async with lone_source(None, server) as (peer, source, _):
        await peer.say(p.Prepared())
        await peer.read(p.Commit)
        await peer.say(p.Running(5))
        await peer.say(message)
        await source.paused.wait()
        assert reason in str(source.failure)
        assert not server.gone


async def test_memory_that_cannot_be_given_back() -> None:
    """The migration goes on, and the memory is kept."""
    server = FakeServer(0)
    server.release_error = CoreError(1, "giving memory back")
    async with lone_source(None, server) as (peer, source, _):
        await peer.say(p.Prepared())
        await peer.read(p.Commit)
        await peer.say(p.Running(5))
        for _ in range(2):
            await peer.say(p.Placed(0, 0, 5, b"\x00\x05"))
            await peer.read(p.Ping)
        await peer.say(p.Complete({}))
        await peer.read(p.CompleteAck)
    assert source.state is State.COMPLETED
    assert not server.gone


async def test_a_file_is_never_released(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * PAGES * UNIT)
    machine = FakeMachine()
    machine.memories.append(Memory.from_file(image))
    here, there = socket.socketpair()
    with pytest.raises(
        ConfigurationError, match="--release-ram: the memory of a machine of kind fake is a file of yours"
    ):
        SourceMigration(machine, FakeLink(here), SourceOptions(release_ram=True))
    there.close()
    here.close()
    await machine.close()
