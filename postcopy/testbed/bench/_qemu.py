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
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec

from postcopy.errors import ResourceError
from postcopy.testbed import probe
from postcopy.testbed._processes import run_json
from postcopy.testbed.bench._common import DEADLINE_S, Figure, ratio, worker
from postcopy.testbed.bench._daemons import move
from postcopy.testbed.bench._qemu_run import QEMU, Run
from postcopy.units import format_size

OLDEST = (7, 1)
"""The first one that has postcopy-preempt."""
SIZES = (256 << 20, 1 << 30)
OPERATIONS = {"rv64": 100_000, "kvm": 1}
"""That the guest does, after it has filled its memory, before it is migrated. An emulated KVM does few a second."""
MODES = {"qemu": "postcopy", "qemu-preempt": "preempt"}

DOWNTIME = (
    "ours: from the request to pause until the source knows that the machine runs; QEMU: from its event STOP to RESUME;"
    " says: the downtime of query-migrate, without what the destination does"
)
TOTAL = "from the request to migrate until the source has completed, on both sides; the goal is on these"
PRECOPY = "both may stop the guest for 300 ms for what is left, which this one writes as fast as it can"
FAULT = "from the fault read to its page placed; QEMU's by its trace, in runs of their own"

Part = Callable[[], Awaitable[dict[str, float]]]
"""One migration; what it took."""
Turns = list[dict[str, dict[str, float]]]
"""Of each round, by part and by what it took."""


async def measure_qemu(rounds: int) -> list[Figure]:
    """Downtime, total time, fault latency and blocktime, ours over QEMU's."""
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
            # Not less than one: what QEMU's clocks can tell; a small memory may come before its guest has missed any.
            values["qemu-better"] = max(1.0, min(values[name] for name in MODES))
            if what == "downtime":
                values |= {f"{name} says": turn[name]["downtime-ms"] for name in MODES}
            if what == "total time":
                values |= {f"{name} from the pause": turn[name]["from-pause-ms"] for name in (kind, *MODES)}
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


async def _ours(kind: str, size_bytes: int, **migrate: str) -> dict[str, float]:
    """In daemons that are new, as QEMU's processes are; `migrate`: more arguments of that request."""
    moved = await move(kind, size_bytes, "random", OPERATIONS[kind], **migrate)
    counted = moved.counted
    return {
        "downtime-ms": counted["downtime-ms"],
        "total-ms": moved.total_ms,
        "from-pause-ms": counted["total-ms"],
        "blocktime-ms": max(counted["blocktime-ms"], default=0.0),
        "p50": counted["fault-latency-us"]["p50"],
        "p99": counted["fault-latency-us"]["p99"],
    }
