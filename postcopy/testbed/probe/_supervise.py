# SPDX-License-Identifier: Apache-2.0
"""Runs trials in children that may hang or die: each costs its own answer, not the others, and leaves nothing behind.

Without Trio, and where need be without another interpreter: `postcopy probe` must work where little does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable
from typing import Any

from postcopy._child import python
from postcopy.testbed import _linux
from postcopy.testbed.probe import _trials

Json = dict[str, Any]
TRIAL_DEADLINE_S = 30.0
"""For one trial in the child; the slowest takes well under a second on a healthy host."""
REAP_DEADLINE_S = 5.0


def try_in_child(names: Iterable[str], deadline_s: float = TRIAL_DEADLINE_S) -> dict[str, Json]:
    """The raw answers of trials (`_trials.TRIALS`): ``state`` and ``facts`` or ``reason``.

    Blocks, for at most `deadline_s` and `REAP_DEADLINE_S` for each trial that hangs, and a start of a Python beside.
    """
    left = list(names)
    answers: dict[str, Json] = {}
    while left:
        done, stuck, why = _run_child(left, deadline_s)
        answers.update(done)
        if stuck is None and not done:
            stuck = left[0]  # it has not even begun: do not start it for ever
        if stuck is not None:
            answers[stuck] = {"state": "unknown", "reason": why, "errno": 0}
        left = [name for name in left if name not in answers]
    return answers


def _run_child(names: list[str], deadline_s: float) -> tuple[dict[str, Json], str | None, str]:
    """What was answered; the trial in which the child ended before its time; how."""
    with open(os.memfd_create("postcopy-probe"), "rb") as stdout:
        # A file, no pipe: whatever a child that cannot be killed still holds open must not hold us up. In memory: a
        # container's file system may be read-only as a whole.
        pid = _start_child(names, stdout.fileno())
        # Trials have no deadlines of their own: healthy ones together stay far below that of a single one.
        status = _wait(pid, deadline_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # also what it has left behind
        if status is None:
            why = f"no answer within {deadline_s:g} s"
            _wait(pid, REAP_DEADLINE_S)
        else:
            why = f"the trial died ({signal.Signals(-status).name if status < 0 else f'status {status}'})"
        lines = os.pread(stdout.fileno(), os.fstat(stdout.fileno()).st_size, 0).decode(errors="replace").splitlines()
    answers: dict[str, Json] = {}
    begun = None
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line of a killed child
            answer = json.loads(line)
            if "begin" in answer:
                begun = answer["begin"]
            else:
                answers[answer["name"]] = answer
    return answers, begun if begun is not None and begun not in answers else None, why


def _start_child(names: list[str], stdout: int) -> int:
    """A child in a session of its own; its pid, still to be waited for."""
    code = "import sys; from postcopy.testbed.probe import _trials; _trials.run(sys.argv[2:], int(sys.argv[1]))"
    parent = os.getpid()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    streams = ((null, 0), (stdout, 1), (null, 2))
    try:
        return os.posix_spawn(
            sys.executable,
            python("-c", code, str(parent), *names),
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for fd, number in streams],
            setsid=True,
        )
    except OSError:
        # An interpreter that this user may not execute (it had more rights once), or that is embedded: a fork.
        if pid := os.fork():
            return pid
        try:
            os.setsid()
            for fd, number in streams:
                os.dup2(fd, number)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - what was buffered in the old one is the parent's
            _trials.run(names, parent)
        finally:
            os._exit(1)
    finally:
        os.close(null)


def _wait(pid: int, deadline_s: float) -> int | None:
    """How the child ended, negative for a signal; None when it had not at the deadline."""
    pidfd = os.pidfd_open(pid)
    try:
        if not _linux.wait_for([pidfd], deadline_s):
            return None
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
