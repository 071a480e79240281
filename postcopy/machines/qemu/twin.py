# SPDX-License-Identifier: Apache-2.0
"""The command line of a QEMU that can take the guest of another one.

It is for an operator, who looks at it and starts it where the guest shall go. A destination never runs a command line
that a peer has sent: it can name any program and any file.
"""

from __future__ import annotations

import re

from postcopy.errors import ConfigurationError, MigrationError, ResourceError

_DROPPED = {"incoming": 1, "loadvm": 1, "S": 0}  # options, and how many words they take
_ADDED = ["-incoming", "defer", "-S"]
_INHERITED = re.compile(r"(^|[,=:])fd[=:]\d|/(dev|proc/self)/fd/\d|/dev/fdset/")


def command_line_of(pid: int) -> list[str]:
    """What that process was started with."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode("utf-8", "surrogateescape").split("\0")[:-1]
    except PermissionError as error:
        raise ResourceError(f"this user may not look at process {pid}", "run as its user, or as root") from error
    except (FileNotFoundError, ProcessLookupError) as error:
        raise MigrationError(f"there is no process {pid}") from error
    if not words:
        raise ConfigurationError(f"process {pid} has no command line")
    return words


def twin(words: list[str]) -> tuple[list[str], list[str]]:
    """The command line of its twin, which waits for the guest; and what has to be looked at before it is used, one line
    each. What was plugged into QEMU after its start is not in its command line."""
    program, *rest = words
    kept: list[str] = []
    while rest:
        word = rest.pop(0)
        # QEMU takes one hyphen or two.
        name = word.removeprefix("-").removeprefix("-") if word.startswith("-") else ""
        if name in _DROPPED:
            del rest[: _DROPPED[name]]
        else:
            kept.append(word)
    inherited = [f"{word}: a descriptor that it was given at its start" for word in kept if _INHERITED.search(word)]
    return [program, *kept, *_ADDED], inherited
