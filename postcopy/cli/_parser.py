# SPDX-License-Identifier: Apache-2.0
"""The commands, and the parsers of their options.

A command is a module. Its options are in a table, from which the parser is made (`OPTIONS`; for the two sides and the
daemon it is `postcopy.service.options.COMMANDS`), or its `add_arguments` makes the parser. It has `make`, which turns
what was given into what runs in Trio, or `run`, which does it all and returns the exit status.

The module is loaded only for the command that was asked for: the two sides of a migration run for long, and what
`bench` and the others need would cost each of them megabytes.

In what a parser returns, an option that was not given is missing: see `postcopy.service.options`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from postcopy import __version__
from postcopy.errors import ConfigurationError
from postcopy.service import options
from postcopy.service.options import OUTPUT, Group, OneOf, Option
from postcopy.units import argument
from postcopy.wire import one_line

COMMANDS = {
    "source": ("run a machine, or hold an image, and migrate it away", "postcopy.cli.sides"),
    "dest": ("receive what a source offers", "postcopy.cli.sides"),
    "daemon": ("own machines, send them away on request, take those that come", "postcopy.cli.sides"),
    "demo": ("both sides on this host, verified", "postcopy.testbed.demo"),
    "merge": ("join what both sides of a lost migration have salvaged into an image", "postcopy.cli.merge"),
    "ctl": ("ask a running process, or tell it what to do", "postcopy.cli.ctl"),
    "probe": ("what this host allows, and what would help", "postcopy.testbed.probe"),
    "faultpaths": (
        "which kernel paths wait for a missing page here, and which do not",
        "postcopy.testbed.faultpaths.command",
    ),
    "bench": ("measure, each figure against its floor in the same run", "postcopy.testbed.bench"),
    "lab": ("hosts with cables and a switch between them, on this machine", "postcopy.testbed.lab.command"),
    "chaos": ("a bad network between two programs, to try them with", "postcopy.testbed.chaos.command"),
}


class _Parser(argparse.ArgumentParser):
    """One line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{one_line(message)} (see `{self.prog} --help`)")


def make_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for these arguments: of the commands that they do not name it knows the names only."""
    parser = _Parser(
        prog="postcopy",
        description="Moves the memory of a running machine after the machine has moved.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"postcopy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (text, _) in COMMANDS.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        if name == asked:
            if (groups := options_of(name)) is not None:
                add_groups(command, groups)
            else:
                load(name).add_arguments(command)
    return parser


def values(args: argparse.Namespace) -> dict[str, Any]:
    """What was given, by the names in the records."""
    return {name: value for name, value in vars(args).items() if value is not None}


def options_of(command: str) -> tuple[Group, ...] | None:
    """The table of a command's options, where it has one."""
    return options.COMMANDS.get(command) or getattr(load(command), "OPTIONS", None)


def load(command: str) -> Any:
    """A command's module."""
    return import_module(COMMANDS[command][1])


def add_groups(parser: argparse.ArgumentParser, groups: Iterable[Group]) -> None:
    for group in groups:
        section = parser.add_argument_group(group.title) if group.title else parser
        for item in group.items:
            if isinstance(item, OneOf):
                one = section.add_mutually_exclusive_group(required=True)
                for option in item.options:
                    add_option(one, option)
            else:
                add_option(section, item)
        if group is OUTPUT:
            section.add_argument(
                "-v", "--verbose", action="store_const", const="info", dest="log_level", default=argparse.SUPPRESS,
                help="--log-level info",
            )  # fmt: skip


def add_option(parser: argparse._ActionsContainer, option: Option) -> None:
    more: dict[str, Any] = {"help": option.help, "default": argparse.SUPPRESS}
    if option.flag:
        more["action"] = "store_true" if option.flag == "set" else argparse.BooleanOptionalAction
    else:
        more |= {"type": argument(option.parse), "metavar": option.metavar}
    if option.nargs:
        more["nargs"] = option.nargs
    if option.positional:
        # (argparse would parse SUPPRESS, which is a text, in place of one that was left out)
        parser.add_argument(option.key, **more | {"default": None})
    else:
        parser.add_argument(f"--{option.name}", dest=option.key, required=option.required, **more)
