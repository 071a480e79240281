# SPDX-License-Identifier: Apache-2.0
"""What may be asked of a running process through its control socket, whichever policy it follows. What only one of them
can do it says itself (`Service.requests`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import trio

from postcopy.errors import ConfigurationError, MigrationError, PostcopyError
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.net import Address, check_reachable, parse_address
from postcopy.records import Record
from postcopy.records.control import (
    AllSteered,
    Command,
    Commands,
    Done,
    ProcessStatus,
    Reclaimed,
    Settings,
    Steered,
)
from postcopy.service import report, schema
from postcopy.service.options import Option
from postcopy.service.report import Json, Migration
from postcopy.service.schema import COMMANDS, SETTINGS, ControlError
from postcopy.service.service import Owned, Request, Service


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
            **({"reclaim": self._reclaim, "switchover": self._switchover} if service.pushes else {}),
            **service.requests(),
        }

    async def execute(self, request: schema.Request) -> Record:
        """For `ControlServer`."""
        await trio.lowlevel.checkpoint()
        handler = self._requests.get(request.command)
        if handler is None:
            called = {
                "source": "a source that migrates once (see `postcopy source --hold`)",
                "dest": "a destination",
            }.get(self._service.side, f"a {self._service.side}")
            raise ControlError("CommandNotFound", f"{request.command} has no meaning for {called}")
        return await handler(request.arguments)

    async def _commands(self, arguments: Json) -> Commands:
        known = {"events", *self._requests}
        return Commands(
            commands=[
                Command(name=name, help=command.help, arguments=list(command.arguments))
                for name, command in COMMANDS.items()
                if name in known
            ]
        )

    async def _status(self, arguments: Json) -> ProcessStatus:
        return process_status(self._service, arguments.get("machine"))

    def _undecided(self, name: str | None = None) -> list[tuple[Owned, Migration]]:
        """The migrations that have not come to their end, of all machines or of the one that is named."""
        here = [owned for owned in self._service.machines if name in (None, owned.name)]
        if name is not None and not here:
            raise no_machine(name)
        return [(owned, owned.undecided) for owned in here if owned.undecided is not None]

    async def _pause(self, arguments: Json) -> AllSteered:
        return _all_that_can(self._undecided(arguments.get("machine")), lambda migration: migration.pause())

    async def _recover(self, arguments: Json) -> AllSteered:
        address, hostname = None, arguments.get("tls-hostname")
        undecided = self._undecided(arguments.get("machine"))
        if "to" in arguments:
            if len(undecided) > 1:
                names = ", ".join(owned.name for owned, _ in undecided)
                raise ControlError("BadArguments", f"several migrations: {names}; choose with --machine NAME")
            address = await peer_address(self._service, arguments)
        elif hostname is not None:
            raise ControlError("BadArguments", "tls-hostname goes with a new address")
        return _all_that_can(undecided, lambda migration: migration.recover(address, hostname))

    async def _set(self, arguments: Json) -> Settings:
        given = given_by_key(SETTINGS, arguments)
        if "machine" in arguments:
            if others := given.keys() - {"precopy_s", "max_downtime_s", "push_after_s"}:
                name = next(option.name for option in SETTINGS if option.key in others)
                raise ControlError("BadArguments", f"{name} is of the process: leave --machine out")
            owned = find(self._service.machines, arguments["machine"])
            try:
                owned.set_sending(given)
            except MigrationError as error:
                raise ControlError("NotNow", str(error)) from error
            return settings(self._service, owned.sending)
        if not self._service.pushes and (others := arguments.keys() - {"recover-for"}):
            raise ControlError("BadArguments", f"a destination has no {min(others)}: it is the source that pushes")
        self._service.set_options(given)
        return settings(self._service)

    async def _switchover(self, arguments: Json) -> AllSteered:
        undecided = self._undecided(arguments.get("machine"))
        if not undecided:
            raise ControlError("NotNow", "no migration is going on")
        return _all_that_can(undecided, _switch_over)

    async def _cancel(self, arguments: Json) -> AllSteered:
        name = arguments.get("machine")
        here = [owned for owned in self._service.machines if name in (None, owned.name)]
        undecided = [owned for owned in here if owned.is_begun_again] + [owned for owned, _ in self._undecided(name)]
        if not undecided:
            raise ControlError("NotNow", "no migration is going on")
        cancelled = [_steered(owned) for owned in undecided if owned.cancel()]
        if not cancelled:
            raise ControlError("NotNow", "the machine belongs to the destination already: that cannot be taken back")
        return AllSteered(migrations=cancelled)

    async def _reclaim(self, arguments: Json) -> Reclaimed:
        """Takes a machine back, or says what would be lost by it."""
        if self._service.stop.is_set():
            raise ControlError("NotNow", "this process was asked to end, and the machine would end with it")
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
        return Reclaimed(machine=owned.name, migration_id=migration.migration_id, lost=lost_there)

    async def _quit(self, arguments: Json) -> Done:
        service = self._service
        if arguments.get("force"):
            service.stop.insist()
        elif lost := service.lost_by_quitting():
            elsewhere = ", migrate or end the machine" if service.names_machines else ""
            raise ControlError("NotNow", f"{lost}: wait{elsewhere}, or say quit --force, which loses it")
        else:
            service.stop.set()
        return Done()


async def peer_address(service: Service, arguments: Json) -> Address:
    """The address that a request names. `ControlError` for one that may only be connected to under TLS."""
    if "tls-hostname" in arguments and service.protection.credentials is None:
        raise ControlError("BadArguments", "tls-hostname: this process was started without --tls")
    address = parse_address(arguments["to"])
    try:
        await check_reachable(address, service.protection)
    except ConfigurationError as error:
        raise ControlError("BadArguments", str(error)) from error
    return address


def process_status(service: Service, name: str | None = None) -> ProcessStatus:
    """Of the process and all machines, or of the one with this name."""
    machines = [report.machine_status(*row) for row in service.rows() if name in (None, row[0])]
    if name is not None and not machines:
        raise no_machine(name)
    return ProcessStatus(
        side=service.side,
        pid=os.getpid(),
        listening=[str(address) for address in service.listening],
        settings=settings(service),
        certificates=report.certificates(service.protection) or None,
        machines=machines,
    )


def settings(service: Service, of: SourceOptions | None = None) -> Settings:
    """What `set` can change: of the process, or of one migration."""
    options = service.options if of is None else of
    now = {option.name: option.to_json(getattr(options, option.key)) for option in SETTINGS}
    if not service.pushes:
        return Settings(recover_for=now["recover-for"])
    return Settings(mode=options.mode.value, **{name.replace("-", "_"): value for name, value in now.items()})


def given_by_key(known: Iterable[Option], arguments: Json) -> Json:
    """By the names of the records' fields."""
    return {option.key: arguments[option.name] for option in known if option.name in arguments}


def find(machines: Sequence[Owned], name: str | None) -> Owned:
    """The machine of this name, or without one the only one. `ControlError` when there is none."""
    here = [owned for owned in machines if not owned.has_left]
    found = [owned for owned in here if (owned.name == name if name else owned.shown is not None)]
    if not found:
        raise no_machine(name)
    return _only(found)


def no_machine(name: str | None) -> ControlError:
    """None of this name, or none at all."""
    return ControlError("BadArguments", f"there is no machine {name!r} here" if name else "no machine is here")


def _only(found: Sequence[Owned]) -> Owned:
    if len(found) > 1:
        names = ", ".join(owned.name for owned in found)
        raise ControlError("BadArguments", f"several machines: {names}; choose with --machine NAME")
    return found[0]


def _steered(owned: Owned) -> Steered:
    assert owned.migration is not None
    return Steered(machine=owned.name, migration_id=owned.migration.migration_id)


def _switch_over(migration: Migration) -> None:
    if not isinstance(migration, SourceMigration):
        raise MigrationError("the machine comes from another host: it is its source that switches over")
    migration.switch_over()


def _all_that_can(migrations: list[tuple[Owned, Migration]], do: Callable[[Migration], None]) -> AllSteered:
    """`ControlError` when none can."""
    done: list[Steered] = []
    failure: PostcopyError | None = None
    for owned, migration in migrations:
        try:
            do(migration)
            done.append(_steered(owned))
        except MigrationError as error:
            failure = error
    if not done:
        raise ControlError("NotNow", str(failure) if failure else "no migration is going on")
    return AllSteered(migrations=done)
