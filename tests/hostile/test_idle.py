# SPDX-License-Identifier: Apache-2.0
"""An attachment that is left alone for many heartbeats costs nothing, and is never cut."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from hostile._program import MIB, Program, python

Start = Callable[..., Program]

SCRIPT = """
import sys, trio, postcopy
async def main():
    async with postcopy.attach(sys.argv[1]) as memory:
        first = await memory.read(0, 4096)
        print("attached", flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        last = await memory.read(8 << 20, 4096)
        sys.stdout.buffer.write(first + last)
        print("lost" if memory.failure else "kept", file=sys.stderr)
trio.run(main)
"""
HEARTBEATS = 10
HEARTBEAT_S = 1


def watch(source: Program, for_s: float) -> None:
    """Its peer is not lost for so long."""
    end = time.monotonic() + for_s
    while time.monotonic() < end:
        statuses = {line["status"] for line in source.lines() if "status" in line}
        assert not statuses & {"postcopy-paused", "postcopy-recover"}, f"{statuses}\n{source.errors()[-2000:]}"
        time.sleep(0.1)


def test_attachment_that_is_left_alone(start: Start, tmp_path: Path) -> None:
    content = os.urandom(16 * MIB)  # more than fits into the sockets of channels that are not read
    (tmp_path / "image").write_bytes(content)
    image = ("--machine", "image", "--image", tmp_path / "image", "--serve", "forever", "-v")
    source = start("source", "--json", *image, "--listen", "127.0.0.1:0", "--heartbeat", str(HEARTBEAT_S))
    reading, writing = os.pipe()
    with open(writing, "wb", buffering=0) as say:
        client = start("-P", "-c", SCRIPT, source.where, argv=[python()], stdin=reading)
        os.close(reading)
        source.wait_status("postcopy-active")
        # Nothing is said meanwhile, since nothing changes.
        watch(source, HEARTBEATS * HEARTBEAT_S)
        cpu_s = client.cpu_s() + source.cpu_s()
        watch(source, 4)
        cpu_s = client.cpu_s() + source.cpu_s() - cpu_s
        # Before the client leaves: that is a loss for a source that serves forever, and meant.
        say.write(b"go on\n")
    assert client.end() == 0, client.errors()
    assert cpu_s < 2.0
    assert "kept\n" in client.errors()
