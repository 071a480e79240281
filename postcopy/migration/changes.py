# SPDX-License-Identifier: Apache-2.0
"""What the memory of a machine at the source holds, and what of it has changed since that was asked last."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from postcopy._blocking import run_briefly, run_sync, run_to_end
from postcopy.machines import Machine
from postcopy.memory import DirtyLog
from postcopy.memory.bitmap import Bitmap

QUICK_S = 0.0005
"""Looking at the memory may keep the Trio thread for about so long."""


def _timed(look: Callable[[], list[Bitmap]]) -> tuple[list[Bitmap], float]:
    began_s = time.monotonic()
    return look(), time.monotonic() - began_s


class Changes:
    """In pages of transfer, a map for each RAM block. Open it, `begin` once, `collect` again and again, `close`.

    Without a dirty log a page counts as changed when it holds something, and was all zeros before: enough for a
    destination that has been sent no page. With one, a page that was written.

    Resource handling: the log slows the machine's writes down until `close`; memory is in use until then.
    """

    def __init__(self, machine: Machine, page_bytes: Sequence[int], log: DirtyLog | None) -> None:
        self._machine = machine
        self._page_bytes = page_bytes
        self._log = log
        self._present: list[Bitmap] = []
        self._took_s = 0.0  # looking, the last time

    @classmethod
    async def open(cls, machine: Machine, page_bytes: Sequence[int], logged: bool) -> Changes:
        """`ResourceError` where the kernel has no dirty log, or the machine's kind."""
        if not logged:
            return cls(machine, page_bytes, None)
        async with machine.settled():
            return cls(machine, page_bytes, await run_sync(machine.dirty_log))

    @property
    def logged(self) -> bool:
        """Whether pages may be sent while the machine runs."""
        return self._log is not None

    async def begin(self) -> list[Bitmap]:
        """The pages that may hold something other than zeros; `collect` adds to these maps."""
        self._present, self._took_s = await run_sync(_timed, self._look)
        return self._present

    async def collect(self) -> list[Bitmap]:
        """The pages that have changed since the last call, or since `begin`."""
        # It takes about as long as the last time: as the memory is that holds something. A thread would double that.
        if self._took_s < QUICK_S:
            changed, self._took_s = _timed(self._collect)
        else:
            changed, self._took_s = await run_briefly(_timed, self._collect)
        return changed

    def _look(self) -> list[Bitmap]:
        return [
            block.memory.present(unit) for block, unit in zip(self._machine.blocks, self._page_bytes, strict=True)
        ]  # fmt: skip

    def _collect(self) -> list[Bitmap]:
        if not self._machine.live:
            return [Bitmap(len(bitmap)) for bitmap in self._present]
        if self._log is None:
            known = zip(self._machine.blocks, self._present, self._page_bytes, strict=True)
            return [block.memory.present_more(bitmap, unit) for block, bitmap, unit in known]
        return [
            self._log.collect(number).rescaled(block.memory.page_bytes, unit)
            for number, (block, unit) in enumerate(zip(self._machine.blocks, self._page_bytes, strict=True))
        ]

    async def close(self) -> None:
        """Shielded. Twice does no harm."""
        log, self._log = self._log, None
        if log is not None:
            await run_to_end(log.close, "ending the dirty log")
