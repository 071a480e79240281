# SPDX-License-Identifier: Apache-2.0
"""What a microVM that arrives may use of this host, and what its Firecracker has really opened.

The state that a source sends names files, sockets and network devices itself, and Firecracker opens whatever it names,
as its user. So an offer is only a promise, and the state is in a format of Firecracker's own: what counts is which
descriptors the process has when it has loaded it, before the guest runs. The kernel tells that.

A process with a root directory of its own (the jailer's) is not asked for files: it sees those that were put there.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping

from postcopy._patterns import matches
from postcopy.errors import ConfigurationError, MigrationError
from postcopy.machines._peer import one_line

TAP = "tap:"
_TUN = (10, 200)
_DEVICES = frozenset({(10, 232), (1, 3), (1, 5), (1, 8), (1, 9)})  # kvm, null, zero, random, urandom
_SOCKET = re.compile(r"[0-9a-f]+: \S+ \S+ \S+ \S+ \S+ +(\d+) (.+)")


def parse_allowed(text: str) -> tuple[str, ...]:
    """Of ``--allow``: patterns with commas between them. `ConfigurationError` for what is none."""
    patterns = tuple(text.split(",")) if text else ()
    for pattern in patterns:
        is_path = pattern.startswith("/") and _is_plain(pattern.removesuffix("/") or "/")
        if not pattern.isprintable() or not (is_path or re.fullmatch(TAP + r"[!-.0-~]{1,15}", pattern)):
            raise ConfigurationError(
                f"{pattern[:80]!r}: write an absolute path, DIRECTORY/ for all that is below it, or tap:NAME; * stands"
                " for any characters but /"
            )
    return patterns


def allows(patterns: Iterable[str], name: str) -> bool:
    """Whether one of them is the pattern of a path that is absolute and has no detours, or of ``tap:NAME``."""
    return (name.startswith(TAP) or _is_plain(name)) and any(_is_as(pattern, name) for pattern in patterns)


def _is_as(pattern: str, name: str) -> bool:
    if pattern.endswith("/"):  # all that is below it
        name = "".join(re.findall(r"[^/]*/", name)[: pattern.count("/")])
    return matches(pattern, name, "[^/]")


def _is_plain(path: str) -> bool:
    return path.startswith("/") and not path.startswith("//") and os.path.normpath(path) == path


def descriptors(pid: int) -> dict[int, str]:
    """What each descriptor of a process is, in the words of the kernel."""
    directory, found = f"/proc/{pid}/fd", {}
    for name in os.listdir(directory):
        try:
            found[int(name)] = os.readlink(f"{directory}/{name}")
        except FileNotFoundError:  # closed meanwhile
            continue
    return found


def check_opened(
    pid: int,
    before: Mapping[int, str],
    files: Iterable[tuple[str, bool]] | None,
    sockets: Collection[str],
    taps: Collection[str],
) -> None:
    """`MigrationError` when the process has something open that was not open `before` (`descriptors`) and is none of
    these. `files`: paths, as this process sees them, and whether it may write there; None where the process sees only
    what it may use. `sockets`: where it may have bound one. May wait for a file system: for a worker thread."""
    known = None if files is None else {(*_identity(os.stat(path)), writes) for path, writes in files}
    bound = _socket_paths(pid)
    sockets = {*sockets, *(bound.get(what, "") for what in before.values())}
    for fd, what in descriptors(pid).items():
        if before.get(fd) == what:
            continue
        try:
            status, writes = os.stat(f"/proc/{pid}/fd/{fd}"), _writes(pid, fd)
        except FileNotFoundError:
            continue
        device = (os.major(status.st_rdev), os.minor(status.st_rdev))
        if stat.S_ISCHR(status.st_mode) and device == _TUN:
            if (tap := _tap_of(pid, fd)) not in taps:
                raise _not_allowed(f"the TAP device {tap!r}")
        elif stat.S_ISSOCK(status.st_mode):
            if known is not None and (path := bound.get(what, "")) and path not in sockets:
                raise _not_allowed(f"the socket {path}")
        elif known is not None and not what.startswith(("anon_inode:", "pipe:")):
            needed = stat.S_ISCHR(status.st_mode) and (device in _DEVICES or what == "/dev/userfaultfd")
            if not needed and known.isdisjoint({(*_identity(status), True), (*_identity(status), writes)}):
                raise _not_allowed(f"{what} for writing" if writes else what)


def _not_allowed(what: str) -> MigrationError:
    return MigrationError(
        f"the state of the microVM has made Firecracker open {one_line(what)}, which its offer does not name: a source"
        " that is not what it seems; it is ended"
    )


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _writes(pid: int, fd: int) -> bool:
    with open(f"/proc/{pid}/fdinfo/{fd}") as file:
        flags = next((line.split()[1] for line in file if line.startswith("flags:")), "0")
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY


def _tap_of(pid: int, fd: int) -> str:
    with open(f"/proc/{pid}/fdinfo/{fd}") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("iff:")), "")


def _socket_paths(pid: int) -> dict[str, str]:
    """Where sockets are bound, by what their descriptors are called: those of the network namespace of a process."""
    with open(f"/proc/{pid}/net/unix", errors="surrogateescape") as file:
        matches = filter(None, map(_SOCKET.match, file))
        return {f"socket:[{match[1]}]": match[2] for match in matches}
