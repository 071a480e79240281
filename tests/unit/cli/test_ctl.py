# SPDX-License-Identifier: Apache-2.0
"""What `postcopy ctl` shows of a migration that it waits for."""

from __future__ import annotations

import io
import json
from typing import Any, cast

import pytest
import trio

from postcopy.cli.ctl import CtlCommand
from postcopy.errors import MigrationError
from postcopy.output import Output
from postcopy.service.client import ControlClient

OF = {"migration-id": "ff", "direction": "outgoing", "machine": "one", "peer": "192.0.2.7:7777", "error": None}
ENDED = {"status": "completed", "downtime-ms": 24.71, "total-ms": 219.2}


class Client:
    """A process that sends the machine `one` away."""

    def __init__(self, *events: tuple[str, dict[str, Any]]) -> None:
        self._events = [{"event": event, "data": data} for event, data in events]

    async def execute(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"machine": "one", "migration-id": "ff"}

    async def next_event(self) -> dict[str, Any]:
        await trio.testing.wait_all_tasks_blocked()  # what there is to show is shown
        return self._events.pop(0)


async def migrate(*events: tuple[str, dict[str, Any]], **given: Any) -> str:
    stderr = io.StringIO()
    command = CtlCommand({"request": "migrate", "control": "x", **given}, Output(False, io.StringIO(), stderr))
    try:
        assert await command._migrate(cast(ControlClient, Client(*events)))
    finally:
        command._output.close()
    return stderr.getvalue()


async def test_progress_of_a_migration(capsys: pytest.CaptureFixture[str]) -> None:
    ram = {"total": 64 << 20, "page-size": 4096, "transferred": 16 << 20, "demand-pages": 96, "background-pages": 4000}
    job = OF | {"status": "postcopy-active", "ram": ram}
    guest = {"state": "paused", "operations": 7}
    machines = [{"name": "one", "memory": 64 << 20, "guest": guest, "migration": job}]
    text = await migrate(
        ("migration-status", OF | {"status": "active"}),
        ("migration-status", OF | {"status": "failed", "direction": "incoming"}),  # sent to where it is
        ("progress", {"side": "daemon", "machines": machines}),
        ("migration-status", OF | {"status": "postcopy-active"}),
        ("migration-status", OF | {"status": "postcopy-paused", "error": "the cable is out"}),
        ("migration-ended", OF | ENDED),
    )
    lines = text.splitlines()
    assert lines[0].startswith("one: connecting to the destination; time: ")
    assert any(
        line.startswith("one: sending pages; the machine runs at the destination; memory: 25 %, 16 MiB of 64 MiB;")
        and "; pages: 96 on demand, 4000 in background" in line
        for line in lines
    )
    assert "one: postcopy-paused: the cable is out" in lines
    assert capsys.readouterr().out == "one has moved to 192.0.2.7:7777: downtime 24.7 ms, total time 219 ms\n"


async def test_json_of_a_migration(capsys: pytest.CaptureFixture[str]) -> None:
    assert await migrate(("migration-ended", OF | ENDED), json=True) == ""
    assert json.loads(capsys.readouterr().out) == OF | ENDED


async def test_migration_that_fails() -> None:
    with pytest.raises(MigrationError, match="one has not moved: failed: no such host"):
        await migrate(("migration-ended", OF | {"status": "failed", "error": "no such host"}))
