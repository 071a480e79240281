# SPDX-License-Identifier: Apache-2.0
"""Where a laboratory's record is: one JSON file, from ``lab up`` to ``lab down``, which says whose the holder is.

The directory belongs to one user: /run/postcopy-lab for a user who may write there, else $XDG_RUNTIME_DIR/postcopy-lab,
else /tmp/postcopy-lab-UID; $POSTCOPY_LAB_DIR replaces all of them. All changes happen under one lock file in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from postcopy._files import replacing, write_all
from postcopy.errors import ConfigurationError, ResourceError
from postcopy.testbed._linux import inode, start_time

_SUFFIX = ".json"


class HostRecord(msgspec.Struct, rename="kebab"):
    fd: int
    """The holder's descriptor of the host's network namespace."""
    ipv4: str
    ipv6: str | None
    rate: int | None = None
    """Bytes a second in each direction of its cable, as it was set last; None: no limit."""
    delay_us: int = 0


class Record(msgspec.Struct, rename="kebab"):
    """What is in the file."""

    version: Literal[1]
    name: str
    mark: str
    """What `_members.MARK` is in the environment of what runs here, all of which ends with the laboratory."""
    pid: int
    """Of the holder."""
    started: int | None
    pid_namespace: int
    user: bool
    """It has a user namespace of its own."""
    kept: bool
    switch: int
    """The holder's descriptor of the switch's network namespace."""
    inodes: tuple[int, ...]
    mtu: int
    hosts: dict[str, HostRecord]

    def is_alive(self) -> bool:
        """Whether the holder is there: this very process, not another one that has got its number."""
        if self.pid_namespace != inode("/proc/self/ns/pid"):
            raise ConfigurationError(
                f"laboratory {self.name} was made in another PID namespace (a container): call `postcopy lab` there, or"
                f" remove {path_of(directory(), self.name)}"
            )
        return self.started is not None and start_time(self.pid) == self.started


def directory() -> Path:
    """Made if need be, with no rights for others."""
    named = os.environ.get("POSTCOPY_LAB_DIR")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if named:
        path = Path(named)
    elif os.access("/run", os.W_OK):
        path = Path("/run/postcopy-lab")
    elif runtime and os.access(runtime, os.W_OK):
        path = Path(runtime, "postcopy-lab")
    else:
        path = Path(tempfile.gettempdir(), f"postcopy-lab-{_user()}")
    try:
        path.mkdir(mode=0o700, parents=bool(named), exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ResourceError(
            f"cannot keep the record of a laboratory in {path}: {error.strerror}",
            "name a directory in the environment variable POSTCOPY_LAB_DIR",
        ) from error
    # Below /tmp another user could have made it, with a record that names some other process.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ResourceError(
            f"{path} is not a directory that only this user can write to",
            "remove it, or name another one in the environment variable POSTCOPY_LAB_DIR",
        )
    return path


def _user() -> int:
    """Who this user is outside of the user namespace, where all who are root inside of theirs share one /tmp."""
    user = os.getuid()
    with open("/proc/self/uid_map", encoding="ascii") as file:
        for line in file:
            inside, outside, count = map(int, line.split())
            if inside <= user < inside + count:
                return outside + user - inside
    return user


@contextlib.contextmanager
def locked() -> Iterator[Path]:
    """The directory, while no other process changes it. Blocks until then."""
    path = directory()
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield path
    finally:
        os.close(fd)


def path_of(where: Path, name: str) -> Path:
    return where / f"{name}{_SUFFIX}"


def write(where: Path, record: Record) -> None:
    """Whole or not at all, whenever this process is killed."""
    with replacing(str(path_of(where, record.name))) as fd:
        write_all(fd, msgspec.json.format(msgspec.json.encode(record), indent=1))


def read(where: Path, name: str) -> Record | None:
    path = path_of(where, name)
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"{path} is not the record of a laboratory: remove it") from error


def remove(where: Path, name: str) -> None:
    path_of(where, name).unlink(missing_ok=True)


def names(where: Path) -> list[str]:
    return sorted(path.name.removesuffix(_SUFFIX) for path in where.glob(f"*{_SUFFIX}"))
