# SPDX-License-Identifier: Apache-2.0
"""`postcopy schema`: what the lines of `--json`, `--log-json` and the control socket have in them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from postcopy import __version__
from postcopy._stop import Stop
from postcopy.output import Output
from postcopy.service.options import Group, flag

OPTIONS = (Group("", flag("markdown", "print a page for people instead of JSON Schema")),)


def make(given: dict[str, Any], output: Output) -> Callable[[Stop], Awaitable[bool]]:
    async def run(stop: Stop) -> bool:
        from postcopy.records.document import document, markdown  # some megabytes that nothing else needs

        await trio.lowlevel.checkpoint()
        print(markdown() if "markdown" in given else json.dumps(document(__version__), indent=2))
        return True

    return run
