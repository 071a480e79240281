# SPDX-License-Identifier: Apache-2.0
"""A real QEMU that takes the guest of another one, step by step, and each way in which that fails before it runs. The
part of the engine is played here: pages are copied from the memory of the source, which stands."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from postcopy._blocking import run_sync
from postcopy.errors import ConfigurationError, MigrationError, PostcopyError, ProtocolError, ResourceError
from postcopy.machines import BlockLayout, Extent, MachineState, _memory_files, process
from postcopy.machines.kinds import HostOptions, create_destination
from postcopy.machines.preload.client import Armed, Preload, State
from postcopy.machines.preload.start import library
from postcopy.machines.process import Started
from postcopy.machines.qemu import destination
from postcopy.machines.qemu.destination import ArrivingQemu
from postcopy.machines.qemu.qmp import QemuRefused
from postcopy.machines.qemu.source import QemuMachine
from postcopy.memory import Memory
from postcopy.service.options import QEMU as QEMU_OPTION
from postcopy.testbed.qemu import Qemu, command_line
from postcopy.uffd import PageFault, Userfaultfd

pytestmark = [pytest.mark.needs("qemu", "uffd"), pytest.mark.slow]

PAGE = 4096
MIB = 32


@dataclass
class Stood:
    """A guest that stands at its source, for good, and its pages."""

    config: dict[str, Any]
    layout: list[BlockLayout]
    state: bytes
    memory: int
    options: dict[str, Any]
    serving: trio.Event = field(default_factory=trio.Event)
    uffd: Userfaultfd | None = None
    extent: Extent | None = None

    async def lend(self, machine: ArrivingQemu, nursery: trio.Nursery) -> None:
        """Once it is `serving`, the machine has each page that it touches."""

        async def adopt(uffd: int, features: int, extents: Sequence[Extent]) -> None:
            (self.extent,) = extents
            self.uffd = Userfaultfd.adopt(uffd, features)
            nursery.start_soon(self._serve, self.uffd)

        await machine.lend(adopt)

    async def _serve(self, uffd: Userfaultfd) -> None:
        assert self.extent is not None
        await self.serving.wait()
        try:
            async for event in uffd:
                if isinstance(event, PageFault):
                    self._place(uffd, (event.address - self.extent.address) // PAGE)
        finally:
            uffd.close()

    def _place(self, uffd: Userfaultfd, page: int) -> None:
        assert self.extent is not None
        uffd.place(self.extent.address + page * PAGE, os.pread(self.memory, PAGE, page * PAGE))

    def fill(self) -> None:
        """The rest, and the end."""
        assert self.uffd is not None
        assert self.extent is not None
        for page in range(self.extent.pages):
            self._place(self.uffd, page)
        self.uffd.unregister(self.extent.address, self.extent.pages * PAGE)


@contextmanager
def incoming(**options: Any) -> Iterator[Qemu]:
    """As `postcopy run` starts it, which takes longer than all of a test."""
    with tempfile.TemporaryDirectory() as directory:
        variables = [f"LD_PRELOAD={library()}", f"POSTCOPY_PRELOAD={directory}/preload.sock"]
        with Qemu.start(**options, incoming=True, prefix=["env", *variables]) as qemu:
            yield qemu


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stood]:
    disk = tmp_path_factory.mktemp("disk") / "disk"
    disk.write_bytes(b"")
    os.truncate(disk, 64 << 20)
    options: dict[str, Any] = {"memory_mib": MIB, "append": "pages=512 spread=1", "disk": disk}
    with Qemu.start(**options) as qemu:
        qemu.wait_passes(1)
        memory = os.open(qemu.ram_paths[0], os.O_RDONLY)

        async def stop() -> Stood:
            async with QemuMachine.create(qemu.qmp_path) as machine:
                await machine.prepare()
                await machine.pause()
                config = machine.config() | {"boot": "another host"}
                return Stood(config, machine.layout, await machine.save_state(), memory, options)

        yield trio.run(stop)
        os.close(memory)


@pytest.fixture
def guest(source: Stood) -> Stood:
    guest = Stood(source.config, source.layout, source.state, source.memory, source.options)
    guest.serving.set()
    return guest


@pytest.fixture
def waiting(source: Stood) -> Iterator[Qemu]:
    with incoming(**source.options) as qemu:
        yield qemu


def arriving(guest: Stood, qemu: Qemu | None = None, command: str = "", **offer: Any) -> ArrivingQemu:
    host = (
        HostOptions(qmp=qemu.qmp_path) if qemu is not None else HostOptions(qemu=QEMU_OPTION.parse(command), name="vm1")
    )
    machine = create_destination("qemu", guest.config | offer, guest.layout, host)
    assert isinstance(machine, ArrivingQemu)
    return machine


@pytest.fixture(autouse=True)
async def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Whatever was started ends with its test."""
    started, start = [], Started.start

    async def noted(*arguments: Any) -> Started:
        started.append(await start(*arguments))
        return started[-1]

    monkeypatch.setattr(Started, "start", noted)
    yield
    for one in started:
        await one.remove()


async def is_killed(qemu: Qemu) -> bool:
    return await run_sync(qemu.process.wait, 30) == -signal.SIGKILL


async def unanswered(*_: Any) -> None:
    await trio.lowlevel.checkpoint()
    raise MigrationError("it has not answered")


@pytest.mark.parametrize("disarms", [True, False])
async def test_one_that_is_whole_stays_and_can_leave_again(
    disarms: bool, guest: Stood, waiting: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trio.open_nursery() as nursery:
        machine = arriving(guest, waiting)
        await machine.prepare()
        assert machine.statistics().state is MachineState.CREATED
        assert machine.layout == guest.layout
        await guest.lend(machine, nursery)
        await machine.load_state(guest.state)
        assert machine.statistics().state is MachineState.PAUSED
        assert await run_sync(waiting.status) == "paused"
        await machine.resume()
        await machine.claim_network()
        assert machine.statistics().state is MachineState.RUNNING
        await run_sync(waiting.wait_passes, 2)
        await run_sync(guest.fill)
        if disarms:
            await machine.made_whole()
        else:
            with monkeypatch.context() as patch:
                patch.setattr(Preload, "disarm", unanswered)
                with pytest.raises(MigrationError):
                    await machine.made_whole()
        nursery.cancel_scope.cancel()
    await machine.close()
    assert await run_sync(waiting.status) == "running"
    lines = await run_sync(waiting.wait_passes, 2)
    assert lines[-1].values["errors"] == lines[-1].values["stale"] == 0
    async with QemuMachine.create(waiting.qmp_path) as leaves:
        await leaves.prepare()
        log = await run_sync(leaves.dirty_log)
        await run_sync(log.close)
        await leaves.pause()
        assert await leaves.save_state()


async def test_a_state_may_come_in_pieces(guest: Stood, waiting: Qemu) -> None:
    """Also one that is given away too early, with devices: what they touch is waited for."""
    guest.serving = trio.Event()
    async with trio.open_nursery() as nursery:
        machine = arriving(guest, waiting)
        await machine.prepare()
        await guest.lend(machine, nursery)
        size = len(guest.state) // 3
        for piece in (b"", guest.state[:size], guest.state[size:-1]):
            await machine.load_early(piece)
        guest.serving.set()
        await machine.load_state(guest.state[-1:])
        await machine.resume()
        await run_sync(waiting.wait_passes, 2)
        await run_sync(guest.fill)
        await machine.made_whole()
        nursery.cancel_scope.cancel()
    await machine.close()
    assert await run_sync(waiting.status) == "running"


async def test_one_that_has_begun_to_load_is_killed(guest: Stood, waiting: Qemu) -> None:
    async with trio.open_nursery() as nursery:
        machine = arriving(guest, waiting)
        await machine.prepare()
        await guest.lend(machine, nursery)
        await machine.load_early(guest.state[:100])
        for _ in range(2):
            await machine.close()
        assert await is_killed(waiting)
        nursery.cancel_scope.cancel()


async def test_one_that_is_not_whole_is_killed(guest: Stood, waiting: Qemu) -> None:
    async with trio.open_nursery() as nursery:
        machine = arriving(guest, waiting)
        await machine.prepare()
        await guest.lend(machine, nursery)
        await machine.load_state(guest.state)
        await machine.resume()
        await machine.close()
        nursery.cancel_scope.cancel()
    assert await is_killed(waiting)


async def test_one_that_was_told_nothing_is_let_go_and_taken_again(guest: Stood, waiting: Qemu) -> None:
    before = await run_sync(waiting.execute, "query-migrate-capabilities")
    async with arriving(guest, waiting) as machine:
        await machine.prepare()
    assert await run_sync(waiting.execute, "query-migrate-capabilities") == before
    async with arriving(guest, waiting) as machine, trio.open_nursery() as nursery:
        await machine.prepare()
        await guest.lend(machine, nursery)
        await machine.load_state(guest.state)
        nursery.cancel_scope.cancel()


async def test_what_a_dead_destination_has_left_guarded_is_taken_over(guest: Stood, waiting: Qemu) -> None:
    dead = arriving(guest, waiting)
    await dead.prepare()
    assert dead._claim is not None
    assert dead._guard is not None
    assert dead._monitor is not None
    for what in (dead._guard, dead._claim, dead._monitor):  # as the kernel does
        what.close()
    async with arriving(guest, waiting) as machine, trio.open_nursery() as nursery:
        await machine.prepare()
        await guest.lend(machine, nursery)
        await machine.load_state(guest.state)
        nursery.cancel_scope.cancel()
    dead._guard = None
    await dead.close()


async def test_memory_that_was_guarded_by_a_request_that_failed(
    guest: Stood, waiting: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is emptied, and guarded no more."""
    with await run_sync(open, waiting.ram_paths[0], "r+b") as file:
        os.pwrite(file.fileno(), b"of an earlier guest", PAGE)
    armed, arm = [], Preload.arm

    async def lost(*arguments: Any, **options: Any) -> Armed:
        armed.append(await arm(*arguments, **options))
        raise MigrationError("it has not answered")

    with monkeypatch.context() as patch:
        patch.setattr(Preload, "arm", lost)
        machine = arriving(guest, waiting)
        with pytest.raises(MigrationError, match="has not answered"):
            await machine.prepare()
    asked = machine._library
    assert asked is not None
    for one in armed:
        one.uffd.close()
    assert (await run_sync(os.stat, waiting.ram_paths[0])).st_blocks == 0
    for mapping in await asked.mappings():
        mapping.fd.close()
    assert State.KEPT in asked.state
    await machine.close()
    for mapping in await asked.mappings():
        mapping.fd.close()
    assert State.KEPT not in asked.state


@pytest.mark.parametrize(
    ("offer", "why"),
    [
        ({"machine": "pc-i440fx-7.2"}, "-machine"),
        ({"cpu": "host-x86_64-cpu"}, "-cpu"),
        ({"accelerator": "kvm"}, "-accel"),
        ({"vcpus": 2}, "-smp"),
        ({"version": "99.1.0"}, "newer"),
        ({"version": "99.1.0\x1b[2J"}, "no sense"),
        ({"layout": [BlockLayout("ram1", MIB << 20, PAGE)]}, "backend 'ram0'"),
        ({"layout": [BlockLayout("ram0", 64 << 20, PAGE)]}, "64 MiB"),
        ({"layout": [BlockLayout("ram0", MIB << 20, 2 << 20)]}, "pages of 2 MiB"),
        ({"layout": [BlockLayout("ram1", MIB << 20, PAGE), BlockLayout("ram0", MIB << 20, PAGE)]}, "by name"),
        ({"files": []}, "a file of its own"),
        ({"vcpus": 0}, "no sense"),
    ],
)
async def test_what_does_not_fit_is_refused(guest: Stood, waits: Qemu, offer: dict[str, Any], why: str) -> None:
    guest.layout = offer.pop("layout", guest.layout)
    if len(guest.layout) == 2:
        offer["files"] = guest.config["files"] * 2
    with pytest.raises((ConfigurationError, ProtocolError), match=why):
        async with arriving(guest, waits, **offer) as machine:
            await machine.prepare()
    assert await run_sync(waits.status) == "inmigrate"


@pytest.fixture(scope="module")
def waits(source: Stood) -> Iterator[Qemu]:
    """One for all tests that leave it as it was."""
    with incoming(**source.options) as qemu:
        yield qemu


async def test_the_file_of_its_own_source_is_never_emptied(guest: Stood, waits: Qemu) -> None:
    status = await run_sync(os.stat, waits.ram_paths[0])
    boot = await run_sync(Path("/proc/sys/kernel/random/boot_id").read_text)
    machine = arriving(guest, waits, boot=boot.strip(), files=[{"device": status.st_dev, "inode": status.st_ino}])
    with pytest.raises(ConfigurationError, match="the same file"):
        await machine.prepare()
    await machine.close()


async def test_the_file_of_another_one_is_never_emptied(guest: Stood, waits: Qemu) -> None:
    script = "import mmap, os, sys; mapping = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 4096); print(); input()"
    command = [sys.executable, "-c", script, str(waits.ram_paths[0])]
    with await run_sync(partial(subprocess.Popen, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)) as other:
        try:
            assert other.stdout is not None
            await run_sync(other.stdout.readline)
            machine = arriving(guest, waits)
            with pytest.raises(ConfigurationError, match=rf"process {other.pid}, python.*file of its own"):
                await machine.prepare()
            await machine.close()
        finally:
            other.kill()


async def test_a_file_system_that_is_too_small_for_all_of_it(on_tmpfs: Path) -> None:
    room = os.statvfs(on_tmpfs)
    size_bytes = room.f_bavail * room.f_frsize // PAGE * 6 // 10 * PAGE
    memories = []
    for name in "ab":
        path = on_tmpfs / name
        path.touch()
        os.truncate(path, size_bytes)
        with await run_sync(open, path, "r+b") as file:
            memories.append(Memory.from_shared_file(file.fileno(), size_bytes))
    _memory_files._check_file_systems("QEMU", memories[:1])
    with pytest.raises(ResourceError, match=r"left, and .* are to come"):
        _memory_files._check_file_systems("QEMU", memories)
    for memory in memories:
        memory.close()


async def test_one_that_does_not_wait_is_refused(guest: Stood) -> None:
    with Qemu.start(MIB) as qemu:
        machine = arriving(guest, qemu)
        with pytest.raises(ConfigurationError, match="-incoming defer"):
            await machine.prepare()
        await machine.close()
        assert await run_sync(qemu.status) == "running"


async def test_one_without_the_library_is_refused(guest: Stood) -> None:
    with Qemu.start(**guest.options, incoming=True) as qemu:
        machine = arriving(guest, qemu)
        with pytest.raises(PostcopyError, match="postcopy run"):
            await machine.prepare()
        await machine.close()
        assert await run_sync(qemu.status) == "inmigrate"


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6])
async def test_a_state_that_is_cut_ends_it(guest: Stood, waiting: Qemu, part: float) -> None:
    async with trio.open_nursery() as nursery:
        machine = arriving(guest, waiting)
        await machine.prepare()
        await guest.lend(machine, nursery)
        with pytest.raises((MigrationError, ProtocolError), match="not loaded the state"):
            await machine.load_state(guest.state[: int(part * len(guest.state))])
        await machine.close()
        nursery.cancel_scope.cancel()
    assert not part or (await run_sync(waiting.process.wait, 30)) != 0


async def test_a_page_that_does_not_come_ends_it(guest: Stood, waiting: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destination, "LOAD_S", 0.5)
    guest.serving = trio.Event()
    async with trio.open_nursery() as nursery:
        machine = arriving(guest, waiting)
        await machine.prepare()
        await guest.lend(machine, nursery)
        with pytest.raises(MigrationError, match="a page that it needs"):
            await machine.load_state(guest.state)
        await machine.close()
        nursery.cancel_scope.cancel()
    assert await is_killed(waiting)


async def test_a_disk_that_somebody_has_locked_is_found_out_before_the_decision(guest: Stood, waiting: Qemu) -> None:
    with await run_sync(open, guest.options["disk"], "rb") as disk:
        fcntl.lockf(disk, fcntl.LOCK_SH, 1, 201)  # as a QEMU does it that lets nobody else write
        async with trio.open_nursery() as nursery:
            machine = arriving(guest, waiting)
            await machine.prepare()
            await guest.lend(machine, nursery)
            with pytest.raises(MigrationError, match="lock"):
                await machine.load_state(guest.state)
            await machine.close()
            nursery.cancel_scope.cancel()
    assert await is_killed(waiting)


async def test_one_that_does_not_answer_is_told_to_run_until_it_does(
    guest: Stood, waiting: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "RESUME_S", 0.3)
    monkeypatch.setattr(process, "ANSWER_S", 0.1)
    async with trio.open_nursery() as nursery:
        machine = arriving(guest, waiting)
        await machine.prepare()
        await guest.lend(machine, nursery)
        await machine.load_state(guest.state)
        os.kill(waiting.pid, signal.SIGSTOP)
        await machine.resume()
        assert machine.statistics().state is MachineState.RUNNING
        nursery.start_soon(machine.wait_changed)
        os.kill(waiting.pid, signal.SIGCONT)
        await run_sync(waiting.wait_passes, 1)
        assert await run_sync(waiting.status) == "running"
        nursery.cancel_scope.cancel()
    await machine.close()


async def test_one_that_refuses_to_run_is_told_again_and_named(
    guest: Stood, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "RESUME_S", 0.2)
    machine = arriving(guest, command="true")
    refused = 0

    async def refuse(timeout_s: float) -> None:
        nonlocal refused
        refused += 1
        await trio.lowlevel.checkpoint()
        raise QemuRefused("cont", "GenericError", "Failed to get lock")

    async def stands(timeout_s: float) -> bool:
        await trio.lowlevel.checkpoint()
        return False

    monkeypatch.setattr(machine, "_tell_to_run", refuse)
    monkeypatch.setattr(machine, "_is_running", stands)
    await machine.resume()
    assert refused > 1
    await process.ArrivingProcess.made_whole(machine)
    messages = [record.getMessage() for record in caplog.records]
    assert ["Failed to get lock" in message for message in messages] == [True] * 3
    assert "it is told again" in messages[1]
    assert "has all of its memory, and does not run" in messages[2]
    await machine.close()
    with trio.fail_after(30), pytest.raises(trio.ClosedResourceError):
        await machine.wait_changed()


@pytest.mark.parametrize(
    ("status", "runs"),
    [("running", True), ("shutdown", True), ("paused", False), ("prelaunch", False), ("inmigrate", None),
     ("finish-migrate", None), ("", None), ("of a version to come", None)],
)  # fmt: skip
async def test_what_counts_as_running(
    status: str, runs: bool | None, guest: Stood, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = arriving(guest, command="true")

    async def say() -> str:
        await trio.lowlevel.checkpoint()
        return status

    monkeypatch.setattr(machine, "_status", say)
    assert await machine._is_running(30.0) is runs


async def test_one_that_has_ended_cannot_run(guest: Stood, waiting: Qemu) -> None:
    async with trio.open_nursery() as nursery:
        machine = arriving(guest, waiting)
        await machine.prepare()
        await guest.lend(machine, nursery)
        await machine.load_state(guest.state)
        waiting.process.kill()
        with pytest.raises(MigrationError, match="has ended"):
            await machine.resume()
        assert machine.statistics().state is MachineState.FAILED
        await machine.close()
        nursery.cancel_scope.cancel()


# ---- one that we start


@pytest.fixture
def on_tmpfs() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


async def test_one_that_is_started_is_killed_until_it_is_whole(guest: Stood, on_tmpfs: Path) -> None:
    command = shlex.join(command_line(on_tmpfs, **guest.options))
    async with trio.open_nursery() as nursery:
        machine = arriving(guest, command=command)
        await machine.prepare()
        assert machine.process is not None
        pid, monitor = machine.process
        assert b"\0POSTCOPY_MACHINE=vm1\0" in await trio.Path(f"/proc/{pid}/environ").read_bytes()
        await guest.lend(machine, nursery)
        await machine.load_state(guest.state)
        await machine.close()
        nursery.cancel_scope.cancel()
    assert not await trio.Path(f"/proc/{pid}").exists()
    assert not await trio.Path(monitor).parent.exists()


async def test_one_that_is_started_stays_when_it_is_whole(guest: Stood, on_tmpfs: Path) -> None:
    command = shlex.join(command_line(on_tmpfs, **guest.options))
    async with trio.open_nursery() as nursery:
        machine = arriving(guest, command=command)
        await machine.prepare()
        assert machine.process is not None
        pid, monitor = machine.process
        await guest.lend(machine, nursery)
        await machine.load_state(guest.state)
        await machine.resume()
        await run_sync(guest.fill)
        await machine.made_whole()
        nursery.cancel_scope.cancel()
    await machine.close()
    async with QemuMachine.create(monitor) as again:
        await again.prepare()
        assert again.process == (pid, monitor)
    await machine.destroy()
    assert not await trio.Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("false", "ended with status 1"),
        ("qemu-system-x86_64 -incoming tcp::1", "leave -incoming out"),
        ("qemu-system-x86_64 --daemonize", "leave -daemonize out"),
        ("qemu-system-x86_64 -no-such-option", "ended with status 1"),
    ],
)
async def test_a_command_that_starts_nothing_is_named(guest: Stood, command: str, why: str) -> None:
    machine = arriving(guest, command=command)
    with pytest.raises(ConfigurationError, match=why):
        await machine.prepare()
    await machine.close()


async def test_nothing_is_started_for_what_this_host_cannot_hold(guest: Stood, tmp_path: Path) -> None:
    machine = create_destination(
        "qemu",
        guest.config,
        [BlockLayout(one.name, 1 << 46, one.page_bytes) for one in guest.layout],
        HostOptions(qemu=QEMU_OPTION.parse(f"touch {tmp_path}/started"), name="vm1"),
    )
    with pytest.raises(ResourceError, match="memory"):
        await machine.prepare()
    await machine.close()
    assert not await trio.Path(tmp_path / "started").exists()
