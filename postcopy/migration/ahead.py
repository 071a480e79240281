# SPDX-License-Identifier: Apache-2.0
"""What a destination asks for before it is touched, beside its policy: the working set of an earlier run; and the
record of this one.

Nothing depends on either: what cannot be read or written is logged, and the migration goes on.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import trio

from postcopy._blocking import run_sync
from postcopy._fd import FdHolder
from postcopy.dataplane.ahead import NO_PREFETCH, Prefetch
from postcopy.dataplane.pager import new_touches, page_runs, read_touches
from postcopy.errors import PostcopyError
from postcopy.machines import Machine
from postcopy.memory import workingset

if TYPE_CHECKING:
    from postcopy.dataplane.pager import Pager
    from postcopy.dataplane.pager_process import ProcessPager

WRITE_S = 10.0

log = logging.getLogger(__name__)


class Ahead:
    """Of one machine. `begin` before its memory is armed, `ask` when it runs, `record` when every page is here, and in
    any case `close`, which records what there is where `record` has not been called."""

    def __init__(
        self, policy: Prefetch = NO_PREFETCH, working_set: str | None = None, record_to: str | None = None
    ) -> None:
        """`working_set`, `record_to`: paths of files."""
        self._policy = policy
        self._working_set = working_set
        self._record_to = record_to
        self._runs: Any = ()
        self._touches: FdHolder | None = None
        self._names: workingset.Blocks = ()
        self._sizes: list[tuple[int, int]] = []

    async def begin(self, machine: Machine, pager: Pager | ProcessPager) -> None:
        memories = [block.memory for block in machine.blocks]
        self._names = tuple((block.name, block.memory.size_bytes) for block in machine.blocks)
        self._sizes = [(memory.size_bytes, memory.page_bytes) for memory in memories]
        if self._policy != NO_PREFETCH:
            pager.set_prefetch(self._policy)
        if self._record_to is not None:
            self._touches = FdHolder(new_touches(sum(memory.pages for memory in memories)))
            pager.record_touches(self._touches.fd)
        if self._working_set is not None:
            try:
                self._runs = await run_sync(self._read, self._working_set)
            except (PostcopyError, MemoryError) as error:
                log.warning("%s; nothing is asked for because of it", str(error) or f"{self._working_set}: no memory")

    def _read(self, path: str) -> Any:
        return page_runs(workingset.read_of_machine(path, self._names).in_blocks(self._sizes))

    def ask(self, pager: Pager | ProcessPager) -> None:
        """For the working set, once."""
        runs, self._runs = self._runs, ()
        if len(runs):
            try:
                pager.request_runs(runs)
            except PostcopyError as error:
                log.warning("--working-set %s: %s; nothing is asked for because of it", self._working_set, error)

    async def record(self) -> None:
        """Shielded: what is asked to end meanwhile ends when it is written. Bounded in time."""
        touches, self._touches = self._touches, None
        if touches is None or self._record_to is None:
            return
        with trio.CancelScope(shield=True):
            try:
                found = await run_sync(self._touched, touches.fd)
                with trio.move_on_after(WRITE_S) as scope:  # a disk may hang
                    await run_sync(workingset.write, self._record_to, found, self._names, abandon_on_cancel=True)
                if scope.cancelled_caught:
                    log.error("--record-working-set %s: not written within %g s", self._record_to, WRITE_S)
                else:
                    log.info("the working set, %d pages, has been written to %s", found.pages, self._record_to)
            except (PostcopyError, MemoryError) as error:
                log.error("%s", str(error) or f"--record-working-set {self._record_to}: no memory")
            finally:
                touches.close()

    def _touched(self, fd: int) -> workingset.WorkingSet:
        return workingset.of_machine(read_touches(fd), self._sizes)

    async def close(self, ran: bool) -> None:
        """`ran`: whether the machine has run here, so that there is something to record."""
        if ran:
            await self.record()
        elif self._touches is not None:
            self._touches.close()
