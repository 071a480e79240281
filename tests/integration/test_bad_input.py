# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong: one line that says so, and a status that is not 0."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SOURCE = "source --machine kvm --connect 127.0.0.1:1"
CASES = [
    ("", 2, "COMMAND"),
    ("fly", 2, "invalid choice: 'fly'"),
    ("source", 2, "--machine"),
    ("source --machine kvm", 2, "--listen --connect --peer-file is required"),
    ("source --machine kvm --listen :0 --connect a:1", 2, "not allowed with"),
    ("source --machine kvm --connect localhost", 2, "it has no port"),
    ("source --machine kvm --connect ::1:7", 2, "needs brackets"),
    ("source --machine kvm --connect a:65536", 2, "at most 65535"),
    ("dest --connect 127.0.0.1:1", 1, "connection refused; start the other side first"),
    ("dest --connect nosuchhost.invalid:7", 1, "cannot be resolved"),
    ("dest --listen 192.0.2.1:7", 1, "name an address of this host"),
    ("dest --listen :0 --backing tape", 2, "invalid choice: 'tape'"),
    ("dest --listen :0 --run-for soon", 2, "not a number of seconds"),
    ("dest --listen :0 --dump /nonexistent/file", 2, "directory /nonexistent does not exist"),
    ("dest --listen :0 --dump /", 2, "that is a directory"),
    (f"{SOURCE} --memory 0", 2, "0 bytes"),
    (f"{SOURCE} --memory much", 2, "'much' is not a size"),
    (f"{SOURCE} --memory -1", 2, "--memory"),
    (f"{SOURCE} --memory 900TiB", 1, "remedy"),
    (f"{SOURCE} --memory 12345", 2, "12345"),
    (f"{SOURCE} --vcpus 0", 2, "1 to 8 vcpus"),
    (f"{SOURCE} --vcpus 9", 2, "1 to 8 vcpus"),
    (f"{SOURCE} --workload dance", 2, "invalid choice: 'dance'"),
    (f"{SOURCE} --image x", 2, "--image has no meaning"),
    (f"{SOURCE} --bulk-channels 0", 2, "from 1 to 16"),
    (f"{SOURCE} --max-bandwidth fast", 2, "'fast' is not a rate"),
    (f"{SOURCE} --serve 2", 2, "--serve goes with"),
    ("source --machine image --listen :0", 2, "needs --image FILE"),
    ("source --machine image --image /nonexistent --listen :0", 2, "No such file"),
    ("source --machine image --image / --listen :0", 2, "not a regular file"),
    ("source --machine image --image EMPTY --listen :0", 2, "empty"),
    ("source --machine image --image IMAGE --memory 1GiB --listen :0", 2, "--memory has no meaning"),
    ("demo --machine image --memory 1", 2, "at least"),
]


@pytest.mark.needs("kvm")
@pytest.mark.parametrize(("line", "status", "reason"), CASES, ids=[line or "(nothing)" for line, _, _ in CASES])
def test_one_line(run_in_child: Callable[..., Any], tmp_path: Path, line: str, status: int, reason: str) -> None:
    (tmp_path / "EMPTY").touch()
    (tmp_path / "IMAGE").write_bytes(b"x" * 10000)
    arguments = [str(tmp_path / word) if word in ("EMPTY", "IMAGE") else word for word in line.split()]
    done = run_in_child([sys.executable, "-m", "postcopy", *arguments])
    assert done.returncode == status, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("postcopy: error: ")
    assert reason in lines[0]
    assert not done.stdout


def test_version(run_in_child: Callable[..., Any]) -> None:
    done = run_in_child([sys.executable, "-m", "postcopy", "--version"])
    assert done.returncode == 0
    assert done.stdout.startswith("postcopy 0.")
