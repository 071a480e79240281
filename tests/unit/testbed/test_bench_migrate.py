# SPDX-License-Identifier: Apache-2.0
"""`postcopy bench migrate`: its arithmetic on hand-made recordings, and what it makes of cells that fail."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from postcopy.errors import MigrationError
from postcopy.records import as_json
from postcopy.records.commands import DemoResult
from postcopy.records.migration import Check, Latency, Ram
from postcopy.records.results import Measurement
from postcopy.records.timeline import Mark, Origin, Recording, Residency, Series
from postcopy.testbed.bench import _migrate
from postcopy.testbed.bench import _migrate_columns as columns
from postcopy.testbed.bench._common import Found
from postcopy.testbed.bench._migrate import Cell, Plan, conditions, read, sections, text_migrate
from postcopy.units import parse_rate, parse_size

ORIGIN_NS = 5_000_000_000


def recording(origin_ms: float, points: Sequence[tuple[float, int]], **marks: float) -> Recording:
    """Whose time begins `origin_ms` after that of the source. `marks`: by name, in its own time."""
    return Recording(
        origin=Origin(unix_ms=0.0, monotonic_ns=ORIGIN_NS + round(origin_ms * 1e6)),
        period_ms=100.0,
        cost_us=0,
        blocks=[],
        at_ms=[at_ms for at_ms, _ in points],
        series=Series(guest_operations=[count for _, count in points]),
        map=Residency(bins=0, columns=[]),
        marks=[Mark(moment_ms=at_ms, what=name.replace("_", "-")) for name, at_ms in marks.items()],
    )


def steady(begin_ms: int, end_ms: int, first: int, per_100_ms: int) -> list[tuple[float, int]]:
    return [(at_ms, first + per_100_ms * n) for n, at_ms in enumerate(range(begin_ms, end_ms + 1, 100))]


def demo_result(**more: object) -> DemoResult:
    known = {
        "side": "demo",
        "status": "completed",
        "error": None,
        "kind": "rv64",
        "verified": True,
        "verification": [Check(ok=True, what="right", how="looked", counts={"pages-checked": 1000})],
        "downtime_ms": 4.0,
        "ram": Ram(total=4_096_000, transferred=6_144_000, duplicate_pages=17),
        "fault_latency_us": Latency(count=250, p50=70.0, p99=200.0, p99_9=900.0, max=1000.0),
        "blocktime_ms": [10.0, 5.5],
    }
    return DemoResult(**(known | more))  # type: ignore[arg-type]


# The machine does 1000 operations in 100 ms until the pause at 3000; nothing for 400 ms; half as many for 600 ms;
# and again 1000 from 4000 on.
BEFORE = recording(0, [*steady(0, 3000, 0, 1000), (3500, 30_000)], offer=20, round=2000, pause=3000, ended=4500)
AFTER = recording(
    2500,
    [(-500, 0), (900, 30_000), *steady(1000, 1500, 30_500, 500), *steady(1600, 4000, 34_000, 1000)],
    running=900, all_there=1800,
)  # fmt: skip


def test_the_columns_of_one_migration() -> None:
    found = columns.values(demo_result(), BEFORE, AFTER)
    assert found == {
        "downtime": 4.0,
        "total": 2300.0,  # 1800 at the destination is 4300
        "eviction": 2500.0,
        "bytes-over-memory": 1.5,
        "duplicates": 17,
        "faults": 250,
        "faults-over-working-set": 0.25,
        "fault-p50": 70.0,
        "fault-p99": 200.0,
        "fault-p99.9": 900.0,
        "fault-max": 1000.0,
        "blocktime": 15.5,
        "dip": 1.0,  # it stood still for two windows
        "back": pytest.approx(960.0),  # 3960 after the pause at 3000: a window from there has 40 ms at half of it
    }
    assert set(found) == {column.name for column in columns.COLUMNS} - {columns.PREVENTED} | {columns.FAULTS}


def test_what_no_side_has_said_is_not_made_up() -> None:
    bare = demo_result(ram=None, fault_latency_us=None, downtime_ms=None, blocktime_ms=None)
    found = columns.values(bare, recording(0, []), recording(0, []))
    assert found == {"downtime": None, "blocktime": 0}
    assert columns.begin(recording(0, [], offer=20, pause=1020)) == 1020
    no_faults = demo_result(fault_latency_us=Latency(count=0, p50=0.0, p99=0.0, p99_9=0.0, max=0.0))
    found = columns.values(no_faults, BEFORE, AFTER)
    assert found["faults"] == 0
    assert found["faults-over-working-set"] == 0
    assert "fault-p50" not in found


# ---- what is asked of a demo


def test_a_cell_is_a_demo_with_the_options_of_its_policy() -> None:
    plan = Plan(memory=96 << 20, bandwidth=32 << 20, delay=0.0025)
    assert plan.window_s == 4.5
    words = plan.arguments("demand", "write-heavy", 7, "file")
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert (parse_size(given["--memory"]), given["--workload"], given["--seed"]) == (96 << 20, "dirty", "7")
    assert given["--run-for"] == "9.5"  # 4.5 without a push, 3 of push, 2
    assert (given["--push-after"], given["--record-working-set"]) == ("4.5", "file")
    kind, _, settings = given["--chaos"].partition(":")
    parts = dict(part.split("=") for part in settings.split(","))
    assert (kind, parse_rate(parts["rate"]), parts["delay"]) == ("slow", 32 << 20, "0.0025")
    assert "--working-set" in plan.arguments("+working-set", "zipf", 1, "file")
    assert "--push-after" not in plan.arguments("demand+push", "zipf", 1, "file")
    assert "--chaos" not in Plan(bandwidth=0).arguments("demand", "zipf", 1, "file")
    assert Plan(bandwidth=0).window_s == 1.0
    assert (plan.deadline_s, Plan(memory=1 << 30, bandwidth=10 << 20).deadline_s) == (120.0, 2048.0)


# ---- cells that fail


def faults(count: int) -> dict[str, float | None]:
    return {"faults": count, "faults-over-working-set": count / 1000, "downtime": 2.0, "processors": 1.8}


async def compared(
    monkeypatch: pytest.MonkeyPatch, plan: Plan, rounds: int, counts: dict[str, list[int | None]]
) -> tuple[list[Cell], list[str]]:
    """`counts`: how many faults each run of a policy has; None: it fails."""
    left = {policy: list(of_it) for policy, of_it in counts.items()}

    async def migrate(arguments: Sequence[str], deadline_s: float, recorded: object) -> dict[str, float | None]:
        learned, learns = "--working-set" in arguments, "--push-after" in arguments
        count = left["+working-set" if learned else "demand" if learns else "demand+push"].pop(0)
        if count is None:
            raise MigrationError("the memory is not as it must be")
        return faults(count)

    said: list[str] = []
    monkeypatch.setattr(_migrate, "migrate", migrate)
    kept: list[list[Cell]] = []
    await _migrate.compare(plan, rounds, said.append, lambda _: None, kept.append)
    assert not any(left.values())
    return kept[-1], said


async def test_faults_are_prevented_against_pure_demand_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(policies=("demand+push", "demand"), workloads=("zipf",))
    found, said = await compared(monkeypatch, plan, 3, {"demand": [1000, None, 500], "demand+push": [250, 10, 500]})
    push, demand = found
    assert [values.get(columns.PREVENTED) for values in push.rounds] == [0.75, None, 0.0]
    assert demand.failures == ["round 2: the memory is not as it must be"]
    assert len(said) == 6
    assert "round 2: zipf, demand: FAILED: the memory is not as it must be" in said[2]


def test_no_policy_is_always_the_last_but_demand_is_always_the_first() -> None:
    names = ("precopy", "demand", "+working-set")
    assert [_migrate.order(names, number) for number in range(3)] == [
        ["demand", "precopy", "+working-set"],
        ["demand", "+working-set", "precopy"],
        ["demand", "+working-set", "precopy"],
    ]
    assert _migrate.order(("hybrid", "precopy"), 0) == ["precopy", "hybrid"]
    assert _migrate.order(("hybrid", "precopy"), 1) == ["hybrid", "precopy"]


async def test_a_working_set_is_recorded_by_pure_demand_that_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(policies=("+working-set",), workloads=("zipf", "phases"))
    found, said = await compared(monkeypatch, plan, 1, {"demand": [1, 1], "+working-set": [3, 4]})
    assert [(cell.workload, cell.policy, cell.rounds[0]["faults"]) for cell in found] == [
        ("zipf", "+working-set", 3),
        ("phases", "+working-set", 4),
    ]
    assert [cell.rounds[0][columns.PREVENTED] for cell in found] == [-2.0, -3.0]
    assert len(said) == 4


async def test_each_cell_is_kept_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    async def migrate(arguments: Sequence[str], deadline_s: float, recorded: object) -> dict[str, float | None]:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise KeyboardInterrupt
        return faults(asked)

    monkeypatch.setattr(_migrate, "migrate", migrate)
    kept = Found(lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        await _migrate.measure_migrate({"policies": ("precopy", "hybrid"), "workloads": ("zipf", "disk")}, kept)
    one, other, about = kept.measurements
    assert [one.name, other.name] == ["zipf, precopy", "zipf, hybrid"]
    assert about.reached is False
    assert str(about.note).endswith("Ended early: 2 of 4 migrations were made.")


async def test_a_cell_that_fails_is_shown_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(policies=("demand", "demand+push"), workloads=("zipf",))
    found, _ = await compared(monkeypatch, plan, 2, {"demand": [None, None], "demand+push": [250, None]})
    measurements = [*(cell.record() for cell in found), conditions(plan, found)]
    assert [measurement.reached for measurement in measurements] == [False, False, None]
    assert measurements[1].values["downtime"].rounds == [2.0, None]
    assert measurements[1].values["processors"].better is None
    (section,) = sections(measurements)
    assert [row[0][0].text for row in section.rows] == ["demand", "demand+push"]
    assert section.rows[0][1][0].text == "FAILED"
    assert section.rows[1][1][0].text == "2.00 ms"
    text = " ".join(text_migrate(measurements, 100).split())
    assert "demand failed: round 1: the memory is not as it must be; round 2: the memory is not as it must be" in text
    assert "demand+push failed: round 2" in text
    assert "of which 1.8 were busy" in text


def test_a_busy_host_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    cell = Cell("demand", "zipf", [faults(1)])
    assert "share 2 processors" in (conditions(Plan(), [cell]).note or "")
    assert "hold waits for a processor" in (conditions(Plan(), [cell]).note or "")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert "hold waits" not in (conditions(Plan(), [cell]).note or "")
    assert conditions(Plan(), [Cell("demand", "zipf", [{}])]).values["most"].rounds == [None]


def test_a_guest_that_was_not_back_in_time_is_not_one_that_was_never_slow() -> None:
    cell = Cell("demand", "zipf", [{"dip": 0.5, "back": None}])
    (section,) = sections([cell.record()])
    shown = dict(zip(section.header, (words[0].text for words in section.rows[0]), strict=True))
    assert (shown["dip"], shown["back to 90 %"]) == ("50 %", "later")


def test_lines_of_a_demo_are_checked() -> None:
    good = {"event": "result", "schema": 3, "elapsed-ms": 1.0, **as_json(demo_result())}
    result, recordings = read([b'{"event": "progress"}', json.dumps(good).encode()], lambda _: None)
    assert result is not None
    assert result.verified
    assert recordings == {}
    with pytest.raises(MigrationError, match="not what it should be"):
        read([b'{"event": "result", "side": 3}'], lambda _: None)
    with pytest.raises(MigrationError, match="not JSON"):
        read([b"what"], lambda _: None)


def test_the_units_of_all_columns_are_known() -> None:
    record: Measurement = Cell("demand", "zipf", [faults(1)]).record()
    assert {name: value.better for name, value in record.values.items() if value.better != "less"} == {
        columns.PREVENTED: "more",
        "processors": None,
    }
