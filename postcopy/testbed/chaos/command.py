# SPDX-License-Identifier: Apache-2.0
"""`postcopy chaos`: the bad network by hand, between any two programs."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import trio

from postcopy._stop import Stop
from postcopy.output import Output
from postcopy.records import Record, as_json
from postcopy.records.commands import ChaosListening, ChaosResult
from postcopy.service import options
from postcopy.service.options import Group, Option
from postcopy.testbed.chaos import KINDS, ChaosPlan, open_chaos_proxy
from postcopy.testbed.chaos._proxy import Statistics

OPTIONS = (
    Group(
        "",
        Option(
            "plan",
            f"{', '.join(KINDS)}; or in detail, as cut:every=0.1..0.5,down=0.2 (default: cut)",
            "PLAN",
            nargs="?",
            positional=True,
        ),
        replace(options.LISTEN, help="take connections at this address; port 0: any free port", required=True),
        replace(options.CONNECT, name="to", help="carry them to this address", required=True),
        replace(options.SEED, help="makes the plan's random choices the same in each run (default: random)"),
    ),
    options.LOGGING,
)


def parse_plan(text: str, given: dict[str, Any]) -> ChaosPlan:
    return ChaosPlan.parse(text, given["seed"] if "seed" in given else secrets.randbits(32))


def make(given: dict[str, Any], output: Output) -> Callable[[Stop], Awaitable[bool]]:
    """Carries connections, as badly as the plan says, until it is interrupted."""
    plan = parse_plan(given.get("plan", "cut"), given)
    listen, target = given["listen"], given["to"]

    async def run(stop: Stop) -> bool:
        began_s = trio.current_time()

        def log(event: str, record: Record) -> None:
            output.emit(event, record)
            words = ", ".join(f"{name} {value}" for name, value in as_json(record).items() if name != "side")
            output.say(f"{trio.current_time() - began_s:9.3f} s  {event}: {words}")

        async with open_chaos_proxy(target, plan, listen=listen, log=log) as proxy:
            address = str(proxy.address)
            log("listening", ChaosListening(side="chaos", address=address, to=str(target), seed=plan.seed))
            await stop.wait()
            output.emit("result", _result(plan, proxy.statistics))
        return True

    return run


def _result(plan: ChaosPlan, counted: Statistics) -> ChaosResult:
    return ChaosResult(
        side="chaos",
        seed=plan.seed,
        connections=counted.connections,
        refused=counted.refused,
        cuts=counted.by_way,
        bytes_out=counted.bytes_out,
        bytes_back=counted.bytes_back,
        flipped=counted.flipped,
    )
