# SPDX-License-Identifier: Apache-2.0
"""docs/firecracker.md, typed as a new user would."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typed_page import Shell, typed

from postcopy.testbed.firecracker import find


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path, {"firecracker": find()})
    yield shell
    shell.leave()


@pytest.mark.needs("firecracker")
def test_page_as_a_new_user_types_it(shell: Shell) -> None:
    for line in typed("firecracker.md"):
        if '"Paused"' in line:  # a reader has looked into the log before
            shell.until("passes of the guest", lambda: len(shell.lines("first.log")) >= 2)
        shell.type(line)
        if "fault_message" in shell.said():
            pytest.fail(f"{line}: {shell.said()}")
    shell.until("passes of the restored guest", lambda: len(shell.lines("second.log")) >= 2)
    first, second = shell.lines("first.log"), shell.lines("second.log")
    numbers = [int(line.split("=")[1].split()[0]) for line in (*first, *second)]
    assert numbers == sorted(numbers)
    assert {line.split()[-1] for line in (*first, *second)} == {"errors=0"}
