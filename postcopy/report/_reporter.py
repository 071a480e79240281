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
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import trio

from postcopy._child import python
from postcopy._files import absolute, check_new_file
from postcopy.errors import ConfigurationError
from postcopy.output import Output
from postcopy.records import Json

MOST_MIGRATIONS = 16
RENDER_S = 60.0
_NICENESS = 10
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
        self._drawn = False  # what is known is in the file
        output.listeners.append(self.take)

    def take(self, event: str, fields: Json) -> None:
        """An event of this process, or of another one. `fields` may be written to afterwards."""
        if event == "run":
            self._run = _line(event, fields)
        elif event in _KEPT:
            about = fields.get("migration-id") or fields.get("vm") or ""
            key = (str(about), str(fields.get("side")))
            of_one = self._lines.pop(key, {})
            self._lines[key] = of_one
            of_one[event] = _line(event, fields)
            migrations = list(dict.fromkeys(about for about, _ in self._lines))
            for old in migrations[:-MOST_MIGRATIONS]:
                self._lines = {key: lines for key, lines in self._lines.items() if key[0] != old}
            self._drawn = False
            if event in _ENDS:
                self._due.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Draws when a migration has ended, and what is left at the end. `ConfigurationError` before anything else
        where that could not be: no library, no file that could be written."""
        if reason := explain_missing():
            raise ConfigurationError(f"--report {self._path}: {reason}")
        check_new_file("--report", self._path)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._work)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()
                if not self._drawn and self._lines:
                    with trio.CancelScope(shield=True):
                        await self._draw()

    async def _work(self) -> None:
        while True:
            await self._due.wait()
            self._due = trio.Event()
            await self._draw()

    async def _draw(self) -> None:
        self._drawn = True
        data = self._run + b"".join(line for lines in self._lines.values() for line in lines.values())
        command = python("-m", "postcopy", "report", "-", "--output", self._path)
        reason = f"not done after {RENDER_S:g} s"
        process: trio.Process | None = None
        with trio.move_on_after(RENDER_S):
            try:
                async with trio.open_nursery() as nursery:
                    process = await nursery.start(
                        partial(trio.run_process, command, stdin=data, capture_stdout=True, capture_stderr=True, check=False)
                    )
                    with contextlib.suppress(OSError):
                        os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
            except OSError as error:
                reason = str(error.strerror)
            else:
                reason = ""
        if process is not None and process.returncode == 0 and not reason:
            self._output.say(f"postcopy: report: {self._path}")
            return
        del process
        log.warning("--report %s: not drawn: %s", self._path, reason)


def _line(event: str, fields: Json) -> bytes:
    return json.dumps({"event": event, **fields}).encode() + b"\n"
