# SPDX-License-Identifier: Apache-2.0
"""`postcopy faultpaths` on this kernel: it says what happened, and leaves no process behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from lines import parse_line

from postcopy.dataplane.pager import Pager
from postcopy.testbed import _linux
from postcopy.testbed.chaos import ChaosPlan
from postcopy.testbed.faultpaths import _remote, _runner
from postcopy.testbed.faultpaths._core import operations
from postcopy.testbed.faultpaths._model import Backing, Cell, Mode, Operation, Outcome, Verdict
from postcopy.testbed.faultpaths._supervise import Runner
from postcopy.testbed.faultpaths._system import file_system_of

FAULTPATHS = [sys.executable, "-m", "postcopy", "faultpaths"]
SHORT = ["--only", "user.load,copy.write_pipe,copy.read_pipe", "--mode", "missing", "--backing", "anon,memfd"]
GONE_S = 20.0


def report_of(stdout: str) -> Any:
    """Behind the line that says what ran where."""
    began, found = stdout.splitlines()
    run, report = parse_line(began), json.loads(found)
    assert (run["event"], run["command"]) == ("run", "faultpaths")
    assert run["host"]["kernel"] == report["system"]["kernel"]
    return report


def descendants(pid: int) -> list[int]:
    found = []
    for child in _runner.children_of(pid):
        found += [child, *descendants(child)]
    return found


def wait_until_gone(pids: list[int]) -> None:
    """A pid that is used again in the meantime would fail it, which is not to be expected in these seconds."""
    deadline_s = time.monotonic() + GONE_S
    # (an orphan that has ended stays a zombie until its new parent, such as CI's subreaper, reaps it)
    while left := [pid for pid in pids if _linux.start_time(pid) is not None]:
        assert time.monotonic() < deadline_s, f"left behind: {left}"
        time.sleep(0.01)


@pytest.mark.needs("uffd")
def test_a_short_run(run_in_child: Callable[..., Any], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run_in_child([*FAULTPATHS, *SHORT, "--measure", "signal,kill", "--json", "--html", str(page)])
    assert done.returncode == 0, done.stdout + done.stderr
    report = report_of(done.stdout)
    assert report["good"] is True
    cells = {(cell["operation"], cell["backing"]): cell for cell in report["cells"]}
    assert len(cells) == 6
    for cell in cells.values():
        assert (cell["outcome"], cell["verdict"], cell["event-thread"]) == ("blocked", "as expected", "own")
        assert cell["events"] >= 1
        assert cell["kill"]["killed"] is True
        assert cell["reason"]
    assert cells["user.load", "anon"]["pending-signal"]["handler-before-page"] is True
    assert cells["copy.write_pipe", "anon"]["pending-signal"]["handler-before-page"] is False
    assert "copy.read_pipe" in page.read_text()


@pytest.mark.needs("uffd")
def test_a_wrong_expectation_is_reported_as_changed(run_in_child: Callable[..., Any], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(
        'schema = 1\n[[expect]]\noperation = "*"\nmode = "missing"\noutcome = "blocked"\nreason = "right"\n'
        '[[expect]]\noperation = "copy.*"\nmode = "*"\noutcome = "refused"\nerror = "EFAULT"\n'
        'reason = "wrong on purpose"\n'
    )
    done = run_in_child([*FAULTPATHS, *SHORT, "--expectations", str(wrong)])
    assert done.returncode == 1, done.stderr
    assert "Changed: another outcome than expected" in done.stdout
    assert "blocked instead of refused EFAULT" in done.stdout
    assert "wrong on purpose" in done.stdout
    assert "2 as expected, 4 changed" in done.stdout


@pytest.mark.needs("uffd")
def test_every_operation_in_mode_missing_is_as_expected_or_has_a_reason(run_in_child: Callable[..., Any]) -> None:
    done = run_in_child([*FAULTPATHS, "--mode", "missing", "--measure", "none", "--json"], deadline_s=110.0)
    report = report_of(done.stdout)
    bad = [cell for cell in report["cells"] if cell["verdict"] in (Verdict.CHANGED, Verdict.NOT_EXPECTED)]
    assert done.returncode == 0, bad
    assert all(cell["reason"] for cell in report["cells"])


DIRECT = ("pin.odirect_*", "pin.aio_*", "uring.direct_*", "uring.async_direct_*")


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("directory", ["/dev/shm", "/tmp", "/var/tmp", "."])
@pytest.mark.parametrize("named", [True, False])
def test_no_row_is_changed_whatever_file_system_it_runs_on(
    run_in_child: Callable[..., Any], directory: str, named: bool
) -> None:
    command = [*FAULTPATHS, "--only", ",".join(DIRECT), "--mode", "missing", "--measure", "none"]
    if named:
        done = run_in_child([*command, "--direct-dir", directory])
    else:
        done = run_in_child(["env", "-C", directory, f"TMPDIR={directory}", "COLUMNS=80", *command])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed" not in done.stdout.splitlines()[-1]
    kind = re.search(r"O_DIRECT on (\S+) \(([^)]*)\)", " ".join(done.stdout.split()))
    assert kind is not None, done.stdout  # it says which one that was
    assert file_system_of(kind[2]) == kind[1]


def test_the_list(run_in_child: Callable[..., Any]) -> None:
    done = run_in_child([*FAULTPATHS, "--list"])
    assert done.returncode == 0, done.stderr
    known = operations()
    assert len({operation.name for operation in known}) == len(known)
    for operation in known:
        assert operation.name.startswith(operation.group + ".")
        assert operation.name in done.stdout
    done = run_in_child([*FAULTPATHS, "--list", "--json", "--only", "copy"])
    listed = json.loads(done.stdout)["operations"]
    assert [msgspec.convert(item, Operation).name for item in listed] == [
        operation.name for operation in known if operation.group == "copy"
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--only tape", "no operation or group is called 'tape'; the groups are user,"),
        ("--mode lost", "--mode: there is no 'lost'; there are missing, minor,"),
        ("--backing tape", "--backing: there is no 'tape'; there are anon,"),
        ("--measure all", "--measure: there is no 'all'; there are signal, kill, locks"),
        ("--direct-dir /nonexistent", "--direct-dir: directory '/nonexistent' does not exist"),
        ("--direct-dir /proc", "no file can be made in '/proc'"),
        ("--direct-dir " + 300 * "x", "more than 255 bytes"),
        ("--json --markdown", "choose one"),
        ("--html /nonexistent/page", "--html /nonexistent/page: directory /nonexistent does not exist"),
        ("--html /dev/null", "--html /dev/null: that is a device, which would be replaced"),
        ("--expectations /nonexistent", "cannot read '/nonexistent': No such file"),
        ("--timeout 0", "seconds from 0.1 to 600, as 2.5 or 200ms, not '0'"),
        ("compare a.json", "faultpaths compare needs B.json"),
        ("merge /nonexistent", "cannot read '/nonexistent': No such file"),
        ("merge --output /nonexistent/all.jsonl", "--output /nonexistent/all.jsonl: directory /nonexistent"),
        ("merge --json --markdown", "choose one"),
        ("--remote --backing guest-memfd", "no page of a guest_memfd is handed over"),
        ("contrast", "unknown command 'contrast'"),
    ],
)
def test_one_line_for_a_mistake(run_in_child: Callable[..., Any], line: str, reason: str) -> None:
    done = run_in_child([*FAULTPATHS, *line.split()])
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert reason in done.stderr
    assert done.stdout == ""


# ---- what goes wrong


async def run_test_operation(name: str, timeout_s: float) -> str:
    cell = Cell(f"test.{name}", Mode.MISSING, Backing.ANON)
    async with Runner(timeout_s=timeout_s) as runner:
        result = await runner.run(cell)
        # The same process goes on: a cell that fails is the core's matter, not the end of the runner.
        again = await runner.run(Cell(operations()[0].name, Mode.MISSING, Backing.ANON))
    assert runner.restarts == 0
    assert again.outcome is Outcome.BLOCKED
    return result.outcome


def in_trio(name: str, timeout_s: float) -> str:
    return trio.run(run_test_operation, name, timeout_s)


@pytest.mark.needs("uffd")
@pytest.mark.parametrize(("name", "outcome"), [("hang", "hung"), ("crash", "crashed"), ("wrong", "wrong")])
def test_a_cell_that_fails(run_in_child: Callable[..., Any], name: str, outcome: str) -> None:
    done = run_in_child(in_trio, name, 1.0)
    assert done.value == outcome, done.stderr


def start_a_hang(spawn_child: Callable[..., Any], *command: str) -> tuple[Any, list[int]]:
    """The child, and all processes below it once a cell's child is among them."""
    child = spawn_child(list(command)) if command else spawn_child(in_trio, "hang", 600.0)
    deadline_s = time.monotonic() + GONE_S
    while len(below := descendants(child.pid)) < 3:  # guard, worker, and what a cell has started
        assert time.monotonic() < deadline_s, child.errors()
        time.sleep(0.005)
    return child, below


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("victim", ["supervisor", "guard", "worker", "cell"])
def test_nothing_is_left_behind_when_one_is_killed(spawn_child: Callable[..., Any], victim: str) -> None:
    child, below = start_a_hang(spawn_child)
    guard = _runner.children_of(child.pid)[0]
    worker = _runner.children_of(guard)[0]
    killed = {"supervisor": child.pid, "guard": guard, "worker": worker, "cell": _runner.children_of(worker)[0]}
    os.kill(killed[victim], signal.SIGKILL)
    if victim != "supervisor":
        # It reports and ends by itself: the cell is not what it waited for any more.
        child.wait(GONE_S)
    else:
        child.process.wait(GONE_S)
    wait_until_gone(below)


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("line", ["--all --measure locks", "--remote=slow:delay=0.5"])
def test_an_interrupted_run_ends_in_order(spawn_child: Callable[..., Any], line: str) -> None:
    child, below = start_a_hang(spawn_child, *FAULTPATHS, *line.split())
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(signal.SIGINT)
    done = child.wait(GONE_S)
    assert done.returncode == 1
    assert done.stderr == ""
    wait_until_gone(below)


# ---- through the engine


@pytest.mark.needs("uffd")
def test_pages_of_another_host_through_a_cut(run_in_child: Callable[..., Any]) -> None:
    only = (
        "user.load,copy.write_pipe,copy.execve_argv,pin.odirect_read,futex.wake_private,nofault.munmap,remote.mem_read"
    )
    done = run_in_child([*FAULTPATHS, "--remote", "--only", only, "--json"], deadline_s=60.0)
    assert done.returncode == 0, done.stdout + done.stderr
    report = report_of(done.stdout)
    assert len(report["cells"]) == 2 * len(only.split(","))  # anonymous memory and memfd
    waited = [cell for cell in report["cells"] if cell["outcome"] == "blocked"]
    assert {cell["operation"] for cell in waited} == {
        "user.load", "copy.write_pipe", "copy.execve_argv", "pin.odirect_read"
    }  # fmt: skip
    for cell in waited:
        remote = cell["remote"]
        assert (remote["requests"], remote["pages"], remote["cuts"]) == (1, 1, 1), cell
        assert cell["waited-us"] >= remote["held-us"]
    assert report["remote"]["connections"] > len(report["cells"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("--remote=quick", "no plan begins with 'quick'"),
        ("--remote=cut", "cuts by itself"),
        ("--remote --mode wp", "a page of another host is a missing one"),
        ("--remote --measure kill", "nothing is measured beside"),
    ],
)
def test_one_line_for_a_mistake_with_remote(run_in_child: Callable[..., Any], line: str, reason: str) -> None:
    test_one_line_for_a_mistake(run_in_child, line, reason)


STORM_SIGNALS = 20
STORM_EVENTS = 300
"""As many as make the engine rest between its reads, and some that it reads then."""


async def storm(name: str) -> tuple[str, int, int, int, float]:
    """Sends signals to the thread that waits in a system call until the engine has read many events. The outcome,
    faults, requests and pages at the source, and for how long the page was certainly not there, in seconds."""

    async def send_signals(pager: Pager) -> None:
        below = descendants(os.getpid())
        cell = below[2]  # after guard and worker
        for _ in range(STORM_SIGNALS):
            os.kill(cell, signal.SIGUSR1)
        while pager.statistics().faults < STORM_EVENTS:  # noqa: ASYNC110 - the pager has no event for it
            await trio.sleep(0.01)

    cell = Cell(name, Mode.MISSING, Backing.MEMFD)
    results, _ = await _remote.run_cells(
        [cell], plan=ChaosPlan(), timeout_s=60.0, direct_dir=os.getcwd(), while_pending=send_signals
    )
    remote = results[cell].remote
    assert remote, results[cell].text
    return results[cell].outcome, remote.faults, remote.requests, remote.pages, remote.held_us / 1e6


def storm_in_trio(name: str) -> tuple[str, int, int, int, float]:
    return trio.run(storm, name)


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("name", ["copy.write_pipe", "futex.wait_private"])
def test_a_signal_storm_leads_to_one_request_and_bounded_work(run_in_child: Callable[..., Any], name: str) -> None:
    done = run_in_child(storm_in_trio, name, deadline_s=90.0)
    assert done.value is not None, done.stderr
    outcome, faults, requests, pages, held_s = done.value
    assert (outcome, requests, pages) == ("blocked", 1, 1)
    assert faults >= STORM_EVENTS
    # The thread raises its fault 100,000 times a second; the engine rests between reads (csrc/pager/pager.c).
    assert faults <= STORM_EVENTS + 100 + held_s * 4000
