# SPDX-License-Identifier: Apache-2.0
"""The files of memory into which a machine arrives that another process has mapped: nobody else's, large enough, and
empty."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence

from postcopy._blocking import run_sync
from postcopy.errors import ConfigurationError, ResourceError
from postcopy.machines._peer import one_line
from postcopy.memory import Memory, MemoryKind, check_memory
from postcopy.memory._admission import PROMISES
from postcopy.memory.bitmap import Bitmap
from postcopy.units import format_size


async def check_nobody_else_has(who: str, pid: int, files: Iterable[tuple[int, int]]) -> None:
    """`files`: device and inode of each. `ConfigurationError` when another process than `pid` has one mapped: what it
    has there would be thrown away at a destination, and lost at a source."""
    if other := await run_sync(_other_process_with, pid, list(files)):
        raise ConfigurationError(
            f"{who} has its memory in a file that {other}, has mapped, too, and would lose what it has there: give each"
            " a file of its own"
        )


def _other_process_with(pid: int, files: Iterable[tuple[int, int]]) -> str:
    """As far as this user may look; "" where there is none."""
    wanted = [f" {os.major(device):02x}:{os.minor(device):02x} {inode} " for device, inode in files]
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in (pid, os.getpid()):
            with contextlib.suppress(OSError):
                with open(f"/proc/{name}/maps", errors="surrogateescape") as file:
                    content = file.read()
                if any(one in content for one in wanted):
                    with open(f"/proc/{name}/comm", errors="replace") as file:
                        return f"process {name}, {one_line(file.read())}"
    return ""


def boot_id() -> str:
    """By which two processes find out that they are on one host, and the numbers of files are of the same."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def promise_room(who: str, memories: Sequence[Memory]) -> None:
    """What this host cannot hold is refused (`ResourceError`); what it can is promised, in the same step."""
    small = sum(memory.size_bytes for memory in memories if memory.kind is MemoryKind.MEMFD)
    if small:
        check_memory(MemoryKind.MEMFD, small)
    _check_file_systems(who, memories)
    PROMISES.add(memories)


def _check_file_systems(who: str, memories: Sequence[Memory]) -> None:
    """A tmpfs has a limit of its own, beyond which pages cannot be placed."""
    wanted: dict[int, int] = {}  # by file system: bytes that it does not hold yet
    for memory in memories:
        status, room = os.fstat(memory.fd), os.fstatvfs(memory.fd)
        size_bytes = wanted.get(status.st_dev, 0) + memory.size_bytes - status.st_blocks * 512
        wanted[status.st_dev] = size_bytes
        available = room.f_bavail * room.f_frsize
        if room.f_blocks and available < size_bytes:
            raise ResourceError(
                f"the file system of {who}'s memory has {format_size(available)} left, and {format_size(size_bytes)}"
                " are to come",
                "remove files there that are not used any more, or mount it larger (-o remount,size=...)",
            )


async def empty(memories: Iterable[Memory]) -> None:
    """Before a process's memory is guarded, since one that waits for its memory already must not see what a file had;
    and after it, for what any other one has touched meanwhile. (Not by its library: a second for some GiB is too long
    for a request.)"""
    for memory in memories:
        await run_sync(memory.discard_pages, Bitmap.full(memory.pages))
