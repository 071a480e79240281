# SPDX-License-Identifier: Apache-2.0
"""Background tasks for as long as a ``with`` block lasts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background_tasks() -> AsyncIterator[trio.Nursery]:
    """A nursery that is cancelled at the end of the block. What the block raises comes out as it is, not in a group:
    that there are tasks is no business of whoever wrote the block."""
    error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except BaseException as raised:  # noqa: BLE001  # raised again below, outside of what would wrap it
            error = raised
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error
