# SPDX-License-Identifier: Apache-2.0
"""What another process has mapped, as the kernel says (/proc/PID/maps, and smaps with what the kernel marks there)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from postcopy.errors import MigrationError, ResourceError

_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)")


@dataclass(frozen=True)
class Area:
    """One mapping. The kernel cuts one in several where their rights, their advice or their userfaultfd differ."""

    start: int
    end: int
    rights: str  # as "rw-s"
    offset: int  # in the file
    device: int  # st_dev of the file
    inode: int  # 0: of no file
    path: str = ""  # as the kernel shows it
    flags: frozenset[str] = frozenset()  # "VmFlags", where they were asked for
    page_bytes: int = 0  # likewise

    @property
    def size_bytes(self) -> int:
        return self.end - self.start

    @property
    def shared(self) -> bool:
        return self.rights.endswith("s")


def may_not(who: str) -> ResourceError:
    """Look at a process."""
    return ResourceError(
        f"this user may not look at {who}",
        "run as the user of it, or as root (as root where it has changed its user, as QEMU by -runas)",
    )


def areas(pid: int, who: str, *, flags: bool = False) -> list[Area]:
    """From low to high. With `flags` it takes as long as the page tables are large. `who` that is, to a person."""
    found: list[Area] = []
    try:
        with open(f"/proc/{pid}/{'smaps' if flags else 'maps'}", errors="surrogateescape") as file:
            for line in file:
                if match := _HEAD.match(line):
                    start, end, offset, major, minor = (int(match[number], 16) for number in (1, 2, 4, 5, 6))
                    device = os.makedev(major, minor)
                    found.append(Area(start, end, match[3], offset, device, int(match[7]), match[8]))
                elif line.startswith("KernelPageSize:"):
                    found[-1] = replace(found[-1], page_bytes=int(line.split()[1]) * 1024)
                elif line.startswith("VmFlags:"):
                    found[-1] = replace(found[-1], flags=frozenset(line.split()[1:]))
    except PermissionError as error:
        raise may_not(who) from error
    except (FileNotFoundError, ProcessLookupError):
        raise MigrationError(f"{who} has ended") from None
    return found
