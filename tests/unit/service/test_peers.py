# SPDX-License-Identifier: Apache-2.0
"""What one peer may have of a daemon."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from postcopy.errors import ResourceError
from postcopy.service._peers import IN_VAIN, MAX_COUNTED, Shares
from postcopy.service.service import Owned, Phase


def of(peer: str, offered_bytes: int = 1000) -> Owned:
    owned = Owned("vm", Phase.ARRIVING)
    owned.peer, owned.offered_bytes = peer, offered_bytes
    return owned


async def test_places(autojump_clock: MockClock) -> None:
    """Those of a peer are its own: nobody else's count, and machines that were started here are nobody's."""
    shares = Shares(2, 3, None)
    a, b, mine = of("a"), of("b"), of("")
    assert not shares.why_refused("a", 0, [a, b, b, b, mine], [a, b])
    assert "on their way to here: 2" in shares.why_refused("a", 1, [a], [a])
    assert "on their way to here: 2" in shares.why_refused("b", 0, [a, b, b], [a, b, b])
    assert "has 3 machines here already" in shares.why_refused("b", 0, [a, b, b, b], [a])
    assert not shares.why_refused("a", 0, [a, b, b, b], [a])


async def test_memory(autojump_clock: MockClock) -> None:
    shares = Shares(8, 8, 3000)
    here = [of("a"), of("a"), of("b"), of("a", 0)]
    shares.check_memory("a", 1000, here)
    with pytest.raises(ResourceError, match=r"has machines with .* here, and may have .*--max-memory-per-peer"):
        shares.check_memory("a", 1001, here)
    shares.check_memory("b", 2000, here)
    Shares(8, 8, None).check_memory("a", 1 << 60, here)


async def test_what_comes_to_nothing(autojump_clock: MockClock) -> None:
    """A peer that offers for nothing again and again may do it once in a second; others do not suffer from it."""
    shares = Shares(8, 8, None)
    for _ in range(IN_VAIN):
        assert not shares.why_refused("a", 0, [], [])
        shares.came_to_nothing("a")
    shares.came_to_nothing("a")
    assert "come to nothing" in shares.why_refused("a", 0, [], [])
    assert not shares.why_refused("b", 0, [], [])
    await trio.sleep(1)
    for _ in range(5):
        assert not shares.why_refused("a", 0, [], [])
        shares.came_to_nothing("a")
        assert shares.why_refused("a", 0, [], [])
        await trio.sleep(1)
    await trio.sleep(IN_VAIN)
    assert not shares.why_refused("a", 0, [], [])
    for number in range(2 * MAX_COUNTED):
        shares.came_to_nothing(f"{number}")
    assert len(shares._in_vain) == MAX_COUNTED
