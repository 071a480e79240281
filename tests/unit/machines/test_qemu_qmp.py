# SPDX-License-Identifier: Apache-2.0
"""The client of QEMU's monitor: what a QEMU says, cut anywhere, and all that can go wrong."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from fake_qemu import fake_qemu
from hypothesis import given
from hypothesis import strategies as st

from postcopy._fd import FdHolder
from postcopy.machines.qemu.qmp import (
    MAX_LINE_BYTES,
    Answer,
    Event,
    Monitor,
    QemuAnswer,
    QemuInDoubt,
    QemuRefused,
    QemuUnreachable,
    QmpProtocol,
)

BOUND_S = 30.0
GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}\r\n'
)


def greeted(commands: int = 0) -> QmpProtocol:
    protocol = QmpProtocol()
    assert protocol.receive(GREETING) == []
    assert protocol.version == (7, 2, 22)
    for _ in range(commands):
        protocol.command("query-status")
    return protocol


def test_a_command_is_a_line() -> None:
    protocol = greeted()
    assert protocol.command("qmp_capabilities") == (1, b'{"execute":"qmp_capabilities","id":1}\n')
    number, line = protocol.command("getfd", {"fdname": "a\nb"})
    assert number == 2
    assert json.loads(line) == {"execute": "getfd", "id": 2, "arguments": {"fdname": "a\nb"}}
    assert line.count(b"\n") == 1


SAID: list[tuple[dict[str, Any], Event | Answer]] = [
    ({"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}, Event("STOP", {}, 1_000_002_000)),
    ({"return": {"status": "running"}, "id": 1}, Answer(1, {"status": "running"})),
    ({"event": "MIGRATION", "data": {"status": "active"}}, Event("MIGRATION", {"status": "active"})),
    (
        {"id": 3, "error": {"class": "GenericError", "desc": "no\n\x1b[1m way"}},
        Answer(3, None, ("GenericError", "no [1m way")),
    ),
    ({"return": None, "id": 2}, Answer(2, None)),
    ({"event": "JOB", "data": ["what", "is", "this"], "timestamp": {"seconds": "x"}}, Event("JOB", {})),
]


@given(st.lists(st.integers(0, 1000), max_size=20))
def test_it_may_be_cut_anywhere(cuts: list[int]) -> None:
    stream = GREETING + b"\n".join(json.dumps(message).encode() for message, _ in SAID) + b"\r\n"
    ends = sorted({cut % len(stream) for cut in cuts} | {len(stream)})
    protocol, messages, begin = QmpProtocol(), [], 0
    for _ in range(3):
        protocol.command("query-status")
    for end in ends:
        messages += protocol.receive(stream[begin:end])
        begin = end
    assert messages == [meant for _, meant in SAID]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"HTTP/1.1 400 Bad Request", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "does not speak QMP"),
        (b"{}", "no answer and no event"),
        (b'{"return": 1}', "not asked"),
        (b'{"return": 1, "id": 7}', "not asked"),
        (b'{"return": 1, "id": true}', "not asked"),
        (b'{"return": 1, "id": "1"}', "not asked"),
        (b'{"return": 1, "id": [1]}', "not asked"),
        (b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}', "not asked: JSON parse error"),
        (b'{"error": 1}', "not asked"),
        (b'{"event": 1}', "no answer and no event"),
    ],
)
def test_what_makes_no_sense(line: bytes, why: str) -> None:
    with pytest.raises(QemuAnswer, match=why):
        greeted(1).receive(line + b"\n")


@pytest.mark.parametrize(
    "greeting",
    [
        b'{"return": {}, "id": 1}',
        b'{"event": "STOP"}',
        b'{"QMP": 1}',
        b'{"QMP": {"version": {"qemu": {"major": 7, "minor": "x", "micro": 1}}}}',
        b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 1' + b"0" * 4000 + b"}}}}",
        b'{"QMP": {"version": {"qemu": [7, 2, 1]}}}',
    ],
)
def test_who_does_not_greet_is_no_qemu(greeting: bytes) -> None:
    with pytest.raises(QemuAnswer, match="no QEMU"):
        QmpProtocol().receive(greeting + b"\n")


def test_an_answer_is_to_one_question_once() -> None:
    protocol = greeted(1)
    assert protocol.receive(b'{"return": {}, "id": 1}\n') == [Answer(1, {})]
    with pytest.raises(QemuAnswer, match="not asked"):
        protocol.receive(b'{"return": {}, "id": 1}\n')


def test_a_line_is_bounded() -> None:
    protocol, piece = greeted(), b"x" * (1 << 20)
    for _ in range(MAX_LINE_BYTES // len(piece)):
        assert protocol.receive(piece) == []
    with pytest.raises(QemuAnswer, match="in one line"):
        protocol.receive(b"x")
    with pytest.raises(QemuAnswer, match="in one line"):
        greeted().receive(b"x" * (MAX_LINE_BYTES + 1) + b"\n")


# ---- a connection


class Server:
    """The other end, as it comes: what it is sent, and what it says."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = trio.socket.from_stdlib_socket(listener)
        self.connection: trio.socket.SocketType

    async def accept(self, greeting: bytes = GREETING) -> None:
        self.connection, _ = await self._listener.accept()
        await self.say(greeting)

    async def say(self, data: bytes) -> None:
        while data:
            data = data[await self.connection.send(data) :]

    async def asked(self) -> dict[str, Any]:
        line = b""
        while not line.endswith(b"\n"):
            line += await self.connection.recv(1)
        message: dict[str, Any] = json.loads(line)
        return message

    async def answer(self, value: Any = None) -> str:
        request = await self.asked()
        await self.say(json.dumps({"return": value or {}, "id": request["id"]}).encode() + b"\n")
        return str(request["execute"])


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "qmp.sock"))
        listening.listen(1)
        listening.setblocking(False)
        yield listening


@asynccontextmanager
async def connected(tmp_path: Path, listener: socket.socket) -> AsyncIterator[tuple[Server, Monitor]]:
    server = Server(listener)

    async def greet() -> None:
        await server.accept()
        assert await server.answer() == "qmp_capabilities"

    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(greet)
            monitor = await Monitor.open(str(tmp_path / "qmp.sock"), BOUND_S)
        try:
            yield server, monitor
        finally:
            monitor.close()
            server.connection.close()


async def test_who_it_is(tmp_path: Path, listener: socket.socket) -> None:
    async with connected(tmp_path, listener) as (_, monitor):
        assert monitor.version == (7, 2, 22)
        assert (monitor.process.pid, monitor.process.uid) == (os.getpid(), os.geteuid())
        assert monitor.process.alive


async def test_one_that_has_another_client_says_nothing(tmp_path: Path, listener: socket.socket) -> None:
    with trio.fail_after(BOUND_S), pytest.raises(QemuUnreachable, match=r"another client.*second -qmp"):
        await Monitor.open(str(tmp_path / "qmp.sock"), 0.05)


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(QemuUnreachable, match="-qmp unix:PATH"):
        await Monitor.open(str(tmp_path / "none.sock"))


async def test_a_long_path(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    with fake_qemu(tmp_path) as fake, trio.fail_after(BOUND_S):
        fake.qmp_path.rename(directory / "qmp.sock")
        monitor = await Monitor.open(str(directory / "qmp.sock"), BOUND_S)
        assert monitor.process.pid == fake.process.pid
        monitor.close()


async def test_answers_find_who_has_asked(tmp_path: Path, listener: socket.socket) -> None:
    """Whatever their order, and with events between them."""
    async with connected(tmp_path, listener) as (server, monitor):
        events: list[Event] = []
        monitor.on_event = events.append
        answers: dict[int, Any] = {}

        async def ask(number: int) -> None:
            answers[number] = await monitor.execute("query", {"number": number}, timeout_s=BOUND_S)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(ask, number)
            requests = [await server.asked() for _ in range(20)]
            for request in reversed(requests):
                said = [
                    {"event": "E", "data": {"n": request["id"]}},
                    {"return": request["arguments"]["number"], "id": request["id"]},
                ]
                await server.say(b"\n".join(json.dumps(one).encode() for one in said) + b"\n")
        assert answers == {number: number for number in range(20)}
        assert [event.data["n"] for event in events] == [request["id"] for request in reversed(requests)]


async def test_who_reads_may_leave(tmp_path: Path, listener: socket.socket) -> None:
    """A task that reads for the others and is cancelled leaves that to another one; an answer that nobody waits for any
    more is no answer to anything else."""
    async with connected(tmp_path, listener) as (server, monitor):
        answers: list[Any] = []

        async def ask(name: str) -> None:
            answers.append(await monitor.execute(name, timeout_s=BOUND_S))

        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as inner:
                inner.start_soon(ask, "first")
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(ask, "second")
                await trio.testing.wait_all_tasks_blocked()
                inner.cancel_scope.cancel()
            asked = [await server.asked(), await server.asked()]
            assert {request["execute"] for request in asked} == {"first", "second"}
            for request in asked:
                await server.say(json.dumps({"return": request["execute"], "id": request["id"]}).encode() + b"\n")
        assert answers == ["second"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "third")
            assert await server.answer("again") == "third"
        assert answers == ["second", "again"]


async def test_an_answer_that_is_read_in_place_is_found_by_who_waits_for_it(
    tmp_path: Path, listener: socket.socket
) -> None:
    """Also where that task was woken for it already: of two that are woken together either may be the first."""
    async with connected(tmp_path, listener) as (server, monitor):

        async def ask(number: int) -> None:
            assert await monitor.execute("query", timeout_s=BOUND_S / 2) == number

        async def hurry() -> None:
            with FdHolder.duplicate(monitor._stream.socket.fileno()) as same:
                await same.wait_readable()
                monitor.hurry(lambda: None not in [asked.answer for asked in monitor._asked.values()])

        for number in range(1, 21):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, number)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(hurry)
                await server.answer(number)
        monitor.close()
        monitor.hurry(lambda: False)


async def test_an_answer_that_is_read_in_place_is_found_by_who_gives_way_before_it_waits(
    tmp_path: Path, listener: socket.socket
) -> None:
    async with connected(tmp_path, listener) as (server, monitor):

        def all_here() -> bool:
            return None not in [asked.answer for asked in monitor._asked.values()]

        async def hurry() -> None:
            while not monitor._reading and not all_here():
                await trio.lowlevel.checkpoint()
            monitor.hurry(all_here)

        for number in range(1, 21):
            asked = await monitor.ask("query", timeout_s=BOUND_S / 2)
            await server.answer(number)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hurry)
                assert await monitor.answer_to(asked) == number


async def test_nothing_is_kept_of_what_nobody_waits_for(tmp_path: Path, listener: socket.socket) -> None:
    async with connected(tmp_path, listener) as (server, monitor):
        for number in range(1, 6):
            await monitor.ask("query", timeout_s=BOUND_S)  # and the answer is not asked for
            await server.answer(number)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(monitor.execute, "query")
            await server.answer(6)
        assert not monitor._asked
        assert not monitor._protocol._asked


async def test_a_descriptor_goes_along(tmp_path: Path, listener: socket.socket) -> None:
    async with connected(tmp_path, listener) as (server, monitor):
        ours, theirs = os.pipe()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(monitor.execute, "getfd", {"fdname": "x"}, fd=theirs))
            data, ancillary, _, _ = await server.connection.recvmsg(4096, socket.CMSG_SPACE(4))
            await server.say(b'{"return": {}, "id": 2}\n')
        os.close(theirs)
        assert json.loads(data)["arguments"] == {"fdname": "x"}
        received = int.from_bytes(ancillary[0][2], "little")
        os.write(received, b"through")
        os.close(received)
        assert os.read(ours, 100) == b"through"
        os.close(ours)


async def test_a_refusal_has_its_text(tmp_path: Path, listener: socket.socket) -> None:
    async with connected(tmp_path, listener) as (server, monitor):
        async with trio.open_nursery() as nursery:

            async def refuse() -> None:
                request = await server.asked()
                error = {"class": "CommandNotFound", "desc": "no such\ncommand"}
                await server.say(json.dumps({"id": request["id"], "error": error}).encode() + b"\n")

            nursery.start_soon(refuse)
            with pytest.raises(QemuRefused, match="QEMU refuses nothing: no such command") as caught:
                await monitor.execute("nothing")
        assert (caught.value.kind, caught.value.command) == ("CommandNotFound", "nothing")


async def test_no_answer_is_a_doubt(tmp_path: Path, listener: socket.socket) -> None:
    async with connected(tmp_path, listener) as (server, monitor):
        with pytest.raises(QemuInDoubt, match="has not answered cont within"):
            await monitor.execute("cont", timeout_s=0.05)
        late = await server.asked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(monitor.execute, "query-status", timeout_s=BOUND_S))
            request = await server.asked()
            for number in (late["id"], request["id"]):
                await server.say(b'{"return": {}, "id": %d}\n' % number)


async def test_the_end_of_the_connection_is_told_to_all(tmp_path: Path, listener: socket.socket) -> None:
    async with connected(tmp_path, listener) as (server, monitor):
        failed = 0

        async def ask(name: str) -> None:
            nonlocal failed
            with pytest.raises(QemuInDoubt, match="may have ended"):
                await monitor.execute(name, timeout_s=BOUND_S)
            failed += 1

        async with trio.open_nursery() as nursery:
            for name in ("one", "two", "three"):
                nursery.start_soon(ask, name)
            await trio.testing.wait_all_tasks_blocked()
            server.connection.close()
        assert failed == 3
        await ask("four")


@pytest.mark.parametrize(
    "said", [b"%s\n" % (b"x" * 100), b'{"return": 1, "id": 99}\n', b"y" * (MAX_LINE_BYTES + 65536)]
)
async def test_one_that_lies_is_believed_no_more(said: bytes, tmp_path: Path, listener: socket.socket) -> None:
    async with connected(tmp_path, listener) as (server, monitor):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.say, said)
            with pytest.raises(QemuAnswer):
                await monitor.execute("query-status", timeout_s=BOUND_S)
            nursery.cancel_scope.cancel()
        with pytest.raises(QemuAnswer):
            await monitor.execute("query-status", timeout_s=BOUND_S)


async def test_events_without_end_are_bounded_in_time(tmp_path: Path, listener: socket.socket) -> None:
    async with connected(tmp_path, listener) as (server, monitor), trio.open_nursery() as nursery:

        async def flood() -> None:
            while True:
                await server.say(b'{"event": "NIC_RX_FILTER_CHANGED", "data": {}}\n' * 100)

        nursery.start_soon(flood)
        with pytest.raises(QemuInDoubt):
            await monitor.execute("query-status", timeout_s=0.1)
        nursery.cancel_scope.cancel()


async def test_closing_it_wakes_who_waits(tmp_path: Path, listener: socket.socket) -> None:
    async with connected(tmp_path, listener) as (_, monitor):

        async def wait() -> None:
            with pytest.raises(QemuInDoubt, match="was closed"):
                await monitor.wait_until(lambda: False, BOUND_S)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            monitor.close()
        monitor.close()
        with pytest.raises(QemuInDoubt, match="was closed"):
            await monitor.execute("query-status")
        with pytest.raises(QemuInDoubt, match="was closed"):
            await monitor.mend()


async def test_a_connection_of_no_use_is_made_again_once(tmp_path: Path, listener: socket.socket) -> None:
    """Those who wait on the old one get its error, and no answer of the new one."""
    async with connected(tmp_path, listener) as (server, monitor):
        assert not await monitor.mend()
        events: list[Event] = []
        monitor.on_event = events.append
        mended: list[bool] = []

        async def wait() -> None:
            with pytest.raises(QemuInDoubt, match="half of a command"):
                await monitor.wait_until(lambda: False, BOUND_S)

        async def mend() -> None:
            mended.append(await monitor.mend(BOUND_S))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            monitor._break(QemuInDoubt("half of a command"))
            old, server = server, Server(listener)
            nursery.start_soon(mend)
            nursery.start_soon(mend)
            await server.accept()
            assert await old.connection.recv(1) == b""
            old.connection.close()
            assert await server.answer() == "qmp_capabilities"
        assert mended == [True, True]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.say, b'{"event": "STOP"}\n')
            nursery.start_soon(server.answer, "fine")
            assert await monitor.execute("query-status", timeout_s=BOUND_S) == "fine"
        assert [event.name for event in events] == ["STOP"]
        server.connection.close()


async def test_another_one_is_not_taken_for_it(tmp_path: Path, listener: socket.socket) -> None:
    async with connected(tmp_path, listener) as (server, monitor):
        server.connection.close()
        (tmp_path / "qmp.sock").unlink()
        with pytest.raises(QemuInDoubt):
            await monitor.execute("query-status", timeout_s=BOUND_S)
        with fake_qemu(tmp_path), pytest.raises(QemuUnreachable, match="another QEMU"):
            await monitor.mend(BOUND_S)
