# SPDX-License-Identifier: Apache-2.0
"""A real QEMU at the source: what it is, that it goes on from each step of the pause, and what is refused."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from postcopy.errors import ConfigurationError, MigrationError
from postcopy.machines import MachineState
from postcopy.machines.qemu import source
from postcopy.machines.qemu.source import QemuMachine
from postcopy.testbed.qemu import Qemu

pytestmark = [pytest.mark.needs("qemu"), pytest.mark.slow]

BOUND_S = 60.0
APPEND = "pages=512 spread=1"
MIB = 32


@pytest.fixture(scope="module")
def qemu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Qemu]:
    """Its disk is O_DIRECT."""
    disk = tmp_path_factory.mktemp("disk") / "disk"
    disk.touch()
    os.truncate(disk, 64 << 20)
    with Qemu.start(MIB, APPEND, disk=disk) as started:
        started.wait_passes(1)
        yield started
        assert [line.values["errors"] for line in started.wait_passes(2)][-1] == 0


async def test_what_it_is(qemu: Qemu) -> None:
    with trio.fail_after(BOUND_S):
        async with QemuMachine.create(qemu.qmp_path) as machine:
            await machine.prepare()
            config = machine.config()
            assert (config["machine"], config["accelerator"], config["vcpus"]) == ("microvm", "tcg", 1)
            status = os.stat(qemu.ram_paths[0])
            assert config["files"] == [{"device": status.st_dev, "inode": status.st_ino}]
            assert machine._seen.has_disks
            assert [(block.name, block.memory.size_bytes) for block in machine.blocks] == [("ram0", MIB << 20)]
            assert machine.process == (qemu.pid, qemu.qmp_path)


async def test_it_goes_on_after_the_pause(qemu: Qemu) -> None:
    with trio.fail_after(BOUND_S):
        async with QemuMachine.create(qemu.qmp_path) as machine:
            await machine.prepare()
            for _ in range(3):
                await machine.before_pause()
                await machine.pause()
                assert machine.statistics().state is MachineState.PAUSED
                assert await trio.to_thread.run_sync(qemu.status) in ("finish-migrate", "postmigrate")
                state = await machine.save_state()
                assert 10_000 < len(state) < 1 << 20
                assert state.endswith(b"\x06" + bytes(4))
                block, content = machine.blocks[0].memory, machine.blocks[0].memory.digest()
                await trio.sleep(0.01)
                assert block.digest() == content
                await machine.resume()
                await trio.to_thread.run_sync(qemu.wait_passes, 1)


async def test_it_goes_on_wherever_the_pause_is_given_up(qemu: Qemu) -> None:
    chosen = random.Random(16)
    with trio.fail_after(BOUND_S):
        async with QemuMachine.create(qemu.qmp_path) as machine:
            await machine.prepare()
            before = await machine._capabilities()
            given_up = 0
            for _ in range(25):
                with trio.move_on_after(chosen.uniform(0, 0.02)) as scope:
                    await machine.before_pause()
                    await machine.pause()
                    await machine.save_state()
                given_up += scope.cancelled_caught
                await machine.resume()
                assert await machine._status() == "running"
                assert await machine._capabilities() == before
            assert given_up
            await trio.to_thread.run_sync(qemu.wait_passes, 1)


async def test_a_state_that_is_too_long(qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_STATE_BYTES", 10_000)
    with trio.fail_after(BOUND_S):
        async with QemuMachine.create(qemu.qmp_path) as machine:
            await machine.prepare()
            with pytest.raises(MigrationError, match="is longer than"):
                await machine.pause()
            assert await machine._status() == "running"


async def test_its_disk_is_at_rest_for_a_look(qemu: Qemu) -> None:
    with trio.fail_after(BOUND_S):
        async with QemuMachine.create(qemu.qmp_path) as machine:
            await machine.prepare()
            assert [os.path.basename(file) for file in machine._seen.pins] == ["disk"]
            for _ in range(5):
                async with machine.settled():
                    assert await machine._status() == "paused"
                assert await machine._status() == "running"


async def test_one_that_has_left_ends_in_good_order(tmp_path: Path) -> None:
    with Qemu.start(MIB, APPEND, arguments=["-pidfile", str(tmp_path / "pid")]) as qemu:
        qemu.wait_ready()
        with trio.fail_after(BOUND_S):
            machine = QemuMachine.create(qemu.qmp_path)
            await machine.prepare()
            await machine.pause()
            await machine.save_state()
            await machine.destroy()
            assert await trio.to_thread.run_sync(qemu.process.wait, BOUND_S) == 0
    assert not (tmp_path / "pid").exists()


FILE = "memory-backend-file,share=on"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"backends": ("memory-backend-ram",)},
            "64 MiB .ram0. is private.*-object memory-backend-file,id=ram0,.*share=on",
        ),
        ({"backends": ("memory-backend-ram,share=on",)}, "is a memory-backend-ram"),
        ({"machine": "pc", "arguments": ("-device", "VGA,vgamem_mb=64")}, "vga.vram.*vgamem_mb=16"),
        ({"arguments": ("-S",)}, "prelaunch"),
        ({"incoming": True}, "waits for a guest"),
    ],
)
async def test_what_is_refused(options: dict[str, Any], why: str) -> None:
    with Qemu.start(64, APPEND, **options) as qemu, trio.fail_after(BOUND_S):
        async with QemuMachine.create(qemu.qmp_path) as machine:
            with pytest.raises(ConfigurationError, match=why):
                await machine.prepare()


@pytest.mark.parametrize(
    ("machine", "backends", "names"),
    [
        ("pc", (FILE, FILE), ["ram0", "ram1"]),
        ("microvm", (f"{FILE},mem-path=/dev/shm",), ["ram0"]),
        ("microvm", ("memory-backend-memfd,share=on",), ["ram0"]),
    ],
)
async def test_memory_is_found_by_its_mappings(machine: str, backends: tuple[str, ...], names: list[str]) -> None:
    """Also where its file has no name any more."""
    with Qemu.start(MIB, APPEND, machine=machine, backends=backends) as qemu, trio.fail_after(BOUND_S):
        qemu.wait_passes(1)
        async with QemuMachine.create(qemu.qmp_path) as moved:
            await moved.prepare()
            assert [block.name for block in moved.blocks] == names
            assert sum(block.memory.size_bytes for block in moved.blocks) == MIB << 20
            assert all(block.memory.present().count() for block in moved.blocks[:1])
            await moved.pause()
            await moved.resume()
        qemu.wait_passes(1)
