# SPDX-License-Identifier: Apache-2.0
"""A program that maps files in memory, under the preload library, and does what it is told."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from postcopy.machines.preload.client import VARIABLE
from postcopy.machines.preload.start import environment

PAGE = 4096
_PROGRAM = """
import mmap, os, sys, threading
maps, fds = [], {}
for name, size, offset in eval(sys.argv[1]):
    if name not in fds:  # else it is mapped once more
        fds[name] = os.memfd_create(name)
        os.ftruncate(fds[name], size)
    maps.append(mmap.mmap(fds[name], size - offset, offset=offset))
print("mapped", flush=True)
for line in sys.stdin:
    word, *numbers = line.split()
    if word == "write":
        number, page, value = [int(one) for one in numbers]
        maps[number][page * 4096:(page + 1) * 4096] = bytes([value]) * 4096
        print("written", flush=True)
    elif word == "read":
        number, page = [int(one) for one in numbers]
        print(maps[number][page * 4096 + 7], flush=True)
    elif word == "threads":
        def spin():
            while True:
                maps[0][8] = (maps[0][8] + 1) % 256
        for _ in range(int(numbers[0])):
            threading.Thread(target=spin, daemon=True).start()
        print("started", flush=True)
"""


class Program:
    def __init__(self, process: subprocess.Popen[str], socket: str) -> None:
        self.process = process
        self.pid = process.pid
        self.socket = socket

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        self.tell(line)
        return self.answer()


@contextlib.contextmanager
def program(
    directory: Path, name: str, maps: Sequence[tuple[str, int, int]] = (("arena", 16 * PAGE, 0),), *, lazy: bool = False
) -> Iterator[Program]:
    """`maps`: name of the memfd, size, and the offset from which it is mapped. Killed at the end."""
    socket = str(directory / f"{name}.sock")
    with environment(socket, lazy=lazy) as variables:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _PROGRAM, repr(list(maps))],
            env=variables,
            pass_fds=[int(variables[f"{VARIABLE}_UFFD"])] if f"{VARIABLE}_UFFD" in variables else (),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    with process:
        try:
            found = Program(process, socket)
            assert found.answer() == "mapped"
            yield found
        finally:
            process.kill()


def threads_run(pid: int) -> bool:
    """Whether any thread of a process is not stopped."""
    states = [
        Path(f"/proc/{pid}/task/{task}/stat").read_text().rpartition(")")[2].split()[0]
        for task in os.listdir(f"/proc/{pid}/task")
    ]
    return any(state not in "Tt" for state in states)
