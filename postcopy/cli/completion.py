# SPDX-License-Identifier: Apache-2.0
"""`postcopy completion`: a script that teaches a shell the commands, options and values, made by shtab of the parsers.

The script knows everything by itself: nothing of postcopy runs when Tab is pressed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from postcopy.cli._parser import make_parser
from postcopy.service.options import Group, choice

SHELLS = ("bash", "zsh", "fish")
OPTIONS = (Group("", replace(choice("shell", SHELLS, "bash, zsh or fish"), metavar="SHELL", positional=True)),)


def run(args: argparse.Namespace) -> int:
    """Prints it."""
    import shtab

    parser = make_parser(None)
    for command in parser.walk():
        for action in command._actions:
            # On a parser that parses nothing, so that what is said of values does not limit them.
            if words := getattr(action, "words", ()):
                action.choices = words
            kind = str(action.metavar)
            _, dot, suffix = kind.rpartition(".")
            if kind in ("FILE", "PATH", "DIR") or (dot and suffix.isalpha()):  # as A.jsonl
                action.complete = shtab.DIRECTORY if kind == "DIR" else shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell))
    return 0
