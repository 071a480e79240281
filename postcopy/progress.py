# SPDX-License-Identifier: Apache-2.0
"""What a command shows while it works: JSON lines on stdout, and for people, on stderr, a live view or plain lines.

Output is never a reason to lose a machine: when nobody reads it any more (a closed pipe), it is given up silently.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

import trio

from postcopy._logs import add_migration, json_line, json_record
from postcopy.memory import format_size

if TYPE_CHECKING:
    # Loaded only where there is a terminal: a daemon's megabytes are counted.
    from rich.console import Console
    from rich.table import Table

Json = dict[str, Any]
PERIOD_S = 0.5
LIVE_PERIOD_S = 0.1
PLAIN_PERIOD_S = 2.0


class Output:
    """Where a command's words go. `statuses` is asked whenever there is something to show."""

    def __init__(self, as_json: bool, stdout: TextIO, stderr: TextIO, log_json: bool = False) -> None:
        """`log_json`: every line on `stderr` is a JSON object too, and there is no live view."""
        self._as_json = as_json
        self._log_json = log_json
        self._stdout: TextIO | None = stdout
        self._stderr: TextIO | None = stderr
        self._console = None if log_json else _console_on(stderr)
        self._began = time.monotonic()
        self._kick = trio.Event()
        self._last_line = ""
        self._rate = _Rate()
        self.listeners: list[Callable[[str, Json], None]] = []
        """Called with every event, whether or not JSON was asked for; must not block."""

    def say(self, text: str) -> None:
        """A line for a person."""
        self._write(json_line("info", "postcopy", text, time.time()) if self._log_json else text)

    def log(self, record: logging.LogRecord) -> None:
        """A log record that went through `add_migration`."""
        if self._log_json:
            self._write(json_record(record))
            return
        name = getattr(record, "machine", "")
        self._write(f"postcopy: {record.levelname.lower()}: {name and name + ': '}{record.getMessage()}")

    def _write(self, text: str) -> None:
        if self._stderr is None:
            return
        try:
            if self._console is not None:
                self._console.print(text, markup=False)
            else:
                self._stderr.write(text + "\n")
                self._stderr.flush()
        except (OSError, ValueError):
            self._stderr = None

    def emit(self, event: str, fields: Json) -> None:
        """A JSON line, where they were asked for."""
        for listener in self.listeners:
            listener(event, fields)
        if not self._as_json or self._stdout is None:
            return
        elapsed_ms = round((time.monotonic() - self._began) * 1000, 1)
        try:
            self._stdout.write(json.dumps({"event": event, "elapsed-ms": elapsed_ms, **fields}) + "\n")
            self._stdout.flush()
        except (OSError, ValueError):
            self._stdout = None

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
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell, status, lambda now: None)
                while True:
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
            self.say(line)

    def _table(self, now: Json) -> Table:
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        for name, value in rows(now, self._rate):
            grid.add_row(f"[bold]{name}[/bold]", value)
        return grid


def _console_on(stream: TextIO) -> Console | None:
    """A console where there is a terminal."""
    if not stream.isatty():
        return None
    from rich.console import Console

    return Console(file=stream, highlight=False, soft_wrap=True)


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
