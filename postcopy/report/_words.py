# SPDX-License-Identifier: Apache-2.0
"""What a migration was, in sentences and in the few numbers that matter most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from postcopy._throughput import BACK, Throughput, joined, throughput
from postcopy.output.words import AT_DESTINATION, AT_SOURCE, format_count, format_duration, format_speed
from postcopy.report._charts import bytes_of
from postcopy.report._model import Histogram, Mark, Migration, Side, object_of, text_of
from postcopy.units import format_size

GOOD = ("completed", "reclaimed")
PARTS = {
    "stop": "stop the vCPUs", "dirty": "find what was written since", "state": "save the device state",
    "send": "send it", "prepared": "the destination prepares", "commit": "commit, until it runs there",
    "arm": "make changed pages missing", "load": "load the device state", "first-run": "the first vCPU runs",
}  # fmt: skip
"""Of the pause, by their names in `downtime-breakdown-us`."""
_WITHIN = {"prepared": ("arm", "load"), "commit": ("first-run",)}


@dataclass(frozen=True)
class Part:
    name: str
    side: str
    begin_us: float
    length_us: float


def pause_parts(migration: Migration) -> list[Part]:
    """In order. Those of the source follow each other; those of the destination, of whose place only the part of the
    source is known within which they lie, are put into its middle."""
    if not migration.runs:
        return []
    lengths = {name: migration.number("downtime-breakdown-us", name) for name in PARTS}
    found, at = [], 0.0
    for name in AT_SOURCE:
        if (length := lengths[name]) is None:
            continue
        found.append(Part(name, "source", at, length))
        inner = [(one, there) for one in _WITHIN.get(name, ()) if (there := lengths[one]) is not None]
        begin = at + max(0.0, length - sum(there for _, there in inner)) / 2
        for one, there in inner:
            found.append(Part(one, "dest", begin, there))
            begin += there
        at += length
    if not found:  # a destination alone
        for name in AT_DESTINATION:
            if (length := lengths[name]) is not None:
                found.append(Part(name, "dest", at, length))
                at += length
    return found if any(part.length_us for part in found) else []


def status_of(migration: Migration) -> str:
    """Of both sides: the one that is not good, where one is not."""
    known = [side.text("status") for side in (migration.dest, migration.source) if side is not None]
    return next((one for one in known if one and one not in GOOD), next(filter(None, known), "")) or "not known"


def title(migration: Migration) -> str:
    """``vm1 (kvm, 256 MiB), attempt 2``."""
    name, kind = migration.text("machine") or migration.text("name"), migration.text("kind")
    total = migration.number("ram", "total") or migration.number("memory")
    about = ", ".join(filter(None, (kind if kind != name else "", size_of(total) if total else "")))
    attempt = migration.number("attempts") or 1
    which = f", attempt {attempt:.0f}" if attempt > 1 else ""
    return f"{name or kind or 'a machine'}{f' ({about})' if about else ''}{which}"


def differences(migrations: Sequence[Migration]) -> dict[str, str]:
    """By migration, the options that are not the same for all of them, as ``workload zipf, prefetch forward``: what
    each of a comparison is. Empty where nothing differs but what always does."""
    options = {
        one.key: {text_of(k, 40): text_of(v, 80) for k, v in object_of(one.main.run.get("options")).items()}
        for one in migrations
    }
    names = dict.fromkeys(name for given in options.values() for name in given)
    chosen = [name for name in names if name not in _OWN and len({given.get(name) for given in options.values()}) > 1]
    return {
        key: ", ".join(f"{name} {given[name]}" for name in chosen[:8] if name in given)
        for key, given in options.items()
    }


_OWN = frozenset({"seed", "listen", "connect", "name", "report", "json", "log-level"})
"""Options that differ between migrations for no reason of theirs."""


def waits(migration: Migration) -> dict[str, Histogram]:
    return migration.dest.timeline.latency if migration.dest is not None and migration.dest.timeline is not None else {}


def latency_of(migration: Migration) -> dict[str, float]:
    """Of demand faults: ``count``, and ``p50``, ``p99``, ``p99.9`` and ``max`` in microseconds; empty: not known."""
    names = ("count", "p50", "p99", "p99.9", "max")
    known = {name: migration.number("fault-latency-us", name) for name in names}
    if (total := waits(migration).get("total")) is not None:
        counted = {name: total.percentile(float(name[1:])) for name in names[1:4]}
        known = {"count": float(total.count), **counted, "max": total.max_us}
    return {name: value for name, value in known.items() if value is not None} if known["count"] is not None else {}


def guest_of(migration: Migration) -> Throughput | None:
    """None where too little is known of it. Where there is too little before the first round, what it was before the
    pause is what it is compared with."""
    marks = marks_of(migration)
    pause_ms = next((mark.at_ms for mark in marks if mark.what == "pause"), None)
    running_ms = next((mark.at_ms for mark in marks if mark.what == "running"), None)
    if pause_ms is None:
        return None
    points: dict[str, list[tuple[float, float]]] = {"source": [], "dest": []}
    for side, timeline in migration.timelines:
        if side.name in points and (counts := timeline.series.get("guest-operations")) is not None:
            known = ~np.isnan(counts)
            at_ms = (timeline.at_ms + migration.offset_ms(side))[known]
            points[side.name] = list(zip(at_ms.tolist(), counts[known].tolist(), strict=True))
    found = joined(points["source"], points["dest"], pause_ms, running_ms)
    begin_ms = next((mark.at_ms for mark in marks if mark.what == "round"), pause_ms)
    return throughput(found, min(begin_ms, pause_ms), pause_ms) or throughput(found, pause_ms, pause_ms)


def marks_of(migration: Migration) -> list[Mark]:
    """Of both sides, on the clock of the main one; what both know, once: the destination knows when it runs, the source
    when it was paused."""
    found: dict[tuple[str, int], Mark] = {}
    order = sorted(migration.timelines, key=lambda pair: pair[0].name == "source")
    for side, timeline in order:
        counts: dict[str, int] = {}
        for mark in timeline.marks:
            number = counts[mark.what] = counts.get(mark.what, 0) + 1
            moved = Mark(mark.at_ms + migration.offset_ms(side), mark.what, mark.text)
            if (mark.what, number) not in found or (side.name == "source" and mark.what in ("pause", "round", "offer")):
                found[mark.what, number] = moved
    return sorted(found.values(), key=lambda mark: mark.at_ms)


def lead(migration: Migration, guest: Throughput | None) -> Iterator[str]:
    """The story in a few sentences."""
    error, status = migration.text("error"), status_of(migration)
    downtime, total = migration.number("downtime-ms"), migration.number("total-ms")
    size = migration.number("ram", "total")
    what = "all of its memory" if migration.runs else "all of the image"
    memory = f"{what} ({size_of(size)})" if size else what
    if status not in GOOD:
        before = not downtime and not any(mark.what == "commit" for mark in marks_of(migration))
        where = " before the machine was the destination's" if before and "source" in migration.sides else ""
        if status in ("failed", "cancelled", "postcopy-failed"):
            what = "was cancelled" if status == "cancelled" else "failed"
            yield f"The migration {what}{where}{f': {error}' if error else ''}."
        elif status == "lost" and error:
            yield f"Its pages could not be had: {error}."
        elif not migration.is_vm:
            why = f": {error}" if error else ""
            yield f"The migration did not complete, as far as is known here; its last status was {status}{why}."
    if downtime and migration.runs:
        yield f"The machine stood still for {ms(downtime)}" + (
            f", and {memory} had arrived {ms(total)} after the request to pause." if total else "."
        )
    elif total:
        yield f"{memory[0].upper()}{memory[1:]} had arrived after {ms(total)}."
    if (resident := migration.number("resident")) is not None and size:
        yield f"{size_of(resident)} of its memory ({size_of(size)}) was there in the end."
    latency = latency_of(migration)
    if latency.get("count"):
        count = latency["count"]
        words = f"{grouped(count)} {'access' if count == 1 else 'accesses'} had to wait for a page"
        if count == 1:
            yield f"{words}, for {us(latency['max'])}."
        elif {"p50", "p99", "max"} <= latency.keys():
            slow = f", 99 % within {us(latency['p99'])}" if count >= 100 else ""
            half, most = us(latency["p50"]), us(latency["max"])
            yield f"{words}; half of them were served within {half}{slow}, the slowest after {most}."
    elif latency and migration.dest is not None and status in GOOD:
        yield "No access had to wait for a page."
    if (recovered := migration.number("recoveries", "count")) and (
        total_ms := migration.number("recoveries", "total-ms")
    ) is not None:
        each = f"after {ms(total_ms)}" if recovered == 1 else f"{ms(total_ms)} in all"
        yield f"The connection was lost {times(round(recovered))}, and the migration went on ({each})."
    if guest is not None:
        least = f"{100 * guest.least / guest.before:.0f} %"
        if guest.dip <= 1 - BACK:
            yield f"The guest's throughput never fell below {least} of what it was before."
        else:
            yield f"The guest's throughput fell to {least} of what it was before; {_back(guest)}."


def _back(guest: Throughput) -> str:
    if guest.back_ms is None:
        return "it was not back at 90 % when the recording ended"
    if not guest.back_ms:  # what was lost was in precopy
        return "since the pause it has not been below 90 %"
    return f"it was back at 90 % {ms(guest.back_ms)} after the pause began"


def cards(migration: Migration, guest: Throughput | None) -> Iterator[tuple[str, str, str]]:
    """The numbers to be seen first: label, value, and what belongs to it."""
    if migration.runs and (downtime := migration.number("downtime-ms")):
        parts = [part for part in pause_parts(migration) if part.side == "source"]
        most = max(parts, key=lambda part: part.length_us, default=None)
        yield "Downtime", ms(downtime), f"longest part: {PARTS[most.name]}, {us(most.length_us)}" if most else ""
    total, size = migration.number("total-ms"), migration.number("ram", "total")
    if total:
        yield (
            "Total time",
            ms(total),
            f"from the {'request to pause' if migration.runs else 'switchover'} until the last page had arrived",
        )
    latency = latency_of(migration)
    if latency.get("count"):
        shown = [f"{name} {us(latency[name])}" for name in ("p50", "p99", "max") if name in latency]
        yield "Faults that waited", grouped(latency["count"]), ", ".join(shown)
    elif latency and status_of(migration) in GOOD:
        yield "Faults that waited", "0", "no access met a missing page"
    if sum(blocked := blocktimes(migration)):
        yield (
            "vCPUs waited",
            ms(sum(blocked)),
            f"the sum of {format_count(len(blocked), 'vCPU')}" if len(blocked) > 1 else "1 vCPU",
        )
    if moved := migration.number("ram", "transferred"):
        twice = migration.number("ram", "duplicate-pages")
        over = f"{moved / size:.2f} x the memory" if size else ""
        yield (
            "Sent",
            size_of(moved),
            ", ".join(filter(None, (over, f"{grouped(twice)} pages twice" if twice else ""))),
        )
    if guest is not None:
        back = f"back at 90 % after {ms(guest.back_ms)}" if guest.back_ms else "not below 90 % since the pause"
        back = "not back at 90 % in the recording" if guest.back_ms is None else back
        yield "Guest throughput, lowest", f"{100 * guest.least / guest.before:.0f} %", back
    if recovered := migration.number("recoveries", "count"):
        longest = migration.number("recoveries", "max-ms")
        yield "Recoveries", grouped(recovered), f"the longest took {ms(longest)}" if longest is not None else ""


def blocktimes(migration: Migration) -> list[float]:
    given = (migration.dest or migration.main).facts.get("blocktime-ms")
    return (
        [float(one) for one in given if isinstance(one, int | float) and 0 <= one < 1e12]
        if isinstance(given, list)
        else []
    )


def phases(migration: Migration) -> list[tuple[str, str, float, str]]:
    """Where the time went, on the outside: kind, label, milliseconds, what happened in it. Nothing of one that did not
    come to its end: of its last phase the length is not known."""
    downtime, total = migration.number("downtime-ms") or 0.0, migration.number("total-ms") or 0.0
    if not migration.runs or not total:
        return []
    marks = {mark.what: mark.at_ms for mark in reversed(marks_of(migration))}
    found = []
    if "offer" in marks and "pause" in marks and marks["pause"] > marks["offer"]:
        rounds = migration.number("ram", "iteration")
        what = (
            f"{format_count(round(rounds), 'round')} of precopy; the machine runs at the source"
            if rounds
            else "the machine runs at the source"
        )
        found.append(("before", "before the pause", marks["pause"] - marks["offer"], what))
    if downtime:
        found.append(("pause", "pause", downtime, "the machine stands still"))
    if total > downtime > 0:
        found.append(("after", "postcopy", total - downtime, "the machine runs at the destination; its memory follows"))
    return found if len(found) > 1 else []


def speed(migration: Migration) -> str:
    """Mean throughput, of the intervals in which bytes moved."""
    timeline, moved = migration.main.timeline, bytes_of(migration.main)
    if timeline is None or moved is None or len(timeline.at_ms) < 2:
        return ""
    lengths, steps = np.diff(timeline.at_ms), np.maximum(np.diff(moved), 0)
    busy = steps > 0
    mean = float(steps[busy].sum() / max(lengths[busy].sum(), 1e-3) * 1e3)
    return f"Mean rate while data was transferred: {unbroken(format_speed(mean))}." if mean else ""


def sides_of(migration: Migration) -> list[Side]:
    return [side for side in (migration.source, migration.dest) if side is not None]


def unbroken(text: str) -> str:
    """A number and its unit, which stay on one line."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def ms(value: float) -> str:
    return unbroken(format_duration(value / 1e3))


def us(value: float) -> str:
    return unbroken(format_duration(value / 1e6) if value >= 10 or value == 0 else f"{value:.1f} µs")


def size_of(value: float) -> str:
    return unbroken(format_size(round(value)))


def times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def grouped(value: float) -> str:
    return f"{round(value):,}"
