# SPDX-License-Identifier: Apache-2.0
"""The backing file of a toy machine's block device."""

from __future__ import annotations

import contextlib
import os
import tempfile

from postcopy._fd import FdHolder
from postcopy._files import absolute
from postcopy._native import lib
from postcopy.errors import ConfigurationError, ErrorLine, ProtocolError, ResourceError, shortage
from postcopy.units import format_size


class Disk:
    """Opened for O_DIRECT. Without a path it is a temporary file."""

    def __init__(self, path: str | None, size_bytes: int) -> None:
        if path is not None and ("\0" in path or not path):
            raise ConfigurationError(f"disk {path!r}: not the name of a file")  # C would take what is before the null
        if not 0 < size_bytes < 1 << 62:
            raise ConfigurationError(f"a disk cannot have {size_bytes} bytes")
        self.size_bytes = size_bytes
        self._temporary = path is None
        if path is None:
            try:
                fd, path = tempfile.mkstemp(prefix="postcopy-disk-", suffix=".img")
            except OSError as error:  # which is no mistake of a daemon's that was asked for one
                raise shortage(error) or ResourceError(
                    f"no file for a disk: {error}", "name one: --disk FILE"
                ) from error
            os.close(fd)
        self.path = absolute(path)
        line = ErrorLine()
        fd = lib.pc_disk_open(os.fsencode(self.path), size_bytes, line.buffer, line.size)
        if fd < 0:
            self._remove()
            raise ConfigurationError(f"disk {str(line) or f'{self.path}: {os.strerror(-fd)}'}")
        self._fd = FdHolder(fd)

    @classmethod
    def of_twin(cls, path: str | None, source_path: object, size_bytes: int) -> Disk:
        """The disk of a machine that arrives. It must be the one the source uses: neither made nor made longer here,
        however long a peer says that it is.

        Never is it the file that the source names (`source_path`): the guest writes to its disk whatever it likes, and
        guest and path both come from a peer, which could so overwrite any file."""
        if path is None:
            if not isinstance(source_path, str) or not source_path.isprintable():
                raise ProtocolError("an offer of a machine with a disk must say where it is")
            raise ConfigurationError(
                f"the machine has a disk, which is {source_path} on the source; say --disk FILE where it is on this"
                " host"
            )
        try:
            found_bytes = os.stat(path).st_size
        except (OSError, ValueError):
            raise ConfigurationError(
                f"disk {path}: there is no such file; it must be the one the source uses"
            ) from None
        if found_bytes < size_bytes:
            raise ConfigurationError(
                f"disk {path} has {format_size(found_bytes)}, the machine's {format_size(size_bytes)}; it must be the"
                " one the source uses"
            )
        return cls(path, size_bytes)

    @property
    def fd(self) -> int:
        return self._fd.fileno()

    def close(self) -> None:
        """A temporary file loses its name; a twin on this host that has it open keeps its content."""
        self._fd.close()
        self._remove()

    def _remove(self) -> None:
        if self._temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
