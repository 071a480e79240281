# SPDX-License-Identifier: Apache-2.0
"""`postcopy demo --machine qemu`: a Linux moves by postcopy, and another one of the same by QEMU's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.mark.slow
@pytest.mark.needs("qemu", "uffd", "linux-guest")
def test_both_moves(side: Callable[..., Any]) -> None:
    arguments = ("--machine", "qemu", "--memory", "192MiB", "--migrate-after", "0")
    status, result, errors = side("demo", "--json", *arguments).end(100)
    assert status == 0, errors
    assert (result["status"], result["verified"]) == ("completed", True)
    assert len(result["verification"]) == 6
    for move in (result["qemu"]["postcopy"], result["qemu"]["own"]):
        assert (move["status"], move["errors"]) == ("completed", 0)
        assert move["passes"] > 0
        assert move["stop-to-run-ms"] > 0
        assert move["fault-p50-us"] > 0
