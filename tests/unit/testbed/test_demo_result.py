# SPDX-License-Identifier: Apache-2.0
"""What the demo makes of both sides' results."""

from __future__ import annotations

from typing import Any

import pytest

from postcopy.records.commands import DemoResult
from postcopy.records.events import DestResult, SourceResult
from postcopy.records.migration import Guest
from postcopy.testbed.demo._result import merge


def _merged(here: str | None, verified: bool | None) -> DemoResult:
    both: dict[str, Any] = {
        "status": "completed", "error": None, "kind": "kvm", "verified": verified, "verification": [],
        "overhead_bytes": 0,
    }  # fmt: skip
    there = Guest(state="paused", nonce="0x05", operations=0)
    source = SourceResult(side="source", served=1, guest_at_pause=there, **both)
    return merge(
        source, DestResult(side="dest", dump=None, guest=Guest(state="paused", nonce=here, operations=0), **both)
    )


@pytest.mark.parametrize(
    ("here", "verified", "asked", "verdict"),
    [
        ("0x05", True, 2, True),
        ("0x05", None, 2, None),
        ("0x06", True, 2, False),
        (None, True, 2, False),  # its memory was read
        (None, None, 1, None),  # it was not, and the guest had no time to say it
    ],
)
def test_whether_it_is_the_same_machine(
    here: str | None, verified: bool | None, asked: int, verdict: bool | None
) -> None:
    result = _merged(here, verified)
    assert len(result.verification) == asked
    assert result.verified is verdict
