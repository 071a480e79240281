# SPDX-License-Identifier: Apache-2.0
"""A page of the documentation, typed as a new user would: every `sh` block, in its order, in one shell, in one
directory.

The shell runs a line when the one before has ended, or, where it began something with ``&``, has come as far as a
reader would wait for: its socket is there.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sessions import end_session

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0


def typed(page: str) -> list[str]:
    """Line by line, of docs/`page`; one that ends with a backslash goes on in the next one. What is typed on two hosts
    is not for here."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    lines = re.split(r"(?<!\\)\n", "".join(textwrap.dedent(block) for block in blocks))
    return [line for line in lines if line.strip() and not line.startswith(("#", "host-"))]


class Shell:
    """A bash whose commands are typed; what it says is in the file `output`. `programs`: commands that it has, too."""

    def __init__(self, directory: Path, programs: Mapping[str, str] | None = None) -> None:
        tools = directory / "bin"
        tools.mkdir()
        ours = {"postcopy": f"{sys.executable} -m postcopy", "python": sys.executable}
        for name, command in {**ours, **(programs or {})}.items():
            (tools / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (tools / name).chmod(0o755)
        (directory / "examples").symlink_to(ROOT / "examples")
        self.directory = directory
        self.output = directory / "output"
        self._typed = 0
        with self.output.open("wb") as stream:
            self._bash = subprocess.Popen(
                ["bash", "--norc", "--noprofile"],
                cwd=directory,
                env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"},
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def type(self, line: str) -> None:
        """Until it has ended with status 0, and what it began serves."""
        before = self.output.stat().st_size
        self._typed += 1
        assert self._bash.stdin is not None
        self._bash.stdin.write(f"{line}\necho done-{self._typed}-$?\n".encode())
        self._bash.stdin.flush()
        self.until(line, lambda: f"done-{self._typed}-" in self.said())
        assert f"done-{self._typed}-0\n" in self.said(), self.said()[before:]
        if socket := re.search(r"(?:--api-sock|--socket|-qmp) (?:unix:)?([^ ,]+).*&$", line):
            self.until(line, (self.directory / socket[1]).is_socket)

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def until(self, what: str, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not true():
            assert self._bash.poll() is None, f"{what}: the shell has ended: {self.said()}"
            assert "postcopy: " not in self.said(), self.said()
            assert time.monotonic() < deadline, f"{what}: {self.said()}"
            time.sleep(0.01)

    def lines(self, log: str) -> list[str]:
        """Of the guest, in this file."""
        return re.findall(
            r"^guest: pass=\d+ errors=\d+", (self.directory / log).read_text(errors="replace"), re.MULTILINE
        )

    def leave(self) -> None:
        """What it has begun ends in order, as a pager has to: what its keeper runs is no child of this shell."""
        assert self._bash.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._bash.stdin as stdin:
            stdin.write(b"kill $(jobs -p); wait\n")
        try:
            self._bash.wait(DEADLINE_S)
        finally:
            end_session(self._bash)
