# SPDX-License-Identifier: Apache-2.0
"""``--user``: from root to an ordinary user, with the devices, and with nothing else."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NOBODY = 65534
GROUP = 65012  # of no account
Start = Callable[..., Any]


def status_of(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}


def assert_nothing_left(pid: int, uid: int, gid: int, groups: set[int]) -> None:
    """Of every thread: user and groups are what was asked for, and no capability is held or can be had again."""
    checked = set()
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            status = status_of(int(task))
        except (FileNotFoundError, ProcessLookupError):  # a thread that has ended since
            continue
        checked.add(int(task))
        assert status["Uid"] == [str(uid)] * 4
        assert status["Gid"] == [str(gid)] * 4
        assert set(map(int, status["Groups"])) == groups
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[name][0], 16) == 0, name
        assert status["NoNewPrivs"] == ["1"]
    assert pid in checked


def fails(command: list[str], *arguments: str) -> str:
    """Standard error of a source that is asked for wrongly: one line, status 2."""
    done = subprocess.run(
        [*command, "-m", "postcopy", "source", "--machine", "rv64", "--connect", "127.0.0.1:1", *arguments],
        capture_output=True, text=True, timeout=60, check=False, cwd="/",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.needs("root", "uffd-device", "kvm")
@pytest.mark.parametrize(("backing", "pager"), [("memfd", "thread"), ("anon", "thread"), ("memfd", "process")])
def test_migration_between_ordinary_users(side: Start, readable_package: list[str], backing: str, pager: str) -> None:
    """Several machines' worth of descriptors come from devices that the user could not open."""
    command = [*readable_package, "-m", "postcopy"]
    user = f"nobody:{GROUP}"
    arguments = ("--backing", backing, "--user", user)
    received = ("--run-for", "0.3", "--pager", pager)
    dest = side("dest", "--json", "--listen", "127.0.0.1:0", *received, *arguments, command=command)
    address = dest.address  # it listens: from now on anybody may send it bytes
    assert_nothing_left(dest.pid, NOBODY, GROUP, {GROUP})
    kvm = ("--machine", "kvm", "--memory", "32MiB", "--vcpus", "2", "--workload", "random", "--used-memory", "16MiB")
    source = side("source", "--json", *kvm, "--migrate-after", "0.2", "--connect", address, *arguments, command=command)
    source.wait_status("active")
    assert_nothing_left(source.pid, NOBODY, GROUP, {GROUP})
    dest.wait_status("postcopy-active")
    assert_nothing_left(dest.pid, NOBODY, GROUP, {GROUP})
    status, result, errors = dest.end()
    assert status == 0, errors
    assert (result["status"], result["verified"]) == ("completed", True)
    assert source.end()[0] == 0


@pytest.mark.needs("root", "uffd-user")
def test_output_belongs_to_the_user(side: Start, readable_package: list[str], tmp_path: Path) -> None:
    command = [*readable_package, "-m", "postcopy"]
    image = tmp_path / "image"
    image.write_bytes(os.urandom(1 << 20))
    source = side("source", "--json", "--machine", "image", "--image", image, "--listen", "127.0.0.1:0")
    # In a directory where the user may: pytest's own are root's alone.
    place = next(Path(word.partition("=")[2]) for word in readable_package if word.startswith("TMPDIR="))
    copy = place / "copy"
    dest = side("dest", "--json", "--connect", source.address, "--dump", copy, "--user", "nobody", command=command)
    status, _, errors = dest.end()
    assert status == 0, errors
    assert copy.read_bytes() == image.read_bytes()
    assert copy.stat().st_uid == NOBODY
    dest = side(
        "dest", "--json", "--connect", "127.0.0.1:1", "--dump", tmp_path / "x", "--user", "nobody", command=command
    )
    status, _, errors = dest.end()
    assert status == 2
    assert "--dump" in errors


@pytest.mark.needs("root")
def test_account_decides_the_groups(side: Start, readable_package: list[str]) -> None:
    account = pwd.getpwuid(NOBODY)
    groups = set(os.getgrouplist(account.pw_name, account.pw_gid))
    for text in (account.pw_name, str(NOBODY)):
        dest = side(
            "dest", "--json", "--listen", "127.0.0.1:0", "--user", text, command=[*readable_package, "-m", "postcopy"]
        )
        assert dest.address
        assert_nothing_left(dest.pid, NOBODY, account.pw_gid, groups)


@pytest.mark.needs("root")
def test_unknown_users_and_groups(readable_package: list[str]) -> None:
    assert "there is no user 'nosuch'" in fails(readable_package, "--user", "nosuch")
    assert "there is no group 'nosuch'" in fails(readable_package, "--user", "nobody:nosuch")
    assert "has no account here: write 65013:GROUP" in fails(readable_package, "--user", "65013")
    for text in ("", "nobody:", ":nogroup"):
        assert "write NAME or NAME:GROUP" in fails(readable_package, "--user", text)
    for text in ("root", "0", "0:0"):
        assert "would give up nothing" in fails(readable_package, "--user", text)
    with pytest.raises(KeyError):
        grp.getgrgid(GROUP)  # else the other tests show less than they seem to


@pytest.mark.needs("root")
def test_who_may_not_change_the_user(readable_package: list[str]) -> None:
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv: install util-linux")
    nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    assert "only root can become another user" in fails([*nobody, *readable_package], "--user", "nobody")
    weak = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]  # as in a container with --cap-drop ALL
    assert "--cap-add SETUID --cap-add SETGID" in fails([*weak, *readable_package], "--user", "nobody")
    enough = ["setpriv", "--bounding-set=-all,+setuid,+setgid"]
    done = subprocess.run(
        [*enough, *readable_package, "-c", _BECOME], capture_output=True, text=True, timeout=60, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    status = dict(line.split(":\t", 1) for line in done.stdout.splitlines() if ":\t" in line)
    assert (int(status["CapEff"], 16), int(status["CapPrm"], 16), status["NoNewPrivs"]) == (0, 0, "1")


_BECOME = """
from postcopy.service.privileges import become, find_user
become(find_user("nobody"))
print(open("/proc/self/status").read())
"""

_DEATH = """
import ctypes
from postcopy.service.privileges import become, find_user
prctl = ctypes.CDLL(None).prctl
prctl(1, 9, 0, 0, 0)
become(find_user("nobody"))
number = ctypes.c_int()
prctl(2, ctypes.byref(number), 0, 0, 0)
print(number.value, prctl(3, 0, 0, 0, 0))
open("/proc/self/pagemap", "rb").close()
"""


@pytest.mark.needs("root")
def test_death_signal_and_own_page_tables_are_kept(readable_package: list[str]) -> None:
    done = subprocess.run(
        [*readable_package, "-c", _DEATH], capture_output=True, text=True, timeout=60, check=False, cwd="/"
    )
    assert (done.returncode, done.stdout) == (0, "9 1\n"), done.stderr
