# SPDX-License-Identifier: Apache-2.0
"""The probe tells what it tried, survives what hangs, leaves nothing behind, and needs no rights."""

from __future__ import annotations

import contextlib
import errno
import grp
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lines import parse_report

from postcopy._files import explain_no_access
from postcopy._host import container
from postcopy.cli import main
from postcopy.errors import ConfigurationError
from postcopy.testbed import probe
from postcopy.testbed.probe import Finding, _findings, _host, _needs, _supervise, _trials, migrations
from postcopy.testbed.probe._needs import Use
from postcopy.uffd import RegisterMode

pytestmark = pytest.mark.slow

NOBODY = 65534


def everything(user: int | None = None) -> dict[str, Any]:
    """All findings by name, and what is left of the search; as another user, in this process, if so."""
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    fds = set(os.listdir("/proc/self/fd"))
    namespaces = os.readlink("/proc/self/ns/net"), os.readlink("/proc/self/ns/user")
    findings = probe.find_all()
    try:
        children = os.waitpid(-1, os.WNOHANG) and True
    except ChildProcessError:
        children = False
    return {
        "findings": {finding.name: finding for finding in findings},
        "left-fds": len(set(os.listdir("/proc/self/fd")) - fds),
        "left-children": children,
        "left-threads": threading.active_count() - 1,
        "moved": (os.readlink("/proc/self/ns/net"), os.readlink("/proc/self/ns/user")) != namespaces,
    }


def test_it_answers_everything_and_leaves_nothing(run_in_child: Callable[..., Any]) -> None:
    seen = run_in_child(everything, deadline_s=90).value
    findings: dict[str, Finding] = seen.pop("findings")
    assert seen == {"left-fds": 0, "left-children": False, "left-threads": 0, "moved": False}
    assert set(findings) == set(probe.names()) - _findings.ALIASES.keys()
    for finding in findings.values():
        assert finding.state in ("yes", "no", "unknown")
        assert finding.needed_for or finding.name == "root"
        if finding:
            assert not finding.remedy
        else:
            assert finding.remedy
            assert finding.detail
            assert "\n" not in (finding.complaint() or "")


@pytest.mark.needs("uffd", "root")
def test_a_root_that_may_have_a_userfaultfd_is_served(run_in_child: Callable[..., Any]) -> None:
    findings = run_in_child(everything, deadline_s=90).value["findings"]
    for name in ("uffd-user", "anon-missing", "memfd-missing", "kernel-faults", "anon-wp"):
        assert findings[name], findings[name]
    assert findings["anon-minor"].state == "no"
    assert "COPY" in findings["anon-missing"].facts["ioctls"]


@pytest.mark.needs("root")
def test_without_rights_it_says_what_rights_would_help(run_in_child: Callable[..., Any]) -> None:
    seen = run_in_child(everything, NOBODY, deadline_s=90).value
    findings: dict[str, Finding] = seen.pop("findings")
    assert seen == {"left-fds": 0, "left-children": False, "left-threads": 0, "moved": False}
    assert findings["root"].state == "no"
    assert findings["netns"].state == "no"
    for name in ("root", "netns"):
        assert findings[name].remedy.startswith("docker run --user 0 " if container() else "sudo ")
    for name, device in (("kvm", "/dev/kvm"), ("uffd-device", "/dev/userfaultfd"), ("tun", "/dev/net/tun")):
        if os.path.exists(device) and not findings[name]:
            assert "EACCES" in findings[name].detail or "Permission denied" in findings[name].detail
            assert "modprobe" not in findings[name].remedy  # the device is there
            assert ("chmod" in findings[name].remedy) == (name == "tun")
    if os.path.exists("/dev/kvm") and not findings["kvm"]:
        assert "udev rule" in findings["kvm"].remedy or "usermod" in findings["kvm"].remedy
        assert findings["kvm"].remedy.endswith("or use --machine rv64")
    if not findings["uffd"]:
        assert not findings["kernel-faults"]
        assert "/dev/userfaultfd" in findings["uffd"].detail
    if findings["uffd-user-only"] and not findings["uffd"]:
        assert findings["uffd-user"].facts["how"] == "user-only"
        assert findings["memfd-missing"], "faults of user code need no right"
        assert migrations(findings.values()) == {"image": True, "rv64": True, "kvm": False}


def _sleep() -> dict[str, Any]:
    time.sleep(3600)
    return {}


def _die() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def try_bad_ones() -> tuple[dict[str, Any], float]:
    sys.executable = "/nonexistent"  # forked then, with the trials below
    _trials.TRIALS.clear()
    bad = {"first": lambda: {"a": 1}, "hangs": _sleep, "dies": _die, "last": lambda: {"b": 2}}
    _trials.TRIALS.update({name: _trials.Trial(trial, "", str) for name, trial in bad.items()})
    began = time.monotonic()
    return _supervise.try_in_child(list(_trials.TRIALS), deadline_s=3), time.monotonic() - began


def test_a_trial_that_hangs_or_dies_costs_its_own_answer_only(run_in_child: Callable[..., Any]) -> None:
    answers, _ = run_in_child(try_bad_ones).value  # it returned at all: within the child's deadline
    assert answers["first"]["facts"] == {"a": 1}
    assert answers["hangs"] == {"state": "unknown", "reason": "no answer within 3 s", "errno": 0}
    assert answers["dies"] == {"state": "unknown", "reason": "the trial died (SIGKILL)", "errno": 0}
    assert answers["last"]["facts"] == {"b": 2}


def give_up_a_page() -> int:
    access = None
    with contextlib.suppress(_trials.Lacking), _trials._watched("anon", RegisterMode.MISSING) as page:
        access = _trials._Access(page.address)
        page.fault()
        raise _trials.Lacking
    assert access is not None
    return access.done()


@pytest.mark.needs("uffd-user")
def test_a_trial_that_gives_up_does_not_kill_the_others(run_in_child: Callable[..., Any]) -> None:
    done = run_in_child(give_up_a_page)
    assert done.value == 0, done.stderr  # its thread went on, with a page of zeros


def test_a_child_that_cannot_begin_is_not_started_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[list[str]] = []

    def run(names: list[str], deadline_s: float) -> tuple[dict[str, Any], str | None, str]:
        starts.append(list(names))
        return {}, None, "the trial died (status 1)"

    monkeypatch.setattr(_supervise, "_run_child", run)
    answers = _supervise.try_in_child(["netns", "ipv6"])
    assert starts == [["netns", "ipv6"], ["ipv6"]]
    assert {answer["state"] for answer in answers.values()} == {"unknown"}


def test_bits_of_a_newer_kernel_keep_their_number() -> None:
    assert _findings.feature_names(1 << 14 | 1 << 40) == ["POISON", "bit 40"]
    assert _trials.ioctl_names(1 << 3 | 1 << 50 | 1 << 63) == ["COPY", "bit 50", "API"]


@pytest.mark.parametrize(
    ("there", "image", "kvm"),
    [
        ("uffd-user memfd-missing kernel-faults kvm", True, True),
        ("uffd-user memfd-missing kernel-faults", True, False),
        ("uffd-user anon-missing kvm", True, False),
        ("uffd-user kvm kernel-faults", False, False),
        ("memfd-missing anon-missing kvm kernel-faults", False, False),
    ],
)
def test_what_a_migration_needs(there: str, image: bool, kvm: bool) -> None:
    every = ("uffd-user", "memfd-missing", "anon-missing", "kernel-faults", "kvm")
    findings = [Finding(name, "yes" if name in there.split() else "no") for name in every]
    assert migrations(findings) == {"image": image, "rv64": image, "kvm": kvm}


def fake(monkeypatch: pytest.MonkeyPatch, findings: dict[str, Finding]) -> None:
    monkeypatch.setattr(probe, "find", lambda name: findings[name])
    monkeypatch.setattr(probe, "find_all", lambda: list(findings.values()))


NEEDED = ("uffd-user", "memfd-missing", "anon-missing", "kernel-faults", "kvm")


@pytest.mark.parametrize(("state", "status"), [("yes", 0), ("no", 1), ("unknown", 1)])
def test_the_status_tells_whether_any_migration_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: Any, status: int
) -> None:
    facts = {"features": ["MOVE"], "ioctls": ["API"]}
    fake(monkeypatch, {name: Finding(name, state, "why [not]", "do [this]", "uses", facts) for name in NEEDED})
    assert main(["probe"]) == status
    text = capsys.readouterr().out
    assert "memfd-missing" in text
    assert "why [not]" in text
    assert ("do [this]" in text) == (state != "yes")
    assert main(["probe", "--json"]) == status
    answer = parse_report(capsys.readouterr().out)
    assert answer["receivable"] == dict.fromkeys(("image", "rv64", "kvm"), state == "yes")
    assert answer["kernel"] == os.uname().release
    assert [finding["name"] for finding in answer["findings"]] == list(NEEDED)


def test_what_is_required_and_missing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, {"kvm": Finding("kvm", "no", "/dev/kvm: no", "modprobe kvm"), "root": Finding("root", "yes")})
    assert main(["probe", "--require", "root"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["probe", "--require", "root,kvm"]) == 1
    assert capsys.readouterr().err == "postcopy: error: kvm: /dev/kvm: no (remedy: modprobe kvm)\n"
    assert main(["probe", "--require", "warp-drive"]) == 2
    assert "'warp-drive'" in capsys.readouterr().err
    assert main(["probe", "--require", " , "]) == 2


def test_find_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ConfigurationError, match="warp-drive"):
        probe.find("warp-drive")


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"/proc/self/cgroup": "0::/a/b", "/sys/fs/cgroup/a/b/memory.max": "max"}, None),
        (
            {
                "/proc/self/cgroup": "0::/a/b",
                "/sys/fs/cgroup/a/b/memory.max": "8192",
                "/sys/fs/cgroup/a/memory.max": "4096",
            },
            4096,
        ),
        ({"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/memory.max": "4096"}, 4096),
        (
            {
                "/proc/self/cgroup": "5:cpu:/x\n4:memory:/x",
                "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "65536",
            },
            65536,
        ),
        ({}, None),
    ],
)
def test_the_smallest_limit_on_the_way_up(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], limit: int | None
) -> None:
    monkeypatch.setattr(_host, "read", lambda path: files.get(path, ""))
    assert _host._cgroup_limit_bytes() == limit


def test_a_qdisc_that_nobody_could_try_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(user: bool) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(_trials, "_new_network", refuse)
    finding = _findings._judge("tbf", _trials._attempt(_trials.TRIALS["tbf"].run))
    assert finding.state == "unknown"
    assert "no network of its own" in finding.detail


def test_huge_pages_that_are_reserved_are_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "HugePages_Total: 4\nHugePages_Free: 2\nHugePages_Rsvd: 2\nHugepagesize: 2048 kB\n"
    monkeypatch.setattr(_findings, "read", lambda path: text)
    finding = _findings._hugetlb()
    assert finding.state == "no"
    assert finding.facts == {"total-pages": 4, "free-pages": 0, "page-bytes": 2 << 20}


def test_what_is_needed_is_what_the_docs_say() -> None:
    rows = [f"| {use.name} | {use.needs} |" for use in _needs.USES]
    text = Path(__file__).parents[3].joinpath("docs", "privileges.md").read_text()
    assert "\n".join(rows) in text
    for use in _needs.USES:
        assert set(use.findings) <= set(probe.names())


def test_what_is_needed_is_here_when_each_finding_is() -> None:
    use = Use("a", "b", ("kvm", "uffd"))
    assert use.here({"kvm": True, "uffd": True, "root": False})
    assert not use.here({"kvm": True, "uffd": False, "root": True})
    assert not Use("a", "b", (), other=lambda: False).here({})


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    ("bounding", "state", "detail"),
    [
        ("+all", "yes", "user 0 with"),
        ("-setuid", "no", "without CAP_SETUID"),
        ("-all", "no", "CAP_SETGID and CAP_SETUID"),
    ],
)
def test_changing_the_user_needs_two_capabilities(
    run_in_child: Callable[..., Any], bounding: str, state: str, detail: str
) -> None:
    code = "from postcopy.testbed import probe; found = probe.find('change-user'); print(found.state, found.detail)"
    command = ["setpriv", f"--bounding-set={bounding}", "--inh-caps=-all", sys.executable, "-P", "-c", code]
    done = run_in_child(command)
    assert done.stdout.startswith(state), done.stderr
    assert detail in done.stdout


# ---- remedies, as the user who must follow them reads them


@pytest.fixture
def open_path() -> Iterator[Path]:
    """Which other users see, as they do not see `tmp_path`."""
    with tempfile.TemporaryDirectory() as path:
        os.chmod(path, 0o755)
        yield Path(path)


def device_node(path: Path, owner: int, group: int, mode: int) -> str:
    path.touch()
    os.chown(path, owner, group)
    path.chmod(mode)
    return str(path)


def explain_as_nobody(device: str, groups: list[int]) -> tuple[str, str]:
    os.setgroups(groups)
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    return explain_no_access(device)


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    ("group", "mode", "why", "remedy"),
    [
        (0, 0o600, "is root:root 0600", "install the udev rule"),
        (0, 0o660, "is root:root 0660", "install the udev rule"),
        (grp.getgrnam("disk").gr_gid, 0o660, "is root:disk 0660", "usermod -a -G disk nobody"),
        (54321, 0o660, "is root:54321 0660", "docker run --group-add 54321 ..."),
    ],
)
def test_what_an_ordinary_user_is_told_about_a_device(
    run_in_child: Callable[..., Any], open_path: Path, group: int, mode: int, why: str, remedy: str
) -> None:
    device = device_node(open_path / "device", 0, group, mode)
    said = run_in_child(explain_as_nobody, device, []).value
    assert said[0] == f"{device} {why}"
    assert said[1].startswith(remedy)


def test_a_device_that_root_may_not_open_is_kept_by_a_container_or_a_unit(tmp_path: Path) -> None:
    device = device_node(tmp_path / "device", os.geteuid(), os.getegid(), 0o600)
    why, remedy = explain_no_access(device)
    assert why == f"{device} is not among the devices of this container or unit"
    assert f"--device {device}" in remedy
    assert f"DeviceAllow={device} rw" in remedy


@pytest.mark.parametrize(
    ("name", "number", "files", "remedy"),
    [
        ("user-netns", errno.ENOSPC, {"/proc/sys/user/max_user_namespaces": "0"}, "user.max_user_namespaces=10000"),
        (
            "user-netns",
            errno.EPERM,
            {"/proc/sys/user/max_user_namespaces": "99", "/proc/sys/kernel/unprivileged_userns_clone": "0"},
            "kernel.unprivileged_userns_clone=1",
        ),
        (
            "user-netns",
            errno.EACCES,
            {"/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1"},
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        ("user-netns", errno.EINVAL, {}, "a kernel with CONFIG_USER_NS=y and CONFIG_NET_NS=y"),
        ("io-uring", errno.EPERM, {"/proc/sys/kernel/io_uring_disabled": "2"}, "kernel.io_uring_disabled=0"),
        ("io-uring", errno.EPERM, {"/proc/sys/kernel/io_uring_disabled": "0"}, "seccomp=unconfined"),
        ("io-uring", errno.ENOSYS, {}, "CONFIG_IO_URING=y"),
        ("netem", 0, {}, "CONFIG_NET_SCH_NETEM"),
        (
            "netem",
            0,
            {f"/lib/modules/{os.uname().release}/modules.dep": "kernel/net/sched/sch_netem.ko.xz:"},
            "modprobe sch_netem",
        ),
        ("tbf", errno.ENOSPC, {"/proc/sys/user/max_user_namespaces": "0"}, "user.max_user_namespaces=10000"),
        ("ipv6", errno.EAFNOSUPPORT, {}, "a kernel with IPv6"),
        ("ipv6", errno.EADDRNOTAVAIL, {}, "disable_ipv6=0"),
        ("uffd-poison", errno.EOPNOTSUPP, {}, "Linux 6.6 or newer"),
    ],
)
def test_the_remedy_follows_from_what_was_met(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, files: dict[str, str], remedy: str
) -> None:
    monkeypatch.setattr(_host, "read", lambda path: files.get(path, ""))
    monkeypatch.setattr(_host, "in_container", lambda: False)
    assert remedy in _trials.TRIALS[name].remedy(number)


@pytest.mark.parametrize(
    ("flag", "file", "remedy"),
    [
        ("vmx", "kernel/arch/x86/kvm/kvm-intel.ko.zst:", "modprobe kvm_intel"),
        ("svm", "kernel/arch/x86/kvm/kvm-amd.ko:", "modprobe kvm_amd"),
        ("svm", "", "a kernel with CONFIG_KVM_AMD"),
        ("sse", "", "switch virtualization on in the firmware"),
    ],
)
@pytest.mark.parametrize("there", [False, True])  # without a driver a node answers ENODEV
def test_the_module_of_a_device_is_named(
    monkeypatch: pytest.MonkeyPatch, flag: str, file: str, remedy: str, there: bool
) -> None:
    files = {"/proc/cpuinfo": f"flags : fpu {flag}", f"/lib/modules/{os.uname().release}/modules.dep": file}
    monkeypatch.setattr(_host, "read", lambda path: files.get(path, ""))
    monkeypatch.setattr(_host, "in_container", lambda: False)
    monkeypatch.setattr(os.path, "exists", lambda path: there)
    assert remedy in _host.kvm_remedy(errno.ENODEV if there else errno.ENOENT)


@pytest.mark.needs("root")
def test_a_container_is_told_what_its_host_can_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_host, "in_container", lambda: True)
    # Its own groups, udev, root and files are of no use.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    of_root = _host.device_remedy(device_node(tmp_path / "a", 0, 0, 0o600), errno.EACCES)
    assert of_root.startswith("on the host: install the udev rule 60-postcopy.rules, then docker run --group-add")
    of_disk = _host.device_remedy(device_node(tmp_path / "b", 0, grp.getgrnam("disk").gr_gid, 0o660), errno.EACCES)
    assert of_disk.startswith(f"docker run --group-add {grp.getgrnam('disk').gr_gid} ...")
    assert _host.device_remedy(str(tmp_path / "c"), errno.ENOENT).startswith("docker run --device ")
    assert _host.again_as_root() == "docker run --user 0 ..."
    assert _host.netns_remedy(errno.EPERM).startswith("docker run --user 0 --cap-add SYS_ADMIN")
    assert "seccomp=docker/seccomp-userfaultfd.json" in _host.user_only_remedy(errno.EPERM)


@pytest.mark.needs("root")
def test_a_kernel_that_refuses_user_namespaces_is_told_from_one_without_netem(run_in_child: Callable[..., Any]) -> None:
    # (a user namespace with no room for another one, where this user is no root)
    code = (
        "import os, json; from postcopy.testbed import _linux; _linux.new_user()\n"
        "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
        "open('/proc/sys/user/max_net_namespaces', 'w').write('0')\n"
        "from postcopy.testbed import probe\n"
        "print(json.dumps({name: vars(probe.find(name)) for name in ('netns', 'user-netns', 'netem')}))"
    )
    done = run_in_child([sys.executable, "-P", "-c", code])
    said = json.loads(done.stdout)
    assert "max_net_namespaces=10000" in said["netns"]["remedy"]
    assert "max_user_namespaces=10000" in said["user-netns"]["remedy"]
    assert said["netem"]["state"] == "unknown"
    assert "namespaces=10000" in said["netem"]["remedy"]


@pytest.mark.parametrize("columns", ["80", "100"])
def test_the_report_fits_the_terminal(run_in_child: Callable[..., Any], columns: str) -> None:
    done = run_in_child(["env", f"COLUMNS={columns}", sys.executable, "-m", "postcopy", "probe"], deadline_s=90)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert "Machines that can be received here: " in lines[-1]
    words = set(done.stdout.split())
    for use in _needs.USES:  # no word is broken
        assert set(use.needs.split()) <= words
