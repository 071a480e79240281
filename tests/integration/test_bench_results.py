# SPDX-License-Identifier: Apache-2.0
"""Real files of results: what `bench` and a migration write is what `bench compare` and HdrHistogram's library read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader
from lines import parse_lines

from postcopy.testbed.bench._read import read

POSTCOPY = [sys.executable, "-m", "postcopy"]


@pytest.mark.slow
@pytest.mark.needs("uffd")
def test_of_bench(run_in_child: Callable[..., Any], tmp_path: Path) -> None:
    results, log = tmp_path / "a.jsonl", tmp_path / "a.hlog"
    done = run_in_child(
        [*POSTCOPY, "bench", "pager-process", "--rounds", "1", "--output", str(results), "--hdr", str(log)]
    )
    assert "fault p50, pager process / pager threads" in done.stdout, done.stderr
    began, measured = parse_lines(results.read_text())
    assert (began["event"], began["options"]) == ("run", {"figures": "pager-process", "rounds": "1"})
    assert measured["event"] == "measurement"
    engine = measured["distributions"]["engine"]
    found = {}
    reader = HistogramLogReader(str(log), HdrHistogram(1, 1 << 40, 3))
    while (histogram := reader.get_next_interval_histogram()) is not None:
        found[histogram.get_tag().rpartition(":")[2]] = histogram
    reader.close()
    assert set(found) == {"engine", "thread"}
    assert found["engine"].get_total_count() == engine["count"] > 1000
    # the median that the figure says, and the longest: in nanoseconds, to three digits
    assert found["engine"].get_value_at_percentile(50) == pytest.approx(
        measured["values"]["p50"]["rounds"][0] * 1e3, rel=0.001
    )
    assert found["engine"].get_max_value() == pytest.approx(engine["max-ns"], rel=0.001)
    compared = run_in_child([*POSTCOPY, "bench", "compare", str(results), str(results)])
    assert compared.returncode == 0, compared.stderr
    assert "too few rounds to tell: 1 and 1" in compared.stdout


@pytest.mark.slow
@pytest.mark.needs("uffd-user")
def test_of_migrations(run_in_child: Callable[..., Any], tmp_path: Path) -> None:
    demo = [*POSTCOPY, "demo", "--json", "--machine", "rv64", "--memory", "16MiB", "--run-for", "0.1"]
    lines = run_in_child(demo).stdout
    assert parse_lines(lines)[0]["event"] == "run"
    # As `cat` joins the files of several: each migration is a round.
    again = lines.replace(parse_lines(lines)[-1]["migration-id"], "0" * 32)
    path = tmp_path / "all.jsonl"
    path.write_text(lines + again)
    found = read(str(path))
    assert [run.command for run in found.runs].count("demo") == 2
    assert found.failed == 0
    for name in ("migration: downtime", "migration: total time", "migration: fault p50"):
        assert len(found.values[name].rounds) == 2, name
    result = parse_lines(lines)[-1]
    assert found.values["migration: downtime"].rounds[0] == result["downtime-ms"] > 0
    assert found.values["migration: fault p50"].rounds[0] == result["fault-latency-us"]["p50"] > 0
