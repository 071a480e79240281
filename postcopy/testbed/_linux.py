# SPDX-License-Identifier: Apache-2.0
"""Calls that Python's library lacks before 3.12, and what /proc tells of processes. The standard library only: the
processes that use this stay for long, or are about to become something else."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x04000000, 0x10000000, 0x40000000
MS_BIND, MS_REC, MS_SLAVE, MNT_DETACH = 0x1000, 0x4000, 0x80000, 2
CAP_SETGID, CAP_SETUID, CAP_NET_ADMIN, CAP_SYS_ADMIN = 6, 7, 12, 21
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
STATE, PARENT, SESSION, STARTED = 0, 1, 3, 19
"""Fields of /proc/PID/stat, counted from the one behind the command's name."""

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int | bytes | None) -> None:
    """A function of the C library that returns 0, or -1 and errno: then `OSError`, with its name as the file name."""
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"{name}(2)")


def die_with(parent: int) -> None:
    """From now on SIGKILL, for this process, when `parent` ends; at once when it has ended already."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def cpu_virtualization() -> bool | None:
    """Whether the processor says that it can run guests; None where it does not say."""
    if os.uname().machine not in ("x86_64", "i686"):
        return None
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("flags"):
                return not {"vmx", "svm"}.isdisjoint(line.split())
    return None


# ---- namespaces


def new_user() -> None:
    """A new user namespace for this process, in which this user is root: user_namespaces(7). One thread only."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", CLONE_NEWUSER)
    # Without "deny" nobody but root may map a group: a group can take rights away, too.
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def new_network() -> int:
    """Moves this thread into a new network namespace; its descriptor, which keeps it alive."""
    call("unshare", CLONE_NEWNET)
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
        call("setns", fd, kind)
    finally:
        os.close(fd)


def new_host_name(name: str) -> None:
    """A UTS namespace for this process, of one thread, in which the host has that name. `OSError` when it may not."""
    call("unshare", CLONE_NEWUTS)
    call("sethostname", name.encode(), len(name))


def new_hosts_file(text: str, scratch: str) -> None:
    """A mount namespace for this process, of one thread, in which /etc/hosts has that text. `OSError` when it may not.

    `scratch`: a directory, over which a file system in memory is mounted meanwhile: there is no file to be removed.
    """
    call("unshare", CLONE_NEWNS)
    call("mount", None, b"/", None, MS_REC | MS_SLAVE, None)  # what is mounted from here on is seen here only
    call("mount", b"hosts", os.fsencode(scratch), b"tmpfs", 0, b"size=64k,mode=0755")
    try:
        with open(f"{scratch}/hosts", "w", encoding="ascii") as file:
            file.write(text)
        call("mount", os.fsencode(f"{scratch}/hosts"), b"/etc/hosts", None, MS_BIND, None)
    finally:
        call("umount2", os.fsencode(scratch), MNT_DETACH)


def inode(path: str) -> int:
    return os.stat(path).st_ino


# ---- processes


def has_capabilities(*bits: int) -> bool:
    """Whether this process has them all, in its user namespace."""
    return all(capability_mask() >> bit & 1 for bit in bits)


def capability_mask() -> int:
    """The effective capabilities: capabilities(7). 0 where /proc does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/status", errors="replace") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0


def all_pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def stat_of(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from `STATE` on; empty when the process is gone."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()  # the command's name, in parentheses, may hold anything
    return []


def pids_with(field: int, value: int) -> list[int]:
    """Processes, zombies too, with that number in that field of `stat_of`."""
    return [pid for pid in all_pids() if stat_of(pid)[field : field + 1] == [b"%d" % value]]


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot: with its number, which process it is. None: it has
    ended, or only waits to be reaped."""
    fields = stat_of(pid)
    return int(fields[STARTED]) if fields and fields[STATE] not in (b"Z", b"X") else None


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
