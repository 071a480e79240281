# SPDX-License-Identifier: Apache-2.0
"""A host runs out of disk or memory under a migration: nothing is lost or half written, and both sides say why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cgroups import Group, group_of

Start = Callable[..., Any]
MIB = 1 << 20
POSTCOPY = (sys.executable, "-m", "postcopy")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 4 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "postcopy-test", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture
def memory_group() -> Iterator[Group]:
    with group_of("memory", 1 << 30) as group:
        yield group


@pytest.mark.needs("root", "uffd-user")
def test_disk_full_under_a_salvage(side: Start, tmp_path: Path, small_disk: Path) -> None:
    """The side says so and ends with 1; what it had begun to write is gone, and the other side's salvage is whole."""
    image = tmp_path / "image"
    image.write_bytes(os.urandom(16 * MIB))
    dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--salvage", tmp_path / "dest")
    arguments = (
        "--machine",
        "image",
        "--image",
        image,
        "--max-bandwidth",
        "2MiB/s",
        "--salvage",
        small_disk / "source",
    )
    source = side("source", "--json", *arguments, "--connect", dest.address)
    dest.wait_for("pages", lambda line: line.get("ram", {}).get("background-pages", 0) > 300)
    dest.signal(signal.SIGTERM)
    assert dest.end()[0] == 1
    source.wait_status("postcopy-paused")
    source.signal(signal.SIGTERM)
    status, _, errors = source.end()
    assert status == 1
    assert f"salvage to {small_disk / 'source'}: No space left on device" in errors
    assert list(small_disk.iterdir()) == []
    assert (tmp_path / "dest" / "manifest.json").exists()


@pytest.mark.needs("root", "uffd-user")
def test_disk_full_under_the_salvage_of_a_machine(side: Start, small_disk: Path) -> None:
    """One signal does not lose it: it is kept until there is room."""
    dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--salvage", small_disk / "dest")
    machine = ("--machine", "rv64", "--memory", "256MiB", "--workload", "random", "--max-bandwidth", "1MiB/s")
    source = side("source", "--json", *machine, "--connect", dest.address)
    dest.wait_status("postcopy-active")
    source.signal(signal.SIGKILL)
    dest.wait_status("postcopy-paused")
    other = small_disk / "other"
    with suppress(OSError):
        other.write_bytes(bytes(8 * MIB))
    dest.signal(signal.SIGTERM)
    dest.wait_for_errors("Still needed: the salvage")
    assert list(small_disk.iterdir()) == [other]
    subprocess.run(["mount", "-o", "remount,size=1g", small_disk], check=True)
    status, _, errors = dest.end()
    assert status == 1
    assert "salvage written to" in errors
    assert (small_disk / "dest" / "manifest.json").exists()


@pytest.mark.needs("root", "uffd-user")
def test_disk_full_under_a_dump(side: Start, tmp_path: Path, small_disk: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(8 * MIB))
    source = side("source", "--json", "--machine", "image", "--image", image, "--listen", "127.0.0.1:0")
    dest = side("dest", "--json", "--connect", source.address, "--dump", small_disk / "copy")
    status, result, errors = dest.end()
    assert status == 1
    assert result["status"] == "completed"  # the migration has; the file has not
    assert "No space left on device" in errors
    assert list(small_disk.iterdir()) == []
    assert source.end()[0] == 0


@pytest.mark.needs("root", "uffd", "kvm")
def test_no_memory_for_the_machine(side: Start, spawn_child: Callable[..., Any], memory_group: Group) -> None:
    """Found out before COMMIT: the machine computes on where it is."""
    memory_group.limit(64 * MIB)
    machine = ("--machine", "kvm", "--memory", "96MiB", "--workload", "random")
    source = side("source", "--json", *machine, "--listen", "127.0.0.1:0")
    dest = spawn_child([*memory_group.enter(), *POSTCOPY, "dest", "--json", "--connect", source.address])
    done = dest.wait(60)
    assert done.returncode == 1
    assert "the control group of this process allows" in done.stderr
    assert "Traceback" not in done.stderr
    running = source.wait_for("running", lambda line: line.get("guest", {}).get("state") == "running")
    source.operations_after(running)


@pytest.mark.needs("root", "uffd", "kvm")
def test_killed_for_want_of_memory(side: Start, spawn_child: Callable[..., Any], memory_group: Group) -> None:
    """After COMMIT the out-of-memory killer is a SIGKILL: the machine runs nowhere, the source says so and keeps
    what it has."""
    machine = ("--machine", "kvm", "--memory", "64MiB", "--used-memory", "48MiB", "--workload", "random")
    source = side("source", "--json", *machine, "--max-bandwidth", "8MiB/s", "--listen", "127.0.0.1:0")
    dest = spawn_child([*memory_group.enter(), *POSTCOPY, "dest", "--json", "--connect", source.address])
    source.wait_status("postcopy-active")
    memory_group.limit(memory_group.used() + 8 * MIB)  # of which 30 are still to come
    assert dest.wait(60).returncode == -signal.SIGKILL
    paused = source.wait_status("postcopy-paused")
    assert paused["guest"]["state"] == "paused"
    source.abandon()
    status, result, errors = source.end()
    assert status == 1, errors
    assert result["guest"]["operations"] == result["guest-at-pause"]["operations"]
