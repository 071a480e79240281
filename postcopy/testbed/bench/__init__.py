# SPDX-License-Identifier: Apache-2.0
"""`postcopy bench`: the figures that the documentation quotes, each a ratio of things measured side by side.

Every measurement is repeated in rounds, its parts one after the other within a round, in processes of their own; what
is reported is the median over the rounds of the ratio within a round, so that a slow spell of the host hits both parts.

- ``fault``: a demand fault over loopback TCP, nothing else under way, against the least a C program can do (read the
  userfaultfd, 8 byte request, 4 KiB reply, UFFDIO_COPY), sleeping and busy polling. Seen by the thread that touches.
- ``scale``: a fault with 1 to 10,000 others pending; a look at the counters, and the choice of the next run to push, of
  64 MiB to 1 TiB; one memory with 1 to 8 userfaultfds; as curves.
- ``pager-process``: the same fault with the pager in a process of its own, against one in threads.
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
- ``qemu-move``: a virtual machine of QEMU moves by postcopy, against QEMU's own postcopy of the same (TCG; with and
  without preempt): stop to run, faults, total time; and both with the network cut in the middle.

The module of a figure (`FIGURES`) has an async function `measure_NAME` of the number of rounds, which returns a list of
`Figure`, and where it needs a program of others a function `check_NAME`, which raises `ResourceError` without it before
anything is measured. `_common` has what the modules share, `_worker` most of the processes. Options and output are
here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import textwrap
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import TYPE_CHECKING

from postcopy._files import check_new_file, replacing, write_all
from postcopy.errors import ConfigurationError, MigrationError, ResourceError
from postcopy.records import as_json
from postcopy.records.results import Measurement
from postcopy.testbed import _processes
from postcopy.testbed._report import make_console
from postcopy.units import among, argument, did_you_mean, parse_whole

__all__ = ["FIGURES", "add_arguments", "run"]

FIGURES = {
    "fault": "_fault",
    "scale": "_scale",
    "pager-process": "_fault",
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
}
"""The module that measures it; imported then."""
_BAR = 20
"""Characters of the longest bar of a curve."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `postcopy bench`."""
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"of {', '.join(FIGURES)}; all by default")
    parser.add_argument(
        "--rounds", type=argument(parse_whole, 1, 1000), default=5, metavar="N",
        help="repetitions, medians are shown",
    )  # fmt: skip
    parser.add_argument("--svg", default=None, metavar="FILE", help="draw the figures of contention there")
    parser.add_argument("--json", action="store_true", help="one JSON object a figure")


def run(args: argparse.Namespace) -> int:
    """0 when every figure was measured and kept to its target, 1 otherwise. `ConfigurationError` for what was asked
    wrongly, `ResourceError` for what this host lacks."""
    names = args.figures or list(FIGURES)
    if unknown := [name for name in names if name not in FIGURES]:
        hint = did_you_mean(unknown[0], FIGURES) or among(FIGURES)
        raise ConfigurationError(f"no figure called {unknown[0]}{hint}")
    if args.svg is not None:  # now, not after minutes of measuring
        if "contention" not in names:
            raise ConfigurationError("--svg: it draws the figures of contention, which are not among those asked for")
        check_new_file("--svg", args.svg)
    names = [name for name in names if _can_be_measured(name, asked=bool(args.figures))]
    width = make_console(sys.stdout).width
    reached = True
    for name in names:
        try:
            figures = _processes.run(_measurement(name), args.rounds)
        except MigrationError as error:  # the others are worth having
            print(f"postcopy: error: {name}: {error}", file=sys.stderr)
            reached = False
            continue
        for figure in figures:
            reached &= figure.reached
            print(json.dumps(as_json(figure.record())) if args.json else _text(figure, width), flush=True)
        if name == "contention":
            from postcopy.testbed.bench import _plot

            if not args.json:
                print(_plot.text_plot(figures, width), flush=True)
            if args.svg is not None:
                with replacing(args.svg, 0o644) as fd:
                    write_all(fd, _plot.svg_plot(figures).encode())
    return 0 if reached else 1


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{FIGURES[name]}")


def _can_be_measured(name: str, *, asked: bool) -> bool:
    """`ResourceError` when a program is missing that a figure needs that was `asked` for; else a line about it."""
    try:
        getattr(_module(name), f"check_{name.replace('-', '_')}", lambda: None)()
    except ResourceError as error:
        if asked:
            raise
        print(f"postcopy: warning: {name} is left out: {error}", file=sys.stderr)
        return False
    return True


def _measurement(name: str) -> Callable[[int], Awaitable[list[Measurement]]]:
    measure: Callable[[int], Awaitable[list[Measurement]]] = getattr(_module(name), f"measure_{name.replace('-', '_')}")
    return measure


def _text(figure: Figure, width: int) -> str:
    """Its name, the ratio and the goal; of each value the median, and the least and the most of the rounds."""
    width = min(width, 100)
    if figure.target is None:
        goal = "no goal"
    else:
        bound = "at most" if figure.at_most else "at least"
        goal = f"{bound} {figure.target:g}: {'goal reached' if figure.reached else 'GOAL NOT REACHED'}"
    lines = [*textwrap.wrap(figure.name, width), f"    {figure.ratio:.2f}, {goal}"]
    if figure.curve:
        lines.append(f"    over {figure.curve}:")
    medians = figure.medians()
    longest, most = max(map(len, medians)), max(medians.values())
    for name, median in medians.items():
        values = [values[name] for values in figure.rounds]
        bar = f"{'█' * round(median / most * _BAR):<{_BAR}}  " if figure.curve else ""
        between = f"  {min(values):.2f} .. {max(values):.2f}" if len(values) > 1 else ""
        lines.append(f"    {name:<{longest}}  {bar}{median:10.2f} {figure.unit}{between}")
    if figure.note:
        lines += textwrap.wrap(figure.note, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
