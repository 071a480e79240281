# SPDX-License-Identifier: Apache-2.0
"""The other end of a control socket, for `postcopy ctl` and for programs."""

from __future__ import annotations

import contextlib
import json
import math
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import trio
from msgspec import ValidationError, convert

from postcopy.errors import PeerError
from postcopy.records import VERSION, Json, Record
from postcopy.records.control import ANSWERS
from postcopy.records.events import EVENTS
from postcopy.service.options import check_control_path
from postcopy.service.schema import MAX_ANSWER_BYTES, ControlError, LineSplitter, parse_json
from postcopy.wire import one_line

ANSWER_TIMEOUT_S = 60.0
BUSY_POLL_S = 0.02
MAX_EVENTS = 10_000
"""That come before an answer; a process drops events long before so many wait for a reader."""


class ProcessGoneError(PeerError):
    """The process has ended, or has closed the connection."""


class ControlClient:
    """One conversation, used from one task at a time. `open` gives one that has been greeted."""

    def __init__(self, stream: trio.SocketStream, path: str, checks: bool = False) -> None:
        self.greeting: Json = {}
        self._checks = checks
        self._stream = stream
        self._path = path
        self._splitter = LineSplitter(MAX_ANSWER_BYTES)
        self._lines: list[Json] = []
        self._events: list[Json] = []
        self._requests = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, path: str, timeout_s: float = 10.0, *, checks: bool = False) -> AsyncIterator[ControlClient]:
        """`PeerError` when no process answers there, or not in this protocol; `ConfigurationError` for a path that no
        socket can have. `checks`: answers and events are as the records have them, with what was added to these since;
        anything else is a `PeerError`, since the socket may be of anything."""
        check_control_path(path, "the control socket")
        try:
            with trio.fail_after(timeout_s):
                stream = await _connect(path)
        except trio.TooSlowError:
            raise PeerError(f"{path}: no answer within {timeout_s:g} s") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise PeerError(
                f"{path}: {reason}; is there a process with --control {path}, and is it this user's?"
            ) from error
        async with stream:
            client = cls(stream, path, checks)
            await client._greeted(timeout_s)
            yield client

    async def execute(self, command: str, arguments: Json | None = None, timeout_s: float = ANSWER_TIMEOUT_S) -> Json:
        """The answer. `ControlError` when it was refused, `PeerError` when none came: `ProcessGoneError` when none can
        come."""
        self._requests += 1
        request = {"execute": command, "arguments": arguments or {}, "id": self._requests}
        try:
            await self._stream.send_all(json.dumps(request).encode() + b"\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ProcessGoneError(f"{self._path}: the process is gone") from error
        with trio.move_on_after(timeout_s):
            while True:
                line = await self._next()
                if "event" in line:
                    self._events.append(line)
                    if len(self._events) > MAX_EVENTS:
                        raise PeerError(f"{self._path}: {MAX_EVENTS} events came in place of the answer to {command}")
                elif line.get("id") in (self._requests, None):
                    value = self._value(line)
                    self._check(f"the answer to {command}", value, ANSWERS.get(command, ()))
                    return value
        raise PeerError(f"{self._path}: {command} was not answered within {timeout_s:g} s")

    async def next_event(self) -> Json:
        """The next event; `events` must have been executed before. `ProcessGoneError` when no more comes,
        `ControlError` when the process says why it does not send any more."""
        while True:
            line = self._events.pop(0) if self._events else await self._next()
            if "event" in line:
                self._check(f"the event {line['event']}", line["data"], EVENTS.get(line["event"], ()))
                return line
            if "error" in line:
                self._value(line)

    async def _greeted(self, timeout_s: float) -> None:
        with trio.move_on_after(timeout_s):
            line = await self._next()
            self.greeting = line.get("postcopy", {})
            if "error" in line:
                self._value(line)
            if not isinstance(self.greeting, dict) or "version" not in self.greeting:
                raise PeerError(f"{self._path}: that is not a postcopy control socket")
            if (theirs := self.greeting.get("schema", 1)) != VERSION:
                raise PeerError(
                    f"{self._path}: the process is of postcopy {self.greeting['version']}, and speaks version {theirs}"
                    f" of the control protocol, not {VERSION}: use `postcopy ctl` of that release"
                )
            return
        raise PeerError(f"{self._path}: no greeting within {timeout_s:g} s")

    async def _next(self) -> Json:
        while not self._lines:
            try:
                data = await self._stream.receive_some(64 * 1024)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise ProcessGoneError(f"{self._path}: the process is gone") from error
            if not data:
                raise ProcessGoneError(f"{self._path}: the process has closed the connection")
            try:
                self._lines += [_printable(parse_json(line)) for line in self._splitter.feed(bytes(data))]
            except (ControlError, RecursionError) as error:
                raise PeerError(f"{self._path}: that is not a postcopy control socket ({error})") from None
        line = self._lines.pop(0)
        if "event" in line and not (isinstance(line["event"], str) and isinstance(line.get("data"), dict)):
            raise PeerError(f"{self._path}: an event without a name or data")
        return line

    def _value(self, line: Json) -> Json:
        error = line.get("error")
        if isinstance(error, dict):
            raise ControlError(str(error.get("class")), str(error.get("desc")))
        value = line.get("return")
        if not isinstance(value, dict):
            raise PeerError(f"{self._path}: an answer without a return value")
        return value

    def _check(self, what: str, value: Json, kinds: Iterable[type[Record]]) -> None:
        """That it is of one of these kinds; of none there may be anything. Fields of the other kinds are taken out:
        who shows it tells by them which one it is."""
        problem: ValidationError | None = None
        kinds = list(kinds) if self._checks else []
        for kind in kinds:
            try:
                convert(value, kind)
                known = {name for other in kinds for name in other.__struct_encode_fields__}
                for name in known.difference(kind.__struct_encode_fields__):
                    value.pop(name, None)
                return
            except ValidationError as error:
                problem = error
        if problem is not None:
            raise PeerError(f"{self._path}: {what} is none that postcopy gives: {one_line(str(problem), 200)}")


def _printable(value: Any) -> Any:
    """All text in it made one line each, with nothing that moves a cursor: it is shown in a terminal, and any process
    may have made a socket of this path. A number without an end, as 1e999, is none, nor is one that no count can be."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value if abs(value) < 2**64 else None
    if isinstance(value, str):
        return value if value.isprintable() else one_line(value, len(value))
    if isinstance(value, list):
        return [_printable(part) for part in value]
    if isinstance(value, dict):
        return {_printable(key): _printable(part) for key, part in value.items()}
    return value


async def _connect(path: str) -> trio.SocketStream:
    """Waits for a place in the queue, which connect(2) of a Unix socket does not: it fails with EAGAIN, and is neither
    connected nor connecting then, as `trio.open_unix_socket` would take it to be."""
    while True:
        with contextlib.ExitStack() as undo:
            handle = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            handle.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                handle.connect(path)
                undo.pop_all()
                return trio.SocketStream(trio.socket.from_stdlib_socket(handle))
        await trio.sleep(BUSY_POLL_S)
