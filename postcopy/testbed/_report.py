# SPDX-License-Identifier: Apache-2.0
"""How a command of this room writes its report: tables for a terminal, for Markdown and for one HTML page, and JSON.

A report is titled tables (`Section`) of styled words (`Span`); the three forms are three ways of writing these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape as escape_html

from rich.console import Console

from postcopy.output.tables import (
    Row,
    Span,
    Words,
    informative,
    make_console,
    markup,
    print_line,
    print_table,
    row,
    text_of,
)

__all__ = [
    "Row",
    "Section",
    "Span",
    "Words",
    "emit_json",
    "make_console",
    "markup",
    "plain",
    "print_line",
    "print_section",
    "print_table",
    "row",
    "section_as_markdown",
    "to_html",
]


@dataclass(frozen=True)
class Section:
    """A table under a title. Each cell is a few spans, written after each other."""

    title: str
    header: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""
    hints: tuple[str, ...] = ()
    """For each row, what a reader with a mouse may want beside."""


# ---- text


def emit_json(answer: object) -> None:
    """On standard output, which is the command's `Output`: what cannot be written there is its business."""
    print(json.dumps(answer))


def print_section(console: Console, section: Section) -> None:
    if section.title:
        print_line(console, section.title, "bold")
    if section.note:
        print_line(console, section.note, "dim")
    print_table(console, section.header, section.rows)


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
        lines.append("| " + " | ".join(plain(text_of(cell)) for cell in cells) + " |")
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
