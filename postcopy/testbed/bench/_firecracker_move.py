# SPDX-License-Identifier: Apache-2.0
"""``firecracker-move``: a running microVM from one Firecracker to another one on this host, over loopback.

It stands still from the request to pause until it runs again. Most of that time are Firecracker's own calls, by its own
log of the same move: pause, the state without memory, load with a userfaultfd, resume. What is left is ours. `copied`
is what one would do without us: a Full snapshot, its file copied, and loaded from there.

One microVM of each size moves from round to round; the guest counts in its pages all the time.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from postcopy._child import python
from postcopy.errors import MigrationError
from postcopy.records.results import Measurement
from postcopy.testbed._processes import open_child, run_json
from postcopy.testbed._scratch import scratch
from postcopy.testbed.bench._common import DEADLINE_S, Rounds, ratio
from postcopy.testbed.bench._firecracker import Snapshot, check_firecracker, next_line, thread
from postcopy.testbed.firecracker import Firecracker

SIZES_MIB = (128, 2048)
WRITTEN_PAGES = 32000
"""Pages that the guest has written, spread over its memory: 125 MiB."""
TOUCHES = 500
"""Of a pass, that it writes while it is moved."""
ALLOWED_MS = 25.0
OURS_MS = 5.0
GROWTH = 1.25
_CALL = re.compile(r"^(\S{26})\S* \[\S+:fc_api\] (The API server received a \w+ |.*Status code: )", re.MULTILINE)
"""Of Firecracker's log: when a request was read, and when it was answered."""

PAUSE = (
    "from the request to pause until the microVM runs; calls: Firecracker's own, by its log; copied: by a Full"
    " snapshot, whose file is copied"
)
OURS = "all but Firecracker's own calls of the same move"

check_firecracker_move = check_firecracker


async def measure_firecracker_move(rounds: int) -> list[Measurement]:
    """How long a microVM stands still, with little and with much memory."""
    found: dict[int, Rounds] = {}
    for size_mib in SIZES_MIB:
        found[size_mib] = await _moves(rounds, size_mib)
    figures = []
    for size_mib, turns in found.items():
        figures.append(ratio(
            f"move of {size_mib} MiB, pause to resumed / allowed", turns, "moved", "allowed", 1.0, note=PAUSE, unit="ms"
        ))  # fmt: skip
        ours = [{"ours": turn["moved"] - turn["calls"], "allowed": OURS_MS} for turn in turns]
        name = f"move of {size_mib} MiB, what is ours of it / allowed"
        figures.append(ratio(name, ours, "ours", "allowed", 1.0, note=OURS, unit="ms"))
    small, large = (found[size] for size in SIZES_MIB)
    growth = [{"small": one["moved"], "large": other["moved"]} for one, other in zip(small, large, strict=True)]
    name = f"move of {SIZES_MIB[1]} MiB / of {SIZES_MIB[0]} MiB"
    figures.append(ratio(name, growth, "large", "small", GROWTH, unit="ms"))
    return figures


async def _moves(rounds: int, size_mib: int) -> Rounds:
    turns: Rounds = []
    with ExitStack() as vms, scratch() as directory:
        vm = vms.enter_context(await thread(Firecracker.start))
        await thread(vm.boot, size_mib, f"pages={WRITTEN_PAGES} spread=1 touches={TOUCHES}")
        await thread(vm.wait_ready)
        await thread(vm.wait_passes, 1)
        for _ in range(rounds):
            copied = await thread(_copied, vm, directory)
            there = vms.enter_context(await thread(Firecracker.start))
            before = [len(await thread(one.log_path.read_text)) for one in (vm, there)]
            moved = await _moved(vm, there)
            logs = [(await thread(one.log_path.read_text)) for one in (vm, there)]
            # pause and snapshot; load and resume
            calls = sum(_calls_ms(log[since:], 2) for log, since in zip(logs, before, strict=True))
            turn = {"allowed": ALLOWED_MS, "moved": moved, "calls": calls, "copied": copied}
            vm.close()
            vm = there
            turns.append(turn)
    return turns


def _ms(call: Callable[[], object]) -> float:
    before_s = time.perf_counter()
    call()
    return (time.perf_counter() - before_s) * 1e3


def _calls_ms(log: str, at_least: int) -> float:
    """By a piece of Firecracker's log: what its calls took, each from the request to its answer. `MigrationError` when
    there are fewer than that: another version words it otherwise."""
    took_s, begun, calls = 0.0, None, 0
    for at, what in _CALL.findall(log):
        if what.startswith("The API server received"):
            begun = None if " Get " in what else datetime.fromisoformat(at)
        elif begun is not None:
            took_s += (datetime.fromisoformat(at) - begun).total_seconds()
            begun = None
            calls += 1
    if calls < at_least:
        raise MigrationError(f"Firecracker's log tells {calls} of at least {at_least} calls:\n{log[-2000:]}")
    return took_s * 1e3


def _copied(vm: Firecracker, directory: Path) -> float:
    snapshot, there = Snapshot(directory), directory / "copy"

    def move() -> None:
        vm.pause()
        vm.snapshot(snapshot.state, snapshot.memory)
        shutil.copyfile(snapshot.memory, there)
        other.load(snapshot.state, memory=there, resume=True)

    with Firecracker.start() as other:
        took_ms = _ms(move)
    vm.resume()
    snapshot.memory.unlink()
    there.unlink()
    return took_ms


async def _moved(here: Firecracker, there: Firecracker) -> float:
    before = (await thread(here.passes))[-1].values["pass"]
    async with AsyncExitStack() as stack:
        machine = ("--machine", "firecracker", "--json", "--log-level", "error", "--api-socket")
        command = python("-m", "postcopy", "dest", *machine, there.api_path, "--listen", "127.0.0.1:0")
        dest = await stack.enter_async_context(
            open_child(command, ask=signal.SIGTERM, end_s=10.0, stderr=subprocess.DEVNULL)
        )
        address = (await next_line(dest, "listening", lambda line: line["event"] == "listening"))["address"]
        command = python("-m", "postcopy", "source", *machine, here.api_path, "--connect", address)
        result: dict[str, Any] = await run_json(command, "a move of a microVM", DEADLINE_S)
        await next_line(dest, "result", lambda line: line["event"] == "result")
    after = (await thread(there.wait_passes, 1))[-1].values
    if after["errors"] or after["pass"] <= before:
        raise MigrationError(f"the guest found {after['errors']} wrong words in pass {after['pass']}:\n{there.said()}")
    return float(result["downtime-ms"])
