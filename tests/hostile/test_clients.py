# SPDX-License-Identifier: Apache-2.0
"""Those who may connect to the control socket and to the metrics, and do not behave."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile._program import MIB, RV64, Control, Program, Pulse, Refusal, wait_until

Start = Callable[..., Program]
Daemon = Callable[..., tuple[Program, Control]]


def unread_client(path: Path) -> socket.socket:
    """Asks for everything, and reads nothing."""
    client = socket.socket(socket.AF_UNIX)
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError, ConnectionError):
        client.connect(str(path))
        client.send(b'{"execute": "events"}\n' + b'{"execute": "status"}\n' * 2000)
    return client


def test_one_client_among_many_that_do_not_read(daemon: Daemon) -> None:
    program, control = daemon("d", *RV64)
    before = program.forget_peak()
    clients = [unread_client(control.path) for _ in range(200)]
    try:
        with Pulse(control) as pulse:
            for _ in range(50):
                control.ask("status")
        pulse.check(20.0)  # behind the 400,000 answers of the others it would wait for minutes
        assert program.peak_bytes() - before < 64 * MIB
    finally:
        for client in clients:
            client.close()
    control.ask("status")


def test_a_client_that_waits_among_deaf_ones(daemon: Daemon) -> None:
    """It came first and reads all that it is sent: no other client may take its place."""
    program, control = daemon("d", *RV64)
    with socket.socket(socket.AF_UNIX) as honest, honest.makefile("rb") as file:
        honest.settimeout(30)
        honest.connect(str(control.path))
        honest.sendall(b'{"execute": "events"}\n')
        assert b"postcopy" in file.readline()
        clients = [unread_client(control.path) for _ in range(200)]
        try:
            for _ in range(6):  # progress comes twice a second
                assert file.readline(), "the honest client was hung up on"
        finally:
            for client in clients:
                client.close()
    assert program.alive()


def test_slow_clients_of_the_metrics(daemon: Daemon) -> None:
    """They say a byte now and then, more of them than may be connected; scrapers get their answers."""
    program, _ = daemon("d", "--metrics", "127.0.0.1:0", *RV64)
    where = program.wait_for("metrics", lambda line: line["event"] == "metrics")["address"]
    host, _, port = where.rpartition(":")
    slow = []
    for _ in range(300):
        client = socket.create_connection((host, int(port)), 10)
        with contextlib.suppress(OSError):
            client.sendall(b"GET /metrics HTTP/1.1\r\nX-Slow: ")
        slow.append(client)
    try:
        for _ in range(3):
            with urllib.request.urlopen(f"http://{where}/metrics", timeout=60) as answer:
                assert b"postcopy_build_info" in answer.read()
            for client in slow:
                with contextlib.suppress(OSError):
                    client.send(b"x")
    finally:
        for client in slow:
            client.close()


def test_what_is_no_request(daemon: Daemon) -> None:
    program, control = daemon("d", *RV64)
    said: list[bytes] = [
        b"\n" * 10_000,
        b"[" * 60_000 + b"\n",
        b"{}\n",
        b"null\n",
        b'{"execute": 1}\n',
        b'{"execute": "status", "x": 1}\n',
        b'{"execute": "set", "arguments": {"recover-for": 1e999}}\n',
        b'{"execute": "set", "arguments": {"recover-for": -1}}\n',
        b'{"execute": "start", "arguments": {"kind": "rv64", "memory": 1e300}}\n',
        b"\xff\xfe\n",
        os.urandom(3000) + b"\n",
        b'{"execute": "start", "arguments": {"kind": "kvm", "memory": "900TiB"}}\n',
        b'{"execute": "migrate"}\n',
        b'{"execute": "migrate", "arguments": {"to": "\\ud800:1"}}\n',
        b'{"execute": "status", "id": {"a": 1}}\n',
        b'{"execute": "end", "arguments": {"machine": "' + b"x" * 5000 + b'"}}\n',
        b"x" * 100_000,
        b'{"execute": "start", "arguments": {"kind": "rv64", "memory": "16MiB", "vcpus": 999}}\n',
    ]
    for line in said:
        with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as file:
            client.settimeout(30)
            client.connect(str(control.path))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(line)
                client.sendall(b'{"execute": "commands", "id": 7}\n')
            with contextlib.suppress(ConnectionResetError):
                for answer in file:
                    if json.loads(answer).get("id") == 7:
                        break
    assert len(control.machines()) == 1
    program.check()


def test_mode_of_the_socket(daemon: Daemon, start: Start, tmp_path: Path) -> None:
    """0600 from its first instant, whatever the umask is."""
    seen: set[int] = set()
    path = tmp_path / "d"
    program = start("daemon", "--json", "--control", path, before=["sh", "-c", 'umask 0; exec "$0" "$@"'])

    def there() -> bool:
        with contextlib.suppress(FileNotFoundError):
            mode = os.stat(path).st_mode
            if stat.S_ISSOCK(mode):
                seen.add(stat.S_IMODE(mode))
                return True
        return False

    wait_until("socket", there)
    wait_until("answer", lambda: _answers(Control(path)))
    there()
    assert seen == {0o600}
    assert program.alive()


def _answers(control: Control) -> bool:
    with contextlib.suppress(OSError, Refusal, AssertionError):
        control.ask("status")
        return True
    return False


def test_settings_that_change_all_the_time(daemon: Daemon, start: Start) -> None:
    """From many clients, while a machine arrives and leaves again."""
    program, control = daemon("d")
    source = start("source", "--json", *RV64, "--connect", program.where)
    asked: list[Any] = []
    for number in range(40):
        asked.append(control.begin("set", recover_for=1 + number, max_bandwidth=1 << 20, bulk_channels=1 + number % 16))
    for one in asked:
        one.answer()
    assert source.end() == 0, source.tail()
