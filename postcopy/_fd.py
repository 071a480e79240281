# SPDX-License-Identifier: Apache-2.0
"""A file descriptor with a well-defined end.

The kernel reuses a descriptor number the moment it is closed; code that still has the number then uses another file.
The holder therefore forgets the number first (closed is -1), wakes Trio's waiters next, and closes last.
"""

from __future__ import annotations

import os

import trio


class FdHolder:
    """Owns one descriptor. Not thread-safe: used from the Trio thread (or without Trio, from one thread)."""

    def __init__(self, fd: int) -> None:
        if fd < 0:
            raise ValueError(f"not a file descriptor: {fd}")
        self._fd = fd

    @classmethod
    def duplicate(cls, fd: int) -> FdHolder:
        """Holds a copy (close-on-exec) of a descriptor that has another owner, such as a C object.

        Waiting on the copy stays safe when the owner closes the original in another thread.
        """
        return cls(os.dup(fd))

    @property
    def fd(self) -> int:
        """The number, or -1 once closed."""
        return self._fd

    @property
    def closed(self) -> bool:
        return self._fd == -1

    def fileno(self) -> int:
        """The number, for select() and friends; raises `trio.ClosedResourceError` once closed."""
        if self._fd == -1:
            raise trio.ClosedResourceError("file descriptor was closed")
        return self._fd

    async def wait_readable(self) -> None:
        """Waits until a read would not block. One waiter at a time (else `trio.BusyResourceError`); cancellable; raises
        `trio.ClosedResourceError` when closed before or meanwhile."""
        await trio.lowlevel.wait_readable(self.fileno())

    def detach(self) -> int:
        """Gives the descriptor away: the caller closes it."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def close(self) -> None:
        """Closes; once is enough, twice does no harm. Inside Trio the waiters get `trio.ClosedResourceError`."""
        if self._fd == -1:
            return
        fd, self._fd = self._fd, -1
        if trio.lowlevel.in_trio_run():
            trio.lowlevel.notify_closing(fd)
        os.close(fd)

    def __enter__(self) -> FdHolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
