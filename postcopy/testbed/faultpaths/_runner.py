# SPDX-License-Identifier: Apache-2.0
"""The process that runs cells: ``python -m postcopy.faultpaths._runner``, one JSON order a line in, one result out.

It is two processes. The *worker* has one thread, reads orders, and calls the core, which forks a child for each run.
The *guard*, its parent, does nothing but wait until the worker ends or standard input is hung up, which is also what
happens when the supervisor is killed; then it kills the worker and everything below it and goes. A cell may leave
processes behind that PR_SET_PDEATHSIG does not reach (it is cleared by fork, and by an execve of some programs): the
guard is a subreaper, so that they become its children, and it stays until none is left.

An order: ``{"index", "operation", "mode", "backing", "measure", "timeout-ms", "direct-dir", "hand-over"}``; the last
is -1, or the number of an inherited Unix socket over which the page is served from elsewhere (see `_remote`).
An answer: `Result.as_wire`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SWEEP_S = 10.0
"""How long killed processes may take to go; one that does not answer SIGKILL hangs in the kernel."""
EXIT_LEFT_BEHIND = 3
"""Something did not answer SIGKILL."""

_libc = ctypes.CDLL(None, use_errno=True)


def _work() -> None:
    """Until standard input ends."""
    from postcopy.testbed.faultpaths import _core
    from postcopy.testbed.faultpaths._model import Measure

    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        result = _core.run(
            order["index"],
            _core.cell_of(order),
            [Measure(name) for name in order["measure"]],
            timeout_ms=order["timeout-ms"],
            direct_dir=order["direct-dir"],
            hand_over_fd=order["hand-over"],
        )
        print(json.dumps(result.as_wire()), flush=True)


def children_of(pid: int) -> list[int]:
    """Processes whose parent is `pid`, zombies too."""
    return _whose_stat(1, pid)


def members_of(session: int) -> list[int]:
    """Processes of a session, zombies too."""
    return _whose_stat(3, session)


def _whose_stat(word: int, value: int) -> list[int]:
    """Processes with that value there in /proc/PID/stat; words are counted from the state, 0."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        # It may go meanwhile.
        with contextlib.suppress(OSError, IndexError, ValueError), open(f"/proc/{name}/stat", "rb") as stat:
            # The command's name, in parentheses, may hold anything.
            if int(stat.read().rpartition(b")")[2].split()[word]) == value:
                found.append(int(name))
    return found


def is_zombie(pid: int) -> bool:
    """Whether it has ended, and only waits to be reaped; also when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] == b"Z"
    except (OSError, IndexError):
        return True


def sweep(deadline_s: float = SWEEP_S) -> bool:
    """Kills and reaps all children, and theirs as they are handed to this subreaper; whether all went in time."""
    until_s = time.monotonic() + deadline_s
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        children = children_of(os.getpid())
        if not children:
            return True
        if time.monotonic() > until_s:
            return False
        for pid in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def main() -> int:
    """Guards a worker; the worker's status (128 and the number when a signal ended it)."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    guard = os.getpid()
    worker = os.fork()
    if worker == 0:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != guard:  # it went before the line above
            os._exit(1)
        _work()
        return 0
    os.close(1)  # its end is the worker's end, for who reads
    pidfd = os.pidfd_open(worker)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(0, 0)  # POLLHUP only: the lines are the worker's
    for fd, _ in poll.poll():
        if fd == pidfd:
            status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
            return (128 - status if status < 0 else status) if sweep() else EXIT_LEFT_BEHIND
    # Hung up: an idle worker has seen its end of file too, but one that is within a cell has not.
    return 0 if sweep() else EXIT_LEFT_BEHIND


if __name__ == "__main__":
    sys.exit(main())
