# SPDX-License-Identifier: Apache-2.0
"""``scale``: how costs grow along six dimensions, each cost as a curve with a fitted exponent.

A dimension has points; a round measures all its costs at each point, in processes of their own (`_scale_parts`,
`_scale_moves`). A cost need not have a value at each point: whole machines end where the host does, parts of the engine
go on with sparse memory. What is fitted are the medians of the rounds. docs/scale.md says what comes of it.

The time is bounded (`BUDGET_S`, or what was asked for). The next round is one of the dimension that has used least of
it, so that the rounds of each are spread over all of the time, and what is cheap has more of them; and within a round
the points come in an order of their own. What the host does for a while is then part of some rounds of each point, from
which the median keeps it out, and no growth. On a host on which a first round does not fit every second point is
missing.
"""

from __future__ import annotations

import argparse
import random
import statistics
import textwrap
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import trio

from postcopy.errors import MigrationError, PostcopyError, known_error
from postcopy.records.results import Curve, Measurement, Value
from postcopy.testbed._processes import run_json
from postcopy.testbed.bench import _scale_moves as moves
from postcopy.testbed.bench._bulk import Take, open_sides
from postcopy.testbed.bench._common import Found, pair, worker
from postcopy.testbed.bench._scale_fit import fit, last_exponent
from postcopy.units import format_size

BUDGET_S = 165.0
"""Of all dimensions that are asked for, together."""
ROUNDS = 25
"""Of a dimension at most."""
PART_DEADLINE_S = 60.0
GIB = 1 << 30
STRIPED_BYTES = 64 << 20
PUSHED_BYTES = (64 << 20, 1 << 30)
"""Memory that is full of content, from one size to another; so much is there twice."""
MOVED_BYTES = 256 << 30
"""The largest sparse machine that moves as a whole; a larger one has no more to do than parts of the engine show."""
_BARS = "▁▂▃▄▅▆▇█"
_REACHED = {True: "reached", False: "NOT REACHED", None: "not clear"}


Measure = Callable[[float], Awaitable[dict[str, float]]]


@dataclass(frozen=True)
class Cost:
    """What grows, or should not."""

    what: str
    unit: str
    goal: float | None = None  # of the exponent; None: nothing of ours decides it
    note: str = ""


@dataclass(frozen=True)
class Dimension:
    """What is varied."""

    over: str
    unit: str  # of x
    points: tuple[float, ...]
    measure: Measure
    """At one point; by the names of `costs`."""
    costs: dict[str, Cost]
    x_of: str = ""  # the cost that is x itself, where that can only be measured
    label: Callable[[float], str] = "{:g}".format


# ---- what is measured at a point


async def _part(what: str, size: int) -> dict[str, float]:
    return dict(await run_json(worker("_scale_parts", what, str(size)), f"the measurement of {what}", PART_DEADLINE_S))


async def _memory(x: float) -> dict[str, float]:
    size_bytes = int(x * GIB)
    found = await _part("memory", size_bytes)
    if PUSHED_BYTES[0] <= size_bytes <= PUSHED_BYTES[1]:
        async with open_sides(size_bytes, 2) as sides:
            await sides.take(Take("engine"))  # the pages of both sides are there
            floor, engine = [await sides.take(Take(kind)) for kind in ("floor", "engine")]
        found |= {
            "push": size_bytes / engine["bytes-per-s"] * 1e3,
            "push-floor": size_bytes / floor["bytes-per-s"] * 1e3,
        }
        found["push-over-floor"] = found["push"] / found["push-floor"]
    if size_bytes <= MOVED_BYTES:
        found |= await moves.move(
            *moves.WORK, *moves.USED, "--memory", f"{size_bytes >> 20}MiB", "--vcpus", "1", sparse=True
        )  # fmt: skip
        found.pop("blocktime", None)
    return found


async def _userfaultfds(x: float) -> dict[str, float]:
    count = int(x)
    return await pair("striped", STRIPED_BYTES, bulk_channels=count - 1, pin=True, module="_scale_parts")


async def _vcpus(x: float) -> dict[str, float]:
    return await moves.move(*moves.WORK, "--memory", "128MiB", "--vcpus", str(int(x)))


async def _pending(x: float) -> dict[str, float]:
    return await _part("pending", int(x))


async def _machines(x: float) -> dict[str, float]:
    return await moves.machines(int(x))


async def _delay(x: float) -> dict[str, float]:
    return await moves.delayed(x / 2e3)


# ---- the dimensions

FLAT, LINEAR = 0.1, 1.1
"""Goals of exponents: what must not grow, and what must not grow faster than x; each with room for noise."""
SUBLINEAR = 0.75
_WAKE = "the kernel looks at all that wait on a userfaultfd when a page is placed"
DIMENSIONS = {
    "memory": Dimension(
        "memory", "GiB", (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 16, 256, 1024),
        _memory,
        {
            "switchover": Cost("switchover (32 MiB of it used)", "ms", SUBLINEAR),
            "look": Cost("in the pause: the look for what has changed", "ms", SUBLINEAR),
            "fault-p50": Cost("fault p50 beside the push (32 MiB used)", "us", FLAT),
            "fault-p99": Cost("fault p99 beside the push", "us", FLAT),
            "setup": Cost("before the pause: from the offer to ready", "ms", SUBLINEAR),
            "total": Cost("total from the pause (32 MiB used)", "ms", SUBLINEAR),
            "resident": Cost("peak memory of the destination beside the machine's", "MiB", SUBLINEAR),
            "push": Cost("push of a memory full of content", "ms", LINEAR),
            "push-floor": Cost("the same by the smallest program", "ms"),
            "push-over-floor": Cost("push over floor", "1", FLAT),
            "map": Cost("the map of what there is", "ms", LINEAR),
            "arm": Cost("adding and arming the memory", "ms", LINEAR),
            "zeros": Cost("marking what is zero", "ms", LINEAR),
            "maps": Cost("maps of the destination", "MiB", LINEAR),
            "counters": Cost("reading the counters", "us", FLAT),
            "claim": Cost("claiming a run to push", "ns", SUBLINEAR, "claims: of 4096 pages that are left"),
            "recovery-size": Cost("map of a recovery, half received", "kB", LINEAR),
            "recovery-map": Cost("making, taking and applying it", "ms", LINEAR),
        },
        label=lambda x: format_size(int(x * GIB)),
    ),
    "userfaultfds": Dimension(
        "userfaultfds of one memory", "1", (1, 2, 4, 8, 16, 32, 64), _userfaultfds,
        {
            "one-fault": Cost("fault p50 of one thread", "us", FLAT),
            "many-faults": Cost("8 threads that fault: elapsed time a fault", "us", FLAT),
            "many-p50": Cost("8 threads that fault: p50", "us", FLAT),
            "many-p99": Cost("8 threads that fault: p99", "us", 0.3),
            "start": Cost("making and arming all", "ms", LINEAR),
            "fd-memory": Cost("memory of all", "KiB", LINEAR),
            "fd-counters": Cost("reading the counters", "us", LINEAR),
            "received": Cost("copying the received map", "us", FLAT),
        },
    ),
    "vcpus": Dimension(
        "vCPUs of one machine", "1", (1, 2, 3, 4, 6, 8), _vcpus,
        {
            "switchover": Cost("switchover", "ms", SUBLINEAR),
            "setup": Cost("before the pause: from the offer to ready", "ms", SUBLINEAR),
            "fault-p50": Cost("fault p50 beside the push", "us", SUBLINEAR),
            "fault-p99": Cost("fault p99 beside the push", "us", LINEAR,
                              "fault p99: more threads than processors wait for each other"),
            "blocktime": Cost("a vCPU waits for pages, in all", "ms"),
            "total": Cost("total from the pause", "ms", SUBLINEAR),
            "resident": Cost("peak memory of the destination beside the machine's", "MiB", 0.3),
        },
    ),
    "pending": Dimension(
        "threads that wait on one userfaultfd", "1", (1, 10, 100, 1000, 10_000), _pending,
        {
            "sent": Cost("from a fault's event to its request", "us", 0.2),
            "placed": Cost("from its page to the thread's wake-up", "us", None, _WAKE),
            "wake": Cost("the kernel's wake-up for one page", "us", None, _WAKE),
            "pending-counters": Cost("reading the counters", "us", FLAT),
            "requested-again": Cost("after a lost connection: all requested again", "ms", LINEAR),
            "all-answered": Cost("all answered at once", "ms", None, _WAKE),
        },
    ),
    "machines": Dimension(
        "machines of one daemon", "1", (1, 2, 4, 8, 16, 32, 64), _machines,
        {
            "all-start": Cost("starting all", "ms", LINEAR),
            "daemon-memory": Cost("memory of all, beside their own", "KiB", LINEAR),
            "idle": Cost("processor time while nothing happens", "%", LINEAR),
            "status": Cost("answer to status", "ms", LINEAR),
            "all-moved": Cost(f"all move to another daemon, {moves.AT_ONCE} at once", "ms", LINEAR),
            "move-cpu": Cost("processor time of both daemons for that", "ms", LINEAR),
            "each-switchover": Cost("switchover of each of them, median", "ms", SUBLINEAR),
        },
    ),
    "delay": Dimension(
        "round trip, measured", "ms", (0, 1, 3, 5, 10, 25, 50), _delay,
        {
            "fault-p50": Cost("fault p50", "ms", LINEAR),
            "fault-p99": Cost("fault p99", "ms", LINEAR),
            "switchover": Cost("switchover", "ms", LINEAR),
            "setup": Cost("before the pause: from the offer to ready", "ms", LINEAR),
            "first-page": Cost("from a reset of all connections to the next page", "ms", LINEAR),
        },
        x_of="echo", label=lambda x: f"{x:g} ms" if x else "none",
    ),
}  # fmt: skip


def add_arguments_scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dimension", action="append", choices=list(DIMENSIONS), metavar="NAME", default=argparse.SUPPRESS,
        help=f"measure this one only, of {', '.join(DIMENSIONS)}; may be repeated (default: all)",
    )  # fmt: skip


async def measure_scale(given: Mapping[str, Any], found: Found) -> None:
    """All costs of the dimensions asked for, kept after each round. `MigrationError` at the end for dimensions without
    any point."""
    budget_s, rounds = given.get("within", BUDGET_S), given.get("rounds", ROUNDS)
    names = list(dict.fromkeys(given.get("dimension", DIMENSIONS)))
    under_way = [Curves(name, DIMENSIONS[name]) for name in names]
    began_s, left = trio.current_time(), list(under_way)
    while left:
        each = min(left, key=lambda each: each.spent_s)
        now_s = trio.current_time()
        if len(each.done) == rounds or (each.done and now_s + each.longest_s > began_s + budget_s):
            left.remove(each)
            continue
        try:
            await each.add_round(began_s + budget_s if each.done else now_s + budget_s / len(names))
        finally:
            found.measurements = [curve for curves in under_way for curve in curves.measurements()]
    for each in under_way:
        if not any(each.done):
            raise MigrationError(f"{each.name}: no point could be measured: {next(iter(each.problems.values()))}")


Points = dict[float, dict[str, float]]


class Curves:
    """The costs of a dimension, as far as they were measured. A point that more rounds lack than have is left out."""

    def __init__(self, name: str, dimension: Dimension) -> None:
        self.name = name
        self._dimension = dimension
        self.done: list[Points] = []  # a round each
        self.problems: dict[str, str] = {}  # by the point's label
        self.longest_s = self.spent_s = 0.0

    async def add_round(self, ends_s: float) -> None:
        """`ends_s`: by Trio's clock. A round that does not come to its end is left out, but of the first all points
        that were done count."""
        points, label = self._dimension.points, self._dimension.label
        # Where the time ends in the first there are some of all sizes.
        order = [*points[::-2], *points[-2::-2]]
        if number := len(self.done):
            random.Random(number).shuffle(order)
        began_s, found, whole = trio.current_time(), Points(), False
        try:
            with trio.move_on_at(ends_s):
                for x in order:
                    try:
                        found[x] = await _contained(self._dimension.measure, x)
                    except MigrationError as error:
                        self.problems[label(x)] = str(error)
                whole = True
        finally:
            if whole or not self.done:
                self.done.append(found)
            for x in points if len(self.done) == 1 else ():
                if x not in found:
                    self.problems.setdefault(label(x), "there was no time left")
            took_s = trio.current_time() - began_s
            self.longest_s, self.spent_s = max(self.longest_s, took_s), self.spent_s + took_s

    def measurements(self) -> list[Measurement]:
        labels: dict[str, list[str]] = {}
        for x in self._dimension.points:
            if sum(x in points for points in self.done) * 2 <= len(self.done) and self.done:
                label = self._dimension.label(x)
                labels.setdefault(self.problems[label], []).append(label)
        note = "; ".join(f"left out: {', '.join(left)}: {problem}" for problem, left in labels.items())
        costs = self._dimension.costs.items()
        curves = (_curve(self.name, self._dimension, key, cost, self.done, note) for key, cost in costs)
        return [curve for curve in curves if curve is not None]


async def _contained(measure: Measure, x: float) -> dict[str, float]:
    """`MigrationError` for whatever went wrong with its processes."""
    try:
        return await measure(x)
    except trio.TooSlowError:
        raise MigrationError("it was not done in time") from None
    except PostcopyError as error:
        raise MigrationError(str(error)) from None
    except BaseExceptionGroup as group:
        if group.subgroup((KeyboardInterrupt, trio.Cancelled)) is not None:
            raise
        raise MigrationError(str(known_error(group))) from None


def _curve(name: str, dimension: Dimension, key: str, cost: Cost, done: list[Points], note: str) -> Measurement | None:
    """None where no point has the cost."""
    values: dict[str, list[float | None]] = {}
    at: dict[str, float] = {}
    for x in dimension.points:
        rounds = [points.get(x, {}).get(key) for points in done]
        if 2 * rounds.count(None) < len(rounds):
            values[dimension.label(x)] = rounds
            at[dimension.label(x)] = (
                statistics.median(points[x][dimension.x_of] for points in done if x in points) if dimension.x_of else x
            )
    if not values:
        return None
    measurement = Measurement(
        figure="scale",
        name=f"{name}: {cost.what}",
        values={label: Value(unit=cost.unit, rounds=rounds, better="less") for label, rounds in values.items()},
        curve=Curve(over=dimension.over, x_unit=dimension.unit, at=at),
        note="; ".join(filter(None, (cost.note, note))) or None,
    )
    assert measurement.curve is not None
    found = fit(list(at.values()), list(_medians(measurement).values()))
    if found is not None:
        measurement.curve.fit = found
        measurement.result, measurement.better = found.exponent, "less"
        measurement.goal = cost.goal
        if cost.goal is not None and not found.low <= cost.goal <= found.high:
            measurement.reached = found.high < cost.goal
    return measurement


def _medians(measurement: Measurement) -> dict[str, float]:
    """Of the rounds that have a point."""
    values = measurement.values.items()
    return {label: statistics.median(each for each in value.rounds if each is not None) for label, value in values}


# ---- for people


def text_scale(measurements: Sequence[Measurement], width: int) -> str:
    """A table for each dimension: a line or two for each cost."""
    lines: list[str] = []
    for name in dict.fromkeys(measurement.name.partition(": ")[0] for measurement in measurements):
        own = [measurement for measurement in measurements if measurement.name.startswith(f"{name}: ")]
        labels = list(dict.fromkeys(label for measurement in own for label in measurement.values))
        rounds = len(next(iter(own[0].values.values())).rounds)
        assert own[0].curve is not None
        lines += ["", f"{name}: {own[0].curve.over}, {', '.join(labels)}; rounds: {rounds}"]
        for measurement in own:
            lines += _line(measurement, width)
        notes = dict.fromkeys(measurement.note for measurement in own if measurement.note)
        for note in notes:
            lines += textwrap.wrap(note, width, initial_indent="  ", subsequent_indent="  ")
    legend = (
        "Exponent: cost = constant * x ^ exponent, with its 95 % confidence interval; at the end: between the last two"
        " points; then the straight line (memory: x in GiB). The curve is on logarithmic axes:"
        f" {_BARS[0]} is the first value, {_BARS[-1]} as many times that as x has grown. A goal is missed where the"
        " whole interval is above it, reached where it is below, and else not clear."
    )
    return "\n".join([*lines, "", *textwrap.wrap(legend, width)])


def _line(measurement: Measurement, width: int) -> list[str]:
    curve = measurement.curve
    assert curve is not None
    what, found = measurement.name.partition(": ")[2], _medians(measurement)
    unit = next(iter(measurement.values.values())).unit
    ys, xs = list(found.values()), [curve.at[label] for label in found]
    name = f"{what}{'' if unit == '1' else f', {unit}'}"
    values = " ".join(f"{y:.3g}" for y in ys)
    lines = textwrap.wrap(f"  {name:<52} {sparkline(xs, ys)}  {values}", width, subsequent_indent=" " * 55)
    if (grown := curve.fit) is not None:
        goal = ""
        if measurement.goal is not None:
            goal = f"; goal {measurement.goal:g}: {_REACHED[measurement.reached]}"
        lines += textwrap.wrap(
            f"exponent {grown.exponent:.2f} ({grown.low:.2f} .. {grown.high:.2f}), at the end"
            f" {last_exponent(xs, ys):.2f}; {grown.base:.3g} + {grown.slope:.3g} x{goal}",
            width, initial_indent=" " * 6, subsequent_indent=" " * 6,
        )  # fmt: skip
    return lines


def sparkline(xs: Sequence[float], ys: Sequence[float]) -> str:
    """On logarithmic axes: the lowest bar is the first value, the highest one as many times it as x has grown."""
    if min(*xs, *ys) <= 0:
        return "?" * len(ys)
    span = log(max(xs) / xs[0]) or 1.0
    heights = [log(y / ys[0]) / span for y in ys]
    return "".join(_BARS[min(len(_BARS) - 1, max(0, round(height * (len(_BARS) - 1))))] for height in heights)
