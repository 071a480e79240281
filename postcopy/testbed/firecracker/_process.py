# SPDX-License-Identifier: Apache-2.0
"""`Firecracker`: one process, its API, and the lines of its guest."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from postcopy.errors import MigrationError, ResourceError
from postcopy.testbed.firecracker._find import REMEDY, find, guest_path

START_S = 30.0
API_S = 60.0
WAIT_S = 60.0
_LINE = re.compile(r"^guest: (ready|pass|wrong|stale)(.*)$", re.MULTILINE)
_VALUE = re.compile(r"(\w+)=(\d+)")


class ApiError(MigrationError):
    """Firecracker has refused a request; `status` is HTTP's."""

    def __init__(self, what: str, status: int, text: str) -> None:
        super().__init__(f"{what}: {status}: {text}")
        self.status = status
        self.text = text


@dataclass(frozen=True)
class GuestLine:
    """One line of the guest: ``ready`` once, ``pass`` after each pass, ``wrong`` and ``stale`` for the first pages that
    were not as they must be. `values`: the numbers of it, by name; those of a pass are `errors`, `stale`, `touched`,
    `ballooned`, `pages`, `pass`, and in ticks of its clock `tsc`, `ticks`, `p50`, `p99`, `max`."""

    kind: str
    values: dict[str, int]


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Firecracker:
    """A process of Firecracker, with its API at `api_path`; `close`, or the end of the ``with`` block, kills it.

    The serial port's output is in the file `serial_path`, Firecracker's own log in `log_path`.
    """

    def __init__(self, process: subprocess.Popen[bytes], directory: Path, owns_directory: bool) -> None:
        self.process = process
        self.directory = directory
        self.api_path = str(directory / "api.sock")
        self.serial_path = directory / "serial"
        self.log_path = directory / "log"
        self._owns_directory = owns_directory

    @classmethod
    def start(
        cls,
        directory: Path | None = None,
        *,
        binary: str | None = None,
        prefix: Sequence[str] = (),
        arguments: Sequence[str] = (),
    ) -> Firecracker:
        """One that was told nothing yet. `directory`: of its own, for sockets and logs; else a new one, which goes with
        it. `prefix`: of its command, as ``setpriv`` with its arguments. `ResourceError` when it cannot be started,
        `MigrationError` when it does not come up."""
        binary = binary or find()
        owns = directory is None
        directory = Path(tempfile.mkdtemp(prefix="postcopy-fc-")) if directory is None else directory
        directory.mkdir(exist_ok=True)
        if prefix:
            directory.chmod(0o777)  # another user's
        (directory / "log").touch()
        (directory / "log").chmod(0o666)
        command = [*prefix, binary, "--api-sock", str(directory / "api.sock"), "--id", "postcopy"]
        command += ["--log-path", str(directory / "log"), "--level", "Info", *arguments]
        try:
            with open(directory / "serial", "wb") as serial:
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=serial, stderr=subprocess.STDOUT)
        except OSError as error:
            if owns:
                shutil.rmtree(directory, ignore_errors=True)
            raise ResourceError(f"{command[0]} cannot be started: {error.strerror}", REMEDY) from None
        self = cls(process, directory, owns)
        try:
            self._until("its API socket", self._answers, START_S)
        except BaseException:
            self.close()
            raise
        return self

    def _answers(self) -> bool:
        try:
            self.api("GET", "/")
        except OSError:
            return False
        return True

    # ---- the API

    def api(self, method: str, path: str, body: object = None, *, timeout_s: float = API_S) -> Any:
        """What Firecracker answers, None where that is nothing; `ApiError` when it refuses, OSError when the socket is
        not there, or nothing is answered in time."""
        connection = _Connection(self.api_path, timeout_s)
        with contextlib.closing(connection):
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {} if body is None else {"Content-Type": "application/json"})
            try:
                response = connection.getresponse()
            except http.client.HTTPException as error:
                raise ConnectionResetError(f"{method} {path}: {error!r}: {self.said()}") from None
            answer = response.read().decode()
        if response.status >= 300:
            raise ApiError(f"{method} {path}", response.status, answer)
        return json.loads(answer) if answer.strip() else None

    def boot(
        self,
        memory_mib: int,
        arguments: str = "",
        *,
        balloon: bool = False,
        huge_pages: bool = False,
        track_dirty: bool = False,
        drives: dict[str, str] | None = None,
    ) -> None:
        """Boots our guest, with these `arguments` on its command line. `drives`: paths by drive's id."""
        machine: dict[str, object] = {"vcpu_count": 1, "mem_size_mib": memory_mib, "track_dirty_pages": track_dirty}
        if huge_pages:
            machine["huge_pages"] = "2M"
        self.api("PUT", "/machine-config", machine)
        self.api("PUT", "/boot-source", {"kernel_image_path": guest_path(), "boot_args": arguments})
        if balloon:
            self.api("PUT", "/balloon", {"amount_mib": 0, "deflate_on_oom": False, "stats_polling_interval_s": 0})
        for name, path in (drives or {}).items():
            drive = {"drive_id": name, "path_on_host": path, "is_root_device": False, "is_read_only": False}
            self.api("PUT", f"/drives/{name}", drive)
        self.api("PUT", "/actions", {"action_type": "InstanceStart"})

    def pause(self) -> None:
        self.api("PATCH", "/vm", {"state": "Paused"})

    def resume(self) -> None:
        self.api("PATCH", "/vm", {"state": "Resumed"})

    def state(self) -> str:
        """``Not started``, ``Running`` or ``Paused``."""
        return str(self.api("GET", "/")["state"])

    def snapshot(self, state_path: str | Path, memory_path: str | Path, kind: str = "Full") -> None:
        """Of a paused one."""
        body = {"snapshot_type": kind, "snapshot_path": str(state_path), "mem_file_path": str(memory_path)}
        self.api("PUT", "/snapshot/create", body)

    def load(
        self,
        state_path: str | Path,
        *,
        uffd: str | Path | None = None,
        memory: str | Path | None = None,
        resume: bool = False,
        timeout_s: float = API_S,
    ) -> None:
        """With its memory from the handler that listens at `uffd`, or from the file `memory`."""
        kind, path = ("Uffd", uffd) if uffd is not None else ("File", memory)
        backend = {"backend_type": kind, "backend_path": str(path)}
        body = {"snapshot_path": str(state_path), "mem_backend": backend, "resume_vm": resume}
        self.api("PUT", "/snapshot/load", body, timeout_s=timeout_s)

    def inflate(self, mib: int) -> None:
        """To so much in all; the guest follows before its next pass, one that waits for orders at once."""
        self.api("PATCH", "/balloon", {"amount_mib": mib})

    # ---- its guest

    def lines(self) -> list[GuestLine]:
        """All so far that are whole."""
        text = self.serial_path.read_text(errors="replace")
        text = text[: text.rfind("\n") + 1]
        return [
            GuestLine(match[1], {name: int(value) for name, value in _VALUE.findall(match[0])})
            for match in _LINE.finditer(text)
        ]

    def passes(self) -> list[GuestLine]:
        return [line for line in self.lines() if line.kind == "pass"]

    def wait_line(
        self, what: str, found: Callable[[GuestLine], bool], *, after: int = 0, deadline_s: float = WAIT_S
    ) -> GuestLine:
        """The first line, not among the first `after`, of which `found` is true. `MigrationError` when there is none in
        time, or Firecracker ends."""
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
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

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
                raise MigrationError(f"firecracker has ended (status {ended}) before: {what}\n{self.said()}")
            if time.monotonic() > deadline:
                raise MigrationError(f"firecracker: no {what} within {deadline_s:g} s\n{self.said()}")
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

    def __enter__(self) -> Firecracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def serving_engine(keeper: int) -> int:
    """Of a `postcopy pager` that serves a microVM: the process below its keeper that has a userfaultfd now, as a spare
    has not. Waits until there is one; `MigrationError`."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        for child in Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split():
            with contextlib.suppress(OSError):  # one that ends
                fds = Path(f"/proc/{child}/fd")
                if any(os.readlink(fds / name) == "anon_inode:[userfaultfd]" for name in os.listdir(fds)):
                    return int(child)
        time.sleep(0.001)
    raise MigrationError(f"no process of the pager {keeper} has a userfaultfd")
