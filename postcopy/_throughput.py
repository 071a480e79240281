# SPDX-License-Identifier: Apache-2.0
"""How far the throughput of a guest fell in a migration, and when it was back.

A guest reports how many operations it has done every few hundred of them, and a recording takes that count every few
milliseconds: over time it is a staircase. Here it is straight lines between the moments at which it rose, so that even
progress has an even throughput. Where it did not rise for longer than a window, the guest stood still.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WINDOW_MS = 200.0
"""Throughput is a mean over so long. Shorter windows would show the guest's reports."""
BEFORE_MS = 800.0
"""What it was before the migration: over at most so long, and at least a window."""
BACK = 0.9
"""Of the throughput before: it is back when it does not fall below that ..."""
STEADY_MS = 600.0
"""... for so long."""

Points = Sequence[tuple[float, float]]
"""Milliseconds, rising, and the operations that the guest had done by then."""


@dataclass(frozen=True)
class Throughput:
    before: float  # operations a second
    least: float  # the same: the lowest mean over a window since the migration began
    back_ms: float | None  # since the pause; None: it was not back as long as it was recorded

    @property
    def dip(self) -> float:
        """Which part of it was lost at its lowest: 1 is all."""
        return max(0.0, 1 - self.least / self.before)


def throughput(points: Points, begin_ms: float, pause_ms: float) -> Throughput | None:
    """`points`: of `joined`. None where it is not known for a window before `begin_ms` and one after it, or where there
    was none before."""
    if not points or points[0][0] > begin_ms - WINDOW_MS:
        return None
    before = _rate(points, max(points[0][0], begin_ms - BEFORE_MS), begin_ms)
    rates = [rate for _, rate in _windows(points, begin_ms)]
    if before <= 0 or not rates:
        return None
    return Throughput(1e3 * before, 1e3 * min(rates), _back_ms(points, pause_ms, BACK * before))


def joined(here: Points, there: Points, pause_ms: float | None, running_ms: float | None) -> list[tuple[float, float]]:
    """The count over time, as straight lines: what the source recorded up to the pause, and the destination from the
    moment at which the machine runs there. None: that did not happen."""
    if pause_ms is None or running_ms is None or running_ms < pause_ms:
        return _rises(here)
    # It has stopped here, and until its first report there the destination does not know the count.
    least = max((count for _, count in here), default=0.0)
    before = [point for point in here if point[0] < pause_ms]
    after = [(at_ms, count) for at_ms, count in there if at_ms > running_ms]
    return [*_rises(before), *_rises([(pause_ms, least), (running_ms, least), *after], paused=True)]


def _rises(points: Points, *, paused: bool = False) -> list[tuple[float, float]]:
    """Those at which the count rose, and the last one before that where it had not for longer than a window. `paused`:
    from the first to the second point it stood still."""
    found = list(points[: 1 + paused])
    last = found[-1] if found else (0.0, 0.0)
    for at_ms, count in points[1 + paused :]:
        if count > found[-1][1]:
            if at_ms - found[-1][0] > WINDOW_MS and last[0] > found[-1][0]:
                found.append((last[0], found[-1][1]))
            found.append((at_ms, count))
        last = (at_ms, count)
    if found and last[0] - found[-1][0] > WINDOW_MS:
        found.append((last[0], found[-1][1]))
    return found


def _count_at(points: Points, at_ms: float) -> float:
    """Between two points: on the straight line between them."""
    number = bisect_left(points, (at_ms, -1.0))
    if number == 0:
        return points[0][1]
    if number == len(points):
        return points[-1][1]
    (from_ms, low), (to_ms, high) = points[number - 1], points[number]
    return low + (high - low) * (at_ms - from_ms) / (to_ms - from_ms)


def _rate(points: Points, begin_ms: float, end_ms: float) -> float:
    """Operations a millisecond."""
    return (_count_at(points, end_ms) - _count_at(points, begin_ms)) / (end_ms - begin_ms)


def _windows(points: Points, begin_ms: float) -> Iterator[tuple[float, float]]:
    """When windows begin, rising, and their rates; from `begin_ms` on, as far as the points go. Between two of these
    the rate changes evenly, since in both ends of the window it does: no other window has more or less."""
    last_ms = points[-1][0] - WINDOW_MS
    if last_ms >= begin_ms:
        edges = {at_ms - back_ms for at_ms, _ in points for back_ms in (0.0, WINDOW_MS)}
        for at_ms in sorted({begin_ms, last_ms, *(edge for edge in edges if begin_ms < edge < last_ms)}):
            yield at_ms, _rate(points, at_ms, at_ms + WINDOW_MS)


def _back_ms(points: Points, pause_ms: float, enough: float) -> float | None:
    since: float | None = None
    before = (pause_ms, enough)
    for at_ms, rate in _windows(points, pause_ms):
        if rate < enough:
            since = None
        elif since is None:
            at_before, low = before
            since = at_ms if low >= enough else at_before + (at_ms - at_before) * (enough - low) / (rate - low)
        if since is not None and at_ms + WINDOW_MS - since >= STEADY_MS:
            return since - pause_ms
        before = (at_ms, rate)
    return None
