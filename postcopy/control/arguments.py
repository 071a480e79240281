# SPDX-License-Identifier: Apache-2.0
"""The arguments of `postcopy ctl`. What they mean is checked by the process that is asked."""

from __future__ import annotations

import argparse

from .schema import COMMANDS


def _patience(text: str) -> float | str:
    return text if text == "forever" else float(text)


def add_ctl_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("socket", metavar="SOCKET", help="what the process was given as --control")
    requests = parser.add_subparsers(dest="request", required=True, metavar="REQUEST")

    def add(name: str, help: str = "") -> argparse.ArgumentParser:
        request = requests.add_parser(name, help=help or COMMANDS[name].help, allow_abbrev=False)
        request.add_argument("--json", action="store_true", help="as it came, in JSON")
        request.set_defaults(sent=[], log_level="warning")
        return request

    add("status").add_argument("machine", metavar="NAME", nargs="?", help="of one machine only")
    requests.choices["status"].set_defaults(sent=["machine"])
    add("pause")
    recover = add("recover")
    recover.add_argument("to", metavar="HOST:PORT", nargs="?", help="where the other side is now")
    recover.set_defaults(sent=["to"])
    change = add("set")
    change.add_argument("--max-bandwidth", metavar="RATE|none", help="of the background push, as 100MiB/s")
    change.add_argument("--bulk-channels", type=int, metavar="N", help="of the next migration")
    change.add_argument("--recover-for", type=_patience, metavar="SECONDS|forever", help="from the next loss on")
    change.set_defaults(sent=["max_bandwidth", "bulk_channels", "recover_for"])
    add("cancel")
    quit = add("quit")
    quit.add_argument(
        "--force", action="store_true", default=None, help="also when pages are still needed, which are then lost"
    )
    quit.set_defaults(sent=["force"])
    add("events", "show what happens until it ends, or Ctrl-C")
    add("commands")
