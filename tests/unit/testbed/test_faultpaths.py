# SPDX-License-Identifier: Apache-2.0
"""Choosing, judging and reporting fault path cells, on recorded results: no kernel is asked."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from msgspec.structs import replace

from postcopy._host import run_line
from postcopy.cli import main
from postcopy.errors import ConfigurationError, ResourceError
from postcopy.testbed import _linux
from postcopy.testbed.faultpaths import _compare, _expect, _merge, _report, _runner, _select, _supervise, _system
from postcopy.testbed.faultpaths._model import (
    Backing,
    Cell,
    Flag,
    Judged,
    KillMeasure,
    LockMeasure,
    Measure,
    Mode,
    Operation,
    Outcome,
    RemoteMeasure,
    Result,
    Run,
    SignalMeasure,
    Verdict,
)
from postcopy.testbed.faultpaths._system import System

pytestmark = pytest.mark.slow

LOAD = Operation("user.load", "user", "a load <in> user code")
READ = Operation("pin.odirect_read", "pin", "read(2) of an O_DIRECT file", flags=(Flag.WRITES, Flag.NEEDS_DIR))
FORK = Operation("nofault.fork", "nofault", "fork", modes=(Mode.MISSING,), flags=(Flag.NOFAULT,))
OPERATIONS = (LOAD, READ, FORK)
BLOCKED = Result(Outcome.BLOCKED, events=1, event_offset=8, event_thread="own", state="D", wchan="handle_userfault")
SYSTEM = System("6.18.44-x", "x86_64", kvm="emulated", config={"CONFIG_A": "y"}, config_known=True)
LOAD_ANON = Cell("user.load", Mode.MISSING, Backing.ANON)


def rules(*tables: str) -> _expect.Expectations:
    return _expect.parse("schema = 1\n" + "\n".join("[[expect]]\n" + table for table in tables), "a test")


ALL_BLOCK = 'operation = "*"\nmode = "missing"\noutcome = "blocked"\nreason = "since 5.0"'


# ---- expectations


def test_the_file_that_comes_with_postcopy_is_sound() -> None:
    expectations = _expect.load()
    assert expectations.rules
    assert all(len(rule.reason) > 10 for rule in expectations.rules)


@pytest.mark.parametrize(
    ("changed", "verdict", "difference"),
    [
        ({}, Verdict.AS_EXPECTED, ""),
        (
            {"outcome": Outcome.REFUSED, "error": "EFAULT"},
            Verdict.CHANGED,
            "refused EFAULT instead of blocked, state",
        ),
        ({"outcome": Outcome.SIGNALLED, "signal": "SIGBUS"}, Verdict.CHANGED, "signalled SIGBUS instead of"),
        ({"outcome": Outcome.UNAVAILABLE, "text": "no pool"}, Verdict.NOT_AVAILABLE, ""),
        ({"state": "R"}, Verdict.CHANGED, "state R instead of S/D"),
        ({"state": None}, Verdict.AS_EXPECTED, ""),  # it went on before it was looked at
        ({"state": "R", "wchan": "mutex_lock"}, Verdict.AS_EXPECTED, ""),  # it was looked at somewhere else
    ],
)
def test_verdicts(changed: dict[str, Any], verdict: Verdict, difference: str) -> None:
    expectations = rules('operation = "*"\nmode = "*"\noutcome = "blocked"\nstate = ["S", "D"]\nreason = "so it is"')
    judged = expectations.judge(LOAD, LOAD_ANON, replace(BLOCKED, **changed), SYSTEM)
    assert judged.verdict is verdict
    assert judged.difference.startswith(difference)
    assert bool(judged.difference) == bool(difference)
    assert judged.reason == ("no pool" if verdict is Verdict.NOT_AVAILABLE else "so it is")


def test_what_nothing_is_known_of() -> None:
    judged = rules(ALL_BLOCK).judge(LOAD, Cell("user.load", Mode.WP, Backing.ANON), BLOCKED, SYSTEM)
    assert judged.verdict is Verdict.NOT_EXPECTED


@pytest.mark.parametrize("reverse", [False, True])
def test_the_most_specific_holds_wherever_it_stands(reverse: bool) -> None:
    tables = [
        'operation = "*"\nmode = "*"\noutcome = "hung"\nreason = "0"',
        'operation = "*"\nmode = "missing"\nbacking = "anon"\noutcome = "hung"\nreason = "1"',
        'operation = "user.*"\nmode = "*"\noutcome = "hung"\nreason = "2"',
        'operation = "user.load"\nmode = "*"\noutcome = "hung"\nreason = "3"',
        'operation = ["copy.*", "user.load"]\nmode = "missing"\noutcome = "hung"\nreason = "4"',
        'operation = "user.load"\nmode = "missing"\nkernel = ">=6.1"\noutcome = "hung"\nreason = "5"',
        'operation = "user.load"\nmode = "missing"\nbacking = "anon"\noutcome = "blocked"\nreason = "6"',
        'operation = "user.load"\nmode = "missing"\nbacking = "memfd"\noutcome = "hung"\nreason = "elsewhere"',
    ]
    for known in range(7, 0, -1):  # without the most specific one, the next holds
        some = tables[:known] if not reverse else tables[:known][::-1]
        found = rules(*some).find(LOAD, LOAD_ANON, SYSTEM)
        assert found is not None
        assert found.reason == str(known - 1)


@pytest.mark.parametrize(
    ("condition", "matches"),
    [
        ('kernel = ">=6.1"', True),
        ('kernel = "<6.18"', False),
        ('kernel = "=6.18"', True),
        ('kernel = "=6.18.43"', False),
        ('kernel = "<=6.18"', True),
        ('kernel = ">6.18"', False),
        ('kernel = ">=6.1, <7"', True),
        ('kernel = ">=6.1, <6.6"', False),
        ('kvm = "emulated"', True),
        ('kvm = ["hardware", "none"]', False),
        ("writes = false", True),
        ("writes = true", False),
        ('config = { CONFIG_A = "y" }', True),
        ('config = { CONFIG_A = ["m", "y"], CONFIG_B = "n" }', True),
        ('config = { CONFIG_A = "y", CONFIG_B = "y" }', False),
    ],
)
def test_conditions(condition: str, matches: bool) -> None:
    assert (rules(ALL_BLOCK + "\n" + condition).find(LOAD, LOAD_ANON, SYSTEM) is not None) is matches


def test_a_kernel_that_hides_its_configuration_satisfies_no_condition_on_it() -> None:
    expectations = rules(ALL_BLOCK + '\nconfig = { CONFIG_B = "n" }')
    assert expectations.find(LOAD, LOAD_ANON, SYSTEM) is not None
    assert expectations.find(LOAD, LOAD_ANON, System("6.18.44")) is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("schema = 2", "schema = 1"),
        ("schema = ", "a test: "),
        ("schema = 1\nexpect = 3", "Expected `array`, got `int` - at `$.expect`"),
        ("schema = 1\nexpect = [3]", "Expected `object`, got `int` - at `$.expect[0]`"),
        ("schema = 1\n[[expect]]\nmode = 'missing'", "missing required field `operation` - at `$.expect[0]`"),
        ("schema = 1\n[[expect]]\n" + ALL_BLOCK.replace("since 5.0", ""), "length >= 1 - at `$.expect[0].reason`"),
        (
            "schema = 1\n[[expect]]\n" + ALL_BLOCK.replace('"blocked"', '"danced"'),
            "'danced' - at `$.expect[0].outcome[0]`",
        ),
        ("schema = 1\n[[expect]]\n" + ALL_BLOCK.replace('"missing"', '"mising"'), "mode 'mising' is none of"),
        ("schema = 1\n[[expect]]\n" + ALL_BLOCK + '\nbacking = "disk"', "backing 'disk' is none of"),
        ("schema = 1\n[[expect]]\n" + ALL_BLOCK + '\nkernel = "6.1"', "kernel '6.1'"),
        ("schema = 1\n[[expect]]\n" + ALL_BLOCK + '\nkvm = "yes"', "value 'yes' - at `$.expect[0].kvm[0]`"),
        ("schema = 1\n[[expect]]\n" + ALL_BLOCK + "\nconfig = { KVM = 'y' }", "matching regex '^CONFIG_' - at"),
        ("schema = 1\n[[expect]]\n" + ALL_BLOCK + "\nthread = 'mine'", "value 'mine' - at `$.expect[0].thread[0]`"),
        ("schema = 1\n[[expect]]\n" + ALL_BLOCK + "\nerrno = 'EFAULT'", "unknown field `errno` - at `$.expect[0]`"),
        ("schema = 1\n[[expect]]\n" + ALL_BLOCK + "\nwrites = 1", "got `int` - at `$.expect[0].writes`"),
        ("schema = 1\n[[expect]]\n" + ALL_BLOCK + "\nerror = 14", "got `int` - at `$.expect[0].error`"),
    ],
)
def test_a_bad_file_is_told_with_its_place(text: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(complaint)):
        _expect.parse(text, "a test")


@pytest.mark.parametrize(
    ("operation", "mode", "outcome", "uncovered"),
    [
        (LOAD, Mode.MISSING, Outcome.BLOCKED, False),
        (LOAD, Mode.MISSING, Outcome.REFUSED, True),
        (LOAD, Mode.MISSING, Outcome.RETRIED, True),
        (LOAD, Mode.MISSING, Outcome.PASSED, True),
        (LOAD, Mode.MISSING, Outcome.UNAVAILABLE, False),
        (LOAD, Mode.WP, Outcome.PASSED, False),
        (LOAD, Mode.WP, Outcome.REFUSED, True),
        (LOAD, Mode.RWP, Outcome.REFUSED, True),
        (LOAD, Mode.RWP, Outcome.PASSED, False),
        (LOAD, Mode.POISON, Outcome.SIGNALLED, False),
        (LOAD, Mode.USER_ONLY, Outcome.REFUSED, False),
        (FORK, Mode.MISSING, Outcome.PASSED, False),
    ],
)
def test_what_counts_as_uncovered(operation: Operation, mode: Mode, outcome: Outcome, uncovered: bool) -> None:
    cell = Cell(operation.name, mode, Backing.ANON)
    assert _expect.is_uncovered(operation, cell, Result(outcome)) is uncovered


def test_a_second_request_at_the_source_is_a_change() -> None:
    for requests, verdict in ((1, Verdict.AS_EXPECTED), (2, Verdict.CHANGED), (0, Verdict.CHANGED)):
        result = replace(BLOCKED, remote=RemoteMeasure(9, requests, 1, 1, 1, 1))
        judged = rules(ALL_BLOCK).judge(LOAD, LOAD_ANON, result, SYSTEM)
        assert judged.verdict is verdict
        if requests != 1:
            assert judged.difference == f"{requests} requests reached the source instead of one"


# ---- the system


@pytest.mark.parametrize(
    ("release", "version"), [("6.18.44-fc-v595", (6, 18, 44)), ("7.0-rc1", (7, 0)), ("unknown", ())]
)
def test_versions(release: str, version: tuple[int, ...]) -> None:
    assert _system.version_of(release) == version


def test_a_configuration_file() -> None:
    text = '# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C="x=y"\n'
    assert _system.parse_config(text) == {"CONFIG_B": "y", "CONFIG_C": "x=y"}


def test_the_file_system_of_a_directory() -> None:
    assert _system.file_system_of("/proc/self") == "proc"


O_DIRECT = ("pin.odirect_read", "pin.odirect_write", "pin.aio_read", "pin.aio_write", "uring.direct_read",
            "uring.direct_write", "uring.async_direct_read", "uring.async_direct_write")  # fmt: skip


@pytest.mark.parametrize("operation", O_DIRECT)
@pytest.mark.parametrize(
    ("file_system", "expected"),
    [("ext4", "D"), ("xfs", "D"), ("tmpfs", "S"), ("btrfs", "S"), ("overlay", "SD"), ("nfs4", "SD"), ("", "SD")],
)
def test_what_is_expected_of_o_direct_depends_on_the_file_system(
    operation: str, file_system: str, expected: str
) -> None:
    cell = Cell(operation, Mode.MISSING, Backing.ANON)
    system = dataclasses.replace(SYSTEM, file_system=file_system)
    for state in "SD":
        result = replace(BLOCKED, state=state, event_thread="none")
        judged = _expect.load().judge(Operation(operation, operation.partition(".")[0], "x"), cell, result, system)
        assert (judged.verdict is Verdict.AS_EXPECTED) == (state in expected), judged


def test_the_directory_for_o_direct_is_one_that_can_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kinds = {name: tmp_path / name for name in ("here", "tmp")}
    for path in kinds.values():
        path.mkdir()
    known = {str(kinds["here"]): "tmpfs", str(kinds["tmp"]): "tmpfs", "/var/tmp": "ext4"}
    monkeypatch.setattr(_select, "file_system_of", lambda path: known[path])
    monkeypatch.setattr(tempfile, "tempdir", str(kinds["tmp"]))
    monkeypatch.chdir(kinds["here"])
    assert _select.direct_dir("") == "/var/tmp"
    known["/var/tmp"] = "btrfs"
    assert _select.direct_dir("") == str(kinds["here"])  # none can: the one that the user is in
    known[str(kinds["tmp"])] = "xfs"
    assert _select.direct_dir("") == str(kinds["tmp"])
    known[str(kinds["here"])] = "ext4"
    assert _select.direct_dir("") == str(kinds["here"])
    assert _select.direct_dir(".") == str(kinds["here"])
    known[str(kinds["here"])] = "tmpfs"
    assert _select.direct_dir(".") == str(kinds["here"])  # what was named is taken


def test_the_directory_for_o_direct_where_the_current_one_has_been_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert os.path.isdir(_select.direct_dir(""))


# ---- choosing


def test_patterns_match_names_and_groups() -> None:
    assert _select.chosen_operations(OPERATIONS, ["pin"]) == [READ]
    assert _select.chosen_operations(OPERATIONS, ["*.load", "nofault.*"]) == [LOAD, FORK]
    with pytest.raises(ConfigurationError, match=r"'tape'; the groups are user, pin, nofault \(names: --list\)"):
        _select.chosen_operations(OPERATIONS, ["user", "tape"])


def test_the_default_begins_with_missing_pages_of_every_operation() -> None:
    cells = _select.choose(OPERATIONS)
    first = {Cell(op.name, Mode.MISSING, backing) for op in OPERATIONS for backing in (Backing.ANON, Backing.MEMFD)}
    assert set(cells[: len(first)]) == first
    assert len(set(cells)) == len(cells)
    assert {cell.mode for cell in cells if cell.operation == "user.load"} == set(Mode)
    assert {cell.mode for cell in cells if cell.operation == "nofault.fork"} == {Mode.MISSING}


def test_a_mode_or_a_backing_means_all_of_it() -> None:
    cells = _select.choose(OPERATIONS, modes=[Mode.MINOR])
    assert {(cell.operation, cell.backing) for cell in cells} == {
        (operation.name, backing) for operation in (LOAD, READ) for backing in Backing
    }
    everything = _select.choose(OPERATIONS, everything=True)
    assert len(everything) == 2 * len(Mode) * len(Backing) + len(Backing)
    with pytest.raises(ConfigurationError, match="nothing to run"):
        _select.choose(OPERATIONS, ["nofault"], modes=[Mode.POISON])


def test_measures_go_to_one_operation_of_each_group_that_waits() -> None:
    refused = Operation("pin.first", "pin", "")
    operations = (LOAD, refused, READ, FORK)
    expectations = rules(ALL_BLOCK, 'operation = "pin.first"\nmode = "*"\noutcome = "refused"\nreason = "cannot wait"')

    def waits(operation: Operation, cell: Cell) -> bool:
        return expectations.waits(operation, cell, SYSTEM)

    no_rule = Cell("user.load", Mode.WP, Backing.ANON)
    assert waits(LOAD, no_rule)
    assert not waits(FORK, Cell("nofault.fork", Mode.WP, Backing.ANON))
    cells = _select.choose(operations)
    measured = _select.measured(cells, operations, None, waits)
    read_anon = Cell("pin.odirect_read", Mode.MISSING, Backing.ANON)
    assert {LOAD_ANON, read_anon} <= set(measured)
    assert not any(cell.operation == "pin.first" for cell in measured)
    assert set(measured[LOAD_ANON]) == set(Measure)
    chosen = _select.measured(cells, operations, [Measure.KILL], waits)
    assert chosen[no_rule] == (Measure.KILL,)
    assert not any(cell.operation == "pin.first" or cell.mode is Mode.POISON for cell in chosen)
    assert _select.measured(cells, operations, [], waits) == {}


# ---- reports


FULL = Result(
    Outcome.REFUSED, "EFAULT", None, 0, -1, 3, 2, 0x12, 5, 0, "kernel", True, "S", None, 123.4, "a | text",
    SignalMeasure(False, 40, 5000.0, 6000.0), KillMeasure(True, 700.0),
    {
        "mmap": LockMeasure(100, 110, 1, 2),
        "munmap": LockMeasure(200, 0, 2, 2),
        "mprotect": LockMeasure(300, 300, 3, 9),
        "fork": LockMeasure(0, 400, 4, 0),
        "register": LockMeasure(500, 1000, 5, 50),
    },
    RemoteMeasure(7, 2, 1, 1, 5000.0, 1000.0),
)  # fmt: skip


@pytest.fixture
def found() -> Run:
    expectations = rules(
        ALL_BLOCK, 'operation = "nofault.*"\nmode = "missing"\noutcome = "passed"\nreason = "no touch"'
    )
    cells = [
        (LOAD, LOAD_ANON, BLOCKED),
        (LOAD, Cell("user.load", Mode.MISSING, Backing.HUGETLB), Result(Outcome.UNAVAILABLE, text="no huge pages")),
        (READ, Cell("pin.odirect_read", Mode.MISSING, Backing.ANON), FULL),
        (READ, Cell("pin.odirect_read", Mode.POISON, Backing.ANON), Result(Outcome.SIGNALLED, signal="SIGBUS")),
        (FORK, Cell("nofault.fork", Mode.MISSING, Backing.ANON), Result(Outcome.PASSED)),
    ]
    return Run(
        SYSTEM.as_json(),
        OPERATIONS,
        tuple(expectations.judge(operation, cell, result, SYSTEM) for operation, cell, result in cells),
        1.5,
        (Cell("nofault.fork", Mode.MISSING, Backing.MEMFD),),
        expectations.as_json(),
    )


def test_json_is_read_back_as_it_was(found: Run) -> None:
    assert _report.from_json(json.loads(json.dumps(_report.to_json(found)))) == found


def test_the_runner_line_is_read_back_as_it_was() -> None:
    for result in (FULL, BLOCKED):
        assert msgspec.json.decode(msgspec.json.encode(result), type=Result) == result


def test_lock_ratios() -> None:
    assert FULL.locks_ns
    assert [locks.ratios for locks in FULL.locks_ns.values()] == [
        (1.1, 2.0), (None, 1.0), (1.0, 3.0), (None, None), (2.0, 10.0)
    ]  # fmt: skip


def written(found: Run) -> dict[str, str]:
    text = io.StringIO()
    _report.print_text(found, text)
    return {"text": text.getvalue(), "markdown": _report.to_markdown(found), "html": _report.to_html(found)}


@pytest.mark.parametrize("form", ["text", "markdown", "html"])
def test_every_form_names_what_matters(found: Run, form: str) -> None:
    text = written(found)[form]
    for words in (
        "Linux 6.18.44-x",
        "User-mode code",
        "Must not fault",
        "refused EFAULT !",
        "signalled SIGBUS ?",
        "refused EFAULT instead of blocked",
        "Few places that remain uncovered",
        "no huge pages",
        "3 operations, 5 cells",
        "1 left out",
    ):
        assert words in text.replace("\\", ""), text
    assert "\x1b" not in text  # no colour where no terminal is


def test_special_characters_stay_what_they_are(found: Run) -> None:
    forms = written(found)
    assert "a | text" in forms["text"]
    assert "a \\| text" in forms["markdown"]
    assert 'title="a load &lt;in&gt; user code"' in forms["html"]
    assert "<script" not in forms["html"]
    assert "http" not in forms["html"]  # one page, nothing beside it
    rows = [line for line in forms["markdown"].splitlines() if "a \\| text" in line]
    assert rows[0].replace("\\|", "").count("|") == 6  # five columns, as its header


def test_a_run_is_good_when_nothing_is_changed_or_unknown(found: Run) -> None:
    assert not found.good
    fine = [item for item in found.judged if item.verdict in (Verdict.AS_EXPECTED, Verdict.NOT_AVAILABLE)]
    assert Run({}, OPERATIONS, tuple(fine)).good
    assert {item.verdict for item in found.judged} == set(Verdict)


# ---- compare


def with_result(found: Run, cell: Cell, result: Result | None) -> Run:
    judged = [item for item in found.judged if item.cell != cell]
    if result is not None:
        judged.append(Judged(cell, result, Verdict.AS_EXPECTED))
    return Run(found.system, found.operations, tuple(judged))


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (BLOCKED, None),
        (Result(Outcome.BLOCKED, events=1, event_thread="own", waited_us=5), None),  # times and lost races do not count
        (Result(Outcome.REFUSED, error="EFAULT", events=1), ("blocked", "refused EFAULT")),
        (Result(Outcome.BLOCKED, events=9, events_repeated=8, event_thread="own"), ("one event", "events repeated")),
        (Result(Outcome.BLOCKED, events=1, event_thread="own", state="S"), ("state D", "state S")),
        (Result(Outcome.BLOCKED, events=1, event_thread="kernel"), ("fault of own thread", "fault of kernel thread")),
        (None, ("blocked", "")),
    ],
)
def test_compare(found: Run, after: Result | None, words: tuple[str, str] | None) -> None:
    changes = _compare.compare(found, with_result(found, LOAD_ANON, after))
    assert [(change.cell, change.before, change.after) for change in changes] == (
        [(LOAD_ANON, *words)] if words else []
    )


def test_the_compare_command(found: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    before.write_text(f"{run_line('faultpaths', {})}\n{json.dumps(_report.to_json(found))}\n")
    after.write_text(  # as it was written before there was a line `run`
        json.dumps(_report.to_json(with_result(found, LOAD_ANON, Result(Outcome.REFUSED, error="EFAULT", events=1))))
    )
    assert main(["faultpaths", "compare", str(before), str(before)]) == 0
    assert "nothing changed in 5 cells" in capsys.readouterr().out
    assert main(["faultpaths", "compare", str(before), str(after)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"user.load missing anon +blocked +refused EFAULT", out)
    assert "1 of 5 cells changed" in out
    assert main(["faultpaths", "compare", str(before), str(after), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["changes"][0]["before"] == "blocked"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file"),
        ("", "is empty: not a report that `postcopy faultpaths --json` has written"),
        ("{", "is not JSON"),
        ("{}\n{}\n", "has several JSON values, one behind the other"),
        ('{"event": "run"}\n{}\n{}', "has several JSON values, one behind the other"),
        ('{"event": "run"}\n{}', "is an empty JSON object"),
        ('{"event": "run"}', "is a JSON object with 'event', without 'schema'"),
        ("[]", "is a JSON array: not a report"),
        ("{}", "is an empty JSON object, without 'schema': not a report"),
        ('{"event": "result", "status": "completed"}', "is a JSON object with 'event', 'status', without 'schema'"),
        ('{"schema": 2}', "is a JSON object with 'schema', without 'system'"),
        ('{"schema": 1}', "is a report of schema 1, and this version reads 2"),
    ],
)
def test_compare_with_something_else(
    content: str | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    assert main(["faultpaths", "compare", str(path), str(path)]) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert len(err.splitlines()) == 1


# ---- merge: over kernels

OLD = {"schema": 2, "system": {"kernel": "6.1.0-18-amd64", "architecture": "x86_64", "kvm": "hardware"},
       "expectations": {"file": "built in", "rules": 37}, "seconds": 1.0, "good": True, "summary": {},
       "operations": [], "left-out": [],
       "cells": [{"operation": "user.load", "mode": "missing", "backing": "anon", "outcome": "blocked", "error": None,
                  "state": "S", "wchan": "handle_userfault", "verdict": "as expected", "expected": None, "reason": None,
                  "difference": None, "uncovered": False}]}  # fmt: skip
"""As versions before `run` was written have written it."""


def line(kernel: str = "6.1.9", cells: Any = None, **fields: Any) -> str:
    cells = {"missing": {"anon": {"blocked S": ["user.load"]}}} if cells is None else cells
    return json.dumps({"event": "fault-paths", "schema": 1, "kernel": kernel, "architecture": "x86_64", "kvm": "none",
                       "direct-file-system": "", "cells": cells} | fields)  # fmt: skip


@pytest.fixture
def no_community(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_merge, "community", tuple)


def merge(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, Any]:
    status = main(["faultpaths", "merge", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def did(merged: Any, operation: str, mode: str, backing: str) -> dict[str, list[str]]:
    """By kernel."""
    for cell in merged["cells"]:
        if (cell["operation"], cell["mode"], cell["backing"]) == (operation, mode, backing):
            return dict(zip((kernel["kernel"] for kernel in merged["kernels"]), cell["did"], strict=True))
    return {}


def test_the_community_file_has_this_version_s_cells_and_nothing_unexpected() -> None:
    (report, *_) = _merge.community()
    assert report.kernel.startswith("6.18.")
    did = dict(report.by_cell())
    assert did[LOAD_ANON] == "blocked S"
    assert did[Cell("nofault.msync", Mode.WP_ASYNC, Backing.GUEST_MEMFD)] == "refused EINVAL"
    assert {cell.mode for cell in did} == {*Mode} - {Mode.RWP, Mode.RWP_ASYNC}
    assert _merge.is_seen(SYSTEM)
    assert not _merge.is_seen(System("7.1.0"))


def test_what_newer_kernels_are_expected_to_do_is_marked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    status, merged = merge(capsys)
    assert status == 0
    new = [kernel["kernel"] for kernel in merged["kernels"] if kernel["read-from-source"]]
    assert new == ["7.1 (read from source)", "7.3 (read from source)"]
    assert did(merged, "user.load", "missing", "guest-memfd")[new[0]] == ["blocked S"]
    load = did(merged, "user.load", "rwp", "anon")
    assert (load[new[0]], load[new[1]]) == ([], ["blocked S"])
    number = [kernel["kernel"] for kernel in merged["kernels"]].index(new[0])
    modes = {cell["mode"] for cell in merged["cells"] if cell["did"][number]}
    assert modes == {*Mode} - {Mode.RWP, Mode.RWP_ASYNC}
    assert did(merged, "copy.clear_child_tid", "rwp", "memfd")[new[1]] == ["refused EFAULT"]
    assert did(merged, "nofault.fork", "rwp", "anon")[new[1]] == ["passed"]
    assert did(merged, "pin.mlock_onfault", "rwp", "anon")[new[1]] == ["passed"]
    assert did(merged, "pin.mlock_onfault", "rwp", "hugetlb")[new[1]] == ["blocked"]
    assert did(merged, "user.load", "minor", "anon") == {}  # there is no such page
    assert main(["faultpaths", "merge"]) == 0
    assert "7.3 (read from source)" in capsys.readouterr().out


def test_reports_of_all_versions_are_merged_and_written(
    found: Run, no_community: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, both = (tmp_path / name for name in ("old.json", "new.json", "both.jsonl"))
    old.write_text(json.dumps(OLD))
    run = {"event": "run", "schema": 3, "version": "0.1.0", "started": "2026-11-29T05:19:57.175Z"}
    new.write_text(json.dumps(run) + "\n" + json.dumps(_report.to_json(found)) + "\n")
    status, merged = merge(capsys, new, old, "--output", both)
    assert status == 0
    assert [report["kernel"] for report in merged["reports"]] == ["6.1.0-18-amd64", "6.18.44-x"]
    assert [report["date"] for report in merged["reports"]] == [None, "2026-11-29"]
    load = did(merged, "user.load", "missing", "anon")
    assert (load["6.1.0-18-amd64"], load["6.18.44-x"]) == (["blocked S"], ["blocked D"])
    assert did(merged, "user.load", "missing", "hugetlb").get("6.18.44-x", []) == []  # not available there
    assert did(merged, "pin.odirect_read", "missing", "anon")["6.18.44-x"] == ["refused EFAULT"]
    assert len(both.read_text().splitlines()) == 2
    again = merge(capsys, both, new, old)  # what is there already is not there twice
    assert again == (0, merged)
    html = tmp_path / "page.html"
    assert main(["faultpaths", "merge", str(both), "--markdown", "--html", str(html)]) == 0
    assert "| missing (anon): user.load | blocked S | blocked D |" in capsys.readouterr().out
    assert "6.1.0-18-amd64" in html.read_text()


def test_reports_of_one_kernel_that_do_not_agree(
    no_community: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = {"missing": {"anon": {"refused EFAULT": ["user.load"], "blocked": ["user.store"]}}}
    seen = {"missing": {"anon": {"blocked S": ["user.load", "user.store"]}}}
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join([line(cells=seen), line(cells=refused, kvm="emulated"), line("6.1.10", refused)]))
    status, merged = merge(capsys, path)
    assert (status, merged["conflicts"]) == (1, 1)
    load, store = (did(merged, name, "missing", "anon") for name in ("user.load", "user.store"))
    assert load["6.1.9"] == ["blocked S", "refused EFAULT"]
    assert load["6.1.10"] == ["refused EFAULT"]
    assert store["6.1.9"] == ["blocked S"]  # a state that was not seen contradicts none
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["faultpaths", "merge", str(path)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "Conflicts: reports of one kernel that do not agree" in out
    assert "refused EFAULT (Linux 6.1.9, x86_64, KVM emulated)" in out
    assert " 2 kernels, 3 reports, " in out
    assert out.endswith(" cells, 1 conflict")


def test_many_hosts_of_one_kernel_are_counted(
    no_community: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "all.jsonl"
    refused = {"missing": {"anon": {"refused EFAULT": ["user.load"]}}}
    dates = [{"date": f"2026-01-{day:02d}"} for day in range(1, 8)]
    path.write_text("\n".join([line(cells=refused), *(line(**date) for date in dates)]))
    assert main(["faultpaths", "merge", str(path), "--markdown"]) == 1
    [conflict] = [said for said in capsys.readouterr().out.splitlines() if "refused EFAULT (" in said]
    assert (
        "refused EFAULT (Linux 6.1.9, x86_64, no KVM); blocked S (Linux 6.1.9, x86_64, no KVM, 2026-01-01" in conflict
    )
    assert conflict.count("2026-01") == 3
    assert "; and 4 more)" in conflict


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is empty"),
        ("\xff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "is an empty JSON object, without 'schema'"),
        ("3", "is a JSON number: not a report"),
        ('{"event": "run"}', "has no report: not a report that"),
        (line(schema=2), "is a report in which Invalid enum value 2 - at `$.schema`"),
        (line(kernel="6.1\x1b[2J"), "matching regex"),
        (line(kernel="6.1 " + "x" * 200), "at `$.kernel`"),
        (line(architecture="<b>\n"), "at `$.architecture`"),
        (line(cells={"lost": {}}), "'lost'"),
        (line(cells={"missing": {"tape": {}}}), "'tape'"),
        (line(cells={"missing": {"anon": {"danced": ["user.load"]}}}), "matching regex"),
        (line(cells={"missing": {"anon": {"unavailable": ["user.load"]}}}), "matching regex"),
        (line(cells={"missing": {"anon": {"passed": ["| `x`"]}}}), "matching regex"),
        (line(cells={"missing": {"anon": {"passed": ["a.b"], "blocked": ["a.b"]}}}), "did two things at once"),
        (line(more=1), "unknown field `more`"),
        (line() + "\n" + line(kvm="some"), ", value 2, is a report in which Invalid enum value 'some'"),
        (line(cells={"lost" * 9999: {}}), "lostlost"),
        (json.dumps({"schema": "2" * 9999}), "is a report of schema '222"),
        (json.dumps({"key" * 9999: "2"}), "'keykey"),
        (json.dumps(OLD | {"remote": {}}), "is a report of --remote"),
        (json.dumps(OLD | {"system": [3]}), "Expected `object`, got `array`"),
        (json.dumps(OLD | {"system": {"kernel": {}}}), "`$[...]`"),
        (json.dumps(OLD | {"system": {}}), "at `$.kernel`"),
        (json.dumps(OLD | {"seconds": 10**400}), "in which int too large"),
    ],
)
def test_a_bad_file_is_refused_as_a_whole(
    content: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good, output = tmp_path / "bad.json", tmp_path / "good.jsonl", tmp_path / "all.jsonl"
    bad.write_bytes(content.encode("latin-1"))
    good.write_text(line())
    assert main(["faultpaths", "merge", str(good), str(bad), "--output", str(output)]) == 2
    err = capsys.readouterr().err
    assert complaint in err, err
    assert str(bad) in err
    assert len(err.splitlines()) == 1
    assert len(err) < 600
    assert "\x1b" not in err
    assert not output.exists()


# ---- processes


def test_a_sweep_leaves_no_child(run_in_child: Callable[..., Any]) -> None:
    done = run_in_child(sweep_grandchildren)
    assert done.value == (True, []), done.stderr


def sweep_grandchildren() -> tuple[bool, list[int]]:
    """In a child: makes a child that ignores SIGTERM, in a group of its own, with a child of its own; sweeps."""
    import os
    import signal

    _linux.libc.prctl(_linux.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ready, says = os.pipe()
    if os.fork() == 0:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.fork()
        os.write(says, b"x")
        while True:
            signal.pause()
    for _ in range(2):
        os.read(ready, 1)
    assert len(_runner.children_of(os.getpid())) == 1
    return _runner.sweep(), _runner.children_of(os.getpid())


FAKE_WORKER = """
import os, signal, sys
import msgspec
from postcopy.testbed.faultpaths import _runner
from postcopy.testbed.faultpaths._model import Order, Outcome, Result

def work():
    for line in sys.stdin:
        operation = msgspec.json.decode(line, type=Order).cell.operation
        if operation == "answers":
            print(msgspec.json.encode(Result(Outcome.BLOCKED, text=str(os.getpid()))).decode(), flush=True)
            continue
        if os.fork() == 0:  # what a cell leaves behind
            os.setpgid(0, 0)
            with open(sys.argv[1], "a") as file:
                file.write(f"{os.getpid()}\\n")
            signal.pause()
        while not os.path.getsize(sys.argv[1]):
            pass
        if operation == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        if operation == "half":
            os.write(1, b'{"outcome": ')
            os.kill(os.getpid(), signal.SIGKILL)
        if operation == "raises":
            raise RuntimeError("of the fake")
        signal.pause()

_runner._work = work
sys.exit(_runner.main())
"""


def named(name: str) -> Cell:
    return Cell(name, Mode.MISSING, Backing.ANON)


@pytest.fixture
def left_behind(tmp_path: Path) -> Path:
    path = tmp_path / "pids"
    path.touch()
    return path


def fake_runner(left_behind: Path) -> _supervise.Runner:
    return _supervise.Runner(command=[sys.executable, "-c", FAKE_WORKER, str(left_behind)])


def something_in(path: Path) -> bool:
    return path.stat().st_size > 0


def assert_gone(left_behind: Path) -> None:
    pids = left_behind.read_text().split()
    assert pids
    for pid in pids:
        assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize(
    ("name", "outcome", "text"),
    [
        ("dies", Outcome.CRASHED, "the runner died: SIGSEGV"),
        ("half", Outcome.CRASHED, "the runner died: SIGKILL"),
        ("raises", Outcome.CRASHED, "the runner ended with status 1: RuntimeError: of the fake"),
        ("hangs", Outcome.HUNG, "the runner gave no answer within"),
    ],
)
async def test_a_runner_that_fails_is_replaced(
    left_behind: Path, monkeypatch: pytest.MonkeyPatch, name: str, outcome: Outcome, text: str
) -> None:
    async with fake_runner(left_behind) as runner:
        first = await runner.run(named("answers"))
        monkeypatch.setattr(_supervise, "SLACK_S", 1.0)
        runner.timeout_s = 0.0
        failed = await runner.run(named(name))
        assert (failed.outcome, failed.text.startswith(text)) == (outcome, True), failed
        assert_gone(left_behind)
        monkeypatch.undo()
        second = await runner.run(named("answers"))
        assert second.outcome is Outcome.BLOCKED
        assert second.text != first.text  # the pid: another process
        assert runner.restarts == 1


async def test_each_runner_has_its_own_last_words() -> None:
    command = [sys.executable, "-c", "import sys; sys.stderr.write('no room\\n'); sys.exit(7)"]
    async with _supervise.Runner(command=command) as runner:
        for _ in range(2):
            result = await runner.run(named("answers"))
            assert result.text == "the runner ended with status 7: no room"


async def test_a_cancelled_run_leaves_nothing(left_behind: Path) -> None:
    async with fake_runner(left_behind) as runner:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(runner.run, named("hangs"))
                while not something_in(left_behind):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        assert scope.cancelled_caught
        assert_gone(left_behind)


async def test_cells_without_time_are_left_out(left_behind: Path) -> None:
    cell, other = named("answers"), Cell("answers", Mode.WP, Backing.ANON)
    async with fake_runner(left_behind) as runner:
        results, left = await _supervise.run_cells(runner, [cell, other], {}, budget_s=-1.0)
        assert (results, left) == ({}, [cell, other])
        results, left = await _supervise.run_cells(runner, [cell, other], {})
        assert (list(results), left) == ([cell, other], [])


async def test_an_interpreter_that_is_not_there() -> None:
    async with _supervise.Runner(command=["/nonexistent/python"]) as runner:
        with pytest.raises(ResourceError, match="which runs the operations: No such file"):
            await runner.run(named("answers"))
