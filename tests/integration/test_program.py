# SPDX-License-Identifier: Apache-2.0
"""examples/arena.c, a program that is no virtual machine and checks its own memory, is moved while it computes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
DEADLINE_S = 60.0
_LINE = re.compile(r"^nonce ([0-9a-f]+) step (\d+) errors (\d+)$", re.MULTILINE)

pytestmark = [
    pytest.mark.needs("uffd"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: apt install gcc"),
]


class Arena:
    def __init__(self, child: Any, socket: Path) -> None:
        self.child = child
        self.socket = socket

    def lines(self) -> list[tuple[str, int, int]]:
        return [(nonce, int(step), int(errors)) for nonce, step, errors in _LINE.findall(self.child.output())]

    def wait(self, what: str, found: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not found():
            assert time.monotonic() < deadline, f"no {what}:\n{self.child.output()}{self.child.errors()}"
            time.sleep(0.01)

    def wait_lines(self, more: int) -> tuple[str, int, int]:
        """So many more lines than there are; the last one of them."""
        wanted = len(self.lines()) + more
        self.wait(f"{wanted} lines", lambda: len(self.lines()) >= wanted)
        return self.lines()[-1]


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arena") / "arena"
    subprocess.run(["cc", "-O2", "-o", path, EXAMPLES / "arena.c"], check=True, timeout=60)
    return path


@pytest.fixture
def arena(binary: Path, spawn_child: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Arena]]:
    """``arena("a")``: started, and its file mapped; ``lazy``: as a destination."""
    files = []

    def start(name: str, *, lazy: bool = False, mib: int = 8) -> Arena:
        files.append(Path(f"/dev/shm/test-arena-{os.getpid()}-{name}"))
        if lazy:  # what it had in its file before is thrown away, and not seen
            files[-1].write_bytes(b"another one's content..." * (1 << 15))
        command = [sys.executable, "-P", "-m", "postcopy", "run", *["--lazy"] * lazy, "--socket", tmp_path / name, "--"]
        started = Arena(spawn_child([*map(str, command), str(binary), str(files[-1]), str(mib)]), tmp_path / name)
        started.wait("mapping", lambda: "mapped" in started.child.output())
        return started

    yield start
    for file in files:
        file.unlink(missing_ok=True)


Sides = tuple[Any, Any]


def sides_of(side: Callable[..., Any], one: Arena, other: Arena, *options: str) -> Sides:
    """The commands that move one to the place of another."""
    dest = side("dest", "--json", "--machine", "program", "--preload", other.socket, "--listen", "127.0.0.1:0")
    machine = ("--machine", "program", "--preload", one.socket)
    return side("source", "--json", *machine, "--connect", dest.address, *options), dest


def test_it_is_moved_while_it_computes(arena: Callable[..., Arena], side: Callable[..., Any]) -> None:
    """There with precopy, and on."""
    places = [arena("a"), arena("b", lazy=True), arena("c", lazy=True)]
    nonce, before, _ = places[0].wait_lines(1)
    for one, other, options in zip(places, places[1:], (["--precopy", "auto"], []), strict=False):
        assert not other.lines()
        for one_side in sides_of(side, one, other, *options):
            status, result, errors = one_side.end()
            assert status == 0, errors
            assert result["status"] == "completed"
        one.wait("end", lambda one=one: one.child.process.poll() is not None)  # type: ignore[misc]
        step = before
        while step <= before:
            found, step, wrong = other.wait_lines(1)
            assert (found, wrong) == (nonce, 0)
        before = step


def test_it_runs_on_where_it_is_when_it_cannot_be_moved(arena: Callable[..., Arena], side: Callable[..., Any]) -> None:
    one, smaller = arena("a"), arena("b", lazy=True, mib=4)
    source, _ = sides_of(side, one, smaller)
    status, _, errors = source.end()
    assert status == 1
    assert "both must map the same" in errors
    assert one.wait_lines(1)[2] == 0
    assert smaller.child.process.poll() is None  # it can be used for another one


def test_the_example() -> None:
    postcopy = Path(sys.executable).with_name("postcopy")
    done = subprocess.run(
        ["sh", EXAMPLES / "arena_move.sh", "8"],
        env={**os.environ, "POSTCOPY": str(postcopy)}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    there, here = (_LINE.search(line.partition(": ")[2].strip()) for line in done.stdout.splitlines())
    assert there is not None
    assert here is not None
    assert there[1] == here[1]
    assert here[3] == "0"
