# SPDX-License-Identifier: Apache-2.0
"""What a peer says at the end that it has counted: what is no sensible number is shown as none."""

from __future__ import annotations

import pytest

from postcopy.migration.statistics import Breakdown, Statistics

LIES = [None, True, False, -1, 1.5, 0.0, "fast", b"7", [1], {"a": 1}, 1 << 53, (1 << 63) - 1, (1 << 64) - 1, 1 << 70]


@pytest.mark.parametrize("lie", LIES, ids=repr)
def test_a_lie_is_not_known(lie: object) -> None:
    told = Statistics().with_source({"downtime_ns": lie, "total_ns": lie, "iteration": 3, "dirty_pages_rate": 0})
    assert (told.downtime_ns, told.total_ns, told.iteration, told.dirty_pages_rate) == (None, None, 3, 0)
    assert Breakdown(arm_ns=5).with_wire({"stop_ns": lie, "dirty_ns": 2, "arm_ns": lie}) == Breakdown(
        dirty_ns=2, arm_ns=5
    )
    assert Breakdown(arm_ns=5).with_wire(lie) == Breakdown(arm_ns=5)


@pytest.mark.parametrize("lie", LIES, ids=repr)
def test_of_a_destination(lie: object) -> None:
    told = Statistics.from_wire({"demand_pages": lie, "latency": {"p99_ns": lie}, "blocktime_ns": [lie]})
    assert (told.demand_pages, told.latency.p99_ns, told.blocktime_ns) == (0, 0, (0,))


def test_nothing_less_than_all_remains() -> None:
    assert Statistics.from_wire({"total_bytes": 4096, "resident_bytes": 8192}).remaining_bytes == 0
