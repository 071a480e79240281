# SPDX-License-Identifier: Apache-2.0
"""How far a guest's throughput fell, and when it was back: on counts that were made by hand."""

from __future__ import annotations

import itertools
import random

import pytest

from postcopy._throughput import STEADY_MS, WINDOW_MS, joined, throughput

BEGIN_MS = 1000.0


def steady(begin_ms: int, end_ms: int, first: int, per_100_ms: int) -> list[tuple[float, float]]:
    return [(at_ms, first + per_100_ms * n) for n, at_ms in enumerate(range(begin_ms, end_ms + 1, 100))]


def pieces(*rates: tuple[float, float]) -> list[tuple[float, float]]:
    """One second of 10 operations a millisecond, and then of each (milliseconds, operations a millisecond)."""
    points, at_ms, count = [(0.0, 0.0), (BEGIN_MS, 10_000.0)], BEGIN_MS, 10_000.0
    for length_ms, rate in rates:
        at_ms, count = at_ms + length_ms, count + length_ms * rate
        points.append((at_ms, count))
    return points


def reported(points: list[tuple[float, float]], every: float, period_ms: float) -> list[tuple[float, float]]:
    """The same as a recording has it: the guest reports after so many operations, and is looked at so often."""
    found, at_ms = [], points[0][0]
    for one, other in itertools.pairwise(points):
        while at_ms <= other[0]:
            count = one[1] + (other[1] - one[1]) * (at_ms - one[0]) / (other[0] - one[0])
            found.append((at_ms, count // every * every))
            at_ms += period_ms
    return found


@pytest.mark.parametrize(
    ("rates", "dip", "back_ms"),
    [
        ([(3000, 10)], 0.0, 0.0),
        ([(3000, 12)], 0.0, 0.0),
        ([(200, 0), (3000, 10)], 1.0, 180.0),  # 180 on, a window has 20 ms of standstill: a tenth
        ([(150, 0), (3000, 10)], 0.75, 130.0),
        ([(1000, 5), (3000, 10)], 0.5, 960.0),
        ([(1000, 8.9), (300, 9.1), (1000, 8.9), (3000, 10)], 0.11, 2300 - 2000 / 11),  # 300 ms are not enough
        ([(1000, 5), (700, 9.5), (1000, 5)], 0.5, 1000 - 200 / 9),
        ([(3000, 5)], 0.5, None),
        ([(300, 5), (550, 10)], 0.5, None),  # the recording ends too early to know
    ],
)
def test_how_far_it_falls_and_when_it_is_back(
    rates: list[tuple[float, float]], dip: float, back_ms: float | None
) -> None:
    points = joined(pieces(*rates), [], None, None)
    found = throughput(points, BEGIN_MS, BEGIN_MS)
    assert found is not None
    assert found.before == pytest.approx(10_000)
    assert found.dip == pytest.approx(dip, abs=1e-9)
    assert found.back_ms == (back_ms if back_ms is None else pytest.approx(back_ms))


def test_no_window_is_lower_than_the_lowest() -> None:
    """It looks at some of the windows only."""
    dice = random.Random(5)
    points = pieces(*((dice.uniform(5, 150), dice.choice((0, 3, 9, 10, 14))) for _ in range(60)))
    found = throughput(joined(points, [], None, None), BEGIN_MS, BEGIN_MS)
    assert found is not None

    def count(at_ms: float) -> float:
        one, other = next(pair for pair in itertools.pairwise(points) if pair[0][0] <= at_ms <= pair[1][0])
        return one[1] + (other[1] - one[1]) * (at_ms - one[0]) / (other[0] - one[0])

    steps = range(int(BEGIN_MS), int(points[-1][0] - WINDOW_MS))
    tried = min((count(at_ms + WINDOW_MS) - count(at_ms)) / WINDOW_MS * 1e3 for at_ms in steps)
    assert found.least <= tried + 1e-6
    assert found.least == pytest.approx(tried, abs=150)


@pytest.mark.parametrize("every", [16, 256, 512])
@pytest.mark.parametrize("period_ms", [2.5, 20.0])
def test_reports_of_a_guest_that_goes_on_evenly_are_no_dip(every: int, period_ms: float) -> None:
    points = joined(reported(pieces((3000, 10)), every, period_ms), [], None, None)
    found = throughput(points, BEGIN_MS, BEGIN_MS)
    assert found is not None
    assert found.dip < 0.1  # 20 ms of 200: when the count rose is not known better
    assert found.back_ms is not None


@pytest.mark.parametrize("every", [16, 256, 512])
def test_a_standstill_is_one_however_rarely_the_guest_reports(every: int) -> None:
    points = joined(reported(pieces((400, 0), (3000, 10)), every, 5.0), [], None, None)
    found = throughput(points, BEGIN_MS, BEGIN_MS)
    assert found is not None
    assert found.dip == 1.0
    assert found.back_ms == pytest.approx(380, abs=every / 10 + 5)


def test_the_count_goes_on_at_the_destination_where_it_was() -> None:
    # It knows nothing before the guest's first report there, and its first points are older than the last ones here.
    here, there = [(0.0, 10.0), (50.0, 60.0), (120.0, 60.0)], [(40.0, 0.0), (110.0, 0.0), (150.0, 80.0)]
    assert joined(here, there, 90.0, 100.0) == [(0.0, 10.0), (50.0, 60.0), (90.0, 60.0), (100.0, 60.0), (150.0, 80.0)]
    assert joined(here, there, 90.0, None) == here[:2]
    assert joined([], there, 90.0, 100.0) == [(90.0, 0.0), (100.0, 0.0), (150.0, 80.0)]
    assert joined(here, there, 100.0, 90.0) == here[:2]  # no machine runs before it was paused


def test_the_pause_is_a_standstill() -> None:
    here = reported(pieces((1, 10)), 256, 5.0)
    there = [(at_ms, max(0.0, 10_000 + 10 * (at_ms - 1500) // 256 * 256)) for at_ms in range(1500, 4000, 5)]
    found = throughput(joined(here, there, BEGIN_MS, 1500.0), BEGIN_MS, BEGIN_MS)
    assert found is not None
    assert found.dip == 1.0
    assert found.back_ms == pytest.approx(480, abs=30)


def test_without_a_time_before_there_is_no_comparison() -> None:
    assert throughput([], 0, 0) is None
    assert throughput(steady(0, 2000, 0, 1000), 100, 300) is None  # too short before it began
    assert throughput([(0, 5), (2000, 5)], 1000, 1000) is None  # it did nothing
    assert throughput(steady(0, 1100, 0, 1000), 1000, 1000) is None  # no whole window after it


def test_counts_of_a_hundred_years_take_no_longer() -> None:
    points = [(n * 1e9, n * 1e3) for n in range(4096)]
    found = throughput(points, 1e12, 1e12)
    assert found is not None
    assert found.back_ms == 0.0
    assert STEADY_MS < 1e9
