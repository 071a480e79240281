# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

import pytest

from postcopy import Memory, Userfaultfd
from postcopy._native import lib
from postcopy.errors import CoreError, ResourceError
from postcopy.uffd import RegisterMode, UffdFeature
from postcopy.uffd.pagemap import PageCategory, PageRegion, pagemap_scan

PAGE = int(lib.pc_page_bytes())
PRESENT, WRITTEN = PageCategory.PRESENT, PageCategory.WRITTEN
DIRTY = UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED


def scan(memory: Memory, **options: Any) -> list[PageRegion]:
    found = pagemap_scan(memory.address, memory.address + memory.size_bytes, **options)
    return [
        PageRegion((r.start - memory.address) // PAGE, (r.end - memory.address) // PAGE, r.categories) for r in found
    ]


def test_finds_what_is_there_and_touches_nothing() -> None:
    with Memory.create("anon", 16 * PAGE) as memory:
        assert scan(memory, all_of=PRESENT) == []
        for number in (2, 3, 9):
            memory.write(number * PAGE, b"x")
        assert scan(memory, all_of=PRESENT) == [PageRegion(2, 4, PRESENT), PageRegion(9, 10, PRESENT)]
        absent = scan(memory, all_of=PRESENT, inverted=PRESENT, returned=PageCategory.FILE)
        assert [(r.start, r.end) for r in absent] == [(0, 2), (4, 9), (10, 16)]
        assert scan(memory, all_of=PRESENT, max_pages=1) == [PageRegion(2, 3, PRESENT)]
        assert memory.resident_bytes() == 3 * PAGE


def test_more_regions_than_one_call_takes() -> None:
    with Memory.create("anon", 4000 * PAGE) as memory:
        for number in range(0, 4000, 2):
            memory.write(number * PAGE, b"x")
        found = scan(memory, any_of=PRESENT)
        assert [(r.start, r.end) for r in found] == [(n, n + 1) for n in range(0, 4000, 2)]


def test_dirty_log() -> None:
    with Memory.create("anon", 16 * PAGE) as memory, Userfaultfd.open(features=DIRTY) as uffd:
        uffd.register(memory.address, memory.size_bytes, RegisterMode.WP)
        uffd.writeprotect(memory.address, memory.size_bytes)
        assert scan(memory, all_of=WRITTEN) == []
        memory.write(5 * PAGE, b"x")
        memory.write(6 * PAGE, b"x")
        # Found and protected again in one step: the second look finds only what was written since.
        assert scan(memory, all_of=WRITTEN, wp_matching=True, check_wp_async=True) == [PageRegion(5, 7, WRITTEN)]
        memory.write(6 * PAGE, b"y")
        assert scan(memory, all_of=WRITTEN, wp_matching=True) == [PageRegion(6, 7, WRITTEN)]
        uffd.unregister(memory.address, memory.size_bytes)
        with pytest.raises(CoreError) as caught:
            scan(memory, all_of=WRITTEN, wp_matching=True, check_wp_async=True)
        assert caught.value.errno == errno.EPERM


def test_another_process(spawn_child: Callable[..., Any], tmp_path: Any) -> None:
    """A child's own mapping, of which it tells the address, with two pages written."""
    ready, go = tmp_path / "ready", tmp_path / "go"
    os.mkfifo(ready)
    os.mkfifo(go)
    code = f"""
from postcopy import Memory
memory = Memory.create("anon", 8 * {PAGE})
memory.write({PAGE}, b"x" * (2 * {PAGE}))
open({str(ready)!r}, "w").write(str(memory.address))
open({str(go)!r}).read()
"""
    child = spawn_child([sys.executable, "-c", code])
    address = int(ready.read_text())
    found = pagemap_scan(address, address + 8 * PAGE, pid=child.pid, all_of=PRESENT)
    assert found == [PageRegion(address + PAGE, address + 3 * PAGE, PRESENT)]
    go.write_text("")
    assert child.wait(30).returncode == 0


def test_mistakes_are_named() -> None:
    with pytest.raises(ResourceError, match=r"/proc/\d+/pagemap"):
        pagemap_scan(0, PAGE, pid=2**22 + 1)
    with pytest.raises(CoreError):
        pagemap_scan(1, PAGE, all_of=PRESENT)
