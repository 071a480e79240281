# SPDX-License-Identifier: Apache-2.0
"""What a pager or page server has done over time, for the record `timeline`: a `struct pc_recorder`, and marks.

csrc/recorder/recorder.c says what is looked at and what it costs. A thread in C looks, one for all of the process;
Python puts a mark where something happens, and reads all of it once, at the end.

Resource handling: what is recorded holds its recorder, and stops it before it ends (`DataPlane.close`, a machine's
`close`), so that nothing is looked at that is not there any more. `close` frees it.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from postcopy._native import ffi, lib
from postcopy.errors import PostcopyError, check

if TYPE_CHECKING:
    from postcopy.dataplane._base import DataPlane
    from postcopy.dataplane.histogram import Histogram
    from postcopy.records.timeline import Distribution, Recording

PERIOD_NS = 1_000_000
BUCKETS = 400
"""Of a distribution; neighbours are put together where there are more."""
TEXT_CHARACTERS = 200

log = logging.getLogger(__name__)

_PAGER, _PAGESERVER = "struct pc_pager_stats *", "struct pc_pageserver_stats *"
_OF_PAGER = {
    "demand": "demand_pages",
    "background": "background_pages",
    "zero": "zero_pages",
    "prefetched": "prefetched_pages",
    "hits": "prefetch_hits",
    "duplicate": "duplicate_pages",
    "received_bytes": "bytes_received",
    "sent_bytes": "bytes_sent",
}
_OF_PAGESERVER = {
    "demand": "demand_pages",
    "background": "background_pages",
    "zero": "zero_pages",
    "received_bytes": "bytes_received",
    "sent_bytes": "bytes_sent",
    "released_bytes": "released_bytes",
}


@dataclass(frozen=True)
class Moment:
    """A mark."""

    at_ns: int  # CLOCK_MONOTONIC
    what: str
    text: str = ""


class Recorder:
    """Make it, give it what is to be recorded, `mark` what happens; `stop`, `recording`, `close`."""

    @classmethod
    def open(cls) -> Recorder | None:
        """None without memory, which ends nothing else."""
        try:
            return cls()
        except PostcopyError as error:
            log.warning("nothing is recorded over time: %s", error)
            return None

    def __init__(self) -> None:
        from postcopy.records.timeline import MARKS  # now, and not in the pause

        pointer: Any = ffi.new("struct pc_recorder **")
        check(lib.pc_recorder_new(PERIOD_NS, pointer), "making a recorder")
        self._struct: Any = ffi.gc(pointer[0], lib.pc_recorder_free)  # None: closed
        self._origin_ns, self._origin_unix_ms = time.monotonic_ns(), time.time() * 1e3
        self._marks: list[Moment] = []
        self._most_marks = MARKS
        self._counts = ""  # the struct of the core that a column has; empty: nothing has been recorded
        self._latencies: list[Histogram] = []
        self._plane: DataPlane | None = None
        self._blocks: list[tuple[str, int, int]] = []

    # ---- what is recorded

    def follow(self, plane: DataPlane, blocks: Sequence[tuple[str, int, int]]) -> None:
        """A pager or page server, with the names of its blocks, their sizes and units of transfer."""
        self._plane = plane
        self._blocks = list(blocks)
        plane.be_recorded(self)

    def take(self, kind: str, struct: Any) -> None:
        """A struct of the core to look at: of a `pager`, of `metrics`, of a `pageserver`, of a `machine` (NULL: not any
        more). Where that cannot be, as without a thread or after `stop`, it is not recorded, and no migration fails of
        it."""
        if self._struct is None:
            return
        if (result := getattr(lib, f"pc_recorder_{kind}")(self._struct, struct)) < 0:
            why = "it was stopped" if result == -errno.ECANCELED else f"starting its thread: {os.strerror(-result)}"
            log.warning("the recorder takes no %s any more, nothing of that is recorded over time: %s", kind, why)
        elif kind != "machine":
            self._counts = _PAGESERVER if kind == "pageserver" else _PAGER

    def mark(self, what: str, text: str = "", *, at_ns: int | None = None, begins: bool = False) -> None:
        """Something happens now, or has happened; `what`: as in the record `Mark`. `begins`: what follows is recorded
        in full detail again."""
        if len(self._marks) == self._most_marks:  # of what happens most often, as rounds and cuts, one is left out
            ((often, count),) = Counter(mark.what for mark in self._marks).most_common(1)
            del self._marks[[number for number, mark in enumerate(self._marks) if mark.what == often][count // 2]]
        self._marks.append(Moment(time.monotonic_ns() if at_ns is None else at_ns, what, text[:TEXT_CHARACTERS]))
        if begins:
            self.begin()

    def begin(self) -> None:
        """What follows is recorded in full detail. Costs the time to wake a thread."""
        if self._struct is not None:
            lib.pc_recorder_phase(self._struct)

    def stop(self) -> None:
        """What is recorded will not be looked at any more. Twice does no harm."""
        if self._struct is None:
            return
        lib.pc_recorder_stop(self._struct)  # first: whatever fails after it, what is looked at may be freed
        plane, self._plane = self._plane, None
        if plane is not None and self._counts:
            try:
                self._latencies = plane.stages() or self._latencies
            except (PostcopyError, MemoryError) as error:
                log.warning("latencies are not recorded: %s", str(error) or "out of memory")

    def close(self) -> None:
        """Frees it. Twice does no harm."""
        if self._struct is not None:
            self.stop()
            self._struct = None

    # ---- reading it

    def recording(self, committed_ns: int = 0) -> Recording | None:
        """All of it, once; None where nothing was recorded. `committed_ns`: when the machine became the destination's;
        0: it did not."""
        self.stop()
        if not self._counts:
            return None
        from postcopy.records import timeline as records

        columns: Any = ffi.new("struct pc_record_column[]", lib.PC_RECORD_COLUMNS)
        faults: Any = ffi.new("struct pc_record_fault[]", lib.PC_RECORD_FAULTS)
        summary: Any = ffi.new("struct pc_record_summary *")
        lib.pc_recorder_read(self._struct, columns, faults, summary)
        count, bins = int(summary.columns), int(summary.bins)
        at_ns = [int(columns[i].at_ns) for i in range(count)]
        texts = [records.residency_text(bytes(ffi.buffer(columns[i].bins)[0:bins])) for i in range(count)]
        stages = [_distribution(each) for each in self._latencies]
        return records.Recording(
            origin=records.Origin(unix_ms=round(self._origin_unix_ms, 3), monotonic_ns=self._origin_ns),
            period_ms=summary.period_ns / 1e6,
            cost_us=round(summary.cost_ns / 1e3),
            blocks=[records.Block(name=name, bytes=size, page_size=unit) for name, size, unit in self._blocks],
            at_ms=[self._ms(ns) for ns in at_ns],
            series=self._series(columns, at_ns, committed_ns),
            map=records.Residency(bins=bins, columns=texts),
            fault_sample=self._sample(faults, summary) if self._latencies else None,
            latency=records.Stages(
                until_sent=stages[0], until_received=stages[1], until_placed=stages[2], whole=stages[3]
            )
            if stages
            else None,
            marks=[
                records.Mark(moment_ms=self._ms(mark.at_ns), what=mark.what, text=mark.text or None)
                for mark in sorted(self._marks, key=lambda mark: mark.at_ns)
            ],
        )

    def _ms(self, ns: int) -> float:
        return round((ns - self._origin_ns) / 1e6, 3)

    def _series(self, columns: Any, at_ns: list[int], committed_ns: int) -> Any:
        from postcopy.records.timeline import Series

        is_pager = self._counts == _PAGER
        numbers = range(len(at_ns))
        rows = [ffi.cast(self._counts, columns[i].counts) for i in numbers]
        series = Series()
        for name, field in (_OF_PAGER if is_pager else _OF_PAGESERVER).items():
            setattr(series, name, [int(getattr(row, field)) for row in rows])
        if (pushed := series.background) is not None:  # what came before the commit, and after it
            before = 0 if committed_ns else max(pushed, default=0)
            for i in numbers:
                if committed_ns and (at_ns[i] <= committed_ns or i == 0 or at_ns[i - 1] < committed_ns):
                    before = pushed[i]  # with the first column after it
            series.precopied = [min(value, before) for value in pushed]
            series.background = [value - max(0, min(value, before)) for value in pushed]
        operations = [int(columns[i].operations) for i in numbers]
        if any(operations):
            series.guest_operations = operations
        if is_pager:
            series.faults_waiting = [int(columns[i].waiting) for i in numbers]
            series.blocked_us = [int(columns[i].blocked_ns) // 1000 for i in numbers]
        return series

    def _sample(self, faults: Any, summary: Any) -> Any:
        from postcopy.records.timeline import Faults

        blocks = self._blocks
        total = max(1, sum(size for _, size, _ in blocks))
        ends = [0]
        for _, size, _ in blocks:
            ends.append(ends[-1] + size)
        found = sorted((faults[i] for i in range(summary.faults)), key=lambda fault: fault.event_ns)
        places = []
        for fault in found:
            block, page = fault.place >> 40, fault.place & (1 << 40) - 1
            at = ends[block] + page * blocks[block][2] if block < len(blocks) else 0
            places.append(round(at / total, 6))
        asked = [fault if fault.sent_ns else None for fault in found]
        return Faults(
            every=int(summary.sample_every),
            at_ms=[self._ms(fault.event_ns) for fault in found],
            page=places,
            sent_us=[_us(each.event_ns, each.sent_ns) if each else None for each in asked],
            received_us=[_us(each.sent_ns, each.received_ns) if each else None for each in asked],
            placed_us=[_us(each.received_ns, each.placed_ns) if each else None for each in asked],
            total_us=[_us(fault.event_ns, fault.placed_ns) for fault in found],
        )


def _us(from_ns: int, to_ns: int) -> float:
    return round((to_ns - from_ns) / 1e3, 1)


def _distribution(histogram: Histogram) -> Distribution:
    from postcopy.records.timeline import Distribution

    buckets = histogram.buckets()
    while len(buckets) > BUCKETS:
        pairs = [buckets[at : at + 2] for at in range(0, len(buckets), 2)]
        buckets = [(pair[-1][0], sum(count for _, count in pair)) for pair in pairs]
    return Distribution(
        count=histogram.count,
        sum_ns=histogram.sum_ns,
        max_ns=histogram.max_ns,
        bucket_edges_ns=[edge for edge, _ in buckets],
        bucket_counts=[count for _, count in buckets],
    )
