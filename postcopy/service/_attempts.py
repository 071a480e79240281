# SPDX-License-Identifier: Apache-2.0
"""A migration that loses its connection before its point of no return has lost nothing but the work done: the machine
has stayed where it was. So it is begun again, from the offer on, by the side that calls.

What the peer says is final: a refusal, an abort, a named error; so is what this host lacks, and what the user says. But
a peer that has not noticed the loss yet may refuse since it is busy with the very migration that was lost: until it
must have noticed, that is tried again, too.

Each attempt may have paused the machine before it was lost. A destination that lets that happen again and again, out of
malice or since it is ill, would keep it from its work: so there is a limit to how long it was paused in vain.
"""

from __future__ import annotations

import math
import random

import trio

from postcopy.errors import PeerError, PostcopyError
from postcopy.migration.connection import LAST_LOOK_S, MISSED_HEARTBEATS
from postcopy.net import backoff
from postcopy.wire import RefusedError

END_S = 5.0
"""How long a peer may need for the end of a migration whose loss it has noticed."""
IN_VAIN_S, IN_VAIN_ATTEMPTS = 30.0, 3
"""How long all attempts together may have paused the machine, after so many of them."""


class Attempts:
    """Of one migration."""

    def __init__(self, heartbeat_s: float) -> None:
        self.count = 1
        self.paused_s = 0.0  # for so long attempts that are over had paused the machine
        self.said = backoff.LogLimit()  # of what is said of each
        self._notices_s = MISSED_HEARTBEATS * heartbeat_s + LAST_LOOK_S + END_S
        self._lost_s = math.inf  # when
        self._begun_s = trio.current_time()  # the present one
        self._quick = 0  # attempts in a row that have not lasted

    def left_s(self, failure: PostcopyError | None, lost: bool, connected: bool, recover_for_s: float) -> float:
        """How long it may still be tried after an attempt that has ended of `failure`; 0: not again. `lost`: by nothing
        but a lost connection; `connected`: the peer had been reached."""
        now_s = trio.current_time()
        if lost:
            return recover_for_s if self._lasted or self.count == 1 else self._lost_s + recover_for_s - now_s
        if math.isinf(self._lost_s) or not isinstance(failure, PeerError):
            return 0.0
        refused = connected or isinstance(failure, RefusedError)
        return self._lost_s + (min(recover_for_s, self._notices_s) if refused else recover_for_s) - now_s

    def in_vain(self, paused_s: float) -> bool:
        """Whether the machine was paused for too long, `paused_s` by the present attempt."""
        return self.count >= IN_VAIN_ATTEMPTS and self.paused_s + paused_s > IN_VAIN_S

    def again(self, lost: bool) -> float:
        """Begins the next one; returns the pause before it."""
        if lost and (self._lasted or self.count == 1):
            self._lost_s, self._quick = trio.current_time(), 0
        pause_s = min(backoff.FIRST_S * 2.0**self._quick, backoff.PATIENT_CAP_S) * random.uniform(0.5, 1)
        self._quick = min(self._quick + 1, 20)
        self.count += 1
        self._begun_s = trio.current_time() + pause_s
        return pause_s

    @property
    def _lasted(self) -> bool:
        return trio.current_time() > self._begun_s + backoff.PATIENT_CAP_S
