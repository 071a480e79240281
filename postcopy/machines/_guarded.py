# SPDX-License-Identifier: Apache-2.0
"""A machine that arrives in a process whose memory the preload library guards (`Preload.arm`).

Resource handling: `_guard` is a copy of what guards it, closed by `close`. The process keeps one too, until all of its
memory is there: when we die it waits.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Sequence
from typing import Any

from postcopy.machines.base import Adopt, Extent
from postcopy.machines.preload.client import Mapping, Preload
from postcopy.machines.process import ArrivingProcess
from postcopy.uffd import RegisterMode, Userfaultfd


class GuardedProcess(ArrivingProcess):
    """Before a kind's own class among the bases of one."""

    lends = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._library: Preload | None = None
        self._guard: Userfaultfd | None = None

    @abc.abstractmethod
    def _block_addresses(self) -> Sequence[int]:
        """Where the process has mapped each block, as a whole."""

    async def _arm(self, library: Preload, mappings: Sequence[Mapping], features: int) -> None:
        """Whoever touches its memory from now on waits."""
        self._library = library  # from here on it may be guarded, whatever becomes of the request
        armed = await library.arm(mappings, features=features, mode=RegisterMode.MISSING, keep=True)
        self._guard = Userfaultfd.adopt(armed.uffd.detach(), int(armed.features))

    async def lend(self, adopt: Adopt) -> None:
        assert self._guard is not None
        extents = [
            Extent(number, 0, block.memory.pages, address)
            for number, (block, address) in enumerate(zip(self.blocks, self._block_addresses(), strict=True))
        ]
        await adopt(os.dup(self._guard.fileno()), int(self._guard.features), extents)

    async def made_whole(self) -> None:
        await super().made_whole()
        assert self._library is not None
        self._drop_guard()
        await self._library.disarm()

    def _drop_guard(self) -> None:
        if self._guard is not None:
            self._guard.close()

    async def _release(self) -> None:
        self._drop_guard()
        await super()._release()
