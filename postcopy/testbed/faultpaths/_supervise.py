# SPDX-License-Identifier: Apache-2.0
"""Runs cells in runner processes that are killed and started again when they hang or die.

The supervisor holds the write end of the runner's standard input and nothing else of it: when this process goes, in
whatever way, that end closes, and the runner's guard takes down what is left (`_runner`). The runner is in a session of
its own, so that a Ctrl-C of the terminal is this process's to handle, in order.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec
import trio

from postcopy._child import python
from postcopy.errors import ResourceError
from postcopy.testbed import _linux
from postcopy.testbed._processes import Child
from postcopy.testbed.faultpaths import _runner
from postcopy.testbed.faultpaths._model import Cell, Measure, Order, Outcome, Result

DEFAULT_TIMEOUT_S = 10.0
"""For each child of a cell."""
START_S = 20.0
"""Added to the first order: a Python starts on a busy machine."""
SLACK_S = 5.0
RUNS_OF_A_MEASURE = 3
"""At most; the locks need an idle one, and one each with a fault elsewhere and in the same mapping."""
STOP_S = _runner.SWEEP_S + 5.0

COMMAND = python("-m", "postcopy.testbed.faultpaths._runner")
Progress = Callable[[int, Cell], None]
"""Called before each cell, with its number."""


class Runner(contextlib.AbstractAsyncContextManager["Runner"]):
    """Where cells run; an async context manager, which leaves no process behind when it is left."""

    def __init__(
        self,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        direct_dir: str = "",
        hand_over_fd: int = -1,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.timeout_s = timeout_s
        self.restarts = 0
        """How often a runner hung or died."""
        self._direct_dir = direct_dir
        self._hand_over_fd = hand_over_fd
        self._command = command
        self._child: Child | None = None
        self._fresh = True
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __aexit__

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._stop()
        finally:
            self._stderr.close()

    async def run(self, cell: Cell, measure: Collection[Measure] = ()) -> Result:
        """One cell. A runner that does not answer in time makes it `Outcome.HUNG`, one that dies `Outcome.CRASHED`; the
        next call starts another. Cancelled: the runner is killed."""
        order = Order(cell, round(self.timeout_s * 1000), tuple(measure), self._direct_dir, self._hand_over_fd)
        child = await self._started()
        deadline_s = SLACK_S + self.timeout_s * (1 + RUNS_OF_A_MEASURE * len(measure)) + START_S * self._fresh
        line: str | None = None
        try:
            with trio.move_on_after(deadline_s):
                line = await self._ask(child, msgspec.json.encode(order))
        finally:
            if not line:
                await self._stop()
        if line:
            self._fresh = False
            return msgspec.json.decode(line, type=Result)
        self.restarts += 1
        if line is None:
            return Result(Outcome.HUNG, text=f"the runner gave no answer within {deadline_s:g} s and was killed")
        return Result(Outcome.CRASHED, text=self._how_it_died(child.process.returncode))

    @staticmethod
    async def _ask(child: Child, order: bytes) -> str:
        """The answer; empty when the runner ended instead."""
        await child.send(order)
        line = ""
        async with trio.open_nursery() as nursery:

            async def cancel_at_end() -> None:
                # What a killed runner has left behind may hold its standard output open.
                await child.process.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(cancel_at_end)
            line = await child.line()
            nursery.cancel_scope.cancel()
        return line

    async def _started(self) -> Child:
        if self._child is None:
            self._fresh = True
            self._stderr.seek(0)  # the runners write where this file is
            self._stderr.truncate()
            try:
                self._child = await Child.start(
                    self._command,
                    end_s=STOP_S,  # for the guard, which takes down what is below it when its input ends
                    outlives=True,  # likewise
                    stdin=subprocess.PIPE,
                    stderr=self._stderr.fileno(),
                    start_new_session=True,
                    pass_fds=[self._hand_over_fd] if self._hand_over_fd >= 0 else [],
                )
            except OSError as error:
                raise ResourceError(
                    f"cannot start {self._command[0]}, which runs the operations: {error.strerror}"
                ) from None
        return self._child

    async def _stop(self) -> None:
        """Bounded, and not cancelled."""
        child, self._child = self._child, None
        if child is None:
            return
        with trio.CancelScope(shield=True):
            await child.end()
            if child.process.returncode != 0:
                await self._end_session(child.pid)

    @staticmethod
    async def _end_session(session: int) -> None:
        """Kills what a guard that was itself killed has left behind. It goes to init, or to our subreaper, to reap."""
        with trio.move_on_after(_runner.SWEEP_S):
            while left := [
                pid for pid in _linux.pids_with(_linux.SESSION, session) if _linux.start_time(pid) is not None
            ]:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
                await trio.sleep(0.002)

    def _how_it_died(self, status: int | None) -> str:
        lines = os.pread(self._stderr.fileno(), 1 << 16, 0).decode(errors="replace").strip().splitlines()
        if status is not None and status > 128:
            with contextlib.suppress(ValueError):
                return f"the runner died: {signal.Signals(status - 128).name}"
        if status == _runner.EXIT_LEFT_BEHIND:
            return "the runner died, and something it had started does not answer SIGKILL"
        return f"the runner ended with status {status}" + (f": {lines[-1]}" if lines else "")


async def run_cells(
    runner: Runner,
    cells: Sequence[Cell],
    measures: Mapping[Cell, Collection[Measure]],
    *,
    budget_s: float | None = None,
    progress: Progress = lambda number, cell: None,
) -> tuple[dict[Cell, Result], list[Cell]]:
    """The results, and the cells that `budget_s` had no room for, in the order of `cells`."""
    began_s = time.monotonic()
    results: dict[Cell, Result] = {}
    for number, cell in enumerate(cells):
        if budget_s is not None and time.monotonic() - began_s > budget_s:
            return results, list(cells[number:])
        progress(number, cell)
        results[cell] = await runner.run(cell, measures.get(cell, ()))
    return results, []
