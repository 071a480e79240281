# SPDX-License-Identifier: Apache-2.0
"""What the tests of connections share: an acceptor that serves, and one migration."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from postcopy import net as c
from postcopy import wire as p

SESSION = c.Session(b"m" * 16, b"t" * 16, 0)
INSECURE = c.Protection(insecure=True)
OFFER = p.Offer(b"m" * 16, b"t" * 16, "kvm", {}, (p.Block("ram", 4096, 4096),), 1, 0)


@asynccontextmanager
async def open_acceptor(
    side: str = "source",
    why_refused: Callable[[c.Asking], str] = lambda asking: "",
    *,
    host: str = "127.0.0.1",
    endings: c.Endings | None = None,
    instance: bytes = b"",
) -> AsyncIterator[c.Acceptor]:
    acceptor = await c.Acceptor.open(c.Address(host, 0), side, why_refused, endings, instance, INSECURE)
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


async def looks_again(caller: Any, refused: Callable[[], int]) -> None:
    """Until the caller has come back after a refusal: it has ended nothing. `refused` counts them."""

    async def look() -> None:
        raise AssertionError(await caller.next_link())

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            before = refused()
            while refused() < before + 2:  # noqa: ASYNC110  (a counter)
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
