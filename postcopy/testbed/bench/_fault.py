# SPDX-License-Identifier: Apache-2.0
"""What a demand fault takes, over loopback TCP."""

from __future__ import annotations

from postcopy.testbed.bench._common import Figure, ratio, side_by_side, touch_us, warm_pair


async def measure_fault(rounds: int) -> list[Figure]:
    """Demand fault p50 against the floor's, sleeping and busy polling."""
    figures = []
    for how, busy_poll_us in (("sleeping", 0), ("busy polling", 200)):
        values = []
        for _ in range(rounds):
            floor, engine = [
                await touch_us(kind, 64 << 20, touches=4000, busy_poll_us=busy_poll_us) for kind in ("floor", "engine")
            ]
            values.append(side_by_side(engine, floor, "floor-"))
        figures.append(ratio(f"fault p50, {how} / floor", values, "p50", "floor-p50", 1.25))
    return figures


async def measure_pager_process(rounds: int) -> list[Figure]:
    """What it costs that the machine survives its pager: demand fault p50 through a pager in a process of its own."""
    values = []
    for _ in range(rounds):
        apart, inside = [
            await touch_us("engine", 64 << 20, touches=4000, pager_process=where) for where in (True, False)
        ]
        values.append(side_by_side(apart, inside, "thread-"))
    return [ratio("fault p50, pager process / pager threads", values, "p50", "thread-p50", 1.25)]


async def measure_bulk_delay(rounds: int) -> list[Figure]:
    """p99 of a demand fault while bulk runs at full speed, against the idle p99."""
    values = []
    for _ in range(rounds):
        idle = await touch_us("engine", 64 << 20, touches=8000)
        # As many touches as there are pages, so that faults happen until the last page is there.
        size_bytes = 768 << 20
        busy = await warm_pair("engine", size_bytes, touches=size_bytes // 4096, bulk_channels=1, pin=True)
        values.append(side_by_side(busy["touch-us"], idle, "idle-"))
    return [ratio("fault p99 under bulk / idle", values, "p99", "idle-p99", 4.0)]
