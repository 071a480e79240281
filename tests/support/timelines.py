# SPDX-License-Identifier: Apache-2.0
"""Lines of a migration as ``--json`` has them, made by hand: one that was cut once, with precopy, of 256 MiB."""

from __future__ import annotations

import bisect
import functools
import json
import math
import random
from typing import Any

from postcopy.records.timeline import COLUMNS, DIGITS

Json = dict[str, Any]

PAGES, PAGE_BYTES, BINS = 65536, 4096, 128
OFFER_MS, PAUSE_MS, RUNNING_MS, LOST_MS, RECOVERED_MS, ALL_MS, END_MS = 1000, 2200, 2204.2, 3000, 3350, 4600, 6500
MIGRATION = "0123456789abcdef" * 2
PARTS = {
    "stop": 90.0,
    "dirty": 310.0,
    "state": 140.0,
    "send": 60.0,
    "prepared": 2900.0,
    "commit": 700.0,
    "arm": 800.0,
    "load": 350.0,
    "first-run": 240.0,
}


def _at_ms() -> list[float]:
    """As many as a recording has at most."""
    return [round(END_MS * column / (COLUMNS - 1), 3) for column in range(COLUMNS)]


def _ramp(at_ms: float, begin: float, end: float, top: float) -> int:
    """From 0 to `top`; nothing while the connection is cut."""

    def busy(until: float) -> float:
        cut = min(max(until - LOST_MS, 0), RECOVERED_MS - LOST_MS)
        return max(0.0, until - begin - (cut if begin < LOST_MS else 0))

    return round(top * min(1.0, busy(min(at_ms, end)) / busy(end)))


def _guest(at_ms: float) -> int:
    """20,000 a second, none in the pause, then a quarter that becomes all."""
    before = 20.0 * min(at_ms, PAUSE_MS)
    after = max(0.0, at_ms - RUNNING_MS)
    return round(before + 20.0 * (after - 0.75 * 900 * (1 - math.exp(-after / 900))))


def distribution(values_us: list[float]) -> Json:
    edges = sorted({math.ceil(1.03 ** math.ceil(math.log(max(us * 1e3, 1), 1.03))) for us in values_us})
    counts = [0] * len(edges)
    for us in values_us:
        counts[bisect.bisect_left(edges, us * 1e3)] += 1
    total_ns = [round(us * 1e3) for us in values_us]
    return {
        "count": len(values_us),
        "sum-ns": sum(total_ns),
        "max-ns": max(total_ns, default=0),
        "bucket-edges-ns": edges,
        "bucket-counts": counts,
    }


def dest(faults: int = 2113) -> Json:
    """The `timeline` of the destination. The caller's own."""
    line: Json = json.loads(_dest(faults))
    return line


@functools.cache
def _dest(faults: int, seed: int = 7) -> str:
    dice = random.Random(seed)
    at_ms = _at_ms()
    series = {
        "demand": [_ramp(at, RUNNING_MS, ALL_MS - 400, 1700) for at in at_ms],
        "background": [_ramp(at, RUNNING_MS, ALL_MS, 9600) for at in at_ms],
        "precopied": [_ramp(at, OFFER_MS, PAUSE_MS, 41000) for at in at_ms],
        "zero": [_ramp(at, OFFER_MS, OFFER_MS + 50, 22000) for at in at_ms],
        "prefetched": [_ramp(at, RUNNING_MS, ALL_MS - 600, 2200) for at in at_ms],
        "duplicate": [_ramp(at, RUNNING_MS, ALL_MS, 31) for at in at_ms],
        "faults-waiting": [dice.randint(0, 4) if RUNNING_MS < at < ALL_MS - 400 else 0 for at in at_ms],
        "guest-operations": [_guest(at) if at > RUNNING_MS else 0 for at in at_ms],
        "blocked-us": [_ramp(at, RUNNING_MS, ALL_MS - 400, 1_200_000) for at in at_ms],
    }
    series["received-bytes"] = [
        4160 * sum(series[kind][n] for kind in ("demand", "background", "precopied", "prefetched"))
        for n in range(len(at_ms))
    ]
    columns = []
    for at in at_ms:
        share = [_ramp(at, OFFER_MS + 4 * one, PAUSE_MS, 0.8 * 63) for one in range(BINS)]
        if at > PAUSE_MS:
            share = [
                max(20, one - 12) + _ramp(at, RUNNING_MS + (n * 37 % BINS) * 9, ALL_MS, 75 - one)
                for n, one in enumerate(share)
            ]
        columns.append("".join(DIGITS[max(0, min(63, one))] for one in share))
    when = sorted(dice.uniform(RUNNING_MS, ALL_MS - 400) for _ in range(min(1000, faults)))
    sent = [dice.lognormvariate(1.3, 0.3) for _ in range(faults)]
    received = [dice.lognormvariate(4.1, 0.5) * (20 if dice.random() < 0.01 else 1) for _ in range(faults)]
    placed = [dice.lognormvariate(1.7, 0.3) for _ in range(faults)]
    whole = [sum(parts) for parts in zip(sent, received, placed, strict=True)]
    if faults > 1:
        whole[-1] = received[-1] = 351_200.0  # that waited through the cut
    line = {
        "event": "timeline",
        "side": "dest",
        "machine": "vm1",
        "kind": "rv64",
        "migration-id": MIGRATION,
        "direction": "incoming",
        "peer": "192.0.2.1:7777",
        "encrypted": False,
        "status": "completed",
        "error": None,
        "mode": "hybrid",
        "downtime-ms": 0.0,
        "total-ms": 0.0,
        "downtime-breakdown-us": {part: us for part, us in PARTS.items() if part in ("arm", "load", "first-run")},
        "ram": {
            "total": PAGES * PAGE_BYTES,
            "remaining": 0,
            "transferred": 219_000_000,
            "page-size": PAGE_BYTES,
            "demand-pages": 1700,
            "background-pages": 50600,
            "zero-pages": 22000,
            "duplicate-pages": 31,
        },
        "pending-faults": 0,
        "blocktime-ms": [640.2, 560.9],
        "recoveries": {"count": 1, "last-ms": 350.0, "max-ms": 350.0, "total-ms": 350.0},
        "recording": {
            "origin": {"unix-ms": 1_790_000_000_000.0, "monotonic-ns": 5_000_000_000},
            "period-ms": 20.0,
            "cost-us": 900,
            "blocks": [{"name": "ram", "bytes": PAGES * PAGE_BYTES, "page-size": PAGE_BYTES}],
            "at-ms": at_ms,
            "series": series,
            "map": {"bins": BINS, "columns": columns},
            "fault-sample": {
                "every": max(1, faults // 1000),
                "at-ms": when,
                "page": [dice.random() for _ in when],
                "sent-us": sent[: len(when)],
                "received-us": received[: len(when)],
                "placed-us": placed[: len(when)],
                "total-us": whole[: len(when)],
            },
            "latency": {
                "until-sent": distribution(sent),
                "until-received": distribution(received),
                "until-placed": distribution(placed),
                "whole": distribution(whole),
            },
            "marks": [
                {"moment-ms": OFFER_MS, "what": "offer"},
                {"moment-ms": OFFER_MS + 60, "what": "round", "text": "1"},
                {"moment-ms": 1800, "what": "round", "text": "2"},
                {"moment-ms": PAUSE_MS + 1, "what": "switchover"},
                {"moment-ms": PAUSE_MS + 3, "what": "prepared"},
                {"moment-ms": PAUSE_MS + 3.6, "what": "commit"},
                {"moment-ms": RUNNING_MS, "what": "running"},
                {"moment-ms": LOST_MS, "what": "lost", "text": "connection reset by peer"},
                {"moment-ms": RECOVERED_MS, "what": "recovered"},
                {"moment-ms": ALL_MS, "what": "all-there"},
                {"moment-ms": ALL_MS + 3, "what": "ended"},
            ],
        },
    }
    return json.dumps(line)


def source() -> Json:
    """The `timeline` of the source, on the same host; it began half a second earlier."""
    at_ms = _at_ms()
    line = dest()
    recording = line["recording"]
    series = recording["series"]
    moved = [at + 500 for at in at_ms]
    line |= {
        "side": "source",
        "direction": "outgoing",
        "downtime-ms": 4.2,
        "total-ms": ALL_MS - PAUSE_MS,
        "downtime-breakdown-us": {part: us for part, us in PARTS.items() if part not in ("arm", "load", "first-run")},
    }
    for key in ("blocktime-ms", "pending-faults"):
        del line[key]
    recording |= {
        "origin": {"unix-ms": 1_789_999_999_500.0, "monotonic-ns": 4_500_000_000},
        "at-ms": moved,
        "series": {
            "demand": series["demand"],
            "background": series["background"],
            "precopied": series["precopied"],
            "sent-bytes": series["received-bytes"],
            "guest-operations": [min(_guest(at), 44000) for at in at_ms],
        },
        "marks": [
            {"moment-ms": OFFER_MS + 500, "what": "offer"},
            {"moment-ms": PAUSE_MS + 500, "what": "pause"},
            {"moment-ms": RUNNING_MS + 501, "what": "running"},
        ],
    }
    for key in ("fault-sample", "latency"):
        del recording[key]
    return line


def run(command: str) -> Json:
    return {
        "event": "run",
        "command": command,
        "version": "0.1.0",
        "started": "2026-09-21T12:26:40.000Z",
        "options": {"machine": "rv64", "memory": "256MiB", "mode": "hybrid"},
        "host": {
            "cpu": "Example 9000",
            "cpus": 8,
            "usable-cpus": 8,
            "memory": 64 << 30,
            "page-size": 4096,
            "kernel": "6.12.1",
            "architecture": "x86_64",
            "virtual": True,
            "container": None,
            "thp": "madvise",
            "governor": None,
            "load": 0.4,
        },
    }


def text(*lines: Json) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def both() -> bytes:
    return text(run("source"), source(), run("dest"), dest())
