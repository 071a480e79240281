# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.dataplane.histogram import Histogram


def test_empty() -> None:
    histogram = Histogram()
    assert (histogram.count, histogram.sum_ns, histogram.max_ns, histogram.percentile(99)) == (0, 0, 0, 0)


@given(st.lists(st.integers(0, 1 << 50), min_size=1, max_size=200), st.floats(0, 100))
def test_percentiles_are_off_by_three_percent_at_most(values: list[int], percentile: float) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    assert histogram.count == len(values)
    assert histogram.sum_ns == sum(values)
    assert histogram.max_ns == max(values)
    found = histogram.percentile(percentile)
    assert found <= max(values)
    enough = sum(value <= found * 1.0 for value in values)
    assert enough >= len(values) * percentile / 100 - 1e-6
    assert any(value <= found <= value * 1.04 + 1 for value in values)


def test_merge() -> None:
    one, two = Histogram(), Histogram()
    one.add(10)
    two.add(1000)
    one.merge(two)
    assert (one.count, one.sum_ns, one.max_ns) == (2, 1010, 1000)


@pytest.mark.parametrize("percentile", [-1, 100.1, float("nan")])
def test_what_is_no_percentile(percentile: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 100"):
        Histogram().percentile(percentile)


@given(st.lists(st.integers(0, 1 << 40), max_size=200))
def test_between_limits(values: list[int]) -> None:
    """Every value is counted once, on the right side of each limit, unless it is near."""
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    limits = [1000 << number for number in range(1, 24)]
    counts = histogram.between(limits)
    assert len(counts) == len(limits) + 1
    assert sum(counts) == len(values)
    for place, limit in enumerate(limits, 1):
        below = sum(counts[:place])
        assert sum(value < limit * 0.98 for value in values) <= below <= sum(value < limit * 1.02 for value in values)


def test_subtract_what_is_not_earlier() -> None:
    """Another process counts, which may say what it likes: less than before is none, and never some 2^64."""
    now, before = Histogram(), Histogram()
    for ns in (10, 10, 1000):
        now.add(ns)
    for ns in (10, 1000, 1000, 5000):
        before.add(ns)
    now.subtract(before)
    assert (now.count, now.sum_ns, now.buckets()) == (1, 0, [(10, 1)])
