# SPDX-License-Identifier: Apache-2.0
"""Up to the point of no return: whatever fails, and whenever, the machine is at one side, and runs there."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from dataclasses import replace
from typing import Any, cast

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from postcopy import wire as p
from postcopy.dataplane.pager import ChannelKind, Event, EventType, Pager
from postcopy.errors import PeerError, ProtocolError, ResourceError
from postcopy.machines import Machine, MachineState, MachineStatistics
from postcopy.migration.connection import Control
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.engine import channel_down
from postcopy.migration.source import PREPARE_TIMEOUT_S, SourceMigration
from postcopy.wire import State
from tests.unit.migration._engines import (
    FULL,
    PAGES,
    UNIT,
    FakeLink,
    FakeMachine,
    FakePager,
    Pair,
    Peer,
    assert_back_at_source,
    lone_destination,
    lone_source,
    make_pair,
    running,
)


async def test_the_whole_way() -> None:
    async with running(make_pair()) as pair:
        await pair.until(lambda: pair.source.state is State.READY)
        assert pair.machine.state is MachineState.RUNNING
        await pair.move()
        await pair.until(lambda: pair.servers[0].started)
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
    there = replace(pair.dest.statistics(), pending_faults=None)
    assert replace(pair.source.statistics(), released_bytes=None) == there
    here, there = pair.source.statistics(), pair.dest.statistics()
    assert here.downtime_ns == there.downtime_ns
    assert (here.total_ns or 0) >= (there.downtime_ns or 0) > 0
    assert here.total_ns == there.total_ns


async def test_what_was_not_pushed_is_asked_for() -> None:
    async with running(make_pair()) as pair:
        await pair.move()
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
    assert str(error).rpartition("] ")[2] in str(pair.source.failure)


async def test_a_machine_that_fails_does_not_leave() -> None:
    async with running(make_pair()) as pair:
        await pair.until(lambda: pair.source.state is State.READY)
        pair.machine.fail()
    assert pair.source.state is State.ABORTED
    assert str(pair.source.failure).startswith("the machine has failed: ")


async def test_a_machine_that_fails_where_it_arrives_is_needed_whole() -> None:
    async with running(make_pair()) as pair:
        await pair.move()
        pair.twin.fail()
        await trio.testing.wait_all_tasks_blocked()
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is pair.dest.state is State.COMPLETED
    assert pair.dest.machine_failure == "a vCPU stopped"


@pytest.mark.parametrize("who", ["source", "dest"])
@pytest.mark.parametrize("when", [State.OFFERED, State.READY])
@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_interrupted_before_commit(who: str, when: State, how: str) -> None:
    async with running(make_pair()) as pair:
        await pair.until(lambda: pair.source.state is when)
        if how == "cancel":
            assert pair.side(who).cancellable
            pair.side(who).cancel()
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
        pair.side(who).cancel()
        await pair.until(lambda: pair.source.state in (State.COMPLETED, State.ABORTED))
        nursery.cancel_scope.cancel()
        pair.meeting.refuse(p.EndedElsewhere(p.Ended.ABORTED))  # to one that is in doubt and asks
    return pair


@pytest.mark.parametrize("who", ["source", "dest"])
async def test_cancelled_at_any_moment(who: str) -> None:
    """Also in the very moment of the decision: the machine is then at the one side or at the other one, with all its
    pages. A `stop` would end this side in any case."""
    moment = cancelled = completed = 0
    while completed < 10:  # how many steps there are before the decision depends on the threads that work meanwhile
        pair = await cancelled_after(who, moment)
        assert pair.source.state is pair.dest.state
        if pair.source.state is State.ABORTED:
            cancelled += 1
            assert_back_at_source(pair)
        else:
            completed += 1
            assert pair.twin.resumed == 1
            assert pair.machine.resumed == 0
        moment += 2
        assert moment < 2000
    assert cancelled


@pytest.mark.parametrize("who", ["source", "dest"])
async def test_data_channel_lost_before_commit(who: str) -> None:
    async with running(make_pair()) as pair:
        await pair.until(lambda: pair.source.state is State.READY)
        engine = pair.engine(who)
        engine.channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 1, "reset by peer")
    assert_back_at_source(pair)
    noticed = pair.source if who == "source" else pair.dest
    assert "a data channel (urgent 1) broke: reset by peer" in str(noticed.failure)
    for side in (pair.source, pair.dest):
        assert side.may_try_again, side.failure  # neither has given a reason why it should not


@pytest.mark.parametrize("who", ["source", "dest"])
async def test_a_data_channel_that_made_no_sense(who: str) -> None:
    """Both operators get the reason, and it is not tried again and again."""
    async with running(make_pair()) as pair:
        await pair.until(lambda: pair.source.state is State.READY)
        event = EventType.CHANNEL_DOWN, ChannelKind.BULK, 0, "bad magic", errno.EBADMSG
        pair.engine(who).channel.tell(*event)
    assert_back_at_source(pair)
    for side in (pair.source, pair.dest):
        assert "a data channel (bulk 0) broke: bad magic" in str(side.failure)
        assert not side.may_try_again


async def test_cancelled_when_it_is_lost_already() -> None:
    """`cancel` says that it will not be decided, while the end of the lost connection is not dealt with yet: it is not
    begun again."""
    async with running(make_pair()) as pair:
        await pair.until(lambda: pair.source.state is State.READY)
        resume, cancelled = pair.source._take_back, list[bool]()

        async def take_back() -> None:
            cancelled.append(pair.source.cancel())
            await resume()

        pair.source._take_back = take_back  # type: ignore[method-assign]
        pair.engine("source").channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 1, "reset by peer")
    assert_back_at_source(pair)
    assert cancelled == [True]
    assert not pair.source.may_try_again


async def test_destination_that_dies_in_the_switchover(mock_clock: MockClock) -> None:
    """Time stands still here: nothing is waited for, since the users of the machine are."""
    async with lone_source() as (peer, source, machine):
        await trio.aclose_forcefully(peer.stream)
        await machine.runs_again.wait()
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


async def test_a_silent_peer_is_told_that_it_is_given_up(mock_clock: MockClock) -> None:
    """It may be a host that was too busy, and would else only see that its connections are closed."""
    async with lone_source() as (peer, source, machine):
        mock_clock.autojump_threshold = 0.1
        told = await peer.read(p.Abort)
    assert told.reason == str(source.failure) == "no sign of life from the destination for 3 s"
    assert machine.state is MachineState.RUNNING


async def test_what_came_while_this_process_did_not_run(mock_clock: MockClock) -> None:
    """As after SIGSTOP, or on a host without a free processor: the peer has spoken, and is not given up."""
    async with lone_source() as (peer, source, _):
        for _ in range(2):
            await peer.say(p.Ping(1))
            mock_clock.jump(4)
            await peer.read(p.Pong)
        assert source.failure is None
        assert source.state is State.HANDED
        mock_clock.autojump_threshold = 0.1


@pytest.mark.parametrize("who", ["source", "dest"])
async def test_the_peers_reason_goes_before_the_end_of_its_channels(who: str) -> None:
    """Both are noticed in one moment, as on a busy host."""
    async with running(make_pair()) as pair:
        await pair.until(lambda: pair.source.state is State.READY)
        side = pair.side(who)
        side._protocol.receive_data(p.encode(p.Abort("no memory")))
        assert isinstance(side._protocol.next_message(), p.Abort)
        side._scope.fail(channel_down(Event(EventType.CHANNEL_DOWN, ChannelKind.URGENT), "the peer"))
    assert str(side.failure).endswith("aborted: no memory")


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
        assert reason in told.reason
        assert machine.state is MachineState.RUNNING
    assert reason in str(source.failure)


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
        ([*FULL, p.Commit()], "commit must not be received by the destination in state maps"),
    ],
)
async def test_source_that_makes_no_sense(messages: list[p.Message], reason: str) -> None:
    async with lone_destination() as (peer, dest, twin):
        for message in messages:
            await peer.say(message)
        told = await peer.read(p.Abort)
        assert reason in told.reason
    assert reason in str(dest.failure)
    assert twin.resumed == 0
    assert not dest.may_run


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
    async with lone_source() as (peer, source, machine):
        migrations.append(source)
        await peer.say(p.Prepared())
        told = await peer.read(p.Abort)
        assert "cancelled at the source" in told.reason
        assert machine.state is MachineState.RUNNING
    assert source.status == "cancelled"
    assert source.may_run


async def test_a_destination_that_is_cancelled_does_not_say_prepared() -> None:
    async with lone_destination() as (peer, dest, twin):
        load = twin.load_state

        async def and_cancel(state: bytes) -> None:
            await load(state)
            assert dest.cancel()

        cast(Any, twin).load_state = and_cancel
        for message in [*FULL, p.Switchover(b"state", 2)]:
            await peer.say(message)
        told = await peer.read(p.Abort)
        assert "cancelled at the destination" in told.reason
    assert dest.status == "cancelled"


async def test_no_threads_fails_before_anything_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    from postcopy._blocking import Workers, no_thread

    def refuse(count: int, name: str, what: str) -> Workers:
        raise no_thread(what)

    pair = make_pair()
    monkeypatch.setattr(Workers, "open", refuse)
    async with running(pair):
        pass
    assert pair.source.state is pair.dest.state is State.ABORTED
    assert pair.machine.state is MachineState.RUNNING
    assert "no thread can be started" in str(pair.source.failure)


@pytest.mark.parametrize(
    "shortage",
    [MemoryError(), RuntimeError("can't start new thread"), OSError(errno.EMFILE, os.strerror(errno.EMFILE))],
)
async def test_what_the_host_lacks_is_no_mistake(shortage: Exception, caplog: pytest.LogCaptureFixture) -> None:
    def make_machine(*_: object) -> Machine:
        raise shortage

    pair = make_pair(make_machine)
    async with running(pair):
        pass
    assert isinstance(pair.dest.failure, ResourceError)
    assert pair.dest.failure.__cause__ is None
    assert f"declined: {pair.dest.failure}" in str(pair.source.failure)
    assert "a mistake" not in caplog.text


@pytest.mark.parametrize("version", [2, 3])
async def test_a_destination_without_threads_gives_its_reason(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it has looked at the offer, so that it aborts instead of declining: each version understands that."""
    from postcopy._blocking import Workers, no_thread

    open_workers = Workers.open

    def refuse(count: int, name: str, what: str) -> Workers:
        if name.endswith("dest"):
            raise no_thread(what)
        return open_workers(count, name, what)

    monkeypatch.setattr(FakeLink, "version", property(lambda _: version, lambda *_: None), raising=False)
    monkeypatch.setattr(Workers, "open", refuse)
    pair = make_pair()
    async with running(pair):
        pass
    assert pair.source.state is pair.dest.state is State.ABORTED
    assert pair.machine.state is MachineState.RUNNING
    assert f"the destination aborted: {pair.dest.failure}" == str(pair.source.failure)


async def lone_offer(version: int, background: bool) -> tuple[p.Accept, DestinationMigration]:
    here, there = socket.socketpair()
    twin, pager = FakeMachine(), FakePager()
    link = FakeLink(here)
    link.version = version
    dest = DestinationMigration(
        link, background=background, make_machine=lambda *_: twin, make_pager=lambda: cast(Pager, pager)
    )
    peer, stop = Peer(there, version), trio.Event()
    blocks = tuple(p.Block(block.name, block.size_bytes, block.page_bytes) for block in twin.layout)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dest.run, stop)
        await peer.say(p.Offer(b"m" * 16, b"t" * 16, "fake", {}, blocks, 1, 0))
        accept = await peer.read(p.Accept)
        stop.set()
    await peer.stream.aclose()
    await dest.close()
    return accept, dest


@pytest.mark.parametrize(
    ("version", "background", "channels"), [(3, True, 1), (3, False, 0), (2, True, 1), (2, False, 1)]
)
async def test_without_background_there_are_no_bulk_channels(
    version: int, background: bool, channels: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_channels(self: Any, shards: int, bulk_channels: int) -> dict[Any, Any]:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(FakeLink, "open_channels", no_channels)
    accept, _ = await lone_offer(version, background)
    assert accept.bulk_channels == channels
    assert ("all pages are taken" in caplog.text) is (version == 2 and not background)


async def test_the_pause_begins_when_the_machine_says_that_it_stopped() -> None:
    """One that is another process's may have stopped before `pause` is called."""
    pair = make_pair()
    stopped_ns = 0

    async def before_pause(early: object = None) -> None:
        nonlocal stopped_ns
        await trio.lowlevel.checkpoint()
        stopped_ns = time.monotonic_ns()
        pair.machine.state = MachineState.PAUSED
        await trio.lowlevel.checkpoint()

    def statistics() -> MachineStatistics:
        return MachineStatistics(pair.machine.state, paused_ns=stopped_ns)

    pair.machine.before_pause = before_pause  # type: ignore[method-assign]
    pair.machine.statistics = statistics  # type: ignore[method-assign]
    async with running(pair):
        await pair.move()
        await pair.until(lambda: pair.servers[0].started)
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is State.COMPLETED
    assert pair.source.paused_ns == stopped_ns > 0
