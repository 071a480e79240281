# SPDX-License-Identifier: Apache-2.0
"""What was counted, as one flat record that travels with `complete` and `complete-ack`: both hosts report the same
numbers.

The destination knows what a fault cost and what came, the source how long nobody ran the machine. A record that
comes from the peer is taken number by number: what is not a sensible number is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from postcopy.dataplane.histogram import Histogram
from postcopy.dataplane.pager import PagerStatistics


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


@dataclass(frozen=True)
class Figures:
    """The destination's numbers."""

    total_bytes: int = 0
    resident_bytes: int = 0
    transferred_bytes: int = 0  # on data channels, both ways, headers included
    page_bytes: int = 0  # of the first block
    demand_pages: int = 0
    background_pages: int = 0
    zero_pages: int = 0
    duplicate_pages: int = 0
    requests: int = 0
    pending_faults: int = 0
    latency: Latency = Latency()
    blocktime_ns: tuple[int, ...] = ()  # by vCPU

    @classmethod
    def of(cls, page_bytes: int, stats: PagerStatistics, latency: Histogram, blocktime_ns: list[int]) -> Figures:
        return cls(
            total_bytes=stats.total_bytes,
            resident_bytes=stats.resident_bytes,
            transferred_bytes=stats.bytes_received + stats.bytes_sent,
            page_bytes=page_bytes,
            demand_pages=stats.demand_pages,
            background_pages=stats.background_pages,
            zero_pages=stats.zero_pages,
            duplicate_pages=stats.duplicate_pages,
            requests=stats.requests,
            pending_faults=stats.pending_faults,
            latency=Latency.of(latency),
            blocktime_ns=tuple(blocktime_ns),
        )

    def to_wire(self) -> dict[str, Any]:
        table: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        table["latency"] = {name: getattr(self.latency, name) for name in _LATENCY}
        table["blocktime_ns"] = list(self.blocktime_ns)
        return table

    @classmethod
    def from_wire(cls, table: Mapping[str, Any]) -> Figures:
        latency, blocktime = table.get("latency"), table.get("blocktime_ns")
        return cls(
            **{name: natural(table.get(name)) for name in _PLAIN},
            latency=Latency(**{name: natural(latency.get(name)) for name in _LATENCY})
            if isinstance(latency, Mapping)
            else Latency(),
            blocktime_ns=tuple(natural(value) for value in blocktime[:64]) if isinstance(blocktime, list) else (),
        )


_LATENCY = tuple(Latency.__dataclass_fields__)
_PLAIN = tuple(name for name in Figures.__dataclass_fields__ if name not in ("latency", "blocktime_ns"))


def natural(value: object) -> int:
    """A number of the peer, or 0 for anything else."""
    return value if type(value) is int and 0 <= value < 1 << 64 else 0
