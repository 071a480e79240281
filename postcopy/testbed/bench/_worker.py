# SPDX-License-Identifier: Apache-2.0
"""One process of a measurement: a source or a destination, of the engine or of the floor.

Started by `_common.pair` with its connected sockets inherited; it prints ``ready``, waits for a line on its
standard input, does its part, prints one JSON object. A source serves until its standard input ends.

Memory is made and filled here, in the process that uses it, and touched by C threads only.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import time
from typing import Any

import msgspec
import trio

from postcopy._native import ffi, lib
from postcopy.dataplane.histogram import Histogram
from postcopy.dataplane.pager import EventType, Pager
from postcopy.dataplane.pager_process import ProcessPager
from postcopy.dataplane.pageserver import PageServer
from postcopy.errors import PostcopyError, check, known_error, shortage
from postcopy.memory import Memory
from postcopy.records import as_json
from postcopy.records.timeline import Distribution
from postcopy.tls import Credentials, TlsStream
from postcopy.uffd import How

SEED = 20141001
ADDRESS = "127.0.0.1"
# A read that took less found its page there: an order of magnitude below any fault, and above any cache miss.
HIT_NS = 5_000


class Job(msgspec.Struct, frozen=True):
    """What a worker is to do."""

    role: str  # "floor-source", "floor-dest", "engine-source", "engine-dest"
    size_bytes: int
    urgent_fd: int
    bulk_fds: tuple[int, ...] = ()  # engine-dest: where there are some, it waits for the whole memory
    touches: int = 0
    busy_poll_us: int = 0  # the floor polls without end where this is not 0
    pager_process: bool = False  # engine-dest: the pager apart from the thread that touches
    cpus: tuple[int, ...] = ()  # the host's processors; any where empty
    tls: str = ""  # engine-*: the directory of the certificates for ADDRESS


async def channel(fd: int, tls: str, *, listens: bool) -> tuple[int, Any]:
    """What `attach_urgent` and `attach_bulk` take of a connected socket: over TLS where `tls` is the directory of its
    certificates. The other end does the same meanwhile."""
    if not tls:
        return fd, None
    credentials = Credentials(tls)
    connected = trio.socket.from_stdlib_socket(socket.socket(fileno=fd))
    stream = TlsStream(connected, await credentials.context(server=listens), "" if listens else ADDRESS)
    await stream.handshake()
    return stream.detach().detach()


def ready() -> None:
    """Says so, and waits for a line."""
    print("ready", flush=True)
    sys.stdin.readline()


def _filled(job: Job) -> Memory:
    memory = Memory.create("memfd", job.size_bytes)
    lib.pc_bench_fill(memory.struct.base, job.size_bytes, SEED)
    return memory


def percentiles_us(histogram: Histogram, *percentiles: float) -> dict[str, float]:
    """And the maximum; and the median between the edges of its bucket, which are 2 to 3 % apart."""
    found = {f"p{p:g}": histogram.percentile(p) / 1e3 for p in percentiles}
    return found | {"max": histogram.max_ns / 1e3, "median": median_ns(histogram) / 1e3}


def median_ns(histogram: Histogram) -> float:
    seen, rank = 0, histogram.count / 2
    for edge_ns, count in histogram.buckets():
        if seen + count >= rank:
            width_ns = 1 << max(0, edge_ns.bit_length() - 6)
            return edge_ns - width_ns * (1 - (rank - seen) / count)
        seen += count
    return 0.0


def distribution(histogram: Histogram) -> Distribution:
    """All of it."""
    buckets = list(histogram.buckets())
    return Distribution(
        count=histogram.count, sum_ns=histogram.sum_ns, max_ns=histogram.max_ns,
        bucket_edges_ns=[edge for edge, _ in buckets], bucket_counts=[count for _, count in buckets],
    )  # fmt: skip


def touched(histogram: Histogram) -> dict[str, Any]:
    """What a destination says of the waits of the thread that touches."""
    return {"touch-us": percentiles_us(histogram, 50, 99, 99.9), "touches": as_json(distribution(histogram))}


def _touch(memory: Memory, touches: int) -> Histogram:
    histogram = Histogram()
    check(
        lib.pc_bench_touch(
            memory.struct.base, memory.page_bytes, memory.pages, touches, SEED, HIT_NS, histogram.struct
        ),
        "touching memory",
    )
    return histogram


async def _floor_source(job: Job) -> dict[str, Any]:
    memory = _filled(job)
    ready()
    # Until the destination is gone, in whatever way.
    lib.pc_bench_floor_serve(job.urgent_fd, memory.struct.base, memory.page_bytes, memory.pages, bool(job.busy_poll_us))
    return {}


async def _floor_dest(job: Job) -> dict[str, Any]:
    memory = Memory.create("memfd", job.size_bytes)
    uffd = check(lib.pc_uffd_open(How.ANY, 0, ffi.NULL), "opening a userfaultfd")
    check(lib.pc_uffd_register(uffd, memory.address, job.size_bytes, 1, ffi.NULL), "registering memory")
    ready()
    waits: list[Histogram] = []

    async def touch() -> None:
        waits.append(await trio.to_thread.run_sync(_touch, memory, job.touches))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(touch)
        result = await trio.to_thread.run_sync(
            lambda: lib.pc_bench_floor_fault(
                uffd, job.urgent_fd, memory.struct.base, memory.page_bytes, job.touches, bool(job.busy_poll_us)
            )
        )
    os.close(job.urgent_fd)
    check(result, "serving faults as the floor")
    return touched(waits[0])


async def engine_source(job: Job) -> dict[str, Any]:
    memory = _filled(job)
    async with PageServer() as server:
        server.add_block(memory)
        fd, tls = await channel(job.urgent_fd, job.tls, listens=False)
        server.attach_urgent(0, fd, job.busy_poll_us, tls=tls)
        for index, bulk_fd in enumerate(job.bulk_fds):
            fd, tls = await channel(bulk_fd, job.tls, listens=False)
            server.attach_bulk(index, fd, tls=tls)
        ready()
        server.start()
        await trio.to_thread.run_sync(sys.stdin.read)
        return {}


async def _engine_dest(job: Job) -> dict[str, Any]:
    memory = Memory.create("memfd", job.size_bytes)
    async with ProcessPager() if job.pager_process else Pager() as pager:
        pager.add_block(memory)
        pager.add_shard(How.ANY, job.busy_poll_us)
        pager.arm(0, 0, 0, memory.pages)
        fd, tls = await channel(job.urgent_fd, job.tls, listens=True)
        pager.attach_urgent(0, fd, tls=tls)
        for index, bulk_fd in enumerate(job.bulk_fds):
            fd, tls = await channel(bulk_fd, job.tls, listens=True)
            pager.attach_bulk(index, fd, tls=tls)
        await pager.confirm()
        ready()
        begin_s = time.perf_counter()
        result: dict[str, Any] = {}
        if job.touches:
            result |= touched(await trio.to_thread.run_sync(_touch, memory, job.touches))
        if job.bulk_fds:
            async for event in pager.events():
                if event.type is EventType.COMPLETE:
                    break
                if event.type is EventType.FATAL:
                    raise RuntimeError(event.text)
            result["bytes-per-s"] = job.size_bytes / (time.perf_counter() - begin_s)
        else:
            # The page server goes first, and closing a pager poisons what is missing: nothing is read here any more.
            print(json.dumps(result), flush=True)
            os._exit(0)
        return result


def call(module: str, *arguments: str) -> None:
    """`main` of a module of this package. What this process lacks is one line, as of any command."""
    try:
        importlib.import_module(f"{__package__}.{module}").main(*arguments)
    except Exception as error:
        known = known_error(error) if isinstance(error, ExceptionGroup) else shortage(error) or error
        if not isinstance(known, PostcopyError):
            raise
        sys.exit(f"postcopy: error: {known}")


def main(argument: str) -> None:
    """Runs one job, given as JSON; see the head of this file."""
    job = msgspec.json.decode(argument, type=Job)
    if job.cpus:
        os.sched_setaffinity(0, job.cpus)
    roles = {
        "floor-source": _floor_source,
        "floor-dest": _floor_dest,
        "engine-source": engine_source,
        "engine-dest": _engine_dest,
    }
    print(json.dumps(trio.run(roles[job.role], job)), flush=True)
