# SPDX-License-Identifier: Apache-2.0
"""``firecracker``: a real Firecracker whose memory comes from `postcopy pager`, against the least that can serve it.

The guest (csrc/machine/guest/firecracker.c) times its first access to each page itself, in random order, and says the
percentiles; so what is compared is what a guest sees, whoever serves it. `_Floor` is the smallest handler in C, and the
design of the example in Firecracker's documentation (one thread, synchronous).
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from postcopy._child import python
from postcopy._native import ffi, lib
from postcopy.errors import MigrationError, ResourceError, check
from postcopy.machines.firecracker.handshake import Handshake, receive_handshake
from postcopy.testbed import probe
from postcopy.testbed._processes import Child, open_child, parse
from postcopy.testbed.bench._common import DEADLINE_S, Figure, Rounds, ratio, worker
from postcopy.testbed.firecracker import Firecracker, GuestLine, find, guest_path, version_of

MEMORY_MIB = 128
PAGES = 8192
"""The working set of the guest, spread over its memory: 32 MiB."""
POPULATED_MIB = 512
KILLS = 20
"""Of the engine in a round."""
SOME_PAGES = 256
"""That a guest touches during one of them."""
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


def _ordered(vm: Firecracker) -> GuestLine:
    line = vm.order("r")
    if line.values["errors"]:
        raise MigrationError(f"the guest found {line.values['errors']} wrong words:\n{vm.said()}")
    return line


def _touched(snapshot: Snapshot, path: str) -> dict[str, float]:
    """One pass of a guest whose memory comes from the handler at `path`, in microseconds."""
    with Firecracker.start() as vm:
        vm.load(snapshot.state, uffd=path, resume=True)
        values = _ordered(vm).values
        return {name: values[name] / snapshot.ticks_per_us for name in ("p50", "p99", "ticks")}


# ---- who serves it


@asynccontextmanager
async def _floor(path: str, snapshot: Snapshot, what: str) -> AsyncIterator[Child]:
    """``plain`` or ``example``, see the head of this file; ``place N``: puts all of the image there, by N threads."""
    command = worker("_firecracker", path, str(snapshot.memory), what)
    async with open_child(command) as child:
        if await child.line() != "ready":
            raise MigrationError("a handler of a measurement ended early (its error is above)")
        yield child


@asynccontextmanager
async def _pager(path: str, snapshot: Snapshot, *options: str) -> AsyncIterator[Child]:
    """`postcopy pager`, that listens."""
    command = python("-m", "postcopy", "pager", "--json", "--socket", path, "--image", str(snapshot.memory), *options)
    async with open_child(command, ask=signal.SIGTERM, end_s=10.0) as child:
        await _event(child, "listening")
        yield child


async def _event(child: Child, name: str) -> dict[str, Any]:
    with trio.move_on_after(DEADLINE_S):
        async for line in child.stdout:
            if (record := parse(line))["event"] == name:
                return record
        raise MigrationError(f"`postcopy pager` ended before its line {name} (its error is above)")
    raise MigrationError(f"`postcopy pager` wrote no line {name} within {DEADLINE_S:.0f} s")


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
        check(
            lib.pc_bench_image_place(
                handshake.uffd, image_fd, region.offset + at, region.address + at, part, PLACED_RUN_BYTES
            ),
            "placing an image",
        )

    running = [threading.Thread(target=place, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


# ---- what is measured


async def measure_firecracker(rounds: int) -> list[Figure]:
    """Faults, the working set, how fast all memory comes, and the death of the engine."""
    with tempfile.TemporaryDirectory(prefix="postcopy-bench-") as name:
        directory = Path(name)
        small = await _thread(take_snapshot, directory / "small", MEMORY_MIB, f"pages={PAGES} spread=1")
        figures = await _faults(rounds, directory, small)
        return figures


async def _thread(function: Any, *arguments: Any) -> Any:
    return await trio.to_thread.run_sync(partial(function, *arguments))


async def _faults(rounds: int, directory: Path, snapshot: Snapshot) -> list[Figure]:
    path = str(directory / "socket")
    ways = {
        "c": partial(_floor, path, snapshot, "plain"),
        "example": partial(_floor, path, snapshot, "example"),
    }
    turns: list[dict[str, dict[str, float]]] = []
    for number in range(rounds):
        turn = {}
        for name, way in list(ways.items())[:: 1 if number % 2 else -1]:
            async with way():
                turn[name] = await _thread(_touched, snapshot, path)
            Path(path).unlink(missing_ok=True)
        turns.append(turn)
    print(turns)
    p50: Rounds = [{name: values["p50"] for name, values in turn.items()} for turn in turns]
    return [ratio("example / c", p50, "example", "c", None)]
