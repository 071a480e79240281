# SPDX-License-Identifier: Apache-2.0
"""Background tasks for as long as a ``with`` block lasts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background_tasks() -> AsyncIterator[trio.Nursery]:
    """A nursery that is cancelled at the end of the block. What the block raises is raised as it is, not in a
    group: the caller does not see that there are tasks."""
    error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except BaseException as raised:  # noqa: BLE001  # raised again below, outside of what would wrap it
            error = raised
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error
