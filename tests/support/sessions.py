# SPDX-License-Identifier: Apache-2.0
"""The end of what a test has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

KILL_TIMEOUT_S = 20.0
"""How long a killed process may take to go: one that does not answer SIGKILL hangs in the kernel."""


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kills all that runs in the session that `process` leads (`start_new_session`), and waits until it is gone.

    Not only its process group: a shell gives each job a group of its own, and a keeper each engine. What one of them
    starts before its end is found when we look again. A process that has its number now is another one's, and nothing
    is left of the session: the kernel gives a number again only then.
    """
    if process.poll() is None:
        process.kill()
    process.wait(KILL_TIMEOUT_S)
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while time.monotonic() < deadline:
        left = [] if os.path.exists(f"/proc/{process.pid}") else list(_running(process.pid))
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _running(session: int) -> Iterator[int]:
    """Its processes that have not ended yet. (Nobody here can wait for them, nor in some containers anybody else.)"""
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # gone meanwhile
            with open(f"/proc/{pid}/stat", "rb") as file:
                state, _, _, its_session = file.read().rpartition(b")")[2].split()[:4]
            if int(its_session) == session and state not in b"ZX":
                yield int(pid)
