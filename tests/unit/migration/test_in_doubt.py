# SPDX-License-Identifier: Apache-2.0
"""A source that is lost between `prepared` and `commit`: the destination does not run the machine before it knows."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from postcopy import wire as p
from postcopy.dataplane.pager import EventType
from postcopy.errors import CoreError, MigrationError, PeerError
from postcopy.machines import MachineState
from postcopy.wire import Ended, State
from tests.unit.migration._engines import (
    Meeting,
    Peer,
    lone_destination,
    prepared,
)


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
        assert (told.resume_ns, told.maps) == (0, 2)
        assert twin.resumed == 0
        await again.say(p.Recovered())
        await again.read(p.Running)
        assert twin.resumed == 1
        await again.stream.aclose()


async def test_doubt_has_an_end(mock_clock: MockClock) -> None:
    """Sixteen sources that die at this moment must not keep sixteen places for ever; and they hear how it ended."""
    ended = trio.Event()
    async with lone_destination(ended.set) as (peer, dest, twin):
        await prepared(peer)
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
    async with lone_destination(ended.set) as (peer, dest, _):
        await prepared(peer)

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


@pytest.mark.parametrize("runs", [True, False])
async def test_lost_when_the_decision_has_come(runs: bool) -> None:
    """Every page had come while it was in doubt; the source says that it had decided, and is gone before the data
    channels are there. A machine that does not run is not complete."""
    meeting, ended = Meeting(), trio.Event()
    meeting.open.set()
    async with lone_destination(ended.set, meeting) as (peer, dest, twin):
        await prepared(peer)
        pager = cast(Any, dest._data)
        pager.channel.tell(EventType.COMPLETE)
        await trio.aclose_forcefully(peer.stream)

        def no_channel(*_: object) -> None:
            raise CoreError(104, "attaching a channel")

        async def no_resume() -> None:
            raise MigrationError("the vCPUs do not start")

        pager.attach_urgent = no_channel
        if not runs:
            cast(Any, twin).resume = no_resume
        again = Peer(await meeting.join())
        await again.read(p.Recover)
        assert twin.resumed == 0
        meeting.open = trio.Event()
        await again.say(p.Recovered())
        with trio.fail_after(20):
            if runs:
                await ended.wait()
            else:
                await dest._until(lambda: dest.status == "postcopy-failed")
        if runs:
            assert dest.state is State.COMPLETED
            assert twin.state is MachineState.RUNNING
            assert twin.resumed == 1
        else:
            assert dest.state is State.PAUSED
            assert "do not start" in str(dest.failure)
        await trio.aclose_forcefully(again.stream)
