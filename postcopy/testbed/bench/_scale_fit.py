# SPDX-License-Identifier: Apache-2.0
"""How a cost grows: the exponent of a power law with its confidence interval, and a straight line to go on with."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from postcopy.records.results import Fit

MIN_POINTS = 3
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t, two-sided, 95 %, by degrees of freedom from 1 on."""


def t95(degrees: int) -> float:
    """How many standard errors a 95 % confidence interval reaches to either side."""
    # Beyond the table the expansion by Cornish and Fisher is right to two digits after the point.
    z = 1.959964
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return _T95[degrees - 1] if degrees <= len(_T95) else z + (z**3 + z) / (4 * degrees) + second


def fit(xs: Sequence[float], ys: Sequence[float]) -> Fit | None:
    """Of one value for each x; None for fewer than `MIN_POINTS`, or where one is not positive.

    The exponent is the slope of the line through the logarithms (least squares). Its interval is made of the distances
    of the points from that line, so it says both how much the values scatter and how far they are from a power law. A
    cost of a constant part and one that grows is none: its exponent is between, and rises (see `last_exponent`). The
    straight line minimises the relative errors, as the values span decades; neither of its parts is below 0.
    """
    if len(xs) < MIN_POINTS or min(*xs, *ys) <= 0 or len(set(xs)) < MIN_POINTS:
        return None
    logs = [math.log(x) for x in xs], [math.log(y) for y in ys]
    exponent, constant = statistics.linear_regression(*logs)
    left = sum((y - constant - exponent * x) ** 2 for x, y in zip(*logs, strict=True))
    mean, degrees = statistics.fmean(logs[0]), len(xs) - 2
    error = math.sqrt(left / degrees / sum((x - mean) ** 2 for x in logs[0]))
    base, slope = _line(xs, ys)
    reach = t95(degrees) * error
    return Fit(
        exponent=exponent, low=exponent - reach, high=exponent + reach, base=base, slope=slope, points=len(xs)
    )  # fmt: skip


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    weights = [1 / y**2 for y in ys]

    def total(*factors: Sequence[float]) -> float:
        return math.fsum(map(math.prod, zip(weights, *factors, strict=True)))

    one, x, xx, y, xy = total(), total(xs), total(xs, xs), total(ys), total(xs, ys)
    slope = (one * xy - x * y) / (one * xx - x * x)
    base = (y - slope * x) / one
    if base < 0:
        return 0.0, xy / xx
    if slope < 0:
        return y / one, 0.0
    return base, slope


def last_exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Between the two largest x: where a constant part matters least."""
    (x0, y0), (x1, y1) = sorted(zip(xs, ys, strict=True))[-2:]
    return math.log(y1 / y0) / math.log(x1 / x0)
