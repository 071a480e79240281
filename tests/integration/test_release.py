# SPDX-License-Identifier: Apache-2.0
"""``--release-ram``: the source's memory goes as the destination's comes, and whatever fails, no page is wrong."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., Any]
MIB = 1 << 20
MACHINE = ("--machine", "kvm", "--memory", "32MiB", "--vcpus", "2", "--workload", "random", "--release-ram")


def seed() -> str:
    """Of this run; printed, so that a failure can be repeated."""
    value = os.environ.get("POSTCOPY_SEED") or str(secrets.randbits(32))
    print(f"POSTCOPY_SEED={value}")
    return value


def mapped_bytes(side: Any) -> int:
    """Of memory files, in the process of a side."""
    for line in Path(f"/proc/{side.pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "RssShmem":
            return int(rest.split()[0]) * 1024
    raise AssertionError("no RssShmem")


@pytest.mark.needs("uffd", "kvm")
@pytest.mark.parametrize(
    ("plan", "backing", "pager"), [("cut", "memfd", "process"), ("cut", "anon", "thread"), ("all", "memfd", "thread")]
)
def test_over_a_bad_network(side: Start, plan: str, backing: str, pager: str) -> None:
    arguments = (*MACHINE, "--backing", backing, "--pager", pager, "--migrate-after", "0.2")
    status, result, errors = side("demo", "--json", *arguments, "--chaos", plan, "--seed", seed()).end(100)
    assert status == 0, errors
    assert (result["status"], result["verified"]) == ("completed", True)
    assert result["recoveries"]["count"] > 0
    assert result["dest"]["guest"]["failures"] == 0
    assert 16 * MIB < result["source"]["ram"]["released"] <= 32 * MIB


@pytest.mark.needs("uffd-user")
def test_without_any_right(side: Start) -> None:
    arguments = ("--machine", "rv64", "--memory", "16MiB", "--workload", "dirty", "--release-ram")
    status, result, errors = side("demo", "--json", *arguments, "--max-bandwidth", "8MiB/s").end(100)
    assert status == 0, errors
    assert result["verified"] is True
    assert result["source"]["ram"]["released"] > 4 * MIB


@pytest.fixture
def half_way(side: Start, tmp_path: Path) -> dict[str, Any]:
    """A migration of which a part has been given back when the network was cut for good, both sides alive."""
    dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--run-for", "0", "--salvage", tmp_path / "dest")
    cable = side("chaos", "none", "--json", "--listen", "127.0.0.1:0", "--to", dest.address)
    limits = ("--max-bandwidth", "4MiB/s", "--salvage", tmp_path / "source")
    source = side("source", "--json", *MACHINE, *limits, "--connect", cable.address)
    source.wait_for("memory given back", partial(has_released, 4 * MIB))
    cable.signal(signal.SIGKILL)
    for one in (source, dest):
        one.wait_status("postcopy-paused")
    return {"source": source, "dest": dest, "address": cable.address, "directory": tmp_path}


def has_released(size_bytes: int, line: dict[str, Any]) -> bool:
    return bool(line.get("ram", {}).get("released", 0) > size_bytes)


def is_lost_again(recoveries: int, line: dict[str, Any]) -> bool:
    return bool(line.get("status") == "postcopy-paused" and (line.get("recoveries") or {}).get("count") == recoveries)


@pytest.mark.needs("uffd", "kvm")
def test_gone_while_it_runs_and_found_again(side: Start, half_way: dict[str, Any]) -> None:
    """The source's memory has shrunk before it is over; both go on when the network is back, more than once."""
    source, dest = half_way["source"], half_way["dest"]
    for number in range(1, 3):
        released = max(line["ram"].get("released", 0) for line in source.lines if "ram" in line)
        assert 4 * MIB < mapped_bytes(source) <= 32 * MIB - released
        cable = side("chaos", "none", "--json", "--listen", half_way["address"], "--to", dest.address)
        source.wait_for("more given back", partial(has_released, released + MIB))
        cable.signal(signal.SIGKILL)
        dest.wait_for("another loss", partial(is_lost_again, number))
    side("chaos", "none", "--json", "--listen", half_way["address"], "--to", dest.address)
    for one in (source, dest):
        status, result, errors = one.end()
        assert status == 0, errors
        assert result["status"] == "completed"
        assert result["recoveries"]["count"] >= 3
    assert dest.end()[1]["verified"] is True
    assert source.end()[1]["ram"]["released"] > 16 * MIB


@pytest.mark.needs("uffd", "kvm")
def test_salvage_of_what_was_not_given_back(side: Start, half_way: dict[str, Any]) -> None:
    """The source does not speak for what it has given back: alone it says what is in doubt, with the destination it
    makes a whole."""
    results = {}
    for name in ("source", "dest"):
        half_way[name].signal(signal.SIGTERM)
        status, results[name], errors = half_way[name].end()
        assert (status, results[name]["status"]) == (1, "postcopy-paused"), errors
        assert "salvage written to" in errors
    released = results["source"]["ram"]["released"]
    assert released > 4 * MIB
    directory = half_way["directory"]
    status, alone, errors = side("merge", "--json", directory / "source", "--output", directory / "alone").end()
    assert status == 1
    assert released <= alone["in-doubt"] < 32 * MIB  # and pages that were released as zero from the beginning
    assert sum(item["pages"] * item["page-bytes"] for item in alone["ranges-in-doubt"]) == alone["in-doubt"]
    assert "merge: in doubt: block" in errors
    both = (directory / "source", directory / "dest")
    status, merged, errors = side("merge", "--json", *both, "--output", directory / "both").end()
    assert status in (0, 1)  # 1: a vCPU waited where it could not be paused
    assert (merged["in-doubt"], merged["torn"]) == (0, status == 1), errors
    assert merged["from-dest"] >= alone["in-doubt"]
    assert merged["from-source"] == results["dest"]["ram"]["remaining"]
    # What the source does speak for is the same in both images.
    ours, theirs = (directory / "alone").read_bytes(), (directory / "both").read_bytes()
    same = sum(ours[at : at + 4096] == theirs[at : at + 4096] != bytes(4096) for at in range(0, len(ours), 4096))
    assert same * 4096 > merged["from-source"] // 2


@pytest.mark.parametrize("command", [("source", "--listen", "127.0.0.1:0"), ("demo",)])
def test_a_file_is_not_memory_to_give_back(side: Start, tmp_path: Path, command: tuple[str, ...]) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * MIB)
    status, _, errors = side(*command, "--machine", "image", "--image", image, "--release-ram").end()
    assert status == 2
    assert errors.count("postcopy: error:") == 1
    assert "--release-ram" in errors
    assert image.read_bytes() == b"x" * MIB
