# SPDX-License-Identifier: Apache-2.0
"""Blocking calls into the core that must come to an end, whatever is cancelled around them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import trio

from ._errors import MigrationError

END_TIMEOUT_S = 30.0
"""How long ending C threads may take. They are woken through an eventfd and answer within milliseconds; a thread that
is still there after this hangs in the kernel."""


async def run_to_end(call: Callable[[], int], what: str, timeout_s: float = END_TIMEOUT_S) -> int:
    """Runs `call` in a thread and waits for it, shielded from cancellation but not for ever.

    After `timeout_s` the thread is left behind and `MigrationError` raised; the caller must then never free what the
    thread works on. Own limiter: ending something must not wait for a free worker.
    """
    result: list[int] = []

    def worker() -> None:
        # A thread within the thread: its time is the real one, whatever clock Trio runs on.
        thread = threading.Thread(target=lambda: result.append(call()), name="pc-end", daemon=True)
        thread.start()
        thread.join(timeout_s)

    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(worker, limiter=trio.CapacityLimiter(1))
    if not result:
        raise MigrationError(f"{what}: not done after {timeout_s:g} s; its memory is kept")
    return result[0]
