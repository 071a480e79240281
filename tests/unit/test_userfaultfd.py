# SPDX-License-Identifier: Apache-2.0
"""Each ioctl and event on a real userfaultfd. What could hang runs in a child with a deadline."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio

from postcopy import Memory, Userfaultfd
from postcopy._errors import BusyError, CoreError, ResourceError
from postcopy._native import lib
from postcopy.uffd import (
    FaultFlag,
    Fork,
    How,
    Outcome,
    PageFault,
    RegisterMode,
    Remap,
    Remove,
    Result,
    UffdFeature,
    UffdIoctl,
    Unmap,
)

PAGE = int(lib.pc_page_bytes())
MISSING = RegisterMode.MISSING


def content(number: int) -> bytes:
    return bytes([number % 255 + 1]) * PAGE


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    uffd = Userfaultfd.open()
    yield uffd
    uffd.close(abandon=True)


@pytest.fixture
def anon() -> Iterator[Memory]:
    with Memory.create("anon", 16 * PAGE) as memory:
        yield memory


def test_register_says_what_can_be_done(uffd: Userfaultfd, anon: Memory) -> None:
    allowed = uffd.register(anon.address, anon.size_bytes, MISSING)
    assert UffdIoctl.COPY | UffdIoctl.ZEROPAGE | UffdIoctl.WAKE in allowed
    assert uffd.registered == [(anon.address, anon.address + anon.size_bytes)]
    uffd.unregister(anon.address + PAGE, PAGE)
    assert uffd.registered == [
        (anon.address, anon.address + PAGE),
        (anon.address + 2 * PAGE, anon.address + 16 * PAGE),
    ]
    uffd.unregister(anon.address, anon.size_bytes)
    assert uffd.registered == []


def test_a_refused_registration_leaves_nothing_behind(uffd: Userfaultfd, anon: Memory) -> None:
    uffd.register(anon.address, PAGE, MISSING)
    with pytest.raises(CoreError) as caught:
        uffd.register(anon.address, 2 * PAGE + 1, MISSING)
    assert caught.value.errno == errno.EINVAL
    assert uffd.registered == [(anon.address, anon.address + PAGE)]
    with Userfaultfd.open() as other, pytest.raises(BusyError):
        other.register(anon.address, PAGE, MISSING)


def test_partial_count_and_exists(uffd: Userfaultfd, anon: Memory) -> None:
    uffd.register(anon.address, anon.size_bytes, MISSING)
    assert uffd.copy(anon.address + 2 * PAGE, content(9)) == Result(PAGE, Outcome.DONE)
    data = b"".join(content(i) for i in range(4))
    # The kernel says EAGAIN with the count; asked again from there it says EEXIST.
    assert uffd.copy(anon.address, data) == Result(2 * PAGE, Outcome.AGAIN)
    assert uffd.copy(anon.address + 2 * PAGE, data[2 * PAGE :]) == Result(0, Outcome.EXISTS)
    assert uffd.place(anon.address, data) == Result(4 * PAGE, Outcome.DONE)
    assert uffd.fill_zero(anon.address, anon.size_bytes) == Result(16 * PAGE, Outcome.DONE)
    expected = content(0) + content(1) + content(9) + content(3) + bytes(12 * PAGE)
    assert anon.read(0, anon.size_bytes) == expected


def test_copy_takes_an_address_and_any_buffer(uffd: Userfaultfd, anon: Memory) -> None:
    uffd.register(anon.address, anon.size_bytes, MISSING)
    with Memory.create("anon", PAGE) as source:
        source.write(0, content(5))
        assert uffd.copy(anon.address, source.address, PAGE).done
    assert uffd.copy(anon.address + PAGE, memoryview(bytearray(content(6) + content(7)))[PAGE:]).done
    assert anon.read(0, 2 * PAGE) == content(5) + content(7)
    with pytest.raises(ValueError, match="size_bytes"):
        uffd.copy(anon.address, source.address)
    with pytest.raises(ValueError, match="of a source"):
        uffd.copy(anon.address, b"short", PAGE)


def test_outside_of_a_range_is_gone(uffd: Userfaultfd, anon: Memory) -> None:
    assert uffd.copy(anon.address, content(1)) == Result(0, Outcome.GONE)
    assert uffd.fill_zero(anon.address, PAGE) == Result(0, Outcome.GONE)


def test_misuse_is_raised(uffd: Userfaultfd, anon: Memory) -> None:
    uffd.register(anon.address, anon.size_bytes, MISSING)
    with pytest.raises(CoreError) as caught:
        uffd.copy(anon.address + 1, content(1))
    assert caught.value.errno == errno.EINVAL
    for size in (0, -PAGE, 1 << 64):
        with pytest.raises(ValueError, match="no range"):
            uffd.register(anon.address, size, MISSING)
