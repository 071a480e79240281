# SPDX-License-Identifier: Apache-2.0
"""What the figures share: `Figure` and the ratio it is, and processes that are measured against each other."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from postcopy._child import python
from postcopy.errors import MigrationError
from postcopy.records import VERSION
from postcopy.records.reports import BenchFigure
from postcopy.testbed._processes import open_child, parse, run_json
from postcopy.testbed.bench._worker import Job

DEADLINE_S = 120.0  # for one process of one measurement

Rounds = list[dict[str, float]]


@dataclass(frozen=True)
class Figure:
    """One ratio and what it was made of."""

    name: str
    ratio: float  # median over the rounds
    target: float | None  # None: a comparison without a goal
    at_most: bool  # the target is an upper bound, else a lower one
    rounds: Rounds
    note: str = ""
    unit: str = "us"
    curve: str = ""
    """Where the values of a round are the points of a curve: what their names count, as ``faults pending``."""

    @property
    def reached(self) -> bool:
        """Whether the ratio keeps to its target."""
        if self.target is None:
            return True
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target

    def medians(self) -> dict[str, float]:
        """Of each value that all rounds have; a part of a downtime is left out where a side has not told it."""
        names = [name for name in self.rounds[0] if all(name in values for values in self.rounds)]
        return {name: statistics.median(values[name] for values in self.rounds) for name in names}

    def record(self) -> BenchFigure:
        """For ``--json``; `rounds` hold the absolute values, in `unit`."""
        return BenchFigure(
            schema=VERSION,
            name=self.name,
            ratio=round(self.ratio, 3),
            target="" if self.target is None else f"{'<=' if self.at_most else '>='} {self.target}",
            reached=self.reached,
            unit=self.unit,
            rounds=self.rounds,
            curve=self.curve,
            note=self.note,
        )


def ratio(
    name: str, rounds: Rounds, over: str, under: str, target: float | None, *, at_most: bool = True, **more: str
) -> Figure:
    """Of two values of each round; `more`: note, unit and curve."""
    median = statistics.median(values[over] / values[under] for values in rounds)
    return Figure(name, median, target, at_most, rounds, **more)


def side_by_side(one: dict[str, float], other: dict[str, float], prefix: str) -> dict[str, float]:
    """p50 and p99 of two latencies as one round, those of the `other` with a prefix."""
    return {prefix * (values is other) + name: values[name] for name in ("p50", "p99") for values in (one, other)}


# ---- processes


def worker(module: str, *arguments: str) -> list[str]:
    """The command that calls `main` of a module of this package."""
    return python(
        "-c", f"import sys; from postcopy.testbed.bench.{module} import main; main(*sys.argv[1:])", *arguments
    )


def connections(count: int) -> list[tuple[socket.socket, socket.socket]]:
    """Over loopback TCP, both ends of each."""
    pairs = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(count):
            near = socket.create_connection(listener.getsockname())
            far, _ = listener.accept()
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pairs.append((near, far))
    return pairs


async def pair(
    kind: str, size_bytes: int, *, bulk_channels: int = 0, pin: bool = False, module: str = "_worker", **job: Any
) -> dict[str, Any]:
    """Runs a source and a destination against each other; the destination's result.

    `kind`: of both roles (``engine``: ``engine-source`` and ``engine-dest``). `module`: whose `main` takes the `Job`.
    `job`: more fields of both jobs. `pin`: each has half of the processors to itself, as two hosts would. Without it,
    which threads happen to share a processor decides more about a latency than what is measured.
    """
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    halves = (cpus[: len(cpus) // 2], cpus[len(cpus) // 2 :]) if pin and len(cpus) > 1 else ((), ())
    async with AsyncExitStack() as stack:
        pairs = connections(1 + bulk_channels)
        ends = [end for pair in pairs for end in pair]
        for end in ends:
            stack.callback(end.close)
        children = []
        for side, role in enumerate(("source", "dest")):
            fds = [pair[side].fileno() for pair in pairs]
            order = Job(f"{kind}-{role}", size_bytes, fds[0], tuple(fds[1:]), cpus=halves[side], **job)
            command = worker(module, msgspec.json.encode(order).decode())
            children.append(await stack.enter_async_context(open_child(command, stdin=subprocess.PIPE, pass_fds=fds)))
        for name, child in zip(("source", "destination"), children, strict=True):
            if await child.line() != "ready":
                raise MigrationError(f"the {name} of a measurement ended early (its error is above)")
        for end in ends:
            end.close()  # what the other process of a pair is to see ends with its own copies
        for child in children:
            await child.send(b"go")
        with trio.move_on_after(DEADLINE_S):
            if not (line := await children[1].line()):
                raise MigrationError("a process of a measurement failed (its error is above)")
            return parse(line)
        raise MigrationError(f"a measurement did not end within {DEADLINE_S:.0f} s")


async def touch_us(kind: str, size_bytes: int, **options: Any) -> dict[str, float]:
    """Percentiles of what a thread waits for a page."""
    return dict((await pair(kind, size_bytes, pin=True, **options))["touch-us"])


async def warm_pair(kind: str, size_bytes: int, **options: Any) -> dict[str, Any]:
    """The second of two runs, back to back.

    A virtual machine whose host takes freed memory back within seconds (free page reporting) pays a fault in the host
    for every page it allocates again: the first run finds that memory, the second one measures.
    """
    await pair(kind, size_bytes, **options)
    return await pair(kind, size_bytes, **options)


async def demo(*arguments: str) -> dict[str, Any]:
    """The result of a whole migration on this host."""
    command = python("-m", "postcopy", "demo", "--json", *arguments)
    return dict(await run_json(command, f"`postcopy demo --json {' '.join(arguments)}`", DEADLINE_S * 2))
