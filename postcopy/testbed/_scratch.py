# SPDX-License-Identifier: Apache-2.0
"""A directory for as long as a command runs. What one that was killed has left, the next one removes: a lock says that
a directory is in use."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "postcopy-scratch-"


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Blocks on I/O. OSError where there can be none."""
    os.close(os.open("/", os.O_RDONLY | os.O_CLOEXEC))  # (without a descriptor tempfile would say another reason)
    _remove_stale(Path(tempfile.gettempdir()))
    with contextlib.ExitStack() as stack:
        locked = False
        while not locked:
            path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            stack.callback(shutil.rmtree, path, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):  # another command has removed it before it was locked
                fd = stack.enter_context(_opened(path))
                with contextlib.suppress(OSError):  # NFS locks no directory: there nobody removes it, either
                    fcntl.flock(fd, fcntl.LOCK_EX)
                locked = path.exists()
        inner = path / "own"  # a daemon that has its control socket there locks that directory
        inner.mkdir(mode=0o700)
        yield inner


def _remove_stale(directory: Path) -> None:
    """Nobody else's: in a directory for all (sticky) only its owner can put another one in the place of one."""
    for path in directory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _opened(path) as fd:
            if os.fstat(fd).st_uid == os.geteuid():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
