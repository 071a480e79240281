# SPDX-License-Identifier: Apache-2.0
"""What a destination asks for before it is touched, and a push that is held back."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

from postcopy.dataplane import pager as core
from postcopy.dataplane.ahead import Prefetch
from postcopy.dataplane.pager import ChannelKind, EventType
from postcopy.errors import ResourceError
from postcopy.memory import workingset
from postcopy.memory.workingset import Run, WorkingSet
from postcopy.migration import ahead as ahead_module
from postcopy.migration.ahead import Ahead
from postcopy.migration.precopy import Mode
from postcopy.wire import State
from tests.unit.migration._engines import PAGES, UNIT, FakeMachine, FakePager, Pair, make_pair, running

BLOCKS = (("block0", PAGES * UNIT), ("block1", 2 * PAGES * UNIT))


class AheadPager(FakePager):
    def __init__(self) -> None:
        super().__init__()
        self.runs: list[list[Run]] = []
        self.touches = -1
        self.fails = False

    def set_prefetch(self, policy: Prefetch) -> None:
        self.log.append(f"prefetch {policy}")

    def request_runs(self, runs: Any) -> None:
        assert self.armed
        if self.fails:
            raise ResourceError("no memory for that")
        self.runs.append([(run.block, run.first_page, run.pages) for run in runs])

    def record_touches(self, fd: int) -> None:
        assert not self.armed
        self.touches = fd


def pair_with(make_ahead: Any, **options: Any) -> tuple[Pair, AheadPager]:
    pair, pager = make_pair(**options), AheadPager()
    pair.pager = pager
    pair.dest._make_pager = lambda: cast(Any, pager)
    pair.dest._make_ahead = make_ahead
    return pair, pager


async def wait_for(condition: Callable[[], bool]) -> None:
    """Of what no change is announced."""
    with trio.fail_after(20):
        while not condition():
            await trio.lowlevel.checkpoint()


# ---- asking


async def test_a_working_set_is_asked_for_once(tmp_path: Path) -> None:
    """When the machine runs; not again after a recovery."""
    path = str(tmp_path / "vm.ws")
    workingset.write(path, WorkingSet(UNIT, ((PAGES + 3, 2), (0, 1))), BLOCKS)
    pair, pager = pair_with(partial(Ahead, Prefetch.parse("both:4"), path))
    async with running(pair):
        await pair.move()
        await wait_for(lambda: bool(pager.runs))
        pair.servers[0].channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 0, "reset")
        await pair.until(lambda: pair.source.status == pair.dest.status == "postcopy-paused")
        pair.meeting.open.set()
        await pair.until(lambda: pair.dest.recoveries.count == 1)
        pager.channel.tell(EventType.COMPLETE)
    assert pair.dest.state is State.COMPLETED
    assert pager.runs == [[(1, 3, 2), (0, 0, 1)]]
    assert "prefetch both:4" in pager.log


async def test_one_that_cannot_be_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(tmp_path / "vm.ws")
    workingset.write(path, WorkingSet(UNIT, ((0, 1),)), BLOCKS)
    pair, pager = pair_with(partial(Ahead, working_set=path))
    pager.fails = True
    async with running(pair):
        await pair.move()
        pager.channel.tell(EventType.COMPLETE)
    assert pair.dest.state is State.COMPLETED
    assert "no memory for that; nothing is asked for because of it" in caplog.text


@pytest.mark.parametrize("what", ["another machine", "nothing", "damaged"])
async def test_one_that_is_of_no_use(tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing depends on it: the machine is taken."""
    path = tmp_path / "vm.ws"
    if what == "another machine":
        workingset.write(str(path), WorkingSet(UNIT, ((0, 1),)), BLOCKS[:1])
    elif what == "damaged":
        path.write_bytes(b"pcwset01 and more")
    pair, pager = pair_with(partial(Ahead, working_set=str(path)))
    async with running(pair):
        await pair.move()
        pager.channel.tell(EventType.COMPLETE)
    assert pair.dest.state is State.COMPLETED
    assert not pager.runs
    assert "nothing is asked for because of it" in caplog.text


# ---- recording


async def test_what_was_waited_for_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vm.ws"
    touches = [(1, 3), (0, 9), (1, 4), (1, 3)]
    monkeypatch.setattr(ahead_module, "read_touches", lambda fd: touches)
    pair, pager = pair_with(partial(Ahead, record_to=str(path)))
    async with running(pair):
        await pair.move()
        assert pager.touches >= 0
        assert not path.exists()
        pager.channel.tell(EventType.COMPLETE)
    found = workingset.read_of_machine(str(path), BLOCKS)
    assert found.in_blocks([(size, UNIT) for _, size in BLOCKS]) == [(1, 3, 1), (0, 9, 1), (1, 4, 1)]


async def test_it_is_written_before_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, began, stopped = tmp_path / "vm.ws", trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()

    def slowly(fd: int) -> list[tuple[int, int]]:
        token.run_sync_soon(began.set)
        assert stopped.wait(20)
        return [(0, 1)]

    monkeypatch.setattr(ahead_module, "read_touches", slowly)
    pair, pager = pair_with(partial(Ahead, record_to=str(path)))
    async with running(pair):
        await pair.move()
        pager.channel.tell(EventType.COMPLETE)
        with trio.fail_after(20):
            await began.wait()
        pair.stop_dest.set()
        await trio.testing.wait_all_tasks_blocked(0.01)
        stopped.set()
    assert workingset.read_of_machine(str(path), BLOCKS).runs == ((1, 1),)


async def test_a_migration_that_never_ends_is_recorded_as_far_as_it_came(tmp_path: Path) -> None:
    path = tmp_path / "vm.ws"
    pair, _ = pair_with(partial(Ahead, record_to=str(path)))
    async with running(pair):
        await pair.move()
        pair.stop_dest.set()
        pair.stop_source.set()
    assert workingset.read_of_machine(str(path), BLOCKS).pages == 0


async def test_one_that_never_ran_is_not(tmp_path: Path) -> None:
    path = tmp_path / "vm.ws"
    pair, pager = pair_with(partial(Ahead, record_to=str(path)))
    async with running(pair):
        await wait_for(lambda: pager.touches >= 0)
        pair.stop_source.set()
    assert not path.exists()


async def test_a_record_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        pair, pager = pair_with(partial(Ahead, record_to=str(tmp_path / "gone" / "vm.ws")))
        async with running(pair):
            await pair.move()
            pager.channel.tell(EventType.COMPLETE)
    assert pair.dest.state is State.COMPLETED
    assert "--record-working-set" in caplog.text


def test_the_log_of_touches() -> None:
    """As `Ahead` makes it."""
    assert core.read_touches(core.new_touches(3 * PAGES)) == []


# ---- a push that is held back


def started(pair: Pair) -> bool:
    return pair.servers[0].started


async def test_a_push_is_held_back(mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as it was asked for, from the switchover on; requests are answered meanwhile."""
    from postcopy.migration import source

    began_s = trio.current_time()
    monkeypatch.setattr(source, "now_ns", lambda: int((trio.current_time() - began_s + 1) * 1e9))
    async with running(make_pair(push_after_s=5)) as pair:
        await pair.move()
        assert pair.servers[0].serving
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not started(pair)
        mock_clock.jump(5)
        await wait_for(lambda: started(pair))
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is State.COMPLETED


async def test_one_that_is_held_for_ever_can_be_begun() -> None:
    """Also on the connections of a recovery."""
    async with running(make_pair(push_after_s=math.inf)) as pair:
        await pair.move()
        pair.servers[0].channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 0, "reset")
        await pair.until(lambda: pair.source.status == pair.dest.status == "postcopy-paused")
        assert not started(pair)
        pair.meeting.open.set()
        await pair.until(lambda: pair.source.recoveries.count == 1)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not started(pair)
        pair.source.set_push_after(7)  # since the switchover, which has just been
        assert not started(pair)
        pair.source.set_push_after(0)
        await wait_for(lambda: started(pair))
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is State.COMPLETED


async def test_what_is_sent_in_the_pause_is_not_held() -> None:
    """The destination waits for all of it there."""
    async with running(make_pair(mode=Mode.STOP_AND_COPY, push_after_s=math.inf)) as pair:
        await pair.move()
    assert pair.source.state is State.COMPLETED


def test_a_machine_s_blocks() -> None:
    """`BLOCKS` are those of the machine here."""
    machine = FakeMachine()
    assert tuple((block.name, block.memory.size_bytes) for block in machine.blocks) == BLOCKS
    for memory in machine.memories:
        memory.close()
