# SPDX-License-Identifier: Apache-2.0
"""`postcopy merge`: joins what both sides of a lost migration have salvaged, and says exactly which pages are in
doubt."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any

from msgspec import convert

from postcopy._blocking import run_sync
from postcopy._stop import Stop
from postcopy.cli.sides import Run
from postcopy.migration import salvage
from postcopy.migration.salvage import MAX_RANGES
from postcopy.migration.tasks import Interrupted
from postcopy.output import Kind, Output
from postcopy.records.commands import DoubtfulRange, MergeResult
from postcopy.service.options import LOGGING, Group, OneOf, Option, parse_path, path
from postcopy.units import format_size

# fmt: off
OPTIONS = (
    Group("",
          Option("salvages", "directory that --salvage has written: the source's, the destination's, or both", "DIR",
                 parse_path, nargs="+", positional=True),
          OneOf(path("output", "write a memory image (sparse): one RAM block after the other"),
                path("into", "write a new directory with all that was salvaged of the machine, for `postcopy source"
                     " --from`", "DIR"))),
    LOGGING,
)
# fmt: on


def make(given: dict[str, Any], output: Output) -> Run:
    all_ranges = given.get("log_level") in ("info", "debug")  # --verbose
    return partial(merge, given["salvages"], given.get("output"), given.get("into"), all_ranges, output)


async def merge(
    paths: list[str], image: str | None, directory: str | None, all_ranges: bool, output: Output, stop: Stop
) -> bool:
    """Into an image, or into a directory that a machine can be started from. True when no page is in doubt, and a
    machine could be started from what was to be one. What was made is there in either case, but not when it was
    interrupted. People are told the ranges in doubt block by block, or `all_ranges`; the result has all of them."""

    def give_up() -> None:
        if stop.is_set():
            raise Interrupted("interrupted; nothing was written")

    merged = await run_sync(partial(salvage.merge, paths, image, directory, give_up=give_up))
    output.emit(
        "result",
        MergeResult(
            side="merge",
            migration_id=merged.migration_id,
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
        f"merge: {directory if image is None else image}: {format_size(merged.from_dest_bytes)} from the destination,"
        f" {format_size(merged.from_source_bytes)} from the source, {format_size(merged.doubtful_bytes)} in doubt"
    )
    for line in _in_doubt(merged.doubtful, all_ranges):
        output.say(f"merge: in doubt: {line}", Kind.LOG)
    if merged.torn:
        output.say("merge: the destination's machine ran on while it was salvaged: its pages may be torn")
    startable = merged.has_state or directory is None
    if not startable:
        output.say("merge: the state of the machine's devices is missing: the machine cannot be started from it")
    return not merged.doubtful_bytes and not merged.torn and startable


def _in_doubt(ranges: list[dict[str, Any]], all_ranges: bool) -> Iterator[str]:
    """A line for each of the ranges, or for each block."""
    for block, found in groupby(ranges, lambda one: one["block"]):
        of_block = list(found)
        first, last = of_block[0], of_block[-1]
        if all_ranges or len(of_block) == 1:
            for one in of_block:
                end = one["first-page"] + one["pages"] - 1
                yield f"block {block}, pages {one['first-page']} to {end} of {format_size(one['page-bytes'])}"
            continue
        pages, end = sum(one["pages"] for one in of_block), last["first-page"] + last["pages"] - 1
        more = "at least " if len(ranges) == MAX_RANGES else ""
        yield (
            f"block {block}, {more}{pages} pages of {format_size(first['page-bytes'])} in {len(of_block)} ranges, from"
            f" page {first['first-page']} to {end}; --verbose lists them"
        )
