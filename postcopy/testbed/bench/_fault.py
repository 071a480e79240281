# SPDX-License-Identifier: Apache-2.0
"""What a demand fault takes, over loopback TCP."""

from __future__ import annotations

import resource

from postcopy.records.results import Measurement
from postcopy.testbed import _linux
from postcopy.testbed.bench._common import ratio, side_by_side, touch_us, warm_pair

CAP_SYS_NICE = 23  # linux/capability.h


async def measure_fault(rounds: int) -> list[Measurement]:
    """Demand fault p50 against the floor's, sleeping and busy polling."""
    figures = []
    for how, busy_poll_us, target in (("sleeping", 0, 1.06), ("busy polling", 200, 1.10)):
        values = []
        for _ in range(rounds):
            floor, engine = [
                await touch_us(kind, 64 << 20, touches=4000, busy_poll_us=busy_poll_us) for kind in ("floor", "engine")
            ]
            values.append(side_by_side(engine, floor, "floor-"))
        figures.append(ratio(f"fault p50, {how} / floor", values, "p50", "floor-p50", target))
    return figures


async def measure_recording(rounds: int) -> list[Measurement]:
    """What it costs that a migration is recorded over time (`--json`): the median of a demand fault with the recorder
    beside it. Its p50 would be the edge of a bucket, 2 % from the next one."""
    values = []
    for number in range(rounds):
        recorded, not_recorded = (True, False), (False, True)
        order = recorded if number % 2 else not_recorded  # what changes in the host meanwhile is in both
        found = {which: await touch_us("engine", 64 << 20, touches=8000, recorded=which) for which in order}
        values.append(
            {
                prefix + name: found[which][name]
                for which, prefix in ((True, ""), (False, "plain-"))
                for name in ("median", "p99")
            }
        )
    return [ratio("fault median, recorded / not", values, "median", "plain-median", 1.01)]


async def measure_pager_process(rounds: int) -> list[Measurement]:
    """What it costs that the machine survives its pager: demand fault p50 through a pager in a process of its own."""
    values = []
    for _ in range(rounds):
        apart, inside = [
            await touch_us("engine", 64 << 20, touches=4000, pager_process=where) for where in (True, False)
        ]
        values.append(side_by_side(apart, inside, "thread-"))
    return [ratio("fault p50, pager process / pager threads", values, "p50", "thread-p50", 1.25)]


async def measure_bulk_delay(rounds: int) -> list[Measurement]:
    """The tail of a demand fault while bulk runs at full speed: p99 against the idle p99, and p99.9 against what is
    allowed, which is more without the right to real-time scheduling."""
    real_time = _linux.has_capabilities(CAP_SYS_NICE) or resource.getrlimit(resource.RLIMIT_RTPRIO)[0] > 0
    allowed_us, how = (1000.0, "with") if real_time else (2000.0, "without")
    values = []
    for _ in range(rounds):
        idle = await touch_us("engine", 64 << 20, touches=8000)
        # As many touches as there are pages, so that faults happen until the last page is there.
        size_bytes = 768 << 20
        busy = await warm_pair("engine", size_bytes, touches=size_bytes // 4096, bulk_channels=1, pin=True)
        tail = {"p99.9": busy["touch-us"]["p99.9"], "idle-p99.9": idle["p99.9"], "allowed": allowed_us}
        values.append(side_by_side(busy["touch-us"], idle, "idle-") | tail)
    return [
        ratio("fault p99 under bulk / idle", values, "p99", "idle-p99", 4.0),
        ratio(
            f"fault p99.9 under bulk / {allowed_us / 1000:g} ms", values, "p99.9", "allowed", 1.0,
            note=f"{how} the right to real-time scheduling (CAP_SYS_NICE or RLIMIT_RTPRIO)",
        ),
    ]  # fmt: skip
