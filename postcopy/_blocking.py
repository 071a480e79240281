# SPDX-License-Identifier: Apache-2.0
"""Blocking calls, on threads that are there before they are needed.

A call that may block runs on a thread; and a thread may be refused at any moment, by a control group's ``pids.max``,
by RLIMIT_NPROC, by a lack of memory. Trio makes its threads when a call needs one, so the refusal would come in the
middle of a migration, past its point of no return. Therefore `Workers` are opened before anything
is promised: as many threads as will be needed at a time, which exist when `open` returns, and stay until `close`.

::

    # ResourceError: refuse now, while that costs nothing
    workers = Workers.open(2, "pc-migration", "a migration")
    with workers.serving():                          # this task, and all that it starts from now on
        state = await run_sync(machine_call)         # on one of the two; waits when both are busy
        await run_to_end(end_threads, "closing it")  # shielded, bounded; never waits for one of the two
    await workers.close()

**In a pause** the way through the event loop costs more than most calls: two wake-ups, and whatever other tasks are
ready then. `run_briefly` is for a call that takes well under a millisecond, but that nobody can vouch for: one of the
threads makes it, and the Trio thread waits in place, for `BRIEF_S` at most; a call that takes longer is then waited for
as any other. A call that is certain to return at once needs no thread at all.

`run_sync` outside of any `serving` is `trio.to_thread.run_sync`, but a thread that cannot be had is a `ResourceError`.
`run_to_end` takes a worker that is idle, else a thread of its own, else the one thread that the process keeps for this
(made by the first `open`): an end must always be possible.

The functions run in a copy of the caller's context variables, as logs want it; ``trio.from_thread`` needs the token
named. Everything but `Workers.open` belongs to the Trio thread.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import outcome
import trio

from postcopy._trio import require_trio
from postcopy.errors import MigrationError, ResourceError

END_TIMEOUT_S = 30.0
"""How long ending C threads may take. They are woken through an eventfd and answer within milliseconds; a thread that
is still there after this hangs in the kernel."""
BRIEF_S = 0.002
"""How long `run_briefly` may keep all other tasks waiting."""
CLOSE_TIMEOUT_S = 1.0
"""How long `Workers.close` waits for calls that were abandoned."""

T = TypeVar("T")


class _Job:
    """One call, and what became of it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.context = contextvars.copy_context()
        self.token = trio.lowlevel.current_trio_token()
        self.finished = trio.Event()
        self._worked = threading.Lock()  # until then it is held
        self._worked.acquire()
        self.after: Callable[[], None] | None = None  # called in the Trio thread, also when no task waits any more
        self._outcome: outcome.Outcome[Any] | None = None

    def work(self) -> None:
        """In the worker."""
        self._outcome = outcome.capture(self.context.run, self.function)
        del self.function, self.context  # what they hold may be wanted free as soon as the call has ended
        self._worked.release()
        with contextlib.suppress(trio.RunFinishedError):
            self.token.run_sync_soon(self._finish)

    def _finish(self) -> None:
        self.finished.set()
        if self.after is not None:
            self.after()

    def wait_briefly(self) -> bool:
        """Whether it has worked within `BRIEF_S`, in which no task runs. Once."""
        return self._worked.acquire(timeout=BRIEF_S)

    def result(self) -> Any:
        """What the call returned; raises what it raised."""
        assert self._outcome is not None
        return self._outcome.unwrap()

    async def to_end(self, what: str, timeout_s: float) -> Any:
        """Its result; `MigrationError` after `timeout_s`. Shielded by the caller."""
        # Real time, whatever clock Trio runs on: a thread takes its own time, and a test's clock may jump.
        deadline = time.monotonic() + timeout_s
        while not self.finished.is_set():
            left = deadline - time.monotonic()
            if left <= 0:
                raise MigrationError(f"{what}: not done after {timeout_s:g} s; its memory is kept")
            with trio.move_on_after(left):
                await self.finished.wait()
        return self.result()


class _Worker:
    """A thread that does one job after the other. It exists when this returns; `ResourceError` when it cannot."""

    def __init__(self, name: str, what: str) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # A daemon: one that hangs in the kernel must not keep the interpreter from its end.
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        try:
            self._thread.start()
        except (RuntimeError, MemoryError) as error:
            raise no_thread(what) from error

    def put(self, job: _Job) -> None:
        self._jobs.put(job)

    def end(self) -> None:
        """When its jobs are done."""
        self._jobs.put(None)

    def join(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()


def _work(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.work()
        del job


def no_thread(what: str) -> ResourceError:
    """The error for a thread that was needed and cannot be had."""
    return ResourceError(
        f"no thread can be started for {what}",
        "raise the limit of processes (pids.max of the control group, TasksMax= of the unit, ulimit -u), or end"
        " something",
    )


_serving: contextvars.ContextVar[Workers | None] = contextvars.ContextVar("postcopy-workers", default=None)


@functools.cache
def keep_reserve() -> _Worker:
    """The thread that the process keeps for ends, made once. `ResourceError` when there is none."""
    return _Worker("pc-reserve", "the ends of machines")


class Workers:
    """A few threads for the blocking calls of one owner, which exist from `open` to `close`."""

    def __init__(self, workers: list[_Worker]) -> None:
        self._all = workers
        self._idle = list(workers)
        self._free = trio.Semaphore(len(workers))
        self._freed = trio.Event()
        self._closed = False

    @classmethod
    def open(cls, count: int, name: str, what: str) -> Workers:
        """`count` threads, called `name` in debuggers; `what` they are for, to a person. `ResourceError`, and none of
        them, when not all can be had. Takes some 50 µs each."""
        started: list[_Worker] = []
        try:
            keep_reserve()
            for _ in range(count):
                started.append(_Worker(name, what))
        except BaseException:
            for worker in started:
                worker.end()
            raise
        return cls(started)

    @property
    def idle(self) -> int:
        """How many have nothing to do."""
        return len(self._idle)

    @property
    def closed(self) -> bool:
        return self._closed

    @contextlib.contextmanager
    def serving(self) -> Iterator[Workers]:
        """Inside, `run_sync` and `run_to_end` of this task and of those that it starts use these threads."""
        token = _serving.set(self)
        try:
            yield self
        finally:
            _serving.reset(token)

    async def run(
        self, function: Callable[..., T], *args: Any, abandon_on_cancel: bool = False, briefly: bool = False
    ) -> T:
        """What `function(*args)` returns or raises, from one of the threads; waits, cancellably, for a free one.
        `briefly`: as `run_briefly`; where it succeeds, no other task has run meanwhile.

        Once it runs, cancelling does not interrupt it: without `abandon_on_cancel` the call is waited for, with it it
        is left to itself, its result is thrown away, and the thread is free again only when it has ended.
        `trio.ClosedResourceError` after `close`.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if not (briefly and self._acquire_at_once()):
            await self._free.acquire()
        if self._closed:
            self._free.release()  # and so wakes the next one that waits
            raise trio.ClosedResourceError("these workers were closed")
        job = self._begin(lambda: function(*args))
        if not (briefly and job.wait_briefly()):
            with trio.CancelScope(shield=not abandon_on_cancel):
                await job.finished.wait()
        value: T = job.result()
        return value

    def begin_at_once(self, function: Callable[[], Any]) -> _Job | None:
        """For `run_to_end`: the call on a thread that is idle now, if there is one."""
        return self._begin(function) if not self._closed and self._acquire_at_once() else None

    def _acquire_at_once(self) -> bool:
        try:
            self._free.acquire_nowait()
        except trio.WouldBlock:
            return False
        return True

    def _begin(self, function: Callable[[], Any]) -> _Job:
        worker = self._idle.pop()

        def after() -> None:
            self._idle.append(worker)
            self._free.release()
            self._freed.set()

        job = _Job(function)
        job.after = after
        worker.put(job)
        return job

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Ends the threads, each when its call has ended; whether all have, within `timeout_s`. The others are left
        behind: they end when their calls do. Shielded, bounded. Twice does no harm."""
        if not self._closed:
            self._end()
            self._free.release()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + timeout_s):
            while len(self._idle) < len(self._all):
                self._freed = trio.Event()
                await self._freed.wait()
        await trio.lowlevel.cancel_shielded_checkpoint()
        # An idle one has nothing left to do but to return.
        ended = [worker.join(0.1 if worker in self._idle else 0) for worker in self._all]
        return all(ended)

    def _end(self) -> None:
        self._closed = True
        for worker in self._all:
            worker.end()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self._end()


async def run_sync(function: Callable[..., T], *args: Any, abandon_on_cancel: bool = False) -> T:
    """`function(*args)` on one of the threads that serve this task, see `Workers.run`; on one of Trio's where none do:
    `ResourceError` when there is none, in which case it has not been called."""
    require_trio("a blocking call of postcopy")
    workers = _serving.get()
    if workers is not None and not workers.closed:
        return await workers.run(function, *args, abandon_on_cancel=abandon_on_cancel)
    called = False

    def call() -> T:
        nonlocal called
        called = True
        return function(*args)

    try:
        return await trio.to_thread.run_sync(call, abandon_on_cancel=abandon_on_cancel)
    except (RuntimeError, MemoryError) as error:
        if called:
            raise
        raise no_thread("a blocking call") from error


async def run_briefly(function: Callable[..., T], *args: Any, abandon_on_cancel: bool = False) -> T:
    """`run_sync` for a call that nearly always takes less than a millisecond: where it does, and a thread of those that
    serve this task is idle, its result is here without another task having run meanwhile."""
    require_trio("a blocking call of postcopy")
    workers = _serving.get()
    if workers is None or workers.closed:
        return await run_sync(function, *args, abandon_on_cancel=abandon_on_cancel)
    return await workers.run(function, *args, abandon_on_cancel=abandon_on_cancel, briefly=True)


async def run_to_end(call: Callable[[], T], what: str, timeout_s: float = END_TIMEOUT_S) -> T:
    """Runs `call` in a thread and waits for it, shielded from cancellation but not for ever; raises what it raises.

    After `timeout_s` the thread is left behind and `MigrationError` raised; the caller must then never free what the
    thread works on. Ending something must not wait for a free worker, nor fail for want of a thread.
    """
    with trio.CancelScope(shield=True):
        workers = _serving.get()
        job = workers.begin_at_once(call) if workers is not None else None
        if job is None:
            job = _Job(call)
            try:
                worker = _Worker("pc-end", what)
            except ResourceError:
                keep_reserve().put(job)
            else:
                worker.put(job)
                worker.end()
        value: T = await job.to_end(what, timeout_s)
    return value
