# SPDX-License-Identifier: Apache-2.0
"""`postcopy run`: starts a program whose memory can then be moved while it runs, as a QEMU's."""

from __future__ import annotations

import argparse
import shlex
import sys

from postcopy.errors import ConfigurationError
from postcopy.machines.preload.start import start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lazy",
        action="store_true",
        help="it is a destination of --machine program: it waits for what is in its memory from the first touch on",
    )
    parser.add_argument(
        "--socket",
        metavar="PATH",
        help="where it is asked for its memory (default: $XDG_RUNTIME_DIR/postcopy/preload-PID.sock, root: in"
        " /run/postcopy)",
    )
    parser.add_argument(
        "--twin",
        metavar="PID",
        type=int,
        help="run nothing: print the command that starts, on the other host, the QEMU into which that one can be moved",
    )
    parser.add_argument("command_line", nargs=argparse.REMAINDER, metavar="-- COMMAND...", help="program to become")


def run(args: argparse.Namespace) -> int:
    """Returns only where it runs nothing."""
    command = args.command_line[1:] if args.command_line[:1] == ["--"] else args.command_line
    if args.twin is not None:
        if command or args.lazy or args.socket:
            raise ConfigurationError("run: --twin runs nothing; leave the rest out")
        return _show_twin(args.twin)
    if not command:
        raise ConfigurationError("run: name a program, as in `postcopy run -- qemu-system-x86_64 ...`")
    return start(command, args.socket, lazy=args.lazy)


def _show_twin(pid: int) -> int:
    from postcopy.machines.qemu.twin import command_line_of, twin

    command, warnings = twin(command_line_of(pid))
    print(f"postcopy run -- {shlex.join(command)}")
    for warning in warnings:
        print(f"postcopy: look at this: {warning}", file=sys.stderr)
    return 0
