# SPDX-License-Identifier: Apache-2.0
"""A QEMU at the source, with one that is none: what it may say and do, and what is refused by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from fake_qemu import EARLY_BYTES, MIB, STATE, FakeQemu, Orders, fake_qemu

from postcopy.errors import BusyError, ConfigurationError, MigrationError, PostcopyError
from postcopy.machines import MachineState
from postcopy.machines.qemu import source
from postcopy.machines.qemu._look import FileIdentity, same_host_and_file
from postcopy.machines.qemu.qmp import QemuAnswer, QemuError, QemuInDoubt
from postcopy.machines.qemu.source import QemuMachine
from postcopy.machines.qemu.twin import command_line_of, twin
from postcopy.migration.source import RESUME_TIMEOUT_S

pytestmark = pytest.mark.slow

BOUND_S = 30.0
PAGE = os.sysconf("SC_PAGE_SIZE")
SET_UP = ["migrate-set-capabilities", "migrate-set-parameters", "getfd", "migrate"]
WAY_BACK = ["migrate-set-capabilities", "migrate-set-parameters"]
PINS = {"query-named-block-nodes": [{"node-name": "n", "drv": "raw", "file": "/d", "cache": {"direct": True}}]}


def saying(command: str, value: Any, mib: dict[str, int] | None = None, ramblock: str = "") -> Orders:
    return Orders(says={command: value}, mib={"ram0": 8} if mib is None else mib, ramblock=ramblock)


def is_now(status: str) -> Orders:
    return saying("query-status", {"status": status})


def block(name: str, mib: int) -> str:
    return f" {name} 4 KiB 0x0000000000000000 {mib * MIB:#018x} {mib * MIB:#018x}"


def device(kind: str) -> Orders:
    return saying("qom-list /machine/peripheral-anon", [{"name": "device[0]", "type": f"child<{kind}>"}])


def objects(kind: str, version: list[int] | None = None) -> Orders:
    orders = saying("qom-list /objects", [{"name": "ram0", "type": f"child<{kind}>"}])
    orders.version = version or orders.version
    return orders


@asynccontextmanager
async def prepared(directory: Path, orders: Orders | None = None) -> AsyncIterator[tuple[FakeQemu, QemuMachine]]:
    with fake_qemu(directory, orders) as fake, trio.fail_after(BOUND_S):
        async with QemuMachine.create(str(fake.qmp_path)) as machine:
            await machine.prepare()
            yield fake, machine


async def saved(machine: QemuMachine) -> bytes:
    await machine.pause()
    return await machine.save_state()


async def status(machine: QemuMachine) -> str:
    return await machine._status()


async def test_what_it_is_is_found(tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders(mib={"ram1": 8, "ram0": 4})) as (fake, machine):
        config = machine.config()
        paths = [fake.ram_path("ram0"), fake.ram_path("ram1")]
        assert config.pop("boot")
        assert config == {
            "version": "7.2.22",
            "machine": "pc-i440fx-7.2",
            "accelerator": "tcg",
            "cpu": "qemu64-x86_64-cpu",
            "vcpus": 1,
            "files": [{"device": path.stat().st_dev, "inode": path.stat().st_ino} for path in paths],
        }
        assert (machine._seen.has_disks, machine._seen.pins) == (True, ())
        shown = [(block.name, block.memory.size_bytes, block.memory.page_bytes) for block in machine.blocks]
        assert shown == [("ram0", 4 * MIB, PAGE), ("ram1", 8 * MIB, PAGE)]
        present = machine.blocks[1].memory.present()
        assert [page for page in range(len(present)) if present[page]] == list(range(0, 8 * MIB // PAGE, 3))
        assert machine.vcpu_threads() == [fake.process.pid]
        assert machine.process == (fake.process.pid, str(fake.qmp_path))
        assert machine.statistics().state is MachineState.RUNNING
        assert fake.was_told() == []
        mine = machine._seen.config
        assert same_host_and_file(mine, mine)
        assert not same_host_and_file(mine, msgspec.structs.replace(mine, boot="another host"))
        assert not same_host_and_file(mine, msgspec.structs.replace(mine, files=[FileIdentity(1, 2)]))


async def test_it_is_paused_with_its_state_and_goes_on(tmp_path: Path) -> None:
    async with prepared(tmp_path) as (fake, machine):
        assert machine._monitor is not None
        before = await machine._capabilities()
        for _ in range(3):
            await machine.before_pause()
            await machine.pause()
            await machine.pause()
            assert machine.statistics().state is MachineState.PAUSED
            assert await machine.save_state() == STATE
            assert await machine._capabilities() == dict.fromkeys(before, False) | {
                "x-ignore-shared": True,
                "events": True,
                "pause-before-switchover": True,
            }
            await machine.resume()
            assert machine.statistics().state is MachineState.RUNNING
            assert machine.statistics().first_run_ns > machine.statistics().paused_ns > 0
            with pytest.raises(MigrationError, match="while its guest is paused"):
                await machine.save_state()
            assert await machine._capabilities() == before
        await machine.resume()  # it runs: nothing is said
        assert fake.was_told() == [*SET_UP, "migrate-continue", "cont", *WAY_BACK] * 3
        parameters = await machine._execute("query-migrate-parameters")
        assert parameters == {"max-bandwidth": 1 << 27, "downtime-limit": 300, "announce-rounds": 5}


@pytest.mark.parametrize("clock_us", [0, 1, 1 << 62])
async def test_the_pause_begins_when_qemu_says(clock_us: int, tmp_path: Path) -> None:
    """Unless its clock makes no sense."""
    async with prepared(tmp_path, Orders(clock_us=clock_us)) as (_, machine):
        before_ns = time.monotonic_ns()
        await machine.before_pause()
        assert before_ns < machine.statistics().paused_ns <= time.monotonic_ns()


async def test_the_pause_without_what_comes_before(tmp_path: Path) -> None:
    async with prepared(tmp_path) as (fake, machine):
        await machine.pause()
        assert await machine.save_state() == STATE
        assert fake.was_told() == [*SET_UP, "migrate-continue"]


@pytest.mark.parametrize("state", [1, EARLY_BYTES, len(STATE)])
async def test_what_is_written_before_the_switchover_is_given_away(state: int, tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders(state=state)) as (fake, machine):
        for _ in range(2):
            pieces: list[bytes] = []
            await machine.before_pause(pieces.append)
            assert pieces[0] == b""  # said before QEMU has written anything
            early = b"".join(pieces)
            assert early == STATE[: min(state, EARLY_BYTES)]
            assert "migrate-continue" not in fake.was_told()[-2:]
            await machine.pause()
            assert early + await machine.save_state() == STATE[:state]
            await machine.resume()
            assert await status(machine) == "running"


async def test_before_the_pause_it_may_be_told_to_go_on(tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders(migrates="unread")) as (fake, machine):
        await machine.before_pause()
        assert await status(machine) == "finish-migrate"
        await machine.resume()
        assert await status(machine) == "running"
        assert "migrate_cancel" in fake.was_told()


@pytest.mark.parametrize(
    ("migrates", "why"),
    [
        ("failed", "cannot save its state"),
        ("unstopped", "stopped by somebody else"),
        ("endless", "longer than"),
        ("unread", "within 0.2 s"),
    ],
)
async def test_a_pause_that_fails_leaves_it_running(
    migrates: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if migrates == "unread":
        monkeypatch.setattr(source, "SAVE_TIMEOUT_S", 0.2)
    async with prepared(tmp_path, Orders(migrates=migrates)) as (fake, machine):
        before = await machine._capabilities()
        with pytest.raises(MigrationError, match=why):
            await saved(machine)
        if machine.statistics().state is MachineState.PAUSED:  # as the engine does when a state cannot be had
            await machine.resume()
        assert await status(machine) == "running"
        assert machine.statistics().state is MachineState.RUNNING
        assert await machine._capabilities() == before
        fake.order(Orders())
        await machine.pause()
        assert await machine.save_state() == STATE


async def test_one_that_never_stops_its_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "STOP_TIMEOUT_S", 0.1)
    async with prepared(tmp_path, Orders(migrates="silent")) as (fake, machine):
        with pytest.raises(MigrationError, match=r"has not stopped its guest.*active"):
            await machine.before_pause()
        assert fake.was_told() == [*SET_UP, "migrate_cancel", *WAY_BACK]
        assert await status(machine) == "running"


async def test_one_that_does_not_notice_that_it_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has just begun to wait for us."""
    monkeypatch.setattr(source, "STOP_TIMEOUT_S", 0.1)
    async with prepared(tmp_path, Orders(migrates="deaf")) as (fake, machine):
        with pytest.raises(MigrationError, match="has not stopped its guest"):
            await machine.before_pause()
        assert fake.was_told("migrate_cancel", "migrate-continue", "cont")[:2] == ["migrate_cancel", "migrate-continue"]
        assert await status(machine) == "running"


async def test_one_that_saves_its_devices_is_never_cancelled(tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders(migrates="unread")) as (fake, machine):
        await machine.pause()
        await machine.resume()
        assert await status(machine) == "running"
        assert fake.was_told("migrate_cancel") == []


async def test_one_that_was_told_to_go_on_and_has_not_heard_it(tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders(drops=["migrate-continue"])) as (fake, machine):
        await machine.pause()
        while not fake.was_told("migrate-continue"):  # noqa: ASYNC110 -- another process
            await trio.sleep(0.001)
        fake.order(Orders())
        await machine.resume()
        assert await status(machine) == "running"
        assert fake.was_told("migrate_cancel") == []


async def test_cancelled_before_the_pause_it_runs_on(tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders(migrates="silent")) as (fake, machine):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(machine.before_pause)
            while "migrate" not in fake.was_told():  # noqa: ASYNC110 -- another process
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
        assert await status(machine) == "running"
        assert fake.was_told()[-3:] == ["migrate_cancel", *WAY_BACK]


@pytest.mark.parametrize("command", ["migrate-set-capabilities", "migrate-set-parameters", "getfd", "migrate"])
async def test_what_is_refused_leaves_it_running(command: str, tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders(refuses={command: ["not today"]})) as (_, machine):
        before = await machine._capabilities()
        with pytest.raises(QemuError, match=f"refuses {command}: not today"):
            await machine.pause()
        assert await status(machine) == "running"
        assert await machine._capabilities() == before
        await machine.pause()
        assert await machine.save_state() == STATE


async def test_a_disk_that_is_locked_is_tried_again(tmp_path: Path) -> None:
    locked = 'Failed to get shared "write" lock'
    async with prepared(tmp_path, Orders(refuses={"cont": [locked] * 3})) as (fake, machine):
        await machine.pause()
        await machine.save_state()
        await machine.resume()
        assert fake.was_told("cont") == ["cont"] * 4
        assert await status(machine) == "running"


async def test_a_disk_that_stays_locked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "GO_ON_TIMEOUT_S", 0.2)
    locked = 'Failed to get shared "write" lock on /disk'
    async with prepared(tmp_path, Orders(refuses={"cont": [locked] * 1000})) as (_, machine):
        await machine.pause()
        await machine.save_state()
        with pytest.raises(MigrationError, match="lock on /disk"):
            await machine.resume()
        assert machine.statistics().state is MachineState.PAUSED


async def test_a_way_back_that_failed_is_gone_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause has failed, and so has the way back: the engine tells it to run once more."""
    async with prepared(tmp_path) as (fake, machine):
        before = await machine._capabilities()
        fake.order(Orders(migrates="silent", hangs=["query-migrate"]))
        with monkeypatch.context() as patch:
            patch.setattr(source, "GO_ON_TIMEOUT_S", 0.2)
            patch.setattr(source, "STOP_TIMEOUT_S", 0.1)
            with pytest.raises(MigrationError, match="has not stopped its guest"):
                await machine.before_pause()
        assert machine.statistics().state is MachineState.PAUSED
        fake.order(Orders())
        await machine.resume()
        assert fake.was_told() == [*SET_UP, "migrate_cancel", *WAY_BACK]
        assert machine.statistics().state is MachineState.RUNNING
        assert await machine._capabilities() == before


@pytest.mark.parametrize("command", ["query-migrate", "query-status", "cont"])
async def test_the_way_back_ends_before_the_engine_gives_up(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "GO_ON_TIMEOUT_S", 0.2)
    async with prepared(tmp_path) as (fake, machine):
        await machine.pause()
        await machine.save_state()
        fake.order(Orders(hangs=[command]))
        with trio.fail_after(RESUME_TIMEOUT_S), pytest.raises(MigrationError, match="has not answered"):
            await machine.resume()
    assert source.RESTORE_TIMEOUT_S + 7.0 < RESUME_TIMEOUT_S


async def test_a_guest_that_cannot_go_on_is_named(tmp_path: Path) -> None:
    async with prepared(tmp_path) as (fake, machine):
        await machine.pause()
        fake.order(Orders(says={"query-status": {"status": "io-error"}}))
        with pytest.raises(MigrationError, match="it is io-error"):
            await machine.resume()
        fake.order(Orders())
        await machine.resume()
        assert await status(machine) == "running"


@pytest.mark.parametrize("command", ["migrate-set-capabilities", "migrate"])
async def test_a_migration_of_somebody_else_is_left_alone(command: str, tmp_path: Path) -> None:
    """It may have completed by then: the guest runs elsewhere."""
    why = "There's a migration process in progress"
    async with prepared(tmp_path, Orders(refuses={command: [why]})) as (fake, machine):
        asked = len(fake.was_told("query-migrate"))
        with pytest.raises(QemuError, match=why):
            await machine.pause()
        assert len(fake.was_told("query-migrate")) == asked
        assert fake.was_told("cont") == fake.was_told("migrate_cancel") == []
        assert machine.statistics().state is MachineState.RUNNING


async def test_a_monitor_that_breaks_before_the_pause_is_opened_again(tmp_path: Path) -> None:
    async with prepared(tmp_path) as (fake, machine):
        fake.order(Orders(drops=["migrate"]))
        with pytest.raises(QemuInDoubt):
            await machine.pause()
        fake.order(Orders())
        assert await status(machine) == "running"
        await machine.pause()
        assert await machine.save_state() == STATE


@pytest.mark.parametrize("how", ["drops", "raw"])
@pytest.mark.parametrize("command", ["query-migrate", "query-status", "cont"])
async def test_a_monitor_that_breaks_on_the_way_back_is_opened_again(how: str, command: str, tmp_path: Path) -> None:
    async with prepared(tmp_path) as (fake, machine), trio.open_nursery() as nursery:
        await machine.pause()
        await machine.save_state()
        asked = len(fake.was_told(command))

        async def twice() -> None:
            while len(fake.was_told(command)) < asked + 2:  # noqa: ASYNC110 -- another process
                await trio.sleep(0.001)
            fake.order(Orders())

        fake.order(Orders(drops=[command]) if how == "drops" else Orders(raw={command: "no JSON\n"}))
        nursery.start_soon(twice)
        await machine.resume()
        assert await status(machine) == "running"


async def test_its_death_in_the_pause(tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders(migrates="dies")) as (_, machine):
        with pytest.raises(PostcopyError, match="may have ended"):
            await saved(machine)
        while machine.statistics().state is not MachineState.FAILED:  # its sockets end before it
            await machine.wait_changed()
        assert "has ended" in machine.statistics().failure_text
        with pytest.raises(PostcopyError):
            await machine.save_state()


async def test_letting_go_of_it_changes_nothing(tmp_path: Path) -> None:
    async with prepared(tmp_path) as (fake, machine):
        await machine.pause()
        await machine.save_state()
        await machine.close()
        await machine.close()
        assert fake.process.poll() is None
        assert fake.was_told() == [*SET_UP, "migrate-continue", *WAY_BACK]
        with pytest.raises(trio.ClosedResourceError):
            await machine.wait_changed()
        async with QemuMachine.create(str(fake.qmp_path)) as next_one:  # the monitor is free, and the claim
            with pytest.raises(ConfigurationError, match=r"stopped \(postmigrate\).*cont"):
                await next_one.prepare()


@pytest.mark.parametrize("hangs", [False, True])
async def test_one_that_has_left_is_ended(hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "QUIT_TIMEOUT_S", 0.1 if hangs else BOUND_S)
    async with prepared(tmp_path, Orders(hangs=["quit"] if hangs else [])) as (fake, machine):
        await machine.pause()
        await machine.save_state()
        await machine.destroy()
        signalled = signal.SIGKILL if hangs else signal.SIGTERM  # by which the fake ends itself
        assert await trio.to_thread.run_sync(fake.process.wait, BOUND_S) == -signalled


async def test_one_that_nobody_wants_is_ended(tmp_path: Path) -> None:
    """In good order, also while it runs: a disk may have to be written."""
    async with prepared(tmp_path) as (fake, machine):
        await machine.destroy()
        assert await trio.to_thread.run_sync(fake.process.wait, BOUND_S) == -signal.SIGTERM


async def test_its_end_is_noticed(tmp_path: Path) -> None:
    async with prepared(tmp_path) as (fake, machine):
        noticed = 0

        async def notice() -> None:
            nonlocal noticed
            while machine.statistics().state is not MachineState.FAILED:
                await machine.wait_changed()
            noticed += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(notice)
            nursery.start_soon(notice)
            await trio.testing.wait_all_tasks_blocked()
            fake.process.kill()
        assert noticed == 2


async def test_what_it_says_is_read_while_nobody_asks(tmp_path: Path) -> None:
    """A QEMU is looked after for weeks: its events must not pile up."""
    async with prepared(tmp_path) as (fake, machine), trio.open_nursery() as nursery:
        nursery.start_soon(machine.wait_changed)
        fake.order(Orders(events=2_000))
        assert await status(machine) == "running"
        await machine.pause()
        assert await machine.save_state() == STATE
        nursery.cancel_scope.cancel()


async def test_one_belongs_to_one(tmp_path: Path) -> None:
    async with prepared(tmp_path) as (_, machine):
        other = QemuMachine.create(machine._qmp)
        with pytest.raises(BusyError, match="belongs to another postcopy"):
            other._hold(machine._monitor.process)  # type: ignore[union-attr]
        await other.close()


REFUSED: list[tuple[Orders, type[PostcopyError], str]] = [
    (is_now("paused"), ConfigurationError, r"stopped \(paused\); tell it to run first \(cont\)"),
    (is_now("postmigrate"), ConfigurationError, "does not run elsewhere"),
    (is_now("finish-migrate"), ConfigurationError, "migrate_cancel"),
    (is_now("inmigrate"), ConfigurationError, "waits for a guest"),
    (is_now("guest-panicked"), ConfigurationError, "guest-panicked"),
    (Orders(version=[3, 1, 0]), ConfigurationError, r"3\.1\.0 cannot be moved: that needs 4\.0"),
    (
        saying("query-migrate-capabilities", [{"capability": "events", "state": False}]),
        ConfigurationError,
        "x-ignore-shared",
    ),
    (saying("query-migrate", {"status": "active"}), BusyError, r"somebody else \(active\)"),
    (saying("query-migrate", {"status": "postcopy-paused"}), BusyError, "postcopy-paused"),
    (saying("query-migrate", {"blocked-reasons": ["VFIO device"]}), ConfigurationError, "VFIO device"),
    (
        Orders(mib={}, ramblock=block("pc.ram", 128)),
        ConfigurationError,
        r"128 MiB \(pc.ram\) is private.*-object memory-backend-file,id=ram0,size=128M,mem-path=\S+,share=on"
        r" -machine \.\.\.,memory-backend=ram0",
    ),
    (Orders(mib={}, ramblock=block("pc.bios", 1)), ConfigurationError, "no memory of this QEMU is shared"),
    (Orders(mib={}), QemuAnswer, "info ramblock"),
    (Orders(mib={}, ramblock=" " * 200_000 + "4 KiB 0x0 0x0"), QemuAnswer, "info ramblock"),
    (Orders(mib={}, ramblock=block("ram0", 8).replace("0x", "0x" + "f" * 5000)), QemuAnswer, "info ramblock"),
    (Orders(ramblock="\n".join([block("ram0", 8)] * 64)), ConfigurationError, "more than 64 memory backends"),
    (saying("query-block-jobs", [{"type": "backup", "device": "j0"}]), ConfigurationError, r"\(backup j0\): wait"),
    (saying("query-block-jobs", [{"type": "mirror", "ready": True}]), ConfigurationError, "write-blocking"),
    (Orders(ramblock=block("0000:00:02.0/vga.vram", 64)), ConfigurationError, "vgamem_mb=16"),
    (Orders(ramblock=block("ram0", 64)), QemuAnswer, "8388608 bytes, and 67108864"),
    (
        saying("query-memdev", [{"id": "ram0", "size": 64 * MIB, "share": False}], {}, block("ram0", 64)),
        ConfigurationError,
        "ram0 of 64 MiB is private.*add share=on",
    ),
    (objects("memory-backend-memfd", [10, 0, 1]), ConfigurationError, r"memfd, which QEMU 10\.0\.1 sends itself"),
    (objects("memory-backend-ram"), ConfigurationError, "memory-backend-ram"),
    (saying("qom-get /objects/ram0 pmem", True), ConfigurationError, "pmem=on"),
    (saying("qom-get /objects/ram0 readonly", True), ConfigurationError, "readonly=on"),
    (saying("qom-get /objects/ram0 mem-path", "/dev/shm/another"), ConfigurationError, "is not certain"),
    (saying("qom-get /objects/ram0 mem-path", "/dev/shm"), ConfigurationError, "is not certain"),
    (saying("qom-get /objects/ram0 mem-path", "a\0b"), ConfigurationError, "is not certain"),
    (device("vhost-user-fs-pci"), ConfigurationError, r"device\[0\] \(vhost-user-fs-pci\)"),
    (device("vfio-pci"), ConfigurationError, "vfio-pci.*hardware writes"),
    (device("virtio-mem-pci"), ConfigurationError, "virtio-mem-pci.*plugged in pieces"),
    (device("nvdimm"), ConfigurationError, "nvdimm"),
    (device("ivshmem-plain"), ConfigurationError, "shared with others"),
    (
        saying("human-monitor-command info network", "n0: index=0,type=vhost-user,x"),
        ConfigurationError,
        "network of type vhost-user",
    ),
    (saying("query-cpus-fast", []), QemuAnswer, "no CPU"),
    (
        saying("query-cpus-fast", [{"cpu-index": 0, "thread-id": 1, "qom-path": "/c"}]),
        ConfigurationError,
        "not the QEMU",
    ),
    (saying("query-cpus-fast", [{"cpu-index": "x"}]), QemuAnswer, "makes no sense"),
    (saying("query-memdev", {"a": 1}), QemuAnswer, "makes no sense"),
    (saying("query-named-block-nodes", [1]), QemuAnswer, "makes no sense"),
    (saying("query-kvm", None), QemuAnswer, "makes no sense"),
    (saying("query-migrate-capabilities", [{"x": 1}]), MigrationError, "capable"),
    (saying("query-status", 3), ConfigurationError, "no guest that runs"),
    (Orders(drops=["qom-get"]), QemuInDoubt, "has closed its monitor"),
    (Orders(raw={"query-status": "SSH-2.0\n"}), QemuAnswer, "not JSON"),
]


async def test_what_cannot_be_moved_is_refused_by_name(tmp_path: Path) -> None:
    with fake_qemu(tmp_path) as fake, trio.fail_after(BOUND_S):
        for orders, error, why in REFUSED:
            fake.order(orders)
            async with QemuMachine.create(str(fake.qmp_path)) as machine:
                with pytest.raises(error, match=why):
                    await machine.prepare()
        assert fake.was_told() == []
        fake.order(Orders())
        async with QemuMachine.create(str(fake.qmp_path)) as machine:
            await machine.prepare()
        fake.order(Orders(dies=["query-memdev"]))
        async with QemuMachine.create(str(fake.qmp_path)) as machine:
            with pytest.raises(QemuInDoubt, match="may have ended"):
                await machine.prepare()


async def test_a_mirror_that_loses_nothing_may_run(tmp_path: Path) -> None:
    jobs = [{"type": "mirror", "device": "j0", "ready": True, "actively-synced": True}]
    async with prepared(tmp_path, saying("query-block-jobs", jobs)) as (fake, machine):
        await machine.pause()
        await machine.resume()
        fake.order(saying("query-block-jobs", [jobs[0] | {"actively-synced": False}]))
        with pytest.raises(ConfigurationError, match="j0"):
            await machine.before_pause()
        assert await status(machine) == "running"


async def test_memory_that_was_plugged_since_is_noticed(tmp_path: Path) -> None:
    async with prepared(tmp_path) as (fake, machine):
        fake.order(Orders(ramblock=" dimm1 4 KiB 0x0 0x4000000 0x4000000"))
        with pytest.raises(MigrationError, match="other memory than when it was looked at"):
            await machine.before_pause()
        assert fake.was_told() == []


async def test_a_guest_that_was_stopped_by_somebody_else(tmp_path: Path) -> None:
    async with prepared(tmp_path) as (fake, machine):
        fake.order(Orders(says={"query-status": {"status": "paused"}}))
        with pytest.raises(ConfigurationError, match="stopped"):
            await machine.before_pause()
        assert fake.was_told() == []


async def test_it_is_stopped_for_a_look_where_disks_pin_memory(tmp_path: Path) -> None:
    async with prepared(tmp_path) as (fake, machine):
        async with machine.settled():
            assert fake.was_told() == []
        fake.order(Orders(says=PINS))  # a disk that was plugged
        async with machine.settled():
            assert await status(machine) == "paused"
        assert await status(machine) == "running"
        with pytest.raises(ZeroDivisionError):
            async with machine.settled():
                raise ZeroDivisionError
        assert fake.was_told() == ["stop", "cont"] * 2
        async with machine.settled():
            with trio.CancelScope() as scope:
                scope.cancel()
                await trio.sleep_forever()
        assert await status(machine) == "running"
        await machine.pause()
        async with machine.settled():
            assert "stop" not in fake.was_told()[-2:]
        await machine.resume()


async def test_it_runs_after_a_look_in_which_the_monitor_breaks(tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders(says=PINS)) as (fake, machine), trio.open_nursery() as nursery:
        asked = len(fake.was_told("query-status"))

        async def once() -> None:
            while len(fake.was_told("query-status")) < asked + 2:  # noqa: ASYNC110 -- another process
                await trio.sleep(0.001)
            fake.order(Orders(says=PINS))

        async with machine.settled():
            fake.order(Orders(says=PINS, drops=["query-status"]))
            nursery.start_soon(once)
        assert await status(machine) == "running"
        assert fake.was_told() == ["stop", "cont"]


async def test_it_is_said_when_it_may_still_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with prepared(tmp_path, Orders(says=PINS)) as (fake, machine):
        with monkeypatch.context() as patch:
            patch.setattr(source, "GO_ON_TIMEOUT_S", 0.1)
            with pytest.raises(MigrationError, match=r"cannot go on .*closed its monitor"):
                async with machine.settled():
                    fake.order(Orders(says=PINS, drops=["query-status"]))
        assert machine.statistics().state is MachineState.PAUSED
        fake.order(Orders(says=PINS))
        await machine.resume()  # as the engine does when the migration has failed
        assert await status(machine) == "running"
        assert machine.statistics().state is MachineState.RUNNING
        assert fake.was_told() == ["stop", "cont"]
        await machine.resume()  # once
        assert fake.was_told() == ["stop", "cont"]
        with monkeypatch.context() as patch:
            patch.setattr(source, "GO_ON_TIMEOUT_S", 0.1)
            with pytest.raises(MigrationError, match="cannot go on"):
                async with machine.settled():
                    fake.order(Orders(says=PINS, drops=["query-status"]))
        fake.order(Orders(says=PINS))
        async with machine.settled():  # of another migration: it runs, and is stopped again
            assert await status(machine) == "paused"
        assert fake.was_told() == ["stop", "cont", "stop", "cont", "stop", "cont"]
        with pytest.raises(MigrationError, match=r"has ended while its memory was looked at$"):
            async with machine.settled():
                fake.order(Orders(says=PINS, dies=["query-status"]))


async def test_it_stays_stopped_where_another_client_has_moved_it(tmp_path: Path) -> None:
    """It runs elsewhere."""
    async with prepared(tmp_path, Orders(says=PINS)) as (fake, machine):
        with pytest.raises(MigrationError, match=r"it is postmigrate; .*only if it does not run elsewhere"):
            async with machine.settled():
                fake.order(Orders(says=PINS | {"query-status": {"status": "postmigrate"}}))
        with pytest.raises(MigrationError, match="it is postmigrate"):
            await machine.resume()
        assert fake.was_told() == ["stop"]


async def test_it_stays_stopped_where_somebody_else_has_stopped_it(tmp_path: Path) -> None:
    async with prepared(tmp_path) as (fake, machine):
        fake.order(Orders(says=PINS | {"query-status": {"status": "paused"}}))
        with pytest.raises(ConfigurationError, match="is stopped"):
            async with machine.settled():
                pytest.fail("it was looked at")
        assert fake.was_told() == []


async def test_the_command_line_of_its_twin(tmp_path: Path) -> None:
    with fake_qemu(tmp_path) as fake:
        assert (await trio.to_thread.run_sync(command_line_of, fake.process.pid))[-1].endswith("orders.json")
    with pytest.raises(MigrationError, match="no process"):
        command_line_of(fake.process.pid)
    words = [
        "qemu",
        "-S",
        "-m",
        "1G",
        "--incoming",
        "tcp:0:1",
        "-loadvm",
        "x",
        "-drive",
        "file=/a b",
        "-netdev",
        "tap,fd=3",
    ]
    command, warnings = twin(words)
    assert command == ["qemu", "-m", "1G", "-drive", "file=/a b", "-netdev", "tap,fd=3", "-incoming", "defer", "-S"]
    assert [warning.partition(":")[0] for warning in warnings] == ["tap,fd=3"]
    assert twin(command)[0] == command


def test_what_a_state_says_of_itself_is_not_sent() -> None:
    state = bytes(range(256)) * 3 + b"\x06\0\0\0\x05{"  # as a device may have it: so much does not follow
    for said in (b'{"page_size": 4096, "devices": []}', b'{"configuration": {}, "page_size": 4096}'):  # 7.2, 10.0
        whole = state + b"\x06" + len(said).to_bytes(4, "big") + said
        assert source._without_description(whole) == state + b"\x06" + bytes(4)
    assert source._without_description(state) == state


def test_what_a_guest_has_put_into_its_devices_is_not_taken_for_the_description() -> None:
    """Marks with the right length, but not all that follows them is ASCII."""
    marks, rest = 1000, b"\xff" + b"{" * 1000
    size = marks * 6 + len(rest)
    state = b"".join(b"\x06" + (size - at * 6 - 5).to_bytes(4, "big") + b"{" for at in range(marks)) + rest
    assert source._without_description(state) == state
    said = b'{"page_size": 4096}'
    whole = state + b"\x06" + len(said).to_bytes(4, "big") + said
    assert source._without_description(whole) == state + b"\x06" + bytes(4)
