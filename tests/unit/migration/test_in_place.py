# SPDX-License-Identifier: Apache-2.0
"""Messages that are sent and received in a pause, past the event loop."""

from __future__ import annotations

import array
import fcntl
import socket
import termios
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from postcopy import wire as p
from postcopy.errors import ConnectionLost, PeerError, ProtocolError
from postcopy.migration import connection
from postcopy.migration.connection import Control
from postcopy.tls import Credentials, TlsStream
from postcopy.tls._authority import issue, new_authority
from postcopy.wire import DestinationProtocol, State


class Side:
    """A destination in a pause, which waits for a `commit`, and its peer's socket."""

    def __init__(self, here: trio.abc.HalfCloseableStream, there: socket.socket) -> None:
        self.protocol = DestinationProtocol()
        self.protocol._state = State.PREPARED
        self.control = Control(here, self.protocol, 3600.0)  # (nothing is found only since there was no sign of life)
        self.peer = there
        self.steps = 0  # of the other tasks of this thread
        self.at_a_step: Callable[[], None] = lambda: None

    async def others(self) -> None:
        while True:
            await trio.lowlevel.checkpoint()
            self.steps += 1
            self.at_a_step()

    async def wait_until_others_run(self) -> None:
        """Waits for a message, in place as long as it likes."""
        with trio.CancelScope() as scope:
            self.at_a_step = scope.cancel
            await self.control.receive(p.Commit)
        self.at_a_step = lambda: None
        assert self.steps > 0


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here is about how long it is."""
    for name in ("IN_PLACE_S", "PATIENCE_S", "HURRY_S"):
        monkeypatch.setattr(connection, name, 60.0)


@asynccontextmanager
async def in_a_hurry(
    ends: type[Exception] | None = None, match: str | None = None, stream: TlsStream | None = None
) -> AsyncIterator[Side]:
    """`ends`: what its connection ends with, and then what is inside is cancelled. `stream`: that connection, where it
    is no pair of sockets."""
    found: list[type[Exception]] = []
    here, there = socket.socketpair()
    there.setblocking(False)
    plain = trio.SocketStream(trio.socket.from_stdlib_socket(here))
    with there:
        side = Side(stream or plain, there)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:

                async def run() -> None:
                    if ends is None:
                        await side.control.run()
                    else:
                        with pytest.raises(ends, match=match):
                            await side.control.run()
                        found.append(ends)
                        nursery.cancel_scope.cancel()

                nursery.start_soon(run)
                await wait_all_tasks_blocked()  # the receiver is idle
                nursery.start_soon(side.others)
                side.control.hurry()
                yield side
                nursery.cancel_scope.cancel()
        assert found == [ends] * (ends is not None)
        await side.control._stream.aclose()
        await plain.aclose()


async def test_a_message_is_sent_and_received_while_no_other_task_runs() -> None:
    async with in_a_hurry() as side:
        side.peer.send(p.encode(p.Commit()))
        assert isinstance(await side.control.receive(p.Commit), p.Commit)
        assert side.control.received_ns > 0
        running = side.protocol.send(p.Running(1, 1))
        await side.control.send(running)
        assert side.peer.recv(1024) == running
        assert side.steps == 0


async def test_what_follows_a_message_is_received_after_it() -> None:
    """Also what was in the same read, and the first half of something."""
    pong = p.encode(p.Pong(1))
    async with in_a_hurry() as side:
        placed = p.encode(p.Ping(7)) + p.encode(p.CompleteAck({}))
        side.peer.send(p.encode(p.Commit()) + p.encode(p.Ping(1)) + pong[:5])
        await side.control.receive(p.Commit)
        side.control.no_hurry()
        side.protocol._state = State.CLOSING
        await wait_all_tasks_blocked_but(side)
        assert p.encode(p.Pong(1)) in side.peer.recv(1024)
        side.peer.send(pong[5:] + placed)
        await side.control.receive(p.CompleteAck)


async def wait_all_tasks_blocked_but(side: Side) -> None:
    """Until the peer has been sent something."""
    while True:
        with suppress(BlockingIOError):
            if side.peer.recv(1, socket.MSG_PEEK):
                return
        await trio.lowlevel.checkpoint()


async def test_a_sign_of_life_is_answered_and_passed_over() -> None:
    async with in_a_hurry() as side:
        side.peer.send(p.encode(p.Ping(3)) + p.encode(p.Pong(1)) + p.encode(p.Commit()))
        await side.control.receive(p.Commit)
        assert side.steps == 0
        await wait_all_tasks_blocked_but(side)
        assert side.peer.recv(1024) == p.encode(p.Pong(3))


async def test_an_abort_ends_the_connection_with_its_reason() -> None:
    async with in_a_hurry(PeerError, "the source aborted: enough") as side:
        side.peer.send(p.encode(p.Abort("enough")))
        await side.control.receive(p.Commit)


async def test_an_end_is_the_receivers_to_find() -> None:
    async with in_a_hurry(ConnectionLost, "the source closed the control connection") as side:
        side.peer.shutdown(socket.SHUT_WR)
        await side.control.receive(p.Commit)


async def test_what_is_no_message_is_refused() -> None:
    async with in_a_hurry(ProtocolError) as side:
        side.peer.send(bytes(64))
        with pytest.raises(ProtocolError):
            await side.control.receive(p.Commit)
        await trio.sleep_forever()  # until the receiver has found the same


@pytest.mark.parametrize("limit", ["IN_PLACE_S", "PATIENCE_S"])
async def test_a_peer_that_says_nothing_is_waited_for_as_ever(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, limit, 0.002)
    async with in_a_hurry() as side:
        await side.wait_until_others_run()
        side.peer.send(p.encode(p.Commit()))
        await side.control.receive(p.Commit)


async def test_patience_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that has this side hurry again and again does not keep its thread."""
    monkeypatch.setattr(connection, "PATIENCE_S", 0.002)
    async with in_a_hurry() as side:
        await side.wait_until_others_run()
        assert side.control._patience_s <= 0
        side.control.hurry()
        before = side.steps
        side.peer.send(p.encode(p.Commit()))
        await side.control.receive(p.Commit)
        assert side.steps > before


async def test_a_message_that_does_not_fit_into_the_socket() -> None:
    async with in_a_hurry() as side:
        data, got = bytes(range(256)) * 16384, bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side.control.send, data)
            while len(got) < len(data):
                with suppress(BlockingIOError):
                    got += side.peer.recv(1 << 20)
                await trio.lowlevel.checkpoint()
        assert got == data


class Wire:
    """Between two ends under TLS: what each of them has sent goes to the other one as the test lets it."""

    def __init__(self) -> None:
        self.client, self._near = socket.socketpair()
        self.server, self._far = socket.socketpair()
        for end in (self._near, self._far):
            end.setblocking(False)

    def carry(self) -> None:
        for one, other in ((self._near, self._far), (self._far, self._near)):
            with suppress(BlockingIOError):
                while data := one.recv(1 << 16):
                    other.send(data)

    def to_client(self) -> bytes:
        return self._far.recv(1 << 16)

    def pass_on(self, data: bytes) -> None:
        self._near.send(data)

    def until_client_has_read(self) -> None:
        unread = array.array("i", [1])
        while unread[0]:
            fcntl.ioctl(self.client, termios.FIONREAD, unread)
            time.sleep(0.001)

    def close(self) -> None:
        for end in (self._near, self._far):
            end.close()


@asynccontextmanager
async def under_tls(
    tmp_path: Path, ends: type[Exception] | None = None, match: str | None = None
) -> AsyncIterator[tuple[Side, TlsStream, Wire]]:
    """As `in_a_hurry`, its peer, and what is between them."""
    new_authority(tmp_path / "ca")
    issue(tmp_path / "ca", ["host-a"], tmp_path / "host")
    credentials = Credentials(tmp_path / "host")
    wire = Wire()
    client, server = [
        TlsStream(trio.socket.from_stdlib_socket(end), await credentials.context(server=listens), name)
        for end, listens, name in ((wire.client, False, "host-a"), (wire.server, True, ""))
    ]
    async with client, server:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for stream in (client, server):
                    nursery.start_soon(stream.handshake)
                while nursery.child_tasks:
                    wire.carry()
                    await trio.lowlevel.checkpoint()
        async with in_a_hurry(ends, match, client) as side:
            yield side, server, wire
    wire.close()


@pytest.mark.needs("tls")
async def test_half_a_record_is_nothing_yet(tmp_path: Path) -> None:
    """Not an end, and nothing that the other tasks would have to run for."""
    async with under_tls(tmp_path) as (side, server, wire):
        message = p.encode(p.Commit())
        assert server.write_now(message) == len(message)
        record = wire.to_client()
        wire.pass_on(record[:-7])

        def rest() -> None:
            wire.until_client_has_read()
            wire.pass_on(record[-7:])

        thread = threading.Thread(target=rest)
        thread.start()
        assert isinstance(await side.control.receive(p.Commit), p.Commit)
        thread.join()
        await side.control.send(running := side.protocol.send(p.Running(1, 1)))
        assert side.steps == 0
        wire.carry()
        assert server.read_now() == running


@pytest.mark.parametrize("how", ["in order", "by nonsense", "behind a message"])
@pytest.mark.needs("tls")
async def test_an_end_that_was_read_in_place(tmp_path: Path, how: str) -> None:
    """Nothing more will make the socket readable: the receiver has to look, and not when it has heard nothing for
    long."""
    reason = "TLS failed" if how == "by nonsense" else "closed the control connection"
    async with under_tls(tmp_path, ConnectionLost, reason) as (side, server, wire):
        if how == "by nonsense":
            wire.pass_on(b"\x17\x03\x03\x00\x20" + bytes(32))
        else:
            if how == "behind a message":
                assert server.write_now(p.encode(p.Commit()))
            assert server._close_notify() == 0
            wire.carry()
        if how == "behind a message":
            await side.control.receive(p.Commit)
        await side.control.receive(p.Commit)


@pytest.mark.needs("tls")
async def test_more_than_one_read_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the stream still holds behind the message that was waited for is received too."""
    monkeypatch.setattr(connection, "RECEIVE_BYTES", len(p.encode(p.Commit())))
    async with under_tls(tmp_path) as (side, server, wire):
        assert server.write_now(p.encode(p.Commit()) + p.encode(p.Ping(3)))
        wire.carry()
        await side.control.receive(p.Commit)
        side.control.no_hurry()
        while (answer := server.read_now()) is None:
            await trio.lowlevel.checkpoint()
            wire.carry()
        assert answer == p.encode(p.Pong(3))
