# SPDX-License-Identifier: Apache-2.0
"""What a report says of a migration, whatever of it is known, and of lines that make no sense."""

from __future__ import annotations

import functools
import html
import io
import itertools
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import matplotlib
import numpy as np
import pytest
import timelines
from lines import parse_line
from timelines import Json, both, dest, run, source, text

from postcopy._throughput import Throughput
from postcopy.errors import ConfigurationError
from postcopy.records import VERSION
from postcopy.records.timeline import COLUMNS
from postcopy.report import _charts, _page, _read, draw
from postcopy.report._model import Histogram, Migration
from postcopy.report._words import cards, guest_of, latency_of, lead, marks_of, pause_parts

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time: the other width is the same picture, and both are looked at in a browser."""
    monkeypatch.setattr(_charts, "WIDTHS", {_charts.WIDE: "wide"})


@pytest.fixture
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_charts, "as_svg", lambda draw, name: "")


def read(data: bytes) -> _read.Reader:
    reader = _read.Reader()
    reader.read(io.BytesIO(data), "lines")
    return reader


def only(data: bytes) -> Migration:
    (migration,) = read(data).migrations
    return migration


@functools.lru_cache(maxsize=4)
def page_of(data: bytes) -> str:
    return draw(read(data))


class _Words(HTMLParser):
    """What a reader sees, without the pictures; and that elements end in the order in which they began."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_data(self, data: str) -> None:
        if not {"svg", "style"}.intersection(self.open):
            self.words.append(data)


def words(data: bytes) -> str:
    parser = _Words()
    parser.feed(page_of(data))
    assert not parser.open
    return re.sub(r"\s+", " ", " ".join(parser.words))


def changed(line: Json, *path: str | int, to: Any) -> Json:
    """The same line with another value at `path`."""
    at: Any = line
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return line


def pictures(page: str) -> int:
    return page.count('<div class="wide"><svg ')


# ---- what it says


def test_both_sides_tell_one_story() -> None:
    page = page_of(both())
    seen = words(both())
    assert "Migration of vm1 (rv64, 256 MiB)" in seen
    assert "The machine stood still for 4.20 ms, and all of its memory (256 MiB) had arrived 2.4 s after the" in seen
    assert "2,113 accesses had to wait for a page; half of them were served within" in seen
    assert "The connection was lost once, and the migration went on (after 350 ms)." in seen
    assert "it was back at 90 %" in seen
    for heading in (
        "Where the time went",
        "Over time",
        "The pause",
        "Residency: which part of the memory was there",
        "Fault latency",
        "Events",
        "Machine, options, versions",
    ):
        assert f"<h2>{heading}</h2>" in page
    assert pictures(page) == 4
    assert "not among these lines" not in seen


def test_it_needs_nothing_beside_it() -> None:
    page = page_of(both())
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href|xlink:href)="(?!#|data:image/png;base64,)""", page)
    assert not re.findall(r"url\((?!#)", page)
    assert "default-src 'none'" in page
    assert len(set(re.findall(r' id="([^"]*)"', page))) == len(re.findall(r' id="([^"]*)"', page))
    assert len(page) < 1 << 20


def test_a_matplotlibrc_changes_nothing() -> None:
    """One is read from the current directory."""
    draw = _charts.pause([("source", "stop", 0.0, 90.0)])
    with matplotlib.rc_context({"text.usetex": True, "font.size": 40, "savefig.bbox": "tight"}):
        picture = _charts.as_svg(draw, "p")
    assert picture == _charts.as_svg(draw, "p")


def test_colours_are_those_of_the_style_sheet() -> None:
    page = page_of(both())
    style, _, rest = page.partition("</style>")
    assert not re.findall(r"#a1[0-9a-f]{2}b7", rest)  # which stand for variables while matplotlib draws
    used = set(re.findall(r"var\(--([a-z]+)\)", page))
    light, _, dark = style.partition("prefers-color-scheme: dark")
    for scheme in (light, dark.partition("* {")[0]):
        assert used <= set(re.findall(r"--([a-z]+): ", scheme))


def test_times_of_two_sides_are_one_time() -> None:
    migration = only(both())  # the source's recording began half a second earlier, on the same host
    assert migration.source is not None
    assert migration.one_host
    assert migration.offset_ms(migration.source) == -500
    marks = {mark.what: mark.at_ms for mark in marks_of(migration)}
    assert marks["pause"] == timelines.PAUSE_MS
    assert marks["running"] == timelines.RUNNING_MS
    elsewhere = changed(source(), "recording", "origin", "monotonic-ns", to=99_000_000_000)
    other = only(text(elsewhere, dest()))
    assert other.source is not None
    assert not other.one_host
    assert other.offset_ms(other.source) == -500  # by the wall clocks
    assert "which may differ" in words(text(elsewhere, dest()))


def test_progress_of_the_guest_before_and_after() -> None:
    migration = only(both())
    guest = guest_of(migration)
    assert guest is not None
    assert guest.before == pytest.approx(20_000, rel=0.01)
    assert 0.2 < guest.least / guest.before < 0.4
    # 20,000 (1 - 0.75 exp(-t / 900)) reaches 90 % at t = 900 ln 7.5
    assert guest.back_ms == pytest.approx(900 * math.log(7.5), abs=130)


def test_a_dip_in_precopy_alone_is_not_back_after_nothing() -> None:
    guest = Throughput(before=20_000.0, least=10_600.0, back_ms=0.0)
    said = " ".join([*lead(only(both()), guest), *(note for *_, note in cards(only(both()), guest))])
    assert "fell to 53 % of what it was before; since the pause it has not been below 90 %." in said
    assert "not below 90 % since the pause" in said
    assert "0 µs" not in said


def test_without_a_time_before_the_first_round_progress_is_compared_with_that_before_the_pause() -> None:
    """As of a source that has begun to record when it connected."""
    line = source()
    recording = line["recording"]
    late = next(n for n, at in enumerate(recording["at-ms"]) if at >= timelines.OFFER_MS + 500)
    recording["at-ms"] = recording["at-ms"][late:]
    recording["series"] = {name: values[late:] for name, values in recording["series"].items()}
    recording["map"]["columns"] = recording["map"]["columns"][late:]
    guest = guest_of(only(text(run("source"), line, run("dest"), dest())))
    assert guest is not None
    assert guest.before == pytest.approx(20_000, rel=0.01)


def test_a_page_that_is_written_in_precopy_is_no_zero_page_any_more() -> None:
    line = dest()
    zeros = line["recording"]["series"]["zero"]
    line["recording"]["series"]["zero"] = [*zeros[:-50], *[9000] * 50]
    timeline = only(text(line)).main.timeline
    assert timeline is not None
    assert timeline.pages["zero"].max() == 22000
    assert timeline.pages["zero"][-1] == 9000


@pytest.mark.parametrize("at_ms", [0.0, 9e5, 3e12])
@pytest.mark.parametrize("what", ["pause", "running", "lost", "all-there"])
def test_a_mark_at_another_time_than_the_recording_hides_nothing_of_it(at_ms: float, what: str) -> None:
    line = dest()
    line["recording"]["marks"] = [{"moment-ms": at_ms, "what": what}]
    migration = only(text(line))
    timeline = migration.main.timeline
    assert timeline is not None
    begin, end = _charts.interesting(migration, timeline, marks_of(migration))
    assert 0 <= begin < timelines.PAUSE_MS
    assert timelines.ALL_MS - 100 < end <= timelines.END_MS
    for span in _charts.spans(marks_of(migration), end):
        assert span.begin_ms <= span.end_ms


def test_the_guest_is_drawn_until_the_pause() -> None:
    ((side, at_ms, counted),) = _charts.operations(only(text(source())))
    assert (side, at_ms[-1]) == ("source", timelines.PAUSE_MS + 500)  # its recording began earlier
    assert counted[-1] == pytest.approx(20 * timelines.PAUSE_MS, rel=0.001)


@pytest.mark.parametrize("width", [_charts.WIDE, _charts.NARROW])
def test_no_label_of_the_pause_is_cut_off(width: int) -> None:
    for begin in range(0, 1000, 50):
        with _charts._drawing():
            figure = _charts.pause([
                ("source", "stop", 0.0, 1000.0), ("dest", "make changed pages missing", float(begin), 5.0)
            ])(width)  # fmt: skip
            for label in figure.axes[0].texts:
                box = label.get_window_extent()
                assert box.x0 >= 0, begin
                assert box.x1 <= width, begin


def test_attempts_are_told_apart_and_what_came_again_is_explained() -> None:
    first = _failed_early() | {"migration-id": "a" * 32, "attempts": 1}
    again = dest() | {"attempts": 2}
    seen = words(text(first, again))
    assert "Migration of vm1 (rv64, 256 MiB), 2 attempts" in seen
    assert "vm1 (rv64, 256 MiB), attempt 2" in seen
    assert "The dashed line is the memory (256 MiB): pages that were written after they had been sent came" in seen
    assert "came again" not in words(text(changed(again, "recording", "series", "precopied", to=[0] * COLUMNS)))


def test_a_migration_that_was_abandoned() -> None:
    line = source() | {"status": "postcopy-paused", "error": "abandoned: the destination is lost", "total-ms": 0.0}
    seen = words(text(run("source"), line))
    assert "did not complete, as far as is known here; its last status was postcopy-paused: abandoned: the" in seen
    assert "Where the time went" not in seen  # of the last phase the length is not known
    assert ">Pages that were sent, by kind<" in page_of(text(run("source"), line))


def test_several_virtual_machines() -> None:
    page = page_of(text(run("pager"), _vm("vm1"), _vm("vm2")))
    assert "<h1>2 virtual machines</h1>" in page
    assert page.count("<strong class=good>ended") == 2
    header = re.findall(r"<th scope=col>([^<]*)</th>", page)[:6]
    assert header == ["machine", "status", "faults", "p50", "p99", "max"]  # and no column that says nothing


# ---- of `bench migrate`


def cell(workload: str, policy: str, note: str | None = None, **values: float) -> Json:
    found = {name.replace("_", "-"): {"unit": "ms", "rounds": [value, None, value]} for name, value in values.items()}
    line = {"event": "measurement", "figure": "migrate", "name": f"{workload}, {policy}", "values": found}
    return line | ({"note": note} if note else {})


def test_policies_are_compared_at_the_top_of_the_page() -> None:
    lines = [
        cell("zipf", "precopy", downtime=536.0, total=1600.0, dip=1.0),
        cell("zipf", "+both", downtime=3.1, total=400.0, dip=0.5, faults_over_working_set=0.0625),
        cell("disk", "precopy", note="round 1: <b>no page</b>"),
        {"event": "measurement", "figure": "migrate", "name": "processors busy", "values": {}, "note": "2 processors"},
        {"event": "measurement", "figure": "scale", "name": "a, b", "values": {}},
    ]
    page, seen = page_of(text(run("bench"), *lines)), words(text(run("bench"), *lines))
    assert "Ways to migrate, compared" in seen
    assert "disk, precopy: round 1: <b>no page</b>" in seen
    assert "2 processors" in seen
    assert "There is no migration" not in seen
    assert pictures(page) == 1
    for expected in (">zipf<", ">disk<", ">536 ms<", ">3.10 ms<", ">6 %<", ">100 %<", ">failed<"):
        assert expected in page
    both_kinds = page_of(text(*lines, *map(json.loads, both().splitlines())))
    assert pictures(both_kinds) == 5
    assert both_kinds.index("By workload and policy") < both_kinds.index("<article")


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": 5},
        {"name": "no comma"},
        {"name": "w" * 500 + ", " + "p" * 500},
        {"name": ", "},
        {"values": [1]},
        {"values": {"downtime": {"rounds": ["x", None, -1e300, 10**400]}, "total": {"rounds": 5}, "dip": 7}},
        {"values": {"downtime": {"rounds": [-5.0]}, "dip": {"rounds": [1e15]}}},
        {"values": {f"v{n}": {"rounds": [1]} for n in range(2000)}},
        {"note": {"a": 1}},
    ],
)
def test_cells_that_make_no_sense_do_no_harm(wrong: Json) -> None:
    words(text(cell("zipf", "precopy", downtime=1.0) | wrong))


def test_very_many_cells_are_some() -> None:
    reader = read(text(*(cell("zipf", f"policy {number}") for number in range(2000))))
    assert len(reader.cells) == 256


def test_parts_of_the_pause_follow_each_other() -> None:
    parts = pause_parts(only(both()))
    ours = [part for part in parts if part.side == "source"]
    assert [part.name for part in ours] == ["stop", "dirty", "state", "send", "prepared", "commit"]
    for one, other in itertools.pairwise(ours):
        assert one.begin_us + one.length_us == pytest.approx(other.begin_us)
    prepared = next(part for part in ours if part.name == "prepared")
    for part in parts:
        if part.name in ("arm", "load"):
            assert prepared.begin_us <= part.begin_us
            assert part.begin_us + part.length_us <= prepared.begin_us + prepared.length_us


def test_percentiles_are_those_of_the_values() -> None:
    values = [float(us) for us in range(1, 1001)]
    latency = dest()["recording"]["latency"]
    latency["whole"] = timelines.distribution(values)
    found = latency_of(only(text(changed(dest(), "recording", "latency", to=latency))))
    assert found["count"] == 1000
    assert found["p50"] == pytest.approx(500, rel=0.035)
    assert found["p99"] == pytest.approx(990, rel=0.035)
    assert found["max"] == pytest.approx(1000, rel=0.001)


def test_a_histogram_of_one_value() -> None:
    one = Histogram(np.array([5.0]), np.array([1.0]), 5.0, 5.0)
    assert [one.percentile(percent) for percent in (0.1, 50, 99.9, 100)] == [5.0] * 4


def test_several_migrations_have_a_table_and_say_how_they_differ() -> None:
    lines = []
    for number, workload in enumerate(("random", "zipf", "dirty")):
        begin = run("demo")
        begin["options"] |= {"workload": workload, "seed": str(number)}
        lines += [begin, changed(dest(), "migration-id", to=f"{number:032x}")]
    page, seen = page_of(text(*lines)), words(text(*lines))
    assert "3 migrations" in seen
    assert "workload zipf" in seen
    assert "seed 1" not in seen.partition("Machine, options")[0]
    assert pictures(page) == 12
    assert all(f'href="#m{number}"' in page and f'id="m{number}"' in page for number in (1, 2, 3))


def test_only_the_last_of_very_many_have_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_page, "MOST_DRAWN", 1)
    monkeypatch.setattr(_read, "MAX_MIGRATIONS", 3)
    lines = [changed(dest(), "migration-id", to=f"{number:032x}") for number in range(5)]
    page, seen = page_of(text(*lines)), words(text(*lines))
    assert page.count("<article") == 1
    assert pictures(page) == 4
    assert "There were 2 migrations before these" in seen
    assert "Pictures of the last 1 follow." in seen


# ---- what is missing is said in words


def _failed_early() -> Json:
    line = source()
    line |= {"status": "failed", "error": "192.0.2.1:7777: connection refused", "downtime-ms": 0.0, "total-ms": 0.0}
    line["fault-latency-us"] = {"count": 0, "p50": 0.0, "p99": 0.0, "p99.9": 0.0, "max": 0.0}
    del line["downtime-breakdown-us"]
    line["recording"]["marks"] = [{"moment-ms": 1500.0, "what": "offer"}, {"moment-ms": 1600.0, "what": "ended"}]
    line["recording"]["series"] = {"guest-operations": line["recording"]["series"]["guest-operations"]}
    return line


def _no_faults() -> Json:
    line = dest()
    empty = {"count": 0, "sum-ns": 0, "max-ns": 0, "bucket-edges-ns": [], "bucket-counts": []}
    line["recording"]["latency"] = dict.fromkeys(line["recording"]["latency"], empty)
    line["recording"]["fault-sample"] = {name: [] for name in line["recording"]["fault-sample"]} | {"every": 1}
    line["fault-latency-us"] = {"count": 0, "p50": 0.0, "p99": 0.0, "p99.9": 0.0, "max": 0.0}
    return line


def _one_sample() -> Json:
    line = dest(faults=1)
    recording = line["recording"]
    recording["at-ms"] = recording["at-ms"][:1]
    recording["series"] = {name: values[:1] for name, values in recording["series"].items()}
    recording["map"]["columns"] = recording["map"]["columns"][:1]
    return line


def _without_operations() -> Json:
    line = dest()
    line["kind"] = "qemu"
    del line["recording"]["series"]["guest-operations"]
    return line


def _image() -> Json:
    line = changed(source(), "kind", to="image")
    line["total-ms"] = 812.0
    del line["recording"]["series"]["guest-operations"]
    return line


def _result() -> Json:
    line = dest()
    del line["recording"]
    return line | {
        "event": "result",
        "downtime-ms": 4.2,
        "verified": None,
        "verification": [],
        "overhead-bytes": 1 << 20,
        "fault-latency-us": {"count": 20, "p50": 60.0, "p99": 200.0, "p99.9": 300.0, "max": 310.0},
    }


def _vm(name: str = "vm1", **more: Any) -> Json:
    line = dest()
    figures = {"name": name, "memory": 1 << 28, "page-size": 4096, "status": "ended", "resident": 1 << 27} | more
    return {"event": "timeline", "side": "pager", "vm": name, "figures": figures, "recording": line["recording"]}


@pytest.mark.parametrize(
    ("lines", "said", "pictures_there"),
    [
        (
            [source()],
            [
                "seen by the source alone",
                "Only the destination knows it",
                "only the destination knows when they were placed",
            ],
            3,
        ),
        ([dest()], ["seen by the destination alone", "the rest only the source knows"], 4),
        (
            [_failed_early()],
            ["failed before the machine was the destination's: 192.0.2.1:7777: connection refused."],
            2,
        ),
        (
            [_no_faults()],
            ["No access had to wait for a page.", "No access met a missing page, so there is nothing to draw."],
            3,
        ),
        ([_one_sample()], ["one moment only, so there is nothing to draw over time", "One access waited"], 1),
        ([_without_operations()], ["vm1 (qemu, 256 MiB)"], 4),
        (
            [_image()],
            ["All of the image (256 MiB) had arrived after 812 ms.", "An image does not run, so nothing was paused."],
            2,
        ),
        ([_result()], ["No timeline is among these lines", "20 accesses had to wait"], 1),
        (
            [_vm()],
            [
                "Virtual machine vm1 (256 MiB)",
                "128 MiB of its memory (256 MiB) was there in the end. 2,113 accesses had to wait for a page",
                "it was served no more",
            ],
            3,
        ),
        (
            [_vm(status="lost", error="vm.mem: Input/output error")],
            ["Its pages could not be had: vm.mem: Input/output error."],
            3,
        ),
        (
            [{"event": "result", "side": "source", "status": "failed", "error": "no route to host"}],
            ["no route to host"],
            0,
        ),
    ],
    ids=[
        "source",
        "dest",
        "failed",
        "no faults",
        "one sample",
        "no operations",
        "image",
        "result",
        "pager",
        "pager, lost",
        "never began",
    ],
)
def test_what_is_missing(lines: list[Json], said: list[str], pictures_there: int) -> None:
    seen = words(text(*lines))
    for each in said:
        assert each in seen
    assert pictures(page_of(text(*lines))) == pictures_there
    if "The migration failed" in seen:
        assert "met a missing page" not in seen
    if "All of the image" in seen:
        assert "stood still" not in seen
        assert "stands still" not in seen
    assert "nan" not in seen.lower().split()
    assert "inf" not in seen.lower().split()


# ---- lines that make no sense


_EVIL = "<script>alert(1)</script>\"'&<img src=http://192.0.2.9/x>$\\frac{1}{0}$\0\x1b[31m"


def test_text_from_the_lines_stays_text() -> None:
    line = dest()
    line |= {
        "machine": _EVIL,
        "kind": _EVIL,
        "peer": _EVIL,
        "error": _EVIL,
        "status": "failed",
        "mode": _EVIL,
        _EVIL: _EVIL,
    }
    for mark in line["recording"]["marks"]:
        mark["text"] = _EVIL
    line["recording"]["marks"].append({"moment-ms": 1234.0, "what": _EVIL, "text": _EVIL})
    line["recording"]["blocks"] = [{"name": _EVIL, "bytes": 1 << 20, "page-size": 4096}] * 3
    begin = run("dest") | {
        "command": _EVIL,
        "version": _EVIL,
        "started": _EVIL,
        "options": {_EVIL: _EVIL},
        "host": {_EVIL: _EVIL},
    }
    page = draw(read(text(begin, line)))
    assert "alert(1)" in page
    assert "<script" not in page
    assert "<img" not in page
    assert "\x1b" not in page
    assert html.escape("<script>alert(1)</script>\"'&") in page


def _set(*path: str | int, to: Any) -> Callable[[Json], None]:
    def spoil(line: Json) -> None:
        changed(line, "recording", *path, to=to)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_set("series", "demand", to=[1, 2, 3]), f"demand has 3 values for {COLUMNS} times, and was left out"),
        (_set("series", "demand", to=[-1] * COLUMNS), "demand is no list of sensible numbers"),
        (_set("series", "demand", to=[1e300] * COLUMNS), "demand is no list of sensible numbers"),
        (_set("series", "demand", to=[10**400] * COLUMNS), "demand is no list of sensible numbers"),
        (_set("series", "demand", to="many"), "demand is no list of sensible numbers"),
        (_set("series", "received-bytes", 5, to={}), "received-bytes is no list of sensible numbers"),
        (_set("at-ms", to=[0] * 5000), "at-ms is no list of 1 to 4096 times"),
        (_set("at-ms", to=[]), "at-ms is no list of 1 to 4096 times"),
        (_set("at-ms", 3, to=9e9), "its times go backwards"),
        (_set("at-ms", 3, to=None), "at-ms is no list"),
        (_set("map", "columns", 0, to="A"), "its residency is not one text"),
        (_set("map", "columns", 0, to="!" * 128), "none of base64"),
        (_set("map", "columns", 0, to="é" * 128), "its residency is not one text"),
        (_set("map", "bins", to=2**40), "its residency is not one text"),
    ],
)
@pytest.mark.usefixtures("_no_pictures")
def test_what_makes_no_sense_is_left_out_and_named(spoil: Callable[[Json], None], said: str) -> None:
    line = dest()
    spoil(line)
    seen = words(text(run("dest"), line))
    assert "What is wrong with the input" in seen
    assert said in seen
    assert "Migration of vm1" in seen


@pytest.mark.parametrize(
    "spoil",
    [
        lambda line: line.update(recording=None),
        lambda line: line.update(recording=[1]),
        lambda line: line.update(
            {"ram": {"total": -5, "page-size": 0, "iteration": "x"}, "blocktime-ms": [None, "x", 1e99]}
        ),
        lambda line: line.update({"downtime-breakdown-us": {"arm": "x", "load": -1, "first-run": 1e300}}),
        _set(
            "latency",
            "whole",
            to={"bucket-edges-ns": [5, 1, 3], "bucket-counts": [1, 0, 2**60], "max-ns": 0, "sum-ns": -4},
        ),
        _set("latency", "whole", to={"bucket-edges-ns": [0], "bucket-counts": [7]}),
        _set("fault-sample", to={"every": 0, "at-ms": [5], "page": [7], "total-us": [None]}),
        _set(
            "marks",
            to=[
                {"moment-ms": "x"},
                4,
                {"what": "pause"},
                {"moment-ms": 5000, "what": "pause"},
                {"moment-ms": 1, "what": "running"},
            ],
        ),
        _set("marks", to=[{"moment-ms": 1000 + n, "what": "round", "text": str(n)} for n in range(5000)]),
        _set("blocks", to=[{"name": "b", "bytes": 1e15, "page-size": 1e15}] * 500),
        _set("origin", to={"unix-ms": 1e300, "monotonic-ns": -1}),
        lambda line: line["ram"].update({"total": 10**400, "page-size": 10**400, "transferred": -(10**400)}),
        _set("series", "received-bytes", to=[10**400] * COLUMNS),
        _set("marks", to=[{"moment-ms": 3e12, "what": "pause"}, {"moment-ms": 0, "what": "running"}] * 200),
    ],
)
def test_no_line_can_break_the_page(spoil: Callable[[Json], None]) -> None:
    line = dest(faults=50)
    spoil(line)
    assert "Migration of" in words(text(run("dest"), source(), line))


def test_of_a_line_is_kept_what_a_page_can_show() -> None:
    much = {"list": [1.5] * 10_000, "text": "x" * 100_000, "deep": [[[1]]], "map": {f"{n}": n for n in range(10_000)}}
    line = dest() | {f"much-{n}": much for n in range(5)} | {"recoveries": much}
    begin = run("dest") | {"options": much}
    side = only(text(begin, line)).main
    assert len(json.dumps(side.facts)) < 16 << 10
    assert len(json.dumps(side.run)) < 32 << 10
    assert side.number("ram", "total") == 1 << 28
    reader = _read.Reader(keep_latencies=True)
    reader.read(io.BytesIO(text(begin, line)), "lines")
    assert len(json.dumps(reader.latencies)) < 64 << 10


def test_a_file_that_is_no_such_file_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="first line is no JSON"):
        read(b"\x7fELF\0\0")
    with pytest.raises(ConfigurationError, match=r"line 2 is longer than 2 MiB"):
        read(text(run("dest")) + b'"' + b"x" * (3 << 20) + b'"\n')
    with pytest.raises(ConfigurationError, match="no JSON"):
        read(b'{"event": "timeline", "at-ms": NaN}\n')
    with pytest.raises(ConfigurationError, match="no JSON"):
        read(b"[" * 100_000 + b"\n")


def test_a_file_that_was_cut_off_is_shown_as_far_as_it_goes() -> None:
    whole = both()
    seen = words(whole + b'{"event": "result", "si')
    assert "line 5: no JSON, as where the file was cut off" in seen
    assert "The machine stood still for 4.20 ms" in seen


def test_a_file_of_another_schema_says_so_once() -> None:
    """As one of an older version: it is shown as far as it is understood."""
    seen = words(
        b"".join(json.dumps(json.loads(line) | {"schema": 9}).encode() + b"\n" for line in both().splitlines())
    )
    assert seen.count(f"line 1: of schema 9, and this version reads {VERSION}") == seen.count("of schema") == 1
    assert "The machine stood still for 4.20 ms" in seen


def test_a_file_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_read, "MAX_BYTES", 1 << 20)
    line = json.dumps({"event": "progress", "side": "dest"}).encode() + b"\n"
    with pytest.raises(ConfigurationError, match="keep the lines of its last migrations"):
        read(line * ((2 << 20) // len(line)))


def test_of_many_complaints_some_are_counted() -> None:
    reader = read(text(run("dest")) + b"{\n" * 500)
    assert len(reader.problems.texts) == 20
    assert "and 480 more" in draw(reader)


def test_the_lines_that_are_made_here_are_lines() -> None:
    for line in (dest(), source(), run("dest"), _failed_early(), _no_faults(), _one_sample()):
        parse_line(json.dumps({"schema": VERSION, "elapsed-ms": 0.0} | line))
