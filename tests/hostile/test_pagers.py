# SPDX-License-Identifier: Apache-2.0
"""A pager in a process of its own that hangs, or dies, is the matter of its own migration."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from hostile._peer import Machine, Neighbour, Source
from hostile._program import Control, Program, Pulse, verify

Start = Callable[..., Program]
Daemon = Callable[..., tuple[Program, Control]]
Beside = Callable[[Program, Control], Neighbour]


def pagers(program: Program) -> set[int]:
    """Its children, but for none that are no pagers."""
    return set(program.children())


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_one_pager_of_two(
    daemon: Daemon, start: Start, version: int, rv64: Machine, neighbour: Beside, number: signal.Signals
) -> None:
    """Frozen in the middle of postcopy: the process answers all the time, the other machine keeps its peer."""
    program, control = daemon("d", "--pager", "process", "--heartbeat", "0.5")
    beside = neighbour(program, control)
    others = pagers(program)
    source = Source(program.address, rv64, version).until("running")
    (name,) = control.machines().keys() - {beside.name}
    (frozen,) = pagers(program) - others
    os.kill(frozen, number)
    with Pulse(control) as pulse:
        source.lose()
        control.wait_status(name, "postcopy-paused", deadline_s=30)
        source.come_back().recovered().finish()
        control.wait_status(name, "completed")
    pulse.check(1.5)
    beside.finish()
    verify(start, control, name)


def test_frozen_before_commit(daemon: Daemon, version: int, rv64: Machine, neighbour: Beside) -> None:
    program, control = daemon("d", "--pager", "process")
    beside = neighbour(program, control)
    others = pagers(program)
    source = Source(program.address, rv64, version).until("ready")
    (frozen,) = pagers(program) - others
    os.kill(frozen, signal.SIGSTOP)
    with Pulse(control) as pulse:
        source.switch()
        said = [fields["type"] for fields in source.control.wait_closed(60)]
    assert said in ([], ["abort"], ["prepared"])
    pulse.check(1.5)
    beside.finish()


def test_frozen_at_the_end(daemon: Daemon, version: int, rv64: Machine, neighbour: Beside) -> None:
    """It does not end in time; the machine, which is complete, is not taken down with it."""
    program, control = daemon("d", "--pager", "process")
    beside = neighbour(program, control)
    others = pagers(program)
    source = Source(program.address, rv64, version).until("running")
    (name,) = control.machines().keys() - {beside.name}
    source.serve()
    source.push_all()
    source.control.hear("complete")
    for pid in pagers(program) - others:
        os.kill(pid, signal.SIGSTOP)
    with Pulse(control) as pulse:
        source.control.say("complete-ack", stats={})
        control.wait_status(name, "completed")
        assert control.machines()[name]["guest"]["state"] == "running"
    pulse.check(1.5)
    beside.finish()
