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
    # Only now: a second of processor time.
    from postcopy.report import draw
    from postcopy.report._read import Reader

    log = getattr(args, "hdr", None)
    if log is not None:
        check_new_file("--hdr", log)
    reader = Reader(keep_latencies=log is not None)
    for name in args.files:
        with _opened(name) as file:
            reader.read(file, "standard input" if name == "-" else name)
    if log is not None:
        write_hdr(log, intervals(reader.latencies))
    _write(target, draw(reader).encode("utf-8", "replace"))
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


def _write(target: str, data: bytes) -> None:
    try:
        with replacing(target, MODE, durable=False) as fd:
            write_all(fd, data)
    except OSError as error:
        why = explain_unwritable(error, os.path.dirname(target) or ".")
        raise ResourceError(f"--output {target}: {why}", "name another file") from error
