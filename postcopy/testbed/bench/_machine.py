# SPDX-License-Identifier: Apache-2.0
"""Whole migrations of whole machines, and the speed of the rv64 machine."""

from __future__ import annotations

import time

from postcopy.machines.toy.machine import RV64, ToyMachine, ToyOptions
from postcopy.records.results import Measurement
from postcopy.testbed.bench._common import demo, ratio
from postcopy.units import parse_size


async def measure_sparse(rounds: int) -> list[Measurement]:
    """A large machine, little of it touched, against a small one, all of it touched."""
    common = ("--machine", "kvm", "--workload", "random", "--vcpus", "1", "--used-memory", "240MiB", "--memory")
    values = []
    for _ in range(rounds):
        small, large = [float((await demo(*common, size))["total-ms"]) for size in ("256MiB", "8GiB")]
        values.append({"8GiB": large, "256MiB": small})
    note = "240 MiB of each touched by the guest"
    return [ratio("total time, 8 GiB sparse / 256 MiB", values, "8GiB", "256MiB", 1.3, note=note, unit="ms")]


async def measure_overhead(rounds: int) -> list[Measurement]:
    """Peak memory beside the machine's own, against 32 MiB + 1 % of the machine: of a small one, where Python is nearly
    all of it, and of a larger one, where the engine's maps and buffers would show."""
    figures = []
    for size, used in (("64MiB", "32MiB"), ("1GiB", "256MiB")):
        allowance_mib = 32 + parse_size(size) / 2**20 / 100
        values = []
        for _ in range(max(1, rounds // 2)):
            arguments = ("--workload", "random", "--memory", size, "--used-memory", used)
            result = await demo("--machine", "kvm", *arguments)
            values.append(
                {side: float(result[side]["overhead-bytes"]) / 2**20 for side in ("source", "dest")}
                | {"allowance": allowance_mib}
            )
        for side in ("source", "dest"):
            name = f"memory overhead of the {side}, {size} / allowance"
            note = f"allowance: 32 MiB + 1 % of {size}"
            figures.append(ratio(name, values, side, "allowance", 1.0, note=note, unit="MiB"))
    return figures


async def _rv64_instructions_per_s(workload: str) -> float:
    options = ToyOptions(memory_bytes=64 << 20, workload=workload, seed=1)
    async with ToyMachine.create(RV64, options) as machine:
        await machine.boot()
        await machine.run_until(50_000_000)  # its memory is there, its code decoded
        begin_s = time.perf_counter()
        await machine.run_until(350_000_000)
        return 300e6 / (time.perf_counter() - begin_s)


async def measure_rv64(rounds: int) -> list[Measurement]:
    """Instructions of one hart against what makes a demo of it credible."""
    values = []
    for _ in range(rounds):
        speeds = {name: await _rv64_instructions_per_s(name) / 1e6 for name in ("random", "dirty")}
        values.append(speeds | {"slower": min(speeds.values()), "target": 100.0})
    name = "rv64 instructions, slower workload / 100 million a second"
    return [ratio(name, values, "slower", "target", 1.0, at_most=False, unit="M/s")]
