# SPDX-License-Identifier: Apache-2.0
"""The command: sets both sides up, waits for them, and says what came of it."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from postcopy._blocking import run_sync
from postcopy._stop import Stop
from postcopy.errors import ConfigurationError, MigrationError, PostcopyError, ResourceError, known_error
from postcopy.machines.toy.machine import explain_no_kvm
from postcopy.machines.toy.tap import format_ipv4, parse_ipv4, parse_net
from postcopy.output import Output
from postcopy.output.tables import make_console
from postcopy.output.words import format_count, format_duration
from postcopy.records import Json
from postcopy.records.commands import Chaos, ChaosResult, DemoLab, DemoResult, LabCut, LabHost, Pings, Stranger
from postcopy.records.events import DestResult, Progress, SourceResult
from postcopy.service import options
from postcopy.service.options import Group, Option
from postcopy.testbed._scratch import scratch
from postcopy.testbed.chaos import KINDS, ChaosPlan, ChaosProxy, open_chaos_proxy
from postcopy.testbed.chaos.command import parse_plan
from postcopy.testbed.demo._qemu import QemuDemo
from postcopy.testbed.demo._result import check, merge, show
from postcopy.testbed.demo._side import Side
from postcopy.testbed.demo._tls import Watch, as_record, checks, make_certificates, refuse_strangers
from postcopy.testbed.pinger import open_ping_process
from postcopy.uffd import explain_unavailable
from postcopy.units import format_size

if TYPE_CHECKING:
    from postcopy.testbed.lab._lab import Host

MIN_IMAGE_BYTES = 1 << 20
CUT_PUSH_S = 6.0  # that the push of all memory takes where connections are to be cut meanwhile, whatever its size
MIN_CUT_BANDWIDTH = 256 << 10
MOST_CUT_ATTEMPTS = 3
CUT_WITHIN_S = 0.3  # of the first round
DEADLINE_S = 300.0
DEADLINE_PUSHES = 4  # the deadline is so many times as long as the push should take, where that is more
LAB_HEARTBEAT_S = 0.5  # a cable that is pulled out tells nobody: silence does
LAB_HEADROOM = 2
LAB_NET = "tap:guest0"  # of both hosts
LAB_ADDRESS = "10.77.0.200"  # of the machine, beyond all hosts
IMAGE_CONTENT = 8  # of an image that the demo makes, one part in so many is content
LAB_CUT_AT = 1 / 3  # of the memory is at the destination when the cable is cut


# fmt: off
OPTIONS = (
    Group("machine",
          replace(options.KIND, help="kind of machine to migrate (default: kvm, or rv64 where kvm cannot be used)"),
          *options.MACHINE),
    Group("migration", options.BACKING, options.BUSY_POLL, options.PAGER, *options.AHEAD, *options.SENDING),
    Group("demonstration",
          options.MIGRATE_AFTER,
          replace(options.RUN_FOR, help=options.RUN_FOR.help.partition(" (")[0]),
          options.DUMP, options.VERIFY,
          Option("chaos", f"a bad network between the two sides: {', '.join(KINDS)}; or in detail, as"
                 " cut:every=0.1..0.5,down=0.2 (docs/chaos.md); --seed repeats it", "PLAN"),
          options.flag("lab", "run each side in a host of a laboratory (docs/lab.md), and cut the cable between them in"
                       " the middle of postcopy"),
          options.flag("tls", "encrypt all connections, with certificates that the demo makes; try to get in as a"
                       " stranger, and look at what goes over the network (--lab does it unless --insecure)"),
          replace(options.INSECURE, help="with --lab: no TLS"),
          options.seconds("deadline", "give up after SECONDS, or later where the push takes longer")),
    options.OUTPUT,
)
# fmt: on
DEFAULTS: Json = {"migrate_after_s": 1.0, "run_for_s": 2.0}
MACHINE_DEFAULTS: Json = {"memory_bytes": 256 << 20, "vcpus": 2, "workload": "random"}  # of one that runs


def defaults() -> Json:
    """Of `OPTIONS`: of both sides, and its own."""
    return (
        options.defaults("source") | options.defaults("dest") | MACHINE_DEFAULTS | DEFAULTS | {"deadline_s": DEADLINE_S}
    )


def make(given: Json, output: Output) -> Callable[[Stop], Awaitable[bool]]:
    return DemoCommand(given, output).run


class DemoCommand:
    def __init__(self, given: Json, output: Output) -> None:
        """`given`: the values of `OPTIONS`. The two sides get them, each those of the options that it has."""
        values = self._values = DEFAULTS | given
        self._output = output
        values.pop("report", None)  # one page for both sides, of the lines that the demo emits
        self._lab = "lab" in values
        self._tls = "tls" in values or (self._lab and "insecure" not in values)
        values.pop("tls", None)
        if "insecure" in values and (self._tls or not self._lab):
            raise ConfigurationError("--insecure: it is for --lab without --tls; leave it out")
        self._directory = Path()  # of this run
        self._certificates: dict[str, str] = {}  # by side
        self._watch = Watch()
        self._qemu: QemuDemo | None = None
        if "kind" not in values:
            values["kind"] = self._usable_machine()
        image, qemu = values["kind"] == "image", values["kind"] == "qemu"
        self._image = image
        if "release_ram" in values and image:
            raise ConfigurationError("--release-ram: an image is a file, which stays as it is; leave the option out")
        if qemu:
            if "run_for_s" not in given:
                values.pop("run_for_s")  # it runs on, by itself
            self._take_qemu_options()
        elif not image:
            values |= MACHINE_DEFAULTS | values
        options.check_sending(values, options.sending(values), values["kind"])
        self._echo = values.get("workload") == "echo"
        if self._echo:
            if not self._lab:
                raise ConfigurationError(
                    "--workload echo needs a network: say --lab, or see docs/machines.md for one of your own"
                )
            values |= {"net": LAB_NET, "net_address": parse_ipv4(LAB_ADDRESS)} | values
        self._chaos: ChaosPlan | None = None
        if "chaos" in values:
            self._chaos = parse_plan(values["chaos"], values)
            if image or qemu:
                values.pop("seed", None)  # it is for the network alone
            if self._lab and self._chaos.cut_every_s is not None:
                raise ConfigurationError(
                    "--lab cuts the cable itself: --chaos may only be none, slow or split beside it"
                )
        if self._lab:
            values["heartbeat_s"] = LAB_HEARTBEAT_S
        if image and "image" not in values:
            self._image_bytes: int = values.pop("memory_bytes", 256 << 20)  # for the file, which says it from then on
            if self._image_bytes < MIN_IMAGE_BYTES:
                raise ConfigurationError(f"an image for the demo needs at least {format_size(MIN_IMAGE_BYTES)}")
        content_bytes = self._content_bytes()
        bandwidth = values.get("max_bandwidth_bytes_per_s", 0)
        if (self._lab or (self._chaos is not None and self._chaos.cut_every_s is not None)) and not bandwidth:
            # Slow enough that there is something to cut.
            bandwidth = max(MIN_CUT_BANDWIDTH, int(content_bytes / CUT_PUSH_S))
        values["max_bandwidth_bytes_per_s"] = bandwidth
        slowest = min(filter(None, (bandwidth, self._chaos.rate_bytes_per_s if self._chaos else 0)), default=0)
        push_s = content_bytes / slowest if slowest else 0.0
        values.setdefault("deadline_s", max(DEADLINE_S, DEADLINE_PUSHES * push_s))

    def _usable_machine(self) -> str:
        """kvm where this user can run and migrate one, else rv64, which needs no rights; says so."""
        why = explain_no_kvm() or explain_unavailable(kernel_faults=True)
        if why is None:
            return "kvm"
        self._output.say(f"demo: --machine kvm cannot be used here ({why.message}): showing --machine rv64")
        return "rv64"

    def _take_qemu_options(self) -> None:
        """Of the virtual machine that the demo makes."""
        values = self._values
        if self._lab:
            raise ConfigurationError("--lab: QEMU is not in a host of it; say --chaos cut, which cuts both moves")
        taken = {options.MEMORY.key, options.VCPUS.key} | ({options.SEED.key} if "chaos" in values else set())
        for option in options.MACHINE:
            if option.key in values and option.key not in taken:
                raise ConfigurationError(f"--{option.name}: the demo starts QEMUs of its own; leave the option out")
        self._qemu = QemuDemo(values.pop("memory_bytes", None), values.pop("vcpus", None))
        values["takes"] = values["kind"]

    def _content_bytes(self) -> int:
        """How much there is to push."""
        if self._qemu is not None:
            return self._qemu.memory_bytes
        if not self._image:
            return int(self._values["memory_bytes"])
        if "image" not in self._values:
            return self._image_bytes // IMAGE_CONTENT
        try:
            found = os.stat(self._values["image"])
        except (OSError, ValueError):
            return 0  # the source says what is wrong with it
        return min(found.st_size, found.st_blocks * 512)  # the rest is holes

    def _subject(self) -> str:
        """What is migrated."""
        values = self._values
        if self._qemu is not None:
            return self._qemu.subject
        if self._image:
            if "image" not in values:
                return f"image of {format_size(self._image_bytes)}"
            size = f", {format_size(os.path.getsize(values['image']))}" if os.path.exists(values["image"]) else ""
            return f"image {values['image']}{size}"
        vcpus = format_count(values["vcpus"], "vCPU")
        return f"{values['kind']}, {format_size(values['memory_bytes'])}, {vcpus}, workload {values['workload']}"

    async def run(self, stop: Stop) -> bool:
        result: DemoResult | None = None
        failure: PostcopyError | None = None
        try:
            with trio.fail_after(self._values["deadline_s"]):
                with scratch() as self._directory:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(_interrupted, stop)
                        result = await self._both()
                        nursery.cancel_scope.cancel()
        except trio.TooSlowError:
            failure = MigrationError(f"not done after {self._values['deadline_s']:g} s (--deadline)")
        except BaseExceptionGroup as group:
            failure = known_error(group)
        except PostcopyError as error:
            failure = error
        if result is None:
            result = DemoResult(
                side="demo", status="failed", error=str(failure), kind=None, verified=False, verification=[]
            )
        with contextlib.suppress(BrokenPipeError):  # nobody reads it; the status tells
            show(result, self._output.view.subject, make_console(sys.stderr if "json" in self._values else sys.stdout))
        self._output.emit("result", result)
        if result.error:
            raise failure or MigrationError(result.error)
        return result.status == "completed" and result.verified is not False

    async def _both(self) -> DemoResult:
        values, directory = self._values, self._directory
        self._output.view.subject = self._subject()
        if values.get("workload") == "disk":
            values.setdefault("disk", os.path.join(directory, "disk.img"))
        if self._image and "image" not in values:
            values["image"] = os.path.join(directory, "image.raw")
            await run_sync(_make_image, values["image"], self._image_bytes)
        if self._qemu is not None:

            async def move(here: str, there: str) -> DemoResult:
                values["qmp"] = here
                await self._certify()
                dest = Side("dest", DestResult, self._dest_arguments("127.0.0.1", qmp=there))
                return await self._run(Side("source", SourceResult, []), dest)

            return await self._qemu.both(directory, move, values["max_bandwidth_bytes_per_s"], self._chaos)
        if not self._lab:
            await self._certify()
            dest = Side("dest", DestResult, self._dest_arguments("127.0.0.1"))
            return await self._run(Side("source", SourceResult, []), dest)
        from postcopy.testbed.lab._lab import open_lab
        from postcopy.testbed.lab._plan import MAX_RATE, LabPlan

        # The cable is twice as fast as the push, so that requested pages find room, and yet slow enough to be cut in
        # the middle, however many pages the machine asks for.
        rate = min(LAB_HEADROOM * values["max_bandwidth_bytes_per_s"], MAX_RATE)
        async with open_lab(LabPlan(f"demo-{os.getpid()}", hosts=2 + self._echo, rate=rate)) as lab:
            here, there, *others = lab.hosts.values()
            await self._certify(here, there)
            source = Side("source", SourceResult, [], here)
            dest = Side("dest", DestResult, self._dest_arguments(there.ipv4), there)
            if not self._echo:
                return await self._run(source, dest)
            return await self._watched(source, dest, others[0])

    async def _certify(self, source: Host | None = None, dest: Host | None = None) -> None:
        if self._tls:
            self._certificates = await run_sync(make_certificates, self._directory, source, dest)

    async def _watched(self, source: Side[SourceResult], dest: Side[DestResult], observer: Host) -> DemoResult:
        """The machine is on the laboratory's network, and a third host asks it all the time."""
        for host in (source.host, dest.host):
            assert host is not None
            await trio.to_thread.run_sync(host.attach_tap, parse_net(self._values["net"]))
        address = format_ipv4(self._values["net_address"])
        async with open_ping_process(address, wrap=lambda command: observer.command(*command)) as pings:
            result = await self._run(source, dest)
            statistics = await pings.stop()
        begin_ns, down_ms = (result.source.paused_at_ns, result.source.downtime_ms) if result.source else (0, 0)
        gap_ms = pings.gap_ms(begin_ns or 0, (begin_ns or 0) + round((down_ms or 0) * 1e6))
        one_machine = statistics.same_machine and statistics.not_increasing == statistics.duplicates == 0
        good = one_machine and gap_ms is not None
        result.pings = Pings(
            address=address,
            observer=observer.name,
            switchover_gap_ms=gap_ms,
            sent=statistics.sent,
            answered=statistics.answered,
            duplicates=statistics.duplicates,
            not_increasing=statistics.not_increasing,
            reordered=statistics.reordered,
            longest_gap_ms=statistics.longest_gap_ms,
        )
        result.verification.append(
            check(
                good,
                f"{address} answered {statistics.answered} of {statistics.sent} echoes, before and after, with numbers"
                " that only increased",
                f"{address} was not one machine that counts its answers: {statistics.as_dict()}",
                f"numbered datagrams from {observer.name}, answered with the guest's own number and nonce",
            )
        )
        result.verified = result.verified if good else False
        return result

    async def _run(self, source: Side[SourceResult], dest: Side[DestResult]) -> DemoResult:
        seen: list[DemoLab] = []
        strangers: list[Stranger] = []
        # Of what the demo does to them, cuts and strangers, they would warn as well.
        source.warns = dest.warns = self._chaos is None and not self._tls and not self._lab
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._output.follow, lambda: self._progress(source, dest))
            nursery.start_soon(dest.run, self._output)
            await dest.address_known.wait()
            if dest.listening is None:
                raise MigrationError(f"the destination did not start: {dest.last_error}")
            if self._tls:
                strangers = await refuse_strangers(self._directory, dest.listening, source.host, self._output)
            async with self._cable(dest.listening, source) as (address, chaos):
                source.arguments = self._source_arguments(address)
                nursery.start_soon(source.run, self._output)
                # Whichever ends first with an error ends it all; the other one would wait for it.
                async with trio.open_nursery() as waiting:
                    if dest.host is not None:
                        waiting.start_soon(_pull_the_cable, source, dest, dest.host, seen)
                    waiting.start_soon(source.good_end)
                    waiting.start_soon(dest.good_end)
            nursery.cancel_scope.cancel()
        result = merge(await source.good_end(), await dest.good_end())
        result.chaos = chaos
        if self._tls:
            result.demo_tls = as_record(strangers, self._watch if source.host is None else None)
            found = list(checks(result.demo_tls))
            result.verification += found
            result.verified = result.verified if all(item.ok for item in found) else False
        for lab in seen:
            result.lab = lab
            count = result.recoveries.count if result.recoveries is not None else 0
            out = f"the cable was cut for {format_duration(lab.cut.healed_ms / 1e3)}"
            how = "the port of the destination's cable was down until both sides said that they were paused"
            result.verification.append(
                check(count > 0, f"{out}, and both sides went on", f"{out}, and no side noticed", how)
            )
            result.verified = result.verified if count > 0 else False
        return result

    @asynccontextmanager
    async def _cable(self, address: str, source: Side[SourceResult]) -> AsyncIterator[tuple[str, Chaos | None]]:
        """Where the source is to connect, and what there will be to say about the network afterwards."""
        if self._chaos is None and source.host is None and self._tls:
            async with open_chaos_proxy(address, see=self._watch.see) as proxy:
                yield str(proxy.address), None
            return
        if self._chaos is None:
            yield address, None
            return
        said = Chaos(plan=self._values["chaos"], seed=self._chaos.seed)
        if source.host is not None:
            # There the proxy has to be, too. Where the kernel has no netem, this is how the network becomes slow.
            child = Side("chaos", ChaosResult, self._chaos_arguments(address), source.host)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child.run, self._output)
                await child.address_known.wait()
                if child.listening is None:
                    raise MigrationError(f"the proxy did not start: {child.last_error}")
                yield child.listening, said
                await child.end()
            if (seen := child.result) is not None:
                said.connections, said.refused, said.cuts = seen.connections, seen.refused, seen.cuts
            return
        # By itself nothing is cut before the point of no return: that would only keep the machine where it is.
        async with (
            open_chaos_proxy(address, self._chaos, begin=source.committed, see=self._watch.see) as proxy,
            trio.open_nursery() as nursery,
        ):
            if self._chaos.cut_every_s is not None:
                nursery.start_soon(self._cut_rounds, self._chaos, proxy, source)
            yield str(proxy.address), said
            nursery.cancel_scope.cancel()
            counted = proxy.statistics
            said.connections, said.refused, said.cuts = counted.connections, counted.refused, counted.by_way

    async def _cut_rounds(self, plan: ChaosPlan, proxy: ChaosProxy, source: Side[SourceResult]) -> None:
        """Cuts some of the attempts in the middle of precopy, each once; then lets one come through."""
        choose = random.Random(plan.seed)
        for attempt in range(1, 1 + choose.randint(1, MOST_CUT_ATTEMPTS)):
            if not await source.comes_to(partial(_copies, attempt)):
                return
            await trio.sleep(choose.uniform(0, CUT_WITHIN_S))
            if not _copies(attempt, source.progress):
                return  # it has come through
            proxy.cut(choose.choice(plan.ways))
            proxy.refuse()
            await trio.sleep(choose.uniform(*plan.down_s))
            proxy.heal()

    def _chaos_arguments(self, address: str) -> list[str]:
        assert self._chaos is not None
        plan = ["chaos", self._values["chaos"], "--seed", str(self._chaos.seed)]
        return [*plan, "--json", "--listen", "127.0.0.1:0", "--to", address]

    def _progress(self, source: Side[SourceResult], dest: Side[DestResult]) -> Progress:
        # What matters is at the source until the machine is not there any more.
        begun = dest.progress.status not in ("setup", "active", "in-doubt", "failed")
        return dest.progress if begun else source.progress

    def _dest_arguments(self, host: str, **more: Any) -> list[str]:
        return self._arguments("dest", listen=f"{host}:0", **more)

    def _source_arguments(self, address: str) -> list[str]:
        return self._arguments("source", connect=address, keep=False)

    def _arguments(self, command: str, **more: Any) -> list[str]:
        values = {name: value for name, value in self._values.items() if name != "log_json"}
        if self._tls:
            more |= {"tls": self._certificates.get(command, str(self._directory))}
        return [command, *options.to_arguments(options.COMMANDS[command], values | {"json": True} | more)]


async def _interrupted(stop: Stop) -> None:
    await stop.wait()
    raise MigrationError("interrupted")


def _copies(attempt: int, now: Progress) -> bool:
    """Whether this attempt is in the rounds of its precopy."""
    return now.attempts == attempt and now.status == "active" and bool(now.ram and now.ram.iteration)


async def _pull_the_cable(source: Side[SourceResult], dest: Side[DestResult], host: Host, seen: list[DemoLab]) -> None:
    """Cuts the destination's cable in the middle of postcopy, heals it when both sides have noticed, and says so."""

    def resident(progress: Progress) -> float:
        ram = progress.ram
        return 1 - ram.remaining / ram.total if ram is not None and ram.total and ram.remaining is not None else 0.0

    await dest.until(
        "the cable was cut: give it more --memory or a lower --max-bandwidth",
        lambda now: now.status == "postcopy-active" and resident(now) >= LAB_CUT_AT,
    )
    at_percent = round(100 * resident(dest.progress), 1)
    await trio.to_thread.run_sync(host.cut)
    cut_s = trio.current_time()
    await source.until("it noticed the cut cable", lambda now: now.status == "postcopy-paused")
    await dest.until("it noticed the cut cable", lambda now: now.status == "postcopy-paused")
    noticed_s = trio.current_time()
    await trio.to_thread.run_sync(host.heal)
    healed_s = trio.current_time()
    rate = host.lab.rate_of(host.name)
    assert rate is not None  # the demo has set it
    hosts = {"source": source.host, "dest": dest.host}
    cut = LabCut(
        host=host.name,
        at_percent=at_percent,
        noticed_ms=round(1000 * (noticed_s - cut_s), 1),
        healed_ms=round(1000 * (healed_s - cut_s), 1),
    )
    seen.append(
        DemoLab(
            name=host.lab.name,
            mtu=host.lab.mtu,
            rate_bytes_per_s=rate,
            hosts={
                side: LabHost(name=one.name, ipv4=one.ipv4, ipv6=one.ipv6)
                for side, one in hosts.items()
                if one is not None
            },
            cut=cut,
        )
    )


def _make_image(path: str, size_bytes: int) -> None:
    """A sparse image: one part in `IMAGE_CONTENT` is random, in four pieces. `ResourceError` where it has no room."""
    piece_bytes = size_bytes // (4 * IMAGE_CONTENT)
    try:
        with open(path, "wb") as image:
            image.truncate(size_bytes)
            for piece in range(4):
                image.seek((2 * piece + 1) * size_bytes // 8)
                for _ in range(0, piece_bytes, 1 << 16):
                    image.write(os.urandom(min(1 << 16, piece_bytes)))
    except OSError as error:
        raise ResourceError(
            f"{path}: {error.strerror}", "make room there, set TMPDIR to a directory with more, or give an --image"
        ) from error
