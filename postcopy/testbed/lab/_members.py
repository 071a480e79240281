# SPDX-License-Identifier: Apache-2.0
"""The processes of a laboratory: which they are, and how they are ended. The standard library only: the holder needs no
more."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterator

from postcopy.testbed._linux import all_pids, inode, start_time, wait_for

MARK = "POSTCOPY_LAB"
"""The environment variable that every process of a laboratory has: ``NAME:TOKEN``. An inode number says only as long as
the namespace lives whose it is; this says it for ever."""
TERM_S = 3.0
KILL_S = 10.0


def belongs(pid: int, mark: str, networks: Collection[int] = ()) -> bool:
    """Whether a process has the mark in its environment, or is in one of these network namespaces (inode numbers, only
    to be trusted while the holder keeps them alive). Not when it is gone, or another user's."""
    try:
        if networks and inode(f"/proc/{pid}/ns/net") in networks:
            return True
        with open(f"/proc/{pid}/environ", "rb") as file:
            return f"{MARK}={mark}".encode() in file.read().split(b"\0")
    except OSError:
        return False


def processes(mark: str, networks: Collection[int] = ()) -> Iterator[int]:
    """All that `belongs` says yes to, but this process."""
    for pid in all_pids():
        if pid != os.getpid() and belongs(pid, mark, networks):
            yield pid


def end_processes(mark: str, networks: Collection[int] = (), spare: Collection[int] = ()) -> int:
    """Ends them, first in order, then by force, and waits until they are gone: how many there were.

    Blocks for at most `TERM_S` + `KILL_S`. A process that one of them starts meanwhile is found in the next round.
    """
    count = 0
    term_until = time.monotonic() + TERM_S
    kill_until = term_until + KILL_S
    asked: set[int] = set()
    while time.monotonic() < kill_until:
        pids = [pid for pid in processes(mark, networks) if pid not in spare and start_time(pid) is not None]
        if not pids:
            break
        late = time.monotonic() >= term_until
        with contextlib.ExitStack() as stack:
            fds = []
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    fd = os.pidfd_open(pid)
                    stack.callback(os.close, fd)
                    # Between the look and the descriptor the number may have become another process's.
                    if not belongs(pid, mark, networks):
                        continue
                    fds.append(fd)
                    if late or pid not in asked:
                        count += pid not in asked
                        asked.add(pid)
                        signal.pidfd_send_signal(fd, signal.SIGKILL if late else signal.SIGTERM)
            wait_for(fds, max(0.0, (kill_until if late else term_until) - time.monotonic()))
    return count
