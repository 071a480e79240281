# SPDX-License-Identifier: Apache-2.0
"""Certificates for tests, and a cable that is cut at a byte that the test chooses."""

from __future__ import annotations

import atexit
import contextlib
import functools
import select
import socket
import ssl
import struct
import tempfile
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import trio

from postcopy.tls import Credentials, TlsStream
from postcopy.tls._authority import issue, new_authority

RECORD_HEAD_BYTES = 5
APPLICATION_DATA = 0x17  # the type of every encrypted record of TLS 1.3


def records(stream: bytes) -> list[tuple[int, int]]:
    """Type and length of each whole record of a stream of TLS. AssertionError where something else is in it."""
    found = []
    at = 0
    while at + RECORD_HEAD_BYTES <= len(stream):
        kind, version, size = struct.unpack_from("!BHH", stream, at)
        assert kind in (0x14, 0x15, 0x16, APPLICATION_DATA), f"no record of TLS at byte {at}: {stream[at : at + 16]!r}"
        assert version in (0x0301, 0x0303), f"version {version:#x} at byte {at}"
        assert size <= (1 << 14) + 256, f"a record of {size} bytes"
        found.append((kind, size))
        at += RECORD_HEAD_BYTES + size
    return found


def client_hello() -> bytes:
    """The first that a client says, which makes a server sign."""
    written = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), written, server_hostname="x")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return written.read()


async def connect(credentials: Credentials, stream: trio.SocketStream, name: str, session: bytes = b"") -> TlsStream:
    """As the side that connects, which expects that name in the peer's certificate."""
    tls = TlsStream(stream.socket, await credentials.context(server=False), name, session)
    await tls.handshake()
    return tls


# ---- a cable that is cut

Passes = Callable[[bytes], int | None]
"""Of the next bytes of one direction: how many pass before the cable is cut; None: all, and it is not."""


def after(count: int) -> Passes:
    """So many bytes pass."""
    left = count

    def passes(data: bytes) -> int | None:
        nonlocal left
        if left < len(data):
            return left
        left -= len(data)
        return None

    return passes


def inside_record(number: int, at: int) -> Passes:
    """Of the encrypted records of a direction, counted from 0: this one is cut at this byte, from its head on; where it
    is not so long, and where `at` is negative, before its end."""
    seen = b""
    index = 0  # of the record whose head is looked for

    def passes(data: bytes) -> int | None:
        nonlocal seen, index
        before = len(seen)
        seen += data
        while len(seen) >= RECORD_HEAD_BYTES:
            kind, _, content_bytes = struct.unpack_from("!BHH", seen)
            size = RECORD_HEAD_BYTES + int(content_bytes)
            cut = min(at, size - 1) if at >= 0 else size + at
            if kind == APPLICATION_DATA and index == number and cut <= len(seen):
                return max(0, cut - before)
            if size > len(seen):
                break
            index += kind == APPLICATION_DATA
            seen = seen[size:]
            before -= size
        return None

    return passes


class _Connection:
    """Two connected sockets, both closed when both directions have ended."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.ends = (near, far)
        self.over = ""  # or how it was cut
        self._lock = threading.Lock()
        self._directions = 2
        for end in self.ends:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setblocking(False)

    def carry(self, source: socket.socket, sink: socket.socket, passes: Passes | None, way: str) -> None:
        """One direction, to its end or a cut."""
        with contextlib.suppress(OSError):
            while self._until(source, select.POLLIN) and (data := source.recv(1 << 16)):
                count = passes(data) if passes is not None else None
                self._send(sink, data[:count])
                if count is not None:
                    self.over = self.over or way
            if not self.over:
                sink.shutdown(socket.SHUT_WR)
        with self._lock:
            self._directions -= 1
            if self._directions:
                return
        for end in self.ends:
            if self.over == "reset":  # by close(2): SO_LINGER in socket(7)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()

    def _send(self, sink: socket.socket, data: bytes) -> None:
        left = memoryview(data)
        while left and self._until(sink, select.POLLOUT):
            left = left[sink.send(left) :]

    def _until(self, end: socket.socket, event: int) -> bool:
        """False: it is over."""
        poll = select.poll()
        poll.register(end, event)
        while not self.over:
            if poll.poll(20):
                return True
        return False


class Relay:
    """A cable to `target`, in threads of its own, until its ``with`` block is left.

    `cuts` are for the next connections, in the order in which they are made: ``(out, back, way)``; what passes towards
    the target and back, and whether it is cut with a ``reset`` or by an orderly ``close`` of TCP. Later ones are not
    cut.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host.strip("[]"), int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._connections: list[_Connection] = []
        self._threads: list[threading.Thread] = []
        self._is_down = False
        self.cuts: list[tuple[Passes | None, Passes | None, str]] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def made(self) -> int:
        """Connections so far, those aside that came while it was down."""
        return len(self._connections)

    @property
    def cut(self) -> int:
        """How many of them were cut."""
        return sum(bool(connection.over) for connection in self._connections)

    def __enter__(self) -> Relay:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.down()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def down(self) -> None:
        """Resets every connection, and the new ones, until `up`."""
        with self._lock:
            self._is_down = True
            for connection in self._connections:
                connection.over = connection.over or "reset"

    def up(self) -> None:
        self._is_down = False

    # ---- in its threads

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                    continue
                if self._is_down:
                    near.close()
                    far.close()
                    continue
                connection = _Connection(near, far)
                self._connections.append(connection)
                out, back, way = self.cuts.pop(0) if self.cuts else (None, None, "")
            self._start(connection.carry, near, far, out, way)
            self._start(connection.carry, far, near, back, way)


# ---- certificates


class Site:
    """An authority, and the directories for ``--tls`` that it has issued."""

    def __init__(self, directory: Path, name: str = "test CA") -> None:
        self.directory = directory
        self.directory.mkdir()
        self.authority = directory / "ca"
        new_authority(self.authority, name)

    def issue(self, name: str, *hosts: str, days: int = 1, now: datetime | None = None) -> Path:
        """The directory `name`, of a host with these names (by default this one's address on loopback), new or
        renewed."""
        out = self.directory / name
        issue(self.authority, hosts or ("127.0.0.1", "::1", "localhost"), out, days, now=now)
        return out


@functools.cache
def _scratch() -> Path:
    directory = tempfile.TemporaryDirectory(prefix="postcopy-tls-")
    atexit.register(directory.cleanup)
    return Path(directory.name)


@functools.cache
def site() -> Site:
    """One for all tests of this process."""
    return Site(_scratch() / "site")


@functools.cache
def other_site() -> Site:
    """Another one, that the first does not know."""
    return Site(_scratch() / "other", "another CA")


@functools.cache
def directory() -> Path:
    """Of this host, on loopback."""
    return site().issue("here")
