# SPDX-License-Identifier: Apache-2.0
"""The control socket's server: many clients, none of which can hold the process up, or keep another one out.

Each client has two tasks. One reads requests and has them executed, one after the other; the other one writes from a
queue. What a client may leave unread is bounded twice. *Answers*: while `QUEUE_ANSWERS` of them (or a long one) wait,
nothing more is read from it, so that one that asks a lot and reads what it is told is served at its own pace. *Events*
come unasked and wait for nobody: a client that leaves `QUEUE_LINES` or `QUEUE_BYTES` unread is hung up on. So is one
that takes a line in less than `WRITE_TIMEOUT_S`.

**Places.** There are `MAX_CLIENTS`. When all are taken, a newcomer gets that of the client which has left something
unread for longest; where there is no such one, that of the client which has asked nothing for longest; and else that
of the client which was alive longest ago. One that has been seen to read is given `BENEFIT_S` for what it has not read
yet: it may just not have come to it. Everybody may connect who may do everything, so this is not about rights, but
about clients that hang: the operator must always get in, and stay. For the same reason one descriptor is kept for the
moment when the process has no more.

**The socket.** Whoever may connect may do everything, so the socket is born with mode 0600: only this user, and root;
it listens only when that has been seen. One that a dead process left behind is replaced, one that answers is not, and
nothing that is not a socket is ever removed. Looking and replacing happen under a lock on the directory, so that of two
processes that start at the same time one gets the name and the other one the error. At the end the socket is removed,
if it is still the same one.

Resource handling: the server owns the listening socket; `close` removes it. Error handling: `ConfigurationError` for a
path that cannot be one, `ResourceError` where it cannot be had. Nothing that a client does, and no mistake in a
command, ends `serve`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import sys
import termios
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from postcopy.errors import ConfigurationError, PostcopyError, ResourceError
from postcopy.service._contain import contained
from postcopy.service.options import check_control_path
from postcopy.service.schema import (
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
BACKLOG = 128
QUEUE_ANSWERS = 4
LONG_ANSWER_BYTES = 256 * 1024
"""One that is longer is alone in the queue."""
QUEUE_LINES = 256
"""What a client may leave unread of events: some minutes of progress."""
QUEUE_BYTES = 4 << 20
WRITE_TIMEOUT_S = 30.0
LAST_WORDS_S = 0.5
"""How long a client may take for what it was told last: the answer to `quit`, the result."""
BENEFIT_S = 5.0
STAY_S = 0.2
"""Nobody is hung up on before, so that one who asks at once is answered in whatever crowd; others wait to connect."""
LOCK_TIMEOUT_S = 5.0
ACCEPT_PAUSE_S = 0.1

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
        self._spare = _Spare()
        self.dropped = 0  # clients that did not read

    @classmethod
    async def open(cls, path: str, side: str, execute: Execute) -> ControlServer:
        """`side` is told to clients. `execute` does a request, its arguments checked, and returns the answer; what it
        raises, when it is a `PostcopyError`, the client is told."""
        check_control_path(path)
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
                client.tell(line)

    async def serve(self) -> None:
        """Serves clients until cancelled; what they were told last they still get, if they take it soon."""
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
        victim = min(self._clients, key=lambda client: client.merit())
        stays_s = victim.connected_at + STAY_S - trio.current_time()
        if stays_s > 0:
            await trio.sleep(stays_s)  # and look again: it may have asked something, or somebody may have left
            return
        self._clients.discard(victim)
        victim.hang_up(ControlError("NotNow", f"hung up on: {MAX_CLIENTS} clients, and this one silent for longest"))
        log.warning("control: there are %d clients: hung up on the one that was silent for longest", MAX_CLIENTS)

    def close(self) -> None:
        """Removes the socket. `serve` must have ended."""
        self._listener.close()
        self._spare.give()
        with contextlib.suppress(OSError):
            if _identity(self.path) == self._identity:
                os.unlink(self.path)

    async def _serve_client(self, client: _Client) -> None:
        try:
            client.greet(greeting(self._side, os.getpid()))
            await contained("a client of the control socket", lambda: client.run(self._handle))
        finally:
            self._clients.discard(client)
            self._spare.take()
            if client.dropped:
                self.dropped += 1
                log.warning("control: a client that does not read was hung up on")

    async def _handle(self, client: _Client, line: bytes) -> bytes:
        """The answer to a line."""
        try:
            request = parse_request(line)
        except RequestError as error:
            return refusal(error.error, error.id)
        if request.command == "events":
            client.wants_events = request.arguments.get("enable", True)
            return answer({"enabled": client.wants_events}, request.id)
        told = b""

        async def execute() -> None:
            nonlocal told
            try:
                told = answer(await self._execute(request), request.id)
            except ControlError as error:
                told = refusal(error, request.id)
            except PostcopyError as error:
                kind = "BadArguments" if isinstance(error, ConfigurationError) else "Failed"
                told = refusal(ControlError(kind, str(error)), request.id)

        mistake = await contained(f"control: {request.command}", execute)
        if mistake is not None:
            what = f"a mistake in postcopy, see its log: {type(mistake).__name__}: {mistake}"
            told = refusal(ControlError("Failed", what), request.id)
        return told


class _Client:
    """One connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.wants_events = False
        self.dropped = False
        self.queued_bytes = 0
        self.connected_at = trio.current_time()
        self._alive_at = self.connected_at  # of the last request, or line taken
        self._has_asked = self._was_told = False
        self._has_read = False  # at some time everything that it had been told
        self._behind_since = self._alive_at  # when it was told the first of what it may not have read
        self._stream = stream
        self._lines: deque[tuple[bytes, bool]] = deque()  # and whether it is an answer
        self._answers = 0
        self._wake = trio.Event()
        self._taken = trio.Event()
        self._closing = False
        self._reading = trio.CancelScope()
        # Shielded: whatever ends the server, a line that was begun is finished, and the last words are said.
        self._writing = trio.CancelScope(shield=True)

    def merit(self) -> tuple[int, float]:
        """The client with the smallest one is the first to be hung up on: one that leaves something unread, then one
        that has read all and asked nothing, then one that has asked."""
        if not self._reads():
            return 0, self._behind_since + BENEFIT_S * self._has_read
        return (2, self._alive_at) if self._has_asked else (1, self._behind_since)

    def _reads(self) -> bool:
        """Whether it has read all that it was told."""
        if self._lines or self._unread_bytes():
            return False
        self._has_read = self._was_told
        return True

    def _unread_bytes(self) -> int:
        """In the connection's buffers, by the kernel's count."""
        try:
            answer = fcntl.ioctl(self._stream.socket.fileno(), termios.TIOCOUTQ, b"\0" * 4)
        except (OSError, ValueError):  # closed
            return 0
        return int.from_bytes(answer, sys.byteorder)

    def greet(self, line: bytes) -> None:
        self._put(line, True)

    def tell(self, line: bytes) -> None:
        """Queues an event, or gives the client up."""
        if len(self._lines) >= QUEUE_LINES or self.queued_bytes >= QUEUE_BYTES:
            self._drop()
        else:
            self._put(line, False)

    def hang_up(self, error: ControlError) -> None:
        """Now, with a word of why if there is room for it."""
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
                    self._writing.deadline = trio.current_time() + LAST_WORDS_S
        finally:
            self._stream.socket.close()

    def _put(self, line: bytes, is_answer: bool) -> None:
        if self._reads():
            self._behind_since = trio.current_time()
        self._was_told = True
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
                self._alive_at, self._has_asked = trio.current_time(), True
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
                self._alive_at = trio.current_time()
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

    @property
    def held(self) -> bool:
        return self._fd >= 0

    def take(self) -> None:
        """Again, where there is one."""
        if not self.held:
            with contextlib.suppress(OSError):
                self._fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def give(self) -> bool:
        """Whether there was one to be given back."""
        if not self.held:
            return False
        fd, self._fd = self._fd, -1
        os.close(fd)
        return True


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
        # Before bind: Linux makes the socket's file with the socket's mode, less the umask, which must not take the
        # owner's part away. So there is no instant at which others may, and nothing is changed by a name that somebody
        # could have put elsewhere meanwhile.
        os.fchmod(listener.fileno(), 0o600)
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        if stat.S_IMODE(os.lstat(path).st_mode) & 0o077:
            os.unlink(path)
            raise ResourceError(
                f"--control {path}: other users could connect: this file system gives a socket no mode of its own",
                "choose a directory on another one, such as /run",
            )
        listener.listen(BACKLOG)  # before which nobody can connect
    except BaseException as error:
        listener.close()
        if isinstance(error, OSError):
            raise ResourceError(f"--control {path}: {error.strerror}") from error
        raise
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
