# SPDX-License-Identifier: Apache-2.0
"""Starts a program with the preload library in it (csrc/preload/preload.h)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import socket
import stat
from collections.abc import Iterator, Sequence
from typing import NoReturn

from postcopy import _native
from postcopy._fd import FdHolder
from postcopy._files import absolute, explain_unwritable
from postcopy.errors import ConfigurationError, ResourceError
from postcopy.machines._peer import MAX_SOCKET_PATH_BYTES
from postcopy.machines.preload.client import VARIABLE
from postcopy.uffd import How, UffdFeature, explain_unavailable, probe

_DEVICE = "/dev/userfaultfd"
LAZY_FEATURES = (
    UffdFeature.THREAD_ID
    | UffdFeature.MISSING_SHMEM
    | UffdFeature.MINOR_SHMEM
    | UffdFeature.MISSING_HUGETLBFS
    | UffdFeature.MINOR_HUGETLBFS
)
"""Of the userfaultfd that guards a program from the start on, as far as the kernel has them."""


def library() -> str:
    """Its path. `ResourceError` where it is not installed."""
    path = os.path.join(os.path.dirname(str(_native.__file__)), "libpostcopy-preload.so")
    if not os.access(path, os.R_OK):
        raise ResourceError(f"{path} is not there, or cannot be read", "install postcopy again")
    if {" ", ":"} & set(path):  # which separate the entries of LD_PRELOAD
        raise ResourceError(
            f"{path}: a library with ' ' or ':' in its path cannot be preloaded", "install it elsewhere"
        )
    return path


def start(command: Sequence[str], path: str | None = None, *, lazy: bool = False) -> NoReturn:
    """This process becomes `command`, whose first word is looked for in PATH. Errors of `environment`, and
    `ConfigurationError` for a command that cannot be run."""
    with environment(path or _default_path(), lazy=lazy) as variables:
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # which Python ignores
        try:
            os.execvpe(command[0], list(command), variables)
        except OSError as error:
            raise ConfigurationError(f"cannot run {command[0]}: {error.strerror}") from error


@contextlib.contextmanager
def environment(path: str, *, lazy: bool = False) -> Iterator[dict[str, str]]:
    """The environment in which a program is started, with descriptors that it inherits: until the block is left.

    Its socket will be at `path`, from its first mapping of a file in memory on. `lazy`: it waits for the content of
    such a mapping from the first touch on. `ResourceError`, with the remedy, where this user may have no full
    userfaultfd; `ConfigurationError` for a path that cannot be a socket's."""
    if unavailable := explain_unavailable():
        raise unavailable
    path = absolute(path)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise ConfigurationError(f"--socket {path}: the path of a socket has at most {MAX_SOCKET_PATH_BYTES} bytes")
    _check_free(path)
    preloaded = [library(), *filter(None, [os.environ.get("LD_PRELOAD")])]
    variables = {**os.environ, "LD_PRELOAD": ":".join(preloaded), VARIABLE: path}
    if lazy:
        variables[f"{VARIABLE}_LAZY"] = hex(LAZY_FEATURES & probe(How.ANY).features)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # there are other ways to a userfaultfd
            device = stack.enter_context(FdHolder(_inherited()))
            variables[f"{VARIABLE}_UFFD"] = str(device.fd)
        yield variables


def _default_path() -> str:
    """In a directory of this user's own."""
    uid = os.geteuid()
    runtime = "/run" if uid == 0 else os.environ.get("XDG_RUNTIME_DIR")
    directory = os.path.join(runtime, "postcopy") if runtime else f"/tmp/postcopy-{uid}"
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        status = os.lstat(directory)
    except OSError as error:
        why = explain_unwritable(error, os.path.dirname(directory))
        raise ConfigurationError(f"no socket in {directory}: {why}; say --socket PATH") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != uid or status.st_mode & 0o022:
        raise ConfigurationError(f"{directory} is not a directory that this user alone may write to; say --socket PATH")
    return os.path.join(directory, f"preload-{os.getpid()}.sock")


def _check_free(path: str) -> None:
    """Nobody has this path, or a program that has ended: its socket is replaced by the library."""
    directory = os.path.dirname(path)
    if not os.access(directory, os.W_OK | os.X_OK):
        why = explain_unwritable(OSError(errno.EACCES if os.path.isdir(directory) else errno.ENOENT, ""), directory)
        raise ConfigurationError(f"--socket {path}: {why}")
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigurationError(f"--socket {path}: there is something that is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as attempt:
        try:
            attempt.connect(path)
        except ConnectionRefusedError:
            return
        except OSError as error:
            raise ConfigurationError(f"--socket {path}: {error.strerror}; choose another path") from error
    raise ResourceError(f"--socket {path}: a program that runs has this socket", "choose another path")


def _inherited() -> int:
    """/dev/userfaultfd, open in what is executed, with a number that no program counts on. It is a right that stays
    where the program gives up others, as its user."""
    fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return fcntl.fcntl(fd, fcntl.F_DUPFD, 1024 if limit == resource.RLIM_INFINITY or limit > 2048 else limit // 2)
    finally:
        os.close(fd)
