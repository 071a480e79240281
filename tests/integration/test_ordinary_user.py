# SPDX-License-Identifier: Apache-2.0
"""A migration by a user who has no rights at all: no capability, no group, no /dev/kvm, no /dev/userfaultfd.

The user is nobody (65534), who can read little: see the fixture `readable_package`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from lines import parse_line, parse_report

NOBODY = 65534
AS_NOBODY = (
    "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all",
    "--no-new-privs",
)  # fmt: skip


@pytest.fixture
def package(readable_package: list[str]) -> list[str]:
    """The start of a command that runs python with the package as nobody."""
    return [*AS_NOBODY, *readable_package]


def rights(command: list[str]) -> dict[str, Any]:
    code = (
        "import json, os; from postcopy.uffd import probe; "
        "print(json.dumps({'uid': os.getuid(), 'groups': os.getgroups(), 'how': probe().how.name,"
        " 'caps': [l.split()[1] for l in open('/proc/self/status') if l.startswith('Cap')]}))"
    )
    done = subprocess.run([*command, "-c", code], capture_output=True, text=True, cwd="/", timeout=60, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.needs("root", "uffd-user")
@pytest.mark.parametrize("workload", ["random", "dirty", "disk", "idle"])
def test_demo_without_any_right(package: list[str], spawn_child: Callable[..., Any], workload: str) -> None:
    found = rights(package)
    assert (found["uid"], found["groups"]) == (NOBODY, [])
    assert {int(capabilities, 16) for capabilities in found["caps"]} == {0}
    arguments = ["demo", "--json", "--memory", "32MiB", "--workload", workload]
    # So slow that the machine touches pages before they are pushed, however busy the host is.
    arguments += ["--migrate-after", "0.1", "--run-for", "0.2", "--max-bandwidth", "16MiB/s"]
    if found["how"] != "USER_ONLY":  # a host where everybody has everything: still by hand
        arguments += ["--machine", "rv64"]
    child = spawn_child([*package, "-m", "postcopy", *arguments])
    done = child.wait(100)
    result = parse_line(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert (result["status"], result["verified"]) == ("completed", True)
    assert result["kind"] == "rv64"
    if workload != "idle":  # which touches so little that the push may be faster
        assert result["ram"]["demand-pages"] > 0
    if found["how"] == "USER_ONLY":
        assert done.stderr.count("demo: --machine kvm cannot be used here") == 1


@pytest.mark.needs("root", "uffd-user", "user-netns")
def test_laboratory_without_any_right(package: list[str]) -> None:
    """The user who makes a user namespace is root in it, and may cut cables there; by hand, and in the demo."""

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [*package, "-m", "postcopy", *arguments], capture_output=True, text=True, cwd="/", timeout=100
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("lab", "up", "--rate", "100mbit")
    try:
        assert run("lab", "exec", "h1", "--", "id", "-u") == "0\n"
        assert run("lab", "exec", "h1", "--", "hostname") == "h1\n"
        assert run("lab", "exec", "h1", "--", "getent", "hosts", "h2").split()[1:] == ["h2"]
        run("lab", "link", "h1", "cut")
        status = parse_report(run("lab", "status", "--json"))["labs"][0]
        assert (status["user-namespace"], status["hosts"]["h1"]["cable"]) == ("own", "cut")
    finally:
        run("lab", "down")
    assert parse_report(run("lab", "status", "--json"))["labs"] == []
    result = parse_line(run("demo", "--lab", "--json", "--machine", "rv64", "--memory", "32MiB").splitlines()[-1])
    assert (result["status"], result["verified"]) == ("completed", True)
    assert result["recoveries"]["count"] > 0
    assert parse_report(run("lab", "status", "--json"))["labs"] == []


@pytest.mark.needs("root", "uffd-user")
def test_faultpaths_without_any_right(package: list[str], spawn_child: Callable[..., Any]) -> None:
    found = rights(package)
    child = spawn_child([*package, "-m", "postcopy", "faultpaths", "--only", "user.load,copy.write_pipe", "--json"])
    done = child.wait(100)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = {(cell["operation"], cell["mode"]): cell for cell in json.loads(done.stdout.splitlines()[1])["cells"]}
    assert cells["user.load", "user-only"]["outcome"] == "blocked"
    assert cells["copy.write_pipe", "user-only"]["error"] == "EFAULT"
    if found["how"] == "USER_ONLY":
        assert cells["user.load", "missing"]["verdict"] == "not available here"
        assert "CAP_SYS_PTRACE" in cells["user.load", "missing"]["reason"]
