# SPDX-License-Identifier: Apache-2.0
"""The first connection breaks anywhere: in each message, in its length, and between two."""

from __future__ import annotations

import math
import socket

import pytest
import trio
import trio.testing

from postcopy import wire as p
from postcopy.dataplane.pager import EventType
from postcopy.machines import MachineState
from postcopy.migration.precopy import Mode
from postcopy.wire import State
from tests.unit.migration._engines import (
    Pair,
    make_pair,
    running,
)

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


async def over_a_cable(direction: str, limit: int | None, mode: Mode) -> tuple[Pair, Cable]:
    """A whole migration; whoever comes back to one that is over is told so, as a listener would."""
    cable = Cable(direction, limit)
    pair = make_pair(controls=(cable.ends[0][0], cable.ends[1][0]), mode=mode, precopy_s=math.inf)
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


@pytest.mark.slow
@pytest.mark.parametrize("mode", [Mode.POSTCOPY, Mode.HYBRID])
@pytest.mark.parametrize("direction", ["to-dest", "to-source"])
async def test_cut_everywhere(direction: str, mode: Mode) -> None:
    """One side has the machine, and runs it; behind the point of no return everything comes all the same."""
    pair, cable = await over_a_cable(direction, None, mode)
    assert [log.closed for log in pair.machine.logs] == [True] * (mode is Mode.HYBRID)
    assert pair.source.state is pair.dest.state is State.COMPLETED
    ends = []
    for limit in range(0, cable.passed[direction], 3 if mode is Mode.POSTCOPY else 11):
        pair, _ = await over_a_cable(direction, limit, mode)
        assert all(log.closed for log in pair.machine.logs), limit
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
