# SPDX-License-Identifier: Apache-2.0
"""What `demo --machine qemu` makes of what it sees of both moves."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec.structs import replace
from rich.console import Console

from postcopy.errors import ConfigurationError
from postcopy.output import Output
from postcopy.output.tables import print_table
from postcopy.records.commands import DemoMove, DemoQemu
from postcopy.testbed.demo import DemoCommand, _qemu
from postcopy.testbed.qemu import Qemu

BEFORE = {"nonce": 7, "passes": 10, "errors": 0, "stale": 0, "saved": 5, "loaded": 5}
AFTER = {"nonce": 7, "passes": 20, "errors": 0, "stale": 0, "saved": 9, "loaded": 9}


@pytest.mark.parametrize(
    ("changed", "good"),
    [({}, True), ({"nonce": 8}, False), ({"passes": 10}, False), ({"errors": 1}, False), ({"stale": 1}, False)],
)
def test_whether_the_guest_went_on(changed: dict[str, int], good: bool) -> None:
    assert _qemu._went_on(BEFORE, AFTER | changed).ok is good


@pytest.mark.parametrize(("changed", "good"), [({}, True), ({"saved": 5}, True), ({"loaded": 5}, False)])
def test_whether_its_disk_worked(changed: dict[str, int], good: bool) -> None:
    assert _qemu._disk(BEFORE, AFTER | changed).ok is good


@pytest.mark.parametrize(
    ("status", "missing", "ended", "verdict"),
    [
        ("running", 0, True, [True, True, True]),
        ("paused", 0, True, [False, True, True]),
        ("running", 4096, True, [True, False, True]),
        ("running", 0, False, [True, True, False]),
    ],
)
def test_what_is_seen_from_outside(status: str, missing: int, ended: bool, verdict: list[bool]) -> None:
    source = cast(Qemu, SimpleNamespace(pid=1))
    assert [item.ok for item in _qemu._outside(source, status, missing, ended)] == verdict


OURS = DemoMove(status="completed", stop_to_run_ms=6.1, total_ms=900.0, fault_p50_us=70.0, passes=10, errors=0)


@pytest.mark.parametrize(
    ("own", "shown"),
    [
        (OURS, "10 passes, 0 wrong pages"),
        (DemoMove(status="postcopy-paused", stop_to_run_ms=4.0), "it waits for an operator, and so does the guest"),
    ],
)
def test_both_stand_beside_each_other(own: DemoMove, shown: str) -> None:
    found = DemoQemu(version="7.2.22", system="Linux 6.1", postcopy=replace(OURS, recovered=2), own=own)
    text = io.StringIO()
    print_table(Console(file=text, width=160), *_qemu.table(found))
    assert "by QEMU 7.2.22 itself" in text.getvalue()
    assert "6.10 ms" in text.getvalue()
    assert shown in text.getvalue()


@pytest.mark.needs("qemu")
@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"lab": True}, "--lab: "),
        ({"qmp": "x"}, "--qmp: "),
        ({"preload": "x"}, "--preload: "),
        ({"memory_bytes": 64 << 20}, "--memory: "),
    ],
)
def test_what_is_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        DemoCommand({"kind": "qemu"} | given, Output(False, None, None))
