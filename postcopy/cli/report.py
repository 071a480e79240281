# SPDX-License-Identifier: Apache-2.0
"""`postcopy report`: a page about migrations, made of what a command has written with ``--json``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import BinaryIO

from postcopy._files import check_new_file, explain_unwritable, open_regular, replacing, write_all
from postcopy._hdr import intervals, write_hdr
from postcopy.errors import ConfigurationError, ResourceError
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
MODE = 0o644  # a page is to be shown to others


def run(args: argparse.Namespace) -> int:
    """Writes it. `ConfigurationError` for what cannot be read as such lines, or written."""
    target = getattr(args, "output", OUTPUT)
    if reason := explain_missing():
        raise ConfigurationError(f"report: {reason}")
    check_new_file("--output", target)
    directory = getattr(args, "svg", None)
    if directory is not None and not os.path.isdir(directory):
        raise ConfigurationError(f"--svg {directory}: no such directory; make it first")
    # Only now: a second of processor time.
    from postcopy.report import Reader, draw, pictures

    log = getattr(args, "hdr", None)
    if log is not None:
        check_new_file("--hdr", log)
    reader = Reader(keep_latencies=log is not None)
    for name in args.files:
        with _opened(name) as file:
            reader.read(file, "standard input" if name == "-" else name)
    if log is not None:
        write_hdr(log, intervals(reader.latencies))
    if directory is not None:
        found = pictures(reader)
        if not found:
            raise ConfigurationError("--svg: there is no migration in these lines, so there is no picture")
        for name, picture in found.items():
            _write("--svg", os.path.join(directory, f"{name}.svg"), picture)
    _write("--output", target, draw(reader))
    return 0


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


def _write(option: str, target: str, text: str) -> None:
    try:
        with replacing(target, MODE, durable=False) as fd:
            write_all(fd, text.encode("utf-8", "replace"))
    except OSError as error:
        why = explain_unwritable(error, os.path.dirname(target) or ".")
        raise ResourceError(f"{option} {target}: {why}", "name another file") from error
