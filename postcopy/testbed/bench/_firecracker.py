# SPDX-License-Identifier: Apache-2.0
"""``firecracker``: a real Firecracker whose memory comes from `postcopy pager`, against the least that can serve it.

The guest (csrc/machine/guest/vmm.c) times its first access to each page itself, in random order, and says the
percentiles; so what is compared is what a guest sees, whoever serves it. `_Floor` is the smallest handler in C, and the
design of the example in Firecracker's documentation (one thread, synchronous).
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio

from postcopy._child import python
from postcopy._native import ffi, lib
from postcopy.errors import MigrationError, ResourceError, check
from postcopy.machines.firecracker.handshake import Handshake, receive_handshake
from postcopy.records.results import Measurement
from postcopy.testbed import probe
from postcopy.testbed._processes import Child, open_child, parse
from postcopy.testbed._scratch import scratch
from postcopy.testbed.bench._common import DEADLINE_S, Rounds, by_turns, ratio, worker
from postcopy.testbed.firecracker import Firecracker, GuestLine, find, guest_path, serving_engine, version_of

T = TypeVar("T")

MEMORY_MIB = 128
PAGES = 8192
"""The working set of the guest, spread over its memory: 32 MiB."""
POPULATED_MIB = 512
KILLS = 10
"""Of the engine in a round."""
STEP_PAGES = 400
"""That a guest touches for the first time during one of them."""
DEATH_MS = 300.0
PLACED_RUN_BYTES = 2 << 20

FAULT = "seen by the guest: its first access to each page of a working set, in random order, from an image in the cache"
TOUCH = "what all first accesses took together; example: one thread, synchronous, as Firecracker's documentation has it"
SET = "faults that were read with the working set replayed, of those without"
POPULATE = (
    "rate from 10 % to 90 % of the memory, by what is resident in Firecracker; ceiling: the faster of 1 and 2 threads"
)
DEATH = "SIGKILL of the engine; the longest access of the guest then: it touches missing pages all the time"


def check_firecracker() -> None:
    """`ResourceError` when there is no Firecracker, or it cannot run here."""
    version_of(find())
    guest_path()
    for name in ("kvm", "uffd"):
        if reason := probe.find(name).complaint():
            raise ResourceError(f"no microVM can be restored here: {reason}")


# ---- a snapshot


@dataclass(frozen=True)
class Snapshot:
    """What a microVM was saved to. `ticks_per_us`: of its guest's clock."""

    directory: Path
    ticks_per_us: float = 1.0

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def memory(self) -> Path:
        return self.directory / "memory"


def _said_ns(vm: Firecracker) -> int:
    """When its guest has said its last character."""
    return os.stat(vm.serial_path).st_mtime_ns


def take_snapshot(directory: Path, memory_mib: int, arguments: str) -> Snapshot:
    """Of a guest that has written all of its pages and waits for orders."""
    directory.mkdir()
    with Firecracker.start() as vm:
        vm.boot(memory_mib, f"wait=1 {arguments}")
        ready = vm.wait_ready()
        before_ns = _said_ns(vm)
        line = vm.order("w")
        ticks_per_us = (line.values["tsc"] - ready.values["tsc"]) / (_said_ns(vm) - before_ns) * 1e3
        vm.pause()
        snapshot = Snapshot(directory, ticks_per_us)
        vm.snapshot(snapshot.state, snapshot.memory)
    return snapshot


def _right(vm: Firecracker, line: GuestLine) -> GuestLine:
    if line.values["errors"]:
        raise MigrationError(f"the guest found {line.values['errors']} wrong words:\n{vm.said()}")
    return line


def _touched(snapshot: Snapshot, path: str) -> dict[str, float]:
    """One pass of a guest whose memory comes from the handler at `path`, in microseconds."""
    with Firecracker.start() as vm:
        vm.load(snapshot.state, uffd=path, resume=True)
        values = _right(vm, vm.order("r")).values
        return {name: values[name] / snapshot.ticks_per_us for name in ("p50", "p99", "ticks")}


# ---- who serves it


@dataclass(frozen=True)
class Handler:
    """Listens at `path`."""

    path: str
    child: Child
    ours: bool


@asynccontextmanager
async def _floor(snapshot: Snapshot, what: str) -> AsyncIterator[Handler]:
    """``plain`` or ``example``, see the head of this file; ``place N``: puts all of the image there, by N threads."""
    with tempfile.TemporaryDirectory(dir=snapshot.directory) as directory:
        path = f"{directory}/socket"
        async with open_child(worker("_firecracker", path, str(snapshot.memory), what)) as child:
            if await child.line() != "ready":
                raise MigrationError("a handler of a measurement ended early (its error is above)")
            yield Handler(path, child, False)


@asynccontextmanager
async def _pager(snapshot: Snapshot, *options: str) -> AsyncIterator[Handler]:
    """`postcopy pager`."""
    with tempfile.TemporaryDirectory(dir=snapshot.directory) as directory:
        path = f"{directory}/socket"
        arguments = ("--json", "--socket", path, "--image", str(snapshot.memory), *options)
        command = python("-m", "postcopy", "pager", *arguments)
        async with open_child(command, ask=signal.SIGTERM, end_s=10.0, stderr=subprocess.DEVNULL) as child:
            await next_line(child, "listening", lambda line: line["event"] == "listening")
            yield Handler(path, child, True)


async def next_line(child: Child, what: str, found: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The next line of a command of ours of which `found` is true."""
    with trio.move_on_after(DEADLINE_S):
        async for line in child.stdout:
            if found(record := parse(line)):
                return record
        raise MigrationError(f"a command ended before it said {what} (its error is above)")
    raise MigrationError(f"a command did not say {what} within {DEADLINE_S:.0f} s")


def main(path: str, image: str, what: str) -> None:
    """A handler of one microVM; see `_floor`."""
    with socket.socket(socket.AF_UNIX) as listener, open(image, "rb") as file:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        connection, _ = listener.accept()
        size_bytes = os.fstat(file.fileno()).st_size
        with connection, trio.run(_receive, connection.dup()) as handshake:
            regions = ffi.new("struct pc_bench_region[]", len(handshake.regions))
            for to, region in zip(regions, handshake.regions, strict=True):
                to.address, to.bytes, to.offset = region.address, region.size_bytes, region.offset
            if what.startswith("place"):
                _place(handshake, file.fileno(), int(what.split()[1]))
                connection.setblocking(True)
                connection.recv(1)  # until it has ended
                return
            example = what == "example"
            check(
                lib.pc_bench_image_serve(
                    handshake.uffd, connection.fileno(), file.fileno(), size_bytes, regions, len(regions), example
                ),
                "serving a microVM",
            )


async def _receive(connection: socket.socket) -> Handshake:
    with trio.socket.from_stdlib_socket(connection) as stream:
        return await receive_handshake(stream)


def _place(handshake: Handshake, image_fd: int, threads: int) -> None:
    """Each thread a part of it."""
    (region,) = handshake.regions
    part = region.size_bytes // threads

    def place(number: int) -> None:
        at = number * part
        place = lib.pc_bench_image_place
        done = place(handshake.uffd, image_fd, region.offset + at, region.address + at, part, PLACED_RUN_BYTES)
        if done != -errno.ESRCH:  # it has been seen for long enough, and was ended
            check(done, "placing an image")

    running = [threading.Thread(target=place, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


# ---- what is measured


async def measure_firecracker(rounds: int) -> list[Measurement]:
    """Faults, the working set, how fast all memory comes, and the death of the engine."""
    with scratch() as directory:
        small = await thread(take_snapshot, directory / "small", MEMORY_MIB, f"pages={PAGES} spread=1")
        steps = await thread(take_snapshot, directory / "steps", MEMORY_MIB, f"touches={STEP_PAGES}")
        large = await thread(take_snapshot, directory / "large", POPULATED_MIB, "pages=16")
        await thread(_fill, large)
        return [
            *await _faults(rounds, small),
            *await _populate(rounds, large),
            await _death(rounds, steps),
        ]


async def thread(function: Callable[..., T], *arguments: Any) -> T:
    return await trio.to_thread.run_sync(partial(function, *arguments))


async def _faults(rounds: int, snapshot: Snapshot) -> list[Measurement]:
    """First accesses of the guest, by who serves it; and what a working set is worth: each round records one."""
    working_set = str(snapshot.directory / "working-set")
    ways = {
        "c": partial(_floor, snapshot, "plain"),
        "example": partial(_floor, snapshot, "example"),
        "ours": partial(_pager, snapshot, "--record-working-set", working_set),
        "ours, all": partial(_pager, snapshot, "--prefetch", "all"),
        "ours, working set": partial(_pager, snapshot, "--working-set", working_set),
    }
    # (the first round begins with the first of them, so that there is a working set when it is wanted)
    turns = await by_turns(rounds, {name: partial(_served, way, snapshot) for name, way in ways.items()})

    def rounds_of(value: str, *names: str, scale: float = 1.0) -> Rounds:
        return [{name: turn[name][value] * scale for name in names} for turn in turns]

    p50 = rounds_of("p50", "ours", "c", "example")
    total = rounds_of("ticks", "ours, all", "example", "c", "ours", "ours, working set", scale=1e-3)
    gone = [
        {"ours, working set": turn["ours, working set"]["faults"], "ours": turn["ours"]["faults"]} for turn in turns
    ]
    return [
        ratio("fault of a guest, p50, postcopy pager / C handler", p50, "ours", "c", 1.06, note=FAULT),
        ratio("time to touch a working set, all prefetched / example", total, "ours, all", "example", 1.0, note=TOUCH,
              unit="ms"),
        ratio("faults with a working set / without", gone, "ours, working set", "ours", 0.03, note=SET, unit="faults"),
    ]  # fmt: skip


Way = Callable[[], AbstractAsyncContextManager[Handler]]


async def _served(way: Way, snapshot: Snapshot) -> dict[str, float]:
    """What a guest saw that it served; of ours, with the faults that it read."""
    async with way() as handler:
        seen = await thread(_touched, snapshot, handler.path)
        if not handler.ours:
            return seen
        ended = await next_line(handler.child, "vm-ended", lambda line: line["event"] == "vm-ended")
        return seen | {"faults": float(ended["figures"]["faults"])}


# ---- how fast all of it comes


def _fill(snapshot: Snapshot) -> None:
    """Content for memory of which nobody looks at what is in it: all is there."""
    size = os.stat(snapshot.memory).st_size
    content = os.urandom(1 << 20)
    with open(snapshot.memory, "r+b") as file:
        for _ in range(size >> 20):
            file.write(content)


def _rate(snapshot: Snapshot, path: str) -> float:
    """Bytes for each microsecond, from a tenth to nine tenths of its memory, of a microVM that does not run."""
    size = os.stat(snapshot.memory).st_size
    with Firecracker.start() as vm:
        before = _resident(vm.pid)
        loading = threading.Thread(target=vm.load, args=(snapshot.state,), kwargs={"uffd": path})
        loading.start()
        times = []
        for part in (0.1, 0.9):
            deadline = time.monotonic() + DEADLINE_S
            while (now := _resident(vm.pid) - before) < part * size:
                if time.monotonic() > deadline:
                    raise MigrationError(f"{now} of {size} bytes of a microVM are there after {DEADLINE_S:.0f} s")
                time.sleep(0.0002)
            times.append((time.perf_counter(), now))
        loading.join()
    (begin_s, least), (end_s, most) = times
    return float((most - least) / (end_s - begin_s) / 1e6)


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def _populate(rounds: int, snapshot: Snapshot) -> list[Measurement]:
    ways = {
        "1 thread": partial(_floor, snapshot, "place 1"),
        "2 threads": partial(_floor, snapshot, "place 2"),
        "ours": partial(_pager, snapshot, "--prefetch", "all"),
    }

    async def rate(name: str) -> float:
        async with ways[name]() as handler:
            if name == "ours":
                await _has_spare(handler)
            return await thread(_rate, snapshot, handler.path)

    found = await by_turns(rounds, {name: partial(rate, name) for name in ways})
    turns = [turn | {"ceiling": max(turn["1 thread"], turn["2 threads"])} for turn in found]
    name = f"memory of {POPULATED_MIB} MiB, populated / UFFDIO_COPY"
    return [ratio(name, turns, "ours", "ceiling", 0.8, at_most=False, note=POPULATE, unit="MB/s")]


# ---- when the engine dies


async def _has_spare(handler: Handler) -> None:
    """The next engine has been started, which takes a processor for half a second."""
    await next_line(handler.child, "spare", lambda line: line["event"] == "progress" and bool(line["keeper"]["spare"]))


async def _killed(snapshot: Snapshot, handler: Handler) -> list[float]:
    """Milliseconds of the longest access of the guest, for each time that the engine was killed."""
    longest = []
    with Firecracker.start() as vm:
        await thread(partial(vm.load, uffd=handler.path, resume=True), snapshot.state)
        for _ in range(KILLS):
            await _has_spare(handler)
            line = await thread(_kill, vm, handler.child.pid)
            longest.append(line.values["max"] / snapshot.ticks_per_us / 1e3)
    return longest


def _kill(vm: Firecracker, keeper: int) -> GuestLine:
    """Its engine, in the middle of a pass."""
    engine = serving_engine(keeper)
    before, passes = _resident(vm.pid), len(vm.passes())
    vm.send("r")
    deadline = time.monotonic() + DEADLINE_S
    while _resident(vm.pid) < before + STEP_PAGES // 4 * os.sysconf("SC_PAGE_SIZE"):
        if time.monotonic() > deadline:
            raise MigrationError(f"the guest waits for its pages:\n{vm.said()}")
    os.kill(engine, signal.SIGKILL)
    return _right(vm, vm.wait_pass(passes + 1))


async def _death(rounds: int, snapshot: Snapshot) -> Measurement:
    turns: Rounds = []
    for _ in range(rounds):
        async with _pager(snapshot) as handler:
            longest = sorted(await _killed(snapshot, handler))
        turns.append({"longest": longest[-1], "p50": longest[len(longest) // 2], "allowed": DEATH_MS})
    name = f"death of the engine to the next page, the longest of {KILLS} / allowed"
    return ratio(name, turns, "longest", "allowed", 1.0, note=DEATH, unit="ms")
