# SPDX-License-Identifier: Apache-2.0
"""Memory pushed over loopback TCP, against one iperf3 stream."""

from __future__ import annotations

import json
import shutil
import socket
import time

import trio

from postcopy.errors import MigrationError, ResourceError
from postcopy.migration.source import DEFAULT_BULK_CHANNELS
from postcopy.testbed._processes import open_child
from postcopy.testbed.bench._common import Figure, ratio, warm_pair


async def _iperf3_bytes_per_s(size_bytes: int) -> float:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        where = ("127.0.0.1", "-p", str(probe.getsockname()[1]))
    async with open_child(["iperf3", "-s", "-1", "-B", *where]):
        deadline_s = time.monotonic() + 10
        while True:
            command = ["iperf3", "-c", *where, "-n", str(size_bytes), "-J"]
            done = await trio.run_process(command, capture_stdout=True, check=False)
            result = json.loads(done.stdout)
            if "error" not in result:
                return float(result["end"]["sum_received"]["bits_per_second"]) / 8
            if time.monotonic() > deadline_s:  # refused until the server listens
                raise MigrationError(f"iperf3 failed: {result['error']}")


async def measure_throughput(rounds: int) -> list[Figure]:
    """Pushed memory against one iperf3 stream."""
    if not shutil.which("iperf3"):
        raise ResourceError("iperf3 is not installed", "apt-get install iperf3")
    size_bytes = 1 << 30

    async def iperf3() -> float:
        return await _iperf3_bytes_per_s(size_bytes) / 1e9

    async def engine() -> float:
        return float((await warm_pair("engine", size_bytes, bulk_channels=DEFAULT_BULK_CHANNELS))["bytes-per-s"]) / 1e9

    values = []
    for number in range(rounds):
        parts = [("engine", engine), ("iperf3", iperf3)]
        # Each goes first in half of the rounds: a host that lends its processors for a while and then slows them down
        # would otherwise decide.
        values.append({name: await measure() for name, measure in (parts if number % 2 else reversed(parts))})
    name = f"background throughput, {DEFAULT_BULK_CHANNELS} channels / one iperf3 stream"
    return [ratio(name, values, "engine", "iperf3", 0.5, at_most=False, unit="GB/s")]
