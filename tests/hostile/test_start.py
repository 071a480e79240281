# SPDX-License-Identifier: Apache-2.0
"""What lies around where the program is started, and where it is asked to write."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from hostile._peer import Machine, Source
from hostile._program import RV64, Program

Start = Callable[..., Program]


@pytest.fixture
def hostile_directory(tmp_path: Path) -> Path:
    """Foreign modules under names that the program imports: each leaves a mark when it is run."""
    directory = tmp_path / "here"
    directory.mkdir()
    mark = f"open({str(tmp_path / 'mark')!r}, 'a').write(__name__ + '\\n')\nraise SystemExit(99)\n"
    for name in (
        "select",
        "socket",
        "json",
        "logging",
        "selectors",
        "random",
        "trio",
        "msgpack",
        "cffi",
        "_cffi_backend",
        "sitecustomize",
        "usercustomize",
        "array",
        "multiprocessing",
        "postcopy/__init__",
        "postcopy/_pager_child",
    ):
        path = directory / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(mark)
    return directory


@pytest.mark.parametrize("pager", ["thread", "process"])
def test_a_directory_full_of_modules(start: Start, hostile_directory: Path, tmp_path: Path, pager: str) -> None:
    dest = start("dest", "--json", "--listen", "127.0.0.1:0", "--pager", pager, "--run-for", "0", cwd=hostile_directory)
    source = start("source", "--json", *RV64, "--connect", dest.where, cwd=hostile_directory)
    assert dest.end() == 0, dest.tail()
    assert source.end() == 0, source.tail()
    assert not (tmp_path / "mark").exists(), (tmp_path / "mark").read_text()


@pytest.mark.parametrize(
    "line",
    [
        ("demo", *RV64, "--run-for", "0", "--migrate-after", "0"),
        ("probe",),
        ("faultpaths", "--list"),
        ("--version",),
    ],
    ids=lambda line: line[0],
)
def test_commands_in_a_directory_full_of_modules(
    start: Start, hostile_directory: Path, tmp_path: Path, line: tuple[str, ...]
) -> None:
    program = start(*line, cwd=hostile_directory)
    status = program.end()
    assert not (tmp_path / "mark").exists(), (tmp_path / "mark").read_text()
    assert status in (0, 1), program.tail()
    assert "postcopy._native" not in program.errors()


def test_pager_process_in_a_source_checkout(start: Start, tmp_path: Path) -> None:
    """There `postcopy` is a directory without the extension."""
    (tmp_path / "postcopy").mkdir()
    (tmp_path / "postcopy" / "__init__.py").touch()
    dest = start("dest", "--json", "--listen", "127.0.0.1:0", "--pager", "process", "--run-for", "0", cwd=tmp_path)
    source = start("source", "--json", *RV64, "--connect", dest.where, cwd=tmp_path)
    assert dest.end() == 0, dest.tail()
    assert source.end() == 0


# ---- Where it writes


def received(start: Start, version: int, target: Path, *more: object) -> Program:
    """A destination that is given a whole image, with ``--dump target``."""
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0", "--dump", target, *more)
    try:
        address = dest.address
    except AssertionError:  # refused, as it may be
        return dest
    Source(address, Machine.image(1 << 20), version).until("running").finish()
    return dest


def test_dump_does_not_follow_a_link(start: Start, version: int, tmp_path: Path) -> None:
    """Another user who may write in the directory has guessed the name of the unfinished file."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    target = tmp_path / "copy"
    for name in ("copy.part", ".copy.part"):
        (tmp_path / name).symlink_to(victim)
    dest = received(start, version, target)
    status = dest.end()
    assert victim.read_bytes() == b"precious"
    assert status in (0, 1, 2)
    if status == 0:
        assert not target.is_symlink()
        assert target.stat().st_size == 1 << 20


@pytest.mark.parametrize("kind", ["fifo", "device", "link to a device"])
def test_dump_to_what_is_no_file(
    start: Start, version: int, tmp_path: Path, node: Callable[[str, int], Path], kind: str
) -> None:
    """A node like /dev/null, and a FIFO: written to or refused, but there afterwards as before."""
    target = tmp_path / "target"
    if kind == "fifo":
        os.mkfifo(target)
    else:
        place = node("target" if kind == "device" else "null", 3)
        if kind != "device":
            target.symlink_to(place)
    before = os.lstat(target)
    dest = received(start, version, target)
    assert dest.end(30) in (0, 1, 2), dest.tail()
    after = os.lstat(target)
    assert (before.st_ino, stat.S_IFMT(before.st_mode)) == (after.st_ino, stat.S_IFMT(after.st_mode))
    if kind != "fifo":
        assert stat.S_ISCHR(os.stat(target).st_mode)


def test_stale_salvage(start: Start, version: int, tmp_path: Path) -> None:
    """What an earlier process has left does not make the salvage fail when it is needed."""
    stale = tmp_path / "s.part"
    stale.mkdir()
    (stale / "manifest.json").write_text("{}")
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0", "--salvage", tmp_path / "s")
    try:
        address = dest.address
    except AssertionError:
        assert dest.end() == 2
        assert dest.errors().count("\n") == 1
        return
    source = Source(address, Machine.image(1 << 20), version).until("running")
    source.lose()
    dest.wait_status("postcopy-paused")
    dest.signal(15)
    assert dest.end() == 1
    assert (tmp_path / "s" / "manifest.json").exists()


def test_salvage_where_nothing_can_be_made(start: Start) -> None:
    """Found out at once, and not when the machine is lost."""
    dest = start("dest", "--json", "--listen", "127.0.0.1:0", "--salvage", "/proc/postcopy-salvage")
    assert dest.end() in (1, 2)


LONG = "/tmp/" + "x" * 300
USELESS = [
    (("dest", "--listen", "127.0.0.1:0", "--dump", ""), "--dump"),
    (("dest", "--listen", "127.0.0.1:0", "--salvage", ""), "--salvage"),
    (("dest", "--listen", "127.0.0.1:0", "--control", ""), "--control"),
    (("dest", "--listen", "127.0.0.1:0", "--control", LONG), "--control"),
    (("dest", "--listen", "127.0.0.1:0", "--dump", LONG), "--dump"),
    (("dest", "--listen", "127.0.0.1:0", "--metrics-file", ""), "--metrics-file"),
    (("dest", "--listen", "127.0.0.1:0", "--metrics", ""), ""),
    (("daemon", "--control", ""), "--control"),
    (("daemon", "--control", LONG), "--control"),
    (("source", "--machine", "image", "--image", "", "--listen", "127.0.0.1:0"), "--image"),
    (("source", "--machine", "rv64", "--disk", "", "--workload", "disk", "--listen", "127.0.0.1:0"), ""),
    (("dest", "--listen", "127.0.0.1:0", "--user", ""), ""),
    (("dest", "--peer-file", ""), "--peer-file"),
    (("ctl", "--control", "", "status"), ""),
    (("ctl", "--control", LONG, "status"), ""),
    (("merge", "", "--output", "/tmp/never"), ""),
]


@pytest.mark.parametrize(("line", "named"), USELESS, ids=[" ".join(line)[:60] for line, _ in USELESS])
def test_useless_arguments(start: Start, line: tuple[str, ...], named: str) -> None:
    """Refused at once, in one line, and not when it is too late."""
    program = start(*line)
    assert program.end() in (1, 2), program.tail()
    said = program.errors().splitlines()
    assert len(said) == 1, program.errors()
    assert said[0].startswith("postcopy: error: ")
    assert named in said[0]


DAMAGED = {
    "nothing": b"",
    "no JSON": b"\x00\xff",
    "a list": b"[]",
    "a number": b"7",
    "an empty object": b"{}",
    "deep": b"[" * 100_000,
    "null everywhere": b'{"version": null, "blocks": null, "side": null, "migration": null}',
    "blocks of nothing": b'{"version": 1, "side": "dest", "migration": "00", "machine": "image", "blocks": [{}]}',
    "huge numbers": b'{"version": 1e999, "side": "dest", "blocks": [{"size-bytes": 99999999999999999999999}]}',
}


@pytest.mark.parametrize("what", DAMAGED)
def test_merge_of_damaged_manifests(start: Start, tmp_path: Path, what: str) -> None:
    salvage = tmp_path / "s"
    salvage.mkdir()
    (salvage / "manifest.json").write_bytes(DAMAGED[what])
    merge = start("merge", salvage, "--output", tmp_path / "out")
    assert merge.end(30) in (1, 2)
    assert merge.errors().startswith("postcopy: error: "), merge.tail()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["manifest.json", "output", "directory"])
def test_merge_does_not_hang_on_a_fifo(start: Start, tmp_path: Path, what: str) -> None:
    salvage, output = tmp_path / "s", tmp_path / "out"
    if what == "directory":
        os.mkfifo(salvage)
    else:
        salvage.mkdir()
        if what == "manifest.json":
            os.mkfifo(salvage / "manifest.json")
        else:
            (salvage / "manifest.json").write_text("{}")
            os.mkfifo(output)
    assert start("merge", salvage, "--output", output).end() in (1, 2)


@pytest.mark.parametrize("what", ["--image", "--peer-file"])
def test_fifos_as_inputs(start: Start, tmp_path: Path, what: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    line = (
        ("source", "--machine", "image", "--image", tmp_path / "fifo", "--listen", "127.0.0.1:0")
        if what == "--image"
        else ("dest", "--peer-file", tmp_path / "fifo")
    )
    assert start(*line).end() == 2
