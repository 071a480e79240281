# SPDX-License-Identifier: Apache-2.0
"""What this host is: kernel, container, limits and settings, read from /proc and /sys; and so which command would help.
Nothing here tries anything."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shlex
import sys
from pathlib import Path
from typing import Any

from postcopy.testbed import _linux

Json = dict[str, Any]
INIT_PID_NS, INIT_USER_NS = 0xEFFFFFFC, 0xEFFFFFFD  # inodes of the first namespaces, fixed in the kernel


def read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").replace("\0", "\n").strip()
    except OSError:
        return ""


def container() -> str | None:
    """In what kind of container this process is, None for none that shows."""
    for path, kind in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if os.path.exists(path):
            return kind
    for line in read("/proc/1/environ").splitlines():
        if line.startswith("container="):
            return line.partition("=")[2] or "unnamed"
    for what, inode in (("pid", INIT_PID_NS), ("user", INIT_USER_NS)):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/self/ns/{what}").st_ino != inode:
                return f"{what} namespace"
    return None


CAPABILITIES = {0: "CHOWN", 1: "DAC_OVERRIDE", 6: "SETGID", 7: "SETUID", 12: "NET_ADMIN", 14: "IPC_LOCK",
                19: "SYS_PTRACE", 21: "SYS_ADMIN", 24: "SYS_RESOURCE", 38: "PERFMON", 39: "BPF"}  # fmt: skip
_SECCOMP = {"0": "off", "1": "strict", "2": "filter"}


def _cgroup_limit_bytes() -> int | None:
    """The smallest memory limit on the way up from this process's cgroup; None where there is none (or none shows)."""
    limits: list[int] = []
    for line in read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        here = root / path.lstrip("/")
        for directory in (here, *here.parents):
            if (text := read(str(directory / name))).isdigit():
                limits.append(int(text))
            if directory == root:
                break
    # Version 1 writes "no limit" as the largest number of pages.
    return min((limit for limit in limits if limit < 1 << 60), default=None)


def system() -> Json:
    """Kernel, user, limits and settings, as `--json` has them. Reads files, tries nothing."""
    status = dict(line.split(":", 1) for line in read("/proc/self/status").splitlines() if ":" in line)
    held = _linux.capability_mask()
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)

    def limit(value: int) -> int | None:
        return None if value == resource.RLIM_INFINITY else value

    def sysctl(name: str) -> int | None:
        text = read("/proc/sys/" + name.replace(".", "/"))
        return int(text) if text.lstrip("-").isdigit() else None

    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "user": os.geteuid(),
        "container": container(),
        "seccomp": _SECCOMP.get(status.get("Seccomp", "").strip()),
        "capabilities": [name for bit, name in CAPABILITIES.items() if held >> bit & 1],
        "capability-mask": f"{held:#x}",
        "memlock-soft-bytes": limit(soft),
        "memlock-hard-bytes": limit(hard),
        "cgroup-memory-limit-bytes": _cgroup_limit_bytes(),
        "sysctl": {
            name: sysctl(name)
            for name in ("vm.unprivileged_userfaultfd", "vm.overcommit_memory", "vm.nr_hugepages",
                         "kernel.io_uring_disabled", "user.max_user_namespaces")
        },
        "thp": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "thp-shmem": _chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
    }  # fmt: skip


def _chosen(path: str) -> str | None:
    """The bracketed word of a setting such as ``always [madvise] never``."""
    _, bracket, rest = read(path).partition("[")
    return rest.partition("]")[0] if bracket else None


def cpu_virtualization() -> bool | None:
    """Whether the processor says that it can run guests; None where it does not say."""
    if platform.machine() not in ("x86_64", "i686"):
        return None
    for line in read("/proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            return not {"vmx", "svm"}.isdisjoint(line.split())
    return None


# ---- remedies


def as_root(command: str) -> str:
    return command if os.geteuid() == 0 else f"sudo {command}"


def device_remedy(device: str, module: str) -> str:
    if os.path.exists(device):
        # Root that may not open it is held by the container's device list.
        return f"docker run --device {device} ..." if os.geteuid() == 0 else f"sudo chmod o+rw {device}"
    if container() is not None:
        return f"docker run --device {device} ..."
    return as_root(f"modprobe {module}") if module else "a kernel from 6.1 with CONFIG_USERFAULTFD=y"


def uffd_remedy() -> str:
    if os.path.exists("/dev/userfaultfd") or container() is not None:
        return device_remedy("/dev/userfaultfd", "")
    return as_root("sysctl -w vm.unprivileged_userfaultfd=1")


def netns_remedy() -> str:
    if os.geteuid() != 0:
        return f"sudo {shlex.join(sys.argv)}"
    if container() is not None:
        return "docker run --cap-add SYS_ADMIN --cap-add NET_ADMIN ..."
    return "a kernel with CONFIG_NET_NS=y"


def huge_remedy() -> str:
    return as_root("sysctl -w vm.nr_hugepages=64")
