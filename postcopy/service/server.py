# SPDX-License-Identifier: Apache-2.0
"""The control socket's server: many clients, none of which can delay the process, or keep another one out.

Each client has two tasks. One reads requests and executes them, one after the other; the other writes from a queue. The
queue is bounded twice. *Answers*: while `QUEUE_ANSWERS` of them (or a long one) wait, no more requests are read from
that client, so it is served at its own pace. *Events* never wait for a client: one that leaves `QUEUE_LINES` or
`QUEUE_BYTES` unread is disconnected. So is one that takes longer than `WRITE_TIMEOUT_S` for a line.

**The limit of clients.** There may be `MAX_CLIENTS`. One more takes the place of the client that has left something
unread for longest; without such a one, of the client that has made no request and is connected for longest; else of the
client whose last request, or line read, is oldest. A client that was seen to have read everything has `GRACE_S` for
what it has not read since. This is not about rights, since every client may do everything: clients that hang must not
keep the operator out. For the same reason one descriptor is kept for the moment when the process has no more.

Resource handling: the server owns the listening socket (`_socket_file`); `close` removes it. Error handling: nothing
that a client does, and no mistake in a command, ends `serve`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import sys
import termios
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from postcopy.errors import ConfigurationError, PostcopyError
from postcopy.records import Json, Record
from postcopy.service._contain import contained
from postcopy.service._socket_file import identity, listen
from postcopy.service.schema import (
    ControlError,
    LineSplitter,
    Request,
    RequestError,
    answer,
    event,
    greeting,
    parse_request,
    refusal,
)

MAX_CLIENTS = 32
QUEUE_ANSWERS = 4
LONG_ANSWER_BYTES = 256 * 1024
"""One that is longer is alone in the queue."""
QUEUE_LINES = 256
"""What a client may leave unread of events: some minutes of progress."""
QUEUE_BYTES = 4 << 20
WRITE_TIMEOUT_S = 30.0
LAST_LINES_S = 0.5
"""How long a client may take for the last lines: the answer to `quit`, the result."""
GRACE_S = 5.0
STAY_S = 0.2
"""No client is disconnected before, so that one that asks at once gets its answer; others wait to connect."""
ACCEPT_PAUSE_S = 0.1

log = logging.getLogger(__name__)

Execute = Callable[[Request], Awaitable[Record]]


class ControlServer:
    """`open` it, `serve` in a task of its own, `publish` what happens, `close`."""

    def __init__(self, path: str, listener: socket.socket, side: str, execute: Execute) -> None:
        self.path = path
        self._listener = trio.socket.from_stdlib_socket(listener)
        self._identity = identity(path)
        self._side = side
        self._execute = execute
        self._clients: set[_Client] = set()
        self._spare = _Spare()
        self.dropped = 0  # clients that did not read

    @classmethod
    async def open(cls, path: str, side: str, execute: Execute) -> ControlServer:
        """`side` is in the greeting. `execute` does a request, its arguments checked, and returns the answer; a
        `PostcopyError` that it raises is the answer too."""
        listener = await listen(path)
        return cls(path, listener, side, execute)

    def publish(self, what: str, data: Json) -> None:
        """Sends an event to the clients that asked for events. Never blocks."""
        listeners = [client for client in self._clients if client.wants_events]
        if listeners:
            line = event(what, data)
            for client in listeners:
                client.send_event(line)

    async def serve(self) -> None:
        """Until cancelled; clients still get their last lines, if they read them soon."""
        async with trio.open_nursery() as nursery:
            while True:
                connection = await self._accept()
                try:
                    while len(self._clients) >= MAX_CLIENTS:
                        await self._make_room()
                except BaseException:
                    connection.close()
                    raise
                client = _Client(trio.SocketStream(connection))
                self._clients.add(client)
                nursery.start_soon(self._serve_client, client)

    async def _accept(self) -> trio.socket.SocketType:
        failing = False
        while True:
            try:
                connection, _ = await self._listener.accept()
                return connection
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and self._spare.give():
                    continue
                if not failing:
                    log.error("control: cannot accept a connection: %s", error.strerror)
                failing = True
                await trio.sleep(ACCEPT_PAUSE_S)
                self._spare.take()

    async def _make_room(self) -> None:
        client = min(self._clients, key=lambda client: client.rank())
        stays_s = client.connected_at + STAY_S - trio.current_time()
        if stays_s > 0:
            await trio.sleep(stays_s)  # and look again: it may have made a request, or another one may have left
            return
        self._clients.discard(client)
        client.disconnect(
            ControlError("NotNow", f"disconnected: {MAX_CLIENTS} clients, and this one silent for longest")
        )
        log.warning("control: there are %d clients: disconnected the one that was silent for longest", MAX_CLIENTS)

    def close(self) -> None:
        """Removes the socket. `serve` must have ended."""
        self._listener.close()
        self._spare.give()
        with contextlib.suppress(OSError):
            if identity(self.path) == self._identity:
                os.unlink(self.path)

    async def _serve_client(self, client: _Client) -> None:
        try:
            client.send_answer(greeting(self._side, os.getpid()))
            await contained("a client of the control socket", lambda: client.run(self._handle))
        finally:
            self._clients.discard(client)
            self._spare.take()
            if client.dropped:
                self.dropped += 1
                log.warning("control: disconnected a client that does not read")

    async def _handle(self, client: _Client, line: bytes) -> bytes:
        """The answer to a line."""
        try:
            request = parse_request(line)
        except RequestError as error:
            return refusal(error.error, error.id)
        if request.command == "events":
            from postcopy.records.control import Subscription  # which no parser needs

            client.wants_events = request.arguments.get("enable", True)
            return answer(Subscription(enabled=client.wants_events), request.id)
        line = b""

        async def execute() -> None:
            nonlocal line
            try:
                line = answer(await self._execute(request), request.id)
            except ControlError as error:
                line = refusal(error, request.id)
            except PostcopyError as error:
                kind = "BadArguments" if isinstance(error, ConfigurationError) else "Failed"
                line = refusal(ControlError(kind, str(error)), request.id)

        mistake = await contained(f"control: {request.command}", execute)
        if mistake is not None:
            what = f"a mistake in postcopy, see its log: {type(mistake).__name__}: {mistake}"
            line = refusal(ControlError("Failed", what), request.id)
        return line


class _Client:
    """One connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.wants_events = False
        self.dropped = False
        self.queued_bytes = 0
        self.connected_at = trio.current_time()
        self._active_at = self.connected_at  # of the last request, or line read
        self._has_asked = self._was_sent_to = False
        self._has_read = False  # at some time everything that had been sent
        self._behind_since = self._active_at  # when the first line was queued that it may not have read
        self._stream = stream
        self._lines: deque[tuple[bytes, bool]] = deque()  # and whether it is an answer
        self._answers = 0
        self._wake = trio.Event()
        self._taken = trio.Event()
        self._closing = False
        self._reading = trio.CancelScope()
        # Shielded: whatever ends the server, a line that was begun is finished, and the last lines are written.
        self._writing = trio.CancelScope(shield=True)

    def rank(self) -> tuple[int, float]:
        """The client with the lowest one is the first to be disconnected: one that leaves something unread, then one
        that has read everything and made no request, then one that has made one."""
        if not self._reads():
            return 0, self._behind_since + GRACE_S * self._has_read
        return (2, self._active_at) if self._has_asked else (1, self._behind_since)

    def _reads(self) -> bool:
        """Whether it has read all that was sent to it."""
        if self._lines or self._unread_bytes():
            return False
        self._has_read = self._was_sent_to
        return True

    def _unread_bytes(self) -> int:
        """In the connection's buffers, by the kernel's count."""
        try:
            answer = fcntl.ioctl(self._stream.socket.fileno(), termios.TIOCOUTQ, b"\0" * 4)
        except (OSError, ValueError):  # closed
            return 0
        return int.from_bytes(answer, sys.byteorder)

    def send_answer(self, line: bytes) -> None:
        self._put(line, True)

    def send_event(self, line: bytes) -> None:
        """Queues it, or gives the client up."""
        if len(self._lines) >= QUEUE_LINES or self.queued_bytes >= QUEUE_BYTES:
            self._drop()
        else:
            self._put(line, False)

    def disconnect(self, error: ControlError) -> None:
        """Now; with the reason, if there is room for it."""
        if not self._lines:
            with contextlib.suppress(OSError):
                os.write(self._stream.socket.fileno(), refusal(error))
        self._reading.cancel()
        self._writing.cancel()

    async def run(self, handle: Callable[[_Client, bytes], Awaitable[bytes]]) -> None:
        """Until the client leaves. Never raises for what the client does."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                try:
                    with self._reading:
                        await self._read(handle)
                finally:
                    self._closing = True
                    self._wake.set()
                    self._writing.deadline = trio.current_time() + LAST_LINES_S
        finally:
            self._stream.socket.close()

    def _put(self, line: bytes, is_answer: bool) -> None:
        if self._reads():
            self._behind_since = trio.current_time()
        self._was_sent_to = True
        self._lines.append((line, is_answer))
        self.queued_bytes += len(line)
        self._answers += is_answer
        self._wake.set()

    async def _read(self, handle: Callable[[_Client, bytes], Awaitable[bytes]]) -> None:
        splitter = LineSplitter()
        while True:
            try:
                data = await self._stream.receive_some(16 * 1024)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not data:
                return
            try:
                lines = splitter.feed(bytes(data))
            except ControlError as error:
                self._put(refusal(error), True)
                return
            for line in lines:
                while self._answers >= QUEUE_ANSWERS or (self._answers and self.queued_bytes >= LONG_ANSWER_BYTES):
                    self._taken = trio.Event()
                    await self._taken.wait()
                self._active_at, self._has_asked = trio.current_time(), True
                self._put(await handle(self, line), True)
                await trio.lowlevel.checkpoint()  # thousands may have come in one piece

    async def _write(self) -> None:
        with self._writing:
            while self._lines or not self._closing:
                if not self._lines:
                    self._wake = trio.Event()
                    await self._wake.wait()
                    continue
                line, is_answer = self._lines.popleft()
                with trio.move_on_after(WRITE_TIMEOUT_S) as waiting:
                    try:
                        await self._stream.send_all(line)
                    except (trio.BrokenResourceError, trio.ClosedResourceError):
                        self._reading.cancel()
                        return
                if waiting.cancelled_caught:
                    self._drop()
                self._active_at = trio.current_time()
                self.queued_bytes -= len(line)
                self._answers -= is_answer
                self._taken.set()

    def _drop(self) -> None:
        self.dropped = True
        self._reading.cancel()
        self._writing.cancel()


class _Spare:
    """A descriptor that is kept for the moment in which there are no more."""

    def __init__(self) -> None:
        self._fd = -1
        self.take()

    def take(self) -> None:
        """Again, where there is one."""
        if self._fd < 0:
            with contextlib.suppress(OSError):
                self._fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def give(self) -> bool:
        """Whether there was one to be given back."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        return fd >= 0
