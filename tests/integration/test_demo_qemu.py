# SPDX-License-Identifier: Apache-2.0
"""`postcopy demo --machine qemu`: a Linux moves by postcopy, and another one of the same by QEMU's own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/qemu_move.py"


def demo(side: Callable[..., Any], *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What it says of ours, which went well, and of QEMU's own."""
    words = ("--json", "--machine", "qemu", "--memory", "192MiB", "--migrate-after", "0", *arguments)
    status, result, errors = side("demo", *words).end(250)
    assert status == 0, errors
    assert (result["status"], result["verified"]) == ("completed", True)
    assert len(result["verification"]) == 6
    check(ours := result["qemu"]["postcopy"])
    return ours, result["qemu"]["own"]


def check(move: dict[str, Any]) -> None:
    assert (move["status"], move["errors"]) == ("completed", 0)
    assert move["passes"] > 0
    assert move["stop-to-run-ms"] > 0
    assert move["fault-p50-us"] > 0


@pytest.mark.slow
@pytest.mark.needs("qemu", "uffd", "linux-guest")
def test_both_moves(side: Callable[..., Any]) -> None:
    _, own = demo(side)
    check(own)


@pytest.mark.slow
@pytest.mark.needs("qemu", "uffd", "linux-guest")
def test_both_are_cut(side: Callable[..., Any]) -> None:
    ours, own = demo(side, "--chaos", "cut", "--seed", "16", "--max-bandwidth", "64MiB/s")
    assert ours["recovered"] > 0
    assert own["status"] == "postcopy-paused"


def memory_of_qemus(parent: int) -> list[Path]:
    """The files with the memory of those that this process has started."""
    files = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text()
            if int(stat.rpartition(")")[2].split()[1]) == parent:
                files += re.findall(r"mem-path=([^,\0]+)", Path(f"/proc/{pid}/cmdline").read_text())
    return [Path(file) for file in files]


@pytest.mark.needs("qemu", "uffd", "linux-guest")
def test_it_ends_at_once_while_linux_boots(side: Callable[..., Any]) -> None:
    one = side("demo", "--json", "--machine", "qemu", "--memory", "192MiB")
    deadline = time.monotonic() + 60
    while not (files := memory_of_qemus(one.pid)) or not files[0].exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    one.signal(signal.SIGTERM)
    status, result, _ = one.end()
    assert (status, result["status"], result["error"]) == (1, "failed", "interrupted")
    assert not [file for file in files if file.exists()]


@pytest.mark.slow
@pytest.mark.needs("qemu", "uffd")
def test_the_example(run_in_child: Callable[..., Any]) -> None:
    done = run_in_child([sys.executable, EXAMPLE, "--memory", "32"], deadline_s=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^here:  pass \d+, 0 errors\nmoved: completed, .*\nthere: pass \d+, 0 errors$", done.stdout, re.M)
