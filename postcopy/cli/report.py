# SPDX-License-Identifier: Apache-2.0
"""`postcopy report`: a page about migrations, made of what a command has written with ``--json``."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import BinaryIO

from postcopy._files import check_new_file, open_regular, write_output
from postcopy._hdr import intervals, write_hdr
from postcopy.errors import ConfigurationError, PostcopyError, ResourceError
from postcopy.report import explain_missing
from postcopy.service.options import Group, Option, parse_path, path

OUTPUT = "report.html"
OPTIONS = (
    Group(
        "",
        Option("files", "what a command has written with --json; - is standard input. Both sides of a migration become"
               " one report", "FILE", parse_path, nargs="+", positional=True),
        path("output", f"write the page to FILE (default: {OUTPUT})", "FILE.html"),
        path("svg", "also write the pictures of the last migration to DIR, as SVG files for documents", "DIR"),
        path("hdr", "write the latencies of the faults to FILE, as an HdrHistogram log", "FILE.hlog"),
    ),
)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Writes it. `ConfigurationError` for what cannot be read as such lines, or written."""
    target, log = getattr(args, "output", OUTPUT), getattr(args, "hdr", None)
    if reason := explain_missing():
        raise ConfigurationError(f"report: {reason}")
    for option, written in (("--output", target), ("--hdr", log)):
        if written is not None:
            check_new_file(option, written)
            if any(os.path.realpath(name) == os.path.realpath(written) for name in args.files):
                raise ConfigurationError(f"{option} {written}: that is read, and would be replaced; name another file")
    directory = getattr(args, "svg", None)
    if directory is not None and not os.path.isdir(directory):
        raise ConfigurationError(f"--svg {directory}: no such directory; make it first")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it keeps its cache of fonts is nobody's concern
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's are of no use here; with little memory they crash
    try:  # only now: a second of processor time
        from postcopy.report import Reader, draw, pictures
    except (ImportError, AttributeError, ValueError) as error:  # its parts do not fit, or MPLBACKEND is none
        raise ResourceError(f"report: matplotlib cannot be loaded: {error}", "install it again") from error
    reader = Reader(keep_latencies=log is not None)
    for name in args.files:
        with _opened(name) as file:
            reader.read(file, "standard input" if name == "-" else name)
    if log is not None:
        write_hdr(log, intervals(reader.latencies))
        _say(f"latencies: {log}")
    if not reader.migrations and not reader.cells:  # as of another benchmark, which has latencies
        if log is not None:
            return 0
        raise PostcopyError(
            "there is no migration in these lines; a report is made of what `postcopy source`, `dest`, `daemon`,"
            " `pager`, `demo` or `bench migrate` has written with --json"
        )
    if directory is not None:
        for name, picture in pictures(reader).items():
            write_output("--svg", os.path.join(directory, f"{name}.svg"), picture, durable=False)
        _say(f"pictures: {directory}")
    write_output("--output", target, draw(reader), durable=False)
    _say(f"report: {target}")
    return 0


def _say(what: str) -> None:
    """As a command with ``--report`` does at its end."""
    print(f"postcopy: {what}", file=sys.stderr)


@contextlib.contextmanager
def _opened(name: str) -> Iterator[BinaryIO]:
    if name == "-":
        yield sys.stdin.buffer
        return
    try:
        fd = open_regular(name)
    except OSError as error:
        raise ConfigurationError(f"{name}: {error.strerror}") from error
    with os.fdopen(fd, "rb") as file:
        yield file
