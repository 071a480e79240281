# SPDX-License-Identifier: Apache-2.0
"""What runs a source, a destination or a daemon, with all that around it by which it is operated."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from postcopy.output import Output
from postcopy.service.config import OperatingOptions
from postcopy.service.options import record

Run = Callable[[trio.Event], Awaitable[bool]]


def run_operated(side: Any, given: Mapping[str, Any], output: Output) -> Run:
    """Only where that was asked for: a side that nobody operates has no use for the megabytes."""
    if not given.keys() & {"control", "metrics", "metrics_file"} and not os.environ.get("NOTIFY_SOCKET"):
        run: Run = side.run
        return run
    from postcopy.cli._interim import operated

    asked = record(OperatingOptions, given, ready_on="listening" if "listen" in given else "progress")
    run = operated(side, asked, output)
    return run  # noqa: RET504
