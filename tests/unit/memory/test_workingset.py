# SPDX-License-Identifier: Apache-2.0
"""The files of working sets: what was written is read, what was damaged or is of another image is not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import ConfigurationError, ResourceError
from postcopy.handler._image import SAMPLE_BYTES, SAMPLES, Image
from postcopy.memory import workingset
from postcopy.memory.workingset import DamagedError, WorkingSet, collect

PAGE = 4096
PAGES = 300


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vm.ws"


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    path = tmp_path / "vm.mem"
    path.write_bytes(os.urandom(PAGES * PAGE))
    return path


def save(path: Path, image_path: Path, found: WorkingSet) -> None:
    image = Image.open(str(image_path))
    workingset.write(str(path), found, image.identify())
    image.close()


def load(path: Path, image_path: Path) -> WorkingSet:
    image = Image.open(str(image_path))
    try:
        return workingset.read(str(path), image)
    finally:
        image.close()


@given(st.lists(st.integers(0, PAGES - 1)))
def test_runs_keep_the_order_of_first_touch(touches: list[int]) -> None:
    found = collect(PAGE, touches)
    pages = [page for first, count in found.runs for page in range(first, first + count)]
    assert pages == list(dict.fromkeys(touches))
    assert found.pages == len(pages)


def test_what_was_written_is_read(path: Path, image_path: Path) -> None:
    found = collect(PAGE, [299, 0, 1, 2, 150, 149, 148, 3])
    save(path, image_path, found)
    assert load(path, image_path) == found
    assert path.stat().st_mode & 0o777 == 0o600
    save(path, image_path, collect(PAGE, []))
    assert load(path, image_path).runs == ()


def test_every_damage_is_found(path: Path, image_path: Path) -> None:
    save(path, image_path, collect(PAGE, [5, 9, 10]))
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        with pytest.raises(DamagedError, match=r"vm\.ws"):
            load(path, image_path)
        path.write_bytes(whole[:at])
        with pytest.raises(DamagedError):
            load(path, image_path)


def _forged(runs: bytes, pages: int = 2, page_bytes: int = PAGE) -> bytes:
    content = workingset._File(
        image_bytes=PAGES * PAGE,
        image_mtime=0,
        image_sample=b"",
        page_bytes=page_bytes,
        pages=pages,
        runs=runs,
    )
    body = msgspec.msgpack.encode(content)
    return workingset.MAGIC + workingset._crc(body) + body


@pytest.mark.parametrize(
    "data",
    [
        _forged(b"\x00"),  # half a run
        _forged(b"\x01\x02"),  # before the first page
        _forged(b"\x00\xad\x02"),  # behind the last one
        _forged(b"\x00\x00"),  # a run of nothing
        _forged(b"\x00\x03"),  # more than it says
        _forged(b"\x00\x01"),  # less
        _forged(b"\xff" * 12 + b"\x01"),  # a number without an end
        _forged(b"\x00\x02", page_bytes=4095),
        _forged(b"\x00\xac\x02\xd7\x04\xac\x02", pages=600),  # every page twice
    ],
)
def test_a_forged_one_names_no_page_that_there_is_not(data: bytes) -> None:
    with pytest.raises(DamagedError, match="make no sense"):
        workingset._unpack(workingset.decode(data, "x"), "x")


def test_a_forged_one_is_not_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """One page again and again: it is refused when there are more pages than the image has, whatever it says."""
    read = 0
    numbers = workingset._numbers

    def counted(packed: bytes) -> Iterator[int]:
        nonlocal read
        for number in numbers(packed):
            read += 1
            yield number

    monkeypatch.setattr(workingset, "_numbers", counted)
    data = _forged(b"\x00\x01" + b"\x01\x01" * (10 * PAGES), pages=1 << 60)
    with pytest.raises(DamagedError, match="make no sense"):
        workingset._unpack(workingset.decode(data, "x"), "x")
    assert read == 2 * (PAGES + 1)


def test_of_which_image_it_is(path: Path, image_path: Path, tmp_path: Path) -> None:
    save(path, image_path, collect(PAGE, [5]))
    stamp = image_path.stat().st_mtime_ns
    copy = tmp_path / "copy.mem"
    copy.write_bytes(image_path.read_bytes())
    os.utime(copy, ns=(stamp, stamp))
    assert load(path, copy).runs == ((5, 1),)
    os.utime(copy, ns=(stamp, stamp + 2_000_000_000))
    with pytest.raises(ConfigurationError, match="differs in time of last change"):
        load(path, copy)
    copy.write_bytes(os.urandom(PAGES * PAGE))
    os.utime(copy, ns=(stamp, stamp))
    with pytest.raises(ConfigurationError, match="differs in content"):
        load(path, copy)
    copy.write_bytes(image_path.read_bytes() + bytes(PAGE))
    os.utime(copy, ns=(stamp, stamp))
    with pytest.raises(ConfigurationError, match="differs in size"):
        load(path, copy)


def test_one_that_was_read_is_read_again_when_it_or_its_image_has_changed(
    path: Path, image_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets, reads = workingset.Sets(), []
    once = workingset.read

    def read(*arguments: Any) -> WorkingSet:
        reads.append(arguments)
        return once(*arguments)

    monkeypatch.setattr(workingset, "read", read)

    def have() -> WorkingSet:
        image = Image.open(str(image_path))
        try:
            return sets.read(str(path), image)
        finally:
            image.close()

    save(path, image_path, collect(PAGE, [5]))
    assert [have().runs for _ in range(3)] == [((5, 1),)] * 3
    assert len(reads) == 1
    save(path, image_path, collect(PAGE, [7]))
    assert have().runs == ((7, 1),)
    os.utime(image_path, ns=(0, 10**18))
    with pytest.raises(ConfigurationError, match="another image"):
        have()
    path.unlink()
    with pytest.raises(ConfigurationError, match="No such file"):
        have()


def test_a_file_that_is_not_there_or_cannot_be_made(path: Path, image_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        load(path, image_path)
    with pytest.raises(ResourceError, match="--record-working-set"):
        save(path / "x", image_path, collect(PAGE, []))


def test_a_large_image_is_sampled(tmp_path: Path) -> None:
    path = tmp_path / "large.mem"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    image = Image.open(str(path))
    before = image.identify()
    step = (64 << 20) // SAMPLES
    for offset, seen in ((step - SAMPLE_BYTES, False), (17 * step, True)):
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"x")
        assert (image.identify().sample != before.sample) is seen
    image.close()


def test_pages_of_another_size() -> None:
    found = WorkingSet(PAGE, ((511, 2), (0, 1), (2048, 1)))
    assert found.in_pages_of(2 << 20).runs == ((0, 2), (4, 1))
    assert WorkingSet(2 << 20, ((1, 1),)).in_pages_of(PAGE).runs == ((512, 512),)


# ---- of a machine that has arrived

BLOCKS = (("low", 8 * PAGE), ("high", 4 * PAGE))
SIZES = [(size, PAGE) for _, size in BLOCKS]


def test_of_a_machine_s_blocks(path: Path) -> None:
    """In the order of first touch, over all blocks, for memory that has pages of another size too."""
    touches = [(1, 2), (0, 7), (1, 0), (1, 1), (0, 3), (1, 2), (0, 4)]
    found = workingset.of_machine(touches, SIZES)
    workingset.write(str(path), found, BLOCKS)
    workingset.check(str(path))
    again = workingset.read_of_machine(str(path), BLOCKS)
    assert again.in_blocks(SIZES) == [(1, 2, 1), (0, 7, 1), (1, 0, 2), (0, 3, 2)]
    wide = [(8 * PAGE, 4 * PAGE), (4 * PAGE, 2 * PAGE)]
    assert again.in_blocks(wide) == [(1, 1, 1), (0, 1, 1), (1, 0, 1), (0, 0, 2)]
    assert workingset.of_machine([(0, 1), (1, 1)], wide).in_blocks(SIZES) == [(0, 4, 4), (1, 2, 2)]


def test_a_run_over_the_border_of_two_blocks() -> None:
    assert WorkingSet(PAGE, ((6, 4), (11, 1))).in_blocks(SIZES) == [(0, 6, 2), (1, 0, 2), (1, 3, 1)]


def test_the_set_of_another_machine(path: Path, image_path: Path) -> None:
    """And of an image: neither is taken for the other."""
    workingset.write(str(path), collect(PAGE, [1]), BLOCKS)
    for other in (BLOCKS[:1], BLOCKS[::-1], (("low", 8 * PAGE), ("high", 5 * PAGE))):
        with pytest.raises(ConfigurationError, match="of another machine"):
            workingset.read_of_machine(str(path), other)
    with pytest.raises(ConfigurationError, match="not of an image"):
        load(path, image_path)
    save(path, image_path, collect(PAGE, [1]))
    with pytest.raises(ConfigurationError, match="of an image"):
        workingset.read_of_machine(str(path), BLOCKS)


@pytest.mark.parametrize(
    "what",
    [{}, {"blocks": (("a", 0),)}, {"blocks": (("a", -PAGE),)}, {"blocks": (("a", PAGE),), "image_bytes": PAGE}],
    ids=["nothing", "an empty block", "a negative one", "two things"],
)
def test_a_forged_identity(what: dict[str, Any]) -> None:
    body = msgspec.msgpack.encode(workingset._File(page_bytes=PAGE, pages=0, runs=b"", **what))
    with pytest.raises(DamagedError, match="does not say what it is of"):
        workingset.decode(workingset.MAGIC + workingset._crc(body) + body, "x")
