# SPDX-License-Identifier: Apache-2.0
"""What this kernel, this user and this container allow: `postcopy probe`.

Nothing is concluded from a version or a configuration file that can be tried instead (`_trials`). What may block in the
kernel (a page that is really missing and really served, a virtual machine, a namespace) is tried by a child process
with a deadline, one trial after the other (`_supervise`); a trial that hangs or dies costs that answer, not the others,
and the child takes everything it made with it. What remains is read from /proc and /sys (`_host`).

A `Finding` is ``yes``, ``no`` or ``unknown``, never a guess, and, where it is not ``yes``, has the one command that
would change that and what of postcopy needs it. The tests' capabilities (`tests/conftest.py`) are findings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from msgspec import structs

from postcopy.errors import ConfigurationError, ResourceError
from postcopy.records import VERSION, as_json, reports
from postcopy.testbed._report import Row, Section, Span, emit_json, make_console, print_line, print_section, row
from postcopy.testbed.probe._findings import Finding, find, find_all, migrations, names, uses
from postcopy.testbed.probe._host import system
from postcopy.units import among, did_you_mean

__all__ = ["Finding", "add_arguments", "find", "find_all", "migrations", "names", "run", "system", "uses"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `postcopy probe`."""
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--require", default=None, metavar="NAME,...",
        help="try these only; exit status 1, with one line, when one is missing; see docs/probe.md for the names",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """0 when some way of migrating works here, and all that is required; 1 otherwise. `ResourceError` for what is
    required and missing, `ConfigurationError` for a name that is none."""
    if args.require is not None:
        return _require(args.require.replace(",", " ").split(), args.json)
    findings = find_all()
    ways = migrations(findings)
    if args.json:
        found = [finding.record() for finding in findings]
        here = structs.asdict(system())
        emit_json(as_json(reports.Probe(schema=VERSION, **here, receivable=ways, uses=uses(findings), findings=found)))
    else:
        _print(findings, ways)
    return 0 if any(ways.values()) else 1


def _require(wanted: list[str], in_json: bool) -> int:
    if not wanted:
        raise ConfigurationError(f"--require needs names; there are {', '.join(names())}")
    if unknown := [name for name in wanted if name not in names()]:
        hint = did_you_mean(unknown[0], names()) or among(names())
        raise ConfigurationError(f"--require: there is no {unknown[0]!r}{hint}")
    findings = [find(name) for name in wanted]
    if in_json:
        found = [finding.record() for finding in findings]
        emit_json(as_json(reports.Findings(schema=VERSION, findings=found)))
    missing = [complaint for finding in findings if (complaint := finding.complaint())]
    if missing:
        raise ResourceError("; ".join(missing))
    return 0


_KINDS = {"yes": "good", "no": "bad", "unknown": "warn"}


def _print(findings: list[Finding], ways: dict[str, bool]) -> None:
    console = make_console(sys.stdout)

    def table(title: str, rows: Iterable[Row]) -> None:
        print_section(console, Section(title, (), tuple(rows)))
        console.print()

    about = [row(name, _plain(value)) for name, value in as_json(system()).items()]
    for finding in findings:
        if finding.name == "uffd-user" and finding:
            about += [row(f"uffd {name}", ", ".join(finding.facts[name])) for name in ("features", "ioctls")]
    table("This host", about)
    table("What works here", (row(finding.name, _mark(finding.state), finding.detail) for finding in findings))
    if missing := [finding for finding in findings if not finding]:
        remedies = (row(finding.name, finding.remedy, finding.needed_for) for finding in missing)
        table("What is missing, what would give it, and what needs it", remedies)
    needs = (row(use.name, _mark("yes" if use.here else "no"), use.needs) for use in uses(findings))
    table("What each use needs, and whether it is here", needs)
    can = ", ".join(name for name, works in ways.items() if works)
    print_line(console, f"Machines that can be received here: {can or 'none'}", "bold")


def _mark(state: str) -> Span:
    return Span(state, _KINDS[state])


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={'?' if item is None else item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "none" if value is None else str(value)
