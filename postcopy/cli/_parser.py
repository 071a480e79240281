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
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from postcopy import __version__
from postcopy.cli._commands import COMMANDS
from postcopy.errors import ConfigurationError
from postcopy.service import options
from postcopy.service.options import Group, OneOf, Option, is_name
from postcopy.units import among, any_of, argument, did_you_mean
from postcopy.wire import one_line

MAX_WIDTH = 100  # of help on a wide terminal


class _Help(argparse.HelpFormatter):
    """Text with paragraphs, examples as they are, and the defaults of options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=_help_width())

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):  # whose choices are indented once more
            longest = max(len(name) for name in action.choices)
            self._action_max_length = max(self._action_max_length, longest + 2 * self._indent_increment)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        return _help_with_default(action)


def _help_width() -> int:
    return min(shutil.get_terminal_size().columns - 2, MAX_WIDTH)


def _help_with_default(action: argparse.Action) -> str:
    """A template, as argparse fills in with the action's own values."""
    text = action.help or ""
    shown = action.option_strings and action.nargs != 0 and action.default not in (None, argparse.SUPPRESS, "", [])
    return f"{text} (default: %(default)s)" if shown and "(default" not in text else text


_LIKE_OPTION = re.compile(r"--|-[a-zA-Z]|[\u2013\u2014]")
"""A word that is meant for an option: editors and web pages turn -- into a dash."""
_VALUES = {None: "{0}", "?": "[{0}]", "*": "[{0} ...]", "+": "{0} [{0} ...]", argparse.PARSER: "{0} ..."}
"""How often a value is written, by ``nargs``."""


class Argument(NamedTuple):
    """What ``--help`` says of an argument, for other forms of it."""

    names: list[str]  # none where it is given by its place
    value: str
    help: str


class Parser(argparse.ArgumentParser):
    """One line instead of a page of usage, in words that name what was typed. `usage` names what must be given.

    argparse has no public way to list the arguments of a parser. The attributes that it has for that, which other
    packages use too (shtab is one), are used in this class only."""

    def __init__(
        self, *, formatter_class: Any = _Help, allow_abbrev: bool = False, examples: Sequence[tuple[str, str]] = (),
        **more: Any,
    ) -> None:  # fmt: skip
        """`examples`: what each does, or nothing, and the command line."""
        super().__init__(formatter_class=formatter_class, allow_abbrev=allow_abbrev, **more)
        self._positionals.title = "arguments"
        self.examples = tuple(examples)
        if examples:
            shown = [f"  {what}\n" * bool(what) + textwrap.indent(line, "    ") for what, line in examples]
            self.epilog = "\n".join([f"example{'s' * (len(shown) > 1)}:", *shown])

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse calls it for the parser of each command. All that is given must be known."""
        words = list(sys.argv[1:] if args is None else args)
        self._check_words(words)
        known, rest = super().parse_known_args(words, namespace)
        if rest:
            self._no_use(rest[0])
        return known, rest

    def error(self, message: str) -> NoReturn:
        """`message` is argparse's. One that is not known here, as of another version of Python, is said as it is."""
        if found := re.fullmatch(r"the following arguments are required: (.*)", message):
            message = f"{self.name} needs {found[1].replace(', ', ' and ')}"
        elif found := re.fullmatch(r"one of the arguments (.*) is required", message):
            message = f"{self.name} needs {any_of(found[1].split())}"
        elif found := re.fullmatch(r"argument (.+?): (.*)", message, re.DOTALL):
            argument, problem = found.groups()
            if problem in ("expected one argument", "expected at least one argument"):
                message = f"{argument}: a value is missing"
            elif problem.startswith("ignored explicit argument"):
                message = f"{argument} takes no value"
            elif other := re.fullmatch(r"not allowed with argument (.*)", problem):
                message = f"{argument} does not go with {other[1]}"
            else:
                message = f"{argument}: {problem}"
        raise ConfigurationError(f"{one_line(message)} (see `{self.prog} --help`)")

    def format_help(self) -> str:
        self.usage = self.usage or self.short_usage().replace("%", "%%")
        return super().format_help()

    @property
    def name(self) -> str:
        """Without the name of the program."""
        return self.prog.partition(" ")[2] or self.prog

    @property
    def options(self) -> Mapping[str, argparse.Action]:
        return {name: action for action in self._actions for name in action.option_strings}

    @property
    def subcommands(self) -> Mapping[str, Parser]:
        """The parsers of what this one is divided into."""
        return next((action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction)), {})

    @property
    def subcommand_is(self) -> str:
        """What a user calls one of them, in capitals."""
        return next(str(one.metavar) for one in self._actions if isinstance(one, argparse._SubParsersAction))

    def walk(self) -> Iterator[Parser]:
        """This parser, and those of all commands under it."""
        yield self
        for parser in self.subcommands.values():
            yield from parser.walk()

    def sections(self, above: Parser | None = None) -> Iterator[tuple[str, list[Argument]]]:
        """The arguments as ``--help`` groups them, with the title of the group where it is not argparse's; without
        those that the command `above` has, and without the commands."""
        known = set(above.options) if above is not None else set()
        for group in self._action_groups:
            arguments = [
                Argument(
                    list(action.option_strings),
                    _value_of(action),
                    _help_with_default(action) % {**vars(action), "prog": self.prog},
                )
                for action in group._group_actions
                if not (isinstance(action, argparse._SubParsersAction) or known.intersection(action.option_strings))
            ]
            if arguments:
                yield "" if group.title in ("options", "arguments") else str(group.title), arguments

    def short_usage(self) -> str:
        """What must be given, and that there are options."""

        def written(action: argparse.Action) -> str:
            text = " ".join(filter(None, (*action.option_strings[:1], _value_of(action))))
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
        text = textwrap.wrap(
            f"usage: {self.prog} {' '.join(words)}",
            _help_width(),
            subsequent_indent=" " * 11,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return "\n".join(text).removeprefix("usage: ")

    def _check_words(self, words: Sequence[str]) -> None:
        """Finds an option or a command that there is not, before argparse does, which would say first what is missing,
        and take the value of a mistyped option for an argument of its own. What is not sure is left to argparse."""
        options, positional = self.options, [action for action in self._actions if not action.option_strings]
        left = list(words)
        while left:
            word = left.pop(0)
            if word == "--":
                return
            if _LIKE_OPTION.match(word):
                name, equals, _ = word.partition("=")
                several = "" if word.startswith("--") else word[1:]  # as -vh
                action = options.get(name)
                if action is None and not (several and all(f"-{letter}" in options for letter in several)):
                    if {"-h", "--help"}.isdisjoint(words):
                        self._no_option(name)
                    return
                if action is not None and action.nargs != 0 and not equals and left and not _LIKE_OPTION.match(left[0]):
                    left.pop(0)
            elif self.subcommands:
                if word not in self.subcommands:
                    known = did_you_mean(word, self.subcommands) or among(self.subcommands)
                    self.error(f"unknown {self.subcommand_is.lower()} {word!r}{known}")
                return  # the rest is for its parser
            elif not positional:
                self._no_use(word)
            elif any(action.nargs == argparse.REMAINDER for action in positional):
                return

    def _no_option(self, name: str) -> NoReturn:
        def above(parser: Parser) -> str:
            return parser.prog.rpartition(" ")[0]

        others = [one for one in make_parser(None).walk() if name in one.options]
        under = [one.name for one in others if above(one) == self.prog]
        if found := under or [one.name for one in others if above(one) == above(self)]:
            shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            self.error(f"{self.name} has no {name}; {shown} {'has' if len(found) == 1 else 'have'}")
        bare = name.lstrip("-\u2013\u2014")
        if bare in self.subcommands:
            self.error(f"{self.name} has no {name}; write {self.name} {bare}")
        for action in self._actions:
            if action.dest == bare and not action.option_strings:
                self.error(f"{self.name} has no {name}; write {action.metavar} without it")
        known = [option[2:] for option in self.options if option.startswith("--")]
        self.error(f"unknown option {name}{did_you_mean(bare, known, '--')}")

    def _no_use(self, word: str) -> NoReturn:
        hint = ""
        for option, action in self.options.items():
            metavars = {
                "NAME": is_name(word),
                "HOST:PORT": bool(re.match(r".+:\d+$", word)),
                "[HOST]:PORT": bool(re.match(r":\d+$", word)),
            }
            known = getattr(action, "words", ()) or action.choices or ()
            if word in known if known else metavars.get(_value_of(action)):
                hint = f"; did you mean {option} {word}?"
                break
        self.error(f"{self.name} has no use for {word!r}{hint}")


def _value_of(action: argparse.Action) -> str:
    """What is to be written for its value."""
    metavar = str(action.metavar or action.dest.upper())
    if action.nargs == argparse.REMAINDER:
        return metavar
    return "" if action.nargs == 0 else _VALUES[action.nargs].format(metavar)  # type: ignore[index]


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
    description = description or f"{help[0].upper()}{help[1:]}."
    parser: Parser = commands.add_parser(name, help=help, description=description, examples=examples)
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


def written(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given, as a user writes it: by the names of the options, a value as text."""
    table = {option.key: option for group in options_of(given["command"]) or () for option in group}
    found = {}
    for key, value in given.items():
        if (option := table.get(key)) is not None:
            words = [word for word in option.to_arguments(value) if word != f"--{option.name}"]
            found[option.name] = True if option.flag else words
    return found


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
        if group.title == "output":
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
    if option.repeats:
        more["action"] = _Repeated
    if option.nargs:
        more["nargs"] = option.nargs
    if option.positional:
        # (argparse would parse SUPPRESS, which is a text, in place of one that was left out)
        action = parser.add_argument(option.key, **more | {"default": None})
    else:
        action = parser.add_argument(f"--{option.name}", dest=option.key, required=option.required, **more)
    action.words = option.words  # type: ignore[attr-defined]


class _Repeated(argparse.Action):
    """A tuple of all values."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, value: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), value))


def with_default(option: Option, default: Any) -> str:
    """Its help. A default that needs words of its own is in there already; a flag has none."""
    if default in (None, "") or option.flag == "set" or "(default" in option.help:
        return option.help
    shown = " ".join(option.to_arguments(default)) if option.flag else option.format(default)
    return f"{option.help} (default: {shown})"
