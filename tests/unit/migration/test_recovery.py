# SPDX-License-Identifier: Apache-2.0
"""Behind the point of no return: what is lost is found again, as often as it takes."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from postcopy import wire as p
from postcopy.dataplane.pager import ChannelKind, EventType
from postcopy.machines import MachineState
from postcopy.records import as_json
from postcopy.service import report
from postcopy.wire import State
from tests.unit.migration._engines import (
    Meeting,
    Peer,
    has_status,
    lone_source,
    lose,
    make_pair,
    recover,
    running,
)


@pytest.mark.parametrize("who", ["source", "dest"])
async def test_data_channel_lost_after_commit(who: str) -> None:
    """Both pause, keep everything and wait; the machine stays at the destination."""
    async with running(make_pair()) as pair:
        await pair.move()
        engine = pair.engine(who)
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
        await pair.move()
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
        await pair.move()
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


async def test_complete_that_nobody_hears(mock_clock: MockClock) -> None:
    """A machine that has every page does not depend on its source any more, whatever that knows."""
    async with running(make_pair()) as pair:
        await pair.move()
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
        mock_clock.autojump_threshold = 0.05  # not before: time must not jump while a worker thread is at work
    assert pair.dest.state is State.COMPLETED
    assert pair.dest.failure is None
    assert pair.twin.state is MachineState.RUNNING
    told = as_json(report.ended("m", pair.dest))  # by nobody
    assert told["status"] == "completed"
    assert "downtime-ms" not in told
    assert "total-ms" not in told


async def test_complete_while_the_network_is_away() -> None:
    """The last page came with the cut: the destination has nothing to wait for but to say so."""
    async with running(make_pair()) as pair:
        await pair.move()
        pair.pager.channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 0, "reset")
        pair.pager.channel.tell(EventType.COMPLETE)
        pair.meeting.open.set()
    assert pair.source.state is pair.dest.state is State.COMPLETED


@pytest.mark.parametrize("who", ["source", "dest"])
async def test_what_cannot_go_on_is_not_tried_again(who: str) -> None:
    async with running(make_pair()) as pair:
        await pair.move()
        engine = pair.engine(who)
        engine.channel.tell(EventType.FATAL, text="out of everything")
        lost, other = (pair.source, pair.dest) if who == "source" else (pair.dest, pair.source)
        await pair.until(lambda: lost.status == "postcopy-failed" and other.status == "postcopy-paused")
        pair.meeting.open.set()
        assert "out of everything" in str(lost.failure)
        assert lost.recoveries.count == 0
        pair.stop_source.set()
        pair.stop_dest.set()


@pytest.mark.slow
async def test_request_that_is_never_answered(mock_clock: MockClock) -> None:
    """A data connection that is dead behind a control connection that lives."""
    async with running(make_pair()) as pair:
        await pair.move()
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


@pytest.mark.parametrize("ran", [False, True])
async def test_destination_that_comes_back(ran: bool) -> None:
    meeting = Meeting()
    meeting.open.set()
    async with lone_source(meeting) as (peer, source, machine):
        await peer.commit()
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
    assert source.downtime_ns
    assert machine.resumed == 0


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([p.ReceivedMap(2, 0, 1, b"")], "there is no block 2"),
        (recover(0)[:1] + recover(0)[2:], "speaks of 2 page maps, 1 came"),
        ([*recover(0)[:2], p.Recover(0, 2, 1)], "do not have the digest that was sent with them"),
        ([p.Running(1)], "running must not be received by the source in state recover"),
        ([p.Commit()], "commit must not be received by the source in state recover"),
    ],
)
async def test_destination_that_comes_back_with_nonsense(messages: list[p.Message], reason: str) -> None:
    """It is shown out, the machine's memory is kept, and the next one that makes sense is served."""
    meeting = Meeting()
    meeting.open.set()
    async with lone_source(meeting) as (peer, source, machine):
        await peer.commit()
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


async def test_recover_looks_again_when_patience_has_run_out(mock_clock: MockClock) -> None:
    pair = make_pair()
    pair.source.set_recover_for(30)
    pair.dest.set_recover_for(30)
    async with running(pair):
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
    pair = make_pair()
    async with running(pair):
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


async def test_image_of_which_nothing_comes_after_the_end_of_the_push(mock_clock: MockClock) -> None:
    """No thread is blocked on it, and still a request that is not answered is a lost connection."""
    pair = make_pair()
    cast(Any, pair.pager).request_missing = lambda limit: 0
    async with running(pair):
        await pair.move()
        pair.pager.channel.tell(EventType.BULK_END, ChannelKind.BULK, 0)
        mock_clock.rate = 5
        await pair.until(lambda: pair.dest.status == "postcopy-paused")
        mock_clock.rate = 0
        assert "no page that was asked for has come" in str(pair.dest.failure)
        pair.stop_source.set()
        pair.stop_dest.set()


async def test_twice_the_same_disagreement_is_the_end() -> None:
    meeting = Meeting()
    meeting.open.set()
    async with lone_source(meeting) as (peer, source, machine):
        await peer.commit()
        await trio.aclose_forcefully(peer.stream)
        for attempt in range(2):
            again = Peer(await meeting.join())
            for message in [*recover(5)[:2], p.Recover(5, 2, 1)]:
                await again.say(message)
            while await again.stream.receive_some():
                pass
            await again.stream.aclose()
            with trio.fail_after(10):
                await source._until(partial(has_status, source, ("postcopy-paused", "postcopy-failed")[attempt]))
        assert "do not have the digest that was sent with them" in str(source.failure)
        assert source.over
        # Whoever comes now is shown out, until somebody wants it tried once more.
        again = Peer(await meeting.join())
        assert not await again.stream.receive_some()
        await again.stream.aclose()
        source.recover()
        assert source.status == "postcopy-paused"
        again = Peer(await meeting.join())
        for message in recover(5):
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
    async with running(make_pair()) as pair:
        await pair.move()
        for side in (pair.source, pair.dest):
            cast(Any, side)._reconnector.went_on = lambda side=side: told.append(side)
        await lose(pair)
        pair.meeting.open.set()
        await pair.until(lambda: pair.source.recoveries.count == pair.dest.recoveries.count == 1)
        pair.pager.channel.tell(EventType.COMPLETE)
    assert set(told) == {pair.source, pair.dest}
