# SPDX-License-Identifier: Apache-2.0
"""A process that runs a VM belongs to one machine of this package at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from postcopy.errors import BusyError, MigrationError, ResourceError
from postcopy.machines._claim import claim

NOBODY = 65534


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_it_belongs_to_one_at_a_time(process: subprocess.Popen[bytes]) -> None:
    for _ in range(2):
        with claim(process.pid, "Some VMM"):
            with pytest.raises(BusyError, match=rf"Some VMM \(process {process.pid}\) belongs to another postcopy"):
                claim(process.pid, "Some VMM")
            claim(os.getpid(), "Another VMM").close()


def test_a_process_that_has_ended_cannot_be_claimed(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    with pytest.raises(MigrationError, match="has ended"):
        claim(process.pid, "Some VMM")


def _claim_as_nobody(pid: int) -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    with pytest.raises(ResourceError, match="run as the user of that Some VMM, or as root"):
        claim(pid, "Some VMM")


@pytest.mark.needs("root")
def test_another_user_cannot_hold_it(process: subprocess.Popen[bytes], run_in_child: Callable[..., None]) -> None:
    run_in_child(_claim_as_nobody, process.pid)
