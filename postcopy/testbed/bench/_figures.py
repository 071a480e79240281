# SPDX-License-Identifier: Apache-2.0
"""What `postcopy bench` measures: a function for each name, which returns its figures."""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from postcopy._child import python
from postcopy.errors import MigrationError, ResourceError
from postcopy.machines.toy.machine import RV64, ToyMachine, ToyOptions
from postcopy.migration.source import DEFAULT_BULK_CHANNELS
from postcopy.records import VERSION
from postcopy.records.reports import BenchFigure
from postcopy.testbed._processes import open_child, parse, run_json
from postcopy.testbed.bench import _contention as contention
from postcopy.testbed.bench._recovery import recovery_map, recovery_times_ms
from postcopy.testbed.bench._worker import Job
from postcopy.units import parse_size

DEADLINE_S = 120.0  # for one process of one measurement

Rounds = list[dict[str, float]]


@dataclass(frozen=True)
class Figure:
    """One ratio and what it was made of."""

    name: str
    ratio: float  # median over the rounds
    target: float
    at_most: bool  # the target is an upper bound, else a lower one
    rounds: Rounds
    note: str = ""
    unit: str = "us"

    @property
    def reached(self) -> bool:
        """Whether the ratio keeps to its target."""
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target

    def record(self) -> BenchFigure:
        """For ``--json``; `rounds` hold the absolute values, in `unit`."""
        return BenchFigure(
            schema=VERSION,
            name=self.name,
            ratio=round(self.ratio, 3),
            target=("<= " if self.at_most else ">= ") + str(self.target),
            reached=self.reached,
            unit=self.unit,
            rounds=self.rounds,
            note=self.note,
        )


def _ratio(
    name: str, rounds: Rounds, over: str, under: str, target: float, *, at_most: bool = True, **more: str
) -> Figure:
    """Of two values of each round; `more`: note and unit."""
    ratio = statistics.median(values[over] / values[under] for values in rounds)
    return Figure(name, ratio, target, at_most, rounds, **more)


def _side_by_side(one: dict[str, float], other: dict[str, float], prefix: str) -> dict[str, float]:
    """p50 and p99 of two latencies as one round, those of the `other` with a prefix."""
    return {prefix * (values is other) + name: values[name] for name in ("p50", "p99") for values in (one, other)}


# ---- processes


def worker(module: str, *arguments: str) -> list[str]:
    """The command that calls `main` of a module of this package."""
    return python(
        "-c", f"import sys; from postcopy.testbed.bench.{module} import main; main(*sys.argv[1:])", *arguments
    )


def _connections(count: int) -> list[tuple[socket.socket, socket.socket]]:
    pairs = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(count):
            near = socket.create_connection(listener.getsockname())
            far, _ = listener.accept()
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pairs.append((near, far))
    return pairs


async def _pair(
    engine: bool, size_bytes: int, *, bulk_channels: int = 0, pin: bool = False, **job: Any
) -> dict[str, Any]:
    """Runs a source and a destination against each other; the destination's result. `job`: more fields of both `Job`s.

    `pin`: each has half of the processors to itself, as two hosts would. Without it, which threads happen to share a
    processor decides more about a latency than what is measured.
    """
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    halves = (cpus[: len(cpus) // 2], cpus[len(cpus) // 2 :]) if pin and len(cpus) > 1 else ((), ())
    kind = "engine" if engine else "floor"
    async with AsyncExitStack() as stack:
        pairs = _connections(1 + bulk_channels)
        ends = [end for pair in pairs for end in pair]
        for end in ends:
            stack.callback(end.close)
        children = []
        for side, role in enumerate(("source", "dest")):
            fds = [pair[side].fileno() for pair in pairs]
            order = Job(
                f"{kind}-{role}",
                size_bytes,
                fds[0],
                tuple(fds[1:]),
                cpus=halves[side],
                **job,
            )
            child = await stack.enter_async_context(
                open_child(worker("_worker", msgspec.json.encode(order).decode()), stdin=subprocess.PIPE, pass_fds=fds)
            )
            if await child.line() != "ready":
                raise MigrationError(f"the {order.role} of a measurement ended early (its error is above)")
            children.append(child)
        for end in ends:
            end.close()  # what the other process of a pair is to see ends with its own copies
        for child in children:
            await child.send(b"go")
        with trio.move_on_after(DEADLINE_S):
            if not (line := await children[1].line()):
                raise MigrationError("a process of a measurement failed (its error is above)")
            return parse(line)
        raise MigrationError(f"a measurement did not end within {DEADLINE_S:.0f} s")


async def _touch_us(engine: bool, size_bytes: int, **options: Any) -> dict[str, float]:
    """Percentiles of what a thread waits for a page."""
    return dict((await _pair(engine, size_bytes, pin=True, **options))["touch-us"])


async def _warm_pair(size_bytes: int, **options: Any) -> dict[str, Any]:
    """The second of two runs of the engine, back to back.

    A virtual machine whose host takes freed memory back within seconds (free page reporting) pays a fault in the host
    for every page it allocates again: the first run finds that memory, the second one measures the engine.
    """
    await _pair(True, size_bytes, **options)
    return await _pair(True, size_bytes, **options)


async def _demo(*arguments: str) -> dict[str, Any]:
    command = python("-m", "postcopy", "demo", "--json", *arguments)
    return dict(await run_json(command, f"`postcopy demo --json {' '.join(arguments)}`", DEADLINE_S * 2))


# ---- figures


async def measure_fault(rounds: int) -> list[Figure]:
    """Demand fault p50 against the floor's, sleeping and busy polling."""
    figures = []
    for how, busy_poll_us in (("sleeping", 0), ("busy polling", 200)):
        values = []
        for _ in range(rounds):
            floor, engine = [
                await _touch_us(engine, 64 << 20, touches=4000, busy_poll_us=busy_poll_us) for engine in (False, True)
            ]
            values.append(_side_by_side(engine, floor, "floor-"))
        figures.append(_ratio(f"fault p50, {how} / floor", values, "p50", "floor-p50", 1.25))
    return figures


async def measure_pager_process(rounds: int) -> list[Figure]:
    """What it costs that the machine survives its pager: demand fault p50 through a pager in a process of its own."""
    values = []
    for _ in range(rounds):
        apart, inside = [await _touch_us(True, 64 << 20, touches=4000, pager_process=where) for where in (True, False)]
        values.append(_side_by_side(apart, inside, "thread-"))
    return [_ratio("fault p50, pager process / pager threads", values, "p50", "thread-p50", 1.25)]


async def measure_bulk_delay(rounds: int) -> list[Figure]:
    """p99 of a demand fault while bulk runs at full speed, against the idle p99."""
    values = []
    for _ in range(rounds):
        idle = await _touch_us(True, 64 << 20, touches=8000)
        # As many touches as there are pages, so that faults happen until the last page is there.
        size_bytes = 768 << 20
        busy = await _warm_pair(size_bytes, touches=size_bytes // 4096, bulk_channels=1, pin=True)
        values.append(_side_by_side(busy["touch-us"], idle, "idle-"))
    return [_ratio("fault p99 under bulk / idle", values, "p99", "idle-p99", 4.0)]


async def iperf3_bytes_per_s(size_bytes: int) -> float:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        where = ("127.0.0.1", "-p", str(probe.getsockname()[1]))
    async with open_child(["iperf3", "-s", "-1", "-B", *where]):
        deadline_s = time.monotonic() + 10
        while True:
            command = ["iperf3", "-c", *where, "-n", str(size_bytes), "-J"]
            done = await trio.run_process(command, capture_stdout=True, check=False)
            result = json.loads(done.stdout)
            if "error" not in result:
                return float(result["end"]["sum_received"]["bits_per_second"]) / 8
            if time.monotonic() > deadline_s:  # refused until the server listens
                raise MigrationError(f"iperf3 failed: {result['error']}")


async def measure_throughput(rounds: int) -> list[Figure]:
    """Pushed memory against one iperf3 stream."""
    if not shutil.which("iperf3"):
        raise ResourceError("iperf3 is not installed", "apt-get install iperf3")
    size_bytes = 1 << 30

    async def iperf3() -> float:
        return await iperf3_bytes_per_s(size_bytes) / 1e9

    async def engine() -> float:
        return float((await _warm_pair(size_bytes, bulk_channels=DEFAULT_BULK_CHANNELS))["bytes-per-s"]) / 1e9

    values = []
    for number in range(rounds):
        parts = [("engine", engine), ("iperf3", iperf3)]
        # Each goes first in half of the rounds: a host that lends its processors for a while and then slows them down
        # would otherwise decide.
        values.append({name: await measure() for name, measure in (parts if number % 2 else reversed(parts))})
    name = f"background throughput, {DEFAULT_BULK_CHANNELS} channels / one iperf3 stream"
    return [_ratio(name, values, "engine", "iperf3", 0.5, at_most=False, unit="GB/s")]


async def measure_sparse(rounds: int) -> list[Figure]:
    """A large machine, little of it touched, against a small one, all of it touched."""
    common = ("--machine", "kvm", "--workload", "random", "--vcpus", "1", "--working-set", "240MiB", "--memory")
    values = []
    for _ in range(rounds):
        small, large = [float((await _demo(*common, size))["total-ms"]) for size in ("256MiB", "8GiB")]
        values.append({"8GiB": large, "256MiB": small})
    note = "240 MiB of each touched by the guest"
    return [_ratio("total time, 8 GiB sparse / 256 MiB", values, "8GiB", "256MiB", 1.3, note=note, unit="ms")]


async def measure_overhead(rounds: int) -> list[Figure]:
    """Peak memory beside the machine's own, against 32 MiB + 1 % of the machine: of a small one, where Python is nearly
    all of it, and of a larger one, where the engine's maps and buffers would show."""
    figures = []
    for size, working_set in (("64MiB", "32MiB"), ("1GiB", "256MiB")):
        allowance_mib = 32 + parse_size(size) / 2**20 / 100
        values = []
        for _ in range(max(1, rounds // 2)):
            arguments = ("--workload", "random", "--memory", size, "--working-set", working_set)
            result = await _demo("--machine", "kvm", *arguments)
            values.append(
                {side: float(result[side]["overhead-bytes"]) / 2**20 for side in ("source", "dest")}
                | {"allowance": allowance_mib}
            )
        for side in ("source", "dest"):
            name = f"memory overhead of the {side}, {size} / allowance"
            note = f"allowance: 32 MiB + 1 % of {size}"
            figures.append(_ratio(name, values, side, "allowance", 1.0, note=note, unit="MiB"))
    return figures


async def measure_recovery_time(rounds: int) -> list[Figure]:
    """A running machine that is cut off again and again."""
    times_ms = sorted([ms for number in range(rounds) for ms in await recovery_times_ms(25, number)])
    note = f"{len(times_ms)} cuts of 0.1 to 1 s, all connections reset"
    return [
        Figure(
            f"first page after the network's return, {name} / {allowed_ms} ms",
            value / allowed_ms,
            1.0,
            True,
            [{name: value}],
            note,
            "ms",
        )
        for name, value, allowed_ms in (
            ("p50", times_ms[len(times_ms) // 2], 150),
            ("p99", times_ms[min(len(times_ms) - 1, int(len(times_ms) * 0.99))], 500),
        )
    ]


async def measure_recovery_map(rounds: int) -> list[Figure]:
    """The maps of a machine of 1 TiB, from one side's bitmap to the other's."""
    values = [await recovery_map(1 << 40, number) | {"MB-allowed": 10.0, "s-allowed": 1.0} for number in range(rounds)]
    note = "4 KiB pages, half of them received, in random runs of 64; simulated on bitmaps"
    return [
        _ratio(f"recovery map of 1 TiB, {name} / allowance", values, unit, f"{unit}-allowed", 1.0, note=note, unit="")
        for name, unit in (("size", "MB"), ("time", "s"))
    ]


async def _rv64_instructions_per_s(workload: str) -> float:
    options = ToyOptions(memory_bytes=64 << 20, workload=workload, seed=1)
    async with ToyMachine.create(RV64, options) as machine:
        await machine.boot()
        await machine.run_until(50_000_000)  # its memory is there, its code decoded
        begin_s = time.perf_counter()
        await machine.run_until(350_000_000)
        return 300e6 / (time.perf_counter() - begin_s)


async def measure_rv64(rounds: int) -> list[Figure]:
    """Instructions of one hart against what makes a demo of it credible."""
    values = []
    for _ in range(rounds):
        speeds = {name: await _rv64_instructions_per_s(name) / 1e6 for name in ("random", "dirty")}
        values.append(speeds | {"slower": min(speeds.values()), "target": 100.0})
    name = "rv64 instructions, slower workload / 100 million a second"
    return [_ratio(name, values, "slower", "target", 1.0, at_most=False, unit="M/s")]


async def measure_userfaultfd(rounds: int) -> list[Figure]:
    """The Python binding against the smallest C handler, and how many events one read brings."""

    async def part(what: str, pause_s: float = 0.0) -> float:
        return float(await run_json(worker("_uffd", what, str(pause_s)), f"the measurement of {what}", DEADLINE_S))

    reads = [{"reads": await part("reads"), "wanted": 1.0} for _ in range(rounds)]
    figures = [_ratio("system calls that read 64 pending events", reads, "reads", "wanted", 1.0, unit="")]
    for when, pause_s in (("0.5 ms apart", 0.0005), ("back to back", 0.0)):
        for how in ("sleeping", "busy polling"):
            values = [{"c-us": await part("c", pause_s), "trio-us": await part(how, pause_s)} for _ in range(rounds)]
            name = f"faults {when}, Trio handler {how} / C handler sleeping, p50"
            figures.append(_ratio(name, values, "trio-us", "c-us", 1.5))
    return figures


async def measure_contention(rounds: int) -> list[Figure]:
    """mmap and munmap beside pending faults and bulk placement, against neither."""
    # One round has all scenes, each in a process of its own, so that a slow spell of the host hits them alike.
    measured: dict[str, list[dict[str, dict[str, float]]]] = {scene.name: [] for scene in contention.SCENES}
    for _ in range(rounds):
        for scene in contention.SCENES:
            command = worker("_contention", str(scene.pending_faults), str(int(scene.bulk)))
            what = f"the measurement of mmap and munmap with {scene.name}"
            measured[scene.name].append(await run_json(command, what, DEADLINE_S))
    idle = measured[contention.IDLE.name]
    figures = []
    for call in ("mmap", "munmap"):
        for scene in contention.SCENES[1:]:
            values = [
                here[call] | {f"idle-{name}": us for name, us in before[call].items()}
                for here, before in zip(measured[scene.name], idle, strict=True)
            ]
            figures.append(_ratio(f"{call} p50, {scene.name} / none", values, "p50", "idle-p50", 1.5))
    return figures


MEASUREMENTS: dict[str, Callable[[int], Awaitable[list[Figure]]]] = {
    "fault": measure_fault,
    "pager-process": measure_pager_process,
    "bulk-delay": measure_bulk_delay,
    "throughput": measure_throughput,
    "sparse": measure_sparse,
    "overhead": measure_overhead,
    "recovery-time": measure_recovery_time,
    "recovery-map": measure_recovery_map,
    "rv64": measure_rv64,
    "userfaultfd": measure_userfaultfd,
    "contention": measure_contention,
}
