# SPDX-License-Identifier: Apache-2.0
"""The control socket as a file: who has its name, and who may connect.

A client may do everything, so the socket is made with mode 0600, for this user and root only, and listens only when
that has been checked. A socket that a dead process left behind is replaced, one that answers is not, and nothing that
is not a socket is ever removed. Checking and replacing happen under a lock on the directory, so that of two processes
that start at the same time one gets the name and the other one the error.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat

import trio

from postcopy.errors import ConfigurationError, ResourceError
from postcopy.service.options import check_control_path

BACKLOG = 128
LOCK_TIMEOUT_S = 5.0


async def listen(path: str) -> socket.socket:
    """A socket that listens there. `ConfigurationError` for a path that cannot be one, `ResourceError` where it cannot
    be had."""
    check_control_path(path)
    directory = _directory(path)
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigurationError(f"--control {path}: {directory}: {error.strerror}") from error
    try:
        await _lock(lock, directory)
        return _listen(path)
    finally:
        os.close(lock)


def _directory(path: str) -> str:
    return os.path.dirname(os.path.abspath(path))


def identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


async def _lock(directory_fd: int, directory: str) -> None:
    with trio.move_on_after(LOCK_TIMEOUT_S):
        while True:
            try:
                fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                await trio.sleep(0.01)
            except OSError as error:
                raise ResourceError(f"cannot lock {directory}: {error.strerror}") from error
    raise ResourceError(f"another process has locked {directory}", "choose another directory for --control")


def _listen(path: str) -> socket.socket:
    """The listening socket, in place of a dead one. Under the lock."""
    with contextlib.suppress(FileNotFoundError):
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise ConfigurationError(f"--control {path}: there is something that is not a socket")
            if _answers(path):
                raise ResourceError(
                    f"--control {path}: a running process has this socket", "choose another path, or end that process"
                )
            os.unlink(path)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ResourceError(f"--control {path}: {error.strerror}") from error
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Before bind: Linux makes the socket's file with the socket's mode, less the umask, which must not take the
        # owner's part away. So there is no instant at which others may connect, and no chmod by a name that could mean
        # another file by then.
        os.fchmod(listener.fileno(), 0o600)
        before = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        if stat.S_IMODE(os.lstat(path).st_mode) & 0o077:
            os.unlink(path)
            raise ResourceError(
                f"--control {path}: other users could connect: this file system gives a socket no mode of its own",
                "choose a directory on another one, such as /run",
            )
        listener.listen(BACKLOG)  # before which no client can connect
    except BaseException as error:
        listener.close()
        if isinstance(error, OSError):
            raise ResourceError(f"--control {path}: {error.strerror}") from error
        raise
    return listener


def _answers(path: str) -> bool:
    """Whether a process listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            return True  # its queue is full
    return True
