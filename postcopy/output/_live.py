# SPDX-License-Identifier: Apache-2.0
"""The part of a terminal in which the live view is drawn, and what a person does there: resize it, stop the program,
press a key.

**Below the lines.** The cursor rests at the beginning of the view, in an empty row above it, and is never hidden. A
terminal that is resized moves its rows and breaks them anew, and takes the cursor with them: wherever that is then, the
view begins there, and what is below is drawn over. So nothing has to be known of how the terminal resizes; no line that
was written is touched; and whatever ends this process, the terminal is as it was.

**The whole terminal** (`whole`), with keys: on its alternate screen. That, the cursor and the keyboard are given back
at the end, and while the process is stopped (Ctrl-Z).

Nothing is drawn while the process is in the background. No handler for SIGWINCH is needed: the size is asked for at
each drawing.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import termios
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TextIO

import trio
from rich.console import COLOR_SYSTEMS
from rich.style import Style

from postcopy.output._frame import Glyphs
from postcopy.output._writer import Picture, Writer
from postcopy.output.tables import STYLES, Row, make_console

GIVE_BACK_S = 0.5
_SIZE = (80, 24)  # of a terminal that does not say
_MOST_COLUMNS, _MOST_ROWS = 500, 200
_LEAVE_WHOLE = "\x1b[?25h\x1b[?1049l"
_KEYS = {
    "A": "up", "B": "down", "H": "home", "F": "end", "1~": "home", "7~": "home", "4~": "end", "8~": "end",
    "5~": "page up", "6~": "page down",
}  # fmt: skip
_KEY = re.compile(r"\x1b[\[O](?P<code>[0-9;]*[A-Za-z~])|(?P<char>[^\x1b])", re.DOTALL)


class Paint:
    """Styled words in the control sequences of a terminal."""

    def __init__(self, stream: TextIO) -> None:
        console = make_console(stream)
        system = COLOR_SYSTEMS[console.color_system] if console.color_system is not None else None
        self._around: dict[str, list[str]] = {}
        for kind, words in STYLES.items():
            style = Style.parse(words)
            if console.no_color:  # the user's NO_COLOR: bold and dim are left
                style = style.without_color
            self._around[kind] = style.render("\0", color_system=system).split("\0")

    def __call__(self, cells: Row) -> str:
        return "".join(
            span.text.join(self._around.get(span.kind, ("", ""))) for cell in cells for span in cell if span.text
        )


class Live:
    """Drawn from one task; `open_live` gives one."""

    def __init__(self, writer: Writer, stream: TextIO, *, whole: bool, keyboard_fd: int | None, job: int) -> None:
        self.glyphs = Glyphs.of(writer.encoding)
        self._writer = writer
        self._fd = stream.fileno()
        self._paint = Paint(stream)
        self._whole = whole
        self._keyboard_fd = keyboard_fd
        self._job = job
        self._typed = ""
        self._stopping = False  # by Ctrl-Z, or has stopped
        self._mode: list[object] | None = None  # of the keyboard, before it was changed here

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows that a view may have. Of the columns one is left free, in which some terminals begin the
        next row."""
        try:
            columns, rows = os.get_terminal_size(self._fd)
        except OSError:
            columns, rows = 0, 0
        columns, rows = columns or _SIZE[0], rows or _SIZE[1]
        columns, rows = min(columns, _MOST_COLUMNS) - 1, min(rows, _MOST_ROWS)
        return columns, rows if self._whole else max(1, rows - 2)  # the empty row, and one that was written

    @property
    def has_keyboard(self) -> bool:
        """Whether keys may come."""
        return self._keyboard_fd is not None

    def draw(self, rows: Sequence[Row]) -> None:
        """What is the same as before is not written again."""
        if self._stopping:
            return
        if not self._in_foreground():
            # Ctrl-Z has stopped the job, and this process is another one: the shell's prompt is where the view began.
            self._writer.give_up(_LEAVE_WHOLE if self._whole else "\x1b[J")
            return
        self._take_keyboard()
        lines = [self._paint(cells) for cells in rows]
        # Without the automatic break of lines: a terminal may have become smaller since its size was asked for.
        if self._whole:
            text = "\x1b[?7l\x1b[H" + "\x1b[K\r\n".join(lines) + "\x1b[J\x1b[?7h"
            enter, leave = "\x1b[?1049h\x1b[?25l", _LEAVE_WHOLE
        else:
            text = "\r\x1b[?7l" + "\x1b[K\r\n".join(["", *lines]) + "\x1b[J" + f"\x1b[{len(lines)}A\r\x1b[?7h"
            enter, leave = "", "\r\x1b[J"
        self._writer.show(Picture(text, leave, enter))

    def clear(self) -> None:
        """The terminal is as it was, or will be soon."""
        self._writer.show(None)
        mode, self._mode = self._mode, None
        # (in the background the keyboard is another program's, and SIGTTOU would stop this one)
        if mode is not None and self._in_foreground():
            with contextlib.suppress(termios.error):  # it has hung up
                termios.tcsetattr(self._keyboard_fd or 0, termios.TCSANOW, mode)  # type: ignore[arg-type]

    async def key(self) -> str:
        """The next one that is pressed: its character, or a name, as `up`. Never returns where there is no keyboard."""
        while True:
            if (found := _KEY.search(self._typed)) is not None:
                self._typed = self._typed[found.end() :]
                name = _KEYS.get(found["code"] or "") or found["char"]
                if name:
                    return name
            elif self._keyboard_fd is None:
                await trio.sleep_forever()
            else:
                await trio.lowlevel.wait_readable(self._keyboard_fd)
                if not self._in_foreground():
                    await trio.sleep(GIVE_BACK_S)
                    continue
                try:
                    more = os.read(self._keyboard_fd, 64)
                except OSError:  # it has hung up
                    more = b""
                if not more:
                    self._keyboard_fd = None
                self._typed = self._typed[-16:] + more.decode("ascii", "ignore")

    def _in_foreground(self) -> bool:
        try:
            foreground = os.tcgetpgrp(self._fd)
        except OSError:  # it is not the terminal of this session
            return True
        try:
            return foreground == os.getpgid(self._job)
        except ProcessLookupError:  # the shell's job has ended, and another program may have the terminal
            return False

    def _take_keyboard(self) -> None:
        """Keys come one by one, and are not written to the terminal."""
        if self._keyboard_fd is None or self._mode is not None:
            return
        try:
            self._mode = list(termios.tcgetattr(self._keyboard_fd))
            mode = termios.tcgetattr(self._keyboard_fd)
            mode[3] &= ~(termios.ICANON | termios.ECHO)
            mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
            mode[6][termios.VQUIT] = b"\0"  # Ctrl-\ would end it with the terminal as it is now
            termios.tcsetattr(self._keyboard_fd, termios.TCSANOW, mode)
        except termios.error:
            self._keyboard_fd = self._mode = None

    async def give_back_when_stopped(self, task_status: trio.TaskStatus[None]) -> None:
        """Ctrl-Z: the terminal is another program's until this one goes on. (One that is stopped by SIGSTOP cannot do
        that.) SIGQUIT, which another process sends, ends it as it always does, where all of the terminal is to be given
        back before."""
        wanted = (signal.SIGTSTP, signal.SIGQUIT) if self._whole else (signal.SIGTSTP,)
        numbers = [number for number in wanted if signal.getsignal(number) in (signal.SIG_DFL, None)]
        if threading.current_thread() is not threading.main_thread() or not numbers:
            task_status.started()
            return
        with trio.open_signal_receiver(*numbers) as signals:
            task_status.started()
            async for number in signals:
                self._stopping = True
                self.clear()
                with trio.move_on_after(GIVE_BACK_S):
                    while not self._writer.settled:  # noqa: ASYNC110 -- the writer's thread knows no Trio
                        await trio.sleep(0.01)
                handler = signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(signal.Signals(number))  # and is stopped, until SIGCONT; or ended
                signal.signal(number, handler)
                self._stopping = False


@asynccontextmanager
async def open_live(writer: Writer, stream: TextIO, *, whole: bool = False, job: int = 0) -> AsyncIterator[Live]:
    """`stream`: a terminal that can draw, whose lines go through `writer`. `whole`: takes the whole terminal, and the
    keyboard where standard input is one. `job`: the process that is in the foreground when this one may draw; 0: this
    one."""
    live = Live(writer, stream, whole=whole, keyboard_fd=0 if whole and os.isatty(0) else None, job=job)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(live.give_back_when_stopped)
            yield live
            nursery.cancel_scope.cancel()
    finally:
        live.clear()
