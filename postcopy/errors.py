# SPDX-License-Identifier: Apache-2.0
"""Every error that is meant for a person.

``str(error)`` is one line that says what was being done, what went wrong and, where there is one, the remedy; a command
prints it and ends with a non-zero status. Anything that is *not* a `PostcopyError` is a mistake in this package and
should be seen with its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from typing import Any

from postcopy._native import ffi, lib


class PostcopyError(Exception):
    """Something that can be said to a user in one line."""


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


class ConnectionLost(PeerError):
    """The connection with the peer has ended, and the peer has not said why: another one may be all that is needed."""


class MigrationError(PostcopyError):
    """The migration as a whole cannot go on."""


class BusyError(PostcopyError):
    """Refused since something still depends on it, as on memory of which pages are still missing."""


class CoreError(PostcopyError, OSError):
    """A call into the C core failed. Also an `OSError`: `errno` is set, `what` was being done."""

    def __init__(self, number: int, what: str, reason: str = "") -> None:
        super().__init__(number, os.strerror(number))
        self.what = what
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.what}: {self.reason or self.strerror}"


class MissingPackageError(ResourceError, ImportError):
    """A Python package that this needs is not installed. Also an `ImportError`: `name` is the module."""


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


class ErrorLine:
    """The one-line error buffer that many functions of the core take, for one call: pass `buffer` and `size`, then
    `check` the result."""

    def __init__(self) -> None:
        self.size: int = lib.PC_ERROR_BYTES
        self.buffer: Any = ffi.new("char[]", self.size)

    def __str__(self) -> str:
        return c_text(self.buffer)

    def check(self, result: int, what: str) -> int:
        return check(result, what, str(self))


def c_text(array: Any) -> str:
    """The text in a `char` array. Bytes that are not UTF-8 (a peer may have sent them) become U+FFFD, control
    characters spaces: what is printed is one line."""
    raw: Any = ffi.string(array)
    text = bytes(raw).decode("utf-8", "replace")
    return "".join(char if char.isprintable() else " " for char in text).strip()


NO_FILES = frozenset({errno.EMFILE, errno.ENFILE})


def out_of_memory() -> ResourceError:
    """The `ResourceError` for a MemoryError."""
    return ResourceError(
        "this process has run out of memory", "allow it more (ulimit -v, the control group), or use a host with more"
    )


def out_of_files(number: int, what: str = "") -> ResourceError:
    """The `ResourceError` for EMFILE or ENFILE."""
    reason = f"{what}: {os.strerror(number)}" if what else os.strerror(number)
    if number == errno.ENFILE:
        return ResourceError(reason, "close files of other programs, or allow this host more: sysctl fs.file-max")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return ResourceError(reason, f"allow this process more than {limit} open files: ulimit -n {max(1024, 2 * limit)}")


_PACKAGES = {  # by their modules: what pyproject.toml names, and what each is for
    "trio": ("trio", "all that moves memory over a network"),
    "outcome": ("trio", "all that moves memory over a network"),
    "msgspec": ("msgspec", "the migration protocol"),
    "rich": ("rich", "what is shown on a terminal"),
    "h11": ("h11", "the HTTP server of --metrics"),
    "prometheus_client": ("prometheus-client", "the metrics"),
    "pyroute2": ("pyroute2", "the lab"),
    "shtab": ("shtab", "completion"),
    "cryptography": ("cryptography", "making certificates"),
}


def missing_package(error: BaseException, what: str = "") -> MissingPackageError | None:
    """The error for a package of `_PACKAGES` that `what` wanted to import and that is not installed, as after
    ``pip install --no-deps``; None for any other error."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name not in _PACKAGES:
        return None
    package, purpose = _PACKAGES[name]
    found = MissingPackageError(
        f"{what or purpose} needs the Python package {package}, which is not installed",
        f"python -m pip install {package}; `python -m pip install postcopy` installs all that postcopy needs",
    )
    found.name = name
    return found


@contextlib.contextmanager
def naming_missing_packages(what: str) -> Iterator[None]:
    """Around imports: `MissingPackageError` for a package that `what` needs and that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if found := missing_package(error, what):
            raise found from error
        raise


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in a group and the groups in it; an error that is no group is its own only leaf."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from leaves(each)
    else:
        yield error


def shortage(error: BaseException | None) -> ResourceError | None:
    """The `ResourceError` for an error, or a group of them, that only says that memory, threads, descriptors, room for
    temporary files or an installed package are missing, itself or as the cause of another one. None for any other."""
    if isinstance(error, BaseExceptionGroup):
        found = [shortage(each) for each in leaves(error)]
        return found[0] if all(found) else None
    if isinstance(error, MemoryError):
        return out_of_memory()
    if isinstance(error, OSError) and error.errno in NO_FILES:
        return out_of_files(error.errno or 0)
    if isinstance(error, RuntimeError) and "start new thread" in str(error):  # CPython has no class for it
        return ResourceError("no thread can be started", "allow this user, or its control group, more processes")
    if isinstance(error, FileNotFoundError) and "usable temporary directory" in str(error):  # nor for this
        return ResourceError(
            f"temporary files cannot be written: {error.strerror}",
            "make room there, or set TMPDIR to a directory that this user may write to",
        )
    if error is None:
        return None
    if type(error).__name__ == "TrioInternalError":  # Trio itself ran short; its other errors are what came of that
        return next(filter(None, map(shortage, leaves(error.__cause__) if error.__cause__ else ())), None)
    return missing_package(error) or shortage(error.__cause__)


def known_error(group: BaseExceptionGroup[BaseException]) -> PostcopyError:
    """The first error for a person in a group that has no others (see `shortage`); raises the group when it has."""
    known, unknown = group.split(PostcopyError)
    lacking = shortage(unknown)
    if unknown is not None and lacking is None:
        raise group
    first = lacking if known is None else next(leaves(known))
    assert isinstance(first, PostcopyError)
    return first
