# SPDX-License-Identifier: Apache-2.0
"""The process that runs cells: ``python -m postcopy.testbed.faultpaths._runner``, one `Order` a line in, one `Result`
out.

It is two processes. The *worker* has one thread, reads orders, and calls the core, which forks a child for each run.
The *guard*, its parent, does nothing but wait until the worker ends or standard input is hung up, which is also what
happens when the supervisor is killed; then it kills the worker and everything below it and goes. A cell may leave
processes behind that PR_SET_PDEATHSIG does not reach (it is cleared by fork, and by an execve of some programs): the
guard is a subreaper, so that they become its children, and it stays until none is left.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

from postcopy.testbed import _linux

SWEEP_S = 10.0
"""How long killed processes may take to go; one that does not answer SIGKILL hangs in the kernel."""
EXIT_LEFT_BEHIND = 3
"""Something did not answer SIGKILL."""


def _work() -> None:
    """Until standard input ends."""
    import msgspec  # here, and not in the guard

    from postcopy.testbed.faultpaths import _core
    from postcopy.testbed.faultpaths._model import Order

    for line in sys.stdin:
        result = _core.run(msgspec.json.decode(line, type=Order))
        print(msgspec.json.encode(result).decode(), flush=True)


def children_of(pid: int) -> list[int]:
    """Processes whose parent is `pid`, zombies too."""
    return _linux.pids_with(_linux.PARENT, pid)


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
    _linux.libc.prctl(_linux.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    guard = os.getpid()
    worker = os.fork()
    if worker == 0:
        _linux.die_with(guard)
        _work()
        return 0
    os.close(1)  # the reader takes its end for the worker's
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
