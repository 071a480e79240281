# SPDX-License-Identifier: Apache-2.0
"""TLS around a connection of the hostile peer, which knows nothing of it: a peer whose certificate is good is still
hostile.

Each connection has a thread, between the socket that the peer uses and the one that goes to the program. Ends are
passed on as they are: an orderly one as such, a reset as a reset. OpenSSL is driven by Python's `ssl`, not by our code.
"""

from __future__ import annotations

import contextlib
import functools
import select
import socket
import ssl
import struct
import threading
from pathlib import Path

import tls

PIECE_BYTES = 1 << 16
NAMES = 64
"""Peers that a test can be: one certificate for each."""


def directory() -> Path:
    """Of the attacked program, for ``--tls``."""
    return tls.directory()


@functools.cache
def _context(name: str, *, server: bool) -> ssl.SSLContext:
    where = tls.site().issue(name, name, "127.0.0.1")
    role = "server" if server else "client"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(where / "ca-cert.pem")
    context.load_cert_chain(where / f"{role}-cert.pem", where / f"{role}-key.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def carried(outer: socket.socket, caller: str | None) -> socket.socket:
    """What the peer uses in its place. `caller`: the address that it calls from, each of which is another peer; None:
    it was called."""
    number = sum(map(int, caller.split("."))) % NAMES if caller else 0
    context = _context(f"peer{number}", server=caller is None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        inner, _ = listener.accept()
    _Pump(inner, outer, context, None if caller is None else "127.0.0.1").start()
    return ours


class _Pump(threading.Thread):
    def __init__(self, inner: socket.socket, outer: socket.socket, context: ssl.SSLContext, host: str | None) -> None:
        super().__init__(daemon=True)
        self._inner, self._outer = inner, outer
        for end in (inner, outer):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received, self._written = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._written, server_side=host is None, server_hostname=host)
        self._agreed = False
        self._unsent = {inner: b"", outer: b""}
        self._reads = {inner: True, outer: True}  # until its end
        self._ends = {inner: False, outer: False}  # when all is sent, and nothing more comes

    def run(self) -> None:
        broken = True
        with contextlib.suppress(OSError):  # also of TLS: the other end is lost with the one
            while not all(self._ends.values()) or any(self._unsent.values()):
                self._turn()
            broken = False
        for end in (self._inner, self._outer):
            if broken:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()

    def _turn(self) -> None:
        try:
            self._step()
        except ssl.SSLError:  # the program has heard why
            self._unsent[self._outer] += self._written.read()
            with contextlib.suppress(OSError):
                self._outer.send(self._unsent[self._outer])
            raise
        self._unsent[self._outer] += self._written.read()
        for end, data in self._unsent.items():
            if data:
                with contextlib.suppress(BlockingIOError):
                    self._unsent[end] = data[end.send(data) :]
                if self._ends[end] and not self._unsent[end]:
                    end.shutdown(socket.SHUT_WR)
        self._wait()

    def _wait(self) -> None:
        poll, waits = select.poll(), False
        for end, other in ((self._inner, self._outer), (self._outer, self._inner)):
            # No more is taken than the other end takes: who does not read must be seen not to.
            reads = self._reads[end] and not self._unsent[other] and (self._agreed or end is self._outer)
            if events := select.POLLIN * reads | select.POLLOUT * bool(self._unsent[end]):
                poll.register(end, events)
                waits = True
        ready = dict(poll.poll()) if waits else {}
        if ready.get(self._inner.fileno(), 0) & ~select.POLLOUT and self._reads[self._inner]:
            if data := self._inner.recv(PIECE_BYTES):
                self._tls.write(data)
            else:
                self._reads[self._inner] = False
                with contextlib.suppress(ssl.SSLWantReadError):
                    self._tls.unwrap()
                self._end(self._outer)
        if ready.get(self._outer.fileno(), 0) & ~select.POLLOUT and self._reads[self._outer]:
            if data := self._outer.recv(PIECE_BYTES):
                self._received.write(data)
            else:
                self._reads[self._outer] = False
                self._received.write_eof()

    def _step(self) -> None:
        """What has come is decrypted."""
        with contextlib.suppress(ssl.SSLWantReadError):
            if not self._agreed:
                self._tls.do_handshake()
                self._agreed = True
            if not self._ends[self._inner]:
                with contextlib.suppress(ssl.SSLZeroReturnError, ssl.SSLEOFError):
                    while data := self._tls.read(PIECE_BYTES):
                        self._unsent[self._inner] += data
                self._end(self._inner)

    def _end(self, end: socket.socket) -> None:
        """No more comes for it."""
        self._ends[end] = True
        self._unsent[self._outer] += self._written.read()
        if not self._unsent[end]:
            end.shutdown(socket.SHUT_WR)
