# SPDX-License-Identifier: Apache-2.0
"""Tables for a person, of whatever command. Loads Rich: import it only where there is a table to write."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import IO

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 160  # of what goes to a file: what is broken into lines can neither be searched for nor copied
GAP = 2
_NOTHING = frozenset({"", "-", "n/a"})


def make_console(stream: IO[str], *, soft_wrap: bool = False) -> Console:
    """Colours where `stream` is a terminal that has them (TERM) and the user wants them (NO_COLOR); lines of its width,
    or of COLUMNS."""
    wide = None if stream.isatty() or os.environ.get("COLUMNS", "").isdigit() else PLAIN_WIDTH
    return Console(file=stream, highlight=False, width=wide, soft_wrap=soft_wrap)


class Columns:
    """Rows of cells in Rich's markup, under a header where there is one, which fit the console.

    A column that no row has anything for (`n/a`) is left out. Lines are broken between words, in the columns that have
    most to say; inside of a word only where there is no other way.
    """

    def __init__(self, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> None:
        cells = [[Text.from_markup(cell) for cell in row] for row in rows]
        count = max(map(len, cells), default=0)
        kept = [
            number
            for number in range(count)
            if any(row[number].plain.strip() not in _NOTHING for row in cells if number < len(row))
        ]
        self._rows = [[row[number] for number in kept if number < len(row)] for row in cells]
        self._header = [Text.from_markup(header[number], style="dim") for number in kept] if header else []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [*self._rows, *([self._header] if self._header else [])]
        count = max(map(len, lines), default=0)
        columns = [[row[number].plain for row in lines if number < len(row)] for number in range(count)]
        longest = [max(_widest(text.splitlines()) for text in texts) for texts in columns]
        words = [max(_widest(text.split()) for text in texts) for texts in columns]
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_header=bool(self._header))
        for number, width in enumerate(fit(words, longest, options.max_width - GAP * (len(columns) - 1))):
            table.add_column(self._header[number] if self._header else "", width=width, overflow="fold")
        for row in self._rows:
            table.add_row(*row)
        yield table


def fit(least: Sequence[int], most: Sequence[int], available: int) -> list[int]:
    """Widths between `least` and `most`, all of them together not above `available`; less than `least` only where that
    is not possible otherwise, for the widest first."""
    widths = list(least)
    while sum(widths) > available and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    while (rest := available - sum(widths)) > 0 and (
        wanting := [n for n, width in enumerate(widths) if width < most[n]]
    ):
        for number in wanting[:rest]:
            widths[number] += 1
    return widths


def _widest(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)
