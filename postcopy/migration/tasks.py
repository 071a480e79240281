# SPDX-License-Identifier: Apache-2.0
"""How the tasks of one migration end together.

An engine is one main task that follows the plan, and beside it a few that watch: the control connection, the data
plane, the machine, the user. The first thing that goes wrong in any of them is kept as the reason and the others are
stopped; only when all of them have ended does the engine decide what that means, by the state of the protocol. That
holds for what nobody has thought of, too: an exception that is no `PostcopyError` is a mistake in this package; it is
logged with its traceback, and fails only the migration that it happened in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterator

import trio

from postcopy.errors import MigrationError, PostcopyError

log = logging.getLogger(__name__)


class Interrupted(PostcopyError):
    """The user ended it."""


def now_ns() -> int:
    """CLOCK_MONOTONIC, the clock that the core uses too."""
    return time.monotonic_ns()


class Patience:
    """How long something is waited for, counted from `begin`; may be changed meanwhile. Trio thread only."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._since_s: float | None = None
        self._changed = trio.Event()

    @property
    def begun(self) -> bool:
        return self._since_s is not None

    def begin(self) -> None:
        """Counts from now on (again)."""
        self._since_s = trio.current_time()
        self._wake()

    def end(self) -> None:
        """There is nothing to be waited for any more."""
        self._since_s = None

    def set(self, seconds: float) -> None:
        """Also for what is being waited for."""
        self.seconds = seconds
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def run_out(self) -> None:
        """Returns when it is over. `begin` must have been called."""
        while self._since_s is not None:
            left_s = self._since_s + self.seconds - trio.current_time()
            if left_s <= 0:
                return
            with trio.move_on_after(left_s):
                await self._changed.wait()
        await trio.sleep_forever()


async def first_of(*waits: Callable[[], Awaitable[object]]) -> None:
    """Returns when one of them has returned; the others are cancelled. What one raises comes out as it is."""
    failures: list[Exception] = []
    async with trio.open_nursery() as nursery:

        async def run(wait: Callable[[], Awaitable[object]]) -> None:
            try:
                await wait()
            except Exception as error:  # noqa: BLE001  # raised below, outside of the nursery, which would wrap it
                failures.append(error)
            nursery.cancel_scope.cancel()

        for wait in waits:
            nursery.start_soon(run, wait)
    if failures:
        raise failures[0]


class FirstFailure:
    """Runs tasks until one says `done` or fails; `failure` is then the first error."""

    def __init__(self) -> None:
        self.failure: PostcopyError | None = None
        self._scope = trio.CancelScope()

    async def run(self, *tasks: Callable[[], Awaitable[None]]) -> None:
        """The first of the tasks is the main one: when it returns, all is done. Raises nothing but what ends the caller
        himself (`trio.Cancelled`, `KeyboardInterrupt`)."""
        main, *watchers = tasks
        with self._scope:
            async with trio.open_nursery() as nursery:
                for watcher in watchers:
                    nursery.start_soon(self._guard, watcher)
                await self._guard(main)
                nursery.cancel_scope.cancel()

    def fail(self, error: PostcopyError) -> None:
        """Ends it all, unless it has ended already."""
        if self.failure is None:
            self.failure = error
        self._scope.cancel()

    async def _guard(self, task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except Exception as error:  # noqa: BLE001  # contained: see the top
            self.fail(explained(error))
        except BaseExceptionGroup as group:  # of a nursery inside of the task, with what is not to be contained
            known, _ = group.split(Exception)
            if known is not None:
                self.fail(explained(known))
            raise


def explained(error: Exception) -> PostcopyError:
    """What a migration fails with. An exception that no part of this package should have let out is logged here, with
    its traceback."""
    errors = list(_leaves(error))
    for each in errors:
        if not isinstance(each, PostcopyError | OSError):
            log.error("a mistake in postcopy: this migration fails of it", exc_info=error)
            return MigrationError(f"a mistake in postcopy ({type(each).__name__}: {each}); the log has its traceback")
    first = next((each for each in errors if isinstance(each, PostcopyError)), errors[0])
    if isinstance(first, PostcopyError):
        return first
    return MigrationError(f"{type(first).__name__}: {first}")  # a system call that nobody expected to fail


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error
