# SPDX-License-Identifier: Apache-2.0
"""Precopy: whether another round of pages is sent before the machine is paused, and what is sent while it is paused.

Sans-IO: the engine says what a round has sent and left, and asks. A *round* sends all pages that the destination does
not have (the first one: all there are) while the machine runs, and then finds out which of them were written meanwhile;
these are *left*.
"""

from __future__ import annotations

import enum
import math

SHRINKS = 0.9
"""A round that leaves more than this part of what it has sent does not shrink: others would not either."""
STUBBORN_ROUNDS = 2
"""So many in a row, since one may have been held up by the host."""
ROUND_S = 0.1
"""A precopy of a given time sends again no more often than that: a round costs both sides something, sent or not."""
MEASURED_BYTES = 256 * 1024
"""A round that has sent less content says nothing about the bandwidth."""


class Mode(enum.StrEnum):
    """When pages are sent."""

    STOP_AND_COPY = "stop-and-copy"  # all while the machine is paused
    PRECOPY = "precopy"  # in rounds before it is paused, the rest while it is
    POSTCOPY = "postcopy"  # all when it runs at the destination
    HYBRID = "hybrid"  # in rounds; the rest while it is paused if it fits, else when it runs at the destination

    @property
    def has_rounds(self) -> bool:
        return self in (Mode.PRECOPY, Mode.HYBRID)


class Policy:
    """Of one migration. All that is public may be changed at any time.

    **How long a pause will take** is estimated high rather than low. The bandwidth is that of the last round up to the
    destination's answer, since the end of a push means only that the system has taken all of it, and counts content
    only, since zeros cost next to nothing. What telling the destination costs comes on top. And between the last look
    at what was written and the pause the machine writes on, as fast as before.
    """

    def __init__(self, mode: Mode, precopy_s: float, max_downtime_s: float, max_rounds: int) -> None:
        """`precopy_s`: no rounds (0), for so long, or as long as it makes sense (`math.inf`)."""
        self.mode = mode
        self.precopy_s = precopy_s
        self.max_downtime_s = max_downtime_s
        self.max_rounds = max_rounds
        self.limit_bytes_per_s = 0  # that was set; 0: none
        self.ended = False  # the user wants no other round
        self.telling_s = 0.0  # how long it takes to tell the destination of all pages when none are under way
        self.rounds = 0  # so many have ended
        self.left_bytes: int | None = None  # by the last of them
        self._measured_bytes_per_s = 0.0
        self._written_again = 0.0  # of what a round has left, the part that is written again before the pause
        self._stubborn = 0  # rounds in a row that did not shrink

    @property
    def bytes_per_s(self) -> float:
        """With which the rest would be sent; 0: not known yet."""
        limit = self.limit_bytes_per_s
        return min(self._measured_bytes_per_s, limit) if limit else self._measured_bytes_per_s

    def round_ended(
        self, sent_bytes: int, left_bytes: int, push_s: float, answer_s: float, content_bytes: int | None = None
    ) -> None:
        """A round has sent so much, of which all but `content_bytes` were zeros, and left so much. It took `push_s` to
        send it, and `answer_s` from there until the destination had it, and knew what has changed."""
        self.rounds += 1
        self.left_bytes = left_bytes
        took_s = push_s + answer_s
        content_bytes = sent_bytes if content_bytes is None else content_bytes
        if content_bytes >= MEASURED_BYTES and took_s > 0:
            self._measured_bytes_per_s = content_bytes / took_s
        self._written_again = answer_s / took_s if took_s > 0 else 0.0
        self._stubborn = self._stubborn + 1 if left_bytes > SHRINKS * sent_bytes else 0

    def fits(self, left_bytes: float) -> bool:
        """Whether so much can be sent within the downtime that is allowed."""
        return not left_bytes or left_bytes <= self.bytes_per_s * (self.max_downtime_s - self.telling_s)

    def whole(self, left_bytes: int) -> bool:
        """Whether so much, all that the destination does not have, is sent while the machine is paused."""
        return self.mode in (Mode.STOP_AND_COPY, Mode.PRECOPY) or (
            self.mode is Mode.HYBRID and self.rounds > 0 and self.fits(left_bytes)
        )

    def time_left_s(self, since_s: float) -> float:
        """How long rounds may still take, that began so long ago."""
        return 0.0 if self.ended or not self.mode.has_rounds else max(0.0, self.precopy_s - since_s)

    def why_no_other(self, since_s: float) -> str:
        """Why there is no other round; empty: there is. The rounds began `since_s` ago."""
        if not self.mode.has_rounds or self.precopy_s == 0:
            return "there is no precopy"
        if self.ended:
            return "the switchover was asked for"
        if not self.time_left_s(since_s):
            return f"precopy has taken {self.precopy_s:g} s"
        if self.precopy_s < math.inf or self.left_bytes is None:
            return ""
        if self.fits(self.left_bytes * (1 + self._written_again)):
            return f"what is left fits {self.max_downtime_s:g} s"
        if self.rounds >= self.max_rounds:
            return f"there were {self.rounds} rounds"
        if self._stubborn >= STUBBORN_ROUNDS:
            return "what is left no longer shrinks"
        return ""
