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
    arguments += ["--migrate-after", "0.1", "--run-for", "0.2"]
    if found["how"] != "USER_ONLY":  # a host where everybody has everything: still by hand
        arguments += ["--machine", "rv64"]
    child = spawn_child([*package, "-m", "postcopy", *arguments])
    done = child.wait(100)
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert (result["status"], result["verified"]) == ("completed", True)
    assert result["machine"] == "rv64"
    if workload != "idle":  # which touches so little that the push may be faster
        assert result["ram"]["demand-pages"] > 0
    if found["how"] == "USER_ONLY":
        assert done.stderr.count("postcopy: --machine kvm cannot be used here") == 1
