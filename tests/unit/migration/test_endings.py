# SPDX-License-Identifier: Apache-2.0
"""How a migration ends when it does not end well: taken back, ended by the peer, failed by a mistake of ours; and what
becomes of the machine."""

from __future__ import annotations

import logging
import math
from typing import Any, cast

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from postcopy.dataplane.pager import ChannelKind, EventType
from postcopy.errors import MigrationError
from postcopy.machines import MachineState
from postcopy.migration.source import SourceMigration
from postcopy.wire import Ended, EndedElsewhere, State
from tests.unit.migration._engines import (
    PAGES,
    UNIT,
    FakeReconnector,
    Meeting,
    assert_back_at_source,
    has_status,
    lone_source,
    lose,
    make_pair,
    running,
)


@pytest.mark.parametrize("who", ["source", "dest"])
@pytest.mark.parametrize("when", [State.READY, State.POSTCOPY])
async def test_a_mistake_is_contained(who: str, when: State, caplog: pytest.LogCaptureFixture) -> None:
    """Logged with its traceback; it fails this migration, and the machine is where the protocol says."""
    pair = make_pair()
    engine: Any = None

    def broken_event() -> None:
        engine.channel.send.send_nowait(None)  # of which no attribute can be had

    async with running(pair):
        await pair.until(lambda: pair.source.state is State.READY)
        engine = pair.engine(who)
        if when is State.POSTCOPY:
            await pair.move()
        broken_event()
        if when is State.POSTCOPY:
            await pair.until(lambda: pair.source.status == pair.dest.status == "postcopy-paused")
            assert pair.twin.state is MachineState.RUNNING
            pair.meeting.open.set()
            await pair.until(lambda: pair.source.recoveries.count == pair.dest.recoveries.count == 1)
            pair.pager.channel.tell(EventType.COMPLETE)
    if when is State.READY:
        assert_back_at_source(pair)
        assert "a mistake in postcopy (AttributeError" in str(pair.side(who).failure)
    else:
        assert pair.source.state is pair.dest.state is State.COMPLETED
    assert any(record.exc_info for record in caplog.records if record.levelno == logging.ERROR)


async def test_a_mistake_in_the_callback(caplog: pytest.LogCaptureFixture) -> None:
    pair = make_pair()

    def look_and_fail() -> None:
        pair.look()  # which wakes the test: the last change may be this side's
        raise ZeroDivisionError

    cast(Any, pair.source)._on_change = look_and_fail
    async with running(pair):
        await pair.move()
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is pair.dest.state is State.COMPLETED
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)


async def test_a_pager_that_hangs_does_not_keep_a_whole_machine() -> None:
    pair = make_pair()

    async def hang() -> None:
        await trio.lowlevel.checkpoint()
        raise MigrationError("ending the pager: not done after 30 s; its memory is kept")

    async with running(pair):
        await pair.move()
        pair.pager.channel.tell(EventType.COMPLETE)
        await pair.until(lambda: pair.dest.state is State.COMPLETED and pair.source.state is State.COMPLETED)
    dest = cast(Any, pair.dest)
    dest._data = cast(Any, pair.pager)
    dest._data.close = hang
    dest.machine = pair.twin
    assert await dest.hand_over() is pair.twin


async def test_reclaimed_from_a_destination_that_is_dead(mock_clock: MockClock) -> None:
    meeting = Meeting()  # where nobody comes
    async with lone_source(meeting) as (peer, source, machine):
        with pytest.raises(MigrationError, match="this migration is active"):
            await source.reclaim()
        await peer.commit()
        await trio.aclose_forcefully(peer.stream)
        await source.paused.wait()
        mock_clock.autojump_threshold = 0.05  # not before: time must not jump while a worker thread is at work
        lost = await source.reclaim()
        assert "since is lost" in lost
        assert machine.state is MachineState.RUNNING
        assert machine.network_log == ["released", "claimed"]
        assert source.status == "reclaimed"
        assert source.may_run
        with pytest.raises(MigrationError, match="this migration is reclaimed"):
            await source.reclaim()
    assert source._protocol.ending is Ended.RECLAIMED


@pytest.mark.parametrize("cancelled", [False, True])
async def test_one_that_is_taken_back_is_not_closed_before_it_runs(
    cancelled: bool, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner closes the machine when `run` has returned, or was cancelled."""
    returned, told, answers = trio.Event(), trio.Event(), trio.Event()
    run, scope = SourceMigration.run, trio.CancelScope()

    async def run_and_tell(self: SourceMigration, go: trio.Event, stop: trio.Event) -> None:
        with scope:
            await run(self, go, stop)
        returned.set()

    monkeypatch.setattr(SourceMigration, "run", run_and_tell)
    async with lone_source(Meeting()) as (peer, source, machine), trio.open_nursery() as nursery:
        resume = machine.resume

        async def slow_resume() -> None:
            told.set()
            await answers.wait()
            await resume()

        monkeypatch.setattr(machine, "resume", slow_resume)
        await peer.commit()
        await trio.aclose_forcefully(peer.stream)
        await source.paused.wait()
        mock_clock.autojump_threshold = 0.05
        nursery.start_soon(source.reclaim)
        await told.wait()
        mock_clock.autojump_threshold = math.inf
        if cancelled:
            scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        too_early = returned.is_set()
        answers.set()
        await returned.wait()
    assert not too_early
    assert source.status == "reclaimed"
    assert machine.state is MachineState.RUNNING


async def test_not_reclaimed_from_one_that_answers() -> None:
    pair = make_pair()
    async with running(pair):
        await lose(pair)
        pair.meeting.open.set()
        with pytest.raises(MigrationError, match="the destination answers"):
            await pair.source.reclaim()
        await pair.until(lambda: pair.source.recoveries.count == pair.dest.recoveries.count == 1)
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.machine.resumed == 0


async def test_not_reclaimed_when_memory_has_been_given_back() -> None:
    pair = make_pair(release_ram=True)
    pair.machine.memories[0].write(0, b"x" * PAGES * UNIT)
    pair.machine.memories[1].write(0, b"x" * 2 * PAGES * UNIT)
    async with running(pair):
        await pair.move()
        await pair.servers[0].until_gone(2)
        await lose(pair)
        with pytest.raises(MigrationError, match="have been given back"):
            await pair.source.reclaim()
        pair.stop_source.set()
        pair.stop_dest.set()
    assert pair.machine.resumed == 0


async def test_a_destination_that_comes_back_to_a_reclaimed_machine_stops_its_own() -> None:
    """Told with proof: there were two for as long as nobody could know, and there is one from here on."""
    pair = make_pair()
    async with running(pair):
        await lose(pair)
        assert pair.twin.state is MachineState.RUNNING
        pair.stop_source.set()
        pair.meeting.refuse(EndedElsewhere(Ended.RECLAIMED))
        pair.meeting.open.set()
    assert pair.dest.state is State.ABORTED
    assert not pair.dest.may_run
    assert pair.twin.statistics().state is MachineState.PAUSED
    assert pair.twin.network_log == ["claimed", "released"]


async def test_the_machine_runs_while_its_pause_is_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair()
    found: list[tuple[MachineState, int]] = []

    async def before_pause(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        found.append((pair.machine.state, pair.source.paused_ns))

    monkeypatch.setattr(pair.machine, "before_pause", before_pause)
    running_as = pair.machine.state
    async with running(pair):
        await pair.move()
        pair.pager.channel.tell(EventType.COMPLETE)
    assert found == [(running_as, 0)]


async def test_one_that_does_not_stop_then_is_destroyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is a process of its own would run on when it is only let go."""
    pair = make_pair()
    destroyed = 0

    async def hangs(timeout_s: float = 0.0) -> None:
        raise MigrationError("it waits for a page")

    async def destroy() -> None:
        nonlocal destroyed
        destroyed += 1

    async with running(pair):
        await lose(pair)
        monkeypatch.setattr(pair.twin, "pause", hangs)
        monkeypatch.setattr(pair.twin, "destroy", destroy)
        pair.stop_source.set()
        pair.meeting.refuse(EndedElsewhere(Ended.RECLAIMED))
        pair.meeting.open.set()
    assert destroyed == 1


@pytest.mark.parametrize("how", [Ended.COMPLETED, Ended.ABORTED, Ended.LOST])
async def test_how_it_has_ended_at_the_destination(how: Ended) -> None:
    """Every page is there; it never heard `commit`; it was given up."""
    meeting = Meeting()
    async with lone_source(meeting) as (peer, source, machine):
        await peer.commit()
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


@pytest.mark.parametrize("error", [EndedElsewhere(Ended.LOST), MigrationError("no connection helps")])
async def test_reclaimed_in_the_moment_in_which_the_search_ends(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the peer says, or what fails, then changes nothing any more."""
    async with lone_source(Meeting()) as (peer, source, _):

        async def next_link(self: FakeReconnector) -> Any:
            await trio.lowlevel.checkpoint()
            source._protocol.reclaim()
            raise error

        monkeypatch.setattr(FakeReconnector, "next_link", next_link)
        await peer.commit()
        await trio.aclose_forcefully(peer.stream)
        with trio.fail_after(10):
            await source._until(lambda: source.over)
    assert source.status == "reclaimed"
    assert source.failure is None or source.failure is not error
    assert "nothing to end" not in str(source.failure)


async def test_the_machine_does_not_wait_for_a_source_that_is_dead(mock_clock: MockClock) -> None:
    """The last page came with the cut, and nothing after it: the machine is whole, and the caller's after a moment."""
    pair = make_pair()
    async with running(pair):
        await pair.move()
        pair.pager.channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 0, "reset")
        pair.pager.channel.tell(EventType.COMPLETE)
        began = trio.current_time()
        await pair.until(lambda: pair.source.status == pair.dest.status == "postcopy-paused")
        mock_clock.autojump_threshold = 0.05
        await pair.until(lambda: pair.dest.state is State.COMPLETED)
        assert trio.current_time() - began < 5
        assert pair.dest._protocol.ending is Ended.COMPLETED
        assert await pair.dest.hand_over() is pair.twin
        pair.stop_source.set()
    assert pair.twin.statistics().state is MachineState.RUNNING
    assert pair.dest.failure is None
