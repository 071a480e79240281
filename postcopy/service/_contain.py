# SPDX-License-Identifier: Apache-2.0
"""Where a mistake ends: what one task does wrong is logged with its traceback, and affects nothing else.

A nursery passes the failure of one task on to all others. That is right for tasks that do one thing together, and wrong
for those that have nothing to do with each other: the machines of a daemon, its clients, its outputs. Each of these
runs inside `contained`. What it lets pass is cancellation, and what ends a whole process (KeyboardInterrupt,
SystemExit).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


async def contained(what: str, function: Callable[[], Awaitable[object]]) -> Exception | None:
    """Runs `function`; None when it returned, else what it raised, which has been logged as a mistake made in `what`.

    Errors that are meant for a person are the caller's to catch inside; here every `Exception` is one of this package.
    """
    try:
        await function()
    except BaseExceptionGroup as group:
        mistakes, others = group.split(Exception)
        if mistakes is not None:
            _log(what, mistakes)
        if others is not None:  # cancelled meanwhile
            raise others from None
        assert isinstance(mistakes, ExceptionGroup)
        return first(mistakes)
    except Exception as error:  # noqa: BLE001 -- the one place for it
        _log(what, error)
        return error
    return None


def contained_call(what: str, function: Callable[[], object]) -> None:
    """The same for what is called in the middle of something else, which goes on whatever becomes of it."""
    try:
        function()
    except Exception as error:  # noqa: BLE001 -- as above
        _log(what, error)


def first(error: Exception) -> Exception:
    """Of a group the first error, else the error itself."""
    return first(error.exceptions[0]) if isinstance(error, ExceptionGroup) else error


def _log(what: str, error: BaseException) -> None:
    log.error("%s: a mistake in postcopy; nothing else is touched by it", what, exc_info=error)
