# SPDX-License-Identifier: Apache-2.0
"""A machine that was committed to the destination runs there, whatever is lost in that very moment. On the harness of
`test_engines`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from postcopy import wire as p
from postcopy.dataplane.pager import EventType
from postcopy.errors import CoreError, MigrationError
from postcopy.machines import MachineState
from postcopy.wire import State

# --import-mode=importlib makes no packages of test directories, so what they share is loaded by its path.
_spec = importlib.util.spec_from_file_location("postcopy_engines_3", Path(__file__).with_name("test_engines.py"))
assert _spec is not None
assert _spec.loader is not None
h: Any = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = h
_spec.loader.exec_module(h)


@pytest.mark.parametrize("runs", [True, False])
async def test_lost_when_the_decision_was_heard(runs: bool) -> None:
    """Every page had come while it was in doubt; the source says that it had decided, and is gone before the data
    channels are there. A machine that does not run is not complete."""
    meeting, ended = h.Meeting(), trio.Event()
    meeting.open.set()
    async with h.lone_destination(ended.set, meeting) as (peer, dest, twin):
        await h.prepared(peer)
        dest._pager.channel.tell(EventType.COMPLETE)
        await trio.aclose_forcefully(peer.stream)

        def no_channel(*_: object) -> None:
            raise CoreError(104, "attaching a channel")

        async def no_resume() -> None:
            raise MigrationError("the vCPUs do not start")

        dest._pager.attach_urgent = no_channel
        if not runs:
            twin.resume = no_resume
        again = h.Peer(await meeting.join())
        await again.read(p.Recover)
        assert twin.resumed == 0
        meeting.open = trio.Event()
        await again.say(p.Recovered())
        with trio.fail_after(20):
            if runs:
                await ended.wait()
            else:
                await dest._until(lambda: dest.status == "postcopy-failed")
        if runs:
            assert dest.state is State.COMPLETED
            assert twin.state is MachineState.RUNNING
            assert twin.resumed == 1
        else:
            assert dest.state is State.PAUSED
            assert "do not start" in str(dest.failure)
        await trio.aclose_forcefully(again.stream)
