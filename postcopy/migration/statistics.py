# SPDX-License-Identifier: Apache-2.0
"""What a migration counts: one record, and for each of its numbers one place that says how it is called.

`Statistics` is what a side knows of a migration. The destination knows what a fault cost and what arrived, the source
for how long nobody ran the machine; they tell each other with `complete` (`to_wire`, `from_wire`) and `complete-ack`,
so both report the same numbers. A number that this side does not know is None.

The `Figure` of a number has its JSON key, its label for people and its metric. Results, progress, `ctl status` and the
metrics are made from these: a new number needs its field here, and a line in docs/results.md and docs/operating.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from postcopy.dataplane.counters import PagerStatistics, PageServerStatistics
from postcopy.dataplane.histogram import Histogram


@dataclass(frozen=True)
class Figure:
    """How a number is called where it is shown; empty: it is not shown there."""

    key: str  # JSON
    label: str = ""  # `ctl status`, in the order of the fields
    metric: str = ""  # Prometheus, after ``postcopy_migration_``; times in seconds
    help: str = ""  # the metric's
    counter: bool = False  # the metric's type; else a gauge
    kind: str = ""  # the metric's label `kind`
    of: str = ""  # the attribute that is shown, when it is not the field
    ram: bool = True  # in JSON the key is in `ram`
    wire: bool = True  # sent with `complete`


def _number(key: str, default: int | None = None, **names: Any) -> Any:
    return field(default=default, metadata={"figure": Figure(key, **names)})


def _pages(kind: str, label: str = "") -> Any:
    text = "Pages by how they came: demand, background, zero (never sent), duplicate."
    return _number(f"{kind}-pages", label=label, metric="pages", help=text, counter=True, kind=kind)


def milliseconds(ns: int) -> float:
    return round(ns / 1e6, 3)


def figures(record: type) -> Iterator[Figure]:
    """Those of the numbers of a record, in order."""
    return (each.metadata["figure"] for each in fields(record) if "figure" in each.metadata)


def shown(record: Any) -> Iterator[tuple[Figure, int]]:
    """The numbers of a record that this side knows, in order, and how each is called."""
    for each in fields(record):
        figure = each.metadata.get("figure")
        if figure is not None and (value := getattr(record, figure.of or each.name)) is not None:
            yield figure, value


def as_json(record: object, *, ram: bool = True) -> dict[str, Any]:
    """The numbers of a record by their keys, those of `ram` or the others; times in milliseconds."""
    return {
        figure.key: milliseconds(value) if figure.key.endswith("-ms") else value
        for figure, value in shown(record)
        if figure.ram is ram
    }


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

    def as_json(self) -> dict[str, Any]:
        """In microseconds."""
        times = {"p50": self.p50_ns, "p99": self.p99_ns, "p99.9": self.p999_ns, "max": self.max_ns}
        return {"count": self.count} | {key: round(ns / 1e3, 1) for key, ns in times.items()}


@dataclass
class Recoveries:
    """How often a migration was cut and went on, and how long that took: from the loss noticed to all channels anew."""

    count: int = _number(
        "count", 0, metric="recoveries", help="Cuts after which both sides went on by themselves.", counter=True
    )
    last_ns: int = _number("last-ms", 0)
    max_ns: int = _number("max-ms", 0)
    total_ns: int = _number(
        "total-ms", 0, metric="recovery_seconds", counter=True,
        help="From losses noticed until all channels were there again.",
    )  # fmt: skip

    def add(self, duration_ns: int) -> None:
        self.count += 1
        self.last_ns = duration_ns
        self.max_ns = max(self.max_ns, duration_ns)
        self.total_ns += duration_ns


@dataclass(frozen=True)
class Statistics:
    """Of one migration. Fields are in the order in which `ctl status` shows them."""

    downtime_ns: int | None = _number(
        "downtime-ms", label="Downtime", metric="downtime_seconds", ram=False, wire=False,
        help="From the request to pause until the machine ran on; 0 until then.",
    )  # fmt: skip
    total_ns: int | None = _number(
        "total-ms", label="Total time", metric="duration_seconds", ram=False, wire=False,
        help="From the request to pause until every page had arrived; 0 until then.",
    )  # fmt: skip
    transferred_bytes: int | None = _number(
        "transferred", label="Data processed", metric="transferred_bytes", counter=True,
        help="On data channels, both ways, headers included.",
    )  # fmt: skip
    resident_bytes: int | None = _number(
        "remaining", of="remaining_bytes", label="Data remaining", metric="remaining_bytes",
        help="Memory that has not arrived; a source knows it only when all has.",
    )  # fmt: skip
    total_bytes: int | None = _number(
        "total", label="Data total", metric="memory_bytes", help="Memory that the migration moves."
    )
    page_bytes: int | None = _number("page-size")  # of the first block
    demand_pages: int | None = _pages("demand", "Demand pages")
    background_pages: int | None = _pages("background", "Background pages")
    zero_pages: int | None = _pages("zero", "Zero pages")
    duplicate_pages: int | None = _pages("duplicate")
    requests: int | None = _number(
        "postcopy-requests", label="Page requests", metric="page_requests", help="Requests for pages.", counter=True
    )
    released_bytes: int | None = _number(
        "released", metric="released_bytes", wire=False,
        help="Memory that --release-ram has given back to this host (outgoing).",
    )  # fmt: skip
    pending_faults: int | None = _number(
        "pending-faults", label="Blocked threads", metric="blocked_threads", ram=False,
        help="Threads that wait for a page now.",
    )  # fmt: skip
    latency: Latency = Latency()
    blocktime_ns: tuple[int, ...] = ()  # by vCPU

    @property
    def remaining_bytes(self) -> int | None:
        if self.total_bytes is None or self.resident_bytes is None:
            return None
        return self.total_bytes - self.resident_bytes

    @classmethod
    def of(cls, counted: PagerStatistics | PageServerStatistics, **more: Any) -> Statistics:
        """What the core has counted, under the same names."""
        same = {
            name: getattr(counted, name) for name in cls.__dataclass_fields__ if name in counted.__dataclass_fields__
        }
        return cls(transferred_bytes=counted.bytes_received + counted.bytes_sent, **same, **more)

    def to_wire(self) -> dict[str, Any]:
        table: dict[str, Any] = {name: getattr(self, name) for name in _ON_WIRE}
        return table | {"latency": vars(self.latency), "blocktime_ns": list(self.blocktime_ns)}

    @classmethod
    def from_wire(cls, table: Mapping[str, Any]) -> Statistics:
        """What the peer has counted. What is no sensible number there is 0."""
        latency, blocktime = table.get("latency"), table.get("blocktime_ns")
        latency = latency if isinstance(latency, Mapping) else {}
        return cls(
            **{name: natural(table.get(name)) for name in _ON_WIRE},
            latency=Latency(*(natural(latency.get(each.name)) for each in fields(Latency))),
            blocktime_ns=tuple(natural(value) for value in blocktime[:64]) if isinstance(blocktime, list) else (),
        )


_ON_WIRE = [each.name for each in fields(Statistics) if (figure := each.metadata.get("figure")) and figure.wire]


def natural(value: object) -> int:
    """A number of the peer, or 0 for anything else."""
    return value if type(value) is int and 0 <= value < 1 << 64 else 0
