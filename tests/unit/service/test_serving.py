# SPDX-License-Identifier: Apache-2.0
"""A source that listens ends when it has served as many as were asked for, whatever becomes of the others."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import trio
import trio.testing

from postcopy.errors import MigrationError
from postcopy.machines import Machine
from postcopy.machines.kinds import MachineOptions
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.output import Output
from postcopy.records.control import AllSteered, Steered
from postcopy.service import service as service_module
from postcopy.service.config import ArrivalOptions, DestinationConfig, SourceConfig
from postcopy.service.control import ControlHandler
from postcopy.service.destination import Destination
from postcopy.service.schema import Request
from postcopy.service.service import Owned, Phase
from postcopy.service.source import Source
from postcopy.wire import State


class Engine:
    """A migration to a destination that comes back, and is lost again when the other one has been served."""

    lost = trio.Event()
    migration_id = machine_name = peer = ""
    attempt, may_try_again, ready_ns = 1, False, 0
    recorder = None

    def __init__(self, machine: Machine, link: Any, options: Any, *, peer: Any, on_change: Callable[[], None]) -> None:
        self.machine = machine
        self.link = link
        self.state = State.RECOVER
        self.status = "postcopy-recover"
        self.failure: MigrationError | None = None
        self.may_run = False
        self.paused = trio.Event()
        self._on_change = on_change

    async def run(self, go: trio.Event, stop: trio.Event, *, keep: bool) -> None:
        if self.link.peer == "served":
            self.state = State.COMPLETED
            return
        await self.lost.wait()
        self.state, self.failure = State.PAUSED, MigrationError("lost")
        self._on_change()
        await stop.wait()


async def test_one_that_is_lost_when_all_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "SourceMigration", Engine)
    monkeypatch.setattr(Engine, "lost", trio.Event())
    monkeypatch.setattr("postcopy.service.report.ended", lambda *_: {})
    links = [Mock(peer="comes back"), Mock(peer="served")]

    async def next_link() -> Any:
        await trio.testing.wait_all_tasks_blocked()
        if not links:
            await trio.sleep_forever()
        return links.pop(0)

    config = SourceConfig("image", MachineOptions(), SourceOptions())
    source = Source(config, Output(False, None, io.StringIO()))
    machine = Mock(spec=Machine, live=False, outlives=False, process=None, kind="image")
    source.machines.append(Owned("image", Phase.HERE, machine))
    done = False
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                nonlocal done
                done = await source._serve(machine, Mock(next_link=next_link))

            nursery.start_soon(serve)
            while links or source._completed < 1:
                await trio.testing.wait_all_tasks_blocked()
            await trio.testing.wait_all_tasks_blocked()
            Engine.lost.set()
    assert done


@pytest.mark.parametrize("kind", [SourceMigration, DestinationMigration])
async def test_cancel_answers_with_what_it_was_for(kind: Any) -> None:
    output = Output(False, io.StringIO(), io.StringIO())
    config = SourceConfig("image", MachineOptions(), SourceOptions())
    service = (
        Source(config, output) if kind is SourceMigration else Destination(DestinationConfig(ArrivalOptions()), output)
    )
    owned = Owned("rv64", Phase.LEAVING if kind is SourceMigration else Phase.ARRIVING)
    owned.migration = Mock(spec=kind, migration_id="ff", state=State.READY)
    service.machines.append(owned)
    cancelled = await ControlHandler(service).execute(Request("migrate-cancel", {}))
    assert cancelled == AllSteered(migrations=[Steered(machine="rv64", migration_id="ff")])
