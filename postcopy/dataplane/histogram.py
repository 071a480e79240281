# SPDX-License-Identifier: Apache-2.0
"""Latencies as the core counts them: log-linear, 32 steps in each power of two, so off by 3 % at most."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from postcopy._native import ffi, lib


class Histogram:
    """A snapshot; what the core counts afterwards is not in it. All values in nanoseconds."""

    def __init__(self) -> None:
        self._struct: Any = ffi.new("struct pc_histogram *")

    @property
    def struct(self) -> Any:
        """The `struct pc_histogram *`, for the core to fill."""
        return self._struct

    @property
    def count(self) -> int:
        return int(self._struct.count)

    @property
    def sum_ns(self) -> int:
        """Exact: it is kept beside the buckets."""
        return int(self._struct.sum_ns)

    @property
    def max_ns(self) -> int:
        return int(self._struct.max_ns)

    def add(self, ns: int) -> None:
        lib.pc_histogram_add(self._struct, ns)

    def merge(self, other: Histogram) -> None:
        lib.pc_histogram_merge(self._struct, other._struct)

    def subtract(self, earlier: Histogram) -> None:
        """Leaves what is not in an earlier snapshot of the same; the maximum stays that of both."""
        lib.pc_histogram_subtract(self._struct, earlier._struct)

    def percentile(self, percentile: float) -> int:
        """The value that `percentile` (0 to 100) percent do not exceed: the upper edge of its bucket, 0 when empty."""
        if not 0 <= percentile <= 100:
            raise ValueError(f"a percentile is between 0 and 100, not {percentile}")
        return int(lib.pc_histogram_percentile(self._struct, percentile))

    def below(self, exponent: int) -> int:
        """How many values are less than 2 to the power of `exponent` ns (5 to 63): exact, a bucket ends there."""
        if not 5 <= exponent <= 63:
            raise ValueError(f"no bucket ends at 2^{exponent}")
        return sum(self._struct.buckets[0 : (exponent - 4) * 32])

    def between(self, limits_ns: Sequence[int]) -> list[int]:
        """How many values are less than the first of these rising limits (of 64 ns or more), how many from there to the
        next one, and so on; the last number is of those above all. A limit is taken to be the edge of a bucket that is
        nearest: 2 % off at most."""
        counts: list[int] = ffi.unpack(self._struct.buckets, len(self._struct.buckets))
        ends = [0]
        for limit_ns in limits_ns:
            exponent = limit_ns.bit_length() - 1
            ends.append((exponent - 4) * 32 + round((limit_ns - (1 << exponent)) * 32 / (1 << exponent)))
        ends.append(len(counts))
        return [sum(counts[low:high]) for low, high in pairwise(ends)]

    def buckets(self) -> list[tuple[int, int]]:
        """Those that have any values: the highest that each can have, and how many there are."""
        counts: list[int] = ffi.unpack(self._struct.buckets, len(self._struct.buckets))
        return [(int(lib.pc_histogram_bucket_edge(i)), count) for i, count in enumerate(counts) if count]

    def __repr__(self) -> str:
        return f"<Histogram: {self.count} values, p50 {self.percentile(50)} ns, max {self.max_ns} ns>"


RECENT_S = 0.5


@dataclass(frozen=True)
class Recent:
    """What has been counted in an interval."""

    interval_ns: int
    count: int
    p50_ns: int
    p99_ns: int

    def fields(self) -> dict[str, Any]:
        """Those of its record."""
        p50, p99 = (round(ns / 1e3, 1) for ns in (self.p50_ns, self.p99_ns))
        return {"interval_ms": round(self.interval_ns / 1e6, 1), "count": self.count, "p50": p50, "p99": p99}


class RecentWindow:
    """The newest interval, `RECENT_S` long at least, between two of those looks that are made anyway: several who look
    see the same."""

    def __init__(self) -> None:
        self.recent: Recent | None = None  # none has passed yet
        self._from_ns = time.monotonic_ns()
        self._before = Histogram()

    def look(self, now: Histogram) -> Recent | None:
        """With a new snapshot, which is kept."""
        interval_ns = time.monotonic_ns() - self._from_ns
        if interval_ns >= RECENT_S * 1e9:
            difference = Histogram()
            difference.merge(now)
            difference.subtract(self._before)
            percentile = difference.percentile
            self.recent = Recent(interval_ns, difference.count, percentile(50), percentile(99))
            self._before, self._from_ns = now, self._from_ns + interval_ns
        return self.recent
