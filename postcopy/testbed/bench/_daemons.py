# SPDX-License-Identifier: Apache-2.0
"""A migration as a user asks for it: two daemons on this host, a machine that is started and moved by their control
sockets. Its guest has to work on where it has arrived."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from postcopy._child import python
from postcopy.errors import MigrationError
from postcopy.records import Json
from postcopy.service.client import ControlClient
from postcopy.testbed._processes import Child, open_child, parse
from postcopy.testbed.bench._common import DEADLINE_S
from postcopy.units import format_size

LOOK_S = 0.02


@dataclass(frozen=True)
class Moved:
    """What one migration took."""

    total_ms: float
    """From the request on the control socket until the source says that it has completed."""
    counted: Json
    """The migration, as the destination's ``status`` has it."""


async def move(kind: str, memory_bytes: int, workload: str, operations: int, **migrate: str) -> Moved:
    """Moves a machine whose guest has done so many operations between two new daemons, which are killed at the end.
    `migrate`: more arguments of that request. `MigrationError` when it does not complete in time, or the guest finds a
    failure."""
    with tempfile.TemporaryDirectory(prefix="postcopy-bench-") as directory, trio.move_on_after(DEADLINE_S):
        paths = [f"{directory}/{side}" for side in ("source", "dest")]
        async with (
            _daemon(paths[0]),
            _daemon(paths[1]) as address,
            ControlClient.open(paths[0]) as source,
            ControlClient.open(paths[1]) as dest,
        ):
            await source.execute("events", {"enable": True})
            await source.execute("start", {"kind": kind, "memory": memory_bytes, "workload": workload, "seed": 1})
            await _has_done(source, operations)
            began_s = time.perf_counter()
            await source.execute("migrate", {"to": address} | migrate)
            await _completed(source)
            total_ms = (time.perf_counter() - began_s) * 1e3
            arrived = await _has_done(dest, 0)
            await _has_done(dest, arrived["guest"]["operations"] + 1)
            return Moved(total_ms, arrived["migration"])
    raise MigrationError(f"a migration of {kind}, {format_size(memory_bytes)}: not done after {DEADLINE_S:g} s")


async def _completed(source: ControlClient) -> None:
    while True:
        event = await source.next_event()
        status = event["data"].get("status")
        if event["event"] == "migration-status" and status == "completed":
            return
        if event["event"] == "migration-ended":  # which comes last, when the machine's memory has been given back
            raise MigrationError(f"a migration ended as {status}: {event['data']['error']}")


@asynccontextmanager
async def _daemon(path: str) -> AsyncIterator[str]:
    """Where it takes machines."""
    command = python("-m", "postcopy", "daemon", "--json", "--listen", "127.0.0.1:0", "--control", path)
    async with open_child(command, stderr=subprocess.DEVNULL) as child, trio.open_nursery() as nursery:
        async for line in child.stdout:
            if (message := parse(line))["event"] == "listening":
                nursery.start_soon(_read_on, child)  # a full pipe would stop it
                yield str(message["address"])
                nursery.cancel_scope.cancel()
                return
        raise MigrationError("`postcopy daemon` ended before it listened")


async def _read_on(child: Child) -> None:
    async for _ in child.stdout:
        pass


async def _has_done(client: ControlClient, operations: int) -> Json:
    """The machine, when its guest has done so many."""
    while True:
        machine: Json = (await client.execute("status"))["machines"][0]
        if machine["guest"]["failures"]:
            raise MigrationError(f"the guest has found {machine['guest']['failures']} failures")
        if machine["guest"]["operations"] >= operations:
            return machine
        await trio.sleep(LOOK_S)
