# SPDX-License-Identifier: Apache-2.0
"""Migrations over TLS and a network that fails all the time: they complete, and no page is wrong.

POSTCOPY_SEEDS=100 runs so many of each; POSTCOPY_SEED is the first one of them.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from typing import Any

import pytest

Start = Callable[..., Any]
SEEDS = int(os.environ.get("POSTCOPY_SEEDS", "1"))


@pytest.mark.needs("tls", "uffd", "kvm")
@pytest.mark.timeout(60 * SEEDS + 60)
@pytest.mark.parametrize("plan", ["cut:every=0.2..0.4,ways=reset+close+truncate", "all:every=0.2..0.4"])
def test_machines(side: Start, plan: str) -> None:
    """`all` also flips bits, which TLS takes for an attack, and leaves connections half open."""
    first = int(os.environ.get("POSTCOPY_SEED") or secrets.randbits(31))
    for seed in range(first, first + SEEDS):
        print(f"POSTCOPY_SEED={seed}")
        machine = ("--memory", "16MiB", "--vcpus", "1", "--workload", ("random", "dirty")[seed % 2])
        arguments = (
            "demo",
            "--json",
            "--tls",
            *machine,
            "--max-bandwidth",
            "8MiB/s",
            "--migrate-after",
            "0.1",
            "--run-for",
            "0.1",
        )
        status, result, errors = side(*arguments, "--chaos", plan, "--seed", seed).end(100)
        assert status == 0, errors
        assert (result["status"], result["verified"]) == ("completed", True)
        assert result["dest"]["guest"]["failures"] == 0
        print(f"{result['recoveries']['count']} recoveries")
