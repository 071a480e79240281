# SPDX-License-Identifier: Apache-2.0
"""How a migration ends when it does not end well: given up, taken back, cancelled in the last moment, failed of a
mistake of ours; and what the other side is told of it. On the harness of `test_engines`."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from postcopy import wire as p
from postcopy.dataplane.pager import ChannelKind, EventType, Pager
from postcopy.errors import MigrationError, PeerError
from postcopy.machines import MachineState
from postcopy.migration._session import Control
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.net import Address, Link
from postcopy.wire import Ended, EndedElsewhere, State

# --import-mode=importlib makes no packages of test directories, so what they share is loaded by its path.
_spec = importlib.util.spec_from_file_location("postcopy_engines", Path(__file__).with_name("test_engines.py"))
assert _spec is not None
assert _spec.loader is not None
h: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = h
_spec.loader.exec_module(h)


def has_status(migration: Any, status: str) -> bool:
    return bool(migration.status == status)


async def lose(pair: Any) -> None:
    """Until both sides have lost each other behind the point of no return."""
    pair.go.set()
    await pair.until(lambda: pair.source.state is State.POSTCOPY)
    pair.servers[0].channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 0, "reset")
    await pair.until(lambda: pair.source.status == pair.dest.status == "postcopy-paused")


# ---- connecting


async def test_connecting_is_a_state_that_can_be_cancelled(autojump_clock: MockClock) -> None:
    machine = h.FakeMachine()
    machine.state = MachineState.RUNNING
    asked = trio.Event()

    async def never() -> Link:
        asked.set()
        await trio.sleep_forever()
        raise AssertionError

    source = SourceMigration(machine, never, SourceOptions(), peer=Address("far.example", 7))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.run, trio.Event(), trio.Event())
        await asked.wait()
        assert source.status == "connecting"
        assert source.migration_id
        assert str(source.peer) == "far.example:7"
        assert source.cancellable
        assert not source.connected.is_set()
        with pytest.raises(MigrationError):
            source.pause()
        assert source.cancel()
    assert source.status == "cancelled"
    assert source.may_run
    assert source.connected.is_set()
    assert machine.state is MachineState.RUNNING
    await machine.close()


@pytest.mark.parametrize("error", [PeerError("connection refused"), RuntimeError("a mistake")])
async def test_a_connection_that_does_not_come(error: Exception) -> None:
    machine = h.FakeMachine()

    async def refused() -> Link:
        await trio.lowlevel.checkpoint()
        raise error

    source = SourceMigration(machine, refused, SourceOptions(), peer=Address("far.example", 7))
    await source.run(trio.Event(), trio.Event())
    assert source.status == "failed"
    assert source.connected.is_set()
    assert str(error) in str(source.failure)
    await machine.close()


async def test_a_connection_that_comes() -> None:
    pair = h.make_pair()
    link = pair.source._link

    async def connect() -> Link:
        await trio.lowlevel.checkpoint()
        return cast(Link, link)

    pair.source = SourceMigration(
        pair.machine,
        connect,
        SourceOptions(bulk_channels=1),
        make_server=pair.source._make_server,
        on_change=pair.look,
    )
    async with h.running(pair):
        await pair.until(lambda: pair.source.state is State.READY)
        assert pair.source.peer == link.peer
        pair.go.set()
        await pair.until(lambda: pair.dest.state is State.POSTCOPY)
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is pair.dest.state is State.COMPLETED


# ---- the decision


async def test_prepared_and_a_cancel_in_the_same_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was told that it is cancelled can rely on it, although `prepared` has come."""
    receive = Control.receive
    migrations: list[SourceMigration] = []

    async def and_cancel(self: Any, kind: type[p.Message], timeout_s: float = float("inf")) -> p.Message:
        message = await receive(self, kind, timeout_s)
        if kind is p.Prepared:
            assert migrations[0].cancel()
        return message

    monkeypatch.setattr(Control, "receive", and_cancel)
    async with h.lone_source() as (peer, source, machine):
        migrations.append(source)
        await peer.say(p.Prepared())
        told = await peer.read(p.Abort)
        assert "cancelled at the source" in told.reason
        assert machine.state is MachineState.RUNNING
    assert source.status == "cancelled"
    assert source.may_run


async def test_a_destination_that_is_cancelled_does_not_say_prepared() -> None:
    async with h.lone_destination() as (peer, dest, twin):
        load = twin.load_state

        async def and_cancel(state: bytes) -> None:
            await load(state)
            assert dest.cancel()

        twin.load_state = and_cancel
        for message in [*h.FULL, p.Switchover(b"state", 2)]:
            await peer.say(message)
        told = await peer.read(p.Abort)
        assert "cancelled at the destination" in told.reason
    assert dest.status == "cancelled"


async def test_half_a_message_is_not_followed_by_another() -> None:
    """A peer would take what follows for the rest of it: the connection is closed instead."""
    here, there = socket.socketpair()
    for side in (here, there):
        side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    protocol = p.SourceProtocol()
    control = Control(trio.SocketStream(trio.socket.from_stdlib_socket(here)), protocol)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(there))
    whole = bytes(1 << 20)
    with trio.move_on_after(0.05) as scope:
        await control.send(whole)
    assert scope.cancelled_caught
    with pytest.raises(PeerError, match="in part"):
        await control.send(b"more")
    got = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(control.say_goodbye, "no more")
        while data := await stream.receive_some():
            got += data
        await stream.aclose()
    assert len(got) < len(whole)
    assert not any(got)
    assert protocol.state is State.ABORTED


async def test_trouble_of_this_host_is_not_the_peers() -> None:
    """EBADF, say: the connection is lost all the same, and the reason says where."""
    async with h.lone_source() as (_, source, machine):
        stream = source._link.control
        stream.socket.close()
        with trio.fail_after(10):
            await machine.runs_again.wait()
    assert isinstance(source.failure, MigrationError)
    assert "this host" in str(source.failure)


# ---- patience


async def test_recover_looks_again_when_patience_has_run_out(mock_clock: MockClock) -> None:
    pair = h.make_pair()
    pair.source.set_recover_for(30)
    pair.dest.set_recover_for(30)
    async with h.running(pair):
        await lose(pair)
        await trio.testing.wait_all_tasks_blocked()
        assert not pair.source.over
        mock_clock.jump(31)
        await pair.until(lambda: pair.source.over and pair.dest.over)
        assert pair.source.status == pair.dest.status == "postcopy-paused"
        pair.source.recover()
        pair.dest.recover()
        pair.meeting.open.set()
        await pair.until(lambda: pair.source.recoveries.count == pair.dest.recoveries.count == 1)
        assert not pair.source.over
        assert not pair.dest.over
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is pair.dest.state is State.COMPLETED


async def test_patience_can_be_changed_while_it_lasts(mock_clock: MockClock) -> None:
    """At both sides, and at the second loss as at the first."""
    pair = h.make_pair()
    async with h.running(pair):
        await lose(pair)
        pair.meeting.open.set()
        await pair.until(lambda: pair.source.recoveries.count == pair.dest.recoveries.count == 1)
        pair.meeting.open = trio.Event()
        pair.servers[0].channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 0, "reset")
        await pair.until(lambda: pair.source.status == pair.dest.status == "postcopy-paused")
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(50)
        await trio.testing.wait_all_tasks_blocked()
        assert not pair.source.over
        pair.source.set_recover_for(10)
        pair.dest.set_recover_for(2000)
        await pair.until(lambda: pair.source.over)
        assert not pair.dest.over
        pair.stop_source.set()
        pair.stop_dest.set()


async def test_doubt_has_an_end(mock_clock: MockClock) -> None:
    """Sixteen sources that die at this moment must not keep sixteen places for ever; and they hear how it ended."""
    ended = trio.Event()
    async with h.lone_destination(ended.set) as (peer, dest, twin):
        await h.prepared(peer)
        await trio.aclose_forcefully(peer.stream)
        await dest.paused.wait()
        assert dest.status == "in-doubt"
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(61)
        with trio.fail_after(600):
            await ended.wait()
        assert dest.status == "failed"
        assert "reclaim" in str(dest.failure)
        assert dest._protocol.ending is Ended.ABORTED
    assert twin.resumed == 0


async def test_a_source_that_lives_and_does_not_decide(mock_clock: MockClock) -> None:
    """It has half a minute."""
    ended = trio.Event()
    async with h.lone_destination(ended.set) as (peer, dest, _):
        await h.prepared(peer)

        async def keep_talking() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                while True:
                    await peer.say(p.Ping(1))
                    await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_talking)
            mock_clock.rate = 100
            await dest.paused.wait()
            assert dest.status == "in-doubt"
            await ended.wait()
            mock_clock.rate = 0
            nursery.cancel_scope.cancel()
    assert dest.state is State.ABORTED


async def test_image_of_which_nothing_comes_after_the_end_of_the_push(mock_clock: MockClock) -> None:
    """No thread is blocked on it, and still a request that is not answered is a lost connection."""
    pair = h.make_pair()
    pair.pager.request_missing = lambda limit: 0
    async with h.running(pair):
        pair.go.set()
        await pair.until(lambda: pair.dest.state is State.POSTCOPY)
        pair.pager.channel.tell(EventType.BULK_END, ChannelKind.BULK, 0)
        mock_clock.rate = 5
        await pair.until(lambda: pair.dest.status == "postcopy-paused")
        mock_clock.rate = 0
        assert "no page that was asked for has come" in str(pair.dest.failure)
        pair.stop_source.set()
        pair.stop_dest.set()


# ---- what can never succeed


async def test_twice_the_same_disagreement_is_the_end() -> None:
    meeting = h.Meeting()
    meeting.open.set()
    async with h.lone_source(meeting) as (peer, source, machine):
        await peer.say(p.Prepared())
        await peer.read(p.Commit)
        await trio.aclose_forcefully(peer.stream)
        for attempt in range(2):
            again = h.Peer(await meeting.join())
            for message in [*h.recover(5)[:2], p.Recover(5, 2, 1)]:
                await again.say(message)
            while await again.stream.receive_some():
                pass
            await again.stream.aclose()
            with trio.fail_after(10):
                await source._until(partial(has_status, source, ("postcopy-paused", "postcopy-failed")[attempt]))
        assert "do not have the digest that was told" in str(source.failure)
        assert source.over
        # Whoever comes now is shown out, until somebody wants it tried once more.
        again = h.Peer(await meeting.join())
        assert not await again.stream.receive_some()
        await again.stream.aclose()
        source.recover()
        assert source.status == "postcopy-paused"
        again = h.Peer(await meeting.join())
        for message in h.recover(5):
            await again.say(message)
        await again.read(p.Recovered)
        await again.say(p.Complete({}))
        await again.read(p.CompleteAck)
        await again.stream.aclose()
    assert source.state is State.COMPLETED
    assert machine.resumed == 0


async def test_a_recovery_that_succeeds_tells_its_reconnector() -> None:
    """It is by that, and not by a connection, that pauses between attempts become short again."""
    told = []
    async with h.running(h.make_pair()) as pair:
        pair.go.set()
        await pair.until(lambda: pair.source.state is State.POSTCOPY)
        for side in (pair.source, pair.dest):
            side._reconnector.went_on = lambda side=side: told.append(side)
        await lose(pair)
        pair.meeting.open.set()
        await pair.until(lambda: pair.source.recoveries.count == pair.dest.recoveries.count == 1)
        pair.pager.channel.tell(EventType.COMPLETE)
    assert set(told) == {pair.source, pair.dest}


# ---- a mistake of ours


@pytest.mark.parametrize("who", ["source", "dest"])
@pytest.mark.parametrize("when", [State.READY, State.POSTCOPY])
async def test_a_mistake_is_contained(who: str, when: State, caplog: pytest.LogCaptureFixture) -> None:
    """Logged with its traceback; it fails this migration, and the machine is where the protocol says."""
    pair = h.make_pair()
    engine: Any = None

    def broken_event() -> None:
        engine.channel.send.send_nowait(None)  # of which no attribute can be had

    async with h.running(pair):
        await pair.until(lambda: pair.source.state is State.READY)
        engine = pair.servers[0] if who == "source" else pair.pager
        if when is State.POSTCOPY:
            pair.go.set()
            await pair.until(lambda: pair.source.state is State.POSTCOPY)
        broken_event()
        if when is State.POSTCOPY:
            await pair.until(lambda: pair.source.status == pair.dest.status == "postcopy-paused")
            assert pair.twin.state is MachineState.RUNNING
            pair.meeting.open.set()
            await pair.until(lambda: pair.source.recoveries.count == pair.dest.recoveries.count == 1)
            pair.pager.channel.tell(EventType.COMPLETE)
    if when is State.READY:
        h.assert_back_at_source(pair)
        assert "a mistake in postcopy (AttributeError" in str((pair.source if who == "source" else pair.dest).failure)
    else:
        assert pair.source.state is pair.dest.state is State.COMPLETED
    assert any(record.exc_info for record in caplog.records if record.levelno == logging.ERROR)


async def test_a_mistake_of_whoever_looks_on(caplog: pytest.LogCaptureFixture) -> None:
    pair = h.make_pair()
    pair.source._told_change = lambda: 1 / 0
    async with h.running(pair):
        pair.go.set()
        await pair.until(lambda: pair.dest.state is State.POSTCOPY)
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is pair.dest.state is State.COMPLETED


async def test_no_threads_is_told_before_anything_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    from postcopy._blocking import Workers, no_thread

    def refuse(count: int, name: str, what: str) -> Workers:
        raise no_thread(what)

    pair = h.make_pair()
    monkeypatch.setattr(Workers, "open", refuse)
    async with h.running(pair):
        pass
    assert pair.source.state is pair.dest.state is State.ABORTED
    assert pair.machine.state is MachineState.RUNNING
    assert "no thread can be started" in str(pair.source.failure)


async def test_a_pager_that_hangs_does_not_keep_a_whole_machine() -> None:
    pair = h.make_pair()

    async def hang() -> None:
        await trio.lowlevel.checkpoint()
        raise MigrationError("ending the pager: not done after 30 s; its memory is kept")

    async with h.running(pair):
        pair.go.set()
        await pair.until(lambda: pair.dest.state is State.POSTCOPY)
        pair.pager.channel.tell(EventType.COMPLETE)
        await pair.until(lambda: pair.dest.state is State.COMPLETED and pair.source.state is State.COMPLETED)
    pair.pager.close = hang
    dest = pair.dest
    dest._pager = pair.pager
    dest.machine = pair.twin
    assert await dest.release() is pair.twin


# ---- taking it back


async def test_reclaimed_from_a_destination_that_is_dead(autojump_clock: MockClock) -> None:
    autojump_clock.autojump_threshold = 0.05
    meeting = h.Meeting()  # where nobody comes
    async with h.lone_source(meeting) as (peer, source, machine):
        with pytest.raises(MigrationError, match="this migration is active"):
            await source.reclaim()
        await peer.say(p.Prepared())
        await peer.read(p.Commit)
        await trio.aclose_forcefully(peer.stream)
        await source.paused.wait()
        lost = await source.reclaim()
        assert "since is lost" in lost
        assert machine.state is MachineState.RUNNING
        assert machine.network_log == ["released", "claimed"]
        assert source.status == "reclaimed"
        assert source.may_run
        with pytest.raises(MigrationError, match="this migration is reclaimed"):
            await source.reclaim()
    assert source._protocol.ending is Ended.RECLAIMED


async def test_not_reclaimed_from_one_that_answers() -> None:
    pair = h.make_pair()
    async with h.running(pair):
        await lose(pair)
        pair.meeting.open.set()
        with pytest.raises(MigrationError, match="the destination answers"):
            await pair.source.reclaim()
        await pair.until(lambda: pair.source.recoveries.count == pair.dest.recoveries.count == 1)
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.machine.resumed == 0


async def test_not_reclaimed_when_memory_has_been_given_back() -> None:
    pair = h.make_pair(release_ram=True)
    pair.machine.memories[0].write(0, b"x" * h.PAGES * h.UNIT)
    pair.machine.memories[1].write(0, b"x" * 2 * h.PAGES * h.UNIT)
    async with h.running(pair):
        pair.go.set()
        await pair.until(lambda: pair.source.state is State.POSTCOPY)
        await pair.servers[0].until_gone(2)
        await lose(pair)
        with pytest.raises(MigrationError, match="have been given back"):
            await pair.source.reclaim()
        pair.stop_source.set()
        pair.stop_dest.set()
    assert pair.machine.resumed == 0


async def test_a_destination_that_comes_back_to_a_reclaimed_machine_stops_its_own() -> None:
    """Told with proof: there were two for as long as nobody could know, and there is one from here on."""
    pair = h.make_pair()
    async with h.running(pair):
        await lose(pair)
        assert pair.twin.state is MachineState.RUNNING
        pair.stop_source.set()
        pair.meeting.refuse(EndedElsewhere(Ended.RECLAIMED))
        pair.meeting.open.set()
    assert pair.dest.state is State.ABORTED
    assert not pair.dest.may_run
    assert pair.twin.statistics().state is MachineState.PAUSED
    assert pair.twin.network_log == ["claimed", "released"]


@pytest.mark.parametrize("how", [Ended.COMPLETED, Ended.ABORTED, Ended.LOST])
async def test_how_it_has_ended_at_the_destination(how: Ended) -> None:
    """Every page is there; it never heard `commit`; it was given up."""
    meeting = h.Meeting()
    async with h.lone_source(meeting) as (peer, source, machine):
        await peer.say(p.Prepared())
        await peer.read(p.Commit)
        await trio.aclose_forcefully(peer.stream)
        await source.paused.wait()
        meeting.refuse(EndedElsewhere(how))
        meeting.open.set()
        with trio.fail_after(10):
            await source._until(lambda: not has_status(source, "postcopy-paused"))
        if how is Ended.LOST:
            assert "reclaim" not in str(source.failure)
            began = trio.current_time()
            await source.reclaim()  # at once: nobody is there to be looked for
            assert trio.current_time() - began < 3
    assert source.state is {Ended.COMPLETED: State.COMPLETED, Ended.ABORTED: State.ABORTED}.get(how, State.RECLAIMED)
    runs = how is not Ended.COMPLETED
    assert machine.resumed == runs
    assert source.may_run == runs
    assert machine.network_log == ["released", *["claimed"] * runs]


# ---- every page is here, and nobody knows it


async def test_the_machine_does_not_wait_for_a_source_that_is_dead(autojump_clock: MockClock) -> None:
    """The last page came with the cut, and nothing after it: the machine is whole, and the caller's after a moment."""
    autojump_clock.autojump_threshold = 0.05
    pair = h.make_pair()
    async with h.running(pair):
        pair.go.set()
        await pair.until(lambda: pair.source.state is State.POSTCOPY)
        pair.pager.channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 0, "reset")
        pair.pager.channel.tell(EventType.COMPLETE)
        began = trio.current_time()
        await pair.until(lambda: pair.dest.state is State.COMPLETED)
        assert trio.current_time() - began < 5
        assert pair.dest._protocol.ending is Ended.COMPLETED
        assert await pair.dest.release() is pair.twin
        pair.stop_source.set()
    assert pair.twin.statistics().state is MachineState.RUNNING
    assert pair.dest.failure is None


# ---- zero bulk channels


async def lone_offer(version: int, background: bool) -> tuple[p.Accept, DestinationMigration]:
    here, there = socket.socketpair()
    twin, pager = h.FakeMachine(), h.FakePager()
    link = h.FakeLink(here)
    link.version = version
    dest = DestinationMigration(
        link, background=background, make_machine=lambda *_, **__: twin, make_pager=lambda: cast(Pager, pager)
    )
    peer, stop = h.Peer(there), trio.Event()
    blocks = tuple(p.Block(block.name, block.size_bytes, block.page_bytes) for block in twin.layout)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dest.run, stop)
        await peer.say(p.Offer(b"m" * 16, b"t" * 16, "fake", {}, blocks, 1, 0))
        accept = await peer.read(p.Accept)
        stop.set()
    await peer.stream.aclose()
    await dest.close()
    return cast(p.Accept, accept), dest


@pytest.mark.parametrize(
    ("version", "background", "channels"), [(3, True, 1), (3, False, 0), (2, True, 1), (2, False, 1)]
)
async def test_without_background_there_are_no_bulk_channels(
    version: int, background: bool, channels: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_channels(self: Any, shards: int, bulk_channels: int) -> dict[Any, Any]:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(h.FakeChannelSet, "channels", no_channels)
    accept, _ = await lone_offer(version, background)
    assert accept.bulk_channels == channels
    assert ("all pages are taken" in caplog.text) is (version == 2 and not background)
