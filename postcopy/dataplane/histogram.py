# SPDX-License-Identifier: Apache-2.0
"""Latencies as the core counts them: log-linear, 32 steps in each power of two, so off by 3 % at most."""

from __future__ import annotations

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

    def below_about(self, ns: int) -> int:
        """How many values are less than this, which may be off by the values within 2 % of it: an edge of a bucket is
        as near."""
        if ns < 64:
            raise ValueError(f"no bucket ends near {ns} ns")
        exponent = ns.bit_length() - 1
        steps = round((ns - (1 << exponent)) * 32 / (1 << exponent))
        return sum(self._struct.buckets[0 : (exponent - 4) * 32 + steps])

    def __repr__(self) -> str:
        return f"<Histogram: {self.count} values, p50 {self.percentile(50)} ns, max {self.max_ns} ns>"
