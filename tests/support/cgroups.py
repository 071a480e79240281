# SPDX-License-Identifier: Apache-2.0
"""A control group for the processes of one test, of either version of control groups."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_FILES = {  # controller: limit and use in version 1, and in version 2
    "memory": (("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")),
    "pids": (("pids.max", "pids.current"), ("pids.max", "pids.current")),
}
_REMOVED_AFTER_S = 10.0


class Group:
    def __init__(self, controller: str) -> None:
        root, path, files = Path("/sys/fs/cgroup"), "/", _FILES[controller][1]
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, where = line.split(":", 2)
            if controller in controllers.split(","):
                root, path, files = root / controller, where, _FILES[controller][0]
                break
        self.path = Path(f"{root}{path}") / f"postcopy-test-{secrets.token_hex(4)}"
        self._limit, self._used = (self.path / name for name in files)
        self.path.mkdir()

    def limit(self, value: int | str) -> None:
        self._limit.write_text(str(value))

    def used(self) -> int:
        return int(self._used.read_text())

    def enter(self) -> list[str]:
        """The start of a command, which is in the group before it begins."""
        return ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(self.path)]

    def remove(self) -> None:
        deadline = time.monotonic() + _REMOVED_AFTER_S
        while self.path.exists():
            assert time.monotonic() < deadline, f"{self.path} still has processes"
            with contextlib.suppress(OSError):  # one of them is still ending
                self.path.rmdir()
            time.sleep(0.02)


@contextlib.contextmanager
def group_of(controller: str, limit: int | str) -> Iterator[Group]:
    """Removed again when the processes in it have ended; the test is skipped where it cannot be made."""
    try:
        group = Group(controller)
        group.limit(limit)
    except OSError as error:
        pytest.skip(f"no control group with a limit of {controller} can be made here: {error}")
    try:
        yield group
    finally:
        group.remove()
