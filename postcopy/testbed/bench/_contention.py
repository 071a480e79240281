# SPDX-License-Identifier: Apache-2.0
"""Does a pending fault hold a lock? What mmap and munmap of another thread take while faults are pending."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from postcopy._native import lib
from postcopy.dataplane.histogram import Histogram
from postcopy.errors import ErrorLine
from postcopy.records.results import Measurement
from postcopy.testbed._processes import run_json
from postcopy.testbed.bench._common import DEADLINE_S, by_turns, medians, ratio, worker
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


_LABELS, _NUMBERS = 26, 31  # characters of a line that are not its bar
_PARTS = ("p50", "p99", "max")


async def measure_contention(rounds: int) -> list[Measurement]:
    """mmap and munmap beside pending faults and bulk placement, against neither."""
    # One round has all scenes, each in a process of its own, so that a slow spell of the host hits them alike.
    parts = {}
    for scene in SCENES:
        command = worker("_contention", str(scene.pending_faults), str(int(scene.bulk)))
        what = f"the measurement of mmap and munmap with {scene.name}"
        parts[scene.name] = partial(run_json, command, what, DEADLINE_S)
    turns: list[dict[str, dict[str, dict[str, float]]]] = await by_turns(rounds, parts)
    figures = []
    for call in ("mmap", "munmap"):
        for scene in SCENES[1:]:
            values = [
                turn[scene.name][call] | {f"idle-{name}": us for name, us in turn[IDLE.name][call].items()}
                for turn in turns
            ]
            figures.append(ratio(f"{call} p50, {scene.name} / none", values, "p50", "idle-p50", 1.5))
    return figures


def text_contention(measurements: Sequence[Measurement], width: int) -> str:
    """A bar for each scene of each call, of medians in microseconds: solid to p50, shaded to p99, dots to the maximum;
    not wider than `width`. Each measurement has these, and ``idle-`` of each."""
    bars: list[tuple[str, str, list[float], float]] = []
    for measurement in measurements:
        call, scene = measurement.name.removesuffix(" / none").split(" p50, ")
        median = medians(measurement)
        if not any(bar[0] == call for bar in bars):  # the first scene of a call brings the idle one with it
            bars.append((call, IDLE.name, [median[f"idle-{part}"] for part in _PARTS], 1.0))
        bars.append((call, scene, [median[part] for part in _PARTS], measurement.result or 0.0))
    low = math.floor(math.log10(min(us[0] for _, _, us, _ in bars)))
    high = max(math.ceil(math.log10(max(us[2] for _, _, us, _ in bars))), low + 1)
    longest = max(16, width - _LABELS - _NUMBERS)
    first, last = f"{_time(low)} ", f" {_time(high)}"
    axis = first + "." * (longest - len(first) - len(last)) + last
    lines = [f"{'':<{_LABELS}}{axis:<{longest}}  {'p50 / p99 / max us':<23} ratio"]
    for call, scene, (p50, p99, most), quotient in bars:
        ends = [max(1, round((math.log10(us) - low) / (high - low) * longest)) for us in (p50, p99, most)]
        drawn = "█" * ends[0] + "▒" * (ends[1] - ends[0]) + "·" * (ends[2] - ends[1])
        numbers = f"{p50:.2f} / {p99:.2f} / {most:.0f}"
        lines.append(f"{call:<6} {scene:<{_LABELS - 7}}{drawn:<{longest}}  {numbers:<23} {quotient:5.2f}")
    return "\n".join(lines)


def _time(power: int) -> str:
    """So many powers of ten of a microsecond, in the unit that has no exponent."""
    unit = min(max(power // 3, -1), 2)
    return f"{10 ** (power - 3 * unit)} {('us', 'ms', 's', 'ns')[unit]}"
