# SPDX-License-Identifier: Apache-2.0
"""`postcopy bench scale`, small: the first points of some dimensions, with real processes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from postcopy.records.results import Measurement
from postcopy.testbed.bench import _scale, _scale_moves
from postcopy.testbed.bench._common import medians


async def curves(name: str, *points: float) -> dict[str, Measurement]:
    """By what they measure: all costs have a value at each point."""
    dimension = replace(_scale.DIMENSIONS[name], points=points)
    curves = _scale.Curves(name, dimension)
    await curves.add_round(math.inf)
    found = curves.measurements()
    costs = {cost.what for cost in dimension.costs.values()}
    by_cost = {measurement.name.removeprefix(f"{name}: "): measurement for measurement in found}
    assert by_cost.keys() == costs, [measurement.note for measurement in found]
    for measurement in found:
        assert all(value > 0 for value in medians(measurement).values()), measurement
        assert len(measurement.values) == len(points), measurement
    return by_cost


@pytest.mark.slow
@pytest.mark.needs("uffd")
async def test_waiting_threads_and_userfaultfds(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = await curves("pending", 50)
    assert waiting["all answered at once"].values.keys() == {"50"}
    monkeypatch.setattr(_scale, "STRIPED_BYTES", 8 << 20)
    await curves("userfaultfds", 3)


@pytest.mark.slow
@pytest.mark.needs("uffd")
async def test_machines_of_a_daemon_and_a_slow_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_scale_moves, "IDLE_S", 0.2)
    monkeypatch.setattr(_scale_moves, "FAULTS_S", 0.3)
    await curves("machines", 2)
    found = await curves("delay", 20)
    assert found["fault p50"].curve is not None
    (round_trip_ms,) = found["fault p50"].curve.at.values()
    assert round_trip_ms >= 20
    (fault_ms,) = medians(found["fault p50"]).values()
    assert fault_ms >= 19.5  # buckets of a histogram


@pytest.mark.slow
@pytest.mark.needs("uffd")
async def test_a_sparse_machine_that_this_host_could_not_hold() -> None:
    found = await _scale_moves.move(*_scale_moves.WORK, *_scale_moves.USED, "--memory", "128GiB", sparse=True)
    assert found["switchover"] > 0
    assert found["resident"] < 1024
