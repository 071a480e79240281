# SPDX-License-Identifier: Apache-2.0
"""`postcopy bench`: the figures that the documentation quotes, each a ratio of things measured side by side.

Every measurement is repeated in rounds, its parts one after the other within a round, in processes of their own; what
is reported is the median over the rounds of the ratio within a round, so that a slow spell of the host hits both parts.

The module of a figure (`FIGURES`) has an async function `measure_NAME` of the number of rounds, which returns a list of
`Measurement` (`_common.ratio` makes one), and what it wants of these:

- `check_NAME`, which raises `ResourceError` without a program that is needed, before anything is measured;
- `text_NAME` of the measurements and a width, for people, in place of a paragraph for each of them.

What takes minutes and has options of its own is a command (`STUDIES`): `add_arguments_NAME` adds these to its parser,
and `measure_NAME` has what was given, by name, and a `Found`, in which it keeps what it has measured so far.

`_common` has what the modules share, `_worker` most of the processes. Options and output are here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio

from postcopy._child import python
from postcopy._files import check_new_file, write_output
from postcopy._hdr import intervals, write_hdr
from postcopy._host import run_line
from postcopy._stop import heard
from postcopy.errors import ConfigurationError, MigrationError, PostcopyError, ResourceError, shortage
from postcopy.records import VERSION, Json, as_json
from postcopy.records.results import Measurement
from postcopy.report import explain_missing
from postcopy.testbed import _processes
from postcopy.testbed._report import make_console
from postcopy.testbed.bench._common import Found, medians
from postcopy.units import (
    argument,
    check_word,
    format_exact_size,
    format_rate,
    parse_percent,
    parse_seconds,
    parse_whole,
)

__all__ = ["FIGURES", "STUDIES", "add_arguments", "run"]

# fmt: off
FIGURES = {
    "fault": ("_fault", "a demand fault, against the least a C program can do"),
    "prefetch": ("_prefetch", "a page that is touched with --prefetch adaptive, against none"),
    "pager-process": ("_fault", "a fault with the pager in a process of its own, against threads"),
    "recording": ("_recording", "a fault while it is recorded over time, against one that is not"),
    "bulk-delay": ("_fault", "the tail of a fault while everything else is pushed"),
    "bulk": ("_bulk", "memory pushed at full speed, against the least a C program can do, and iperf3"),
    "compress": ("_compress", "memory pushed over a slow network with compression, against without"),
    "sparse": ("_machine", "a large machine of which little was touched, against a small one"),
    "overhead": ("_machine", "memory of both sides beside the machine's, against its allowance"),
    "recovery-time": ("_recovery", "from a cut network's return to the first page"),
    "recovery-map": ("_recovery", "what a destination of 1 TiB has to say when it comes back"),
    "tls": ("_tls", "faults, the push and recoveries with TLS, against without"),
    "rv64": ("_machine", "instructions a second of the interpreter"),
    "userfaultfd": ("_uffd", "a fault served by Python under Trio, against the smallest C handler"),
    "contention": ("_contention", "mmap and munmap beside threads that wait for a page, against none"),
    "switchover": ("_switchover", "how long a machine stands still, by machine, workload and memory"),
    "dirty": ("_dirty", "a guest that writes while its dirty log is read, against without"),
    "qemu-move": ("_qemu_move", "a virtual machine of QEMU that moves, against QEMU's own postcopy"),
    "firecracker": ("_firecracker", "a restored Firecracker whose pages come from `postcopy pager`"),
    "firecracker-move": ("_firecracker_move", "how long a microVM stands still while it moves"),
}
"""The module that measures it, imported then, and what it is."""
STUDIES = {
    "scale": ("_scale", "how costs grow along six dimensions, as curves: three minutes", "--dimension memory",
              "as there is time"),
    "migrate": ("_migrate", "all ways to migrate, by workload, as a table: seven minutes", "--policies demand,hybrid",
                "1"),
}
"""Likewise, how options are given, and the default of `--rounds`."""
# fmt: on
_WRITTEN: Mapping[str, Callable[[int], str]] = {"memory": format_exact_size, "bandwidth": format_rate}
"""Options that are written with a unit."""
QUICK = (
    "fault",
    "bulk",
    "switchover",
    "pager-process",
    "recovery-map",
    "contention",
    "userfaultfd",
    "rv64",
    "dirty",
    "recovery-time",
)  # fmt: skip
ROUNDS = 5
MAX_WIDTH = 100
_BAR = 20
"""Characters of the longest bar of a curve."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The parser of each figure. What is not given is missing in what they return."""
    others = "; ".join(f"{name}: {rounds}" for name, (*_, rounds) in STUDIES.items())
    _add_common(parser, f"{ROUNDS}, as compare needs; {others}")
    title = "figures (all but scale and migrate by default)"
    commands = parser.add_subparsers(dest="figure", metavar="FIGURE", title=title)

    def add(name: str, help: str, words: str) -> argparse.ArgumentParser:
        example: Any = {"examples": [("", f"postcopy bench {name} {words}")]}
        return commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", **example)

    another = argument(check_word, FIGURES)
    for name, (_, help) in FIGURES.items():
        figure = add(name, help, "--rounds 10")
        figure.add_argument("more", nargs="*", type=another, metavar="FIGURE", help="another one")
        _add_common(figure)
    _add_common(add("quick", f"{', '.join(QUICK)}: some eight minutes", "--output today.jsonl"))
    for name, (_, help, words, rounds) in STUDIES.items():
        study = add(name, help, words)
        _of(name, "add_arguments")(study)
        _add_common(study, rounds)
    help = "not measured: what differs between two files that --output or --json has written"
    compare = add("compare", help, "a.jsonl b.jsonl --fail-above 10")
    for letter in "AB":
        compare.add_argument(letter, metavar=f"{letter}.jsonl", help="lines of this or another command")
    compare.add_argument(
        "--fail-above", type=argument(parse_percent), metavar="PERCENT",
        help="status 1 when a value of B is worse than in A by certainly more than that, or nothing can be told",
    )  # fmt: skip
    compare.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="JSON lines: run, then one for each value"
    )


def _add_common(parser: argparse.ArgumentParser, rounds: str = f"{ROUNDS}, as compare needs") -> None:
    more: Any = {"default": argparse.SUPPRESS}
    # fmt: off
    parser.add_argument("--rounds", type=argument(parse_whole, 1, 1000), metavar="N", **more,
                        help=f"repetitions, medians are shown (default: {rounds})")
    parser.add_argument("--within", type=argument(parse_seconds, 1, 1e6), metavar="SECONDS", **more,
                        help="end then: what has not been measured is left out")
    parser.add_argument("--json", action="store_true", **more, help="JSON lines: run, then one for each measurement")
    parser.add_argument("--output", metavar="FILE", **more, help="write the JSON lines there too, at the end")
    parser.add_argument("--hdr", metavar="FILE", **more, help="write latencies there, as a log of HdrHistogram")
    # fmt: on


def run(args: argparse.Namespace) -> int:
    """0 when what was measured kept to its targets, 1 otherwise, and where that is nothing. `ConfigurationError` for
    what was asked wrongly, `ResourceError` for what this host lacks."""
    given = vars(args)
    if args.figure == "compare":
        from postcopy.testbed.bench import _compare

        if unused := sorted({"rounds", "within", "output", "hdr"} & given.keys()):  # in front of its name
            raise ConfigurationError(f"bench compare has no --{unused[0]}")
        return _compare.run(args.A, args.B, given.get("fail_above"), "json" in given)
    asked = list(dict.fromkeys([args.figure, *given.get("more", ())])) if args.figure else []
    every = [*QUICK] if asked == ["quick"] else asked or [*FIGURES]
    names = [name for name in every if _can_be_measured(name, asked=name in asked)]
    files = [option for option in ("output", "hdr", "report") if option in given]
    for option in files:  # now, not after minutes of measuring
        check_new_file(f"--{option}", given[option])
    if "report" in given and (reason := explain_missing()):
        raise ConfigurationError(f"--report: {reason}")
    began_s = time.monotonic()
    options = {name: value for name, value in given.items() if name not in ("command", "figure", "more")}
    options |= {name: form(given[name]) for name, form in _WRITTEN.items() if name in given}
    lines = [run_line("bench", options | {"figures": asked})]

    def show(text: str) -> None:
        with contextlib.suppress(*[BrokenPipeError] * bool(files)):  # the files are worth having without a reader
            print(text, flush=True)

    def write(line: Json) -> None:
        lines.append(json.dumps(line | {"elapsed-ms": round((time.monotonic() - began_s) * 1e3, 1)}))
        if "json" in given:
            show(lines[-1])

    if "json" in given:
        show(lines[0])
    numbers = heard(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:  # all as Ctrl-C, between two figures too
        signal.signal(number, signal.default_int_handler)
    reached = True
    try:
        for name in names:
            left_s = math.inf if "within" not in given else args.within - (time.monotonic() - began_s)
            found = Found(write)
            try:
                if not _processes.run(_measure, name, given, found, left_s):
                    what = "is not all of it" if found.measurements else "is left out"
                    print(f"postcopy: warning: {name} {what}: {args.within:g} s are over", file=sys.stderr)
            except MigrationError as error:  # the others are worth having
                print(f"postcopy: error: {name}: {error}", file=sys.stderr)
                reached = False
            finally:
                for measurement in found.measurements:
                    measurement.figure = name
                    reached &= measurement.reached is not False
                    write({"schema": VERSION, "event": "measurement"} | as_json(measurement))
                if found.measurements and "json" not in given:
                    width = min(make_console(sys.stdout).width, MAX_WIDTH)
                    show((_of(name, "text") or text_of)(found.measurements, width))
    finally:  # what was measured is kept, whatever ends it
        reached &= _keep(given, lines, numbers)
    return 0 if reached and len(lines) > 1 else 1  # (there may have been no time for any)


def _keep(given: Mapping[str, Any], lines: Sequence[str], numbers: Sequence[signal.Signals]) -> bool:
    """Writes all files that were asked for. False, and it has been said, where one cannot be written, or the lines do
    not have what it needs: the others are worth having. `numbers`: the signals that end it."""

    def draw() -> None:
        for number in numbers:  # it takes a while
            signal.signal(number, signal.default_int_handler)
        command = python("-m", "postcopy", "report", "-", "--output", given["report"])
        if subprocess.run(command, input="\n".join(lines), text=True, check=False).returncode:
            raise MigrationError(f"--report {given['report']}: it was not drawn (its error is above)")

    kept: dict[str, Callable[[], None]] = {
        "output": lambda: write_output("--output", given["output"], "".join(f"{line}\n" for line in lines)),
        "hdr": lambda: write_hdr(given["hdr"], intervals(map(json.loads, lines))),
        "report": draw,
    }
    failed = False
    for option in [option for option in kept if option in given]:
        try:
            kept[option]()
        except (PostcopyError, OSError, MemoryError) as error:
            said = str(shortage(error) or error)
            print(f"postcopy: error: {said if said.startswith('--') else f'--{option}: {said}'}", file=sys.stderr)
            failed = True
    return not failed


def _of(figure: str, what: str) -> Any:
    """A function of its module; None where it has none."""
    module = importlib.import_module(f"{__name__}.{(FIGURES | STUDIES)[figure][0]}")
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


async def _measure(name: str, given: Mapping[str, Any], found: Found, left_s: float) -> bool:
    """Whether there was time for all of it; all processes have ended then too."""
    measure = _of(name, "measure")
    with trio.move_on_after(max(left_s, 0)) as in_time:
        if name in STUDIES:
            await measure(given, found)
        else:
            found.measurements = await measure(given.get("rounds", ROUNDS))
    return not in_time.cancelled_caught


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
    reached = {True: "goal reached", False: "GOAL NOT REACHED", None: "not clear"}[measurement.reached]
    return f"{bound} {measurement.goal:g}: {reached}"
