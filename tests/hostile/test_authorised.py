# SPDX-License-Identifier: Apache-2.0
"""Peers that may do what they do, a source that may send and a destination that may take, and do it to harm. See
docs/security.md: each line there has its test, many of them here."""

from __future__ import annotations

import threading
from collections.abc import Callable

from hostile._peer import Closed, Listener
from hostile._program import RV64, Program, wait_until

Start = Callable[..., Program]


HOLD_S = 9.0  # less than a source waits for `prepared`


def test_a_destination_that_is_lost_in_each_pause(start: Start, version: int) -> None:
    """It takes the state, shows signs of life until just before the source would give up, and is lost; and that again
    and again. The machine does not stand still for ever: after some attempts it stays, and runs."""
    paused = 0

    def gone() -> bool:
        return source.errors().count("not begun again") > 0

    with Listener(version) as listener:
        source = start("source", "--json", *RV64, "--connect", listener.where)
        while paused < 10:
            wait_until("a connection, or the end", lambda: gone() or listener.backlog(), 60)
            if gone():
                break
            try:
                destination = listener.destination().until("handed")
            except Closed:  # it came to say that the last one has ended
                continue
            paused += 1
            threading.Event().wait(HOLD_S)
            destination.lose()
        source.operations_go_on()
    assert 3 <= paused < 10
