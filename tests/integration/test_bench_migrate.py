# SPDX-License-Identifier: Apache-2.0
"""`postcopy bench migrate`, a small cut of it: two policies with one workload."""

from __future__ import annotations

import pytest
from lines import parse_lines

from postcopy.cli import main
from postcopy.errors import MigrationError
from postcopy.testbed.bench import _migrate


@pytest.mark.slow
@pytest.mark.needs("uffd-user")
def test_a_small_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seconds in (("BEFORE_S", 0.5), ("WINDOW_S", 0.3), ("AFTER_S", 0.4)):
        monkeypatch.setattr(_migrate, name, seconds)
    policies, workloads = ["demand", "demand+push"], ["zipf"]
    status = main(
        ["bench", "migrate", "--rounds", "1", "--memory", "16MiB", "--bandwidth", "400mbit", "--json",
         "--policies", ",".join(policies), "--workloads", ",".join(workloads)]
    )  # fmt: skip
    printed = capsys.readouterr()
    run, *lines = parse_lines(printed.out)
    assert run["event"] == "run"
    cells = {line["name"]: line for line in lines if line["event"] == "measurement"}
    conditions = cells.pop("processors busy")
    assert "16 MiB" in conditions["note"]
    assert cells.keys() == {f"{workload}, {policy}" for workload in workloads for policy in policies}
    assert status == 0, printed.err
    for name, cell in cells.items():
        assert "note" not in cell, printed.err
        values = {key: value["rounds"][0] for key, value in cell["values"].items()}
        back = values.pop("back")
        assert back is None or back >= 0
        assert None not in values.values(), (name, values)
        assert values["eviction"] >= values["total"] > values["downtime"] > 0
        assert 0.9 < values["bytes-over-memory"] < 3
        assert 0 <= values["dip"] <= 1
        assert values["faults-over-working-set"] > 0
        assert values["fault-max"] >= values["fault-p50"] > 0
        if name.endswith("demand"):
            assert values["faults-prevented"] == 0
    recorded = [line for line in lines if line["event"] == "timeline"]
    assert {(line["machine"], line["side"]) for line in recorded} == {
        (f"{name}, round 1", side) for name in cells for side in ("source", "dest")
    }


@pytest.mark.needs("uffd-user")
async def test_a_demo_that_ends_with_an_error_gives_its_words() -> None:
    with pytest.raises(MigrationError, match=r"^--max-downtime: seconds from"):
        await _migrate.migrate(["--max-downtime", "nonsense"], 60.0, lambda _: None)
