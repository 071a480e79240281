# SPDX-License-Identifier: Apache-2.0
"""Reports as a real browser shows them: what can be read, where it is, in which colours, in wide and narrow windows,
light and dark, with scripts off; and that a page asks for nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
from browser import TEXTS, Browser, Json, Page, contrast, open_browser, open_page
from timelines import both, dest, run, source, text

from postcopy.cli._main import main

pytestmark = pytest.mark.needs("chromium")

LEGIBLE = 4.5  # WCAG 2, AA
SMALLEST_PX = 9.0
NEAR_PX = 2.0  # words of a picture that are closer to each other than this look like one


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as one:
        yield one


def _cells() -> Iterator[Json]:
    """Of `bench migrate`: some that are as they are, and some with names and values that nobody would give."""
    for workload in ("sequential", "write-heavy", "w" * 80):
        for policy in ("stop-and-copy", "+working-set", "p" * 80):
            values = {"downtime": 536.0, "total": 1.6e6, "faults-over-working-set": 0.57, "dip": 1.0}
            found = {name: {"unit": "ms", "rounds": [value * len(policy)]} for name, value in values.items()}
            yield {"event": "measurement", "figure": "migrate", "name": f"{workload}, {policy}", "values": found}
    yield {"event": "measurement", "figure": "migrate", "name": "disk, +both", "values": {}, "note": "round 1: failed"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By what they are about."""
    directory = tmp_path_factory.mktemp("pages")
    failed = source() | {
        "status": "failed",
        "error": "192.0.2.1:7777: connection refused",
        "downtime-ms": 0.0,
        "total-ms": 0.0,
    }
    hostile = dest() | {"machine": "<script>document.title='run'</script>" * 3, "error": "w" * 400, "status": "failed"}
    hostile["recording"]["marks"] = [
        {"moment-ms": 1000 + 5 * n, "what": "round", "text": f"{n} {'x' * 200}"} for n in range(200)
    ]
    hostile["recording"]["blocks"] = [{"name": "n" * 200, "bytes": 1 << 28, "page-size": 4096}] * 40
    found = {}
    for name, lines in (
        ("both", both()),
        ("failed", text(run("source"), failed)),
        ("hostile", text(hostile)),
        ("policies", text(run("bench"), *_cells())),
    ):
        lines_file, found[name] = directory / f"{name}.jsonl", directory / f"{name}.html"
        lines_file.write_bytes(lines)
        assert main(["report", str(lines_file), "--output", str(found[name])]) == 0
    return found


def look(page: Page) -> tuple[list[Json], Json]:
    """The texts that can be seen; and what else: `width` of the page, `window`, `requested`, `complaints`, `title`."""
    found: Json = page.evaluate(TEXTS)
    more = {"requested": page.requested, "complaints": page.complaints, "title": page.evaluate("document.title")}
    more["rasters"] = page.evaluate(
        "[...document.querySelectorAll('image')].filter(one => one.checkVisibility())"
        ".map(one => one.getBoundingClientRect()).map(box => [box.width, box.height])"
    )
    for one in found["texts"]:
        one["text"] = one["text"].replace("\N{NO-BREAK SPACE}", " ")
    more["title"] = more["title"].replace("\N{NO-BREAK SPACE}", " ")
    return found["texts"], found | more


def assert_legible(texts: list[Json], seen: Json) -> None:
    assert seen["width"] <= seen["window"], "the page is wider than its window"
    for one in texts:
        assert contrast(one["colour"], one["background"]) >= LEGIBLE, one
        assert one["size"] >= SMALLEST_PX, one
        assert not one["cut"], one
        if not one["scrolls"]:
            assert one["x"] >= 0, one
            assert one["x"] + one["width"] <= seen["window"] + 1, one
    for one, other in combinations([one for one in texts if one["svg"] >= 0], 2):
        assert one["svg"] != other["svg"] or not overlap(one, other), (one, other)


def overlap(one: Json, other: Json) -> bool:
    across = min(one["x"] + one["width"], other["x"] + other["width"]) - max(one["x"], other["x"])
    down = min(one["y"] + one["height"], other["y"] + other["height"]) - max(one["y"], other["y"])
    # (a box of text is higher than its letters)
    return bool(across > -NEAR_PX and down > 0.35 * min(one["height"], other["height"]))


def test_a_report_can_be_read(browser: Browser, pages: dict[str, Path]) -> None:
    with open_page(browser, pages["both"]) as page:
        for width, scheme in ((1000, "light"), (360, "light"), (360, "dark"), (1000, "dark")):
            page.show(width, scheme)
            texts, seen = look(page)
            assert_whole(texts, seen, pages["both"])
            assert seen["rasters"][0][0] > 0.7 * width * 0.85
            assert (contrast(texts[0]["background"], "rgb(0, 0, 0)") > 10) is (scheme == "light")
        page.show(700, "light", "print")
        assert_whole(*look(page), pages["both"])


def assert_whole(texts: list[Json], seen: Json, path: Path) -> None:
    assert_legible(texts, seen)
    assert seen["title"] == "postcopy: Migration of vm1 (rv64, 256 MiB)"
    words = " ".join(one["text"] for one in texts)
    for expected in (
        "Migration of vm1 (rv64, 256 MiB)",
        "The machine stood still for",
        "Downtime",
        "4.20 ms",
        "2,113",
        # in the pictures
        "Pages that have arrived, by kind",
        "Bytes a second, on all data channels",
        "Operations of the guest, a second",
        "Threads that wait for a page",
        "256 MiB",
        "pause",
        "cut",
        "last page",
        "s since the migration began",
        "the destination prepares: 2.90 ms",
        "the first vCPU runs: 240 µs",
        "Place in the memory",
        "Latency, at most",
        "99.9 %",
    ):
        assert expected in words, expected
    assert seen["requested"] == {path.as_uri(), "data:"}
    assert not seen["complaints"]
    # One of both widths of each picture is shown, and all of them are.
    assert len({one["svg"] for one in texts if one["svg"] >= 0}) == 4
    assert len(seen["rasters"]) == 1


@pytest.mark.parametrize("name", ["failed", "hostile", "policies"])
def test_a_page_of_less_or_of_nonsense_can_be_read_too(name: str, browser: Browser, pages: dict[str, Path]) -> None:
    with open_page(browser, pages[name], scripts=True) as page:
        for width, scheme in ((1000, "light"), (360, "dark")):
            page.show(width, scheme)
            texts, seen = look(page)
            assert_legible(texts, seen)
            assert seen["title"] != "run"
            assert seen["requested"] <= {pages[name].as_uri(), "data:"}


def test_what_is_looked_for_would_be_found(browser: Browser, tmp_path: Path) -> None:
    """Each of the checks above, on a page that is wrong."""
    file = tmp_path / "empty.html"
    file.write_text("<!doctype html><body style='background:#fff;margin:0'></body>")
    with open_page(browser, file) as page:
        page.show(400, "light")

        def show(body: str) -> None:
            page.evaluate(f"document.body.innerHTML = {json.dumps(body)}")
            assert_legible(*look(page))

        show("<p>good</p>")
        for body in (
            "<p style='color:#aaa'>pale</p>",
            "<p style='font-size:6px'>small</p>",
            "<p style='position:absolute;left:-30px'>outside</p>",
            "<div style='width:900px'>wide</div>",
            "<svg viewBox='0 0 100 100'><text x='10' y='50'>one</text><text x='12' y='52'>two</text></svg>",
            "<svg viewBox='0 0 1000 100'><text x='10' y='50' font-size='12'>small</text></svg>",
            "<p style='margin-left:100px'><svg viewBox='0 0 100 100'><text x='-9' y='50'>cut off</text></svg></p>",
        ):
            with pytest.raises(AssertionError):
                show(body)


def test_the_report_of_a_real_migration(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "demo.html"
    command = [sys.executable, "-m", "postcopy", "demo", "--machine", "rv64", "--memory", "16MiB", "--precopy", "auto"]
    options = ["--migrate-after", "0.5", "--run-for", "0.5", "--report", str(file)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert f"postcopy: report: {file}" in done.stderr
    with open_page(browser, file) as page:
        page.show(1000, "light")
        texts, seen = look(page)
    assert_legible(texts, seen)
    assert seen["requested"] == {file.as_uri(), "data:"}
    words = " ".join(one["text"] for one in texts)
    for expected in (
        "Migration of rv64 (16 MiB)",
        "both sides",
        "The machine stood still for",
        "precopied:",
        "Pages that have arrived, by kind",
        "Operations of the guest, a second",
        "the destination prepares:",
        "Place in the memory",
        "the last page had arrived",
        "--precopy",
        "kernel",
    ):
        assert expected in words, expected
    assert "What is wrong with the input" not in words
