# SPDX-License-Identifier: Apache-2.0
"""What the tests of connections share: an acceptor that serves, and one migration."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from postcopy import net as c
from postcopy import wire as p

SESSION = c.Session(b"m" * 16, b"t" * 16, 0)
OFFER = p.Offer(b"m" * 16, b"t" * 16, "kvm", {}, (p.Block("ram", 4096, 4096),), 1, 0)


@asynccontextmanager
async def open_acceptor(
    side: str = "source",
    why_refused: Callable[[int], str] = lambda waiting: "",
    *,
    host: str = "127.0.0.1",
    endings: c.Endings | None = None,
    instance: bytes = b"",
) -> AsyncIterator[c.Acceptor]:
    acceptor = await c.Acceptor.open(c.Address(host, 0), side, why_refused, endings, instance)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(acceptor.serve)
            yield acceptor
            nursery.cancel_scope.cancel()
    finally:
        await acceptor.close()


async def hang_up(*links: c.Link) -> None:
    for link in links:
        await trio.aclose_forcefully(link.control)
