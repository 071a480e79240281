# SPDX-License-Identifier: Apache-2.0
"""What is gained, and what it costs, to ask for pages before they are touched, for each policy and each order in which
a thread touches memory, with no push: over loopback, and with a round trip of some milliseconds (the chaos proxy's).

One process has all of it: source, proxy, destination and the thread that touches."""

from __future__ import annotations

import json
import random
import socket
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from statistics import median

import msgspec
import trio

from postcopy._native import ffi, lib
from postcopy.dataplane.ahead import Prefetch
from postcopy.dataplane.pager import Pager
from postcopy.dataplane.pageserver import PageServer
from postcopy.memory import Memory
from postcopy.net import Address
from postcopy.records.results import Measurement
from postcopy.testbed._processes import run_json
from postcopy.testbed.bench._common import DEADLINE_S, ratio, worker
from postcopy.testbed.bench._worker import SEED
from postcopy.testbed.chaos import ChaosPlan, open_chaos_proxy

NONE, ADAPTIVE = "none", "adaptive"
POLICIES = (NONE, ADAPTIVE, "forward:8", "both:8")
STRIDE = 7
ORDERS = {"sequential": 1, "backward": -1, f"stride {STRIDE}": STRIDE, f"stride -{STRIDE}": -STRIDE, "random": 0}
DELAY_S = 0.002  # each way; with what the proxy and Python take some 5 ms there and back
NEAR_TOUCHES, FAR_TOUCHES = 4096, 192


@dataclass(frozen=True)
class Cell:
    order: str
    policy: str
    far: bool  # with the delay

    @property
    def touches(self) -> int:
        return FAR_TOUCHES if self.far else NEAR_TOUCHES


def order_of(stride: int, touches: int) -> list[int]:
    """Pages; of a stride of 0 any, in random order, of a memory that has eight times as many."""
    if not stride:
        return random.Random(SEED).sample(range(8 * touches), touches)
    pages = [abs(stride) * number for number in range(touches)]
    return pages if stride > 0 else pages[::-1]


async def measure_prefetch(rounds: int) -> list[Measurement]:
    """The time of a page that is touched: the median of all touches for the random order, else their mean."""
    near = [Cell("random", policy, False) for policy in (NONE, ADAPTIVE) * 2 + POLICIES]
    near += [Cell("sequential", policy, False) for policy in POLICIES]
    far = [Cell(order, policy, True) for order, stride in ORDERS.items() if stride for policy in POLICIES]
    cells = [*near, *far]
    took = []
    for number in range(rounds):  # what is measured later finds another host
        us = await _round(cells[::-1] if number % 2 else cells)
        took.append(us[::-1] if number % 2 else us)
    found = []
    for order, is_far in dict.fromkeys((cell.order, cell.far) for cell in cells):
        values = [
            {
                policy: median(us for cell, us in zip(cells, one, strict=True) if cell == Cell(order, policy, is_far))
                for policy in POLICIES
            }
            for one in took
        ]
        where = f"{order}, {2 * DELAY_S * 1000:g} ms of round trip and more" if is_far else f"{order}, loopback"
        goal = 1.05 if order == "random" else 0.2 if is_far else 0.5
        found.append(ratio(f"{where}: {ADAPTIVE} / {NONE}", values, ADAPTIVE, NONE, goal))
    return found


async def _round(cells: list[Cell]) -> list[float]:
    """Microseconds a page of each."""
    command = worker("_prefetch", msgspec.json.encode(cells).decode())
    return list((await run_json(command, "a measurement of prefetch policies", DEADLINE_S))["us"])


async def _measure(cell: Cell) -> float:
    order = order_of(ORDERS[cell.order], cell.touches)
    size_bytes = 4096 * (8 * cell.touches)
    async with AsyncExitStack() as stack:
        source = stack.enter_context(Memory.create("memfd", size_bytes))
        memory = stack.enter_context(Memory.create("memfd", size_bytes))
        lib.pc_bench_fill(source.struct.base, size_bytes, SEED)
        server = await stack.enter_async_context(PageServer())
        pager = await stack.enter_async_context(Pager())
        server.add_block(source)
        pager.add_block(memory)
        pager.add_shard()
        pager.set_prefetch(Prefetch.parse(cell.policy))
        pager.arm(0, 0, 0, memory.pages)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        host, port = listener.getsockname()
        if cell.far:
            plan = ChaosPlan(delay_s=DELAY_S)
            proxy = await stack.enter_async_context(open_chaos_proxy(Address(host, port), plan))
            host, port = proxy.address.host, proxy.address.port
        near = await trio.to_thread.run_sync(socket.create_connection, (host, port))
        far, _ = await trio.to_thread.run_sync(listener.accept)
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.attach_urgent(0, far.detach())
        pager.attach_urgent(0, near.detach())
        await pager.confirm()
        server.serve()
        took_ns = await trio.to_thread.run_sync(_touch, memory, order)
        await pager.disconnect()
        return (median(took_ns) if cell.order == "random" else sum(took_ns) / len(took_ns)) / 1e3


def _touch(memory: Memory, order: list[int]) -> list[int]:
    """By the core, which lets other threads run meanwhile. Nanoseconds of each."""
    took_ns, base = [], memory.address
    for page in order:
        at = ffi.cast("void *", base + page * memory.page_bytes)
        before_ns = time.perf_counter_ns()
        lib.pc_crc32c(0, at, 8)
        took_ns.append(time.perf_counter_ns() - before_ns)
    return took_ns


def main(argument: str) -> None:
    """In a process of its own."""
    cells = msgspec.json.decode(argument, type=list[Cell])

    async def run() -> list[float]:
        return [await _measure(cell) for cell in cells]

    print(json.dumps({"us": trio.run(run)}), flush=True)
