# SPDX-License-Identifier: Apache-2.0
"""`postcopy bench qemu`, small: QEMU and postcopy migrate by turns, and nothing of QEMU is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from postcopy.testbed import _linux
from postcopy.testbed.bench._common import worker
from postcopy.testbed.bench._qemu import compare
from postcopy.testbed.bench._qemu_run import QEMU, Run

MEMORY_BYTES = 16 << 20  # a precopy ends when what is left can be sent within 300 ms: on a host that is busy, too
DEADLINE_S = 60.0

pytestmark = pytest.mark.slow


@pytest.mark.needs("qemu", "uffd")
async def test_both_by_turns() -> None:
    figures = await compare(1, (MEMORY_BYTES,), kvm=False)
    names = [figure.name.split(",")[0] for figure in figures]
    times = ["downtime", "total time", "blocktime", "fault p50", "fault p99"]
    assert names == [*times, "downtime of precopy", "total time of precopy"]
    for figure in figures:
        assert {"rv64", "qemu"} <= figure.rounds[0].keys()
        if figure.name.startswith(("downtime", "total")):  # nobody need have missed a page of a memory that is small
            assert all(value > 0 for name, value in figure.rounds[0].items() if "says" not in name)


@pytest.mark.parametrize("killed", ["the process that looks after them", "who has started that"])
def test_nothing_is_left(killed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In place of QEMU what never answers and never ends: a migration may be over before this test has looked at it.
    (tmp_path / QEMU).write_text("#!/bin/sh\nexec sleep 1000\n")
    (tmp_path / QEMU).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    run = msgspec.json.encode(Run(MEMORY_BYTES, "postcopy")).decode()
    with subprocess.Popen(["sh", "-c", '"$@"; :', "sh", *worker("_qemu_run", run)]) as shell:
        [looks_after] = poll(lambda: _linux.pids_with(_linux.PARENT, shell.pid), 1)
        qemus = poll(lambda: [pid for pid in _linux.pids_with(_linux.PARENT, looks_after) if sleeps(pid)], 2)
        started = {pid: _linux.start_time(pid) for pid in qemus}
        os.kill(shell.pid if killed == "who has started that" else looks_after, signal.SIGKILL)
        poll(lambda: [pid for pid in qemus if _linux.start_time(pid) == started[pid]], 0)


def sleeps(pid: int) -> bool:
    """It is not still the process that was forked to become it."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
    return False


def poll(look: Callable[[], list[int]], count: int) -> list[int]:
    """What it finds, when these are so many."""
    deadline_s = time.monotonic() + DEADLINE_S
    while len(found := look()) != count:
        assert time.monotonic() < deadline_s, found
        time.sleep(0.01)
    return found
