# SPDX-License-Identifier: Apache-2.0
"""`ctl reclaim` of a `postcopy source`: the machine goes on there, and can be migrated again."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lines import parse_answer

Start = Callable[..., Any]
RV64 = ("--machine", "rv64", "--memory", "192MiB", "--workload", "random", "--max-bandwidth", "64KiB/s")

pytestmark = pytest.mark.needs("uffd-user")


def _ctl(at: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "postcopy", "ctl", "--control", str(at), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _lose_the_destination(side: Start, dest: Any, source: Any) -> None:
    dest.wait_status("postcopy-active")
    source.wait_status("postcopy-active")
    dest.signal(signal.SIGKILL)
    source.wait_status("postcopy-paused")


def _wait_running(at: Path) -> int:
    """How many operations it has done when it is seen to do more."""
    seen = None
    for _ in range(60):
        guest = parse_answer(_ctl(at, "status", "--json").stdout, ["status"])["machines"][0]["guest"]
        if seen is not None and guest["state"] == "running" and guest["operations"] > seen:
            return int(guest["operations"])
        seen = guest["operations"]
    raise AssertionError("it does not run")


def test_it_goes_on_here_until_interrupted(side: Start, tmp_path: Path) -> None:
    at = tmp_path / "control"
    dest = side("dest", "--json", "--listen", "127.0.0.1:0")
    source = side(
        "source", "--json", *RV64, "--connect", dest.address, "--control", at, "--on-failure", "exit", "--salvage",
        tmp_path / "salvage",
    )  # fmt: skip
    _lose_the_destination(side, dest, source)
    refused = _ctl(at, "reclaim")
    assert refused.returncode == 1
    assert "--force" in refused.stderr
    done = _ctl(at, "reclaim", "--force")
    assert done.returncode == 0, done.stderr
    source.wait_for_errors("it goes on here until interrupted")
    _wait_running(at)
    source.signal(signal.SIGTERM)
    status, result, errors = source.end()
    assert status == 1
    assert result["status"] == "reclaimed"
    assert "taken back" in result["error"]
    assert errors.count("postcopy: error:") == 1
    assert not (tmp_path / "salvage").exists()  # nothing was lost that it could speak for


def test_it_can_be_migrated_again(side: Start, tmp_path: Path) -> None:
    at = tmp_path / "control"
    source = side("source", "--json", *RV64, "--listen", "127.0.0.1:0", "--control", at)
    dest = side("dest", "--json", "--connect", source.address)
    _lose_the_destination(side, dest, source)
    assert _ctl(at, "reclaim", "--force").returncode == 0
    _wait_running(at)
    _ctl(at, "set", "--max-bandwidth", "none")
    second = side("dest", "--json", "--connect", source.address, "--run-for", "0.2")
    status, result, errors = second.end()
    assert status == 0, errors
    assert result["verified"] is True
    status, result, errors = source.end()
    assert status == 0, errors
    assert result["status"] == "completed"
