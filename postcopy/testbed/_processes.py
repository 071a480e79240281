# SPDX-License-Identifier: Apache-2.0
"""Child processes of this room: started, read by the line, waited for with a deadline, and ended in every case.

From Trio: `open_child` for one that is talked to, `run_json` for one that prints its result and ends. Where Trio cannot
be (`lab`, which enters namespaces): `read_json` and `hang_up`, of a `subprocess.Popen`.

Resource handling: a `Child` owns its process and both ends of its pipes. `end` closes standard input, asks by a signal
where there is one, waits, and then kills the process (its whole group, where it leads one). It is shielded and
bounded: a process that hangs in the kernel, and so does not answer SIGKILL, is left behind. It asks twice: a side that
has a machine past its point of no return sees that through when it is asked once. Whatever ends this process, SIGKILL
too, ends its children (`Process`), and so theirs.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import IO, Any, TypeVar, TypeVarTuple

import trio

from postcopy._stop import heard
from postcopy.errors import MigrationError, ResourceError, known_error, shortage
from postcopy.testbed._linux import die_with

Json = dict[str, Any]
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
MAX_LINE_BYTES = 1 << 20
KILL_S = 10.0
ASK_AGAIN_S = 1.0
END_S = 5.0
"""For a command that was cancelled to end in order."""


class Lines:
    """Of a stream, decoded. An iterator for one task. `MigrationError` for a line that is too long. A last line without
    its end is dropped: a process was killed while it wrote it."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._buffer = b""

    def __aiter__(self) -> Lines:
        return self

    async def __anext__(self) -> str:
        while b"\n" not in self._buffer:
            more = await self._stream.receive_some()
            if not more:
                raise StopAsyncIteration
            self._buffer += more
            if len(self._buffer) > MAX_LINE_BYTES:
                raise MigrationError("a child's line does not end")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode("utf-8", "replace")


class Process:
    """As `trio.Process`, but it dies with this one. It does so with the *thread* that has started it, in truth
    (PR_SET_PDEATHSIG): with a worker, in which Trio would, at any time; so that in which Trio runs starts it."""

    def __init__(self, command: Sequence[str], *, outlives: bool = False, **options: Any) -> None:
        """`outlives`: not so, as it has something to put right when its standard input ends. Blocks until it runs."""
        die = None if outlives else partial(die_with, os.getpid())
        self._popen = subprocess.Popen(list(command), bufsize=0, preexec_fn=die, **options)
        self.stdin, self.stdout, self.stderr = map(_stream, (self._popen.stdin, self._popen.stdout, self._popen.stderr))
        self.pid = self._popen.pid

    @property
    def returncode(self) -> int | None:
        return self._popen.poll()

    async def wait(self) -> int:
        """Any number of tasks may."""
        if (status := self.returncode) is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                while (status := self.returncode) is None:
                    await trio.lowlevel.wait_readable(pidfd)
            finally:
                os.close(pidfd)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)


def _stream(end: IO[bytes] | None) -> trio.lowlevel.FdStream | None:
    if end is None:
        return None
    with end:
        return trio.lowlevel.FdStream(os.dup(end.fileno()))


class Child:
    """A process whose standard output is read by the line. Made by `Child.start`, ended by `end`."""

    def __init__(self, process: Process, ask: signal.Signals | None, end_s: float, leads_group: bool) -> None:
        assert process.stdout is not None
        self.process = process
        self._ask = ask
        self._end_s = end_s
        self._leads_group = leads_group
        self.stdout = Lines(process.stdout)

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        *,
        ask: signal.Signals | None = None,
        end_s: float = 0.0,
        start_new_session: bool = False,
        **options: Any,
    ) -> Child:
        """`ask` and `end_s`: how `end` asks first, and how long it waits; `options` are those of `subprocess.Popen`
        and of `Process`. OSError when it cannot be started, `ResourceError` where none could be."""
        await trio.lowlevel.checkpoint()
        options = {"stdin": subprocess.DEVNULL, "start_new_session": start_new_session, **options}
        try:
            process = Process(command, stdout=subprocess.PIPE, **options)
        except BlockingIOError as error:  # of fork(2)
            raise ResourceError(
                "no process can be started", "allow this user, or its control group, more processes"
            ) from error
        except OSError as error:
            raise shortage(error) or error from None
        return cls(process, ask, end_s, start_new_session)

    @property
    def pid(self) -> int:
        return self.process.pid

    async def send(self, line: bytes) -> None:
        """A line to its standard input; nothing when it has ended: what it wrote before can still be read."""
        assert self.process.stdin is not None
        with contextlib.suppress(trio.BrokenResourceError):
            await self.process.stdin.send_all(line + b"\n")

    async def line(self) -> str:
        """The next line of its standard output; empty when it ended instead."""
        return await anext(self.stdout, "")

    def signal(self, number: signal.Signals) -> None:
        """Harmless when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def end(self) -> None:
        """See the head of this file. Harmless when it has ended."""
        process = self.process
        with trio.CancelScope(shield=True):
            if process.stdin is not None:
                await process.stdin.aclose()
            if process.returncode is None and self._ask is not None:
                self.signal(self._ask)
                with trio.move_on_after(min(ASK_AGAIN_S, self._end_s)):
                    await process.wait()
                if process.returncode is None:
                    self.signal(self._ask)
            with trio.move_on_after(self._end_s):
                await process.wait()
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    (os.killpg if self._leads_group else os.kill)(process.pid, signal.SIGKILL)
                with trio.move_on_after(KILL_S):
                    await process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    await stream.aclose()


@asynccontextmanager
async def open_child(command: Sequence[str], **options: Any) -> AsyncIterator[Child]:
    """A `Child` that has ended when the block has; `options` as for `Child.start`."""
    child = await Child.start(command, **options)
    try:
        yield child
    finally:
        await child.end()


async def run_captured(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """What a command that ends by itself has written. Cancelled, it is asked to end, and then killed."""
    written: dict[trio.abc.ReceiveStream | None, bytes] = {}

    async def read(stream: trio.abc.ReceiveStream) -> None:
        written[stream] = b"".join([data async for data in stream])

    async with open_child(command, ask=signal.SIGTERM, end_s=END_S, stderr=subprocess.PIPE) as child:
        process = child.process
        async with trio.open_nursery() as nursery:
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                nursery.start_soon(read, stream)
        status = await process.wait()
    return subprocess.CompletedProcess(list(command), status, written[process.stdout], written[process.stderr])


async def run_json(command: Sequence[str], what: str, deadline_s: float) -> Any:
    """The last line on standard output, as JSON, of a command that ends by itself. `MigrationError` when it is not done
    in time, prints nothing, or ends with another status than 0, then with the last line of its standard error."""
    with trio.move_on_after(deadline_s):
        done = await run_captured(command)
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            words = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise MigrationError(f"{what} failed: {words[-1] if words else f'status {done.returncode}'}")
        return json.loads(lines[-1])
    raise MigrationError(f"{what} did not end within {deadline_s:g} s")


def parse(line: str | bytes) -> Json:
    """A line of a child; `MigrationError` when it is not a JSON object."""
    with contextlib.suppress(ValueError):
        message = json.loads(line)
        if isinstance(message, dict):
            return message
    raise MigrationError(f"a child said something that is not JSON: {line[:80]!r}")


def run(function: Callable[[*Ts], Awaitable[T]], *arguments: *Ts) -> T:
    """`trio.run` for a command without an `Output`: errors for a person come as they are, not in a group. At SIGINT,
    SIGTERM and SIGHUP, where they are not ignored, it is cancelled, and then `KeyboardInterrupt`: there are processes,
    mounts and files to end. To ask again makes no difference from then on, to what comes after this call either: each
    end has its deadline, and what there is to say then is short."""
    numbers = heard(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def ask_no_more() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    async def cancelled_when_told(task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        scope = trio.CancelScope()
        if not numbers:  # of which Trio would make an error
            task_status.started(scope)
            return
        with trio.open_signal_receiver(*numbers) as received:
            task_status.started(scope)
            async for _ in received:
                ask_no_more()  # what waits at its end would be sent to this process again
                scope.cancel()

    async def until_told_to_end() -> T:
        async with trio.open_nursery() as nursery:
            with await nursery.start(cancelled_when_told) as scope:
                result = await function(*arguments)
            nursery.cancel_scope.cancel()
        if scope.cancel_called:
            ask_no_more()
            raise KeyboardInterrupt
        return result

    try:
        return trio.run(until_told_to_end, strict_exception_groups=True)
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is not None:
            raise KeyboardInterrupt from None
        raise known_error(group) from None


# ---- without Trio


def read_json(process: subprocess.Popen[bytes], what: str, deadline_s: float) -> Json:
    """The next line of a process as JSON. Blocks for at most `deadline_s` and one line; `ResourceError`."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], deadline_s)[0]:
        raise ResourceError(f"{what} did not answer within {deadline_s:g} s")
    try:
        return dict(json.loads(process.stdout.readline()))
    except ValueError:
        raise ResourceError(f"{what} has ended", "see what it said on standard error") from None


def hang_up(process: subprocess.Popen[bytes], end_s: float) -> None:
    """Closes the pipes of a process that ends then; by force when it has not within `end_s`. Harmless when it has."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    try:
        process.wait(end_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
