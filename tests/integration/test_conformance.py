# SPDX-License-Identifier: Apache-2.0
"""`postcopy conformance`: the handler that is right passes, and each of those that are wrong in one way is caught by
the case that is there for it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from postcopy._files import installed_program
from postcopy.errors import ConfigurationError
from postcopy.testbed.conformance import command
from postcopy.testbed.conformance._cases import CASES
from postcopy.testbed.conformance._handler import Handler, HandlerCommands
from postcopy.testbed.conformance._image import Image, make_image
from postcopy.testbed.conformance._kit import Settings
from postcopy.testbed.conformance._model import Case, NotApplicable, Outcome, Result

CONFORMANCE = [sys.executable, "-m", "postcopy", "conformance"]
IMAGE_BYTES = 64 << 20
ZERO_PAGES = 7  # beside the hole
PATIENT_S = 25.0
"""For what has to come: no busy host takes longer."""
DEADLINES_S = (2.0, 4.0, 8.0, PATIENT_S, PATIENT_S)
"""A wrong handler is caught, mostly, by a fault that is never answered. With the first of these that is soon; a host
that is so busy that something else was late gets the others."""
JOBS = 12
DEFECT_JOBS = 12  # more of them, and those that keep a processor busy disturb the others
PAGER_JOBS = 5  # of each of two runs beside each other

# A defect that is planted in csrc/conformance/handler.c; the case that is there for it; words that this case says then.
DEFECTS = {
    "write-ignored": ("01-missing", "a write fault: no end"),
    "wp-copied": ("01-write-protect", "a write to a page that it has protected: no end"),
    "minor-ignored": ("01-minor", "neither answered nor refused"),
    "page-size-kib": ("02-kib", "a fault is not answered"),
    "ends-at-eof": ("03-eof", "the handler has ended (status 1)"),
    "close-is-death": ("03-old", "after the connection was closed: no end"),
    "no-fd-waits": ("04-no-fd", "is not refused"),
    "two-fds": ("04-two-fds", "is not refused"),
    "not-uffd": ("04-not-uffd", "is not refused"),
    "zero-size": ("04-zero-size", "is not refused"),
    "overlap": ("04-overlap", "is not refused"),
    "beyond-image": ("04-too-big", "is not refused"),
    "garbage-waits": ("04-garbage", "is not refused"),
    "drips-kept": ("05-drips", "has no end is still connected"),
    "silent-blocks": ("05-silent", "another client is not served"),
    "connection-kept": ("05-dies", "connections of dead clients are kept"),
    "any-uid": ("05-uid", "is not refused"),
    "one-base": ("06-below", "the last page of the region below: no end"),
    "unclipped": ("07-clipped", "a fault is not answered"),
    "huge-small": ("08-huge", "a page of 2 MiB: no end"),
    "huge-zeropage": ("08-huge-zeros", "a page of 2 MiB that was removed: no end"),
    "address-exact": ("09-exact", "a fault is not answered"),
    "small-table": ("10-storm", "each thread its own pages: no end"),
    "repeat-fatal": ("10-same", "a fault is not answered"),
    "eexist-asleep": ("11-eexist", "EEXIST needs a WAKE"),
    "run-repeated": ("12-partial", "a run with pages in it that were there: no end"),
    "copy-cast": ("13-negative", "no end"),
    "spins-unread": ("14-unread", "no end"),
    "waits-for-event": ("15-eagain", "EAGAIN that ends without an event"),
    "gives-up": ("16-long-eagain", "a second of EAGAIN: no end"),
    "prefetch-marks": ("17-prefetch", "the pages around one whose COPY said EAGAIN: no end"),
    "placed-kept": ("18-removed", "image instead of zero"),
    "missing-kept": ("19-never-placed", "image instead of zero"),
    "batch-order": ("20-batch", "image instead of zero"),
    "in-flight": ("21-in-flight", "image instead of zero"),
    "old-decision": ("22-decided", "image instead of zero"),
    "rounded-out": ("23-partly", "zeros instead of image"),
    "quadratic": ("24-flood", "are quadratic work"),
    "reads-inline": ("25-unreachable", "a REMOVE while the source does not answer: no end"),
    "removes-lost": ("26-recovered", "image instead of zero"),
    "enoent-asleep": ("27-left", "ENOENT needs a WAKE"),
    "death-ignored": ("28-killed", "is still open in the handler"),
    "kills-pid": ("29-pid", "the handler killed a process"),
    "takeover-asleep": ("30-takeover", "when it was killed: no end"),
    "end-unregisters": ("31-ended", "zeros instead of image"),
    "timeout-zeros": ("32-slow", "zeros instead of image"),
    "error-zeros": ("33-lost", "zeros instead of image"),
    "mapped-image": ("34-truncated", "SIGBUS"),
    "pollerr-ends": ("35-blocking", "after O_NONBLOCK was cleared: no end"),
    "eagain-ends": ("36-spurious", "no end"),
    "idle-ends": ("37-idle", "the first touch"),
    "limited": ("38-snapshot", "a Full snapshot: no end"),
    "serial": ("39-ten", "no end"),
    "complete-ends": ("40-complete", "removed after all pages were placed: no end"),
    "wp-forgotten": ("41-handler-protects", "are not protected"),
    "own-uid-only": ("42-jailed", "a jailed client"),
    "fork-kept": ("43-fork", "a forked child that touches a page: no end"),
    "unmap-ends": ("44-unmap", "beside memory that was unmapped: no end"),
    "remap-ignored": ("45-remap", "no end"),
}


def settings(image: str, *options: str) -> Settings:
    words = [
        installed_program("conformance-handler"),
        "--socket",
        "{socket}",
        "--image",
        "{image}",
        "--allow-uid",
        "65534",
    ]
    commands = HandlerCommands(" ".join([*words, "--state", "{dir}/state", *options]), takes_over=True)
    return Settings(
        Image(image), commands, None, deadline_s=PATIENT_S, slow_s=2.0, idle_s=2.5, silent_s=PATIENT_S, jail_uid=65534
    )


async def run_one(chosen: Settings, name: str) -> Result:
    [case] = command.chosen(name)
    [result] = await command.run_cases(chosen, [case], 1, False, lambda case: None)
    return result


def outcomes(image: str, *options: str) -> dict[str, tuple[Outcome, str]]:
    async def run() -> list[Result]:
        return await command.run_cases(settings(image, *options), CASES, JOBS, False, lambda case: None)

    return {result.case.name: (result.outcome, result.text) for result in trio.run(run)}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("conformance") / "mem.img"
    make_image(str(path), IMAGE_BYTES)
    return str(path)


@pytest.mark.needs("uffd")
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_handler_that_is_right_passes(run_in_child: Callable[..., Any], image: str) -> None:
    check_all_passed(run_in_child(outcomes, image, deadline_s=280.0).value)


def check_all_passed(found: dict[str, tuple[Outcome, str]]) -> None:
    assert not {name: text for name, (outcome, text) in found.items() if outcome is Outcome.FAIL}
    left = {name: text for name, (outcome, text) in found.items() if outcome is Outcome.NOT_APPLICABLE}
    assert left.pop("41-handler-protects") == "this handler does not write-protect its clients' memory"
    # On a busy host a race that the handler always wins proves nothing: that is not a failure.
    other = {name: text for name, text in left.items() if "could not be tried" not in text and "scheduler" not in text}
    if os.geteuid() == 0 and os.path.exists("/dev/fuse"):
        assert not {name: text for name, text in other.items() if "huge" not in name}


def pager_outcomes(image: str) -> dict[str, tuple[Outcome, str]]:
    """Of `postcopy pager`. With its keeper where that takes part: what is killed then is what the keeper keeps, the
    engine and its spare. Other cases that start one of their own have none, since a spare takes as long to start."""
    words = [sys.executable, "-m", "postcopy", "pager", "--socket", "{socket}", "--image", "{image}"]
    start = " ".join([*words, "--control", "{dir}/c", "--allow-uid", "65534"])
    kill = "sh -c 'kill -KILL $(cat /proc/{pid}/task/{pid}/children)'"
    kept = replace(settings(image), commands=HandlerCommands(start, kill=kill, takes_over=True))
    alone = replace(kept, commands=HandlerCommands(f"{start} --no-keeper"))
    keeper = command.chosen("05-dies,26,27-recovered,28,30,31,46")
    results: list[Result] = []

    async def run_some(chosen: Settings, cases: list[Case]) -> None:
        results.extend(await command.run_cases(chosen, cases, PAGER_JOBS, True, lambda case: None))

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                run_some, kept, [case for case in CASES if "command" not in case.needs or case in keeper]
            )
            nursery.start_soon(
                run_some, alone, [case for case in CASES if "command" in case.needs and case not in keeper]
            )

    trio.run(run)
    return {result.case.name: (result.outcome, result.text) for result in results}


@pytest.mark.needs("uffd")
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_our_own_pager_passes(run_in_child: Callable[..., Any], image: str) -> None:
    check_all_passed(run_in_child(pager_outcomes, image, deadline_s=280.0).value)


async def catches(image: str, defect: str) -> str:
    """Empty, or what the case said instead."""
    expected, words = DEFECTS[defect]
    chosen = settings(image, "--defect", defect, *(["--write-protect"] if defect == "wp-forgotten" else []))
    for deadline_s in DEADLINES_S:
        result = await run_one(replace(chosen, deadline_s=deadline_s, silent_s=4 * deadline_s), expected)
        if result.outcome is Outcome.FAIL and words in result.text:
            return ""
        if result.outcome is Outcome.NOT_APPLICABLE and result.case.needs & {"root", "slow", "huge"}:
            return ""  # the tests above say what may be missing here
    return f"{defect}: {result.outcome}: {result.text}"


async def catch_all(image: str) -> list[str]:
    wrong = []
    limiter = trio.CapacityLimiter(DEFECT_JOBS)

    async def one(defect: str) -> None:
        async with limiter:
            if words := await catches(image, defect):
                wrong.append(words)

    async with trio.open_nursery() as nursery:
        for defect in DEFECTS:
            nursery.start_soon(one, defect)
    return wrong


@pytest.mark.needs("uffd")
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_planted_defect_is_caught_by_its_case(run_in_child: Callable[..., Any], image: str) -> None:
    assert run_in_child(catch_all, image, deadline_s=280.0).value == []


def test_each_defect_and_each_number_is_in_the_table(run_in_child: Callable[..., Any]) -> None:
    listed = run_in_child([installed_program("conformance-handler"), "--list-defects"]).stdout.split()
    assert sorted(listed) == sorted(DEFECTS)
    caught = {name.split("-")[0] for name, _ in DEFECTS.values()}
    assert {f"{number:02d}" for number in range(1, 46)} == caught


def test_the_page_has_each_case() -> None:
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text()
    assert set(re.findall(r"\b\d\d-[a-z]+(?:-[a-z]+)*", page)) == {case.name for case in CASES}


# ---- the command


@pytest.mark.needs("uffd")
def test_the_command_says_what_it_saw(run_in_child: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "mem.img"
    done = run_in_child([*CONFORMANCE, "--image", str(path), "--make-image", "32MiB"])
    assert done.returncode == 0, done.stderr
    handler = f"{installed_program('conformance-handler')} --socket {{socket}} --image {{image}}"
    some = ["--cases", "01-missing,18", "--image", str(path), "--deadline", str(PATIENT_S)]
    done = run_in_child([*CONFORMANCE, *some, "--handler-cmd", handler, "--json"])
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert (report["passed"], report["failed"], report["not-applicable"]) == (2, 0, 0)
    assert [case["case"] for case in report["cases"]] == ["01-missing", "18-removed"]
    done = run_in_child([*CONFORMANCE, *some, "--handler-cmd", f"{handler} --defect placed-kept"])
    assert done.returncode == 1
    assert "1 passed, 1 failed" in done.stdout
    assert "pages are wrong" in done.stdout


@pytest.mark.needs("uffd")
def test_a_handler_that_runs_already(run_in_child: Callable[..., Any], spawn_child: Any, image: str) -> None:
    with tempfile.TemporaryDirectory() as directory:  # a short path
        path = f"{directory}/s"
        spawn_child([installed_program("conformance-handler"), "--socket", path, "--image", image])
        line = [
            "--image",
            image,
            "--handler-socket",
            path,
            "--cases",
            "01,18,28",
            "--deadline",
            str(PATIENT_S),
            "--json",
        ]
        done = run_in_child([*CONFORMANCE, *line])
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert [case["case"] for case in report["cases"] if case["outcome"] == "not-applicable"] == ["28-killed"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "--image FILE"),
        ("--image nowhere.img --handler-socket s", "nowhere.img': No such file"),
        ("--image IMAGE", "--handler-socket PATH or --handler-cmd COMMAND"),
        ("--image IMAGE --handler-socket s --handler-cmd {socket}", "--handler-socket PATH or --handler-cmd"),
        ("--image IMAGE --handler-cmd handler", "without {socket}"),
        ("--image IMAGE --handler-cmd handler --cases 99", "there is no '99'"),
        (f"--image IMAGE --handler-socket /{'s' * 107}", "is no address"),
        ("--image IMAGE --make-image 32MiB", "IMAGE"),
        ("--image SHORT --handler-socket s", "at least 32 MiB"),
    ],
)
def test_what_is_asked_wrongly(
    run_in_child: Callable[..., Any], image: str, tmp_path: Path, line: str, says: str
) -> None:
    short = tmp_path / "short"
    short.write_bytes(b"short")
    names = {"IMAGE": image, "SHORT": str(short)}
    done = run_in_child([*CONFORMANCE, *(names.get(word, word) for word in line.split())])
    assert done.returncode == 2
    assert names.get(says, says) in done.stderr


def test_a_handler_that_cannot_be_started(image: str, tmp_path: Path) -> None:
    handler = Handler(HandlerCommands("/nowhere/handler {socket}"), str(tmp_path), image)
    with pytest.raises(ConfigurationError, match="cannot start '/nowhere/handler'"):
        handler.start()


def test_nothing_passed_is_no_success(run_in_child: Callable[..., Any], image: str) -> None:
    done = run_in_child([*CONFORMANCE, "--image", image, "--handler-socket", "/nowhere", "--cases", "28", "--json"])
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["not-applicable"] == 1


@pytest.mark.needs("uffd", "root")
@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse")
def test_one_that_is_told_to_end_leaves_no_mount(image: str) -> None:
    """In the middle of a read that is not answered."""
    handler = f"{installed_program('conformance-handler')} --socket {{socket}} --image {{image}}"
    with tempfile.TemporaryDirectory() as directory:
        line = ["--image", image, "--handler-cmd", handler, "--cases", "32-slow", "--slow", "1000"]
        environment = {**os.environ, "TMPDIR": directory}
        with subprocess.Popen([*CONFORMANCE, *line], env=environment, stderr=subprocess.DEVNULL) as kit:
            try:
                deadline_s = time.monotonic() + PATIENT_S
                while directory not in Path("/proc/mounts").read_text():
                    assert kit.poll() is None
                    assert time.monotonic() < deadline_s
                    time.sleep(0.005)
                kit.terminate()
                kit.wait(PATIENT_S)
            finally:
                kit.kill()
        assert directory not in Path("/proc/mounts").read_text()
        assert os.listdir(directory) == []


def test_processes_of_a_handler_that_hide_their_environment(image: str, tmp_path: Path) -> None:
    """As sudo does. A command that should kill them and does not is no reason to go on as if it had."""

    async def run() -> None:
        handler = Handler(
            HandlerCommands("env -i sleep 1000", kill="sh -c 'echo not I >&2; exit 3'"), str(tmp_path), image
        )
        handler.start()
        try:
            assert handler.processes() != []
            with pytest.raises(NotApplicable, match="status 3: not I"):
                await handler.kill()
            assert handler.death == ""
        finally:
            await handler.end()
        assert handler.processes() == []
        assert "SIGKILL" in handler.death

    trio.run(run)


# ---- the image


def runs_of(image: Image, wanted: Sequence[tuple[int, int]]) -> list[list[int]]:
    return [image.runs(pages, count) for pages, count in wanted]


def test_pages_of_an_image(image: str) -> None:
    content = Path(image).read_bytes()
    known = Image(image)
    zeros = bytes(4096)
    for found, (pages, _) in zip(runs_of(known, [(1, 6), (64, 3), (640, 5)]), [(1, 6), (64, 3), (640, 5)], strict=True):
        assert sorted(set(found)) == found
        for first in found:
            for page in range(first, first + pages):
                assert content[page * 4096 : (page + 1) * 4096] != zeros
    hole = known.zero_pages(512, 512)
    assert content[hole * 4096 : (hole + 512) * 4096] == bytes(512 * 4096)
    different = {content[at : at + 4096] for at in range(0, len(content), 4096)} - {zeros}
    assert len(different) == len(content) // 4096 - 512 - ZERO_PAGES  # each is another one
    with pytest.raises(NotApplicable):
        known.runs(4096)
