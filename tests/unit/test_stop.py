# SPDX-License-Identifier: Apache-2.0
"""When a signal is the first one, when it insists, and when the command is ended from outside."""

from __future__ import annotations

import trio
import trio.testing

from postcopy._stop import INSIST_S, TOGETHER_S, Stop


async def test_nothing_to_lose(autojump_clock: trio.testing.MockClock) -> None:
    stop = Stop()
    assert not stop.ask("SIGTERM")
    assert stop.is_set()
    assert not stop.ask("SIGTERM")  # right with it: timeout(1) sends it twice
    await trio.sleep(2 * TOGETHER_S)
    assert stop.ask("Ctrl-C")  # nothing was said that would be lost: it is ended from outside
    assert not stop.insisted


async def test_insisting(autojump_clock: trio.testing.MockClock) -> None:
    stop = Stop()
    stop.ask("Ctrl-C")
    await trio.sleep(5)  # it takes a while until there is something to be said
    stop.warned()
    assert not stop.ask("Ctrl-C")  # too soon for an answer to that
    assert not stop.insisted
    await trio.sleep(INSIST_S)
    changes = stop.changes
    assert not stop.ask("SIGTERM")
    assert stop.insisted
    assert changes.is_set()
    await trio.sleep(2 * TOGETHER_S)
    assert stop.ask("SIGTERM")


async def test_too_late(autojump_clock: trio.testing.MockClock) -> None:
    """It warns again: the first warning may not have been seen."""
    stop = Stop()
    for number in range(1, 4):
        assert not stop.ask(f"signal {number}")
        assert (stop.has_warned, stop.by) == (False, f"signal {number}")
        stop.warned()
        await trio.sleep(INSIST_S + 1)
    assert not stop.insisted
    stop.ask("Ctrl-C")
    stop.warned()
    await trio.sleep(2 * TOGETHER_S)
    assert not stop.ask("Ctrl-C")
    assert stop.insisted


async def test_nothing_more_to_lose(autojump_clock: trio.testing.MockClock) -> None:
    """What was warned of has arrived: the next signal does not insist on losing it, nor is it ignored."""
    stop = Stop()
    stop.ask("Ctrl-C")
    stop.warned()
    stop.settled()
    assert not stop.ask("Ctrl-C")
    await trio.sleep(2 * TOGETHER_S)
    assert stop.ask("Ctrl-C")
    assert not stop.insisted


async def test_requests() -> None:
    stop = Stop()
    stop.set()
    assert stop.is_set()
    assert not stop.insisted
    assert not stop.has_warned  # it may be decided in this very moment what would be lost
    with trio.testing.assert_checkpoints():
        await stop.wait()
    stop.insist()
    assert stop.insisted
