# SPDX-License-Identifier: Apache-2.0
"""What `postcopy ctl` shows of a migration that it waits for."""

from __future__ import annotations

import io
from typing import Any, cast

import pytest

from postcopy.cli.ctl import CtlCommand
from postcopy.errors import MigrationError
from postcopy.output import Output
from postcopy.service.client import ControlClient


class Client:
    """A process that sends the machine `one` away."""

    def __init__(self, *events: tuple[str, dict[str, Any]]) -> None:
        of = {"migration": "ff", "direction": "outgoing", "machine": "one", "peer": "192.0.2.7:7777", "error": None}
        self._events = [{"event": event, "data": of | data} for event, data in events]

    async def execute(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"migration": "ff"}

    async def next_event(self) -> dict[str, Any]:
        return self._events.pop(0)


async def migrate(*events: tuple[str, dict[str, Any]]) -> str:
    stderr = io.StringIO()
    command = CtlCommand({"request": "migrate", "control": "x"}, Output(False, io.StringIO(), stderr))
    try:
        assert await command._migrate(cast(ControlClient, Client(*events)))
    finally:
        command._output.close()
    return stderr.getvalue()


async def test_progress_of_a_migration(capsys: pytest.CaptureFixture[str]) -> None:
    text = await migrate(
        ("migration-status", {"status": "active"}),
        ("migration-status", {"status": "active", "direction": "incoming"}),  # sent to where it is
        ("migration-status", {"status": "postcopy-paused", "error": "the cable is out"}),
        ("migration-ended", {"status": "completed", "downtime-ms": 24.71, "total-ms": 219.2}),
    )
    assert text.splitlines() == ["one: active", "one: postcopy-paused: the cable is out"]
    assert capsys.readouterr().out.startswith("one has moved to 192.0.2.7:7777: down for 24.7 ms")


async def test_migration_that_fails() -> None:
    with pytest.raises(MigrationError, match="one: failed: no such host"):
        await migrate(("migration-ended", {"status": "failed", "error": "no such host"}))
