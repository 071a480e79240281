# SPDX-License-Identifier: Apache-2.0
"""``--report FILE.html``: a process keeps what the report of its migrations is made of, and has a child draw it.

The child is ``postcopy report -``. So a process that moves machines never waits for a picture, and loads no library for
one; what a child fails in is a message, and changes nothing of the migration. Kept are the lines of the last
`MOST_MIGRATIONS` migrations, as text.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
from collections.abc import Awaitable, Callable
from functools import partial
from subprocess import CompletedProcess
from typing import Final

import trio

from postcopy._child import python
from postcopy._files import absolute, check_new_file
from postcopy._stop import Stop
from postcopy.errors import ConfigurationError, leaves
from postcopy.output import Output
from postcopy.records import Json
from postcopy.wire import one_line

Run = Callable[[Stop], Awaitable[bool]]
MOST_MIGRATIONS = 16
RENDER_S = 60.0  # for a page, where the processors are busy with other things, ...
RENDER_MORE_S = 15.0  # ... and for each migration on it
_NICENESS = 5
_ENDS: Final = frozenset({"migration-ended", "vm-ended", "result"})
_KEPT: Final = _ENDS | {"timeline"}

log = logging.getLogger(__name__)


def explain_missing() -> str:
    """Why no report can be drawn here; empty where one can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "it needs matplotlib, which is not installed: pip install 'postcopy[report]'"
    return ""


class Reporter:
    """Listens to the events of a command from the time it is made, in the Trio thread. To be made before there are
    any."""

    def __init__(self, path: str, output: Output) -> None:
        self._path = absolute(path)
        self._output = output
        self._run = b""
        self._lines: dict[tuple[str, ...], dict[str, bytes]] = {}  # of a migration, and of its side, by event
        self._due = trio.Event()
        self._known = self._in_file = 0  # how many lines were taken, and how many of them the page was made of
        output.listeners.append(self.take)

    def take(self, event: str, fields: Json) -> None:
        """An event of this process, or of another one. `fields` may be written to afterwards."""
        if event == "run":
            self._run = _line(event, fields)
        elif event in _KEPT:
            about = fields.get("migration-id") or fields.get("vm") or ""
            if not about and (self._lines or fields.get("side") in ("daemon", "pager")):
                return  # the end of a process, which has been in other migrations or in none
            key = (str(about), str(fields.get("side")))
            of_one = self._lines.pop(key, {})
            self._lines[key] = of_one
            of_one[event] = _line(event, fields)
            migrations = list(dict.fromkeys(about for about, _ in self._lines))
            for old in migrations[:-MOST_MIGRATIONS]:
                self._lines = {key: lines for key, lines in self._lines.items() if key[0] != old}
            self._known += 1
            if event in _ENDS:
                self._due.set()

    def around(self, run: Run, *, patient: bool = False) -> Run:
        """A command that runs as `run` does, and draws when a migration has ended, and at its own end.
        `ConfigurationError` before it begins where that could not be: no library, no file that could be written.
        `patient`: that is only said, since something may depend on the command already."""

        async def run_reported(stop: Stop) -> bool:
            try:
                self._check()
            except ConfigurationError as error:
                if not patient:
                    raise
                log.warning("%s", error)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._work)
                    done = await run(stop)
                    nursery.cancel_scope.cancel()
            finally:
                # (when it was asked to end at once this is cancelled, too)
                if self._in_file < self._known:
                    await self._draw_at_the_end(stop)
                if self._in_file:
                    self._output.say(f"postcopy: report: {self._path}")
            return done

        return run_reported

    def _check(self) -> None:
        if reason := explain_missing():
            raise ConfigurationError(f"--report {self._path}: {reason}")
        check_new_file("--report", self._path)

    async def _work(self) -> None:
        while True:
            await self._due.wait()
            self._due = trio.Event()
            await self._draw(_NICENESS)

    async def _draw_at_the_end(self, stop: Stop) -> None:
        """Until it is done, or a signal comes, which ends the drawing only: how the command ends is decided."""
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                await changes.wait()
                log.warning("--report %s was not drawn: ended by %s", self._path, stop.by)
                nursery.cancel_scope.cancel()

            stop.warned()  # else the next signal ends everything from outside
            changes = stop.changes
            nursery.start_soon(give_up)
            await self._draw()
            nursery.cancel_scope.cancel()

    async def _draw(self, niceness: int = 0) -> None:
        """What can be drawn can wait for what is moved: `niceness` of the child, while something may be."""
        known = self._known  # there may be more when it is done
        data = self._run + b"".join(line for lines in self._lines.values() for line in lines.values())
        command = python("-m", "postcopy", "report", "-", "--output", self._path)
        limit_s = RENDER_S + RENDER_MORE_S * len({about for about, _ in self._lines})
        reason = f"not done after {limit_s:g} s"
        try:
            with trio.move_on_after(limit_s):
                reason = await _child(command, data, niceness)
        except* (OSError, RuntimeError, MemoryError) as group:  # no process, descriptor or thread
            error = next(leaves(group))
            reason = getattr(error, "strerror", None) or str(error) or "out of memory"
        if not reason:
            self._in_file = known
        else:
            log.warning("--report %s was not drawn: %s", self._path, one_line(reason, 300))


async def _child(command: list[str], data: bytes, niceness: int) -> str:
    """Why it failed; empty when it did not. In a process group of its own: Ctrl-C is for the command, and what is being
    drawn is drawn."""
    async with trio.open_nursery() as nursery:
        ended = partial(
            trio.run_process, command, stdin=data, capture_stdout=True, capture_stderr=True, check=False,
            process_group=0,
        )  # fmt: skip
        done: list[CompletedProcess[bytes]] = []

        async def run(task_status: trio.TaskStatus[trio.Process]) -> None:
            done.append(await ended(task_status=task_status))

        process = await nursery.start(run)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, os.nice(0) + niceness)
    said = done[0].stderr.decode(errors="replace").strip().rpartition("\n")[2].removeprefix("postcopy: error: ")
    return "" if done[0].returncode == 0 else said or f"the process that draws ended with {done[0].returncode}"


def _line(event: str, fields: Json) -> bytes:
    return json.dumps({"event": event, **fields}).encode() + b"\n"
