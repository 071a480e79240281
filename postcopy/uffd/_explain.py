# SPDX-License-Identifier: Apache-2.0
"""What the kernel meant by an errno of a userfaultfd: which argument was wrong, found by looking at the mappings.

For errors only: /proc/self/smaps is read, which takes as long as much memory is populated. The rules are those of
`vma_can_userfault` and `validate_range` in the kernel, see ioctl_userfaultfd(2).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass

from postcopy._native import lib

_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) [0-9a-f]+ (\S+) (\d+) *(.*)")
_SHARED_MEMORY = ("/memfd:", "/SYSV", "/dev/zero (deleted)", "[anon_shmem:")
_REGISTRABLE = "only anonymous memory, shared memory (memfd, tmpfs) and huge pages can be registered"


@dataclass
class Mapping:
    """One line of /proc/self/maps, with what smaps adds."""

    start: int
    end: int
    device: str
    inode: int
    name: str
    page_bytes: int = 0
    flags: frozenset[str] = frozenset()

    @property
    def huge(self) -> bool:
        return "ht" in self.flags

    @property
    def shared_memory(self) -> bool:
        return not self.huge and (self.name.startswith(_SHARED_MEMORY) or self.device in _tmpfs())

    @property
    def anonymous(self) -> bool:
        return not self.inode and not self.name.startswith(("/", "[v"))  # [vdso], [vvar], [vsyscall]

    def __str__(self) -> str:
        return f"the mapping from {self.start:#x} to {self.end:#x}{f' ({self.name})' if self.name else ''}"


def explain(
    call: str,
    number: int,
    address: int,
    size_bytes: int,
    *,
    mode: int = 0,
    source: int = 0,
    foreign: bool = False,
) -> str:
    """The reason for ``-number`` of the ioctl `call` (``register``, ``copy`` ...), in a clause; empty where nothing is
    known. `foreign`: the addresses are another process's, whose mappings are not looked at."""
    what = f"{address:#x} to {address + size_bytes:#x}"
    if number == errno.ENOENT and call == "writeprotect":
        return f"{what} is not registered with this userfaultfd, or not all of it: register RegisterMode.WP first"
    if number == errno.EBUSY and call == "register":
        return f"{what} is registered with another userfaultfd, at least a part of it: unregister it there first"
    if number == errno.EPERM and call == "register":
        return f"{what} is a shared mapping of a file that is open for reading only: open it for writing too"
    if number == errno.EBUSY and call == "move":
        return f"a page of the source, {size_bytes} bytes at {source:#x}, is pinned, or shared since a fork"
    if number == errno.EAGAIN:
        return "an event of this userfaultfd is unread: read it, then call again"
    if number == errno.EFAULT and call == "copy":
        return f"the source, {size_bytes} bytes at {source:#x}, cannot be read"
    if number != errno.EINVAL:
        return ""
    try:
        return _explain_invalid(call, address, size_bytes, mode, source, foreign)
    except OSError:  # /proc does not tell, as when no more files can be opened: no reason to hide what happened
        return ""


def _explain_invalid(call: str, address: int, size_bytes: int, mode: int, source: int, foreign: bool) -> str:
    """The reason for EINVAL."""
    what = f"{address:#x} to {address + size_bytes:#x}"
    mappings = [] if foreign else list(_mappings(address, address + size_bytes))
    page_bytes = max([mapping.page_bytes for mapping in mappings], default=0) or int(lib.pc_page_bytes())
    ranges = {"address": address, "length": size_bytes} | ({"source": source} if call == "move" else {})
    for name, value in ranges.items():
        if value % page_bytes:
            huge = "huge " if any(mapping.huge for mapping in mappings) else ""
            shown = str(value) if name == "length" else f"{value:#x}"
            return f"the {name} {shown} is not a multiple of the {huge}page size, {page_bytes} bytes"
    if not size_bytes:
        return "a length of 0 bytes"
    if call == "register" and (not mode or mode & ~(lib.PC_UFFD_MISSING | lib.PC_UFFD_WP | lib.PC_UFFD_MINOR)):
        return f"mode {mode:#x} is no combination of RegisterMode.MISSING, WP and MINOR"
    if foreign:
        return ""
    if not mappings:
        return f"nothing is mapped from {what}"
    if call == "move":
        mappings += _mappings(source, source + size_bytes)
    if reason := next((reason for mapping in mappings if (reason := _refused(call, mode, mapping))), ""):
        return reason
    if call in ("copy", "continue") and mode & lib.PC_UFFD_FILL_WP:
        return f"{what} is not registered for write protection: register RegisterMode.WP first"
    if call == "unregister":  # since Linux 6.17; an older one takes it away from the other
        return f"{what} is registered with another userfaultfd, at least a part of it: unregister it there"
    return ""


def _refused(call: str, mode: int, mapping: Mapping) -> str:
    """Why the kernel does not do this to such a mapping; empty when it would."""
    if not (mapping.anonymous or mapping.shared_memory or mapping.huge):
        whose = "the kernel's own" if mapping.name.startswith("[v") else "of a file"
        return f"{mapping} is {whose}: {_REGISTRABLE}"
    minor = {"continue": "continue_()", "register": "RegisterMode.MINOR" if mode & lib.PC_UFFD_MINOR else ""}.get(call)
    if minor and mapping.anonymous and not mapping.huge:
        use = f"{minor} is for shared memory (memfd, tmpfs) and huge pages"
        return f"{mapping} is private anonymous memory, which has no page cache: {use}"
    if call == "zeropage" and mapping.huge:
        return f"{mapping} has huge pages, of which the kernel has none of zeros: copy zeros"
    if call == "move" and not mapping.anonymous:
        return f"{mapping} is not private anonymous memory, which alone can be moved"
    if call == "register" and mode & lib.PC_UFFD_WP and not mapping.anonymous:
        return f"{mapping} is not private anonymous memory: RegisterMode.WP on it needs Linux 5.19 or newer"
    return ""


def _mappings(start: int, end: int) -> Iterator[Mapping]:
    """Of this process, in order, as far as they are between two addresses."""
    found: Mapping | None = None
    with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            if header := _HEADER.match(line):
                if found:
                    yield found
                low, high = int(header[1], 16), int(header[2], 16)
                if low >= end:
                    return
                found = Mapping(low, high, header[4], int(header[5]), header[6].strip()) if high > start else None
            elif found and line.startswith("KernelPageSize:"):
                found.page_bytes = int(line.split()[1]) * 1024
            elif found and line.startswith("VmFlags:"):
                found.flags = frozenset(line.split()[1:])
    if found:
        yield found


def _tmpfs() -> frozenset[str]:
    """The devices of the tmpfs that are mounted, as /proc/self/maps writes them."""
    devices = set()
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split()
            if fields[fields.index("-") + 1] == "tmpfs":
                major, minor = map(int, fields[2].split(":"))
                devices.add(f"{major:02x}:{minor:02x}")
    return frozenset(devices)
