# SPDX-License-Identifier: Apache-2.0
"""Where the words of a command go; see the room's own description."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TextIO, cast

import trio

from postcopy._log import Loggable, add_migration, json_line, json_record, plain_record
from postcopy.errors import ResourceError
from postcopy.output._view import View
from postcopy.output._writer import Kind, QueuedStream, Writer
from postcopy.records import VERSION, Json, Record, as_json

if TYPE_CHECKING:
    from postcopy.output._frame import Frames
    from postcopy.output._live import Live

PERIOD_S = 0.5
LIVE_PERIOD_S = 0.25
LEAST_PERIOD_S = 0.1  # however much happens
MOST_PERIOD_S = 2.0
SMALL_COST_S = 0.005
"""Processor time in a row of what is told as soon as it changes; beyond that telling takes a tenth of the time."""
PLAIN_PERIOD_S = 2.0

log = logging.getLogger(__name__)


class Output:
    """Where a command's words go. `say`, `log`, `complain` and `emit` may be called from any thread, and never wait."""

    def __init__(self, as_json: bool, stdout: TextIO | None, stderr: TextIO | None, log_json: bool = False) -> None:
        """`as_json`, `log_json`: see `configure`."""
        self.configure(as_json, log_json)
        self._began = time.monotonic()
        self._stderr = Writer(stderr, self._dropped_lines)
        # On one terminal one thread writes both, in order, and takes the live view away for each line.
        one = _same_terminal(stdout, stderr)
        self._stdout = self._stderr if one else Writer(stdout, self._dropped_events)
        # A command may end when the reader of its results has gone. It goes on when that of its messages has gone: Rich
        # must not see that, since it raises SystemExit then.
        self._streams = (
            QueuedStream(self._stdout, stdout, loss_is_error=True),
            QueuedStream(self._stderr, stderr, loss_is_error=False),
        )
        self._stalled = False  # that stdout is not read has been said
        self._kick = trio.Event()
        self._last_progress: dict[str, Json] = {}
        self.view = View()
        self.reports = False
        """Whether somebody makes a report of what is emitted (`--report`)."""
        self.patient = True
        """Whether `close` waits for the reader of what was printed: it is the answer of a command. To be set to False
        where a command prints until it is interrupted."""
        self.job = 0
        """The process that is the job of a shell, where this one is part of one: the live view is drawn while that is
        in the foreground. 0: this one."""
        self.listeners: list[Callable[[str, Json], None]] = []
        """Called with every event, whether or not JSON was asked for; must not block."""

    def configure(self, as_json: bool, log_json: bool) -> None:
        """`as_json`: events are JSON lines on stdout. `log_json`: every line on stderr is a JSON object too, and there
        is no live view."""
        self._as_json = as_json
        self._log_json = log_json

    @property
    def records(self) -> bool:
        """Whether what happens over time is to be recorded (`timeline`): where it is read."""
        return self._as_json or self.reports

    @property
    def draws(self) -> bool:
        """Whether there is a terminal for a live view."""
        terminal = self._streams[1].isatty() and not self._stderr.gone
        return terminal and not self._log_json and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")

    # ---- its life

    @contextlib.contextmanager
    def standard_streams(self) -> Iterator[None]:
        """Inside the block all that is printed in this process goes through the same queues, the interpreter's own
        messages too."""
        before = sys.stdout, sys.stderr
        # (what is printed for a reader that has gone is dropped, as everything else is)
        sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in self._streams)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before

    def start(self) -> None:
        """Begins to write what has been queued since it was made, with two threads. `ResourceError` without them."""
        try:
            self._stdout.start()
            self._stderr.start()
        except RuntimeError as error:
            raise ResourceError(
                f"no thread for the output: {error}", "allow this user, or its control group, more processes"
            ) from error

    @property
    def stdout_failed(self) -> bool:
        """Whether what was written there last could not be, as on a full disk."""
        return self._stdout.error is not None and not self._stdout.gone

    @property
    def has_answered(self) -> bool:
        """Whether there is an answer on stdout, for which `close` waits."""
        return self.patient and self._streams[0].used

    def close(self) -> bool:
        """Waits until what is queued has been read: events and messages for a bounded time, an answer as long as its
        reader takes. Says so when a result or a part of the answer was lost; False for the answer only."""
        self._stderr.show(None)
        if self.has_answered:
            self._stdout.close(math.inf, math.inf)
        else:
            self._stdout.close()
        complete = self._stdout.gone or not self._stdout.lost
        if not complete:
            error = self._stdout.error
            why = error.strerror if error is not None else "nobody reads it"
            self.complain(f"standard output: {why}: the result is not complete there")
        self._stderr.close()
        return complete or not self.has_answered

    def _read_again(self) -> None:
        """Lines were dropped, and there is a reader again."""
        self._stalled = False
        self._last_progress = {}  # the last one may be among them: it is due again, even if nothing has changed

    def _dropped_events(self, count: int) -> str:
        self._read_again()
        if self._as_json:
            from postcopy.records.events import OutputDropped  # milliseconds at every start

            return self._event_line("output-dropped", as_json(OutputDropped(lines=count)))
        return f"postcopy: {count} lines are missing here: nobody read them\n"

    def _dropped_lines(self, count: int) -> str:
        self._read_again()
        text = f"{count} lines are missing here: nobody read them"
        return self._line("warning", text, f"postcopy: warning: {text}", dropped=count) + "\n"

    # ---- words

    def say(self, text: str, kind: Kind = Kind.LASTING, *, about: Loggable | None = None) -> None:
        """A line for a person; `about`: the migration that it is about."""
        known = {} if about is None else {"migration_id": about.migration_id, "machine": about.machine_name}
        self._write(self._line("info", text, text, **known), kind)

    def complain(self, text: str) -> None:
        """The error that a command ends with."""
        self._write(self._line("error", text, f"postcopy: error: {text}"), Kind.LASTING)

    def log(self, record: logging.LogRecord) -> None:
        """A log record that went through `add_migration`."""
        kind = Kind.LASTING if record.levelno >= logging.ERROR else Kind.LOG
        self._write(json_record(record) if self._log_json else plain_record(record), kind)

    def _line(self, level: str, text: str, plain: str, **more: Any) -> str:
        return json_line(level, "postcopy", text, time.time(), **more) if self._log_json else plain

    def _write(self, text: str, kind: Kind) -> None:
        self._stderr.put(text + "\n", kind)

    def emit(self, event: str, record: Record | Json) -> None:
        """A JSON line, where they were asked for. Progress that says the same as before is left out."""
        fields = as_json(record)
        if event == "progress":
            side = fields["side"]
            if fields == self._last_progress.get(side):
                return
            self._last_progress[side] = fields
        for listener in self.listeners:
            listener(event, fields)
        if not self._as_json or self._stdout.gone:
            return
        taken = self._stdout.put(
            self._event_line(event, fields), Kind.PROGRESS if event == "progress" else Kind.LASTING
        )
        if not taken and not self._stalled and not self._stdout.gone:
            self._stalled = True
            self.say("postcopy: nobody reads the standard output: progress is dropped until somebody does")

    def _event_line(self, event: str, fields: Json) -> str:
        elapsed_ms = round((time.monotonic() - self._began) * 1000, 1)
        return json.dumps({"schema": VERSION, "event": event, "elapsed-ms": elapsed_ms, **fields}) + "\n"

    def kick(self) -> None:
        """Something changed: show it now."""
        self._kick.set()

    async def follow(self, progress: Callable[[], Record | Json]) -> None:
        """Shows progress until cancelled; and emits it, where it is not what another process has said."""
        if not self.draws:
            await self._follow(progress, None)
        else:
            async with self.open_live() as live:
                await self._follow(progress, live)

    @asynccontextmanager
    async def open_live(self, *, whole: bool = False) -> AsyncIterator[tuple[Live, Frames]]:
        """A live view, where this `draws`: below the lines, or on the whole terminal."""
        # Loaded only where there is a terminal: a daemon's megabytes are counted.
        from postcopy.output._frame import Frames
        from postcopy.output._live import open_live

        async with open_live(self._stderr, cast(TextIO, self._streams[1]), whole=whole, job=self.job) as live:
            yield live, Frames(self.view, live.glyphs)

    async def _follow(self, progress: Callable[[], Record | Json], live: tuple[Live, Frames] | None) -> None:
        next_event = next_plain = paid_s = 0.0  # paid: when a tenth of the time is as much as was used
        last_status = None
        while True:
            at, used_s = time.monotonic(), time.thread_time()
            record = progress()
            now = as_json(record)
            if self._kick.is_set() or at >= next_event:
                self._kick = trio.Event()
                if isinstance(record, Record):
                    self.emit("progress", record)
                next_event = at + PERIOD_S
                if live is None and (now.get("status") != last_status or at >= next_plain):
                    self._plain(now)
                    last_status, next_plain = now.get("status"), at + PLAIN_PERIOD_S
            if live is not None and not self._draw(*live, now):
                live = None
            # A process with a thousand machines looks at them less often: it takes a twentieth of a processor at most.
            cost_s = time.thread_time() - used_s
            if live is not None:
                await trio.sleep(max(LEAST_PERIOD_S, min(20 * cost_s, MOST_PERIOD_S)))
            else:  # of many machines one changes all the time, and all of them are shown then
                paid_s = min(max(paid_s, at) + 10 * cost_s, at + PERIOD_S)
                await trio.sleep(max(0.0, paid_s - 10 * SMALL_COST_S - time.monotonic()))
            with trio.move_on_after(max(PERIOD_S if live is None else LIVE_PERIOD_S - LEAST_PERIOD_S, 20 * cost_s)):
                await self._kick.wait()

    def _draw(self, live: Live, frames: Frames, now: Json) -> bool:
        """False when there is no more use in it. What is shown of a machine must not do it any harm."""
        try:
            if not self._stderr.gone:
                live.draw(frames.below(now, *live.size))
        except Exception:
            live.clear()
            log.exception("the live view has failed: there are lines instead of it from now on")
            return False
        return True

    def _plain(self, now: Json) -> None:
        if line := self.view.line(now):
            self.say(line, Kind.PROGRESS)


def _same_terminal(one: TextIO | None, other: TextIO | None) -> bool:
    if one is None or other is None:
        return False
    try:
        return one.isatty() and other.isatty() and os.path.sameopenfile(one.fileno(), other.fileno())
    except (OSError, ValueError):  # closed, or without a descriptor
        return False


class LogHandler(logging.Handler):
    """Log lines through the queue, so that they do not tear the live view."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output
        self.addFilter(add_migration)

    def emit(self, record: logging.LogRecord) -> None:
        self._output.log(record)


def make_output() -> Output:
    """On the standard streams of this process."""
    return Output(False, sys.stdout, sys.stderr)
