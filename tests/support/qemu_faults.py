# SPDX-License-Identifier: Apache-2.0
"""`postcopy` on whose side something happens to a QEMU while it loads a guest: ``qemu_faults.py FILE ARGUMENT...``.
Each line of FILE is for one arrival, the last one for all that follow:

    nothing
    killed before   QEMU is killed before it is told to load the state
    killed after    and when it has loaded it, before that is told to the source
    cut N           it is given only the first bytes of the state: N, modulo the length of what it needs of that
    locked DISK     somebody has the lock of that image meanwhile, as another QEMU that runs would
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from postcopy.cli import main
from postcopy.machines.qemu.destination import ArrivingQemu


def command(steps: Path) -> tuple[str, ...]:
    """In place of ``postcopy``."""
    return (sys.executable, __file__, str(steps))


UNSHARED_WRITE = 201
"""The byte on which a QEMU has a lock that lets nobody else write to the image; 101 says that it may write."""


def kill(pid: int) -> None:
    """And waits until it has ended."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [])
    finally:
        os.close(pidfd)


@contextlib.contextmanager
def locked(image: str) -> Iterator[None]:
    with open(image, "rb") as file:
        lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, UNSHARED_WRITE, 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        yield


def cut(state: bytes, at: int) -> bytes:
    """Its beginning: four bytes at least, for which QEMU waits, and not all that it needs."""
    description = next(
        i for i in range(len(state)) if state[i] == 6 and int.from_bytes(state[i + 1 : i + 5]) == len(state) - i - 5
    )  # at its end, for debuggers; the byte before that is the end of what is needed
    return state[: 4 + at % (description - 5)]


def main_with_faults(steps: list[str]) -> int:
    load_state = ArrivingQemu.load_state

    async def load(self: ArrivingQemu, state: bytes) -> None:
        what, _, value = (steps.pop(0) if len(steps) > 1 else steps[0]).partition(" ")
        assert self.process is not None
        pid, _ = self.process
        if (what, value) == ("killed", "before"):
            kill(pid)
        if what == "cut":
            state = cut(state, int(value))
        with locked(value) if what == "locked" else contextlib.nullcontext():
            await load_state(self, state)
        if (what, value) == ("killed", "after"):
            kill(pid)

    ArrivingQemu.load_state = load  # type: ignore[method-assign]
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main_with_faults(Path(sys.argv.pop(1)).read_text().splitlines()))
