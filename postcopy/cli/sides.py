# SPDX-License-Identifier: Apache-2.0
"""`postcopy source`, `dest` and `daemon`: from what was given to the service that runs."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

from postcopy._stop import Stop
from postcopy.errors import ConfigurationError
from postcopy.machines.kinds import MachineOptions, is_live
from postcopy.migration.source import SourceOptions
from postcopy.output import Output
from postcopy.service import options
from postcopy.service.config import (
    ArrivalOptions,
    DaemonConfig,
    DestinationConfig,
    OperatingOptions,
    Origin,
    SourceConfig,
)
from postcopy.service.options import default_control, record
from postcopy.service.service import Service

Run = Callable[[Stop], Awaitable[bool]]
KEEPS_MACHINES = True
"""A closed terminal does not end them."""


def make(given: dict[str, Any], output: Output) -> Run:
    command = given["command"]
    if command == "source":
        _check_source(given)
    if command == "dest":
        service = _dest(given, output)
    elif command == "daemon" or "hold" in given:
        if "control" not in given:
            if "user" in given:
                raise ConfigurationError("--user: say --control PATH, in a directory that this user may write to")
            given["control"] = default_control()
        service = _daemon(given, output)
    else:
        service = _source(given, output)
    operating = record(OperatingOptions, given)
    run = service.run
    if operating != OperatingOptions() or os.environ.get("NOTIFY_SOCKET"):
        from postcopy.service.operation import Operation  # megabytes that no other command needs

        run = Operation(service, operating, output).run

    async def run_protected(stop: Stop) -> bool:
        """What is wrong with the certificates is said before anything has begun."""
        await service.protection.load(listens="listen" in given, connects="listen" not in given)
        return await run(stop)

    return run_protected


def _source(given: dict[str, Any], output: Output) -> Service:
    from postcopy.service.source import Source

    config = record(
        SourceConfig,
        {"kind": "", **given},
        machine=record(MachineOptions, given),
        migration=_sending(given),
        origin=record(Origin, given) if "path" in given else None,
    )
    return Source(config, output)


def _sending(given: dict[str, Any]) -> SourceOptions:
    sending = options.sending(given)
    options.check_sending(given, sending, given.get("kind", ""))
    return sending


def _dest(given: dict[str, Any], output: Output) -> Service:
    from postcopy.service.destination import Destination

    _check_loads(given, "firecracker", (options.API_SOCKET, options.FIRECRACKER), "was started and told nothing yet")
    _check_loads(given, "qemu", (options.QMP, options.QEMU), "was started with -incoming defer -S")
    if given.get("takes") == "program" and "preload" not in given:
        raise ConfigurationError("--machine program: say --preload PATH of one that postcopy run --lazy has started")
    processes = [option for option in _PROCESSES if option.key in given]
    for option in (options.RUN_FOR, options.DUMP, options.VERIFY):
        if processes and given.get(option.key):
            raise ConfigurationError(
                f"--{option.name} does not go with --{processes[0].name}: the machine is a process of its own, which"
                " runs on when it is here, and this command ends"
            )
    return Destination(record(DestinationConfig, given, arrival=record(ArrivalOptions, given)), output)


_PROCESSES = (options.API_SOCKET, options.FIRECRACKER, options.QMP, options.QEMU, options.PRELOAD)
"""They say which process a machine becomes that comes."""


def _check_loads(given: dict[str, Any], kind: str, ways: tuple[options.Option, options.Option], which: str) -> None:
    loads = [option for option in ways if option.key in given]
    if len(loads) > 1 or (given.get("takes") == kind and not loads):
        there, start = ways
        raise ConfigurationError(
            f"--machine {kind}: say where it is loaded, --{there.name} {there.metavar} of one that {which}, or"
            f" --{start.name} {start.metavar} to have it started; one of both"
        )


def _daemon(given: dict[str, Any], output: Output) -> Service:
    """A daemon, which for `source --hold` is one that takes no machines."""
    from postcopy.service.daemon import Daemon

    config = record(
        DaemonConfig,
        given,
        machine=record(MachineOptions, given) if "kind" in given else None,
        migration=options.sending(given),
        arrival=record(ArrivalOptions, given, api_socket=None, qmp=None, preload=None),  # of the machine to begin with
        side=given["command"],
    )
    return Daemon(config, output)


def _check_source(given: dict[str, Any]) -> None:
    """A machine is described by --machine and its options, or by what is left of it."""
    if "path" in given:
        if "hold" in given:
            raise ConfigurationError("--from does not go with --hold: say --listen or --connect")
        for option in options.MACHINE:
            if option.key in given and option not in (options.DISK, options.NET):
                raise ConfigurationError(f"--{option.name} does not go with --from: the machine is what it was")
    elif given.keys() & {"reclaim", "force"}:
        raise ConfigurationError("--reclaim and --force go with --from")
    live = "kind" not in given or is_live(given["kind"])
    if "hold" in given:
        if not live:
            raise ConfigurationError("--hold keeps a machine running, which an image is not: say --listen or --connect")
        for option in (options.SALVAGE, options.SERVE, options.MIGRATE_AFTER):
            if given.get(option.key):
                raise ConfigurationError(f"--{option.name} has no meaning with --hold")
        if "tls_hostname" in given:
            raise ConfigurationError("--tls-hostname has no meaning with --hold: say it to `postcopy ctl migrate`")
        return
    if given.get("serve", 1) != 1 and (live or "listen" not in given):
        raise ConfigurationError("--serve goes with --machine image and --listen only")
    if not live:
        given.pop("backing", None)  # its memory is the file
