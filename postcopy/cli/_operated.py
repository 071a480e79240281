# SPDX-License-Identifier: Apache-2.0
"""What runs a source, a destination or a daemon, with all that is around it where somebody operates it."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from postcopy.output import Output
from postcopy.service.config import OperatingOptions
from postcopy.service.options import record
from postcopy.service.service import Service

Run = Callable[[trio.Event], Awaitable[bool]]


def run_operated(service: Service, given: Mapping[str, Any], output: Output) -> Run:
    options = record(OperatingOptions, given)
    if options == OperatingOptions() and not os.environ.get("NOTIFY_SOCKET"):
        return service.run
    from postcopy.service.operation import Operation  # megabytes that nobody else needs

    return Operation(service, options, output).run
