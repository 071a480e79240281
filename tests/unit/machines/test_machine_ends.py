# SPDX-License-Identifier: Apache-2.0
"""A load, a verification or a vCPU that hangs in the kernel holds up nobody: deadline, cancellation, and an end that
can be tried again once the kernel has let go.

The rv64 machine stands for both: the Python side is the same (`as_kvm`, where that loads its state in a worker). What
hangs is a core of which one function is replaced; csrc/tests/machine/test_state.c shows that the real one stays whole
beneath it.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from postcopy._native import ffi, lib
from postcopy.dataplane import _base, pageserver
from postcopy.errors import ConfigurationError, MigrationError, ResourceError
from postcopy.machines import Machine
from postcopy.machines.kinds import HostOptions, MachineOptions, create_destination, create_source
from postcopy.machines.toy import machine as toy

MIB = 1 << 20
OPTIONS = MachineOptions(memory_bytes=16 * MIB, workload="idle", seed=5)
pytestmark = pytest.mark.needs("uffd-user")


class Core:
    """The core, but for the functions that a test replaces."""

    def __init__(self, **replaced: Callable[..., int]) -> None:
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Lets go of what hangs, at the latest when the test ends."""
    event = threading.Event()
    yield event
    event.set()


async def twin_and_state(*, as_kvm: bool = False) -> tuple[Machine, bytes]:
    async with create_source("rv64", OPTIONS) as source:
        await source.boot()
        twin = create_destination("rv64", source.config(), source.layout)
        twin.kernel_faults = as_kvm
        return twin, await source.save_state()


def hanging(release: threading.Event) -> Callable[..., int]:
    def load(*_: Any) -> int:
        release.wait(60)
        return -errno.EFAULT

    return load


async def test_a_load_has_a_deadline(monkeypatch: pytest.MonkeyPatch, release: threading.Event) -> None:
    twin, state = await twin_and_state(as_kvm=True)
    monkeypatch.setattr(toy, "lib", Core(pc_machine_load_state=hanging(release)))
    monkeypatch.setattr(toy, "LOAD_TIMEOUT_S", 0.1)
    with trio.fail_after(20), pytest.raises(MigrationError, match="not done after"):
        await twin.load_state(state)
    await twin.close()


async def test_a_load_is_cancelled_at_once(monkeypatch: pytest.MonkeyPatch, release: threading.Event) -> None:
    twin, state = await twin_and_state(as_kvm=True)
    monkeypatch.setattr(toy, "lib", Core(pc_machine_load_state=hanging(release)))
    with trio.fail_after(toy.LOAD_TIMEOUT_S * 0.8):
        with trio.move_on_after(0.1) as scope:
            await twin.load_state(state)
        assert scope.cancelled_caught
        await twin.close()


async def test_an_end_that_comes_too_early_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    twin, _ = await twin_and_state()
    busy = True

    def close(machine: Any, timeout_ms: int) -> int:
        return -errno.ETIMEDOUT if busy else int(lib.pc_machine_close(machine, timeout_ms))

    monkeypatch.setattr(toy, "lib", Core(pc_machine_close=close))
    for _ in range(2):
        with pytest.raises(MigrationError, match="memory is kept"):
            await twin.close()
        with pytest.raises(trio.ClosedResourceError):
            twin.statistics()
    assert not any(block.memory.closed for block in twin.blocks)
    busy = False  # the pager has ended, and whatever waited for a page was let go
    await twin.close()
    assert all(block.memory.closed for block in twin.blocks)


async def test_a_verification_without_end_is_called_off() -> None:
    source = create_source("rv64", MachineOptions(memory_bytes=16 * MIB, workload="random", seed=5))
    await source.boot()
    memory = source.blocks[0].memory
    # struct pcg_vcpu (csrc/machine/guest/abi.h): the operations that the first vCPU says it has done
    address = int(ffi.cast("uintptr_t", memory.struct.base)) + 0x4000 + 4 * 8
    ffi.cast("uint64_t *", address)[0] = 1 << 62
    with trio.fail_after(30):
        with trio.move_on_after(0.1) as scope:
            await source.verify()
        assert scope.cancelled_caught
        await source.close()
    assert memory.closed


def test_no_thread_is_a_matter_of_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_machine(config: Any, machine: Any, text: Any, size: int) -> int:
        ffi.memmove(text, b"no thread for vCPU 0", 20)
        return -errno.EAGAIN

    monkeypatch.setattr(toy, "lib", Core(pc_machine_open=open_machine))
    with pytest.raises(ResourceError, match="vCPU 0") as caught:
        create_source("rv64", OPTIONS)
    assert "pids.max" in caught.value.remedy


async def test_no_thread_for_a_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    def attach(server: Any, channel: int, fd: int, tls: Any) -> int:
        os.close(fd)
        return -errno.EAGAIN

    async with pageserver.PageServer() as server:
        monkeypatch.setattr(_base, "lib", Core(pc_pageserver_attach_bulk=attach))
        with pytest.raises(ResourceError, match="bulk channel 0"):
            server.attach_bulk(0, os.open(os.devnull, os.O_RDWR))


async def test_a_disk_is_neither_named_nor_lengthened_by_a_peer(tmp_path: Path) -> None:
    options = MachineOptions(memory_bytes=16 * MIB, workload="disk", disk=str(tmp_path / "postcopy-disk-1.img"))
    async with create_source("rv64", options) as source:
        config, layout = source.config(), source.layout
        size_bytes = (tmp_path / "postcopy-disk-1.img").stat().st_size
        with pytest.raises(ConfigurationError, match="--disk FILE"):  # this process could write to it
            create_destination("rv64", config, layout)
        config["disk-bytes"] = size_bytes + MIB
        with pytest.raises(ConfigurationError, match="the one the source uses"):
            create_destination("rv64", config, layout, HostOptions(disk=options.disk))
        assert (tmp_path / "postcopy-disk-1.img").stat().st_size == size_bytes
