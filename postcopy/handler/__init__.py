# SPDX-License-Identifier: Apache-2.0
"""A userfaultfd handler for virtual machine monitors: the service behind ``postcopy pager``.

A VMM that restores a snapshot (Firecracker with ``mem_backend`` Uffd) connects to a Unix socket and sends its
userfaultfd. From then on its page faults are answered here, from a memory file, from another host, or from a page
source in Python, until its process ends.

What is owned: the listening sockets, and a `Vm` for each virtual machine, with a pager and threads in C of its own.
What ends it: the end of its process for a virtual machine; that of `Handler.run` for all of them. What must outlive the
process is in a `Store`: another process goes on from it (`_store`, `_keeper`).

Programs use `serve`::

    async with trio.open_nursery() as nursery:
        await nursery.start(serve, "/run/vm.sock", lambda vm: MyPageSource(vm))
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import trio

from postcopy._stop import Stop
from postcopy.handler._handler import Handler, MakeSource
from postcopy.handler._keeper import in_keeper, keep, open_store
from postcopy.handler._vm import OLDEST_VERSION, RECORD_VERSION, About
from postcopy.records import Json, Record, as_json
from postcopy.service.config import PagerConfig

__all__ = [
    "OLDEST_VERSION",
    "RECORD_VERSION",
    "About",
    "Handler",
    "MakeSource",
    "in_keeper",
    "keep",
    "open_store",
    "serve",
]

log = logging.getLogger(__name__)


class _Teller:
    """What `Handler` says, for a program."""

    def __init__(self, on_event: Callable[[str, Json], None], listening: Callable[[], None]) -> None:
        self._on_event = on_event
        self._listening = listening

    def say(self, text: str) -> None:
        log.info("%s", text)

    def emit(self, event: str, record: Record) -> None:
        if event == "listening":
            self._listening()
        self._on_event(event, as_json(record))

    records = False

    def kick(self) -> None:
        """Nothing is drawn."""


async def serve(
    socket: str,
    source: MakeSource,
    *,
    on_event: Callable[[str, Json], None] = lambda event, fields: None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    **options: Any,
) -> None:
    """Serves virtual machines that connect to a Unix socket, with the pages of a `PageSource` for each, which `source`
    makes when it is told about the virtual machine (`About`). Until cancelled.

    The source has one block: the memory file of the snapshot, in pages of ``About.page_bytes``. `options` are those of
    `PagerConfig`, as ``kill_when_lost=True``. `on_event` gets what ``postcopy pager --json`` writes.

    When this ends, virtual machines of which pages are missing stay frozen where they need one; nothing outlives this
    process. `ConfigurationError` and `ResourceError` where it cannot listen.
    """
    config = PagerConfig(socket=socket, **options)
    async with open_store() as store:
        await Handler(config, _Teller(on_event, task_status.started), store, source).run(Stop())
