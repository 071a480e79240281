# SPDX-License-Identifier: Apache-2.0
"""A source that does with requests made ahead of faults what it likes. They have the highest bit of their id set."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

from hostile import _wire as wire
from hostile._peer import Closed, Line, Machine, Source
from hostile._program import Program
from hostile._wire import Frame

Start = Callable[..., Program]
AHEAD = 0x80000000


@pytest.mark.parametrize("what", ["nothing", "other pages"])
def test_answers_to_what_was_asked_for_ahead(start: Start, version: int, rv64: Machine, what: str) -> None:
    """None, or the same page each time: no more than a window is asked for, and the machine goes on with the push."""
    if version < 4:
        pytest.skip("the same in each version")
    dest = start("dest", "--json", "--listen", "127.0.0.1:0", "--run-for", "0", "--prefetch", "both:16")
    source = Source(dest.address, rv64, version).until("running")
    kept: set[tuple[int, int]] = set()
    asked_ahead = threading.Event()

    def answer(line: Line) -> None:
        line.sock.settimeout(None)
        with contextlib.suppress(Closed, OSError):
            while True:
                asked: Any = line.take_frame()
                page = asked.block, asked.first_page
                if asked.request_id & AHEAD:
                    kept.add(page)
                    asked_ahead.set()
                    if what == "nothing":
                        continue
                    page = asked.block, 0
                content = source.machine.page(*page)
                line.send(Frame(wire.PAGES, *page, 1, asked.request_id, content, wire.ANSWERS).pack())

    for line in source.urgent:
        threading.Thread(target=answer, args=(line,), daemon=True).start()
    assert asked_ahead.wait(30), dest.tail()
    source.push_all()
    source.control.hear("complete")
    source.control.say("complete-ack", stats={})
    assert dest.end() == 0, dest.tail()
    assert len(kept) < 2000
