# SPDX-License-Identifier: Apache-2.0
"""What a migration counts.

`Statistics` is what a side knows of a migration. The destination knows what a fault cost and what arrived, the source
for how long the machine did not run; they exchange this with `complete` (`to_wire`, `from_wire`) and `complete-ack`,
so both report the same numbers. A number that this side does not know is None.

How a number is called where it is shown, and its unit there, say the records (`postcopy.records.migration`), which
`postcopy.service.report` makes from these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeGuard

from postcopy.dataplane.counters import PagerStatistics, PageServerStatistics
from postcopy.dataplane.histogram import Histogram, Recent


def milliseconds(ns: int) -> float:
    return round(ns / 1e6, 3)


@dataclass(frozen=True)
class Latency:
    """Of demand faults, from the event read to the thread woken."""

    count: int = 0
    p50_ns: int = 0
    p99_ns: int = 0
    p999_ns: int = 0
    max_ns: int = 0

    @classmethod
    def of(cls, histogram: Histogram) -> Latency:
        percentile = histogram.percentile
        return cls(histogram.count, percentile(50), percentile(99), percentile(99.9), histogram.max_ns)


@dataclass
class Recoveries:
    """How often a migration was cut and went on, and how long that took: from the loss noticed to all channels anew."""

    count: int = 0
    last_ns: int = 0
    max_ns: int = 0
    total_ns: int = 0

    def add(self, duration_ns: int) -> None:
        self.count += 1
        self.last_ns = duration_ns
        self.max_ns = max(self.max_ns, duration_ns)
        self.total_ns += duration_ns


@dataclass(frozen=True)
class Breakdown:
    """Where the downtime went. The source's parts follow each other and are all of it, by the source's clock; those of
    the destination, by its own clock, are a part of `prepared_ns` (arm, load) and of `commit_ns` (first run). None: not
    known."""

    stop_ns: int | None = None  # source: until the machine had stopped
    dirty_ns: int | None = None  # until it was known what had changed
    state_ns: int | None = None  # until the state was saved
    send_ns: int | None = None  # until that was sent, with what had to be told about pages before
    prepared_ns: int | None = None  # until the destination was prepared; with the pages that are sent meanwhile
    commit_ns: int | None = None  # until it was known that the machine runs there
    arm_ns: int | None = None  # destination: what had changed was made missing
    load_ns: int | None = None  # the state was loaded
    first_run_ns: int | None = None  # from `commit` to a vCPU in the machine

    def to_wire(self) -> dict[str, int]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def with_wire(self, table: object) -> Breakdown:
        """With the peer's parts, where it has told them and they are not known here."""
        return Breakdown(**_told(table, vars(self)) | self.to_wire())


@dataclass(frozen=True)
class Statistics:
    """Of one migration."""

    downtime_ns: int | None = None
    total_ns: int | None = None
    transferred_bytes: int | None = None
    resident_bytes: int | None = None
    total_bytes: int | None = None
    page_bytes: int | None = None  # of the first block
    demand_pages: int | None = None
    prefetched_pages: int | None = None
    prefetch_hits: int | None = None
    background_pages: int | None = None
    zero_pages: int | None = None
    duplicate_pages: int | None = None
    requests: int | None = None
    released_bytes: int | None = None
    pending_faults: int | None = None
    iteration: int | None = None  # rounds of precopy that were begun
    dirty_sync_count: int | None = None  # how often it was looked which pages had been written
    dirty_pages_rate: int | None = None  # pages a second, of the last round
    precopy_bytes: int | None = None  # before the commit
    postcopy_bytes: int | None = None
    compressed_bytes: int | None = None  # payloads as they were on the wire, and
    uncompressed_bytes: int | None = None  # what they stand for
    latency: Latency = Latency()
    recent: Recent | None = None  # the same, in the newest interval that was looked at
    blocktime_ns: tuple[int, ...] = ()  # by vCPU
    bins: bytes = b""  # which parts of the memory are there, see `DataPlane.bins`

    @property
    def remaining_bytes(self) -> int | None:
        if self.total_bytes is None or self.resident_bytes is None:
            return None
        return max(0, self.total_bytes - self.resident_bytes)  # the peer may have told nonsense

    @classmethod
    def of(cls, counted: PagerStatistics | PageServerStatistics, **more: Any) -> Statistics:
        """What the core has counted, under the same names."""
        same: dict[str, Any] = {
            name: getattr(counted, name) for name in cls.__dataclass_fields__ if name in counted.__dataclass_fields__
        }
        return cls(transferred_bytes=counted.bytes_received + counted.bytes_sent, **same, **more)

    def told_by_source(self) -> dict[str, int]:
        """What only the source knows, for `complete-ack`."""
        return {name: value for name in _OF_SOURCE if (value := getattr(self, name)) is not None}

    def with_source(self, table: Mapping[str, Any]) -> Statistics:
        return replace(self, **_told(table, _OF_SOURCE))

    def to_wire(self) -> dict[str, Any]:
        table: dict[str, Any] = {name: getattr(self, name) for name in _ON_WIRE}
        return table | {"latency": vars(self.latency), "blocktime_ns": list(self.blocktime_ns)}

    @classmethod
    def from_wire(cls, table: Mapping[str, Any]) -> Statistics:
        """What the peer has counted. What is no sensible number there is 0."""
        latency, blocktime = table.get("latency"), table.get("blocktime_ns")
        latency = latency if isinstance(latency, Mapping) else {}
        told: dict[str, Any] = {name: natural(table.get(name)) for name in _ON_WIRE}
        return cls(
            **told,
            latency=Latency(*(natural(latency.get(each.name)) for each in fields(Latency))),
            blocktime_ns=tuple(natural(value) for value in blocktime[:64]) if isinstance(blocktime, list) else (),
        )


_ON_WIRE = (
    "transferred_bytes", "resident_bytes", "total_bytes", "page_bytes", "demand_pages", "prefetched_pages",
    "prefetch_hits", "background_pages", "zero_pages", "duplicate_pages", "requests", "pending_faults",
    "precopy_bytes", "postcopy_bytes",
)  # fmt: skip
"""What is told as it was counted. The source's times go with `complete-ack`, and the rest is of one side's host."""


_OF_SOURCE = (
    "downtime_ns", "total_ns", "iteration", "dirty_sync_count", "dirty_pages_rate", "compressed_bytes",
    "uncompressed_bytes",
)  # fmt: skip


_SENSIBLE = 1 << 53
"""What is told is less than this: 104 days, 8 PiB. Readers of JSON take greater numbers for others."""


def natural(value: object) -> int:
    """A number of the peer, or 0 for anything else."""
    return value if _is_sensible(value) else 0


def _is_sensible(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _SENSIBLE


def _told(table: object, names: Iterable[str]) -> dict[str, Any]:
    """What the peer has told of these. What is no sensible number is not known: 0 would say that there was none."""
    theirs = table if isinstance(table, Mapping) else {}
    return {name: theirs[name] for name in names if _is_sensible(theirs.get(name))}
