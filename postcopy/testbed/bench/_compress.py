# SPDX-License-Identifier: Apache-2.0
"""Compression of what is pushed, over slow wires: two hosts of a laboratory whose cable has a limit (tbf), the same
memory with and without compression by turns. The sides are those of `_bulk`."""

from __future__ import annotations

from functools import partial

import trio

from postcopy.records.results import Measurement
from postcopy.testbed.bench._bulk import Take, open_sides
from postcopy.testbed.bench._common import by_turns, ratio
from postcopy.testbed.lab import LabPlan, open_lab
from postcopy.units import format_size

CHANNELS = 2
SPEEDS = {"100 Mbit/s": (12_500_000, 24 << 20), "1 Gbit/s": (125_000_000, 192 << 20)}
"""Bytes a second of the cable, and the memory that is sent over it: two seconds of it."""
CONTENTS = {"random": "incompressible", "text": "compressible"}
COMPRESS = ("off", "lz4", "zstd", "auto")


async def measure_compress(rounds: int) -> list[Measurement]:
    """``auto`` against ``off``: never slower, and by how much faster."""
    figures = []
    async with open_lab(LabPlan("bench-compress")) as lab:
        source, destination = lab.host("h1"), lab.host("h2")
        for speed, (rate, size_bytes) in SPEEDS.items():
            await trio.to_thread.run_sync(source.limit, rate)
            for content, name in CONTENTS.items():
                where = (source.command, destination.command)
                async with open_sides(size_bytes, CHANNELS, where=where, host=source.ipv4, content=content) as sides:
                    parts = {how: partial(sides.take, Take("engine", how)) for how in COMPRESS}
                    turns = await by_turns(rounds, parts)
                values = [{how: take["bytes-per-s"] / 1e6 for how, take in turn.items()} for turn in turns]
                note = f"{format_size(size_bytes)} of content, {CHANNELS} channels; within 2 % they are the same"
                what = f"{name} memory over {speed}, compress auto / off"
                figures.append(ratio(what, values, "auto", "off", 0.98, at_most=False, unit="MB/s", note=note))
    return figures
