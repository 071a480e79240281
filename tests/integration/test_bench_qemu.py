# SPDX-License-Identifier: Apache-2.0
"""`postcopy bench qemu-move`, small: a QEMU moves by postcopy and by its own postcopy, by turns."""

from __future__ import annotations

import pytest

from postcopy.testbed.bench import _qemu_move
from postcopy.testbed.bench._common import medians

MEMORY_MIB = 32


@pytest.mark.slow
@pytest.mark.needs("qemu", "uffd")
async def test_both_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_qemu_move, "CUT_PUSH_S", 1.0)
    monkeypatch.setattr(_qemu_move, "WAITS_S", 0.1)
    figures = await _qemu_move.compare(1, MEMORY_MIB)
    names = [figure.name.split(",")[0] for figure in figures]
    times = ["total time", "total time", "total time from the pause", "blocktime"]
    assert names == ["stop to run", "fault p50", *times, f"network cut at a third of {MEMORY_MIB} MiB"]
    for figure in figures:
        if figure.name.startswith(("stop", "total")):  # nobody need have missed a page of a memory that is small
            assert all(value > 0 for value in medians(figure).values())
