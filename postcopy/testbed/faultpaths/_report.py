# SPDX-License-Identifier: Apache-2.0
"""A run as JSON, as a table for a person, and as Markdown. docs/faultpaths.md says what the fields mean."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import IO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from postcopy.errors import ConfigurationError
from postcopy.testbed.faultpaths._layout import LEGEND, Section, Span, columns, sections, summary
from postcopy.testbed.faultpaths._model import Backing, Cell, Json, Judged, Mode, Operation, Result, Run, Verdict

SCHEMA = 1
_STYLES = {"good": "green", "muted": "dim", "warn": "yellow", "bad": "bold red"}
UNBROKEN_WIDTH = 40  # a column of short words is not broken: the long ones beside it give way
PLAIN_WIDTH = 160  # of what goes to a file: a reason that is broken into lines cannot be searched for


# ---- JSON


def to_json(run: Run) -> Json:
    """One object; `from_json` reads it."""
    counts = Counter(item.verdict for item in run.judged)
    answer: Json = {
        "schema": SCHEMA,
        "system": run.system,
        "expectations": run.expectations,
        "seconds": round(run.seconds, 3),
        "good": run.good,
        "summary": {verdict.value: counts[verdict] for verdict in Verdict},
        "operations": [operation.as_json() for operation in run.operations],
        "cells": [_cell_json(item) for item in run.judged],
        "left-out": [{"operation": c.operation, "mode": c.mode, "backing": c.backing} for c in run.left_out],
    }
    if run.remote is not None:
        answer["remote"] = run.remote
    return answer


def _cell_json(item: Judged) -> Json:
    return {
        "operation": item.cell.operation,
        "mode": item.cell.mode.value,
        "backing": item.cell.backing.value,
        **item.result.as_json(),
        "verdict": item.verdict.value,
        "expected": item.expected or None,
        "reason": item.reason or None,
        "difference": item.difference or None,
        "uncovered": item.uncovered,
    }


def from_json(value: Json) -> Run:
    """What `to_json` made. `ConfigurationError` when it is something else."""
    try:
        if value["schema"] != SCHEMA:
            raise ConfigurationError(f"its schema is {value['schema']!r}, and this version reads {SCHEMA}")
        return Run(
            value["system"],
            tuple(Operation.from_json(item) for item in value["operations"]),
            tuple(
                Judged(
                    _cell(item),
                    Result.from_json(item),
                    Verdict(item["verdict"]),
                    item["expected"] or "",
                    item["reason"] or "",
                    item["difference"] or "",
                    bool(item["uncovered"]),
                )
                for item in value["cells"]
            ),
            float(value["seconds"]),
            tuple(_cell(item) for item in value["left-out"]),
            value["expectations"],
            value.get("remote"),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"not a report of `postcopy faultpaths --json` ({error!r})") from None


def _cell(item: Json) -> Cell:
    return Cell(item["operation"], Mode(item["mode"]), Backing(item["backing"]))


def read_report(path: str) -> Run:
    """A file that `--json` wrote. `ConfigurationError` with its name when it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return from_json(json.load(file))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path!r}: {error.strerror}") from None
    except ValueError:
        raise ConfigurationError(f"{path!r} is not JSON") from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{path!r}: {error}") from None


# ---- text


def describe_system(system: Json) -> str:
    """One line, also of a kernel that is only known from a report."""
    parts = [f"Linux {system.get('kernel', '?')}", str(system.get("architecture", ""))]
    if (kvm := system.get("kvm")) is not None:
        parts.append(f"KVM {kvm}" if kvm != "none" else "no KVM")
    if directory := system.get("direct-file-system"):
        parts.append(f"O_DIRECT on {directory}")
    return ", ".join(filter(None, parts))


def print_text(run: Run, file: IO[str]) -> None:
    """The readable table; colours where `file` is a terminal."""
    console = make_console(file)
    console.print(escape(describe_system(run.system)))
    console.print(escape(columns(run)), style="dim")
    for section in sections(run):
        console.print()
        print_section(console, section)
    console.print()
    console.print(escape(LEGEND), style="dim")
    console.print(escape(summary(run)), style="bold" if run.good else "bold red")


def make_console(file: IO[str]) -> Console:
    return Console(file=file, highlight=False, width=None if file.isatty() else PLAIN_WIDTH)


def print_section(console: Console, section: Section) -> None:
    console.print(escape(section.title), style="bold")
    if section.note:
        console.print(escape(section.note), style="dim")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, name in enumerate(section.header):
        widest = max((sum(len(span.text) for span in row[number]) for row in section.rows), default=0)
        # The first column is a name, to be found again; the others are broken where the console is narrow.
        whole = widest <= UNBROKEN_WIDTH and (number == 0 or console.width // 4 >= UNBROKEN_WIDTH)
        table.add_column(escape(name), overflow="fold", no_wrap=whole)
    for row in section.rows:
        table.add_row(*("".join(_markup(span) for span in cell) for cell in row))
    console.print(table)


def _markup(span: Span) -> str:
    style = _STYLES.get(span.kind)
    return f"[{style}]{escape(span.text)}[/{style}]" if style and span.text else escape(span.text)


# ---- Markdown


def to_markdown(run: Run) -> str:
    """The same tables, for a document."""
    lines = [f"{describe_system(run.system)}: {summary(run)}.", "", f"{_plain(columns(run))}.".capitalize(), ""]
    for section in sections(run):
        lines += [f"**{section.title}**", ""]
        if section.note:
            lines += [section.note, ""]
        lines.append("| " + " | ".join(_plain(name) for name in section.header) + " |")
        lines.append("|" + "---|" * len(section.header))
        for row in section.rows:
            lines.append("| " + " | ".join(_plain("".join(span.text for span in cell)) for cell in row) + " |")
        lines.append("")
    lines.append(_plain(LEGEND) + ".")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    # An underscore within a word is one; at its edge it would begin emphasis.
    return " ".join(re.sub(r"[\\|*`<\[]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text).split())
