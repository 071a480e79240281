# SPDX-License-Identifier: Apache-2.0
"""Tables of styled words (`Span`) for a terminal, of whatever command. Loads Rich: import it where there is one to
write."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import IO, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

STYLES = {"strong": "bold", "good": "green", "muted": "dim", "warn": "yellow", "bad": "bold red"}
EMPTY = ("", "-", "n/a")
"""What a cell has that says nothing."""
GAP = 2  # between two columns
_MONOCHROME = re.compile(r"vt[0-9]|.*-(m|mono)\Z")  # names of terminals (TERM) that have none, which Rich does not know
PROSE_WIDTH = 24  # a column of sentences is readable from here on
PLAIN_WIDTH = 160  # of what goes to a file: what is broken into lines can neither be searched for nor copied


@dataclass(frozen=True)
class Span:
    """Words and how they are meant: strong, good, plain, muted, warn or bad."""

    text: str
    kind: str = "plain"


Words = str | Span | Sequence[Span]
"""What a table's cell is written from."""
Row = tuple[tuple[Span, ...], ...]


def row(*cells: Words) -> Row:
    return tuple(
        (Span(cell),) if isinstance(cell, str) else (cell,) if isinstance(cell, Span) else tuple(cell) for cell in cells
    )


def make_console(file: IO[str]) -> Console:
    """Colours where `file` is a terminal that has them (TERM) and the user wants them (NO_COLOR)."""
    width = None if file.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    colours: Literal["auto"] | None = None if _MONOCHROME.match(os.environ.get("TERM", "")) else "auto"
    # (no emoji: the address 2001:b::1 has the name of one in it)
    return _Console(file=file, color_system=colours, highlight=False, emoji=False, width=width)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich's own ends the program, from wherever it has got to."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def markup(words: Words) -> str:
    """In Rich's markup."""
    return "".join(
        f"[{STYLES[span.kind]}]{escape(span.text)}[/{STYLES[span.kind]}]"
        if span.kind in STYLES and span.text
        else escape(span.text)
        for span in row(words)[0]
    )


def print_line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False)


def print_table(console: Console, header: Sequence[str], rows: Sequence[Row]) -> None:
    """As wide as the console."""
    for part in table_parts(header, rows, console.width):
        console.print(part)


def table_parts(header: Sequence[str], rows: Sequence[Row], width: int) -> list[Table]:
    """Not wider than `width`. Lines are broken between words; where there is no room for the longest word of every
    column, the table is written in parts, each with its first column. An empty `header`: none is shown."""
    shown = bool(header)
    header, rows = informative(header or [""] * max(map(len, rows), default=0), rows)
    columns = [_Column.of(name, [cells[number] for cells in rows]) for number, name in enumerate(header)]
    tables = []
    for part in _parts(columns, width):
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim", show_header=shown)
        widths = _widths([columns[number] for number in part], width)
        for number, own_width in zip(part, widths, strict=True):
            table.add_column(escape(header[number]), overflow="fold", width=own_width)
        for cells in rows:
            table.add_row(*(markup(cells[number]) for number in part))
        tables.append(table)
    return tables


def informative(header: Sequence[str], rows: Sequence[Row]) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    """Without the columns that say nothing in any row. The first one stays: it says what a row is about."""
    if not rows:
        return tuple(header), tuple(rows)
    kept = [
        number
        for number in range(len(header))
        if number == 0 or any(text_of(cells[number]) not in EMPTY for cells in rows)
    ]
    return tuple(header[number] for number in kept), tuple(tuple(cells[number] for number in kept) for cells in rows)


def text_of(cell: Sequence[Span]) -> str:
    return "".join(span.text for span in cell)


@dataclass(frozen=True)
class _Column:
    """How many characters a column takes."""

    least: int
    """Its longest word."""
    good: int
    """Few of its lines are broken, and those of prose not too often."""
    full: int
    """None is."""

    @classmethod
    def of(cls, name: str, cells: Sequence[Sequence[Span]]) -> _Column:
        texts = [text_of(cell) for cell in cells]
        least = max(map(cell_len, (word for text in (name, *texts) for word in text.split())), default=1)
        lengths = sorted(map(cell_len, texts)) or [0]
        most = lengths[max(0, len(lengths) * 9 // 10 - 1)]
        return cls(least, max(least, min(most, PROSE_WIDTH)), max(least, lengths[-1]))


def _parts(columns: Sequence[_Column], width: int) -> list[list[int]]:
    """The numbers of the columns that stand beside each other."""
    parts = [[0]] if columns else []
    for number in range(1, len(columns)):
        if _together(columns[n].good for n in (*parts[-1], number)) > width and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(number)
    return parts


def _together(widths: Iterable[int]) -> int:
    return sum(width + GAP for width in widths) - GAP


def _widths(columns: Sequence[_Column], width: int) -> list[int]:
    """Of columns beside each other: what is good for each, and then as much more as there is room for, to those first
    that need the least."""
    good = _together(column.good for column in columns) <= width
    widths = [column.good if good else column.least for column in columns]
    room = width - _together(widths)
    order = sorted(range(len(columns)), key=lambda number: columns[number].full - widths[number])
    for done, number in enumerate(order):
        more = min(columns[number].full - widths[number], room // (len(order) - done))
        if more > 0:
            widths[number] += more
            room -= more
    return widths
