# SPDX-License-Identifier: Apache-2.0
"""A real Firecracker at the source: what is taken of it while it runs and when it is paused is the microVM, as its
guest finds out in another one."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from postcopy._fd import FdHolder
from postcopy._native import ffi, lib
from postcopy.errors import ResourceError
from postcopy.machines import MachineState
from postcopy.machines.firecracker.api import Api, FirecrackerUnreachable
from postcopy.machines.firecracker.handshake import Handshake, receive_handshake
from postcopy.machines.firecracker.source import FirecrackerMachine
from postcopy.memory import Memory
from postcopy.memory.bitmap import Bitmap
from postcopy.testbed.firecracker import Firecracker, find, guest_path
from postcopy.uffd import RegisterMode

pytestmark = [pytest.mark.needs("firecracker")]

BOUND_S = 90.0
PAGE = mmap.PAGESIZE

in_thread = trio.to_thread.run_sync


@asynccontextmanager
async def running() -> AsyncIterator[Firecracker]:
    with trio.fail_after(BOUND_S), await in_thread(Firecracker.start) as vm:
        yield vm


@asynccontextmanager
async def source_of(vm: Firecracker) -> AsyncIterator[FirecrackerMachine]:
    async with FirecrackerMachine.create(vm.api_path) as machine:
        await machine.prepare()
        yield machine


async def restore(vm: Firecracker, state: Path, memory: Path, *, serve: bool = True) -> Handshake:
    """Has a Firecracker load a snapshot through a userfaultfd. `serve`: all of its memory arrives at once, and nobody
    serves it any more."""
    listening = trio.socket.socket(socket.AF_UNIX)
    path = vm.directory / "uffd.sock"
    await listening.bind(str(path))
    listening.listen()
    path.chmod(0o777)
    handshakes: list[Handshake] = []

    async def answer() -> None:
        connection, _ = await listening.accept()
        with connection:
            handshakes.append(await receive_handshake(connection))
        await in_thread(_fill, handshakes[0], memory, serve)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        await in_thread(partial(vm.load, state, uffd=path, resume=True))
    listening.close()
    return handshakes[0]


def _fill(handshake: Handshake, memory: Path, all_of_it: bool) -> None:
    """With ``all_of_it`` false the last megabyte is left out, which the load does not need."""
    with open(memory, "rb") as file:
        content = file.read()
    buffer = ffi.from_buffer("char[]", content)
    done = ffi.new("uint64_t *")
    for region in handshake.regions:
        size = region.size_bytes - (0 if all_of_it else 1 << 20)
        assert lib.pc_uffd_copy(handshake.uffd, region.address, buffer + region.offset, size, 0, done) == 0
        if all_of_it:
            assert lib.pc_uffd_unregister(handshake.uffd, region.address, region.size_bytes) == 0


async def snapshot(directory: Path, arguments: str, *, balloon: bool = False) -> tuple[Path, Path]:
    state, memory = directory / "first.state", directory / "first.memory"
    async with running() as vm:
        await in_thread(partial(vm.boot, 64, arguments, balloon=balloon))
        await in_thread(vm.wait_ready)
        await in_thread(vm.pause)
        await in_thread(vm.snapshot, state, memory)
    return state, memory


async def check(state: bytes, memory: Path, at_least: int) -> None:
    """In another Firecracker the guest finds its memory as it should be, and goes on."""
    path = memory.with_suffix(".moved")
    path.write_bytes(state)
    async with running() as vm:
        await in_thread(partial(vm.load, path, memory=memory, resume=True))
        for line in await in_thread(vm.wait_passes, 2):
            assert line.values["errors"] == line.values["stale"] == 0, vm.said()
            assert line.values["pass"] > at_least


def copy_pages(machine: FirecrackerMachine, pages: Bitmap, to: Path) -> None:
    """What a page server sends, without one."""
    (region,) = machine._regions
    source, target = os.open(f"/proc/{machine._pid}/mem", os.O_RDONLY), os.open(to, os.O_WRONLY | os.O_CREAT)
    try:
        os.ftruncate(target, region.size_bytes)
        for first, count in pages.runs():
            os.pwrite(target, os.pread(source, count * PAGE, region.address + first * PAGE), first * PAGE)
    finally:
        os.close(source)
        os.close(target)


async def test_a_paused_one_is_all_there(tmp_path: Path) -> None:
    async with running() as vm:
        await in_thread(vm.boot, 128, "pages=1024")
        await in_thread(vm.wait_ready)
        async with source_of(vm) as machine:
            assert machine.config()["regions"] == [128 << 20]
            with pytest.raises(ResourceError, match="not restored through a userfaultfd"):
                machine.dirty_log()
            await in_thread(vm.wait_passes, 2)
            for _ in range(2):  # one that is resumed can be paused again
                await machine.pause()
                assert await in_thread(vm.state) == "Paused"
                await machine.resume()
                assert await in_thread(vm.state) == "Running"
            await machine.pause()
            state = await machine.save_state()
            passes = max(line.values["pass"] for line in vm.passes())
            await machine.dump(tmp_path / "memory")
            assert 4 << 20 < machine.blocks[0].memory.resident_bytes() < 16 << 20  # looking at it has brought nothing
            await machine.destroy()
            assert machine.statistics().state is not MachineState.RUNNING
            assert await in_thread(vm.process.wait, BOUND_S) == -signal.SIGKILL
    await check(state, tmp_path / "memory", passes - 1)


async def test_one_that_was_restored_from_a_file_has_what_it_never_touched(tmp_path: Path) -> None:
    state_path, memory_path = await snapshot(tmp_path, "wait=1 pages=512")
    async with running() as vm:
        await in_thread(partial(vm.load, state_path, memory=memory_path, resume=True))
        async with source_of(vm) as machine:
            assert machine.blocks[0].memory.present().count() == (64 << 20) // PAGE
            with pytest.raises(ResourceError, match="not restored through a userfaultfd"):
                machine.dirty_log()
            await machine.pause()
            state = await machine.save_state()
            await machine.dump(tmp_path / "memory")
    (tmp_path / "state").write_bytes(state)
    async with running() as vm:
        await in_thread(partial(vm.load, tmp_path / "state", memory=tmp_path / "memory", resume=True))
        line = await in_thread(vm.order, "r")
        assert (line.values["touched"], line.values["errors"]) == (512, 0)


async def test_one_with_two_regions_is_all_there(tmp_path: Path) -> None:
    """The kernel shows them as one mapping, the second below the first."""
    async with running() as vm:
        await in_thread(vm.boot, 3584, "wait=1 pages=512 spread=1")
        await in_thread(vm.wait_ready)
        async with source_of(vm) as machine:
            assert machine.config()["regions"] == [3328 << 20, 256 << 20]
            await machine.pause()
            state = await machine.save_state()
            await machine.dump(tmp_path / "memory")
    (tmp_path / "state").write_bytes(state)
    async with running() as vm:
        await in_thread(partial(vm.load, tmp_path / "state", memory=tmp_path / "memory", resume=True))
        assert (await in_thread(vm.order, "r")).values["errors"] == 0


async def test_one_that_was_restored_is_copied_while_it_runs(tmp_path: Path) -> None:
    """Precopy in small: all pages, then those that were written or given back, until it is paused."""
    state_path, memory_path = await snapshot(tmp_path, "pages=512", balloon=True)
    copy = tmp_path / "copy"
    async with running() as vm:
        (await restore(vm, state_path, memory_path)).close()
        async with source_of(vm) as machine:
            memory = machine.blocks[0].memory
            log = await in_thread(machine.dirty_log)
            with log:
                await in_thread(copy_pages, machine, memory.present(), copy)
                dirty = []
                for mib in (0, 1, 0, 1):
                    await in_thread(vm.inflate, mib)
                    await in_thread(vm.wait_passes, 1)
                    written = await in_thread(log.collect, 0)
                    await in_thread(copy_pages, machine, written, copy)
                    dirty.append(written.count())
                assert min(dirty) > 0
                await machine.pause()
                state = await machine.save_state()
                await in_thread(copy_pages, machine, await in_thread(log.collect, 0), copy)
                with Memory.from_file(copy) as copied:
                    assert await in_thread(memory.digest) == await in_thread(copied.digest)
            await machine.resume()  # the attempt is given up: nobody waits for an answer
            passes = await in_thread(vm.wait_passes, 2)
            assert all(line.values["errors"] == line.values["stale"] == 0 for line in passes)
    await check(state, copy, 0)


async def test_a_source_that_dies_in_precopy_is_followed_by_another(tmp_path: Path) -> None:
    """The guest waits at its next write, as long as nobody answers."""
    state_path, memory_path = await snapshot(tmp_path, "pages=512")
    async with running() as vm:
        handshake = await restore(vm, state_path, memory_path)
        with handshake:
            (region,) = handshake.regions
            protected = lib.pc_uffd_register(
                handshake.uffd, region.address, region.size_bytes, RegisterMode.WP, ffi.NULL
            )
            assert protected == 0
            assert lib.pc_uffd_writeprotect(handshake.uffd, region.address, region.size_bytes, lib.PC_UFFD_PROTECT) == 0
        before = len(vm.passes())
        async with source_of(vm) as machine:
            passes = await in_thread(vm.wait_passes, 2)
            assert all(line.values["errors"] == 0 for line in passes)
            with await in_thread(machine.dirty_log) as log:
                await in_thread(vm.wait_passes, 1)
                assert (await in_thread(log.collect, 0)).count() > 0
        assert len(vm.passes()) > before
        await in_thread(vm.wait_passes, 1)


async def test_while_another_pager_serves_it_pages_are_waited_for(tmp_path: Path) -> None:
    """It cannot be copied while it runs then, and what is absent is not zero."""
    state_path, memory_path = await snapshot(tmp_path, "wait=1 pages=512")
    async with running() as vm:
        handshake = await restore(vm, state_path, memory_path, serve=False)
        with handshake:
            async with source_of(vm) as machine:
                memory = machine._memory
                assert memory is not None
                assert memory.present().count() == memory.pages
                with pytest.raises(ResourceError, match="still served by a page fault handler"):
                    await in_thread(machine.dirty_log)
                await machine.pause()
                last, missing = ffi.new("char[]", PAGE), memory.size_bytes - PAGE
                read: list[int] = []

                async def look() -> None:
                    read.append(await in_thread(lib.pc_remote_read, memory.remote, missing, last, PAGE))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(look)
                    fault = FdHolder.duplicate(handshake.uffd)
                    with fault:
                        await fault.wait_readable()
                    assert read == []
                    events = ffi.new("struct pc_uffd_event[1]")
                    assert lib.pc_uffd_read(handshake.uffd, events, 1) == 1
                    (region,) = handshake.regions
                    assert events[0].address == region.address + missing
                    content, done = ffi.new("char[]", b"p" * (PAGE - 1)), ffi.new("uint64_t *")
                    assert lib.pc_uffd_copy(handshake.uffd, events[0].address, content, PAGE, 0, done) == 0
                assert read == [0]
                assert bytes(ffi.buffer(last)) == bytes(ffi.buffer(content))
                await machine.resume()


@pytest.mark.needs("root")
async def test_a_jailed_one_writes_its_state_into_its_jail(tmp_path: Path) -> None:
    """It is another user, sees another root directory, and its seccomp filter is on; its socket's path is too long for
    an address."""
    jail = tmp_path / ("jails-" + "x" * 60) / "firecracker" / "vm" / "root"
    jail.parents[2].mkdir()
    command = [str(Path(find()).with_name("jailer")), "--id", "vm", "--uid", "65534", "--gid", "65534"]
    command += ["--exec-file", find(), "--chroot-base-dir", str(jail.parents[2]), "--", "--api-sock", "/run/api.sock"]
    with trio.fail_after(BOUND_S):
        start = partial(subprocess.Popen, command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        process = await in_thread(start)
        try:
            api = Api(jail / "run" / "api.sock")
            while not await answers(api):
                assert process.poll() is None
                await trio.sleep(0.01)
            await in_thread(shutil.copy, guest_path(), jail / "guest.elf")
            await api.put("/machine-config", {"vcpu_count": 1, "mem_size_mib": 64})
            await api.put("/boot-source", {"kernel_image_path": "/guest.elf", "boot_args": "pages=64"})
            await api.put("/actions", {"action_type": "InstanceStart"})
            async with FirecrackerMachine.create(api.path) as machine:
                await machine.prepare()
                exchange = machine._exchange
                assert exchange is not None
                inside = jail / exchange.path[1:]
                assert inside.stat().st_uid == 65534
                await machine.pause()
                state = await machine.save_state()
                await machine.dump(tmp_path / "memory")
                assert list(inside.iterdir()) == []
                await machine.resume()
            assert not inside.exists()
            assert (await api.get("/"))["state"] == "Running"
        finally:
            process.kill()
            await in_thread(process.wait)
    await check(state, tmp_path / "memory", 0)


async def answers(api: Api) -> bool:
    try:
        await api.get("/")
    except FirecrackerUnreachable:
        return False
    return True
