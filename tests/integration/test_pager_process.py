# SPDX-License-Identifier: Apache-2.0
"""A pager in a process of its own dies: the machine waits, another one goes on, and no page is ever zeros."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., Any]
Json = dict[str, Any]
MIB = 1 << 20


def pager_of(dest: Any, deaths: int) -> int:
    """The process number of the pager after so many deaths."""

    def found(line: Json) -> bool:
        pager = line.get("pager") or {}
        return pager.get("deaths") == deaths and bool(pager.get("pid")) and line["status"] == "postcopy-active"

    line: Json = dest.wait_for(f"pager number {deaths + 1}", found)
    return int(line["pager"]["pid"])


@pytest.mark.needs("uffd", "kvm")
@pytest.mark.parametrize("backing", ["memfd", "anon"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_pager_dies_again_and_again(side: Start, backing: str, number: signal.Signals) -> None:
    """SIGSEGV is what a crash of a fault thread is to the rest of the world."""
    dest = side(
        "dest", "--json", "--listen", "127.0.0.1:0", "--backing", backing, "--pager", "process", "--run-for", "0.5"
    )
    machine = ("--machine", "kvm", "--memory", "32MiB", "--vcpus", "2", "--workload", "random")
    source = side("source", "--json", *machine, "--connect", dest.address, "--max-bandwidth", "8MiB/s")
    deaths = 3
    for death in range(deaths):
        os.kill(pager_of(dest, death), number)
    status, result, errors = dest.end()
    assert status == 0, errors
    assert result["verified"] is True
    assert result["pager"] == {"where": "process", "deaths": deaths}  # and no process any more
    assert 1 <= result["recoveries"]["count"] <= deaths  # one may die while the last one's recovery is under way
    assert result["guest"]["failures"] == 0
    assert errors.count(f"the pager's process has died ({number.name}); another one takes over") == deaths
    assert source.end()[0] == 0


@pytest.mark.needs("uffd-user")
def test_pager_dies_at_random_instants(side: Start, tmp_path: Path) -> None:
    seed = int(os.environ.get("POSTCOPY_SEED") or random.SystemRandom().getrandbits(32))
    print(f"POSTCOPY_SEED={seed}")
    choose = random.Random(seed)
    image, copy = tmp_path / "image", tmp_path / "copy"
    image.write_bytes(os.urandom(12 * MIB))
    arguments = ("--image", image, "--listen", "127.0.0.1:0", "--max-bandwidth", "6MiB/s")
    source = side("source", "--json", "--machine", "image", *arguments)
    dest = side("dest", "--json", "--connect", source.address, "--pager", "process", "--dump", copy)
    deaths = 0
    with contextlib.suppress(AssertionError, ProcessLookupError):  # it has ended, in time
        for deaths in range(8):
            pid = pager_of(dest, deaths)
            limit = choose.randrange(MIB)  # bytes that this one may bring
            until = dest.events("progress")[-1]["ram"]["remaining"] - limit
            dest.wait_for(
                "progress",
                lambda line, until=until: "remaining" in line.get("ram", {}) and line["ram"]["remaining"] <= until,
            )
            os.kill(pid, signal.SIGKILL)
    status, result, errors = dest.end()
    assert status == 0, errors
    assert result["pager"]["deaths"] >= 3
    assert copy.read_bytes() == image.read_bytes()
    assert source.end()[0] == 0


@pytest.mark.needs("uffd-user")
def test_pager_that_hangs(side: Start, tmp_path: Path) -> None:
    """It is killed when it does not answer, and replaced."""
    image, copy = tmp_path / "image", tmp_path / "copy"
    image.write_bytes(os.urandom(4 * MIB))
    arguments = ("--image", image, "--listen", "127.0.0.1:0", "--max-bandwidth", "4MiB/s")
    source = side("source", "--json", "--machine", "image", *arguments)
    dest = side("dest", "--json", "--connect", source.address, "--pager", "process", "--dump", copy)
    os.kill(pager_of(dest, 0), signal.SIGSTOP)
    status, result, errors = dest.end()
    assert status == 0, errors
    assert result["pager"]["deaths"] == 1
    assert copy.read_bytes() == image.read_bytes()
    assert source.end()[0] == 0


@pytest.mark.needs("uffd", "kvm")
def test_pager_dies_before_commit(side: Start) -> None:
    """Then it is a destination that has failed: the machine stays where it is."""
    dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--pager", "process")
    machine = ("--machine", "kvm", "--memory", "32MiB", "--workload", "random")
    source = side("source", "--json", *machine, "--connect", dest.address, "--migrate-after", "2")
    source.wait_status("active")
    line = dest.wait_for("a pager", lambda line: bool((line.get("pager") or {}).get("pid")))
    os.kill(line["pager"]["pid"], signal.SIGKILL)
    dest.wait_for_errors("waiting for the next one")
    dest.signal(signal.SIGTERM)
    status, result, _ = dest.end()
    assert status == 1
    assert "the pager's process has died (SIGKILL)" in result["error"]
    failed = source.wait_for("failure", lambda line: line["event"] == "migration-ended")
    assert failed["error"]  # that a data channel is lost, or why: whichever it hears first
    later = source.wait_for(
        "progress", lambda line: line["event"] == "progress" and line["elapsed-ms"] > failed["elapsed-ms"]
    )
    source.operations_after(later)
    source.signal(signal.SIGINT)
    source.end()
