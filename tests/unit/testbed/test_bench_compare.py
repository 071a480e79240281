# SPDX-License-Identifier: Apache-2.0
"""`postcopy bench compare`: whether its statistics hold what they say, by simulation, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from lines import parse_line

from postcopy._host import run_line
from postcopy.cli import main
from postcopy.records import VERSION, as_json
from postcopy.testbed.bench import _read
from postcopy.testbed.bench._common import ratio
from postcopy.testbed.bench._compare import LEVEL, MIN_ROUNDS, interval, resampled_medians

pytestmark = pytest.mark.slow

Draw = Callable[[random.Random], float]
SHAPES: dict[str, Draw] = {
    "quiet": lambda chance: 100 * chance.lognormvariate(0, 0.03),
    "noisy": lambda chance: 100 * chance.lognormvariate(0, 0.4),
    "a few slow": lambda chance: 100 + chance.expovariate(1 / 20),
    "two modes": lambda chance: chance.choice([100, 100, 130]) * chance.lognormvariate(0, 0.02),
    "far out": lambda chance: 100 * (1 + 0.05 * abs(chance.gauss(0, 1) / chance.gauss(0, 1))),
}
"""How the values of rounds may be spread."""


def miss(draw: Draw, rounds: tuple[int, int], trials: int, seed: int, factor: float = 1.0) -> float:
    """How often the interval does not have the true ratio in it, which is `factor`."""
    chance, missed = random.Random(seed), 0
    for _ in range(trials):
        before = [draw(chance) for _ in range(rounds[0])]
        after = [factor * draw(chance) for _ in range(rounds[1])]
        low, high = interval(before, after)
        missed += not low <= factor <= high
    return missed / trials


class TestStatistics:
    """With fixed seeds: each is the same in every run."""

    @pytest.mark.parametrize("rounds", [(MIN_ROUNDS, MIN_ROUNDS), (MIN_ROUNDS, 8), (8, 8)])
    def test_runs_that_are_the_same_differ_in_less_than_one_of_twenty(self, rounds: tuple[int, int]) -> None:
        missed = {shape: miss(draw, rounds, 120, seed=sum(rounds)) for shape, draw in SHAPES.items()}
        assert 0.01 < statistics.mean(missed.values()) < 1 - LEVEL, missed  # neither too bold nor useless
        assert max(missed.values()) < 1 - LEVEL + 0.04  # (of 120: 0.05 has a standard error of 0.02)

    def test_a_true_ratio_is_in_the_interval(self) -> None:
        missed = [miss(draw, (MIN_ROUNDS, 6), 100, seed=3, factor=1.3) for draw in SHAPES.values()]
        assert statistics.mean(missed) < 1 - LEVEL

    def test_three_rounds_would_not_hold_it(self) -> None:
        """Why so few are refused."""
        assert miss(SHAPES["quiet"], (3, 3), 400, seed=1) > 1 - LEVEL + 0.02

    def test_a_difference_is_found(self) -> None:
        """Of 20 %, in rounds that differ by 3 %: nearly always; of half of what they differ by: seldom."""
        chance, found = random.Random(5), Counter[float]()
        for factor in (1.2, 1.015):
            for _ in range(60):
                before, after = ([each * SHAPES["quiet"](chance) for _ in range(5)] for each in (1.0, factor))
                found[factor] += interval(before, after)[0] > 1
        assert found[1.2] > 57
        assert found[1.015] < 20

    @pytest.mark.parametrize("count", [5, 6, 40])
    def test_medians_are_those_of_samples_that_are_drawn(self, count: int) -> None:
        chance = random.Random(2)
        values = [chance.lognormvariate(0, 1) for _ in range(count)]
        drawn = sorted(statistics.median(chance.choices(values, k=count)) for _ in range(20_000))
        ours = sorted(resampled_medians(values, seed=0))
        for part in (0.025, 0.25, 0.5, 0.75, 0.975):
            low, high = (drawn[int(len(drawn) * (part + by))] for by in (-0.02, 0.02))
            assert low <= ours[int(len(ours) * part)] <= high

    def test_a_count_may_be_nothing(self) -> None:
        assert interval([0.0] * 5, [0.0] * 5) == (1.0, 1.0)
        assert interval([0.0] * 5, [3.0] * 5)[0] > 1000


# ---- the command


def written(path: Path, *measurements: Sequence[float], unit: str = "us", at_most: bool = True) -> str:
    """A file in which the measurement number N has these rounds."""
    lines = [run_line("bench", {"rounds": 5})]
    for number, values in enumerate(measurements):
        rounds = [{"p50": value, "floor": 10.0} for value in values]
        found = ratio(f"figure {number}", rounds, "p50", None, None, unit=unit, at_most=at_most)
        found.figure = "fault"
        lines.append(json.dumps({"schema": VERSION, "event": "measurement"} | as_json(found)))
    path.write_text("\n".join([*lines, ""]))
    return str(path)


SLOW, FAST = [20.0, 21.0, 20.5, 20.2, 20.8], [10.0, 10.5, 10.2, 10.4, 10.1]


@pytest.fixture
def compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(before: Sequence[float], after: Sequence[float], *options: str, **more: Any) -> tuple[int, str]:
        a, b = (written(tmp_path / name, each, **more) for name, each in (("a", before), ("b", after)))
        status = main(["bench", "compare", a, b, *options])
        return status, capsys.readouterr().out

    return run


class TestCommand:
    def test_worse_better_and_the_same(self, compared: Callable[..., tuple[int, str]]) -> None:
        assert "worse: +101.0 %" in " ".join(compared(FAST, SLOW)[1].split())
        assert "better: -50.2 %" in " ".join(compared(SLOW, FAST)[1].split())
        assert "better: +101.0 %" in " ".join(compared(FAST, SLOW, at_most=False)[1].split())
        status, text = compared(FAST, FAST)
        assert "no difference seen" in text
        assert "1 values: 0 worse, 0 better, no difference seen in 1" in text
        assert status == 0

    def test_too_few_rounds(self, compared: Callable[..., tuple[int, str]]) -> None:
        status, text = compared(FAST[:4], SLOW)
        assert "too few rounds to tell: 4 and 5" in text
        assert status == 0
        status, text = compared(FAST[:4], SLOW, "--fail-above", "10")
        assert "nothing could be told" in text  # a check that cannot see is not passed
        assert status == 1

    def test_values_below_0_have_no_ratio(self, compared: Callable[..., tuple[int, str]]) -> None:
        status, text = compared([-0.1, *FAST], SLOW, "--fail-above", "10")
        assert "no ratio: below 0" in text
        assert "too few rounds to tell in 0 (5 are needed on each side), no ratio of 1" in " ".join(text.split())
        assert status == 1

    def test_a_check_in_ci(self, compared: Callable[..., tuple[int, str]]) -> None:
        assert compared(FAST, SLOW, "--fail-above", "50%")[0] == 1
        assert compared(FAST, SLOW, "--fail-above", "150")[0] == 0
        assert compared(SLOW, FAST, "--fail-above", "0")[0] == 0
        assert compared(SLOW, FAST, "--fail-above", "40", at_most=False)[0] == 1
        assert compared(SLOW, FAST, "--fail-above", "60", at_most=False)[0] == 0

    def test_runs_that_are_the_same_pass_it(self, tmp_path: Path) -> None:
        """20 files of 20 values, each against another one: with 5 % of noise none is worse by certainly more than
        10 %."""
        chance = random.Random(11)
        for _ in range(20):
            a, b = (
                written(tmp_path / name, *([chance.gauss(100, 5) for _ in range(5)] for _ in range(20)))
                for name in ("a", "b")
            )
            assert main(["bench", "compare", a, b, "--fail-above", "10"]) == 0

    def test_as_json(self, compared: Callable[..., tuple[int, str]]) -> None:
        _, text = compared(FAST, SLOW, "--json")
        began, line = map(parse_line, text.splitlines())
        assert began["event"] == "run"
        assert (line["event"], line["verdict"], line["before"], line["after"]) == ("comparison", "worse", 10.2, 20.5)
        assert line["low"] < line["ratio"] < line["high"]

    def test_a_floor_is_divided_by_within_each_round(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A host that is half as fast is half as fast in both."""
        paths = []
        for name, factor in (("a", 1.0), ("b", 2.0)):
            rounds = [{"p50": value * factor, "floor": 10.0 * factor} for value in FAST]
            found = ratio("fault / floor", rounds, "p50", "floor", 1.5)
            found.figure = "fault"
            (tmp_path / name).write_text(
                json.dumps({"schema": VERSION, "event": "measurement"} | as_json(found)) + "\n"
            )
            paths.append(str(tmp_path / name))
        assert main(["bench", "compare", *paths]) == 0
        text = " ".join(capsys.readouterr().out.split())  # as wide as the path is long
        assert "no difference seen" in text
        assert "it does not say where it was made" in text

    def test_several_runs_in_a_file_are_more_rounds(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        a, b = (written(tmp_path / name, values[:3]) for name, values in (("a", FAST), ("b", SLOW)))
        for path in (a, b):
            Path(path).write_text(Path(path).read_text() * 2)
        assert main(["bench", "compare", a, b]) == 0
        assert "worse" in capsys.readouterr().out

    def test_hosts_that_differ_are_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        a, b = (written(tmp_path / name, FAST) for name in "ab")
        began, *rest = (tmp_path / "b").read_text().splitlines()
        other = json.loads(began)
        other["host"] |= {"kernel": "9.9\x1b[2J", "load": 99.0, "memory": 3 << 30, "container": None, "virtual": True}
        other["options"] |= {"hybrid": "yes", "memory": "64MiB", "rounds": "9"}
        (tmp_path / "b").write_text("\n".join([json.dumps(other), *rest, ""]))
        assert main(["bench", "compare", a, b]) == 0
        text = capsys.readouterr().out
        assert "The hosts differ: memory " in text
        assert " / 3 GiB, kernel " in text
        assert "None" not in text
        assert "True" not in text
        assert "with other options: --hybrid not given / yes, --memory not given / 64MiB" in " ".join(text.split())
        assert "B: other work was under way" in text
        assert "\x1b[2J" not in text

    def test_migrations_are_rounds(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Each once, however many lines it has; none that has failed."""
        for name, downtimes in (("a", FAST), ("b", SLOW)):
            lines = []
            for number, downtime in enumerate(downtimes):
                line = {"schema": VERSION, "elapsed-ms": 1.0, "migration-id": f"{number}", "status": "completed"}
                lines.append(line | {"event": "timeline", "downtime-ms": downtime, "fault-latency-us": {"p50": 60.0}})
                lines.append(line | {"event": "migration-ended", "downtime-ms": downtime, "total-ms": 9.0})
            lines.append(lines[0] | {"migration-id": "x", "status": "failed", "downtime-ms": 1e6})
            (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        files = [str(tmp_path / "a"), str(tmp_path / "b")]
        printed = []
        for words in (["--json", "compare", *files], ["compare", *files, "--json"]):
            assert main(["bench", *words]) == 0
            printed.append([json.loads(line) for line in capsys.readouterr().out.splitlines()][1:])
        assert printed[0] == printed[1]
        lines = printed[0]
        found = {line["name"]: line for line in lines}
        assert set(found) == {"migration: downtime", "migration: total time", "migration: fault p50"}
        assert found["migration: downtime"]["rounds-before"] == 5
        assert found["migration: downtime"]["verdict"] == "worse"
        assert found["migration: total time"]["verdict"] == "no difference seen"


def test_migrations_within_bench_are_no_rounds_of_each_other(tmp_path: Path) -> None:
    """`bench migrate` writes recordings too, of all policies."""
    line = {"schema": VERSION, "event": "timeline", "migration-id": "a", "status": "completed", "downtime-ms": 5.0}
    measured = Path(written(tmp_path / "a", FAST)).read_text() + json.dumps(line) + "\n"
    (tmp_path / "a").write_text(measured + "\n".join([run_line("demo", {}), json.dumps(line | {"migration-id": "b"})]))
    found = _read.read(str(tmp_path / "a"))
    assert {name: len(value.rounds) for name, value in found.values.items()} == {
        "figure 0": 5,
        "migration: downtime": 1,
    }
    assert found.failed == 0


def event(**fields: Any) -> str:
    return json.dumps({"schema": VERSION, "event": "measurement", "elapsed-ms": 0.0} | fields)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "it is empty"),
        ("hello\n", "line 1: not JSON"),
        ("\n[1]\n", "line 2: not a JSON object"),
        ("\xff\n", "line 1: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"a": 1}\n', "line 1: not a line that postcopy has written: it has no schema"),
        ('{"schema": 2, "event": "run"}\n', f"it is of schema 2, and this version reads {VERSION}"),
        ('{"schema": "\\u001b[2J", "event": "run"}\n', "it is of schema"),
        (event(figure="x", name="y", values={}), "nothing in it can be compared"),
        (
            event(figure="x", name="y", values={"p50": {"unit": "us", "rounds": "many", "better": "less"}}),
            "line 1: meas",
        ),
        (event(figure="x", name="y", values={"p50": {"unit": "us", "rounds": [1], "better": "big"}}), "line 1: meas"),
        (event(figure="x", name="y", values={"p50": {"unit": "us", "rounds": [1e999], "better": "less"}}), "line 1: "),
        (
            event(figure="x", name="y", values={"q": {"unit": "us", "rounds": [1e300], "better": "less"}}),
            "beyond 1e+30",
        ),
        (event(**{"event": "result", "migration-id": "a", "status": "completed", "total-ms": 10**60}), "beyond 1e+30"),
        ('{"schema": 2, "cells": []}', "line 1: "),
        ('{"cells": 7}', "line 1: "),
        (
            json.dumps({"schema": VERSION, "event": "result", "migration-id": "a", "status": "failed"}),
            "1 migrations have",
        ),
    ],
)
def test_what_is_refused(content: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = written(tmp_path / "good", FAST), tmp_path / "bad"
    bad.write_bytes(content.encode("latin-1"))
    assert main(["bench", "compare", good, str(bad)]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert f"{str(bad)!r}" in said
    assert said.count("\n") == 1
    assert "\x1b" not in said


def test_what_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = written(tmp_path / "a", FAST), written(tmp_path / "b", FAST, unit="ms")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "other").write_text(
        event(figure="x", name="z", values={"q": {"unit": "1", "rounds": [1], "better": "less"}})
    )
    for words, complaint in (
        ((a, b), "'figure 0' is in us (less is better)"),
        ((a, str(tmp_path / "fifo")), "not a regular file"),
        ((a, str(tmp_path)), "Is a directory"),
        ((a, str(tmp_path / "none")), "No such file"),
        ((a, str(tmp_path / "other")), "have no value in common"),
        ((a,), "bench compare needs B.jsonl"),
        ((a, a, a), "bench compare has no use for"),
        ((a, a, "--rounds", "3"), "bench compare has no --rounds"),
        ((a, a, "--output", "x"), "bench compare has no --output"),
        ((a, a, "--fail-above", "-1"), "a number of percent"),
    ):
        assert main(["bench", "compare", *words]) == 2, words
        assert complaint in capsys.readouterr().err
    assert main(["bench", "fault", "--fail-above", "3"]) == 2
    assert "bench compare has" in capsys.readouterr().err


def test_it_is_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a", FAST, SLOW)
    for bound, complaint in (
        ("MAX_BYTES", "it has more than"),
        ("MAX_LINE_BYTES", "line 1: it is longer than"),
        ("MAX_VALUES", "line 3: more than 1 values"),
        ("MAX_ROUNDS", "line 3: more than"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(_read, bound, {"MAX_VALUES": 1, "MAX_ROUNDS": 5}.get(bound, 100))
            assert main(["bench", "compare", path, path]) == 2
        assert complaint in capsys.readouterr().err


def test_two_quantities_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = written(tmp_path / "a", FAST), written(tmp_path / "b", FAST, unit="ms")
    Path(a).write_text(Path(a).read_text() + Path(b).read_text())
    assert main(["bench", "compare", a, a]) == 2
    assert "line 4: 'figure 0' is in ms (less is better), and in an earlier line in us" in capsys.readouterr().err
