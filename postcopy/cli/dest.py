# SPDX-License-Identifier: Apache-2.0
"""`postcopy dest`: from what was given to what runs."""

from __future__ import annotations

from typing import Any

from postcopy.cli._operated import Run, run_operated
from postcopy.output import Output
from postcopy.service import options
from postcopy.service.config import ArrivalOptions, DestinationConfig
from postcopy.service.destination import Destination
from postcopy.service.options import record

OPTIONS = options.COMMANDS["dest"]


def make(given: dict[str, Any], output: Output) -> Run:
    config = record(DestinationConfig, given, arrival=record(ArrivalOptions, given))
    return run_operated(Destination(config, output), given, output)
