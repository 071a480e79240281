# SPDX-License-Identifier: Apache-2.0
"""Logs of HdrHistogram, read back with HdrHistogram's own library for Python."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader

from postcopy._hdr import Interval, encode, hdr_log, intervals, write_hdr
from postcopy.errors import ConfigurationError
from postcopy.records import VERSION, as_json
from postcopy.records.timeline import Distribution

RUN = {"schema": VERSION, "event": "run", "elapsed-ms": 0.0, "started": "2026-01-31T23:59:59.000Z"}


def distribution(edges: list[int], counts: list[int], max_ns: int | None = None) -> Distribution:
    most = max_ns if max_ns is not None else edges[-1]
    return Distribution(count=sum(counts), sum_ns=1, max_ns=most, bucket_edges_ns=edges, bucket_counts=counts)


def read_back(path: Path) -> dict[str, HdrHistogram]:
    reader = HistogramLogReader(str(path), HdrHistogram(1, 1 << 40, 3))
    found: dict[str, HdrHistogram] = {}
    while (histogram := reader.get_next_interval_histogram()) is not None:
        found[histogram.get_tag()] = histogram
    reader.close()
    return found


@pytest.mark.parametrize("seed", range(5))
def test_what_the_library_reads_is_what_was_counted(seed: int) -> None:
    generator = random.Random(seed)
    ours: dict[int, int] = {}
    theirs = HdrHistogram(1, 1 << 40, 3)
    for _ in range(500):
        value = int(2 ** generator.uniform(0, 39))
        count = generator.choice([1, 2, 63, 64, 8191, 8192, 10**9])
        ours[value] = ours.get(value, 0) + count
        theirs.record_value(value, count)
    read = HdrHistogram.decode(encode(sorted(ours.items())))
    assert read.get_total_count() == theirs.get_total_count() == sum(ours.values())
    for percentile in (0.0, 1, 25, 50, 90, 99, 99.9, 100):
        assert read.get_value_at_percentile(percentile) == theirs.get_value_at_percentile(percentile)
    # every count by itself, not only their sums
    for value in ours:
        assert read.get_count_at_value(value) == theirs.get_count_at_value(value)
    assert read.get_max_value() == theirs.get_max_value()


def test_the_lines_of_a_migration_and_of_bench(tmp_path: Path) -> None:
    faults = as_json(distribution([1000, 2047, 70_000], [5, 90, 5], max_ns=69_000))
    recording = {
        "origin": {"unix-ms": 1.7e12},
        "at-ms": [0.0, 2500.0],
        "latency": {"whole": faults, "until-sent": faults},
    }
    timeline = {"event": "timeline", "side": "dest", "machine": "a, b\n", "recording": recording}
    measured: dict[str, Any] = {
        "event": "measurement",
        "elapsed-ms": 8.0,
        "figure": "fault",
        "name": "p50",
        "distributions": {"us": faults},
    }
    lines: list[dict[str, Any]] = [RUN, {"event": "progress"}, timeline, measured]
    path = tmp_path / "x.hlog"
    write_hdr(str(path), intervals(json.loads(json.dumps(lines))))
    found = read_back(path)
    assert set(found) == {"dest:a_b_:whole", "dest:a_b_:until-sent", "fault:p50:us"}
    whole = found["dest:a_b_:whole"]
    assert whole.get_total_count() == 100
    assert whole.values_are_equivalent(whole.get_value_at_percentile(50), 2047)
    assert whole.values_are_equivalent(whole.get_max_value(), 69_000)  # exact, not the bucket's edge
    assert whole.get_start_time_stamp() == pytest.approx(1.7e12, abs=2000)
    assert whole.get_end_time_stamp() - whole.get_start_time_stamp() == pytest.approx(2500, abs=2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bucket-edges-ns": [1, 2], "bucket-counts": [1]},
        {"bucket-edges-ns": [2, 1], "bucket-counts": [1, 1]},
        {"bucket-edges-ns": [-1], "bucket-counts": [1]},
        {"bucket-edges-ns": [1 << 63], "bucket-counts": [1]},
        {"bucket-edges-ns": [1], "bucket-counts": [-1]},
        {"bucket-edges-ns": "x", "bucket-counts": [1]},
        {"bucket-edges-ns": [1], "bucket-counts": [1.5]},
        {"bucket-edges-ns": [4096, 4097, 4098], "bucket-counts": [1 << 61] * 3},  # one bucket in a log
    ],
)
def test_what_is_no_distribution_is_refused(wrong: dict[str, Any]) -> None:
    line = {"event": "measurement", "elapsed-ms": 8.0, "figure": "f", "name": "n"}
    line["distributions"] = {"us": {"count": 1, "sum-ns": 1, "max-ns": 1, **wrong}}
    with pytest.raises(ConfigurationError, match="is not as postcopy writes it"):
        list(intervals([line]))


@pytest.mark.parametrize("unix_ms", [1e18, 1e300, -1.0, 10**400, "x", None])
def test_a_time_that_is_none_is_refused(unix_ms: Any) -> None:
    recording = {"origin": {"unix-ms": unix_ms}, "at-ms": [0.0], "latency": {"whole": as_json(distribution([5], [1]))}}
    with pytest.raises(ConfigurationError, match="line of timeline 'dest' is not as postcopy writes it"):
        hdr_log(intervals([{"event": "timeline", "side": "dest", "recording": recording}]))


@pytest.mark.parametrize("most", [-5, 6, 1 << 70])
def test_a_longest_time_that_is_not_in_its_bucket_is_the_end_of_that(most: int) -> None:
    text = hdr_log([Interval("a", 1.0, 1.0, distribution([5], [3], max_ns=most))])
    read = HdrHistogram.decode(text.splitlines()[-1].rpartition(",")[2])
    assert (read.get_total_count(), read.get_max_value()) == (3, 5)


def test_nothing_to_write_is_said_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no line has a distribution"):
        write_hdr(str(tmp_path / "x.hlog"), intervals([RUN]))
    assert not list(tmp_path.iterdir())


def test_a_tag_cannot_end_its_line() -> None:
    text = hdr_log([Interval("a,b\r\nTag=c", 1.0, 1.0, distribution([5], [1]))])
    assert text.splitlines()[-1].startswith("Tag=a_b_Tag=c,0.000,1.000,")
