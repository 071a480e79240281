# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ASYNC240  (a file of the test's own is looked at where it is needed)
"""The control socket: its language, and a server whose clients do what they like."""

from __future__ import annotations

import json
import math
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import ConfigurationError, MigrationError, PeerError, ResourceError
from postcopy.records import VERSION, Record
from postcopy.records.control import EndedMachine
from postcopy.service import server as server_module
from postcopy.service.client import ControlClient, ProcessGoneError
from postcopy.service.render import render, render_answer
from postcopy.service.schema import (
    COMMANDS,
    MAX_LINE_BYTES,
    ControlError,
    LineSplitter,
    Request,
    RequestError,
    answer,
    event,
    parse_arguments,
    parse_request,
)
from postcopy.service.server import MAX_CLIENTS, QUEUE_LINES, ControlServer

_ODD: list[Any] = [None, True, False, 0, 1, -1, 1 << 70, 0.0, 1.5, math.inf, "", "x", "1MiB", "none", "\0", [], {}]


class TestSchema:
    def test_request(self) -> None:
        request = parse_request(b'{"execute": "set", "arguments": {"max-bandwidth": "1MiB/s"}, "id": 7}')
        assert request == Request("set", {"max-bandwidth": 1 << 20}, 7)

    @pytest.mark.parametrize(
        ("line", "kind"),
        [
            (b"", "BadRequest"),
            (b"\xff\xfe", "BadRequest"),
            (b"[]", "BadRequest"),
            (b"7", "BadRequest"),
            (b"{", "BadRequest"),
            (b"[" * 30_000, "BadRequest"),
            (b'{"execute": "status", "execute": "quit"}', "BadRequest"),
            (b'{"execute": "status", "id": NaN}', "BadRequest"),
            (b'{"execute": "status", "id": 1e999}', "BadRequest"),
            (b'{"execute": "status", "id": []}', "BadRequest"),
            (b'{"execute": "status", "and": 1}', "BadRequest"),
            (b'{"execute": 7}', "BadRequest"),
            (b"{}", "BadRequest"),
            (b'{"execute": "sit"}', "CommandNotFound"),
            (b'{"execute": "status", "arguments": []}', "BadArguments"),
            (b'{"execute": "status", "arguments": {"loudly": true}}', "BadArguments"),
            (b'{"execute": "status", "arguments": {"machine": "a b"}}', "BadArguments"),
            (b'{"execute": "migrate", "arguments": {}}', "BadArguments"),
            (b'{"execute": "set", "arguments": {"max-bandwidth": true}}', "BadArguments"),
            (b'{"execute": "set", "arguments": {"max-bandwidth": -1}}', "BadArguments"),
            (b'{"execute": "set", "arguments": {"max-bandwidth": "fast"}}', "BadArguments"),
            (b'{"execute": "set", "arguments": {"bulk-channels": 0}}', "BadArguments"),
            (b'{"execute": "set", "arguments": {"bulk-channels": 1.0}}', "BadArguments"),
            (b'{"execute": "set", "arguments": {"recover-for": "long"}}', "BadArguments"),
            (b'{"execute": "set", "arguments": {"recover-for": 1e999}}', "BadArguments"),
            (b'{"execute": "quit", "arguments": {"force": 1}}', "BadArguments"),
        ],
    )
    def test_what_is_no_request(self, line: bytes, kind: str) -> None:
        with pytest.raises(RequestError) as caught:
            parse_request(line)
        assert caught.value.error.kind == kind
        assert "\n" not in str(caught.value)

    def test_error_keeps_the_id(self) -> None:
        with pytest.raises(RequestError) as caught:
            parse_request(b'{"execute": "sit", "id": "x"}')
        assert caught.value.id == "x"

    @given(st.binary(max_size=200))
    def test_any_bytes(self, line: bytes) -> None:
        try:
            request = parse_request(line)
        except RequestError:
            return
        assert request.command in COMMANDS

    @given(
        st.sampled_from(sorted(COMMANDS)),
        st.dictionaries(
            st.sampled_from(sorted({name for command in COMMANDS.values() for name in command.arguments})),
            st.sampled_from(_ODD),
            max_size=4,
        ),
    )
    def test_any_arguments(self, command: str, arguments: dict[str, Any]) -> None:
        try:
            values = parse_arguments(command, arguments)
        except ControlError:
            return
        assert values.keys() == {name for name, value in arguments.items() if value is not None}

    @given(st.lists(st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"")), max_size=8), st.data())
    def test_lines_in_any_pieces(self, lines: list[bytes], data: st.DataObject) -> None:
        stream = b"".join(line + b"\n" for line in lines)
        splitter = LineSplitter()
        got = []
        while stream:
            cut = data.draw(st.integers(1, len(stream)))
            got += splitter.feed(stream[:cut])
            stream = stream[cut:]
        assert got == [line.strip() for line in lines if line.strip()]

    def test_line_too_long(self) -> None:
        splitter = LineSplitter()
        assert splitter.feed(b"x" * MAX_LINE_BYTES) == []
        with pytest.raises(ControlError):
            splitter.feed(b"x")
        assert LineSplitter().feed(b"x" * MAX_LINE_BYTES + b"\n") == [b"x" * MAX_LINE_BYTES]
        with pytest.raises(ControlError):
            LineSplitter().feed(b"x" * (MAX_LINE_BYTES + 1) + b"\n")

    def test_what_the_server_says(self) -> None:
        assert json.loads(answer(EndedMachine(machine="a"), 3)) == {"return": {"machine": "a"}, "id": 3}
        told = json.loads(event("status", {"to": "active"}))
        assert told["event"] == "status"
        assert told["data"] == {"to": "active"}
        assert told["timestamp"].keys() == {"seconds", "microseconds"}


# ---- The server


class _Echo(Record):
    command: str
    arguments: dict[str, Any]


async def _echo(request: Request) -> Record:
    await trio.lowlevel.checkpoint()
    if request.command == "quit":
        raise ControlError("NotNow", "not now")
    if request.command == "migrate-cancel":
        raise MigrationError("it did\nnot work")
    if request.command == "end":
        await trio.sleep_forever()
    return _Echo(command=request.command, arguments=request.arguments)


@asynccontextmanager
async def _serving(path: Path) -> AsyncIterator[ControlServer]:
    server = await ControlServer.open(str(path), "test", _echo)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve)
            yield server
            nursery.cancel_scope.cancel()
    finally:
        server.close()


class _Raw:
    """A client without manners."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._splitter = LineSplitter(1 << 24)
        self._lines: list[bytes] = []

    async def line(self) -> dict[str, Any]:
        while not self._lines:
            data = await self.stream.receive_some(65536)
            if not data:
                raise EOFError
            self._lines += self._splitter.feed(bytes(data))
        value: dict[str, Any] = json.loads(self._lines.pop(0))
        return value


@asynccontextmanager
async def _raw(path: Path) -> AsyncIterator[_Raw]:
    async with await trio.open_unix_socket(str(path)) as stream:
        client = _Raw(stream)
        greeting = await client.line()
        assert greeting["postcopy"]["schema"] == VERSION
        assert greeting["postcopy"]["side"] == "test"
        yield client


async def _send_for_ever(client: _Raw, data: bytes) -> None:
    """Until it is disconnected."""
    with suppress(trio.BrokenResourceError):
        while True:
            await client.stream.send_all(data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control"


class TestSocket:
    async def test_mode_and_removal(self, path: Path) -> None:
        before = os.umask(0)
        try:
            async with _serving(path):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
        finally:
            os.umask(before)
        assert not path.exists()

    async def test_dead_one_is_replaced(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        async with _serving(path), ControlClient.open(str(path)) as client:
            assert (await client.execute("status"))["command"] == "status"

    async def test_live_one_is_refused(self, path: Path) -> None:
        async with _serving(path):
            with pytest.raises(ResourceError, match="running process"):
                await ControlServer.open(str(path), "test", _echo)
            async with ControlClient.open(str(path)) as client:  # and is still there
                await client.execute("status")

    async def test_live_one_with_a_full_queue_is_refused(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as client:
            busy.bind(str(path))
            busy.listen(0)
            client.connect(str(path))
            with pytest.raises(ResourceError, match="running process"):
                await ControlServer.open(str(path), "test", _echo)

    async def test_file_is_left_alone(self, path: Path) -> None:
        path.write_text("precious")
        with pytest.raises(ConfigurationError, match="not a socket"):
            await ControlServer.open(str(path), "test", _echo)
        assert path.read_text() == "precious"

    @pytest.mark.parametrize("name", ["", "x" * 200, "a\0b", "no/such/directory"])
    async def test_no_path(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ConfigurationError):
            await ControlServer.open(name and f"{tmp_path}/{name}", "test", _echo)

    async def test_somebody_elses_socket_is_not_removed(self, path: Path) -> None:
        async with _serving(path):
            path.unlink()
            with socket.socket(socket.AF_UNIX) as other:
                other.bind(str(path))
        assert path.exists()

    async def test_nobody_there(self, path: Path) -> None:
        with pytest.raises(PeerError, match="--control"):
            async with ControlClient.open(str(path)):
                pass


class TestServer:
    async def test_client(self, path: Path) -> None:
        async with _serving(path) as server, ControlClient.open(str(path)) as client:
            assert client.greeting["side"] == "test"
            assert (await client.execute("set", {"bulk-channels": 3}))["arguments"] == {"bulk-channels": 3}
            for command, kind in (("quit", "NotNow"), ("migrate-cancel", "Failed"), ("sit", "CommandNotFound")):
                with pytest.raises(ControlError) as caught:
                    await client.execute(command)
                assert caught.value.kind == kind
            await client.execute("events")
            server.publish("status", {"n": 1})
            await client.execute("status")  # an event between request and answer is kept
            server.publish("status", {"n": 2})
            assert [(await client.next_event())["data"]["n"] for _ in range(2)] == [1, 2]
            await client.execute("events", {"enable": False})
            server.publish("status", {"n": 3})
            await client.execute("events", {"enable": True})
            server.publish("status", {"n": 4})
            assert (await client.next_event())["data"]["n"] == 4

    async def test_a_client_learns_why_no_more_events_come(self, path: Path) -> None:
        async with _serving(path) as server, ControlClient.open(str(path)) as client:
            await client.execute("events")
            for each in server._clients:
                each.disconnect(ControlError("NotNow", "disconnected: 32 clients"))
            with pytest.raises(ControlError, match="disconnected: 32 clients"):
                await client.next_event()
            with pytest.raises(ProcessGoneError):
                await client.next_event()

    async def test_nonsense_and_on(self, path: Path) -> None:
        async with _serving(path), _raw(path) as client:
            await client.stream.send_all(b'GET / HTTP/1.1\r\n\r\n{"execute": "status", "id": 1}\n')
            assert (await client.line())["error"]["class"] == "BadRequest"
            assert (await client.line())["id"] == 1

    async def test_byte_by_byte(self, path: Path) -> None:
        async with _serving(path), _raw(path) as client:
            for byte in b'{"execute": "status", "id": 1}\n':
                await client.stream.send_all(bytes([byte]))
            assert (await client.line())["id"] == 1

    async def test_pipelined_answers_come_in_order(self, path: Path) -> None:
        async with _serving(path), _raw(path) as client:
            await client.stream.send_all(
                b"".join(b'{"execute": "status", "id": %d}\n' % number for number in range(100))
            )
            assert [(await client.line())["id"] for _ in range(100)] == list(range(100))

    async def test_endless_line(self, path: Path) -> None:
        async with _serving(path), _raw(path) as client:
            await _send_for_ever(client, b"x" * 65536)
        async with _serving(path), _raw(path) as client:
            await client.stream.send_all(b"x" * (MAX_LINE_BYTES + 1))
            assert (await client.line())["error"]["class"] == "BadRequest"
            with pytest.raises((EOFError, trio.BrokenResourceError)):
                await client.line()

    async def test_too_many_clients(self, path: Path) -> None:
        """One that is silent makes room, and is told why."""
        async with AsyncExitStack() as stack, _serving(path):
            first = await stack.enter_async_context(_raw(path))
            for _ in range(MAX_CLIENTS - 1):
                await stack.enter_async_context(_raw(path))
            async with ControlClient.open(str(path)) as client:
                assert (await first.line())["error"]["class"] == "NotNow"
                with pytest.raises((EOFError, trio.BrokenResourceError)):
                    await first.line()
                await client.execute("status")

    async def test_client_that_reads_no_events(self, path: Path) -> None:
        """It is disconnected; `publish` never waits, and another client gets everything."""
        async with _serving(path) as server, _raw(path) as stuck, ControlClient.open(str(path)) as good:
            await stuck.stream.send_all(b'{"execute": "events"}\n')
            await stuck.line()
            await good.execute("events")
            number = 0
            while not server.dropped:
                assert number < 100 * QUEUE_LINES
                server.publish("progress", {"n": number, "filler": "x" * 10_000})
                assert (await good.next_event())["data"]["n"] == number
                number += 1
            assert (await good.execute("status"))["command"] == "status"

    async def test_client_that_reads_no_answers(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It stops being read from when its socket is full, and is disconnected; others are served."""
        monkeypatch.setattr(server_module, "WRITE_TIMEOUT_S", 0.5)
        async with _serving(path) as server, _raw(path) as stuck, ControlClient.open(str(path)) as good:
            request = json.dumps({"execute": "migrate", "arguments": {"to": "y" * 4000}}).encode() + b"\n"
            await _send_for_ever(stuck, request)
            with trio.fail_after(10):
                while not server.dropped:
                    await good.execute("status")

    async def test_client_in_a_long_request(self, path: Path) -> None:
        """Others are served meanwhile, and so is the end."""
        async with _serving(path), _raw(path) as slow, ControlClient.open(str(path)) as good:
            await slow.stream.send_all(b'{"execute": "end"}\n')
            await good.execute("status")

    async def test_last_words(self, path: Path) -> None:
        """What was said last is still sent when the server ends."""
        async with AsyncExitStack() as stack:
            async with _serving(path) as server:
                client = await stack.enter_async_context(_raw(path))
                await client.stream.send_all(b'{"execute": "events"}\n')
                assert (await client.line())["return"] == {"enabled": True}
                server.publish("result", {"status": "completed"})
            assert (await client.line())["event"] == "result"
            with pytest.raises(EOFError):
                await client.line()


# ---- What a person reads


class TestRendering:
    JOB: dict[str, Any] = {  # noqa: RUF012
        "migration-id": "ab" * 16, "direction": "incoming", "status": "postcopy-active", "peer": "192.0.2.7:7777",
        "elapsed-ms": 1234.56, "downtime-ms": 12.5, "total-ms": 0, "recoveries": {"count": 2}, "error": "it broke",
        "ram": {"total": 64 << 20, "remaining": 32 << 20, "transferred": 33 << 20, "demand-pages": 7},
        "pending-faults": 3, "fault-latency-us": {"count": 7, "p50": 80.5, "p99": 200.0},
    }  # fmt: skip

    def test_status(self) -> None:
        guest = {"state": "running", "operations": 99, "failures": 1, "failure": "a torn page"}
        machine = {"name": "vm1", "kind": "kvm", "memory": 64 << 20, "guest": guest, "migration": self.JOB}
        idle = {"name": "vm2", "kind": "rv64", "memory": 16 << 20, "guest": {"state": "paused"}, "migration": None}
        settings = {"max-bandwidth": 10 << 20, "bulk-channels": 2, "recover-for": 60.0}
        text = render(
            {"side": "daemon", "pid": 7, "listening": ["*:1"], "settings": settings, "machines": [machine, idle]}
        )
        rows = dict(line.split(":", 1) for line in text.split("\n\n")[1].splitlines())
        assert {key: value.strip() for key, value in rows.items()} == {
            "Machine": "vm1", "Kind": "kvm, 64 MiB", "State": "running", "Operations": "99",
            "Guest failures": "1: a torn page", "Job type": "Postcopy-active, incoming", "Migration": "ab" * 16,
            "Peer": "192.0.2.7:7777", "Time elapsed": "1.2 s", "Downtime": "12.5 ms", "Data processed": "33 MiB",
            "Data remaining": "32 MiB", "Data total": "64 MiB", "Demand pages": "7", "Blocked threads": "3",
            "Fault latency": "median 80 µs, 99 % within 200 µs", "Recoveries": "2", "Error": "it broke",
        }  # fmt: skip
        assert "Max bandwidth:     10 MiB/s" in text
        assert "Recover for:       60 s" in text
        assert text.endswith("Job type:          None")
        assert {len(line) - len(line.split(":", 1)[1].lstrip()) for line in text.splitlines() if line} == {19}

    def test_nothing_known_yet(self) -> None:
        job = {"direction": "incoming", "status": "setup", "peer": "x", "ram": {}}
        machine = {"name": "vm1", "kind": None, "memory": 0, "guest": None, "migration": job}
        assert "Job type:          Setup, incoming" in render({"side": "daemon", "pid": 7, "machines": [machine]})

    def test_a_subject_that_a_terminal_would_obey(self) -> None:
        tls = {"peer-name": "CN=\x9b2Jhost\u202e", "resumed": False, "expires-at": 2_000_000_000}
        job = {"direction": "incoming", "status": "active", "peer": "x", "ram": {}, "encrypted": True, "tls": tls}
        machine = {"name": "vm1", "kind": None, "memory": 0, "guest": None, "migration": job}
        text = render({"side": "daemon", "pid": 7, "machines": [machine]})
        assert "Encrypted:         TLS with CN= 2Jhost, its certificate until 2033-05-18 03:33 UTC" in text

    def test_other_answers(self) -> None:
        assert render_answer("quit", {}) == ""
        assert render_answer("migrate", {"machine": "a", "migration-id": "ff"}) == "a is on its way: migration ff"
        assert "unlimited" in render_answer("set", {"max-bandwidth": 0})
        assert "how it is" in render_answer("commands", {"commands": [{"name": "status", "help": "how it is"}]})
