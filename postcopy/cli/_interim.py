from __future__ import annotations

from typing import Any

from postcopy.dataplane.pager import Pager
from postcopy.output import Output
from postcopy.service import commands, daemon
from postcopy.service.config import DaemonConfig, DestinationConfig, OperatingOptions, SourceConfig
from postcopy.service.controllers import DestinationHandler, SourceHandler
from postcopy.service.operation import Service, ServiceOptions


def Source(c: SourceConfig, output: Output) -> Any:
    return commands.SourceCommand(
        c.kind,
        c.machine,
        c.migration,
        output,
        origin=commands.Origin(**vars(c.origin)) if c.origin else None,
        listen=c.listen,
        connect=c.connect,
        migrate_after_s=c.migrate_after_s,
        serve=c.serve,
        keep=c.keep,
        salvage_to=c.salvage_to,
    )


def Destination(c: DestinationConfig, output: Output) -> Any:
    a = c.arrival
    return commands.DestinationCommand(
        output,
        listen=c.listen,
        connect=c.connect,
        backing=a.backing,
        disk=a.disk,
        net=a.net,
        busy_poll_us=a.busy_poll_us,
        pager_process=a.pager_process,
        heartbeat_s=c.heartbeat_s,
        recover_for_s=c.recover_for_s,
        kill_when_lost=a.kill_when_lost,
        run_for_s=c.run_for_s,
        dump=c.dump,
        verify=c.verify,
        salvage_to=c.salvage_to,
    )


def Daemon(c: DaemonConfig, output: Output) -> Any:
    from postcopy.dataplane.pager_process import ProcessPager

    a = c.arrival
    arrival = daemon.ArrivalOptions(
        ProcessPager if a.pager_process else Pager, a.backing, a.disk, a.net, a.busy_poll_us
    )
    return daemon.Daemon(
        output,
        c.migration,
        arrival,
        listen=c.listen,
        first=(c.kind or "", c.machine) if c.machine else None,
        name=c.name,
        side=c.side,
    )


def operated(what: Any, asked: OperatingOptions, output: Output) -> Any:
    if isinstance(what, commands.SourceCommand):
        handler: Any = SourceHandler(what)
    elif isinstance(what, commands.DestinationCommand):
        handler = DestinationHandler(what)
    else:
        handler = what
    return Service(what.run, handler, output, ServiceOptions(**vars(asked))).run
