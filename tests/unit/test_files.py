# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all, and what is not replaced."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

import pytest

from postcopy import _files
from postcopy._files import (
    check_new_file,
    explain_bad_name,
    new_directory,
    open_regular,
    read_regular,
    replacing,
    write_all,
    write_new,
    write_output,
)
from postcopy.errors import ConfigurationError, ResourceError


def _write(path: Path, data: bytes = b"new") -> None:
    with replacing(str(path)) as fd:
        write_all(fd, data)


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    _write(path, b"old")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with contextlib.suppress(RuntimeError), replacing(str(path)) as fd:
        write_all(fd, b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    _write(path)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_links_lead_nowhere(tmp_path: Path) -> None:
    """Neither one laid where the file under way might be, nor one in place of the file."""
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_bytes(b"precious")
    for suffix in (".part", ".tmp", ".new"):
        (tmp_path / f"file{suffix}").symlink_to(victim)
    _write(path)
    path.unlink()
    path.symlink_to(victim)
    with pytest.raises(ConfigurationError, match="symbolic link"):
        _write(path)
    with pytest.raises(ConfigurationError, match="symbolic link"):
        check_new_file("--dump", str(path))
    assert victim.read_bytes() == b"precious"


def test_what_is_not_replaced(tmp_path: Path) -> None:
    fifo, device = tmp_path / "fifo", tmp_path / "device"
    os.mkfifo(fifo)
    kinds = [(fifo, "a FIFO"), (tmp_path, "a directory")]
    if os.geteuid() == 0:
        # One of our own: were this test to fail with the system's, nobody would have a /dev/null any more.
        os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        kinds.append((device, "a device"))
    for path, what in kinds:
        before = path.lstat()
        with pytest.raises(ConfigurationError, match=what):
            check_new_file("--dump", str(path))
        with pytest.raises(ConfigurationError, match=what):
            _write(path)
        assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert not list(tmp_path.glob("*.part"))


def test_checked_at_the_start(tmp_path: Path) -> None:
    check_new_file("--dump", str(tmp_path / "file"))
    assert not list(tmp_path.iterdir())
    check_new_file("--dump", str(tmp_path / ("x" * 255)))
    _write(tmp_path / ("x" * 255))
    with pytest.raises(ConfigurationError, match=r"directory .* does not exist"):
        check_new_file("--dump", str(tmp_path / "no" / "file"))
    with pytest.raises(ConfigurationError, match=r"cannot write into|no right"):
        check_new_file("--dump", "/proc/file")


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 256, "x/" * 3000, "\ud800"])
def test_names_that_are_none(path: str) -> None:
    assert explain_bad_name(path)
    with pytest.raises(ConfigurationError, match="--dump"):
        check_new_file("--dump", path)


def test_names_that_could_be(tmp_path: Path) -> None:
    for path in ("x" * 255, "/", ".", "a/b", "\udcff", "-"):
        assert not explain_bad_name(path)


def test_an_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_output("--hdr", str(tmp_path / "log"), "before")

    def write_to_a_full_disk(fd: int, data: bytes) -> None:
        os.write(fd, data[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_files, "write_all", write_to_a_full_disk)
    with pytest.raises(ResourceError, match=r"--hdr .*log: cannot write into .*: No space left"):
        write_output("--hdr", str(tmp_path / "log"), "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("log", "before")]


def test_directories(tmp_path: Path) -> None:
    path = tmp_path / "directory"
    with new_directory(str(path)) as part:
        with write_new(part / "file") as fd:
            write_all(fd, b"content")
        with pytest.raises(FileExistsError), write_new(part / "file"):
            pass
        assert not path.exists()
    assert (path / "file").read_bytes() == b"content"
    with pytest.raises(FileExistsError), new_directory(str(path)) as part:
        pass
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileExistsError), new_directory(str(tmp_path / "empty")) as part:
        pass
    with pytest.raises(RuntimeError), new_directory(str(tmp_path / "other")) as part:
        raise RuntimeError
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["directory", "empty"]


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_regular(tmp_path / "file", 4)
