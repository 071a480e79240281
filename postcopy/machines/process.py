# SPDX-License-Identifier: Apache-2.0
"""Machines that are processes of their own (`Machine.outlives`), held for as long as they are moved, and the start of
one.

Nothing here ends a process by its number alone: another one may have that meanwhile.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar

import trio

from postcopy._blocking import run_sync
from postcopy._fd import FdHolder
from postcopy.errors import ConfigurationError, MigrationError, PostcopyError, ResourceError
from postcopy.machines._claim import claim
from postcopy.machines._peer import Process, has_ended
from postcopy.machines.base import CLOSE_TIMEOUT_S, Check, Machine, MachineState, MachineStatistics

KILL_TIMEOUT_S = 5.0
RESUME_S = 2.0
"""How long one that arrives may take to run; a millisecond, unless it waits for a page."""
ANSWER_S = 1.0
"""How long one request of that may take."""
_POLL_S = 0.005
_AGAIN_S = 0.05

log = logging.getLogger(__name__)


class ProcessMachine(Machine):
    """What such a machine is beside its memory and its state. A subclass holds its process (`_hold`) in `prepare`, and
    lets go of what else it has in `_release`.

    `close` lets go of it and ends nothing; `destroy` kills what is left of it here."""

    live = True
    kernel_faults = True
    outlives = True
    program: ClassVar[str]
    """What runs it, to a person: Firecracker, QEMU."""

    def __init__(self) -> None:
        self._pid = 0
        self._pidfd: FdHolder | None = None
        self._claim: FdHolder | None = None
        self._state = MachineState.CREATED
        self._first_run_ns = self._paused_ns = 0
        self._changed = trio.Event()
        self._end_was_told = False
        self._closed = False

    def _hold(self, process: Process) -> None:
        """It is this object's until `close`. `BusyError` when another one has it."""
        self._pid, self._pidfd = process.pid, process.pidfd
        self._claim = claim(process.pid, self.program)

    async def _release(self) -> None:
        """What a subclass lets go of in `close`, once; shielded, so bounded in time."""

    # ---- looking at it

    @property
    def _name(self) -> str:
        return f"{self.program} (process {self._pid})"

    def statistics(self) -> MachineStatistics:
        state, text = self._state, ""
        if state is not MachineState.CREATED and not self._is_alive():
            state, text = MachineState.FAILED, f"{self._name} has ended"
        return MachineStatistics(
            state,
            failures=int(bool(text)),
            failure_text=text,
            first_run_ns=self._first_run_ns,
            paused_ns=self._paused_ns,
        )

    def _is_alive(self) -> bool:
        """Whether its process, where it is known, has not ended."""
        return self._pidfd is None or self._pidfd.closed or not has_ended(self._pidfd.fd)

    def vcpu_threads(self) -> list[int]:
        return []

    async def wait_ready(self) -> None:
        await trio.lowlevel.checkpoint()

    async def wait_changed(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("the machine was closed")
        changed = self._changed
        if self._pidfd is None or self._pidfd.closed or self._end_was_told:
            await changed.wait()
        else:
            with FdHolder.duplicate(self._pidfd.fd) as pidfd:  # any number of tasks may wait

                async def until_it_ends() -> None:
                    await pidfd.wait_readable()
                    self._end_was_told = True

                await _first_of(until_it_ends, changed.wait)
        if self._closed:
            raise trio.ClosedResourceError("the machine was closed")

    def _tell(self) -> None:
        """`statistics` says something else than before."""
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def _runs(self) -> None:
        self._first_run_ns = time.monotonic_ns()
        self._state = MachineState.RUNNING
        self._tell()

    async def verify(self) -> Check:
        return Check(False, "nothing: only the guest knows what its memory should hold", "by no means")

    async def boot(self) -> None:
        """It runs already."""
        await trio.lowlevel.checkpoint()

    # ---- the end

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Lets go of it: it is as it was, running or paused."""
        if not self._closed:
            self._closed = True
            try:
                with trio.CancelScope(shield=True):
                    await self._release()
            finally:
                for holder in (self._pidfd, self._claim):
                    if holder is not None:
                        holder.close()
                self._tell()
        await trio.lowlevel.checkpoint()

    async def destroy(self) -> None:
        """Kills it: it runs elsewhere, or nobody wants it any more. Its sockets' files stay."""
        await self._kill()
        await self.close()

    async def _kill(self) -> None:
        if self._pidfd is None or self._pidfd.closed:
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd.fd, signal.SIGKILL)
        if not await self._ends_within(KILL_TIMEOUT_S):
            log.error("%s has not ended %g s after SIGKILL", self._name, KILL_TIMEOUT_S)

    async def _ends_within(self, timeout_s: float) -> bool:
        """Whether its process has ended by then. Shielded."""
        assert self._pidfd is not None
        deadline = trio.current_time() + timeout_s
        with FdHolder.duplicate(self._pidfd.fd) as pidfd, trio.CancelScope(shield=True, deadline=deadline) as scope:
            await pidfd.wait_readable()
        return not scope.cancelled_caught


class ArrivingProcess(ProcessMachine):
    """One that arrives, loaded into a process that was there or that we start: before a kind's own class among the
    bases of one.

    Resource handling: a process that has begun to load (`_touched`) and is not whole is killed by `close`, whoever has
    started it: it could not be used for anything else, and resumed by mistake it would be a second one. One that we
    have started (`_own`) runs on when it is whole; its directory stays, for its sockets, until `destroy`."""

    UNANSWERED: ClassVar[tuple[type[MigrationError], ...]]
    """Errors of `_tell_to_run` and `_is_running` after which it is asked again."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._own: Started | None = None
        self._touched = False
        self._is_destroyed = False
        self._whole = False
        self._unconfirmed = False  # it was told to run, and has not answered
        self._doubt = ""  # the last reason for that

    @abc.abstractmethod
    async def _tell_to_run(self, timeout_s: float) -> None: ...

    @abc.abstractmethod
    async def _is_running(self, timeout_s: float) -> bool | None:
        """None: neither that, nor paused."""

    async def resume(self) -> None:
        """A request that is not answered may have been done: it is asked how it is, and told again when it is paused.
        One that does not say so in time waits for a page, which the network may have lost: it has been told, and
        `wait_changed` sees to it that it runs when the page has come."""
        if self._whole:
            await super().resume()  # type: ignore[safe-super]  # the kind's own
            return
        if self._state is MachineState.RUNNING:
            return
        self._unconfirmed = not await self._runs_in_time(tell=True)
        if self._unconfirmed:
            log.warning(
                "%s was told to run, and has not done it within %g s; it is told again until it has: %s",
                self._name,
                RESUME_S,
                self._doubt or "it waits for a page, or for a disk",
            )
        self._runs()

    async def _runs_in_time(self, tell: bool | None) -> bool:
        with trio.move_on_after(RESUME_S):
            while tell is not None:
                tell = await self._told_to_run(tell)
        return tell is None

    async def _told_to_run(self, tell: bool) -> bool | None:
        """None: it runs. Else whether it has to be told (again)."""
        try:
            if tell:
                await self._tell_to_run(ANSWER_S)
                return None
            running = await self._is_running(ANSWER_S)
            return None if running else running is False
        except self.UNANSWERED as error:
            if not self._is_alive():
                raise MigrationError(f"the machine was given to this host, and {self._name} has ended") from error
            if str(error) != self._doubt:
                self._doubt = str(error)
                log.warning("%s", error)
            await trio.sleep(_AGAIN_S)
        await trio.sleep(_POLL_S)
        return False

    async def wait_changed(self) -> None:
        tell: bool | None = False
        while self._unconfirmed and tell is not None and self._is_alive() and not self._closed:
            tell = await self._told_to_run(tell)
        self._unconfirmed = False
        await super().wait_changed()

    async def made_whole(self) -> None:
        self._whole = True
        # No page is missing any more: what it waits for now nobody here can bring.
        if self._unconfirmed and not await self._runs_in_time(tell=False):
            log.error(
                "%s has all of its memory, and does not run: %s; see to that, and tell it to run",
                self._name,
                self._doubt or "it does not answer",
            )

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        if not self._whole and not self._is_destroyed and (self._touched or self._own is not None):
            await self.destroy()
        else:
            await super().close(timeout_s)

    async def destroy(self) -> None:
        own, self._own, self._is_destroyed = self._own, None, True
        with trio.CancelScope(shield=True):  # bounded
            if not self._whole:
                await self._kill()  # it is not asked: it may wait for a page
            await super().destroy()
            if own is not None:
                await own.remove()


Environment = contextlib.AbstractContextManager[Mapping[str, str]]


def _as_it_is(_: str) -> Environment:
    return contextlib.nullcontext(os.environ)


class Started:
    """A process that we have started for a machine, in a session of its own: what ends this process does not end it.
    It has a directory of our own, for its sockets."""

    def __init__(self, directory: str, pid: int) -> None:
        self.directory = directory
        self._pid = pid
        self._status: int | None = None

    @classmethod
    async def start(
        cls, name: str, command: Callable[[str], list[str]], environment: Callable[[str], Environment] = _as_it_is
    ) -> Started:
        """`command` makes its command line of the directory's path; its first word is the path of a program.
        `environment` makes its environment of that, and has what it needs until it has been started. What it writes,
        and its guest on a serial port, goes to this process's standard error. `name` is what the user calls it.
        `ConfigurationError` when it cannot be started."""
        return await run_sync(cls._start, name, command, environment)

    @classmethod
    def _start(
        cls, name: str, command: Callable[[str], list[str]], environment: Callable[[str], Environment]
    ) -> Started:
        try:
            directory = tempfile.mkdtemp(prefix="postcopy-", dir=os.environ.get("XDG_RUNTIME_DIR") or None)
        except OSError as error:
            raise ResourceError(f"{name}: a directory for it: {error.strerror or error}") from error
        words = command(directory)
        try:
            with environment(directory) as variables:
                pid = os.posix_spawn(
                    words[0],
                    words,
                    variables,
                    file_actions=[
                        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                        (os.POSIX_SPAWN_DUP2, 2, 1),
                    ],
                    setsid=True,
                    setsigmask=(),
                    setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
                )
        except BaseException as error:
            shutil.rmtree(directory, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, PostcopyError):
                raise ConfigurationError(f"{name}: {error.strerror}") from error
            raise
        return cls(directory, pid)

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def ended(self) -> int | None:
        """Its status, once it has ended."""
        if self._status is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self._pid, os.WNOHANG)
                self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    async def until_it_answers(self, name: str, asks: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
        """Until `asks`, which is called again and again, says that it has answered. `ConfigurationError` when it ends
        or does not within that time."""
        with trio.move_on_after(timeout_s):
            while not await asks():
                if (status := self.ended()) is not None:
                    raise ConfigurationError(
                        f"{name}: it has ended with status {status} before it took a request; what it said is on"
                        " standard error"
                    )
                await trio.sleep(_POLL_S)
            return
        raise ConfigurationError(f"{name}: it took no request within {timeout_s:g} s")

    async def remove(self) -> None:
        """Kills it, and removes its directory. Bounded in time."""
        await run_sync(self._remove)

    def _remove(self) -> None:
        deadline_s = time.monotonic() + KILL_TIMEOUT_S
        while self.ended() is None and time.monotonic() < deadline_s:
            with contextlib.suppress(PermissionError):  # all of it has become another user's
                os.killpg(self._pid, signal.SIGKILL)  # not waited for: its number is its own
            time.sleep(_POLL_S)
        shutil.rmtree(self.directory, ignore_errors=True)


async def _first_of(*functions: Callable[[], Awaitable[object]]) -> None:
    async with trio.open_nursery() as nursery:

        async def run(function: Callable[[], Awaitable[object]]) -> None:
            await function()
            nursery.cancel_scope.cancel()

        for function in functions:
            nursery.start_soon(run, function)
