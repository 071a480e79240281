# SPDX-License-Identifier: Apache-2.0
"""A control connection on which a peer says much more than there is to say."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair, wait_all_tasks_blocked

from postcopy import wire as p
from postcopy.errors import PeerError
from postcopy.migration.connection import MESSAGES_PER_S, SEND_BYTES, STEP_TIMEOUT_S, Control
from postcopy.wire import DestinationProtocol, SourceProtocol, State


def control(state: State) -> tuple[Control[DestinationProtocol], trio.abc.SendStream]:
    here, there = memory_stream_pair()
    protocol = DestinationProtocol()
    protocol._state = state
    return Control(here, protocol), there


async def run_until_lost(side: Control[Any]) -> None:
    with pytest.raises(PeerError):
        await side.run()


async def test_pings_without_end(mock_clock: MockClock) -> None:
    """Thousands arrive in one read: the others have their turn meanwhile, and a second's worth takes a second."""
    side, peer = control(State.POSTCOPY)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_until_lost, side)
        nursery.start_soon(peer.send_all, p.encode(p.Ping(1)) * (2 * MESSAGES_PER_S + 2))
        for _ in range(2):
            turns = 0
            while side._received <= MESSAGES_PER_S:
                await trio.lowlevel.checkpoint()
                turns += 1
            assert turns >= MESSAGES_PER_S // 64
            await wait_all_tasks_blocked()
            assert side._received == MESSAGES_PER_S + 1
            side._received -= 1  # told from the next second's
            mock_clock.jump(1)
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_maps_that_nobody_takes() -> None:
    """They are large: only a few of them are kept, and the peer has to wait."""
    here, there = (trio.SocketStream(trio.socket.from_stdlib_socket(one)) for one in socket.socketpair())
    protocol = DestinationProtocol()
    protocol._state = State.READY
    side = Control(here, protocol)
    data = p.encode(p.PageMap(0, 0, 1 << 20, b"\x01" * (1 << 20)))
    sent = 0

    async def flood() -> None:
        nonlocal sent
        while True:
            await there.send_all(data)
            sent += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_until_lost, side)
        nursery.start_soon(side.receive, p.PageMap)
        nursery.start_soon(flood)
        while side._messages.statistics().tasks_waiting_send == 0:
            await trio.lowlevel.checkpoint()
        await wait_all_tasks_blocked(0.05)
        assert sent <= 12
        nursery.cancel_scope.cancel()
    await here.aclose()
    await there.aclose()


async def test_a_peer_that_lives_and_takes_nothing(autojump_clock: MockClock) -> None:
    """A machine may be paused while its state is sent: it does not wait for ever for a peer that only gives signs of
    life. One that takes a little in time is waited for, however long all of it takes."""
    here, there = lockstep_stream_pair()
    protocol = SourceProtocol()
    protocol._state = State.MAPS
    side = Control(here, protocol)
    data = bytes(4 * SEND_BYTES)

    async def pings() -> None:
        while True:
            await trio.sleep(1)
            await there.send_all(p.encode(p.Ping(1)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_until_lost, side)
        nursery.start_soon(pings)
        async with trio.open_nursery() as sending:
            sending.start_soon(side.send, data)
            taken = 0
            while taken < len(data):
                got = await there.receive_some(SEND_BYTES)
                taken += len(got)
                if len(got) > 100:  # (no ping)
                    await trio.sleep(STEP_TIMEOUT_S * 0.8)
        began_s = trio.current_time()
        with pytest.raises(PeerError, match="the destination has taken nothing of a message within 30 s"):
            await side.send(data)
        assert trio.current_time() - began_s < 2 * STEP_TIMEOUT_S + 1
        while protocol.state is not State.ABORTED:  # noqa: ASYNC110  (no event tells)
            await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
