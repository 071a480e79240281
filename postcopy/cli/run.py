# SPDX-License-Identifier: Apache-2.0
"""`postcopy run`: starts a program whose memory can then be moved while it runs, as a QEMU's."""

from __future__ import annotations

import argparse

from postcopy.errors import ConfigurationError
from postcopy.machines.preload.start import start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lazy",
        action="store_true",
        help="it is a destination: it waits for what is in its memory from the first touch on",
    )
    parser.add_argument(
        "--socket",
        metavar="PATH",
        help="where it is asked for its memory (default: $XDG_RUNTIME_DIR/postcopy/preload-PID.sock, root: /run/...)",
    )
    parser.add_argument("command_line", nargs=argparse.REMAINDER, metavar="-- COMMAND...", help="program to become")


def run(args: argparse.Namespace) -> int:
    """Does not return but with an error."""
    command = args.command_line[1:] if args.command_line[:1] == ["--"] else args.command_line
    if not command:
        raise ConfigurationError("run: name a program, as in `postcopy run -- qemu-system-x86_64 ...`")
    start(command, args.socket, lazy=args.lazy)
