# SPDX-License-Identifier: Apache-2.0
"""What `Userfaultfd` costs: one process, in which a C thread touches pages and another thread serves them."""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import trio

from postcopy._native import ffi, lib
from postcopy.dataplane.histogram import Histogram
from postcopy.errors import MigrationError, check
from postcopy.memory import Memory
from postcopy.records.results import Measurement
from postcopy.testbed._processes import run_json
from postcopy.testbed.bench._common import DEADLINE_S, by_turns, ratio, worker
from postcopy.uffd import PageFault, RegisterMode, Userfaultfd

PAGES = 2000
PENDING = 64
BUSY_POLL_US = 2000.0  # longer than the pause, so that it never sleeps


def main(what: str, pause: str) -> None:
    """Prints one number: microseconds, or for ``reads`` system calls.

    `pause`: seconds between two faults. Without one a Trio handler, still on its way back to sleep when the next fault
    comes, is spared a wake-up that the C handler pays.
    """
    pause_s = float(pause)
    if what == "reads":
        print(_reads_of_pending_events())
        return
    with Memory.create("anon", PAGES * int(lib.pc_page_bytes())) as memory, Userfaultfd.open() as uffd:
        uffd.register(memory.address, memory.size_bytes, RegisterMode.MISSING)
        histogram = Histogram()
        base: Any = ffi.cast("void *", memory.address)
        # Each on a processor of its own: whether they happen to share one decides a sleeping handler's time.
        cpus = sorted(os.sched_getaffinity(0))

        def touch() -> None:
            os.sched_setaffinity(0, cpus[:1])
            if not pause_s:
                lib.pc_bench_touch(base, memory.page_bytes, PAGES, PAGES, 1, 0, histogram.struct)
                return
            for page in range(PAGES):
                time.sleep(pause_s)  # until the handler sleeps; not in what is timed
                at = ffi.cast("void *", memory.address + page * memory.page_bytes)
                lib.pc_bench_touch(at, memory.page_bytes, 1, 1, 1, 0, histogram.struct)

        toucher = threading.Thread(target=touch, daemon=True)
        os.sched_setaffinity(0, cpus[-1:])
        toucher.start()
        content = b"\x5a" * memory.page_bytes
        if what == "c":
            check(lib.pc_bench_uffd_serve(uffd.fileno(), content, memory.page_bytes, PAGES), "serving faults in C")
        else:
            uffd.busy_poll_us = BUSY_POLL_US if what == "busy polling" else 0
            trio.run(_serve, uffd, memory, content)
        toucher.join()
        uffd.unregister(memory.address, memory.size_bytes)
    print(histogram.percentile(50) / 1e3)


async def _serve(uffd: Userfaultfd, memory: Memory, content: bytes) -> None:
    served = 0
    while served < PAGES:
        for event in await uffd.read_batch():
            if isinstance(event, PageFault):
                uffd.copy(event.address & -memory.page_bytes, content)
                served += 1


def _reads_of_pending_events() -> int:
    """How often this thread calls read(2), as the kernel counts it, to get the events of 64 threads that wait."""
    with Memory.create("anon", PENDING * int(lib.pc_page_bytes())) as memory, Userfaultfd.open() as uffd:
        uffd.register(memory.address, memory.size_bytes, RegisterMode.MISSING)
        threads = [
            threading.Thread(target=memory.read, args=(page * memory.page_bytes, 1), daemon=True)
            for page in range(PENDING)
        ]
        for thread in threads:
            thread.start()
        info = Path(f"/proc/self/fdinfo/{uffd.fileno()}")
        while f"pending:\t{PENDING}" not in info.read_text():
            pass
        counting = _system_reads(lambda: None)
        events: list[object] = []
        reads = _system_reads(lambda: events.extend(uffd.read())) - counting
        if len(events) != PENDING:
            raise MigrationError(f"one read brought {len(events)} of {PENDING} pending events")
        uffd.fill_zero(memory.address, memory.size_bytes)
        for thread in threads:
            thread.join()
        uffd.unregister(memory.address, memory.size_bytes)
        return reads


def _system_reads(call: Any) -> int:
    def count() -> int:
        text = Path("/proc/thread-self/io").read_text()
        return int(text.split("syscr:")[1].split()[0])

    before = count()
    call()
    return count() - before


async def measure_userfaultfd(rounds: int) -> list[Measurement]:
    """The Python binding against the smallest C handler, and how many events one read brings."""

    async def part(what: str, pause_s: float = 0.0) -> float:
        return float(await run_json(worker("_uffd", what, str(pause_s)), f"the measurement of {what}", DEADLINE_S))

    reads = [{"reads": await part("reads"), "wanted": 1.0} for _ in range(rounds)]
    figures = [ratio("system calls that read 64 pending events", reads, "reads", "wanted", 1.0, unit="")]
    for when, pause_s in (("0.5 ms apart", 0.0005), ("back to back", 0.0)):
        for how in ("sleeping", "busy polling"):
            parts = {"c-us": partial(part, "c", pause_s), "trio-us": partial(part, how, pause_s)}
            values = await by_turns(rounds, parts)
            name = f"faults {when}, Trio handler {how} / C handler sleeping, p50"
            figures.append(ratio(name, values, "trio-us", "c-us", 1.5))
    return figures
