# SPDX-License-Identifier: Apache-2.0
"""What a demand fault takes, over loopback TCP."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from functools import partial

from postcopy.records.results import Measurement
from postcopy.testbed import _linux
from postcopy.testbed.bench._common import Touched, by_turns, joined, ratio, side_by_side, touch, warm_pair

CAP_SYS_NICE = 23  # linux/capability.h


async def measure_fault(rounds: int) -> list[Measurement]:
    """Demand fault p50 against the floor's, sleeping and busy polling."""
    found = []
    for how, busy_poll_us, goal in (("sleeping", 0, 1.06), ("busy polling", 200, 1.10)):
        parts = {
            kind: partial(touch, kind, 64 << 20, touches=4000, busy_poll_us=busy_poll_us)
            for kind in ("floor", "engine")
        }
        turns = await by_turns(rounds, parts)
        found.append(_pairs(f"fault p50, {how} / floor", turns, "floor", goal))
    return found


async def measure_pager_process(rounds: int) -> list[Measurement]:
    """What it costs that the machine survives its pager: demand fault p50 through a pager in a process of its own."""
    parts = {
        name: partial(touch, "engine", 64 << 20, touches=4000, pager_process=name == "engine")
        for name in ("thread", "engine")
    }
    turns = await by_turns(rounds, parts)
    return [_pairs("fault p50, pager process / pager threads", turns, "thread", 1.25)]


def _pairs(name: str, turns: Sequence[Mapping[str, Touched]], other: str, goal: float | None) -> Measurement:
    """Of the latencies of the engine, and of what it is compared with."""
    values = [side_by_side(turn["engine"], turn[other], f"{other}-") for turn in turns]
    times = {who: joined(turn[who] for turn in turns) for who in ("engine", other)}
    return ratio(name, values, "p50", f"{other}-p50", goal, distributions=times)


async def measure_bulk_delay(rounds: int) -> list[Measurement]:
    """The tail of a demand fault while bulk runs at full speed: p99 against the idle p99, and p99.9 against what is
    allowed, which is more without the right to real-time scheduling."""
    real_time = _linux.has_capabilities(CAP_SYS_NICE) or resource.getrlimit(resource.RLIMIT_RTPRIO)[0] > 0
    allowed_us, how = (1000.0, "with") if real_time else (2000.0, "without")
    values, times = [], {"under bulk": list[Touched](), "idle": list[Touched]()}
    for _ in range(rounds):
        idle = await touch("engine", 64 << 20, touches=8000)
        # As many touches as there are pages, so that faults happen until the last page is there.
        size_bytes = 768 << 20
        said = await warm_pair("engine", size_bytes, touches=size_bytes // 4096, bulk_channels=1, pin=True)
        busy = Touched.of(said)
        tail = {"p99.9": busy.us["p99.9"], "idle-p99.9": idle.us["p99.9"], "allowed": allowed_us}
        values.append(side_by_side(busy, idle, "idle-") | tail)
        times["under bulk"].append(busy)
        times["idle"].append(idle)
    distributions = {name: joined(found) for name, found in times.items()}
    return [
        ratio("fault p99 under bulk / idle", values, "p99", "idle-p99", 4.0, distributions=distributions),
        ratio(
            f"fault p99.9 under bulk / {allowed_us / 1000:g} ms", values, "p99.9", "allowed", 1.0,
            note=f"{how} the right to real-time scheduling (CAP_SYS_NICE or RLIMIT_RTPRIO)",
        ),
    ]  # fmt: skip
