# SPDX-License-Identifier: Apache-2.0
"""`postcopy merge`: joins what both sides of a lost migration have salvaged, and says exactly which pages are in
doubt."""

from __future__ import annotations

from functools import partial
from typing import Any

from msgspec import convert

from postcopy._blocking import run_sync
from postcopy._stop import Stop
from postcopy.cli.sides import Run
from postcopy.migration import salvage
from postcopy.migration.tasks import Interrupted
from postcopy.output import Kind, Output
from postcopy.records.commands import DoubtfulRange, MergeResult
from postcopy.service.options import OUTPUT, Group, OneOf, Option, parse_path, path

# fmt: off
OPTIONS = (
    Group("",
          Option("salvages", "written by --salvage: of the source, the destination, or both", "DIR", parse_path,
                 nargs="+", positional=True),
          OneOf(path("output", "the image, sparse: one RAM block after the other"),
                path("into", "a new directory, with all that is there of the machine, for `postcopy source --from`",
                     "DIR"))),
    OUTPUT,
)
# fmt: on


def make(given: dict[str, Any], output: Output) -> Run:
    return partial(merge, given["salvages"], given.get("output"), given.get("into"), output)


async def merge(paths: list[str], image: str | None, directory: str | None, output: Output, stop: Stop) -> bool:
    """Into an image, or into a directory that a machine can be started from. True when no page is in doubt, and a
    machine could be started from what was to be one. What was made is there in either case, but not when it was
    interrupted."""

    def give_up() -> None:
        if stop.is_set():
            raise Interrupted("interrupted; nothing was written")

    merged = await run_sync(partial(salvage.merge, paths, image, directory, give_up=give_up))
    output.emit(
        "result",
        MergeResult(
            side="merge",
            image=image,
            directory=directory,
            from_dest=merged.from_dest_bytes,
            from_source=merged.from_source_bytes,
            in_doubt=merged.doubtful_bytes,
            ranges_in_doubt=convert(merged.doubtful, list[DoubtfulRange]),
            torn=merged.torn,
            device_state=merged.has_state,
        ),
    )
    output.say(
        f"merge: {directory if image is None else image}: {merged.from_dest_bytes} bytes of the destination,"
        f" {merged.from_source_bytes} of the source, {merged.doubtful_bytes} in doubt"
    )
    for item in merged.doubtful:
        output.say(
            f"merge: in doubt: block {item['block']}, pages {item['first-page']}"
            f" to {item['first-page'] + item['pages'] - 1} of {item['page-bytes']} bytes",
            Kind.LOG,  # ten thousand of them, all in the result
        )
    if merged.torn:
        output.say("merge: the destination's machine ran on while it was salvaged: its pages may be torn")
    startable = merged.has_state or directory is None
    if not startable:
        output.say("merge: there is no state of the machine's devices: it cannot be started from there")
    return not merged.doubtful_bytes and not merged.torn and startable
