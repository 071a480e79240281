# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ASYNC240  (a file of the test's own is looked at where it is needed)
"""The control socket against those who may connect and mean no good: bounded memory and time for each, and the honest
client is always served."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from postcopy.errors import ConfigurationError, PeerError, ResourceError
from postcopy.records import VERSION, Record
from postcopy.service import server as server_module
from postcopy.service.client import ControlClient, _connect
from postcopy.service.options import check_control_path
from postcopy.service.schema import ControlError, LineSplitter, Request
from postcopy.service.server import MAX_CLIENTS, QUEUE_BYTES, ControlServer

DEADLINE_S = 120.0
PIPELINED = 9_000


class Big(Record):
    big: str


class ControlHandler:
    """What is asked."""

    def __init__(self) -> None:
        self.big = 0
        self.asked = 0

    async def execute(self, request: Request) -> Record:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        if request.command == "quit":
            raise KeyError("a mistake")
        if request.command == "end":
            await trio.sleep_forever()
        return Big(big="x" * self.big)


@pytest.fixture
def handler() -> ControlHandler:
    return ControlHandler()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control"


@asynccontextmanager
async def serving(path: Path, handler: ControlHandler) -> AsyncIterator[ControlServer]:
    server = await ControlServer.open(str(path), "test", handler.execute)
    try:
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.serve)
                yield server
                nursery.cancel_scope.cancel()
    finally:
        server.close()


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110 -- the deadline is `serving`'s
        await trio.sleep(0.001)


def queued_bytes(server: ControlServer) -> int:
    return sum(client.queued_bytes for client in server._clients)


@pytest.fixture
def deaf(path: Path) -> Iterator[Any]:
    """`deaf(n)`: that many connections that neither say nor read anything."""
    with ExitStack() as stack:

        async def connect(count: int, says: bytes = b"") -> list[socket.socket]:
            sockets = []
            for _ in range(count):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                while True:
                    try:
                        sock.connect(str(path))
                        break
                    except BlockingIOError:  # the backlog is full
                        await trio.sleep(0.001)
                if says:
                    with suppress(OSError):
                        sock.send(says)
                sockets.append(sock)
            await trio.testing.wait_all_tasks_blocked()  # what they have said is heard
            return sockets

        yield connect


async def test_events_without_end_in_place_of_an_answer(path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    with listener, trio.fail_after(DEADLINE_S):
        listener.bind(str(path))
        listener.listen()

        async def flood(stream: trio.SocketStream) -> None:
            greeting = {"postcopy": {"version": "0.1.0", "schema": VERSION, "side": "daemon", "pid": 7}}
            with suppress(trio.BrokenResourceError):
                await stream.send_all(json.dumps(greeting).encode() + b"\n")
                while True:
                    await stream.send_all(b'{"event": "progress", "data": {}}\n' * 1000)

        async with trio.open_nursery() as nursery:
            served = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
            nursery.start_soon(trio.serve_listeners, flood, [served])
            async with ControlClient.open(str(path)) as client:
                with pytest.raises(PeerError, match="10000 events came in place of the answer to status"):
                    await client.execute("status")
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("says", [b"", b'{"execute": "events"}\n', b'{"execute": "status"}\n', b'{"execute": "end"}\n'])
@pytest.mark.slow
async def test_honest_client_among_deaf_ones(path: Path, handler: ControlHandler, deaf: Any, says: bytes) -> None:
    async with serving(path, handler) as server:
        await deaf(MAX_CLIENTS, says)
        async with ControlClient.open(str(path)) as client:
            await deaf(MAX_CLIENTS - 1, says)
            await client.execute("status")
            for _ in range(200):
                await deaf(1, says)
                await client.execute("status")
        await deaf(200, says)
        async with ControlClient.open(str(path)) as client:
            await client.execute("status")
        assert len(server._clients) <= MAX_CLIENTS


async def test_subscriber_that_reads_outlives_idle_ones(path: Path, handler: ControlHandler, deaf: Any) -> None:
    async with serving(path, handler) as server, ControlClient.open(str(path)) as client:
        await client.execute("events")
        for number in range(20):
            await deaf(10)
            server.publish("status", {"n": number})
            assert (await client.next_event())["data"] == {"n": number}


@pytest.mark.slow
async def test_one_that_has_read_everything_outlives_a_burst(path: Path, handler: ControlHandler, deaf: Any) -> None:
    """Whatever the deaf ones say, and although none of them has been silent for as long as the honest one."""
    async with serving(path, handler) as server, ControlClient.open(str(path)) as client:
        await client.execute("events")
        await trio.sleep(0.01)
        for says in (b"", b'{"execute": "status"}\n', b'{"execute": "events"}\n'):
            await deaf(200, says)
            server.publish("status", {"n": len(says)})
            assert (await client.next_event())["data"] == {"n": len(says)}


async def test_one_that_asks_at_once_is_answered_in_a_crowd(path: Path, handler: ControlHandler, deaf: Any) -> None:
    """Deaf ones connect as fast as they can, before and after it, and before it has read its greeting."""
    async with serving(path, handler):
        for _ in range(3):
            await deaf(MAX_CLIENTS)
            async with await _connect(str(path)) as stream:
                await deaf(MAX_CLIENTS)
                await stream.send_all(b'{"execute": "status", "id": 1}\n')
                told = b""
                while b'"id": 1' not in told:
                    more = await stream.receive_some(65536)
                    assert more
                    told += more


async def test_one_that_has_not_come_to_reading_outlives_a_burst(
    path: Path, handler: ControlHandler, deaf: Any
) -> None:
    async with serving(path, handler) as server, ControlClient.open(str(path)) as client:
        await client.execute("events")
        server.publish("status", {"n": 1})
        await deaf(200)
        assert (await client.next_event())["data"] == {"n": 1}
        await client.execute("status")


async def test_who_has_stopped_reading_makes_room(
    path: Path, handler: ControlHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although it has read before; those that have asked and read keep their places."""
    monkeypatch.setattr(server_module, "GRACE_S", 0.0)
    async with serving(path, handler) as server, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(ControlClient.open(str(path))) for _ in range(MAX_CLIENTS)]
        for client in clients:
            await client.execute("events")
        server.publish("status", {"n": 1})
        for client in clients[:5] + clients[6:]:
            await client.next_event()
        async with ControlClient.open(str(path)) as newcomer:
            await newcomer.execute("status")
            for client in clients[:5] + clients[6:]:
                await client.execute("status")
            with pytest.raises(PeerError):
                await clients[5].execute("status")


async def test_connecting_to_a_full_backlog_waits(path: Path, handler: ControlHandler) -> None:
    """connect(2) of a Unix socket whose backlog is full says EAGAIN: that is no answer yet."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)
        first.connect(str(path))
        async with trio.open_nursery() as nursery:

            async def answer() -> None:
                await trio.testing.wait_all_tasks_blocked()  # it has found no place
                listener.accept()[0].close()
                listener.setblocking(False)
                await trio.lowlevel.wait_readable(listener)
                listener.accept()[0].close()

            nursery.start_soon(answer)
            with pytest.raises(PeerError, match="closed the connection"):
                async with ControlClient.open(str(path)):
                    pass


@pytest.mark.slow
async def test_pipelined_commands_are_all_answered(path: Path, handler: ControlHandler) -> None:
    """Also lines that are no requests: a client that reads its answers is not disconnected, however fast it asks."""
    async with serving(path, handler) as server, await trio.open_unix_socket(str(path)) as stream:
        lines = [b'{"execute": "status"}\n', b"x\n", b'{"execute": "events", "arguments": {"enable": false}}\n']
        highest = 0

        async def ask() -> None:
            for _ in range(PIPELINED // 300):
                await stream.send_all(b"".join(lines) * 100)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            splitter, count = LineSplitter(1 << 20), 0
            while count < PIPELINED // 300 * 300 + 1:
                data = await stream.receive_some(1 << 16)
                assert data, f"disconnected after {count} lines"
                count += len(splitter.feed(bytes(data)))
                highest = max(highest, queued_bytes(server))
        assert highest < 64 * 1024


async def test_pipelined_commands_without_reading(
    path: Path, handler: ControlHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not read from any more, and disconnected in the end; meanwhile it has a few answers only."""
    monkeypatch.setattr(server_module, "WRITE_TIMEOUT_S", 0.5)
    handler.big = 1 << 20
    async with serving(path, handler) as server, await trio.open_unix_socket(str(path)) as stream:
        highest = 0
        with suppress(trio.BrokenResourceError):
            while True:
                with trio.move_on_after(0.05):
                    await stream.send_all(b'{"execute": "status"}\n' * 1000)
                highest = max(highest, queued_bytes(server))
        assert server.dropped == 1
        assert handler.asked < 20
        assert highest <= 2 << 20


async def test_events_that_nobody_reads_are_bounded_in_bytes(path: Path, handler: ControlHandler) -> None:
    async with serving(path, handler) as server, await trio.open_unix_socket(str(path)) as stream:
        await stream.send_all(b'{"execute": "events"}\n')
        await until(lambda: any(client.wants_events for client in server._clients))
        for _ in range(100):
            server.publish("progress", {"x": "y" * (1 << 20)})
            assert queued_bytes(server) <= QUEUE_BYTES + (2 << 20)
            await trio.lowlevel.checkpoint()
        await until(lambda: not server._clients)
        assert server.dropped == 1


async def test_half_closed_client_is_answered(path: Path, handler: ControlHandler) -> None:
    async with serving(path, handler) as server, await trio.open_unix_socket(str(path)) as stream:
        await stream.send_all(b'{"execute": "status", "id": 1}\n')
        await stream.send_eof()
        data = b""
        while more := await stream.receive_some(1 << 16):
            data += bytes(more)
        assert json.loads(data.splitlines()[1])["id"] == 1
        await until(lambda: not server._clients)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 60_000,
        b'{"a":' * 12_000,
        b'{"execute": "set", "arguments": {"max-bandwidth": ' + b"9" * 60_000 + b"}}",
        b'{"execute": "set", "arguments": {"max-bandwidth": 1e' + b"9" * 400 + b"}}",
        b'{"execute": "set", "arguments": {"recover-for": 1e308}}',
        b'{"execute": "status", "id": ' + b"9" * 4_000 + b"1e9}",
        b'{"execute": "set", "arguments": {"max-bandwidth": "' + b"9" * 60_000 + b'"}}',
        b'{"execute": "' + b"\\ud800" * 9_000 + b'"}',
        b'{"execute": "status", "id": "\\ud800"}',
        b'{"execute": "status", "arguments": {"machine": "\\u0000"}}',
        b'{"execute": "status", "arguments": {"\\ud800": 1}}',
        b'{"execute": "migrate", "arguments": {"to": "' + b"[" * 4_000 + b'"}}',
        b"{" + b",".join(b'"%d":0' % n for n in range(7000)) + b"}",
        b"\x00" * 60_000,
        b"\xff" * 60_000,
    ],
)
async def test_lines_that_no_one_in_his_right_mind_sends(path: Path, handler: ControlHandler, line: bytes) -> None:
    """Answered in one line, and the next one is heard."""
    async with serving(path, handler), await trio.open_unix_socket(str(path)) as stream:
        await stream.send_all(line + b'\n{"execute": "status", "id": "after"}\n')
        splitter = LineSplitter(1 << 24)
        lines: list[dict[str, Any]] = []
        while len(lines) < 3:
            data = await stream.receive_some(1 << 16)
            assert data
            lines += [json.loads(text) for text in splitter.feed(bytes(data))]
        assert ("error" in lines[1]) or lines[1]["return"] == {"big": ""}
        assert lines[2]["id"] == "after"


async def test_mistake_in_a_command_is_contained(
    path: Path, handler: ControlHandler, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(path, handler), ControlClient.open(str(path)) as client:
        with caplog.at_level(logging.ERROR), pytest.raises(ControlError, match="KeyError") as caught:
            await client.execute("quit")
        assert caught.value.kind == "Failed"
        assert any(record.exc_info for record in caplog.records)
        await client.execute("status")


async def test_no_descriptors_left(path: Path, handler: ControlHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator still gets in: one descriptor is kept for him."""
    async with serving(path, handler) as server:
        accept, failed = server._listener.accept, []

        async def none_left() -> Any:
            if server._spare._fd >= 0:
                failed.append(True)
                raise OSError(errno.EMFILE, "Too many open files")
            return await accept()

        monkeypatch.setattr(server._listener, "accept", none_left)
        async with ControlClient.open(str(path)) as client:  # the one that is being accepted already
            await client.execute("status")
        for _ in range(3):
            async with ControlClient.open(str(path)) as client:
                await client.execute("status")
        assert failed


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOMEM, errno.EPERM, errno.EPROTO])
async def test_no_error_of_accept_ends_the_server(
    path: Path, handler: ControlHandler, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    async with serving(path, handler) as server:
        accept, failures = server._listener.accept, [error] * 3

        async def fail() -> Any:
            if failures:
                raise OSError(failures.pop(), "it failed")
            return await accept()

        monkeypatch.setattr(server._listener, "accept", fail)
        for _ in range(3):
            async with ControlClient.open(str(path)) as client:
                await client.execute("status")


class TestPath:
    @pytest.mark.parametrize(
        ("given", "word"),
        [("", "empty"), ("a\0b", "NUL"), ("/tmp/" + "x" * 103, "107"), ("/tmp/" + "é" * 60, "107")],
    )
    def test_what_is_no_path(self, given: str, word: str) -> None:
        with pytest.raises(ConfigurationError, match=word) as caught:
            check_control_path(given)
        assert "--control" in str(caught.value)
        assert len(str(caught.value)) < 400

    @pytest.mark.parametrize("given", ["", "a\0b", "/tmp/" + "x" * 103])
    async def test_client_says_so_too(self, given: str) -> None:
        with pytest.raises(ConfigurationError, match="the control socket"):
            async with ControlClient.open(given):
                pass

    def test_longest_path(self) -> None:
        assert check_control_path("/tmp/" + "x" * 102) == "/tmp/" + "x" * 102

    @pytest.mark.parametrize("mask", [0, 0o777, 0o022])
    async def test_nobody_else_can_connect_at_any_instant(
        self, path: Path, handler: ControlHandler, monkeypatch: pytest.MonkeyPatch, mask: int
    ) -> None:
        """The file is looked at the moment that it exists, and when it begins to listen."""
        modes: list[int] = []
        bind, listen = socket.socket.bind, socket.socket.listen

        def look(sock: socket.socket) -> None:
            name = sock.getsockname()
            modes.append(stat.S_IMODE(os.lstat(name).st_mode))

        class Watched(socket.socket):
            def bind(self, address: Any) -> None:
                bind(self, address)
                look(self)

            def listen(self, *backlog: int) -> None:
                look(self)
                listen(self, *backlog)

        monkeypatch.setattr(socket, "socket", Watched)
        before = os.umask(mask)
        try:
            async with serving(path, handler):
                assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        finally:
            os.umask(before)
        assert modes
        assert not any(mode & 0o077 for mode in modes)

    async def test_file_system_that_ignores_the_mode(
        self, path: Path, handler: ControlHandler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "fchmod", lambda fd, mode: None)
        before = os.umask(0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: 0)
            try:
                with pytest.raises(ResourceError, match="other users"):
                    await ControlServer.open(str(path), "test", handler.execute)
            finally:
                patch.undo()
                os.umask(before)
        assert not path.exists()
