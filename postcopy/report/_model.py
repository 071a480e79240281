# SPDX-License-Identifier: Apache-2.0
"""What the report knows of a migration: checked numbers, whatever the lines said.

The lines may have been edited, cut off or made up. A number is finite and within bounds, a list has at most so many
values, a text so many characters; what is not like that is left out, and `Problems` says so on the page.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from postcopy.records import Json
from postcopy.records.timeline import DIGITS

Array = NDArray[np.float64]

MAX_POINTS = 4096  # of a timeline; what is recorded has fewer
MAX_FAULTS = 4096
MAX_BUCKETS = 4096
MAX_MARKS = 256
MAX_BLOCKS = 64
MAX_CELLS = 256
MAX_VALUES = 64
MAX_ROUNDS = 1024
_SAME_BOOT_MS = 50.0  # wall clocks are adjusted in small steps
MAX_TEXT = 300
MAX_FIELDS = 80  # of an object, beside the recording
MAX_LIST = 1024  # of vCPUs
MAX_NUMBER = 2.0**53
MAX_MS = 100 * 365.25 * 86400e3
_LEVELS = np.full(128, -1, dtype=np.int8)
_LEVELS[[ord(digit) for digit in DIGITS]] = np.arange(64)

KINDS = ("precopied", "zero", "background", "prefetched", "demand")
"""Of pages that arrive, as they are drawn upon each other."""
STAGES = ("sent", "received", "placed", "total")
_STAGES = {"sent": "until-sent", "received": "until-received", "placed": "until-placed", "total": "whole"}
_SERIES = ("faults-waiting", "guest-operations", "received-bytes", "sent-bytes", "released-bytes", "blocked-us")


class Problems:
    """What was left out, in words; so many at most."""

    MOST = 20

    def __init__(self) -> None:
        self.texts: dict[str, None] = {}
        self.more = 0

    def add(self, text: str) -> None:
        if text not in self.texts and len(self.texts) >= self.MOST:
            self.more += 1
        else:
            self.texts[text] = None


def text_of(value: object, limit: int = MAX_TEXT) -> str:
    """One line for a person; empty for what is no text or number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    text = "".join(
        letter if letter.isprintable() or letter == "\N{NO-BREAK SPACE}" else " " for letter in str(value)[: limit + 1]
    )
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def number_of(value: object, most: float = MAX_NUMBER, least: float = 0.0) -> float | None:
    """None for what is no number, or no sensible one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if least <= value <= most else None  # an integer may be larger than any float


def object_of(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def list_of(value: object, most: int) -> list[Any]:
    return value[:most] if isinstance(value, list) else []


@dataclass(frozen=True)
class Mark:
    at_ms: float
    what: str
    text: str


@dataclass(frozen=True)
class Histogram:
    """How many took how long: sorted, none is empty."""

    upto_us: Array
    counts: Array
    sum_us: float
    max_us: float

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    def percentile(self, percent: float) -> float:
        """In microseconds."""
        reached = np.cumsum(self.counts)
        at = int(np.searchsorted(reached, reached[-1] * percent / 100 * (1 - 1e-12)))
        return float(self.upto_us[min(at, len(self.upto_us) - 1)])


@dataclass(frozen=True)
class Faults:
    """Some of them: when, where in the memory (0 to 1), and how long."""

    at_ms: Array
    place: Array
    us: Array


@dataclass
class Timeline:
    """All lists are as long as `at_ms`; one that was not recorded is not there."""

    at_ms: Array
    pages: dict[str, Array] = field(default_factory=dict)  # cumulative, by kind
    series: dict[str, Array] = field(default_factory=dict)  # the others, by their names in `records.timeline.Series`
    residency: NDArray[np.int8] | None = None  # columns x bins, 0 to 63
    faults: Faults | None = None
    latency: dict[str, Histogram] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)
    blocks: list[tuple[str, float, float]] = field(default_factory=list)  # name, bytes, page size
    unix_ms: float | None = None
    monotonic_ns: float | None = None
    every: int = 1  # one of so many faults is in the sample

    def first(self, *what: str) -> Mark | None:
        return next((mark for mark in self.marks if mark.what in what), None)


@dataclass
class Side:
    """One side of a migration, as its lines describe it."""

    name: str  # source, dest or pager
    facts: Json = field(default_factory=dict)
    run: Json = field(default_factory=dict)
    timeline: Timeline | None = None

    def number(self, *path: str) -> float | None:
        """A number of the facts, as ``number("ram", "total")``."""
        value: object = self.facts
        for key in path:
            value = object_of(value).get(key)
        return number_of(value)

    def text(self, key: str) -> str:
        return text_of(self.facts.get(key))


@dataclass
class Migration:
    key: str
    sides: dict[str, Side] = field(default_factory=dict)

    @property
    def source(self) -> Side | None:
        return self.sides.get("source")

    @property
    def dest(self) -> Side | None:
        """Or the pager: the side at which pages arrive."""
        return self.sides.get("dest") or self.sides.get("pager")

    @property
    def main(self) -> Side:
        """The side that knows most."""
        known = [side for side in (self.dest, self.source) if side is not None]
        return next((side for side in known if side.timeline is not None), known[0])

    def number(self, *path: str) -> float | None:
        """From the side that knows it; the source's own clock has downtime and total time."""
        order = (self.source, self.dest) if path[0] in ("downtime-ms", "total-ms") else (self.dest, self.source)
        found = [value for side in order if side is not None and (value := side.number(*path)) is not None]
        return next((value for value in found if value), found[0] if found else None)

    def text(self, key: str) -> str:
        return next((text for side in (self.dest, self.source) if side is not None and (text := side.text(key))), "")

    @property
    def is_vm(self) -> bool:
        """Whether it is no migration, but a virtual machine that a pager has served."""
        return "pager" in self.sides

    @property
    def runs(self) -> bool:
        """Whether it is a machine, which can stand still; an image is not."""
        return self.text("kind") != "image"

    @property
    def timelines(self) -> list[tuple[Side, Timeline]]:
        return [(side, side.timeline) for side in self.sides.values() if side.timeline is not None]

    def offset_ms(self, side: Side) -> float:
        """What is to be added to times of this side for those of the main one."""
        main, other = self.main.timeline, side.timeline
        if main is None or other is None or side is self.main:
            return 0.0
        if self.one_host and main.monotonic_ns and other.monotonic_ns:
            return (other.monotonic_ns - main.monotonic_ns) / 1e6
        return (other.unix_ms or 0) - (main.unix_ms or 0) if main.unix_ms and other.unix_ms else 0.0

    @property
    def one_host(self) -> bool:
        """Whether both sides have one monotonic clock: then both say the same of when it began."""
        begun = [
            timeline.unix_ms - timeline.monotonic_ns / 1e6
            for _, timeline in self.timelines
            if timeline.unix_ms is not None and timeline.monotonic_ns is not None
        ]
        return len(begun) > 1 and max(begun) - min(begun) < _SAME_BOOT_MS


@dataclass(frozen=True)
class Cell:
    """A policy with a workload, as `bench migrate` has measured it: medians of the rounds, by name."""

    workload: str
    policy: str
    values: dict[str, float]
    rounds: int
    failure: str


# ---- from JSON


def cell_of(fields: Mapping[str, Any]) -> Cell | None:
    """Of a line `measurement`; None where it is about something else."""
    workload, comma, policy = text_of(fields.get("name"), 80).partition(", ")
    if fields.get("figure") != "migrate" or not comma:
        return None
    values, most = {}, 0
    for name, value in list(object_of(fields.get("values")).items())[:MAX_VALUES]:
        rounds = list_of(object_of(value).get("rounds"), MAX_ROUNDS)
        known = [number for one in rounds if (number := number_of(one, least=-MAX_NUMBER)) is not None]
        most = max(most, len(known))
        if known:
            values[text_of(name, 40)] = statistics.median(known)
    return Cell(workload, policy, values, most, text_of(fields.get("note")))


def timeline_of(fields: Mapping[str, Any], problems: Problems) -> Timeline | None:
    """The checked timeline of a `timeline` line; None where there is none to speak of."""
    about = f"timeline of {text_of(fields.get('machine') or fields.get('vm'), 60) or 'a machine'}"
    recording = object_of(fields.get("recording"))
    at_ms = _numbers(recording.get("at-ms"), MAX_POINTS, MAX_MS)
    if at_ms is None or not len(at_ms) or np.isnan(at_ms).any():
        problems.add(f"{about}: at-ms is no list of 1 to {MAX_POINTS} times, so it was left out")
        return None
    if (np.diff(at_ms) < 0).any():
        problems.add(f"{about}: its times go backwards, so it was left out")
        return None
    found = Timeline(at_ms)
    given = object_of(recording.get("series"))
    for name in (*KINDS, "duplicate", *_SERIES):
        if given.get(name) is None:
            continue
        values = _numbers(given[name], MAX_POINTS, MAX_NUMBER)
        if values is None:
            problems.add(f"{about}: {name} is no list of sensible numbers, and was left out")
        elif len(values) != len(at_ms):
            problems.add(f"{about}: {name} has {len(values)} values for {len(at_ms)} times, and was left out")
        elif name in _SERIES:
            found.series[name] = values
        else:
            found.pages[name] = np.nan_to_num(values)
            if name != "zero":  # such a page may be written while it has not been given away
                np.maximum.accumulate(found.pages[name], out=found.pages[name])
    found.residency = _residency(recording.get("map"), len(at_ms), about, problems)
    found.faults = _faults(object_of(recording.get("fault-sample")))
    found.every = int(number_of(object_of(recording.get("fault-sample")).get("every"), 2.0**40, 1) or 1)
    for stage, name in _STAGES.items():
        if (histogram := _histogram(object_of(object_of(recording.get("latency")).get(name)))) is not None:
            found.latency[stage] = histogram
    for mark in list_of(recording.get("marks"), MAX_MARKS):
        mark = object_of(mark)
        when, what = number_of(mark.get("moment-ms"), MAX_MS), text_of(mark.get("what"), 40)
        if when is not None and what:
            found.marks.append(Mark(when, what, text_of(mark.get("text"))))
    found.marks.sort(key=lambda mark: mark.at_ms)
    for block in list_of(recording.get("blocks"), MAX_BLOCKS):
        block = object_of(block)
        size, page = number_of(block.get("bytes")), number_of(block.get("page-size"))
        if size:
            found.blocks.append((text_of(block.get("name"), 60), size, page or 0.0))
    origin = object_of(recording.get("origin"))
    found.unix_ms = number_of(origin.get("unix-ms"), MAX_MS)
    found.monotonic_ns = number_of(origin.get("monotonic-ns"), 2.0**63)
    return found


def _numbers(value: object, most: int, largest: float) -> Array | None:
    """None in the list: not known (NaN)."""
    if not isinstance(value, list) or len(value) > most:
        return None
    found = [math.nan if one is None else number_of(one, largest) for one in value]
    return None if None in found else np.array(found, dtype=np.float64)


def _residency(value: object, length: int, about: str, problems: Problems) -> NDArray[np.int8] | None:
    if value is None:
        return None
    bins = number_of(object_of(value).get("bins"), 1024, 1)
    columns = list_of(object_of(value).get("columns"), MAX_POINTS)
    good = bins is not None and len(columns) == length
    if not good or not all(isinstance(one, str) and one.isascii() and len(one) == bins for one in columns):
        problems.add(f"{about}: its residency is not one text of as many characters for each time, and was left out")
        return None
    levels: NDArray[np.int8] = _LEVELS[np.frombuffer("".join(columns).encode(), dtype=np.uint8).reshape(length, -1)]
    if (levels < 0).any():
        problems.add(f"{about}: its residency has characters that are none of base64, and was left out")
        return None
    return levels


def _faults(value: Json) -> Faults | None:
    at_ms = _numbers(value.get("at-ms"), MAX_FAULTS, MAX_MS)
    place = _numbers(value.get("page"), MAX_FAULTS, 1.0)
    us = _numbers(value.get("total-us"), MAX_FAULTS, MAX_NUMBER)
    if at_ms is None or place is None or us is None or not len(at_ms) == len(place) == len(us) > 0:
        return None
    known = ~(np.isnan(at_ms) | np.isnan(place) | np.isnan(us))
    return Faults(at_ms[known], place[known], us[known]) if known.any() else None


def _histogram(value: Json) -> Histogram | None:
    edges = _numbers(value.get("bucket-edges-ns"), MAX_BUCKETS, MAX_NUMBER)
    counts = _numbers(value.get("bucket-counts"), MAX_BUCKETS, MAX_NUMBER)
    if edges is None or counts is None or len(edges) != len(counts):
        return None
    known = (counts > 0) & ~np.isnan(edges)
    if not known.any():
        return None
    order = np.argsort(edges[known], kind="stable")
    upto_us, counts = np.maximum(edges[known][order], 1) / 1e3, counts[known][order]
    total, most = number_of(value.get("sum-ns"), 2.0**70), number_of(value.get("max-ns"))
    upto_us[-1] = min(
        float(upto_us[-1]), max((most or MAX_NUMBER) / 1e3, float(upto_us[-2]) if len(upto_us) > 1 else 0.001)
    )
    return Histogram(
        upto_us, counts, float((upto_us * counts).sum()) if total is None else total / 1e3, float(upto_us[-1])
    )
