# SPDX-License-Identifier: Apache-2.0
"""A process of the demo, as it is seen from outside: by its JSON lines and its end."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable
from subprocess import PIPE, SubprocessError
from typing import TYPE_CHECKING, Generic, TypeVar

import trio
from msgspec import convert

from postcopy._child import python
from postcopy.errors import ConfigurationError, MigrationError
from postcopy.output import Output
from postcopy.records import Record
from postcopy.records.events import Progress
from postcopy.records.timeline import Timeline
from postcopy.testbed._processes import Child, Json, Lines, Process, parse
from postcopy.wire import one_line

if TYPE_CHECKING:
    from postcopy.testbed.lab._lab import Host

END_S = 15.0  # for a child to end in order
R = TypeVar("R", bound=Record)


class Side(Generic[R]):
    """One side, or the proxy between them: its progress as it comes, its result, its last words."""

    def __init__(self, name: str, result: type[R], arguments: list[str], host: Host | None = None) -> None:
        """`result`: what its last line says."""
        self.name = name
        self._result_type = result
        self.arguments = arguments
        self.host = host  # where it runs, in a laboratory
        self.warns = False  # whether what it warns of is told to the user
        self.listening: str | None = None
        self.progress = Progress(side=name, status="setup", error=None)
        self.result: R | None = None
        self.address_known = trio.Event()
        self.committed = trio.Event()  # behind the point of no return, as far as it has said
        self._done = trio.Event()
        self._news = trio.Event()  # replaced by each line
        self._stderr: deque[str] = deque(maxlen=50)
        self._child: Child | None = None

    async def run(self, output: Output | None) -> None:
        """From its start to its end; cancelled, it is ended. `output` tells how far it is."""
        command = python("-m", "postcopy", *self.arguments)
        if self.host is not None:
            command = self.host.command(*command)
        try:
            child = self._child = await Child.start(command, ask=signal.SIGTERM, end_s=END_S, stdin=None, stderr=PIPE)
        except (OSError, SubprocessError) as error:
            raise MigrationError(f"cannot start {self.name}: {error}") from error
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_errors, child.process, output)
                async for line in child.stdout:
                    self._take(parse(line), output)
            await child.process.wait()
        finally:
            await child.end()
            for event in (self.address_known, self.committed, self._done, self._news):
                event.set()

    async def end(self) -> None:
        """Asks it to end, in order, and waits for it."""
        if self._child is not None:
            self._child.signal(signal.SIGTERM)
        await self._done.wait()

    async def good_end(self) -> R:
        """Waits for its end, and its result; `MigrationError` without one, `ConfigurationError` when it was asked for
        wrongly."""
        await self._done.wait()
        assert self._child is not None
        if self._child.process.returncode or self.result is None:
            asked_wrongly = self._child.process.returncode == 2
            raise (ConfigurationError if asked_wrongly else MigrationError)(f"{self.name}: {self.last_error}")
        return self.result

    async def until(self, what: str, found: Callable[[Progress], bool]) -> None:
        """Waits for a progress of which `found` is true; `MigrationError` when its end comes first."""
        if not await self.comes_to(found):
            await self.good_end()  # what it has died of says more
            raise MigrationError(f"{self.name} was at its end before {what}")

    async def comes_to(self, found: Callable[[Progress], bool]) -> bool:
        """Waits for a progress of which `found` is true; False when its end comes first. One waiter."""
        while not found(self.progress):
            if self._done.is_set():
                return False
            self._news = trio.Event()
            await self._news.wait()
        return True

    def _take(self, message: Json, output: Output | None) -> None:
        event = message.pop("event", None)
        for key in ("schema", "elapsed-ms"):
            message.pop(key, None)
        if event == "result":
            self.result = convert(message, self._result_type)
        elif event == "listening":
            self.listening = message["address"]
            self.address_known.set()
        elif event == "timeline" and output is not None:
            output.emit("timeline", convert(message, Timeline))
        elif event == "progress":
            self.progress = convert(message, Progress)
            if self.progress.status.startswith("postcopy"):
                self.committed.set()
            if output is not None:
                output.emit("progress", self.progress)
        if output is not None:
            output.kick()
        self._news.set()

    async def _read_errors(self, process: Process, output: Output | None) -> None:
        assert process.stderr is not None
        async for line in Lines(process.stderr):
            self._stderr.append(line)
            if self.warns and output is not None and line.startswith("postcopy: warning: "):
                output.say(f"postcopy: warning: {self.name}: {one_line(line.removeprefix('postcopy: warning: '), 300)}")

    @property
    def last_error(self) -> str:
        for line in reversed(self._stderr):
            if line.startswith("postcopy: error: "):
                return line.removeprefix("postcopy: error: ")
        if self._child is not None and (status := self._child.process.returncode) is not None and status < 0:
            return f"it has died ({signal.Signals(-status).name})"  # its last words are of something else
        said = getattr(self.result, "error", None) or (self._stderr[-1] if self._stderr else "it said nothing")
        return str(said)
