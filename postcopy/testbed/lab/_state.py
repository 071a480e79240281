# SPDX-License-Identifier: Apache-2.0
"""Where a laboratory's record is: one JSON file, from ``lab up`` to ``lab down``, which says whose the holder is.

The directory belongs to one user: /run/postcopy-lab for whoever may write there, else $XDG_RUNTIME_DIR/postcopy-lab,
else /tmp/postcopy-lab-UID; $POSTCOPY_LAB_DIR replaces all of them. All changes happen under one lock file in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from postcopy._files import replacing, write_all
from postcopy.errors import ConfigurationError, ResourceError

Json = dict[str, Any]
_SUFFIX = ".json"


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
    # Below /tmp anybody could have made it, with a record that names a process of his choice.
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
    """The directory, while nobody else changes it. Blocks until then."""
    path = directory()
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield path
    finally:
        os.close(fd)


def path_of(where: Path, name: str) -> Path:
    return where / f"{name}{_SUFFIX}"


def write(where: Path, name: str, record: Json) -> None:
    """Whole or not at all, whenever this process is killed."""
    with replacing(str(path_of(where, name))) as fd:
        write_all(fd, json.dumps(record, indent=1).encode())


def read(where: Path, name: str) -> Json | None:
    try:
        record = json.loads(path_of(where, name).read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record["version"] != 1:
            raise KeyError("version")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        raise ConfigurationError(f"{path_of(where, name)} is not the record of a laboratory: remove it") from error
    return record


def remove(where: Path, name: str) -> None:
    path_of(where, name).unlink(missing_ok=True)


def names(where: Path) -> list[str]:
    return sorted(path.name.removesuffix(_SUFFIX) for path in where.glob(f"*{_SUFFIX}"))
