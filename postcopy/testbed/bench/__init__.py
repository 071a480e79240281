# SPDX-License-Identifier: Apache-2.0
"""`postcopy bench`: the figures that the documentation quotes, each a ratio of things measured side by side.

Every measurement is repeated in rounds, its parts one after the other within a round, in processes of their own; what
is reported is the median over the rounds of the ratio within a round, so that a slow spell of the host hits both parts.

- ``fault``: a demand fault over loopback TCP, nothing else under way, against the least a C program can do (read the
  userfaultfd, 8 byte request, 4 KiB reply, UFFDIO_COPY), sleeping and spinning. Seen by the thread that touches.
- ``pager-process``: the same fault with the pager in a process of its own, against one in threads.
- ``bulk-delay``: p99 of such a fault while everything else is pushed at full speed, against the idle p99.
- ``throughput``: incompressible memory pushed over loopback, both ends included, against one iperf3 stream.
- ``sparse``: total time of a large kvm machine of which 256 MiB were touched, against a machine of 256 MiB.
- ``rv64``: instructions a second of the interpreter, in the workloads dirty and random, against 100 million.
- ``overhead``: resident memory of source and destination beside the machine's own, against its allowance.
- ``recovery-time``: from a cut network's return to the first page that comes over it, against 150 ms and 500 ms.
- ``recovery-map``: what a destination of 1 TiB, half of it there, has to say when it comes back, against 10 MB and 1 s.
- ``contention``: mmap and munmap of one thread while others wait for a page, against none waiting: is a lock held?
- ``userfaultfd``: a fault served by the Python binding under Trio against the smallest C handler; events per read.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import trio

from postcopy._child import python
from postcopy._files import check_new_file, replacing, write_all
from postcopy.errors import ConfigurationError, MigrationError, ResourceError
from postcopy.machines.toy.machine import RV64, ToyMachine, ToyOptions
from postcopy.migration.source import DEFAULT_BULK_CHANNELS
from postcopy.testbed.bench._worker import Job, encode
from postcopy.units import argument, parse_size, parse_whole

__all__ = ["Figure", "add_arguments", "run"]

DEADLINE_S = 120.0  # for one process of one measurement


@dataclass(frozen=True)
class Figure:
    """One ratio and what it was made of."""

    name: str
    ratio: float  # median over the rounds
    target: float
    at_most: bool  # the target is an upper bound, else a lower one
    rounds: list[dict[str, float]]
    note: str = ""
    unit: str = field(default="us")

    @property
    def reached(self) -> bool:
        """Whether the ratio keeps to its target."""
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target

    def as_json(self) -> dict[str, Any]:
        """For ``--json``; `rounds` hold the absolute values, in `unit`."""
        return {
            "name": self.name,
            "ratio": round(self.ratio, 3),
            "target": ("<= " if self.at_most else ">= ") + str(self.target),
            "reached": self.reached,
            "unit": self.unit,
            "rounds": self.rounds,
            "note": self.note,
        }


# ---- processes


@contextmanager
def _worker(job: Job, fds: list[int]) -> Iterator[subprocess.Popen[str]]:
    """A worker that has said ``ready``; killed when left. `fds` are handed over."""
    with subprocess.Popen(
        python("-c", "import sys; from postcopy.bench._worker import main; main(sys.argv[1])", encode(job)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=fds,
    ) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise MigrationError(f"the {job.role} of a measurement ended early (its error is above)")
            yield process
        finally:
            process.kill()


def _go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def _result(process: subprocess.Popen[str], deadline_s: float = DEADLINE_S) -> dict[str, Any]:
    try:
        output, _ = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        raise MigrationError(f"a measurement did not end within {deadline_s:.0f} s") from None
    if process.returncode or not output.strip():
        raise MigrationError("a process of a measurement failed (its error is above)")
    result: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return result


def _connections(count: int) -> list[tuple[socket.socket, socket.socket]]:
    pairs = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(count):
            near = socket.create_connection(listener.getsockname())
            far, _ = listener.accept()
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pairs.append((near, far))
    return pairs


def _pair(
    engine: bool,
    size_bytes: int,
    *,
    touches: int = 0,
    busy_poll_us: int = 0,
    bulk_channels: int = 0,
    pin: bool = False,
    pager_process: bool = False,
) -> dict[str, Any]:
    """Runs a source and a destination against each other; the destination's result.

    `pin`: each has half of the processors to itself, as two hosts would. Without it, which threads happen to share a
    processor decides more about a latency than what is measured.
    """
    cpus = sorted(os.sched_getaffinity(0))
    halves = (cpus[: len(cpus) // 2], cpus[len(cpus) // 2 :]) if pin and len(cpus) > 1 else ([], [])
    kind = "engine" if engine else "floor"
    with ExitStack() as stack:
        pairs = _connections(1 + bulk_channels)
        for near, far in pairs:
            stack.enter_context(near)
            stack.enter_context(far)
        fds = [[pair[side].fileno() for pair in pairs] for side in (0, 1)]

        def job(role: str, side: int) -> Job:
            return Job(
                f"{kind}-{role}",
                size_bytes,
                fds[side][0],
                fds[side][1:],
                touches=touches,
                busy_poll_us=busy_poll_us,
                pager_process=pager_process,
                complete=bool(bulk_channels),
                cpus=halves[side],
            )

        source = stack.enter_context(_worker(job("source", 0), fds[0]))
        dest = stack.enter_context(_worker(job("dest", 1), fds[1]))
        for near, far in pairs:
            near.close()
            far.close()
        _go(source)
        _go(dest)
        return _result(dest)


def _warm_pair(size_bytes: int, **options: Any) -> dict[str, Any]:
    """The second of two runs of the engine, back to back.

    A virtual machine whose host takes freed memory back within seconds (free page reporting) pays a fault in the host
    for every page it allocates again: the first run finds that memory, the second one measures the engine.
    """
    _pair(True, size_bytes, **options)
    return _pair(True, size_bytes, **options)


# ---- figures


def _median(values: Iterable[float]) -> float:
    import statistics  # here: the command line knows this module, and a daemon's megabytes are counted

    return statistics.median(values)


def _median_ratio(rounds: list[dict[str, float]], over: str, under: str) -> float:
    return _median(values[over] / values[under] for values in rounds)


def measure_fault(rounds: int) -> list[Figure]:
    """Demand fault p50 against the floor's, sleeping and spinning."""
    size_bytes, touches = parse_size("64MiB"), 4000
    figures = []
    for how, busy_poll_us in (("sleeping", 0), ("spinning", 200)):
        values = []
        for _ in range(rounds):
            floor, engine = (
                _pair(engine, size_bytes, touches=touches, busy_poll_us=busy_poll_us, pin=True)["touch-us"]
                for engine in (False, True)
            )
            values.append(
                {"p50": engine["p50"], "floor-p50": floor["p50"], "p99": engine["p99"], "floor-p99": floor["p99"]}
            )
        ratio = _median_ratio(values, "p50", "floor-p50")
        figures.append(Figure(f"fault p50, {how} / floor", ratio, 1.25, True, values))
    return figures


def measure_pager_process(rounds: int) -> list[Figure]:
    """What it costs that the machine survives its pager: demand fault p50 through a pager in a process of its own."""
    values = []
    for _ in range(rounds):
        apart, inside = (
            _pair(True, parse_size("64MiB"), touches=4000, pin=True, pager_process=where)["touch-us"]
            for where in (True, False)
        )
        values.append(
            {"p50": apart["p50"], "thread-p50": inside["p50"], "p99": apart["p99"], "thread-p99": inside["p99"]}
        )
    ratio = _median_ratio(values, "p50", "thread-p50")
    return [Figure("fault p50, pager process / pager threads", ratio, 1.25, True, values)]


def measure_bulk_delay(rounds: int) -> list[Figure]:
    """p99 of a demand fault while bulk runs at full speed, against the idle p99."""
    values = []
    for _ in range(rounds):
        idle = _pair(True, parse_size("64MiB"), touches=8000, pin=True)["touch-us"]
        # As many touches as there are pages, so that faults happen until the last page is there.
        size_bytes = parse_size("768MiB")
        busy = _warm_pair(size_bytes, touches=size_bytes // 4096, bulk_channels=1, pin=True)["touch-us"]
        values.append({"p99": busy["p99"], "idle-p99": idle["p99"], "p50": busy["p50"], "idle-p50": idle["p50"]})
    return [Figure("fault p99 under bulk / idle", _median_ratio(values, "p99", "idle-p99"), 4.0, True, values)]


def _iperf3_bytes_per_s(size_bytes: int) -> float:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with subprocess.Popen(
        ["iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL
    ) as server:
        try:
            deadline_s = time.monotonic() + 10
            while True:
                client = subprocess.run(
                    ["iperf3", "-c", "127.0.0.1", "-p", str(port), "-n", str(size_bytes), "-J"],
                    capture_output=True,
                    text=True,
                    timeout=DEADLINE_S,
                    check=False,
                )
                result = json.loads(client.stdout)
                if "error" not in result:
                    return float(result["end"]["sum_received"]["bits_per_second"]) / 8
                if time.monotonic() > deadline_s:  # refused until the server listens
                    raise MigrationError(f"iperf3 failed: {result['error']}")
        finally:
            server.kill()


def measure_throughput(rounds: int) -> list[Figure]:
    """Pushed memory against one iperf3 stream."""
    if not shutil.which("iperf3"):
        raise ResourceError("iperf3 is not installed", "apt-get install iperf3")
    size_bytes = parse_size("1GiB")

    def iperf3() -> float:
        return _iperf3_bytes_per_s(size_bytes) / 1e9

    def engine() -> float:
        return float(_warm_pair(size_bytes, bulk_channels=DEFAULT_BULK_CHANNELS)["bytes-per-s"]) / 1e9

    values = []
    for number in range(rounds):
        parts = [("engine", engine), ("iperf3", iperf3)]
        # Each goes first in half of the rounds: a host that lends its processors for a while and then slows them down
        # would otherwise decide.
        measured = {}
        for name, measure in parts if number % 2 else reversed(parts):
            measured[name] = measure()
        values.append(measured)
    name = f"background throughput, {DEFAULT_BULK_CHANNELS} channels / one iperf3 stream"
    return [Figure(name, _median_ratio(values, "engine", "iperf3"), 0.5, False, values, unit="GB/s")]


def _demo(*arguments: str) -> dict[str, Any]:
    command = python("-m", "postcopy", "demo", "--json", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S * 2, check=False)
    if done.returncode:
        raise MigrationError(f"`{' '.join(command[3:])}` failed: {done.stderr.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def measure_sparse(rounds: int) -> list[Figure]:
    """A large machine, little of it touched, against a small one, all of it touched."""
    common = ("--machine", "kvm", "--workload", "random", "--vcpus", "1", "--working-set", "240MiB")
    values = []
    for _ in range(rounds):
        small = float(_demo(*common, "--memory", "256MiB")["total-ms"])
        large = float(_demo(*common, "--memory", "8GiB")["total-ms"])
        values.append({"8GiB": large, "256MiB": small})
    ratio = _median_ratio(values, "8GiB", "256MiB")
    note = "240 MiB of each touched by the guest"
    return [Figure("total time, 8 GiB sparse / 256 MiB", ratio, 1.3, True, values, note, unit="ms")]


def measure_overhead(rounds: int) -> list[Figure]:
    """Peak memory beside the machine's own, against 32 MiB + 1 % of the machine: of a small one, where Python is nearly
    all of it, and of a larger one, where the engine's maps and buffers would show."""
    figures = []
    for size, working_set in (("64MiB", "32MiB"), ("1GiB", "256MiB")):
        allowance_mib = 32 + parse_size(size) / 2**20 / 100
        values = []
        for _ in range(max(1, rounds // 2)):
            result = _demo("--machine", "kvm", "--workload", "random", "--memory", size, "--working-set", working_set)
            values.append(
                {side: float(result[side]["overhead-bytes"]) / 2**20 for side in ("source", "dest")}
                | {"allowance": allowance_mib}
            )
        figures += [
            Figure(
                f"memory overhead of the {side}, {size} / allowance",
                _median_ratio(values, side, "allowance"),
                1.0,
                True,
                values,
                f"allowance: 32 MiB + 1 % of {size}",
                unit="MiB",
            )
            for side in ("source", "dest")
        ]
    return figures


def measure_recovery_time(rounds: int) -> list[Figure]:
    """A running machine that is cut off again and again."""
    import trio

    from postcopy.testbed.bench._recovery import recovery_times_ms

    times_ms = sorted(time_ms for number in range(rounds) for time_ms in trio.run(recovery_times_ms, 25, number))
    p50, p99 = times_ms[len(times_ms) // 2], times_ms[min(len(times_ms) - 1, int(len(times_ms) * 0.99))]
    note = f"{len(times_ms)} cuts of 0.1 to 1 s, all connections reset"
    return [
        Figure(
            "first page after the network's return, p50 / 150 ms", p50 / 150, 1.0, True, [{"p50": p50}], note, unit="ms"
        ),
        Figure(
            "first page after the network's return, p99 / 500 ms", p99 / 500, 1.0, True, [{"p99": p99}], note, unit="ms"
        ),
    ]


def measure_recovery_map(rounds: int) -> list[Figure]:
    """The maps of a machine of 1 TiB, from one side's bitmap to the other's."""
    import trio

    from postcopy.testbed.bench._recovery import recovery_map

    values = [
        trio.run(recovery_map, parse_size("1TiB"), number) | {"MB-allowed": 10.0, "s-allowed": 1.0}
        for number in range(rounds)
    ]
    note = "4 KiB pages, half of them received, in random runs of 64; simulated on bitmaps"
    return [
        Figure(
            "recovery map of 1 TiB, size / allowance",
            _median_ratio(values, "MB", "MB-allowed"),
            1.0,
            True,
            values,
            note,
            unit="",
        ),
        Figure(
            "recovery map of 1 TiB, time / allowance",
            _median_ratio(values, "s", "s-allowed"),
            1.0,
            True,
            values,
            note,
            unit="",
        ),
    ]


async def _rv64_instructions_per_s(workload: str) -> float:
    options = ToyOptions(memory_bytes=parse_size("64MiB"), workload=workload, seed=1)
    async with ToyMachine.create(RV64, options) as machine:
        await machine.boot()
        await machine.run_until(50_000_000)  # its memory is there, its code decoded
        begin_s = time.perf_counter()
        await machine.run_until(350_000_000)
        return 300e6 / (time.perf_counter() - begin_s)


def measure_rv64(rounds: int) -> list[Figure]:
    """Instructions of one hart against what makes a demo of it credible."""
    values = []
    for _ in range(rounds):
        speeds = {name: trio.run(_rv64_instructions_per_s, name) / 1e6 for name in ("random", "dirty")}
        values.append(speeds | {"slower": min(speeds.values()), "target": 100.0})
    ratio = _median_ratio(values, "slower", "target")
    return [Figure("rv64 instructions, slower workload / 100 million a second", ratio, 1.0, False, values, unit="M/s")]


def measure_userfaultfd(rounds: int) -> list[Figure]:
    """The Python binding against the smallest C handler, and how many events one read brings."""

    def part(what: str, pause_s: float = 0.0) -> float:
        command = "import sys; from postcopy.bench._uffd import main; main(sys.argv[1], float(sys.argv[2]))"
        done = subprocess.run(
            python("-c", command, what, str(pause_s)),
            stdout=subprocess.PIPE,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        if done.returncode:
            raise MigrationError(f"the measurement of {what} failed (its error is above)")
        return float(done.stdout)

    reads = [{"reads": part("reads"), "wanted": 1.0} for _ in range(rounds)]
    name = "system calls that read 64 pending events"
    figures = [Figure(name, _median_ratio(reads, "reads", "wanted"), 1.0, True, reads, unit="")]
    for when, pause_s in (("0.5 ms apart", 0.0005), ("back to back", 0.0)):
        for how in ("sleeping", "busy polling"):
            values = [{"c-us": part("c", pause_s), "trio-us": part(how, pause_s)} for _ in range(rounds)]
            name = f"faults {when}, Trio handler {how} / C handler sleeping, p50"
            figures.append(Figure(name, _median_ratio(values, "trio-us", "c-us"), 1.5, True, values))
    return figures


def measure_contention(rounds: int) -> list[Figure]:
    """mmap and munmap beside pending faults and bulk placement, against neither."""
    from postcopy.testbed.bench import _contention as contention

    measured = contention.measure(rounds)
    idle = measured[contention.IDLE.name]
    figures = []
    for call in ("mmap", "munmap"):
        for scene in contention.SCENES[1:]:
            values = [
                here[call] | {f"idle-{name}": us for name, us in before[call].items()}
                for here, before in zip(measured[scene.name], idle, strict=True)
            ]
            ratio = _median_ratio(values, "p50", "idle-p50")
            figures.append(Figure(f"{call} p50, {scene.name} / none", ratio, 1.5, True, values))
    return figures


def _contention_bars(figures: list[Figure]) -> list[Any]:
    from postcopy.testbed.bench import _contention as contention

    parts = (figure.name.removesuffix(" / none").split(" p50, ") for figure in figures)
    return contention.bars([(call, scene, figure.rounds) for (call, scene), figure in zip(parts, figures, strict=True)])


MEASUREMENTS: dict[str, Callable[[int], list[Figure]]] = {
    "fault": measure_fault,
    "pager-process": measure_pager_process,
    "bulk-delay": measure_bulk_delay,
    "throughput": measure_throughput,
    "sparse": measure_sparse,
    "overhead": measure_overhead,
    "recovery-time": measure_recovery_time,
    "recovery-map": measure_recovery_map,
    "rv64": measure_rv64,
    "userfaultfd": measure_userfaultfd,
    "contention": measure_contention,
}


def _print(figure: Figure) -> None:
    bound = "at most" if figure.at_most else "at least"
    print(
        f"{figure.name}: {figure.ratio:.2f}  ({bound} {figure.target:g}: {'reached' if figure.reached else 'MISSED'})"
    )
    for name in figure.rounds[0]:
        values = [values[name] for values in figure.rounds]
        print(
            f"    {name:<12} median {_median(values):9.2f} {figure.unit}   range {min(values):.2f} .. {max(values):.2f}"
        )
    if figure.note:
        print(f"    {figure.note}")
    sys.stdout.flush()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `postcopy bench`."""
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"of {', '.join(MEASUREMENTS)}; all by default")
    parser.add_argument(
        "--rounds",
        type=argument(parse_whole, 1, 1000),
        default=5,
        metavar="N",
        help="repetitions, medians are shown (default 5)",
    )
    parser.add_argument("--svg", default=None, metavar="FILE", help="draw the figures of contention there")
    parser.add_argument("--json", action="store_true", help="one JSON object a figure")


def run(args: argparse.Namespace) -> int:
    """Measures; 0 when every figure kept to its target, 1 otherwise."""
    names = args.figures or list(MEASUREMENTS)
    if unknown := [name for name in names if name not in MEASUREMENTS]:
        print(f"postcopy: error: no figure called {unknown[0]}; there are {', '.join(MEASUREMENTS)}", file=sys.stderr)
        return 2
    if args.svg is not None and (complaint := _check_svg(args.svg, names)):
        print(f"postcopy: error: {complaint}", file=sys.stderr)
        return 2
    reached = True
    for name in names:
        figures = MEASUREMENTS[name](args.rounds)
        for figure in figures:
            reached &= figure.reached
            if args.json:
                print(json.dumps(figure.as_json()), flush=True)
            else:
                _print(figure)
        if name == "contention":
            _plot(figures, None if args.json else sys.stdout, args.svg)
    return 0 if reached else 1


def _check_svg(path: str, names: list[str]) -> str:
    """Now, not after minutes of measuring; empty when all is well."""
    if "contention" not in names:
        return "--svg: it draws the figures of contention, which are not among those asked for"
    try:
        check_new_file("--svg", path)
    except ConfigurationError as error:
        return str(error)
    return ""


def _plot(figures: list[Figure], out: IO[str] | None, svg: str | None) -> None:
    from postcopy.testbed.bench import _contention as contention

    bars = _contention_bars(figures)
    if out is not None:
        print(contention.text_plot(bars), file=out, flush=True)
    if svg is not None:
        with replacing(svg, 0o644) as fd:
            write_all(fd, contention.svg_plot(bars).encode())
