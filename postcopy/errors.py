# SPDX-License-Identifier: Apache-2.0
"""Every error that is meant for a person.

``str(error)`` is one line that says what was being done, what went wrong and, where there is one, the remedy; a command
prints it and ends with a non-zero status. Anything that is *not* a `PostcopyError` is a mistake in this package and
should be seen with its traceback.
"""

from __future__ import annotations

import errno
import os


class PostcopyError(Exception):
    """Something that a user can be told in one line."""


class ConfigurationError(PostcopyError):
    """What was asked for makes no sense: a bad option, an unusable file, a size that does not fit."""


class ResourceError(PostcopyError):
    """The host lacks something (a device, a right, memory). `remedy` says what to do about it; empty if unknown."""

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} (remedy: {self.remedy})" if self.remedy else self.message


class ProtocolError(PostcopyError):
    """The peer sent what it must not send."""


class PeerError(PostcopyError):
    """The peer refused, aborted or went away; the text is its reason where it gave one."""


class MigrationError(PostcopyError):
    """The migration as a whole cannot go on."""


class BusyError(PostcopyError):
    """Refused since somebody still depends on it, as on memory of which pages are still missing."""


class CoreError(PostcopyError, OSError):
    """A call into the C core failed. Also an `OSError`: `errno` is set, `what` was being done."""

    def __init__(self, number: int, what: str, reason: str = "") -> None:
        super().__init__(number, os.strerror(number))
        self.what = what
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.what}: {self.reason or self.strerror}"


def check(result: int, what: str, reason: str = "") -> int:
    """Passes a C result on when it is not negative, else raises what ``-errno`` means.

    `what` says what was being done ("registering memory"); `reason` is the line that the core wrote into its error
    buffer, and replaces the system's words for the errno. EBUSY becomes `BusyError`, ENOMEM `ResourceError`, everything
    else `CoreError`.
    """
    if result >= 0:
        return result
    number = -result
    text = f"{what}: {reason or os.strerror(number)}"
    if number == errno.EBUSY:
        raise BusyError(text)
    if number == errno.ENOMEM:
        raise ResourceError(text, "ask for less memory, or use a host with more")
    raise CoreError(number, what, reason)


def out_of_memory() -> ResourceError:
    """What a MemoryError means to a person."""
    return ResourceError(
        "this process has run out of memory", "allow it more (ulimit -v, the control group), or use a host with more"
    )


def want_of(error: BaseException | None) -> ResourceError | None:
    """What an error is to a person that says nothing but that memory or threads are short; also where it has become
    another one on its way. None for any other."""
    if isinstance(error, BaseExceptionGroup):
        found = [want_of(one) for one in error.exceptions]
        return found[0] if all(found) else None
    if isinstance(error, MemoryError):
        return out_of_memory()
    if isinstance(error, RuntimeError) and "start new thread" in str(error):  # CPython has no class for it
        return ResourceError("no thread can be started", "allow this user, or its control group, more processes")
    return want_of(error.__cause__) if error is not None else None


def known_error(group: BaseExceptionGroup[BaseException]) -> PostcopyError:
    """The first error for a person in a group that has no others; raises the group when it has."""
    known, unknown = group.split(PostcopyError)
    want = want_of(unknown)
    if unknown is not None and want is None:
        raise group
    if known is None:
        assert want is not None
        return want
    first: BaseException = known
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    assert isinstance(first, PostcopyError)
    return first
