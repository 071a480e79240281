# SPDX-License-Identifier: Apache-2.0
"""One machine of this package for each process that runs a VM: whoever moves it, or into it, holds its claim."""

from __future__ import annotations

import fcntl
import os

from postcopy._fd import FdHolder
from postcopy.errors import NO_FILES, BusyError, MigrationError, ResourceError, out_of_files


def claim(pid: int, program: str) -> FdHolder:
    """Keeps all others of this package from the same process, until it is closed. `BusyError` when another one has it.

    It is a lock on the directory of the process's descriptors, which none but root and the user of that process can
    open: other users cannot hold it. Those who see it through another mount of /proc do not see the lock.
    """
    process = f"{program} (process {pid})"
    try:
        holder = FdHolder(os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in NO_FILES:
            raise out_of_files(error.errno or 0, process) from error
        if isinstance(error, PermissionError):
            raise ResourceError(
                f"this user may not look at {process}", f"run as the user of that {program}, or as root"
            ) from error
        raise MigrationError(f"{process} has ended") from error
    try:
        fcntl.flock(holder.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder.close()
        raise BusyError(f"{process} belongs to another postcopy, or to another machine of this one") from error
    except OSError as error:
        holder.close()
        raise ResourceError(f"{process} cannot be claimed: {error.strerror}") from error
    return holder
