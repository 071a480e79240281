# SPDX-License-Identifier: Apache-2.0
"""QMP, the monitor protocol of QEMU: lines of JSON over an AF_UNIX socket.

`QmpProtocol` does no I/O: it is given bytes and says what they mean, so that the same one serves a client on Trio
(`Monitor`) and one that blocks. `Monitor` is a connection with a QEMU, held for as long as that QEMU is looked after:
a monitor has one client, so that nobody else gives orders there meanwhile.

What QEMU says is not trusted: a line is bounded in length, an answer must be to a question, an event is looked at by
whoever knows its name. Every way in which a command can fail has a name:

| error | what it means |
|---|---|
| `QemuUnreachable` | nothing was asked: nobody listens there, or another client has this monitor |
| `QemuRefused` | it answered that it will not; `description` is its own text |
| `QemuInDoubt` | it was asked and has not answered: whether it did it has to be found out |
| `QemuAnswer` | it said what no QEMU says: the connection is of no use any more |

Concurrency: any number of tasks may use a `Monitor`. One of those that wait reads, for all of them; when it has what it
waits for, another goes on. So there is no task of its own, and while nobody waits nothing is read.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
import weakref
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import trio

from postcopy.errors import MigrationError
from postcopy.machines._peer import Process, Unreachable, connect, one_line, process_of

REQUEST_TIMEOUT_S = 10.0
"""How long QEMU has for a command that does little."""
GREETING_TIMEOUT_S = 2.0
"""How long it has to say who it is, which it does at once where the monitor has no other client."""
MAX_LINE_BYTES = 4 << 20
IN_PLACE_S = 0.002
"""See `Monitor.hurry`."""
PATIENCE_S = 0.25
"""How long that may be in all, on one connection: QEMU may call for it again and again."""
_READ_BYTES = 64 << 10
_Part = Annotated[int, msgspec.Meta(ge=0, lt=10_000)]  # of a version


class QemuError(MigrationError):
    """A command that failed."""


class QemuUnreachable(QemuError, Unreachable):
    """Nobody answers there: nothing was asked."""


class QemuInDoubt(QemuError):
    """It was asked and has not answered: whether it has done it is not known."""


class QemuAnswer(QemuError):
    """It said what no QEMU says."""


class QemuRefused(QemuError):
    """It answered that it will not."""

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"QEMU refuses {command}: {description or 'it does not say why'}")
        self.command = command
        self.kind = kind  # as CommandNotFound; mostly GenericError
        self.description = description


@dataclass(frozen=True)
class Event:
    """Something that has happened in QEMU."""

    name: str
    data: Mapping[str, Any]
    when_ns: int = 0  # CLOCK_REALTIME, as QEMU says; 0: it does not


@dataclass(frozen=True)
class Answer:
    """What QEMU says to one command."""

    number: int
    value: Any
    refusal: tuple[str, str] | None = None  # class and description


@dataclass
class QmpProtocol:
    """The client's side of one connection."""

    version: tuple[int, int, int] | None = None
    """Of QEMU, once it has greeted. The first command must be ``qmp_capabilities``."""
    _buffer: bytearray = field(default_factory=bytearray)
    _searched: int = 0
    _asked: dict[int, str] = field(default_factory=dict)
    _last: int = 0

    def command(self, name: str, arguments: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """The number by which its answer will be known, and what is to be sent."""
        self._last += 1
        self._asked[self._last] = name
        message: dict[str, Any] = {"execute": name, "id": self._last}
        if arguments:
            message["arguments"] = arguments
        return self._last, msgspec.json.encode(message) + b"\n"

    def receive(self, data: bytes) -> list[Event | Answer]:
        """What bytes from QEMU mean. `QemuAnswer` for what makes no sense, after which nothing does."""
        self._buffer += data
        messages: list[Event | Answer] = []
        while (end := self._buffer.find(b"\n", self._searched)) >= 0:
            line = bytes(self._buffer[:end]).strip()
            del self._buffer[: end + 1]
            self._searched = 0
            if line and (message := self._decoded(line)) is not None:
                messages.append(message)
        self._searched = len(self._buffer)
        if self._searched > MAX_LINE_BYTES:
            raise QemuAnswer(f"QEMU says more than {MAX_LINE_BYTES >> 20} MiB in one line")
        return messages

    def _decoded(self, line: bytes) -> Event | Answer | None:
        if len(line) > MAX_LINE_BYTES:
            raise QemuAnswer(f"QEMU says more than {MAX_LINE_BYTES >> 20} MiB in one line")
        try:
            said = msgspec.json.decode(line)
        except (ValueError, RecursionError) as error:
            raise QemuAnswer("what answers there does not speak QMP: a line of it is not JSON") from error
        if not isinstance(said, dict):
            raise QemuAnswer("what answers there does not speak QMP")
        if self.version is None:
            self.version = _version(said)
            return None
        if isinstance(name := said.get("event"), str):
            data = said.get("data", {})
            return Event(name, data if isinstance(data, dict) else {}, _when_ns(said.get("timestamp")))
        refusal = None
        if "error" in said:
            why = said["error"] if isinstance(said["error"], dict) else {}
            refusal = (one_line(why.get("class", "")), one_line(why.get("desc", "")))
        elif "return" not in said:
            raise QemuAnswer("QEMU sends what is no answer and no event")
        number = said.get("id")
        if type(number) is not int or self._asked.pop(number, None) is None:
            raise QemuAnswer("QEMU answers what it was not asked" + (f": {refusal[1]}" if refusal else ""))
        return Answer(number, said.get("return"), refusal)


def _version(greeting: Mapping[str, Any]) -> tuple[int, int, int]:
    try:
        number = greeting["QMP"]["version"]["qemu"]
        return msgspec.convert((number["major"], number["minor"], number["micro"]), tuple[_Part, _Part, _Part])
    except (LookupError, TypeError, msgspec.ValidationError):
        raise QemuAnswer("what answers there is no QEMU: it does not say its version") from None


def _when_ns(timestamp: object) -> int:
    try:
        said = msgspec.convert(timestamp, dict[str, int])
        return said["seconds"] * 10**9 + said["microseconds"] * 1000
    except (LookupError, msgspec.ValidationError):
        return 0


@dataclass(eq=False)
class Asked:
    """A command that was sent."""

    number: int
    command: str
    timeout_s: float
    deadline: float  # for its answer
    answer: Answer | None = None


class Monitor:
    """The monitor of one QEMU. Made by `open`; `close` ends the connection, and nothing else."""

    def __init__(self, path: str, stream: trio.SocketStream, process: Process) -> None:
        self.path = path
        self.process = process
        """Who listens there; its pidfd is closed with this."""
        self.on_event: Callable[[Event], object] = lambda event: None
        """Called for each event, by the task that reads. Must not raise."""
        self._protocol = QmpProtocol()
        self._stream = stream
        self._sending = trio.Lock()
        self._asked = weakref.WeakValueDictionary[int, Asked]()  # whose answers somebody may want still
        self._read = trio.Event()
        self._reading = False
        self._idle = trio.CancelScope()  # of the task that reads
        self._patience_s = PATIENCE_S
        self._broken: QemuError | None = None
        self._mending = trio.Lock()
        self._closed = False

    @classmethod
    async def open(cls, path: str, timeout_s: float = GREETING_TIMEOUT_S) -> Monitor:
        """The one at that path, ready for commands."""
        deadline = trio.current_time() + timeout_s
        try:
            stream = await connect(path, deadline, "QEMU", "start one with -qmp unix:PATH,server=on,wait=off")
        except Unreachable as error:
            raise QemuUnreachable(str(error)) from error
        try:
            monitor = cls(path, stream, process_of(stream.socket, path, "QEMU"))
        except Unreachable as error:
            stream.socket.close()
            raise QemuUnreachable(str(error)) from error
        except BaseException:
            stream.socket.close()
            raise
        try:
            await monitor._greet(timeout_s)
        except BaseException:
            monitor.close()
            raise
        return monitor

    async def mend(self, timeout_s: float = GREETING_TIMEOUT_S) -> bool:
        """A new connection with the same QEMU, where the one that there was is of no use any more; whether it is new.
        Those who wait on the old one get its error. Events in between are lost."""
        if self._is_fine():
            return False
        async with self._mending:
            if self._is_fine():  # another task has made it
                return True
            if self._closed or not self.process.alive:
                self._check()
            self._stream.socket.close()
            fresh = await Monitor.open(self.path, timeout_s)
            with fresh.process.pidfd:
                if self._closed:
                    fresh.close()
                    self._check()
                if fresh.process.pid != self.process.pid or not self.process.alive:
                    fresh.close()
                    raise QemuUnreachable(f"another QEMU (process {fresh.process.pid}) has the monitor {self.path} now")
            # Numbers go on, so that no answer is taken for that to an older question.
            fresh._protocol._last = max(self._protocol._last, fresh._protocol._last)
            self._stream, self._protocol, self._broken = fresh._stream, fresh._protocol, None
            return True

    def _is_fine(self) -> bool:
        return self._broken is None

    async def _greet(self, timeout_s: float) -> None:
        try:
            await self.wait_until(lambda: self._protocol.version is not None, timeout_s)
        except trio.TooSlowError:
            raise QemuUnreachable(
                f"QEMU ({self.path}) says nothing: another client has this monitor, and it takes one at a time; end"
                " that client, or start QEMU with a second -qmp unix:PATH,server=on,wait=off (or it hangs: it waits for"
                " a page of the guest's memory, or for a disk)"
            ) from None
        await self.execute("qmp_capabilities", timeout_s=timeout_s)

    @property
    def version(self) -> tuple[int, int, int]:
        """Of QEMU."""
        assert self._protocol.version is not None
        return self._protocol.version

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fd: int | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> Any:
        """What QEMU answers. `fd`: a descriptor that goes along, as ``getfd`` takes one; it stays the caller's. Raises
        a `QemuError`. Cancelled, it is in doubt whether it was done."""
        return await self.answer_to(await self.ask(command, arguments, fd=fd, timeout_s=timeout_s))

    async def ask(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        fd: int | None = None,
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> Asked:
        """`execute` up to where its answer is waited for: see `answer_to`, which is called once. Commands that are
        asked one after the other are done in this order."""
        number, line = self._protocol.command(command, arguments)
        asked = Asked(number, command, timeout_s, trio.current_time() + timeout_s)
        self._asked[number] = asked
        try:
            with trio.fail_at(asked.deadline):
                await self._send(line, fd)
        except trio.TooSlowError:
            raise self._unanswered(asked) from None
        return asked

    async def answer_to(self, asked: Asked, *, hurry: bool = False) -> Any:
        try:
            if hurry:
                self.hurry(lambda: asked.answer is not None)
            with trio.fail_at(asked.deadline):
                await self._until(lambda: asked.answer is not None)
        except trio.TooSlowError:
            raise self._unanswered(asked) from None
        assert asked.answer is not None
        if asked.answer.refusal is not None:
            raise QemuRefused(asked.command, *asked.answer.refusal)
        return asked.answer.value

    def _unanswered(self, asked: Asked) -> QemuInDoubt:
        return QemuInDoubt(
            f"QEMU ({self.path}) has not answered {asked.command} within {asked.timeout_s:g} s; it may wait for a page"
            " of the guest's memory, or for a disk"
        )

    async def wait_until(self, done: Callable[[], bool], timeout_s: float) -> None:
        """Reads until `done`, which is asked after each piece of what QEMU sends. `trio.TooSlowError` after
        `timeout_s`; a `QemuError` when the connection ends first. Cancellable."""
        with trio.fail_after(timeout_s):
            await self._until(done)

    async def _send(self, line: bytes, fd: int | None) -> None:
        try:
            self._sending.acquire_nowait()  # no other task need run before a command leaves
        except trio.WouldBlock:
            await self._sending.acquire()
        sent = 0
        try:
            self._check()
            if fd is not None:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
                sent = await self._stream.socket.sendmsg([line], rights)
            else:
                with contextlib.suppress(BlockingIOError):
                    sent = os.write(self._stream.socket.fileno(), line)
            while sent < len(line):
                sent += await self._stream.socket.send(line[sent:])
        except trio.ClosedResourceError:  # by `close`, or `mend`
            self._check()
            raise
        except OSError as error:
            raise self._break(self._ended()) from error
        finally:
            if 0 < sent < len(line):  # cancelled within a line
                self._break(QemuInDoubt(f"QEMU ({self.path}) was sent half of a command"))
            self._sending.release()

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._check()
            if self._reading:
                await self._read.wait()
                continue
            self._reading = True
            try:
                await self._read_some()
            except trio.ClosedResourceError:  # by `close`, or `mend`
                self._check()
                raise
            finally:
                self._reading = False
                self._wake()

    def _wake(self) -> None:
        read, self._read = self._read, trio.Event()
        read.set()

    async def _read_some(self) -> None:
        with trio.CancelScope() as self._idle:  # also when it is read in place before this task is woken
            await trio.lowlevel.checkpoint()  # the others get their turn, however much QEMU says
            while not self._read_now():
                await trio.lowlevel.wait_readable(self._stream.socket)

    def _read_now(self) -> bool:
        """Takes what has come, if anything."""
        try:
            data = os.read(self._stream.socket.fileno(), _READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._break(self._ended()) from error
        self._sort(data)
        return True

    def hurry(self, done: Callable[[], bool]) -> None:
        """A guest stands: what QEMU says is waited for *in place*, with no other task running, since each pass of the
        event loop costs as much as QEMU's answer. What does not come within `IN_PLACE_S` is to be waited for as
        ever."""
        if self._broken is not None:
            return
        began_s = time.monotonic()
        until_s = began_s + min(IN_PLACE_S, self._patience_s)
        poll = select.poll()
        poll.register(self._stream.socket.fileno(), select.POLLIN)
        try:
            while not done() and self._broken is None:
                left_s = until_s - time.monotonic()
                if not self._read_now() and (left_s <= 0 or not poll.poll(left_s * 1000)):
                    return
        finally:
            self._patience_s -= time.monotonic() - began_s
            self._idle.cancel()  # whoever reads has to look
            self._wake()

    def _sort(self, data: bytes) -> None:
        if not data:
            raise self._break(self._ended())
        try:
            messages = self._protocol.receive(data)
        except QemuAnswer as error:
            raise self._break(QemuAnswer(f"{error} ({self.path})")) from None
        for message in messages:
            if isinstance(message, Event):
                self.on_event(message)
            elif (asked := self._asked.get(message.number)) is not None:  # else nobody waits for it any more
                asked.answer = message

    def _ended(self) -> QemuInDoubt:
        return QemuInDoubt(f"QEMU ({self.path}, process {self.process.pid}) has closed its monitor: it may have ended")

    def _check(self) -> None:
        if self._broken is not None:
            raise type(self._broken)(str(self._broken)) from self._broken

    def _break(self, error: QemuError) -> QemuError:
        self._broken = self._broken or error
        return error

    def close(self) -> None:
        """Twice does no harm. Tasks that wait get a `QemuError`, as later ones do."""
        self._closed = True
        self._break(QemuInDoubt(f"the connection with QEMU ({self.path}) was closed"))
        self._stream.socket.close()
        self.process.pidfd.close()
