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
import contextlib
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

from postcopy import __version__
from postcopy.cli._commands import COMMANDS
from postcopy.errors import ConfigurationError
from postcopy.service import options
from postcopy.service.options import OUTPUT, Group, OneOf, Option
from postcopy.units import any_of, argument, did_you_mean
from postcopy.wire import one_line

MAX_WIDTH = 100  # of help on a wide terminal


class _Help(argparse.HelpFormatter):
    """Text with paragraphs, examples as they are, and the defaults of options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)
        self._width = min(self._width, MAX_WIDTH)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):  # whose choices are indented once more
            longest = max(len(name) for name in action.choices)
            self._action_max_length = max(self._action_max_length, longest + 2 * self._indent_increment)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.option_strings and action.nargs != 0 and action.default not in (None, argparse.SUPPRESS, "", [])
        if not shown or "(default" in (action.help or ""):
            return action.help
        return f"{action.help} (default: %(default)s)"


_SAID_BETTER: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (  # what argparse says, and what is said here
    (r"the following arguments are required: (.*)", lambda found: f"needs {found[1].replace(', ', ' and ')}"),
    (r"one of the arguments (.*) is required", lambda found: f"needs {any_of(found[1].split())}"),
    (r"argument ([^ /]*)\S*: expected (?:one|at least one) argument", lambda found: f"{found[1]}: a value is missing"),
    (r"argument ([^ /]*)\S*: not allowed with argument (\S+)", lambda found: f"{found[1]} does not go with {found[2]}"),
    (r"argument ([^ /]*)\S*: ignored explicit argument .*", lambda found: f"{found[1]} takes no value"),
    (r"argument ([^ /]*)\S*: (.*)", lambda found: f"{found[1]}: {found[2]}"),
)


class Parser(argparse.ArgumentParser):
    """One line instead of a page of usage, in words that name what was typed. `usage` names what must be given."""

    def __init__(self, *, formatter_class: Any = _Help, allow_abbrev: bool = False, **more: Any) -> None:
        super().__init__(formatter_class=formatter_class, allow_abbrev=allow_abbrev, **more)
        self._positionals.title = "arguments"
        self.examples: tuple[tuple[str, str], ...] = ()

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        words = list(sys.argv[1:] if args is None else args)
        self._check_words(words.copy())
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        for pattern, say in _SAID_BETTER:
            if found := re.fullmatch(pattern, message, re.DOTALL):
                message = say(found)
                if message.startswith("needs"):
                    message = f"{self._name} {message}"
                break
        raise ConfigurationError(f"{one_line(message)} (see `{self.prog} --help`)")

    def format_help(self) -> str:
        self.usage = self.usage or self.short_usage()
        return super().format_help()

    def help_of(self, action: argparse.Action) -> str:
        """What is said of an argument, with its default."""
        return self._get_formatter()._expand_help(action) if action.help else ""

    def value_of(self, action: argparse.Action) -> str:
        """What is to be written for its value."""
        if action.nargs in (0, argparse.REMAINDER):
            return str(action.metavar) if action.nargs else ""
        return self._get_formatter()._format_args(action, action.dest.upper())

    @property
    def _name(self) -> str:
        return self.prog.partition(" ")[2] or self.prog

    @property
    def subcommands(self) -> Mapping[str, Parser]:
        found = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return found[0].choices if found else {}

    def walk(self) -> Iterator[Parser]:
        """This parser, and those of all commands under it."""
        yield self
        for parser in self.subcommands.values():
            yield from parser.walk()

    def short_usage(self) -> str:
        """What must be given, and that there are options."""
        formatter = self._get_formatter()

        def written(action: argparse.Action) -> str:
            text = " ".join(filter(None, (*action.option_strings[:1], self.value_of(action))))
            return f"[{text}]" if action.nargs == argparse.PARSER and not action.required else text

        words = []
        optional = False
        in_group = {action for group in self._mutually_exclusive_groups for action in group._group_actions}
        for group in self._mutually_exclusive_groups:
            words.append(f"({' | '.join(map(written, group._group_actions))})")
        for action in self._actions:
            if action.option_strings and action not in in_group:
                optional |= not action.required and action.dest != "help"
                words += [written(action)] if action.required else []
        words += ["[OPTION]..."] if optional else []
        words += [written(action) for action in self._actions if not action.option_strings]
        first = f"usage: {self.prog} "
        text = textwrap.wrap(
            first + " ".join(words),
            formatter._width,
            subsequent_indent=" " * 11,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return "\n".join(text).removeprefix("usage: ").replace("%", "%%")

    def _check_words(self, words: list[str]) -> None:
        """Options and commands that there are not, before argparse, which would ask for what is missing first."""
        positional = [action for action in self._actions if not action.option_strings]
        while words:
            word = words.pop(0)
            if word == "--" or (positional and positional[0].nargs == argparse.REMAINDER):
                return
            if re.match(r"--|-[a-zA-Z]", word):
                name, equals, _ = word.partition("=")
                action = self._option_string_actions.get(name) or self._option_string_actions.get(
                    "" if name.startswith("--") else name[:2]
                )
                if action is None:
                    self._no_option(name)
                if action.nargs != 0 and not equals and words and not words[0].startswith("--"):
                    words.pop(0)
            elif self.subcommands:
                if word not in self.subcommands:
                    known = "; there are " + ", ".join(self.subcommands)
                    asked = "request" if self.subcommands_metavar == "REQUEST" else "command"
                    self.error(f"unknown {asked} {word!r}{did_you_mean(word, self.subcommands) or known}")
                self.subcommands[word]._check_words(words)
                return
            elif not positional:
                named = "--machine" in self._option_string_actions
                self.error(
                    f"{self._name} has no use for {word!r}{f'; did you mean --machine {word}?' if named else ''}"
                )
            elif positional[0].nargs in (None, "?"):
                positional.pop(0)

    @property
    def subcommands_metavar(self) -> str:
        return next(str(one.metavar) for one in self._actions if isinstance(one, argparse._SubParsersAction))

    def _no_option(self, name: str) -> NoReturn:
        elsewhere = [one for one in make_parser(None).walk() if name in one._option_string_actions]
        beside = [one for one in elsewhere if one.prog.rpartition(" ")[0] == self.prog.rpartition(" ")[0]]
        if found := [one._name for one in beside or elsewhere]:
            others = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            self.error(f"{self._name} has no {name}; {others} {'has' if len(found) == 1 else 'have'}")
        known = [option for option in self._option_string_actions if option.startswith("--")]
        self.error(f"unknown option {name}{did_you_mean(name, known)}")


def make_parser(arguments: Sequence[str] | None) -> Parser:
    """The parser for these arguments: of the commands that they do not name it knows the names only. None: all of it,
    but for the commands that are not installed."""
    parser = Parser(
        prog="postcopy",
        description="Migrates a running machine to another host, and its memory after it: the machine runs there at"
        " once, and each page that it touches before the page has arrived is fetched at that moment.",
        epilog="`postcopy COMMAND --help` describes a command; `man postcopy` and docs/ describe it all.",
    )
    parser.add_argument("--version", action="version", version=f"postcopy {__version__}", help="show the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    asked = None if arguments is None else next((word for word in arguments if not word.startswith("-")), None)
    for name, entry in COMMANDS.items():
        command = add_command(commands, name, entry.help, entry.description, entry.examples)
        if name == asked:
            add_arguments(command, name)
        elif arguments is None:
            with contextlib.suppress(ImportError):
                add_arguments(command, name)
    return parser


def add_command(
    commands: Any, name: str, help: str, description: str = "", examples: Sequence[tuple[str, str]] = ()
) -> Parser:
    """The parser of a command among others (an action of `add_subparsers`)."""
    shown = [f"  {what}\n{textwrap.indent(line, '    ')}" for what, line in examples]
    parser: Parser = commands.add_parser(
        name,
        help=help,
        description=description or f"{help[0].upper()}{help[1:]}.",
        epilog="\n".join(["examples:", *shown]) if shown else None,
    )
    parser.examples = tuple(examples)
    return parser


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """A command's own arguments."""
    if (groups := options_of(command)) is not None:
        add_groups(parser, groups, defaults_of(command))
    else:
        load(command).add_arguments(parser)


def values(args: argparse.Namespace) -> dict[str, Any]:
    """What was given, by the names in the records."""
    return {name: value for name, value in vars(args).items() if value is not None}


def options_of(command: str) -> tuple[Group, ...] | None:
    """The table of a command's options, where it has one."""
    return options.COMMANDS.get(command) or getattr(load(command), "OPTIONS", None)


def load(command: str) -> Any:
    """A command's module."""
    return import_module(COMMANDS[command].module)


def defaults_of(command: str) -> Mapping[str, Any]:
    """What the options of a table are where they are not given, by their keys."""
    return options.defaults(command) or getattr(load(command), "defaults", dict)()


def add_groups(parser: argparse.ArgumentParser, groups: Iterable[Group], defaults: Mapping[str, Any]) -> None:
    for group in groups:
        section = parser.add_argument_group(group.title) if group.title else parser
        for item in group.items:
            if isinstance(item, OneOf):
                one = section.add_mutually_exclusive_group(required=True)
                for option in item.options:
                    add_option(one, option, defaults)
            else:
                add_option(section, item, defaults)
        if group is OUTPUT:
            section.add_argument(
                "-v", "--verbose", action="store_const", const="info", dest="log_level", default=argparse.SUPPRESS,
                help="same as --log-level info",
            )  # fmt: skip


def add_option(parser: argparse._ActionsContainer, option: Option, defaults: Mapping[str, Any] = {}) -> None:
    more: dict[str, Any] = {"help": with_default(option, defaults.get(option.key)), "default": argparse.SUPPRESS}
    if option.flag:
        more["action"] = "store_true" if option.flag == "set" else argparse.BooleanOptionalAction
    else:
        more |= {"type": argument(option.parse), "metavar": option.metavar}
    if option.nargs:
        more["nargs"] = option.nargs
    if option.positional:
        # (argparse would parse SUPPRESS, which is a text, in place of one that was left out)
        action = parser.add_argument(option.key, **more | {"default": None})
    else:
        action = parser.add_argument(f"--{option.name}", dest=option.key, required=option.required, **more)
    action.words = option.words  # type: ignore[attr-defined]


def with_default(option: Option, default: Any) -> str:
    """Its help. A default that needs words of its own is in there already; a flag has none."""
    if default in (None, "") or option.flag == "set" or "(default" in option.help:
        return option.help
    shown = " ".join(option.to_arguments(default)) if option.flag else option.format(default)
    return f"{option.help} (default: {shown})"
