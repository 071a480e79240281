# SPDX-License-Identifier: Apache-2.0
"""QEMU beside postcopy: the same memory, the same way of a guest through it, both over loopback, by turns.

QEMU runs with TCG (`_qemu_run`), so its fair counterpart is rv64: both execute the instructions of their guests
themselves. kvm is there too, with the smaller memory only: where KVM is emulated it fills its memory slowly. Ours is
asked as a user asks it: two daemons, and `migrate` on the control socket. docs/performance.md says what differs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import msgspec
import trio

from postcopy._child import python
from postcopy.errors import MigrationError, ResourceError
from postcopy.records import Json
from postcopy.service.client import ControlClient
from postcopy.testbed import probe
from postcopy.testbed._processes import Child, open_child, parse, run_json
from postcopy.testbed.bench._common import DEADLINE_S, Figure, ratio, worker
from postcopy.testbed.bench._qemu_run import QEMU, Run
from postcopy.units import format_size

OLDEST = (7, 1)
"""The first one that has postcopy-preempt."""
SIZES = (256 << 20, 1 << 30)
OPERATIONS = {"rv64": 100_000, "kvm": 1}
"""That the guest does, after it has filled its memory, before it is migrated. An emulated KVM does few a second."""
LOOK_S = 0.02
MODES = {"qemu": "postcopy", "qemu-preempt": "preempt"}

DOWNTIME = (
    "ours: from the request to pause until the source knows that the machine runs; QEMU: from its event STOP to RESUME;"
    " says: the downtime of query-migrate, without what the destination does"
)
TOTAL = "from the request to migrate until all memory is there"
PRECOPY = "both may stop the guest for 300 ms for what is left, which this one writes as fast as it can"
FAULT = "from the fault read to its page placed; QEMU's by its trace, in runs of their own"

Part = Callable[[], Awaitable[dict[str, float]]]
"""One migration; what it took."""
Turns = list[dict[str, dict[str, float]]]
"""Of each round, by part and by what it took."""


async def measure_qemu(rounds: int) -> list[Figure]:
    """Downtime, total time, fault latency and blocktime, ours over QEMU's."""
    check_qemu()
    return await compare(rounds, SIZES, kvm=bool(probe.find("kvm")))


def check_qemu() -> None:
    """`ResourceError` when QEMU is not here, or too old."""
    remedy = "apt-get install --no-install-recommends qemu-system-x86"
    if shutil.which(QEMU) is None:
        raise ResourceError(f"QEMU is not installed: no {QEMU}", remedy)
    said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    version = re.search(r"version (\d+)\.(\d+)", said)
    if version is None or (int(version[1]), int(version[2])) < OLDEST:
        words = version[0] if version else "it does not tell its version"
        oldest = ".".join(map(str, OLDEST))
        raise ResourceError(f"{shutil.which(QEMU)} is too old: {words}", f"QEMU {oldest} or newer; Debian 12: {remedy}")


async def compare(rounds: int, sizes: tuple[int, ...], *, kvm: bool) -> list[Figure]:
    """With each size of memory; with the first one also precopy, the latency of faults, and with `kvm` that machine."""
    figures = []
    for size_bytes in sizes:
        first = size_bytes == sizes[0]
        machines = ["rv64", "kvm"] if first and kvm else ["rv64"]
        parts: dict[str, Part] = {kind: partial(_ours, kind, size_bytes) for kind in machines}
        parts |= {name: partial(_qemu, Run(size_bytes, mode)) for name, mode in MODES.items()}
        if first:
            parts |= {f"{name}-traced": partial(_qemu, Run(size_bytes, mode, True)) for name, mode in MODES.items()}
            parts["rv64-precopy"] = partial(_ours, "rv64", size_bytes, mode="precopy", precopy="auto")
            # Of a GiB QEMU's takes a minute and more: it goes on until what is left can be sent within 300 ms.
            parts["qemu-precopy"] = partial(_qemu, Run(size_bytes, "precopy"))
        turns = []
        for number in range(rounds):
            # Each goes first as often as last: a host that slows its processors down after a while would decide.
            order = list(parts.items())[:: 1 if number % 2 else -1]
            turns.append({name: await part() for name, part in order})
        for kind in machines:
            figures += _postcopy(kind, format_size(size_bytes), turns, faults=first)
        if first:
            figures += _precopy(format_size(size_bytes), turns)
    return figures


def _postcopy(kind: str, size: str, turns: Turns, *, faults: bool) -> list[Figure]:
    """Against the better of QEMU's two ways, round by round."""

    def figure(
        what: str, ours: str, theirs: str, goal: float | None, *, suffix: str = "", note: str = "", unit: str = "ms"
    ) -> Figure:
        rounds = []
        for turn in turns:
            values = {kind: turn[kind][ours]} | {name: turn[name + suffix][theirs] for name in MODES}
            values["qemu-better"] = min(values[name] for name in MODES)
            if what == "downtime":
                values |= {f"{name} says": turn[name]["downtime-ms"] for name in MODES}
            if what == "total time":
                values[f"{kind} from the pause"] = turn[kind]["from-pause-ms"]
            rounds.append(values)
        return ratio(f"{what}, {size}, {kind} / QEMU", rounds, kind, "qemu-better", goal, note=note, unit=unit)

    figures = [
        figure("downtime", "downtime-ms", "stop-to-run-ms", 1.0, note=DOWNTIME),
        figure("total time", "total-ms", "total-ms", 0.7, note=TOTAL),
        figure("blocktime", "blocktime-ms", "blocktime-ms", None),
    ]
    if faults:
        figures += [figure(f"fault {p}", p, p, 1.0, suffix="-traced", note=FAULT, unit="us") for p in ("p50", "p99")]
    return figures


def _precopy(size: str, turns: Turns) -> list[Figure]:
    """Both send all of the memory before the machine runs at the destination, and allow a downtime of 300 ms."""

    def figure(what: str, ours: str, theirs: str) -> Figure:
        rounds = [{"rv64": turn["rv64-precopy"][ours], "qemu": turn["qemu-precopy"][theirs]} for turn in turns]
        return ratio(f"{what} of precopy, {size}, rv64 / QEMU", rounds, "rv64", "qemu", None, note=PRECOPY, unit="ms")

    return [figure("downtime", "downtime-ms", "stop-to-run-ms"), figure("total time", "total-ms", "total-ms")]


async def _qemu(run: Run) -> dict[str, float]:
    what = f"a migration of QEMU ({run.mode}, {format_size(run.memory_bytes)})"
    return dict(await run_json(worker("_qemu_run", msgspec.json.encode(run).decode()), what, DEADLINE_S))


# ---- ours


async def _ours(kind: str, size_bytes: int, **migrate: str) -> dict[str, float]:
    """One migration between two daemons; `migrate`: more arguments of that request."""
    with tempfile.TemporaryDirectory(prefix="postcopy-bench-") as directory, trio.move_on_after(DEADLINE_S):
        paths = [f"{directory}/{side}" for side in ("source", "dest")]
        async with (
            _daemon(paths[0]),
            _daemon(paths[1]) as to,
            ControlClient.open(paths[0]) as source,
            ControlClient.open(paths[1]) as dest,
        ):
            await source.execute("start", {"kind": kind, "memory": size_bytes, "workload": "random", "seed": 1})
            await _has_done(source, OPERATIONS[kind])
            await source.execute("events", {"enable": True})
            began_s = time.perf_counter()
            await source.execute("migrate", {"to": to} | migrate)
            await _completed(source)
            total_ms = (time.perf_counter() - began_s) * 1e3
            arrived = await _has_done(dest, 0)
            await _has_done(dest, arrived["guest"]["operations"] + 1)  # it works on
            counted = arrived["migration"]
            return {
                "downtime-ms": counted["downtime-ms"],
                "total-ms": total_ms,
                "from-pause-ms": counted["total-ms"],
                "blocktime-ms": max(counted["blocktime-ms"], default=0.0),
                "p50": counted["fault-latency-us"]["p50"],
                "p99": counted["fault-latency-us"]["p99"],
            }
    raise MigrationError(f"a migration of {kind}, {format_size(size_bytes)}, did not end within {DEADLINE_S:g} s")


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


async def _completed(source: ControlClient) -> None:
    while True:
        event = await source.next_event()
        status = event["data"].get("status")
        if event["event"] == "migration-status" and status == "completed":
            return
        if event["event"] == "migration-ended":  # which comes last, when the machine's memory is given back
            raise MigrationError(f"a migration of postcopy: {status}: {event['data']['error']}")


async def _has_done(client: ControlClient, operations: int) -> Json:
    """The machine, when its guest has done so many."""
    while True:
        machine: Json = (await client.execute("status"))["machines"][0]
        if machine["guest"]["failures"]:
            raise MigrationError(f"the guest has found {machine['guest']['failures']} failures")
        if machine["guest"]["operations"] >= operations:
            return machine
        await trio.sleep(LOOK_S)
