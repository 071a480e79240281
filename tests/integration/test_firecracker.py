# SPDX-License-Identifier: Apache-2.0
"""A real Firecracker, with our guest in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from postcopy.testbed.firecracker import ApiError, Firecracker

pytestmark = pytest.mark.needs("firecracker")


def test_guest_checks_its_memory_and_follows_the_balloon(tmp_path: Path) -> None:
    """What the other tests rely on: it counts, finds what is wrong, and says what came back from the balloon."""
    state, memory = tmp_path / "state", tmp_path / "memory"
    with Firecracker.start() as vm:
        vm.boot(64, "wait=1 pages=1024", balloon=True)
        assert vm.wait_ready().values["pages"] == 1024
        first, second = vm.order("w"), vm.order("r")
        assert (first.values["touched"], second.values["touched"]) == (1024, 2048)
        vm.inflate(2)
        taken = vm.order("w")
        assert (taken.values["ballooned"], taken.values["touched"]) == (512, 2048 + 512)
        vm.inflate(0)
        back = vm.order("w")
        assert (back.values["ballooned"], back.values["errors"], back.values["stale"]) == (0, 0, 0)
        vm.pause()
        assert vm.state() == "Paused"
        vm.snapshot(state, memory)
    # Of the memory file one page is lost, and one is an older one: both are found, once each.
    content = bytearray(memory.read_bytes())
    page = [at for at in range(4 << 20, 8 << 20, 4096) if any(content[at : at + 8])][:2]
    content[page[0] : page[0] + 4096] = bytes(4096)
    content[page[1]] ^= 1
    memory.write_bytes(content)
    with Firecracker.start() as vm:
        vm.load(state, memory=memory, resume=True)
        line = vm.order("r")
        assert line.values["errors"] == 4  # three words, and one
        assert [one.kind for one in vm.lines()].count("wrong") == 4
        with pytest.raises(ApiError, match="400"):
            vm.snapshot(state, memory)
