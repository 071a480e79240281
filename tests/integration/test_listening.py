# SPDX-License-Identifier: Apache-2.0
"""A destination that listens takes a machine, whatever has connected before."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import postcopy
from postcopy import wire as p
from postcopy.net import CallingLink, parse_address

Start = Callable[..., Any]
Hello = Callable[[str], socket.socket]
MIB = 1 << 20

pytestmark = pytest.mark.needs("uffd-user")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(MIB))
    return path


@pytest.fixture
def hello() -> Iterator[Callable[[str], socket.socket]]:
    """Says a good hello to an address, and returns the connection, which stays open as long as the test."""
    with contextlib.ExitStack() as stack:

        async def say(address: str) -> int:
            link = await CallingLink.open(parse_address(address), "source")
            fd = link.control.socket.detach()
            os.set_blocking(fd, True)
            return fd

        yield lambda address: stack.enter_context(socket.socket(fileno=trio.run(say, address)))


@pytest.mark.parametrize("behaviour", ["hangs up", "says nothing", "talks nonsense"])
def test_after_a_good_hello(side: Start, image: Path, hello: Hello, behaviour: str) -> None:
    dest = side("dest", "--json", "--listen", "127.0.0.1:0")

    for _ in range(3):
        connection = hello(dest.address)
        if behaviour == "hangs up":
            connection.close()
        elif behaviour == "talks nonsense":
            connection.sendall(b"\0\0\0\x05nonsense")
    source = side("source", "--json", "--machine", "image", "--image", image, "--connect", dest.address)
    status, _, errors = source.end()
    assert status == 0, errors
    status, result, errors = dest.end()
    assert status == 0, errors
    assert result["verified"] is True


def test_after_offers_that_came_to_nothing(side: Start, image: Path, tmp_path: Path) -> None:
    """One that was rejected, and one that was taken and given up before it was decided."""
    dest = side("dest", "--json", "--listen", "127.0.0.1:0")
    rejected = side(
        "source", "--json", "--machine", "rv64", "--memory", "16MiB", "--workload", "disk", "--disk", tmp_path / "disk",
        "--connect", dest.address,
    )  # fmt: skip
    status, result, errors = rejected.end()
    assert status == 1
    assert "--disk" in errors
    given_up = side(
        "source", "--json", "--machine", "rv64", "--memory", "16MiB", "--migrate-after", "60", "--connect", dest.address
    )
    given_up.wait_status("active")
    given_up.signal(signal.SIGTERM)
    assert given_up.end()[0] == 1
    dest.wait_for("the end of it", lambda line: line["event"] == "migration-ended")
    source = side("source", "--json", "--machine", "image", "--image", image, "--connect", dest.address)
    status, _, errors = source.end()
    assert status == 0, errors
    status, result, errors = dest.end()
    assert status == 0, errors
    assert result["status"] == "completed"
    assert errors.count("waiting for the next one") == 2


def test_a_signal_ends_it(side: Start, hello: Hello) -> None:
    """Also while a peer is connected that says nothing."""
    dest = side("dest", "--json", "--listen", "127.0.0.1:0")
    hello(dest.address)
    dest.signal(signal.SIGTERM)
    status, result, errors = dest.end()
    assert status == 1
    assert result["status"] == "failed"
    assert "interrupted before a machine came" in result["error"]
    assert errors.count("postcopy: error:") == 1


@pytest.mark.parametrize("name", ["source", "dest"])
def test_a_signal_ends_connecting(side: Start, name: str) -> None:
    """With a peer that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        machine = ("--machine", "rv64", "--memory", "16MiB") if name == "source" else ()
        one = side(name, "--json", *machine, "--connect", f"127.0.0.1:{silent.getsockname()[1]}")
        silent.settimeout(30)
        peer, _ = silent.accept()
        with peer:
            one.signal(signal.SIGTERM)
            status, result, errors = one.end()
    assert status == 1
    assert "interrupted" in result["error"]
    assert errors.count("postcopy: error:") == 1


def _attach(address: str, count: int) -> None:
    """That many destinations in one process, which is killed."""

    async def attach() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(count):
                await stack.enter_async_context(postcopy.attach(address, how="user-only"))
            print("attached", flush=True)
            await trio.sleep_forever()

    trio.run(attach)


def test_lost_destinations_take_no_place(side: Start, spawn_child: Start, tmp_path: Path) -> None:
    """Those of an image may come back, and are waited for: more of them than are served at a time."""
    image = tmp_path / "large"
    image.write_bytes(os.urandom(4 * MIB))
    source = side(
        "source", "--json", "--machine", "image", "--image", image, "--listen", "127.0.0.1:0", "--serve", "forever",
        "--max-bandwidth", "256KiB/s",
    )  # fmt: skip
    for _ in range(3):
        lost = spawn_child(_attach, source.address, 6)
        deadline = time.monotonic() + 60
        while "attached" not in lost.output():
            assert time.monotonic() < deadline, lost.errors()
            assert lost.process.poll() is None, lost.errors()
            time.sleep(0.02)
        lost.kill()
    last = side("dest", "--json", "--connect", source.address)
    last.wait_status("postcopy-active")
    last.signal(signal.SIGTERM)
    last.end()
    source.signal(signal.SIGTERM)
    source.end()


@pytest.mark.needs("ipv6")
@pytest.mark.parametrize("listen", ["[::]:0", ":0", "*:0"])
def test_both_families(side: Start, image: Path, hello: Hello, listen: str) -> None:
    """As README and the systemd units have it: a source finds it by IPv4 and by IPv6, at one port."""
    dest = side("dest", "--json", "--listen", listen, "--insecure")
    port = dest.address.rpartition(":")[2]
    assert [line["address"] for line in dest.events("listening")] == [f"0.0.0.0:{port}", f"[::]:{port}"]
    hello(f"[::1]:{port}").close()
    source = ("source", "--json", "--machine", "image", "--image", image)
    status, _, errors = side(*source, "--connect", f"127.0.0.1:{port}").end()
    assert status == 0, errors
    status, result, errors = dest.end()
    assert status == 0, errors
    assert "::ffff:" not in errors + str(result)


@pytest.mark.needs("ipv6")
def test_both_families_in_words(spawn_child: Start) -> None:
    """What a person is told is something to connect to."""
    addresses = ("--listen", "[::]:0", "--metrics", "*:0")
    dest = spawn_child([sys.executable, "-m", "postcopy", "dest", "--insecure", *addresses])

    def wait_for(pattern: str) -> str:
        deadline = time.monotonic() + 60
        while not (found := re.search(pattern, dest.output() + dest.errors())):
            assert time.monotonic() < deadline, (pattern, dest.output(), dest.errors())
            assert dest.process.poll() is None, dest.errors()
            time.sleep(0.02)
        return found[1]

    every = r"every address of this host \(IPv4 and IPv6\)"
    metrics = int(wait_for(rf"metrics at http://HOST:(\d+)/metrics, on {every}\n"))
    port = int(wait_for(rf"listening on port (\d+) of {every}, without TLS\n"))
    for host in ("127.0.0.1", "::1"):
        for there in (metrics, port):
            with socket.create_connection((host, there), 30) as browser:
                browser.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                assert browser.recv(12).startswith(b"HTTP/1.1 200" if there == metrics else p.PREAMBLE)
    wait_for(r"( 127\.0\.0\.1:\d+: this is an HTTP client, not a postcopy peer)")


@pytest.mark.parametrize("files", [6, 8, 14])
def test_too_few_open_files(side: Start, image: Path, files: int) -> None:
    """One line says what is short and what to do, whichever step of it fails."""
    words = f"Too many open files (remedy: allow this process more than {files} open files: ulimit -n 1024)"
    shell = ("sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", sys.executable, "-m", "postcopy")
    dest = side("dest", "--json", "--listen", "127.0.0.1:0", command=shell)
    if files > 8:
        source = side("source", "--json", "--machine", "image", "--image", image, "--connect", dest.address)
        status, _, errors = source.end()
        assert status == 1
        assert words in errors
        dest.signal(signal.SIGTERM)
    status, _, errors = dest.end()
    assert status == 1
    assert f"{words}\n" in errors or f"{words})\n" in errors
    assert "Traceback" not in errors
    assert "OSError" not in errors
