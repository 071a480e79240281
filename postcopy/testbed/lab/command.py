# SPDX-License-Identifier: Apache-2.0
"""`postcopy lab`: up, exec, link, status, down. Without Trio: a user namespace is entered by one thread alone."""

from __future__ import annotations

import argparse
import json
import os
import sys

from postcopy import records
from postcopy.errors import ConfigurationError, ResourceError
from postcopy.records import reports
from postcopy.testbed.lab import _members as members
from postcopy.testbed.lab._lab import Lab, down, names
from postcopy.testbed.lab._plan import DEFAULT_NAME, MAX_HOSTS, MAX_MTU, MIN_MTU, LabPlan, parse_delay_us, parse_rate
from postcopy.units import argument, check_word, parse_whole

CHANGES = ("cut", "heal", "rate", "delay")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="lab", required=True, metavar="COMMAND")

    def add(name: str, text: str, *lines: str) -> argparse.ArgumentParser:
        examples = [("", f"postcopy lab {line}") for line in lines]
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", examples=examples)
        command.add_argument("--name", default=DEFAULT_NAME, help="name of the laboratory")
        return command

    up = add("up", "make hosts that are joined by cables and a switch", "up --hosts 3 --rate 100mbit")
    up.add_argument(
        "--hosts",
        type=argument(parse_whole, 1, MAX_HOSTS),
        default=2,
        metavar="N",
        help="number of hosts, which are h1 to hN",
    )
    up.add_argument(
        "--mtu",
        type=argument(parse_whole, MIN_MTU, MAX_MTU),
        default=1500,
        metavar="BYTES",
        help="MTU of the network",
    )
    up.add_argument(
        "--rate",
        type=argument(parse_rate),
        metavar="RATE|off",
        help="rate of each cable in each direction, as 100mbit or 10MiB/s (default: off)",
    )
    up.add_argument("--json", action="store_true", help="print what there is as JSON")

    execute = add("exec", "run a command in a host; the exit status is the command's", "exec h1 -- ping h2")
    execute.add_argument("host", metavar="HOST", help="host, as h1")
    execute.add_argument("command_line", nargs=argparse.REMAINDER, metavar="-- COMMAND...", help="command to run there")

    link = add("link", "change a host's cable", "link h2 cut", "link h2 delay 5ms")
    link.add_argument("host", metavar="HOST", help="host whose cable it is, as h1")
    change = link.add_argument("change", metavar="|".join(CHANGES), help="what happens to it")
    change.words = CHANGES  # type: ignore[attr-defined] # which completion offers
    link.add_argument("value", nargs="?", metavar="VALUE", help="rate: 100mbit, 10MiB/s or off; delay: 5ms or off")
    link.add_argument(
        "--to",
        metavar="HOST:PORT",
        help="delay, where the kernel has no netem: a proxy in HOST delays connections to there; says where it listens",
    )

    status = add("status", "show the laboratories and their hosts", "status")
    status.add_argument("--json", action="store_true", help="print it as JSON")

    end = add("down", "stop the processes of a laboratory and remove it", "down")
    end.add_argument("--all", action="store_true", help="every laboratory of this user, whatever its name")


def run(args: argparse.Namespace) -> int:
    """The exit status. Blocks; ``exec`` does not return."""
    command = {"up": _up, "exec": _exec, "link": _link, "status": _status, "down": _down}[args.lab]
    return command(args)


def _up(args: argparse.Namespace) -> int:
    lab = Lab.up(LabPlan(args.name, args.hosts, args.mtu, args.rate))
    _tell([lab.status()], as_json=args.json)
    return 0


def _exec(args: argparse.Namespace) -> int:
    command = args.command_line[1:] if args.command_line[:1] == ["--"] else args.command_line
    if not command:
        raise ConfigurationError("exec needs a command: `postcopy lab exec HOST -- COMMAND...`")
    lab = Lab.find(args.name)
    lab.host(args.host).enter()
    environment = {**os.environ, members.MARK: lab.mark, "POSTCOPY_LAB_HOST": args.host}
    sys.stdout.flush()
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        # As a shell has it; apart from the statuses of this program.
        print(f"postcopy: error: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126


def _link(args: argparse.Namespace) -> int:
    check_word(args.change, CHANGES)
    if (args.value is None) == (args.change in ("rate", "delay")):
        takes = "a value" if args.value is None else "no value"
        raise ConfigurationError(f"link {args.change} takes {takes}: cut, heal, rate RATE or delay TIME")
    if args.to is not None and args.change != "delay":
        raise ConfigurationError(f"link {args.change} takes no --to: delay does")
    rate = parse_rate(args.value) if args.change == "rate" else None
    delay_us = parse_delay_us(args.value) if args.change == "delay" else 0
    host = Lab.find(args.name).host(args.host)
    if args.change == "cut":
        host.cut()
    elif args.change == "heal":
        host.heal()
    elif args.change == "rate":
        host.limit(rate)
    elif args.to is None:
        host.delay(delay_us)
    else:
        print(host.delay_connections(delay_us, args.to))
    return 0


def _status(args: argparse.Namespace) -> int:
    labs: list[reports.Lab] = []
    for name in names():
        try:
            labs.append(Lab.find(name).status())
        except (ConfigurationError, ResourceError) as error:
            labs.append(reports.Lab(name=name, state="gone", error=str(error), hosts={}))
    _tell(labs, as_json=args.json)
    return 0


def _down(args: argparse.Namespace) -> int:
    if not args.all:
        if not down(args.name):
            print(f"postcopy: laboratory {args.name} was not up", file=sys.stderr)
        return 0
    failures = []
    for name in names():
        try:
            down(name)
        except (ConfigurationError, ResourceError) as error:
            failures.append(error)  # of one: the others end all the same
    if failures:
        raise failures[0]
    return 0


def _tell(labs: list[reports.Lab], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(records.as_json(reports.Labs(schema=records.VERSION, labs=labs))))
        return
    if not labs:
        print("no laboratory is up")
    for lab in labs:
        netem = "" if lab.netem is not False else ", no netem in this kernel"
        more = f"MTU {lab.mtu}{netem}, held by process {lab.holder}" if lab.state == "up" else lab.error
        print(f"{lab.name}: {lab.state}, {more}")
        for name, host in lab.hosts.items():
            delay = f", delay {host.delay_us / 1000:g} ms" if host.delay_us else ""
            rate = "" if host.rate == "off" else f", {host.rate}"
            print(f"  {name}  {host.ipv4}  {host.ipv6 or 'no IPv6'}  cable {host.cable}{rate}{delay}")
