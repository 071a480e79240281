# SPDX-License-Identifier: Apache-2.0
"""`postcopy merge`: joins what both sides of a lost migration have salvaged."""

from __future__ import annotations

from functools import partial
from typing import Any

import trio

from postcopy._blocking import run_sync
from postcopy._writer import Kind
from postcopy.cli._operated import Run
from postcopy.migration import salvage
from postcopy.migration.tasks import Interrupted
from postcopy.output import Output
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


class MergeCommand:
    """Joins salvages, and says exactly what nobody can speak for."""

    def __init__(self, paths: list[str], image: str | None, directory: str | None, output: Output) -> None:
        """Into an image, or into a directory that a machine can be started from."""
        self._paths = paths
        self._image = image
        self._directory = directory
        self._output = output

    async def run(self, stop: trio.Event) -> bool:
        """True when no page is in doubt, and a machine could be started from what was to be one. What was made is there
        in either case, but not when it was interrupted."""
        merged = await self._merge(stop)
        target = self._image if self._image is not None else self._directory
        self._output.emit(
            "result",
            {
                "image": self._image,
                "directory": self._directory,
                "from-dest": merged.from_dest_bytes,
                "from-source": merged.from_source_bytes,
                "in-doubt": merged.doubtful_bytes,
                "ranges-in-doubt": merged.doubtful,
                "torn": merged.torn,
                "state": merged.has_state,
            },
        )
        self._output.say(
            f"merge: {target}: {merged.from_dest_bytes} bytes of the destination,"
            f" {merged.from_source_bytes} of the source, {merged.doubtful_bytes} in doubt"
        )
        for item in merged.doubtful:
            self._output.say(
                f"merge: in doubt: block {item['block']}, pages {item['first-page']}"
                f" to {item['first-page'] + item['pages'] - 1} of {item['page-bytes']} bytes",
                Kind.LOG,  # ten thousand of them, all in the result
            )
        if merged.torn:
            self._output.say("merge: the destination's machine ran on while it was salvaged: its pages may be torn")
        startable = merged.has_state or self._directory is None
        if not startable:
            self._output.say("merge: there is no state of the machine's devices: it cannot be started from there")
        return not merged.doubtful_bytes and not merged.torn and startable

    async def _merge(self, stop: trio.Event) -> salvage.Merged:
        """`Interrupted` by `stop`: nothing is left of it then."""

        def give_up() -> None:
            if stop.is_set():
                raise Interrupted("interrupted; nothing was written")

        return await run_sync(partial(salvage.merge, self._paths, self._image, self._directory, give_up=give_up))
