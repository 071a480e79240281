# SPDX-License-Identifier: Apache-2.0
"""What this kernel, this user and this container allow: `postcopy probe`.

Nothing is concluded from a version or a configuration file that can be tried instead. What may block in the kernel
(a page that is really missing and really served, a virtual machine, a namespace) is tried by a child process with a
deadline, one trial after the other (`_probe_child`); a trial that hangs or dies costs that answer, not the others, and
the child takes everything it made with it. What remains is read from /proc and /sys.

A `Finding` is ``yes``, ``no`` or ``unknown``, never a guess, and, where it is not ``yes``, has the one command that
would change that and what of postcopy needs it. The tests' capabilities (`tests/conftest.py`) are findings.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import resource
import select
import shlex
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from postcopy._child import python
from postcopy._native import ffi, lib
from postcopy.errors import ConfigurationError, ResourceError
from postcopy.testbed import _needs, _probe_child
from postcopy.uffd import How, UffdApi, UffdFeature
from postcopy.units import format_size

State = Literal["yes", "no", "unknown"]
Json = dict[str, Any]

TRIAL_DEADLINE_S = 15.0
"""For one trial in the child; the slowest takes well under a second on a healthy host."""
REAP_DEADLINE_S = 5.0
INIT_PID_NS, INIT_USER_NS = 0xEFFFFFFC, 0xEFFFFFFD  # inodes of the first namespaces, fixed in the kernel


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

    def as_json(self) -> Json:
        return {
            "name": self.name,
            "state": self.state,
            "detail": self.detail,
            "remedy": self.remedy,
            "needed-for": self.needed_for,
            **self.facts,
        }

    def complaint(self) -> str | None:
        """None when it is there, else one line with the remedy."""
        if self:
            return None
        return f"{self.name}: {self.detail or self.state}" + (f" (remedy: {self.remedy})" if self.remedy else "")


# ---- remedies


def _as_root(command: str) -> str:
    return command if os.geteuid() == 0 else f"sudo {command}"


def _device_remedy(device: str, module: str) -> str:
    if os.path.exists(device):
        # Root that may not open it is held by the container's device list.
        return f"docker run --device {device} ..." if os.geteuid() == 0 else f"sudo chmod o+rw {device}"
    if container() is not None:
        return f"docker run --device {device} ..."
    return _as_root(f"modprobe {module}") if module else "a kernel from 6.1 with CONFIG_USERFAULTFD=y"


def _netns_remedy() -> str:
    if os.geteuid() != 0:
        return f"sudo {shlex.join(sys.argv)}"
    if container() is not None:
        return "docker run --cap-add SYS_ADMIN --cap-add NET_ADMIN ..."
    return "a kernel with CONFIG_NET_NS=y"


# ---- trials, by the child


def try_in_child(names: Iterable[str], deadline_s: float = TRIAL_DEADLINE_S) -> dict[str, Json]:
    """The raw answers of trials (`_probe_child.TRIALS`): ``state`` and ``facts`` or ``reason``.

    Blocks, for at most `deadline_s` and `REAP_DEADLINE_S` for each trial that hangs, and a start of a Python beside.
    """
    left = list(names)
    answers: dict[str, Json] = {}
    while left:
        done, stuck, why = _run_child(left, deadline_s)
        answers.update(done)
        if stuck is None and not done:
            stuck = left[0]  # it has not even begun: do not start it for ever
        if stuck is not None:
            answers[stuck] = {"state": "unknown", "reason": why}
        left = [name for name in left if name not in answers]
    return answers


def _run_child(names: list[str], deadline_s: float) -> tuple[dict[str, Json], str | None, str]:
    """What was answered; the trial in which the child ended before its time; how."""
    with open(os.memfd_create("postcopy-probe"), "rb") as stdout:
        # A file, no pipe: whatever a child that cannot be killed still holds open must not hold us up. In memory: a
        # container's file system may be read-only as a whole.
        pid = _start_child(names, stdout.fileno())
        # Trials have no deadlines of their own: healthy ones together stay far below that of a single one.
        status = _wait(pid, deadline_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # also what it has left behind
        if status is None:
            why = f"no answer within {deadline_s:g} s"
            _wait(pid, REAP_DEADLINE_S)
        else:
            why = f"the trial died ({signal.Signals(-status).name if status < 0 else f'status {status}'})"
        lines = os.pread(stdout.fileno(), os.fstat(stdout.fileno()).st_size, 0).decode(errors="replace").splitlines()
    answers: dict[str, Json] = {}
    begun = None
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line of a killed child
            answer = json.loads(line)
            if "begin" in answer:
                begun = answer["begin"]
            else:
                answers[answer["name"]] = answer
    return answers, begun if begun is not None and begun not in answers else None, why


def _start_child(names: list[str], stdout: int) -> int:
    """A child in a session of its own; its pid, still to be waited for."""
    code = "import sys; from postcopy.testbed import _probe_child as c; c.run(sys.argv[2:], int(sys.argv[1]))"
    argv = python("-c", code, str(os.getpid()), *names)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    redirections = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, stdout, 1), (os.POSIX_SPAWN_DUP2, null, 2)]
    try:
        return os.posix_spawn(sys.executable, argv, os.environ, file_actions=redirections, setsid=True)
    except OSError:
        # An interpreter that this user may not execute (it had more rights once), or that is embedded.
        return _fork_child(names, null, stdout)
    finally:
        os.close(null)


def _fork_child(names: list[str], null: int, stdout: int) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            for fd, name in ((null, 0), (stdout, 1), (null, 2)):
                os.dup2(fd, name)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - what was buffered in the old one is the parent's
            _probe_child.run(names, parent)
        finally:
            os._exit(1)
    return pid


def _wait(pid: int, deadline_s: float) -> int | None:
    """How the child ended, negative for a signal; None when it had not at the deadline."""
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(deadline_s * 1000):
            return None
    finally:
        os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@dataclass(frozen=True)
class _Trial:
    """What is said of a trial's answer."""

    needed_for: str
    remedy: Callable[[], str]
    yes: str = ""


_FOR_POSTCOPY = "postcopy: the destination's memory"


def _uffd_remedy() -> str:
    if os.path.exists("/dev/userfaultfd") or container() is not None:
        return _device_remedy("/dev/userfaultfd", "")
    return _as_root("sysctl -w vm.unprivileged_userfaultfd=1")


def _newer(version: str) -> Callable[[], str]:
    return lambda: f"a kernel from {version}"


def _constant(text: str) -> Callable[[], str]:
    return lambda: text


def _huge_remedy() -> str:
    return _as_root("sysctl -w vm.nr_hugepages=64")


def _memory_remedy(kind: str, mode: str) -> Callable[[], str]:
    if kind == "anon" and mode == "minor":
        return _constant("none: anonymous memory has no page cache; use --backing memfd")

    def remedy() -> str:
        if not uffd_user():
            return _uffd_remedy()
        return _huge_remedy() if kind == "hugetlb" else f"a kernel from {'5.14' if mode == 'minor' else '5.19'}"

    return remedy


_MODE_USES = {
    "missing": "a page that has not arrived",
    "minor": "placing pages by UFFDIO_CONTINUE, without a copy",
    "wp": "write-protected memory (dirty tracking)",
}

_TRIALS: dict[str, _Trial] = {
    **{
        f"{kind}-{mode}": _Trial(f"--backing {kind}: {use}", _memory_remedy(kind, mode), "a page was served")
        for kind in ("anon", "memfd", "hugetlb")
        for mode, use in _MODE_USES.items()
    },
    "kernel-faults": _Trial("--machine kvm; O_DIRECT into memory", _uffd_remedy, "a fault of write(2) was served"),
    "uffd-poison": _Trial("pages that can never come", _newer("6.6"), "a poisoned page gives EFAULT"),
    "uffd-move": _Trial("nothing yet: pages moved without a copy", _newer("6.8"), "a page was moved"),
    "kvm": _Trial("--machine kvm", lambda: _device_remedy("/dev/kvm", "kvm")),
    "soft-dirty": _Trial("nothing yet: dirty tracking", _constant("a kernel with CONFIG_MEM_SOFT_DIRTY=y")),
    "pagemap-scan": _Trial("nothing yet: dirty tracking by WP_ASYNC", _newer("6.7"), "a write was seen"),
    "netns": _Trial("postcopy lab, and demo --lab", _netns_remedy),
    "user-netns": _Trial("the same without root", lambda: _as_root("sysctl -w user.max_user_namespaces=10000")),
    "netem": _Trial("networks with delay and loss", lambda: _as_root("modprobe sch_netem")),
    "tbf": _Trial("networks with a rate", lambda: _as_root("modprobe sch_tbf")),
    "htb": _Trial("networks with shared rates", lambda: _as_root("modprobe sch_htb")),
    "tun": _Trial("the network device of a machine", lambda: _as_root("modprobe tun"), "can be opened"),
    "io-uring": _Trial("a dozen rows of postcopy faultpaths", lambda: _as_root("sysctl -w kernel.io_uring_disabled=0")),
    "ktls": _Trial("nothing yet: TLS of data channels in the kernel", lambda: _as_root("modprobe tls")),
    "holes": _Trial("sparse images and dumps", _constant("export TMPDIR=/dev/shm")),
    "ipv6": _Trial("addresses of IPv6", lambda: _as_root("sysctl -w net.ipv6.conf.lo.disable_ipv6=0")),
}  # fmt: skip


def _judge(name: str, answer: Json) -> Finding:
    trial = _TRIALS[name]
    state: State = answer["state"]
    facts = answer.get("facts", {})
    if name in _probe_child.QDISCS and state == "unknown" and "tc" in answer["reason"]:
        return Finding(name, state, answer["reason"], _as_root("apt-get install iproute2"), trial.needed_for)
    if name == "kvm" and state == "yes":
        facts = {**facts, "hardware": _probe_child.cpu_virtualization()}
        return Finding(name, state, f"API {facts['api-version']}, a VM was made; {_KVM_IS[facts['hardware']]}", "",
                       trial.needed_for, facts)  # fmt: skip
    if state == "yes":
        return Finding(name, state, trial.yes, "", trial.needed_for, facts)
    return Finding(name, state, answer["reason"], trial.remedy(), trial.needed_for, facts)


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
        return Finding(name, "no", f"{_HOW[how][0]}: {os.strerror(-result)}", _HOW[how][1](), needed_for)
    facts = _api_facts(UffdApi(How(answer.how), UffdFeature(answer.features), int(answer.ioctls)))
    return Finding(name, "yes", f"opened: {facts['how']}", "", needed_for, facts)


def _api_facts(api: UffdApi) -> Json:
    return {
        "how": api.how.name.lower().replace("_", "-"),
        "features": feature_names(api.features),
        "ioctls": _probe_child.ioctl_names(api.ioctls),
    }


def _user_only_remedy() -> str:
    if container() is not None:
        return "docker run --security-opt seccomp=docker/seccomp-userfaultfd.json ..."
    return "a kernel from 5.11 with CONFIG_USERFAULTFD=y"


_HOW: dict[How, tuple[str, Callable[[], str]]] = {
    How.DEVICE: ("/dev/userfaultfd", lambda: _device_remedy("/dev/userfaultfd", "")),
    How.SYSCALL: ("userfaultfd(2)", lambda: _as_root("sysctl -w vm.unprivileged_userfaultfd=1")),
    How.USER_ONLY: ("userfaultfd(2), UFFD_USER_MODE_ONLY", _user_only_remedy),
    How.ANY: ("any userfaultfd", _uffd_remedy),
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
    return Finding("uffd", "no", reason, _uffd_remedy(), "--machine kvm")


def uffd_user() -> Finding:
    """At least one for faults of user code."""
    return _open_uffd("uffd-user", How.ANY, _FOR_POSTCOPY)


def _feature(name: str, flag: UffdFeature, needed_for: str, version: str) -> Finding:
    any_way = uffd_user()
    if not any_way:
        return Finding(name, "unknown", any_way.detail, any_way.remedy, needed_for)
    if flag.name in any_way.facts["features"]:
        return Finding(name, "yes", "a feature bit", "", needed_for)
    return Finding(name, "no", f"this kernel's userfaultfd has no {flag.name}", f"a kernel from {version}", needed_for)


def _root() -> Finding:
    if os.geteuid() == 0:
        return Finding("root", "yes", "user 0")
    return Finding(
        "root", "no", f"not root: user {os.geteuid()}", f"sudo {shlex.join(sys.argv)}", "tests with networks"
    )


def _change_user() -> Finding:
    lacking = [name for bit, name in ((6, "CAP_SETGID"), (7, "CAP_SETUID")) if not _held_capabilities() >> bit & 1]
    if os.geteuid() == 0 and not lacking:
        return Finding("change-user", "yes", "user 0 with CAP_SETUID and CAP_SETGID", "", "--user")
    if os.geteuid() != 0:
        return Finding("change-user", "no", f"user {os.geteuid()}", f"sudo {shlex.join(sys.argv)}", "--user")
    detail = f"user 0 without {' and '.join(lacking)}"
    return Finding("change-user", "no", detail, "docker run --cap-add SETUID --cap-add SETGID ...", "--user")


def _held_capabilities() -> int:
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _hugetlb() -> Finding:
    uses = "--backing hugetlb"
    pool = {}
    for line in _read("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name in ("HugePages_Total", "HugePages_Free", "HugePages_Rsvd", "Hugepagesize"):
            pool[name] = int(value.split()[0])
    if "HugePages_Free" not in pool:
        return Finding("hugetlb", "no", "this kernel has no huge pages", "a kernel with CONFIG_HUGETLBFS=y", uses)
    free, size = pool["HugePages_Free"] - pool.get("HugePages_Rsvd", 0), pool.get("Hugepagesize", 0) * 1024
    facts = {"total-pages": pool.get("HugePages_Total", 0), "free-pages": free, "page-bytes": size}
    text = f"{free} of {facts['total-pages']} pages of {format_size(size)} are free"
    return Finding("hugetlb", "yes" if free > 0 else "no", text, "" if free > 0 else _huge_remedy(), uses, facts)


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
    return [*CHEAP, *_TRIALS, *ALIASES]


@functools.cache
def find(name: str) -> Finding:
    """One finding, tried now and then remembered for this process. `ConfigurationError` for a name that is none."""
    name = ALIASES.get(name, name)
    if name in CHEAP:
        return CHEAP[name]()
    if name not in _TRIALS:
        raise ConfigurationError(f"probe: there is no {name!r} to ask for; there are {', '.join(names())}")
    return _judge(name, try_in_child([name])[name])


def find_all() -> list[Finding]:
    """Every finding, tried afresh."""
    answers = try_in_child(_TRIALS)
    return [*(ask() for ask in CHEAP.values()), *(_judge(name, answers[name]) for name in _TRIALS)]


# ---- what the host is


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").replace("\0", "\n").strip()
    except OSError:
        return ""


def container() -> str | None:
    """In what kind of container this process is, None for none that shows."""
    for path, kind in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if os.path.exists(path):
            return kind
    for line in _read("/proc/1/environ").splitlines():
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
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        here = root / path.lstrip("/")
        for directory in (here, *here.parents):
            if (text := _read(str(directory / name))).isdigit():
                limits.append(int(text))
            if directory == root:
                break
    # Version 1 writes "no limit" as the largest number of pages.
    return min((limit for limit in limits if limit < 1 << 60), default=None)


def system() -> Json:
    """Kernel, user, limits and settings, as `--json` has them. Reads files, tries nothing."""
    status = dict(line.split(":", 1) for line in _read("/proc/self/status").splitlines() if ":" in line)
    held = _held_capabilities()
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)

    def limit(value: int) -> int | None:
        return None if value == resource.RLIM_INFINITY else value

    def sysctl(name: str) -> int | None:
        text = _read("/proc/sys/" + name.replace(".", "/"))
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
    _, bracket, rest = _read(path).partition("[")
    return rest.partition("]")[0] if bracket else None


def uses(findings: Iterable[Finding]) -> list[Json]:
    """What each use of postcopy needs, and whether that is here (`_needs.USES`)."""
    seen = {finding.name: bool(finding) for finding in findings}
    return [{"name": use.name, "needs": use.needs, "here": use.here(seen)} for use in _needs.USES]


def migrations(findings: Iterable[Finding]) -> dict[str, bool]:
    """What can be a destination here: `image` needs pages served to user code, `kvm` those of the kernel as well."""
    seen = {finding.name: bool(finding) for finding in findings}
    image = seen["uffd-user"] and (seen["memfd-missing"] or seen["anon-missing"])
    return {"image": image, "kvm": image and seen["kernel-faults"] and seen["kvm"]}


# ---- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `postcopy probe`."""
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--require", default=None, metavar="NAME,...",
        help="try these only; exit status 1, with one line, when one is missing; see docs/probe.md for the names",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """0 when some way of migrating works here, and all that is required; 1 otherwise. `ResourceError` for what is
    required and missing, `ConfigurationError` for a name that is none."""
    if args.require is not None:
        return _require(args.require.replace(",", " ").split(), args.json)
    findings = find_all()
    ways = migrations(findings)
    if args.json:
        _emit(
            {
                **system(),
                "migrations": ways,
                "uses": uses(findings),
                "findings": [finding.as_json() for finding in findings],
            }
        )
    else:
        _print(findings, ways)
    return 0 if any(ways.values()) else 1


def _emit(answer: Json) -> None:
    try:
        print(json.dumps(answer), flush=True)
    except BrokenPipeError:
        # Nobody reads it; the status says it too. What is left in the buffer must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _require(wanted: list[str], as_json: bool) -> int:
    if not wanted:
        raise ConfigurationError(f"--require needs names; there are {', '.join(names())}")
    if unknown := [name for name in wanted if name not in names()]:
        raise ConfigurationError(f"--require: there is no {unknown[0]!r}; there are {', '.join(names())}")
    findings = [find(name) for name in wanted]
    if as_json:
        _emit({"findings": [finding.as_json() for finding in findings]})
    missing = [complaint for finding in findings if (complaint := finding.complaint())]
    if missing:
        raise ResourceError("; ".join(missing))
    return 0


_MARKS = {"yes": "[green]yes[/green]", "no": "[red]no[/red]", "unknown": "[yellow]unknown[/yellow]"}


def _print(findings: list[Finding], ways: dict[str, bool]) -> None:
    # Wide when it goes to a file: a remedy that is broken into lines cannot be copied.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    about = _grid()
    for name, value in system().items():
        about.add_row(name, escape(_plain(value)))
    opened = next((finding for finding in findings if finding.name == "uffd-user" and finding), None)
    if opened is not None:
        about.add_row("uffd features", ", ".join(opened.facts["features"]))
        about.add_row("uffd ioctls", ", ".join(opened.facts["ioctls"]))
    table = _grid()
    for finding in findings:
        table.add_row(finding.name, _MARKS[finding.state], escape(finding.detail))
    remedies = _grid()
    for finding in findings:
        if not finding:
            remedies.add_row(finding.name, escape(finding.remedy), escape(finding.needed_for))
    needs = _grid()
    for use in uses(findings):
        needs.add_row(_MARKS["yes" if use["here"] else "no"], escape(use["name"]), escape(use["needs"]))
    works = ", ".join(name for name, works in ways.items() if works) or "none"
    try:
        console.print(about, "", table, sep="\n")
        if remedies.row_count:
            console.print("\nWhat is missing, what would give it, and what needs it:", remedies, sep="\n")
        console.print("\nWhat each use needs, and whether it is here:", needs, sep="\n")
        console.print(f"\nmigrations that work here: {works}")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _grid() -> Table:
    return Table.grid(padding=(0, 2))


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={'?' if item is None else item}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "none" if value is None else str(value)
