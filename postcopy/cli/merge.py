# SPDX-License-Identifier: Apache-2.0
"""`postcopy merge`: from what was given to what runs."""

from __future__ import annotations

from typing import Any

from postcopy.cli._operated import Run
from postcopy.output import Output
from postcopy.service.commands import MergeCommand
from postcopy.service.options import OUTPUT, Group, OneOf, Option, parse_path, path

OPTIONS = (
    Group(
        (
            Option(
                "salvages",
                "written by --salvage: of the source, the destination, or both",
                "DIR",
                parse_path,
                nargs="+",
                positional=True,
            ),
            OneOf(
                (
                    path("output", "the image, sparse: one RAM block after the other"),
                    path(
                        "into",
                        "a new directory, with all that is there of the machine, for `postcopy source --from`",
                        "DIR",
                    ),
                )
            ),
        )
    ),
    OUTPUT,
)


def make(given: dict[str, Any], output: Output) -> Run:
    return MergeCommand(given["salvages"], given.get("output"), given.get("into"), output).run
