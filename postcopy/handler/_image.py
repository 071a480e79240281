# SPDX-License-Identifier: Apache-2.0
"""The memory file of a snapshot, and how it is known again.

It is opened anew for each virtual machine, so that a file which was replaced since is what the next one gets; those
that run keep the file that they began with, also when its name is gone. All of them share the page cache of the host.

Resource handling: an `Image` owns its descriptor until `close`, or until nobody has it: to open one may take for ever
(a disk that hangs), so that is abandoned, and its result with it.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property

from postcopy.errors import ConfigurationError
from postcopy.memory import Memory
from postcopy.memory.workingset import Identity

SAMPLES = 256
"""Pieces of the file that are looked at to know it again."""
SAMPLE_BYTES = 4096


class Image:
    """One that is open."""

    def __init__(self, path: str, fd: int) -> None:
        """The descriptor is this object's from now on. Nothing is asked of its file system, which may not answer."""
        self.path = path
        self.fd = fd

    @classmethod
    def open(cls, path: str) -> Image:
        """`ConfigurationError` for anything but a regular file with something in it."""
        with Memory.from_file(path) as memory:
            image = cls(path, os.dup(memory.fd))
        _ = image.status
        return image

    @cached_property
    def status(self) -> os.stat_result:
        """As it was when it was opened; of one that was taken over, when it was first asked for."""
        return os.fstat(self.fd)

    @property
    def size_bytes(self) -> int:
        return self.status.st_size

    @property
    def stamp(self) -> tuple[int, ...]:
        """The same for as long as it is the same file, and was not written to."""
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def identify(self) -> Identity:
        """Reads a sample of it. Blocks on I/O. `ConfigurationError` when it cannot be read."""
        digest = hashlib.sha256()
        try:
            step = max(SAMPLE_BYTES, self.size_bytes // SAMPLES // SAMPLE_BYTES * SAMPLE_BYTES)
            for offset in range(0, self.size_bytes, step):
                digest.update(os.pread(self.fd, SAMPLE_BYTES, offset))
        except OSError as error:
            raise ConfigurationError(f"image {self.path}: {error.strerror}") from error
        return Identity(self.size_bytes, self.status.st_mtime_ns // 1_000_000_000, digest.digest())

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()
