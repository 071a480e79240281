# SPDX-License-Identifier: Apache-2.0
"""How a command of this room writes its report: tables for a terminal, for Markdown and for one HTML page, and JSON.

A report is titled tables (`Section`) of styled words (`Span`); the three forms are three ways of writing these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape as escape_html

from rich.console import Console
from rich.markup import escape

from postcopy.output.tables import Columns

_STYLES = {"good": "green", "muted": "dim", "warn": "yellow", "bad": "bold red"}


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


# ---- to standard output (which is an `Output`'s: what it cannot take is its business)


def emit_json(answer: object) -> None:
    print(json.dumps(answer))


# ---- text


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
    print_line(console, section.title, "bold")
    if section.note:
        print_line(console, section.note, "dim")
    console.print(Columns(([*map(markup, cells)] for cells in section.rows), tuple(map(escape, section.header))))


# ---- Markdown


def section_as_markdown(section: Section) -> list[str]:
    """Its lines."""
    lines = [f"**{section.title}**", ""]
    if section.note:
        lines += [section.note, ""]
    lines.append("| " + " | ".join(plain(name) for name in section.header) + " |")
    lines.append("|" + "---|" * len(section.header))
    for cells in section.rows:
        lines.append("| " + " | ".join(plain("".join(span.text for span in cell)) for cell in cells) + " |")
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
    head = "".join(f"<th>{escape_html(name)}</th>" for name in section.header)
    rows = []
    for number, cells in enumerate(section.rows):
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
