# SPDX-License-Identifier: Apache-2.0
"""The handler under test: a socket, and where it was given a command the processes of that.

Resource handling: a `Handler` owns what it has started: `end` kills every process that came of the command, whatever
its parent is by now. One is known by its environment, or, where that was emptied (sudo), by its session.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import trio

from postcopy.errors import ConfigurationError
from postcopy.testbed import _linux
from postcopy.testbed.conformance._model import NotApplicable

END_S = 10.0
_MARK = "POSTCOPY_CONFORMANCE"
"""In the environment of all processes of a handler: its directory."""


@dataclass(frozen=True)
class HandlerCommands:
    """With ``{socket}``, ``{image}``, ``{dir}`` (a directory of its own) and ``{pid}`` (of the command) in them."""

    start: str
    restart: str | None = None
    """None: nothing, or `start` where the command itself has ended."""
    kill: str | None = None
    """None: SIGKILL to the command's process."""
    takes_over: bool = False
    """A successor serves the clients of a handler that was killed."""


class Handler:
    def __init__(self, commands: HandlerCommands | None, directory: str, image: str, path: str | None = None) -> None:
        self._commands = commands
        self._directory = directory
        self._image = image
        self.path = path if path is not None else os.path.join(directory, "s")
        self._process: subprocess.Popen[bytes] | None = None
        self._sessions: set[int] = set()
        self._mark = f"{_MARK}={directory}".encode()
        self._log_path = os.path.join(directory, "log")

    def _expand(self, text: str) -> list[str]:
        pid = str(self._process.pid) if self._process is not None else ""
        known = {"socket": self.path, "image": self._image, "dir": self._directory, "pid": pid}
        words = shlex.split(text)
        for name, value in known.items():
            words = [word.replace("{" + name + "}", value) for word in words]
        return words

    def _run(self, text: str) -> None:
        words = self._expand(text)
        with open(self._log_path, "ab") as log:
            try:
                self._process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env={**os.environ, _MARK: self._directory},
                )
            except OSError as error:
                raise ConfigurationError(f"--handler-cmd: cannot start {words[0]!r}: {error.strerror}") from None
        self._sessions.add(self._process.pid)

    def start(self) -> None:
        if self._commands is not None:
            self._run(self._commands.start)

    # ---- what only a command can do

    def _need(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise NotApplicable("needs a handler that it can start: --handler-cmd")
        return self._process

    @property
    def takes_over(self) -> bool:
        return self._commands is not None and (self._commands.takes_over or self._commands.restart is not None)

    def processes(self) -> list[int]:
        """The command's process and all that came of it."""
        self._need()
        return [pid for pid in _linux.all_pids() if self._is_one(_linux.stat_of(pid), pid)]

    def _is_one(self, stat: list[bytes], pid: int) -> bool:
        if not stat or stat[_linux.STATE] == b"Z":
            return False
        if int(stat[_linux.SESSION]) in self._sessions:
            return True
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as environment:
            return self._mark in environment.read().split(b"\0")
        return False

    def stop(self) -> None:
        for pid in self.processes():
            _signal(pid, signal.SIGSTOP)

    def go_on(self) -> None:
        for pid in self.processes():
            _signal(pid, signal.SIGCONT)

    async def kill(self) -> None:
        """As if it had been killed. `NotApplicable` when the command for that has failed: nothing was tried then."""
        process = self._need()
        assert self._commands is not None
        if self._commands.kill is None:
            process.kill()
            await self.ended(END_S)
        else:
            words = self._expand(self._commands.kill)
            try:
                done = await trio.run_process(words, check=False, capture_stdout=True, capture_stderr=True)
            except OSError as error:
                raise ConfigurationError(f"--handler-kill-cmd: cannot start {words[0]!r}: {error.strerror}") from None
            if done.returncode:
                said = done.stderr.decode("utf-8", "replace").strip()
                raise NotApplicable(f"--handler-kill-cmd ended with status {done.returncode}: {said[-200:]}")

    async def restart(self) -> None:
        """The successor, after `kill`."""
        process = self._need()
        assert self._commands is not None
        if self._commands.restart is not None:
            self._run(self._commands.restart)
        elif process.poll() is not None:
            self._run(self._commands.start)

    def terminate(self) -> None:
        """In good order."""
        self._need().terminate()

    async def ended(self, within_s: float) -> bool:
        """Whether the command's process has ended by then."""
        process = self._need()
        with trio.move_on_after(within_s):
            while process.poll() is None:  # noqa: ASYNC110 -- of a child that Trio does not know
                await trio.sleep(0.005)
            return True
        return False

    async def end(self) -> None:
        """Shielded and bounded. What reads from an image that is held must have been let go before."""
        if self._process is None:
            return
        with trio.CancelScope(shield=True), trio.move_on_after(END_S):
            # Again, since one of them may be there to start others: none may be left.
            while found := self.processes():
                for pid in found:
                    _signal(pid, signal.SIGKILL)
                await trio.sleep(0.002)
            await self.ended(END_S)

    # ---- what can be seen

    @property
    def death(self) -> str:
        """How it ended; empty while it runs, or where that cannot be known."""
        if self._process is None or self._process.poll() is None:
            return ""
        status = self._process.returncode
        return f"the handler has ended ({signal.Signals(-status).name if status < 0 else f'status {status}'})"

    @property
    def last_words(self) -> str:
        with contextlib.suppress(OSError), open(self._log_path, "rb") as log:
            lines = log.read()[-4096:].decode("utf-8", "replace").strip().splitlines()
            return lines[-1][:200] if lines else ""
        return ""

    def descriptors(self, chosen: Callable[[str], bool]) -> int:
        """How many descriptors its processes have whose link says so. `NotApplicable` where that cannot be seen."""
        count = 0
        for pid in self.processes():
            try:
                names = os.listdir(f"/proc/{pid}/fd")
            except (ProcessLookupError, FileNotFoundError):  # it has ended meanwhile
                continue
            except OSError as error:
                raise NotApplicable(f"cannot look into /proc/{pid}/fd: {error.strerror}") from None
            for name in names:
                with contextlib.suppress(OSError):
                    count += chosen(os.readlink(f"/proc/{pid}/fd/{name}"))
        return count

    def userfaultfds(self) -> int:
        return self.descriptors(lambda link: link == "anon_inode:[userfaultfd]")

    def sockets(self) -> int:
        return self.descriptors(lambda link: link.startswith("socket:"))

    def private_bytes(self) -> int:
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as status:
                total += sum(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon:"))
        return total


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
