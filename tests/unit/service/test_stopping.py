# SPDX-License-Identifier: Apache-2.0
"""What a service says and does from the first signal on, with migrations that stand where a test puts them."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from unittest.mock import Mock

import pytest
import trio
import trio.testing

from postcopy._stop import INSIST_S, TOGETHER_S
from postcopy.machines import Machine, MachineState
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.migration.statistics import Statistics
from postcopy.output import Output
from postcopy.service import report
from postcopy.service.config import ArrivalOptions, DaemonConfig
from postcopy.service.daemon import Daemon
from postcopy.service.service import Owned, Phase
from postcopy.wire import State

pytestmark = pytest.mark.usefixtures("autojump_clock")


class Stopping:
    """A daemon to which machines come, and that is asked to end."""

    def __init__(self) -> None:
        self._said = io.StringIO()
        self.daemon = Daemon(DaemonConfig(SourceOptions(), ArrivalOptions()), Output(False, None, self._said))

    def arriving(self, name: str) -> Owned:
        """One whose pages are missing."""
        owned = self.daemon._add(name, Phase.ARRIVING)
        machine = Mock(spec=Machine, live=True, outlives=False)
        machine.statistics.return_value.state = MachineState.RUNNING
        owned.migration = Mock(
            spec=DestinationMigration, machine=machine, state=State.POSTCOPY, status="postcopy-active",
            cancellable=False, may_run=True, complete=False, migration_id="ff", peer="192.0.2.1:1", failure=None,
        )  # fmt: skip
        owned.migration.statistics.return_value = Mock(spec=Statistics, remaining_bytes=5 << 20)
        return owned

    async def arrived(self, owned: Owned) -> None:
        assert isinstance(owned.migration, Mock)
        owned.machine = owned.migration.machine
        owned.migration.state, owned.phase = State.COMPLETED, Phase.HERE
        self.daemon.changed()
        await trio.testing.wait_all_tasks_blocked()

    async def ask(self, by: str = "Ctrl-C") -> bool:
        """Whether it would be ended from outside."""
        await trio.sleep(2 * TOGETHER_S)
        from_outside = self.daemon.stop.ask(by)
        await trio.testing.wait_all_tasks_blocked()
        return from_outside

    def said(self) -> list[str]:
        """Since it was looked at last."""
        lines = self._said.getvalue().splitlines()
        self._said.seek(0)
        self._said.truncate()
        return lines


@pytest.fixture
def stopping() -> Callable[[], AbstractAsyncContextManager[Stopping]]:
    @asynccontextmanager
    async def run() -> Any:
        one = Stopping()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.daemon.see_through)
            yield one
            nursery.cancel_scope.cancel()

    return run


Start = Callable[[], AbstractAsyncContextManager[Stopping]]
STILL = "5 MiB have not arrived"


async def test_insisting(stopping: Start) -> None:
    async with stopping() as one:
        a = one.arriving("a")
        assert not await one.ask("SIGTERM")
        assert one.said() == [f"daemon: Still needed: a: {STILL}. SIGTERM again within 10 s abandons the machine."]
        assert not a.stop.is_set()
        assert not await one.ask()
        assert one.said() == [f"daemon: Abandoning what was still needed: a: {STILL}"]
        assert a.stop.is_set()
        assert await one.ask()


async def test_later(stopping: Start, autojump_clock: trio.abc.Clock) -> None:
    async with stopping() as one:
        one.arriving("a")
        one.arriving("b")
        one.daemon._add("c", Phase.HERE)
        for _ in range(3):
            assert not await one.ask()
            (line,) = one.said()
            assert line == (
                f"daemon: Still needed: a: {STILL}; b: {STILL}. Ctrl-C again within 10 s abandons these machines."
            )
            await trio.sleep(INSIST_S)
        assert not one.daemon.stop.insisted


async def test_when_it_has_arrived_nothing_is_left_to_insist_on(stopping: Start) -> None:
    """A signal that comes then ends the command, as it does where nothing was ever missing."""
    async with stopping() as one:
        a = one.arriving("a")
        assert not await one.ask()
        await one.arrived(a)
        assert await one.ask()
        assert not one.daemon.stop.insisted
        assert not one.daemon.abandoned


async def test_one_of_two_has_arrived(stopping: Start) -> None:
    async with stopping() as one:
        a, b = one.arriving("a"), one.arriving("b")
        assert not await one.ask()
        one.said()
        await one.arrived(a)
        assert not await one.ask()  # insists on the end of the other one
        assert one.said() == [f"daemon: Abandoning what was still needed: b: {STILL}"]
        assert b.stop.is_set()


async def test_something_is_needed_only_later(stopping: Start) -> None:
    """Decided in the moment of the signal: it is said as soon as it is known, and no second signal ends it before."""
    async with stopping() as one:
        a = one.arriving("a")
        await one.arrived(a)
        assert not await one.ask()
        assert one.said() == []
        b = one.arriving("b")
        one.daemon.changed()
        await trio.testing.wait_all_tasks_blocked()
        assert one.said() == [f"daemon: Still needed: b: {STILL}. Ctrl-C again within 10 s abandons the machine."]
        assert not b.stop.is_set()
        assert not await one.ask()
        assert one.daemon.stop.insisted


async def test_a_machine_that_fails_meanwhile(stopping: Start) -> None:
    """It does not run anywhere: nothing of it is needed."""
    async with stopping() as one:
        a = one.arriving("a")
        assert not await one.ask()
        assert not a.stop.is_set()
        assert a.shown is not None
        a.shown.statistics().state = MachineState.FAILED  # type: ignore[misc]
        one.daemon.changed()
        await trio.testing.wait_all_tasks_blocked()
        assert a.stop.is_set()


async def test_what_is_announced(stopping: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each status once, whatever else changes; of each machine."""
    told: list[tuple[str, str, str]] = []

    def changed(name: str, job: Any, before: str) -> Any:
        told.append((name, before, job.status))
        return Mock()

    monkeypatch.setattr(report, "changed", changed)
    async with stopping() as one:
        monkeypatch.setattr(one.daemon.output, "emit", lambda *_: None)
        a = one.arriving("a")
        for _ in range(2):
            one.daemon.changed()
        one.arriving("b")
        assert isinstance(a.migration, Mock)
        a.migration.status = "postcopy-paused"
        for _ in range(2):
            one.daemon.changed()
    assert told == [
        ("a", "", "postcopy-active"), ("a", "postcopy-active", "postcopy-paused"), ("b", "", "postcopy-active"),
    ]  # fmt: skip


async def test_a_push_is_held_back_no_longer(stopping: Callable[[], AbstractAsyncContextManager[Stopping]]) -> None:
    """All of the machine has to be there before the process can end."""
    async with stopping() as one:
        owned = one.daemon._add("vm1", Phase.LEAVING)
        owned.sending = SourceOptions(push_after_s=math.inf)
        owned.migration = job = Mock(
            spec=SourceMigration, state=State.POSTCOPY, status="postcopy-active", cancellable=False, may_run=False,
            committed_ns=1, ready_ns=1, paused_ns=1, migration_id="ff", peer="192.0.2.1:1", failure=None,
        )  # fmt: skip
        job.statistics.return_value = Mock(spec=Statistics, remaining_bytes=5 << 20)
        await trio.testing.wait_all_tasks_blocked()
        job.set_push_after.assert_not_called()
        await one.ask()
        job.set_push_after.assert_called_once_with(0.0)
