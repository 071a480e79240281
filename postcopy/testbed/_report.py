# SPDX-License-Identifier: Apache-2.0
"""How a command of this room writes its report: tables for a terminal, for Markdown and for one HTML page, and JSON.

A report is titled tables (`Section`) of styled words (`Span`); the three forms are three ways of writing these.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from typing import IO

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from postcopy.errors import PostcopyError

_STYLES = {"good": "green", "muted": "dim", "warn": "yellow", "bad": "bold red"}
EMPTY = ("", "-", "n/a")
"""What a cell has that says nothing."""
GAP = 2  # between two columns
PROSE_WIDTH = 24  # a column of sentences is readable from here on
PLAIN_WIDTH = 160  # of what goes to a file: what is broken into lines can neither be searched for nor copied


@dataclass(frozen=True)
class Span:
    """Words and how they are meant: good, plain, muted, warn or bad."""

    text: str
    kind: str = "plain"


Words = str | Span | Sequence[Span]
"""What a table's cell is written from."""
Row = tuple[tuple[Span, ...], ...]


def row(*cells: Words) -> Row:
    return tuple(
        (Span(cell),) if isinstance(cell, str) else (cell,) if isinstance(cell, Span) else tuple(cell) for cell in cells
    )


@dataclass(frozen=True)
class Section:
    """A table under a title. Each cell is a few spans, written after each other."""

    title: str
    header: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    hints: tuple[str, ...] = ()
    """For each row, what a reader with a mouse may want beside."""


# ---- to standard output


def emit(write: Callable[[], object]) -> None:
    """Calls what prints, and flushes. `PostcopyError` when it cannot be written, as on a full disk; when nobody reads
    it, the exit status says it too."""
    if sys.stdout is None:  # it was closed when this process began
        return
    try:
        write()
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise PostcopyError(f"standard output: {error.strerror}") from error


def emit_json(answer: object) -> None:
    emit(lambda: print(json.dumps(answer)))


# ---- text


def make_console(file: IO[str]) -> Console:
    """Colours where `file` is a terminal."""
    own_width = file.isatty() or "COLUMNS" in os.environ
    return Console(file=file, highlight=False, width=None if own_width else PLAIN_WIDTH)


def markup(words: Words) -> str:
    """In Rich's markup."""
    return "".join(
        f"[{_STYLES[span.kind]}]{escape(span.text)}[/{_STYLES[span.kind]}]"
        if span.kind in _STYLES and span.text
        else escape(span.text)
        for span in row(words)[0]
    )


def print_line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False)


def print_section(console: Console, section: Section) -> None:
    if section.title:
        print_line(console, section.title, "bold")
    if section.note:
        print_line(console, section.note, "dim")
    print_table(console, section.header, section.rows)


def print_table(console: Console, header: Sequence[str], rows: Sequence[Row]) -> None:
    """As wide as the console. Lines are broken between words; where there is no room for the longest word of every
    column, the table is written in parts, each with its first column. An empty `header`: none is shown."""
    shown = bool(header)
    header, rows = informative(header or [""] * max(map(len, rows), default=0), rows)
    columns = [_Column.of(name, [cells[number] for cells in rows]) for number, name in enumerate(header)]
    for part in _parts(columns, console.width):
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim", show_header=shown)
        widths = _widths([columns[number] for number in part], console.width)
        for number, width in zip(part, widths, strict=True):
            table.add_column(escape(header[number]), overflow="fold", width=width)
        for cells in rows:
            table.add_row(*(markup(cells[number]) for number in part))
        console.print(table)


def informative(header: Sequence[str], rows: Sequence[Row]) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    """Without the columns that say nothing in any row. The first one stays: it says what a row is about."""
    if not rows:
        return tuple(header), tuple(rows)
    kept = [
        number
        for number in range(len(header))
        if number == 0 or any(_text(cells[number]) not in EMPTY for cells in rows)
    ]
    return tuple(header[number] for number in kept), tuple(tuple(cells[number] for number in kept) for cells in rows)


def _text(cell: Sequence[Span]) -> str:
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
        texts = [_text(cell) for cell in cells]
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


# ---- Markdown


def section_as_markdown(section: Section) -> list[str]:
    """Its lines."""
    lines = [f"**{section.title}**", ""]
    if section.note:
        lines += [section.note, ""]
    header, rows = informative(section.header, section.rows)
    lines.append("| " + " | ".join(plain(name) for name in header) + " |")
    lines.append("|" + "---|" * len(header))
    for cells in rows:
        lines.append("| " + " | ".join(plain(_text(cell)) for cell in cells) + " |")
    return [*lines, ""]


def plain(text: str) -> str:
    """On one line of Markdown, as it is."""
    # An underscore within a word is one; at its edge it would begin emphasis.
    return " ".join(re.sub(r"[\\|*`<\[]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text).split())


# ---- HTML

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 14px/1.45 system-ui, sans-serif; max-width: 110rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 1.8rem 0 .3rem; }
table { border-collapse: collapse; width: 100%; } .wide { overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; opacity: .7; } td:first-child { font-family: ui-monospace, monospace; white-space: nowrap; }
p.note, p.legend, .muted { opacity: .65; }
.good { color: light-dark(#176f2c, #56d364); } .warn { color: light-dark(#8a5a00, #e3b341); }
.bad { color: light-dark(#b3141d, #ff7b72); font-weight: 600; }
""".strip()


def to_html(title: str, lead: Iterable[tuple[str, str]], sections: Iterable[Section], legend: str) -> str:
    """One page that needs nothing else: no script, no font, no file beside it. `lead`: paragraphs, each its class and
    its text."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape_html(title)}</title>",
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{escape_html(title)}</h1>",
            *(f'<p class="{kind}">{escape_html(text)}</p>' for kind, text in lead),
            *(_section_as_html(section) for section in sections),
            f'<p class="legend">{escape_html(legend)}</p>',
            "</body></html>",
            "",
        ]
    )


def _section_as_html(section: Section) -> str:
    note = f'<p class="note">{escape_html(section.note)}</p>' if section.note else ""
    header, kept = informative(section.header, section.rows)
    head = "".join(f"<th>{escape_html(name)}</th>" for name in header)
    rows = []
    for number, cells in enumerate(kept):
        words = (
            "".join(f'<span class="{span.kind}">{escape_html(span.text)}</span>' for span in cell) for cell in cells
        )
        hint = section.hints[number] if number < len(section.hints) else ""
        start = f'<tr title="{escape_html(hint)}">' if hint else "<tr>"
        rows.append(start + "".join(f"<td>{cell}</td>" for cell in words) + "</tr>")
    return (
        f'<h2>{escape_html(section.title)}</h2>{note}<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )
