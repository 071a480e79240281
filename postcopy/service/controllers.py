# SPDX-License-Identifier: Apache-2.0
"""The handlers of `postcopy source` and `postcopy dest`, each of which has one machine and ends with its migration."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import replace

import trio

from postcopy.errors import MigrationError, PostcopyError
from postcopy.machines import Machine
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.net import parse_address
from postcopy.service.commands import DestinationCommand, SourceCommand
from postcopy.service.handler import ControlHandler, Handler
from postcopy.service.report import Migration
from postcopy.service.schema import ControlError, Json, plain
from postcopy.wire import State

OVER = frozenset({State.COMPLETED, State.ABORTED, State.RECLAIMED})
CANCEL_POLL_S = 0.01


def changed(options: SourceOptions, settings: Json) -> SourceOptions:
    """The options with what `set` was given."""
    return replace(
        options,
        max_bandwidth_bytes_per_s=settings.get("max-bandwidth", options.max_bandwidth_bytes_per_s),
        bulk_channels=settings.get("bulk-channels", options.bulk_channels),
        recover_for_s=settings.get("recover-for", options.recover_for_s),
    )


def steer(migrations: list[Migration], pause: bool, to: str | None = None) -> Json:
    """Cuts or reconnects all of these that can be. `ControlError` when none can."""
    address = parse_address(to) if to is not None else None
    done: list[str] = []
    failure: PostcopyError | None = None
    for migration in migrations:
        try:
            if pause:
                migration.pause()
            else:
                migration.recover(address)
            done.append(migration.migration_id)
        except MigrationError as error:
            failure = error
    if not done:
        raise ControlError("NotNow", str(failure) if failure else "no migration is going on")
    return {"migrations": done}


async def reclaim(name: str, migration: SourceMigration, force: bool) -> Json:
    """Takes a machine back, or says what would be lost by it. `ControlError` where that cannot be."""
    try:
        migration.check_reclaimable()
        if not force:
            raise ControlError(
                "NotNow",
                f"{migration.reclaim_loses()}; were the destination alive, there would be two of it: if it is dead for"
                " good, say --force",
            )
        lost = await migration.reclaim()
    except MigrationError as error:
        raise ControlError("NotNow", f"{name}: {error}") from error
    return {"machine": name, "migration": migration.migration_id, "lost": lost}


class _SideHandler(ControlHandler):
    def handlers(self) -> Mapping[str, Handler]:
        return {
            "pause": self._pause,
            "recover": self._recover,
            "set": self._set,
            "cancel": self._cancel,
            "quit": self._quit,
        }

    async def _pause(self, arguments: Json) -> Json:
        await trio.lowlevel.checkpoint()
        return steer(self._going_on(arguments), True)

    async def _recover(self, arguments: Json) -> Json:
        await trio.lowlevel.checkpoint()
        return steer(self._going_on(arguments), False, arguments.get("to"))

    async def _set(self, arguments: Json) -> Json:
        await trio.lowlevel.checkpoint()
        self.change(arguments)
        return self.settings()

    @abc.abstractmethod
    def change(self, settings: Json) -> None:
        """Of those that `settings` names. `ControlError` for one that there is not."""

    def _going_on(self, arguments: Json) -> list[Migration]:
        name = arguments.get("machine")
        here = [item for item in self.machines() if name in (None, item[0])]
        if name is not None and not here:
            raise ControlError("BadArguments", f"there is no machine {name!r} here")
        return [migration for _, _, migration in here if migration is not None and migration.state not in OVER]

    async def _cancel(self, arguments: Json) -> Json:
        await trio.lowlevel.checkpoint()
        migrations = self._going_on(arguments)
        if not migrations:
            raise ControlError("NotNow", "no migration is going on")
        cancelled = [migration.migration_id for migration in migrations if migration.cancel()]
        if not cancelled:
            raise ControlError("NotNow", "the machine belongs to the destination already: that cannot be taken back")
        return {"cancelled": cancelled}

    async def _quit(self, arguments: Json) -> Json:
        await trio.lowlevel.checkpoint()
        while not arguments.get("force"):
            going_on = self._going_on({})
            decided = [migration for migration in going_on if not migration.cancellable]
            if decided and self._depended_on():
                raise ControlError(
                    "NotNow",
                    f"pages are still on their way ({decided[0].status}): wait, or quit with force and lose them",
                )
            if len(decided) == len(going_on):
                break
            # Given up first, and only then ended: it might be decided in this very moment, and lost with this process.
            for migration in going_on:
                migration.cancel()
            with trio.CancelScope(shield=True):  # it may be the last that this process does: the client is answered
                await trio.sleep(CANCEL_POLL_S)
        self.stop.set()
        return {}

    def _depended_on(self) -> bool:
        return True


class SourceHandler(_SideHandler):
    side = "source"

    def __init__(self, command: SourceCommand) -> None:
        super().__init__()
        self._command = command

    def settings(self) -> Json:
        options = self._command.options
        return {
            "max-bandwidth": options.max_bandwidth_bytes_per_s,
            "bulk-channels": options.bulk_channels,
            "recover-for": plain(options.recover_for_s),
        }

    def change(self, settings: Json) -> None:
        self._command.options = changed(self._command.options, settings)

    def handlers(self) -> Mapping[str, Handler]:
        return {**super().handlers(), "reclaim": self._reclaim}

    async def _reclaim(self, arguments: Json) -> Json:
        await trio.lowlevel.checkpoint()
        for migration in self._going_on(arguments):
            if isinstance(migration, SourceMigration):
                return await reclaim(migration.machine.kind, migration, bool(arguments.get("force")))
        raise ControlError("NotNow", "no migration is going on")

    def machines(self) -> list[tuple[str, Machine | None, Migration | None]]:
        machine = self._command.machine
        if machine is None:
            return []
        migrations: list[Migration | None] = [*self._command.migrations()]
        return [(machine.kind, machine, migration) for migration in migrations or [None]]

    def _depended_on(self) -> bool:
        return self._command.machine is not None and self._command.machine.live


class DestinationHandler(_SideHandler):
    side = "dest"

    def __init__(self, command: DestinationCommand) -> None:
        super().__init__()
        self._command = command

    def settings(self) -> Json:
        return {"recover-for": plain(self._command.recover_for_s)}

    def change(self, settings: Json) -> None:
        if others := settings.keys() - {"recover-for"}:
            raise ControlError("BadArguments", f"a destination has no {min(others)}: it is the source that pushes")
        if "recover-for" in settings:
            self._command.recover_for_s = settings["recover-for"]

    def machines(self) -> list[tuple[str, Machine | None, Migration | None]]:
        migration = self._command.migration
        if migration is None:
            return []
        machine = migration.machine
        return [(machine.kind if machine else "unknown", machine, migration)]
