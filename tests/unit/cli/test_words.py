# SPDX-License-Identifier: Apache-2.0
"""How progress reads."""

from __future__ import annotations

import io
import os
from typing import Any

import pytest
import trio

from postcopy.cli._parser import make_parser, values
from postcopy.output import Output
from postcopy.output._view import View
from postcopy.output._writer import Writer, encoding_of
from postcopy.output.tables import make_console, print_line, print_table, row
from postcopy.output.words import (
    AT_DESTINATION,
    AT_SOURCE,
    Rate,
    arrived_bytes,
    format_coarsely,
    format_count,
    format_duration,
    format_parts,
    phase,
)
from postcopy.service.render import _job_rows
from postcopy.testbed.demo import DemoCommand

MIB = 1 << 20
RAM = {"total": 64 * MIB, "remaining": 16 * MIB, "transferred": 48 * MIB, "demand-pages": 55, "background-pages": 12000}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 µs"), (80.4e-6, "80 µs"), (1.5843, "1.6 s"), (0.0247, "24.7 ms"), (0.00847, "8.47 ms"), (0.2192, "219 ms"),
     (0.9997, "1.0 s"), (59.96, "1 min 0 s"), (125, "2 min 5 s"), (3780, "1 h 3 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_durations_of_what_goes_on_are_not_exact() -> None:
    assert [format_coarsely(seconds) for seconds in (0.004, 9.96, 125)] == ["0.0 s", "10.0 s", "2 min 5 s"]


def test_counts() -> None:
    assert [format_count(count, "page") for count in (0, 1, 2)] == ["0 pages", "1 page", "2 pages"]


def test_a_rate_is_smooth() -> None:
    """A push that comes in bursts, 244 MiB/s for 100 ms and then nothing for 900, is one of 24 MiB/s."""
    rate, seen, sent = Rate(), [], 0
    for tenth in range(100):
        sent += 24 * MIB if tenth % 10 == 5 else 0
        seen.append(rate.of(sent, tenth / 10))
    assert all(20 * MIB < value < 30 * MIB for value in seen[30:])
    assert rate.of(0, 10.0) == 0  # another migration


def test_a_rate_begins_when_something_moves() -> None:
    rate = Rate()
    for second in range(60):
        assert rate.of(0, second) == 0
    assert rate.of(10 * MIB, 60) == 10 * MIB


@pytest.mark.parametrize(
    ("side", "status", "guest", "starts_in_s", "words"),
    [
        ("source", "setup", {"state": "created", "operations": 0}, None, "booting the machine"),
        ("source", "active", {"state": "running", "operations": 9}, 5.0, "waiting 5.0 s before migrating"),
        ("source", "setup", {"state": "running", "operations": 9}, None, "waiting for the destination"),
        ("source", "active", {"state": "paused", "operations": 9}, None, "switching over"),
        ("source", "connecting", {}, None, "connecting to the destination"),
        ("dest", "setup", {}, None, "waiting for the source"),
        ("dest", "postcopy-active", {}, None, "fetching pages; the machine runs here"),
        ("dest", "postcopy-active", {"state": "created"}, None, "fetching pages"),  # an image runs nowhere
        ("dest", "postcopy-paused", {}, None, "disconnected; waiting for the source"),
        ("daemon", "something new", {}, None, "something new"),
    ],
)
def test_phases(side: str, status: str, guest: dict[str, Any], starts_in_s: float | None, words: str) -> None:
    waits = {} if starts_in_s is None else {"starts-in-ms": 1e3 * starts_in_s}
    assert phase({"side": side, "status": status, "guest": guest} | waits) == words


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"status": "active", "ram": {"iteration": 1, "remaining": 64 * MIB}}, "copying, round 1: 64 MiB left"),
        (
            {"status": "active", "ram": {"iteration": 3, "dirty-sync-count": 2, "remaining": 12 * MIB,
             "dirty-pages-rate": 2611, "page-size": 4096}},
            "copying, round 3: 12 MiB left, 10.2 MiB/s dirtied",
        ),
        ({"status": "active", "ram": {"iteration": 2}}, "copying, round 2"),
        ({"status": "active", "ram": {"iteration": 0}}, "waiting until the machine is ready"),
        ({"status": "postcopy-active", "ram": {"iteration": 3}}, "sending pages; the machine runs at the destination"),
        ({"status": "connecting", "attempts": 3},
         "connection lost; the machine has stayed here; trying again (attempt 3)"),
    ],
)  # fmt: skip
def test_phases_of_precopy(now: dict[str, Any], words: str) -> None:
    assert phase({"side": "source", "guest": {"state": "running", "operations": 1}} | now) == words


def test_parts_of_the_downtime() -> None:
    parts = {"stop": 90.4, "commit": 640.0, "load": 345.2, "first-run": 0.0}
    assert format_parts(parts, AT_SOURCE) == "stop 90, commit 640"
    assert format_parts(parts, AT_DESTINATION) == "load 345, first-run 0"


def test_what_has_arrived() -> None:
    assert arrived_bytes(RAM) == 48 * MIB
    sent = {"total": 64 * MIB, "page-size": 4096, "demand-pages": 256, "background-pages": 256, "zero-pages": 512}
    assert arrived_bytes(sent) == 4 * MIB
    assert arrived_bytes({"total": 64 * MIB}) is None
    assert arrived_bytes({}) is None


def test_a_plain_line_has_labels_and_says_nothing_twice() -> None:
    view = View("kvm, 64 MiB")
    now = {
        "side": "dest", "status": "postcopy-active", "ram": RAM, "pending-faults": 1,
        "guest": {"state": "running", "operations": 12, "failures": 0, "reports": 3},
    }  # fmt: skip
    fields = view.line(now).split("; ")
    assert fields[:2] == ["dest: fetching pages", "the machine runs here"]
    assert [field.partition(":")[0] for field in fields[2:]] == [
        "machine", "memory", "network", "time", "pages", "guest"
    ]  # fmt: skip
    assert "memory: 75 %, 48 MiB of 64 MiB" in fields
    assert "pages: 55 on demand (1 thread waiting), 12000 in background" in fields
    assert "guest: running, 12 operations" in fields
    assert view.line(now) == ""
    assert "memory: 99 %" in View().line(now | {"ram": RAM | {"remaining": 1}})  # a whole is not rounded up
    assert "machine: " not in view.line(now | {"status": "completed"})  # what it is was said


def test_a_rate_that_is_not_known_is_not_zero() -> None:
    now = {"side": "dest", "status": "postcopy-active", "ram": RAM}
    assert "network: 48 MiB transferred; time: " in View().line(now)


def test_a_process_in_a_line() -> None:
    job = {
        "migration-id": "ff", "status": "postcopy-active", "direction": "incoming", "ram": RAM, "pending-faults": 2,
        "fault-latency-us": {"count": 9, "p99": 1584300.0},
    }  # fmt: skip
    here = {"name": "vm1", "memory": 64 * MIB, "guest": {"state": "running"}, "migration": job}
    idle = {"name": "vm2", "memory": 32 * MIB, "guest": {"state": "running"}, "migration": None}
    assert View().line({"side": "daemon", "machines": [here, idle]}) == "daemon: 2 machines, 1 migrating"


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-8", "80 µs ✓ █░ caf\u00e9 \u4e2d"),
        ("latin1", "80 µs + #. caf\u00e9 \\u4e2d"),
        ("ascii", "80 us + #. caf\\xe9 \\u4e2d"),
    ],
)
def test_what_an_encoding_lacks(encoding: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_CTYPE", "LANG", "PYTHONIOENCODING"):
        monkeypatch.delenv(name, raising=False)
    read_fd, write_fd = os.pipe()
    with os.fdopen(write_fd, "w", encoding=encoding) as stream:
        writer = Writer(stream, str)
        writer.put("80 µs ✓ █░ caf\u00e9 \u4e2d\n", 1 << 20)  # type: ignore[arg-type]
        assert writer.close()
    with os.fdopen(read_fd, encoding=encoding) as file:
        assert file.read() == text + "\n"


@pytest.mark.parametrize(
    ("environment", "encoding"),
    [
        ({}, "utf-8"),  # a container
        ({"LANG": "en_US.UTF-8"}, "utf-8"),
        ({"LANG": "C.UTF-8"}, "utf-8"),
        ({"LANG": "C"}, "ascii"),
        ({"LC_ALL": "POSIX", "LANG": "en_US.UTF-8"}, "ascii"),
        ({"LC_ALL": "en_US.UTF-8", "LANG": "C"}, "utf-8"),
        ({"LC_ALL": "C", "LC_CTYPE": "en_US.UTF-8", "LANG": "en_US.UTF-8"}, "ascii"),
        ({"LC_CTYPE": "en_US.UTF-8", "LANG": "C"}, "utf-8"),
        ({"LC_CTYPE": "C", "LANG": "en_US.UTF-8"}, "ascii"),  # with PYTHONCOERCECLOCALE=0
        ({"LC_CTYPE": "C.UTF-8", "LANG": "C"}, "ascii"),  # so Python leaves it where only LANG was given
        ({"LANG": "C", "PYTHONIOENCODING": "utf-8"}, "utf-8"),
        ({"LANG": "C", "PYTHONUTF8": "1"}, "utf-8"),
    ],
)
def test_the_encoding_that_the_locale_means(
    environment: dict[str, str], encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LC_ALL", "LC_CTYPE", "LANG", "PYTHONIOENCODING", "PYTHONUTF8"):
        monkeypatch.delenv(name, raising=False)
        if name in environment:
            monkeypatch.setenv(name, environment[name])
    with open(os.devnull, "w", encoding="utf-8") as stream:
        assert encoding_of(stream) == encoding


def test_an_address_is_no_emoji() -> None:
    file = io.StringIO()
    console = make_console(file)
    print_line(console, "listening on [2001:b:1::2]:7777")
    print_table(console, ("peer",), [row("[2001:b:1::2]:7777")])
    assert file.getvalue().count("[2001:b:1::2]:7777") == 2


def demo(*arguments: str) -> dict[str, Any]:
    args = values(make_parser(["demo", *arguments]).parse_args(["demo", *arguments]))
    return DemoCommand(args, Output(False, None, io.StringIO()))._values


@pytest.mark.parametrize("how", [("--chaos", "cut"), ("--lab",)])
@pytest.mark.parametrize("size_mib", [1, 64, 1024])
def test_a_demo_with_cuts_takes_as_long_whatever_the_size(how: tuple[str, ...], size_mib: int, tmp_path: Any) -> None:
    image = tmp_path / "image"
    with open(image, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size_mib * MIB)
    of_image = demo("--machine", "image", "--image", str(image), *how)
    of_machine = demo("--machine", "rv64", "--memory", f"{size_mib}MiB", *how)
    for given in (of_image, of_machine):
        assert 3 < size_mib * MIB / given["max_bandwidth_bytes_per_s"] < 7
        assert given["deadline_s"] == 300


def test_the_deadline_of_a_demo_is_that_of_its_push() -> None:
    assert demo("--machine", "rv64", "--memory", "4GiB", "--max-bandwidth", "4MiB/s")["deadline_s"] == 4 * 1024
    assert (
        demo("--machine", "rv64", "--memory", "4GiB", "--max-bandwidth", "4MiB/s", "--deadline", "9")["deadline_s"] == 9
    )


async def test_the_live_view_is_for_terminals_that_can_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    controlling, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stream, os.fdopen(controlling, "rb"):
        for term, draws in (("xterm", True), ("dumb", False)):
            monkeypatch.setenv("TERM", term)
            assert Output(False, None, stream).draws is draws
    await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("direction", ["incoming", "outgoing"])
def test_whose_parts_they_are(direction: str) -> None:
    """`ctl status` names the side, which is the same on both."""
    parts = {"stop": 90.4, "load": 345.2}
    job = {"status": "completed", "direction": direction, "migration-id": "ff", "peer": "192.0.2.7:7777"}
    rows = dict(_job_rows(job | {"downtime-breakdown-us": parts}))
    assert (rows["At source, us"], rows["At dest, us"]) == ("stop 90", "load 345")
