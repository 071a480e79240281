# SPDX-License-Identifier: Apache-2.0
"""How the tasks of one migration end together.

An engine is one main task that follows the plan, and beside it a few that watch: the control connection, the data
plane, the machine, the user. The first thing that goes wrong in any of them is kept as the reason and the others are
stopped; only when all of them have ended does the engine decide what that means, by the state of the protocol. That
holds for what was not foreseen, too: an exception that is no `PostcopyError` is a mistake in this package; it is
logged with its traceback, and fails only the migration that it happened in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

import trio

from postcopy.errors import MigrationError, PostcopyError, leaves, shortage

log = logging.getLogger(__name__)


class Interrupted(PostcopyError):
    """The user ended it."""


def now_ns() -> int:
    """CLOCK_MONOTONIC, the clock that the core uses too."""
    return time.monotonic_ns()


Wait = Callable[[], Awaitable[object]]


async def first_of(*waits: Wait) -> Wait:
    """The one that returned first; the others are cancelled. What one raises comes out as it is."""
    failures: list[Exception] = []
    returned: list[Wait] = []
    async with trio.open_nursery() as nursery:

        async def run(wait: Wait) -> None:
            try:
                await wait()
                returned.append(wait)
            except Exception as error:  # noqa: BLE001  # raised below, outside of the nursery, which would wrap it
                failures.append(error)
            nursery.cancel_scope.cancel()

        for wait in waits:
            nursery.start_soon(run, wait)
    if failures:
        raise failures[0]
    return returned[0]


class FirstFailure:
    """Runs tasks until the main one returns or any fails; `failure` is then the first error."""

    def __init__(self) -> None:
        self.failure: PostcopyError | None = None
        self._scope = trio.CancelScope()

    async def run(self, *tasks: Callable[[], Awaitable[None]]) -> None:
        """The first of the tasks is the main one. Raises nothing but what ends the caller, too (`trio.Cancelled`,
        `KeyboardInterrupt`)."""
        main, *watchers = tasks
        with self._scope:
            async with trio.open_nursery() as nursery:
                for watcher in watchers:
                    nursery.start_soon(self._guard, watcher)
                await self._guard(main)
                nursery.cancel_scope.cancel()

    def fail(self, error: PostcopyError) -> None:
        """Ends all tasks."""
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
    """What a migration fails with. An exception that is a mistake in this package is logged here, with its
    traceback."""
    known: list[PostcopyError] = []
    others: list[PostcopyError] = []  # of system calls that were not expected to fail
    for each in leaves(error):
        if isinstance(each, PostcopyError):
            known.append(each)
        elif (lacking := shortage(each)) is not None:
            known.append(lacking)
        elif isinstance(each, OSError):
            reason = each.strerror or f"{type(each).__name__}: {each}"
            others.append(MigrationError(f"{each.filename}: {reason}" if each.filename else reason))
        else:
            log.error("a mistake in postcopy: this migration fails of it", exc_info=error)
            return MigrationError(f"a mistake in postcopy ({type(each).__name__}: {each}); the log has its traceback")
    return (known + others)[0]
