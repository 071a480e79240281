# SPDX-License-Identifier: Apache-2.0
"""`demo --machine qemu`: Linux in an unmodified QEMU moves to a second one by postcopy, and on to a third one by QEMU's
own postcopy, so that both stand beside each other at the end.

The demo starts all three QEMUs. The guest computes, checks its memory and does O_DIRECT I/O all the time, and answers
on its serial port: that is what is known from inside. What can be seen from outside is asked of QEMU's monitor and of
the kernel.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import trio
from msgspec.structs import replace

from postcopy._child import python
from postcopy.errors import ConfigurationError
from postcopy.output.tables import Row, Span, row
from postcopy.output.words import format_count, format_duration
from postcopy.records.commands import DemoMove, DemoQemu, DemoResult
from postcopy.records.migration import Check
from postcopy.testbed.chaos import ChaosPlan, open_chaos_proxy
from postcopy.testbed.qemu import Qemu, linux, own
from postcopy.testbed.qemu import check as check_qemu
from postcopy.units import format_size

# What is waited for ends with the QEMUs, and those end with the demo.
thread = partial(trio.to_thread.run_sync, abandon_on_cancel=True)
MEMORY_BYTES = 256 << 20
OTHER_MIB = 128  # of the memory are not the guest's program's
DISK_BYTES = 4 << 20
REQUESTS = 256  # of each pass to the disk: it is full after four of them, and from then on is read, too
PASSES = 6  # of the guest, before it moves
WAITS_S = 3.0  # so long after the network is whole again QEMU's own migration is looked at: it waits for an operator
NOTICES_S = 30.0  # for QEMU's own migration to end, or to notice that it was cut
ENDS_S = 10.0  # for the source's QEMU to end, which has been told so
COMPLETED, PAUSED = "completed", "postcopy-paused"
WAITS = {
    PAUSED: ": it waits for an operator, and so does the guest",
    "postcopy-active": ": it has not noticed that the network is silent, and the guest waits",
}
"""What else is to be said of a status."""


Move = Callable[[str, str], Awaitable[DemoResult]]
"""By postcopy, of the QEMU with this monitor to that with that one."""


class QemuDemo:
    def __init__(self, memory_bytes: int | None, cpus: int | None) -> None:
        """Of the virtual machine; None: not said. `ResourceError` without QEMU, `ConfigurationError` for too little
        memory."""
        check_qemu()
        self.memory_bytes = memory_bytes or MEMORY_BYTES
        self._mib = self.memory_bytes >> 20
        self._cpus = cpus or 1
        if self._mib < linux.MEMORY_MIB:
            raise ConfigurationError(f"--memory: this Linux needs at least {format_size(linux.MEMORY_MIB << 20)}")
        self.subject = f"qemu, {format_size(self.memory_bytes)}, {format_count(self._cpus, 'vCPU')}, Linux"

    async def both(self, directory: Path, move: Move, bandwidth: int, plan: ChaosPlan | None) -> DemoResult:
        """The result of `move`, with what was verified, and both moves. `bandwidth` (bytes/s, 0: no limit) and `plan`:
        of the network. `ResourceError` where Debian's packages cannot be had."""
        system = await thread(linux.build)
        disk, trace = directory / "disk.img", directory / "trace"
        await thread(_make_disk, disk)
        work_mib = self._mib - OTHER_MIB
        words = f"work={work_mib} disk={REQUESTS} stride={int(work_mib * 256 * own.GOLDEN)}"
        options: dict[str, Any] = {"machine": "pc", "cpus": self._cpus, "disk": disk, **system.boot(words)}
        under_run = python("-m", "postcopy", "run", "--")
        with ExitStack() as stack:

            async def start(**more: Any) -> Qemu:
                # Never abandoned: it would be nobody's.
                begin = partial(Qemu.start, self._mib, **options, **more)
                return stack.enter_context(await trio.to_thread.run_sync(begin))

            first = await start(prefix=under_run)
            second = await start(prefix=under_run, incoming=True)
            await thread(first.wait_passes, PASSES)
            before = (await thread(first.ask, "status")).values
            said = (await thread(first.execute, "query-version"))["qemu"]
            result = await move(first.qmp_path, second.qmp_path)
            ours, now = await _examine(first, second, before, result)
            result.verified = result.status == COMPLETED and all(item.ok for item in result.verification)
            first.close()
            # Without -S: the machine is to run there as soon as it can.
            third = await start(arguments=("-incoming", "defer", *own.tracing(trace)))
            theirs = await _move_by_qemu(second, third, now, trace, bandwidth, plan)
        version = "{major}.{minor}.{micro}".format(**said)
        result.qemu = DemoQemu(version=version, system=f"Linux {system.version}", postcopy=ours, own=theirs)
        return result


def _make_disk(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(DISK_BYTES)


def _look_at_all(qemu: Qemu) -> dict[str, int]:
    """What the guest says of itself, when it has looked at all pages that it works on."""
    qemu.ask("check")
    return qemu.ask("status").values


def _missing_bytes(qemu: Qemu) -> int:
    """Memory that its process would still wait for: of mappings that a userfaultfd watches for missing pages."""
    missing = 0
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{qemu.pid}/smaps").read_text()):
        if re.search(r"^VmFlags:.* u[mi]\b", mapping, re.MULTILINE):
            missing += int(re.findall(r"^Size: *(\d+) kB", mapping, re.MULTILINE)[0]) << 10
    return missing


def _ended(qemu: Qemu) -> bool:
    try:
        qemu.process.wait(ENDS_S)
    except subprocess.TimeoutExpired:
        return False
    return True


async def _examine(
    source: Qemu, dest: Qemu, before: dict[str, int], result: DemoResult
) -> tuple[DemoMove, dict[str, int]]:
    """Of the move by postcopy: its figures, and what the guest, which said `before`, says now. What was verified is
    added to `result`."""
    await thread(dest.wait_passes, PASSES)
    after = await thread(_look_at_all, dest)
    status, missing, ended = await thread(dest.status), await thread(_missing_bytes, dest), await thread(_ended, source)
    result.verification += [_went_on(before, after), _disk(before, after), *_outside(source, status, missing, ended)]
    latency = result.fault_latency_us
    if latency is not None and not latency.count:
        latency = None
    move = DemoMove(
        status=result.status,
        stop_to_run_ms=await thread(own.stop_to_run_ms, source, dest),
        total_ms=result.total_ms,
        fault_p50_us=latency.p50 if latency is not None else None,
        fault_p99_us=latency.p99 if latency is not None else None,
        recovered=result.recoveries.count if result.recoveries is not None else 0,
        **_since(before, after),
    )
    return move, after


def _since(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {"passes": after["passes"] - before["passes"], "errors": after["errors"] + after["stale"]}


def _went_on(before: dict[str, int], after: dict[str, int]) -> Check:
    wrong = after["errors"] + after["stale"]
    return Check(
        ok=after["nonce"] == before["nonce"] and after["passes"] > before["passes"] and not wrong,
        what=f"the guest went on, from pass {before['passes']} to {after['passes']}, and found {wrong} wrong pages",
        how="asked on its serial port before and after, and after it had looked at all pages that it works on; a number"
        f" that it had made at boot, and kept in its memory only, is the same: {before['nonce']}, {after['nonce']}",
    )


def _disk(before: dict[str, int], after: dict[str, int]) -> Check:
    saved, loaded = (after[name] - before[name] for name in ("saved", "loaded"))
    return Check(
        ok=loaded > 0,
        what=f"it went on with its disk: {loaded} pages loaded from there since, {saved} saved",
        how="with O_DIRECT, by the device, into pages that the processor had not touched before; its counters",
    )


def _outside(source: Qemu, status: str, missing_bytes: int, ended: bool) -> list[Check]:
    return [
        Check(ok=status == "running", what=f"QEMU's monitor says: {status}", how="query-status at the destination"),
        Check(
            ok=not missing_bytes,
            what=f"{format_size(missing_bytes)} of its memory may be missing, as the kernel sees it",
            how="the mappings that a userfaultfd watches, in /proc/PID/smaps of the destination's QEMU",
        ),
        Check(
            ok=ended,
            what=f"the source's QEMU {'has ended' if ended else 'still runs'}",
            how=f"its process, {source.pid}",
        ),
    ]


async def _move_by_qemu(
    source: Qemu, dest: Qemu, before: dict[str, int], trace: Path, bandwidth: int, plan: ChaosPlan | None
) -> DemoMove:
    """By QEMU's own postcopy with preempt, through a network that is as bad. One that was cut is left as it is then."""
    address = await thread(partial(own.listen, source, dest, preempt=True))
    switched = trio.Event()
    async with AsyncExitStack() as stack:
        if plan is not None:
            proxy = await stack.enter_async_context(open_chaos_proxy(address, plan, begin=switched))
            address = str(proxy.address)
        await thread(own.begin, source, address)
        stood_ms = await thread(own.stop_to_run_ms, source, dest)
        if bandwidth:
            await thread(own.limit, source, bandwidth)
        switched.set()
        status = await thread(own.outcome, source, dest, NOTICES_S)
        if status == PAUSED:
            await trio.sleep(WAITS_S)
            # The destination's monitor may not answer: a device that waits for a page holds QEMU's lock.
            if (await thread(source.execute, "query-migrate"))["status"] == COMPLETED:
                status = await thread(own.outcome, source, dest)
    move = DemoMove(status=status, stop_to_run_ms=stood_ms)
    if status != COMPLETED:
        return move
    times = await thread(own.completed, source, dest)
    await thread(dest.wait_passes, PASSES)
    since = _since(before, await thread(_look_at_all, dest))
    await thread(own.quit, dest)
    found = own.percentiles_us(own.latencies_us(await thread(trace.read_text)))
    faults = {f"fault_{name}_us": value for name, value in found.items()}
    return replace(move, total_ms=times.from_pause_ms, **faults, **since)


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
        return Span(f"{move.status}{WAITS.get(move.status, '')}", "bad")

    moves = (ours, theirs)
    rows = [
        each("guest", found.system, "the same, after that"),
        row("migration", *map(words, moves)),
        each("guest stood still", *(time(move.stop_to_run_ms, 1e-3) for move in moves)),
        each("until all memory had come", *(time(move.total_ms, 1e-3) for move in moves)),
        each("fault, median", *(time(move.fault_p50_us, 1e-6) for move in moves)),
        each("fault, 99 % within", *(time(move.fault_p99_us, 1e-6) for move in moves)),
        each("recoveries by itself", *(str(move.recovered) for move in moves)),
        each("the guest afterwards", *map(_guest, moves)),
    ]
    return ("", "by postcopy", f"by QEMU {found.version} itself"), rows


def _guest(move: DemoMove) -> str:
    if move.passes is None or move.errors is None:
        return "gave no answer"
    return f"{move.passes} passes, {move.errors} wrong pages"
