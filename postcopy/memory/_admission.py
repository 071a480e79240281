# SPDX-License-Identifier: Apache-2.0
"""No memory is promised twice: what one machine was given and has not touched yet is not available for the next.

A machine's memory costs nothing when it is made, and all of it later, page by page, past its point of no return, when
nothing can be refused any more: the kernel then kills the process, with all machines in it. So before a machine is
made, this is asked; and the machine is counted until its memory is closed, with what is not *resident* yet, since the
kernel has counted what is.

What there is: the host's available memory and free swap, and for each control group that this process is in, and each
above it, its limit less what is used there and cannot be thrown away. The smallest counts. Two processes do not know
each other's promises; a control group for each, as a service manager makes them, keeps them apart.

Huge pages are not counted: the kernel reserves them when they are mapped. Everything belongs to the Trio thread.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from postcopy._native import lib
from postcopy.errors import ErrorLine, ResourceError
from postcopy.memory._memory import CORE_KINDS, Memory, MemoryKind, checked_size, mapped_kind, memory_error
from postcopy.units import format_size

HEADROOM_BYTES = 16 << 20
"""What must be left for the process itself: connections, messages, page maps, Python."""
_MACHINE_BYTES = 4 << 20
_MACHINE_SHARE = 64
"""Beside its memory a machine takes page tables, page states, threads and socket buffers: so much, and this part."""


@dataclass(frozen=True)
class Room:
    """What the host, or a control group, still lets this process have."""

    name: str
    available_bytes: int
    remedy: str


class _Promise:
    """To one machine."""

    def __init__(self, memories: Iterable[Memory]) -> None:
        memories = list(memories)
        self._memories = [weakref.ref(memory) for memory in memories]
        self._overhead_bytes = overhead_bytes(sum(memory.size_bytes for memory in memories))

    def outstanding_bytes(self) -> int:
        """0 when its memory is closed."""
        living = [memory for reference in self._memories if (memory := reference()) is not None and not memory.closed]
        if not living:
            return 0
        return self._overhead_bytes + sum(memory.unpopulated_bytes() for memory in living)


class Promises:
    """What has been promised to machines of this process and is not resident yet."""

    def __init__(self) -> None:
        self._promises: list[_Promise] = []

    def add(self, memories: Iterable[Memory]) -> None:
        """To a machine with these memories; until they are closed."""
        self._promises.append(_Promise(memories))

    def outstanding_bytes(self) -> int:
        outstanding = [(promise, promise.outstanding_bytes()) for promise in self._promises]
        self._promises = [promise for promise, size_bytes in outstanding if size_bytes]
        return sum(size_bytes for _, size_bytes in outstanding)

    def check(self, size_bytes: int, rooms: Callable[[], Iterable[Room]] | None = None) -> None:
        """`ResourceError` when a machine with so much memory that is not reserved otherwise could not have it."""
        promised_bytes = self.outstanding_bytes()
        wanted_bytes = size_bytes + overhead_bytes(size_bytes) + HEADROOM_BYTES
        for room in (rooms or find_rooms)():
            if wanted_bytes + promised_bytes > room.available_bytes:
                promised = f", {format_size(promised_bytes)} of that are promised to machines here"
                raise ResourceError(
                    f"memory: {format_size(wanted_bytes)} wanted for a machine of {format_size(size_bytes)}"
                    f", {room.name}"
                    f" has {format_size(max(0, room.available_bytes))} available{promised if promised_bytes else ''}",
                    f"end or migrate a machine, {room.remedy}",
                )


PROMISES = Promises()


def check_memory(kind: str, total_bytes: int) -> None:
    """Whether this host could hold so much memory of a kind, all blocks of a machine together, as things are now, and
    beside all that machines of this process have been promised (`_admission`). `ConfigurationError` for a size that
    makes no sense, `ResourceError` where there is not enough."""
    line = ErrorLine()
    result = lib.pc_memory_check(CORE_KINDS[mapped_kind(kind)], checked_size(total_bytes), line.buffer, line.size)
    if result < 0:
        raise memory_error(result, line)
    PROMISES.check(0 if kind == MemoryKind.HUGETLB else total_bytes)


def overhead_bytes(size_bytes: int) -> int:
    """What a machine of this size takes beside its memory."""
    return _MACHINE_BYTES + size_bytes // _MACHINE_SHARE


def find_rooms() -> Iterator[Room]:
    """What limits this process, as things are now."""
    numbers = proc_numbers(Path("/proc/meminfo"))
    swap_bytes = numbers.get("SwapFree", 0) * 1024
    if "MemAvailable" in numbers:
        yield Room("this host", numbers["MemAvailable"] * 1024 + swap_bytes, "or use a host with more memory")
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield from _groups("/sys/fs/cgroup", path, _Version2, swap_bytes)
        elif "memory" in controllers.split(","):
            yield from _groups("/sys/fs/cgroup/memory", path, _Version1, swap_bytes)


class _Version1:
    limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
    files = ("total_inactive_file", "total_active_file")
    swap_limit = swap_used = ""


class _Version2:
    limit, used = "memory.max", "memory.current"
    files = ("inactive_file", "active_file")
    swap_limit, swap_used = "memory.swap.max", "memory.swap.current"


def _groups(root: str, path: str, names: type[_Version1 | _Version2], swap_bytes: int) -> Iterator[Room]:
    """The group and those above it. Inside a container the path may be one of the host's, and be missing here."""
    group = os.path.normpath(f"{root}/{path}")
    while group.startswith(root):
        limit, used = (_number(Path(group, name)) for name in (names.limit, names.used))
        if limit is not None and used is not None:  # "max" is no number
            statistics = proc_numbers(Path(group, "memory.stat"))
            available = limit - used + sum(statistics.get(name, 0) for name in names.files)
            if names.swap_limit:
                swap_limit, swap_used = (_number(Path(group, name)) for name in (names.swap_limit, names.swap_used))
                left = swap_bytes if swap_limit is None else max(0, swap_limit - (swap_used or 0))
                available += min(swap_bytes, left)
            yield Room("the control group of this process", available, "or raise the group's limit (memory.max)")
        group = os.path.dirname(group)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isascii() and text.isdigit() else None


def proc_numbers(path: Path) -> dict[str, int]:
    """Of lines such as ``MemAvailable:   123 kB`` and ``inactive_file 123``."""
    words = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) >= 2 and word[1].isdigit()}
