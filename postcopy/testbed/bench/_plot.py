# SPDX-License-Identifier: Apache-2.0
"""The figures of contention as a picture: all rounds together, on a logarithmic axis."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

from rich.console import Console

from postcopy.testbed.bench._common import Figure
from postcopy.testbed.bench._contention import IDLE

WIDTH = 107  # of the picture
_LABELS, _NUMBERS = 26, 31  # characters of a line that are not its bar
_PARTS = ("p50", "p99", "max")
_TITLE = "mmap and munmap of one thread while others wait for a page: solid to p50, shaded to p99, dots to the maximum"


def text_plot(figures: Sequence[Figure], width: int = WIDTH) -> str:
    """A bar for each scene of each call, of medians in microseconds: solid to p50, shaded to p99, dots to the maximum;
    not wider than `width`. The rounds of the figures hold these, and ``idle-`` of each."""
    bars: list[tuple[str, str, list[float], float]] = []
    for figure in figures:
        call, scene = figure.name.removesuffix(" / none").split(" p50, ")
        median = figure.medians()
        if not any(bar[0] == call for bar in bars):  # the first scene of a call brings the idle one with it
            bars.append((call, IDLE.name, [median[f"idle-{part}"] for part in _PARTS], 1.0))
        bars.append((call, scene, [median[part] for part in _PARTS], figure.ratio))
    low = math.floor(math.log10(min(us[0] for _, _, us, _ in bars)))
    high = max(math.ceil(math.log10(max(us[2] for _, _, us, _ in bars))), low + 1)
    longest = max(16, min(width, WIDTH) - _LABELS - _NUMBERS)
    first, last = f"{_time(low)} ", f" {_time(high)}"
    axis = first + "." * (longest - len(first) - len(last)) + last
    lines = [f"{'':<{_LABELS}}{axis:<{longest}}  {'p50 / p99 / max us':<23} ratio"]
    for call, scene, (p50, p99, most), ratio in bars:
        ends = [max(1, round((math.log10(us) - low) / (high - low) * longest)) for us in (p50, p99, most)]
        drawn = "█" * ends[0] + "▒" * (ends[1] - ends[0]) + "·" * (ends[2] - ends[1])
        numbers = f"{p50:.2f} / {p99:.2f} / {most:.0f}"
        lines.append(f"{call:<6} {scene:<{_LABELS - 7}}{drawn:<{longest}}  {numbers:<23} {ratio:5.2f}")
    return "\n".join(lines)


def _time(power: int) -> str:
    """So many powers of ten of a microsecond, in the unit that has no exponent."""
    unit = min(max(power // 3, -1), 2)
    return f"{10 ** (power - 3 * unit)} {('us', 'ms', 's', 'ns')[unit]}"


def svg_plot(figures: Sequence[Figure]) -> str:
    """The same as a picture, for a document; it needs nothing beside it, so no font from the network."""
    text = text_plot(figures)
    console = Console(record=True, file=io.StringIO(), width=max(map(len, text.splitlines())))
    console.print(text, markup=False, highlight=False)
    return re.sub(r"\s*@font-face \{.*?\}", "", console.export_svg(title=_TITLE), flags=re.DOTALL)
