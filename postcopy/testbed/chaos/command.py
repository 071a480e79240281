# SPDX-License-Identifier: Apache-2.0
"""`postcopy chaos`: the bad network by hand, between any two programs."""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from typing import Any

import trio

from postcopy.errors import ResourceError
from postcopy.output import Output
from postcopy.service import options
from postcopy.service.options import Group, Option
from postcopy.testbed.chaos import KINDS, ChaosPlan, open_chaos_proxy

OPTIONS = (
    Group(
        "",
        Option("plan", f"{', '.join(KINDS)} (default: cut)", "PLAN", nargs="?", positional=True),
        replace(options.LISTEN, help="where the one side connects; port 0: any", required=True),
        replace(options.CONNECT, name="to", help="where the other side listens", required=True),
        replace(options.SEED, help="repeats what was drawn (default: random)"),
    ),
    options.OUTPUT,
)


def parse_plan(text: str, given: dict[str, Any]) -> ChaosPlan:
    return ChaosPlan.parse(text, given["seed"] if "seed" in given else secrets.randbits(32))


def make(given: dict[str, Any], output: Output) -> Callable[[trio.Event], Awaitable[bool]]:
    """Carries connections, as badly as the plan says, until it is interrupted."""
    plan = parse_plan(given.get("plan", "cut"), given)
    listen, target = given["listen"], given["to"]

    async def run(stop: trio.Event) -> bool:
        began_s = trio.current_time()

        def log(event: str, fields: dict[str, object]) -> None:
            output.emit(event, fields)
            words = ", ".join(f"{name} {value}" for name, value in fields.items())
            output.say(f"{trio.current_time() - began_s:9.3f} s  {event}: {words}")

        try:
            async with open_chaos_proxy(target, plan, listen=listen, log=log) as proxy:
                log("listening", {"address": str(proxy.address), "to": str(target), "seed": plan.seed})
                await stop.wait()
                output.emit("result", {"seed": plan.seed, **asdict(proxy.statistics)})
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise ResourceError(f"cannot listen on {listen}: {reason}", "choose another address or port") from error
        return True

    return run
