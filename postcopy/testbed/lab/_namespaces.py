# SPDX-License-Identifier: Apache-2.0
"""Network namespaces as files in /proc, and the processes in them. The standard library only: the holder needs no more.

`os.setns` and `os.unshare` came with Python 3.12; until then it is the C library's own functions (setns(2),
unshare(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Collection, Iterator, Sequence

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
CAP_NET_ADMIN, CAP_SYS_ADMIN = 12, 21
MARK = "POSTCOPY_LAB"
"""The environment variable that every process of a laboratory has: ``NAME:TOKEN``. An inode number says only as long as
the namespace lives whose it is; this says it for ever."""
TERM_S = 3.0
KILL_S = 10.0

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int) -> None:
    if getattr(_libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def may_make_networks() -> bool:
    """Whether this process has the capabilities for network namespaces and what is in them, in its user namespace."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        effective = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    return all(effective >> capability & 1 for capability in (CAP_NET_ADMIN, CAP_SYS_ADMIN))


def new_user() -> None:
    """A new user namespace for this process, in which this user is root: user_namespaces(7). One thread only."""
    user, group = os.geteuid(), os.getegid()
    _call("unshare", CLONE_NEWUSER)
    # Without this nobody but root may map a group: a group can take rights away, too.
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"0 {user} 1")
    _write("/proc/self/gid_map", f"0 {group} 1")


def new_network() -> int:
    """Moves this thread into a new network namespace; its descriptor, which keeps it alive."""
    _call("unshare", CLONE_NEWNET)
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def enter_user(path: str) -> None:
    """Moves this process, of one thread, into the user namespace of a file, where it is not there (setns(2))."""
    if not os.path.samestat(os.stat(path), os.stat("/proc/self/ns/user")):
        _enter(path, CLONE_NEWUSER)


def enter_network(path: str) -> None:
    """Moves this thread into the network namespace of a file. `OSError` when it may not."""
    _enter(path, CLONE_NEWNET)


def _enter(path: str, kind: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("setns", fd, kind)
    finally:
        os.close(fd)


def inode(path: str) -> int:
    return os.stat(path).st_ino


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot: with its number, which process it is. None: it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def belongs(pid: int, mark: str, networks: Collection[int] = ()) -> bool:
    """Whether a process has the mark in its environment, or is in one of these network namespaces (inode numbers, only
    to be trusted while somebody keeps them alive). Not when it is gone, or somebody else's."""
    try:
        if networks and inode(f"/proc/{pid}/ns/net") in networks:
            return True
        with open(f"/proc/{pid}/environ", "rb") as file:
            return f"{MARK}={mark}".encode() in file.read().split(b"\0")
    except OSError:
        return False


def processes(mark: str, networks: Collection[int] = ()) -> Iterator[int]:
    """All that `belongs` says yes to, but this process."""
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid() and belongs(int(name), mark, networks):
            yield int(name)


def end_processes(mark: str, networks: Collection[int] = (), spare: Collection[int] = ()) -> int:
    """Ends them, first in order, then by force, and waits until they are gone: how many there were.

    Blocks for at most `TERM_S` + `KILL_S`. A process that one of them starts meanwhile is found in the next round.
    """
    count = 0
    term_until = time.monotonic() + TERM_S
    kill_until = term_until + KILL_S
    told: set[int] = set()
    while time.monotonic() < kill_until:
        pids = [pid for pid in processes(mark, networks) if pid not in spare and start_time(pid) is not None]
        if not pids:
            break
        late = time.monotonic() >= term_until
        with contextlib.ExitStack() as stack:
            fds = []
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    fd = os.pidfd_open(pid)
                    stack.callback(os.close, fd)
                    # Between the look and the descriptor the number may have become somebody else's.
                    if not belongs(pid, mark, networks):
                        continue
                    fds.append(fd)
                    if late or pid not in told:
                        count += pid not in told
                        told.add(pid)
                        signal.pidfd_send_signal(fd, signal.SIGKILL if late else signal.SIGTERM)
            wait_for(fds, max(0.0, (kill_until if late else term_until) - time.monotonic()))
    return count


def wait_for(fds: Sequence[int], timeout_s: float) -> bool:
    """Whether the processes of these descriptors (pidfd_open(2)) have all ended within the time."""
    until = time.monotonic() + timeout_s
    left = set(fds)
    while left:
        remaining = until - time.monotonic()
        if remaining < 0:
            return False
        poll = select.poll()
        for fd in left:
            poll.register(fd, select.POLLIN)
        left -= {fd for fd, _ in poll.poll(remaining * 1000)}
    return True


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
