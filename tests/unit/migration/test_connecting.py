# SPDX-License-Identifier: Apache-2.0
"""The first connection of a migration, and what one carries: a connection that does not come, half a message, a closed
descriptor."""

from __future__ import annotations

import socket
from typing import cast

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from postcopy import wire as p
from postcopy.dataplane.pager import EventType
from postcopy.errors import MigrationError, PeerError
from postcopy.machines import MachineState
from postcopy.migration.connection import Control
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.net import Address, Link
from postcopy.wire import State
from tests.unit.migration._engines import (
    FakeLink,
    FakeMachine,
    lone_source,
    make_pair,
    running,
)


async def test_connecting_is_a_state_that_can_be_cancelled(autojump_clock: MockClock) -> None:
    machine = FakeMachine()
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
    machine = FakeMachine()

    async def refused() -> Link:
        await trio.lowlevel.checkpoint()
        raise error

    source = SourceMigration(machine, refused, SourceOptions(), peer=Address("far.example", 7))
    await source.run(trio.Event(), trio.Event())
    assert source.status == "failed"
    assert source.ended_ns >= source.started_ns
    assert source.connected.is_set()
    assert str(error) in str(source.failure)
    await machine.close()


async def test_a_connection_that_comes() -> None:
    pair = make_pair()
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
    async with running(pair):
        await pair.until(lambda: pair.source.state is State.READY)
        assert pair.source.peer == cast(Link, link).peer
        await pair.move()
        pair.pager.channel.tell(EventType.COMPLETE)
    assert pair.source.state is pair.dest.state is State.COMPLETED


async def test_a_connection_that_comes_in_the_moment_of_the_end() -> None:
    """It is closed: the caller of `run` has never seen it."""
    here, there = socket.socketpair()
    link, machine, asked, answer = FakeLink(here), FakeMachine(), trio.Event(), trio.Event()

    async def connect() -> Link:
        asked.set()
        await answer.wait()
        return link

    source = SourceMigration(machine, connect, SourceOptions())
    with there, trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.run, trio.Event(), trio.Event())
            await asked.wait()
            answer.set()
            scope.cancel()
    assert scope.cancelled_caught
    assert link.control.socket.fileno() == -1
    await machine.close()


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

        async def end() -> None:
            await control.give_reason("no more")
            await control.close()

        nursery.start_soon(end)
        while data := await stream.receive_some():
            got += data
        await stream.aclose()
    assert len(got) < len(whole)
    assert not any(got)
    assert protocol.state is State.ABORTED


async def test_trouble_of_this_host_is_not_the_peers() -> None:
    """EBADF, say: the connection is lost all the same, and the reason says where."""
    async with lone_source() as (_, source, machine):
        stream = cast(Link, source._link).control
        stream.socket.close()
        with trio.fail_after(10):
            await machine.runs_again.wait()
    assert isinstance(source.failure, MigrationError)
    assert "this host" in str(source.failure)
