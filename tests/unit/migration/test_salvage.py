# SPDX-License-Identifier: Apache-2.0
"""Salvages: written, joined, started again; and what is not believed of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from postcopy._files import locked_directory
from postcopy.errors import ConfigurationError, PostcopyError
from postcopy.machines import Machine
from postcopy.machines.kinds import HostOptions, MachineOptions, create_destination, create_source, is_live
from postcopy.memory.bitmap import Bitmap
from postcopy.migration import salvage

MIB = 1 << 20
LIVE = [
    pytest.param("rv64", marks=pytest.mark.needs("uffd-user")),
    pytest.param("kvm", marks=pytest.mark.needs("kvm", "uffd")),
]


async def _computed(kind: str, operations: int = 50) -> Machine:
    """A machine that has done something, and is paused."""
    machine = create_source(kind, MachineOptions(memory_bytes=16 * MIB, vcpus=2, workload="random", backing="memfd"))
    await machine.boot()
    await machine.resume()
    await machine.wait_ready()
    await _compute(machine, operations)
    await machine.pause()
    return machine


async def _compute(machine: Machine, operations: int) -> None:
    """Until it has done so many."""
    with trio.fail_after(60):
        while machine.statistics().operations < operations:
            await machine.wait_changed()


def _even_and_odd(machine: Machine) -> tuple[list[Bitmap], list[Bitmap]]:
    even, odd = [], []
    for block in machine.blocks:
        bits = Bitmap(block.memory.pages)
        for page in range(0, block.memory.pages, 2):
            bits.set_range(page, 1)
        even.append(bits)
        odd.append(bits.inverted())
    return even, odd


@pytest.mark.parametrize("kind", LIVE)
async def test_a_machine_goes_on_from_two(kind: str, tmp_path: Path) -> None:
    """Of each side one page in two; together all of it, with the destination's state."""
    async with await _computed(kind) as machine:
        before = machine.statistics()
        even, odd = _even_and_odd(machine)
        assert await salvage.write(str(tmp_path / "dest"), machine, "ab" * 16, "dest", even)
        assert await salvage.write(str(tmp_path / "source"), machine, "ab" * 16, "source", odd)
    paths = [str(tmp_path / "source"), str(tmp_path / "dest")]
    merged = salvage.merge(paths, into=str(tmp_path / "whole"))
    assert (merged.doubtful_bytes, merged.torn, merged.has_state) == (0, False, True)
    assert merged.from_dest_bytes + merged.from_source_bytes == 16 * MIB
    assert salvage.merge([str(tmp_path / "whole")], output=str(tmp_path / "image")).doubtful_bytes == 0
    found = salvage.examine(str(tmp_path / "whole"), reclaim=False, is_live=is_live)
    assert found.doubts == ()
    async with await salvage.restore(found, partial(create_destination, host=HostOptions("anon"))) as machine:
        assert machine.statistics().operations == before.operations
        assert (await machine.verify()).ok
        await machine.resume()
        await machine.wait_ready()
        await _compute(machine, before.operations + 50)
        await machine.pause()
        assert machine.statistics().failures == 0
        assert (await machine.verify()).ok


@pytest.mark.parametrize("kind", LIVE)
async def test_half_of_a_machine(kind: str, tmp_path: Path) -> None:
    """It is told what is in doubt; that is zeros."""
    async with await _computed(kind) as machine:
        even, _ = _even_and_odd(machine)
        await salvage.write(str(tmp_path / "dest"), machine, "ab" * 16, "dest", even)
    found = salvage.examine(str(tmp_path / "dest"), reclaim=False, is_live=is_live)
    (doubt,) = found.doubts
    assert doubt.startswith("8 MiB of its memory are not there")
    salvage.note_start(found)
    _, before = salvage.examine(str(tmp_path / "dest"), reclaim=False, is_live=is_live).doubts
    assert "has been started before" in before
    # What was made of it would be a second one of the same machine.
    salvage.merge([str(tmp_path / "dest")], into=str(tmp_path / "merged"))
    assert salvage.examine(str(tmp_path / "merged"), reclaim=False, is_live=is_live).doubts == (doubt, before)


async def test_two_that_start_it_at_the_same_time(tmp_path: Path) -> None:
    """Both have looked; one of them starts it, also where both were forced."""
    async with await _computed("rv64") as machine:
        whole = [Bitmap.full(block.memory.pages) for block in machine.blocks]
        await salvage.write(str(tmp_path / "dest"), machine, "ab" * 16, "dest", whole)
    for _ in range(2):
        first, second = (salvage.examine(str(tmp_path / "dest"), reclaim=False, is_live=is_live) for _ in range(2))
        salvage.note_start(first)
        with pytest.raises(ConfigurationError, match="started from there meanwhile"):
            salvage.note_start(second)
    third = salvage.examine(str(tmp_path / "dest"), reclaim=False, is_live=is_live)
    with locked_directory(tmp_path / "dest"), pytest.raises(ConfigurationError, match="at this moment"):
        salvage.note_start(third)


# ---- what is read is not believed


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A salvage of a source, made by hand."""
    path = tmp_path / "salvage"
    path.mkdir()
    (path / "00.memory").write_bytes(os.urandom(8192))
    (path / "00.map").write_bytes(Bitmap.full(2).rle_encode())
    (path / "state").write_bytes(b"state")
    block = {"name": "shared", "size-bytes": 8192, "page-bytes": 4096, "pages": 2}
    manifest = {"format": "postcopy-salvage", "version": 1, "migration": "ab", "side": "source", "machine": "rv64"}
    (path / "manifest.json").write_text(json.dumps(manifest | {"config": {}, "paused": True, "blocks": [block]}))
    assert salvage.read(str(path)).manifest.blocks[0].size_bytes == 8192
    return path


def _change(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    changed = change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest if changed is None else changed))


DAMAGE: list[Callable[[dict[str, Any]], Any]] = [
    lambda manifest: [],
    lambda manifest: "text",
    lambda manifest: manifest.pop("format") and None,
    lambda manifest: manifest.pop("version") and None,
    lambda manifest: manifest.update(format="other"),
    lambda manifest: manifest.update(version=2),
    lambda manifest: manifest.update(version="1"),
    lambda manifest: manifest.update(migration=7),
    lambda manifest: manifest.update(migration="x" * 1000),
    lambda manifest: manifest.update(side="../dest"),
    lambda manifest: manifest.update(side="both"),
    lambda manifest: manifest.update(machine=None),
    lambda manifest: manifest.update(machine="a\nb"),
    lambda manifest: manifest.update(config=[]),
    lambda manifest: manifest.update(paused=1),
    lambda manifest: manifest.update(blocks={}),
    lambda manifest: manifest.update(blocks=[]),
    lambda manifest: manifest.update(blocks=manifest["blocks"] * 65),
    lambda manifest: manifest.update(blocks=[7]),
    lambda manifest: manifest["blocks"][0].update(name="../../etc/passwd"),
    lambda manifest: manifest["blocks"][0].update({"size-bytes": 0}),
    lambda manifest: manifest["blocks"][0].update({"size-bytes": 1 << 60}),
    lambda manifest: manifest["blocks"][0].update({"size-bytes": 8192.0}),
    lambda manifest: manifest["blocks"][0].update({"size-bytes": True}),
    lambda manifest: manifest["blocks"][0].update({"size-bytes": 4096}),
    lambda manifest: manifest["blocks"][0].update({"page-bytes": 3000}),
    lambda manifest: manifest["blocks"][0].update({"page-bytes": 1 << 40}),
    lambda manifest: manifest["blocks"][0].pop("page-bytes"),
    lambda manifest: manifest.pop("side"),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_damaged_manifests(whole: Path, tmp_path: Path, number: int) -> None:
    _change(whole, DAMAGE[number])
    with pytest.raises(ConfigurationError):
        salvage.merge([str(whole)], output=str(tmp_path / "image"))
    assert not list(tmp_path.glob("image*"))


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b"[" * 100_000, b'{"version": ' + b"1" * 5000 + b"}", b" " * 2_000_000]
)
def test_manifests_that_are_none(whole: Path, tmp_path: Path, text: bytes) -> None:
    (whole / "manifest.json").write_bytes(text)
    with pytest.raises(ConfigurationError, match=str(whole)):
        salvage.merge([str(whole)], output=str(tmp_path / "image"))


@pytest.mark.parametrize("name", ["manifest.json", "00.memory", "00.map", "state"])
@pytest.mark.parametrize("what", ["fifo", "link", "directory", "nothing", "device"])
def test_no_regular_files(whole: Path, tmp_path: Path, name: str, what: str) -> None:
    """Nobody waits for the writer of a FIFO, nor follows a link out of the salvage."""
    other = tmp_path / "other"
    shutil.move(whole / name, other)
    if what == "fifo":
        os.mkfifo(whole / name)
    elif what == "link":
        (whole / name).symlink_to(other)
    elif what == "directory":
        (whole / name).mkdir()
    elif what == "device":
        (whole / name).symlink_to("/dev/zero")
    with pytest.raises(ConfigurationError):
        salvage.merge([str(whole)], into=str(tmp_path / "merged"))
    assert not list(tmp_path.glob("merged*"))


def test_a_map_that_is_too_long(whole: Path, tmp_path: Path) -> None:
    (whole / "00.map").write_bytes(b"\0" * 100_000)
    with pytest.raises(ConfigurationError, match="the map of block 0 is unusable"):
        salvage.merge([str(whole)], output=str(tmp_path / "image"))


def test_interrupted(whole: Path, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def give_up() -> None:
        raise Enough

    for target in ({"output": str(tmp_path / "image")}, {"into": str(tmp_path / "image")}):
        with pytest.raises(Enough):
            salvage.merge([str(whole)], **target, give_up=give_up)
    assert not list(tmp_path.glob("image*"))


def test_targets(whole: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.symlink_to(tmp_path / "nowhere")
    for path, reason in (
        (there, "exists already"),
        (tmp_path, "exists already"),
        (tmp_path / "no" / "directory", "does not exist"),
        (tmp_path / ("x" * 256), "too long"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            salvage.check_target(str(path))
        with pytest.raises(ConfigurationError, match=reason):
            salvage.merge([str(whole)], output=str(path))
        with pytest.raises(ConfigurationError, match=reason):
            salvage.merge([str(whole)], into=str(path))


def test_one_that_stood_in_its_way(tmp_path: Path) -> None:
    """What is left of a process that was killed while it wrote is in nobody's way."""
    (tmp_path / "salvage.part").mkdir()
    salvage.check_target(str(tmp_path / "salvage"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["salvage.part"]


async def test_written_beside_a_stale_one(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(10_000))
    (tmp_path / "salvage.part").mkdir()
    async with create_source("image", MachineOptions(image=str(image))) as machine:
        await machine.boot()
        maps = [Bitmap.full(block.memory.pages) for block in machine.blocks]
        await salvage.write(str(tmp_path / "salvage"), machine, "ab", "source", maps)
        assert (tmp_path / "salvage" / "00.memory").read_bytes()[:10_000] == image.read_bytes()
        with pytest.raises(PostcopyError, match="File exists"):
            await salvage.write(str(tmp_path / "salvage"), machine, "ab", "source", maps)
    assert sorted(os.listdir(tmp_path)) == ["image", "salvage", "salvage.part"]
