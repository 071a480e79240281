# SPDX-License-Identifier: Apache-2.0
"""A process that answers at its monitor as QEMU 7.2 does, and has memory as its guests have: for what a real one does
seldom, or never.

``python fake_qemu.py DIRECTORY ORDERS``: ORDERS is a JSON file that is read at each command, see `Orders`.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MIB = 1 << 20
STATE = b"the state of all devices" * 1000
EARLY_BYTES = 5000  # of it, before the guest stops
CAPABILITIES = ("x-ignore-shared", "events", "pause-before-switchover", "multifd", "postcopy-ram", "return-path")


@dataclass
class Orders:
    """How it answers."""

    version: list[int] = field(default_factory=lambda: [7, 2, 22])
    greeting: str | None = None  # in place of its own; "": none
    mib: dict[str, int] = field(default_factory=lambda: {"ram0": 8})  # shared files, mapped
    ramblock: str = ""  # more lines of "info ramblock"
    says: dict[str, Any] = field(default_factory=dict)  # other answers, by "COMMAND" or "COMMAND ARGUMENT"
    raw: dict[str, str] = field(default_factory=dict)  # by command: bytes (latin-1) in place of an answer
    refuses: dict[str, list[str]] = field(default_factory=dict)  # by command, why: each time the next one, then not
    hangs: list[str] = field(default_factory=list)  # commands that are never answered
    drops: list[str] = field(default_factory=list)  # commands at which it closes the connection
    dies: list[str] = field(default_factory=list)
    migrates: str = "completed"  # or: failed, endless, silent, dies, unstopped, unread, deaf
    clock_us: int = 0  # of its events; 0: the true one
    events: int = 0  # other ones, before each answer
    state: int = len(STATE)  # how much of it


@contextlib.contextmanager
def fake_qemu(directory: Path, orders: Orders | None = None) -> Iterator[FakeQemu]:
    fake = FakeQemu(directory, orders or Orders())
    try:
        yield fake
    finally:
        fake.process.kill()
        fake.process.wait()
        for name in fake.orders.mib:
            fake.ram_path(name).unlink(missing_ok=True)


class FakeQemu:
    """Its memory is on a tmpfs."""

    def __init__(self, directory: Path, orders: Orders) -> None:
        self.orders = orders
        self.qmp_path = directory / "qmp.sock"
        self._orders_path = directory / "orders.json"
        self._told_path = directory / "told"
        self._told_path.touch()
        self.order(orders)
        self.process = subprocess.Popen(
            [sys.executable, "-I", __file__, str(directory), str(self._orders_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        with self.process.stdout as said:
            assert said.readline() == "ready\n"

    def order(self, orders: Orders) -> None:
        self.orders = orders
        part = self._orders_path.with_suffix(".part")
        part.write_text(json.dumps(asdict(orders)))
        part.rename(self._orders_path)

    def ram_path(self, name: str) -> Path:
        return _ram_path(self._orders_path.parent, name)

    def was_told(self, *commands: str) -> list[str]:
        """Which of those commands it was told, in their order; all that change something where none are given."""
        told = self._told_path.read_text().split("\n")[:-1]
        if commands:
            return [one for one in told if one in commands]
        return [one for one in told if not one.startswith(("query-", "qom-", "human-", "qmp_"))]


# ---- in the process


def _ram_path(directory: Path, name: str) -> Path:
    return Path("/dev/shm", "-".join(["fake-qemu", *directory.parts[-2:], name]))


class _Qemu:
    def __init__(self, directory: Path, orders: Path) -> None:
        self._directory, self._orders_path = directory, orders
        self._told = open(directory / "told", "a", buffering=1)  # noqa: SIM115 -- as long as the process
        self.status = "running"
        self._capabilities = dict.fromkeys(CAPABILITIES, False)
        self._parameters = {"max-bandwidth": 1 << 27, "downtime-limit": 300, "announce-rounds": 5}
        self._refused: dict[str, int] = {}
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._noticed = threading.Event()
        self._going_on = threading.Event()
        self._migration = ""
        self._fds: dict[str, int] = {}
        self._memory: list[Any] = []
        self._connection: socket.socket | None = None
        for name, mib in self._orders.mib.items():
            fd = os.open(_ram_path(directory, name), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.truncate(fd, mib * MIB)
            memory = mmap.mmap(fd, mib * MIB)
            for page in range(0, mib * MIB // mmap.PAGESIZE, 3):
                memory[page * mmap.PAGESIZE] = 1 + page % 255
            self._memory.append((fd, memory))

    @property
    def _orders(self) -> Orders:
        return Orders(**json.loads(self._orders_path.read_text()))

    def serve(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        path = self._directory / "qmp.sock"
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen(1)
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                self._connection = connection
                self._talk(connection)
            self._connection = None

    def _talk(self, connection: socket.socket) -> None:
        orders = self._orders
        major, minor, micro = orders.version
        numbers = {"major": major, "minor": minor, "micro": micro}
        greeting = json.dumps({"QMP": {"version": {"qemu": numbers, "package": "fake"}, "capabilities": ["oob"]}})
        self._write((greeting + "\r\n" if orders.greeting is None else orders.greeting).encode())
        data, fds = b"", []
        while True:
            piece, received, _, _ = socket.recv_fds(connection, 65536, 4)
            if not piece:
                return
            fds += received
            data += piece
            while b"\n" in data:
                line, data = data.split(b"\n", 1)
                self._told.write(json.loads(line)["execute"] + "\n")
                if not self._answer(json.loads(line), fds):
                    return

    def _write(self, data: bytes) -> None:
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.sendall(data)

    def _say(self, message: dict[str, Any]) -> None:
        self._write(json.dumps(message).encode() + b"\r\n")

    def event(self, name: str, **data: Any) -> None:
        seconds, microseconds = divmod(self._orders.clock_us or time.time_ns() // 1000, 10**6)
        self._say({"event": name, "data": data, "timestamp": {"seconds": seconds, "microseconds": microseconds}})

    def _answer(self, request: dict[str, Any], fds: list[int]) -> bool:
        """Whether the connection goes on."""
        orders, command = self._orders, request["execute"]
        arguments = request.get("arguments", {})
        for number in range(orders.events):
            self.event("RTC_CHANGE", offset=number)
        if command in orders.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if command in orders.hangs:
            return True
        if command in orders.drops:
            return False
        if command in orders.raw:
            self._write(orders.raw[command].encode("latin-1"))
            return True
        if command == "migrate-continue" and arguments["state"] != self._migration:
            error = {"class": "GenericError", "desc": f"Migration not in expected state: {self._migration}"}
            self._say({"error": error, "id": request["id"]})
            return True
        why = orders.refuses.get(command, [])
        if self._refused.get(command, 0) < len(why):
            number = self._refused[command] = self._refused.get(command, 0) + 1
            self._say({"error": {"class": "GenericError", "desc": why[number - 1]}, "id": request["id"]})
            return True
        detail = " ".join([command, *[str(value) for value in arguments.values() if isinstance(value, str)]])
        for key in (detail, command):
            if key in orders.says:
                self._say({"return": orders.says[key], "id": request["id"]})
                return True
        before, after = self._do(orders, command, arguments, fds)
        self._say({"return": before, "id": request["id"]})
        if after is not None:
            threading.Thread(target=after, daemon=True).start()
        return True

    def _do(self, orders: Orders, command: str, arguments: dict[str, Any], fds: list[int]) -> tuple[Any, Any]:
        match command:
            case "query-status":
                return {"status": self.status, "running": self.status == "running"}, None
            case "query-migrate":
                return {"status": self._migration} if self._migration else {}, None
            case "query-cpus-fast":
                return [{"cpu-index": 0, "thread-id": os.getpid(), "qom-path": "/machine/cpu", "target": "x"}], None
            case "query-kvm":
                return {"enabled": False, "present": True}, None
            case "query-block-jobs":
                return [], None
            case "query-memdev":
                return [{"id": name, "size": mib * MIB, "share": True} for name, mib in orders.mib.items()], None
            case "query-named-block-nodes":
                return [{"node-name": "d0", "drv": "file", "file": "/disk", "cache": {"direct": False}}], None
            case "query-migrate-capabilities":
                return [{"capability": name, "state": state} for name, state in self._capabilities.items()], None
            case "query-migrate-parameters":
                return self._parameters, None
            case "migrate-set-capabilities":
                self._capabilities |= {one["capability"]: one["state"] for one in arguments["capabilities"]}
            case "migrate-set-parameters":
                self._parameters |= arguments
            case "qom-list":
                if arguments["path"] == "/objects":
                    return [{"name": name, "type": "child<memory-backend-file>"} for name in orders.mib], None
                return [], None
            case "qom-get":
                name = arguments["path"].rpartition("/")[2]
                values = {
                    "type": "pc-i440fx-7.2-machine" if name == "machine" else "qemu64-x86_64-cpu",
                    "mem-path": str(_ram_path(self._directory, name)),
                }
                return values.get(arguments["property"], False), None
            case "human-monitor-command":
                if arguments["command-line"] != "info ramblock":
                    return "", None
                rows = [
                    f"{name:>24}    4 KiB  0x{0:016x} 0x{mib * MIB:016x} 0x{mib * MIB:016x}"
                    for name, mib in orders.mib.items()
                ]
                heading = "              Block Name    PSize              Offset               Used              Total"
                return "\r\n".join([heading, *rows, orders.ramblock]), None
            case "getfd":
                self._fds[arguments["fdname"]] = fds.pop()
            case "migrate":
                self._cancelled.clear()
                self._going_on.clear()
                fd = self._fds.pop(arguments["uri"].removeprefix("fd:"))
                self._went("setup")
                return {}, lambda: self._migrate(self._orders, fd)
            case "migrate_cancel":
                if self._migration == "device":  # 7.2 may run its guest without disks then, and ends at the next one
                    os.kill(os.getpid(), signal.SIGKILL)
                self._cancelled.set()
                self._going_on.set()
            case "migrate-continue":
                (self._noticed if arguments["state"] == "cancelling" else self._going_on).set()
            case "stop":
                self._stop()
            case "cont":
                with self._lock:
                    self.status = "running"
                return {}, lambda: self.event("RESUME")
            case "quit":
                return {}, lambda: os.kill(os.getpid(), signal.SIGTERM)
        return {}, None

    def _stop(self, status: str = "paused") -> None:
        self.status = status
        self.event("STOP")

    def _went(self, status: str) -> None:
        if self._migration != status:
            self._migration = status
            self.event("MIGRATION", status=status)

    def _migrate(self, orders: Orders, fd: int) -> None:
        assert self._capabilities["x-ignore-shared"]
        assert not self._capabilities["multifd"]
        self._went("active")
        if orders.migrates == "silent":
            self._cancelled.wait()
            os.close(fd)
            self._went("cancelled")
            return
        try:
            os.write(fd, STATE[: min(EARLY_BYTES, orders.state)])
            while orders.migrates == "endless" and not self._cancelled.is_set():
                os.write(fd, bytes(65536))
            if orders.migrates == "unstopped":  # somebody else had stopped the guest
                self.status = "finish-migrate"
            else:
                self._stop("finish-migrate")
            if orders.migrates == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if orders.migrates == "deaf":
                self._cancelled.wait()
                self._went("cancelling")
                self._noticed.wait()
            else:
                self._went("pre-switchover")
                self._going_on.wait()
            if not self._cancelled.is_set():
                self._went("device")
                os.write(fd, STATE[EARLY_BYTES : orders.state])
            if orders.migrates == "unread":
                poll = select.poll()
                poll.register(fd, 0)
                poll.poll()  # until nobody can read it any more
                raise BrokenPipeError
        except BrokenPipeError:
            pass
        os.close(fd)
        ended = "cancelled" if self._cancelled.is_set() else orders.migrates
        if ended in ("completed", "unstopped"):
            self.status = "postmigrate"
            self._went("completed")
            return
        self._went(ended if ended in ("failed", "cancelled") else "failed")
        self.status = "running"
        self.event("RESUME")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    _Qemu(Path(sys.argv[1]), Path(sys.argv[2])).serve()
