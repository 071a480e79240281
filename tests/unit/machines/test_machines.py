# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: ASYNC240 -- files in these tests are small, and nothing else waits while they are looked at
"""What every machine promises, the image machine, and what is asked of options and offers. KVM itself: test_kvm.py."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio

from postcopy.errors import ConfigurationError, MigrationError, PostcopyError, ProtocolError, ResourceError
from postcopy.machines import BlockLayout, Machine
from postcopy.machines import kinds as machines
from postcopy.machines.image import ImageMachine
from postcopy.machines.kinds import HostOptions, MachineOptions, create_destination, create_source
from postcopy.machines.toy.disk import Disk
from postcopy.memory import Memory, page_bytes_of

PAGE = page_bytes_of("memfd")
MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Sparse, and not a whole number of pages."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.write(os.urandom(PAGE))
        file.seek(50 * PAGE)
        file.write(os.urandom(3 * PAGE + 17))
        file.truncate(70 * PAGE + 5)
    return path


def source_of(path: Path) -> ImageMachine:
    machine = create_source("image", MachineOptions(image=str(path)))
    assert isinstance(machine, ImageMachine)
    return machine


def move(destination: Machine, path: Path) -> None:
    """What the engine does, without the engine."""
    with path.open("rb") as file:
        destination.blocks[0].memory.load(file.fileno(), 0, path.stat().st_size)


# ---- image


@pytest.mark.needs("uffd")
@pytest.mark.parametrize("backing", ["memfd", "anon"])
async def test_an_image_moves_byte_by_byte_and_stays_sparse(image: Path, tmp_path: Path, backing: str) -> None:
    async with source_of(image) as source:
        await source.boot()
        assert (source.live, source.shards, source.vcpu_threads()) == (False, 1, [])
        assert source.layout == [BlockLayout("image", 71 * PAGE, PAGE)]
        config = msgpack.unpackb(msgpack.packb(source.config()))
        async with create_destination("image", config, source.layout, HostOptions(backing)) as destination:
            assert isinstance(destination, ImageMachine)
            await source.pause()
            await destination.load_state(await source.save_state())
            assert destination.layout[0].size_bytes == source.layout[0].size_bytes
            wrong = await destination.verify()
            assert not wrong.ok
            move(destination, image)
            check = await destination.verify()
            assert check.ok
            assert check.counts == {"bytes-checked": 70 * PAGE + 5}
            assert check.as_dict()["ok"] is True
            copy = tmp_path / "copy"
            await destination.dump(copy)
    assert copy.read_bytes() == image.read_bytes()
    assert copy.stat().st_blocks <= image.stat().st_blocks
    assert list(tmp_path.glob("*.part")) == []


async def test_several_migrations_share_a_source(image: Path) -> None:
    async with source_of(image) as source:
        states: list[bytes] = []

        async def migrate() -> None:
            await source.boot()
            await source.resume()
            await source.wait_ready()
            await source.pause()
            states.append(await source.save_state())

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(migrate)
        assert len(states) == 3
        assert len(set(states)) == 1


async def test_an_image_that_changes_is_noticed(image: Path) -> None:
    async with source_of(image) as source:
        await source.boot()
        os.utime(image, ns=(0, 0))
        with pytest.raises(MigrationError, match="has changed"):
            await source.save_state()


@pytest.mark.needs("uffd")
async def test_without_a_digest_nothing_is_verified(image: Path) -> None:
    async with (
        ImageMachine.from_file(image, verify=False) as source,
        ImageMachine.for_destination(source.config(), source.layout, "memfd") as destination,
    ):
        await destination.load_state(await source.save_state())
        assert not (await destination.verify()).ok


async def test_an_image_changes_by_its_end_only(image: Path, autojump_clock: trio.testing.MockClock) -> None:
    source = source_of(image)
    with trio.move_on_after(1000) as scope:
        await source.wait_changed()
    assert scope.cancelled_caught
    await source.close()
    with pytest.raises(trio.ClosedResourceError):
        await source.wait_changed()
    await source.close()


@pytest.mark.needs("uffd")
@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\x80\x80",
        msgpack.packb({"digest": "x"}),
        msgpack.packb({"digest": -1}),
        msgpack.packb([]),
    ],
)
async def test_damaged_image_states(state: bytes) -> None:
    machine = create_destination("image", {"file-bytes": 5}, [BlockLayout("image", PAGE, PAGE)])
    with pytest.raises(ProtocolError, match="damaged"):
        await machine.load_state(state)
    await machine.close()


@pytest.mark.needs("uffd")
@pytest.mark.parametrize(
    ("config", "layout"),
    [
        ({}, [BlockLayout("image", PAGE, PAGE)]),
        ({"file-bytes": "5"}, [BlockLayout("image", PAGE, PAGE)]),
        ({"file-bytes": True}, [BlockLayout("image", PAGE, PAGE)]),
        ({"file-bytes": 0}, [BlockLayout("image", PAGE, PAGE)]),
        ({"file-bytes": PAGE + 1}, [BlockLayout("image", PAGE, PAGE)]),
        ({"file-bytes": 5}, [BlockLayout("image", 1 << 40, PAGE)]),
        ({"file-bytes": 5}, [BlockLayout("ram", PAGE, PAGE)]),
        ({"file-bytes": 5}, []),
        ({"file-bytes": 1 << 62}, [BlockLayout("image", 1 << 62, PAGE)]),
        ({"file-bytes": 1 << 50}, [BlockLayout("image", 1 << 50, PAGE)]),
    ],
)
def test_image_offers_that_are_refused(config: dict[str, Any], layout: list[BlockLayout]) -> None:
    with pytest.raises((ProtocolError, ConfigurationError, ResourceError)) as caught:
        create_destination("image", config, layout)
    assert "\n" not in str(caught.value)


# ---- dump


async def test_a_dump_that_fails_leaves_nothing_behind(image: Path, tmp_path: Path) -> None:
    async with source_of(image) as source:
        before = sorted(tmp_path.iterdir())
        for path in (tmp_path / "no" / "dir", tmp_path, Path("a\0b")):
            with pytest.raises(PostcopyError, match="dump to") as caught:
                await source.dump(path)
            assert "\n" not in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before


async def test_a_cancelled_dump_lets_go_of_the_memory(image: Path, tmp_path: Path) -> None:
    source = source_of(image)
    with trio.CancelScope() as scope:
        scope.cancel()
        await source.dump(tmp_path / "copy")
    assert scope.cancelled_caught
    await source.close()
    assert source.blocks[0].memory.closed
    assert not (tmp_path / "copy").exists()


# ---- options and offers


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("z80", MachineOptions(), "kvm, rv64, image"),
        ("image", MachineOptions(), "--image FILE"),
        ("image", MachineOptions(image="/nowhere/image"), "No such file"),
        ("image", MachineOptions(image="x", vcpus=2), "--vcpus has no meaning"),
        ("image", MachineOptions(image="x", memory_bytes=MIB), "--memory has no meaning"),
        ("image", MachineOptions(image="x", used_memory_bytes=1), "--used-memory has no meaning"),
        ("kvm", MachineOptions(image="x"), "--image has no meaning"),
        ("kvm", MachineOptions(workload="chess"), "idle, dirty, random, disk"),
        ("kvm", MachineOptions(vcpus=0), "1 to 8 vcpus"),
        ("kvm", MachineOptions(vcpus=9), "1 to 8 vcpus"),
        ("kvm", MachineOptions(memory_bytes=0), "0 bytes"),
        ("kvm", MachineOptions(memory_bytes=-1), "-1 bytes"),
        ("kvm", MachineOptions(memory_bytes=16 * MIB + 1), "page size"),
        ("kvm", MachineOptions(memory_bytes=64 * 1024), "64 KiB"),
        ("kvm", MachineOptions(memory_bytes=1 << 60), "memory"),
        ("kvm", MachineOptions(backing="paper"), "memfd, anon and hugetlb"),
        ("kvm", MachineOptions(seed=-1), "seed"),
        ("kvm", MachineOptions(seed=1 << 64), "seed"),
        ("kvm", MachineOptions(used_memory_bytes=-1), "--used-memory"),
        ("kvm", MachineOptions(workload="idle", disk="/tmp/x"), "--disk has no meaning"),
        ("kvm", MachineOptions(workload="disk", disk="/nowhere/disk"), "No such file"),
        ("kvm", MachineOptions(workload="disk", disk="a\0b"), "not the name"),
        ("kvm", MachineOptions(workload="disk", disk_bytes=0), "0 bytes"),
    ],
)
def test_options_that_make_no_sense(kind: str, options: MachineOptions, words: str) -> None:
    with pytest.raises((ConfigurationError, ResourceError)) as caught:
        create_source(kind, options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def kvm_layout(vcpus: int = 1) -> list[BlockLayout]:
    return [BlockLayout("shared", 8 * MIB, PAGE)] + [BlockLayout(f"vcpu{n}", 8 * MIB, PAGE) for n in range(vcpus)]


KVM_CONFIG = {"vcpus": 1, "workload": "idle", "working-set-bytes": 0, "seed": 1}


@pytest.mark.needs("uffd")
@pytest.mark.parametrize(
    ("config", "layout"),
    [
        ({}, kvm_layout()),
        ({**KVM_CONFIG, "vcpus": 9}, kvm_layout(9)),
        ({**KVM_CONFIG, "vcpus": "1"}, kvm_layout()),
        ({**KVM_CONFIG, "vcpus": 2}, kvm_layout()),
        ({**KVM_CONFIG, "workload": "chess"}, kvm_layout()),
        ({**KVM_CONFIG, "workload": ["idle"]}, kvm_layout()),
        ({**KVM_CONFIG, "seed": None}, kvm_layout()),
        ({**KVM_CONFIG, "seed": 1 << 64}, kvm_layout()),
        ({**KVM_CONFIG, "working-set-bytes": -1}, kvm_layout()),
        (KVM_CONFIG, kvm_layout()[::-1]),
        (KVM_CONFIG, [BlockLayout("shared", 0, PAGE), BlockLayout("vcpu0", PAGE, PAGE)]),
        (KVM_CONFIG, [BlockLayout("shared", -PAGE, PAGE), BlockLayout("vcpu0", 2 * PAGE, PAGE)]),
        (KVM_CONFIG, [BlockLayout("shared", PAGE + 1, PAGE), BlockLayout("vcpu0", PAGE, PAGE)]),
        (KVM_CONFIG, [BlockLayout("shared", 1 << 63, PAGE), BlockLayout("vcpu0", PAGE, PAGE)]),
        ({**KVM_CONFIG, "workload": "disk"}, kvm_layout()),
        ({**KVM_CONFIG, "workload": "disk", "disk-bytes": MIB}, kvm_layout()),
        ({**KVM_CONFIG, "workload": "disk", "disk-bytes": MIB, "disk": "a\nb"}, kvm_layout()),
    ],
)
def test_kvm_offers_that_are_refused(config: dict[str, Any], layout: list[BlockLayout]) -> None:
    with pytest.raises((ProtocolError, ConfigurationError, ResourceError)) as caught:
        create_destination("kvm", config, layout)
    assert "\n" not in str(caught.value)


@pytest.mark.needs("uffd")
def test_a_peer_cannot_name_a_file_to_write_to(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "postcopy-disk-link.img"
    victim.write_bytes(b"precious")
    link.symlink_to(victim)
    short = tmp_path / "postcopy-disk-short.img"
    short.write_bytes(b"x")
    for path in (victim, link, short, tmp_path, tmp_path / "postcopy-disk-none.img", "postcopy-disk-x.img"):
        config = {**KVM_CONFIG, "workload": "disk", "disk": str(path), "disk-bytes": 8}
        with pytest.raises(ConfigurationError, match="--disk FILE"):
            create_destination("kvm", config, kvm_layout())
    with pytest.raises(ConfigurationError, match="no such file"):
        create_destination("kvm", config, kvm_layout(), HostOptions(disk=str(tmp_path / "typo")))
    assert victim.read_bytes() == b"precious"


def test_unknown_kinds_of_machines_are_the_peers_mistake() -> None:
    with pytest.raises(ProtocolError):
        create_destination("z80", {}, [])
    assert machines.KINDS == ("kvm", "rv64", "image", "firecracker", "qemu", "program")


def test_a_failed_creation_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Memory] = []
    create = Memory.create

    def creating(kind: str, size_bytes: int) -> Memory:
        if made:
            raise ResourceError("no more")
        made.append(create(kind, size_bytes))
        return made[0]

    monkeypatch.setattr(Memory, "create", creating)
    with pytest.raises(ResourceError, match="no more"):
        create_source("kvm", MachineOptions(memory_bytes=16 * MIB))
    assert made[0].closed


def test_no_room_for_a_disk_that_is_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error for a person: a daemon that was asked for such a machine has made no mistake."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    with pytest.raises(ResourceError, match="set TMPDIR"):
        Disk(None, 1 << 20)
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    with pytest.raises(ResourceError, match="name one: --disk FILE"):
        Disk(None, 1 << 20)
