# SPDX-License-Identifier: Apache-2.0
"""How a curve is fitted, judged, measured within its time, and shown."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import trio
import trio.testing

from postcopy.errors import MigrationError
from postcopy.records import as_json
from postcopy.records.results import Measurement
from postcopy.testbed.bench import _scale
from postcopy.testbed.bench._common import Found
from postcopy.testbed.bench._scale import Cost, Dimension, measure_scale, sparkline, text_scale
from postcopy.testbed.bench._scale_fit import fit, last_exponent, t95

XS = (1.0, 4.0, 16.0, 64.0, 256.0)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_a_power_law_is_found(exponent: float) -> None:
    found = fit(XS, [3 * x**exponent for x in XS])
    assert found is not None
    assert found.points == len(XS)
    assert (found.exponent, found.low, found.high) == pytest.approx((exponent, exponent, exponent), abs=1e-6)


def test_a_straight_line_is_found_over_decades() -> None:
    ys = [5 + 0.25 * x for x in XS]
    found = fit(XS, ys)
    assert found is not None
    assert (found.base, found.slope) == pytest.approx((5, 0.25))
    # No power law: the interval says so, and the exponent at the end is larger than that of all.
    assert found.low < found.exponent < found.high
    assert found.exponent < last_exponent(XS, ys) < 1


def test_neither_part_of_the_line_is_below_zero() -> None:
    falling, steep = fit(XS, [9, 7, 5, 3, 1]), fit(XS, [x**2 for x in XS])
    assert falling is not None
    assert steep is not None
    assert falling.slope == 0
    assert falling.base > 0
    assert steep.base == 0
    assert steep.slope > 0


def test_the_interval_holds_what_is_true_as_often_as_it_says() -> None:
    generator, held = random.Random(3), 0
    for _ in range(1000):
        found = fit(XS, [7 * x**0.6 * math.exp(generator.gauss(0, 0.2)) for x in XS])
        assert found is not None
        held += found.low <= 0.6 <= found.high
    assert 920 <= held <= 980


def test_what_cannot_be_fitted() -> None:
    assert fit((1, 2), (1, 2)) is None
    assert fit((1, 2, 2), (1, 2, 3)) is None
    assert fit((1, 2, 4), (1, 0, 3)) is None
    assert fit((1, 2, 4), (1, -1, 3)) is None


def test_students_t() -> None:
    assert [round(t95(degrees), 2) for degrees in (1, 10, 11, 30, 1000)] == [12.71, 2.23, 2.20, 2.04, 1.96]


def test_the_height_of_a_curve_is_its_growth() -> None:
    assert sparkline(XS, [2.0] * 5) == "▁▁▁▁▁"
    linear = sparkline(XS, [3 * x for x in XS])
    assert (linear[0], linear[-1]) == ("▁", "█")
    assert list(linear) == sorted(linear)
    assert sparkline(XS, [x**2 for x in XS])[-3:] == "███"
    assert sparkline(XS, [0, 1, 1, 1, 1]) == "?????"


def dimension(**costs: float | None) -> Dimension:
    """Costs grow with the exponent of their name, and have a goal; x 64 does not exist, and 256 lacks one of them."""

    async def measure(x: float) -> dict[str, float]:
        await trio.sleep(1)
        if x == 64:
            raise MigrationError("this host has no 64 things")
        values = {name: 2 * x ** float(name.removeprefix("as_")) for name in costs}
        return values if x < 256 else dict(list(values.items())[:1])

    return Dimension("things", "1", XS, measure, {name: Cost(name, "us", goal) for name, goal in costs.items()})


async def measured(some: Dimension, rounds: int, within_s: float = math.inf) -> list[Measurement]:
    """As the only dimension."""
    found = Found(lambda _: None)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(_scale, "DIMENSIONS", {"some": some})
        await measure_scale({"rounds": rounds, "within": within_s}, found)
    return found.measurements


async def test_a_dimension_as_curves(autojump_clock: trio.testing.MockClock) -> None:
    linear, flat = await measured(dimension(as_1=0.5, as_0=0.1), 3)
    assert list(linear.values) == ["1", "4", "16", "256"]
    assert list(flat.values) == ["1", "4", "16"]
    assert linear.values["16"].rounds == [32.0] * 3
    assert linear.curve is not None
    assert linear.curve.at == {"1": 1, "4": 4, "16": 16, "256": 256}
    assert (linear.reached, flat.reached) == (False, True)
    assert linear.result == pytest.approx(1)
    assert "left out: 64: this host has no 64 things" in str(linear.note)
    assert as_json(linear)["curve"]["fit"]["points"] == 4
    text = text_scale([linear, flat], 100)
    assert "goal 0.5: NOT REACHED" in text
    assert "goal 0.1: reached" in text
    assert max(map(len, text.splitlines())) <= 100


async def test_no_round_is_begun_that_would_be_late(autojump_clock: trio.testing.MockClock) -> None:
    (found,) = await measured(dimension(as_1=None), 9, 17)
    assert found.reached is None
    assert len(found.values["1"].rounds) == 3  # each takes five seconds
    # Of a round that is late nothing counts, but of the first what was done.
    (found,) = await measured(dimension(as_1=None), 1, 2.5)
    assert list(found.values) == ["16", "256"]
    assert "left out: 1, 4, 64: there was no time left" in str(found.note)
    with pytest.raises(MigrationError, match="there was no time left"):
        await measured(dimension(as_1=None), 1, 0.5)


async def test_what_is_done_is_kept_when_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    found = Found(lambda _: None)
    monkeypatch.setattr(_scale, "DIMENSIONS", {"some": dimension(as_1=None)})
    with trio.move_on_after(2.5):
        await measure_scale({}, found)
    (curve,) = found.measurements
    assert list(curve.values) == ["16", "256"]


async def test_drift_is_not_taken_for_growth(autojump_clock: trio.testing.MockClock) -> None:
    """A host that becomes ten times as slow meanwhile: in the order of the points it would be an exponent of 0.4."""
    began_s = trio.current_time()

    async def measure(x: float) -> dict[str, float]:
        await trio.sleep(1)
        return {"cost": 1 + 9 * (trio.current_time() - began_s) / 125}

    (found,) = await measured(Dimension("things", "1", XS, measure, {"cost": Cost("cost", "us", 0.1)}), 25)
    assert found.result is not None
    assert abs(found.result) < 0.06


async def test_a_point_that_fails_once_is_that_of_the_other_rounds(autojump_clock: trio.testing.MockClock) -> None:
    calls = 0

    async def measure(x: float) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise MigrationError("it failed")
        return {"cost": x}

    (found,) = await measured(Dimension("things", "1", XS, measure, {"cost": Cost("cost", "us")}), 3)
    assert sorted(value.rounds.count(None) for value in found.values.values()) == [0, 0, 0, 0, 1]
    assert found.note is None
    assert found.result == pytest.approx(1)


async def test_what_goes_wrong_in_a_process_is_of_one_point() -> None:
    async def measure(x: float) -> dict[str, float]:
        if x == 1:
            raise BaseExceptionGroup("", [MigrationError("it failed")])
        if x == 4:
            raise trio.TooSlowError
        return {"cost": x}

    some = Dimension("things", "1", XS, measure, {"cost": Cost("cost", "us")})
    (found,) = await measured(some, 1)
    assert list(found.values) == ["16", "64", "256"]
    assert found.note == "left out: 1: it failed; left out: 4: it was not done in time"
    with pytest.raises(MigrationError, match="some: no point could be measured: it was not done in time"):
        await measured(Dimension("things", "1", (1.0, 4.0), measure, {}), 1)


async def test_the_time_is_shared(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    cheap, dear = dimension(as_1=None), dimension(as_1=None)
    dear.costs["as_0"] = Cost("as_0", "us")

    async def slow(x: float) -> dict[str, float]:
        await trio.sleep(2)
        return {"as_1": x}

    monkeypatch.setattr(_scale, "DIMENSIONS", {"cheap": cheap, "dear": replace(dear, measure=slow)})
    monkeypatch.setattr(_scale, "BUDGET_S", 61.0)
    began_s, found = trio.current_time(), Found(lambda _: None)
    await measure_scale({}, found)
    assert [len(each.values["1"].rounds) for each in found.measurements] == [6, 3]
    assert trio.current_time() - began_s <= 61
    await measure_scale({"rounds": 1, "dimension": ["dear", "dear"]}, found)
    assert [each.name for each in found.measurements] == ["dear: as_1"]
