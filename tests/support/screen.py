# SPDX-License-Identifier: Apache-2.0
"""A terminal's screen, made of what a program writes to it. Strict: a control sequence that it does not know is an
error, so that a test sees all that may be left behind."""

from __future__ import annotations

import re

from rich.cells import get_character_cell_size

_PART = re.compile(
    r"\x1b\[(?P<private>\??)(?P<number>[0-9;]*)(?P<code>[A-Za-z])|(?P<text>[^\x00-\x1f\x1b\x7f]+)|(?P<control>[\r\n])",
)


class Screen:
    """`feed` it. What scrolls out is in `history`."""

    def __init__(self, columns: int = 80, rows: int = 24) -> None:
        self.columns, self.rows = columns, rows
        self.history: list[str] = []
        self.alternate = False
        self.cursor_shown = True
        self.breaks_lines = True
        self.entered = 0  # how often it was the alternate screen
        self._x = self._y = 0
        self._cells = self._blank()
        self._main: tuple[list[list[str]], int, int] | None = None
        self._rest = ""

    def _blank(self) -> list[list[str]]:
        return [[" "] * self.columns for _ in range(self.rows)]

    @property
    def lines(self) -> list[str]:
        """What is seen now."""
        return ["".join(cells).rstrip() for cells in self._cells]

    @property
    def text(self) -> str:
        """All that was written and not taken away, with what has scrolled out."""
        return "\n".join([*self.history, *self.lines]).rstrip()

    @property
    def cursor(self) -> tuple[int, int]:
        return self._x, self._y

    def feed(self, text: str) -> None:
        text = self._rest + text
        at = 0
        while at < len(text):
            part = _PART.match(text, at)
            if part is None:
                # (a sequence that has not come as a whole yet)
                assert re.fullmatch(r"\x1b(\[\??[0-9;]*)?", text[at:]), repr(text[at : at + 20])
                break
            at = part.end()
            if part["text"] is not None:
                for char in part["text"]:
                    self._put(char)
            elif part["control"] == "\r":
                self._x = 0
            elif part["control"] == "\n":
                self._down()
            else:
                self._obey(part["private"], part["number"], part["code"])
        self._rest = text[at:]

    def _down(self) -> None:
        if self._y < self.rows - 1:
            self._y += 1
            return
        first = self._cells.pop(0)
        if not self.alternate:
            self.history.append("".join(first).rstrip())
        self._cells.append([" "] * self.columns)

    def _put(self, char: str) -> None:
        wide = get_character_cell_size(char)
        if self._x + wide > self.columns:
            if not self.breaks_lines:
                return
            self._x = 0
            self._down()
        if wide:
            self._cells[self._y][self._x : self._x + wide] = [char, *[""] * (wide - 1)]
        self._x += wide

    def _obey(self, private: str, number: str, code: str) -> None:
        if code == "m":
            return
        if code == "A":
            self._y = max(0, self._y - max(1, int(number or 1)))
        elif code == "H" and not number:
            self._x = self._y = 0
        elif code == "K" and not number:
            self._erase_line(self._x)
        elif code == "J" and not number:
            self._erase_line(self._x)
            self._cells[self._y + 1 :] = self._blank()[self._y + 1 :]
        elif private and code in "hl":
            self._switch(int(number), code == "h")
        else:
            raise AssertionError(f"unknown: ESC [ {private}{number} {code}")

    def _erase_line(self, x: int) -> None:
        self._cells[self._y][x:] = [" "] * (self.columns - x)

    def _switch(self, number: int, on: bool) -> None:
        if number == 7:
            self.breaks_lines = on
        elif number == 25:
            self.cursor_shown = on
        elif number == 1049:
            assert on != self.alternate
            self.alternate = on
            if on:
                self.entered += 1
                self._main = self._cells, self._x, self._y
                self._cells = self._blank()
            elif self._main is not None:
                self._cells, self._x, self._y = self._main
        else:
            raise AssertionError(f"unknown: ESC [ ? {number}")

    @property
    def as_it_was(self) -> bool:
        """Whether nothing of it is another than at the beginning, but for what was written."""
        return not self.alternate and self.cursor_shown and self.breaks_lines and not self._rest
