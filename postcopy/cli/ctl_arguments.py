# SPDX-License-Identifier: Apache-2.0
"""The arguments of `postcopy ctl`. What they mean is checked by the process that is asked."""

from __future__ import annotations

import argparse

from postcopy.service.schema import COMMANDS


def _patience(text: str) -> float | str:
    try:
        return text if text == "forever" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, nor 'forever'") from None


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--machine", metavar="NAME", help="of a daemon that has several: which")


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--force", action="store_true", default=None, help="also when something is lost with it: a machine, its pages"
    )


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
    start = add("start")
    start.add_argument("machine", metavar="KIND", help="kvm or rv64")
    start.add_argument("--name", metavar="NAME")
    for option, metavar in (("memory", "SIZE"), ("working-set", "SIZE"), ("workload", "NAME"), ("backing", "NAME")):
        start.add_argument("--" + option, metavar=metavar)
    for option in ("vcpus", "seed"):
        start.add_argument("--" + option, type=int, metavar="N")
    start.add_argument("--disk", metavar="FILE")
    start.set_defaults(
        sent=["machine", "name", "memory", "working_set", "workload", "backing", "vcpus", "seed", "disk"]
    )
    end = add("end")
    _add_machine(end)
    _add_force(end)
    end.set_defaults(sent=["machine", "force"])
    migrate = add("migrate")
    migrate.add_argument("to", metavar="HOST:PORT", help="a daemon or a destination that listens")
    _add_machine(migrate)
    migrate.add_argument("--detach", action="store_true", help="do not wait until it has moved")
    migrate.set_defaults(sent=["machine", "to"])
    pause = add("pause")
    _add_machine(pause)
    pause.set_defaults(sent=["machine"])
    recover = add("recover")
    recover.add_argument("to", metavar="HOST:PORT", nargs="?", help="where the other side is now")
    _add_machine(recover)
    recover.set_defaults(sent=["to", "machine"])
    change = add("set")
    change.add_argument("--max-bandwidth", metavar="RATE|none", help="of the background push, as 100MiB/s")
    change.add_argument("--bulk-channels", type=int, metavar="N", help="of the next migration")
    change.add_argument("--recover-for", type=_patience, metavar="SECONDS|forever", help="from the next loss on")
    change.set_defaults(sent=["max_bandwidth", "bulk_channels", "recover_for"])
    cancel = add("cancel")
    _add_machine(cancel)
    cancel.set_defaults(sent=["machine"])
    reclaim = add("reclaim")
    _add_machine(reclaim)
    _add_force(reclaim)
    reclaim.set_defaults(sent=["machine", "force"])
    quit = add("quit")
    _add_force(quit)
    quit.set_defaults(sent=["force"])
    add("events", "show what happens until it ends, or Ctrl-C")
    add("commands")
