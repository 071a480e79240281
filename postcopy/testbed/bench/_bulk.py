# SPDX-License-Identifier: Apache-2.0
"""The bulk push against its floor and against iperf3: the same memory, over the same number of connections.

A source and a destination, each a process, do one *take* after the other as they are told: of the engine, or of the
floor (`csrc/bench/bulk.c`: send, receive, UFFDIO_COPY, and nothing else). Source memory is filled once; the destination
makes its memory anew for each take, out of the pages that the take before has given back. So a host that takes free
memory away from its virtual machines within seconds (free page reporting), and whose page faults would otherwise be
measured, has no time for it: the first takes, which are thrown away, find the memory.

The floor's threads and iperf3 have the priority of the engine's bulk threads: on a host that does something else
meanwhile all get the same share of it.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from postcopy._native import ffi, lib
from postcopy.dataplane.compression import ALL, Compression
from postcopy.dataplane.pager import EventType, Pager
from postcopy.dataplane.pageserver import PageServer
from postcopy.errors import MigrationError, ResourceError, check
from postcopy.memory import Memory
from postcopy.records.results import Measurement
from postcopy.testbed._processes import Child, open_child, parse, run_captured
from postcopy.testbed.bench._common import DEADLINE_S, Rounds, by_turns, ratio, worker
from postcopy.testbed.bench._worker import channel
from postcopy.uffd import How

SEED = 20141001
SIZE_BYTES = 1 << 30
BACKGROUND_NICE = 5  # of the engine's bulk threads (csrc/core/runtime.c)


class Job(msgspec.Struct, frozen=True):
    """What a worker is, for all of its takes."""

    size_bytes: int
    channels: int
    host: str = "127.0.0.1"
    port: int = 0  # of the source; 0: this is the source
    cpus: tuple[int, ...] = ()  # the host's processors; any where empty
    content: str = "random"  # or "text": Python's own sources, which compress as programs do


class Take(msgspec.Struct, frozen=True):
    """One transfer of the whole memory."""

    kind: str  # "floor", "engine"
    compress: str = "off"  # "lz4", "zstd", or "auto" for both and none of them
    tls: str = ""  # the directory of certificates for the source's address: over TLS


# ---- in the worker


def _line() -> str:
    return sys.stdin.readline().strip()


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _slices(size_bytes: int, channels: int) -> Iterable[tuple[int, int]]:
    each = size_bytes // channels // 4096 * 4096
    return [(i * each, each if i < channels - 1 else size_bytes - i * each) for i in range(channels)]


async def _floor(function: Any, memory: Memory, fds: list[int], *first: int) -> None:
    """A thread for each connection, with its part of the memory."""
    results = []

    def part(fd: int, offset: int, size_bytes: int) -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND_NICE)
        results.append(function(*first, fd, memory.struct.base + offset, size_bytes))

    # Not Trio's, which would keep that priority for what they do next.
    parts = zip(fds, _slices(memory.size_bytes, len(fds)), strict=True)
    threads = [threading.Thread(target=part, args=(fd, *where)) for fd, where in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        await trio.to_thread.run_sync(thread.join)
    for result in results:
        check(result, "pushing as the floor")
    if len(results) != len(threads):
        raise MigrationError("a thread of the floor failed (its error is above)")


def _ways(take: Take) -> Compression:
    return ALL if take.compress == "auto" else Compression[take.compress.upper()]


async def _send(job: Job, take: Take, memory: Memory, sockets: list[socket.socket]) -> None:
    if take.kind == "floor":
        _say(ready=True)
        _line()
        await _floor(lib.pc_bench_floor_push, memory, [each.fileno() for each in sockets[1:]])
        _line()
        return
    async with PageServer() as server:
        server.add_block(memory)
        fd, tls = await channel(sockets[0].detach(), take.tls, listens=True)
        server.attach_urgent(0, fd, tls=tls)
        for index, each in enumerate(sockets[1:]):
            fd, tls = await channel(each.detach(), take.tls, listens=True)
            server.attach_bulk(index, fd, tls=tls)
        if take.compress != "off":
            server.set_compression(_ways(take), adaptive=take.compress == "auto")
        _say(ready=True)
        _line()
        server.start()
        _line()


async def _receive(job: Job, take: Take, sockets: list[socket.socket]) -> float:
    """How many seconds it took."""
    with Memory.create("memfd", job.size_bytes) as memory:
        if take.kind == "floor":
            uffd = check(lib.pc_uffd_open(How.ANY, 0, ffi.NULL), "opening a userfaultfd")
            check(lib.pc_uffd_register(uffd, memory.address, job.size_bytes, 1, ffi.NULL), "registering memory")
            _say(ready=True)
            _line()
            begin_s = time.perf_counter()
            await _floor(lib.pc_bench_floor_place, memory, [each.fileno() for each in sockets[1:]], uffd)
            seconds = time.perf_counter() - begin_s
            os.close(uffd)
            return seconds
        async with Pager() as pager:
            pager.add_block(memory)
            pager.add_shard(How.ANY, 0)
            pager.arm(0, 0, 0, memory.pages)
            if take.compress != "off":
                pager.accept_compression(_ways(take))
            fd, tls = await channel(sockets[0].detach(), take.tls, listens=False)
            pager.attach_urgent(0, fd, tls=tls)
            for index, each in enumerate(sockets[1:]):
                fd, tls = await channel(each.detach(), take.tls, listens=False)
                pager.attach_bulk(index, fd, tls=tls)
            await pager.confirm()
            _say(ready=True)
            _line()
            begin_s = time.perf_counter()
            async for event in pager.events():
                if event.type is EventType.COMPLETE:
                    break
                if event.type is EventType.FATAL:
                    raise RuntimeError(event.text)
            seconds = time.perf_counter() - begin_s
            await pager.disarm()
            return seconds


def _fill(memory: Memory, content: str) -> None:
    if content == "random":
        lib.pc_bench_fill(memory.struct.base, memory.size_bytes, SEED)
        return
    at = 0
    for path in itertools.cycle(sorted(Path(os.__file__).parent.glob("**/*.py"))):
        data = path.read_bytes()[: memory.size_bytes - at]
        ffi.memmove(memory.struct.base + at, data, len(data))
        at += len(data)
        if at == memory.size_bytes:
            return


async def _source(job: Job) -> None:
    with Memory.create("memfd", job.size_bytes) as memory, socket.create_server((job.host, 0)) as listener:
        _fill(memory, job.content)
        _say(port=listener.getsockname()[1])
        while line := _line():
            take = msgspec.json.decode(line, type=Take)
            sockets = [listener.accept()[0] for _ in range(1 + job.channels)]
            before_s = _cpu_s()
            await _send(job, take, memory, sockets)
            for each in sockets:
                each.close()
            _say(cpu_s=_cpu_s() - before_s)


async def _destination(job: Job) -> None:
    while line := _line():
        take = msgspec.json.decode(line, type=Take)
        # One after the other, so that both sides number them alike.
        sockets = [socket.create_connection((job.host, job.port)) for _ in range(1 + job.channels)]
        before_s = _cpu_s()
        seconds = await _receive(job, take, sockets)
        for each in sockets:
            each.close()
        _say(seconds=seconds, cpu_s=_cpu_s() - before_s)


def main(argument: str) -> None:
    """Runs one side, given as JSON; see the head of this file."""
    job = msgspec.json.decode(argument, type=Job)
    if job.cpus:
        os.sched_setaffinity(0, job.cpus)
    trio.run(_destination if job.port else _source, job)


# ---- in `postcopy bench`


async def _answer(child: Child) -> dict[str, Any]:
    if not (line := await child.line()):
        raise MigrationError("a process of a measurement failed (its error is above)")
    return parse(line)


class Sides:
    """A source and a destination that are ready for takes."""

    def __init__(self, source: Child, destination: Child, size_bytes: int) -> None:
        self._children = (source, destination)
        self._size_bytes = size_bytes

    async def take(self, take: Take) -> dict[str, float]:
        """Bytes of memory a second, and the processor time of both sides for each GiB."""
        source, destination = self._children
        with trio.move_on_after(DEADLINE_S):
            for child in self._children:
                await child.send(msgspec.json.encode(take))
            for child in self._children:
                await _answer(child)
            await destination.send(b"go")
            await source.send(b"go")
            received = await _answer(destination)
            await source.send(b"end")
            sent = await _answer(source)
            gib = self._size_bytes / 2**30
            return {
                "bytes-per-s": self._size_bytes / received["seconds"],
                "source-cpu-s": sent["cpu_s"] / gib,
                "dest-cpu-s": received["cpu_s"] / gib,
            }
        raise MigrationError(f"a transfer did not end within {DEADLINE_S:.0f} s")


Wrap = Callable[..., list[str]]
"""Of a command: the command that runs it elsewhere."""


def _here(*command: str) -> list[str]:
    return list(command)


@asynccontextmanager
async def open_sides(
    size_bytes: int,
    channels: int,
    *,
    where: tuple[Wrap, Wrap] = (_here, _here),
    host: str = "127.0.0.1",
    content: str = "random",
    pin: bool = False,
) -> AsyncIterator[Sides]:
    """`where`: source and destination; `host`: the source's address there. `pin`: each side has half of the processors
    to itself."""
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    halves = (cpus[: len(cpus) // 2], cpus[len(cpus) // 2 :]) if pin and len(cpus) > 1 else ((), ())

    def side(number: int, port: int) -> AbstractAsyncContextManager[Child]:
        job = Job(size_bytes, channels, host, port, halves[number], content)
        command = where[number](*worker("_bulk", msgspec.json.encode(job).decode()))
        return open_child(command, stdin=subprocess.PIPE)

    async with side(0, 0) as source, side(1, (await _answer(source))["port"]) as destination:
        yield Sides(source, destination, size_bytes)


async def _iperf3_bytes_per_s(size_bytes: int) -> float:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        where = ("127.0.0.1", "-p", str(probe.getsockname()[1]))
    nice = ["nice", "-n", str(BACKGROUND_NICE)]
    async with open_child([*nice, "iperf3", "-s", "-1", "-B", *where]):
        deadline_s = time.monotonic() + 10
        while True:
            command = [*nice, "iperf3", "-c", *where, "-n", str(size_bytes), "-J"]
            done = await run_captured(command)
            result = json.loads(done.stdout)
            if "error" not in result:
                return float(result["end"]["sum_received"]["bits_per_second"]) / 8
            if time.monotonic() > deadline_s:  # refused until the server listens
                raise MigrationError(f"iperf3 failed: {result['error']}")


def check_bulk() -> None:
    """`ResourceError` when iperf3 is not here."""
    if not shutil.which("iperf3"):
        raise ResourceError("iperf3 is not installed", "apt-get install iperf3")


async def measure_bulk(rounds: int) -> list[Measurement]:
    """The push against the least that could do it, and against one stream of iperf3."""
    channels = 2
    async with open_sides(SIZE_BYTES, channels) as sides:

        async def rate(kind: str) -> float:
            if kind == "iperf3":
                return await _iperf3_bytes_per_s(SIZE_BYTES) / 1e9
            return float((await sides.take(Take(kind)))["bytes-per-s"]) / 1e9

        for kind in ("floor", "engine"):
            await rate(kind)
        values = await by_turns(rounds, {kind: partial(rate, kind) for kind in ("floor", "engine", "iperf3")})
    return _figures(values, channels)


def _figures(values: Rounds, channels: int) -> list[Measurement]:
    name = f"bulk push, {channels} channels"
    limit = statistics.median(each["floor"] / each["iperf3"] for each in values)
    worst = [{"worst": min(each["engine"] / each["floor"] for each in values)}]
    note = "" if limit >= 0.8 else f"the floor, which UFFDIO_COPY is the most of, reaches {limit:.2f} of iperf3"
    return [
        ratio(f"{name} / floor", values, "engine", "floor", 0.9, at_most=False, unit="GB/s"),
        ratio(f"{name} / floor, worst round", worst, "worst", None, 0.7, at_most=False, unit="1"),
        ratio(f"{name} / one iperf3 stream", values, "engine", "iperf3", 0.8, at_most=False, note=note, unit="GB/s"),
    ]
