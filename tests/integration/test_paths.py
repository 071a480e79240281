# SPDX-License-Identifier: Apache-2.0
"""Paths that a user gives: what cannot be used is one line, before anything else has begun."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

AS_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
POSTCOPY = [sys.executable, "-m", "postcopy"]
RV64 = "source --machine rv64 --listen 127.0.0.1:0"
DEST = "dest --listen 127.0.0.1:0"
LINES = [
    (f"{DEST} --salvage", "this user may not write into"),
    (f"{DEST} --dump", "this user may not write into"),
    (f"{DEST} --metrics-file", "this user may not write into"),
    (f"{DEST} --control", "this user may not write into"),
    (f"{DEST} --disk", "Permission denied"),
    ("dest --peer-file", "Permission denied"),
    ("source --machine image --listen 127.0.0.1:0 --image", "Permission denied"),
    (f"{RV64} --workload disk --disk", "Permission denied"),
    (f"{RV64} --salvage", "this user may not write into"),
    (f"{RV64} --control", "this user may not write into"),
    (f"{RV64} --metrics-file", "this user may not write into"),
    ("source --machine rv64 --peer-file", "Permission denied"),
    ("source --listen 127.0.0.1:0 --from", "Permission denied"),
    ("daemon --control", "this user may not write into"),
    ("daemon --control SOCKET --metrics-file", "this user may not write into"),
    ("daemon --control SOCKET --disk", "Permission denied"),
]


@pytest.fixture
def locked() -> Iterator[Path]:
    """A directory of root's, as /root is."""
    with tempfile.TemporaryDirectory(prefix="postcopy-locked-") as directory:
        os.chmod(directory, 0o700)
        yield Path(directory)


def _complains(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("postcopy: error: ")
    for word in words:
        assert word in done.stderr


@pytest.mark.needs("root")
@pytest.mark.parametrize(("line", "reason"), LINES, ids=[line for line, _ in LINES])
def test_directory_of_another_user(readable_package: list[str], locked: Path, line: str, reason: str) -> None:
    """As an ordinary user."""
    words = [str(Path(tempfile.gettempdir(), "postcopy-no-socket")) if one == "SOCKET" else one for one in line.split()]
    command = [*AS_NOBODY, *readable_package, "-m", "postcopy", *words, str(locked / "x.prom")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/", check=False)
    _complains(done, 2, reason, str(locked))


@pytest.mark.parametrize(("line", "reason"), LINES, ids=[line for line, _ in LINES])
def test_directory_that_does_not_exist(tmp_path: Path, line: str, reason: str) -> None:
    missing = tmp_path / "missing"
    words = [str(tmp_path / "socket") if one == "SOCKET" else one for one in line.split()]
    command = [*POSTCOPY, *words, str(missing / "x.prom")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    made = reason.startswith("this user") or (line.endswith("--disk") and not line.startswith("source"))
    why = "does not exist" if "--from" in line else "No such file"
    _complains(done, 2, f"directory {missing} does not exist" if made else why, str(missing))


@pytest.mark.parametrize(
    "line",
    [
        f"{DEST} --salvage x",
        f"{DEST} --dump x",
        f"{DEST} --metrics-file x.prom",
        f"{DEST} --control x",
        f"{DEST} --disk x",
        f"{RV64} --workload disk --disk x",
        "source --machine rv64 --hold --control x",
        "merge a --output b",
        "merge a --into b",
    ],
)
def test_current_directory_that_is_gone(tmp_path: Path, line: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    command = ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", *POSTCOPY, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=here, check=False)
    _complains(done, 2, "the current directory is gone")


class TestDefaultControlSocket:
    """That of an ordinary user (root's is in /run)."""

    @pytest.fixture
    def runtime(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="postcopy-runtime-") as directory:
            os.chown(directory, 65534, 65534)
            yield Path(directory)

    @pytest.fixture
    def start(self, readable_package: list[str], runtime: Path, spawn_child: Callable[..., Any]) -> Callable[..., Any]:
        """A command of the user's that runs, or that has ended."""

        def start(*arguments: str) -> Any:
            environment = ["env", f"XDG_RUNTIME_DIR={runtime}"]
            return spawn_child([*environment, *AS_NOBODY, *readable_package, "-m", "postcopy", *arguments])

        return start

    @pytest.mark.needs("root")
    def test_it_is_made_for_its_user_alone(self, start: Callable[..., Any], runtime: Path) -> None:
        daemon = start("daemon", "--listen", "127.0.0.1:0")
        socket = runtime / "postcopy" / "control.sock"
        told = start("ctl", "status").wait(60)
        while told.returncode:
            assert daemon.process.poll() is None, daemon.errors()
            told = start("ctl", "status").wait(60)
        assert "daemon" in told.stdout
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        second = start("source", "--hold", "--machine", "rv64").wait(60)
        assert second.returncode == 1
        assert "a running process has this socket" in second.stderr
        assert "choose another path" in second.stderr
        assert start("ctl", "quit").wait(60).returncode == 0
        assert daemon.wait(60).returncode == 0
        assert not socket.exists()

    @pytest.mark.needs("root")
    @pytest.mark.parametrize("what", ["link", "writable", "another user's", "no directory"])
    def test_what_somebody_else_could_have_made(self, start: Callable[..., Any], runtime: Path, what: str) -> None:
        directory = runtime / "postcopy"
        if what == "link":
            (runtime / "elsewhere").mkdir()
            os.chown(runtime / "elsewhere", 65534, 65534)
            directory.symlink_to("elsewhere")
        elif what == "no directory":
            directory.touch()
        else:
            directory.mkdir()
            if what == "writable":
                os.chown(directory, 65534, 65534)
                directory.chmod(0o777)
        done = start("daemon").wait(60)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1
        assert f"{directory}" in done.stderr
        reason = {"writable": "can be written to by others", "another user's": "belongs to user 0"}
        assert reason.get(what, "is not a directory") in done.stderr
        assert "--control PATH" in done.stderr
