# SPDX-License-Identifier: Apache-2.0
"""`postcopy faultpaths`: choose cells, run them, judge them, say so."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import msgspec
from rich.console import Console
from rich.status import Status

from postcopy._files import check_new_file, write_output
from postcopy._host import run_record
from postcopy.errors import ConfigurationError
from postcopy.records import VERSION
from postcopy.testbed import _processes
from postcopy.testbed._report import (
    emit_json,
    make_console,
    plain,
    print_line,
    print_section,
    section_as_markdown,
    to_html,
)
from postcopy.testbed.chaos import ChaosPlan
from postcopy.testbed.faultpaths import _compare, _expect, _merge, _report, _select, _system
from postcopy.testbed.faultpaths._model import Backing, Cell, Json, Measure, Mode, Operation, Result, Run
from postcopy.testbed.faultpaths._sections import operation_list
from postcopy.testbed.faultpaths._supervise import DEFAULT_TIMEOUT_S, Progress, Runner, run_cells
from postcopy.units import among, argument, did_you_mean, parse_seconds

DEFAULT_BUDGET_S = 165.0
"""Of a run without --all, so that it ends within three minutes whatever hangs."""

_DEFAULT_PLAN = "slow:delay=0.002"
"""Of `--remote`: what the network does beside the cuts."""

T = TypeVar("T", Mode, Backing, Measure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `postcopy faultpaths`."""
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATTERN,...", help="operations or groups, as 'copy.*' or pin"
    )
    parser.add_argument("--mode", default="", metavar="MODE,...", help=f"of {', '.join(Mode)}")
    parser.add_argument("--backing", default="", metavar="BACKING,...", help=f"of {', '.join(Backing)}")
    parser.add_argument(
        "--all", action="store_true", help="all modes on all backings, however long it takes (default: a choice)"
    )
    parser.add_argument(
        "--measure", default=None, metavar="WHAT,...",
        help=f"of {', '.join(Measure)}, or none; for every cell that can wait (default: all, for one of each group)",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="the operations, without running any")
    parser.add_argument(
        "--direct-dir",
        default="",
        metavar="DIR",
        help="where files for O_DIRECT are made (default: the current directory, or one for temporary files where the"
        " file system of the current one copies pages instead of pinning them)",
    )
    parser.add_argument("--expectations", default=None, metavar="FILE", help="instead of those that come with postcopy")
    parser.add_argument(
        "--timeout", type=argument(parse_seconds, 0.1, 600), default=DEFAULT_TIMEOUT_S, metavar="SECONDS",
        help="after which a child is killed and its cell called hung",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="two lines: what ran where, and one JSON object")
    parser.add_argument("--markdown", action="store_true", help="tables for a document")
    parser.add_argument("--html", default=None, metavar="FILE", help="also write one self-contained page there")
    parser.add_argument(
        "--remote", nargs="?", default=None, const=_DEFAULT_PLAN, metavar="PLAN",
        help="the page is fetched by the engine over TCP, cut off and recovered while the operation waits; PLAN: what"
        f" the network does beside, as in docs/chaos.md (default: {_DEFAULT_PLAN})",
    )  # fmt: skip
    actions = parser.add_subparsers(dest="action", metavar="COMMAND", title="instead of a run")
    text = "show what differs between two reports of --json"
    example = ("", "postcopy faultpaths compare before.json after.json")
    compare = actions.add_parser("compare", help=text, description=f"{text.capitalize()}.", examples=[example])
    compare.add_argument("before", metavar="A.json", help="report of one kernel or host")
    compare.add_argument("after", metavar="B.json", help="report of another")
    # No default: it would overwrite what stands before the word compare.
    compare.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON object")
    text = "show what kernels do, by reports of --json and by those that come with postcopy"
    example = ("", "postcopy faultpaths merge here.json there.json --output all.jsonl")
    merge = actions.add_parser("merge", help=text, description=f"{text.capitalize()}.", examples=[example])
    merge.add_argument("files", nargs="*", metavar="FILE", help="a report, or a file that --output has written")
    merge.add_argument("--output", default=None, metavar="FILE", help="write all reports there, reduced to outcomes")
    merge.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON object")
    merge.add_argument("--markdown", action="store_true", default=argparse.SUPPRESS, help="tables for a document")
    merge.add_argument(
        "--html", default=argparse.SUPPRESS, metavar="FILE", help="also write one self-contained page there"
    )


def run(args: argparse.Namespace) -> int:
    """0 when all is as expected or not available here, 1 otherwise. `ConfigurationError` for what was asked wrongly."""
    if args.action == "compare":
        return _run_compare(args.before, args.after, args.json)
    if args.json and args.markdown:
        raise ConfigurationError("--json and --markdown: choose one; --html goes with either")
    if args.action == "merge":
        return _run_merge(args)
    from postcopy.testbed.faultpaths import _core  # not for compare: it works without the core

    operations = _core.operations()
    only = [pattern for text in args.only for pattern in _split(text)]
    if args.list:
        return _list(_select.chosen_operations(operations, only), args.json)
    modes, backings = _chosen(args.mode, Mode, "--mode"), _chosen(args.backing, Backing, "--backing")
    measure = None
    if args.measure is not None:
        measure = () if args.measure.strip() == "none" else _chosen(args.measure, Measure, "--measure")
    expectations = _expect.load(args.expectations)
    direct_dir = _select.direct_dir(args.direct_dir)
    if args.html is not None:
        check_new_file("--html", args.html)
    system = _system.this_system(direct_dir)
    plan = _plan(args.remote) if args.remote is not None else None
    measures = {}
    if plan is None:
        cells = _select.choose(operations, only, modes, backings, args.all)
        measures = _select.measured(
            cells, operations, measure, lambda operation, cell: expectations.waits(operation, cell, system)
        )
    elif measure or any(mode is not Mode.MISSING for mode in modes):
        raise ConfigurationError("--remote: a page of another host is a missing one, and nothing is measured beside")
    else:
        cells = _select.choose(operations, only, [Mode.MISSING], backings or [Backing.ANON, Backing.MEMFD])
    # What the user asked for is run, whatever it takes.
    budget_s = None if args.all or args.only or modes or backings else DEFAULT_BUDGET_S

    async def work(progress: Progress) -> tuple[dict[Cell, Result], list[Cell], Json | None]:
        if plan is not None:
            from postcopy.testbed.faultpaths import _remote

            options = {"timeout_s": args.timeout, "direct_dir": direct_dir, "progress": progress}
            results, network = await _remote.run_cells(cells, plan=plan, **options)
            return results, [], {"plan": str(plan), **network}
        async with Runner(timeout_s=args.timeout, direct_dir=direct_dir) as runner:
            return *await run_cells(runner, cells, measures, budget_s=budget_s, progress=progress), None

    if plan is not None and any(cell.backing is Backing.GUEST_MEMFD for cell in cells):
        raise ConfigurationError("--remote: no page of a guest_memfd is handed over; choose another --backing")
    # All that is written as JSON begins with what ran where.
    record = {"schema": VERSION, "event": "run", "elapsed-ms": 0.0} | run_record("faultpaths", vars(args))
    if args.json:
        emit_json(record)
    began_s = time.monotonic()
    with _progress(len(cells)) as progress:
        results, left_out, remote = _processes.run(work, progress)
    by_name = {operation.name: operation for operation in operations}
    found = Run(
        system.as_json(),
        tuple(operation for operation in operations if any(cell.operation == operation.name for cell in cells)),
        tuple(expectations.judge(by_name[cell.operation], cell, result, system) for cell, result in results.items()),
        time.monotonic() - began_s,
        tuple(left_out),
        expectations.as_json() | {"read-from-source": not _merge.is_seen(system)},
        remote,
        record,
    )
    _write(found, args)
    return 0 if found.good else 1


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    """A line on the terminal, where there is one, that says which cell runs."""
    if not sys.stderr.isatty():
        yield lambda number, cell: None
        return
    with Status("starting", console=Console(stderr=True)) as status:
        yield lambda number, cell: status.update(f"{number + 1} of {total}: {cell}")


# ---- what was asked


def _plan(text: str) -> ChaosPlan:
    plan = ChaosPlan.parse(text)
    if plan.cut_every_s is not None:
        raise ConfigurationError(
            f"--remote: {text!r} cuts by itself; each cell is cut off when its operation waits, so give delays only"
        )
    return plan


def _split(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _chosen(text: str, kind: type[T], option: str) -> list[T]:
    chosen = []
    for word in _split(text):
        try:
            chosen.append(kind(word))
        except ValueError:
            raise ConfigurationError(
                f"{option}: there is no {word!r}{did_you_mean(word, kind) or among(kind)}"
            ) from None
    return chosen


# ---- what is said


def _write(found: Run, args: argparse.Namespace) -> None:
    if args.html is not None:
        write_output("--html", args.html, _report.to_html(found))
    if args.json:
        emit_json(_report.to_json(found))
    elif args.markdown:
        sys.stdout.write(_report.to_markdown(found))
    else:
        _report.print_text(found, sys.stdout)


def _list(operations: list[Operation], as_json: bool) -> int:
    def write() -> None:
        console = make_console(sys.stdout)
        for section in operation_list(operations):
            print_section(console, section)
            console.print()
        console.print(f"{len(operations)} operations")

    if as_json:
        emit_json({"operations": msgspec.to_builtins(operations)})
    else:
        write()
    return 0


def _run_compare(before_path: str, after_path: str, as_json: bool) -> int:
    """0 when nothing differs, 1 otherwise."""
    before, after = _report.read_report(before_path), _report.read_report(after_path)
    changes = _compare.compare(before, after)

    def write() -> None:
        console = make_console(sys.stdout)
        print_line(console, f"A: {_report.describe_system(before.system)}")
        print_line(console, f"B: {_report.describe_system(after.system)}")
        if changes:
            print_section(console, _compare.section(changes, "A", "B"))
        both = len({item.cell for item in before.judged} & {item.cell for item in after.judged})
        console.print(f"{len(changes)} of {both} cells changed" if changes else f"nothing changed in {both} cells")

    if as_json:
        emit_json(
            {
                "before": before.system,
                "after": after.system,
                "changes": [change.as_json() for change in changes],
            }
        )
    else:
        write()
    return 1 if changes else 0


def _run_merge(args: argparse.Namespace) -> int:
    """0 when no two reports of one kernel contradict each other, 1 otherwise."""
    from postcopy.testbed.faultpaths import _core

    for option, path in (("--output", args.output), ("--html", args.html)):
        if path is not None:
            check_new_file(option, path)
    reports = _merge.merged([*_merge.community(), *(report for path in args.files for report in _merge.read(path))])
    found = _merge.matrix(reports, _core.operations(), _expect.load(args.expectations))
    tables, title = _merge.sections(found), "What kernels do with a page that is withheld"
    if args.output is not None:
        write_output("--output", args.output, "".join(f"{_merge.line_of(report)}\n" for report in reports))
    if args.html is not None:
        lead = [("bad" if found.conflicts else "good", found.summary), *(("note", report.words) for report in reports)]
        write_output("--html", args.html, to_html(title, lead, tables, _merge.LEGEND))
    if args.json:
        emit_json(found.as_json())
    elif args.markdown:
        lines = [f"{found.summary}.", "", *(f"- {plain(report.words)}" for report in reports), ""]
        sys.stdout.write("\n".join([*lines, *(line for table in tables for line in section_as_markdown(table))]))
    else:
        console = make_console(sys.stdout)
        for report in reports:
            print_line(console, report.words)
        for table in tables:
            console.print()
            print_section(console, table)
        console.print()
        print_line(console, _merge.LEGEND, "dim")
        print_line(console, found.summary, "bold red" if found.conflicts else "bold")
    return 1 if found.conflicts else 0
