# SPDX-License-Identifier: Apache-2.0
"""The columns of `postcopy bench migrate`: what one migration was like, from its result and the recordings of both
sides.

docs/comparison.md says what each column means. Both sides ran on this host, so CLOCK_MONOTONIC puts their recordings on
one time: here milliseconds since the origin of the source's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from postcopy._throughput import joined, throughput
from postcopy.output.words import format_duration
from postcopy.records.commands import DemoResult
from postcopy.records.timeline import Recording


@dataclass(frozen=True)
class Column:
    """A value of a migration."""

    name: str  # in JSON
    head: str  # of the table
    unit: str
    show: Callable[[float], str]


def _ms(value: float) -> str:
    return format_duration(value / 1e3)


def _us(value: float) -> str:
    return format_duration(value / 1e6)


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


# fmt: off
COLUMNS = (
    Column("downtime", "downtime", "ms", _ms),
    Column("total", "total", "ms", _ms),
    Column("eviction", "eviction", "ms", _ms),
    Column("bytes-over-memory", "bytes / memory", "1", "{:.2f}".format),
    Column("duplicates", "duplicates", "pages", "{:.0f}".format),
    Column("faults-over-working-set", "faults / working set", "1", _percent),
    Column("faults-prevented", "faults prevented", "1", _percent),
    Column("fault-p50", "p50", "us", _us),
    Column("fault-p99", "p99", "us", _us),
    Column("fault-p99.9", "p99.9", "us", _us),
    Column("fault-max", "max", "us", _us),
    Column("blocktime", "blocked", "ms", _ms),
    Column("dip", "dip", "1", _percent),
    Column("back", "back to 90 %", "ms", _ms),
)
# fmt: on
PREVENTED = "faults-prevented"
"""The column in which more is better."""
FAULTS = "faults"
"""A value beside the columns: how often a thread has waited for a page. `faults-prevented` is made of it."""


def values(result: DemoResult, here: Recording, there: Recording) -> dict[str, float | None]:
    """Of one migration, by name of the column; but not `faults-prevented`, which takes another migration to compare
    with."""
    found: dict[str, float | None] = {"downtime": result.downtime_ms, "blocktime": sum(result.blocktime_ms or ())}
    if (ram := result.ram) is not None and ram.total:
        found["bytes-over-memory"] = (ram.transferred or 0) / ram.total
        found["duplicates"] = ram.duplicate_pages
    if (latency := result.fault_latency_us) is not None:
        found[FAULTS] = latency.count
        if pages := working_set(result):
            found["faults-over-working-set"] = latency.count / pages
        if latency.count:
            found |= {
                f"fault-{part.replace('_', '.')}": getattr(latency, part) for part in ("p50", "p99", "p99_9", "max")
            }
    shift_ms = (there.origin.monotonic_ns - here.origin.monotonic_ns) / 1e6
    begin_ms, pause_ms = begin(here), moment(here, "pause", last=True)
    if begin_ms is not None and pause_ms is not None:
        for name, end_ms in (("total", moment(there, "all-there", shift_ms)), ("eviction", moment(here, "ended"))):
            found[name] = None if end_ms is None else end_ms - begin_ms
        running_ms = moment(there, "running", shift_ms, last=True)
        points = joined(operations(here), operations(there, shift_ms), pause_ms, running_ms)
        if (guest := throughput(points, begin_ms, pause_ms)) is not None:
            found["dip"], found["back"] = guest.dip, guest.back_ms
    return found


def working_set(result: DemoResult) -> int:
    """Pages that the guest's program works on: those whose content was verified."""
    return sum((item.counts or {}).get("pages-checked", 0) for item in result.verification)


# ---- over time


def begin(here: Recording) -> float | None:
    """When the machine began to be moved: the first round of precopy, or the pause. Until then the destination was
    made ready, and the machine ran as long as it was to."""
    return min((at_ms for what in ("round", "pause") if (at_ms := moment(here, what)) is not None), default=None)


def moment(recording: Recording, what: str, shift_ms: float = 0.0, *, last: bool = False) -> float | None:
    """When the first (or the last) mark of this name was made."""
    times = [mark.moment_ms + shift_ms for mark in recording.marks if mark.what == what]
    return None if not times else times[-1] if last else times[0]


def operations(recording: Recording, shift_ms: float = 0.0) -> list[tuple[float, float]]:
    counts = recording.series.guest_operations or []
    return [(at_ms + shift_ms, float(count)) for at_ms, count in zip(recording.at_ms, counts, strict=False)]
