# SPDX-License-Identifier: Apache-2.0
"""The pictures: SVG by matplotlib, with colours that the page decides upon.

A picture is drawn with colours that stand for a variable of the page's style sheet, and are replaced by it in the SVG:
so one picture is right in a light and in a dark page. Its text stays text. Each is drawn in two widths, of which the
page shows the one that is readable. The residency map is a raster, of one colour that is more or less transparent.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from postcopy.output.words import format_duration, format_speed
from postcopy.report._model import KINDS, Array, Cell, Histogram, Mark, Migration, Side, Timeline
from postcopy.units import format_size

WIDE, NARROW = 660, 300  # points: 880 and 400 pixels of CSS
WIDTHS = {WIDE: "wide", NARROW: "narrow"}  # and the class that shows it
FONT_PT = 9.0
STEPS = 120  # of a curve of rates, at most
_BEFORE, _AFTER = 0.3, 0.5  # shown around the time in which pages move, as parts of that
# What each colour of a picture is in the page; any colours will do that differ, and are nothing's own.
COLOURS = {name: f"#a1{number:02x}b7" for number, name in enumerate((
    "fg", "muted", "grid", "bg", "precopied", "zero", "background", "prefetched", "demand", "pause", "cut", "guest",
    "bytes", "slow", "sent", "received", "placed", "total", "source", "dest"), 16)}  # fmt: skip
Draw = Callable[[int], Figure]
"""Draws a picture of this width, in points."""
_RASTER = "#3f7fd0"
_SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "postcopy", "text.parse_math": False, "font.size": FONT_PT,
    "axes.titlesize": FONT_PT, "axes.labelsize": FONT_PT, "xtick.labelsize": FONT_PT, "ytick.labelsize": FONT_PT,
    "text.color": COLOURS["fg"], "axes.labelcolor": COLOURS["muted"], "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"], "axes.edgecolor": COLOURS["grid"], "axes.facecolor": "none",
    "axes.grid": True, "grid.color": COLOURS["grid"], "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "path.simplify": True, "path.simplify_threshold": 0.3,
    "axes.titlelocation": "left", "axes.titlepad": 5.0,
    "axes.titley": 1.0, "figure.dpi": 72, "lines.linewidth": 1.6,
    "xtick.major.size": 3, "ytick.major.size": 0, "ytick.major.pad": 4,
}  # fmt: skip
_MARK_WORDS = {"all-there": "last page", "lost": "cut", "offer": "begin"}


@dataclass(frozen=True)
class Span:
    """A time that all pictures over time show: the pause, a cut."""

    kind: str
    begin_ms: float
    end_ms: float


def spans(marks: Sequence[Mark], last_ms: float) -> list[Span]:
    """The pause and the cuts, of marks in order; what has no end lasts until the end."""
    found: list[Span] = []
    open_at: dict[str, float] = {}
    for mark in marks:
        if mark.what == "ended":
            last_ms = min(last_ms, mark.at_ms)
        if mark.what in ("pause", "lost"):
            open_at.setdefault("pause" if mark.what == "pause" else "cut", mark.at_ms)
        elif (
            mark.what in ("running", "recovered") and (kind := "pause" if mark.what == "running" else "cut") in open_at
        ):
            found.append(Span(kind, open_at.pop(kind), mark.at_ms))
    return found + [Span(kind, at_ms, max(at_ms, last_ms)) for kind, at_ms in open_at.items()]


class Clock:
    """The axis of time: in seconds or milliseconds, whichever has readable numbers."""

    def __init__(self, first_ms: float, last_ms: float, begun_ms: float | None) -> None:
        """`begun_ms`: when the migration began, which is 0 on the axis; None: not known."""
        self.first_ms, self.last_ms = first_ms, max(last_ms, first_ms + 1)
        self.zero_ms = begun_ms if begun_ms is not None else first_ms
        self.since = "the recording began" if begun_ms is None else "the migration began"
        length = self.length_ms
        self.per_ms, self.unit = (1.0, "ms") if length < 2000 else (1e-3, "s") if length < 600e3 else (1 / 60e3, "min")

    @property
    def length_ms(self) -> float:
        return self.last_ms - self.first_ms

    def __call__(self, at_ms: Any) -> Any:
        return (np.asarray(at_ms) - self.zero_ms) * self.per_ms

    def set_up(self, axes: Axes, marks: Sequence[Span], width: int) -> None:
        axes.set_xlim(self(self.first_ms), self(self.last_ms))
        axes.xaxis.set_major_locator(MaxNLocator(9 if width == WIDE else 5, steps=[1, 2, 5, 10]))
        for span in marks:
            colour = COLOURS[span.kind]
            axes.axvspan(self(span.begin_ms), self(span.end_ms), color=colour, alpha=0.22, lw=0, zorder=2.2)
            axes.axvline(self(span.begin_ms), color=colour, lw=1.0, zorder=2.3)


def interesting(migration: Migration, timeline: Timeline, marks: Sequence[Mark]) -> tuple[float, float]:
    """The time to show of the recording: while pages move or the machine is paused, and some of it before and after. A
    machine may have run for hours before."""
    at_ms = timeline.at_ms
    all_ms = [one.at_ms + migration.offset_ms(side) for side, one in migration.timelines]
    first, last = float(min(one[0] for one in all_ms)), float(max(one[-1] for one in all_ms))
    times = [mark.at_ms for mark in marks if mark.what in ("pause", "running", "lost", "recovered", "all-there")]
    if (moved := bytes_of(migration.main)) is not None:
        share = np.maximum.accumulate(np.nan_to_num(moved)) / np.nanmax(moved)
        times += [float(at_ms[np.searchsorted(share, part)]) for part in (0.01, 0.99)]
    times = [at for at in times if first <= at <= last]
    if not times:
        return first, last
    begin, end = min(times), max(times)
    around = max(end - begin, 20.0)
    return max(first, begin - _BEFORE * around), min(last, end + _AFTER * around)


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    """With these settings and matplotlib's own. It has read a file matplotlibrc, too, which in the current directory
    may be another user's, and could have it run LaTeX."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def as_svg(draw: Draw, name: str) -> str:
    """Both widths, for the page."""
    parts = []
    with _drawing():
        for width, shown in WIDTHS.items():
            parts.append(f'<div class="{shown}">{svg_of(draw(width), f"{name}-{shown}")}</div>')
    return "".join(parts)


def as_file(draw: Draw, colours: str, legend: Sequence[tuple[str, str]]) -> str:
    """A picture for itself; `colours`: a style sheet of the variables; `legend`: which of them is what, above it."""
    with _drawing():
        svg = svg_of(draw(WIDE), "p")
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None
    # A row of the legend has as much as there is room for, by what a letter is wide on average.
    x, row, placed = 10.0, 1, []
    for colour, text in legend:
        room = len(text) * FONT_PT * 0.56 + 24
        if x + room > WIDE and x > 10:
            x, row = 10.0, row + 1
        placed.append((x, 14 * row, colour, html.escape(text)))
        x += room
    above = 14 * row + 12
    words = [
        f'<rect x="{x:.1f}" y="{y - above - 6}" width="8" height="8" style="fill: var(--{colour})"/>'
        f'<text x="{x + 12:.1f}" y="{y - above + 2}" style="font-size: {FONT_PT}px; fill: var(--fg)">{text}</text>'
        for x, y, colour, text in placed
    ]
    width, height = float(size[1]), float(size[2]) + above
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' width="{width * 4 / 3:.0f}" height="{height * 4 / 3:.0f}" viewBox="0 {-above} {width:g} {height:g}">\n'
        f"<style>\n{colours}text {{ font-family: system-ui, 'DejaVu Sans', Arial, sans-serif; }}\n</style>\n"
        f'<rect y="{-above}" width="100%" height="100%" style="fill: var(--bg)"/>\n'
    )
    return head + "\n".join(words) + "\n" + svg.partition(">")[2].lstrip()


def svg_of(figure: Figure, name: str) -> str:
    """What matplotlib writes, without its head and its size, with variables for colours."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    # One page has several pictures: an identifier must be the picture's own.
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    # A tenth of a point is enough for what is drawn; what is written stays as it is.
    return re.sub(r"<[^>]*>", lambda tag: _short(tag[0]), re.sub(r">\s*\n\s*<", ">\n<", svg))


def _short(tag: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"(\d\.\d)\d+", r"\1", tag))


def _figure(width: int, height: float, rows: Sequence[float] = (1,)) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width / 72, height / 72))
    figure.patch.set_alpha(0)
    axes = figure.subplots(len(rows), 1, sharex=True, height_ratios=rows, squeeze=False)[:, 0]
    return figure, list(axes)


def _margins(
    figure: Figure, height: float, width: int, *, left: float = 58, top: float = 20, hspace: float = 0.35
) -> None:
    figure.subplots_adjust(
        left=left / width, right=1 - 10 / width, top=1 - top / height, bottom=36 / height, hspace=hspace
    )


def _plain_axis(axes: Axes, format: Callable[[float], str] | None = None, ticks: int = 4) -> None:
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10], integer=format is None))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format(value) if format else si(value)))
    axes.spines["left"].set_visible(False)
    axes.xaxis.grid(visible=False)


def si(value: float) -> str:
    """As ``12.5k``."""
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g}{letter}"
    return f"{value:.3g}"


def kept(at_ms: Array, least_ms: float) -> NDArray[np.intp]:
    """Which of these times are so far apart at least that a rate from one to the next is one, and no noise; the first
    and the last are."""
    found = [0]
    for number, at in enumerate(at_ms):
        if at - at_ms[found[-1]] >= least_ms:
            found.append(number)
    if len(at_ms) - 1 > found[-1]:
        found[-1 if len(found) > 1 else 1 :] = [len(at_ms) - 1]
    return np.array(found)


def rate(at_ms: Array, counter: Array) -> Array:
    """A second, of a counter, by interval: one value less than there are times. A counter that goes down has begun
    again."""
    period_s = np.maximum(np.diff(at_ms), 0.001) / 1e3
    return np.maximum(np.diff(counter), 0) / period_s


# ---- over time


def over_time(migration: Migration, clock: Clock, marks: Sequence[Mark], found: Sequence[Span]) -> Draw | None:
    """Pages by kind, throughput, progress of the guest, threads that wait: those that are known, below each other."""
    timeline = migration.main.timeline
    if timeline is None or len(timeline.at_ms) < 2:
        return None
    panels: list[tuple[float, str, Callable[[Axes], None]]] = []
    page_bytes = migration.number("ram", "page-size") or 4096
    if any(values[-1] for values in timeline.pages.values()):
        panels.append(
            (
                1.7,
                f"Pages that {'were sent' if migration.main.name == 'source' else 'have arrived'}, by kind",
                lambda axes: _arrived(axes, clock, timeline, migration, page_bytes),
            )
        )
    moved = bytes_of(migration.main)
    if moved is not None:
        panels.append(
            (1, "Bytes a second, on all data channels", lambda axes: _throughput(axes, clock, timeline.at_ms, moved))
        )
    if guest := operations(migration):
        panels.append((1, "Operations of the guest, a second", lambda axes: _guest(axes, clock, guest)))
    if _moves(timeline, "faults-waiting"):
        panels.append((0.8, "Threads that wait for a page, at most", lambda axes: _waiting(axes, clock, timeline)))
    if not panels:
        return None

    def draw(width: int) -> Figure:
        top = 46 if any(clock.first_ms <= mark.at_ms <= clock.last_ms for mark in marks if _named(mark)) else 20
        height = top + 36 + sum(share for share, _, _ in panels) * 88 + (len(panels) - 1) * 26
        figure, axes = _figure(width, height, [share for share, _, _ in panels])
        for each, (_, title, paint) in zip(axes, panels, strict=True):
            paint(each)
            clock.set_up(each, found, width)
            each.set_title(title)
        axes[-1].set_xlabel(f"{clock.unit} since {clock.since}")
        _margins(
            figure, height, width, top=top, hspace=0.36 * len(panels) / sum(share for share, _, _ in panels) + 0.02
        )
        _name_marks(figure, axes, clock, marks, width)
        return figure

    return draw


def _moves(timeline: Timeline, name: str) -> bool:
    return name in timeline.series and bool(np.nanmax(timeline.series[name], initial=0))


def bytes_of(side: Side) -> Array | None:
    """What has gone over the data channels, in the direction in which pages go; None where nothing has."""
    name = "sent-bytes" if side.name == "source" else "received-bytes"
    return side.timeline.series[name] if side.timeline is not None and _moves(side.timeline, name) else None


def _arrived(axes: Axes, clock: Clock, timeline: Timeline, migration: Migration, page_bytes: float) -> None:
    kinds = [kind for kind in KINDS if kind in timeline.pages and timeline.pages[kind][-1]]
    chosen = kept(timeline.at_ms, clock.length_ms / (2 * STEPS))
    axes.stackplot(
        clock(timeline.at_ms[chosen]), *(timeline.pages[kind][chosen] * page_bytes for kind in kinds),
        colors=[COLOURS[kind] for kind in kinds], lw=0,
    )  # fmt: skip
    _plain_axis(axes, lambda value: format_size(round(value)))
    most = axes.get_ylim()[1]
    total = migration.number("ram", "total") or 0
    if total and total < 3 * most:
        axes.axhline(total, color=COLOURS["muted"], lw=1, ls=(0, (4, 3)))
        axes.set_ylim(0, max(most, total * 1.08))
    _binary(axes)


def _binary(axes: Axes) -> None:
    """Ticks at sizes that have short names."""
    most = axes.get_ylim()[1]
    step = 2.0 ** np.ceil(np.log2(max(most, 4) / 5))
    axes.set_yticks(np.arange(0, most, step))


def _throughput(axes: Axes, clock: Clock, at_ms: Array, counter: Array) -> None:
    chosen = kept(at_ms, clock.length_ms / STEPS)
    at_ms, counter = at_ms[chosen], counter[chosen]
    axes.stairs(rate(at_ms, counter), clock(at_ms), baseline=None, color=COLOURS["bytes"], lw=1.4)
    _plain_axis(axes, lambda value: format_speed(value))
    _binary(axes)


def _guest(axes: Axes, clock: Clock, guest: Sequence[tuple[str, Array, Array]]) -> None:
    for _, at_ms, counter in guest:
        chosen = kept(at_ms, clock.length_ms / STEPS)
        at_ms, counter = at_ms[chosen], counter[chosen]
        if len(at_ms) > 1:
            axes.stairs(rate(at_ms, counter), clock(at_ms), baseline=None, color=COLOURS["guest"], lw=1.4)
    _plain_axis(axes, ticks=3)


def _waiting(axes: Axes, clock: Clock, timeline: Timeline) -> None:
    chosen = kept(timeline.at_ms, clock.length_ms / STEPS)
    most = np.maximum.reduceat(np.nan_to_num(timeline.series["faults-waiting"]), np.append(0, chosen[:-1] + 1))
    at_ms = clock(timeline.at_ms[chosen])
    axes.fill_between(at_ms, most, step="pre", color=COLOURS["demand"], alpha=0.75, lw=0)
    _plain_axis(axes, ticks=3)


def operations(migration: Migration) -> list[tuple[str, Array, Array]]:
    """Of the guest: by side, its times, and the counter then. Each side counts while the machine is its own."""
    found = []
    for side, timeline in migration.timelines:
        if len(timeline.at_ms) < 2 or not _moves(timeline, "guest-operations"):
            continue
        at_ms, counted = timeline.at_ms, timeline.series["guest-operations"]
        turn = timeline.first("running") if side.name == "dest" else timeline.first("pause")
        if side.name == "dest":
            known = np.flatnonzero(counted > 0)
            begin = int(known[0]) if len(known) else 0
            at_ms, counted = at_ms[begin:], counted[begin:]
        elif turn is not None:
            # what was counted after the pause is what it was when it began
            keep = int(np.searchsorted(at_ms, turn.at_ms, side="right"))
            counted = counted[: keep + 1]
            at_ms = np.append(at_ms[:keep], turn.at_ms)[: len(counted)]
        good = ~np.isnan(counted)
        at_ms, counted = at_ms[good], counted[good]
        if len(at_ms) > 1:
            found.append((side.name, at_ms + migration.offset_ms(side), counted))
    return found


def _named(mark: Mark) -> bool:
    return mark.what not in ("switchover", "prepared", "commit", "ended", "recovered")


def _name_marks(figure: Figure, axes: Sequence[Axes], clock: Clock, marks: Sequence[Mark], width: int) -> None:
    """Words above the uppermost picture, in two rows; one that has no room is in the list below only."""
    left, right = axes[0].get_position().x0 * width, axes[0].get_position().x1 * width
    height = figure.get_figheight() * 72
    important = ("pause", "lost", "running", "all-there")
    placed: list[tuple[float, str, int, str]] = []
    taken: list[list[tuple[float, float]]] = [[], []]
    for mark in sorted(marks, key=lambda mark: important.index(mark.what) if mark.what in important else 9):
        if not clock.first_ms <= mark.at_ms <= clock.last_ms or not _named(mark):
            continue
        at = left + (right - left) * (mark.at_ms - clock.first_ms) / (clock.last_ms - clock.first_ms)
        word = _MARK_WORDS.get(mark.what, mark.what)[:14]
        if mark.what == "round" and mark.text[:6].isdigit():
            word = f"round {mark.text[:6]}"
        room = len(word) * FONT_PT * 0.56 + 8
        begin = min(at + 2, width - room)
        for row in (0, 1):
            if all(begin + room < one or begin > other for one, other in taken[row]):
                taken[row].append((begin, begin + room))
                placed.append((begin, word, row, mark.what))
                break
        for each in axes if mark.what not in ("pause", "lost") else ():  # those have lines already
            each.axvline(clock(mark.at_ms), color=COLOURS["muted"], lw=0.7, ls=(0, (2, 2)), zorder=0.6)
    for begin, word, row, what in placed:
        figure.text(
            begin / width, 1 - (8 + 12 * row) / height, word, fontsize=FONT_PT - 0.5, va="center",
            color=COLOURS[{"pause": "pause", "lost": "cut"}.get(what, "muted")],
            fontweight="bold" if what in ("pause", "lost") else "normal",
        )  # fmt: skip


def residency(timeline: Timeline, clock: Clock, found: Sequence[Span]) -> Draw | None:
    """Which part of the memory was there, over time, and the faults that were sampled."""
    levels = timeline.residency
    if levels is None or len(timeline.at_ms) < 2:
        return None

    def draw(width: int) -> Figure:
        height = 260.0
        figure, (axes,) = _figure(width, height)
        # (columns are not equally far from each other where the recorder was late)
        begin, end = max(clock.first_ms, float(timeline.at_ms[0])), min(clock.last_ms, float(timeline.at_ms[-1]))
        end = max(end, begin + clock.length_ms / 1000)
        columns = np.linspace(begin, end, 400)
        at = np.clip(np.searchsorted(timeline.at_ms, columns, side="right") - 1, 0, len(timeline.at_ms) - 1)
        colours = LinearSegmentedColormap.from_list("resident", [(*_rgb(_RASTER), 0.0), (*_rgb(_RASTER), 1.0)])
        axes.imshow(
            levels[at].T, origin="lower", aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=72,
            extent=(clock(begin), clock(end), 0, 100), zorder=1,
        )  # fmt: skip
        clock.set_up(axes, found, width)
        axes.grid(visible=False)
        axes.set_ylim(0, 100)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
        axes.set_title("Place in the memory")
        axes.set_xlabel(f"{clock.unit} since {clock.since}")
        _block_borders(axes, timeline)
        if (faults := timeline.faults) is not None:
            slow = faults.us > np.percentile(faults.us, 99) if len(faults.us) >= 100 else np.zeros(len(faults.us), bool)
            _dots(axes, clock(faults.at_ms[~slow]), 100 * faults.place[~slow], COLOURS["demand"], 2.2)
            _dots(axes, clock(faults.at_ms[slow]), 100 * faults.place[slow], COLOURS["slow"], 5.0)
        _margins(figure, height, width)
        return figure

    return draw


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return red, green, blue


def _block_borders(axes: Axes, timeline: Timeline) -> None:
    total, upto = sum(size for _, size, _ in timeline.blocks), 0.0
    for _, size, _ in timeline.blocks[:-1][:16]:
        upto += size
        axes.axhline(100 * upto / total, color=COLOURS["muted"], lw=0.8, zorder=2)


def _dots(axes: Axes, x: Array, y: Array, colour: str, size: float) -> None:
    """As one path of lines that are a point long: a marker for each would be ten times the bytes."""
    if not len(x):
        return
    points = np.column_stack([x, y]).repeat(2, axis=0)
    points[1::2, 0] += 1e-9 + abs(float(np.ptp(x))) * 1e-6
    codes = np.tile(np.array([Path.MOVETO, Path.LINETO], dtype=np.uint8), len(x))
    path = Path(points, codes)
    path.should_simplify = False
    axes.add_artist(PathPatch(path, facecolor="none", edgecolor=colour, lw=size, capstyle="round", zorder=3))


# ---- how long


def latency(stages: dict[str, Histogram]) -> Draw | None:
    """Percentiles on an axis of nines, times on a logarithmic one: the few that waited long are as wide as the rest."""
    total = stages.get("total")
    if total is None or total.count < 2:
        return None
    nines = min(8.0, max(1.0, float(np.log10(total.count))))

    def draw(width: int) -> Figure:
        height = 250.0
        figure, (axes,) = _figure(width, height)
        low, high = np.inf, 0.0
        for stage, histogram in stages.items():
            share = np.cumsum(histogram.counts) / histogram.counts.sum()
            at = np.concatenate([[0.0], -np.log10(np.maximum(1 - share, 10**-nines))])
            axes.stairs(
                histogram.upto_us,
                np.maximum.accumulate(np.minimum(at, nines)),
                baseline=None,
                color=COLOURS[stage],
                lw=2.2 if stage == "total" else 1.4,
                zorder=3,
            )
            low, high = min(low, float(histogram.upto_us[0])), max(high, float(histogram.upto_us[-1]))
        axes.set_yscale("log")
        axes.set_ylim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high * 1.001)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _decade(value)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlim(0, nines)
        ticks: dict[float, str] = {}
        room: list[tuple[float, float]] = []
        for at_nines in (-np.log10(0.5), *np.arange(1, int(nines) + 1), 0.0):  # what matters most first
            text = f"{100 * (1 - 10.0**-at_nines):.10g} %"
            middle, half = at_nines / nines * (width - 68), len(text) * FONT_PT * 0.3 + 4
            if all(middle + half <= begin or middle - half >= end for begin, end in room):
                room.append((middle - half, middle + half))
                ticks[float(at_nines)] = text
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_title("Latency, at most")
        axes.set_xlabel("of the faults (percentile)")
        axes.spines["left"].set_visible(False)
        _margins(figure, height, width)
        return figure

    return draw


def _decade(us: float) -> str:
    unit, per = ("s", 1e6) if us >= 1e6 else ("ms", 1e3) if us >= 1e3 else ("µs", 1)
    return f"{us / per:g} {unit}"


# ---- the pause


def pause(parts: Sequence[tuple[str, str, float, float]]) -> Draw:
    """Its stages below each other, each from where it began: (side, label, begin, length) in microseconds."""

    def draw(width: int) -> Figure:
        height = 44.0 + 25 * len(parts)
        figure, (axes,) = _figure(width, height)
        end = max(begin + length for _, _, begin, length in parts) or 1.0
        unit, per = ("ms", 1e3) if end >= 2000 else ("µs", 1.0)
        for row, (side, label, begin, length) in enumerate(parts):
            axes.barh(
                -row - 0.24, max(length, end * 0.003) / per, left=begin / per, height=0.36, color=COLOURS[side], lw=0
            )
            # above its bar, from where that begins or to where it ends; where there is no room for either, on the right
            text = f"{label}: {format_duration(length / 1e6)}"
            room = len(text) * FONT_PT * 0.56 / (width - 18) * end
            at, side_of = (begin + length, "right") if begin > end / 2 else (begin, "left")
            if (at < room) if side_of == "right" else (at + room > end):
                at, side_of = (end, "right") if room < end else (0.0, "left")
            axes.text(at / per, -row + 0.02, text, va="bottom", ha=side_of, color=COLOURS["fg"])
        axes.set_xlim(0, end / per)
        axes.set_ylim(-len(parts) + 0.35, 0.62)
        axes.yaxis.set_major_locator(NullLocator())
        axes.xaxis.set_major_locator(MaxNLocator(8 if width == WIDE else 4, steps=[1, 2, 5, 10]))
        axes.set_xlabel(f"{unit} since the request to pause")
        axes.spines["left"].set_visible(False)
        _margins(figure, height, width, left=8, top=4)
        return figure

    return draw


# ---- ways to migrate, compared

_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("downtime", "downtime", lambda ms: format_duration(ms / 1e3)),
    ("total", "total time", lambda ms: format_duration(ms / 1e3)),
    ("faults-over-working-set", "faults / working set", lambda share: f"{100 * share:.0f} %"),
    ("dip", "dip of throughput", lambda share: f"{100 * share:.0f} %"),
)
_ROW, _HEAD = 13.0, 20.0  # points


def policies(cells: Sequence[Cell]) -> Draw:
    """A bar for each policy, by workload and quantity. All bars of a quantity have one scale."""
    most = {name: max((cell.values.get(name, 0.0) for cell in cells), default=0.0) for name, _, _ in _COLUMNS}
    texts = (shown(cell.values.get(name, 0.0)) for cell in cells for name, _, shown in _COLUMNS)
    beside = FONT_PT * 0.56 * max(len(text) for text in texts) + 8  # of a bar: its value
    workloads = {cell.workload: [one for one in cells if one.workload == cell.workload] for cell in cells}

    def draw(width: int) -> Figure:
        across = 4 if width == WIDE else 2
        parts = [_COLUMNS[at : at + across] for at in range(0, len(_COLUMNS), across)]
        height = sum(len(parts) * (_HEAD + _ROW * len(group)) for group in workloads.values()) + 8
        figure = Figure(figsize=(width / 72, height / 72))
        figure.patch.set_alpha(0)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        left = 2.0 + min(FONT_PT * 0.56 * max(len(cell.policy) for cell in cells) + 8, 0.3 * width)
        column = (width - left) / across
        y = 0.0
        for workload, group in workloads.items():
            for columns in parts:
                y += _HEAD
                base = y - 6
                axes.text(2, base, _shorter(workload, left), fontweight="bold")
                for number, (_, title, _) in enumerate(columns):
                    axes.text(left + number * column, base, title, color=COLOURS["muted"])
                for cell in group:
                    y += _ROW
                    axes.text(2, y - 6, _shorter(cell.policy, left))
                    for number, (name, _, shown) in enumerate(columns):
                        value, x = cell.values.get(name), left + number * column
                        length = max(0.0, column - beside) * max(0.0, value or 0.0) / (most[name] or 1.0)
                        if value is not None:
                            axes.barh(y - 9, max(length, 1.0), left=x, height=8, color=COLOURS["background"], lw=0)
                        said = shown(value) if value is not None else "failed" if cell.failure else "-"
                        colour = COLOURS["cut" if cell.failure else "fg"]
                        axes.text(x + (length + 4 if value is not None else 0), y - 6, said, color=colour)
        return figure

    return draw


def _shorter(text: str, room: float) -> str:
    most = max(4, int((room - 8) / (FONT_PT * 0.56)))
    return text if len(text) <= most else f"{text[: most - 1]}…"
