# SPDX-License-Identifier: Apache-2.0
"""What a command shows while it works: JSON lines on stdout, and for people, on stderr, a live view or plain lines.

Output is never a reason to lose a machine, or to hold one up: every line goes through a queue (`_writer`), and a thread
that waits for the reader in everybody's place. Progress is dropped when nobody reads it; results, endings and errors
are kept for as long as the process lives, and a few seconds of its end.
"""

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
from postcopy._writer import Kind, QueuedStream, Writer
from postcopy.errors import ResourceError
from postcopy.units import format_size

if TYPE_CHECKING:
    # Loaded only where there is a terminal: a daemon's megabytes are counted.
    from rich.console import Console
    from rich.table import Table

Json = dict[str, Any]
PERIOD_S = 0.5
LIVE_PERIOD_S = 0.1
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
        # Who prints results for nobody may end; what is said beside the work is never a reason to end it (Rich, for
        # one, makes SystemExit of a terminal that has gone).
        self._streams = (
            QueuedStream(self._stdout, stdout, loss_is_error=True),
            QueuedStream(self._stderr, stderr, loss_is_error=False),
        )
        self._console = None if log_json else _console_on(self._streams[1])
        self._stalled = False  # that stdout is not read has been said
        self._kick = trio.Event()
        self._last_line = ""
        self._rate = _Rate()
        self.listeners: list[Callable[[str, Json], None]] = []
        """Called with every event, whether or not JSON was asked for; must not block."""

    # ---- its life

    @contextlib.contextmanager
    def standard_streams(self) -> Iterator[None]:
        """Inside the block all that anybody prints in this process goes through the same queues, the interpreter's own
        messages too."""
        before = sys.stdout, sys.stderr
        # (a reader that has gone is nobody's error: what is printed to nobody is dropped, as everything else is)
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
            return self._event_line("output-dropped", {"lines": count})
        return f"postcopy: {count} lines are missing here: nobody read them\n"

    def _dropped_lines(self, count: int) -> str:
        text = f"{count} lines are missing here: nobody read them"
        if self._log_json:
            return json_line("warning", "postcopy", text, time.time(), dropped=count) + "\n"
        return f"postcopy: warning: {text}\n"

    # ---- words

    def say(self, text: str, kind: Kind = Kind.LASTING) -> None:
        """A line for a person."""
        self._write(json_line("info", "postcopy", text, time.time()) if self._log_json else text, kind)

    def complain(self, text: str) -> None:
        """The error that a command ends with."""
        if self._log_json:
            self._write(json_line("error", "postcopy", text, time.time()), Kind.LASTING)
        else:
            self._write(f"postcopy: error: {text}", Kind.LASTING)

    def log(self, record: logging.LogRecord) -> None:
        """A log record that went through `add_migration`."""
        kind = Kind.LASTING if record.levelno >= logging.ERROR else Kind.LOG
        self._write(json_record(record) if self._log_json else plain_record(record), kind)

    def _write(self, text: str, kind: Kind) -> None:
        if self._console is None:
            self._stderr.put(text + "\n", kind)
            return
        stream = self._streams[1]
        stream.as_kind(kind)
        self._console.print(text, markup=False)
        stream.as_kind(Kind.PROGRESS)

    def emit(self, event: str, fields: Json) -> None:
        """A JSON line, where they were asked for."""
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
        return json.dumps({"event": event, "elapsed-ms": elapsed_ms, **fields}) + "\n"

    def kick(self) -> None:
        """Something changed: show it now."""
        self._kick.set()

    async def follow(self, status: Callable[[], Json]) -> None:
        """Shows progress until cancelled."""
        if self._console is None:
            await self._tell(status, self._plain)
            return
        from rich.live import Live

        # Drawn from this thread (no auto_refresh): Rich's own would look at an engine that is being closed.
        self._streams[1].as_kind(Kind.PROGRESS)
        with Live(
            console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        ) as live:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell, status, lambda now: None)
                while not self._stderr.gone:
                    live.update(self._table(status()), refresh=True)
                    await trio.sleep(LIVE_PERIOD_S)

    async def _tell(self, status: Callable[[], Json], show: Callable[[Json], None]) -> None:
        next_plain = 0.0
        last_status = None
        while True:
            now = status()
            self.emit("progress", now)
            if now["status"] != last_status or time.monotonic() >= next_plain:
                show(now)
                next_plain = time.monotonic() + PLAIN_PERIOD_S
                last_status = now["status"]
            with trio.move_on_after(PERIOD_S):
                await self._kick.wait()
            self._kick = trio.Event()

    def _plain(self, now: Json) -> None:
        if now["status"] == "setup":
            return  # nothing to tell yet
        line = summary(now, self._rate)
        if line != self._last_line:
            self._last_line = line
            self.say(line, Kind.PROGRESS)

    def _table(self, now: Json) -> Table:
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        for name, value in rows(now, self._rate):
            grid.add_row(f"[bold]{name}[/bold]", value)
        return grid


def _console_on(stream: QueuedStream) -> Console | None:
    """A console where there is a terminal."""
    if not stream.isatty():
        return None
    from rich.console import Console

    return Console(file=cast(TextIO, stream), highlight=False, soft_wrap=True)


class _Rate:
    """Bytes a second between two looks at a counter."""

    def __init__(self) -> None:
        self._when = time.monotonic()
        self._value = 0
        self._rate = 0.0

    def of(self, value: int) -> float:
        now = time.monotonic()
        if now - self._when >= LIVE_PERIOD_S:
            self._rate = max(0, value - self._value) / (now - self._when)
            self._when, self._value = now, value
        return self._rate


def rows(now: Json, rate: _Rate) -> list[tuple[str, str]]:
    """The live view: one line each."""
    ram = now.get("ram") or {}
    result = [(now["side"], now["status"])]
    if "remaining" in ram and ram["total"]:
        resident = ram["total"] - ram["remaining"]
        share = resident / ram["total"]
        bar = "█" * round(30 * share) + "░" * (30 - round(30 * share))
        result.append(
            ("resident", f"{bar} {100 * share:5.1f} %  {format_size(resident)} of {format_size(ram['total'])}")
        )
    if "transferred" in ram:
        speed = format_size(round(rate.of(ram["transferred"])))
        result.append(("network", f"{format_size(ram['transferred'])}, {speed}/s"))
    if "demand-pages" in ram:
        waiting = f", {now['pending-faults']} waiting" if now.get("pending-faults") else ""
        result.append(("pages", f"{ram['demand-pages']} on demand{waiting}, {ram['background-pages']} in background"))
    guest = now.get("guest") or {}
    if "operations" in guest:
        failures = f", {guest['failures']} FAILURES" if guest["failures"] else ""
        result.append(
            ("machine", f"{guest['state']}, {guest['operations']} operations, {guest['marks']} marks{failures}")
        )
    return result


def summary(now: Json, rate: _Rate) -> str:
    """The plain line: the same in one."""
    (side, status), *rest = rows(now, rate)
    return f"{side}: {status}" + "".join(
        f"; {name}: {text.lstrip('█░ ')}" if name == "resident" else f"; {text}" for name, text in rest
    )


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
