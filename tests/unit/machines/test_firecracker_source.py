# SPDX-License-Identifier: Apache-2.0
"""A Firecracker at the source, with one that is none: what it may say and do, and what is refused by name."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from fake_firecracker import MIB, STATE, FakeFirecracker, Orders, fake_firecracker

from postcopy._fd import FdHolder
from postcopy.errors import BusyError, ConfigurationError, MigrationError, PostcopyError, ResourceError
from postcopy.machines import BlockLayout, MachineState
from postcopy.machines.firecracker import source
from postcopy.machines.firecracker._process import Area, find_regions, region_sizes
from postcopy.machines.firecracker.api import FirecrackerInDoubt
from postcopy.machines.firecracker.destination import ArrivingFirecracker, FirecrackerHost
from postcopy.machines.firecracker.source import FirecrackerMachine, version_of
from postcopy.memory import RemoteMemory

BOUND_S = 30.0
PAGE = os.sysconf("SC_PAGE_SIZE")


@asynccontextmanager
async def prepared(directory: Path, orders: Orders) -> AsyncIterator[tuple[FakeFirecracker, FirecrackerMachine]]:
    with fake_firecracker(directory, orders) as fake, trio.fail_after(BOUND_S):
        async with FirecrackerMachine.create(str(fake.api_socket)) as machine:
            await machine.prepare()
            yield fake, machine


async def test_what_it_is_is_found(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "drives": [{"drive_id": "root", "path_on_host": "/disk", "is_read_only": True, "other": 1}],
        "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0"}],
        "vsock": {"guest_cid": 3, "uds_path": "/v.sock"},
        "balloon": None,
    }
    async with prepared(tmp_path, Orders(config=config)) as (_, machine):
        assert machine.config() == {
            "regions": [8 * MIB],
            "vcpus": 1,
            "version": "1.12.1",
            "drives": {"root": {"path": "/disk", "read-only": True}},
            "nets": {"eth0": "tap0"},
            "vsock": "/v.sock",
        }
        (block,) = machine.blocks
        assert (block.name, block.memory.size_bytes, block.memory.page_bytes) == ("memory", 8 * MIB, PAGE)
        present = block.memory.present()
        assert [page for page in range(len(present)) if present[page]] == list(range(0, 8 * MIB // PAGE, 3))
        assert machine.statistics().state is MachineState.RUNNING
        assert machine.live
        assert machine.outlives


async def test_its_memory_is_read_from_outside(tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders()) as (_, machine):
        memory = machine.blocks[0].memory
        await machine.dump(tmp_path / "dump")
        content = await trio.to_thread.run_sync((tmp_path / "dump").read_bytes)
        assert len(content) == 8 * MIB
        for page in range(8 * MIB // PAGE):
            number = int.from_bytes(content[page * PAGE : page * PAGE + 8], "little")
            assert number == (page * PAGE if page % 3 == 0 else 0)
        assert memory.resident_bytes() == -(-8 * MIB // PAGE // 3) * PAGE


async def test_it_is_paused_with_its_state_and_goes_on(tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders()) as (fake, machine):
        assert machine._exchange is not None
        directory = machine._exchange.path
        assert os.listdir(directory) == []
        await machine.before_pause()
        assert fake.was_told() == []
        for _ in range(3):
            await machine.pause()
            assert machine.statistics().state is MachineState.PAUSED
            state = await machine.save_state()
            assert state[:-8] == STATE
            await machine.resume()
            assert machine.statistics().state is MachineState.RUNNING
            assert machine.statistics().first_run_ns > machine.statistics().paused_ns > 0
            with pytest.raises(MigrationError, match="while it is paused"):
                await machine.save_state()
        await machine.resume()  # it runs: nothing is said
        assert fake.was_told() == ["PATCH Paused", "PUT /snapshot/create", "PATCH Resumed"] * 3
        assert os.listdir(directory) == []
    assert os.path.basename(directory) not in os.listdir(os.path.dirname(directory))
    assert fake.was_told()[-1] == "PATCH Resumed"


async def test_letting_go_of_it_changes_nothing(tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders()) as (fake, machine):
        await machine.pause()
        await machine.close()
        await machine.close()
        assert fake.process.poll() is None
        assert fake.was_told() == ["PATCH Paused", "PUT /snapshot/create"]
        with pytest.raises(trio.ClosedResourceError):
            await machine.wait_changed()


async def test_one_that_has_left_is_killed(tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders()) as (fake, machine):
        await machine.destroy()
        assert await trio.to_thread.run_sync(fake.process.wait, BOUND_S) == -signal.SIGKILL


async def test_its_end_is_noticed(tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders()) as (fake, machine):
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
        assert "has ended" in machine.statistics().failure_text
        with trio.move_on_after(0.01) as scope:  # told once: who waits again waits for something else
            await machine.wait_changed()
        assert scope.cancelled_caught
        with pytest.raises(PostcopyError):
            await machine.pause()


REFUSED = {
    "not started": (Orders(state="Not started"), ConfigurationError, "no microVM that runs"),
    "paused": (Orders(state="Paused"), ConfigurationError, "does not run elsewhere"),
    "too old": (Orders(version="1.4.1"), ConfigurationError, "needs 1.5"),
    "no version": (Orders(version="?"), ConfigurationError, "needs 1.5"),
    "memory elsewhere": (Orders(mib=16), MigrationError, "is not certain"),
    "memory twice": (Orders(maps_mib=[8, 8]), MigrationError, "is not certain"),
    "memory that is plugged": (Orders(config={"memory-hotplug": {}}), ConfigurationError, "plugged"),
    "a vhost-user drive": (
        Orders(config={"drives": [{"drive_id": "a", "socket": "/s"}]}),
        ConfigurationError,
        "vhost-user",
    ),
    "no memory": (Orders(mib=0), MigrationError, "0 MiB"),
    "too much memory": (Orders(mib=1 << 40), MigrationError, "MiB of memory"),
    "nonsense": (Orders(config={"drives": 7}), MigrationError, "makes no sense"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_moved_is_refused_by_name(tmp_path: Path, name: str) -> None:
    orders, kind, text = REFUSED[name]
    with fake_firecracker(tmp_path, orders) as fake, trio.fail_after(BOUND_S):
        async with FirecrackerMachine.create(str(fake.api_socket)) as machine:
            assert machine.blocks == ()
            with pytest.raises(kind, match=text):
                await machine.prepare()
            assert machine._exchange is None
        assert fake.was_told() == []


async def test_a_firecracker_belongs_to_one_machine_at_a_time(tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders()) as (fake, machine):
        async with FirecrackerMachine.create(str(fake.api_socket)) as second:
            with pytest.raises(BusyError, match="another postcopy"):
                await second.prepare()
        fake.order(Orders(state="Not started"))
        arriving = ArrivingFirecracker.for_destination(
            {"regions": [8 * MIB], "version": "1.12.1"},
            [BlockLayout("memory", 8 * MIB, PAGE)],
            FirecrackerHost(str(fake.api_socket)),
        )
        with pytest.raises(BusyError, match="another postcopy"):
            await arriving.prepare()
        await arriving.close()
        fake.order(Orders())
        await machine.close()
        async with FirecrackerMachine.create(str(fake.api_socket)) as third:
            await third.prepare()


NO_STATE = {
    "another refusal": (Orders(fault="Create snapshot error: something else"), "something else"),
    "about the state file": (
        Orders(fault="Cannot perform open on the snapshot backing file: Permission denied"),
        "snapshot backing file",
    ),
    "success": (Orders(fault=""), "cannot be there"),
    "no file": (Orders(writes="nothing"), "cannot be read"),
    "a damaged one": (Orders(writes="damaged"), "not complete"),
    "one without an end": (Orders(writes="long"), "longer than"),
    "a link": (Orders(writes="link"), "cannot be read"),
}


@pytest.mark.parametrize("name", NO_STATE)
async def test_one_whose_state_cannot_be_had_runs_on(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "MAX_STATE_BYTES", 1 << 16)
    orders, text = NO_STATE[name]
    async with prepared(tmp_path, orders) as (fake, machine):
        with pytest.raises(MigrationError, match=text):
            await machine.pause()
        assert machine.statistics().state is MachineState.RUNNING
        assert fake.was_told() == ["PATCH Paused", "PUT /snapshot/create", "PATCH Resumed"]
        fake.order(Orders())
        await machine.pause()
        assert (await machine.save_state())[:-8] == STATE


async def test_one_that_does_not_pause_in_time_is_told_to_run(tmp_path: Path) -> None:
    """Its one thread may wait for a page: what it is told takes effect when that has come, and in order."""
    async with prepared(tmp_path, Orders(hangs=["PATCH Paused"])) as (fake, machine):
        with pytest.raises(FirecrackerInDoubt, match="PATCH /vm"):
            await machine.pause(timeout_s=0.2)
        assert machine.statistics().state is MachineState.RUNNING
        while (told := fake.was_told()) != ["PATCH Paused"]:  # the other one waits in its socket
            assert told == []
            await trio.sleep(0.01)


async def test_a_resume_without_an_answer_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with prepared(tmp_path, Orders()) as (fake, machine):
        await machine.pause()
        asked: list[str] = []
        ask = machine._api.request

        async def request(method: str, path: str, body: object, timeout_s: float) -> Any:
            asked.append(method)
            answer = await ask(method, path, body, timeout_s)
            if len(asked) == 1:
                raise FirecrackerInDoubt("the answer was lost")
            return answer

        monkeypatch.setattr(machine._api, "request", request)
        await machine.resume()
        assert asked == ["PATCH", "GET"]
        assert machine.statistics().state is MachineState.RUNNING
        assert fake.was_told()[-1] == "PATCH Resumed"


async def test_its_userfaultfd_is_closed_where_its_memory_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: object) -> None:
        raise MigrationError("it has ended")

    holder = FdHolder(os.open(os.devnull, os.O_RDONLY))
    monkeypatch.setattr(source, "userfaultfd_of", lambda *_: holder)
    monkeypatch.setattr(RemoteMemory, "found", ended)
    with pytest.raises(MigrationError, match="it has ended"):
        async with prepared(tmp_path, Orders()):
            pass
    assert holder.closed


async def test_without_a_userfaultfd_it_cannot_be_sent_while_it_runs(tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders()) as (_, machine):
        with pytest.raises(ResourceError, match="not restored through a userfaultfd"):
            machine.dirty_log()


async def test_while_it_is_served_no_page_counts_as_absent(tmp_path: Path) -> None:
    async with prepared(tmp_path, Orders()) as (_, machine):
        memory = machine._memory
        assert memory is not None
        memory.incomplete = True
        assert memory.present().count() == memory.pages
        assert memory.present(2 * PAGE).count() == memory.pages // 2


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="how x86-64 lays out a guest")
@pytest.mark.parametrize(
    ("version", "gib", "sizes"),
    [
        ((1, 12), 3.25, [3.25]),
        ((1, 12), 4, [3.25, 0.75]),
        ((1, 13), 3.25, [3, 0.25]),
        ((1, 13), 300, [3, 252, 45]),
        ((1, 5), 300, [3.25, 296.75]),
    ],
)
def test_regions_by_version(version: tuple[int, int], gib: float, sizes: list[float]) -> None:
    assert region_sizes(version, int(gib * (1 << 30))) == [int(size * (1 << 30)) for size in sizes]


def area(start_mib: int, mib: int) -> Area:
    return Area(start_mib * MIB, (start_mib + mib) * MIB, PAGE, frozenset(), False)


def test_regions_that_are_apart_are_told_by_their_sizes() -> None:
    regions = find_regions(0, [3 * MIB, MIB], [area(10, 1), area(20, 3)])
    assert [(region.address, region.size_bytes, region.offset) for region in regions] == [
        (20 * MIB, 3 * MIB, 0),
        (10 * MIB, MIB, 3 * MIB),
    ]


def test_regions_of_one_size_cannot_be_told_apart() -> None:
    with pytest.raises(MigrationError, match="not certain"):
        find_regions(0, [2 * MIB, 2 * MIB], [area(10, 2), area(20, 2)])


@pytest.mark.parametrize("signature_mib", [0, 2, -1])
async def test_regions_that_are_adjacent_are_told_by_what_begins_a_guest(
    tmp_path: Path, signature_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is below the first, or above it: in one mapping."""
    monkeypatch.setattr(source, "region_sizes", lambda *_: [6 * MIB, 2 * MIB])
    at = signature_mib * MIB + 0xE0000 if signature_mib >= 0 else -1
    orders = Orders(signature_at=at)
    if signature_mib < 0:
        with pytest.raises(MigrationError, match="in which order is not seen"):
            async with prepared(tmp_path, orders):
                pass
        return
    async with prepared(tmp_path, orders) as (_, machine):
        first, second = machine._regions
        assert (first.size_bytes, second.size_bytes, second.offset) == (6 * MIB, 2 * MIB, 6 * MIB)
        assert first.address - second.address == (2 * MIB if signature_mib else -6 * MIB)
        await machine.dump(tmp_path / "dump")
    content = await trio.to_thread.run_sync((tmp_path / "dump").read_bytes)
    for page in range(8 * MIB // PAGE):
        mapped = (page * PAGE + signature_mib * MIB) % (8 * MIB)  # each page holds its place there
        number = int.from_bytes(content[page * PAGE : page * PAGE + 8], "little")
        if mapped != at:
            assert number == (mapped if mapped // PAGE % 3 == 0 else 0)


def test_versions() -> None:
    assert version_of("1.12.1") == (1, 12)
    assert version_of("v1.13.0-dev") == (1, 13)
    for wrong in ("2", "1.", "1.\u00b2", "1." + 5000 * "1", "x1.12"):
        assert version_of(wrong) == (0, 0)
    assert version_of("") == (0, 0)
