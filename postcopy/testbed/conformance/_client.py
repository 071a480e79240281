# SPDX-License-Identifier: Apache-2.0
"""A client of the handler under test: a process of csrc/conformance/client.c, which is given orders.

An order that touches memory is answered when the page is there, so perhaps never: every wait has a deadline, and
leaving the block kills the process. Resource handling: a `Client` owns its process and the socket to it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from enum import IntFlag

import trio

from postcopy._files import installed_program
from postcopy.testbed.conformance._model import Failed, Json

HUGE_BYTES = 2 << 20
EVENT_FORK, EVENT_REMAP, EVENT_REMOVE, EVENT_UNMAP = 1 << 1, 1 << 2, 1 << 3, 1 << 6
MINOR_SHMEM, EXACT_ADDRESS = 1 << 10, 1 << 11
MISSING, WP, MINOR = 1, 2, 4
ANON, HUGE, MEMFD = 0, 1, 2
RACE_PLACE, RACE_PLACE_WAKE, RACE_REPLACE, RACE_STEAL, RACE_DISCARD = range(5)


NOT_YET = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN)
"""Of connect(2): nobody listens there yet, or too many want to connect."""


class Content(IntFlag):
    """What a page may hold."""

    IMAGE = 1
    ZERO = 2
    OWN = 4
    OTHER = 8


class Gone(Exception):
    """The client was killed: by the handler, where that is its policy."""


class Pending:
    """The answer of an order that was given."""

    def __init__(self, client: Client, order: str) -> None:
        self._client = client
        self._event = trio.Event()
        self._answer: Json | None = None
        self.order = order

    def set(self, answer: Json | None) -> None:
        self._answer = answer
        self._event.set()

    @property
    def done(self) -> bool:
        return self._event.is_set()

    async def within(self, seconds: float) -> bool:
        """Whether it is answered by then."""
        with trio.move_on_after(seconds):
            await self._event.wait()
        return self.done

    async def answer(self, within_s: float, what: str = "") -> Json:
        """`Failed` when there is none within that time, `OSError` when the order failed, `Gone` when the client did."""
        if not await self.within(within_s):
            raise Failed(f"{what or self.order}: no end within {within_s:g} s{await self._client.where()}")
        if self._answer is None:
            raise Gone
        if self._answer.get("errno"):
            raise OSError(self._answer["errno"], self._answer["error"], self.order)
        return self._answer


async def any_of(pendings: Sequence[Pending], within_s: float) -> None:
    """Until one of them is answered, or for that long."""

    async def wait(pending: Pending) -> None:
        await pending.within(within_s)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for pending in pendings:
            nursery.start_soon(wait, pending)


class Client:
    def __init__(self, process: subprocess.Popen[bytes], control: trio.socket.SocketType) -> None:
        self.process = process
        self._control = control
        self._pending: dict[int, Pending] = {}
        self._next = 0
        self.page_bytes = 4096
        self.regions: list[tuple[int, int, int]] = []
        """Address, size and offset of each."""

    @property
    def pid(self) -> int:
        return self.process.pid

    async def read(self) -> None:
        """Until the process has ended."""
        while True:
            try:
                message = await self._control.recv(65536)
            except OSError:
                message = b""
            if not message:
                break
            answer = json.loads(message)
            pending = self._pending.pop(answer["id"], None)
            if pending is not None:
                pending.set(answer)
        for pending in self._pending.values():
            pending.set(None)
        self._pending.clear()

    async def begin(self, name: str, *arguments: object) -> Pending:
        self._next += 2  # fork has two answers
        pending = self._pending[self._next] = Pending(self, name)
        text = " ".join(map(str, (self._next, name, *arguments)))
        try:
            await self._control.send(text.encode())
        except OSError:
            pending.set(None)
        return pending

    async def begin_fork(self, page: int) -> tuple[Pending, Pending]:
        """When fork(2) has returned, and when the child has ended."""
        forked = self._pending[self._next + 3] = Pending(self, "fork")
        return forked, await self.begin("fork", page)

    async def do(self, name: str, *arguments: object, within_s: float = 10.0) -> Json:
        return await (await self.begin(name, *arguments)).answer(within_s)

    async def where(self) -> str:
        """Where it hangs, as words that follow others."""
        if self.process.poll() is not None:
            return "; the client was killed"
        pending = await self.begin("progress")
        if not await pending.within(2.0) or pending._answer is None:
            return ""
        return f" (at page {pending._answer['page']})"

    # ---- set-up

    async def map(self, sizes: list[int], *, page_bytes: int, kind: int, shift: int, below: bool) -> None:
        answer = await self.do("map", page_bytes, kind, shift, int(below), *sizes)
        self.page_bytes = page_bytes
        place, offset = (sum(sizes) if below else 0), 0
        for size in sizes:
            place -= size if below else 0
            self.regions.append((answer["base"] + place, size, offset))
            place += 0 if below else size
            offset += size

    def message(self, generation: str = "both") -> str:
        """As Firecracker 1.1 (none), 1.7 (kib), 1.12 (both) and one to come (unknown) say it."""
        said = []
        for address, size, offset in self.regions:
            region: Json = {"base_host_virt_addr": address, "size": size, "offset": offset}
            if generation in ("both", "unknown"):
                region["page_size"] = self.page_bytes
            if generation in ("kib", "both"):
                region["page_size_kib"] = self.page_bytes
            if generation == "unknown":
                region = {
                    "slots": [{"size": 1}, []],
                    "guest": {"address": 4096},
                    "name": 'a "b"',
                    **region,
                    "hot": None,
                }
            said.append(region)
        return json.dumps(said, indent=1 if generation == "unknown" else None)

    async def connect(self, path: str, within_s: float) -> None:
        """Tries again while nobody listens there yet."""
        until_s = trio.current_time() + within_s
        while True:
            try:
                await self.do("connect", path)
            except OSError as error:
                if error.errno not in NOT_YET or trio.current_time() > until_s:
                    raise
                await trio.sleep(0.005)
            else:
                return

    async def send(self, text: str, fds: str = "u") -> None:
        await self.do("send", fds, text)

    async def closed(self, within_s: float) -> bool:
        """Whether the handler closes the connection."""
        answer = await self.do("closed", int(within_s * 1000), within_s=within_s + 5)
        return bool(answer["closed"])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@asynccontextmanager
async def open_client(image: str) -> AsyncIterator[Client]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        # Not by a thread of Trio's: it takes a millisecond, and a process without an owner must not be.
        process = subprocess.Popen([installed_program("conformance-client"), image], stdin=theirs.fileno())  # noqa: ASYNC220
    control = trio.socket.from_stdlib_socket(ours)
    client = Client(process, control)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.read)
            yield client
            nursery.cancel_scope.cancel()
    finally:
        control.close()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()
