# SPDX-License-Identifier: Apache-2.0
"""Processes of ``scale`` that measure a part of the engine at one point: a memory of one size, so many userfaultfds of
one memory, so many threads that wait. Each prints one JSON object of values, by the names of the costs in `_scale`.

Waiting faults are real threads. Memory larger than the host's is sparse: a file of that size of which hardly anything
is touched, with all maps that the engine has of it.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import trio

from postcopy._native import ffi, lib
from postcopy.dataplane.histogram import Histogram
from postcopy.dataplane.pager import Pager, Stage
from postcopy.dataplane.pageserver import PageServer
from postcopy.errors import MigrationError, check
from postcopy.memory import Memory, MemoryKind
from postcopy.memory.bitmap import Bitmap
from postcopy.migration.changes import Changes
from postcopy.testbed.bench._recovery import recovery_map
from postcopy.testbed.bench._worker import HIT_NS, SEED, Job, ready
from postcopy.uffd import How, UffdFeature, Userfaultfd, probe

PAGE_BYTES = int(lib.pc_page_bytes())
STORED_PAGES = 512
"""Of a sparse memory, evenly spread: all that it holds."""
CALLS = 1000
CLAIMS = 4096
LOOKS = 7
TOUCHERS = 8
ALONE = 200
ANSWERED = 300
DEADLINE_S = 60.0
_HEADER_BYTES = int(lib.PC_FRAME_HEADER_BYTES)


def main(what: str, size: str = "") -> None:
    """One part, or one of the two processes of a `pair` when `what` is its `Job`."""
    parts: dict[str, Callable[[int], Any]] = {"memory": _memory, "pending": _pending}
    if what in parts:
        print(json.dumps(trio.run(parts[what], int(size))), flush=True)
        os._exit(0)  # with all those that wait
    job = msgspec.json.decode(what, type=Job)
    if job.cpus:
        os.sched_setaffinity(0, job.cpus)
    trio.run(_striped_source if job.role.endswith("source") else _striped_dest, job)


def each_us(call: Callable[[], object], calls: int = CALLS) -> float:
    """What one call takes: the median of many, each of ten."""
    times_ns = []
    for _ in range(calls // 10):
        begin_ns = time.perf_counter_ns()
        for _ in range(10):
            call()
        times_ns.append(time.perf_counter_ns() - begin_ns)
    return statistics.median(times_ns) / 10 / 1e3


def _took_ms(call: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    call()
    return (time.perf_counter() - begin_s) * 1e3


def _resident_mib() -> float:
    """Of this process, beside memory that it shares."""
    with open("/proc/self/status") as status:
        return sum(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) / 1024


# ---- a memory of one size


def sparse_memory(size_bytes: int) -> Memory:
    """As `Memory.create("memfd", ...)`, which refuses what this host could not hold."""
    fd = os.memfd_create("postcopy-bench", os.MFD_CLOEXEC)
    try:
        os.truncate(fd, size_bytes)
        struct: Any = ffi.new("struct pc_memory *")
        check(lib.pc_memory_map(fd, size_bytes, PAGE_BYTES, lib.PC_MEMORY_MEMFD, struct), "mapping sparse memory")
    finally:
        os.close(fd)
    return Memory(struct, MemoryKind.MEMFD, size_bytes)


def _stored(memory: Memory, pages: int, offset: int) -> None:
    """Puts something into so many pages, `offset` pages from those before, spread over all of the memory."""
    distance = memory.pages // pages
    for number in range(pages):
        os.pwrite(memory.fd, b"\x5a", (number * distance + offset) * PAGE_BYTES)


async def _memory(size_bytes: int) -> dict[str, float]:
    found: dict[str, float] = {}
    memory = sparse_memory(size_bytes)
    _stored(memory, STORED_PAGES, 0)
    # What the source does with the memory before the pause, and in it.
    machine: Any = SimpleNamespace(live=True, blocks=[SimpleNamespace(memory=memory)])
    changes = await Changes.open(machine, [PAGE_BYTES], logged=False)
    begin_s = time.perf_counter()
    present = (await changes.begin())[0]
    found["map"] = (time.perf_counter() - begin_s) * 1e3
    looks = []
    for number in range(LOOKS):
        _stored(memory, 16, 1 + number)
        begin_s = time.perf_counter()
        (changed,) = await changes.collect()
        if changed.count() != 16:
            raise MigrationError(f"{changed.count()} changed pages were found, not 16")
        looks.append((time.perf_counter() - begin_s) * 1e3)
    found["look"] = statistics.median(looks)
    await changes.close()
    found |= await recovery_map_values(size_bytes)
    # What the destination makes, all of it used in the end.
    zero = present.inverted()
    gc.collect()
    before_mib = _resident_mib()
    twin = sparse_memory(size_bytes)
    pager = Pager()
    found["arm"] = _took_ms(lambda: pager.add_block(twin)) + _took_ms(lambda: pager.add_shard(How.ANY))
    found["arm"] += _took_ms(lambda: pager.arm(0, 0, 0, twin.pages))
    found["zeros"] = _took_ms(lambda: pager.set_zero(0, zero))
    found["maps"] = _resident_mib() - before_mib
    counters = ffi.new("struct pc_pager_stats *")
    found["counters"] = each_us(lambda: check(lib.pc_pager_stats(pager._struct, counters), "reading counters"))
    found["claim"] = float(check(lib.pc_bench_claim(size_bytes // PAGE_BYTES, CLAIMS), "claiming runs"))
    return found


async def recovery_map_values(size_bytes: int) -> dict[str, float]:
    """What coming back costs: of a memory that is half there."""
    found = await recovery_map(size_bytes, SEED)
    return {"recovery-size": found["MB"] * 1e3, "recovery-map": found["s"] * 1e3}


# ---- threads that wait


async def _pending(pending: int) -> dict[str, float]:
    """All wait on one userfaultfd, and the source answers none, until the last part."""
    memory = Memory.create("anon", (pending + ANSWERED) * PAGE_BYTES)
    pager = Pager()
    pager.add_block(memory)
    api = probe()
    features = UffdFeature(lib.pc_pager_features(int(api.features)))
    uffd = Userfaultfd.open(api.how, features)
    pager.adopt_shard(os.dup(uffd.fileno()), int(features))
    pager.arm(0, 0, 0, memory.pages)
    source = _connect(pager)
    await pager.confirm()
    threading.Thread(target=_answer, args=(source, pending), daemon=True).start()
    check(lib.pc_bench_wait(memory.struct.base, PAGE_BYTES, pending), "starting threads that wait")
    await _until(lambda: pager.statistics().pending_faults >= pending)
    for page in range(pending, pending + ANSWERED):
        await trio.to_thread.run_sync(memory.read, page * PAGE_BYTES, 1)
    found = {
        stage.name.lower(): pager.latency(stage).percentile(50) / 1e3 for stage in (Stage.SENT, Stage.PLACED)
    }  # fmt: skip
    address = memory.address + (memory.pages - 1) * PAGE_BYTES
    found["wake"] = each_us(lambda: lib.pc_uffd_wake(uffd.fileno(), address, PAGE_BYTES), 300)
    found["pending-counters"] = each_us(pager.statistics, 300)
    # The connection is lost, and there again: all is requested once more.
    await pager.disconnect()
    begin_s = time.perf_counter()
    source = _connect(pager)
    requests = await trio.to_thread.run_sync(_requests, source, pending)
    found["requested-again"] = (time.perf_counter() - begin_s) * 1e3
    answers = b"".join(_page(request) for request in requests)
    begin_s = time.perf_counter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, partial(source.sendall, answers))
        await _until(lambda: pager.statistics().pending_faults == 0, 0.0005)
    found["all-answered"] = (time.perf_counter() - begin_s) * 1e3
    return found


async def _until(done: Callable[[], bool], pause_s: float = 0.01) -> None:
    with trio.fail_after(DEADLINE_S):
        while not done():  # noqa: ASYNC110 -- nothing tells of it
            await trio.sleep(pause_s)


def _connect(pager: Pager) -> socket.socket:
    """The source's end of a new urgent connection."""
    ours, theirs = socket.socketpair()
    pager.attach_urgent(0, theirs.detach())
    return ours


def _requests(connection: socket.socket, count: int) -> list[bytes]:
    with connection.makefile("rb") as stream:
        return [stream.read(_HEADER_BYTES) for _ in range(count)]


def _answer(connection: socket.socket, first_page: int) -> None:
    """As a source that has nothing but the pages from `first_page` on."""
    frame, text = ffi.new("struct pc_frame *"), ffi.new("char[]", 200)
    with connection, connection.makefile("rb") as requests:
        while len(request := requests.read(_HEADER_BYTES)) == _HEADER_BYTES:
            check(lib.pc_frame_decode(request, frame, text, len(text)), "reading a request")
            if frame.first_page >= first_page:
                connection.sendall(_page(request))


_CONTENT = b"\x5a" * PAGE_BYTES
_CONTENT_CRC = lib.pc_crc32c(0, _CONTENT, PAGE_BYTES)


def _page(request: bytes) -> bytes:
    """The answer to a request of one page."""
    frame, text, header = ffi.new("struct pc_frame *"), ffi.new("char[]", 200), ffi.new("uint8_t[]", _HEADER_BYTES)
    check(lib.pc_frame_decode(request, frame, text, len(text)), "reading a request")
    frame.type, frame.flags = lib.PC_FRAME_PAGES, lib.PC_FRAME_DEMAND
    frame.payload_bytes, frame.payload_crc = PAGE_BYTES, _CONTENT_CRC
    lib.pc_frame_encode(frame, header)
    return bytes(ffi.buffer(header)) + _CONTENT


# ---- userfaultfds of one memory, in two processes


async def _striped_source(job: Job) -> None:
    memory = Memory.create("memfd", job.size_bytes)
    lib.pc_bench_fill(memory.struct.base, job.size_bytes, SEED)
    async with PageServer() as server:
        server.add_block(memory)
        for number, fd in enumerate((job.urgent_fd, *job.bulk_fds)):
            server.attach_urgent(number, fd)
        ready()
        server.start()
        await trio.to_thread.run_sync(sys.stdin.read)


async def _striped_dest(job: Job) -> None:
    """One thread touches pages of the first userfaultfd, then many touch all."""
    memory = Memory.create("memfd", job.size_bytes)
    pager = Pager()
    pager.add_block(memory)
    fds = (job.urgent_fd, *job.bulk_fds)
    pages = memory.pages // len(fds)
    before_mib, begin_s = _resident_mib(), time.perf_counter()
    for number, fd in enumerate(fds):
        pager.arm(pager.add_shard(How.ANY), 0, number * pages, pages)
        pager.attach_urgent(number, fd)
    await pager.confirm()
    found = {"start": (time.perf_counter() - begin_s) * 1e3}
    ready()
    alone = Histogram()
    base, page_bytes = memory.struct.base, memory.page_bytes

    async def touch(histogram: Histogram, span: int, count: int, seed: int) -> int:
        call = partial(lib.pc_bench_touch, base, page_bytes, span, count, seed, HIT_NS, histogram.struct)
        return check(await trio.to_thread.run_sync(call), "touching memory")

    await touch(alone, pages, ALONE, SEED)
    # (at the threads' first faults, what they need is there)
    found["one-fault"] = alone.percentile(50) / 1e3
    found["fd-memory"] = max(0.0, _resident_mib() - before_mib) * 1024
    counters = ffi.new("struct pc_pager_stats *")
    found["fd-counters"] = each_us(lambda: check(lib.pc_pager_stats(pager._struct, counters), "reading counters"))
    histograms = [Histogram() for _ in range(TOUCHERS)]
    faults: list[int] = []

    async def touch_all(number: int) -> None:
        faults.append(await touch(histograms[number], memory.pages, memory.pages // TOUCHERS // 2, SEED + number))

    begin_s = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for number in range(TOUCHERS):
            nursery.start_soon(touch_all, number)
    if not sum(faults):
        raise MigrationError("no thread has waited for a page")
    found["many-faults"] = (time.perf_counter() - begin_s) * 1e6 / sum(faults)
    for other in histograms[1:]:
        histograms[0].merge(other)
    found |= {f"many-{name}": histograms[0].percentile(part) / 1e3 for name, part in (("p50", 50), ("p99", 99))}
    received = Bitmap(memory.pages)
    found["received"] = each_us(
        lambda: check(lib.pc_pager_received(pager._struct, 0, received.words), "reading the received map"), 100
    )
    print(json.dumps(found), flush=True)
    os._exit(0)
