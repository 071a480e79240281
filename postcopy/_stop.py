# SPDX-License-Identifier: Apache-2.0
"""That a command is to end, and whether that may lose something.

To *ask* is to have it end in order: what is under way and cannot be had again is seen through. A command that has
something of the kind says so (`warned`), and when it has no more of it (`settled`). To ask again within `INSIST_S` of
that warning is to *insist*: the command ends now. Later than that it warns again, since the first warning may not have
been seen. Where nothing would be lost, to ask again ends the command from outside.

Signals that come together are one: a terminal sends Ctrl-C to a command and to what started it, which may pass it on;
timeout(1) sends SIGTERM to its command, then to its process group.
"""

from __future__ import annotations

import math
import signal

import trio

INSIST_S = 10.0
TOGETHER_S = 0.3


def heard(*numbers: signal.Signals) -> tuple[signal.Signals, ...]:
    """Those of these signals that are not ignored. One that is when the process starts stays so, as under nohup(1) and
    in the background of a script: whoever installs a handler asks here."""
    return tuple(number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN)


class Stop:
    """For a command that only has to end in order it is an event."""

    def __init__(self) -> None:
        self.by = ""  # what asked last, as it is told to people: "Ctrl-C"
        self.has_warned = False  # since it was asked last, and something would still be lost
        self._asked, self._insisted = trio.Event(), trio.Event()
        self.changes = trio.Event()  # replaced whenever it is asked again, or insisted
        self._last_s = -math.inf

    def is_set(self) -> bool:
        return self._asked.is_set()

    async def wait(self) -> None:
        """Until it is asked to end."""
        await self._asked.wait()

    @property
    def insisted(self) -> bool:
        """Whether it is to end whatever is lost."""
        return self._insisted.is_set()

    def ask(self, by: str) -> bool:
        """Returns whether the command is to be ended from outside: it was asked to end before, and has nothing (more)
        to see through."""
        since_s = trio.current_time() - self._last_s
        if self._asked.is_set():
            if since_s < TOGETHER_S:
                return False
            if self._insisted.is_set() or not self.has_warned:
                return True
            if since_s <= INSIST_S:
                self._insisted.set()
        self._last_s = trio.current_time()
        self.by = by
        self.has_warned = False
        self.set()
        return False

    def insist(self) -> None:
        self._insisted.set()
        self.set()

    def set(self) -> None:
        """Asks, for what is no signal."""
        self._asked.set()
        self.changes.set()
        self.changes = trio.Event()

    def warned(self) -> None:
        """It has been said what would be lost, and how to insist."""
        self.has_warned = True
        self._last_s = trio.current_time()

    def settled(self) -> None:
        """Nothing would be lost any more."""
        self.has_warned = False
