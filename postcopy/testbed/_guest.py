# SPDX-License-Identifier: Apache-2.0
"""A VMM that runs a guest of ours, which says what it finds on the serial port: what tests ask of any."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from postcopy._files import share_file
from postcopy.errors import MigrationError, ResourceError
from postcopy.testbed._linux import die_with

WAIT_S = 60.0
_LINE = re.compile(r"^guest: (\w+)(.*)$", re.MULTILINE)
_VALUE = re.compile(r"(\w+)=(\d+)")

# A process dies with the thread that has started it (PR_SET_PDEATHSIG): one that lives as long as we do.
_starter = ThreadPoolExecutor(1, "vmm-starter")


def start_vmm(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Whatever ends this process ends it too. OSError when it cannot be started."""
    die = partial(die_with, os.getpid())
    return _starter.submit(lambda: subprocess.Popen[bytes](command, preexec_fn=die, **options)).result()


def guest_file(name: str) -> str:
    """The path of a guest of ours; `ResourceError` where this installation has none (it is for x86-64)."""
    path = share_file(name)
    if not os.path.isfile(path):
        why = f"this installation has no {name}"
        raise ResourceError(why, "install it with pip, on x86-64; it is in the prefix's share/postcopy")
    return path


@dataclass(frozen=True)
class GuestLine:
    """One line of the guest: ``ready`` once, ``pass`` after each pass, ``wrong`` and ``stale`` for the first pages that
    were not as they must be. `values`: the numbers of it, by name; those of a pass are `errors`, `stale`, `touched`,
    `ballooned`, `saved`, `loaded`, `pages`, `pass`, and in ticks of its clock `tsc`, `ticks`, `p50`, `p99`, `max`."""

    kind: str
    values: dict[str, int]


def lines_of(text: str) -> list[GuestLine]:
    """Those in `text` that are whole: what a serial port has given so far."""
    text = text[: text.rfind("\n") + 1]
    return [
        GuestLine(match[1], {name: int(value) for name, value in _VALUE.findall(match[0])})
        for match in _LINE.finditer(text)
    ]


class GuestProcess:
    """A process of a VMM, its directory, and the lines of its guest; `close`, or the end of ``with``, kills it.

    The serial port is its standard input, and its output, with all that the VMM writes itself, which is in the file
    `serial_path`; what it may log besides is in `log_path`.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes], directory: Path, owns_directory: bool) -> None:
        self._name = name
        self.process = process
        self.directory = directory
        self.serial_path = directory / "serial"
        self.log_path = directory / "log"
        self._owns_directory = owns_directory
        self._lines: list[GuestLine] = []  # each is parsed once
        self._parsed_bytes = 0

    # ---- its guest

    def lines(self) -> list[GuestLine]:
        """All so far that are whole."""
        with self.serial_path.open("rb") as serial:
            serial.seek(self._parsed_bytes)
            text = serial.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._parsed_bytes += len(whole)
        self._lines += lines_of(whole.decode(errors="replace"))
        return list(self._lines)

    def passes(self) -> list[GuestLine]:
        return [line for line in self.lines() if line.kind == "pass"]

    def wait_line(
        self, what: str, found: Callable[[GuestLine], bool], *, after: int = 0, deadline_s: float = WAIT_S
    ) -> GuestLine:
        """The first line, not among the first `after`, of which `found` is true. `MigrationError` when there is none in
        time, or the VMM ends."""
        result: list[GuestLine] = []

        def look() -> bool:
            result.extend(line for line in self.lines()[after:] if found(line))
            return bool(result)

        self._until(what, look, deadline_s)
        return result[0]

    def wait_ready(self, deadline_s: float = WAIT_S) -> GuestLine:
        """Until the guest has filled its memory."""
        return self.wait_line("guest that is ready", lambda line: line.kind == "ready", deadline_s=deadline_s)

    def wait_passes(self, count: int, *, deadline_s: float = WAIT_S) -> list[GuestLine]:
        """Until there are so many passes more than now; these."""
        before = len(self.passes())
        self._until(f"{count} passes", lambda: len(self.passes()) >= before + count, deadline_s)
        return self.passes()[before:]

    def wait_pass(self, number: int, *, deadline_s: float = WAIT_S) -> GuestLine:
        """The line of the pass with this number, counted from 1 for this process."""
        self._until(f"pass {number}", lambda: len(self.passes()) >= number, deadline_s)
        return self.passes()[number - 1]

    def order(self, byte: str, *, deadline_s: float = WAIT_S) -> GuestLine:
        """Has a guest that was booted with ``wait=1`` do one pass: ``r`` looks only, ``w`` writes too. Its line."""
        before = len(self.passes())
        self.send(byte)
        return self.wait_pass(before + 1, deadline_s=deadline_s)

    def send(self, text: str) -> None:
        """To the serial port."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(text.encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise MigrationError(f"{self._name} has ended\n{self.said()}") from None

    def said(self) -> str:
        """The end of what it and its guest have written, for a message."""
        return (self.log_path.read_text(errors="replace") + self.serial_path.read_text(errors="replace"))[-2000:]

    # ---- the process

    @property
    def pid(self) -> int:
        return self.process.pid

    def _until(self, what: str, true: Callable[[], bool], deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        while True:
            ended = self.process.poll()
            if true():
                return
            if ended is not None:
                raise MigrationError(f"{self._name} has ended (status {ended}) before: {what}\n{self.said()}")
            if time.monotonic() > deadline:
                raise MigrationError(f"{self._name}: no {what} within {deadline_s:g} s\n{self.said()}")
            time.sleep(0.002)

    def kill(self) -> None:
        """Harmless when it has ended."""
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def close(self) -> None:
        self.kill()
        if self._owns_directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
