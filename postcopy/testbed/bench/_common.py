# SPDX-License-Identifier: Apache-2.0
"""What the figures share: what is made of the values of their rounds, and processes that are measured against each
other."""

from __future__ import annotations

import itertools
import os
import socket
import statistics
import subprocess
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import trio

from postcopy._child import python
from postcopy.errors import MigrationError
from postcopy.records import Json
from postcopy.records.results import Curve, Measurement, Value
from postcopy.records.timeline import Distribution
from postcopy.testbed._processes import open_child, parse, run_json
from postcopy.testbed.bench._worker import Job

DEADLINE_S = 120.0  # for one process of one measurement

Rounds = list[dict[str, float]]
K = TypeVar("K")
T = TypeVar("T")


@dataclass
class Found:
    """Of what takes minutes: what it has measured so far, which is kept whatever ends it; and where it writes lines."""

    write: Callable[[Json], None]
    measurements: list[Measurement] = field(default_factory=list)


def ratio(
    name: str,
    rounds: Rounds,
    of: str,
    to: str | None,
    goal: float | None,
    *,
    at_most: bool = True,
    unit: str = "us",
    units: Mapping[str, str] = {},
    note: str = "",
    curve: Curve | None = None,
    distributions: Mapping[str, Distribution] | None = None,
) -> Measurement:
    """What was measured in `rounds`, in one `unit` but for those values that have one in `units`: it is about the value
    `of`, over the value `to` of the same round where there is one. `at_most`: less is better, and the goal is an upper
    bound; else a lower one."""
    better = "less" if at_most else "more"
    values = {
        each: Value(
            unit=units.get(each, unit) or "1",
            rounds=[values.get(each) for values in rounds],
            better=better if each == of or (curve is not None and each in curve.at) else None,
        )
        for each in dict.fromkeys(itertools.chain(*rounds))
    }
    result = statistics.median(values[of] / values[to] if to else values[of] for values in rounds)
    return Measurement(
        figure="",  # whoever asked for it knows
        name=name,
        values=values,
        of=of,
        to=to,
        result=result,
        better=better,
        goal=goal,
        reached=None if goal is None else result <= goal if at_most else result >= goal,
        curve=curve,
        distributions=None if distributions is None else dict(distributions),
        note=note or None,
    )


def medians(measurement: Measurement) -> dict[str, float]:
    """Of each value that all rounds have; a part of a downtime is left out where a side has not told it."""
    found = {
        name: [each for each in value.rounds if each is not None]
        for name, value in measurement.values.items()
        if None not in value.rounds
    }
    return {name: statistics.median(rounds) for name, rounds in found.items()}


@dataclass(frozen=True)
class Touched:
    """How long a thread that touches pages has waited for each."""

    us: dict[str, float]
    """Percentiles and the maximum, by name."""
    times: Distribution

    @classmethod
    def of(cls, said: dict[str, Any]) -> Touched:
        """What a destination has said (`_worker.touched`)."""
        return cls(dict(said["touch-us"]), msgspec.convert(said["touches"], Distribution))


def side_by_side(one: Touched, other: Touched, prefix: str) -> dict[str, float]:
    """p50 and p99 of two latencies as one round, those of the `other` with a prefix."""
    return {prefix * (each is other) + name: each.us[name] for name in ("p50", "p99") for each in (one, other)}


def joined(rounds: Iterable[Touched]) -> Distribution:
    """Of all rounds together."""
    counts: Counter[int] = Counter()
    times = [each.times for each in rounds]
    for each in times:
        counts.update(dict(zip(each.bucket_edges_ns, each.bucket_counts, strict=True)))
    edges = sorted(counts)
    return Distribution(
        count=sum(counts.values()),
        sum_ns=sum(each.sum_ns for each in times),
        max_ns=max(each.max_ns for each in times),
        bucket_edges_ns=edges,
        bucket_counts=[counts[edge] for edge in edges],
    )


async def by_turns(rounds: int, parts: Mapping[K, Callable[[], Awaitable[T]]]) -> list[dict[K, T]]:
    """What each part gives in each round. A round begins with another part than the last one, so that each comes first
    as often as any other: a host that slows its processors down after a while would decide."""
    turns = []
    for number in range(rounds):
        first = number % len(parts)
        found = {name: await parts[name]() for name in (*[*parts][first:], *[*parts][:first])}
        turns.append({name: found[name] for name in parts})
    return turns


# ---- processes


def worker(module: str, *arguments: str) -> list[str]:
    """The command that calls `main` of a module of this package. Who has started it ends it: Ctrl-C in a terminal,
    which goes to both, would have it end first, with a traceback."""
    code = (
        "import sys; from signal import SIG_IGN, SIGINT, signal; signal(SIGINT, SIG_IGN);"
        " from postcopy.testbed.bench._worker import call; call(*sys.argv[1:])"
    )
    return python("-c", code, module, *arguments)


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


async def touch(kind: str, size_bytes: int, **options: Any) -> Touched:
    """What a thread waits for a page."""
    return Touched.of(await pair(kind, size_bytes, pin=True, **options))


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
