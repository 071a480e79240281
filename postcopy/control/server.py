# SPDX-License-Identifier: Apache-2.0
"""The control socket's server: many clients, none of which can hold the process up.

Each client has two tasks. One reads requests and has them executed, one after the other; the other one writes from a
bounded queue. Nothing ever waits for that queue: a client that does not read until it is full is hung up on, and so is
one that takes none of it for `WRITE_TIMEOUT_S`.

**The socket.** Whoever may connect may do everything, so the socket is born with mode 0600: only this user, and root.
One that a dead process left behind is replaced, one that answers is not, and nothing that is not a socket is ever
removed. Looking and replacing happen under a lock on the directory, so that of two processes that start at the same
time one gets the name and the other one the error. At the end the socket is removed, if it is still the same one.

Resource handling: the server owns the listening socket; `close` removes it. Error handling: `ConfigurationError` for a
path that cannot be one, `ResourceError` where it cannot be had.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from postcopy._errors import ConfigurationError, PostcopyError, ResourceError

from .schema import (
    ControlError,
    Json,
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
QUEUE_LINES = 256
"""What a client may leave unread: some minutes of progress."""
WRITE_TIMEOUT_S = 30.0
LAST_WORDS_S = 0.5
"""How long a client may take for what it was told last: the answer to `quit`, the result."""
LOCK_TIMEOUT_S = 5.0
_MAX_PATH_BYTES = 107  # sun_path, and its null (unix(7))

log = logging.getLogger(__name__)

Execute = Callable[[Request], Awaitable[Json]]


class ControlServer:
    """`open` it, `serve` in a task of its own, `publish` what happens, `close`."""

    def __init__(self, path: str, listener: socket.socket, side: str, execute: Execute) -> None:
        self.path = path
        self._listener = trio.socket.from_stdlib_socket(listener)
        self._identity = _identity(path)
        self._side = side
        self._execute = execute
        self._clients: set[_Client] = set()
        self.dropped = 0  # clients that did not read

    @classmethod
    async def open(cls, path: str, side: str, execute: Execute) -> ControlServer:
        """`side` is told to clients. `execute` does a request, its arguments checked, and returns the answer; what it
        raises, when it is a `PostcopyError`, the client is told."""
        if not path or "\0" in path or len(os.fsencode(path)) > _MAX_PATH_BYTES:
            raise ConfigurationError(f"--control {path!r}: a socket's path has 1 to {_MAX_PATH_BYTES} bytes")
        directory = _directory(path)
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigurationError(f"--control {path}: {directory}: {error.strerror}") from error
        try:
            await _lock(lock, directory)
            listener = _listen(path)
        finally:
            os.close(lock)
        return cls(path, listener, side, execute)

    def publish(self, what: str, data: Json) -> None:
        """Tells the clients that asked for events. Never blocks."""
        listeners = [client for client in self._clients if client.wants_events]
        if listeners:
            line = event(what, data)
            for client in listeners:
                client.put(line)

    async def serve(self) -> None:
        """Serves clients until cancelled; what they were told last they still get, if they take it soon."""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    connection, _ = await self._listener.accept()
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                        raise
                    log.error("control: cannot accept a connection: %s", error.strerror)
                    await trio.sleep(0.1)
                    continue
                client = _Client(trio.SocketStream(connection))
                if len(self._clients) >= MAX_CLIENTS:
                    client.refuse(ControlError("NotNow", f"this process has {MAX_CLIENTS} clients already"))
                    continue
                self._clients.add(client)
                nursery.start_soon(self._serve_client, client)

    def close(self) -> None:
        """Removes the socket. `serve` must have ended."""
        self._listener.close()
        with contextlib.suppress(OSError):
            if _identity(self.path) == self._identity:
                os.unlink(self.path)

    async def _serve_client(self, client: _Client) -> None:
        try:
            client.put(greeting(self._side, os.getpid()))
            await client.run(self._handle)
        finally:
            self._clients.discard(client)
            if client.dropped:
                self.dropped += 1
                log.warning("control: a client that does not read was hung up on")

    async def _handle(self, client: _Client, line: bytes) -> None:
        try:
            request = parse_request(line)
        except RequestError as error:
            client.put(refusal(error.error, error.id))
            return
        if request.command == "events":
            client.wants_events = request.arguments.get("enable", True)
            client.put(answer({"enabled": client.wants_events}, request.id))
            return
        try:
            client.put(answer(await self._execute(request), request.id))
        except ControlError as error:
            client.put(refusal(error, request.id))
        except PostcopyError as error:
            kind = "BadArguments" if isinstance(error, ConfigurationError) else "Failed"
            client.put(refusal(ControlError(kind, str(error)), request.id))


class _Client:
    """One connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.wants_events = False
        self.dropped = False
        self._stream = stream
        self._lines: deque[bytes] = deque()
        self._wake = trio.Event()
        self._closing = False
        self._reading = trio.CancelScope()
        # Shielded: whatever ends the server, a line that was begun is finished, and the last words are said.
        self._writing = trio.CancelScope(shield=True)

    def put(self, line: bytes) -> None:
        """Queues a line, or gives the client up."""
        if len(self._lines) >= QUEUE_LINES:
            self._drop()
            return
        self._lines.append(line)
        self._wake.set()

    def refuse(self, error: ControlError) -> None:
        with contextlib.suppress(OSError), self._stream.socket as connection:
            connection.shutdown(socket.SHUT_RD)
            os.write(connection.fileno(), refusal(error))  # a new socket has room for that

    async def run(self, handle: Callable[[_Client, bytes], Awaitable[None]]) -> None:
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
                    self._writing.deadline = trio.current_time() + LAST_WORDS_S
        finally:
            self._stream.socket.close()

    async def _read(self, handle: Callable[[_Client, bytes], Awaitable[None]]) -> None:
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
                self.put(refusal(error))
                return
            for line in lines:
                await handle(self, line)

    async def _write(self) -> None:
        with self._writing:
            while self._lines or not self._closing:
                if not self._lines:
                    self._wake = trio.Event()
                    await self._wake.wait()
                    continue
                with trio.move_on_after(WRITE_TIMEOUT_S) as waiting:
                    try:
                        await self._stream.send_all(self._lines.popleft())
                    except (trio.BrokenResourceError, trio.ClosedResourceError):
                        self._reading.cancel()
                        return
                if waiting.cancelled_caught:
                    self._drop()

    def _drop(self) -> None:
        self.dropped = True
        self._reading.cancel()
        self._writing.cancel()


def _directory(path: str) -> str:
    return os.path.dirname(os.path.abspath(path))


def _identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


async def _lock(directory_fd: int, directory: str) -> None:
    with trio.move_on_after(LOCK_TIMEOUT_S):
        while True:
            try:
                fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                await trio.sleep(0.01)
            except OSError as error:
                raise ResourceError(f"cannot lock {directory}: {error.strerror}") from error
    raise ResourceError(f"somebody else has locked {directory}", "choose another directory for --control")


def _listen(path: str) -> socket.socket:
    """The listening socket, in place of a dead one. Under the lock."""
    with contextlib.suppress(FileNotFoundError):
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise ConfigurationError(f"--control {path}: there is something that is not a socket")
            if _answers(path):
                raise ResourceError(
                    f"--control {path}: a running process has this socket", "choose another path, or end that process"
                )
            os.unlink(path)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ResourceError(f"--control {path}: {error.strerror}") from error
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Before bind: Linux makes the socket's file with the socket's mode, so there is no instant at which others may.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(path)
        os.chmod(path, 0o600)  # should the kernel or the file system see that otherwise
        listener.listen(MAX_CLIENTS)
    except OSError as error:
        listener.close()
        raise ResourceError(f"--control {path}: {error.strerror}") from error
    return listener


def _answers(path: str) -> bool:
    """Whether a process listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            return True  # its queue is full
    return True
