# SPDX-License-Identifier: Apache-2.0
"""What may be asked of a running process through its control socket, whichever policy it follows. What only one of them
can do it says itself (`Service.requests`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import trio

from postcopy.errors import MigrationError, PostcopyError
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.source import SourceMigration
from postcopy.net import parse_address
from postcopy.service import schema
from postcopy.service.report import Json, Migration
from postcopy.service.schema import COMMANDS, SETTINGS, ControlError, plain
from postcopy.service.service import Owned, Request, Service
from postcopy.service.status import machine_status

CANCEL_POLL_S = 0.01


class ControlHandler:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._requests: Mapping[str, Request] = {
            "commands": self._commands,
            "status": self._status,
            "migrate-pause": self._pause,
            "migrate-recover": self._recover,
            "set": self._set,
            "migrate-cancel": self._cancel,
            "quit": self._quit,
            **({"reclaim": self._reclaim} if service.pushes else {}),
            **service.requests(),
        }

    async def execute(self, request: schema.Request) -> Json:
        """For `ControlServer`."""
        await trio.lowlevel.checkpoint()
        handler = self._requests.get(request.command)
        if handler is None:
            called = {
                "source": "a source that migrates once: `postcopy source --hold` takes orders",
                "dest": "a destination",
            }.get(self._service.side, f"a {self._service.side}")
            raise ControlError("CommandNotFound", f"{request.command} has no meaning for {called}")
        return await handler(request.arguments)

    async def _commands(self, arguments: Json) -> Json:
        known = {"events", *self._requests}
        return {
            "commands": [
                {"name": name, "help": command.help, "arguments": list(command.arguments)}
                for name, command in COMMANDS.items()
                if name in known
            ]
        }

    async def _status(self, arguments: Json) -> Json:
        return process_status(self._service, arguments.get("machine"))

    def _undecided(self, name: str | None = None) -> list[tuple[Owned, Migration]]:
        """The migrations that have not come to their end, of all machines or of the one that is named."""
        here = [owned for owned in self._service.machines if name in (None, owned.name)]
        if name is not None and not here:
            raise ControlError("BadArguments", f"there is no machine {name!r} here")
        return [(owned, owned.undecided) for owned in here if owned.undecided is not None]

    async def _pause(self, arguments: Json) -> Json:
        return _all_that_can(self._undecided(arguments.get("machine")), lambda migration: migration.pause())

    async def _recover(self, arguments: Json) -> Json:
        undecided = self._undecided(arguments.get("machine"))
        if "to" in arguments and len(undecided) > 1:
            raise ControlError("BadArguments", "say which machine's migration has a new address")
        address = parse_address(arguments["to"]) if "to" in arguments else None
        return _all_that_can(undecided, lambda migration: migration.recover(address))

    async def _set(self, arguments: Json) -> Json:
        if not self._service.pushes and (others := arguments.keys() - {"recover-for"}):
            raise ControlError("BadArguments", f"a destination has no {min(others)}: it is the source that pushes")
        given = {option.key: arguments[option.name] for option in SETTINGS if option.name in arguments}
        self._service.set_options(replace(self._service.options, **given))
        return settings(self._service)

    async def _cancel(self, arguments: Json) -> Json:
        undecided = self._undecided(arguments.get("machine"))
        if not undecided:
            raise ControlError("NotNow", "no migration is going on")
        named = self._service.names_machines
        cancelled = [
            owned.name if named else migration.migration_id for owned, migration in undecided if migration.cancel()
        ]
        if not cancelled:
            raise ControlError("NotNow", "the machine belongs to the destination already: that cannot be taken back")
        return {"cancelled": cancelled}

    async def _reclaim(self, arguments: Json) -> Json:
        """Takes a machine back, or says what would be lost by it."""
        here = self._service.machines
        if "machine" in arguments or len(here) == 1:
            owned = find(here, arguments.get("machine"))
        elif lost := [one for one in here if one.lost]:
            owned = _only(lost)
        else:
            raise ControlError("NotNow", "no machine is here whose destination was lost past its point of no return")
        migration = owned.moving
        if not isinstance(migration, SourceMigration):
            raise ControlError("NotNow", f"{owned.name} has not been sent away")
        try:
            migration.check_reclaimable()
            if not arguments.get("force"):
                raise ControlError(
                    "NotNow",
                    f"{migration.reclaim_loses()}; were the destination alive, there would be two of it: if it is dead"
                    " for good, say --force",
                )
            lost_there = await migration.reclaim()
        except MigrationError as error:
            raise ControlError("NotNow", f"{owned.name}: {error}") from error
        return {"machine": owned.name, "migration": migration.migration_id, "lost": lost_there}

    async def _quit(self, arguments: Json) -> Json:
        """Of a process that ends with its one migration."""
        while not arguments.get("force"):
            undecided = [migration for _, migration in self._undecided()]
            decided = [migration for migration in undecided if not migration.cancellable]
            # (the destination of an image can fetch it again)
            if any(isinstance(one, DestinationMigration) or one.machine.live for one in decided):
                raise ControlError(
                    "NotNow",
                    f"pages are still on their way ({decided[0].status}): wait, or quit with force and lose them",
                )
            if len(decided) == len(undecided):
                break
            # Given up first, and only then ended: it might be decided in this very moment, and lost with this process.
            for migration in undecided:
                migration.cancel()
            with trio.CancelScope(shield=True):  # it may be the last that this process does: the client is answered
                await trio.sleep(CANCEL_POLL_S)
        self._service.stop.set()
        return {}


def process_status(service: Service, name: str | None = None) -> Json:
    """Of the process and all machines, or of the one with this name."""
    machines = [machine_status(*row) for row in service.rows() if name in (None, row[0])]
    if name is not None and not machines:
        raise ControlError("BadArguments", f"there is no machine {name!r} here")
    return {
        "side": service.side,
        "pid": os.getpid(),
        "listening": [str(address) for address in service.listening],
        "settings": settings(service),
        "machines": machines,
    }


def settings(service: Service) -> Json:
    """What `set` can change."""
    return {
        option.name: plain(getattr(service.options, option.key))
        for option in SETTINGS
        if service.pushes or option.name == "recover-for"
    }


def find(machines: Sequence[Owned], name: str | None) -> Owned:
    """The machine of this name, or without one the only one. `ControlError` when there is none."""
    here = [owned for owned in machines if not owned.has_left]
    found = [owned for owned in here if (owned.name == name if name else owned.shown is not None)]
    if not found:
        raise ControlError("BadArguments", f"there is no machine {name!r} here" if name else "no machine is here")
    return _only(found)


def _only(found: Sequence[Owned]) -> Owned:
    if len(found) > 1:
        raise ControlError("BadArguments", f"which of them? {', '.join(owned.name for owned in found)}")
    return found[0]


def _all_that_can(migrations: list[tuple[Owned, Migration]], do: Callable[[Migration], None]) -> Json:
    """`ControlError` when none can."""
    done: list[str] = []
    failure: PostcopyError | None = None
    for _, migration in migrations:
        try:
            do(migration)
            done.append(migration.migration_id)
        except MigrationError as error:
            failure = error
    if not done:
        raise ControlError("NotNow", str(failure) if failure else "no migration is going on")
    return {"migrations": done}
