# SPDX-License-Identifier: Apache-2.0
"""`postcopy bench migrate`: ways to migrate a machine against what the machine does meanwhile, a table of both.

A cell is a whole migration, `postcopy demo` with the options of its policy: a machine that runs, moves over a network
that is as slow as was asked for, and is verified afterwards. In a round, policies follow each other within a workload,
with the same seed, so that a slow spell of the host meets neighbours. A cell that fails has its reason instead of
values, and the others go on. The columns: `_migrate_columns`; what they mean: docs/comparison.md.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import trio
from msgspec import ValidationError, convert
from rich.console import Console

from postcopy._child import python
from postcopy.errors import MigrationError
from postcopy.machines.toy.machine import explain_no_kvm, split_memory
from postcopy.memory import page_bytes_of
from postcopy.output.words import format_duration
from postcopy.records import Json
from postcopy.records.commands import DemoResult
from postcopy.records.results import Measurement, Value
from postcopy.records.timeline import Recording, Timeline
from postcopy.testbed._processes import parse, run_captured
from postcopy.testbed._report import Section, Span, make_console, print_line, print_section, row
from postcopy.testbed._scratch import scratch
from postcopy.testbed.bench._common import Found
from postcopy.testbed.bench._migrate_columns import COLUMNS, FAULTS, PREVENTED, values
from postcopy.units import (
    argument,
    check_word,
    format_exact_size,
    format_rate,
    format_size,
    parse_rate,
    parse_seconds,
    parse_size,
)

POLICIES = {
    "stop-and-copy": ("--mode", "stop-and-copy"),
    "precopy": ("--mode", "precopy"),
    "demand": ("--mode", "postcopy"),
    "demand+push": ("--mode", "postcopy"),
    "+forward": ("--mode", "postcopy", "--prefetch", "forward"),
    "+both": ("--mode", "postcopy", "--prefetch", "both"),
    "+adaptive": ("--mode", "postcopy", "--prefetch", "adaptive"),
    "+working-set": ("--mode", "postcopy"),
    "hybrid": ("--mode", "hybrid"),
}
"""Options of a migration, by the name of the policy. Those with a plus sign are `demand+push` and something more."""
DEMAND, LEARNED = "demand", "+working-set"
WORKLOADS = {
    "sequential": "sequential",
    "random": "random",
    "zipf": "zipf",
    "write-heavy": "dirty",
    "disk": "disk",
    "phases": "phases",
}
"""The guest's program, by the name of the workload."""
BEFORE_S = 1.0  # that the machine runs before it moves
WINDOW_S = 1.0  # at least: how long pure demand goes on without a push
AFTER_S = 2.0  # and, at least, after the last page may have come: time to be back in
DEADLINE_S = 120.0  # of one migration, or
DEADLINE_PUSHES = 20  # so many times what the push takes, where that is more
MIN_BANDWIDTH = 125_000  # bytes a second: a migration of 64 MiB takes a quarter of an hour then
MAX_DELAY_S = 1.0  # beyond two heartbeats are missed, and no migration completes
END_S = 30.0  # for a demo that has missed it, with its processes
PROCESSORS = "processors"
"""A value beside the columns: how many were busy, with whatever ran here, on average from the start of the demo to its
end."""
UNITS = {PROCESSORS: PROCESSORS} | {column.name: column.unit for column in COLUMNS}
SATURATED = 0.85
"""So many of the processors are busy on average: at times all of them are."""
ROUNDS = 1
"""Unless another number was asked for."""
CONDITIONS = "processors busy"
"""The measurement that is about all cells."""


@dataclass(frozen=True)
class Plan:
    """What is to be compared, and on what machine and network."""

    policies: tuple[str, ...] = tuple(POLICIES)
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    machine: str = "rv64"  # its kind
    memory: int = 64 << 20  # bytes
    bandwidth: int = 500_000_000 // 8  # bytes a second; 0: no limit
    delay: float = 0.0  # seconds

    @property
    def push_s(self) -> float:
        """What the push of all memory takes at least."""
        return self.memory / self.bandwidth if self.bandwidth else 0.0

    @property
    def window_s(self) -> float:
        """How long pure demand goes on without a push: half as long again as that would take."""
        return max(WINDOW_S, 1.5 * self.push_s)

    @property
    def deadline_s(self) -> float:
        """Of one migration."""
        return max(DEADLINE_S, DEADLINE_PUSHES * self.push_s)

    def arguments(self, policy: str, workload: str, seed: int, working_set: str) -> list[str]:
        """Of `postcopy demo`. `working_set`: the file that pure demand writes."""
        chosen, run_for_s = [*POLICIES[policy]], self.window_s + AFTER_S
        if policy == DEMAND:
            run_for_s += self.push_s
            chosen += ["--push-after", f"{self.window_s:g}", "--record-working-set", working_set]
        elif policy == LEARNED:
            chosen += ["--working-set", working_set]
        if self.bandwidth or self.delay:
            settings = f"rate={format_rate(self.bandwidth)},delay={self.delay:g},jitter=0"
            chosen += ["--chaos", f"slow:{settings}"]
        return [
            "--machine", self.machine, "--memory", format_exact_size(self.memory),
            "--vcpus", "1", "--bulk-channels", "1", "--workload", WORKLOADS[workload], "--seed", str(seed),
            "--migrate-after", f"{BEFORE_S:g}", "--run-for", f"{run_for_s:g}",
            "--deadline", f"{self.deadline_s:g}", *chosen,
        ]  # fmt: skip


# ---- a cell


@dataclass
class Cell:
    """A policy with a workload: what each round gave. A round that failed gave the reason."""

    policy: str
    workload: str
    rounds: list[dict[str, float | None]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def record(self) -> Measurement:
        names = [*(column.name for column in COLUMNS), PROCESSORS]
        return Measurement(
            figure="migrate",
            name=f"{self.workload}, {self.policy}",
            values={
                name: Value(
                    unit=UNITS[name],
                    rounds=[values.get(name) for values in self.rounds],
                    better=None if name == PROCESSORS else "more" if name == PREVENTED else "less",
                )
                for name in names
            },
            reached=False if self.failures else None,
            note="; ".join(self.failures) or None,
        )


async def migrate(
    arguments: Sequence[str], deadline_s: float, recorded: Callable[[Json], None]
) -> dict[str, float | None]:
    """One migration that was verified; `MigrationError` otherwise. `recorded` gets the line `timeline` of each side."""
    busy_s, begin_s = _busy_s(), time.monotonic()
    with trio.move_on_after(deadline_s + END_S) as late:
        command = python("-m", "postcopy", "demo", "--json", *arguments)
        done = await run_captured(command)
    if late.cancelled_caught:
        raise MigrationError(f"the demo did not end within {deadline_s + END_S:g} s")
    result, recordings = read(done.stdout.splitlines(), recorded)
    if result is None or done.returncode or not result.verified:
        said = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if "error: " in line]
        bad = [item.what for item in result.verification if not item.ok] if result is not None else []
        reasons = [*bad, *(line.partition("error: ")[2] for line in said), f"ended with status {done.returncode}"]
        raise MigrationError(reasons[0])
    if not {"source", "dest"} <= recordings.keys():
        raise MigrationError("a side has not said what it recorded")
    found = values(result, recordings["source"], recordings["dest"])
    return found | {PROCESSORS: (_busy_s() - busy_s) / (time.monotonic() - begin_s)}


def read(lines: Iterable[bytes], recorded: Callable[[Json], None]) -> tuple[DemoResult | None, dict[str, Recording]]:
    """The result of a demo, and what each side recorded."""
    result, recordings = None, {}
    for line in lines:
        message = parse(line)
        try:
            if message.get("event") == "timeline":
                timeline = convert(message, Timeline)
                recordings[timeline.side] = timeline.recording
                recorded(message)
            elif message.get("event") == "result":
                result = convert(message, DemoResult)
        except ValidationError as error:
            raise MigrationError(f"a line of the demo is not what it should be: {error}") from None
    return result, recordings


def _busy_s() -> float:
    """Processor time, of whatever runs on this host, on the processors that this process may use. See proc(5)."""
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    with open("/proc/stat") as file:
        rows = [line.split() for line in file if line.startswith("cpu")]
    spent = ((int(row[number]) for number in (1, 2, 3, 6, 7, 8)) for row in rows if row[0] in mine)
    return sum(map(sum, spent)) / os.sysconf("SC_CLK_TCK")


# ---- all of them


async def compare(
    plan: Plan,
    rounds: int,
    said: Callable[[str], None],
    recorded: Callable[[Json], None],
    kept: Callable[[list[Cell]], None],
) -> None:
    """Every policy with every workload, `rounds` times. `said` is told about each cell that is done, `kept` has all of
    them after each. `recorded` gets the lines `timeline` of all, with the cell as the machine's name."""
    cells = {(workload, policy): Cell(policy, workload) for workload in plan.workloads for policy in plan.policies}
    with scratch() as directory:
        for number in range(rounds):
            for workload in plan.workloads:
                file = os.path.join(directory, f"{workload}-{number}")
                baseline = cells.get((workload, DEMAND), Cell(DEMAND, workload))
                if LEARNED in plan.policies and DEMAND not in plan.policies:  # it shows what there is to learn
                    await _one(plan, baseline, number, file, said, lambda _: None)
                for policy in order(plan.policies, number):
                    cell = cells[workload, policy]
                    await _one(plan, cell, number, file, said, recorded)
                    if baseline.rounds:
                        _add_prevented(cell.rounds[-1], baseline.rounds[-1])
                    kept([cell for cell in cells.values() if cell.rounds])


def order(policies: Sequence[str], number: int) -> list[str]:
    """In round `number`: each comes first as often as the others, but for `DEMAND`, from which is learned."""
    known = [policy for policy in POLICIES if policy in policies]
    first = number % len(known)
    return sorted([*known[first:], *known[:first]], key=lambda policy: policy != DEMAND)


async def _one(
    plan: Plan, cell: Cell, number: int, file: str, said: Callable[[str], None], recorded: Callable[[Json], None]
) -> None:
    begin_s = time.monotonic()

    def with_name(line: Json) -> None:
        recorded(line | {"machine": f"{cell.workload}, {cell.policy}, round {number + 1}"})

    try:
        arguments = plan.arguments(cell.policy, cell.workload, number + 1, file)
        cell.rounds.append(await migrate(arguments, plan.deadline_s, with_name))
        outcome = "verified"
    except MigrationError as error:
        cell.rounds.append({})
        cell.failures.append(f"round {number + 1}: {error}")
        outcome = f"FAILED: {error}"
    took = format_duration(time.monotonic() - begin_s)
    said(f"round {number + 1}: {cell.workload}, {cell.policy}: {outcome} ({took})")


def _add_prevented(values: dict[str, float | None], baseline: Mapping[str, float | None]) -> None:
    """Which part of the faults of pure demand did not happen."""
    count, most = values.get(FAULTS), baseline.get(FAULTS)
    if most and count is not None:
        values[PREVENTED] = 1 - count / most


# ---- as a table


def conditions(plan: Plan, cells: Sequence[Cell]) -> Measurement:
    """What a reader has to know about all of the numbers, and how busy the host was."""
    cpus = len(os.sched_getaffinity(0))
    busy = [used for cell in cells for values in cell.rounds if (used := values.get(PROCESSORS)) is not None]
    network = f"{format_rate(plan.bandwidth)} a connection" if plan.bandwidth else "no limit"
    delay = f", {format_duration(plan.delay)} of delay each way" if plan.delay else ""
    count = f"{cpus} processor{'s' * (cpus != 1)}"
    said = (
        f"{plan.machine}, {format_size(plan.memory)}, 1 vCPU; network: {network}{delay}. Pure demand: no push for"
        f" {plan.window_s:g} s. The guest, both sides and the network between them share {count}"
    )
    if busy:
        least, most = (f"{used:.1f}" for used in (min(busy), max(busy)))
        said += f", of which {least if least == most else f'{least} to {most}'} were busy in a cell, on average"
    if busy and max(busy) > SATURATED * cpus:
        said += ": latencies, dips and times back to 90 % hold waits for a processor too"
    return Measurement(
        figure="migrate",
        name=CONDITIONS,
        values={"least": Value(unit=PROCESSORS, rounds=[min(busy, default=None)]),
                "most": Value(unit=PROCESSORS, rounds=[max(busy, default=None)])},
        note=f"{said}.",
    )  # fmt: skip


def sections(measurements: Sequence[Measurement]) -> list[Section]:
    """A table for each workload."""
    found: dict[str, Section] = {}
    for measurement in measurements:
        workload, comma, policy = measurement.name.partition(", ")
        if not comma:
            continue
        given = {
            name: [each for each in value.rounds if each is not None] for name, value in measurement.values.items()
        }
        known = {name: statistics.median(rounds) for name, rounds in given.items() if rounds}
        texts = [column.show(known[column.name]) if column.name in known else "-" for column in COLUMNS]
        if "dip" in known and "back" not in known:
            texts[[column.name for column in COLUMNS].index("back")] = "later"
        if not known:
            texts[0] = "FAILED"
        name = Span(policy, "bad" if measurement.note else "plain")
        before = found.get(workload, Section(workload, ("policy", *(column.head for column in COLUMNS)), ()))
        note = "; ".join(filter(None, [before.note, measurement.note and f"{policy} failed: {measurement.note}"]))
        found[workload] = replace(before, rows=(*before.rows, row(name, *texts)), note=note)
    return list(found.values())


def text_migrate(measurements: Sequence[Measurement], _width: int) -> str:
    """Of medians; as wide as the terminal."""
    file = io.StringIO()
    console = Console(file=file, width=make_console(sys.stdout).width, highlight=False, emoji=False)
    for measurement in measurements:
        if measurement.name == CONDITIONS:
            print_line(console, measurement.note or "")
    for section in sections(measurements):
        print_line(console, "")
        print_section(console, section)
    return file.getvalue().rstrip("\n")


# ---- the command line


def add_arguments_migrate(parser: argparse.ArgumentParser) -> None:
    default = Plan()
    more: Any = {"default": argparse.SUPPRESS}
    # fmt: off
    parser.add_argument("--policies", type=_names(POLICIES), metavar="LIST", **more,
                        help=f"of {', '.join(POLICIES)} (default: all)")
    parser.add_argument("--workloads", type=_names(WORKLOADS), metavar="LIST", **more,
                        help=f"of {', '.join(WORKLOADS)} (default: all)")
    parser.add_argument("--machine", choices=("rv64", "kvm"), **more,
                        help=f"its kind (default: {default.machine})")
    parser.add_argument("--memory", type=argument(_parse_memory), metavar="SIZE", **more,
                        help=f"of the machine (default: {format_size(default.memory)})")
    parser.add_argument("--bandwidth", type=argument(parse_rate, MIN_BANDWIDTH), metavar="RATE", **more,
                        help="of each connection between the two sides, or none"
                        f" (default: {format_rate(default.bandwidth)})")
    parser.add_argument("--delay", type=argument(parse_seconds, 0, MAX_DELAY_S), metavar="SECONDS", **more,
                        help="of the network, each way (default: 0)")
    parser.add_argument("--report", metavar="FILE.html", **more, help="write a report of all migrations there")
    # fmt: on


def _parse_memory(text: str) -> int:
    """Of a machine with one vCPU."""
    found = parse_size(text)
    split_memory(found, 1, page_bytes_of("memfd"))
    return found


def _names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    def parse_names(text: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(check_word(word, known) for word in text.split(",")))

    return argument(parse_names)


async def measure_migrate(given: Mapping[str, Any], found: Found) -> None:
    """A cell is kept when it is done."""
    plan = Plan(**{each.name: given[each.name] for each in fields(Plan) if each.name in given})
    rounds = given.get("rounds", ROUNDS)  # a round of all is as long as many rounds of others
    if plan.machine == "kvm" and (why := explain_no_kvm()) is not None:
        raise why

    def kept(cells: list[Cell]) -> None:
        about = conditions(plan, cells)
        made, asked = sum(len(cell.rounds) for cell in cells), rounds * len(plan.policies) * len(plan.workloads)
        if made < asked:
            about.reached, about.note = False, f"{about.note} Ended early: {made} of {asked} migrations were made."
        found.measurements = [*(cell.record() for cell in cells), about]

    await compare(plan, rounds, _tell, found.write, kept)


def _tell(text: str) -> None:
    """How far it is, for a person: the table comes at the end."""
    print(f"postcopy: {text}", file=sys.stderr, flush=True)
