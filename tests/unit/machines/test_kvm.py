# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ASYNC240 -- files in these tests are small, and nothing else waits while they are looked at
"""The kvm machine through its Python face: run, pause, move by hand, fail. tests/integration moves it by postcopy."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from machines import copy_memory, twin_of

from postcopy.errors import ConfigurationError, ProtocolError, ResourceError
from postcopy.machines import Machine, MachineState
from postcopy.machines.base import Activity
from postcopy.machines.kinds import HostOptions, MachineOptions, create_destination, create_source
from postcopy.machines.toy import machine as toy
from postcopy.machines.toy.machine import WORKLOADS

MIB = 1 << 20
pytestmark = [pytest.mark.needs("kvm", "uffd"), pytest.mark.slow]


@asynccontextmanager
async def running(options: MachineOptions) -> AsyncIterator[Machine]:
    """A machine that has built up its working set."""
    async with create_source("kvm", options) as machine:
        assert machine.statistics().state is MachineState.CREATED
        await machine.boot()
        assert machine.statistics().state is MachineState.PAUSED
        await machine.resume()
        with trio.fail_after(60):
            await machine.wait_ready()
        yield machine


async def make_progress(machine: Machine) -> None:
    with trio.fail_after(60):
        before = machine.statistics().reports
        while machine.statistics().reports == before:
            await machine.wait_changed()


@pytest.mark.parametrize("workload", [name for name in WORKLOADS if name != "echo"])  # that one: test_network.py
async def test_a_machine_moves_and_goes_on(workload: str) -> None:
    options = MachineOptions(memory_bytes=16 * MIB, vcpus=2, workload=workload, seed=5)
    async with running(options) as source:
        await make_progress(source)
        await source.pause()
        before = source.statistics()
        assert before.state is MachineState.PAUSED
        assert {vcpu.activity for vcpu in before.vcpus} == {Activity.PARKED}
        assert before.nonce
        check = await source.verify()
        assert check.ok, check.what
        async with twin_of(source, "anon" if workload == "random" else "memfd") as twin:
            assert twin.vcpus == 2
            assert twin.config()["workload"] == workload
            await twin.load_state(await source.save_state())
            copy_memory(source, twin)
            await source.close()
            await twin.resume()
            await make_progress(twin)
            await twin.pause()
            check = await twin.verify()
            assert check.ok, check.what
            after = twin.statistics()
            assert after.nonce == before.nonce
            assert after.operations > before.operations
            assert after.first_run_ns > before.paused_ns
            assert after.failures == after.disk_errors == 0
            assert check.counts["operations"] >= after.operations
            assert (check.counts["disk-bytes-checked"] > 0) == (workload == "disk")


async def test_layout() -> None:
    async with create_source("kvm", MachineOptions(memory_bytes=64 * MIB, vcpus=8, workload="idle")) as machine:
        assert [block.name for block in machine.blocks] == ["shared", *(f"vcpu{number}" for number in range(8))]
        assert [block.shard for block in machine.blocks] == list(range(9))
        assert machine.shards == 9
        assert machine.memory_bytes == machine.dump_bytes == 64 * MIB
        assert machine.live
        threads = machine.vcpu_threads()
        assert len(set(threads)) == 8
        assert all(os.path.exists(f"/proc/self/task/{tid}") for tid in threads)
        assert sum(block.memory.resident_bytes() for block in machine.blocks) == 0


async def test_a_damaged_page_is_found() -> None:
    async with running(MachineOptions(memory_bytes=16 * MIB, workload="dirty", seed=5)) as machine:
        await machine.pause()
        memory = machine.blocks[1].memory
        os.pwrite(memory.fd, b"\xff" * 8, 8 * memory.page_bytes)
        check = await machine.verify()
        assert not check.ok
        assert check.counts["bad-pages"] == 1


async def test_damaged_states_are_refused() -> None:
    async with running(MachineOptions(memory_bytes=16 * MIB, workload="idle")) as source:
        await source.pause()
        state = await source.save_state()
        for damaged in (b"", state[:-1], state + b"x", state[:100] + bytes([state[100] ^ 1]) + state[101:]):
            twin = create_destination("kvm", source.config(), source.layout)
            with pytest.raises(ProtocolError):
                await twin.load_state(damaged)
            await twin.close()
        other = create_destination("kvm", {**source.config(), "workload": "dirty"}, source.layout)
        with pytest.raises(ProtocolError):
            await other.load_state(state)
        await other.close()


async def test_any_number_of_tasks_wait_for_a_change() -> None:
    async with running(MachineOptions(memory_bytes=16 * MIB, workload="dirty")) as machine:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(make_progress, machine)
        # One that is cancelled while it waits for all passes its turn on.
        await machine.pause()
        async with trio.open_nursery() as nursery:
            leader = trio.CancelScope()

            async def wait() -> None:
                with leader:
                    while True:
                        await machine.wait_changed()

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(make_progress, machine)
            await trio.testing.wait_all_tasks_blocked()
            leader.cancel()
            await machine.resume()


async def test_tasks_that_wait_for_a_change_see_the_end() -> None:
    machine = create_source("kvm", MachineOptions(memory_bytes=16 * MIB, workload="idle"))
    ended = 0

    async def follow() -> None:
        nonlocal ended
        with pytest.raises(trio.ClosedResourceError):
            await machine.wait_changed()
        ended += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        nursery.start_soon(follow)
        await trio.testing.wait_all_tasks_blocked()
        await machine.close()
    assert ended == 2
    await machine.close()
    assert all(block.memory.closed for block in machine.blocks)
    with pytest.raises(trio.ClosedResourceError):
        await machine.resume()


async def test_close_is_seen_through_when_cancelled() -> None:
    machine = create_source("kvm", MachineOptions(memory_bytes=16 * MIB, workload="dirty"))
    await machine.boot()
    await machine.resume()
    with trio.CancelScope() as scope:
        scope.cancel()
        await machine.close()
    assert scope.cancelled_caught
    assert all(block.memory.closed for block in machine.blocks)


async def test_a_temporary_disk_goes_with_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with create_source("kvm", MachineOptions(memory_bytes=16 * MIB, workload="disk")) as machine:
        (path,) = tmp_path.iterdir()
        assert machine.config()["disk"] == str(path)
    assert list(tmp_path.iterdir()) == []


async def test_a_disk_of_ones_own_stays(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    async with create_source("kvm", MachineOptions(memory_bytes=16 * MIB, workload="disk", disk=str(path))) as machine:
        offer = machine.config(), machine.layout
        with pytest.raises(ConfigurationError, match="--disk FILE"):
            create_destination("kvm", *offer)
        async with create_destination("kvm", *offer, HostOptions(disk=str(path))):
            pass
    assert path.exists()


@pytest.mark.parametrize(
    ("number", "words"), [("ENOENT", "--device /dev/kvm"), ("EACCES", "or use --machine rv64"), ("ENOTSUP", "x86-64")]
)
def test_without_kvm_there_is_a_remedy(number: str, words: str) -> None:
    error = toy._open_error(getattr(errno, number), "/dev/kvm: something")
    assert isinstance(error, ResourceError)
    assert words in error.remedy
