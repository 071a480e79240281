# SPDX-License-Identifier: Apache-2.0
"""What each use of postcopy needs of a host, exactly; `postcopy probe` tells it, docs/privileges.md has the same words.

A need is a device, a capability, a system call that a seccomp filter must let through, or a limit. Whatever is not
named here is not needed: nothing locks memory (RLIMIT_MEMLOCK may be 0) or traces a process, and a real-time priority
only makes page faults shorter.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MANY_FILES = 256
"""RLIMIT_NOFILE: the largest side (8 vCPUs, 16 bulk channels) has some 80 descriptors open."""

_ANY_UFFD = (
    "one of: read and write on /dev/userfaultfd; userfaultfd(2) with CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1;"
    " userfaultfd(2) with UFFD_USER_MODE_ONLY, for which a user needs no right and seccomp must let the call through"
)
_WHOLE_UFFD = (
    "one of: read and write on /dev/userfaultfd (which no seccomp filter of Docker's stops);"
    " userfaultfd(2) with CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1"
)


@dataclass(frozen=True)
class Use:
    """Something that can be done with postcopy, what it needs, and by which findings that is there."""

    name: str
    needs: str
    findings: tuple[str, ...] = ()
    other: Callable[[], bool] | None = None

    def here(self, seen: Mapping[str, bool]) -> bool:
        """Whether this host has it all; `seen` are the findings by name."""
        return all(seen.get(name, False) for name in self.findings) and (self.other is None or self.other())


def _enough_files() -> bool:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft == resource.RLIM_INFINITY or soft >= MANY_FILES


USES = (
    Use("source of image, rv64", "nothing"),
    Use("source of kvm", "read and write on /dev/kvm", ("kvm",)),
    Use("destination of image, rv64", _ANY_UFFD, ("uffd-user",)),
    Use("destination of kvm", f"read and write on /dev/kvm; and {_WHOLE_UFFD}", ("kvm", "kernel-faults")),
    Use("--precopy, at the source", f"Linux 6.7; and {_ANY_UFFD}", ("pagemap-scan",)),
    Use("--backing hugetlb", "free huge pages (vm.nr_hugepages); no right", ("hugetlb",)),
    Use("--user", "start as user 0 with CAP_SETUID and CAP_SETGID; devices that user 0 may open", ("change-user",)),
    Use("postcopy lab, as root", "CAP_SYS_ADMIN and CAP_NET_ADMIN", ("netns",)),
    Use("postcopy lab, as a user", "user.max_user_namespaces above 0 and unshare(2)", ("user-netns",)),
    Use(
        "every side",
        f"RLIMIT_NOFILE {MANY_FILES}; RLIMIT_NPROC for 50 threads; RLIMIT_FSIZE of a RAM block (a memfd is a file)",
        other=_enough_files,
    ),
)
