# SPDX-License-Identifier: Apache-2.0
"""`Qemu`: one process, a monitor of ours, and the lines of its guest."""

from __future__ import annotations

import contextlib
import fcntl
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
from postcopy.testbed._guest import WAIT_S, GuestLine, GuestProcess, start_vmm
from postcopy.testbed.qemu._find import QEMU, REMEDY, guest_path

START_S = 30.0
ANSWER_S = 60.0
SHARED_FILE = "memory-backend-file,share=on"
"""A backend of memory that `Qemu.start` gives the path of a file of its own, on a tmpfs."""

_MEMORY = Path("/dev/shm")
_PREFIX = "postcopy-qemu-"


def _directory() -> tuple[Path, int]:
    """A new one in memory, and a descriptor of it whose lock says that it is in use: it has that lock before it has its
    name. What processes that were killed have left is removed: it would hold the memory of their guests."""
    for old in _MEMORY.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or in use
            lock = _locked(old)
            shutil.rmtree(old, ignore_errors=True)
            os.close(lock)
    unnamed = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=_MEMORY))
    lock = _locked(unnamed)
    return unnamed.rename(_MEMORY / unnamed.name[1:]), lock


def _locked(directory: Path) -> int:
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise
    return lock


class QmpError(MigrationError):
    """QEMU has refused a command; `kind` is its class, as ``GenericError``."""

    def __init__(self, command: str, kind: str, text: str) -> None:
        super().__init__(f"{command}: {text}")
        self.kind = kind


class MonitorClosed(MigrationError):
    """QEMU has closed its monitor: it has ended, as a rule."""


class Monitor:
    """A connection to QEMU's monitor (QMP). `MigrationError` when nothing is answered in time, `MonitorClosed` when
    nothing will be."""

    def __init__(self, connection: socket.socket, name: str = "QEMU") -> None:
        self._connection = connection
        self._name = name
        self._input = b""
        self._events: list[dict[str, Any]] = []
        self._commands = 0

    @property
    def events(self) -> list[dict[str, Any]]:
        """All that QEMU has sent so far, with its timestamps."""
        with contextlib.suppress(MigrationError):
            while True:
                self._read(time.monotonic())
        return self._events

    def greet(self, timeout_s: float = START_S) -> None:
        self._read(time.monotonic() + timeout_s)
        self.execute("qmp_capabilities")

    def execute(self, command: str, *, timeout_s: float = ANSWER_S, fd: int | None = None, **arguments: Any) -> Any:
        """The answer, `QmpError` where it is refused. Underscores in names are hyphens; `fd` is sent along."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._commands += 1  # one that was given up may be answered later
        request = json.dumps({"execute": command, "arguments": named, "id": self._commands}).encode() + b"\n"
        deadline = time.monotonic() + timeout_s
        try:
            self._connection.settimeout(timeout_s)
            socket.send_fds(self._connection, [request], [] if fd is None else [fd])
        except TimeoutError:
            raise MigrationError(f"{self._name}: takes no command: {command}") from None
        except OSError as error:
            raise MonitorClosed(f"{self._name}: {command}: {error}") from None
        while True:
            message = self._read(deadline, command)
            if message.get("id") != self._commands:
                continue
            if "error" in message:
                raise QmpError(command, message["error"]["class"], message["error"]["desc"])
            if "return" in message:
                return message["return"]

    def wait_event(self, name: str, *statuses: str, deadline_s: float = WAIT_S) -> dict[str, Any]:
        """The first event with that name (and one of these `statuses` in its data), also one that came before."""
        what = " ".join([name, *statuses])
        deadline = time.monotonic() + deadline_s
        at = 0
        while True:
            while at == len(self._events):
                self._read(deadline, f"event {what}")
            event = self._events[at]
            if event["event"] == name and (not statuses or event.get("data", {}).get("status") in statuses):
                return event
            at += 1

    def _read(self, deadline: float, what: str = "a greeting") -> dict[str, Any]:
        while b"\n" not in self._input:
            try:
                self._connection.settimeout(max(0.001, deadline - time.monotonic()))
                got = self._connection.recv(65536)
            except TimeoutError:
                raise MigrationError(f"{self._name}: no answer in time: {what}") from None
            except OSError as error:
                raise MonitorClosed(f"{self._name}: {what}: {error}") from None
            if not got:
                raise MonitorClosed(f"{self._name} has closed its monitor: {what}")
            self._input += got
        line, _, self._input = self._input.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self._events.append(message)
        return message

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for an answer
        self._connection.close()


def command_line(
    directory: Path,
    memory_mib: int = 64,
    append: str = "",
    *,
    machine: str = "microvm",
    accel: str = "tcg",
    cpus: int = 1,
    backends: Sequence[str] = (SHARED_FILE,),
    disk: str | os.PathLike[str] | None = None,
    balloon: bool = False,
    kernel: str | None = None,
    initrd: str | None = None,
) -> list[str]:
    """Of a QEMU without monitors; see `Qemu.start`."""
    size = memory_mib // len(backends)
    command = [QEMU, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    command += ["-cpu", "qemu64", "-smp", str(cpus), "-m", f"{memory_mib}M"]
    for i, backend in enumerate(backends):
        path = f",mem-path={directory / f'ram{i}'}" if backend == SHARED_FILE else ""
        command += ["-object", f"{backend},id=ram{i},size={size}M{path}"]
    if len(backends) == 1:
        command += ["-machine", f"{machine},accel={accel},memory-backend=ram0"]
    else:
        command += ["-machine", f"{machine},accel={accel}"]
        for i in range(len(backends)):
            command += ["-numa", f"node,memdev=ram{i}" + (f",cpus=0-{cpus - 1}" if i == 0 else "")]
    command += ["-chardev", "stdio,id=serial,signal=off", "-serial", "chardev:serial"]
    command += ["-kernel", kernel or guest_path(), "-append", append]
    if initrd is not None:
        command += ["-initrd", initrd]
    bus = "pci"
    if machine == "microvm":
        bus = "device"
        command += ["-global", "virtio-mmio.force-legacy=false"]
    if disk is not None:
        command += ["-drive", f"if=none,id=disk,format=raw,cache=none,file={os.fspath(disk)}"]
        command += ["-device", f"virtio-blk-{bus},drive=disk"]
    if balloon:
        command += ["-device", f"virtio-balloon-{bus}"]
    return command


class Qemu(GuestProcess):
    """A process of QEMU. `qmp_path`: a monitor that nobody is connected to, for what is tested; `execute`, `events` and
    `wait_event` are of another one, ours. `ram_paths`: the files that its memory is in.

    It dies with this process, whatever ends that.
    """

    def __init__(self, process: subprocess.Popen[bytes], directory: Path, lock: int, monitor: Monitor) -> None:
        super().__init__("QEMU", process, directory, True)
        self._lock = lock
        self.monitor = monitor
        self.qmp_path = str(directory / "qmp.sock")

    @classmethod
    def start(
        cls,
        memory_mib: int = 64,
        append: str = "",
        *,
        incoming: bool = False,
        prefix: Sequence[str] = (),
        arguments: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
        user: int | None = None,
        **options: Any,
    ) -> Qemu:
        """One that has booted our guest, with `append` on its command line; with `incoming` one that waits for
        ``migrate-incoming``, and is paused after that. The twin of one has the same `memory_mib` and options.

        `options`, as `command_line` has them: `machine` (microvm; on pc and q35 our guest finds no disk, no balloon),
        `accel`, `cpus`, `backends` (objects of memory, a NUMA node each), `disk` (a raw image; O_DIRECT, locked),
        `balloon`, `kernel` and `initrd` in place of our guest. `arguments` go to the end of the command line, `prefix`
        before it, as ``postcopy run --`` or ``setpriv`` with its arguments. `user`: its number, where `prefix` makes
        QEMU another one's (which undoes that it dies with this process: see setpriv's ``--pdeathsig``).
        `ResourceError` when it cannot be started, `MigrationError` when it does not come up.
        """
        directory, lock = _directory()
        ours, its = socket.socketpair()
        try:
            command = [*prefix, *command_line(directory, memory_mib, append, **options)]
            command += ["-qmp", f"unix:{directory / 'qmp.sock'},server=on,wait=off"]
            command += ["-chardev", f"socket,id=own,fd={its.fileno()}", "-mon", "chardev=own,mode=control"]
            if incoming:
                command += ["-incoming", "defer", "-S"]
            if user is not None:
                os.chown(directory, user, -1)
            with its, open(directory / "serial", "wb") as serial:
                (directory / "log").touch()
                process = start_vmm(
                    [*command, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=serial,
                    stderr=subprocess.STDOUT,
                    pass_fds=[its.fileno(), *pass_fds],
                    start_new_session=True,  # Ctrl-C is ours
                )
        except BaseException as error:
            ours.close()
            its.close()
            shutil.rmtree(directory, ignore_errors=True)
            os.close(lock)
            if isinstance(error, OSError):
                raise ResourceError(f"QEMU cannot be started: {error}", REMEDY) from None
            raise
        self = cls(process, directory, lock, Monitor(ours))
        try:
            self.monitor.greet()
        except MigrationError as error:
            said = self.said()
            self.close()
            raise MigrationError(f"{error}\n{said}") from None
        except BaseException:
            self.close()
            raise
        return self

    @property
    def ram_paths(self) -> list[Path]:
        return sorted(self.directory.glob("ram*"))

    @property
    def events(self) -> list[dict[str, Any]]:
        return self.monitor.events

    def execute(self, command: str, *, timeout_s: float = ANSWER_S, fd: int | None = None, **arguments: Any) -> Any:
        """As `Monitor.execute`."""
        return self.monitor.execute(command, timeout_s=timeout_s, fd=fd, **arguments)

    def wait_event(self, name: str, *statuses: str, deadline_s: float = WAIT_S) -> dict[str, Any]:
        """As `Monitor.wait_event`."""
        return self.monitor.wait_event(name, *statuses, deadline_s=deadline_s)

    def status(self) -> str:
        """As ``running``, ``paused``, ``inmigrate``, ``postmigrate``."""
        return str(self.execute("query-status")["status"])

    def inflate(self, mib: int) -> None:
        """To so much that the balloon has in all; the guest follows before its next pass."""
        size = int(self.execute("query-memory-size-summary")["base-memory"])
        self.execute("balloon", value=size - (mib << 20))

    def ask(self, command: str, *, deadline_s: float = WAIT_S) -> GuestLine:
        """What a Linux guest (`linux`) answers between two passes: to ``status``, ``check`` (it looks at all of its
        memory), or ``sh WORDS``."""
        kind = command.split()[0]
        before = len(self.lines())
        self.send(f"{command}\n")
        return self.wait_line(f"answer to {kind}", lambda line: line.kind == kind, after=before, deadline_s=deadline_s)

    def shell(self, words: str, *, deadline_s: float = WAIT_S) -> str:
        """What the shell of a Linux guest writes; `MigrationError` when it says that this has failed."""
        before = self.serial_path.stat().st_size
        result = self.ask(f"sh {words}", deadline_s=deadline_s).values["exit"]
        text = self.serial_path.read_bytes()[before:].decode(errors="replace").partition("guest: sh exit=")[0]
        text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("guest: "))
        if result:
            raise MigrationError(f"{words}: exit status {result} in the guest: {text}")
        return text

    def capabilities(self, *names: str) -> None:
        """Says what a migration is to be capable of."""
        self.execute("migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in names])

    def close(self) -> None:
        self.monitor.close()
        super().close()
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1
