# SPDX-License-Identifier: Apache-2.0
"""What userfaultfd this kernel and this user have.

There are three ways to a userfaultfd, and they differ in what they may stop (userfaultfd(2);
Documentation/admin-guide/mm/userfaultfd.rst of the kernel):

- ``/dev/userfaultfd`` (Linux 6.1): for users that may open the device; all faults.
- the system call with CAP_SYS_PTRACE or with ``vm.unprivileged_userfaultfd=1``; all faults.
- the system call with UFFD_USER_MODE_ONLY: for every user, but only faults raised by user-mode code. A fault raised
  inside the kernel (by a system call, by KVM) gets EFAULT, so this one can never be under a virtual machine.
"""

from __future__ import annotations

import enum
import errno
import os
from dataclasses import dataclass
from typing import Any

from postcopy._native import ffi, lib
from postcopy.errors import NO_FILES, CoreError, ResourceError, out_of_files


class How(enum.IntEnum):
    """How a userfaultfd is opened."""

    ANY = 0
    DEVICE = 1
    SYSCALL = 2
    USER_ONLY = 3


class UffdFeature(enum.IntFlag, boundary=enum.KEEP):
    """Feature bits of UFFDIO_API. Bits that a newer kernel adds are kept, without a name."""

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_FORK = 1 << 1
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16
    RWP = 1 << 17
    RWP_ASYNC = 1 << 18


@dataclass(frozen=True)
class UffdApi:
    """The answer of a kernel to one user."""

    how: How  # the way that works
    features: UffdFeature  # all that the kernel has, whatever was asked for
    ioctls: int  # as UFFDIO_API returned it

    @property
    def kernel_faults(self) -> bool:
        """Whether faults raised inside the kernel are stopped too, which KVM needs."""
        return self.how is not How.USER_ONLY


def probe(how: How | str = How.ANY) -> UffdApi:
    """Asks on a throw-away userfaultfd. Does not block. `ResourceError`, with the remedy, when there is none that way.

    `How.ANY` gives the first way that works, in the order of the list above.
    """
    wanted = parse_how(how)
    api: Any = ffi.new("struct pc_uffd_api *")
    result = lib.pc_uffd_probe(wanted, api)
    if result < 0:
        raise _unavailable(wanted, -result)
    return UffdApi(How(api.how), UffdFeature(api.features), int(api.ioctls))


def open_descriptor(how: How | str, features: int) -> int:
    """A new userfaultfd for the memory of this process, non-blocking and close-on-exec.

    `ResourceError`, with the remedy, when this user may not have it that way, or the kernel lacks a feature.
    """
    wanted = parse_how(how)
    result = int(lib.pc_uffd_open(wanted, features, ffi.NULL))
    if result == -errno.EINVAL:
        lacking = UffdFeature(features) & ~probe(wanted).features
        if lacking:
            names = lacking.name or hex(lacking)
            raise ResourceError(f"this kernel's userfaultfd has no {names}", "use a newer kernel")
    if result < 0:
        raise _unavailable(wanted, -result)
    return result


def parse_how(how: How | str) -> How:
    """`How` of a word: ``any``, ``device``, ``syscall``, ``user-only``."""
    if isinstance(how, How):
        return how
    try:
        return How[how.upper().replace("-", "_")]
    except KeyError:
        raise ValueError(f"unknown way to a userfaultfd: {how!r}") from None


def explain_unavailable(*, kernel_faults: bool = True) -> ResourceError | None:
    """None when this user may have a userfaultfd, else an error whose text is the reason and whose `remedy` helps.

    `kernel_faults`: whether it must also stop faults raised inside the kernel, as under KVM; one for user-mode faults
    only, which every user may have, is then not enough.
    """
    try:
        api = probe(How.ANY)
    except ResourceError as error:
        return error
    if api.kernel_faults or not kernel_faults:
        return None
    return _unavailable(How.ANY, errno.EPERM)


_DEVICE = "/dev/userfaultfd"


def _unavailable(how: How, number: int) -> ResourceError:
    if number in NO_FILES:
        return out_of_files(number, "userfaultfd")
    if number == errno.ENOMEM:
        return ResourceError(f"userfaultfd: {os.strerror(number)}", "free memory")
    if number == errno.ENOSYS or (number == errno.ENOENT and how is not How.DEVICE):
        return ResourceError("this kernel has no userfaultfd", "use a kernel with CONFIG_USERFAULTFD=y")
    if number == errno.ENOENT:
        return ResourceError(f"{_DEVICE} does not exist", f"use Linux 6.1 or newer; in a container: --device {_DEVICE}")
    if number in (errno.EPERM, errno.EACCES):
        # EPERM of the system call: the sysctl, or a seccomp profile (Docker's refuses the call, not the device).
        from postcopy._files import explain_no_access

        if how is How.USER_ONLY:  # for which no right is needed
            return ResourceError(
                "userfaultfd(2) is refused even for faults of user code, as a seccomp filter refuses it",
                "in a container: --security-opt seccomp=seccomp-userfaultfd.json (docs/containers.md)",
            )
        why = "this user may not have a userfaultfd that stops faults raised inside the kernel, as KVM raises them"
        if how is not How.SYSCALL and os.path.exists(_DEVICE):
            reason, remedy = explain_no_access(_DEVICE)
            return ResourceError(f"{why}: {reason}", remedy)
        return ResourceError(
            why,
            f"use Linux 6.1 or newer, which has {_DEVICE} (in a container: --device {_DEVICE}), run with"
            " CAP_SYS_PTRACE, or as root: sysctl -w vm.unprivileged_userfaultfd=1",
        )
    raise CoreError(number, "asking for a userfaultfd")
