# SPDX-License-Identifier: Apache-2.0
"""`Firecracker`: one process, its API, and the lines of its guest."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from postcopy.errors import MigrationError, ResourceError
from postcopy.testbed._guest import GuestProcess, start_vmm
from postcopy.testbed.firecracker._find import REMEDY, find, guest_path

START_S = 30.0
API_S = 60.0


class ApiError(MigrationError):
    """Firecracker has refused a request; `status` is HTTP's."""

    def __init__(self, what: str, status: int, text: str) -> None:
        super().__init__(f"{what}: {status}: {text}")
        self.status = status
        self.text = text


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Firecracker(GuestProcess):
    """A process of Firecracker, with its API at `api_path`; `close`, or the end of the ``with`` block, kills it."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path, owns_directory: bool) -> None:
        super().__init__("firecracker", process, directory, owns_directory)
        self.api_path = str(directory / "api.sock")

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
                process = start_vmm(command, stdin=subprocess.PIPE, stdout=serial, stderr=subprocess.STDOUT)
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
