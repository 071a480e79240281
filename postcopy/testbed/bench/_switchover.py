# SPDX-License-Identifier: Apache-2.0
"""``switchover``: from the pause at the source to the first run at the destination, two processes on loopback."""

from __future__ import annotations

from functools import partial
from typing import Any

from postcopy.records.results import Curve, Measurement
from postcopy.testbed import probe
from postcopy.testbed.bench._common import Rounds, by_turns, demo, ratio
from postcopy.units import parse_size

SIZES = ("64MiB", "1GiB", "8GiB")  # sparse: the guest touches a part of them
ALLOWED_US = {"idle": 2000.0, "random": 4000.0}
"""``random`` works on `USED_MEMORY` meanwhile; QEMU's postcopy takes 4 to 8 ms for such a guest (``qemu-move``)."""
USED_MEMORY = "32MiB"
GROWTH = 1.25
"""Of 8 GiB against 64 MiB: a step of the pause that looked at all memory would make it many times that."""


async def measure_switchover(rounds: int) -> list[Measurement]:
    """Downtimes by machine, workload and memory against what is allowed; and how they grow with the memory."""
    kinds = ("kvm", "rv64") if probe.find("kvm") else ("rv64",)
    cases = [(kind, "idle", size) for kind in kinds for size in SIZES]
    cases += [(kind, "random", SIZES[0]) for kind in kinds]
    turns = await by_turns(rounds, {case: partial(_downtime_us, *case) for case in cases})
    found = {case: [turn[case] for turn in turns] for case in cases}
    figures = [ratio(f"switchover: {', '.join(case)}", found[case], "downtime", "allowed", 1.0) for case in cases]
    curve = Curve(over="memory", x_unit="bytes", at={size: float(parse_size(size)) for size in SIZES})
    for kind in kinds:
        by_size: Rounds = [
            {size: found[kind, "idle", size][number]["downtime"] for size in SIZES} for number in range(rounds)
        ]
        figures.append(ratio(f"switchover: {kind}, growth", by_size, SIZES[-1], SIZES[0], GROWTH, curve=curve))
    return figures


async def _downtime_us(kind: str, workload: str, memory: str) -> dict[str, float]:
    """Of one migration, and its parts, each on the clock of the side that has it (docs/results.md)."""
    used_memory = ("--used-memory", USED_MEMORY) if workload == "random" else ()
    result: dict[str, Any] = await demo(
        "--machine", kind, "--vcpus", "1", "--workload", workload, "--memory", memory, *used_memory,
        "--migrate-after", "0.2", "--run-for", "0.1",
    )  # fmt: skip
    parts = result.get("downtime-breakdown-us") or {}
    return {"downtime": 1e3 * result["downtime-ms"], "allowed": ALLOWED_US[workload]} | {
        name: float(us) for name, us in parts.items() if us is not None
    }
