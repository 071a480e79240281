# SPDX-License-Identifier: Apache-2.0
"""From root to an ordinary user, before anything is sent or received: ``--user``.

`become` opens the devices while that is allowed (the C core keeps them, `pc_device_keep`), then gives up groups, group,
user and every capability, for good: no program that is executed later can bring any of it back (no_new_privs). What
is opened afterwards (``--dump``, ``--salvage``, ``--disk``) is opened by the user, who may not listen below port 1024.

It works on the whole process and cannot be undone; it is called once, by the main thread, before there are others:
glibc changes the user of all threads, but capabilities and no_new_privs are each thread's own.

What a change of user does besides, and what is done about it. The kernel makes the process undumpable, so that
/proc/self/* belongs to root, and /proc/self/pagemap, where pages of anonymous memory are looked for, could no longer be
opened. It is made dumpable again, as every program is that a service manager starts as a user; that user's other
processes may therefore trace it. And the kernel forgets at whose death this process is to die (PR_SET_PDEATHSIG): it is
set again.
"""

from __future__ import annotations

import contextlib
import ctypes
import grp
import os
import pwd
import sys
from dataclasses import dataclass
from pathlib import Path

from postcopy._native import lib
from postcopy.errors import ConfigurationError, ResourceError

PR_SET_PDEATHSIG, PR_GET_PDEATHSIG, PR_SET_DUMPABLE = 1, 2, 4
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
LINUX_CAPABILITY_VERSION_3 = 0x20080522

# Those that a side of a migration may need. One that cannot be opened now is no error here: what needs it later, if
# anything does, raises it with the remedy.
DEVICES = (lib.PC_DEVICE_USERFAULTFD, lib.PC_DEVICE_KVM, lib.PC_DEVICE_TUN)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class User:
    """Whom to become."""

    name: str  # as it was asked for
    uid: int
    gid: int
    groups: tuple[int, ...]
    """Supplementary groups; those of the user's account, or none where a group was named."""


def find_user(text: str) -> User:
    """The user of ``NAME``, ``NAME:GROUP``, with numbers for either if you like. Reads the system's databases.

    `ConfigurationError` for a user or group that there is none of, for a number that has no account and comes without
    a group, and for root, which would give up nothing.
    """
    name, colon, group = text.partition(":")
    if not name or (colon and not group):
        raise ConfigurationError(f"--user {text}: write NAME or NAME:GROUP, by name or by number")
    account = _account(name)
    if account is None and not _is_number(name):
        raise ConfigurationError(f"--user {text}: there is no user {name!r} on this host")
    if account is None and not colon:
        raise ConfigurationError(f"--user {text}: user {name} has no account here: write {name}:GROUP")
    uid = int(name) if account is None else account.pw_uid
    if uid == 0:
        raise ConfigurationError(f"--user {text}: that is root, which would give up nothing: name an ordinary user")
    if colon:
        gid = _group(text, group)
        return User(text, uid, gid, (gid,))
    assert account is not None
    return User(text, uid, account.pw_gid, tuple(sorted(set(os.getgrouplist(account.pw_name, account.pw_gid)))))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) < 2**32 - 1  # the largest means "leave it as it is"


def _account(name: str) -> pwd.struct_passwd | None:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(name)
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(int(name)) if _is_number(name) else None
    return None


def _group(text: str, group: str) -> int:
    with contextlib.suppress(KeyError):
        return grp.getgrnam(group).gr_gid
    if not _is_number(group):
        raise ConfigurationError(f"--user {text}: there is no group {group!r} on this host")
    return int(group)


def become(user: User) -> None:
    """Opens the devices, then gives up every right but those of `user`; see above. Blocks for no time worth naming.

    `ConfigurationError` when this process may not change its user: nothing has been given up then. `ResourceError` when
    something is left that should be gone, or the user could not even read this package: the process is to end.
    """
    if os.geteuid() != 0:
        raise ConfigurationError(
            f"--user {user.name}: only root can become another user, this is user {os.geteuid()}; start as root, or"
            " without --user"
        )
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("become: other threads are running")
    # Modules are imported when they are needed, also by a migration that is under way.
    programs = {os.path.dirname(file) for module in list(sys.modules.values()) if (file := _file_of(module))}
    for device in DEVICES:
        lib.pc_device_keep(device)
    death_signal = ctypes.c_int()
    _libc.prctl(PR_GET_PDEATHSIG, ctypes.byref(death_signal), 0, 0, 0)
    parent = os.getppid()
    # While CAP_SETPCAP is there, which a container's root may lack: with no_new_privs the set gives nothing anyway.
    for bit in range(_last_capability() + 1):
        _libc.prctl(PR_CAPBSET_DROP, bit, 0, 0, 0)
    try:
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    except PermissionError as error:
        raise ConfigurationError(
            f"--user {user.name}: this root may not become another user ({error.strerror}): give it the capabilities"
            " SETUID and SETGID (docker run --cap-add SETUID --cap-add SETGID), or start as that user"
        ) from error
    _clear_capabilities()
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _prctl(PR_SET_DUMPABLE, 1)
    if death_signal.value:
        _prctl(PR_SET_PDEATHSIG, death_signal.value)
        if os.getppid() != parent:  # it died meanwhile, and nothing was sent
            os.kill(os.getpid(), death_signal.value)
    _check(user)
    _check_readable(user, programs)


def _prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        raise ResourceError(f"--user: prctl {option}: {os.strerror(ctypes.get_errno())}")


def _last_capability() -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    return 63


def _clear_capabilities() -> None:
    """Inheritable ones stay when the user changes; all of them do under SECBIT_NO_SETUID_FIXUP or KEEP_CAPS."""
    _libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
    if _libc.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise ResourceError(f"--user: capset: {os.strerror(ctypes.get_errno())}")


def _check(user: User) -> None:
    """Whether the kernel says that it has worked."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    left = [name for name in ("CapInh", "CapPrm", "CapEff", "CapAmb") if int(status.get(name, "0"), 16)]
    same = (
        os.getresuid() == (user.uid,) * 3
        and os.getresgid() == (user.gid,) * 3
        and set(os.getgroups()) == set(user.groups)
        and status.get("NoNewPrivs", "1").strip() == "1"
    )
    if left or not same:
        raise ResourceError(f"--user {user.name}: not every right could be given up ({', '.join(left) or 'ids'})")


def _file_of(module: object) -> str | None:
    file = getattr(module, "__file__", None)
    return file if isinstance(file, str) and os.path.isabs(file) else None


def _check_readable(user: User, programs: set[str]) -> None:
    for path in sorted(programs):
        if not os.access(path, os.R_OK | os.X_OK):
            raise ResourceError(
                f"--user {user.name}: this user may not read {path}, where a part of this program is",
                "use a Python, and install postcopy, where every user may read: /usr, /opt",
            )
