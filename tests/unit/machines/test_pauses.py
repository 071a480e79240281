# SPDX-License-Identifier: Apache-2.0
"""What a machine does in the pause of a migration, and just before it: no test here is about how long that takes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
from machines import copy_memory, twin_of

from postcopy.dataplane.pager import Pager
from postcopy.errors import MigrationError, ResourceError
from postcopy.machines import Machine, MachineState
from postcopy.machines.kinds import MachineOptions, create_source
from postcopy.machines.toy import machine as toy
from postcopy.machines.toy.machine import ToyMachine
from postcopy.memory.bitmap import Bitmap

MIB = 1 << 20
KINDS = [pytest.param("kvm", marks=pytest.mark.needs("kvm")), "rv64"]


@asynccontextmanager
async def running(kind: str, workload: str = "dirty") -> AsyncIterator[ToyMachine]:
    options = MachineOptions(memory_bytes=16 * MIB, vcpus=2, workload=workload, seed=5, used_memory_bytes=2 * MIB)
    async with create_source(kind, options) as machine:
        assert isinstance(machine, ToyMachine)
        await machine.boot()
        await machine.resume()
        with trio.fail_after(60):
            await machine.wait_ready()
        yield machine


@pytest.mark.parametrize("kind", KINDS)
async def test_a_vcpu_that_takes_its_time_is_waited_for_in_a_thread(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one in a disk transfer. The first attempt, in the Trio thread, then leaves the machine running."""
    monkeypatch.setattr(toy, "BRIEF_S", 0.0)
    async with running(kind) as machine:
        for _ in range(20):
            await machine.pause()
            assert machine.statistics().state is MachineState.PAUSED
            check = await machine.verify()
            assert check.ok, check.what
            await machine.resume()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_state_that_is_larger_than_was_thought(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(kind) as machine:
        await machine.pause()
        monkeypatch.setattr(toy, "_STATE_BYTES", 1)
        state = await machine.save_state()
        async with twin_of(machine) as twin:
            await twin.load_state(state)
            copy_memory(machine, twin)
            check = await twin.verify()
            assert check.ok, check.what


def run_into_missing_memory(kind: str) -> None:
    trio.run(_run_into_missing_memory, kind)


async def _run_into_missing_memory(kind: str) -> None:
    async with running(kind) as machine:
        await machine.pause()
        state = await machine.save_state()
        twin, pager = twin_of(machine), Pager()
        for block in twin.blocks:
            pager.add_block(block.memory)
        for _ in range(twin.shards):
            pager.add_shard()
        for number, block in enumerate(twin.blocks):
            pager.arm(block.shard, number, 0, block.memory.pages)
        await twin.load_state(state)
        assert twin.statistics().first_run_ns == 0
        await twin.resume()
        with trio.fail_after(60):
            while twin.statistics().first_run_ns == 0:
                await twin.wait_changed()  # it blocks at its first instruction, and will report nothing else
        with suppress(MigrationError):  # no signal reaches it on some hosts
            await twin.close(0.2)
        await pager.close()
        await twin.close()


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_run_is_told(kind: str, passes: Callable[..., None]) -> None:
    passes(run_into_missing_memory, kind)


def copy_pages(here: Machine, there: Machine, maps: list[Bitmap]) -> None:
    for pages, source, destination in zip(maps, here.blocks, there.blocks, strict=True):
        unit = source.memory.page_bytes
        for first, count in pages.runs():
            destination.memory.write(first * unit, source.memory.read(first * unit, count * unit))


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workload", ["dirty", "random", "disk"])
async def test_what_the_log_names_is_all_that_has_changed(kind: str, workload: str) -> None:
    async with running(kind, workload) as machine, twin_of(machine) as twin:
        try:
            log = await trio.to_thread.run_sync(machine.dirty_log)
        except ResourceError as error:
            pytest.skip(str(error))
        with log:
            maps = [block.memory.present() for block in machine.blocks]
            for _ in range(3):  # each copies, from the machine as it runs, what was written since the one before
                copy_pages(machine, twin, maps)
                before = machine.statistics().reports
                with trio.fail_after(60):
                    while machine.statistics().reports == before:
                        await machine.wait_changed()
                maps = [log.collect(number) for number in range(len(machine.blocks))]
                assert any(pages.count() for pages in maps)
            await machine.pause()
            last = [log.collect(number) for number in range(len(machine.blocks))]
            copy_pages(machine, twin, maps)
            copy_pages(machine, twin, last)
        await twin.load_state(await machine.save_state())
        check = await twin.verify()
        assert check.ok, check.what


async def test_a_log_may_outlive_its_machine() -> None:
    machine = create_source("rv64", MachineOptions(memory_bytes=16 * MIB, workload="disk"))
    try:
        log = await trio.to_thread.run_sync(machine.dirty_log)
    except ResourceError as error:
        pytest.skip(str(error))
    finally:
        await machine.close()
    log.close()
    with pytest.raises(trio.ClosedResourceError):
        machine.dirty_log()


def test_an_image_cannot_tell_what_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(MIB))
    machine = create_source("image", MachineOptions(image=str(path)))
    with pytest.raises(ResourceError, match=r"kind image cannot tell what it writes.*--precopy off"):
        machine.dirty_log()
    trio.run(machine.close)
