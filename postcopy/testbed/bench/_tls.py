# SPDX-License-Identifier: Apache-2.0
"""What TLS costs, each time against the same without: a fault, the push, and coming back."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import trio

from postcopy.records.results import Measurement
from postcopy.testbed._scratch import scratch
from postcopy.testbed.bench._bulk import SIZE_BYTES, Take, open_sides
from postcopy.testbed.bench._common import by_turns, ratio, side_by_side, touch
from postcopy.testbed.bench._recovery import first_page_ms, open_running_machine, recovery_times_ms, tail
from postcopy.testbed.bench._worker import ADDRESS
from postcopy.testbed.chaos import ChaosPlan
from postcopy.tls import _authority

CUTS = 10  # a round
BEFORE_PAGES_BYTES = 16384  # more than the handshakes of four connections and all that is said before pages
ROUND_TRIP_S = 0.2
LASTS_S = 1.2  # what a recovery has to last for, for the next one to begin without a pause (docs/protocol.md)
TRIES = 5


async def measure_tls(rounds: int) -> list[Measurement]:
    """All of it, with certificates that are made for it."""
    with _certificates() as tls:
        return [
            await _fault(rounds, tls, "sleeping", 0, 1.10),
            await _fault(rounds, tls, "busy polling", 200, None),
            *await _bulk(rounds, tls),
            await _recovery(rounds, tls),
            await _round_trips(rounds, tls),
        ]


@contextmanager
def _certificates() -> Iterator[str]:
    """A directory with those of one host, which both sides use."""
    with scratch() as directory:
        _authority.new_authority(f"{directory}/ca")
        _authority.issue(f"{directory}/ca", [ADDRESS], f"{directory}/host", days=1)
        yield f"{directory}/host"


async def _fault(rounds: int, tls: str, how: str, busy_poll_us: int, target: float | None) -> Measurement:
    parts = {
        name: partial(touch, "engine", 64 << 20, touches=4000, busy_poll_us=busy_poll_us, tls=each)
        for name, each in (("plain", ""), ("tls", tls))
    }
    values = [side_by_side(turn["tls"], turn["plain"], "plain-") for turn in await by_turns(rounds, parts)]
    return ratio(f"fault p50, {how}, TLS / plain", values, "p50", "plain-p50", target)


async def _bulk(rounds: int, tls: str) -> list[Measurement]:
    """The push on as many connections as there are processors, and the processor time of both sides."""
    channels = len(os.sched_getaffinity(0))
    async with open_sides(SIZE_BYTES, channels) as sides:
        parts = {name: partial(sides.take, Take("engine", tls=each)) for name, each in (("tls", tls), ("plain", ""))}
        for part in parts.values():
            await part()
        turns = await by_turns(rounds, parts)
    values = [
        {name: take["bytes-per-s"] / 1e9 for name, take in turn.items()}
        | {f"{name}, {side}": take[f"{side}-cpu-s"] for name, take in turn.items() for side in ("source", "dest")}
        for turn in turns
    ]
    units = {name: "s" for name in values[0] if "," in name}
    name = f"bulk push, {channels} channels, TLS / plain"
    note = "with the processor time that source and destination took for it"
    return [ratio(name, values, "tls", "plain", 0.6, at_most=False, note=note, unit="GB/s", units=units)]


async def _recovery(rounds: int, tls: str) -> Measurement:
    options = ("--tls", tls)
    found = [await recovery_times_ms(CUTS, number, options, BEFORE_PAGES_BYTES) for number in range(rounds)]
    return tail("first page after the network's return with TLS", found)


async def _round_trips(rounds: int, tls: str) -> Measurement:
    """From a cut to the first page, over a network on which every byte takes half of ROUND_TRIP_S: what TLS makes
    longer is a whole number of those and, beside it, what is computed."""

    async def median_ms(*options: str) -> float:
        times_ms = []
        async with open_running_machine(ChaosPlan(seed=1, delay_s=ROUND_TRIP_S / 2), options) as proxy:
            for _ in range(TRIES):
                await trio.sleep(LASTS_S)
                times_ms.append(await first_page_ms(proxy, proxy.cut, BEFORE_PAGES_BYTES))
        return statistics.median(times_ms)

    values = await by_turns(rounds, {"tls": partial(median_ms, "--tls", tls), "plain": partial(median_ms)})
    values = [each | {"added": (each["tls"] - each["plain"]) / (ROUND_TRIP_S * 1e3)} for each in values]
    note = f"a round trip takes {ROUND_TRIP_S * 1e3:g} ms; up to 0.1 of one is taken for processor time"
    name = "round trips that TLS adds to a recovery"
    return ratio(name, values, "added", None, 1.1, unit="ms", units={"added": "round trips"}, note=note)
