# SPDX-License-Identifier: Apache-2.0
"""What coming back costs: the maps of a very large machine, through the protocol and into the page server; and the time
from a network's return to the first page that comes over it.

The large machine is simulated: a sparse file stands for its memory, a bitmap for what has arrived. Everything else is
the real code of both sides, from the pager's bitmap to the page server's, but for the network between them.
"""

from __future__ import annotations

import itertools
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from subprocess import DEVNULL

import trio

from postcopy._child import python
from postcopy.dataplane.pageserver import PageServer
from postcopy.errors import MigrationError
from postcopy.memory import Memory
from postcopy.memory.bitmap import Bitmap
from postcopy.migration.maps import MapCollector
from postcopy.records.results import Measurement
from postcopy.testbed._processes import Child, open_child, parse
from postcopy.testbed.bench._common import ratio
from postcopy.testbed.chaos import ChaosPlan, ChaosProxy, open_chaos_proxy
from postcopy.wire import (
    ID_BYTES,
    PAGE_MAP_PAGES,
    Accept,
    Block,
    Commit,
    DestinationProtocol,
    Offer,
    PageMap,
    Prepared,
    Ready,
    ReceivedMap,
    Recover,
    Running,
    SourceProtocol,
    Switchover,
)

RUN_PAGES = 64
READ_BYTES = 64 * 1024  # as the control connection is read
BEFORE_PAGES_BYTES = 4096  # more than the handshakes of a recovery take, less than the first page and they
GIVE_UP_S = 30.0
CUTS = 25  # a round
CUTS_OF = "{} cuts of 0.1 to 1 s, all connections reset"
MACHINE = ["--machine", "kvm", "--memory", "256MiB", "--vcpus", "1", "--workload", "dirty", "--max-bandwidth", "2MiB/s"]


async def recovery_times_ms(
    cuts: int, seed: int, options: Sequence[str] = (), before_pages_bytes: int = BEFORE_PAGES_BYTES
) -> list[float]:
    """From a cable that is whole again to the first page that came over it, for each of so many cuts of a running
    machine. All connections, and new ones too, are reset for 0.1 to 1 s. `options`: of both sides."""
    generator = random.Random(seed)
    times_ms = []
    async with open_running_machine(ChaosPlan(seed=seed), options) as proxy:
        for _ in range(cuts):
            proxy.refuse()
            proxy.cut("reset")
            await trio.sleep(generator.uniform(0.1, 1.0))
            times_ms.append(await first_page_ms(proxy, proxy.heal, before_pages_bytes))
            await trio.sleep(generator.uniform(0.1, 0.3))
    return times_ms


@asynccontextmanager
async def open_running_machine(plan: ChaosPlan, options: Sequence[str]) -> AsyncIterator[ChaosProxy]:
    """The cable of a machine that runs at its destination, and most of whose memory is still at its source."""
    async with trio.open_nursery() as nursery, _side("dest", *options, "--listen", "127.0.0.1:0") as dest:
        address = await _said(nursery, dest, "listening", "address")
        async with (
            open_chaos_proxy(address, plan) as proxy,
            _side("source", *MACHINE, *options, "--connect", str(proxy.address)) as source,
        ):
            await _said(nursery, source, "progress", "status", "postcopy-active")
            yield proxy
            nursery.cancel_scope.cancel()


async def first_page_ms(proxy: ChaosProxy, begin: Callable[[], None], before_pages_bytes: int) -> float:
    """From `begin` to the first page that comes.

    A page has come when more bytes have gone from the source to the destination than everything takes that is said
    before pages: the clock of this measurement is the proxy's, as both sides live in other processes.
    """
    before = proxy.statistics.bytes_out
    begin()
    began_s = time.perf_counter()
    while proxy.statistics.bytes_out - before < before_pages_bytes:
        await trio.sleep(0.001)
        if time.perf_counter() - began_s > GIVE_UP_S:
            raise MigrationError(f"no page came within {GIVE_UP_S:g} s of the network's return")
    return (time.perf_counter() - began_s) * 1e3


def _side(*arguments: str) -> AbstractAsyncContextManager[Child]:
    """As a user starts it; killed in the end."""
    return open_child(python("-m", "postcopy", arguments[0], "--json", *arguments[1:]), stderr=DEVNULL)


async def _said(nursery: trio.Nursery, child: Child, event: str, name: str, value: str | None = None) -> str:
    """Reads its lines up to the one that says it. A task reads on: a full pipe would stop the process."""
    async for line in child.stdout:
        message = parse(line)
        if message["event"] == event and name in message and value in (None, message[name]):
            nursery.start_soon(_read_on, child)
            return str(message[name])
    raise MigrationError(f"a side ended before it said {name} {value or ''}")


async def _read_on(child: Child) -> None:
    async for _ in child.stdout:
        pass


async def recovery_map(size_bytes: int, seed: int) -> dict[str, float]:
    """Half of the pages have arrived, in random runs of 64: the size of all messages, and the time to make, take, check
    and apply them."""
    with tempfile.TemporaryFile() as file:
        file.truncate(size_bytes)
        with Memory.from_file(file.fileno()) as memory:
            async with PageServer() as server:
                server.add_block(memory)
                received = _half(memory.pages, seed)
                source, dest = _cut_off(size_bytes)
                begin_s = time.perf_counter()
                data = _messages(dest, received)
                made_s = time.perf_counter()
                server.set_received(0, _collected(source, data, memory.pages))
                applied_s = time.perf_counter()
    return {"MB": len(data) / 1e6, "make-s": made_s - begin_s, "apply-s": applied_s - made_s, "s": applied_s - begin_s}


def _half(pages: int, seed: int) -> Bitmap:
    words = bytearray(8 * -(-pages // 64))
    generator = random.Random(seed)
    for run in range(pages // RUN_PAGES):
        if generator.getrandbits(1):
            words[run * 8 : run * 8 + 8] = b"\xff" * 8
    return Bitmap.from_bytes(bytes(words), pages)


def _messages(dest: DestinationProtocol, received: Bitmap) -> bytes:
    parts = [
        dest.send(ReceivedMap(0, first_page, len(part), part.rle_encode()))
        for first_page, part in received.parts(PAGE_MAP_PAGES)
    ]
    return b"".join([*parts, dest.send(Recover(1, len(parts), received.crc32c()))])


def _collected(source: SourceProtocol, data: bytes, pages: int) -> Bitmap:
    collector = MapCollector([pages])
    for start in range(0, len(data), READ_BYTES):
        source.receive_data(data[start : start + READ_BYTES])
        while (message := source.next_message()) is not None:
            if isinstance(message, ReceivedMap):
                collector.add(message)
            elif isinstance(message, Recover):
                collector.finish(message.TYPE, message.maps)
                if collector.bitmaps[0].crc32c() != message.digest:
                    raise MigrationError("the map that arrived is not the one that was sent")
    return collector.bitmaps[0]


def _cut_off(size_bytes: int) -> tuple[SourceProtocol, DestinationProtocol]:
    """Both sides of a migration that was cut when the machine ran at the destination, and that have met again."""
    source, dest = SourceProtocol(), DestinationProtocol()
    offer = Offer(bytes(ID_BYTES), bytes(ID_BYTES), "simulated", {}, (Block("memory", size_bytes, 4096),), 1, 0)

    def receive(side: SourceProtocol | DestinationProtocol, data: bytes) -> None:
        side.receive_data(data)
        while side.next_message() is not None:
            pass

    receive(dest, source.send(offer))
    receive(source, dest.send(Accept((4096,), 1, 1)))
    receive(source, dest.send(Ready()))
    receive(dest, source.send(PageMap(0, 0, 1, b"")))
    receive(dest, source.send(Switchover(b"", 1)))
    receive(source, dest.send(Prepared()))
    receive(dest, source.send(Commit()))
    receive(source, dest.send(Running(1)))
    for side in (source, dest):
        side.connection_lost("cut")
        side.reconnected()
    return source, dest


def tail(what: str, rounds: Sequence[Sequence[float]]) -> Measurement:
    """p99 of all cuts together: a round has too few for one, its 99th percentile would be its longest."""
    times_ms = sorted(itertools.chain(*rounds))
    found = {"p99": times_ms[int(len(times_ms) * 0.99)], "longest": times_ms[-1], "allowed": 500.0}
    return ratio(f"{what}, p99 / 500 ms", [found], "p99", "allowed", 1.0, unit="ms", note=CUTS_OF.format(len(times_ms)))


async def measure_recovery_time(rounds: int) -> list[Measurement]:
    """A running machine that is cut off again and again."""
    found = [await recovery_times_ms(CUTS, number) for number in range(rounds)]
    medians = [{"p50": statistics.median(each), "allowed": 150.0} for each in found]
    what, note = "first page after the network's return", CUTS_OF.format(f"{CUTS} times {rounds}")
    return [
        ratio(f"{what}, p50 / 150 ms", medians, "p50", "allowed", 1.0, unit="ms", note=note),
        tail(what, found),
    ]


async def measure_recovery_map(rounds: int) -> list[Measurement]:
    """The maps of a machine of 1 TiB, from one side's bitmap to the other's."""
    values = [await recovery_map(1 << 40, number) | {"MB-allowed": 10.0, "s-allowed": 1.0} for number in range(rounds)]
    note = "4 KiB pages, half of them received, in random runs of 64; simulated on bitmaps"
    return [
        ratio(f"recovery map of 1 TiB, {name} / allowance", values, unit, f"{unit}-allowed", 1.0, note=note, unit="")
        for name, unit in (("size", "MB"), ("time", "s"))
    ]
