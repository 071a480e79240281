# SPDX-License-Identifier: Apache-2.0
"""Does a pending fault hold a lock? What mmap and munmap of another thread take while faults are pending."""

from __future__ import annotations

import json
from dataclasses import dataclass

from postcopy._native import lib
from postcopy.dataplane.histogram import Histogram
from postcopy.errors import ErrorLine
from postcopy.records.results import Measurement
from postcopy.testbed._processes import run_json
from postcopy.testbed.bench._common import DEADLINE_S, ratio, worker
from postcopy.testbed.bench._worker import percentiles_us

CALLS = 4000
"""Of each kind in a scene: enough that ten values lie above p99."""


@dataclass(frozen=True)
class Scene:
    """What goes on beside the thread that maps and unmaps."""

    name: str
    pending_faults: int
    bulk: bool


IDLE = Scene("none pending", 0, False)
SCENES = (
    IDLE,
    Scene("1 fault pending", 1, False),
    Scene("10 faults pending", 10, False),
    Scene("100 faults pending", 100, False),
    Scene("bulk placement", 0, True),
)


def main(pending_faults: str, bulk: str) -> None:
    """In the process of a scene: prints p50, p99 and max of mmap and munmap, in microseconds."""
    line = ErrorLine()
    histograms = {"mmap": Histogram(), "munmap": Histogram()}
    mmap, munmap = (histogram.struct for histogram in histograms.values())
    result = lib.pc_fp_contention(int(pending_faults), int(bulk), CALLS, mmap, munmap, line.buffer, line.size)
    line.check(result, "measuring mmap beside pending faults")
    print(json.dumps({call: percentiles_us(histogram, 50, 99) for call, histogram in histograms.items()}))


async def measure_contention(rounds: int) -> list[Measurement]:
    """mmap and munmap beside pending faults and bulk placement, against neither."""
    # One round has all scenes, each in a process of its own, so that a slow spell of the host hits them alike.
    measured: dict[str, list[dict[str, dict[str, float]]]] = {scene.name: [] for scene in SCENES}
    for _ in range(rounds):
        for scene in SCENES:
            command = worker("_contention", str(scene.pending_faults), str(int(scene.bulk)))
            what = f"the measurement of mmap and munmap with {scene.name}"
            measured[scene.name].append(await run_json(command, what, DEADLINE_S))
    idle = measured[IDLE.name]
    figures = []
    for call in ("mmap", "munmap"):
        for scene in SCENES[1:]:
            values = [
                here[call] | {f"idle-{name}": us for name, us in before[call].items()}
                for here, before in zip(measured[scene.name], idle, strict=True)
            ]
            figures.append(ratio(f"{call} p50, {scene.name} / none", values, "p50", "idle-p50", 1.5))
    return figures
