# SPDX-License-Identifier: Apache-2.0
"""A machine whose memory is another process's: a program that has mapped a file of it shared (`_lender_program.py`)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import trio

from postcopy._native import lib
from postcopy.errors import MigrationError
from postcopy.machines import Adopt, Check, Extent, Machine, MachineState, MachineStatistics, RamBlock
from postcopy.memory import FEATURES_OF_PROCESS, DirtyLog, Memory
from postcopy.uffd import UffdFeature

PAGE = 4096
LENT = UffdFeature.MISSING_SHMEM | UffdFeature.MINOR_SHMEM | UffdFeature.EVENT_REMOVE | UffdFeature.THREAD_ID
DEADLINE_S = 30.0
PROGRAM = os.path.join(os.path.dirname(__file__), "_lender_program.py")


class Lender(Machine):
    """It is stopped and continued by signals. `refuses`: to load a state; `errs`: about where its last page is."""

    kind = "lender"
    live = True
    kernel_faults = False
    outlives = True
    lends = True

    def __init__(self, pages: int) -> None:
        fd = os.memfd_create("lender")
        os.truncate(fd, pages * PAGE)
        self.memory = Memory.from_shared_file(fd, pages * PAGE)
        self._process = subprocess.Popen(
            [sys.executable, "-S", PROGRAM, str(fd)], stdin=-1, stdout=-1, pass_fds=[fd], bufsize=0, text=False
        )
        os.close(fd)
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)
        self._address = 0
        self._state = MachineState.PAUSED
        self.refuses = self.errs = False
        self.whole = False
        self.looks = 0  # at the dirty log
        self.resumed = trio.Event()
        self._one_asks = threading.Lock()  # a test, while the engine does: each has to have the answer to its own

    def order(self, *words: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._one_asks:
            self._process.stdin.write((" ".join(map(str, words)) + "\n").encode())
            return int(self._process.stdout.readline())

    async def ask(self, *words: object) -> int:
        with trio.fail_after(DEADLINE_S):
            return await trio.to_thread.run_sync(self.order, *words, abandon_on_cancel=True)

    def _stop(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGSTOP)
        os.waitid(os.P_PIDFD, self.pidfd, os.WSTOPPED)

    def open(self, features: int) -> int:
        """A copy of a userfaultfd that it has opened."""
        number = self.order("uffd", int(features))
        fd: int = lib.pc_remote_descriptor(self.pidfd, number)
        assert fd >= 0, os.strerror(-fd)
        return fd

    async def prepare(self) -> None:
        self._address = await self.ask("address")

    @property
    def blocks(self) -> Sequence[RamBlock]:
        return [RamBlock("ram", self.memory, 0)]

    def config(self) -> dict[str, Any]:
        return {}

    async def boot(self) -> None:
        pass

    async def resume(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)
        self._state = MachineState.RUNNING
        self.resumed.set()

    async def pause(self, timeout_s: float = 10.0) -> None:
        if self._state is MachineState.RUNNING:
            self._stop()
            self._state = MachineState.PAUSED

    @contextlib.asynccontextmanager
    async def settled(self) -> AsyncIterator[None]:
        self.looks += 1
        self._stop()
        try:
            yield
        finally:
            signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)

    def dirty_log(self) -> DirtyLog:
        """In a worker thread; the program, which has to answer, runs for a moment."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)
        uffd = self.open(FEATURES_OF_PROCESS)
        try:
            self.order("close")
            self._stop()
            return DirtyLog.of_process([(self.memory, self._address)], uffd, self.pid, self.pidfd)
        finally:
            os.close(uffd)

    async def save_state(self) -> bytes:
        return b"none"

    async def load_state(self, state: bytes) -> None:
        if self.refuses:
            raise MigrationError("this program takes no state")

    async def lend(self, adopt: Adopt) -> None:
        last = self.memory.pages - 1
        extents = [Extent(0, 0, last, self._address), Extent(0, last, 1, self._address + last * PAGE + self.errs)]
        await adopt(await trio.to_thread.run_sync(self.open, LENT), int(LENT), extents)

    async def made_whole(self) -> None:
        await self.ask("close")
        self.whole = True

    def vcpu_threads(self) -> list[int]:
        return []

    def statistics(self) -> MachineStatistics:
        return MachineStatistics(self._state)

    async def verify(self) -> Check:
        return Check(True, "nothing", "not at all")

    async def wait_ready(self) -> None:
        pass

    async def wait_changed(self) -> None:
        await trio.sleep_forever()

    async def close(self, timeout_s: float = 5.0) -> None:
        """What was lent and is not whole is given back: nobody has run here."""
        if not self.memory.closed:
            if self._state is MachineState.PAUSED and not self.whole:
                signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)
                await self.ask("close")
            self.memory.drop()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        self.kill()
        os.close(self.pidfd)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        if not self.memory.closed:
            self.memory.close()
