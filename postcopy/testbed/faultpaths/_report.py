# SPDX-License-Identifier: Apache-2.0
"""A run as JSON, as tables for a person, as Markdown and as HTML. docs/faultpaths.md says what the fields mean."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import IO, Any

import msgspec

from postcopy.errors import ConfigurationError
from postcopy.testbed import _report as report
from postcopy.testbed.faultpaths._model import Cell, Json, Judged, Operation, Result, Run, Verdict
from postcopy.testbed.faultpaths._sections import LEGEND, columns, sections, summary

SCHEMA = 2
"""Not that of `postcopy.records`: reports are kept, and stay readable when a line of `--json` changes."""


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
        "operations": msgspec.to_builtins(run.operations),
        "cells": [_cell_json(item) for item in run.judged],
        "left-out": msgspec.to_builtins(run.left_out),
    }
    if run.remote is not None:
        answer["remote"] = run.remote
    return answer


def _cell_json(item: Judged) -> Json:
    return {
        **msgspec.to_builtins(item.cell),
        **msgspec.to_builtins(item.result),
        "verdict": item.verdict.value,
        "expected": item.expected or None,
        "reason": item.reason or None,
        "difference": item.difference or None,
        "uncovered": item.uncovered,
    }


def from_json(value: Any) -> Run:
    """What `to_json` made. `ConfigurationError` when it is something else."""
    if not isinstance(value, dict):
        raise ConfigurationError(f"{_kind_of(value)}: {NOT_OURS}")
    try:
        if value["schema"] != SCHEMA:
            raise ConfigurationError(f"a report of schema {value['schema']!r}, and this version reads {SCHEMA}")
        return Run(
            value["system"],
            msgspec.convert(value["operations"], tuple[Operation, ...]),
            tuple(_judged(item) for item in value["cells"]),
            float(value["seconds"]),
            msgspec.convert(value["left-out"], tuple[Cell, ...]),
            value["expectations"],
            value.get("remote"),
        )
    except (KeyError, TypeError, ValueError, AttributeError, msgspec.ValidationError) as error:
        what = f"without {error}" if isinstance(error, KeyError) else f"in which {error}"
        raise ConfigurationError(f"{_kind_of(value)}, {what}: {NOT_OURS}") from None


NOT_OURS = "not a report that `postcopy faultpaths --json` has written"


def _kind_of(value: object) -> str:
    """What a JSON file has in it."""
    if not isinstance(value, dict):
        return "a JSON " + {list: "array", str: "string", type(None): "null"}.get(type(value), "number")
    return f"a JSON object with {', '.join(map(repr, [*value][:4]))}" if value else "an empty JSON object"


def _judged(item: Json) -> Judged:
    return Judged(
        msgspec.convert(item, Cell),
        msgspec.convert(item, Result),
        Verdict(item["verdict"]),
        item["expected"] or "",
        item["reason"] or "",
        item["difference"] or "",
        bool(item["uncovered"]),
    )


def read_report(path: str) -> Run:
    """A file that `--json` wrote: a line `run`, which older ones lack, and the report. `ConfigurationError` with its
    name when it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        value, end = json.JSONDecoder().raw_decode(text.lstrip())
        rest = text.lstrip()[end:]
        return from_json(
            json.loads(rest) if isinstance(value, dict) and value.get("event") == "run" else json.loads(text)
        )
    except OSError as error:
        raise ConfigurationError(f"cannot read {path!r}: {error.strerror}") from None
    except ValueError as error:
        what = "is not JSON"
        if os.path.getsize(path) == 0:
            what = "is empty"
        elif isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            what = "has several JSON values, one behind the other"
        raise ConfigurationError(f"{path!r} {what}: {NOT_OURS}") from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{path!r} is {error}") from None


def describe_system(system: Json) -> str:
    """One line, also of a kernel that is only known from a report."""
    parts = [f"Linux {system.get('kernel', '?')}", str(system.get("architecture", ""))]
    if (kvm := system.get("kvm")) is not None:
        parts.append(f"KVM {kvm}" if kvm != "none" else "no KVM")
    if file_system := system.get("direct-file-system"):
        parts.append(f"O_DIRECT on {file_system} ({system.get('direct-dir', '?')})")
    return ", ".join(filter(None, parts))


def print_text(run: Run, file: IO[str]) -> None:
    console = report.make_console(file)
    report.print_line(console, describe_system(run.system))
    report.print_line(console, columns(run), "dim")
    for section in sections(run):
        console.print()
        report.print_section(console, section)
    console.print()
    report.print_line(console, LEGEND, "dim")
    report.print_line(console, summary(run), "bold" if run.good else "bold red")


def to_markdown(run: Run) -> str:
    lines = [f"{describe_system(run.system)}: {summary(run)}.", "", f"{report.plain(columns(run))}.".capitalize(), ""]
    for section in sections(run):
        lines += report.section_as_markdown(section)
    return "\n".join([*lines, report.plain(LEGEND) + ".", ""])


def to_html(run: Run) -> str:
    return report.to_html(
        f"Which kernel paths block on a missing page: {describe_system(run.system)}",
        [("good" if run.good else "bad", summary(run)), ("note", columns(run))],
        sections(run),
        f"{LEGEND}.",
    )
