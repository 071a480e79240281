# SPDX-License-Identifier: Apache-2.0
"""What differs between two reports, of two kernels or of one before and after a change."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from postcopy.testbed._report import Section, Span, row
from postcopy.testbed.faultpaths._model import Cell, Json, Outcome, Result, Run


@dataclass(frozen=True)
class Change:
    """One cell that is not the same; an empty text where a report has no such cell."""

    cell: Cell
    before: str
    after: str

    def as_json(self) -> Json:
        return {**msgspec.to_builtins(self.cell), "before": self.before or None, "after": self.after or None}


def compare(before: Run, after: Run) -> list[Change]:
    """In the order of the reports: what a kernel does otherwise, and the cells that only one of them has.

    Compared are outcome, errno, signal, state of the blocked thread, whose fault it was, whether events were repeated,
    and of what was measured on both sides whether a handler ran before the page and whether SIGKILL ended it; times
    are not. A reason for which a cell is not available is a text for people, and not compared.
    """
    old, new = ({item.cell: item.result for item in run.judged} for run in (before, after))
    changes = []
    for cell in dict.fromkeys([*old, *new]):
        if cell not in old or cell not in new:
            changes.append(Change(cell, *(side[cell].brief if cell in side else "" for side in (old, new))))
            continue
        left, right = _aspects(old[cell], new[cell])
        different = [name for name in left if left[name] != right[name]]
        if different:
            changes.append(Change(cell, *(", ".join(side[name] for name in different) for side in (left, right))))
    return changes


def _aspects(before: Result, after: Result) -> tuple[dict[str, str], dict[str, str]]:
    """Of both results what both have, by the same names."""
    both: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for seen, result in zip(both, (before, after), strict=True):
        seen["outcome"] = result.brief
        if before.outcome is after.outcome is not Outcome.UNAVAILABLE:
            repeated = "events repeated" if result.events_repeated else "one event"
            seen["events"] = repeated if result.events else "no event"
            if before.state and after.state:  # a thread may wake before it was looked at
                seen["state"] = f"state {result.state}"
            if before.events and after.events:
                seen["thread"] = f"fault of {result.event_thread} thread"
            if before.pending_signal and after.pending_signal and result.pending_signal:
                ran = result.pending_signal.handler_before_page
                seen["signal"] = "handler before the page" if ran else "handler after the page"
            if before.kill and after.kill and result.kill:
                seen["kill"] = "SIGKILL ends it" if result.kill.killed else "SIGKILL does not end it"
    return both


def section(changes: list[Change], before: str, after: str) -> Section:
    """As a table."""
    rows = (
        row(
            str(change.cell),
            Span(change.before or "not in it", "plain" if change.before else "muted"),
            Span(change.after or "not in it", "bad" if change.after else "muted"),
        )
        for change in changes
    )
    return Section("What changed", ("cell", before, after), tuple(rows))
