# SPDX-License-Identifier: Apache-2.0
"""What the recorder of the core has seen, as a record."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from lines import convert

from postcopy._native import ffi, lib
from postcopy.dataplane import recorder as module
from postcopy.dataplane.histogram import Histogram, RecentWindow
from postcopy.dataplane.pager import Pager
from postcopy.dataplane.pageserver import PageServer
from postcopy.dataplane.recorder import BUCKETS, Recorder
from postcopy.memory import Memory
from postcopy.memory.bitmap import Bitmap
from postcopy.records import as_json
from postcopy.records import timeline as records

MOST = (1 << 63) - 1


async def test_a_pager() -> None:
    recorder = Recorder()
    first, second = (Memory.create("memfd", pages * 4096) for pages in (96, 32))
    async with Pager() as pager:
        for memory in (first, second):
            pager.add_block(memory)
        recorder.follow(pager, [("one", 96 * 4096, 4096), ("two", 32 * 4096, 4096)])
        pager.set_zero(1, Bitmap.full(32))
        recorder.mark("running")
        recorder.mark("offer", "before it", at_ns=1)
        assert pager.bins() == bytes(48) + bytes([63] * 16)
    recording = recorder.recording(committed_ns=1)
    recorder.close()
    for memory in (first, second):
        memory.close()
    assert recording is not None
    convert(as_json(recording), records.Recording)
    assert recording.map.bins == 128
    assert recording.map.columns[-1] == "A" * 96 + "/" * 32
    assert recording.series.zero is not None
    assert recording.series.zero[-1] == 32
    assert [block.name for block in recording.blocks] == ["one", "two"]
    assert [(mark.what, mark.text) for mark in recording.marks] == [("offer", "before it"), ("running", None)]
    assert recording.series.guest_operations is None
    assert recording.latency is not None
    assert recording.latency.whole.bucket_counts == []


async def test_a_page_server() -> None:
    recorder = Recorder()
    with Memory.create("memfd", 64 * 4096) as memory:
        async with PageServer() as server:
            server.add_block(memory)
            recorder.follow(server, [("ram", 64 * 4096, 4096)])
            server.set_present(0, Bitmap(64))
        recording = recorder.recording()
    assert recording is not None
    assert recording.map.columns[-1] == "/" * 64
    assert recording.series.released_bytes is not None
    assert recording.series.faults_waiting is None
    assert recording.latency is None
    assert recording.fault_sample is None


def test_nothing_was_followed() -> None:
    recorder = Recorder()
    recorder.begin()
    recorder.mark("ended")
    assert recorder.recording() is None
    recorder.close()
    recorder.begin()  # no effect any more
    recorder.close()


async def test_one_that_was_stopped(caplog: pytest.LogCaptureFixture) -> None:
    """Takes nothing any more, and says so; nothing of it is looked at."""
    recorder = Recorder()
    recorder.stop()
    with Memory.create("memfd", 4096) as memory:
        async with Pager() as pager:
            pager.add_block(memory)
            recorder.follow(pager, [("ram", 4096, 4096)])
    assert "takes no pager any more" in caplog.text
    assert recorder.recording() is None
    recorder.close()


async def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full ring of the largest numbers and a full sample, of histograms without an empty bucket."""

    def fill(_: Any, columns: Any, faults: Any, summary: Any) -> None:
        summary.columns, summary.faults, summary.bins = records.COLUMNS, records.FAULTS, records.BINS
        summary.sample_every = 1 << 40
        for i in range(records.COLUMNS):
            columns[i].at_ns = 86_400_000_000_000 + i * 123_456_789
            for word in range(lib.PC_RECORD_COUNTS):
                columns[i].counts[word] = 1 << 40  # bytes of a TiB; pages are fewer
            columns[i].operations = columns[i].blocked_ns = 1 << 45
            columns[i].waiting = 16384
            ffi.memmove(columns[i].bins, bytes([i % 64] * records.BINS), records.BINS)
        for i in range(records.FAULTS):
            at_ns = 86_400_000_000_000 + i * 1_234_567
            faults[i].event_ns, faults[i].sent_ns = at_ns, at_ns + 123_456
            faults[i].received_ns, faults[i].placed_ns = at_ns + 2_345_678, at_ns + 3_456_789
            faults[i].place = i

    class Filled:
        def __getattr__(self, name: str) -> Any:
            return fill if name == "pc_recorder_read" else getattr(lib, name)

    full = Histogram()
    for bucket in range(20 * 32, 35 * 32):  # 1 us to 17 s
        full.add(lib.pc_histogram_bucket_edge(bucket - 15 * 32))
    recorder = Recorder()
    with Memory.create("memfd", 1000 * 4096) as memory:
        async with Pager() as pager:
            pager.add_block(memory)
            recorder.follow(pager, [("ram", 1000 * 4096, 4096)])
            monkeypatch.setattr(pager, "stages", lambda: [full] * 4)
    recorder.mark("offer")
    for number in range(2 * records.MARKS):
        recorder.mark("round", str(number) * 1000)
        recorder.mark("lost")
    recorder.mark("ended")
    monkeypatch.setattr(module, "lib", Filled())
    recording = recorder.recording(committed_ns=1)
    assert recording is not None
    assert len(recording.marks) == records.MARKS
    assert (recording.marks[0].what, recording.marks[-1].what) == ("offer", "ended")
    assert len(recording.at_ms) == records.COLUMNS
    assert recording.latency is not None
    assert len(recording.latency.whole.bucket_counts) <= BUCKETS
    assert sum(recording.latency.whole.bucket_counts) == full.count
    assert recording.latency.whole.bucket_edges_ns[-1] >= full.percentile(99)
    assert 100 << 10 < len(json.dumps(as_json(recording))) < 200 << 10


def test_what_came_before_the_commit() -> None:
    """Is told from what came after it by the first column after it."""
    split = Recorder._series
    rows = ffi.new("struct pc_record_column[5]")
    recorder = SimpleNamespace(_counts="struct pc_pageserver_stats *")
    for row, pages in zip(rows, (0, 10, 12, 20, 40), strict=True):
        ffi.cast(recorder._counts, row.counts).background_pages = pages
    for committed_ns, precopied in ((0, 40), (15, 12), (1, 10), (20, 12), (99, 40)):
        series = split(recorder, rows, [0, 10, 20, 30, 40], committed_ns)  # type: ignore[arg-type]
        assert series.precopied[-1] == precopied, committed_ns
        assert [a + b for a, b in zip(series.precopied, series.background, strict=True)] == [0, 10, 12, 20, 40]


def test_the_last_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns = 0
    monkeypatch.setattr("postcopy.dataplane.histogram.time", SimpleNamespace(monotonic_ns=lambda: now_ns))
    window = RecentWindow()

    def counted(values: list[int]) -> Histogram:
        histogram = Histogram()
        for value in values:
            histogram.add(value)
        return histogram

    look: Callable[[list[int]], Any] = lambda values: window.look(counted(values))  # noqa: E731
    now_ns = 400_000_000
    assert look([1000]) is None
    now_ns = 600_000_000
    found = look([1000, 1000, 5000])
    assert (found.count, found.interval_ns) == (3, now_ns)
    now_ns = 900_000_000
    assert look([1000, 1000, 5000, 9000]) is found  # the same for all who look
    now_ns = 1_200_000_000
    found = look([1000, 1000, 5000, 9000, 9000])
    assert (found.count, found.interval_ns) == (2, 600_000_000)
    assert found.p50_ns == pytest.approx(9000, rel=0.04)
    now_ns = 9_000_000_000
    assert look([1000, 1000, 5000, 9000, 9000]).count == 0
