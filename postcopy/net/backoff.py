# SPDX-License-Identifier: Apache-2.0
"""How often something is tried, or said, that may fail again and again."""

from __future__ import annotations

import math

import trio

FIRST_S, CAP_S = 0.02, 0.2
"""Pauses between attempts to come back: doubled from the first to the cap, each cut at random to half or more, so that
the first page after a short cut comes within a fraction of a second."""
PATIENT_AFTER_S, PATIENT_CAP_S = 60.0, 2.0
"""A peer that has been lost for so long is asked less often. Not before, however often it has answered meanwhile: where
the network is cut several times a second a recovery can be cut a few times in a row, and a long pause would only make
the next one meet another cut."""
FREE_RETURNS = 8
"""How often a peer may come back without going on before the side that listens lets it in less often."""
LASTING_S = 0.05
"""A migration that goes on for less than this before it is lost again is not looked for at once every time: some
failures (a page that cannot be sent) come back as soon as everything is there."""


def cap_s(lost_s: float) -> float:
    """The longest pause, for a peer that was lost then."""
    return PATIENT_CAP_S if trio.current_time() - lost_s > PATIENT_AFTER_S else CAP_S


class LogLimit:
    """For log lines that may come again and again: the first at once, then one after a second, two, four, up to a
    minute; from the beginning after a minute without."""

    def __init__(self) -> None:
        self._next_s = -math.inf
        self._pause_s = 0.0

    def due(self) -> bool:
        now_s = trio.current_time()
        if now_s < self._next_s:
            return False
        self._pause_s = 1.0 if now_s > self._next_s + 60 else min(2 * self._pause_s, 60.0)
        self._next_s = now_s + self._pause_s
        return True
