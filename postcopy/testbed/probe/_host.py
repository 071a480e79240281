# SPDX-License-Identifier: Apache-2.0
"""What this host is: kernel, container, limits and settings, read from /proc and /sys; and so which command would help.
Nothing here tries anything."""

from __future__ import annotations

import errno
import os
import platform
import resource
import shlex
import sys
from pathlib import Path
from typing import Any

from postcopy._child import python
from postcopy._files import explain_no_access, share_file
from postcopy._host import chosen, container, read
from postcopy.records.reports import System
from postcopy.testbed import _linux

Json = dict[str, Any]


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


def system() -> System:
    """Kernel, user, limits and settings, as `--json` has them. Reads files, tries nothing."""
    status = dict(line.split(":", 1) for line in read("/proc/self/status").splitlines() if ":" in line)
    held = _linux.capability_mask()
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)

    def limit(value: int) -> int | None:
        return None if value == resource.RLIM_INFINITY else value

    def sysctl(name: str) -> int | None:
        text = read("/proc/sys/" + name.replace(".", "/"))
        return int(text) if text.lstrip("-").isdigit() else None

    return System(
        kernel=platform.release(),
        architecture=platform.machine(),
        user=os.geteuid(),
        container=container(),
        seccomp=_SECCOMP.get(status.get("Seccomp", "").strip()),
        capabilities=[name for bit, name in CAPABILITIES.items() if held >> bit & 1],
        capability_mask=f"{held:#x}",
        memlock_soft_bytes=limit(soft),
        memlock_hard_bytes=limit(hard),
        cgroup_memory_limit_bytes=_cgroup_limit_bytes(),
        sysctl={
            name: sysctl(name)
            for name in ("vm.unprivileged_userfaultfd", "vm.overcommit_memory", "vm.nr_hugepages",
                         "kernel.io_uring_disabled", "user.max_user_namespaces")
        },
        thp=chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        thp_shmem=chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
    )  # fmt: skip


# ---- remedies: what the reader of the probe can do, by the errno that a trial met (0: none)

DENIED = (errno.EPERM, errno.EACCES)


def in_container() -> bool:
    """Whether what concerns the whole host has to be done elsewhere: in a container without the rights of its host."""
    return container() is not None and not _linux.has_capabilities(_linux.CAP_SYS_ADMIN)


def as_root(command: str) -> str:
    """A command that changes the host."""
    if in_container():
        return f"on the host, as root: {command}"
    return command if os.geteuid() == 0 else f"sudo {command}"


def again_as_root() -> str:
    """The same command, by root."""
    if in_container():
        return container_option("--user 0")
    program, *arguments = sys.argv
    # (`python -m postcopy` has the file of the module there)
    command = python("-m", "postcopy") if program.endswith("__main__.py") else [program]
    return f"sudo {shlex.join([*command, *arguments])}"


def container_option(option: str) -> str:
    return f"docker run {option} ..."


def module_remedy(module: str, config: str) -> str:
    """For what a module of the kernel gives: the module where it is installed, else another kernel."""
    modules = Path("/lib/modules", platform.release())
    # Files have either of - and _, names have _: kvm_intel is in kvm-intel.ko.
    if f"/{module}.ko" in read(str(modules / "modules.dep")).replace("-", "_"):
        return as_root(f"modprobe {module}")
    if in_container():  # whose /lib/modules is not the host's
        return f"on the host, as root: modprobe {module}, or a kernel with {config}"
    return f"a kernel with {config}"


def device_remedy(device: str, number: int) -> str:
    there = os.path.exists(device)
    if there and number not in (errno.ENODEV, errno.ENXIO):  # which a node without its driver gives
        if device == "/dev/net/tun" and number in DENIED and not os.access(device, os.R_OK | os.W_OK):
            return as_root(f"chmod 0666 {device}")  # what udev makes it; interfaces have their own rights
        return explain_no_access(device, contained=in_container())[1]
    if not there and in_container():
        return container_option(f"--device {device}")
    if device == "/dev/kvm":
        return _kvm_module()
    if device == "/dev/net/tun":
        return module_remedy("tun", "CONFIG_TUN")
    return "Linux 6.1 or newer with CONFIG_USERFAULTFD=y"


def _kvm_module() -> str:
    flags = read("/proc/cpuinfo").split()
    for flag, module, config in (("vmx", "kvm_intel", "CONFIG_KVM_INTEL"), ("svm", "kvm_amd", "CONFIG_KVM_AMD")):
        if flag in flags:
            return module_remedy(module, config)
    return "switch virtualization on in the firmware (in a virtual machine: nested virtualization)"


def kvm_remedy(number: int) -> str:
    return f"{device_remedy('/dev/kvm', number)}; or use --machine rv64"


def guest_memfd_remedy(number: int) -> str:
    return "Linux 7.1 or newer with CONFIG_KVM_GUEST_MEMFD=y, and /dev/kvm"


def uffd_remedy(number: int = 0) -> str:
    """For one that serves faults of the kernel too."""
    if os.path.exists("/dev/userfaultfd") or in_container():
        return device_remedy("/dev/userfaultfd", number)
    return as_root("sysctl -w vm.unprivileged_userfaultfd=1")


def uffd_syscall_remedy(number: int) -> str:
    if number == errno.ENOSYS:
        return "a kernel with CONFIG_USERFAULTFD=y"
    return f"run with CAP_SYS_PTRACE, or {as_root('sysctl -w vm.unprivileged_userfaultfd=1')}"


def user_only_remedy(number: int) -> str:
    if number in DENIED:  # no right is needed: a seccomp filter stands in the way
        # (the path of a file on the host, which only its copy of the source distribution tells)
        profile = "docker/seccomp-userfaultfd.json" if in_container() else share_file("seccomp-userfaultfd.json")
        return container_option(f"--security-opt seccomp={profile}")
    return "Linux 5.11 or newer with CONFIG_USERFAULTFD=y"


def netns_remedy(number: int) -> str:
    if number == errno.EINVAL:
        return "a kernel with CONFIG_NET_NS=y"
    if number == errno.ENOSPC:
        return as_root("sysctl -w user.max_net_namespaces=10000")
    if os.geteuid() != 0 and not in_container():
        return again_as_root()
    return container_option("--user 0 --cap-add SYS_ADMIN --cap-add NET_ADMIN --security-opt apparmor=unconfined")


def user_netns_remedy(number: int) -> str:
    if number == errno.EINVAL:
        return "a kernel with CONFIG_USER_NS=y and CONFIG_NET_NS=y"
    for name, wanted in _USER_NAMESPACES.items():  # those that this kernel has, and that say no
        found = read("/proc/sys/" + name.replace(".", "/"))
        if found.isdigit() and (int(found) == 0) == (wanted != 0):
            return as_root(f"sysctl -w {name}={wanted}")
    if in_container():
        return container_option("--security-opt seccomp=unconfined --security-opt apparmor=unconfined")
    return "let this user make user namespaces: user_namespaces(7)"


_USER_NAMESPACES = {
    "user.max_user_namespaces": 10000,
    "user.max_net_namespaces": 10000,
    "kernel.unprivileged_userns_clone": 1,
    "kernel.apparmor_restrict_unprivileged_userns": 0,
}


def qdisc_remedy(kind: str, number: int) -> str:
    if number:  # there was no network to try it in
        return user_netns_remedy(number)
    return module_remedy(f"sch_{kind}", f"CONFIG_NET_SCH_{kind.upper()}")


def io_uring_remedy(number: int) -> str:
    if number == errno.ENOSYS:
        return "a kernel with CONFIG_IO_URING=y"
    if read("/proc/sys/kernel/io_uring_disabled") not in ("", "0"):
        return as_root("sysctl -w kernel.io_uring_disabled=0")
    return container_option("--security-opt seccomp=unconfined")  # Docker's own profile refuses it


def ipv6_remedy(number: int) -> str:
    if number == errno.EAFNOSUPPORT:
        return "a kernel with IPv6 (CONFIG_IPV6, and no ipv6.disable=1 on its command line)"
    if in_container():
        return container_option("--sysctl net.ipv6.conf.all.disable_ipv6=0")
    return as_root("sysctl -w net.ipv6.conf.lo.disable_ipv6=0")


def huge_remedy() -> str:
    return as_root("sysctl -w vm.nr_hugepages=64")
