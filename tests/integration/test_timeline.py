# SPDX-License-Identifier: Apache-2.0
"""A migration over time, as `--json` has it: what is recorded agrees with what was counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from postcopy.records import timeline as records

Json = dict[str, Any]
MOST_BYTES = 200 << 10


def check(line: Json) -> Json:
    """What holds for every recording; returns it."""
    recording: Json = line["recording"]
    columns = recording["at-ms"]
    assert len(json.dumps(line)) < MOST_BYTES
    assert 1 < len(columns) <= records.COLUMNS
    assert all(before <= after for before, after in pairwise(columns))
    assert all(len(values) == len(columns) for values in recording["series"].values())
    assert len(recording["map"]["columns"]) == len(columns)
    assert {len(text) for text in recording["map"]["columns"]} == {recording["map"]["bins"]}
    assert len(recording["marks"]) <= records.MARKS
    for name in ("demand", "background", "received-bytes", "sent-bytes", "guest-operations"):
        assert all(before <= after for before, after in pairwise(recording["series"].get(name, [])))
    return recording


def at(recording: Json, what: str) -> float:
    (moment,) = [mark["moment-ms"] for mark in recording["marks"] if mark["what"] == what]
    return float(moment)


@pytest.mark.slow
@pytest.mark.needs("uffd-user")
@pytest.mark.parametrize("pager", ["thread", "process"])
def test_it_agrees_with_the_result(side: Callable[..., Any], pager: str) -> None:
    machine = ("--machine", "rv64", "--memory", "32MiB", "--precopy", "0.1")
    source = side("source", "--json", *machine, "--listen", "127.0.0.1:0")
    dest = side("dest", "--json", "--connect", source.address, "--pager", pager, "--run-for", "0.1")
    results = {}
    for name, one in (("dest", dest), ("source", source)):
        status, results[name], errors = one.end()
        assert status == 0, errors
        assert one.lines[0]["event"] == "run"
        assert one.lines[0]["command"] == name
        assert [line["event"] for line in one.lines].count("timeline") == 1

    (line,) = dest.events("timeline")
    recording, ram = check(line), results["dest"]["ram"]
    assert line["ram"] == ram
    last = {name: values[-1] for name, values in recording["series"].items()}
    assert last["demand"] == ram["demand-pages"]
    assert last["background"] + last["precopied"] == ram["background-pages"]
    assert last["precopied"] > 0
    assert last["zero"] == ram["zero-pages"]
    assert last["duplicate"] == ram["duplicate-pages"]
    assert last["received-bytes"] + last["sent-bytes"] == ram["transferred"]
    assert last["faults-waiting"] == 0
    assert last["blocked-us"] / 1e3 == pytest.approx(sum(results["dest"]["blocktime-ms"]), abs=0.1)
    assert last["guest-operations"] == results["dest"]["guest"]["operations"]
    assert set(recording["map"]["columns"][-1]) == {"/"} == set(ram["residency"])
    assert sum(block["bytes"] for block in recording["blocks"]) == 32 << 20
    whole = recording["latency"]["whole"]
    assert whole["count"] == results["dest"]["fault-latency-us"]["count"] == sum(whole["bucket-counts"])
    assert whole["max-ns"] / 1e3 == pytest.approx(results["dest"]["fault-latency-us"]["max"], abs=0.1)
    sample = recording["fault-sample"]
    assert len(sample["at-ms"]) <= min(records.FAULTS, whole["count"] // sample["every"])
    for number, total_us in enumerate(sample["total-us"]):
        if (sent_us := sample["sent-us"][number]) is not None:
            parts_us = sent_us + sample["received-us"][number] + sample["placed-us"][number]
            assert parts_us == pytest.approx(total_us, abs=0.3)
        assert at(recording, "commit") <= sample["at-ms"][number] <= recording["at-ms"][-1]

    (there,) = source.events("timeline")
    sent = check(there)
    assert sent["series"]["released-bytes"][-1] == 0
    assert there["migration-id"] == line["migration-id"]
    begin, pause, there_ms = (at(sent, what) for what in ("offer", "pause", "all-there"))
    assert begin < pause < at(sent, "prepared") <= at(sent, "commit") <= at(sent, "running") < there_ms
    # Both on one clock: the machine stopped at the source before it ran at the destination.
    ahead_ms = (recording["origin"]["monotonic-ns"] - sent["origin"]["monotonic-ns"]) / 1e6
    assert pause < at(recording, "running") + ahead_ms < there_ms
    # Downtime as it was counted, by the marks that the source has put.
    assert at(sent, "running") - pause == pytest.approx(results["source"]["downtime-ms"], abs=0.01)
    paused = [
        operations
        for ms, operations in zip(sent["at-ms"], sent["series"]["guest-operations"], strict=True)
        if ms > at(sent, "commit")
    ]
    assert len(set(paused)) == 1
    assert paused[0] <= last["guest-operations"]


@pytest.mark.slow
@pytest.mark.needs("uffd-user")
def test_a_recovered_migration_is_one(
    side: Callable[..., Any], operator: Callable[[str], Any], slow_way: Callable[[str], str], tmp_path: Path
) -> None:
    source = side("source", "--json", "--machine", "rv64", "--memory", "48MiB", "--listen", "127.0.0.1:0")
    dest = side(
        "dest", "--json", "--connect", slow_way(source.address), "--run-for", "0.1", "--control", tmp_path / "dest"
    )
    dest.wait_status("postcopy-active")
    operator("dest").tell("migrate-pause")
    dest.wait_status("postcopy-paused")
    operator("dest").tell("migrate-recover", source.address)  # without the slow network
    for one in (dest, source):
        status, _, errors = one.end()
        assert status == 0, errors
        (line,) = one.events("timeline")
        recording = check(line)
        assert (
            at(recording, "running") < at(recording, "lost") < at(recording, "recovered") < at(recording, "all-there")
        )
        assert line["recoveries"]["last-ms"] >= at(recording, "recovered") - at(recording, "lost") - 0.01
        assert recording["series"]["background"][-1] > 0
