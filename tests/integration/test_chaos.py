# SPDX-License-Identifier: Apache-2.0
"""Migrations over a network that fails all the time: they complete, and no page is wrong."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., Any]
MIB = 1 << 20


def seed() -> str:
    """Of this run; printed, so that a failure can be had again."""
    value = os.environ.get("POSTCOPY_SEED") or str(secrets.randbits(32))
    print(f"POSTCOPY_SEED={value}")
    return value


@pytest.mark.needs("uffd", "kvm")
@pytest.mark.parametrize(
    ("workload", "plan"),
    [
        ("random", "cut"),
        ("dirty", "cut"),
        ("disk", "cut"),
        ("random", "all"),
        # A half-open connection is not reported: each takes a heartbeat to be found.
        pytest.param("disk", "freeze", marks=pytest.mark.slow),
    ],
)
def test_machines(side: Start, workload: str, plan: str) -> None:
    memory = "16MiB" if plan == "freeze" else "32MiB"
    arguments = ("--memory", memory, "--vcpus", "2", "--workload", workload, "--migrate-after", "0.2")
    status, result, errors = side("demo", "--json", *arguments, "--chaos", plan, "--seed", seed()).end(100)
    assert status == 0, errors
    assert result["status"] == "completed"
    assert result["verified"] is True
    assert result["recoveries"]["count"] > 0
    assert result["dest"]["guest"]["failures"] == 0


@pytest.mark.needs("uffd-user")
@pytest.mark.parametrize("plan", ["cut", "corrupt:every=0.1..0.2", "cut:ways=truncate,every=0.1..0.2", "split", "slow"])
def test_image(side: Start, tmp_path: Path, plan: str) -> None:
    """Also a network that only delays and splits, from the first byte on."""
    image, copy = tmp_path / "image", tmp_path / "copy"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
        for megabyte in (1, 9) if plan == "split" else (1, 2, 3, 9):  # each of its pieces costs a wake-up
            file.seek(megabyte * MIB)
            file.write(os.urandom(MIB // 4 if plan == "split" else MIB))
    arguments = ("--machine", "image", "--image", image, "--dump", copy, "--max-bandwidth", "2MiB/s")
    status, result, errors = side("demo", "--json", *arguments, "--chaos", plan, "--seed", seed()).end(100)
    assert status == 0, errors
    assert result["verified"] is True
    assert copy.read_bytes() == image.read_bytes()
    if plan not in ("split", "slow"):
        assert result["recoveries"]["count"] > 0


@pytest.mark.needs("uffd", "kvm")
def test_hybrid(side: Start) -> None:
    """Cut in the rounds of precopy, it is begun again; cut after the switchover, it recovers."""
    # The round takes more than a second, and is cut in the first third of a second; what is left then does not fit.
    machine = ("--memory", "16MiB", "--workload", "dirty", "--used-memory", "4MiB", "--run-for", "0.1")
    arguments = (*machine, "--max-bandwidth", "3MiB/s", "--mode", "hybrid", "--precopy-rounds", "1")
    plan = ("--migrate-after", "0.1", "--chaos", "cut", "--seed", seed())
    status, result, errors = side("demo", "--json", *arguments, *plan).end(100)
    assert status == 0, errors
    assert (result["status"], result["verified"]) == ("completed", True)
    assert result["attempts"] > 1
    assert sum(result["chaos"]["cuts"].values()) >= result["attempts"] - 1


@pytest.mark.needs("uffd-user")
def test_by_hand(side: Start, tmp_path: Path) -> None:
    """`postcopy chaos` between two programs, which see no difference to a cable."""
    image = tmp_path / "image"
    image.write_bytes(os.urandom(MIB))
    source = side("source", "--json", "--machine", "image", "--image", image, "--listen", "127.0.0.1:0")
    proxy = side("chaos", "slow", "--json", "--listen", "127.0.0.1:0", "--to", source.address, "--seed", "1")
    dest = side("dest", "--json", "--connect", proxy.address)
    assert dest.end()[0] == 0
    assert source.end()[0] == 0
    proxy.signal(signal.SIGINT)
    status, result, _ = proxy.end()
    assert status == 0
    assert result["seed"] == 1
    assert result["bytes-out"] > 0
    assert result["bytes-back"] > 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("rain", "--to", "127.0.0.1:1"), "no plan begins with 'rain'"),
        (("cut", "--to", "nowhere"), "is not an address"),
        (("cut:every=often", "--to", "127.0.0.1:1"), "every: seconds, as 2.5 or 200ms, not 'often'"),
    ],
)
def test_plans_that_make_no_sense(side: Start, arguments: tuple[str, ...], reason: str) -> None:
    status, _, errors = side("chaos", *arguments, "--listen", "127.0.0.1:0").end()
    assert status == 2
    assert reason in errors
    assert errors.count("postcopy: error:") == 1
