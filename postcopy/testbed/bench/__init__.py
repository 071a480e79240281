# SPDX-License-Identifier: Apache-2.0
"""`postcopy bench`: the figures that the documentation quotes, each a ratio of things measured side by side.

Every measurement is repeated in rounds, its parts one after the other within a round, in processes of their own; what
is reported is the median over the rounds of the ratio within a round, so that a slow spell of the host hits both parts.

- ``fault``: a demand fault over loopback TCP, nothing else under way, against the least a C program can do (read the
  userfaultfd, 8 byte request, 4 KiB reply, UFFDIO_COPY), sleeping and busy polling. Seen by the thread that touches.
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

`_figures` has what is measured; `_worker`, `_uffd`, `_contention` and `_recovery` measure; here are options and output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap

from postcopy._files import check_new_file, replacing, write_all
from postcopy.errors import ConfigurationError
from postcopy.records import as_json
from postcopy.testbed import _processes
from postcopy.testbed._report import make_console
from postcopy.testbed.bench import _plot
from postcopy.testbed.bench._figures import MEASUREMENTS, Figure
from postcopy.units import among, argument, did_you_mean, parse_whole

__all__ = ["Figure", "add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `postcopy bench`."""
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"of {', '.join(MEASUREMENTS)}; all by default")
    parser.add_argument(
        "--rounds", type=argument(parse_whole, 1, 1000), default=5, metavar="N",
        help="repetitions, medians are shown",
    )  # fmt: skip
    parser.add_argument("--svg", default=None, metavar="FILE", help="draw the figures of contention there")
    parser.add_argument("--json", action="store_true", help="one JSON object a figure")


def run(args: argparse.Namespace) -> int:
    """0 when every figure kept to its target, 1 otherwise. `ConfigurationError` for what was asked wrongly."""
    names = args.figures or list(MEASUREMENTS)
    if unknown := [name for name in names if name not in MEASUREMENTS]:
        hint = did_you_mean(unknown[0], MEASUREMENTS) or among(MEASUREMENTS)
        raise ConfigurationError(f"no figure called {unknown[0]}{hint}")
    if args.svg is not None:  # now, not after minutes of measuring
        if "contention" not in names:
            raise ConfigurationError("--svg: it draws the figures of contention, which are not among those asked for")
        check_new_file("--svg", args.svg)
    width = make_console(sys.stdout).width
    reached = True
    for name in names:
        figures = _processes.run(MEASUREMENTS[name], args.rounds)
        for figure in figures:
            reached &= figure.reached
            print(json.dumps(as_json(figure.record())) if args.json else _text(figure, width), flush=True)
        if name == "contention":
            if not args.json:
                print(_plot.text_plot(figures, width), flush=True)
            if args.svg is not None:
                with replacing(args.svg, 0o644) as fd:
                    write_all(fd, _plot.svg_plot(figures).encode())
    return 0 if reached else 1


def _text(figure: Figure, width: int) -> str:
    bound, beyond = ("at most", "OVER THE LIMIT") if figure.at_most else ("at least", "BELOW THE LIMIT")
    verdict = "within limit" if figure.reached else beyond
    lines = [figure.name, f"    {figure.ratio:.2f}, {bound} {figure.target:g}: {verdict}"]
    for name in figure.rounds[0]:
        values = [values[name] for values in figure.rounds]
        median = statistics.median(values)
        lines.append(
            f"    {name:<12} median {median:9.2f} {figure.unit}   range {min(values):.2f} .. {max(values):.2f}"
        )
    if figure.note:
        lines += textwrap.wrap(figure.note, min(width, 100), initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
