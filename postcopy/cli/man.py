# SPDX-License-Identifier: Apache-2.0
"""`postcopy man`: writes the manual pages, postcopy(1) and one for each command, as the parsers describe them.

They are in the macros of man(7), which groff and mandoc render.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Iterator

from postcopy import __version__
from postcopy._files import replacing, write_all
from postcopy.cli._commands import COMMANDS
from postcopy.cli._parser import Parser, make_parser
from postcopy.errors import ConfigurationError, ResourceError
from postcopy.service.options import DEFAULT_CONTROL, Group, Option, parse_path

OPTIONS = (Group("", Option("directory", "existing directory to write to", "DIR", parse_path, positional=True)),)

_EXIT_STATUS = (
    ("0", "The command has done what was asked for."),
    ("1", "It has not; standard error says why."),
    ("2", "The command line is wrong; standard error says what is wrong with it."),
)


def run(args: argparse.Namespace) -> int:
    """Writes them. `ConfigurationError` for no directory, `ResourceError` where it cannot be written."""
    if not os.path.isdir(args.directory):
        raise ConfigurationError(f"directory {args.directory} does not exist")
    try:
        for name, text in pages():
            with replacing(os.path.join(args.directory, f"{name}.1"), 0o644, durable=False) as fd:
                write_all(fd, text.encode())
    except OSError as error:
        raise ResourceError(
            f"cannot write into {args.directory}: {error.strerror}", "choose a directory of yours"
        ) from error
    return 0


def pages() -> Iterator[tuple[str, str]]:
    """The name and the text of each page."""
    whole = make_parser(None)
    yield "postcopy", _page(whole, "migrate running machines, and their memory after them", whole.subcommands)
    for name, parser in whole.subcommands.items():
        yield f"postcopy-{name}", _page(parser, COMMANDS[name].help)


def _page(parser: Parser, help: str, commands: Iterable[str] = ()) -> str:
    """Of a command, or with the names of the `commands` that have pages of their own."""
    name = parser.prog.replace(" ", "-")
    lines = [
        f'.TH {_text(name.upper())} 1 "" "postcopy {__version__}" "User Commands"',
        ".nh",  # a word that is typed is not broken
        ".ad l",
        ".SH NAME",
        f"{_text(name)} \\- {_text(help)}",
        ".SH SYNOPSIS",
        _synopsis(parser),
        ".SH DESCRIPTION",
        _text(parser.description or ""),
    ]
    if commands:
        lines.append(".SH COMMANDS")
        for name_of_it in commands:
            lines += _item(f"\\fBpostcopy\\-{name_of_it}\\fR(1)", COMMANDS[name_of_it].help)
    lines.append(".SH OPTIONS")
    lines += _options(parser)
    if not commands and parser.subcommands:
        lines.append(".SH REQUESTS" if parser.subcommand_is == "REQUEST" else ".SH COMMANDS")
        for name_of_it, command in parser.subcommands.items():
            lines += [f".SS {_text(name_of_it)}", _text(command.description or ""), ".PP", _synopsis(command)]
            lines += _options(command, parser)
    if parser.examples:
        lines.append(".SH EXAMPLES")
        for what, line in parser.examples:
            lines += [".PP", _text(what)] if what else []
            lines += [".PP", ".EX", *(f"    {_text(one)}" for one in line.splitlines()), ".EE"]
    lines.append(".SH EXIT STATUS")
    for status, what in _EXIT_STATUS:
        lines += _item(f"\\fB{status}\\fR", what)
    if commands:
        lines += [
            ".SH FILES",
            *_item(f"\\fI{_text(DEFAULT_CONTROL)}\\fR", "default control socket of `postcopy daemon`"),
        ]
    others = ["postcopy", *(f"postcopy-{command}" for command in COMMANDS)]
    lines += [".SH SEE ALSO", _references(one for one in others if one != name)]
    return "\n".join(lines) + "\n"


def _synopsis(parser: Parser) -> str:
    words = " ".join(parser.short_usage().split())
    return f"\\fB{_text(parser.prog)}\\fR {_text(words.removeprefix(parser.prog).strip())}"


def _options(parser: Parser, above: Parser | None = None) -> Iterator[str]:
    """Group by group, but for those that the command `above` has."""
    for title, arguments in parser.sections(above):
        if title:
            yield f".SS {_text(title.capitalize())}"
        for argument in arguments:
            names = ", ".join(f"\\fB{_text(name)}\\fR" for name in argument.names)
            value = argument.value and f"\\fI{_text(argument.value)}\\fR"
            yield from _item(" ".join(filter(None, (names, value))), argument.help)


def _item(term: str, text: str) -> list[str]:
    return [".TP", term, _text(text)]


def _references(names: Iterable[str]) -> str:
    return ",\n".join(f"\\fB{_text(name)}\\fR(1)" for name in names)


def _text(text: str) -> str:
    """With what groff would take for its own escaped; what is in backquotes is bold."""
    text = (
        text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("^", "\\(ha").replace("~", "\\(ti")
    )
    text = re.sub(r"`([^`]*)`", r"\\fB\1\\fR", text)
    return re.sub(r"^\.", r"\\&.", text)
