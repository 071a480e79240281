# SPDX-License-Identifier: Apache-2.0
"""A process that answers as Firecracker 1.12 does, and has memory as its guests have: for what a real one does seldom.

``python fake_firecracker.py SOCKET ORDERS``: ORDERS is a JSON file that is read at each request, see `Orders`.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer
from typing import Any

MIB = 1 << 20
NO_MEMORY_FILE = (
    "Create snapshot error: Cannot perform open on the memory backing file: No such file or directory (os error 2)"
)
STATE = b"the state of a microVM" * 100
_MAP_NORESERVE = 0x4000


@dataclass
class Orders:
    """How it answers."""

    version: str = "1.12.1"
    state: str = "Running"
    mib: int = 8
    maps_mib: list[int] = field(default_factory=lambda: [8])  # of its mappings
    config: dict[str, Any] = field(default_factory=dict)  # what else GET /vm/config says
    fault: str = NO_MEMORY_FILE  # of a snapshot; "": it succeeds
    writes: str = "state"  # or: nothing, damaged, long, link
    load: str = ""  # why it loads no snapshot; "": it says that it has, and asks nobody for memory; or: dies
    hangs: list[str] = field(default_factory=list)  # requests that are never answered, as "PATCH Paused"
    drops: list[str] = field(default_factory=list)  # requests whose connection it closes instead
    signature_at: int = -1  # where the first mapping has the guest's ACPI pointer


@contextlib.contextmanager
def fake_firecracker(directory: Path, orders: Orders) -> Iterator[FakeFirecracker]:
    fake = FakeFirecracker(directory, orders)
    try:
        yield fake
    finally:
        fake.process.kill()
        fake.process.wait()


class FakeFirecracker:
    def __init__(self, directory: Path, orders: Orders) -> None:
        self.api_socket = directory / "api.sock"
        self._orders = directory / "orders.json"
        self._said = directory / "orders.json.said"
        self.order(orders)
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(self.api_socket), str(self._orders)], stdin=subprocess.DEVNULL
        )
        deadline_s = time.monotonic() + 30
        while not self._said.exists():
            assert self.process.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.005)

    def order(self, orders: Orders) -> None:
        written = self._orders.with_suffix(".new")
        written.write_text(json.dumps(asdict(orders)))
        written.replace(self._orders)

    def was_told(self) -> list[str]:
        """The requests that change something, in order."""
        return self._said.read_text().split("\n")[:-1]


def _crc64(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x95AC9329AC4BC9B5 if crc & 1 else 0)
    return crc


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    orders_path = Path()
    state: str | None = None  # since it was told another one

    def log_message(self, *_: Any) -> None:
        pass

    def address_string(self) -> str:
        return "here"

    def _answer(self, status: int, content: object = None) -> None:
        body = json.dumps(content).encode() if content is not None else b""
        self.send_response(status)
        self.send_header("Connection", "keep-alive")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _do(self) -> None:
        orders = Orders(**json.loads(self.orders_path.read_text()))
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null")
        state = _Handler.state or orders.state
        what = self.command + " " + (body["state"] if self.path == "/vm" else self.path)
        if self.command != "GET":
            with open(str(self.orders_path) + ".said", "a") as file:
                file.write(what + "\n")
        if what in orders.hangs:
            signal.pause()
        if what in orders.drops:
            self.close_connection = True
            return
        if what == "GET /":
            self._answer(200, {"id": "fake", "state": state, "vmm_version": orders.version, "app_name": "Firecracker"})
        elif what == "GET /vm/config":
            machine = {"vcpu_count": 1, "mem_size_mib": orders.mib, "huge_pages": "None"}
            self._answer(200, {"machine-config": machine, "drives": [], "network-interfaces": []} | orders.config)
        elif self.path == "/vm":
            _Handler.state = {"Paused": "Paused", "Resumed": "Running"}[body["state"]]
            self._answer(204)
        elif self.path == "/snapshot/load" and orders.load == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.path == "/snapshot/load":
            self._answer(*((400, {"fault_message": orders.load}) if orders.load else (204,)))
        elif self.path == "/snapshot/create":
            assert not os.path.exists(os.path.dirname(body["mem_file_path"]))
            self._write(orders, body["snapshot_path"])
            self._answer(*((400, {"fault_message": orders.fault}) if orders.fault else (204,)))
        else:
            self._answer(400, {"fault_message": f"Invalid request method and/or path: {what}."})
        self.close_connection = True

    do_GET = do_PUT = do_PATCH = _do

    def _write(self, orders: Orders, path: str) -> None:
        content = STATE + _crc64(STATE).to_bytes(8, "little")
        if orders.writes == "link":
            os.symlink("/etc/passwd", path)
        elif orders.writes != "nothing":
            with open(path, "xb") as file:
                file.write(content[: len(content) - (orders.writes == "damaged")])
                if orders.writes == "long":
                    file.truncate(1 << 30)


def _main(api_socket: str, orders_path: Path) -> None:
    orders = Orders(**json.loads(orders_path.read_text()))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memories = []
    for mib in orders.maps_mib:
        memories.append(mmap.mmap(-1, mib * MIB, flags=flags))
        memories.append(mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ))
    for page in range(0, orders.maps_mib[0] * MIB, 3 * mmap.PAGESIZE):
        memories[0][page : page + 8] = page.to_bytes(8, "little")
    if orders.signature_at >= 0:
        memories[0][orders.signature_at : orders.signature_at + 8] = b"RSD PTR "
    _Handler.orders_path = orders_path
    with UnixStreamServer(api_socket, _Handler) as server:
        Path(str(orders_path) + ".said").touch()
        server.serve_forever()


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
