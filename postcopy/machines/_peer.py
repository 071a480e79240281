# SPDX-License-Identifier: Apache-2.0
"""The process behind an AF_UNIX socket of a virtual machine monitor: how to connect to it, and which one it is."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import signal
import socket
import struct
from dataclasses import dataclass

import trio

from postcopy._fd import FdHolder
from postcopy.errors import MigrationError, ResourceError, out_of_files

_CONNECT_AGAIN_S = 0.01
MAX_SOCKET_PATH_BYTES = 107  # sun_path, and its null (unix(7))
_SO_PEERPIDFD = 77  # Linux 6.5


class Unreachable(MigrationError):
    """Nobody takes connections there: nothing was asked."""


@dataclass(frozen=True)
class Process:
    """A process that listens at a socket."""

    pid: int
    uid: int
    gid: int
    pidfd: FdHolder

    def kill(self) -> None:
        """Ends it, if it has not ended: never another one that has its number."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd.fileno(), signal.SIGKILL)

    @property
    def alive(self) -> bool:
        """Whether it has not ended; what is closed is not looked at."""
        return self.pidfd.closed or not has_ended(self.pidfd.fd)


def has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


async def connect(path: str, deadline: float, who: str, start_one: str) -> trio.SocketStream:
    """A connection to the one who listens at `path` (absolute, of any length). `who` that is, to a person, and how to
    `start_one`. `Unreachable`, or `ResourceError` where this process has no descriptors left."""
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise out_of_files(error.errno or 0, f"connecting to {who}") from error
    directory = -1
    try:
        name = path
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:  # as those of jailed ones often are
            directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            name = f"/proc/self/fd/{directory}/{os.path.basename(path)}"
        # (trio's own takes EAGAIN, of a listener for which too many wait, for a connection that is being made)
        with trio.fail_at(deadline):
            while not connected(connection, name):  # noqa: ASYNC110 -- nothing tells when there is room
                await trio.sleep(_CONNECT_AGAIN_S)
    except trio.TooSlowError:
        connection.close()
        raise Unreachable(f"{who} ({path}) takes no connection: too many wait") from None
    except (OSError, ValueError) as error:
        connection.close()
        raise _unreachable(error, path, who, start_one) from error
    except BaseException:
        connection.close()
        raise
    finally:
        if directory >= 0:
            os.close(directory)
    return trio.SocketStream(trio.socket.from_stdlib_socket(connection))


def _unreachable(error: OSError | ValueError, path: str, who: str, start_one: str) -> Unreachable:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOENT, errno.ECONNREFUSED):
        why = f"no {who} serves that socket; {start_one}, or name its socket"
    elif number in (errno.EACCES, errno.EPERM):
        why = f"this user may not connect; run as the user of that {who}, or as root"
    else:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return Unreachable(f"{who} ({path}): {why}")


def connected(connection: socket.socket, path: str) -> bool:
    """False: too many wait there for a connection."""
    try:
        connection.connect(path)
    except BlockingIOError:
        return False
    return True


def pid_of(connection: trio.socket.SocketType) -> int:
    """Of the process that listens at the other end."""
    return _credentials(connection)[0]


def _credentials(connection: trio.socket.SocketType) -> tuple[int, int, int]:
    fields = struct.Struct("3i")
    pid, uid, gid = fields.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, fields.size))
    return pid, uid, gid


def process_of(connection: trio.socket.SocketType, path: str, who: str) -> Process:
    """The process that listens at the other end, as the kernel says. The pidfd is the caller's."""
    pid, uid, gid = _credentials(connection)
    if pid <= 0:
        raise Unreachable(
            f"{who} ({path}) is in a pid namespace that is not seen from here; run this in the one it was started from"
        )
    try:
        # The process that listens, even if its number has been given to another one meanwhile.
        pidfd = struct.unpack("i", connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0]
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise Unreachable(f"{who} ({path}) has ended") from error
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as failure:
            if failure.errno == errno.ESRCH:
                raise Unreachable(f"{who} ({path}) has ended") from failure
            raise ResourceError(f"{who} ({path}): no pidfd of its process: {failure.strerror}") from failure
    return Process(pid, uid, gid, FdHolder(pidfd))


def one_line(text: object) -> str:
    """What another program says, for a message: of one line, and not too long."""
    shown = "".join(char if char.isprintable() else " " for char in str(text)[:4096])
    return re.sub(" +", " ", shown).strip()[:500]
