# SPDX-License-Identifier: Apache-2.0
"""Which addresses of a process are registered with a userfaultfd, and which Python may touch.

There is one table for each address space: `ADDRESSES` for that of this process, and one of its own for each userfaultfd
of another process. No address of `ADDRESSES` is both registered and touchable: Python would touch it with the GIL held,
sleep in the kernel, and no Python thread could run that answers the fault.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from postcopy.errors import BusyError


class RangeSet:
    """Disjoint ranges of addresses, merged where they meet. Not thread-safe."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

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

    def within(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of it between two addresses."""
        return [(max(low, start), min(high, end)) for low, high in self._ranges if low < end and start < high]

    def move(self, old: int, new: int, size_bytes: int) -> None:
        """What is in the `size_bytes` from `old` on goes to `new`, as after mremap(2)."""
        parts = self.within(old, old + size_bytes)
        self.remove(old, old + size_bytes)
        for low, high in parts:
            self.add(low - old + new, high - old + new)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(self._ranges))

    def __bool__(self) -> bool:
        return bool(self._ranges)


class AddressTable:
    """Which owner has registered which addresses of one process. Thread-safe. An owner is anything that can be a
    key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Keeps the owner: collecting a userfaultfd with ranges registered would let its waiters read zeros.
        self._registered: dict[object, RangeSet] = {}
        self._touchable: list[tuple[int, int]] = []

    def register(self, owner: object, start: int, end: int) -> list[tuple[int, int]]:
        """Which parts the owner had registered before. `BusyError` when Python may touch some of them."""
        with self._lock:
            if any(low < end and start < high for low, high in self._touchable):
                raise BusyError(
                    "this memory cannot be registered while Python has a buffer of it, which it would touch"
                    " with the GIL held: leave Memory.buffer() first"
                )
            ranges = self._registered.setdefault(owner, RangeSet())
            known = ranges.within(start, end)
            ranges.add(start, end)
            return known

    def unregister(self, owner: object, start: int, end: int) -> None:
        with self._lock:
            if ranges := self._registered.get(owner):
                ranges.remove(start, end)
                if not ranges:
                    del self._registered[owner]

    def move(self, owner: object, old: int, new: int, size_bytes: int) -> None:
        with self._lock:
            if ranges := self._registered.get(owner):
                ranges.move(old, new, size_bytes)

    def forget(self, owner: object) -> None:
        with self._lock:
            self._registered.pop(owner, None)

    def of(self, owner: object) -> list[tuple[int, int]]:
        with self._lock:
            return list(self._registered.get(owner, ()))

    def touch(self, start: int, end: int) -> None:
        """Notes that Python may touch these addresses; `BusyError` when some of them are registered."""
        with self._lock:
            if any(ranges.within(start, end) for ranges in self._registered.values()):
                raise BusyError(
                    "Python cannot have a buffer of memory that is registered with a userfaultfd: it would"
                    " sleep in a page fault with the GIL held; use read() and write()"
                )
            self._touchable.append((start, end))

    def untouch(self, start: int, end: int) -> None:
        with self._lock:
            self._touchable.remove((start, end))


ADDRESSES = AddressTable()
