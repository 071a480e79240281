# SPDX-License-Identifier: Apache-2.0
"""The control socket as a file: which process has its name, and which user may connect.

A client may do everything, so the socket is made with mode 0600, for this user and root only, and listens only when
that has been checked. A socket that a dead process left behind is replaced, one that answers is not, and nothing that
is not a socket is ever removed. Checking and replacing happen under a lock on the directory, so that of two processes
that start at the same time one gets the name and the other one the error. The directory of the default path is made
for this user alone, and must be this user's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat

import trio

from postcopy._files import absolute, explain_unwritable
from postcopy.errors import ConfigurationError, ResourceError
from postcopy.service.options import check_control_path, default_control

BACKLOG = 128
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
LOCK_TIMEOUT_S = 5.0


async def listen(path: str, what: str = "--control", mode: int = 0o600) -> socket.socket:
    """A socket that listens there, of this mode. `ConfigurationError` for a path that cannot be one, `ResourceError`
    where it cannot be had; `what` is the option that it was given to."""
    check_control_path(path, what)
    directory = _directory(path)
    try:
        lock = _open_default(directory) if _is_default(path) else os.open(directory, _DIRECTORY)
    except OSError as error:
        where = os.path.dirname(directory) if _is_default(path) else directory
        raise ConfigurationError(f"{what} {path}: {explain_unwritable(error, where)}") from error
    try:
        await _lock(lock, directory, what)
        return _listen(path, what, mode)
    finally:
        os.close(lock)


def _directory(path: str) -> str:
    return os.path.dirname(absolute(path))


def _is_default(path: str) -> bool:
    with contextlib.suppress(ConfigurationError):
        return path == default_control()
    return False


def _open_default(directory: str) -> int:
    """That of the default path, made where it is not there. `ConfigurationError` for one in which another user could
    put a socket of this name: `ctl` would tell that one what it is asked."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    try:
        fd = os.open(directory, _DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        raise ConfigurationError(f"{directory} is not a directory; remove it, or say --control PATH") from error
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(fd)
        whose = f"belongs to user {status.st_uid}" if status.st_uid != os.geteuid() else "can be written to by others"
        raise ConfigurationError(
            f"{directory}, where the default control socket is, {whose}; say --control PATH, or remove the directory"
        )
    return fd


def identity(path: str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


async def _lock(directory_fd: int, directory: str, what: str) -> None:
    with trio.move_on_after(LOCK_TIMEOUT_S):
        while True:
            try:
                fcntl.flock(directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                await trio.sleep(0.01)
            except OSError as error:
                raise ResourceError(f"cannot lock {directory}: {error.strerror}") from error
    raise ResourceError(f"another process has locked {directory}", f"choose another directory for {what}")


def _listen(path: str, what: str, mode: int) -> socket.socket:
    """The listening socket, in place of a dead one. Under the lock."""
    with contextlib.suppress(FileNotFoundError):
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise ConfigurationError(f"{what} {path}: there is something that is not a socket")
            if _answers(path):
                raise ResourceError(
                    f"{what} {path}: a running process has this socket", "choose another path, or end that process"
                )
            os.unlink(path)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ResourceError(f"{what} {path}: {error.strerror}") from error
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Before bind: Linux makes the socket's file with the socket's mode, less the umask, which must not take the
        # owner's part away. So there is no instant at which others may connect, and no chmod by a name that could mean
        # another file by then.
        os.fchmod(listener.fileno(), mode)
        before = os.umask(0o777 & ~mode)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        if stat.S_IMODE(os.lstat(path).st_mode) & ~mode:
            os.unlink(path)
            raise ResourceError(
                f"{what} {path}: other users could connect: this file system gives a socket no mode of its own",
                "choose a directory on another one, such as /run",
            )
        listener.listen(BACKLOG)  # before which no client can connect
    except BaseException as error:
        listener.close()
        if isinstance(error, PermissionError):
            raise ConfigurationError(f"{what} {path}: {explain_unwritable(error, _directory(path))}") from error
        if isinstance(error, OSError):
            raise ResourceError(f"{what} {path}: {error.strerror}") from error
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
