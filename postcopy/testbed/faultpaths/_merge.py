# SPDX-License-Identifier: Apache-2.0
"""What kernels did, report by report, and the matrix over kernels: `postcopy faultpaths merge`.

A *community file* has a line for each report, reduced to what each operation did (`Report`). Others have written them,
so everything in one is checked, and bounded. community.jsonl in this package is the one that comes with postcopy; an
expectation for a kernel that is not in it was read from the kernel's source, and has not been seen.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from postcopy.errors import ConfigurationError
from postcopy.testbed._report import Row, Section, Span, row
from postcopy.testbed.faultpaths._expect import Expectations
from postcopy.testbed.faultpaths._model import WAITS_IN, Backing, Cell, Json, Mode, Operation, Outcome, Result, Run
from postcopy.testbed.faultpaths._report import NOT_OURS, describe_system, from_json, json_values
from postcopy.testbed.faultpaths._system import System, version_of
from postcopy.wire import one_line

SCHEMA = 1
MAX_REPORTS = 1000

Word = Annotated[str, Meta(pattern=r"^[!-~]{1,80}\Z")]
Words = Annotated[str, Meta(pattern=r"^[ -~]{0,80}\Z")]
Name = Annotated[str, Meta(pattern=r"^[a-z0-9_]{1,30}\.[a-z0-9_]{1,50}\Z")]
_OUTCOMES = "|".join(outcome for outcome in Outcome if outcome is not Outcome.UNAVAILABLE)
Did = Annotated[str, Meta(pattern=rf"^({_OUTCOMES})( [A-Z0-9]{{1,16}})?\Z")]
"""An outcome and what belongs to it: the state of the thread that waited, the errno, or the signal."""
Names = Annotated[tuple[Name, ...], Meta(max_length=2000)]
Cells = dict[Mode, dict[Backing, Annotated[dict[Did, Names], Meta(max_length=200)]]]


class Report(Struct, frozen=True, forbid_unknown_fields=True, rename="kebab", tag_field="event", tag="fault-paths"):
    """What one kernel did on one host: a line of a community file."""

    schema: Literal[1]
    kernel: Word
    architecture: Words
    kvm: Literal["hardware", "emulated", "none"]
    direct_file_system: Words
    cells: Cells
    """By mode, by backing and by what was done: the operations that did it. What was not available is not in it."""
    date: Annotated[str, Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}\Z")] | None = None
    postcopy: Words | None = None

    def __post_init__(self) -> None:
        for mode, backings in self.cells.items():
            for backing, did in backings.items():
                names = [name for several in did.values() for name in several]
                if len(names) != len(set(names)):
                    raise ValueError(f"an operation did two things at once, {mode} on {backing}")

    @property
    def where(self) -> tuple[str, str]:
        """Which kernel."""
        return self.kernel, self.architecture

    @property
    def words(self) -> str:
        """The report in one line."""
        parts = [describe_system({"kernel": self.kernel, "architecture": self.architecture, "kvm": self.kvm})]
        if self.direct_file_system:
            parts.append(f"O_DIRECT on {self.direct_file_system}")
        return ", ".join([*parts, *([self.date] if self.date else [])])

    def by_cell(self) -> Iterator[tuple[Cell, str]]:
        """What each cell did."""
        for mode, backings in self.cells.items():
            for backing, dids in backings.items():
                for did, names in dids.items():
                    for name in names:
                        yield Cell(name, mode, backing), did


def of_run(run: Run) -> Report:
    """A run of `postcopy faultpaths`, reduced. `ConfigurationError` for one that says nothing of a kernel."""
    if run.remote is not None:
        raise ConfigurationError("a report of --remote, which tells of the engine rather than of the kernel")
    cells: dict[Mode, dict[Backing, dict[str, list[str]]]] = {}
    for item in run.judged:
        if item.result.outcome is Outcome.UNAVAILABLE:
            continue
        did = cells.setdefault(item.cell.mode, {}).setdefault(item.cell.backing, {})
        did.setdefault(_did(item.result), []).append(item.cell.operation)
    started = (run.run or {}).get("started")
    return _checked(
        {
            "event": "fault-paths",
            "schema": SCHEMA,
            "kernel": run.system.get("kernel"),
            "architecture": run.system.get("architecture", ""),
            "kvm": run.system.get("kvm", "none"),
            "direct-file-system": run.system.get("direct-file-system", ""),
            "cells": cells,
            "date": started[:10] if isinstance(started, str) else None,
            "postcopy": (run.run or {}).get("version"),
        }
    )


def _did(result: Result) -> str:
    if result.outcome is Outcome.BLOCKED and result.state in ("S", "D") and result.wchan == WAITS_IN:
        return f"{result.brief} {result.state}"
    return result.brief


def _checked(value: object) -> Report:
    try:
        return msgspec.convert(value, Report)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigurationError(f"in which {one_line(str(error), 200)}") from None


# ---- files


def read(path: str) -> list[Report]:
    """Of a report of `faultpaths --json`, or of a community file. `ConfigurationError`, with the file's name, for
    anything else: a file of which one line is bad is not read at all."""
    values = json_values(path)
    found: list[Report] = []
    run: Json | None = None
    for number, value in enumerate(values, 1):
        try:
            if isinstance(value, dict) and value.get("event") == "run":
                run = value
            elif isinstance(value, dict) and value.get("event") == "fault-paths":
                found.append(_checked(value))
            else:
                found.append(of_run(from_json(value, run)))
                run = None
        except ConfigurationError as error:
            place = f", value {number}," if len(values) > 1 else ""
            raise ConfigurationError(f"{path!r}{place} is {_a(error)}") from None
    if not found:
        raise ConfigurationError(f"{path!r} has no report: {NOT_OURS}")
    if len(found) > MAX_REPORTS:
        raise ConfigurationError(f"{path!r} has {len(found)} reports; a file may have {MAX_REPORTS}")
    return found


def _a(error: ConfigurationError) -> str:
    text = str(error)
    return f"a report {text}" if text.startswith("in which") else text


@functools.cache
def community() -> tuple[Report, ...]:
    """Those that come with postcopy."""
    text = resources.files(__package__).joinpath("community.jsonl").read_text("utf-8")
    return tuple(_checked(json.loads(line)) for line in text.splitlines())


def is_seen(system: System) -> bool:
    """Whether a kernel of that series is in the community file: what is expected of it has been seen, then."""
    return any(version_of(report.kernel)[:2] == system.version[:2] for report in community())


def merged(reports: Iterable[Report]) -> list[Report]:
    """Each once, in the order of kernels and dates."""
    lines = {line_of(report): report for report in reports}
    return sorted(lines.values(), key=lambda report: (version_of(report.kernel), *report.where, report.date or ""))


def line_of(report: Report) -> str:
    """Of a community file."""
    return msgspec.json.encode(report).decode()


# ---- the matrix


LEGEND = (
    "blocked: waited for the page and went on with it, its thread in state S (interruptible) or D (killable only);"
    " passed: went on without an event; refused, signalled: failed, with that error or signal; x or y: two reports of"
    " one kernel do not agree"
)


@dataclass(frozen=True)
class Column:
    """What one kernel did, or is expected to do."""

    title: str
    did: Mapping[Cell, Mapping[str, Sequence[Report]]]
    """What was done, and the reports that say so; several where they do not agree."""
    expected: bool = False


@dataclass(frozen=True)
class Matrix:
    """Over kernels."""

    reports: tuple[Report, ...]
    columns: tuple[Column, ...]

    @functools.cached_property
    def cells(self) -> list[Cell]:
        return sorted({cell for column in self.columns for cell in column.did})

    @functools.cached_property
    def conflicts(self) -> list[tuple[Column, Cell]]:
        return [(column, cell) for column in self.columns for cell, did in sorted(column.did.items()) if len(did) > 1]

    @property
    def summary(self) -> str:
        kernels = [column for column in self.columns if not column.expected]
        counts = {"kernel": len(kernels), "report": len(self.reports), "cell": len(self.cells)}
        if self.conflicts:
            counts["conflict"] = len(self.conflicts)
        return ", ".join(f"{count} {what}{'s' * (count != 1)}" for what, count in counts.items())

    def as_json(self) -> Json:
        return {
            "reports": [
                {name: value for name, value in msgspec.to_builtins(report).items() if name not in ("cells", "event")}
                for report in self.reports
            ],
            "kernels": [{"kernel": column.title, "read-from-source": column.expected} for column in self.columns],
            "cells": [
                {**msgspec.to_builtins(cell), "did": [list(column.did.get(cell, ())) for column in self.columns]}
                for cell in self.cells
            ],
            "conflicts": len(self.conflicts),
        }


def matrix(reports: Sequence[Report], operations: Sequence[Operation], expectations: Expectations) -> Matrix:
    """A column for each kernel, and for each version that an expectation begins with and that is newer than all; of the
    operations that were tried anywhere."""
    by_kernel: dict[tuple[str, str], list[Report]] = {}
    for report in reports:
        by_kernel.setdefault(report.where, []).append(report)
    architectures = {report.architecture for report in reports}
    columns = [
        Column(" ".join(where) if len(architectures) > 1 else where[0], _together(several))
        for where, several in by_kernel.items()
    ]
    tried = {cell.operation for column in columns for cell in column.did}
    operations = [operation for operation in operations if operation.name in tried]
    newest = max(reports, key=lambda report: version_of(report.kernel), default=None)
    for version in expectations.begins_at():
        if newest is not None and version > version_of(newest.kernel):
            system = System(
                ".".join(map(str, version)), newest.architecture, kvm=newest.kvm, file_system=newest.direct_file_system
            )
            columns.append(
                Column(f"{system.release} (read from source)", _expected(operations, expectations, system), True)
            )
    return Matrix(tuple(reports), tuple(columns))


def _together(reports: Iterable[Report]) -> dict[Cell, dict[str, list[Report]]]:
    """What several reports of one kernel say. A thread whose state was not seen may have waited in either."""
    found: dict[Cell, dict[str, list[Report]]] = {}
    for report in reports:
        for cell, did in report.by_cell():
            found.setdefault(cell, {}).setdefault(did, []).append(report)
    for dids in found.values():
        if any(did.startswith(f"{Outcome.BLOCKED} ") for did in dids):
            dids.pop(Outcome.BLOCKED.value, None)
    return found


def _expected(
    operations: Sequence[Operation], expectations: Expectations, system: System
) -> dict[Cell, dict[str, list[Report]]]:
    """Of the operations, in words."""
    found: dict[Cell, dict[str, list[Report]]] = {}
    expectations = expectations.on(system)
    for operation in operations:
        for mode in operation.modes:
            for backing in operation.backings:
                if (mode, backing) == (Mode.MINOR, Backing.ANON):
                    continue  # there is none: it has no page cache
                cell = Cell(operation.name, mode, backing)
                if rule := expectations.find(operation, cell, system):
                    found[cell] = {rule.brief: []}
    return found


def sections(found: Matrix) -> list[Section]:
    """The matrix, operations that do the same everywhere in one row; and where reports of one kernel do not agree."""
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in found.cells:
        words = (" or ".join(column.did.get(cell, ())) for column in found.columns)
        groups.setdefault((cell.mode, *words), []).append(cell)
    rows: list[Row] = []
    order = {mode.value: number for number, mode in enumerate(Mode)}
    for (mode, *did), cells in sorted(groups.items(), key=lambda item: order[item[0][0]]):
        by_backings: dict[tuple[Backing, ...], list[str]] = {}
        backings: dict[str, list[Backing]] = {}
        for cell in cells:
            backings.setdefault(cell.operation, []).append(cell.backing)
        for name, several in backings.items():
            by_backings.setdefault(tuple(backing for backing in Backing if backing in several), []).append(name)
        for several_backings, names in by_backings.items():
            spans = [_span(column, text) for column, text in zip(found.columns, did, strict=True)]
            rows.append(row(f"{mode} ({', '.join(several_backings)}): {_names(names)}", *spans))
    conflicts = tuple(
        row(
            str(cell),
            column.title,
            Span("; ".join(f"{did} ({_named(reports)})" for did, reports in column.did[cell].items()), "bad"),
        )
        for column, cell in found.conflicts
    )
    made = [
        Section(
            "What kernels do",
            ("page: operations", *(column.title for column in found.columns)),
            tuple(rows),
            "Empty: not tried there, or not available. Read from source: expected, and not confirmed by a report.",
        ),
        Section(
            "Conflicts: reports of one kernel that do not agree",
            ("cell", "kernel", "what each says"),
            conflicts,
            "Two hosts may differ in what the kernel was configured with, in KVM or in a file system.",
        ),
    ]
    return [section for section in made if section.rows]


def _span(column: Column, text: str) -> Span:
    if column.expected:
        return Span(text, "muted")
    if " or " in text:
        return Span(text, "bad")
    return Span(text, "good" if text.startswith((Outcome.BLOCKED, Outcome.PASSED)) else "plain")


def _names(names: Sequence[str]) -> str:
    """As they are, or how many of each class where they are many."""
    if len(names) <= 8:
        return ", ".join(names)
    classes = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"{count} of {name}" for name, count in classes.items())


def _named(reports: Sequence[Report]) -> str:
    named = "; ".join(report.words for report in reports[:3])
    return f"{named}; and {len(reports) - 3} more" if len(reports) > 3 else named
