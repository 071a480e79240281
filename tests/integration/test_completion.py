# SPDX-License-Identifier: Apache-2.0
"""Completion in real shells, at a terminal: what is typed, with Tab, and what the shell then runs."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from postcopy.cli.completion import SHELLS

DEADLINE_S = 60.0

TYPED = [
    ("so\t--help", "source --help"),
    ("source --machi\tkv\t--hold", "source --machine kvm --hold"),
    ("ctl migrate-p\t--machine vm1", "ctl migrate-pause --machine vm1"),
    ("ctl --control ./s stat\t", "ctl --control ./s status"),
    ("daemon --log-level deb\t", "daemon --log-level debug"),
    ("source --machine image --image guest\t--listen :0", "source --machine image --image guest.img --listen :0"),
    ("lab li\th1 cu\t", "lab link h1 cut"),
    ("faultpaths compare gue\tb.json", "faultpaths compare guest.img b.json"),
]


class Terminal:
    """A shell at a terminal of its own."""

    def __init__(self, command: list[str], directory: Path) -> None:
        self.text = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(directory)
            path = f"{directory / 'bin'}:{os.environ['PATH']}"
            environment = {"PATH": path, "HOME": str(directory), "TERM": "xterm", "LANG": "C.UTF-8", "PS1": "ready> "}
            os.execvpe(command[0], command, environment)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.text:
            left_s = deadline - time.monotonic()
            assert left_s > 0, f"no {text!r} in {self.text!r}"
            if select.select([self._fd], [], [], left_s)[0]:
                self.text += os.read(self._fd, 65536).decode(errors="replace")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._fd)


@pytest.fixture(params=SHELLS)
def shell(
    request: pytest.FixtureRequest, tmp_path: Path, run_in_child: Callable[..., Any], require: Callable[..., None]
) -> Iterator[Terminal]:
    name = str(request.param)
    if name != "bash":
        require(name)
    script = run_in_child([sys.executable, "-m", "postcopy", "completion", name], deadline_s=DEADLINE_S)
    assert script.returncode == 0, script.stderr
    stand_in = tmp_path / "bin" / "postcopy"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\necho "got: $* ."\n')
    stand_in.chmod(0o755)
    (tmp_path / "guest.img").touch()
    saved = tmp_path / "_postcopy"
    saved.write_text(script.stdout)
    command = {
        "bash": ["bash", "--norc", "-i"],
        "zsh": ["zsh", "-f", "-i"],
        "fish": ["fish", "--no-config", "-i", "-C", "function fish_prompt; echo -n 'ready> '; end"],
    }[name]
    set_up = {
        "bash": f"source {saved}",
        "zsh": f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -D",
        "fish": f"source {saved}",
    }[name]
    terminal = Terminal(command, tmp_path)
    try:
        terminal.wait_for("ready> ")
        terminal.type(f"{set_up}; echo set up | tr s S\r")
        terminal.wait_for("Set up")
        yield terminal
    finally:
        terminal.close()


def test_what_is_typed_is_completed(shell: Terminal) -> None:
    for typed, run in TYPED:
        shell.type(f"postcopy {typed}\r")
        shell.wait_for(f"got: {run} .")
