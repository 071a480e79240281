# SPDX-License-Identifier: Apache-2.0
"""``qemu-move``: a virtual machine of QEMU moves to another QEMU on this host, by postcopy and by QEMU's own postcopy.

All of them have the same guest, which goes through its memory in a scattered order, looks at each page and writes it.
QEMU emulates the processor (TCG), everything goes over loopback without a limit of bandwidth, and each move begins with
new processes. Ours is asked as a user asks it: a daemon has the machine, and gets `migrate` on its control socket.

The time for which the machine stands still is told by QEMU in both cases: from its event STOP to RESUME.

How long all of it takes depends on what the guest does meanwhile, and one that is served sooner does more. So the same
is measured with a guest that touches none of its pages while it moves: it waits at its serial port.

Then the same once more through a network that is cut when a third of the memory has passed, and whole again when all
who lost it have said so.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from typing import Any

import trio

from postcopy._child import python
from postcopy.errors import MigrationError
from postcopy.records.results import Measurement
from postcopy.service.client import ControlClient
from postcopy.testbed import qemu
from postcopy.testbed._guest import GuestLine
from postcopy.testbed._processes import Child, open_child
from postcopy.testbed._scratch import scratch
from postcopy.testbed.bench._common import DEADLINE_S, by_turns, ratio
from postcopy.testbed.bench._firecracker import next_line, thread
from postcopy.testbed.chaos import ChaosProxy, open_chaos_proxy
from postcopy.testbed.qemu import Qemu, own
from postcopy.units import format_size

MEMORY_MIB = 256
PASS_PAGES = 4096
"""That the guest touches in a pass, of all."""
MARGIN_MS = 2.0
"""Ours may take so much longer from stop to run."""
CUT_PUSH_S = 4.0
"""That the push of all memory takes where it is cut meanwhile."""
CUT_AT = 1 / 3
WAITS_S = 3.0
"""So long after the network is whole again QEMU's own migration is looked at."""
LOOK_S = 0.005
MODES = {"qemu": False, "preempt": True}
"""QEMU's own ways, and whether it has a connection of its own for pages that are waited for."""
FAULTS = {"ours": "ours", "preempt": "traced"}
"""Whose faults, and of which part."""

STANDS = "by QEMU's events STOP at the source and RESUME at the destination; QEMU's: the better of its two ways"
TOTAL = "from the request to migrate until the source has completed; QEMU's: the better of its two ways"
FAULT = "from the fault read to its page placed; QEMU's by its trace, in runs of their own"
IDLE = "the same of a guest that looks at its serial port, and touches no page while it moves"
BLOCKED = "how long the guest's processor waited for pages; a total of its own, for what the others are made of"
CUT = "1: ours has completed by itself, and QEMU's destination is in postcopy-paused, where it waits for an operator"

check_qemu_move = qemu.check
Part = Callable[..., Awaitable[dict[str, float]]]
"""One move; what it took."""


async def measure_qemu_move(rounds: int) -> list[Measurement]:
    """Stop to run, latency of faults and total time, ours over QEMU's; and the network cut in the middle."""
    return await compare(rounds, MEMORY_MIB)


async def compare(rounds: int, memory_mib: int) -> list[Measurement]:
    """With a guest of this size."""
    parts: dict[str, Part] = {"ours": partial(_ours, memory_mib)}
    parts |= {name: partial(_own, memory_mib, preempt) for name, preempt in MODES.items()}
    parts |= {f"idle {name}": partial(part, idle=True) for name, part in parts.items()}
    parts["traced"] = partial(_own, memory_mib, True, traced=True)
    turns = await by_turns(rounds, parts)
    cuts = await by_turns(rounds, {"ours": partial(_ours_cut, memory_mib), "preempt": partial(_own_cut, memory_mib)})

    def figure(
        what: str, value: str, goal: float | None, note: str, *, of: str = "", margin: float = 0.0
    ) -> Measurement:
        values = [{name: turn[of + name][value] for name in ("ours", *MODES)} for turn in turns]
        # Not less than one: a small memory may come before its guest has missed any.
        found = [each | {"allowed": max(1.0, min(each[name] for name in MODES)) + margin} for each in values]
        return ratio(f"{what}, {size} / QEMU's", found, "ours", "allowed", goal, note=note, unit="ms")

    size = format_size(memory_mib << 20)
    faults = [
        {f"{who} {p}": max(1.0, turn[part].get(p, 0.0)) for who, part in FAULTS.items() for p in ("p50", "p99")}
        for turn in turns
    ]
    return [
        figure(f"stop to run, against QEMU's and {MARGIN_MS:g} ms", "stop-to-run-ms", 1.0, STANDS, margin=MARGIN_MS),
        ratio(f"fault p50, {size} / QEMU's with preempt", faults, "ours p50", "preempt p50", 0.25, note=FAULT),
        figure("total time", "total-ms", 0.7, TOTAL),
        figure("total time, guest idle", "total-ms", None, IDLE, of="idle "),
        figure("total time from the pause", "from-pause-ms", None, "from STOP until the source has completed"),
        figure("blocktime", "blocktime-ms", None, BLOCKED),
        _cut_figure(f"network cut at a third of {size}", cuts),
    ]


def _cut_figure(name: str, cuts: list[dict[str, dict[str, float]]]) -> Measurement:
    """Of moves that have come to such an end; else there is an error in its place."""
    rounds = [
        {"completed": 1.0} | {f"{who}: {what}": value for who, values in cut.items() for what, value in values.items()}
        for cut in cuts
    ]
    return ratio(name, rounds, "completed", None, 1.0, at_most=False, unit="ms", units={"completed": "1"}, note=CUT)


@asynccontextmanager
async def _pair(
    memory_mib: int, *arguments: str, by_qemu: bool, idle: bool = False
) -> AsyncIterator[tuple[Qemu, Qemu]]:
    """A QEMU whose guest works, or has done so and is `idle`, and one that waits for it; `arguments`: more of that
    one."""
    append = f"spread=1 touches={PASS_PAGES} stride={int(memory_mib * 256 * own.GOLDEN)} wait={int(idle)}"
    with ExitStack() as stack:
        start = partial(Qemu.start, memory_mib, append)
        if by_qemu:
            # Without -S: the machine is to run there as soon as it can.
            twin = partial(start, arguments=("-incoming", "defer", *arguments))
        else:
            start = partial(start, prefix=python("-m", "postcopy", "run", "--"))
            twin = partial(start, incoming=True)
        source = stack.enter_context(await thread(start))
        dest = stack.enter_context(await thread(twin))
        await thread(source.wait_ready)
        await _passes(source, 1, idle=idle)
        yield source, dest


async def _passes(qemu: Qemu, count: int, *, idle: bool) -> GuestLine:
    """The last of so many more; one that is idle makes one, as it is told."""
    return await thread(qemu.order, "w") if idle else (await thread(qemu.wait_passes, count))[-1]


async def _works(source: Qemu, dest: Qemu, *, idle: bool = False) -> None:
    """The guest goes on where it was, and has found its pages as it left them; `MigrationError`."""
    before = source.passes()[-1].values["pass"]
    after = (await _passes(dest, 2, idle=idle)).values
    if after["errors"] or after["pass"] <= before:
        found = f"{after['errors']} wrong words in pass {after['pass']}, before the move it was in pass {before}"
        raise MigrationError(f"the guest found {found}\n{dest.said()}")


# ---- by QEMU itself


async def _own(memory_mib: int, preempt: bool, *, traced: bool = False, idle: bool = False) -> dict[str, float]:
    with scratch() as directory:
        log = directory / "trace"
        arguments = own.tracing(log) if traced else ()
        async with _pair(memory_mib, *arguments, by_qemu=True, idle=idle) as (source, dest):
            address = await thread(partial(own.listen, source, dest, preempt=preempt))
            await thread(own.begin, source, address)
            times = await thread(own.completed, source, dest)
            found = {
                "stop-to-run-ms": await thread(own.stop_to_run_ms, source, dest),
                "total-ms": times.total_ms,
                "from-pause-ms": times.from_pause_ms,
                "blocktime-ms": times.blocktime_ms,
            }
            await _works(source, dest, idle=idle)
            if traced:
                await thread(own.quit, dest)
                found |= own.percentiles_us(own.latencies_us(await thread(log.read_text)))
            return found


async def _own_cut(memory_mib: int) -> dict[str, float]:
    async with _pair(memory_mib, by_qemu=True) as (source, dest):
        address = await thread(partial(own.listen, source, dest, preempt=True))
        async with open_chaos_proxy(address) as proxy:
            await thread(own.begin, source, str(proxy.address))
            await thread(own.stop_to_run_ms, source, dest)
            await thread(own.limit, source, int((memory_mib << 20) / CUT_PUSH_S))
            cut_s = await _cut(proxy, memory_mib)
            noticed = await thread(own.outcome, source, dest)
            noticed_s = trio.current_time()
            proxy.heal()
            await trio.sleep(WAITS_S)
            status = (await thread(source.execute, "query-migrate"))["status"]
            if noticed != "postcopy-paused" or status == "completed":
                raise MigrationError(f"QEMU's own migration was cut, and is {noticed}, then {status}")
            return {
                "cut to postcopy-paused": 1e3 * (noticed_s - cut_s),
                "cut to a look that found it there": 1e3 * (trio.current_time() - cut_s),
            }


async def _cut(proxy: ChaosProxy, memory_mib: int) -> float:
    """When so much has passed; when that was."""
    with trio.move_on_after(DEADLINE_S):
        while True:
            if proxy.statistics.bytes_out >= CUT_AT * (memory_mib << 20):
                proxy.refuse()
                proxy.cut()
                return trio.current_time()
            await trio.sleep(LOOK_S)
    raise MigrationError(f"a third of the memory had not passed after {DEADLINE_S:g} s: {proxy.statistics}")


# ---- by postcopy


async def _ours(memory_mib: int, *, idle: bool = False) -> dict[str, float]:
    async with (
        _pair(memory_mib, by_qemu=False, idle=idle) as (source, dest),
        _sides(source, dest) as (client, arrives, address),
    ):
        began_s = time.perf_counter()
        await client.execute("migrate", {"to": address})
        await _becomes(client, "completed")
        total_ms = (time.perf_counter() - began_s) * 1e3
        result = await _line(arrives, "result")
        stands_ms = await thread(own.stop_to_run_ms, source, dest)
        await _works(source, dest, idle=idle)
        return {
            "stop-to-run-ms": stands_ms,
            "total-ms": total_ms,
            "from-pause-ms": result["total-ms"],
            "blocktime-ms": max(result["blocktime-ms"], default=0.0),
            "p50": result["fault-latency-us"]["p50"],
            "p99": result["fault-latency-us"]["p99"],
        }


async def _ours_cut(memory_mib: int) -> dict[str, float]:
    limit = f"{int((memory_mib << 20) / CUT_PUSH_S)}B/s"
    async with (
        _pair(memory_mib, by_qemu=False) as (source, dest),
        _sides(source, dest, "--max-bandwidth", limit) as (client, arrives, address),
        open_chaos_proxy(address) as proxy,
    ):
        await client.execute("migrate", {"to": str(proxy.address)})
        cut_s = await _cut(proxy, memory_mib)
        await _becomes(client, "postcopy-paused")
        noticed_s = trio.current_time()
        proxy.heal()
        await _becomes(client, "completed")
        completed_s = trio.current_time()
        result = await _line(arrives, "result")
        await _works(source, dest)
        return {
            "cut to postcopy-paused": 1e3 * (noticed_s - cut_s),
            "recovery": result["recoveries"]["max-ms"],
            "cut to completed": 1e3 * (completed_s - cut_s),
        }


@asynccontextmanager
async def _sides(source: Qemu, dest: Qemu, *arguments: str) -> AsyncIterator[tuple[ControlClient, Child, str]]:
    """A daemon that has the one, by its control socket; a `dest` for the other one, and where that listens.
    `arguments`: more of the daemon."""
    end = {"ask": signal.SIGTERM, "end_s": 10.0, "stderr": subprocess.DEVNULL}
    common = ("--listen", "127.0.0.1:0", "--json", "--machine", "qemu", "--qmp")
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(scratch())
        control = f"{directory}/control"
        daemon = (*common, source.qmp_path, "--control", control, *arguments)
        leaves = await stack.enter_async_context(open_child(python("-m", "postcopy", "daemon", *daemon), **end))
        await _line(leaves, "listening")
        twin = python("-m", "postcopy", "dest", *common, dest.qmp_path)
        arrives = await stack.enter_async_context(open_child(twin, **end))
        address = (await _line(arrives, "listening"))["address"]
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(_read_on, leaves)  # a full pipe would stop it
        client = await stack.enter_async_context(ControlClient.open(control))
        await client.execute("events", {"enable": True})
        yield client, arrives, str(address)
        nursery.cancel_scope.cancel()


async def _read_on(child: Child) -> None:
    async for _ in child.stdout:
        pass


async def _becomes(client: ControlClient, wanted: str) -> None:
    """`MigrationError` when it ends otherwise, or not in time."""
    with trio.move_on_after(DEADLINE_S):
        while True:
            event = await client.next_event()
            status = event["data"].get("status")
            if event["event"] == "migration-status" and status == wanted:
                return
            if event["event"] == "migration-ended":
                raise MigrationError(f"a move ended as {status}: {event['data']['error']}")
    raise MigrationError(f"a move did not come to {wanted} within {DEADLINE_S:g} s")


async def _line(child: Child, event: str) -> dict[str, Any]:
    """The next one with this event of one that has not failed."""
    line = await next_line(child, event, lambda line: line["event"] in (event, "result"))
    if line["event"] != event or line.get("error"):
        raise MigrationError(f"a side ended: {line['error']}")
    return line
