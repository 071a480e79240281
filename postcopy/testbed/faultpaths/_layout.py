# SPDX-License-Identifier: Apache-2.0
"""A run as titled tables of styled words; text, Markdown and HTML are three ways of writing these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from postcopy.testbed.faultpaths._model import (
    EVENT_THREADS,
    LOCK_CALLS,
    WAITS_IN,
    Backing,
    Judged,
    Mode,
    Operation,
    Outcome,
    Run,
    Verdict,
)

TITLES = {
    "user": "User-mode code",
    "copy": "Copies in system calls",
    "pin": "get_user_pages and pins",
    "futex": "Futexes",
    "uring": "io_uring",
    "kvm": "KVM",
    "remote": "Another process's memory",
    "net": "Networking",
    "nofault": "Must not fault",
    "device": "Devices",
}
MARKS = {Verdict.CHANGED: " !", Verdict.NOT_EXPECTED: " ?"}
LEGEND = (
    "blocked: waited for the page and went on with it; passed: went on without an event; spun: came back again and"
    " again instead of waiting; ! changed: another outcome than expected; ? nothing is known of it; n/a not available"
    " here; waits: state of the blocked thread (S interruptible, D killable only), and where it sleeps if not in"
    f" {WAITS_IN}; fault of: the thread that raised it"
)


@dataclass(frozen=True)
class Span:
    """Words and how they are meant: good, plain, muted, warn or bad."""

    text: str
    kind: str = "plain"


@dataclass(frozen=True)
class Section:
    """A table under a title. Each cell is a few spans, written after each other."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[tuple[Span, ...], ...], ...]
    note: str = ""
    hints: tuple[str, ...] = field(default=())
    """For each row, what a reader with a mouse may want beside."""


def summary(run: Run) -> str:
    """One line: how many of what."""
    counts = Counter(item.verdict for item in run.judged)
    operations = len({item.cell.operation for item in run.judged})
    parts = [f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]]
    text = f"{operations} operations, {len(run.judged)} cells in {run.seconds:.1f} s: {', '.join(parts) or 'nothing'}"
    return text + (f"; {len(run.left_out)} left out for want of time" if run.left_out else "")


def sections(run: Run) -> list[Section]:
    """All of them, those without rows left out."""
    made = [
        *_groups(run),
        *_remote(run),
        _changed(run),
        _not_expected(run),
        _uncovered(run),
        _unavailable(run),
        *_measures(run),
    ]
    return [section for section in made if section.rows]


def kind_of(item: Judged) -> str:
    """How a cell is meant."""
    if item.verdict is Verdict.CHANGED:
        return "bad"
    if item.verdict is Verdict.NOT_EXPECTED:
        return "warn"
    if item.verdict is Verdict.NOT_AVAILABLE:
        return "muted"
    return "good" if item.result.outcome in (Outcome.BLOCKED, Outcome.PASSED) else "plain"


def brief(item: Judged) -> str:
    """The outcome, marked."""
    return "n/a" if item.verdict is Verdict.NOT_AVAILABLE else item.result.brief + MARKS.get(item.verdict, "")


def _groups(run: Run) -> Iterable[Section]:
    modes = [mode for mode in Mode if any(item.cell.mode is mode for item in run.judged)]
    by_operation: dict[str, list[Judged]] = {}
    for item in run.judged:
        by_operation.setdefault(item.cell.operation, []).append(item)
    header = ("operation", *modes, "waits", "fault of")
    groups: dict[str, list[Operation]] = {}
    for operation in run.operations:
        if operation.name in by_operation:
            groups.setdefault(operation.group, []).append(operation)
    for group, operations in groups.items():
        rows = []
        for operation in operations:
            items = by_operation[operation.name]
            cells = [_mode_cell([item for item in items if item.cell.mode is mode]) for mode in modes]
            rows.append(((Span(operation.name),), *cells, *_waits(items)))
        yield Section(TITLES.get(group, group), header, tuple(rows), hints=tuple(item.what for item in operations))


def _backings(items: Iterable[Judged]) -> str:
    seen = {item.cell.backing for item in items}
    return ", ".join(backing for backing in Backing if backing in seen)


def columns(run: Run) -> str:
    """Which backings each mode was tried on."""
    parts = []
    for mode in Mode:
        items = [item for item in run.judged if item.cell.mode is mode]
        there = [item for item in items if item.verdict is not Verdict.NOT_AVAILABLE]
        if items:
            parts.append(f"{mode} on {_backings(there) or 'nothing that is there'}")
    return "pages: " + "; ".join(parts)


def _mode_cell(items: Sequence[Judged]) -> tuple[Span, ...]:
    """One word where all backings that are there agree, else which of them did what."""
    same: dict[tuple[str, str], list[Judged]] = {}
    for item in [item for item in items if item.verdict is not Verdict.NOT_AVAILABLE] or items:
        same.setdefault((brief(item), kind_of(item)), []).append(item)
    if len(same) == 1:
        ((text, kind),) = same
        return (Span(text, kind),)
    spans: list[Span] = []
    for (text, kind), those in same.items():
        if spans:
            spans.append(Span("; "))
        spans += [Span(f"{_backings(those)} ", "muted"), Span(text, kind)]
    return tuple(spans) or (Span("", "muted"),)


def _waits(items: Sequence[Judged]) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """Of the first that was seen blocked."""
    for item in items:
        if item.result.state:
            where = "" if item.result.wchan == WAITS_IN else item.result.wchan
            wait = f"{item.result.state} {where}".strip()
            raised_by = item.result.event_thread
            return (Span(wait),), (Span(raised_by if raised_by != EVENT_THREADS[0] else ""),)
    return (Span(""),), (Span(""),)


def _grouped(items: Iterable[Judged], key: Callable[[Judged], object]) -> list[list[Judged]]:
    """Those with an equal key together, in the order of the first."""
    groups: dict[object, list[Judged]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _page(items: Sequence[Judged]) -> tuple[Span, ...]:
    """Modes and backings."""
    parts = (f"{those[0].cell.mode} ({_backings(those)})" for those in _grouped(items, lambda item: item.cell.mode))
    return (Span("; ".join(parts)),)


def _alike(item: Judged) -> tuple[object, ...]:
    """Cells that a list of findings tells in one row: they differ in the backing only."""
    return item.cell.operation, item.cell.mode, item.result.brief, item.result.text, item.difference, item.reason


def _changed(run: Run) -> Section:
    rows = tuple(
        (
            (Span(those[0].cell.operation),),
            _page(those),
            (Span(those[0].difference, "bad"),),
            (Span(those[0].result.text, "muted"),),
            (Span(those[0].reason),),
        )
        for those in _grouped((item for item in run.judged if item.verdict is Verdict.CHANGED), _alike)
    )
    header = ("operation", "page", "outcome", "detail", "the expectation's reason")
    return Section("Changed: another outcome than expected", header, rows)


def _not_expected(run: Run) -> Section:
    rows = tuple(
        (
            (Span(those[0].cell.operation),),
            _page(those),
            (Span(those[0].result.brief, "warn"),),
            (Span(those[0].result.text, "muted"),),
        )
        for those in _grouped((item for item in run.judged if item.verdict is Verdict.NOT_EXPECTED), _alike)
    )
    return Section("Not expected: no expectation for this kernel", ("operation", "page", "outcome", "detail"), rows)


def _uncovered(run: Run) -> Section:
    rows = tuple(
        (
            (Span(those[0].cell.operation),),
            _page(those),
            (Span(those[0].result.brief, "warn"),),
            # An expectation's reason speaks of the outcome that it expects.
            (Span(those[0].result.text if those[0].difference else those[0].reason or those[0].result.text),),
        )
        for those in _grouped(
            (item for item in run.judged if item.uncovered), lambda item: (_alike(item)[0], *_alike(item)[2:])
        )
    )
    return Section(
        "Few places that remain uncovered",
        ("operation", "page", "instead of waiting", "why"),
        rows,
        "These cannot wait for a page; whoever hands them memory must have its pages there first.",
    )


def _unavailable(run: Run) -> Section:
    items = [item for item in run.judged if item.verdict is Verdict.NOT_AVAILABLE]
    rows = []
    for those in _grouped(items, lambda item: item.reason):
        names = list(dict.fromkeys(item.cell.operation for item in those))
        if len(names) > 6:
            names = [*names[:5], f"and {len(names) - 5} more"]
        modes = ", ".join(dict.fromkeys(item.cell.mode.value for item in those))
        rows.append(
            ((Span(those[0].reason),), (Span(", ".join(names)),), (Span(f"{modes} ({_backings(those)})", "muted"),))
        )
    return Section("Not available here", ("reason", "operations", "cells"), tuple(rows))


def _remote(run: Run) -> Iterable[Section]:
    items = [(item, item.result.remote) for item in run.judged if item.result.remote is not None]
    yield Section(
        "The page came from another host",
        ("cell", "outcome", "faults read", "requests at the source", "cuts", "waited"),
        tuple(
            (
                (Span(str(item.cell)),),
                (Span(brief(item), kind_of(item)),),
                (Span(str(remote.faults)),),
                (Span(str(remote.requests), "bad" if remote.wrong(item.result.outcome) else "plain"),),
                (Span(str(remote.cuts)),),
                (Span(f"{item.result.waited_ns / 1e6:.1f} ms"),),
            )
            for item, remote in items
            if remote is not None and item.verdict is not Verdict.NOT_AVAILABLE
        ),
        "Over TCP and a proxy that resets every connection while the operation waits, until both sides meet again. A"
        " fault beside an operation that passed is that of the check of the content afterwards.",
    )


def _measures(run: Run) -> Iterable[Section]:
    items = run.judged
    yield Section(
        "A signal is pending during the fault",
        ("cell", "handler ran before the page", "more events", "CPU burned", "of"),
        tuple(
            (
                (Span(str(item.cell)),),
                (Span("yes" if item.result.signal.handler_before_page else "no"),),
                (Span(str(item.result.signal.events), "warn" if item.result.signal.events else "plain"),),
                (Span(f"{item.result.signal.cpu_ns / 1e6:.2f} ms"),),
                (Span(f"{item.result.signal.window_ns / 1e6:.2f} ms"),),
            )
            for item in items
            if item.result.signal is not None
        ),
        "User code faults once more after the handler has run. A copy within a system call is restarted, and faults"
        " again, for as long as the signal is pending: it burns a processor.",
    )
    yield Section(
        "SIGKILL during the fault",
        ("cell", "killed", "reaped after"),
        tuple(
            (
                (Span(str(item.cell)),),
                (Span("yes", "good") if item.result.kill.killed else Span("NO", "bad"),),
                (Span(f"{item.result.kill.ns / 1e6:.2f} ms" if item.result.kill.killed else ""),),
            )
            for item in items
            if item.result.kill is not None
        ),
    )
    rows = []
    for item in items:
        locks = item.result.locks
        if locks is None:
            continue
        for where, ratios in zip(("elsewhere", "same mapping"), locks.ratios(), strict=True):
            words = [f"{ratio:.2f}" if ratio is not None else "-" for ratio in ratios]
            rows.append(((Span(str(item.cell)),), (Span(where),), *((Span(word),) for word in words)))
    yield Section(
        "Latency on another thread while the fault is pending, against none pending",
        ("cell", "where", *LOCK_CALLS),
        tuple(rows),
        "Near 1: no lock is held. Medians; see --json for the nanoseconds.",
    )
