# SPDX-License-Identifier: Apache-2.0
"""Runs cells in runner processes that are killed and started again when they hang or die.

The supervisor holds the write end of the runner's standard input and nothing else of it: when this process goes, in
whatever way, that end closes, and the runner's guard takes down what is left (`_runner`). The runner is in a session of
its own, so that a Ctrl-C of the terminal is this process's to handle, in order.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType

import trio

from postcopy._child import python
from postcopy.errors import ResourceError
from postcopy.testbed.faultpaths import _runner
from postcopy.testbed.faultpaths._model import Cell, Measure, Operation, Outcome, Result

DEFAULT_TIMEOUT_S = 3.0
"""For each child of a cell."""
START_S = 20.0
"""Added to the first order: a Python starts on a busy machine."""
SLACK_S = 5.0
RUNS_OF_A_MEASURE = 3
"""At most; the locks need an idle one, and one each with a fault elsewhere and in the same mapping."""
STOP_S = _runner.SWEEP_S + 5.0

COMMAND = python("-m", "postcopy.testbed.faultpaths._runner")


class Runner:
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
        self._command = list(command)
        self._process: trio.Process | None = None
        self._fresh = True
        self._pending = b""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __aexit__

    async def __aenter__(self) -> Runner:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._stop()
        finally:
            self._stderr.close()

    async def run(self, operation: Operation, cell: Cell, measure: Collection[Measure] = ()) -> Result:
        """One cell. A runner that does not answer in time makes it `Outcome.HUNG`, one that dies `Outcome.CRASHED`; the
        next call starts another. Cancelled: the runner is killed."""
        order = {
            "index": operation.index,
            "operation": cell.operation,
            "mode": cell.mode,
            "backing": cell.backing,
            "measure": list(measure),
            "timeout-ms": round(self.timeout_s * 1000),
            "direct-dir": self._direct_dir,
            "hand-over": self._hand_over_fd,
        }
        deadline_s = SLACK_S + self.timeout_s * (1 + RUNS_OF_A_MEASURE * len(measure))
        process = await self._started()
        if self._fresh:
            deadline_s += START_S
        line = None
        done = False
        try:
            with trio.move_on_after(deadline_s):
                line = await self._ask(process, json.dumps(order).encode() + b"\n")
            done = bool(line)
        finally:
            if not done:
                await self._stop()
        if line is None:
            self.restarts += 1
            return Result(Outcome.HUNG, f"the runner gave no answer within {deadline_s:g} s and was killed")
        if not line:
            self.restarts += 1
            return Result(Outcome.CRASHED, self._how_it_died(process))
        self._fresh = False
        return Result.from_wire(json.loads(line))

    async def _ask(self, process: trio.Process, order: bytes) -> bytes:
        """The answer's line; empty when the runner ended instead."""
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(trio.BrokenResourceError):  # it died; what it wrote before is still read
            await process.stdin.send_all(order)
        while b"\n" not in self._pending:
            more: bytes | bytearray = b""
            async with trio.open_nursery() as nursery:
                # Its end too: what a killed runner has left behind may hold its standard output open.
                nursery.start_soon(self._cancel_at_end, process, nursery.cancel_scope)
                more = await process.stdout.receive_some()
                nursery.cancel_scope.cancel()
            if not more:
                return b""
            self._pending += more
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    @staticmethod
    async def _cancel_at_end(process: trio.Process, scope: trio.CancelScope) -> None:
        await process.wait()
        scope.cancel()

    async def _started(self) -> trio.Process:
        if self._process is None:
            self._fresh, self._pending = True, b""
            self._stderr.truncate(0)
            # The fork itself must not be left half-way: a process would be started that nobody knows.
            with trio.CancelScope(shield=True):
                try:
                    process = await trio.lowlevel.open_process(
                        self._command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=self._stderr.fileno(),
                        start_new_session=True,
                        pass_fds=[self._hand_over_fd] if self._hand_over_fd >= 0 else [],
                    )
                except OSError as error:
                    raise ResourceError(f"cannot start the runner process: {error.strerror}") from None
            self._process = process
        return self._process

    async def _stop(self) -> None:
        """Hangs up, and waits until the guard has taken everything down; bounded, and not cancelled."""
        process, self._process = self._process, None
        if process is None:
            return
        with trio.CancelScope(shield=True):
            assert process.stdin is not None
            assert process.stdout is not None
            await process.stdin.aclose()
            with trio.move_on_after(STOP_S):
                await process.wait()
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # a session's leader: of its group too
                await process.wait()
            await process.stdout.aclose()
            if process.returncode != 0:
                await self._end_session(process.pid)

    @staticmethod
    async def _end_session(session: int) -> None:
        """Kills what a guard that was itself killed has left behind. It goes to init, or to our subreaper, to reap."""
        with trio.move_on_after(_runner.SWEEP_S):
            while left := [pid for pid in _runner.members_of(session) if not _runner.is_zombie(pid)]:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL)
                await trio.sleep(0.002)

    def _how_it_died(self, process: trio.Process) -> str:
        status = process.returncode
        lines = os.pread(self._stderr.fileno(), 1 << 16, 0).decode(errors="replace").strip().splitlines()
        if status is not None and status > 128:
            with contextlib.suppress(ValueError):
                return f"the runner died: {signal.Signals(status - 128).name}"
        if status == _runner.EXIT_LEFT_BEHIND:
            return "the runner died, and something it had started does not answer SIGKILL"
        return f"the runner ended with status {status}" + (f": {lines[-1]}" if lines else "")


async def run_cells(
    cells: Sequence[Cell],
    operations: Mapping[str, Operation],
    *,
    measures: Mapping[Cell, Collection[Measure]],
    runner: Runner,
    budget_s: float | None = None,
    progress: Callable[[int, Cell], None] = lambda number, cell: None,
) -> tuple[dict[Cell, Result], list[Cell]]:
    """The results, and the cells that `budget_s` had no room for, in the order of `cells`.

    `progress` is told before each cell.
    """
    began_s = time.monotonic()
    results: dict[Cell, Result] = {}
    for number, cell in enumerate(cells):
        if budget_s is not None and time.monotonic() - began_s > budget_s:
            return results, list(cells[number:])
        progress(number, cell)
        results[cell] = await runner.run(operations[cell.operation], cell, measures.get(cell, ()))
    return results, []
