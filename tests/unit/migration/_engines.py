# SPDX-License-Identifier: Apache-2.0
"""Source and destination against each other, with everything beneath them replaced; and each against a peer that is
made by hand."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, cast

import trio
import trio.testing

from postcopy import wire as p
from postcopy._fd import FdHolder
from postcopy.dataplane.compression import Compression
from postcopy.dataplane.histogram import Histogram
from postcopy.dataplane.pager import ChannelKind, Event, EventType, Pager, PagerStatistics
from postcopy.dataplane.pageserver import PageServer, PageServerStatistics
from postcopy.errors import CoreError, PeerError
from postcopy.machines import BlockLayout, Check, Machine, MachineState, MachineStatistics, RamBlock
from postcopy.memory import DirtyLog, Memory
from postcopy.memory.bitmap import Bitmap
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.migration.tasks import now_ns
from postcopy.net import Address, ChannelKey, Link, OpenChannels, Reconnector, Session
from postcopy.tls import DataChannel
from postcopy.wire import State

M = TypeVar("M", bound=p.Message)

PAGES = 40


UNIT = 4096


class FakeLog:
    """Of a machine that writes its first page all the time."""

    def __init__(self, machine: FakeMachine) -> None:
        self.machine = machine
        self.closed = False

    def collect(self, index: int) -> Bitmap:
        return bits(self.machine.memories[index].pages, (0, 1))

    def close(self) -> None:
        self.closed = True


class FakeMachine(Machine):
    kind = "fake"
    live = True

    def __init__(self) -> None:
        self.memories = [Memory.create("memfd", PAGES * UNIT), Memory.create("memfd", 2 * PAGES * UNIT)]
        self.state = MachineState.CREATED
        self.loaded: bytes | None = None
        self.refuses: Exception | None = None
        self.runs_again = trio.Event()
        self._changed = trio.Event()
        self.resumed = 0
        self.closed = False
        self.log: list[str] = []
        self.network_log: list[str] = []
        self.logs: list[FakeLog] = []

    def dirty_log(self) -> DirtyLog:
        self.logs.append(FakeLog(self))
        return cast(DirtyLog, self.logs[-1])

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
        return MachineStatistics(self.state, first_run_ns=now_ns() if self.state is MachineState.RUNNING else 0)

    async def verify(self) -> Check:
        return Check(True, "nothing", "not at all")

    async def wait_ready(self) -> None:
        await trio.lowlevel.checkpoint()

    def fail(self) -> None:
        self.state = MachineState.FAILED
        self._changed.set()

    async def wait_changed(self) -> None:
        await self._changed.wait()
        self._changed = trio.Event()

    async def close(self, timeout_s: float = 5.0) -> None:
        self.log.append("machine closed")
        self.closed = True
        for memory in self.memories:
            memory.close()


class FakeEvents:
    def __init__(self) -> None:
        self.send, self.receive = trio.open_memory_channel[Event](100)

        self.complete = False  # nothing is missing, as far as it was told

    def tell(
        self, type_: EventType, kind: ChannelKind = ChannelKind.NONE, channel: int = 0, text: str = "", error: int = 0
    ) -> None:
        self.complete |= type_ is EventType.COMPLETE
        self.send.send_nowait(Event(type_, kind, channel, error, text))


class FakeEngine:
    """What pager and page server have in common."""

    def __init__(self) -> None:
        self.fds: dict[ChannelKey, DataChannel] = {}
        self.channel = FakeEvents()
        self.log: list[str] = []

    def bins(self) -> bytes:
        return b""

    def attach_urgent(self, shard: int, fd: int, busy_poll_us: int = 0, *, tls: Any = None) -> None:
        self.fds["urgent", shard] = DataChannel(FdHolder(fd), tls)

    def attach_bulk(self, channel: int, fd: int, *, tls: Any = None) -> None:
        self.fds["bulk", channel] = DataChannel(FdHolder(fd), tls)

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
    NAME = "pager"
    process = None

    def __init__(self) -> None:
        super().__init__()
        self.zero: dict[int, Bitmap] = {}
        self.armed: list[tuple[int, int, int, int]] = []
        self.accepted = Compression(0)
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
        there = 100 if self.channel.complete else 0
        counted = PagerStatistics(*range(1, 1 + len(fields(PagerStatistics))))
        return replace(counted, oldest_pending_ns=self.oldest_pending_ns, resident_pages=there, total_pages=100)

    async def forget(self, block: int, stale: Bitmap) -> None:
        self.log.append(f"forgot {stale.count()} of block {block}")
        self.channel.complete = False
        await trio.lowlevel.checkpoint()

    def accept_compression(self, ways: Compression) -> None:
        self.accepted = ways

    def expect_push(self) -> None:
        self.log.append("expects a push")

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
    NAME = "page server"

    def __init__(self, bandwidth: int) -> None:
        super().__init__()
        self.units: list[int] = []
        self.present: dict[int, Bitmap] = {}
        self.received: dict[int, Bitmap] = {}
        self.gone: dict[int, Bitmap] = {}
        self.changed = trio.Event()
        self.release_error: CoreError | None = None
        self.pager: FakePager | None = None  # which gets what is pushed
        self.unsent = self.sent = 0
        self.stale: dict[int, Bitmap] = {}
        self.serving = self.started = False
        self.token = trio.lowlevel.current_trio_token()

    def add_block(self, memory: Memory, unit: int) -> int:
        self.units.append(unit)
        return len(self.units) - 1

    def set_present(self, block: int, present: Bitmap) -> None:
        self.present[block] = present
        self.unsent += present.count()

    def block_pages(self, block: int) -> int:
        return (block + 1) * PAGES

    def set_received(self, block: int, received: Bitmap) -> None:
        assert not self.fds  # the core says EBUSY
        self.received[block] = received

    def set_stale(self, block: int, stale: Bitmap) -> None:
        assert not self.serving
        self.stale[block] = stale
        self.unsent += stale.count()

    def push(self) -> None:
        self.log.append("pushes")
        self.sent, self.unsent = self.sent + self.unsent, 0
        for kind, index in self.fds:
            if kind == "bulk":
                self.channel.tell(EventType.BULK_END, ChannelKind.BULK, index)
                if self.pager is not None:
                    self.pager.channel.tell(EventType.BULK_END, ChannelKind.BULK, index)
        if self.pager is not None and self.serving:
            self.pager.channel.tell(EventType.COMPLETE)

    def stop_push(self) -> None:
        self.log.append("stops")

    def serve(self) -> None:
        self.serving = True

    def start(self) -> None:
        self.serving = self.started = True

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
        return replace(PageServerStatistics(*range(len(fields(PageServerStatistics)))), sent_pages=self.sent)


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
    def channel_set(self, session: Session) -> Iterator[OpenChannels]:
        self.session = session
        yield self.open_channels

    async def open_channels(self, shards: int, bulk_channels: int) -> dict[ChannelKey, DataChannel]:
        await trio.lowlevel.checkpoint()
        assert (shards, bulk_channels) == (2, 1)
        result = {}
        for key in (("urgent", 0), ("urgent", 1), ("bulk", 0)):
            here, there = socket.socketpair()
            there.close()
            result[key] = DataChannel(FdHolder(here.detach()))
        return result


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

    async def move(self) -> None:
        """Until the machine runs at the destination, as both sides know."""
        self.go.set()
        await self.until(lambda: self.source.state is State.POSTCOPY)

    def side(self, who: str) -> SourceMigration | DestinationMigration:
        return self.source if who == "source" else self.dest

    def engine(self, who: str) -> FakeEngine:
        return self.servers[0] if who == "source" else self.pager

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
    **options: Any,
) -> Pair:
    """`options`: more of `SourceOptions`."""
    here, there = controls or socket.socketpair()
    machine, twin, pager, meeting = FakeMachine(), FakeMachine(), FakePager(), Meeting()
    machine.state = MachineState.RUNNING
    servers: list[FakeServer] = []

    def make_server(bandwidth: int) -> PageServer:
        servers.append(FakeServer(bandwidth))
        servers[-1].pager = pager
        return cast(PageServer, servers[-1])

    def make_twin(kind: str, config: Mapping[str, Any], layout: Sequence[BlockLayout]) -> Machine:
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
            SourceOptions(bulk_channels=1, release_ram=release_ram, **options),
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


class Peer:
    """A hand-made other side."""

    def __init__(self, side: socket.socket, version: int = p.PROTOCOL_VERSION) -> None:
        self.version = version
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(side))
        self._buffer = b""

    async def read(self, kind: type[M]) -> M:
        while True:
            size = p.HEADER_BYTES + int.from_bytes(self._buffer[:4], "big")
            if len(self._buffer) >= max(size, p.HEADER_BYTES + 1):
                message = p.decode(self._buffer[p.HEADER_BYTES : size], self.version)
                self._buffer = self._buffer[size:]
                if isinstance(message, kind):
                    return message
                if isinstance(message, p.Round):  # as a destination that takes part
                    await self.say(p.RoundDone(message.number))
                elif not isinstance(message, p.StaleMap):
                    assert isinstance(message, p.Ping | p.Pong | p.PageMap | p.ReceivedMap), message
                continue
            data = await self.stream.receive_some()
            assert data
            self._buffer += data

    async def commit(self) -> None:
        """As a destination, up to the source's decision."""
        await self.say(p.Prepared())
        await self.read(p.Commit)

    async def say(self, message: p.Message) -> None:
        await self.stream.send_all(p.encode(message, self.version))


@contextlib.asynccontextmanager
async def lone_source(
    meeting: Meeting | None = None,
    server: FakeServer | None = None,
    until: type[p.Message] = p.Switchover,
    **options: Any,
) -> AsyncIterator[tuple[Peer, SourceMigration, FakeMachine]]:
    """With a `server` of the caller's: one that gives memory back. `until`: what it has said when this begins."""
    here, there = socket.socketpair()
    machine = FakeMachine()
    machine.state = MachineState.RUNNING
    source = SourceMigration(
        machine,
        FakeLink(here, meeting),
        SourceOptions(bulk_channels=1, release_ram=server is not None, **options),
        make_server=lambda bandwidth: cast(PageServer, server or FakeServer(bandwidth)),
    )
    peer, stop, go = Peer(there), trio.Event(), trio.Event()
    go.set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.run, go, stop)
        await peer.read(p.Offer)
        await peer.say(p.Accept((UNIT, UNIT), 2, 1))
        await peer.say(p.Ready())
        await peer.read(until)
        assert machine.state is (MachineState.PAUSED if until is p.Switchover else MachineState.RUNNING)
        yield peer, source, machine
        stop.set()
    await peer.stream.aclose()
    await machine.close()


@contextlib.asynccontextmanager
async def lone_destination(
    on_end: Callable[[], None] = lambda: None,
    meeting: Meeting | None = None,
    placed_every_ms: int = 0,
) -> AsyncIterator[tuple[Peer, DestinationMigration, FakeMachine]]:
    here, there = socket.socketpair()
    twin, pager = FakeMachine(), FakePager()
    dest = DestinationMigration(
        FakeLink(here, meeting), make_machine=lambda *_: twin, make_pager=lambda: cast(Pager, pager)
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


async def prepared(peer: Peer) -> None:
    for message in [*FULL, p.Switchover(b"state", 2)]:
        await peer.say(message)
    await peer.read(p.Prepared)


def recover(resume_ns: int) -> list[p.Message]:
    """What a destination says that has five pages of the first block."""
    first = Bitmap(PAGES)
    first.set_range(3, 5)
    maps = [first, Bitmap(2 * PAGES)]
    digest = maps[1].crc32c(maps[0].crc32c())
    parts = [p.ReceivedMap(number, 0, len(map_), map_.rle_encode()) for number, map_ in enumerate(maps)]
    return [*parts, p.Recover(resume_ns, 2, digest)]


def bits(pages: int, *runs: tuple[int, int]) -> Bitmap:
    bitmap = Bitmap(pages)
    for first, count in runs:
        bitmap.set_range(first, count)
    return bitmap


def has_status(migration: Any, status: str) -> bool:
    return bool(migration.status == status)


async def lose(pair: Any) -> None:
    """Until both sides have lost each other behind the point of no return."""
    await pair.move()
    pair.servers[0].channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 0, "reset")
    await pair.until(lambda: pair.source.status == pair.dest.status == "postcopy-paused")
