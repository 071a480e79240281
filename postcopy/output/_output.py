# SPDX-License-Identifier: Apache-2.0
"""Where the words of a command go; see the room's own description."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO, cast

import trio

from postcopy._log import add_migration, json_line, json_record, plain_record
from postcopy.errors import ResourceError
from postcopy.output._view import LIVE_PERIOD_S, Rate, rows, summary
from postcopy.output._writer import Kind, QueuedStream, Writer
from postcopy.records import VERSION, Json, Record, as_json
from postcopy.records.events import OutputDropped

if TYPE_CHECKING:
    # Loaded only where there is a terminal: a daemon's megabytes are counted.
    from rich.console import Console

PERIOD_S = 0.5
PLAIN_PERIOD_S = 2.0


class Output:
    """Where a command's words go. `say`, `log`, `complain` and `emit` may be called from any thread, and never wait."""

    def __init__(self, as_json: bool, stdout: TextIO | None, stderr: TextIO | None, log_json: bool = False) -> None:
        """`log_json`: every line on `stderr` is a JSON object too, and there is no live view."""
        self._as_json = as_json
        self._log_json = log_json
        self._began = time.monotonic()
        self._stdout = Writer(stdout, self._dropped_events)
        self._stderr = Writer(stderr, self._dropped_lines)
        # A command may end when the reader of its results has gone. It goes on when that of its messages has gone: Rich
        # must not see that, since it raises SystemExit then.
        self._streams = (
            QueuedStream(self._stdout, stdout, loss_is_error=True),
            QueuedStream(self._stderr, stderr, loss_is_error=False),
        )
        self._console = None if log_json else _console_on(self._streams[1])
        self._stalled = False  # that stdout is not read has been said
        self._kick = trio.Event()
        self._last_line = ""
        self._last_progress: dict[str, Json] = {}
        self._rate = Rate()
        self.listeners: list[Callable[[str, Json], None]] = []
        """Called with every event, whether or not JSON was asked for; must not block."""

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

    def close(self) -> None:
        """Waits, for a bounded time, until what is queued has been read; says so when results have not been."""
        self._stdout.close()
        if self._as_json and self._stdout.lost and not self._stdout.gone:
            self.complain(
                f"{self._stdout.lost} lines of the result could not be written to the standard output, which nobody"
                " reads, or which has no room"
            )
        self._stderr.close()

    def _dropped_events(self, count: int) -> str:
        self._stalled = False
        if self._as_json:
            return self._event_line("output-dropped", as_json(OutputDropped(lines=count)))
        return f"postcopy: {count} lines are missing here: nobody read them\n"

    def _dropped_lines(self, count: int) -> str:
        text = f"{count} lines are missing here: nobody read them"
        return self._line("warning", text, f"postcopy: warning: {text}", dropped=count) + "\n"

    # ---- words

    def say(self, text: str, kind: Kind = Kind.LASTING) -> None:
        """A line for a person."""
        self._write(self._line("info", text, text), kind)

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
        if self._console is None:
            self._stderr.put(text + "\n", kind)
            return
        stream = self._streams[1]
        stream.as_kind(kind)
        self._console.print(text, markup=False)
        stream.as_kind(Kind.PROGRESS)

    def emit(self, event: str, record: Record) -> None:
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

    async def follow(self, progress: Callable[[], Record]) -> None:
        """Shows progress until cancelled."""
        period_s = PERIOD_S if self._console is None else LIVE_PERIOD_S
        next_event = next_plain = 0.0
        last_status = None
        with self._live_view() as draw:
            while True:
                record, at = progress(), time.monotonic()
                now = as_json(record)
                if self._kick.is_set() or at >= next_event:
                    self._kick = trio.Event()
                    self.emit("progress", record)
                    next_event = at + PERIOD_S
                    status = now.get("status") or now.get("summary")
                    if draw is None and (status != last_status or at >= next_plain):
                        self._plain(now)
                        last_status, next_plain = status, at + PLAIN_PERIOD_S
                if draw is not None and not self._stderr.gone:
                    draw(now)
                with trio.move_on_after(period_s):
                    await self._kick.wait()

    @contextlib.contextmanager
    def _live_view(self) -> Iterator[Callable[[Json], None] | None]:
        """What draws the view; None where there is no terminal."""
        if self._console is None:
            yield None
            return
        from rich.live import Live
        from rich.table import Table

        def draw(now: Json) -> None:
            grid = Table.grid(padding=(0, 2))
            for name, value in rows(now, self._rate):
                grid.add_row(f"[bold]{name}[/bold]", value)
            live.update(grid, refresh=True)

        # Drawn from this thread (no auto_refresh): Rich's own would look at an engine that is being closed.
        self._streams[1].as_kind(Kind.PROGRESS)
        with Live(
            console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        ) as live:
            yield draw

    def _plain(self, now: Json) -> None:
        if now.get("status") == "setup":
            return  # nothing to tell yet
        line = summary(now, self._rate)
        if line != self._last_line:
            self._last_line = line
            self.say(line, Kind.PROGRESS)


def _console_on(stream: QueuedStream) -> Console | None:
    """A console where there is a terminal."""
    if not stream.isatty():
        return None
    from rich.console import Console

    return Console(file=cast(TextIO, stream), highlight=False, soft_wrap=True)


class LogHandler(logging.Handler):
    """Log lines through the console, so that they do not tear the live view."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output
        self.addFilter(add_migration)

    def emit(self, record: logging.LogRecord) -> None:
        self._output.log(record)


def make_output(as_json: bool, log_json: bool = False) -> Output:
    return Output(as_json, sys.stdout, sys.stderr, log_json)
