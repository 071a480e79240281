# SPDX-License-Identifier: Apache-2.0
"""``postcopy bench compare A B``: which values of two files of results differ, by more than their rounds do.

For each value that both files have: the median of B over the median of A, with a 95 % confidence interval by bootstrap.
As many rounds as A has are drawn from those of A, with replacement, and likewise from B, 4000 times; the interval holds
the middle 95 % of the ratios of their medians. Where 1 lies in it no difference is seen. With fewer than five rounds on
a side the interval would be too narrow (tests/unit/testbed/test_bench_compare.py tries it): nothing is said then.

What the interval knows is how rounds of one run differ. What the host did during one run and not during the other is
part of the difference that is shown.
"""

from __future__ import annotations

import functools
import json
import random
import statistics
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from postcopy._host import run_line
from postcopy.errors import ConfigurationError
from postcopy.records import VERSION, as_json
from postcopy.records.results import Comparison, Value
from postcopy.testbed._report import Row, Span, make_console, print_line, print_table, row
from postcopy.testbed.bench._read import MAX_NUMBER, Results, read
from postcopy.units import format_size
from postcopy.wire import one_line

MIN_ROUNDS: Final = 5
LEVEL: Final = 0.95
RESAMPLES: Final = 4000
_SEED = 20141001
_TAIL = int(RESAMPLES * (1 - LEVEL) / 2)  # resamples beyond each end of the interval

WORSE, BETTER, SAME, FEW, NEGATIVE = "worse", "better", "no difference seen", "too few rounds", "no ratio"
_KINDS = {WORSE: "bad", BETTER: "good", SAME: "muted", FEW: "warn", NEGATIVE: "warn"}
_WORDS = {FEW: "too few rounds to tell", NEGATIVE: "no ratio: below 0"}
MAX_ROWS = 200
MAX_WIDTH = 100


def run(a: str, b: str, fail_above: float | None, as_lines: bool) -> int:
    """0, or with `fail_above` 1 where a value is worse by certainly more than so many percent, or none could be told.
    `ConfigurationError` for files that cannot be compared."""
    before, after = read(a), read(b)
    found = list(compare(before, after))
    if as_lines:
        print(run_line("bench", {"compare": [a, b]}))
        for each in found:
            print(json.dumps({"schema": VERSION, "event": "comparison", "elapsed-ms": 0.0} | as_json(each)))
    failed = [each for each in found if fail_above is not None and worse_by(each) > fail_above]
    told = any(each.verdict not in _WORDS for each in found)
    if not as_lines:
        _print(before, after, found)
        console = make_console(sys.stdout)
        if failed:
            print_line(console, f"{len(failed)} worse by more than {fail_above:g} %: {failed[0].name}", "bold red")
        elif fail_above is not None:
            text = f"none is certainly worse by more than {fail_above:g} %" if told else "nothing could be told"
            print_line(console, text, "bold" if told else "bold red")
    return int(fail_above is not None and (bool(failed) or not told))


# ---- the statistics


def compare(before: Results, after: Results) -> Iterator[Comparison]:
    """What both have. `ConfigurationError` where that is nothing, or one value is two quantities."""
    names = [name for name in before.values if name in after.values]
    if not names:
        some = [next(iter(each.values)) for each in (before, after)]
        raise ConfigurationError(
            f"{before.path!r} and {after.path!r} have no value in common: {some[0]!r}, ... and {some[1]!r}, ..."
        )
    for name in names:
        one, other = before.values[name], after.values[name]
        if (one.unit, one.better) != (other.unit, other.better):
            raise ConfigurationError(
                f"{name!r} is in {one.unit} ({one.better} is better) in {before.path!r} and in {other.unit}"
                f" ({other.better}) in {after.path!r}: these are two quantities"
            )
        yield _compared(name, one, other)


def _compared(name: str, one: Value, other: Value) -> Comparison:
    a, b = ([each for each in value.rounds if each is not None] for value in (one, other))
    found = Comparison(
        name=name, unit=one.unit, better=one.better, before=statistics.median(a) if a else None,
        after=statistics.median(b) if b else None, rounds_before=len(a), rounds_after=len(b), verdict=FEW,
    )  # fmt: skip
    if min(len(a), len(b)) < MIN_ROUNDS:
        return found
    if min(*a, *b) < 0:
        found.verdict = NEGATIVE
        return found
    assert found.before is not None
    assert found.after is not None
    found.ratio, (found.low, found.high) = _quotient(found.after, found.before), interval(a, b)
    if found.low > 1 or found.high < 1:
        found.verdict = WORSE if (found.low > 1) == (one.better == "less") else BETTER
    else:
        found.verdict = SAME
    return found


def interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """In which the ratio of the medians lies, `after` over `before`, with confidence `LEVEL`."""
    return _middle(map(_quotient, resampled_medians(after, 1), resampled_medians(before, 0)))


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """In which the median lies of what `values` are drawn from, with confidence `LEVEL`."""
    return _middle(resampled_medians(values, 0))


def _middle(resamples: Iterable[float]) -> tuple[float, float]:
    ordered = sorted(resamples)
    return ordered[_TAIL - 1], ordered[-_TAIL]


def resampled_medians(values: Sequence[float], seed: int) -> list[float]:
    """Medians of `RESAMPLES` samples with replacement, each as large as `values`."""
    ordered = sorted(values)
    return [(ordered[lower] + ordered[upper]) / 2 for lower, upper in _middles(len(ordered), seed)]


@functools.lru_cache(16)
def _middles(n: int, seed: int) -> list[tuple[int, int]]:
    """Which of n ordered values are in the middle of each sample: one, or two for an even n.

    The sample need not be drawn for that: the k-th of n numbers that are drawn evenly between 0 and 1 is distributed as
    Beta(k, n - k + 1), the next one above it as the least of the n - k others. So this takes as long for a million
    values as for five.
    """
    generator, k = random.Random(_SEED + seed), (n + 1) // 2
    middles = []
    for _ in range(RESAMPLES):
        lower = upper = generator.betavariate(k, n - k + 1)
        if n % 2 == 0:
            upper += (1 - lower) * generator.betavariate(1, n - k)
        middles.append((min(int(lower * n), n - 1), min(int(upper * n), n - 1)))
    return middles


def _quotient(after: float, before: float) -> float:
    """A count may be 0."""
    if before > 1 / MAX_NUMBER:
        return after / before
    return 1.0 if after == before else MAX_RATIO


MAX_RATIO: Final = 1e9
"""Of something to nothing."""


def worse_by(found: Comparison) -> float:
    """By how many percent it is worse at least: by the nearer end of the interval. 0: perhaps not at all."""
    if found.verdict != WORSE or found.low is None or found.high is None:
        return 0.0
    return 100 * (found.low - 1 if found.better == "less" else 1 - found.high)


# ---- for people


def _print(before: Results, after: Results, found: Sequence[Comparison]) -> None:
    console = make_console(sys.stdout)
    for letter, results in (("A", before), ("B", after)):
        print_line(console, one_line(f"{letter}: {results.path}: {_describe(results)}"))
    for warning in warnings(before, after):
        print_line(console, one_line(warning), "yellow")
    console.print()
    ordered = sorted(found, key=lambda each: list(_KINDS).index(each.verdict))
    print_table(console, ("", "", "B / A", "95 % interval", "A", "B"), [_row(each) for each in ordered[:MAX_ROWS]])
    if len(ordered) > MAX_ROWS:
        print_line(console, f"... and {len(ordered) - MAX_ROWS} more: --json has all")
    console.print()
    for line in summary(before, after, found):
        print_line(console, "\n".join(textwrap.wrap(one_line(line), min(console.width, MAX_WIDTH))))


def _row(found: Comparison) -> Row:
    a, b = (f"{value:.4g}" if value is not None else "-" for value in (found.before, found.after))
    unit = f" {found.unit}" if found.unit != "1" else ""
    between, words = "-", _WORDS.get(found.verdict, found.verdict)
    if found.verdict == FEW:
        words += f": {found.rounds_before} and {found.rounds_after}"
    elif found.ratio is not None and found.low is not None and found.high is not None:
        between = f"{found.low:.3f} .. {found.high:.3f}"
        if found.verdict in (WORSE, BETTER):
            percent = 100 * (found.ratio - 1)
            words = f"{found.verdict}: {percent:+.1f} %" if found.ratio < MAX_RATIO else f"{found.verdict}: it was 0"
    ratio = f"{found.ratio:.3f}" if found.ratio is not None else "-"
    return row(found.name, Span(words, _KINDS[found.verdict]), ratio, between, f"{a}{unit}", f"{b}{unit}")


def summary(before: Results, after: Results, found: Sequence[Comparison]) -> Iterator[str]:
    """What it means, in words."""
    count = Counter(each.verdict for each in found)
    told = len(found) - count[FEW] - count[NEGATIVE]
    negative = f", no ratio of {count[NEGATIVE]} that are below 0 in a round" if count[NEGATIVE] else ""
    yield (
        f"{len(found)} values: {count[WORSE]} worse, {count[BETTER]} better, no difference seen in {count[SAME]},"
        f" too few rounds to tell in {count[FEW]} ({MIN_ROUNDS} are needed on each side){negative}."
    )
    if told:
        yield (
            "The interval says by how much B / A is uncertain, as the rounds differ: a true ratio lies in it in 95 of"
            f" 100 cases. So of values that are the same one in 20 is shown as different: here, about {told / 20:.0f}"
            f" of {told}. No difference seen means that one, if there is one, lies within the interval."
        )
        yield (
            "It does not know what else the host did during A and not during B. To be sure, measure both by turns, A B"
            " A B, and join the files of each."
        )
    for letter, results, other in (("A", before, after), ("B", after, before)):
        if only := [name for name in results.values if name not in other.values]:
            yield f"Only in {letter}: {len(only)} values, as {only[0]!r}."
        if results.failed:
            yield f"{letter}: {results.failed} migrations have not completed, and are left out."


def _describe(results: Results) -> str:
    if not results.runs:
        return "it does not say where it was made"
    last = results.runs[-1]
    more = f" ({len(results.runs)} runs; the last one:)" if len(results.runs) > 1 else ""
    host = last.host
    return (
        f"{last.command}, postcopy {last.version}, {last.started[:19]}Z{more}, {host.cpu or host.architecture},"
        f" {host.cpus} CPUs, Linux {host.kernel}"
    )


_SAME_HOST = (
    "cpu",
    "cpus",
    "usable_cpus",
    "memory",
    "kernel",
    "architecture",
    "virtual",
    "container",
    "thp",
    "governor",
)


def warnings(before: Results, after: Results) -> Iterator[str]:
    """What makes the values of two files differ beside the program."""

    def seen(results: Results, name: str) -> str:
        return " and ".join(dict.fromkeys(_in_words(name, getattr(each.host, name)) for each in results.runs))

    for letter, results in (("A", before), ("B", after)):
        busy = [each for each in results.runs if each.host.load > each.host.cpus / 2]
        if busy:
            yield f"{letter}: other work was under way when it began (load {max(each.host.load for each in busy):.1f})"
    if not before.runs or not after.runs:
        return
    hosts = [name for name in _SAME_HOST if seen(before, name) != seen(after, name)]
    if hosts:
        differ = ", ".join(f"{name.replace('_', ' ')} {seen(before, name)} / {seen(after, name)}" for name in hosts)
        yield f"The hosts differ: {differ}"
    one, other = before.runs[-1].options, after.runs[-1].options
    if names := [name for name in sorted(one | other) if name not in _OF_NO_USE and one.get(name) != other.get(name)]:
        given = (f"--{name} {one.get(name, 'not given')} / {other.get(name, 'not given')}" for name in names)
        yield f"They were asked for with other options: {', '.join(given)}"


_OF_NO_USE = ("figures", "rounds", "within")
"""Options that say nothing of the values that both have."""


def _in_words(name: str, value: object) -> str:
    """What is known of a host."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name == "memory":
        return format_size(value)
    return "none" if value is None else str(value)
