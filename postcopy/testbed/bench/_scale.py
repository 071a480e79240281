# SPDX-License-Identifier: Apache-2.0
"""Costs that must not grow: of a fault with the number of those that wait, of a look at the counters and of the choice
of the next run to push with the memory. And what it gives to serve one memory by several userfaultfds.

Waiting faults are real threads, of which the source answers none; a large memory is simulated by its bitmaps.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import threading
import time
from functools import partial
from typing import Any

import msgspec
import trio

from postcopy._native import ffi, lib
from postcopy.dataplane.histogram import Histogram
from postcopy.dataplane.pager import Pager, Stage
from postcopy.dataplane.pageserver import PageServer
from postcopy.errors import MigrationError, check
from postcopy.memory import Memory
from postcopy.records.results import Curve, Measurement
from postcopy.testbed._processes import run_json
from postcopy.testbed.bench._common import DEADLINE_S, pair, ratio, worker
from postcopy.testbed.bench._worker import HIT_NS, SEED, Job
from postcopy.uffd import How, UffdFeature, Userfaultfd, probe
from postcopy.units import format_size

PENDING = (1, 100, 10_000)
ANSWERED = 1000
MEMORIES = (64 << 20, 1 << 30, 64 << 30, 1 << 40)
CALLS = 2000
CLAIMS, CLAIM_PAGE_BYTES = 4096, 4096
STRIPES = (1, 2, 4, 8)
TOUCHERS = 8
STRIPED_BYTES = 64 << 20
_HEADER_BYTES = int(lib.PC_FRAME_HEADER_BYTES)


async def measure_scale(rounds: int) -> list[Measurement]:
    """Each as a curve."""

    async def part(what: str, size: int) -> Any:
        return await run_json(worker("_scale", what, str(size)), f"the measurement of {what}", DEADLINE_S)

    waiting = [{size: await part("pending", size) for size in PENDING} for _ in range(rounds)]
    sent, wakes = [[{str(size): both[size][what] for size in PENDING} for both in waiting] for what in ("sent", "wake")]
    counters, claims = [
        [{format_size(size): float(await part(what, size)) for size in MEMORIES} for _ in range(rounds)]
        for what in ("counters", "claim")
    ]
    striped = [{str(stripes): await _striped_us(stripes) for stripes in STRIPES} for _ in range(rounds)]
    most = format_size(MEMORIES[-1])
    waiters = Curve(over="threads that wait", x_unit="1", at={str(size): float(size) for size in PENDING})
    sizes = {format_size(size): float(size) for size in MEMORIES}
    memory = Curve(over="memory, simulated on bitmaps", x_unit="bytes", at=sizes)
    shards = Curve(over="userfaultfds of one memory", x_unit="1", at={str(each): float(each) for each in STRIPES})
    return [
        ratio(
            f"from a fault's event to its request, {PENDING[-1]} pending / 1", sent, str(PENDING[-1]), "1", 1.5,
            curve=waiters,
        ),
        ratio(
            f"the kernel's wake-up for one page, {PENDING[-1]} pending / 1", wakes, str(PENDING[-1]), "1", None,
            curve=waiters, note="UFFDIO_WAKE looks at all that wait on a userfaultfd",
        ),
        ratio(
            f"reading the counters, {most} / {format_size(MEMORIES[0])}", counters, most, format_size(MEMORIES[0]), 1.5,
            curve=memory,
        ),
        ratio(
            f"claiming a run, {most} / {format_size(MEMORIES[0])}", claims, most, format_size(MEMORIES[0]), 1.5,
            curve=memory, unit="ns",
            note=f"the next page to push, of {CLAIMS} that are left, spread over all of the memory",
        ),
        ratio(
            f"a fault in shared memory, {STRIPES[-1]} userfaultfds / 1", striped, str(STRIPES[-1]), "1", None,
            curve=shards,
            note=f"{TOUCHERS} threads that fault in one memory; elapsed time by the number of faults",
        ),
    ]  # fmt: skip


async def _striped_us(stripes: int) -> float:
    result = await pair("striped", STRIPED_BYTES, bulk_channels=stripes - 1, pin=True, module="_scale")
    return float(result["us"])


# ---- the processes


def main(what: str, size: str = "") -> None:
    """Prints one number, or takes a part in a `pair` when `what` is its `Job`."""
    if what == "pending":
        print(json.dumps(trio.run(_pending, int(size))), flush=True)
        os._exit(0)  # with all those that wait
    if what == "counters":
        print(_counters_us(int(size)))
        return
    if what == "claim":
        print(check(lib.pc_bench_claim(int(size) // CLAIM_PAGE_BYTES, CLAIMS), "claiming runs"))
        return
    job = msgspec.json.decode(what, type=Job)
    if job.cpus:
        os.sched_setaffinity(0, job.cpus)
    trio.run(_striped_source if job.role.endswith("source") else _striped_dest, job)


def _counters_us(size_bytes: int) -> float:
    """Of a pager that never arms the memory: only its maps are there."""
    pager = ffi.new("struct pc_pager **")
    check(lib.pc_pager_new(-1, pager), "making a pager")
    memory = ffi.new("struct pc_memory *", {"base": ffi.cast("void *", 1 << 46), "size_bytes": size_bytes, "fd": -1})
    memory.page_bytes = lib.pc_page_bytes()
    memory.kind = lib.PC_MEMORY_ANON
    check(lib.pc_pager_add_block(pager[0], memory, -1), "adding memory")
    stats = ffi.new("struct pc_pager_stats *")
    return _each_us(lambda: lib.pc_pager_stats(pager[0], stats))


def _each_us(call: Any) -> float:
    """What one call takes: the median of many, each of ten."""
    times_ns = []
    for _ in range(CALLS // 10):
        begin_ns = time.perf_counter_ns()
        for _ in range(10):
            call()
        times_ns.append(time.perf_counter_ns() - begin_ns)
    return statistics.median(times_ns) / 10 / 1e3


async def _pending(pending: int) -> dict[str, float]:
    """What the fault thread takes to request a page, and the kernel to wake who waits for it, of all who wait."""

    page_bytes = int(lib.pc_page_bytes())
    threading.stack_size(64 << 10)
    ours, theirs = socket.socketpair()
    memory = Memory.create("anon", (pending + ANSWERED) * page_bytes)
    pager = Pager()
    pager.add_block(memory)
    api = probe()
    features = UffdFeature(lib.pc_pager_features(int(api.features)))
    uffd = Userfaultfd.open(api.how, features)
    pager.adopt_shard(os.dup(uffd.fileno()), int(features))
    pager.arm(0, 0, 0, memory.pages)
    pager.attach_urgent(0, theirs.detach())
    await pager.confirm()
    threading.Thread(target=_answer, args=(ours, pending, page_bytes), daemon=True).start()
    for page in range(pending):
        threading.Thread(target=memory.read, args=(page * page_bytes, 1), daemon=True).start()
    with trio.fail_after(DEADLINE_S / 2):
        while pager.statistics().pending_faults < pending:  # noqa: ASYNC110 -- nothing tells of it
            await trio.sleep(0.01)
    for page in range(pending, pending + ANSWERED):
        await trio.to_thread.run_sync(memory.read, page * page_bytes, 1)
    wake_us = _each_us(
        lambda: lib.pc_uffd_wake(uffd.fileno(), memory.address + (memory.pages - 1) * page_bytes, page_bytes)
    )
    return {"sent": pager.latency(Stage.SENT).percentile(50) / 1e3, "wake": wake_us}


def _answer(connection: socket.socket, first_page: int, page_bytes: int) -> None:
    """As a source that has nothing but the pages from `first_page` on."""
    frame, text = ffi.new("struct pc_frame *"), ffi.new("char[]", 200)
    header, content = ffi.new("uint8_t[]", _HEADER_BYTES), b"\x5a" * page_bytes
    crc = lib.pc_crc32c(0, content, page_bytes)
    with connection.makefile("rb") as requests:
        while len(request := requests.read(_HEADER_BYTES)) == _HEADER_BYTES:
            check(lib.pc_frame_decode(request, frame, text, len(text)), "reading a request")
            if frame.first_page < first_page:
                continue
            frame.type, frame.flags = lib.PC_FRAME_PAGES, lib.PC_FRAME_DEMAND
            frame.payload_bytes, frame.payload_crc = page_bytes, crc
            lib.pc_frame_encode(frame, header)
            connection.sendall(bytes(ffi.buffer(header)) + content)


def _ready() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


async def _striped_source(job: Job) -> None:
    memory = Memory.create("memfd", job.size_bytes)
    lib.pc_bench_fill(memory.struct.base, job.size_bytes, SEED)
    async with PageServer() as server:
        server.add_block(memory)
        for number, fd in enumerate((job.urgent_fd, *job.bulk_fds)):
            server.attach_urgent(number, fd)
        _ready()
        server.start()
        await trio.to_thread.run_sync(sys.stdin.read)


async def _striped_dest(job: Job) -> None:
    memory = Memory.create("memfd", job.size_bytes)
    pager = Pager()
    pager.add_block(memory)
    fds = (job.urgent_fd, *job.bulk_fds)
    pages = memory.pages // len(fds)
    for number, fd in enumerate(fds):
        pager.arm(pager.add_shard(How.ANY), 0, number * pages, pages)
        pager.attach_urgent(number, fd)
    await pager.confirm()
    _ready()
    begin_s = time.perf_counter()
    faults: list[int] = []

    async def touch(seed: int) -> None:
        call = partial(
            lib.pc_bench_touch, memory.struct.base, memory.page_bytes, memory.pages, memory.pages // TOUCHERS // 2,
            seed, HIT_NS, Histogram().struct,
        )  # fmt: skip
        faults.append(check(await trio.to_thread.run_sync(call), "touching memory"))

    async with trio.open_nursery() as nursery:
        for seed in range(TOUCHERS):
            nursery.start_soon(touch, SEED + seed)
    if not sum(faults):
        raise MigrationError("no thread has waited for a page")
    print(json.dumps({"us": (time.perf_counter() - begin_s) * 1e6 / sum(faults)}), flush=True)
    os._exit(0)
