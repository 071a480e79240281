# SPDX-License-Identifier: Apache-2.0
"""`postcopy pager`: from what was given to the service that runs, with or without a keeper around it."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from postcopy._child import python
from postcopy._stop import Stop
from postcopy.handler import OLDEST_VERSION, RECORD_VERSION, Handler, in_keeper, keep, open_store
from postcopy.net import check_reachable
from postcopy.output import Output
from postcopy.records import as_json
from postcopy.service.config import OperatingOptions, PagerConfig
from postcopy.service.operation import Operation
from postcopy.service.options import record

Run = Callable[[Stop], Awaitable[bool]]
KEEPS_MACHINES = True
"""A closed terminal does not end them."""


def make(given: dict[str, Any], output: Output) -> Run:
    """With a keeper this process becomes it, and the command is run again as its engine."""
    config = record(PagerConfig, given)
    if config.keeper and not in_keeper():
        keep(python(*sys.orig_argv[1:]), log_json="log_json" in given, burst=config.restart_burst)
    operating = record(OperatingOptions, given)
    if operating.metrics is not None or operating.metrics_file is not None:
        import postcopy.handler._metrics  # noqa: F401  # before there is a virtual machine that waits for it
    return partial(_run, config, operating, output, "log_json" in given)


async def _run(config: PagerConfig, operating: OperatingOptions, output: Output, log_json: bool, stop: Stop) -> bool:
    # Each virtual machine has some twenty descriptors here.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if in_keeper():  # which is the job of the shell
        output.job = os.getppid()
    formats = (OLDEST_VERSION, RECORD_VERSION)
    async with open_store(formats=formats, log_json=log_json, burst=config.restart_burst) as store:
        handler = Handler(config, output, store)
        patient = bool(store.deaths or store.taken)
        if config.connect is not None and not patient:  # else virtual machines wait already, whatever is wrong
            await config.protection.load(connects=True)
            await check_reachable(config.connect.address, config.protection)
        operation = Operation(handler, operating, output, patient=patient)
        if not output.draws:
            return await operation.run(stop)
        async with trio.open_nursery() as nursery:
            # (as JSON, which is not emitted: the handler does that)
            nursery.start_soon(output.follow, lambda: as_json(handler.status()))
            done = await operation.run(stop)
            nursery.cancel_scope.cancel()
        return done
