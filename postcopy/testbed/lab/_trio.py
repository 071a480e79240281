# SPDX-License-Identifier: Apache-2.0
"""The laboratory from Trio: everything that blocks happens in threads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from postcopy.testbed.lab._lab import Lab
from postcopy.testbed.lab._plan import LabPlan


@asynccontextmanager
async def open_lab(plan: LabPlan) -> AsyncIterator[Lab]:
    """A laboratory that lasts as long as the block, and ends with this process, however that ends.

    Its methods block: call them with `trio.to_thread.run_sync`. Making and ending it are shielded from cancellation;
    both take a second or less, and are bounded (`_lab.WORK_S`, `_members.KILL_S`).
    """
    with trio.CancelScope(shield=True):
        lab = await trio.to_thread.run_sync(lambda: Lab.up(plan, keep=False))
    try:
        await trio.lowlevel.checkpoint()
        yield lab
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lab.down)
