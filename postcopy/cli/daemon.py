# SPDX-License-Identifier: Apache-2.0
"""`postcopy daemon`, and `postcopy source --hold`, which is a daemon that takes no machines."""

from __future__ import annotations

from typing import Any

from postcopy.cli._operated import Run, run_operated
from postcopy.errors import ConfigurationError
from postcopy.machines.kinds import MachineOptions
from postcopy.migration.source import SourceOptions
from postcopy.output import Output
from postcopy.service import options
from postcopy.service.config import ArrivalOptions, DaemonConfig
from postcopy.service.daemon import Daemon
from postcopy.service.options import record

OPTIONS = options.COMMANDS["daemon"]


def make(given: dict[str, Any], output: Output) -> Run:
    return make_daemon(given, output, "daemon")


def make_daemon(given: dict[str, Any], output: Output, side: str) -> Run:
    """`ConfigurationError` without a control socket: nobody could tell it anything."""
    if "control" not in given:
        what = "source --hold" if side == "source" else "daemon"
        raise ConfigurationError(f"{what} does what it is told through its control socket: say --control PATH")
    config = record(
        DaemonConfig,
        given,
        machine=record(MachineOptions, given) if "kind" in given else None,
        migration=record(SourceOptions, given, name=""),
        arrival=record(ArrivalOptions, given),
        side=side,
    )
    return run_operated(Daemon(config, output), given, output)
