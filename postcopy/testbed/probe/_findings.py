# SPDX-License-Identifier: Apache-2.0
"""Findings: what is concluded from the trials, what can be asked at once, and what would help."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from postcopy._host import read
from postcopy._native import ffi, lib
from postcopy.errors import ConfigurationError
from postcopy.records import reports
from postcopy.testbed import _linux
from postcopy.testbed.probe import _host, _needs, _trials
from postcopy.testbed.probe._supervise import try_in_child
from postcopy.uffd import How, UffdApi, UffdFeature
from postcopy.units import format_size

State = Literal["yes", "no", "unknown"]
Json = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One answer."""

    name: str
    state: State
    detail: str = ""
    remedy: str = ""
    """The one command that would make it ``yes``; a sentence where no command can; empty when it is."""
    needed_for: str = ""
    facts: Json = field(default_factory=dict)
    """What else was seen; names and units are in docs/probe.md."""

    def __bool__(self) -> bool:
        return self.state == "yes"

    def record(self) -> reports.Finding:
        return reports.Finding(
            name=self.name,
            state=self.state,
            detail=self.detail,
            remedy=self.remedy,
            needed_for=self.needed_for,
            facts=self.facts,
        )

    def complaint(self) -> str | None:
        """None when it is there, else one line with the remedy."""
        if self:
            return None
        return f"{self.name}: {self.detail or self.state}" + (f" (remedy: {self.remedy})" if self.remedy else "")


# ---- trials, by the child


def _judge(name: str, answer: Json) -> Finding:
    trial = _trials.TRIALS[name]
    if answer["state"] != "yes":
        return Finding(name, answer["state"], answer["reason"], trial.remedy(answer["errno"]), trial.needed_for)
    facts = answer["facts"]
    detail = trial.yes
    if name == "kvm":
        detail = f"API {facts['api-version']}, a VM was made; {_KVM_IS[facts['hardware']]}"
    return Finding(name, "yes", detail, "", trial.needed_for, facts)


_KVM_IS = {
    True: "on the processor's own virtualization (vmx or svm)",
    False: "emulated: the processor shows neither vmx nor svm",
    None: "whether on hardware is unknown",
}


# ---- what is asked at once, here: none of it blocks


def _open_uffd(name: str, how: How, needed_for: str) -> Finding:
    answer: Any = ffi.new("struct pc_uffd_api *")
    result = lib.pc_uffd_probe(how, answer)
    if result < 0:
        return Finding(name, "no", f"{_HOW[how][0]}: {os.strerror(-result)}", _HOW[how][1](-result), needed_for)
    facts = _api_facts(UffdApi(How(answer.how), UffdFeature(answer.features), int(answer.ioctls)))
    return Finding(name, "yes", f"opened: {facts['how']}", "", needed_for, facts)


def _api_facts(api: UffdApi) -> Json:
    return {
        "how": api.how.name.lower().replace("_", "-"),
        "features": feature_names(api.features),
        "ioctls": _trials.ioctl_names(api.ioctls),
    }


_HOW: dict[How, tuple[str, Callable[[int], str]]] = {
    How.DEVICE: ("/dev/userfaultfd", lambda number: _host.device_remedy("/dev/userfaultfd", number)),
    How.SYSCALL: ("userfaultfd(2)", _host.uffd_syscall_remedy),
    How.USER_ONLY: ("userfaultfd(2), UFFD_USER_MODE_ONLY", _host.user_only_remedy),
    How.ANY: ("any userfaultfd", _host.user_only_remedy),
}


def feature_names(features: int) -> list[str]:
    """The feature bits by name, in order; a bit of a newer kernel has its number."""
    known = {int(flag): str(flag.name) for flag in UffdFeature}
    return [known.get(1 << bit, f"bit {bit}") for bit in range(64) if features >> bit & 1]


def _uffd() -> Finding:
    """One that stops faults of the kernel too."""
    ways = [_open_uffd("uffd", how, "--machine kvm") for how in (How.DEVICE, How.SYSCALL)]
    for finding in ways:
        if finding:
            return finding
    reasons = "; ".join(finding.detail for finding in ways)
    reason = f"no userfaultfd that serves faults of the kernel ({reasons})"
    return Finding("uffd", "no", reason, _host.uffd_remedy(), "--machine kvm")


def uffd_user() -> Finding:
    """At least one for faults of user code."""
    return _open_uffd("uffd-user", How.ANY, "postcopy: the destination's memory")


def _feature(name: str, flag: UffdFeature, needed_for: str, version: str) -> Finding:
    any_way = uffd_user()
    if not any_way:
        return Finding(name, "unknown", any_way.detail, any_way.remedy, needed_for)
    if flag.name in any_way.facts["features"]:
        return Finding(name, "yes", "a feature bit", "", needed_for)
    return Finding(name, "no", f"this kernel's userfaultfd has no {flag.name}", f"Linux {version} or newer", needed_for)


def _root() -> Finding:
    if os.geteuid() == 0:
        return Finding("root", "yes", "user 0")
    detail = f"not root: user {os.geteuid()}"
    return Finding("root", "no", detail, _host.again_as_root(), "the tests of networks and of --user")


def _change_user() -> Finding:
    needed = {"CAP_SETGID": _linux.CAP_SETGID, "CAP_SETUID": _linux.CAP_SETUID}
    lacking = [name for name, bit in needed.items() if not _linux.has_capabilities(bit)]
    if os.geteuid() == 0 and not lacking:
        return Finding("change-user", "yes", "user 0 with CAP_SETUID and CAP_SETGID", "", "--user")
    if os.geteuid() != 0:
        return Finding("change-user", "no", f"user {os.geteuid()}", _host.again_as_root(), "--user")
    detail = f"user 0 without {' and '.join(lacking)}"
    return Finding("change-user", "no", detail, _host.container_option("--cap-add SETUID --cap-add SETGID"), "--user")


def _hugetlb() -> Finding:
    uses = "--backing hugetlb"
    pool = {}
    for line in read("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name in ("HugePages_Total", "HugePages_Free", "HugePages_Rsvd", "Hugepagesize"):
            pool[name] = int(value.split()[0])
    if "HugePages_Free" not in pool:
        return Finding("hugetlb", "no", "this kernel has no huge pages", "a kernel with CONFIG_HUGETLBFS=y", uses)
    free, size = pool["HugePages_Free"] - pool.get("HugePages_Rsvd", 0), pool.get("Hugepagesize", 0) * 1024
    facts = {"total-pages": pool.get("HugePages_Total", 0), "free-pages": free, "page-bytes": size}
    text = f"{free} of {facts['total-pages']} pages of {format_size(size)} are free"
    return Finding("hugetlb", "yes" if free > 0 else "no", text, "" if free > 0 else _host.huge_remedy(), uses, facts)


CHEAP: dict[str, Callable[[], Finding]] = {
    "uffd": _uffd,
    "uffd-device": lambda: _open_uffd("uffd-device", How.DEVICE, "--machine kvm, without root"),
    "uffd-syscall": lambda: _open_uffd("uffd-syscall", How.SYSCALL, "--machine kvm"),
    "uffd-user-only": lambda: _open_uffd("uffd-user-only", How.USER_ONLY, "--machine image, without any right"),
    "uffd-user": uffd_user,
    "uffd-minor": lambda: _feature("uffd-minor", UffdFeature.MINOR_SHMEM, "--backing memfd", "5.14"),
    "root": _root,
    "change-user": _change_user,
    "hugetlb": _hugetlb,
}
ALIASES = {"uffd-kernel": "kernel-faults"}


def names() -> list[str]:
    """All that `find` and ``--require`` know."""
    return [*CHEAP, *_trials.TRIALS, *ALIASES]


@functools.cache
def find(name: str) -> Finding:
    """One finding, tried now and then remembered for this process. `ConfigurationError` for a name that is none."""
    name = ALIASES.get(name, name)
    if name in CHEAP:
        return CHEAP[name]()
    if name not in _trials.TRIALS:
        raise ConfigurationError(f"probe: there is no {name!r} to ask for; there are {', '.join(names())}")
    return _judge(name, try_in_child([name])[name])


def find_all() -> list[Finding]:
    """Every finding, tried afresh."""
    answers = try_in_child(_trials.TRIALS)
    return [*(ask() for ask in CHEAP.values()), *(_judge(name, answers[name]) for name in _trials.TRIALS)]


def uses(findings: Iterable[Finding]) -> list[reports.Use]:
    """What each use of postcopy needs, and whether that is here (`_needs.USES`)."""
    seen = {finding.name: bool(finding) for finding in findings}
    return [reports.Use(name=use.name, needs=use.needs, here=use.here(seen)) for use in _needs.USES]


def migrations(findings: Iterable[Finding]) -> dict[str, bool]:
    """Which machines can be received here: `image` and `rv64` need pages served to user code, `kvm` those of the
    kernel as well."""
    seen = {finding.name: bool(finding) for finding in findings}
    user = seen["uffd-user"] and (seen["memfd-missing"] or seen["anon-missing"])
    return {"image": user, "rv64": user, "kvm": user and seen["kernel-faults"] and seen["kvm"]}
