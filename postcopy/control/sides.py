# SPDX-License-Identifier: Apache-2.0
"""The desks of `postcopy source` and `postcopy dest`, each of which has one machine and ends with its migration."""

from __future__ import annotations

from collections.abc import Mapping

import trio

from postcopy.commands import DestinationCommand, SourceCommand
from postcopy.machines import Machine
from postcopy.migration.protocol import State

from .desk import Desk, Handler
from .schema import ControlError, Json
from .status import Migration

UNDECIDED = frozenset(
    {State.SETUP, State.OFFERED, State.CHANNELS, State.READY, State.SWITCHOVER, State.HANDED, State.PREPARED}
)
"""States in which a migration can be given up without loss."""
OVER = frozenset({State.COMPLETED, State.ABORTED})


class _SideDesk(Desk):
    def handlers(self) -> Mapping[str, Handler]:
        return {"cancel": self._cancel, "quit": self._quit}

    def _going_on(self) -> list[Migration]:
        return [
            migration for _, _, migration in self.machines() if migration is not None and migration.state not in OVER
        ]

    async def _cancel(self, arguments: Json) -> Json:
        await trio.lowlevel.checkpoint()
        migrations = self._going_on()
        if not migrations:
            raise ControlError("NotNow", "no migration is going on")
        undecided = [migration for migration in migrations if migration.state in UNDECIDED]
        if not undecided:
            raise ControlError("NotNow", "the machine belongs to the destination already: that cannot be taken back")
        for migration in undecided:
            self._give_up(migration)
        return {"cancelled": [migration.migration_id for migration in undecided]}

    def _give_up(self, migration: Migration) -> None:
        self.stop.set()

    async def _quit(self, arguments: Json) -> Json:
        await trio.lowlevel.checkpoint()
        needed = [migration for migration in self._going_on() if migration.state not in UNDECIDED]
        if needed and not arguments.get("force") and self._depended_on():
            raise ControlError(
                "NotNow", f"pages are still on their way ({needed[0].status}): wait, or quit with force and lose them"
            )
        self.stop.set()
        return {}

    def _depended_on(self) -> bool:
        return True


class SourceDesk(_SideDesk):
    side = "source"

    def __init__(self, command: SourceCommand) -> None:
        super().__init__()
        self._command = command

    def machines(self) -> list[tuple[str, Machine | None, Migration | None]]:
        machine = self._command.machine
        if machine is None:
            return []
        migrations: list[Migration | None] = [*self._command.migrations()]
        return [(machine.kind, machine, migration) for migration in migrations or [None]]

    def _give_up(self, migration: Migration) -> None:
        for own in self._command.migrations():
            if own is migration:
                self._command.cancel(own)

    def _depended_on(self) -> bool:
        return self._command.machine is not None and self._command.machine.live


class DestinationDesk(_SideDesk):
    side = "dest"

    def __init__(self, command: DestinationCommand) -> None:
        super().__init__()
        self._command = command

    def machines(self) -> list[tuple[str, Machine | None, Migration | None]]:
        migration = self._command.migration
        if migration is None:
            return []
        machine = migration.machine
        return [(machine.kind if machine else "unknown", machine, migration)]
