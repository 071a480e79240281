# SPDX-License-Identifier: Apache-2.0
"""What it costs that a migration is recorded over time: the wait for a page with the recorder beside it, and without.

The cost is less than what a host does to the same measurement from one process to the next, or from one second to the
next. So both are measured in one process, on one connection, in short blocks of faults between which the recorder is
started and stopped: plain, recorded, recorded, plain, and then the other way round, so that what grows or falls
steadily, or comes with every second or fourth block, meets both alike. Eight blocks give one ratio; the interval is of
the median of all ratios, by bootstrap.

A block is so short that all of it is recorded in full detail, a look each millisecond: a migration that takes longer
than a third of a second pays less.
"""

from __future__ import annotations

import json
import os
import statistics
from functools import partial

import msgspec
import trio

from postcopy._native import lib
from postcopy.dataplane.histogram import Histogram
from postcopy.dataplane.pager import Pager
from postcopy.dataplane.recorder import Recorder
from postcopy.errors import check
from postcopy.memory import Memory
from postcopy.records.results import Measurement
from postcopy.testbed.bench import _worker
from postcopy.testbed.bench._common import pair, ratio
from postcopy.testbed.bench._compare import interval_of_median
from postcopy.testbed.bench._worker import HIT_NS, SEED, Job
from postcopy.uffd import How

BLOCK_PAGES = 128
BLOCKS = 1024
"""Of a pair of processes: some ten seconds."""
UNIT = 8
BUDGET_S = 45.0
"""After this no pair is begun."""
GOAL = 1.01


async def measure_recording(rounds: int) -> list[Measurement]:
    """`rounds`: pairs of processes at most."""
    times_us: list[float] = []
    ends_s = trio.current_time() + BUDGET_S
    while rounds and trio.current_time() < ends_s:
        rounds -= 1
        found = await pair("recording", BLOCKS * BLOCK_PAGES << 12, pin=True, module="_recording")
        times_us += found["blocks-us"]
    return [_figure(times_us)]


def is_recorded(block: int) -> bool:
    """Of each eight: plain, recorded, recorded, plain; recorded, plain, plain, recorded."""
    return block % UNIT in (1, 2, 4, 7)


def _figure(times_us: list[float]) -> Measurement:
    """`times_us`: of all blocks."""
    values = []
    for first in range(0, len(times_us), UNIT):
        both: dict[str, list[float]] = {"recorded": [], "plain": []}
        for block in range(first, first + UNIT):
            both["recorded" if is_recorded(block) else "plain"].append(times_us[block])
        values.append({name: statistics.geometric_mean(times) for name, times in both.items()})
    found = ratio("fault median, recorded / not", values, "recorded", "plain", GOAL)
    low, high = interval_of_median([each["recorded"] / each["plain"] for each in values])
    found.reached = None if low <= GOAL < high else high <= GOAL
    of = f"of {len(values)} times {UNIT} blocks of {BLOCK_PAGES} faults"
    found.note = f"{found.result:.3f}, 95 % interval {low:.3f} .. {high:.3f}; {of}"
    return found


# ---- in the processes


async def _dest(job: Job) -> None:
    memory = Memory.create("memfd", job.size_bytes)
    pager = Pager()
    pager.add_block(memory)
    pager.add_shard(How.ANY)
    pager.arm(0, 0, 0, memory.pages)
    pager.attach_urgent(0, job.urgent_fd)
    await pager.confirm()
    _worker.ready()
    times_us = []
    for block in range(memory.pages // BLOCK_PAGES):
        recorder = None
        if is_recorded(block):
            recorder = Recorder()
            recorder.follow(pager, [("memory", job.size_bytes, memory.page_bytes)])
        waits = Histogram()
        base = memory.struct.base + block * BLOCK_PAGES * memory.page_bytes
        touch = partial(lib.pc_bench_touch, base, memory.page_bytes, BLOCK_PAGES, BLOCK_PAGES, SEED + block, HIT_NS)
        check(await trio.to_thread.run_sync(touch, waits.struct), "touching memory")
        if recorder is not None:
            recorder.close()
        times_us.append(_worker.median_ns(waits) / 1e3)
    print(json.dumps({"blocks-us": times_us}), flush=True)
    os._exit(0)


def main(argument: str) -> None:
    """Runs one side, given as JSON."""
    job = msgspec.json.decode(argument, type=Job)
    os.sched_setaffinity(0, job.cpus or os.sched_getaffinity(0))
    trio.run(_worker.engine_source if job.role.endswith("source") else _dest, job)
