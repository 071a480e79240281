# SPDX-License-Identifier: Apache-2.0
"""From the command line's arguments to what runs: a command with its service around it."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable

import trio

from postcopy.dataplane.pager import Pager
from postcopy.errors import ConfigurationError
from postcopy.machines.kinds import MachineOptions
from postcopy.migration.source import SourceOptions
from postcopy.net import Address
from postcopy.output import Output
from postcopy.service.commands import DestinationCommand, SourceCommand
from postcopy.service.controllers import DestinationHandler, SourceHandler
from postcopy.service.daemon import ArrivalOptions, Daemon
from postcopy.service.handler import ControlHandler
from postcopy.service.operation import Service, ServiceOptions
from postcopy.service.schema import is_name

Run = Callable[[trio.Event], Awaitable[bool]]


def operated(command: SourceCommand | DestinationCommand, args: argparse.Namespace, output: Output) -> Run:
    """A source or a destination that somebody operates."""
    handler = SourceHandler(command) if isinstance(command, SourceCommand) else DestinationHandler(command)
    return _service(command.run, handler, args, output, listens=args.listen is not None)


def make_daemon(
    args: argparse.Namespace,
    output: Output,
    options: SourceOptions,
    machine: MachineOptions | None,
    listen: Address | None,
) -> Run:
    """A daemon, which for `source --hold` is one that takes no machines. `ConfigurationError` without a control
    socket: nobody could tell it anything."""
    holding = args.command == "source"
    if args.control is None:
        what = "source --hold" if holding else "daemon"
        raise ConfigurationError(f"{what} does what it is told through its control socket: say --control PATH")
    if holding and (args.salvage is not None or args.migrate_after):
        raise ConfigurationError("--salvage and --migrate-after have no meaning with --hold")
    name = None if holding else args.name
    if name is not None and (machine is None or not is_name(name)):
        raise ConfigurationError("--name goes with --machine: letters, digits, '.', '_' and '-', at most 63")
    arrival = ArrivalOptions(
        make_pager=Pager if holding else _pager(args.pager),
        backing=args.backing or "memfd",
        disk=args.disk,
        net=args.net,
        busy_poll_us=args.busy_poll,
    )
    daemon = Daemon(
        output,
        options,
        arrival,
        listen=listen,
        first=(args.machine, machine) if machine is not None else None,
        name=name,
        side=args.command,
    )
    return _service(daemon.run, daemon, args, output, listens=listen is not None)


def _pager(where: str) -> Callable[[], object]:
    if where == "thread":
        return Pager
    from postcopy.dataplane.pager_process import ProcessPager

    return ProcessPager


def _service(run: Run, handler: ControlHandler, args: argparse.Namespace, output: Output, *, listens: bool) -> Run:
    options = ServiceOptions(
        control=args.control,
        metrics=args.metrics,
        metrics_file=args.metrics_file,
        ready_on="listening" if listens else "progress",
    )
    return Service(run, handler, output, options).run
