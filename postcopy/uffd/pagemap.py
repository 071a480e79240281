# SPDX-License-Identifier: Apache-2.0
"""PAGEMAP_SCAN (Linux 6.7): which pages of an address range are there, written to, huge, without touching any.

With ``wp_matching`` pages that match are write-protected in the same step: together with a range that is registered for
`RegisterMode.WP` under UffdFeature.WP_ASYNC this is a dirty log that costs the writer no fault handler, for this
process or another one (Documentation/admin-guide/mm/pagemap.rst of the kernel).
"""

from __future__ import annotations

import enum
import errno
import os
from dataclasses import dataclass
from typing import Any

from postcopy._native import ffi, lib
from postcopy.errors import ResourceError, check

_REGIONS_PER_CALL = 512


class PageCategory(enum.IntFlag, boundary=enum.KEEP):
    """What a page can be: PAGE_IS_*."""

    WPALLOWED = lib.PC_PAGE_WPALLOWED  # registered for asynchronous write-protection
    WRITTEN = lib.PC_PAGE_WRITTEN  # since it was protected
    FILE = lib.PC_PAGE_FILE
    PRESENT = lib.PC_PAGE_PRESENT
    SWAPPED = lib.PC_PAGE_SWAPPED
    PFNZERO = lib.PC_PAGE_PFNZERO  # the kernel's page of zeros
    HUGE = lib.PC_PAGE_HUGE
    SOFT_DIRTY = lib.PC_PAGE_SOFT_DIRTY


NO_CATEGORY = PageCategory(0)


@dataclass(frozen=True, slots=True)
class PageRegion:
    """Neighbouring pages of the same categories."""

    start: int  # addresses
    end: int
    categories: PageCategory  # of those that were asked for


def pagemap_scan(
    start: int,
    end: int,
    *,
    pid: int | None = None,
    all_of: PageCategory = NO_CATEGORY,
    any_of: PageCategory = NO_CATEGORY,
    inverted: PageCategory = NO_CATEGORY,
    returned: PageCategory | None = None,
    wp_matching: bool = False,
    check_wp_async: bool = False,
    max_pages: int = 0,
) -> list[PageRegion]:
    """The pages between two page-aligned addresses that have `all_of` the categories and, where given, one of
    `any_of`; categories `inverted` count where they are absent. Populates nothing; time grows with what is populated.

    `pid`: another process (needs the right to ptrace it); by default this one. `returned`: the categories reported, by
    default all that were asked for. `wp_matching`: write-protect what matches, atomically for each page. With
    `check_wp_async` a part that is not registered for that is an error, else it is passed over. `max_pages`: stop after
    so many (0: no limit). Errors: `ResourceError` before Linux 6.7 and for a process that may not be looked at,
    `CoreError` (EINVAL, EFAULT: the range; EPERM: `check_wp_async`). May be called in any thread; without the GIL.
    """
    path = "/proc/self/pagemap" if pid is None else f"/proc/{pid}/pagemap"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        remedy = "use the process's own user, or CAP_SYS_PTRACE" if error.errno in (errno.EACCES, errno.EPERM) else ""
        raise ResourceError(f"{path}: {error.strerror}", remedy) from error
    try:
        query: Any = ffi.new("struct pc_pagemap_query *")
        query.flags = (lib.PC_SCAN_WP_MATCHING if wp_matching else 0) | (
            lib.PC_SCAN_CHECK_WPASYNC if check_wp_async else 0
        )
        query.inverted, query.all_of, query.any_of = inverted, all_of, any_of
        query.returned = all_of | any_of if returned is None else returned
        return _walk(fd, query, start, end, max_pages)
    finally:
        os.close(fd)


def _walk(fd: int, query: Any, start: int, end: int, max_pages: int) -> list[PageRegion]:
    regions: Any = ffi.new("struct pc_pagemap_region[]", _REGIONS_PER_CALL)
    walk_end: Any = ffi.new("uint64_t *")
    found: list[PageRegion] = []
    left, page_bytes = max_pages, int(lib.pc_page_bytes())
    query.end = end
    while True:
        query.start, query.max_pages = start, left if max_pages else 0
        count = lib.pc_pagemap_scan(fd, query, regions, _REGIONS_PER_CALL, walk_end)
        if count == -errno.ENOTTY:
            raise ResourceError("this kernel has no PAGEMAP_SCAN", "use Linux 6.7 or newer")
        check(count, "looking at the page tables")
        for i in range(count):
            region = PageRegion(int(regions[i].start), int(regions[i].end), PageCategory(regions[i].categories))
            left -= (region.end - region.start) // page_bytes
            if found and found[-1].end == region.start and found[-1].categories == region.categories:
                region = PageRegion(found.pop().start, region.end, region.categories)  # cut where the array was full
            found.append(region)
        start = int(walk_end[0])
        if start >= end or (max_pages and left <= 0):
            return found
