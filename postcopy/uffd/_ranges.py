# SPDX-License-Identifier: Apache-2.0
"""Which addresses of this process are registered with a userfaultfd, and which Python may touch.

There is one address space, hence one table in the process. An address is never in both lists: Python would touch it
with the GIL held, sleep in the kernel, and no Python thread could run that answers the fault.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from postcopy.errors import BusyError


class RangeSet:
    """Disjoint ranges of addresses, merged where they meet. Not thread-safe."""

    def __init__(self, ranges: Iterator[tuple[int, int]] | list[tuple[int, int]] | None = None) -> None:
        self._ranges: list[tuple[int, int]] = []
        for start, end in ranges or ():
            self.add(start, end)

    def add(self, start: int, end: int) -> None:
        kept = []
        for low, high in self._ranges:
            if high < start or end < low:
                kept.append((low, high))
            else:
                start, end = min(start, low), max(end, high)
        self._ranges = sorted([*kept, (start, end)])

    def remove(self, start: int, end: int) -> None:
        left = []
        for low, high in self._ranges:
            left += [part for part in ((low, min(high, start)), (max(low, end), high)) if part[0] < part[1]]
        self._ranges = left

    def overlaps(self, start: int, end: int) -> bool:
        return any(low < end and start < high for low, high in self._ranges)

    def move(self, old: int, new: int, size_bytes: int) -> None:
        """What is in the `size_bytes` from `old` on goes to `new`, as after mremap(2)."""
        parts = [(max(low, old), min(high, old + size_bytes)) for low, high in self._ranges]
        self.remove(old, old + size_bytes)
        for low, high in parts:
            if low < high:
                self.add(low - old + new, high - old + new)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(self._ranges))

    def __bool__(self) -> bool:
        return bool(self._ranges)


class AddressTable:
    """Who has which addresses of this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Keeps the owner: a userfaultfd that is garbage-collected with ranges registered would release its waiters,
        # who would then read zeros.
        self._registered: dict[int, tuple[object, RangeSet]] = {}
        self._touchable: list[tuple[int, int]] = []

    def register(self, owner: object, start: int, end: int) -> None:
        with self._lock:
            if any(low < end and start < high for low, high in self._touchable):
                raise BusyError(
                    "this memory cannot be registered while Python has a buffer of it, which it would touch"
                    " with the GIL held: leave Memory.buffer() first"
                )
            self._registered.setdefault(id(owner), (owner, RangeSet()))[1].add(start, end)

    def unregister(self, owner: object, start: int, end: int) -> None:
        with self._lock:
            if entry := self._registered.get(id(owner)):
                entry[1].remove(start, end)
                if not entry[1]:
                    del self._registered[id(owner)]

    def move(self, owner: object, old: int, new: int, size_bytes: int) -> None:
        with self._lock:
            if entry := self._registered.get(id(owner)):
                entry[1].move(old, new, size_bytes)

    def forget(self, owner: object) -> None:
        with self._lock:
            self._registered.pop(id(owner), None)

    def of(self, owner: object) -> list[tuple[int, int]]:
        with self._lock:
            entry = self._registered.get(id(owner))
            return list(entry[1]) if entry else []

    def is_registered(self, start: int, end: int) -> bool:
        with self._lock:
            return any(ranges.overlaps(start, end) for _, ranges in self._registered.values())

    def touch(self, start: int, end: int) -> None:
        """Notes that Python may touch these addresses; `BusyError` when some of them are registered."""
        with self._lock:
            if any(ranges.overlaps(start, end) for _, ranges in self._registered.values()):
                raise BusyError(
                    "Python cannot have a buffer of memory that is registered with a userfaultfd: it would"
                    " sleep in a page fault with the GIL held; use read() and write()"
                )
            self._touchable.append((start, end))

    def untouch(self, start: int, end: int) -> None:
        with self._lock:
            self._touchable.remove((start, end))


ADDRESSES = AddressTable()
