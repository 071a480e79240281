# SPDX-License-Identifier: Apache-2.0
"""`demo --machine qemu`: Linux in an unmodified QEMU moves to another one by postcopy; after that another one of the
same moves by QEMU's own postcopy, so that both stand beside each other at the end.

The demo starts all four QEMUs. The guest computes, checks its memory and does O_DIRECT I/O all the time, and answers on
its serial port: that is what is known from inside. What can be seen from outside is asked of QEMU's monitor and of the
kernel.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import trio

from postcopy.errors import MigrationError
from postcopy.output.tables import Row, Span, row
from postcopy.output.words import format_count, format_duration
from postcopy.records.commands import DemoMove, DemoQemu, DemoResult
from postcopy.records.migration import Check
from postcopy.testbed.chaos import ChaosPlan, open_chaos_proxy
from postcopy.testbed.qemu import Qemu, linux, own
from postcopy.units import format_size

thread = trio.to_thread.run_sync
MEMORY_BYTES = 256 << 20
DISK_BYTES = 64 << 20
TRACE = "trace"  # of the destination
PASSES = 3  # of the guest, before it moves
WAITS_S = 3.0  # so long after the network is whole again QEMU's own migration is looked at: it waits for an operator
ENDS_S = 10.0  # for the source's QEMU to end, which has been told so
COMPLETED, PAUSED = "completed", "postcopy-paused"


class Pair(NamedTuple):
    """Two QEMUs with the same virtual machine: one in which it works, and one that waits for it."""

    source: Qemu
    dest: Qemu
    before: dict[str, int]
    """What the guest said of itself, when it had worked for a while."""


Move = Callable[[str, str], Awaitable[DemoResult]]
"""By postcopy, of the QEMU with this monitor to that with that one."""


class QemuDemo:
    def __init__(self, memory_bytes: int | None, cpus: int | None) -> None:
        """Of the virtual machine; None: not said."""
        self.memory_bytes = memory_bytes or MEMORY_BYTES
        self._cpus = cpus or 1
        self.subject = f"qemu, {format_size(self.memory_bytes)}, {format_count(self._cpus, 'vCPU')}, Linux"

    async def both(self, directory: Path, move: Move, bandwidth: int, plan: ChaosPlan | None) -> DemoResult:
        """The result of `move`, with what was verified, and both moves. `bandwidth` (bytes/s, 0: no limit) and `plan`:
        of the network."""
        async with self._open_pair(directory / "ours", by_qemu=False) as pair:
            result = await move(pair.source.qmp_path, pair.dest.qmp_path)
            ours = await _examine(pair, result)
            said = pair.dest.execute("query-version")["qemu"]
        result.verified = result.status == COMPLETED and all(item.ok for item in result.verification)
        async with self._open_pair(directory / "own", by_qemu=True) as pair:
            theirs = await _move_by_qemu(pair, bandwidth, plan)
        result.qemu = DemoQemu(version="{major}.{minor}.{micro}".format(**said), postcopy=ours, own=theirs)
        return result

    @asynccontextmanager
    async def _open_pair(self, directory: Path, *, by_qemu: bool) -> AsyncIterator[Pair]:
        """Both end with the block. `by_qemu`: without our library, and with a trace at the destination."""
        directory.mkdir()
        guest = await thread(linux.build)
        disk = directory / "disk.img"
        disk.touch()
        os.truncate(disk, DISK_BYTES)
        with ExitStack() as stack:

            async def start(name: str, incoming: bool, arguments: Sequence[str] = ()) -> Qemu:
                begin = partial(
                    Qemu.start,
                    directory / name,
                    memory_mib=self.memory_bytes >> 20,
                    linux=guest,
                    cpus=self._cpus,
                    disk=disk,
                    incoming=incoming,
                    library=not by_qemu,
                    arguments=arguments,
                )
                return stack.enter_context(await thread(begin))

            source = await start("source", False)
            dest = await start("dest", True, own.tracing(directory / TRACE) if by_qemu else ())
            await thread(source.wait_passes, PASSES)
            yield Pair(source, dest, await thread(source.ask, "status"))


async def _examine(pair: Pair, result: DemoResult) -> DemoMove:
    """Of the move by postcopy: the figures, and what was verified, which is added to `result`."""
    source, dest, before = pair
    with contextlib.suppress(MigrationError):
        await thread(dest.wait_passes, PASSES)
    after = await thread(dest.ask, "check")
    status = (await thread(dest.execute, "query-status"))["status"]
    ended = await thread(source.ends, ENDS_S)
    registered = dest.registered()
    result.verification += [
        _inside(before, after),
        Check(
            ok=after["io"] > before["io"] and not after["io_errors"],
            what=f"its O_DIRECT writes were read back right: {after['io']}, {before['io']} of them before the move",
            how="the guest's own counters: a block is written, read into other pages, and compared",
        ),
        Check(ok=status == "running", what=f"QEMU's monitor says: {status}", how="query-status, at the destination"),
        Check(
            ok=not registered,
            what=f"{registered or 'no'} pages of its memory are still missing",
            how="the mappings of QEMU in /proc/PID/smaps that a userfaultfd watches",
        ),
        Check(
            ok=ended,
            what=f"the source's QEMU has {'ended' if ended else 'not ended'}",
            how=f"its process, {source.pid}",
        ),
    ]
    latency = result.fault_latency_us
    return DemoMove(
        status=result.status,
        stop_to_run_ms=await thread(own.stop_to_run_ms, source, dest),
        total_ms=result.total_ms,
        fault_p50_us=latency.p50 if latency is not None else None,
        fault_p99_us=latency.p99 if latency is not None else None,
        recoveries=result.recoveries.count if result.recoveries is not None else 0,
        passes=after["pass"] - before["pass"],
        errors=after["errors"],
    )


def _inside(before: dict[str, int], after: dict[str, int]) -> Check:
    return Check(
        ok=after["nonce"] == before["nonce"] and after["pass"] > before["pass"] and not after["errors"],
        what=f"the guest went on, from pass {before['pass']} to {after['pass']}, and found {after['errors']} wrong pages",
        how="asked on its serial port before and after, the second time after it had looked at all of its memory; it is"
        f" the same one by a number that it had made at boot ({before['nonce']:#x})",
    )


async def _move_by_qemu(pair: Pair, bandwidth: int, plan: ChaosPlan | None) -> DemoMove:
    """By QEMU's own postcopy with preempt, through a network that is as bad. One that was cut is left as it is then."""
    source, dest, before = pair
    listen = partial(own.listen, source, dest, preempt=True, bandwidth=bandwidth or own.NO_LIMIT)
    address = await thread(listen)
    switched = trio.Event()
    async with contextlib.AsyncExitStack() as stack:
        if plan is not None:
            proxy = await stack.enter_async_context(open_chaos_proxy(address, plan, begin=switched))
            address = str(proxy.address)
        await thread(own.begin, source, address)
        await thread(own.event_us, source, "STOP")
        switched.set()
        status = await thread(own.outcome, source, dest)
        if status == PAUSED:
            await trio.sleep(WAITS_S)
            status = (await thread(source.execute, "query-migrate"))["status"]
    move = DemoMove(status=status, stop_to_run_ms=await thread(own.stop_to_run_ms, source, dest))
    if status == COMPLETED:
        move.total_ms = (await thread(own.completed, source, dest)).from_pause_ms
        await thread(dest.wait_passes, PASSES)
        after = await thread(dest.ask, "check")
        move.passes, move.errors = after["pass"] - before["pass"], after["errors"]
        await thread(dest.quit)  # its trace is whole then
        found = own.percentiles_us(own.latencies_us(trace.read_text()))
        move.fault_p50_us, move.fault_p99_us = found["p50"], found["p99"]
    return move


# ---- for a person


def table(found: DemoQemu) -> tuple[tuple[str, ...], list[Row]]:
    """Header and rows of both moves."""
    ours, theirs = found.postcopy, found.own

    def each(label: str, *texts: str) -> Row:
        return row(label, *texts)

    def time(value: float | None, unit_s: float) -> str:
        return "-" if value is None else format_duration(value * unit_s)

    def words(move: DemoMove) -> Span:
        if move.status == COMPLETED:
            return Span(COMPLETED, "good")
        waits = ": it waits for an operator, and so does the guest" if move.status == PAUSED else ""
        return Span(f"{move.status}{waits}", "bad")

    moves = (ours, theirs)
    rows = [
        row("migration", *map(words, moves)),
        each("guest stood still", *(time(move.stop_to_run_ms, 1e-3) for move in moves)),
        each("until all memory had come", *(time(move.total_ms, 1e-3) for move in moves)),
        each("fault, median", *(time(move.fault_p50_us, 1e-6) for move in moves)),
        each("fault, 99 % within", *(time(move.fault_p99_us, 1e-6) for move in moves)),
        each("recoveries by itself", *(str(move.recoveries) for move in moves)),
        each("the guest afterwards", *map(_guest, moves)),
    ]
    return ("", "by postcopy", f"by QEMU {found.version} itself"), rows


def _guest(move: DemoMove) -> str:
    if move.passes is None or move.errors is None:
        return "gave no answer"
    return f"{move.passes} passes, {move.errors} wrong pages"
