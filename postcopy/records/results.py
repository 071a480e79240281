# SPDX-License-Identifier: Apache-2.0
"""What was measured, and where: the line that every `--json` begins with, and the lines of `bench`."""

from __future__ import annotations

from typing import Annotated

from postcopy.records._base import Record, doc
from postcopy.records.timeline import Distribution


class Host(Record, kw_only=True):
    """What decides how fast a host is, as far as it can be read."""

    cpu: Annotated[str | None, doc("Model of the processor; null where the kernel does not tell.")]
    cpus: Annotated[int, doc("Processors of the host.", "processors")]
    usable_cpus: Annotated[int, doc("Those of them that this process may use.", "processors")]
    memory: Annotated[int, doc("Of the host.", "bytes")]
    page_size: Annotated[int, doc("Of memory.", "bytes")]
    kernel: Annotated[str, doc("Its release.")]
    architecture: Annotated[str, doc("Of the processor.")]
    virtual: Annotated[bool | None, doc("Whether it is a virtual machine; null where the processor does not tell.")]
    container: Annotated[str | None, doc("What kind of container this is; null: none was detected.")]
    thp: Annotated[str | None, doc("Transparent huge pages: always, madvise or never; null where there are none.")]
    governor: Annotated[str | None, doc("What chooses the frequency of the first processor; null where nothing does.")]
    load: Annotated[float, doc("Threads that ran or could have run, mean of the last minute.", "threads")]


class Run(Record, kw_only=True):
    """A command has begun: what ran, where. The lines after it, up to the next such line, are of this run."""

    command: Annotated[str, doc("Which one, as `source` or `bench`.")]
    version: Annotated[str, doc("Of postcopy.")]
    started: Annotated[str, doc("When, in UTC: `2026-01-31T23:59:59.000Z`.")]
    options: Annotated[
        dict[str, str],
        doc("What was asked for, by option. No addresses, no command lines, nothing that says where keys and"
            " certificates are."),
    ]  # fmt: skip
    host: Annotated[Host, doc("Where it runs.")]


_Better = Annotated[
    str, doc("Which change of it is better; not there where none is, as of what it is compared with.", of="less|more")
]


class Value(Record, kw_only=True):
    """One quantity, measured in rounds."""

    unit: Annotated[str, doc("Of the numbers; 1 for a number of its own, as a ratio.")]
    rounds: Annotated[list[float | None], doc("What each round gave; null where it gave none.")]
    better: _Better | None = None


class Fit(Record, kw_only=True):
    """How a curve grows: value = constant * x ^ `exponent` (least squares of the logarithms), and a straight line."""

    exponent: Annotated[float, doc("0: it does not grow; 1: as what it is measured over.", "1")]
    low: Annotated[float, doc("Lower end of the exponent's 95 % confidence interval.", "1")]
    high: Annotated[float, doc("Upper end of it.", "1")]
    base: Annotated[float, doc("Of the straight line `base` + `slope` * x: where it begins.", "unit of the values")]
    slope: Annotated[float, doc("Of the straight line: what one more of x adds.", "unit of the values")]
    points: Annotated[int, doc("That were fitted: of all rounds.", "points")]


class Curve(Record, kw_only=True):
    """What the values of a measurement are points of."""

    over: Annotated[str, doc("What x is, as `threads that wait`.")]
    x_unit: Annotated[str, doc("Of x; 1 for a number of things.")]
    at: Annotated[dict[str, float], doc("x of each value, by the value's name.")]
    fit: Annotated[Fit | None, doc("How it grows; not there where that was not asked.")] = None


class Measurement(Record, kw_only=True):
    """Something that was measured. It is about `of`, divided by `to` within each round where there is one."""

    figure: Annotated[str, doc("`postcopy bench FIGURE` measures it; docs/performance.md has them all.")]
    name: Annotated[str, doc("Of the measurement; another one of the same run has another name.")]
    values: Annotated[dict[str, Value], doc("What was measured, by name.")]
    of: Annotated[str | None, doc("Name of the value that it is about; not there where it is about all of them.")] = (
        None
    )
    to: Annotated[str | None, doc("Name of the value that this is divided by.")] = None
    result: Annotated[
        float | None, doc("Median over the rounds; of a curve with a goal its exponent.", "that of `of`; 1 with `to`")
    ] = None
    better: _Better | None = None
    goal: Annotated[float | None, doc("At most that where less is better, at least where more is.", "as `result`")] = (
        None
    )
    reached: Annotated[
        bool | None, doc("Whether the goal is; not there without one, and where its interval holds it.")
    ] = None
    curve: Annotated[Curve | None, doc("Where the values are points of one.")] = None
    distributions: Annotated[dict[str, Distribution] | None, doc("Distributions of times, all rounds together.")] = None
    note: Annotated[str | None, doc("What else there is to say.")] = None


class Comparison(Record, kw_only=True):
    """A value of two files of results (`bench compare A B`)."""

    name: Annotated[str, doc("Of the value.")]
    unit: Annotated[str, doc("Of the medians.")]
    better: _Better | None = None
    before: Annotated[float | None, doc("Median of the rounds of A; null: there are none.", "`unit`")]
    after: Annotated[float | None, doc("Median of those of B.", "`unit`")]
    rounds_before: Annotated[int, doc("Of A.", "rounds")]
    rounds_after: Annotated[int, doc("Of B.", "rounds")]
    ratio: Annotated[float | None, doc("`after` over `before`; only where something could be told.", "1")] = None
    low: Annotated[float | None, doc("Lower end of its 95 % confidence interval.", "1")] = None
    high: Annotated[float | None, doc("Upper end of it.", "1")] = None
    verdict: Annotated[
        str,
        doc("What can be said. no ratio: a round gave less than 0.",
            of="worse|better|no difference seen|too few rounds|no ratio"),
    ]  # fmt: skip
