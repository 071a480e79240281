# SPDX-License-Identifier: Apache-2.0
"""Does a pending fault hold a lock? What mmap and munmap of another thread take while faults are pending.

One round measures all scenes one after the other, each in a process of its own, so that a slow spell of the host hits
them alike. The plot has all rounds together, on a logarithmic axis.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from postcopy._child import python
from postcopy._native import lib
from postcopy.dataplane.histogram import Histogram
from postcopy.errors import ErrorLine, MigrationError

CALLS = 4000
"""Of each kind in a scene: enough that ten values lie above p99."""
DEADLINE_S = 60.0
PERCENTILES = ("p50", "p99", "max")


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

Values = dict[str, dict[str, float]]
"""Of one scene: mmap and munmap to p50, p99 and max, in microseconds."""


def main(pending_faults: int, bulk: bool) -> None:
    """In the process of a scene: prints `Values`."""
    line = ErrorLine()
    mmap, munmap = Histogram(), Histogram()
    result = lib.pc_fp_contention(pending_faults, bulk, CALLS, mmap.struct, munmap.struct, line.buffer, line.size)
    line.check(result, "measuring mmap beside pending faults")
    print(json.dumps({"mmap": _values(mmap), "munmap": _values(munmap)}))


def _values(histogram: Histogram) -> dict[str, float]:
    return {
        "p50": histogram.percentile(50) / 1e3,
        "p99": histogram.percentile(99) / 1e3,
        "max": histogram.max_ns / 1e3,
    }


def measure(rounds: int) -> dict[str, list[Values]]:
    """By the scene's name, one `Values` for each round. `MigrationError` when a process failed."""
    measured: dict[str, list[Values]] = {scene.name: [] for scene in SCENES}
    for _ in range(rounds):
        for scene in SCENES:
            measured[scene.name].append(_run(scene))
    return measured


def _run(scene: Scene) -> Values:
    code = "import sys; from postcopy.bench._contention import main; main(int(sys.argv[1]), bool(int(sys.argv[2])))"
    command = python("-c", code, str(scene.pending_faults), str(int(scene.bulk)))
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=False)
    except subprocess.TimeoutExpired:
        raise MigrationError(f"mmap and munmap with {scene.name}: not done within {DEADLINE_S:g} s") from None
    if done.returncode:
        raise MigrationError(f"the measurement with {scene.name} failed (its error is above)")
    values: Values = json.loads(done.stdout)
    return values


# ---- the plot


@dataclass(frozen=True)
class Bar:
    """One scene of one call: medians over the rounds, in microseconds, and the ratio of p50 to idle."""

    call: str
    scene: str
    p50: float
    p99: float
    max: float
    ratio: float


def bars(rounds: Sequence[tuple[str, str, Sequence[dict[str, float]]]]) -> list[Bar]:
    """From what the figures keep: call, scene, and for each round p50, p99, max and ``idle-`` of each. Of a call the
    first scene brings the idle bar with it."""
    import statistics

    made: list[Bar] = []
    for call, scene, values in rounds:
        median = {name: statistics.median(value[name] for value in values) for name in values[0]}
        if not any(bar.call == call for bar in made):
            made.append(Bar(call, IDLE.name, median["idle-p50"], median["idle-p99"], median["idle-max"], 1.0))
        ratio = statistics.median(value["p50"] / value["idle-p50"] for value in values)
        made.append(Bar(call, scene, median["p50"], median["p99"], median["max"], ratio))
    return made


def _axis(made: Sequence[Bar]) -> tuple[float, float]:
    """Whole powers of ten around everything."""
    low = math.floor(math.log10(min(bar.p50 for bar in made)))
    high = math.ceil(math.log10(max(bar.max for bar in made)))
    return low, max(high, low + 1)


def text_plot(made: Sequence[Bar], width: int = 48) -> str:
    """Bars of characters: solid to p50, shaded to p99, dots to the maximum."""
    low, high = _axis(made)

    def at(us: float) -> int:
        return max(1, round((math.log10(us) - low) / (high - low) * width))

    lines = [f"{'':<28}{10**low:g} us {'.' * (width - 14)} {10**high:g} us   p50 / p99 / max us, p50 to idle"]
    for bar in made:
        p50, p99, most = at(bar.p50), at(bar.p99), at(bar.max)
        drawn = "█" * p50 + "▒" * (p99 - p50) + "·" * (most - p99)
        numbers = f"{bar.p50:.2f} / {bar.p99:.2f} / {bar.max:.0f}"
        lines.append(f"{bar.call:<7} {bar.scene:<20}{drawn:<{width}}  {numbers:<24} {bar.ratio:.2f}")
    return "\n".join(lines)


def svg_plot(made: Sequence[Bar]) -> str:
    """The same as a picture, for a document; follows the reader's light or dark."""
    low, high = _axis(made)
    left, right, line, top = 190, 250, 22, 46
    wide = 560

    def at(us: float) -> float:
        return left + (math.log10(us) - low) / (high - low) * wide

    height = top + line * len(made) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + wide + right} {height}"'
        ' font-family="system-ui, sans-serif" font-size="12">',
        "<style>text{fill:#222}.grid{stroke:#8886}.p50{fill:#2a6fb0}.p99{fill:#2a6fb0;opacity:.45}"
        ".max{stroke:#b3541e;stroke-width:2}@media(prefers-color-scheme:dark){text{fill:#ddd}.p50,.p99{fill:#6cb0f0}}"
        "</style>",
        '<text x="8" y="18" font-weight="600">mmap and munmap of one thread while others wait for a page'
        " (microseconds, logarithmic)</text>",
    ]
    for power in range(int(low), int(high) + 1):
        x = at(10.0**power)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 10}" y2="{height - 28}"/>')
        parts.append(f'<text x="{x:.1f}" y="{top - 14}" text-anchor="middle">{10.0**power:g}</text>')
    for number, bar in enumerate(made):
        y = top + number * line
        p50, p99, most = at(bar.p50), at(bar.p99), at(bar.max)
        numbers = f"{bar.p50:.2f} / {bar.p99:.2f} / {bar.max:.0f}, p50 to idle {bar.ratio:.2f}"
        parts += [
            f'<text x="8" y="{y + 13}">{escape(bar.call)}, {escape(bar.scene)}</text>',
            f'<rect class="p50" x="{left}" y="{y + 2}" width="{max(1.0, p50 - left):.1f}" height="14"/>',
            f'<rect class="p99" x="{p50:.1f}" y="{y + 5}" width="{max(0.0, p99 - p50):.1f}" height="8"/>',
            f'<line class="max" x1="{most:.1f}" x2="{most:.1f}" y1="{y + 2}" y2="{y + 16}"/>',
            f'<text x="{left + wide + 12}" y="{y + 13}">{numbers}</text>',
        ]
    parts.append(f'<text x="8" y="{height - 8}">thick: to p50; thin: to p99; mark: the maximum</text>')
    return "\n".join([*parts, "</svg>", ""])
