# SPDX-License-Identifier: Apache-2.0
"""The client of Firecracker's API: answers as Firecracker gives them, and all that can go wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from postcopy.machines.firecracker.api import (
    MAX_ANSWER_BYTES,
    Api,
    FirecrackerAnswer,
    FirecrackerError,
    FirecrackerInDoubt,
    FirecrackerRefused,
    FirecrackerUnreachable,
    Refusal,
    refusal_of,
)

BOUND_S = 20.0


async def test_too_many_wait(tmp_path: Path) -> None:
    """For a Firecracker that takes no connection: nothing was asked, and it is asked when there is room."""
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as listening, trio.fail_after(BOUND_S):
        listening.bind(str(path))
        listening.listen(0)
        waiting: list[socket.socket] = []
        with suppress(BlockingIOError):
            while True:
                waiting.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                waiting[-1].connect(str(path))
        with pytest.raises(FirecrackerUnreachable, match="too many wait"):
            await Api(path).get("/", 0.05)
        with pytest.raises(FirecrackerUnreachable, match="too many wait"):
            await Api(path).process(0.05)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(Api(path).get, "/", BOUND_S))
            await trio.testing.wait_all_tasks_blocked()
            for one in waiting:
                one.close()
            listening.setblocking(False)
            accepted = trio.socket.from_stdlib_socket(listening.dup())
            with accepted:
                while True:
                    connection, _ = await accepted.accept()
                    with connection:
                        if (await connection.recv(4096)).startswith(b"GET / "):
                            await connection.send(answered("204"))
                            break


def answered(status: str, body: bytes = b"") -> bytes:
    """As Firecracker 1.12.1 answers."""
    head = f"HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def fault(text: str) -> bytes:
    return answered("400", json.dumps({"fault_message": text}).encode())


@asynccontextmanager
async def server(path: Path, answer: bytes, *, keep: bool = True) -> AsyncIterator[list[bytes]]:
    """Answers each connection once; what was asked is in the list. `keep`: does not close it after the answer."""
    requests: list[bytes] = []
    open_streams: list[trio.SocketStream] = []
    listening = trio.socket.socket(socket.AF_UNIX)
    await listening.bind(str(path))
    listening.listen()

    async def serve(stream: trio.SocketStream) -> None:
        open_streams.append(stream)
        received = b""
        while b"\r\n\r\n" not in received or len(received.partition(b"\r\n\r\n")[2]) < _length(received):
            data = await stream.receive_some(1 << 16)
            if not data:
                return
            received += data
        requests.append(received)
        try:
            await stream.send_all(answer)
        except trio.BrokenResourceError:
            return
        if not keep:
            stream.socket.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listening)])
        with trio.fail_after(BOUND_S):
            yield requests
        nursery.cancel_scope.cancel()
    for stream in open_streams:
        stream.socket.close()


def _length(request: bytes) -> int:
    for line in request.partition(b"\r\n\r\n")[0].split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


async def test_a_request_says_what_firecracker_wants(tmp_path: Path) -> None:
    async with server(tmp_path / "api", answered("204")) as requests:
        assert await Api(tmp_path / "api").patch("/vm", {"state": "Paused"}) is None
    head, _, body = requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"PATCH /vm HTTP/1.1\r\n")
    assert json.loads(body) == {"state": "Paused"}


async def test_what_is_answered_is_decoded(tmp_path: Path) -> None:
    async with server(tmp_path / "api", answered("200", b'{"state": "Running"}')) as requests:
        assert await Api(tmp_path / "api").get("/") == {"state": "Running"}
    assert b"Content-Type" not in requests[0]


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        (
            "Create snapshot error: Cannot perform open on the memory backing file: No such file or directory (os"
            " error 2)",
            Refusal.NO_MEMORY_FILE,
        ),
        (
            "Create snapshot error: Cannot perform open on the snapshot backing file: No such file or directory (os"
            " error 2)",
            Refusal.STATE_FILE,
        ),
        (
            "Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore unavailable"
            " while running",
            Refusal.RUNNING,
        ),
        ("The requested operation is not supported before starting the microVM.", Refusal.NOT_STARTED),
        ("The requested operation is not supported after starting the microVM.", Refusal.ALREADY_STARTED),
        ("Loading a microVM snapshot not allowed after configuring boot-specific resources.", Refusal.CONFIGURED),
        (
            "The requested operation is not supported: Diff snapshots are not allowed on uVMs with dirty page tracking"
            " disabled.",
            Refusal.DIRTY_TRACKING,
        ),
        ("Invalid request method and/or path: GET nothing.", Refusal.UNKNOWN_REQUEST),
        (
            "Load snapshot error: Failed to restore from snapshot: Failed to get snapshot state from file: Invalid data"
            " version: 5.0.0",
            Refusal.VERSION,
        ),
        (
            "Load snapshot error: Failed to restore from snapshot: Failed to get snapshot state from file: CRC64"
            " validation failed: 17",
            Refusal.DAMAGED,
        ),
        (
            "Load snapshot error: Failed to restore from snapshot: Failed to load guest memory: Error creating guest"
            " memory from uffd: Failed to connect to UDS Unix stream: No such file or directory (os error 2)",
            Refusal.PAGER,
        ),
        ("Something that no version has said", Refusal.OTHER),
    ],
)
async def test_a_refusal_has_a_name(tmp_path: Path, text: str, refusal: Refusal) -> None:
    async with server(tmp_path / "api", fault(text)):
        with pytest.raises(FirecrackerRefused) as caught:
            await Api(tmp_path / "api").put("/snapshot/create", {})
    error = caught.value
    assert (error.status, error.fault_message, error.refusal) == (400, text, refusal)
    assert text in str(error)
    assert "PUT /snapshot/create" in str(error)


def test_a_memory_file_is_told_from_a_state_file() -> None:
    """By this a state-only snapshot is told from none."""
    assert refusal_of("Cannot perform metadata on the memory backing file: x") is Refusal.NO_MEMORY_FILE
    assert refusal_of("Cannot perform flush on the snapshot backing file: x") is Refusal.STATE_FILE


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n\r\n", id="not HTTP"),
        pytest.param(answered("200", b"{"), id="not JSON"),
        pytest.param(answered("200", 100_000 * b"["), id="nested too deep"),
        pytest.param(answered("200", b'"' + b"x" * (MAX_ANSWER_BYTES + 9) + b'"'), id="too long"),
        pytest.param(b"HTTP/1.1 200\r\n" + b"A: " + b"x" * (1 << 20), id="a header without an end"),
    ],
)
async def test_what_is_no_answer_of_firecracker_is_said(tmp_path: Path, answer: bytes) -> None:
    async with server(tmp_path / "api", answer):
        with pytest.raises(FirecrackerAnswer):
            await Api(tmp_path / "api").get("/")


@pytest.mark.parametrize("content", [b"[]", b"null", b'"Running"', b"{}", b'{"state": 1}'])
async def test_what_is_no_firecracker_is_told(tmp_path: Path, content: bytes) -> None:
    async with server(tmp_path / "api", answered("200", content)):
        with pytest.raises(FirecrackerAnswer, match="no Firecracker"):
            await Api(tmp_path / "api").instance()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 \r\nContent-Length: 100\r\n\r\n{"])
async def test_one_that_ends_before_it_has_answered_leaves_it_in_doubt(tmp_path: Path, answer: bytes) -> None:
    async with server(tmp_path / "api", answer, keep=False):
        with pytest.raises(FirecrackerInDoubt):
            await Api(tmp_path / "api").patch("/vm", {"state": "Resumed"})


async def test_one_that_never_answers_leaves_it_in_doubt(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    del autojump_clock
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "api"))
    listening.listen()
    with listening, pytest.raises(FirecrackerInDoubt, match="has not answered"):
        await Api(tmp_path / "api").get("/", timeout_s=0.01)


async def test_where_nobody_listens_nothing_was_asked(tmp_path: Path) -> None:
    with pytest.raises(FirecrackerUnreachable, match="no Firecracker serves that socket"):
        await Api(tmp_path / "none").get("/")
    left_behind = socket.socket(socket.AF_UNIX)
    left_behind.bind(str(tmp_path / "old"))
    left_behind.close()
    with pytest.raises(FirecrackerUnreachable, match="no Firecracker serves that socket"):
        await Api(tmp_path / "old").get("/")
    with pytest.raises(FirecrackerError):
        await Api(tmp_path / "a\0b").get("/")


async def test_a_path_may_be_longer_than_a_socket_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of jailed Firecrackers are."""
    deep = tmp_path / ("a" * 80) / ("b" * 80)
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    async with server(Path("api"), answered("200", b"{}")):
        assert await Api(deep / "api").get("/") == {}


async def test_the_process_that_listens_is_known(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "api"))
        listening.listen()
        process = await Api(tmp_path / "api").process()
    with process.pidfd:
        assert (process.pid, process.uid) == (os.getpid(), os.getuid())
        signal.pidfd_send_signal(process.pidfd.fd, 0)  # it is one
