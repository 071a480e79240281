# SPDX-License-Identifier: Apache-2.0
"""Directories of commands: of one that was killed, of one that runs, and of one that is being made."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from postcopy.testbed import _scratch
from postcopy.testbed._scratch import scratch

HOLDS = """
import sys
from postcopy.testbed._scratch import scratch
with scratch() as path:
    (path / "file").touch()
    print(path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_what_was_left_is_removed_and_what_is_in_use_is_not(tmp_path: Path) -> None:
    (tmp_path / "postcopy-scratch-file").touch()  # nobody's directory
    (tmp_path / "postcopy-scratch-link").symlink_to(tmp_path)
    command = [sys.executable, "-P", "-c", HOLDS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        held = Path(process.stdout.readline().strip())
        with scratch() as mine:
            assert held.parent.parent == mine.parent.parent == tmp_path
            assert (held / "file").exists()
        assert not mine.parent.exists()
        process.kill()
    assert (held / "file").exists()
    with scratch() as mine:
        assert not held.parent.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["postcopy-scratch-file", "postcopy-scratch-link"]


@pytest.mark.parametrize("where", ["tempfile.mkdtemp", "fcntl.flock"])
def test_one_that_is_removed_while_it_is_made_is_made_again(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making, its opening and its lock, by another command that takes it for one that was left."""
    module, name = where.split(".")
    call, removed = getattr(sys.modules[module], name), list[Path]()

    def and_another_one(*arguments: Any, **keywords: Any) -> Any:
        made = call(*arguments, **keywords) if name == "mkdtemp" else None
        if not removed:
            monkeypatch.setattr(sys.modules[module], name, call)
            removed.extend(tmp_path.iterdir())
            _scratch._remove_stale(tmp_path)
        return made if name == "mkdtemp" else call(*arguments, **keywords)

    monkeypatch.setattr(sys.modules[module], name, and_another_one)
    with scratch() as path:
        assert len(removed) == 1
        assert [path.parent] == list(tmp_path.iterdir()) != removed


def test_where_no_directory_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS: it is made all the same, and no command removes that of another one."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with scratch() as one, scratch() as other:
        assert sorted(tmp_path.iterdir()) == sorted([one.parent, other.parent])
    assert not list(tmp_path.iterdir())


def test_it_can_be_locked_by_what_is_started_there() -> None:
    """As by a daemon, which locks the directory of its control socket."""
    with scratch() as path:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(fd)


def test_without_a_descriptor_that_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tempfile` would say that no directory can be written to."""

    def refuse(*_: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match="Too many open files"), scratch():
        pass
