# SPDX-License-Identifier: Apache-2.0
"""`postcopy source`: from what was given to what runs."""

from __future__ import annotations

from typing import Any

from postcopy.cli._operated import Run, run_operated
from postcopy.errors import ConfigurationError
from postcopy.machines.kinds import MachineOptions
from postcopy.migration.source import SourceOptions
from postcopy.output import Output
from postcopy.service import options
from postcopy.service.config import Origin, SourceConfig
from postcopy.service.options import record
from postcopy.service.source import Source

OPTIONS = options.COMMANDS["source"]


def make(given: dict[str, Any], output: Output) -> Run:
    _check_origin(given)
    if "hold" in given:
        from postcopy.cli.daemon import make_daemon

        if "salvage_to" in given or given.get("migrate_after_s"):
            raise ConfigurationError("--salvage and --migrate-after have no meaning with --hold")
        return make_daemon(given, output, "source")
    is_image = given.get("kind") == "image"
    if given.get("serve", 1) != 1 and not (is_image and "listen" in given):
        raise ConfigurationError("--serve goes with --machine image and --listen only")
    if is_image:
        given.pop("backing", None)  # its memory is the file
    config = record(
        SourceConfig,
        {"kind": "", **given},
        machine=record(MachineOptions, given),
        migration=record(SourceOptions, given),
        origin=record(Origin, given) if "path" in given else None,
    )
    return run_operated(Source(config, output), given, output)


def _check_origin(given: dict[str, Any]) -> None:
    """A machine is described by --machine and its options, or by what is left of it."""
    if "path" not in given:
        if given.keys() & {"reclaim", "force"}:
            raise ConfigurationError("--reclaim and --force go with --from")
        return
    if "hold" in given:
        raise ConfigurationError("--from does not go with --hold: say --listen or --connect")
    for option in options.MACHINE:
        if option.key in given and option not in (options.DISK, options.NET):
            raise ConfigurationError(f"--{option.name} does not go with --from: the machine is what it was")
