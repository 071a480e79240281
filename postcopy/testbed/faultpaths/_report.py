# SPDX-License-Identifier: Apache-2.0
"""A run as JSON, as tables for a person, as Markdown and as HTML. docs/faultpaths.md says what the fields mean."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import IO, Any

import msgspec

from postcopy.errors import ConfigurationError
from postcopy.testbed import _report as report
from postcopy.testbed.faultpaths._model import Cell, Json, Judged, Operation, Result, Run, Verdict
from postcopy.testbed.faultpaths._sections import LEGEND, columns, sections, summary
from postcopy.wire import one_line

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


def from_json(value: Any, run: Json | None = None) -> Run:
    """What `to_json` made, `run` being the line before it. `ConfigurationError` when it is something else."""
    if not isinstance(value, dict):
        raise ConfigurationError(f"{_kind_of(value)}: {NOT_OURS}")
    try:
        if value["schema"] != SCHEMA:
            raise ConfigurationError(f"a report of schema {_short(value['schema'])}, and this version reads {SCHEMA}")
        return Run(
            msgspec.convert(value["system"], dict[str, str | int | float | bool | None]),
            msgspec.convert(value["operations"], tuple[Operation, ...]),
            tuple(_judged(item) for item in value["cells"]),
            float(value["seconds"]),
            msgspec.convert(value["left-out"], tuple[Cell, ...]),
            value["expectations"],
            value.get("remote"),
            run,
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, msgspec.ValidationError) as error:
        what = f"without {error}" if isinstance(error, KeyError) else f"in which {one_line(str(error), 200)}"
        raise ConfigurationError(f"{_kind_of(value)}, {what}: {NOT_OURS}") from None


NOT_OURS = "not a report that `postcopy faultpaths --json` has written"


def _kind_of(value: object) -> str:
    """What a JSON file has in it."""
    if not isinstance(value, dict):
        return "a JSON " + {list: "array", str: "string", type(None): "null"}.get(type(value), "number")
    return f"a JSON object with {', '.join(map(_short, [*value][:4]))}" if value else "an empty JSON object"


def _short(value: object) -> str:
    return one_line(repr(value), 40)


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
    """A file that `--json` wrote. `ConfigurationError` with its name when it cannot be read."""
    values = json_values(path)
    run = (
        values.pop(0) if isinstance(values[0], dict) and values[0].get("event") == "run" and len(values) == 2 else None
    )
    if len(values) > 1:
        raise ConfigurationError(f"{path!r} has several JSON values, one behind the other: {NOT_OURS}")
    try:
        return from_json(values[0], run)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path!r} is {error}") from None


MAX_FILE_BYTES = 16 << 20
_SPACE = re.compile(r"\s*")


def json_values(path: str) -> list[Any]:
    """Of a file: at least one. `ConfigurationError` with its name when it cannot be read."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"cannot read {path!r}: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigurationError(f"{path!r} has more than {MAX_FILE_BYTES >> 20} MiB: {NOT_OURS}")
    if not content.strip():
        raise ConfigurationError(f"{path!r} is empty: {NOT_OURS}")
    values, at = [], 0
    decoder = json.JSONDecoder()
    try:
        text = content.decode().strip()
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            values.append(value)
            at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
    except (ValueError, RecursionError):
        raise ConfigurationError(f"{path!r} is not JSON: {NOT_OURS}") from None
    return values


def describe_system(system: Json) -> str:
    """One line, also of a kernel that is only known from a report."""
    parts = [f"Linux {system.get('kernel', '?')}", str(system.get("architecture", ""))]
    if (kvm := system.get("kvm")) is not None:
        parts.append(f"KVM {kvm}" if kvm != "none" else "no KVM")
    if file_system := system.get("direct-file-system"):
        parts.append(f"O_DIRECT on {file_system} ({system.get('direct-dir', '?')})")
    return ", ".join(filter(None, parts))


def _about(run: Run) -> list[str]:
    """What a reader must know before the tables."""
    lines = [columns(run)]
    if run.expectations.get("read-from-source"):
        lines.append(
            "what is expected of this kernel was read from the kernel's source: we have no report of its version"
        )
    return lines


def print_text(run: Run, file: IO[str]) -> None:
    console = report.make_console(file)
    report.print_line(console, describe_system(run.system))
    for line in _about(run):
        report.print_line(console, line, "dim")
    for section in sections(run):
        console.print()
        report.print_section(console, section)
    console.print()
    report.print_line(console, LEGEND, "dim")
    report.print_line(console, summary(run), "bold" if run.good else "bold red")


def to_markdown(run: Run) -> str:
    lines = [f"{describe_system(run.system)}: {summary(run)}.", ""]
    for line in _about(run):
        lines += [f"{report.plain(line[0].upper() + line[1:])}.", ""]
    for section in sections(run):
        lines += report.section_as_markdown(section)
    return "\n".join([*lines, report.plain(LEGEND) + ".", ""])


def to_html(run: Run) -> str:
    return report.to_html(
        f"Which kernel paths block on a missing page: {describe_system(run.system)}",
        [("good" if run.good else "bad", summary(run)), *(("note", line) for line in _about(run))],
        sections(run),
        f"{LEGEND}.",
    )
