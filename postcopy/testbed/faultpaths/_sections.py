# SPDX-License-Identifier: Apache-2.0
"""A run, and what differs between two, as the titled tables of `postcopy.testbed._report`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from postcopy.testbed._report import Row, Section, Span, Words, row
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
    "blocked: waited for the page and went on with it; passed: went on without an event; retried: came back again and"
    " again instead of waiting; ! changed: another outcome than expected; ? there is no expectation for it; n/a not"
    " available here; waits: state of the blocked thread (S interruptible, D killable only), and where it sleeps if"
    f" not in {WAITS_IN}; fault of: the thread that raised it"
)


def summary(run: Run) -> str:
    """One line: how many of what."""
    counts = Counter(item.verdict for item in run.judged)
    operations = len({item.cell.operation for item in run.judged})
    parts = [f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict]]
    text = f"{operations} operations, {len(run.judged)} cells in {run.seconds:.1f} s: {', '.join(parts) or 'nothing'}"
    return text + (f"; {len(run.left_out)} left out, since the time was over" if run.left_out else "")


def sections(run: Run) -> list[Section]:
    """All of them, those without rows left out."""
    made = [
        *_groups(run),
        _remote(run),
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
    groups: dict[str, list[Operation]] = {}
    for operation in run.operations:
        if operation.name in by_operation:
            groups.setdefault(operation.group, []).append(operation)
    for group, operations in groups.items():
        rows = []
        for operation in operations:
            items = by_operation[operation.name]
            cells = [_mode_cell([item for item in items if item.cell.mode is mode]) for mode in modes]
            rows.append(row(operation.name, *cells, *_waits(items)))
        yield Section(
            TITLES.get(group, group),
            ("operation", *modes, "waits", "fault of"),
            tuple(rows),
            hints=tuple(operation.what for operation in operations),
        )


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


def _mode_cell(items: Sequence[Judged]) -> Words:
    """One word where all backings that are there agree, else which of them did what."""
    same = _grouped(
        [item for item in items if item.verdict is not Verdict.NOT_AVAILABLE] or items,
        lambda item: (brief(item), kind_of(item)),
    )
    spans: list[Span] = []
    for those in same:
        if spans:
            spans.append(Span("; "))
        if len(same) > 1:
            spans.append(Span(f"{_backings(those)} ", "muted"))
        spans.append(Span(brief(those[0]), kind_of(those[0])))
    return spans or Span("", "muted")


def _waits(items: Sequence[Judged]) -> tuple[str, str]:
    """Of the first that was seen blocked."""
    for item in items:
        seen = item.result
        if seen.state:
            where = "" if seen.wchan in (None, WAITS_IN) else seen.wchan
            return f"{seen.state} {where}".strip(), seen.event_thread if seen.event_thread != EVENT_THREADS[0] else ""
    return "", ""


def _grouped(items: Iterable[Judged], key: Callable[[Judged], object]) -> list[list[Judged]]:
    """Those with an equal key together, in the order of the first."""
    groups: dict[object, list[Judged]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _page(items: Sequence[Judged]) -> str:
    """Modes and backings."""
    return "; ".join(f"{those[0].cell.mode} ({_backings(those)})" for those in _grouped(items, lambda i: i.cell.mode))


def _findings(
    run: Run,
    chosen: Callable[[Judged], bool],
    title: str,
    header: tuple[str, ...],
    cells: Callable[[Judged], tuple[Words, ...]],
    note: str = "",
    across_modes: bool = False,
) -> Section:
    """A list of cells, in one row those that differ in the backing only (or in the mode, too)."""

    def key(item: Judged) -> object:
        mode = None if across_modes else item.cell.mode
        return item.cell.operation, mode, item.result.brief, item.result.text, item.difference, item.reason

    rows = (
        row(those[0].cell.operation, _page(those), *cells(those[0]))
        for those in _grouped(filter(chosen, run.judged), key)
    )
    return Section(title, ("operation", "page", *header), tuple(rows), note)


def _changed(run: Run) -> Section:
    return _findings(
        run,
        lambda item: item.verdict is Verdict.CHANGED,
        "Changed: another outcome than expected",
        ("outcome", "detail", "the expectation's reason"),
        lambda item: (Span(item.difference, "bad"), Span(item.result.text, "muted"), item.reason),
    )


def _not_expected(run: Run) -> Section:
    return _findings(
        run,
        lambda item: item.verdict is Verdict.NOT_EXPECTED,
        "Not expected: no expectation for this kernel",
        ("outcome", "detail"),
        lambda item: (Span(item.result.brief, "warn"), Span(item.result.text, "muted")),
    )


def _uncovered(run: Run) -> Section:
    def cells(item: Judged) -> tuple[Words, ...]:
        # An expectation's reason speaks of the outcome that it expects.
        why = item.result.text if item.difference else item.reason or item.result.text
        return Span(item.result.brief, "warn"), why

    return _findings(
        run,
        lambda item: item.uncovered,
        "Few places that remain uncovered",
        ("instead of waiting", "why"),
        cells,
        "These cannot wait for a page; memory that is given to them must have its pages there first.",
        across_modes=True,
    )


def _unavailable(run: Run) -> Section:
    rows = []
    for those in _grouped(
        (item for item in run.judged if item.verdict is Verdict.NOT_AVAILABLE), lambda item: item.reason
    ):
        names = list(dict.fromkeys(item.cell.operation for item in those))
        if len(names) > 6:
            names = [*names[:5], f"and {len(names) - 5} more"]
        modes = ", ".join(dict.fromkeys(item.cell.mode.value for item in those))
        rows.append(row(those[0].reason, ", ".join(names), Span(f"{modes} ({_backings(those)})", "muted")))
    return Section("Not available here", ("reason", "operations", "cells"), tuple(rows))


def _remote(run: Run) -> Section:
    return Section(
        "The page came from another host",
        ("cell", "outcome", "faults read", "requests at the source", "cuts", "waited"),
        tuple(
            row(
                str(item.cell),
                Span(brief(item), kind_of(item)),
                str(remote.faults),
                Span(str(remote.requests), "bad" if remote.wrong(item.result.outcome) else "plain"),
                str(remote.cuts),
                f"{item.result.waited_us / 1e3:.1f} ms",
            )
            for item in run.judged
            if (remote := item.result.remote) and item.verdict is not Verdict.NOT_AVAILABLE
        ),
        "Over TCP and a proxy that resets every connection while the operation waits, until both sides meet again. A"
        " fault beside an operation that passed is that of the check of the content afterwards.",
    )


def _measures(run: Run) -> Iterable[Section]:
    yield Section(
        "A signal is pending during the fault",
        ("cell", "handler ran before the page", "more events", "CPU burned", "of"),
        tuple(
            row(
                str(item.cell),
                "yes" if signal.handler_before_page else "no",
                Span(str(signal.events), "warn" if signal.events else "plain"),
                f"{signal.cpu_us / 1e3:.2f} ms",
                f"{signal.window_us / 1e3:.2f} ms",
            )
            for item in run.judged
            if (signal := item.result.pending_signal)
        ),
        "User code faults once more after the handler has run. A copy within a system call is restarted, and faults"
        " again, for as long as the signal is pending: it burns a processor.",
    )
    yield Section(
        "SIGKILL during the fault",
        ("cell", "killed", "reaped after"),
        tuple(
            row(
                str(item.cell),
                Span("yes", "good") if kill.killed else Span("NO", "bad"),
                f"{kill.reaped_us / 1e3:.2f} ms" if kill.killed else "",
            )
            for item in run.judged
            if (kill := item.result.kill)
        ),
    )
    rows: list[Row] = []
    for item in run.judged:
        if locks := item.result.locks_ns:
            ratios = [locks[call].ratios for call in LOCK_CALLS]
            for where, values in zip(("elsewhere", "same mapping"), zip(*ratios, strict=True), strict=True):
                words = [f"{ratio:.2f}" if ratio is not None else "-" for ratio in values]
                rows.append(row(str(item.cell), where, *words))
    yield Section(
        "Latency on another thread while the fault is pending, against none pending",
        ("cell", "where", *LOCK_CALLS),
        tuple(rows),
        "Near 1: no lock is held. Medians; see --json for the nanoseconds.",
    )


def operation_list(operations: Sequence[Operation]) -> list[Section]:
    """Of `--list`."""

    def all_or(names: Sequence[str], every: Sequence[str]) -> Span:
        return Span("all" if len(names) == len(every) else ", ".join(names), "muted")

    return [
        Section(
            f"{TITLES.get(group, group)} ({group})",
            ("operation", "what touches the page", "modes", "backings"),
            tuple(
                row(item.name, item.what, all_or(item.modes, list(Mode)), all_or(item.backings, list(Backing)))
                for item in operations
                if item.group == group
            ),
        )
        for group in dict.fromkeys(operation.group for operation in operations)
    ]
