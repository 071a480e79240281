# SPDX-License-Identifier: Apache-2.0
"""Processes of a keeper, which outlive the process group that a test knows: an engine that loses its keeper starts
another one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

DEADLINE_S = 30.0


def processes(marker: str) -> list[int]:
    """Those that have `marker`, such as the path of a test's own socket, in a word of their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if any(marker.encode() in word for word in words) and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def kill_all(marker: str) -> None:
    """All at once, again and again until there is none."""
    deadline_s = time.monotonic() + DEADLINE_S
    while found := processes(marker):
        if time.monotonic() > deadline_s:
            raise AssertionError(f"these do not end: {found}")
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def become(fds: list[int], names: str, command: list[str]) -> None:
    """As systemd starts a service that it has descriptors for."""
    high = [os.dup2(fd, 100 + index, inheritable=False) for index, fd in enumerate(fds)]
    for index, fd in enumerate(high):
        os.dup2(fd, 3 + index)
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names}
    os.execv(command[0], command)
