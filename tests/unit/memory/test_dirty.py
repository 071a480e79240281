# SPDX-License-Identifier: Apache-2.0
"""The dirty log as Python has it. What it sees, and what it cannot see: csrc/tests/memory/test_dirty.c."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
from lender import Lender

from postcopy._native import ffi, lib
from postcopy.errors import BusyError, CoreError, MigrationError, ResourceError
from postcopy.memory import FEATURES_OF_PROCESS, DirtyLog, Memory, page_bytes_of
from postcopy.memory.bitmap import Bitmap
from postcopy.uffd import UffdFeature, probe

PAGE = page_bytes_of("memfd")
PAGES = 64


@pytest.fixture(autouse=True)
def _needs_it() -> None:
    try:
        api = probe()
    except ResourceError as error:
        pytest.skip(str(error))
    if not api.features & UffdFeature.WP_ASYNC:
        pytest.skip("this kernel has no WP_ASYNC")


def pages(bitmap: Bitmap) -> list[int]:
    return [page for page in range(len(bitmap)) if bitmap[page]]


@pytest.mark.parametrize("kind", ["memfd", "anon"])
def test_what_is_written_is_there_once(kind: str) -> None:
    with Memory.create(kind, PAGES * PAGE) as one, Memory.create("memfd", PAGES * PAGE) as two:
        one.write(0, b"before")
        with DirtyLog([one, two]) as log:
            assert pages(log.collect(0)) == pages(log.collect(1)) == []
            one.write(3 * PAGE, b"x")
            two.write(5 * PAGE - 1, b"xy")
            log.mark(0, 60, 4)
            log.mark(1, 0, 0)
            assert pages(log.collect(0)) == [3, 60, 61, 62, 63]
            assert pages(log.collect(1)) == [4, 5]
            assert pages(log.collect(0)) == pages(log.collect(1)) == []
            with pytest.raises(IndexError):
                log.mark(0, 60, 5)
            with pytest.raises(IndexError):
                log.collect(2)
            with pytest.raises(BusyError, match="dirty log"):
                one.close()
            with pytest.raises(BusyError, match="another userfaultfd"):
                DirtyLog([two])
        log.close()
        with pytest.raises(ValueError, match="closed"):
            log.collect(0)
        with pytest.raises(ValueError, match="closed"):
            log.mark(0, 0, 1)
        with DirtyLog([two]) as log:  # nothing is left of the first one
            two.write(0, b"z")
            assert pages(log.collect(0)) == [0]


@pytest.mark.parametrize("kind", ["memfd", "anon"])
def test_pages_that_are_given_back_are_marked_by_their_owner(kind: str) -> None:
    with Memory.create(kind, PAGES * PAGE) as memory:
        memory.write(0, bytes([1]) * PAGE * 8)
        memory.write(30 * PAGE, b"x")
        some = Bitmap(PAGES)
        for first, count in (2, 3), (7, 1), (10, 2), (20, 5), (28, 3), (40, 1):  # some hold nothing
            some.set_range(first, count)
        with DirtyLog([memory]) as log:
            memory.discard_pages(some)
            log.mark(0, 2, 3)
            assert pages(log.collect(0)) == [2, 3, 4]
        assert pages(memory.present()) == [0, 1, 5, 6]
        assert memory.read(2 * PAGE, 1) == b"\0"
        with pytest.raises(ValueError, match="63 pages"):
            memory.discard_pages(Bitmap(63))


def test_who_marks_is_told_before_the_end() -> None:
    told: list[Any] = []
    with Memory.create("memfd", PAGES * PAGE) as memory:
        with DirtyLog([memory], told.append) as log:
            lib.pc_dirty_log_mark(told[0], memory.address + PAGE, 1)
            assert pages(log.collect(0)) == [1]
            assert len(told) == 1
        assert told[1:] == [ffi.NULL]


def test_memory_that_is_not_mapped_cannot_be_logged(tmp_path: Any) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x" * PAGE)
    descriptors = len(os.listdir("/proc/self/fd"))
    with (
        Memory.from_file(path) as image,
        Memory.create("memfd", PAGE) as memory,
        pytest.raises(OSError, match="not mapped"),
    ):
        DirtyLog([memory, image])
    assert len(os.listdir("/proc/self/fd")) == descriptors


# ---- of another process


@contextlib.contextmanager
def another_process() -> Iterator[tuple[Lender, int, int]]:
    """With a userfaultfd of it, and where its memory is."""
    program = Lender(PAGES)
    try:
        uffd, address = program.open(FEATURES_OF_PROCESS), program.order("address")
        try:
            yield program, uffd, address
        finally:
            os.close(uffd)
    finally:
        program.end()


def test_what_another_process_writes() -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with another_process() as (program, uffd, address):
        program.order("write", 1)
        with DirtyLog.of_process([(program.memory, address)], uffd, program.pid, program.pidfd) as log:
            assert pages(log.collect(0)) == []
            program.order("write", 1)
            program.order("write", 63)
            log.mark(0, 40, 2)
            assert pages(log.collect(0)) == [1, 40, 41, 63]
            assert pages(log.collect(0)) == []
            with pytest.raises(BusyError, match="dirty log"):
                program.memory.close()
            other = program.open(int(FEATURES_OF_PROCESS | UffdFeature.EVENT_REMOVE))
            with pytest.raises(CoreError, match="features"):
                DirtyLog.of_process([(program.memory, address)], other, program.pid, program.pidfd)
            os.close(other)
            program.kill()
            with pytest.raises(MigrationError, match="has ended"):
                log.collect(0)
        with pytest.raises(MigrationError, match="has ended"):
            DirtyLog.of_process([(program.memory, address)], uffd, program.pid, program.pidfd)
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_a_process_of_another_user() -> None:
    with another_process() as (program, uffd, address):
        os.seteuid(65534)
        try:
            with pytest.raises(ResourceError, match="may not see what process") as caught:
                DirtyLog.of_process([(program.memory, address)], uffd, program.pid, program.pidfd)
        finally:
            os.seteuid(0)
        assert "--precopy off" in str(caught.value)
