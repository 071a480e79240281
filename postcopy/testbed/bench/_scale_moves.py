# SPDX-License-Identifier: Apache-2.0
"""``scale`` with whole processes: a machine that moves between two sides on this host, through a proxy that delays
where that is asked; and a daemon with many machines, all of which move to another one.

The processes are those that a user starts, and are seen from outside: their JSON lines, their control sockets, what the
kernel counts of them. Each point has a deadline, and ends all of its processes.
"""

from __future__ import annotations

import runpy
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from subprocess import PIPE
from typing import Any

import trio

from postcopy._child import python
from postcopy.errors import MigrationError
from postcopy.memory import Memory
from postcopy.service.client import ControlClient
from postcopy.testbed._processes import Child, Json, open_child, parse
from postcopy.testbed._scratch import scratch
from postcopy.testbed.bench._common import worker
from postcopy.testbed.bench._recovery import first_page_ms
from postcopy.testbed.bench._scale_parts import sparse_memory
from postcopy.testbed.chaos import ChaosPlan, ChaosProxy, open_chaos_proxy

DEADLINE_S = 60.0  # of one point
WORK = ["--machine", "rv64", "--workload", "random"]
USED = ["--used-memory", "32MiB"]
BEFORE_MOVE_S = 0.2
SLOW_PUSH = "2MiB/s"
"""Where faults are to be seen for long enough, and the network is cut in between."""
FAULTS_S = 0.7
ECHOES = 20
ECHO_BYTES = 64
IDLE_S = 1.0
AT_ONCE = 8  # machines on their way between two daemons
SMALL = {"kind": "rv64", "memory": 16 << 20, "vcpus": 1, "workload": "idle"}
BEFORE_PAGES_BYTES = 4096
CPUCLOCK_SCHED = 2  # linux/posix-timers.h


def main(*arguments: str) -> None:
    """`postcopy` with these arguments, whose machines may have more memory than this host could hold."""
    from postcopy.machines.toy import machine

    setattr(machine, "check_memory", lambda *_: None)  # noqa: B010 -- in this process only
    setattr(Memory, "create", lambda kind, size_bytes: sparse_memory(size_bytes))  # noqa: B010
    sys.argv[1:] = arguments
    runpy.run_module("postcopy", run_name="__main__", alter_sys=True)


class _Side:
    """A child, and what it says; `run` reads it to its end."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._said: list[Json] = []
        self._last_words = b""
        self._news = trio.Event()
        self._ended = False

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_errors)
            async for line in self._child.stdout:
                self._said.append(parse(line))
                self._news.set()
                self._news = trio.Event()
        self._ended = True
        self._news.set()

    async def _read_errors(self) -> None:
        assert self._child.process.stderr is not None
        async for data in self._child.process.stderr:
            self._last_words = (self._last_words + data)[-1000:]

    async def says(self, event: str, **fields: Any) -> Json:
        """Its first line with this event and these fields. `MigrationError` when it has ended without."""
        while True:
            for line in self._said:
                if line["event"] == event and all(line.get(name) == value for name, value in fields.items()):
                    return line
            if self._ended:
                why = self._last_words.decode("utf-8", "replace").strip().rpartition("\n")[2]
                raise MigrationError(f"a side of a measurement ended before it said {event}: {why}")
            await self._news.wait()

    async def result(self) -> Json:
        result = await self.says("result")
        if result["status"] != "completed":
            raise MigrationError(f"a migration that is measured failed: {result['error']}")
        return result


class Move:
    """One that is under way."""

    def __init__(self, source: _Side, dest: _Side, proxy: ChaosProxy | None, controls: dict[str, str]) -> None:
        self.source = source
        self.dest = dest
        self.proxy = proxy
        self._controls = controls

    async def push_on(self) -> None:
        """Without a limit."""
        async with ControlClient.open(self._controls["source"]) as client:
            await client.execute("set", {"max-bandwidth": 0})

    async def faults_ms(self) -> dict[str, float]:
        """How long a page has been waited for so far. `MigrationError` where none was."""
        async with ControlClient.open(self._controls["dest"]) as client:
            (machine,) = (await client.execute("status"))["machines"]
        latency = machine["migration"]["fault-latency-us"]
        if not latency["count"]:
            raise MigrationError("the machine has not waited for a page")
        return {f"fault-{part}": latency[part] / 1e3 for part in ("p50", "p99")}

    async def values(self) -> dict[str, float]:
        """Of its end, in the units of its costs in `_scale`."""
        source, dest = await self.source.result(), await self.dest.result()
        found = {
            "switchover": dest["downtime-ms"],
            "setup": source["setup-ms"],
            "total": dest["total-ms"],
            "resident": dest["overhead-bytes"] / 2**20,
        }
        latency = dest.get("fault-latency-us")
        if latency and latency["count"]:
            found |= {"fault-p50": latency["p50"], "fault-p99": latency["p99"]}
        if dest.get("blocktime-ms"):
            found["blocktime"] = statistics.fmean(dest["blocktime-ms"])
        return found


@asynccontextmanager
async def open_move(
    *machine: str, delay_s: float | None = None, sparse: bool = False, max_bandwidth: str = ""
) -> AsyncIterator[Move]:
    """`delay_s`: each way, by a proxy; None: without one."""
    program = partial(worker, "_scale_moves") if sparse else partial(python, "-m", "postcopy")
    async with AsyncExitStack() as stack:
        stack.enter_context(trio.fail_after(DEADLINE_S))
        directory = stack.enter_context(scratch())
        controls = {side: str(directory / side) for side in ("source", "dest")}
        nursery = await stack.enter_async_context(trio.open_nursery())

        async def start(command: str, *arguments: str) -> _Side:
            child = open_child(program(command, "--json", *arguments), stderr=PIPE)
            side = _Side(await stack.enter_async_context(child))
            nursery.start_soon(side.run)
            return side

        dest = await start("dest", "--listen", "127.0.0.1:0", "--run-for", "0", "--control", controls["dest"])
        address = str((await dest.says("listening"))["address"])
        proxy = None
        if delay_s is not None:
            proxy = await stack.enter_async_context(open_chaos_proxy(address, ChaosPlan(delay_s=delay_s)))
            address = str(proxy.address)
        limit = ["--max-bandwidth", max_bandwidth] if max_bandwidth else []
        source = await start(
            "source", "--connect", address, "--control", controls["source"],
            "--migrate-after", str(BEFORE_MOVE_S), *limit, *machine,
        )  # fmt: skip
        yield Move(source, dest, proxy, controls)
        nursery.cancel_scope.cancel()


async def move(*machine: str, sparse: bool = False) -> dict[str, float]:
    """From its start to its end."""
    async with open_move(*machine, sparse=sparse) as under_way:
        return await under_way.values()


# ---- delay


async def delayed(delay_s: float) -> dict[str, float]:
    """A machine that faults, is cut off in the middle, and then gets all the rest; times in milliseconds."""
    found = {"echo": await _echo_ms(delay_s)}
    async with open_move(
        *WORK, "--memory", "16MiB", "--vcpus", "1", delay_s=delay_s, max_bandwidth=SLOW_PUSH
    ) as under_way:  # fmt: skip
        proxy = under_way.proxy
        assert proxy is not None
        await under_way.source.says("progress", status="postcopy-active")
        await trio.sleep(FAULTS_S)
        found |= await under_way.faults_ms()
        found["first-page"] = await first_page_ms(proxy, lambda: proxy.cut("reset"), BEFORE_PAGES_BYTES)
        await under_way.push_on()
        return await under_way.values() | found


async def _echo_ms(delay_s: float) -> float:
    """The round trip of a few bytes through the same proxy: median of some, one after the other."""

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            while data := await stream.receive_some(ECHO_BYTES):
                await stream.send_all(data)

    times_ms = []
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, answer, listeners)
        target = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        async with (
            open_chaos_proxy(target, ChaosPlan(delay_s=delay_s)) as proxy,
            await trio.open_tcp_stream("127.0.0.1", proxy.address.port) as stream,
        ):
            for _ in range(ECHOES):
                begin_s = time.perf_counter()
                await stream.send_all(bytes(ECHO_BYTES))
                left = ECHO_BYTES
                while left:
                    left -= len(await stream.receive_some(left))
                times_ms.append((time.perf_counter() - begin_s) * 1e3)
        nursery.cancel_scope.cancel()
    return statistics.median(times_ms)


# ---- machines of a daemon


def _cpu_ms(*pids: int) -> float:
    """Processor time that processes have used, finer than the clock ticks of /proc/PID/stat: clock_getcpuclockid(3)."""
    return sum(time.clock_gettime_ns(~pid << 3 | CPUCLOCK_SCHED) for pid in pids) / 1e6


def _resident_kib(pid: int) -> float:
    """Of a process, beside its machines' memory, which is that of files (memfd)."""
    with open(f"/proc/{pid}/status") as lines:
        return float(sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")))


async def machines(count: int) -> dict[str, float]:
    """So many machines are started in a daemon, do nothing, and move to another daemon."""
    found: dict[str, float] = {}
    async with AsyncExitStack() as stack:
        stack.enter_context(trio.fail_after(DEADLINE_S))
        directory = stack.enter_context(scratch())
        nursery = await stack.enter_async_context(trio.open_nursery())
        pids, addresses, clients = [], [], []
        for name in ("here", "there"):
            control = str(directory / name)
            command = python("-m", "postcopy", "daemon", "--json", "--control", control, "--listen", "127.0.0.1:0")
            child = await stack.enter_async_context(open_child(command, stderr=PIPE))
            side = _Side(child)
            nursery.start_soon(side.run)
            addresses.append(str((await side.says("listening"))["address"]))
            pids.append(child.pid)
            clients.append(await stack.enter_async_context(ControlClient.open(control)))
        here = clients[0]
        before_kib, begin_s = _resident_kib(pids[0]), time.perf_counter()
        names = [str((await here.execute("start", SMALL))["name"]) for _ in range(count)]
        found["all-start"] = (time.perf_counter() - begin_s) * 1e3
        found["daemon-memory"] = max(1.0, _resident_kib(pids[0]) - before_kib)
        cpu_ms, begin_s = _cpu_ms(pids[0]), time.perf_counter()
        await trio.sleep(IDLE_S)
        found["idle"] = (_cpu_ms(pids[0]) - cpu_ms) / (time.perf_counter() - begin_s) / 10
        begin_s = time.perf_counter()
        await here.execute("status")
        found["status"] = (time.perf_counter() - begin_s) * 1e3
        cpu_ms, begin_s = _cpu_ms(*pids), time.perf_counter()
        downtimes = await _evacuate(here, names, addresses[1])
        found["all-moved"] = (time.perf_counter() - begin_s) * 1e3
        found["move-cpu"] = _cpu_ms(*pids) - cpu_ms
        found["each-switchover"] = statistics.median(downtimes)
        nursery.cancel_scope.cancel()
    return found


async def _evacuate(client: ControlClient, names: list[str], to: str) -> list[float]:
    """Moves all of them; how long each stood still."""
    await client.execute("events")
    waiting, under_way, downtimes = list(names), 0, []
    while waiting or under_way:
        while waiting and under_way < AT_ONCE:
            await client.execute("migrate", {"to": to, "machine": waiting.pop()})
            under_way += 1
        event = await client.next_event()
        if event["event"] == "migration-ended":
            if event["data"]["status"] != "completed":
                raise MigrationError(f"a machine did not move: {event['data']['error']}")
            downtimes.append(float(event["data"]["downtime-ms"]))
            under_way -= 1
    return downtimes
