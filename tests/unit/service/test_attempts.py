# SPDX-License-Identifier: Apache-2.0
"""How long a migration that has lost its connection is begun again."""

from __future__ import annotations

import math

import trio
from trio.testing import MockClock

from postcopy.errors import ConnectionLost, MigrationError, PeerError
from postcopy.migration.connection import LAST_LOOK_S, MISSED_HEARTBEATS
from postcopy.net import backoff
from postcopy.service._attempts import END_S, IN_VAIN_ATTEMPTS, IN_VAIN_S, Attempts
from postcopy.wire import RefusedError

CUT = ConnectionLost("cut")
NOTICED_S = MISSED_HEARTBEATS * 1.0 + LAST_LOOK_S + END_S


async def test_what_is_final(autojump_clock: MockClock) -> None:
    """The first connection that cannot be made, and what the peer says; a loss is not."""
    attempts = Attempts(1.0)
    assert attempts.left_s(PeerError("nobody is there"), False, False, 10) == 0
    assert attempts.left_s(RefusedError("busy", "busy"), False, True, 10) == 0
    assert attempts.left_s(CUT, True, True, 0) == 0
    assert attempts.left_s(CUT, True, True, 10) == 10
    attempts.again(True)
    assert attempts.left_s(MigrationError("no such device here"), False, True, math.inf) == 0


async def test_a_peer_that_has_not_noticed(autojump_clock: MockClock) -> None:
    """It refuses, since it is busy with what was lost, until it must have noticed that."""
    attempts = Attempts(1.0)
    attempts.again(True)
    assert attempts.left_s(RefusedError("busy", "busy"), False, False, math.inf) == NOTICED_S
    assert attempts.left_s(RefusedError("busy", "busy"), False, False, 2) == 2
    assert attempts.left_s(PeerError("nobody is there"), False, False, math.inf) == math.inf
    await trio.sleep(NOTICED_S)
    assert attempts.left_s(RefusedError("busy", "busy"), False, False, math.inf) <= 0


async def test_attempts_that_do_not_last(autojump_clock: MockClock) -> None:
    """All of them have one time, and growing pauses; one that has lasted begins anew."""
    attempts = Attempts(1.0)
    pauses = []
    left_s = 30.0
    while left_s > 0:
        pauses.append(attempts.again(True))
        await trio.sleep(pauses[-1])
        left_s = attempts.left_s(CUT, True, True, 30)
    assert 15 < trio.current_time() - pauses[0] < 33
    assert pauses[0] <= backoff.FIRST_S
    assert backoff.PATIENT_CAP_S / 2 <= max(pauses) <= backoff.PATIENT_CAP_S
    attempts.again(True)
    await trio.sleep(2 * backoff.PATIENT_CAP_S + 1)
    assert attempts.left_s(CUT, True, True, 30) == 30
    assert attempts.again(True) <= backoff.FIRST_S


async def test_a_machine_is_not_paused_in_vain_again_and_again() -> None:
    attempts = Attempts(1.0)
    assert not attempts.in_vain(1000)  # one that has all of its memory sent in the pause
    while attempts.count < IN_VAIN_ATTEMPTS:
        attempts.paused_s += IN_VAIN_S / 2
        attempts.again(True)
    assert not attempts.in_vain(0)
    assert attempts.in_vain(0.1)
