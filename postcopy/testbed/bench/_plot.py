# SPDX-License-Identifier: Apache-2.0
"""The figures of contention as a picture, of characters or as SVG: all rounds together, on a logarithmic axis."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from postcopy.testbed.bench._contention import IDLE
from postcopy.testbed.bench._figures import Figure


@dataclass(frozen=True)
class Bar:
    """One scene of one call: medians over the rounds, in microseconds, and the ratio of p50 to idle."""

    call: str
    scene: str
    p50: float
    p99: float
    max: float
    ratio: float


def bars(figures: Sequence[Figure]) -> list[Bar]:
    """From the figures of contention, whose rounds hold p50, p99, max and ``idle-`` of each. The first scene of a call
    brings the idle bar with it."""
    made: list[Bar] = []
    for figure in figures:
        call, scene = figure.name.removesuffix(" / none").split(" p50, ")
        median = {name: statistics.median(values[name] for values in figure.rounds) for name in figure.rounds[0]}
        if not any(bar.call == call for bar in made):
            made.append(Bar(call, IDLE.name, median["idle-p50"], median["idle-p99"], median["idle-max"], 1.0))
        made.append(Bar(call, scene, median["p50"], median["p99"], median["max"], figure.ratio))
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
