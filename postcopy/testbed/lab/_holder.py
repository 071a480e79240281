# SPDX-License-Identifier: Apache-2.0
"""The process that keeps a laboratory alive: it makes the namespaces, holds their descriptors, and waits.

``python -m postcopy.testbed.lab._holder postcopy-lab:NAME COUNT user|- STATE``, with standard input from the process
that makes the laboratory. The first line on standard output says what there is, as JSON; an ``error`` in it ends this
process.

A namespace lives as long as something refers to it. Names below /run/netns would do that, but they need a mount,
which an ordinary user may make only in a mount namespace of their own, where the next command does not see it; and a
maker that is killed half-way leaves names behind. Descriptors of a process need no right and no name, other
processes reach them as /proc/PID/fd/N, and when this process dies, even by SIGKILL, the kernel takes namespaces,
bridges and veth pairs down with it.

While the maker has not written ``stay``, the end of standard input (in order or by SIGKILL of the maker) is the end of
the laboratory; after that it is SIGTERM. Either way this process ends what runs in the laboratory first.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys

from postcopy.testbed._linux import new_network, new_user
from postcopy.testbed.lab import _members as members


def main() -> int:
    _, _, count, user, state = sys.argv
    mark = os.environ[members.MARK]
    ended = _signals()
    try:
        fds = _make(int(count), user == "user")
    except OSError as error:
        print(json.dumps({"error": error.strerror, "errno": error.errno}), flush=True)
        return 1
    inodes = [os.fstat(fd).st_ino for fd in fds]
    print(json.dumps({"pid": os.getpid(), "fds": fds, "inodes": inodes, "user": user == "user"}), flush=True)
    if _wait(ended, sys.stdin.fileno()) == b"stay\n":
        print(json.dumps({"stays": True}), flush=True)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        _wait(ended)
    members.end_processes(mark, inodes)
    with contextlib.suppress(OSError, ValueError):
        with open(state, encoding="utf-8") as file:
            mine = json.load(file)["mark"] == mark
        if mine:
            os.unlink(state)
    return 0


def _signals() -> int:
    """A descriptor that becomes readable with the first signal that asks for the end: none is lost between two
    calls, and the cleaning up is not interrupted by the next one."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: None)
    return readable


def _wait(ended: int, *fds: int) -> bytes:
    """What comes first: a line (short enough for one read), or the end, which is no bytes."""
    ready = select.select([ended, *fds], [], [])[0]
    return b"" if ended in ready else os.read(fds[0], 100)


def _make(count: int, user: bool) -> list[int]:
    if user:
        new_user()
    return [new_network() for _ in range(count)]


if __name__ == "__main__":
    sys.exit(main())
