# SPDX-License-Identifier: Apache-2.0
"""`postcopy bench`: the figures that the documentation quotes, each a ratio of things measured side by side.

Every measurement is repeated in rounds, its parts one after the other within a round, in processes of their own; what
is reported is the median over the rounds of the ratio within a round, so that a slow spell of the host hits both parts.

- ``fault``: a demand fault over loopback TCP, nothing else under way, against the least a C program can do (read the
  userfaultfd, 8 byte request, 4 KiB reply, UFFDIO_COPY), sleeping and busy polling. Seen by the thread that touches.
- ``scale``: a fault with 1 to 10,000 others pending; a look at the counters, and the choice of the next run to push, of
  64 MiB to 1 TiB; one memory with 1 to 8 userfaultfds; as curves.
- ``pager-process``: the same fault with the pager in a process of its own, against one in threads.
- ``recording``: the same fault while it is recorded over time (`--json`), against one that is not.
- ``bulk-delay``: p99 of such a fault while everything else is pushed at full speed, against the idle p99.
- ``bulk``: incompressible memory pushed over loopback, against the least C program that receives and places as many
  bytes over as many connections, and against one iperf3 stream.
- ``compress``: memory that compresses, and memory that does not, pushed over 100 Mbit/s and 1 Gbit/s with ``auto``,
  against without compression.
- ``switchover``: from the pause at the source to the first run at the destination, by machine, workload and memory,
  against 2 ms; and 8 GiB against 64 MiB.
- ``sparse``: total time of a large kvm machine of which 256 MiB were touched, against a machine of 256 MiB.
- ``rv64``: instructions a second of the interpreter, in the workloads dirty and random, against 100 million.
- ``overhead``: resident memory of source and destination beside the machine's own, against its allowance.
- ``recovery-time``: from a cut network's return to the first page that comes over it, against 150 ms and 500 ms.
- ``recovery-map``: what a destination of 1 TiB, half of it there, has to say when it comes back, against 10 MB and 1 s.
- ``tls``: a fault, and the bulk push on one connection a processor, with TLS against without; from a cut network's
  return to the first page with TLS, against 500 ms; round trips that TLS adds to a recovery.
- ``prefetch``: a page that is touched with `--prefetch adaptive` and no push, against none: in random order, where that
  is to cost nothing, and in sequential and strided order, over loopback and with a long round trip.
- ``contention``: mmap and munmap of one thread while others wait for a page, against none waiting: is a lock held?
- ``userfaultfd``: a fault served by the Python binding under Trio against the smallest C handler; events per read.
- ``dirty``: operations of a guest that writes, with its dirty log read every 100 ms, against those without; and what
  reading the log takes for each page.
- ``firecracker``: a restored Firecracker whose pages come from `postcopy pager` and an image: what its guest waits for
  a page, against the smallest C handler; a working set that is touched with all prefetched, against the example of
  Firecracker's documentation; its faults with a working set, against without; how fast memory is populated, against
  UFFDIO_COPY; and from the death of the engine to the next page, against 300 ms.
- ``firecracker-move``: how long a microVM of 128 MiB and of 2 GiB stands still while it moves, against 25 ms; what of
  it are not Firecracker's own calls, against 5 ms; and beside it a Full snapshot and a copied file.
- ``migrate``: a machine moves by every policy (stop-and-copy, precopy, postcopy with and without push, prefetch and a
  working set, hybrid) while it does different things: a table of both, no goal.
- ``qemu-move``: a virtual machine of QEMU moves by postcopy, against QEMU's own postcopy of the same (TCG; with and
  without preempt): stop to run, faults, total time; and both with the network cut in the middle.

- ``compare A B``: not measured, but compared: two files that ``--json`` of this or another command has written
  (`_compare`).

The module of a figure (`FIGURES`) has an async function `measure_NAME` of the number of rounds, which returns a list of
`Measurement` (`_common.ratio` makes one), and what it wants of these:

- `check_NAME`, which raises `ResourceError` without a program that is needed, before anything is measured;
- `add_arguments_NAME`, which adds options of its own to a group of the parser: then `measure_NAME` has all arguments,
  as argparse has them, as its second parameter;
- `text_NAME` of the measurements and a width, for people, in place of a paragraph for each of them.

`_common` has what the modules share, `_worker` most of the processes. Options and output are here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any

import trio

from postcopy._files import check_new_file, write_output
from postcopy._hdr import intervals, write_hdr
from postcopy._host import run_line
from postcopy.errors import ConfigurationError, MigrationError, ResourceError
from postcopy.records import VERSION, as_json
from postcopy.records.results import Measurement
from postcopy.testbed import _processes
from postcopy.testbed._report import make_console
from postcopy.testbed.bench._common import medians
from postcopy.units import among, argument, did_you_mean, parse_percent, parse_seconds, parse_whole

__all__ = ["FIGURES", "add_arguments", "run"]

FIGURES = {
    "fault": "_fault",
    "prefetch": "_prefetch",
    "scale": "_scale",
    "pager-process": "_fault",
    "recording": "_fault",
    "bulk-delay": "_fault",
    "bulk": "_bulk",
    "compress": "_compress",
    "sparse": "_machine",
    "overhead": "_machine",
    "recovery-time": "_recovery",
    "recovery-map": "_recovery",
    "tls": "_tls",
    "rv64": "_machine",
    "userfaultfd": "_uffd",
    "contention": "_contention",
    "switchover": "_switchover",
    "dirty": "_dirty",
    "qemu-move": "_qemu_move",
    "firecracker": "_firecracker",
    "firecracker-move": "_firecracker_move",
    "migrate": "_migrate",
}
"""The module that measures it; imported then."""
QUICK = (
    "fault", "bulk", "switchover", "pager-process", "recovery-map", "contention", "userfaultfd", "rv64", "dirty",
    "recovery-time",
)  # fmt: skip
ROUNDS = 5
MAX_WIDTH = 100
_BAR = 20
"""Characters of the longest bar of a curve."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `postcopy bench`."""
    parser.add_argument(
        "figures", nargs="*", metavar="FIGURE",
        help=f"of {', '.join(FIGURES)}; all by default; or: compare A.jsonl B.jsonl",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=argument(parse_whole, 1, 1000), default=None, metavar="N",
        help=f"repetitions, medians are shown (default: {ROUNDS})",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help=f"of {', '.join(QUICK)}: about eight minutes, and five rounds of each, as compare needs",
    )  # fmt: skip
    parser.add_argument(
        "--within", type=argument(parse_seconds, 1, 1e6), default=None, metavar="SECONDS",
        help="end then: what has not been measured is left out",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="JSON lines: run, then one for each measurement")
    parser.add_argument("--output", default=None, metavar="FILE", help="write the JSON lines there too, at the end")
    parser.add_argument("--hdr", default=None, metavar="FILE", help="write latencies there, as a log of HdrHistogram")
    compare = parser.add_argument_group("compare A.jsonl B.jsonl")
    compare.add_argument(
        "--fail-above", type=argument(parse_percent), default=None, metavar="PERCENT",
        help="status 1 when a value of B is worse than in A by certainly more than that, or nothing can be told",
    )  # fmt: skip
    for name in FIGURES:
        if (add := _of(name, "add_arguments")) is not None:
            add(parser.add_argument_group(name))


def run(args: argparse.Namespace) -> int:
    """0 when every figure was measured and kept to its target, 1 otherwise. `ConfigurationError` for what was asked
    wrongly, `ResourceError` for what this host lacks."""
    if args.figures[:1] == ["compare"]:
        from postcopy.testbed.bench import _compare

        if idle := [name for name in _given(args, add_arguments) if name not in ("--fail-above", "--json")]:
            raise ConfigurationError(f"{idle[0]}: compare measures nothing")
        return _compare.run(args.figures[1:], args.fail_above, args.json)
    if args.fail_above is not None:
        raise ConfigurationError("--fail-above is for compare: `postcopy bench compare A.jsonl B.jsonl`")
    if args.quick and args.figures:
        raise ConfigurationError("--quick chooses figures, and these are named: choose one")
    names = args.figures or list(QUICK if args.quick else FIGURES)
    if unknown := [name for name in names if name not in FIGURES]:
        hint = did_you_mean(unknown[0], FIGURES) or among(FIGURES)
        raise ConfigurationError(f"no figure called {unknown[0]}{hint}")
    for name in FIGURES:
        add = _of(name, "add_arguments")
        if name not in names and add is not None and (idle := _given(args, add)):
            raise ConfigurationError(f"{idle[0]} is an option of {name}, which is not measured: name that figure too")
    names = [name for name in names if _can_be_measured(name, asked=bool(args.figures))]
    for option in ("output", "hdr"):  # now, not after minutes of measuring
        if (path := getattr(args, option)) is not None:
            check_new_file(f"--{option}", path)
    began_s = time.monotonic()
    lines = [run_line("bench", _asked(args))]
    reached, interrupted = True, False
    if args.json:
        print(lines[0], flush=True)
    for name in names:
        left_s = math.inf if args.within is None else args.within - (time.monotonic() - began_s)
        try:
            measurements = _processes.run(_measured, name, args, left_s)
        except MigrationError as error:  # the others are worth having
            print(f"postcopy: error: {name}: {error}", file=sys.stderr)
            reached = False
            continue
        except KeyboardInterrupt:  # what was measured before is kept
            interrupted = True
            break
        if measurements is None:
            print(f"postcopy: warning: {name} is left out: {args.within:g} s are over", file=sys.stderr)
            continue
        for measurement in measurements:
            measurement.figure = name
            reached &= measurement.reached is not False
        added = [_line(measurement, began_s) for measurement in measurements]
        lines += added
        if args.json:
            print("\n".join(added), flush=True)
        else:
            width = min(make_console(sys.stdout).width, MAX_WIDTH)
            print((_of(name, "text") or text_of)(measurements, width), flush=True)
    if args.output is not None:
        write_output("--output", args.output, "".join(f"{line}\n" for line in lines))
    if args.hdr is not None:
        try:
            write_hdr(args.hdr, intervals(map(json.loads, lines)))
        except ConfigurationError as error:  # what was measured is worth having
            print(f"postcopy: error: --hdr: {error}", file=sys.stderr)
            reached = False
    if interrupted:
        raise KeyboardInterrupt
    return 0 if reached else 1


def _given(args: argparse.Namespace, add: Callable[[argparse.ArgumentParser], None]) -> list[str]:
    """Which of the options that `add` adds to a parser are not as they are by default."""
    parser = argparse.ArgumentParser(add_help=False)
    add(parser)
    options = [action for action in parser._actions if action.option_strings]
    return [option.option_strings[0] for option in options if getattr(args, option.dest) != option.default]


def _asked(args: argparse.Namespace) -> dict[str, object]:
    """What is not as it is by default."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args([]))
    return {name: value for name, value in vars(args).items() if name not in defaults or value != defaults[name]}


def _of(figure: str, what: str) -> Any:
    """A function of its module; None where it has none."""
    module = importlib.import_module(f"{__name__}.{FIGURES[figure]}")
    return getattr(module, f"{what}_{figure.replace('-', '_')}", None)


def _can_be_measured(name: str, *, asked: bool) -> bool:
    """`ResourceError` when a program is missing that a figure needs that was `asked` for; else a line about it."""
    try:
        if (check := _of(name, "check")) is not None:
            check()
    except ResourceError as error:
        if asked:
            raise
        print(f"postcopy: warning: {name} is left out: {error}", file=sys.stderr)
        return False
    return True


async def _measured(name: str, args: argparse.Namespace, left_s: float) -> list[Measurement] | None:
    """None where the time was not enough; all processes have ended then too."""
    more = () if _of(name, "add_arguments") is None else (args,)
    with trio.move_on_after(max(left_s, 0)):
        found: list[Measurement] = await _of(name, "measure")(args.rounds or ROUNDS, *more)
        return found
    return None


def _line(measurement: Measurement, began_s: float) -> str:
    stamp = {"schema": VERSION, "event": "measurement", "elapsed-ms": round((time.monotonic() - began_s) * 1e3, 1)}
    return json.dumps(stamp | as_json(measurement))


def text_of(measurements: Sequence[Measurement], width: int) -> str:
    """For people: a paragraph for each."""
    return "\n".join(_text(measurement, width) for measurement in measurements)


def _text(measurement: Measurement, width: int) -> str:
    """Its name, the result and the goal; of each value the median, and the least and the most of the rounds."""
    lines = textwrap.wrap(measurement.name, width)
    if measurement.result is not None:
        lines.append(f"    {measurement.result:.2f}, {_goal(measurement)}")
    curve = measurement.curve
    if curve is not None:
        lines.append(f"    over {curve.over}:")
    found = medians(measurement)
    longest, most = max(map(len, found)), max(found.values())
    for name, median in found.items():
        value = measurement.values[name]
        rounds = [each for each in value.rounds if each is not None]
        bar = ""
        if curve is not None:
            bar = f"{'█' * round(median / most * _BAR) if name in curve.at else '':<{_BAR}}  "
        between = f"  {min(rounds):.2f} .. {max(rounds):.2f}" if len(rounds) > 1 else ""
        unit = value.unit if value.unit != "1" else ""
        lines.append(f"    {name:<{longest}}  {bar}{median:10.2f} {unit}{between}")
    if measurement.note:
        lines += textwrap.wrap(measurement.note, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _goal(measurement: Measurement) -> str:
    if measurement.goal is None:
        return "no goal"
    bound = "at most" if measurement.better == "less" else "at least"
    return f"{bound} {measurement.goal:g}: {'goal reached' if measurement.reached else 'GOAL NOT REACHED'}"
