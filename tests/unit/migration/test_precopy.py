# SPDX-License-Identifier: Apache-2.0
"""Precopy: how the policy decides, what the engines do with it, and that no old page survives, on real memory with a
real pager, while a machine writes wherever it likes."""

from __future__ import annotations

import math
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

# A child process has this file alone.
if (root := str(Path(__file__).parents[3])) not in sys.path:
    sys.path.insert(0, root)

from postcopy import wire as p
from postcopy.dataplane.pager import EventType, Pager
from postcopy.dataplane.pager_process import ProcessPager
from postcopy.errors import ConfigurationError, MigrationError
from postcopy.machines import MachineState, MachineStatistics
from postcopy.memory import DirtyLog, Memory
from postcopy.migration import source as source_module
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.precopy import STUBBORN_ROUNDS, Mode, Policy
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.net import Acceptor, Address, CallingLink
from postcopy.wire import State
from tests.unit.migration._engines import (
    FakeLink,
    FakeMachine,
    assert_back_at_source,
    lone_destination,
    lone_source,
    make_pair,
    running,
)

pytestmark = pytest.mark.slow

MIB = 1 << 20

# ---- the policy


def policy(mode: Mode = Mode.HYBRID, precopy_s: float = math.inf, rounds: int = 30) -> Policy:
    return Policy(mode, precopy_s, 0.3, rounds)


@given(
    st.sampled_from(list(Mode)),
    st.sampled_from([0.0, 2.0, math.inf]),
    st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.floats(0.001, 100)), max_size=20),
    st.integers(1, 10),
)
def test_it_always_ends(mode: Mode, precopy_s: float, rounds: list[tuple[int, int, float]], most: int) -> None:
    """Whatever a machine writes and a network carries: `auto` by itself, a given time when it is over."""
    decides, since_s = policy(mode, precopy_s, most), 0.0
    for sent, left, took_s in rounds:
        if decides.why_no_other(since_s):
            break
        since_s += took_s
        decides.round_ended(sent, left, took_s, 0.001)
    assert decides.rounds <= (most if precopy_s == math.inf else len(rounds))
    if not mode.has_rounds or not precopy_s:
        assert not decides.rounds
        assert not decides.time_left_s(since_s)
    assert decides.why_no_other(max(since_s, 2.0)) or precopy_s == math.inf
    decides.ended = True
    assert decides.why_no_other(since_s)
    assert not decides.time_left_s(since_s)


def test_auto_goes_on_while_it_shrinks() -> None:
    decides, left = policy(), 1000 * MIB
    while not (why := decides.why_no_other(1)):
        decides.round_ended(left, left // 2, left / (10 * MIB), 0)
        left //= 2
    assert why == "what is left fits 0.3 s"
    assert left <= 3 * MIB < 2 * left
    assert decides.whole(left)
    assert not decides.whole(2 * left + 2 * MIB)


def test_auto_gives_up_what_does_not_shrink() -> None:
    decides = policy()
    for _ in range(STUBBORN_ROUNDS):
        assert not decides.why_no_other(1)
        decides.round_ended(100 * MIB, 95 * MIB, 10, 0)
    assert decides.why_no_other(1) == "what is left no longer shrinks"
    assert not decides.whole(95 * MIB)
    decides.mode = Mode.PRECOPY
    assert decides.whole(95 * MIB)


def test_one_bad_round_is_none() -> None:
    decides = policy()
    for sent, left in ((80, 79), (79, 40), (40, 39), (39, 20)):
        decides.round_ended(sent * MIB, left * MIB, 10, 0)
        assert not decides.why_no_other(1)


def test_the_limit_counts_as_the_bandwidth() -> None:
    decides = policy()
    decides.round_ended(100 * MIB, 10 * MIB, 1, 0)
    assert decides.fits(30 * MIB)
    decides.limit_bytes_per_s = 10 * MIB
    assert not decides.fits(30 * MIB)
    decides.max_downtime_s = 3
    assert decides.fits(30 * MIB)
    decides.limit_bytes_per_s = 0
    decides.round_ended(4096, 4096, 10, 0)  # too little to say anything about the network
    assert decides.fits(30 * MIB)
    decides.round_ended(100 * MIB, 4096, 0.001, 0.001, content_bytes=4096)  # zeros cost next to nothing
    assert decides.fits(30 * MIB)
    assert not decides.fits(301 * MIB)


def test_a_push_has_ended_when_the_destination_has_it() -> None:
    """Its end here means only that the system has taken all of it."""
    decides = policy()
    decides.round_ended(100 * MIB, 0, 0.01, 0.99)
    assert decides.bytes_per_s == 100 * MIB


def test_the_machine_writes_on_until_the_pause() -> None:
    decides = policy()
    decides.round_ended(100 * MIB, 20 * MIB, 0.5, 0.5)  # so 10 MiB more
    assert decides.why_no_other(1) == "what is left fits 0.3 s"
    decides.round_ended(100 * MIB, 21 * MIB, 0.5, 0.5)
    assert not decides.why_no_other(1)
    assert decides.whole(30 * MIB)  # nothing is written in the pause


def test_telling_takes_time_too() -> None:
    decides = policy()
    decides.telling_s = 0.1
    decides.round_ended(100 * MIB, 20 * MIB, 1, 0)
    assert decides.fits(19 * MIB)
    assert not decides.fits(21 * MIB)
    decides.telling_s = 0.5
    assert not decides.fits(1)
    assert decides.fits(0)  # there is nothing to tell


def test_a_given_time_is_used() -> None:
    decides = policy(precopy_s=5)
    decides.round_ended(MIB, 0, 0.001, 0)
    assert not decides.why_no_other(4.9)
    assert decides.time_left_s(4) == 1
    assert decides.why_no_other(5) == "precopy has taken 5 s"
    assert decides.whole(0)


@pytest.mark.parametrize("mode", list(Mode))
def test_what_is_sent_in_the_pause(mode: Mode) -> None:
    """Nothing was measured yet."""
    decides = policy(mode)
    assert decides.whole(MIB) is (mode in (Mode.STOP_AND_COPY, Mode.PRECOPY))


# ---- the engines


@pytest.mark.parametrize("mode", list(Mode))
async def test_each_mode(mode: Mode) -> None:
    pair = make_pair(mode=mode, precopy_s=math.inf if mode.has_rounds else 0)
    for memory in pair.machine.memories:
        memory.write(0, b"x" * 3 * 4096)
    async with running(pair):
        await pair.move()
        whole = mode in (Mode.STOP_AND_COPY, Mode.PRECOPY)
        assert pair.dest._all_here.is_set() is whole
        if not whole:
            pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is pair.dest.state is State.COMPLETED
    [server] = pair.servers
    assert (
        server.log.count("pushes") == {Mode.POSTCOPY: 0, Mode.STOP_AND_COPY: 1, Mode.HYBRID: 3, Mode.PRECOPY: 4}[mode]
    )
    assert [log.closed for log in pair.machine.logs] == [True] * mode.has_rounds
    assert set(server.stale) == {0, 1}
    assert server.started
    assert pair.pager.armed
    assert ("expects a push" in pair.pager.log) is mode.has_rounds
    # The second and the third round leave what they have sent.
    assert pair.source.iteration == pair.dest.iteration == (3 if mode.has_rounds else 0)
    assert pair.source.statistics().dirty_sync_count == (4 if mode.has_rounds else 0)
    assert pair.dest.statistics().dirty_sync_count == (4 if mode.has_rounds else 0)
    there, here = vars(pair.dest.breakdown), vars(pair.source.breakdown)
    assert here == there
    assert None not in here.values()
    parts = ("stop", "dirty", "state", "send", "prepared", "commit")
    assert sum(here[f"{part}_ns"] for part in parts) == pair.source.downtime_ns


async def test_pages_that_change_are_forgotten_there() -> None:
    pair = make_pair(mode=Mode.PRECOPY, precopy_s=math.inf)
    async with running(pair):
        await pair.move()
    # In each round, and in the pause.
    assert [line for line in pair.pager.log if line.startswith("forgot")] == [
        "forgot 1 of block 0",
        "forgot 1 of block 1",
    ] * (pair.dest.iteration + 1)


@pytest.mark.parametrize("what", ["cancel", "stop", "fail", "dest"])
async def test_the_machine_never_stopped(what: str) -> None:
    """Whatever ends it in precopy; and it can be sent away again."""
    pair = make_pair(mode=Mode.HYBRID, precopy_s=3600)
    async with running(pair):
        pair.go.set()
        await pair.until(lambda: pair.source.iteration == 2)
        assert pair.source.status == "active"
        if what == "cancel":
            assert pair.source.cancel()
        elif what == "stop":
            pair.stop_source.set()
        elif what == "dest":
            pair.stop_dest.set()
        else:
            pair.machine.fail()
    if what != "fail":
        assert_back_at_source(pair)
    assert pair.machine.resumed == 0
    assert [log.closed for log in pair.machine.logs] == [True]
    assert pair.twin.loaded is None


async def test_the_user_ends_precopy() -> None:
    pair = make_pair(mode=Mode.HYBRID, precopy_s=3600)
    async with running(pair):
        pair.go.set()
        await pair.until(lambda: pair.source.iteration == 1)
        assert pair.machine.state is MachineState.RUNNING
        pair.source.switch_over()
        await pair.until(lambda: pair.source.state is State.POSTCOPY)
        with pytest.raises(MigrationError, match="no precopy to end"):
            pair.source.switch_over()
        assert not pair.source.cancellable
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.dest.state is State.COMPLETED


async def test_the_source_knows_what_remains_while_the_machine_is_here() -> None:
    pair = make_pair(mode=Mode.HYBRID, precopy_s=3600)
    pair.machine.memories[0].write(0, b"x" * 3 * 4096)
    async with running(pair):
        await pair.until(lambda: pair.source.state is State.READY)
        assert pair.source.statistics().remaining_bytes is None
        pair.go.set()
        await pair.until(lambda: pair.source.iteration == 1)
        seen = {pair.source.statistics().remaining_bytes}
        await pair.until(lambda: pair.source.iteration == 2)
        seen.add(pair.source.statistics().remaining_bytes)
        assert seen <= {3 * 4096, 2 * 4096, 0}  # not sent yet, written since, sent
        pair.source.switch_over()
        await pair.until(lambda: pair.source.state is State.POSTCOPY)
        assert pair.source.statistics().remaining_bytes is None
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is State.COMPLETED


async def test_a_mode_without_rounds_gets_none() -> None:
    async with running(make_pair()) as pair:
        with pytest.raises(MigrationError, match="of mode postcopy"):
            pair.source.set_precopy(5)
        pair.source.set_precopy(0)
        await pair.move()
        pair.pager.channel.tell(EventType.COMPLETE)
    assert not pair.source.iteration


def test_what_makes_no_sense() -> None:
    class Still(FakeMachine):
        live = False

    for machine, options, reason in (
        (Still(), SourceOptions(mode=Mode.HYBRID), "does not run"),
        (FakeMachine(), SourceOptions(mode=Mode.STOP_AND_COPY, bulk_channels=0), "sent on bulk channels"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            SourceMigration(machine, cast(Any, None), options)


async def test_a_destination_without_background() -> None:
    pair = make_pair(mode=Mode.HYBRID, precopy_s=math.inf)
    pair.dest._background = False
    async with running(pair):
        pair.go.set()
    assert_back_at_source(pair)
    assert "--no background" in str(pair.source.failure)


@pytest.mark.parametrize("mode", [Mode.POSTCOPY, Mode.PRECOPY])
async def test_an_older_destination(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything happens in the pause, as it did; what that version has not is refused by name."""
    monkeypatch.setattr(FakeLink, "version", property(lambda _: 3, lambda *_: None), raising=False)
    pair = make_pair(mode=mode, precopy_s=math.inf if mode.has_rounds else 0)
    async with running(pair):
        if mode is Mode.POSTCOPY:
            await pair.move()
            assert not pair.servers[0].stale
            assert set(pair.servers[0].present) == {0, 1}
            assert pair.pager.armed
            pair.stop_source.set()
            pair.stop_dest.set()
            return
        pair.go.set()
    assert_back_at_source(pair)
    assert "speaks version 3 of the protocol" in str(pair.source.failure)


async def test_a_round_that_is_never_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "ROUND_TIMEOUT_S", 0.2)
    async with lone_source(until=p.Round, mode=Mode.HYBRID, precopy_s=3600.0) as (_, source, machine):
        await source._until(lambda: source.state is State.ABORTED)
        assert machine.state is MachineState.RUNNING
        assert machine.resumed == 0
        assert str(source.failure) == "the destination did not say round-done within 0.2 s"


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ([p.Round(1, 2, False)], "number 1 came, 0 was due"),
        ([p.Round(0, 3, False)], "3 page maps, 2 came"),
        ([p.Round(0, 2, False), p.PageMap(0, 0, 40, b"")], "page-map came where switchover was due"),
        ([p.Round(0, 2, False), p.StaleMap(5, 0, 40, b"")], "there is no block 5"),
        ([p.Round(0, 2, False), p.StaleMap(0, 0, 40, b""), p.Round(1, 1, False)], "the page map of block 1 ends at 0"),
    ],
)
async def test_a_source_that_makes_no_sense(says: list[p.Message], reason: str) -> None:
    async with lone_destination() as (peer, dest, twin):
        for message in (p.PageMap(0, 0, 40, b""), p.PageMap(1, 0, 80, b""), *says):
            await peer.say(message)
            if message == p.Round(0, 2, False):
                await peer.read(p.RoundDone)
        await peer.read(p.Abort)
        assert reason in str(dest.failure)
        assert twin.resumed == 0


async def test_rounds_without_end_cost_nothing() -> None:
    """A source that only sends rounds: as many as it likes, one at a time, and they can be interrupted."""
    async with lone_destination() as (peer, dest, _):
        maps: list[p.Message] = [p.PageMap(0, 0, 40, b""), p.PageMap(1, 0, 80, b"")]
        for number in range(200):
            for message in (*maps, p.Round(number, 2, False)):
                await peer.say(message)
            assert await peer.read(p.RoundDone) == p.RoundDone(number)
            maps = [p.StaleMap(0, 0, 40, b""), p.StaleMap(1, 0, 80, b"")]
        assert dest.state is State.READY
        assert dest.cancel()
        assert "cancelled" in (await peer.read(p.Abort)).reason


# ---- real memory

PAGE = 4096
PAGES = (300, 700)


class Scribbler(FakeMachine):
    """Writes pages at random, as long as it runs."""

    def __init__(self, backing: str, seed: int) -> None:
        super().__init__()
        for memory in self.memories:
            memory.close()
        self.memories = [Memory.create(backing, pages * PAGE) for pages in PAGES]
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.writes = 0

    def dirty_log(self) -> DirtyLog:
        return DirtyLog(self.memories)

    def statistics(self) -> MachineStatistics:
        return MachineStatistics(self.state)

    def write(self, count: int = 1) -> None:
        for _ in range(count):
            block = self._random.randrange(2)
            page = min(self._random.randrange(PAGES[block]), self._random.randrange(PAGES[block]))
            data = b"" if self._random.random() < 0.1 else self._random.randbytes(40)
            self.memories[block].write(page * PAGE + self._random.randrange(PAGE - 40), data or bytes(40))
            self.writes += 1

    def _run(self) -> None:
        while not self._stop.wait(0.0002):
            self.write()

    async def resume(self) -> None:
        await super().resume()
        self._stop.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    async def pause(self, timeout_s: float = 10.0) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
        self._thread = None
        await super().pause()

    def digests(self) -> list[int]:
        return [memory.digest() for memory in self.memories]


class Standing(FakeMachine):
    """The twin: it does nothing, so that its memory can be compared."""

    def __init__(self, backing: str) -> None:
        super().__init__()
        for memory in self.memories:
            memory.close()
        self.memories = [Memory.create(backing, pages * PAGE) for pages in PAGES]


async def move(machine: Scribbler, backing: str, pager: str, options: SourceOptions, meddle: str) -> dict[str, Any]:
    """One migration over real connections; what became of it."""
    twin, go, stop = Standing(backing), trio.Event(), trio.Event()
    acceptor = await Acceptor.open(Address("127.0.0.1", 0), "dest", lambda waiting: "")
    source: SourceMigration

    def meddles() -> None:
        if source.iteration == 3 and meddle == "cancel":
            source.cancel()
        elif source.iteration == 3 and meddle == "switch over" and not source.paused_ns:
            source.switch_over()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(acceptor.serve)
        link = await CallingLink.open(acceptor.addresses[0], "source")
        source = SourceMigration(machine, link, options, on_change=meddles)
        go.set()
        async with trio.open_nursery() as both:
            both.start_soon(source.run, go, stop)
            dest = DestinationMigration(
                await acceptor.next_link(),
                make_machine=lambda *_: twin,
                make_pager=Pager if pager == "threads" else ProcessPager,
            )
            both.start_soon(dest.run, stop)
        result = {
            "state": source.state.value,
            "failure": str(source.failure),
            "requests": dest.statistics().requests,
            "iteration": source.iteration,
            "same": None,
        }
        if dest.state is State.COMPLETED:
            there = await dest.hand_over()
            result["same"] = machine.digests() == [memory.digest() for memory in cast(Standing, there).memories]
            await there.close()
        await dest.close()
        nursery.cancel_scope.cancel()
    await acceptor.close()
    return result


async def moved(backing: str, pager: str, mode: str, precopy_s: float, meddle: str, seed: int) -> list[dict[str, Any]]:
    machine = Scribbler(backing, seed)
    machine.write(500)
    await machine.resume()
    options = SourceOptions(mode=Mode(mode), precopy_s=precopy_s, max_downtime_s=1e-6, precopy_rounds=5)
    results = [await move(machine, backing, pager, options, meddle)]
    if meddle == "cancel":
        assert machine._thread is not None
        before = machine.writes
        results.append(await move(machine, backing, pager, options, ""))
        assert machine.writes > before
    await machine.close()
    return results


@pytest.mark.needs("uffd")
@pytest.mark.parametrize(
    ("backing", "pager", "mode", "precopy_s", "meddle"),
    [
        ("memfd", "threads", "hybrid", math.inf, ""),
        ("anon", "threads", "hybrid", 0.4, ""),
        ("memfd", "process", "hybrid", 0.3, ""),
        ("memfd", "process", "precopy", math.inf, ""),
        ("anon", "threads", "precopy", math.inf, ""),
        ("memfd", "threads", "stop-and-copy", 0, ""),
        ("memfd", "threads", "postcopy", 0, ""),
        ("anon", "process", "postcopy", 0, ""),
        ("memfd", "threads", "hybrid", 60, "switch over"),
        ("memfd", "threads", "hybrid", 60, "cancel"),
    ],
)
def test_no_old_page_survives(
    backing: str,
    pager: str,
    mode: str,
    precopy_s: float,
    meddle: str,
    run_in_child: Callable[..., Any],
    require: Callable[..., None],
) -> None:
    seed = random.randrange(1 << 32)
    if meddle == "cancel":  # the second time it ends by itself
        precopy_s = 0.6
    result = run_in_child(moved, backing, pager, mode, precopy_s, meddle, seed, deadline_s=60)
    assert result.returncode == 0, f"seed {seed}\n{result.stdout}{result.stderr}"
    results = result.value
    if meddle == "cancel":
        assert results.pop(0)["state"] == "aborted"
    [last] = results
    assert last["state"] == "completed", last
    assert last["same"], f"seed {seed}: {last}"
    if mode in ("precopy", "stop-and-copy"):
        assert last["requests"] == 0
    assert (last["iteration"] > 0) is (mode in ("precopy", "hybrid"))
