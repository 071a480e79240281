# SPDX-License-Identifier: Apache-2.0
"""What it costs to know what a machine writes: its own speed, and the time to ask."""

from __future__ import annotations

import time

import trio

from postcopy._native import lib
from postcopy.machines.toy.machine import KVM, RV64, Engine, ToyMachine, ToyOptions
from postcopy.memory import DirtyLog, Memory
from postcopy.records.results import Measurement
from postcopy.testbed.bench._common import Rounds, ratio
from postcopy.testbed.probe import find

PERIOD_S = 0.1
"""How often the log is asked while the guest runs: far more often than any round of precopy ends."""
WINDOW_S = 1.5
MEMORY_BYTES = 256 << 20


async def measure_dirty(rounds: int) -> list[Measurement]:
    """Operations of a guest that does nothing but write, logged and not, by turns in one machine; and a whole memory
    asked, of which nothing, or every page, was written."""
    figures = []
    for engine in (RV64, KVM) if find("kvm") else (RV64,):
        note = f"workload dirty, 64 MiB, the log read every {PERIOD_S * 1000:.0f} ms"
        name = f"{engine.kind} operations, logged / not logged"
        values = await _guest(engine, rounds)
        figures.append(ratio(name, values, "logged", "not logged", None, at_most=False, unit="k/s", note=note))
    values = [await trio.to_thread.run_sync(_collect) for _ in range(rounds)]
    note = "a page, of 256 MiB: there and not written; every one written"
    return [*figures, ratio("reading the log, all written / none", values, "all", "none", None, unit="ns", note=note)]


async def _guest(engine: Engine, rounds: int) -> Rounds:
    values = []
    options = ToyOptions(memory_bytes=64 << 20, workload="dirty", seed=1)
    async with ToyMachine.create(engine, options) as machine:
        await machine.boot()
        await machine.resume()
        await machine.wait_ready()
        for _ in range(rounds):
            plain = await _operations_per_s(machine, None)
            log = await trio.to_thread.run_sync(lambda: DirtyLog(block.memory for block in machine.blocks))
            try:
                logged = await _operations_per_s(machine, log)
            finally:
                await trio.to_thread.run_sync(log.close)
            values.append({"logged": logged / 1e3, "not logged": plain / 1e3})
        await machine.pause()
    return values


async def _operations_per_s(machine: ToyMachine, log: DirtyLog | None) -> float:
    begin_s, begin = time.perf_counter(), machine.statistics().operations
    while (passed_s := time.perf_counter() - begin_s) < WINDOW_S:
        await trio.sleep(PERIOD_S)
        for index in range(len(machine.blocks) if log is not None else 0):
            assert log is not None
            await trio.to_thread.run_sync(log.collect, index)
    return (machine.statistics().operations - begin) / passed_s


def _collect() -> dict[str, float]:
    """Nanoseconds a page."""
    times = {}
    with Memory.create("memfd", MEMORY_BYTES) as memory:
        lib.pc_bench_fill(memory.struct.base, memory.size_bytes, 1)
        with DirtyLog([memory]) as log:
            for name in ("none", "all"):
                begin_ns = time.perf_counter_ns()
                log.collect(0)
                times[name] = (time.perf_counter_ns() - begin_ns) / memory.pages
                lib.pc_bench_fill(memory.struct.base, memory.size_bytes, 2)
    return times
