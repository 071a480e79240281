# SPDX-License-Identifier: Apache-2.0
"""`postcopy demo`: a source and a destination as two processes on this host, a machine between them, and a verdict.

The two run exactly what a user would run, and are told apart from outside only: the demo reads their JSON lines.
Its own checks are those that need both sides: the machine at the destination is the very one that was booted at the
source (the nonce that it made for itself, kept in its memory only), and it went on where it had been (its
counters).

With ``--lab`` each side is in a host of a laboratory, with a real cable between them, which is pulled out in the
middle of postcopy and put back when both sides have noticed.

Whatever happens, no process is left: the children are ended by the demo's own end, in order first, then by force.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from subprocess import PIPE, SubprocessError
from typing import TYPE_CHECKING, Any

import trio

from postcopy._blocking import run_sync
from postcopy._child import python
from postcopy.errors import ConfigurationError, MigrationError, PostcopyError, known_error
from postcopy.machines.toy.machine import explain_no_kvm
from postcopy.output import Output
from postcopy.service import options
from postcopy.service.options import Group, Option
from postcopy.testbed import ChaosPlan, open_chaos_proxy
from postcopy.testbed.chaos import KINDS
from postcopy.testbed.chaos_command import parse_plan
from postcopy.uffd import explain_unavailable
from postcopy.units import format_size

if TYPE_CHECKING:
    from postcopy.testbed.lab import Host

Json = dict[str, Any]
END_S = 15.0  # for a child to end in order
MAX_LINE_BYTES = 1 << 20
MIN_IMAGE_BYTES = 1 << 20
CHAOS_SECONDS = 6  # that the push of all memory takes where connections are to be cut meanwhile
MIN_CHAOS_BANDWIDTH = 2 << 20
LAB_HEARTBEAT_S = 0.5  # a cable that is pulled out tells nobody: silence does
LAB_HEADROOM = 2
LAB_NET = "tap:guest0"  # of both hosts
LAB_ADDRESS = "10.77.0.200"  # of the machine, beyond all hosts
LAB_CUT_AT = 1 / 3  # of the memory is at the destination when the cable is cut


class _Child:
    """One side: its progress as it comes, its result, its last words."""

    def __init__(self, name: str, arguments: list[str], host: Host | None = None) -> None:
        self.name = name
        self.arguments = arguments
        self.host = host  # where it runs, in a laboratory
        self.listening: str | None = None
        self.progress: Json = {"side": name, "status": "setup"}
        self.result: Json | None = None
        self.stderr: deque[str] = deque(maxlen=50)
        self.process: trio.Process | None = None
        self.address_known = trio.Event()
        self.committed = trio.Event()  # behind the point of no return, as far as it has said
        self.done = trio.Event()
        self._news = trio.Event()  # replaced by each line

    async def run(self, output: Output) -> None:
        command = python("-m", "postcopy", *self.arguments)
        if self.host is not None:
            command = self.host.command(*command)
        try:
            process = self.process = await trio.lowlevel.open_process(command, stdin=None, stdout=PIPE, stderr=PIPE)
        except (OSError, SubprocessError) as error:
            raise MigrationError(f"cannot start {self.name}: {error}") from error
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_errors, process.stderr)
                async for line in _lines(process.stdout):
                    self._take(line, output)
            await process.wait()
        finally:
            if process.returncode is None:
                with trio.CancelScope(shield=True):
                    with contextlib.suppress(ProcessLookupError):
                        process.terminate()
                    with trio.move_on_after(END_S):
                        await process.wait()
                    if process.returncode is None:
                        process.kill()
                        await process.wait()
            await process.stdout.aclose()
            await process.stderr.aclose()
            self.address_known.set()
            self.committed.set()
            self.done.set()
            self._news.set()

    async def end(self) -> None:
        """Asks it to end, in order, and waits for it."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
        await self.done.wait()

    def _take(self, line: str, output: Output) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            raise MigrationError(f"{self.name} said something that is not JSON: {line[:80]!r}") from None
        event = message.pop("event", None)
        message.pop("elapsed-ms", None)
        if event == "result":
            self.result = message
        elif event == "listening":
            self.listening = message["address"]
            self.address_known.set()
        elif event == "progress":
            self.progress = message
            if message["status"].startswith("postcopy"):
                self.committed.set()
            output.emit("progress", message)
        output.kick()
        self._news.set()

    async def until(self, what: str, found: Callable[[Json], bool]) -> None:
        """Waits for a progress of which `found` is true; `MigrationError` when its end comes first. One waiter."""
        while not found(self.progress):
            if self.done.is_set():
                await _good_end(self)  # what it has died of says more
                raise MigrationError(f"{self.name} was at its end before {what}")
            self._news = trio.Event()
            await self._news.wait()

    async def _read_errors(self, stream: trio.abc.ReceiveStream) -> None:
        async for line in _lines(stream):
            self.stderr.append(line)

    @property
    def last_error(self) -> str:
        for line in reversed(self.stderr):
            if line.startswith("postcopy: error: "):
                return line.removeprefix("postcopy: error: ")
        return str((self.result or {}).get("error") or (self.stderr[-1] if self.stderr else "it said nothing"))


async def _lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[str]:
    buffer = b""
    async for data in stream:
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace")
        if len(buffer) > MAX_LINE_BYTES:
            raise MigrationError("a child's line does not end")
    if buffer:
        yield buffer.decode("utf-8", "replace")


_PLANS = ", ".join(KINDS)
OPTIONS = (
    Group(
        (
            replace(options.KIND, help="what to migrate (default: kvm, or rv64 where kvm cannot be used)"),
            *options.MACHINE,
        ),
        "the machine",
    ),
    Group((options.BACKING, options.BUSY_POLL, options.PAGER, *options.SENDING), "the engine"),
    Group(
        (
            replace(options.MIGRATE_AFTER, help="let the machine compute so long after it is ready (default 1)"),
            replace(options.RUN_FOR, help=options.RUN_FOR.help.replace("until interrupted", "2")),
            options.DUMP,
            options.VERIFY,
            Option(
                "chaos",
                f"a bad network between the two: {_PLANS}; or more exactly, as cut:every=0.1..0.5,down=0.2"
                " (docs/chaos.md); --seed repeats it",
                "PLAN",
            ),
            Option(
                "lab",
                "each side in a host of a laboratory of its own (docs/lab.md); the cable between them is cut in the"
                " middle of postcopy, and healed",
                flag="set",
            ),
            options.seconds("deadline", "give up after so long (default 300)"),
        )
    ),
    options.OUTPUT,
)
DEFAULTS: Json = {"migrate_after_s": 1.0, "run_for_s": 2.0, "deadline_s": 300.0}
MACHINE_DEFAULTS: Json = {"memory_bytes": 256 << 20, "vcpus": 2, "workload": "random"}  # of one that runs


def make(given: Json, output: Output) -> Callable[[trio.Event], Awaitable[bool]]:
    return DemoCommand(given, output).run


class DemoCommand:
    def __init__(self, given: Json, output: Output) -> None:
        """`given`: what was said of `OPTIONS`. It becomes what the two sides are told, each as far as it has the
        option."""
        values = self._values = DEFAULTS | given
        self._output = output
        self._as_json = "json" in values
        self._lab = "lab" in values
        self._kind = values.setdefault("kind", "") or _usable_machine()
        values["kind"] = self._kind
        image = self._kind == "image"
        if "release_ram" in values and image:
            raise ConfigurationError("--release-ram: an image is a file, which stays as it is; leave the option out")
        if not image:
            values |= MACHINE_DEFAULTS | values
        self._echo = not image and values["workload"] == "echo"
        if self._echo:
            if not self._lab:
                raise ConfigurationError(
                    "--workload echo needs a network: say --lab, or see docs/machines.md for one of your own"
                )
            from postcopy.machines.toy.tap import parse_ipv4

            values |= {"net": LAB_NET, "net_address": parse_ipv4(LAB_ADDRESS)} | values
        self._chaos: ChaosPlan | None = None
        if "chaos" in values:
            self._chaos = parse_plan(values["chaos"], values)
            if image:
                values.pop("seed", None)  # an image has no use for one
            if self._lab and self._chaos.cut_every_s is not None:
                raise ConfigurationError(
                    "--lab cuts the cable itself: --chaos may only be none, slow or split beside it"
                )
        if self._lab:
            values["heartbeat_s"] = LAB_HEARTBEAT_S
        bandwidth = values.get("max_bandwidth_bytes_per_s", 0)
        if (self._lab or (self._chaos is not None and self._chaos.cut_every_s is not None)) and not bandwidth:
            # Slow enough that there is something to cut.
            bandwidth = max(MIN_CHAOS_BANDWIDTH, values.get("memory_bytes", 0) // CHAOS_SECONDS)
        values["max_bandwidth_bytes_per_s"] = bandwidth
        if image and "image" not in values:
            self._image_bytes = values.pop("memory_bytes", 256 << 20)  # for the file, which says it from then on
            if self._image_bytes < MIN_IMAGE_BYTES:
                raise ConfigurationError(f"an image for the demo needs at least {format_size(MIN_IMAGE_BYTES)}")

    async def run(self, stop: trio.Event) -> bool:
        result: Json
        try:
            with trio.fail_after(self._values["deadline_s"]):
                async with _temporary_directory() as directory:
                    result = await self._both(directory, stop)
        except trio.TooSlowError:
            result = {"status": "failed", "error": f"not done after {self._values['deadline_s']:g} s (--deadline)"}
        except BaseExceptionGroup as group:
            result = {"status": "failed", "error": str(known_error(group))}
        except PostcopyError as error:
            result = {"status": "failed", "error": str(error)}
        result.setdefault("verified", False)
        self._show(result)
        self._output.emit("result", {"side": "demo", **result})
        if result.get("error"):
            raise MigrationError(str(result["error"]))
        return result["status"] == "completed" and result["verified"] is True

    async def _both(self, directory: str, stop: trio.Event) -> Json:
        values = self._values
        if values.get("workload") == "disk":
            values.setdefault("disk", os.path.join(directory, "disk.img"))
        if self._kind == "image" and "image" not in values:
            values["image"] = os.path.join(directory, "image.raw")
            await run_sync(_make_image, values["image"], self._image_bytes)
        if not self._lab:
            return await self._run(_Child("source", []), _Child("dest", self._dest_arguments("127.0.0.1")), stop)
        from postcopy.testbed.lab import MAX_RATE, LabPlan, open_lab

        # The cable is twice as fast as the push, so that requested pages find room, and yet slow enough to be cut in
        # the middle, however many pages the machine asks for.
        rate = min(LAB_HEADROOM * values["max_bandwidth_bytes_per_s"], MAX_RATE)
        async with open_lab(LabPlan(f"demo-{os.getpid()}", hosts=2 + self._echo, rate=rate)) as lab:
            here, there, *others = lab.hosts.values()
            source, dest = _Child("source", [], here), _Child("dest", self._dest_arguments(there.ipv4), there)
            if not self._echo:
                return await self._run(source, dest, stop)
            return await self._watched(source, dest, others[0], stop)

    async def _watched(self, source: _Child, dest: _Child, observer: Host, stop: trio.Event) -> Json:
        """The machine is on the laboratory's network, and a third host asks it all the time."""
        from postcopy.machines.toy.tap import format_ipv4, parse_net
        from postcopy.testbed.pinger import open_ping_process

        for side in (source, dest):
            assert side.host is not None
            await trio.to_thread.run_sync(side.host.attach_tap, parse_net(self._values["net"]))
        address = format_ipv4(self._values["net_address"])
        async with open_ping_process(address, wrap=lambda command: observer.command(*command)) as pings:
            result = await self._run(source, dest, stop)
            statistics = await pings.stop()
        told = result["source"]
        begin_ns = told.get("paused-at-ns", 0)
        gap_ms = pings.gap_ms(begin_ns, begin_ns + round(told.get("downtime-ms", 0) * 1e6))
        one_machine = statistics.same_machine and statistics.went_back == statistics.duplicates == 0
        good = one_machine and gap_ms is not None
        result["pings"] = {
            "address": address,
            "observer": observer.name,
            "switchover-gap-ms": gap_ms,
            "sent": statistics.sent,
            "answered": statistics.answered,
            "duplicates": statistics.duplicates,
            "went-back": statistics.went_back,
            "reordered": statistics.reordered,
            "longest-gap-ms": statistics.longest_gap_ms,
        }
        result["verification"].append(
            {
                "ok": good,
                "what": f"{address} answered {statistics.answered} of {statistics.sent} echoes, before and after, with"
                " numbers that never went back"
                if good
                else f"{address} was not one machine that counts its answers: {statistics.as_dict()}",
                "how": f"numbered datagrams from {observer.name}, answered with the guest's own number and nonce",
            }
        )
        result["verified"] = result["verified"] and good
        return result

    async def _run(self, source: _Child, dest: _Child, stop: trio.Event) -> Json:
        cable: Json = {}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._output.follow, lambda: self._progress(source, dest))
            nursery.start_soon(dest.run, self._output)

            async def interruption() -> None:
                await stop.wait()
                raise MigrationError("interrupted")

            nursery.start_soon(interruption)
            await dest.address_known.wait()
            if dest.listening is None:
                raise MigrationError(f"the destination did not start: {dest.last_error}")
            async with self._cable(dest.listening, source) as (address, chaos):
                source.arguments = self._source_arguments(address)
                nursery.start_soon(source.run, self._output)
                # Whichever ends first with an error ends it all; the other one would wait for it.
                async with trio.open_nursery() as waiting:
                    if dest.host is not None:
                        waiting.start_soon(_pull_the_cable, source, dest, dest.host, cable)
                    for child in (source, dest):
                        waiting.start_soon(_good_end, child)
            nursery.cancel_scope.cancel()
        assert source.result is not None
        assert dest.result is not None
        result = merge(source.result, dest.result) | chaos
        if dest.host is not None:
            result["lab"] = cable
            count = (result["recoveries"] or {}).get("count", 0)
            cut = cable["cut"]
            result["verification"].append(
                {
                    "ok": count > 0,
                    "what": f"the cable was out for {cut['healed-ms']:g} ms; recoveries: {count}",
                    "how": "the port of the destination's cable was down until both sides said that they were paused",
                }
            )
            result["verified"] = result["verified"] and count > 0
        return result

    @asynccontextmanager
    async def _cable(self, address: str, source: _Child) -> AsyncIterator[tuple[str, Json]]:
        """Where the source is to connect, and what there will be to say about the network afterwards."""
        if self._chaos is None:
            yield address, {}
            return
        said: Json = {"plan": self._values["chaos"], "seed": self._chaos.seed}
        if source.host is not None:
            # There the proxy has to be, too. Where the kernel has no netem, this is how the network becomes slow.
            child = _Child("chaos", self._chaos_arguments(address), source.host)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child.run, self._output)
                await child.address_known.wait()
                if child.listening is None:
                    raise MigrationError(f"the proxy did not start: {child.last_error}")
                yield child.listening, {"chaos": said}
                await child.end()
            told = child.result or {}
            said |= {"connections": told.get("connections"), "refused": told.get("refused"), "cuts": told.get("by_way")}
            return
        # Nothing is cut before the point of no return: that would only keep the machine where it is.
        async with open_chaos_proxy(address, self._chaos, begin=source.committed) as proxy:
            yield str(proxy.address), {"chaos": said}
            statistics = proxy.statistics
            said |= {"connections": statistics.connections, "refused": statistics.refused, "cuts": statistics.by_way}

    def _chaos_arguments(self, address: str) -> list[str]:
        assert self._chaos is not None
        plan = ["chaos", self._values["chaos"], "--seed", str(self._chaos.seed)]
        return [*plan, "--json", "--listen", "127.0.0.1:0", "--to", address]

    def _progress(self, source: _Child, dest: _Child) -> Json:
        # What matters is at the source until the machine is not there any more.
        return dest.progress if dest.progress["status"] not in ("setup", "active") else source.progress

    def _dest_arguments(self, host: str) -> list[str]:
        return self._arguments("dest", listen=f"{host}:0")

    def _source_arguments(self, address: str) -> list[str]:
        return self._arguments("source", connect=address, keep=False)

    def _arguments(self, command: str, **more: Any) -> list[str]:
        values = {name: value for name, value in self._values.items() if name != "log_json"}
        return [command, *options.to_arguments(options.COMMANDS[command], values | {"json": True} | more)]

    def _show(self, result: Json) -> None:
        """The table at the end; on stderr when stdout carries JSON."""
        from rich.console import Console
        from rich.table import Table

        console = Console(stderr=self._as_json, highlight=False)
        table = Table(title="postcopy demo", show_header=False, title_justify="left")
        ram, latency = result.get("ram") or {}, result.get("fault-latency-us") or {}
        table.add_row("status", str(result["status"]))
        if "downtime-ms" in result:
            table.add_row("downtime", f"{result['downtime-ms']:g} ms")
            if pings := result.get("pings"):
                gap_ms = pings["switchover-gap-ms"]
                gap = "no answers" if gap_ms is None else f"{gap_ms:g} ms between two answers"
                table.add_row("network gap", f"{gap}; with the cut cable {pings['longest-gap-ms']:g} ms")
            table.add_row("total", f"{result['total-ms']:g} ms")
        if ram:
            table.add_row("memory", f"{format_size(ram['total'])}, {format_size(ram['transferred'])} transferred")
            table.add_row("pages on demand", f"{ram['demand-pages']}")
            table.add_row("pages in background", f"{ram['background-pages']} ({ram['duplicate-pages']} came twice)")
            table.add_row("pages of zeros", f"{ram['zero-pages']}")
        if released := ((result.get("source") or {}).get("ram") or {}).get("released"):
            table.add_row("given back at the source", format_size(released))
        if latency.get("count"):
            numbers = ", ".join(f"{name} {latency[name]:g} us" for name in ("p50", "p99", "max"))
            table.add_row("demand fault", numbers)
        if result.get("recoveries", {}).get("count"):
            told = result["recoveries"]
            table.add_row("recoveries", f"{told['count']}, the longest took {told['max-ms']:g} ms")
        if deaths := (result.get("pager") or {}).get("deaths"):
            table.add_row("pager", f"its process died {deaths} times, and another one took over")
        if chaos := result.get("chaos"):
            cuts = ", ".join(f"{count} by {way}" for way, count in chaos.get("cuts", {}).items())
            table.add_row("network", f"{chaos['plan']}, seed {chaos['seed']}: {cuts or 'nothing was cut'}")
        if lab := result.get("lab"):
            cut, hosts = lab["cut"], " to ".join(f"{host['name']} ({host['ipv4']})" for host in lab["hosts"].values())
            table.add_row("laboratory", f"{hosts}, MTU {lab['mtu']}, {format_size(lab['rate-bytes-per-s'])}/s")
            table.add_row("cable", f"cut at {cut['at-percent']:g} %, noticed after {cut['noticed-ms']:g} ms, healed")
        if result.get("blocktime-ms"):
            table.add_row("blocked, by vCPU", ", ".join(f"{ms:g} ms" for ms in result["blocktime-ms"]))
        table.add_row("verified", {True: "yes", False: "NO"}.get(result["verified"], "was not asked for"))
        for item in result.get("verification", []):
            table.add_row("  " + ("✓" if item["ok"] else "✗"), item["what"])
        with contextlib.suppress(OSError):
            console.print(table)


def merge(source: Json, dest: Json) -> Json:
    """Both results as one, with the checks that need both."""
    verification = list(dest.get("verification") or [])
    here, there = dest.get("guest") or {}, source.get("guest-at-pause") or {}
    if there.get("nonce"):
        same = here.get("nonce") == there["nonce"]
        verification.append(
            {
                "ok": same,
                "what": f"the machine is the one that was booted at the source (nonce {there['nonce']})"
                if same
                else f"the nonce was {there['nonce']} at the source, and is {here.get('nonce')} at the destination",
                "how": "made by the guest at boot, kept in its memory only, announced by the guest on both hosts",
            }
        )
    if "operations" in there:
        before, after = there["operations"], here.get("operations", 0)
        verification.append(
            {
                "ok": after >= before,
                "what": f"it went on where it was: {before} operations at the pause, {after} at the end",
                "how": "counters of the guest, by vCPU, which move with it",
            }
        )
    completed = source["status"] == dest["status"] == "completed"
    status = "completed" if completed else next(s for s in (dest["status"], source["status"]) if s != "completed")
    result: Json = {"status": status, "machine": dest.get("machine") or source.get("machine")}
    for name in ("downtime-ms", "total-ms", "ram", "fault-latency-us", "blocktime-ms", "recoveries", "pager", "dump"):
        result[name] = dest.get(name)
    asked = dest.get("verified") is not None
    good = all(item["ok"] for item in verification)
    result["verified"] = (good if asked else None) if completed else False
    result["verification"] = verification
    result["error"] = dest.get("error") or source.get("error")
    result["source"], result["dest"] = source, dest
    return result


def _usable_machine() -> str:
    """kvm where this user can run and migrate one, else rv64, which needs no rights; says so."""
    why = explain_no_kvm() or explain_unavailable(kernel_faults=True)
    if why is None:
        return "kvm"
    with contextlib.suppress(OSError):
        print(f"postcopy: --machine kvm cannot be used here ({why.message}): showing --machine rv64", file=sys.stderr)
    return "rv64"


async def _pull_the_cable(source: _Child, dest: _Child, host: Host, said: Json) -> None:
    """Cuts the destination's cable in the middle of postcopy, heals it when both sides have noticed, and says so."""

    def resident(progress: Json) -> float:
        ram = progress.get("ram") or {}
        return 1 - ram["remaining"] / ram["total"] if ram.get("total") and "remaining" in ram else 0.0

    await dest.until(
        "the cable was cut: give it more --memory or a lower --max-bandwidth",
        lambda now: now["status"] == "postcopy-active" and resident(now) >= LAB_CUT_AT,
    )
    at_percent = round(100 * resident(dest.progress), 1)
    await trio.to_thread.run_sync(host.cut)
    cut_s = trio.current_time()
    for side in (source, dest):
        await side.until("it noticed the cut cable", lambda now: now["status"] == "postcopy-paused")
    noticed_s = trio.current_time()
    await trio.to_thread.run_sync(host.heal)
    healed_s = trio.current_time()
    said |= {
        "name": host.lab.name,
        "mtu": host.lab.mtu,
        "rate-bytes-per-s": host.lab.rate_of(host.name),
        "hosts": {
            side.name: {"name": side.host.name, "ipv4": side.host.ipv4, "ipv6": side.host.ipv6}
            for side in (source, dest)
            if side.host is not None
        },
        "cut": {
            "host": host.name,
            "at-percent": at_percent,
            "noticed-ms": round(1000 * (noticed_s - cut_s), 1),
            "healed-ms": round(1000 * (healed_s - cut_s), 1),
        },
    }


async def _good_end(child: _Child) -> None:
    await child.done.wait()
    assert child.process is not None
    if child.process.returncode or child.result is None:
        raise MigrationError(f"{child.name}: {child.last_error}")


def _make_image(path: str, size_bytes: int) -> None:
    """A sparse image: an eighth of it is random, in four pieces."""
    piece_bytes = size_bytes // 32
    with open(path, "wb") as image:
        image.truncate(size_bytes)
        for piece in range(4):
            image.seek((2 * piece + 1) * size_bytes // 8)
            for _ in range(0, piece_bytes, 1 << 16):
                image.write(os.urandom(min(1 << 16, piece_bytes)))


@asynccontextmanager
async def _temporary_directory() -> AsyncIterator[str]:
    with tempfile.TemporaryDirectory(prefix="postcopy-demo-") as directory:
        yield directory
