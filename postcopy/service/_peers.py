# SPDX-License-Identifier: Apache-2.0
"""What a daemon gives each of its peers, so that none can take it all from the others.

A peer is who `Link.identity` says: the name in its certificate, or its host where there is no TLS. It may have so many
machines here, and so many on their way, with so much memory. What it offers and what then comes to nothing is counted
for a while: each costs this host some work and some lines of its log, which a peer could fill with nothing else.

Everything belongs to the Trio thread; all is derived from the daemon's table but for those counts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import trio

from postcopy.errors import ResourceError
from postcopy.units import format_size

if TYPE_CHECKING:
    from postcopy.service.service import Owned

IN_VAIN = 256
"""Machines of one peer that came to nothing, of which one is forgotten each second."""
MAX_COUNTED = 1024
"""Peers of which that is counted; of more, those that were heard of last."""


class Shares:
    """Of all peers, beside each other."""

    def __init__(self, incoming: int, machines: int, memory_bytes: int | None) -> None:
        """What one peer may have at most: on their way to here, here or on their way, memory of these."""
        self._incoming = incoming
        self._machines = machines
        self._memory_bytes = memory_bytes
        self._in_vain: OrderedDict[str, float] = OrderedDict()  # by peer: when all of it is forgotten

    def why_refused(self, peer: str, waiting: int, owned: Sequence[Owned], arriving: Sequence[Owned]) -> str:
        """Why this peer may not send one more now, if it may not. `waiting`: of its connections; `owned`: all machines
        that there are, `arriving`: those of them that take a place for arrivals."""
        if self._in_vain.get(peer, 0.0) - trio.current_time() > IN_VAIN:
            return "too much of what this peer has offered has come to nothing; it may offer a machine each second"
        if waiting + _count(arriving, peer) >= self._incoming:
            return f"too many machines of this peer are on their way to here: {self._incoming}"
        if waiting + _count(owned, peer) >= self._machines:
            return f"this peer has {self._machines} machines here already (--max-machines-per-peer)"
        return ""

    def check_memory(self, peer: str, size_bytes: int, owned: Sequence[Owned]) -> None:
        """`ResourceError` where it would be too much. What is offered counts from the offer on: a machine that another
        process runs has no memory yet while that is started."""
        has_bytes = sum(one.offered_bytes for one in owned if one.peer == peer)
        if self._memory_bytes is not None and has_bytes + size_bytes > self._memory_bytes:
            raise ResourceError(
                f"this peer has machines with {format_size(has_bytes)} here, and may have"
                f" {format_size(self._memory_bytes)}: one with {format_size(size_bytes)} is too much",
                "end or migrate one of them, or raise --max-memory-per-peer",
            )

    def came_to_nothing(self, peer: str) -> None:
        now_s = trio.current_time()
        self._in_vain[peer] = max(self._in_vain.pop(peer, 0.0), now_s) + 1.0
        while len(self._in_vain) > MAX_COUNTED:
            self._in_vain.popitem(last=False)


def _count(owned: Sequence[Owned], peer: str) -> int:
    return sum(one.peer == peer for one in owned)
