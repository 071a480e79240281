# SPDX-License-Identifier: Apache-2.0
"""Memory is promised once."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from postcopy.errors import ResourceError
from postcopy.machines import BlockLayout, Machine
from postcopy.machines.kinds import MachineOptions, create_destination, create_source
from postcopy.memory import Extent, Memory, RemoteMemory, _admission, check_memory
from postcopy.memory._admission import HEADROOM_BYTES, PROMISES, Promises, Room, find_rooms, overhead_bytes

MIB = 1 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")


class Group:
    """A limit of 300 MiB of which the process has used some."""

    def __init__(self) -> None:
        self.used = 45 * MIB

    def rooms(self) -> Iterator[Room]:
        yield Room("this host", 1 << 40, "")
        yield Room("the control group of this process", 300 * MIB - self.used, "or raise the group's limit")


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    """And nothing that tests before this one may have left behind counts."""
    group = Group()
    monkeypatch.setattr(_admission, "find_rooms", group.rooms)
    monkeypatch.setattr(PROMISES, "_promises", [])
    return group


def arriving(size_bytes: int = 64 * MIB) -> Machine:
    shared = size_bytes // 2
    layout = [BlockLayout("shared", shared, 4096), BlockLayout("vcpu0", size_bytes - shared, 4096)]
    config: dict[str, Any] = {"vcpus": 1, "workload": "random", "working-set-bytes": 0, "seed": 1}
    return create_destination("rv64", config, layout)


@pytest.mark.needs("uffd-user")
async def test_eight_machines_together(group: Group) -> None:
    """Each of them alone would fit; what has been promised to one is not promised to the next."""
    async with AsyncExitStack() as stack:
        taken = 0
        for _ in range(8):
            with suppress(ResourceError):
                await stack.enter_async_context(arriving())
                taken += 1
        assert taken == 3
        with pytest.raises(ResourceError, match=r"the control group of this process has 255 MiB available") as caught:
            arriving()
        assert "promised to machines here" in str(caught.value)
        with pytest.raises(ResourceError):  # one that is started here counts no less
            create_source("rv64", MachineOptions(memory_bytes=64 * MIB, vcpus=1))
    async with arriving(192 * MIB):  # they have ended, their memory is free again
        pass


@pytest.mark.needs("uffd-user")
async def test_what_is_resident_is_counted_once(group: Group) -> None:
    async with arriving(128 * MIB) as machine:
        assert PROMISES.outstanding_bytes() == 128 * MIB + overhead_bytes(128 * MIB)
        block = machine.blocks[0].memory
        block.write(0, b"x" * (32 * MIB))
        assert PROMISES.outstanding_bytes() == 96 * MIB + overhead_bytes(128 * MIB)
        group.used += 32 * MIB  # as the kernel says
        async with arriving(64 * MIB):
            pass
        group.used += 64 * MIB  # another process's
        with pytest.raises(ResourceError):
            arriving(64 * MIB)
    assert PROMISES.outstanding_bytes() == 0


@pytest.mark.parametrize("kind", ["memfd", "anon"])
def test_unpopulated(kind: str) -> None:
    with Memory.create(kind, 8 * MIB) as memory:
        assert memory.unpopulated_bytes() == 8 * MIB
        memory.write(MIB, b"x" * MIB)
        assert memory.unpopulated_bytes() == 7 * MIB
        memory.discard(MIB, MIB)
        assert memory.unpopulated_bytes() == 8 * MIB


@pytest.mark.needs("uffd-user")
def test_unpopulated_memory_of_another_process() -> None:
    """All of it until it is known whose it is; then what its process has not been given; of one that has ended none."""
    size_bytes = 1 << 40
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        memory, pidfd = RemoteMemory(size_bytes, PAGE), os.pidfd_open(process.pid)
        try:
            assert memory.unpopulated_bytes() == size_bytes
            memory.found(process.pid, pidfd, [Extent(1 << 30, 0, size_bytes)])
            assert size_bytes - (1 << 30) < memory.unpopulated_bytes() < size_bytes
            process.kill()
            process.wait()
            assert memory.unpopulated_bytes() == 0
        finally:
            os.close(pidfd)
            memory.drop()


def test_images_count_too(group: Group) -> None:
    def image() -> Machine:
        return create_destination("image", {"file-bytes": 200 * MIB}, [BlockLayout("image", 200 * MIB, 4096)])

    first = image()
    with pytest.raises(ResourceError, match="promised"):
        image()
    first.blocks[0].memory.close()
    image().blocks[0].memory.close()


def test_machine_that_was_dropped(group: Group) -> None:
    promises = Promises()
    memory = Memory.create("memfd", 64 * MIB)
    promises.add([memory])
    assert promises.outstanding_bytes()
    memory.close()
    assert promises.outstanding_bytes() == 0
    assert not promises._promises


def test_exact(group: Group) -> None:
    fits = 64 * MIB + overhead_bytes(64 * MIB) + HEADROOM_BYTES
    group.used = 300 * MIB - fits
    check_memory("memfd", 64 * MIB)
    group.used += 1
    with pytest.raises(ResourceError, match=r"64 MiB.*remedy: end or migrate a machine, or raise"):
        check_memory("memfd", 64 * MIB)


class TestRooms:
    """Against files of its own."""

    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        original = _admission._text

        def text(path: Path) -> str:
            return original(tmp_path / str(path).lstrip("/"))

        monkeypatch.setattr(_admission, "_text", text)
        return tmp_path

    def write(self, root: Path, **files: str) -> None:
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def test_version_2(self, root: Path) -> None:
        group = "sys/fs/cgroup/system.slice/postcopy.service"
        self.write(
            root,
            **{
                "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    1000 kB\nSwapFree: 24 kB\n",
                "proc/self/cgroup": "0::/system.slice/postcopy.service\n",
                f"{group}/memory.max": "1000000\n",
                f"{group}/memory.current": "600000\n",
                f"{group}/memory.swap.max": "0\n",
                f"{group}/memory.stat": "anon 500000\ninactive_file 1000\nactive_file 2000\n",
                "sys/fs/cgroup/system.slice/memory.max": "max\n",
                "sys/fs/cgroup/system.slice/memory.current": "7\n",
                "sys/fs/cgroup/memory.max": "700000\n",
                "sys/fs/cgroup/memory.current": "600000\n",
                "sys/fs/cgroup/memory.swap.max": "max\n",
            },
        )
        assert [room.available_bytes for room in find_rooms()] == [1024 * 1024, 403_000, 100_000 + 24 * 1024]

    def test_version_1(self, root: Path) -> None:
        self.write(
            root,
            **{
                "proc/self/cgroup": "5:devices:/\n4:cpu,memory:/box\n0::/box\n",
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "500000\n",
                "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "600000\n",
                "sys/fs/cgroup/memory/box/memory.stat": "cache 1\ntotal_inactive_file 1\ntotal_active_file 2\n",
            },
        )
        assert [room.available_bytes for room in find_rooms()] == [-99_997]

    def test_nothing_known(self, root: Path) -> None:
        assert list(find_rooms()) == []
        Promises().check(1 << 60, find_rooms)
