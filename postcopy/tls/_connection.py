# SPDX-License-Identifier: Apache-2.0
"""One connection under TLS 1.3, as a Trio stream, until the core gets it.

TLS is OpenSSL's, in C (csrc/tls), for control and data connections alike: a connection is greeted before it is known to
be one for data, and what has been agreed on by then can only be handed to the code that has agreed on it. A
`TlsStream` drives it without blocking: it calls, and where that says "not yet" it waits for the socket. So nothing is
lost when one of its waits is cancelled: a handshake, and a read, can be taken up again. A write cannot, since part of
it may be on its way: a stream whose `send_all` was cancelled is broken, and says so.

Bytes that OpenSSL holds are not seen by poll(2): always read first, and wait only when there is nothing (`read_now`).
Whether the peer has ended the stream in order (a close_notify) or something on the way has cut it is told apart: the
end of the stream is ``b""``, a cut `trio.BrokenResourceError`.
"""

from __future__ import annotations

import errno
import os
import socket as stdlib_socket
from typing import Any, Protocol

import trio

from postcopy._fd import FdHolder
from postcopy._native import ffi, lib
from postcopy.errors import ConfigurationError, ErrorLine, PeerError, ResourceError, c_text, check
from postcopy.tls._names import PeerCertificate

RECEIVE_BYTES = 64 * 1024


class TlsError(PeerError):
    """The two ends do not come to terms: another authority, a certificate that has ended, no TLS at the other end."""


class Context:
    """What one side has: its certificate, its key, the authority that it trusts. Immutable; any number of connections,
    in any thread."""

    def __init__(self, server: bool, ca: bytes, certificate: bytes, key: bytes, *, names: tuple[str, str, str]) -> None:
        """In PEM. `ConfigurationError` for what cannot be used, which calls the three by their `names`; `ResourceError`
        without OpenSSL. Takes milliseconds."""
        self.server = server
        pointer: Any = ffi.new("struct pc_tls_context **")
        line = ErrorLine()
        pem = (ca, len(ca), certificate, len(certificate), key, len(key))
        result = lib.pc_tls_context_new(server, *pem, pointer, line.buffer, line.size)
        if result == -errno.ENOENT:
            raise ResourceError(str(line))
        if result == -errno.EINVAL:
            text = str(line)
            for what, name in zip(("the CA's certificate", "the certificate", "the private key"), names, strict=True):
                text = text.replace(what, name)
            raise ConfigurationError(text)
        line.check(result, names[1])
        self.struct: Any = ffi.gc(pointer[0], lib.pc_tls_context_free)
        self.not_after_s = int(lib.pc_tls_context_not_after(self.struct))  # when the certificate ends, since 1970


class InPlace(Protocol):
    """A connection that is read and written at once, without other tasks running meanwhile."""

    socket: trio.socket.SocketType

    @property
    def pending(self) -> bool:
        """There may be something to read although the socket is not readable."""

    def read_now(self, max_bytes: int = RECEIVE_BYTES) -> bytes | None:
        """What has come; ``b""`` at the end, None when there is nothing yet: only then the socket can be waited for.
        `trio.BrokenResourceError`, `trio.ClosedResourceError`."""

    def write_now(self, data: bytes | memoryview) -> int:
        """How much of it has been sent, or taken to be sent; what is not must be given again. Errors as `read_now`."""


class SocketInPlace:
    """Of a connection without TLS."""

    def __init__(self, socket: trio.socket.SocketType) -> None:
        self.socket = socket

    @property
    def pending(self) -> bool:
        return False

    def read_now(self, max_bytes: int = RECEIVE_BYTES) -> bytes | None:
        try:
            return os.read(self.socket.fileno(), max_bytes)
        except BlockingIOError:
            return None
        except OSError as error:
            raise _lost(error) from error

    def write_now(self, data: bytes | memoryview) -> int:
        try:
            return os.write(self.socket.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _lost(error) from error


def in_place(stream: trio.abc.Stream) -> InPlace | None:
    """The same connection, read and written in place; None for one that has no socket."""
    if isinstance(stream, TlsStream):
        return stream
    return SocketInPlace(stream.socket) if isinstance(stream, trio.SocketStream) else None


class TlsStream(trio.abc.HalfCloseableStream):
    """Over a connected socket, which is its own from then on. One task may send while another one receives."""

    def __init__(self, socket: trio.socket.SocketType, context: Context, name: str = "", session: bytes = b"") -> None:
        """`name`: of a side that connects, the DNS name or IP address that the peer's certificate must have. `session`:
        what `session` of an earlier connection to the same peer has said, to resume."""
        pointer: Any = ffi.new("struct pc_tls **")
        expected: Any = _as_in_certificate(name) if name else ffi.NULL
        result = lib.pc_tls_new(context.struct, socket.fileno(), expected, session, len(session), pointer)
        if result == -errno.EINVAL:
            raise _no_name(name)
        check(result, "beginning TLS")
        self._adopt(socket, ffi.gc(pointer[0], lib.pc_tls_free))

    def _adopt(self, socket: trio.socket.SocketType, struct: Any) -> None:
        self.socket = socket
        self._struct = struct
        self._torn = False  # a part of something was sent: nothing that follows would be understood
        self._sending = trio.Lock()
        self._buffer: Any = b""  # what is read comes into it
        self._peer: PeerCertificate | None = None

    @classmethod
    def adopt(cls, socket: trio.socket.SocketType, struct: Any) -> TlsStream:
        """One whose handshake is done, as a `DataChannel` has it."""
        stream = cls.__new__(cls)
        stream._adopt(socket, ffi.gc(struct, lib.pc_tls_free))
        return stream

    # ---- the handshake

    async def handshake(self, turns: trio.Lock | None = None) -> None:
        """Until both ends know each other. `TlsError` when they do not come to terms; the peer has been told.
        `trio.BrokenResourceError`. A handshake that was cancelled goes on with the next call. `turns`: of those with
        the same, one does a step in each pass of the event loop, however many there are."""
        await trio.lowlevel.checkpoint()
        while True:
            if turns is not None:
                await turns.acquire()
                turns.release()
            self._check_open()
            result = lib.pc_tls_handshake(self._struct)
            if result == lib.PC_TLS_READABLE:
                await trio.lowlevel.wait_readable(self.socket)
            elif result == lib.PC_TLS_WRITABLE:
                await trio.lowlevel.wait_writable(self.socket)
            elif result == -errno.EPROTO:
                raise TlsError(self._why(result))
            elif result < 0:
                raise self._broken(result)
            else:
                return

    @property
    def peer(self) -> PeerCertificate:
        """After the handshake."""
        if self._peer is None:
            if self._struct == ffi.NULL:
                raise trio.ClosedResourceError("it was given away")
            found: Any = ffi.new("struct pc_tls_peer *")
            check(lib.pc_tls_peer(self._struct, found), "reading the peer's certificate")
            names = [name.partition(":") for name in _text(found.names).split("\n") if ":" in name]
            subject = _text(found.subject)
            self._peer = PeerCertificate(
                # One that would be shown as another one is none, as one that does not fit.
                subject=subject if subject.isprintable() else "",
                names=tuple((kind, text) for kind, _, text in names),
                not_after_s=int(found.not_after_s),
                fingerprint=c_text(found.fingerprint),
                cipher=c_text(found.cipher),
                resumed=bool(found.resumed),
            )
        return self._peer

    @property
    def session(self) -> bytes:
        """Of a side that connects: what the next connection to the same peer begins with. Empty until the peer has
        sent one, which it does behind the handshake."""
        if self.socket.fileno() < 0:
            return b""
        size = int(lib.pc_tls_session(self._struct, ffi.NULL, 0))
        buffer: Any = ffi.new("uint8_t[]", size)
        lib.pc_tls_session(self._struct, buffer, size)
        return bytes(ffi.buffer(buffer))

    # ---- in place

    @property
    def pending(self) -> bool:
        """See `InPlace`."""
        self._check_open()
        return bool(lib.pc_tls_pending(self._struct))

    def read_now(self, max_bytes: int = RECEIVE_BYTES) -> bytes | None:
        """See `InPlace`."""
        self._check_open()
        if len(self._buffer) < max_bytes:
            self._buffer = ffi.new("char[]", max_bytes)
        buffer = self._buffer
        result = int(lib.pc_tls_read(self._struct, buffer, max_bytes))
        if result == -errno.EAGAIN:
            return None
        if result < 0:
            raise self._broken(result)
        return bytes(ffi.buffer(buffer, result))

    def write_now(self, data: bytes | memoryview) -> int:
        """See `InPlace`."""
        self._check_open()
        if self._torn:
            raise trio.BrokenResourceError("something was sent in part")
        if not len(data):
            return 0
        result = int(lib.pc_tls_write(self._struct, ffi.from_buffer("char[]", data), len(data)))
        if result == -errno.EAGAIN:
            return 0
        if result < 0:
            raise self._broken(result)
        return result

    # ---- as a stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        # Not cancelled between here and the first byte, as that of a socket: a caller that has looked whether it is
        # cancelled knows that nothing was torn. (To acquire the lock lets other tasks run.)
        async with self._sending:
            with memoryview(data) as view:
                sent = 0
                while sent < len(view):
                    more = self.write_now(view[sent:])
                    sent += more
                    if not more:
                        try:
                            await trio.lowlevel.wait_writable(self.socket)
                        except BaseException:
                            self._torn = True
                            raise

    async def wait_send_all_might_not_block(self) -> None:
        self._check_open()
        await trio.lowlevel.wait_writable(self.socket)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        while (data := self.read_now(max_bytes or RECEIVE_BYTES)) is None:
            await trio.lowlevel.wait_readable(self.socket)
        return data

    async def send_eof(self) -> None:
        """Says that no more comes; what the peer sends can still be read."""
        await trio.lowlevel.checkpoint()
        async with self._sending:
            while not self._torn and (result := self._close_notify()):
                if result != -errno.EAGAIN:
                    raise self._broken(result)
                await trio.lowlevel.wait_writable(self.socket)
            try:
                self.socket.shutdown(trio.socket.SHUT_WR)
            except OSError as error:
                raise _lost(error) from error

    async def aclose(self) -> None:
        """Tells the peer that this is the end, as far as that can be done at once."""
        if self.socket.fileno() >= 0:
            if not self._torn and not self._sending.locked():
                self._close_notify()
            self.socket.close()
        await trio.lowlevel.checkpoint()

    # ---- its end

    def detach(self) -> DataChannel:
        """For the core; the stream must not be used any more. The socket blocks from here on."""
        fd = _detach(self.socket)
        struct, self._struct = self._struct, ffi.NULL
        ffi.gc(struct, None)  # type: ignore[arg-type]  # (the core frees it)
        return DataChannel(fd, struct)

    # ---- private

    def _close_notify(self) -> int:
        self._check_open()
        return int(lib.pc_tls_close_notify(self._struct))

    def _check_open(self) -> None:
        # (The number of a descriptor that was closed may be another file's by now.)
        if self.socket.fileno() < 0 or self._struct == ffi.NULL:
            raise trio.ClosedResourceError("it was closed here")

    def _why(self, result: int) -> str:
        return c_text(lib.pc_tls_why(self._struct)) or os.strerror(-result)

    def _broken(self, result: int) -> trio.BrokenResourceError:
        text = self._why(result)
        error = trio.BrokenResourceError(text)
        error.__cause__ = OSError(-result, text)
        return error


class DataChannel:
    """A connection that was welcomed, for the core. Owns both until `detach`."""

    def __init__(self, fd: FdHolder, tls: Any = None) -> None:
        """`tls`: a `struct pc_tls`, None without TLS."""
        self.fd = fd
        self._tls = tls

    def detach(self) -> tuple[int, Any]:
        """Descriptor and `struct pc_tls` (or None), as `attach_urgent` and `attach_bulk` take them."""
        fd = self.fd.detach()
        tls, self._tls = self._tls, None
        return fd, tls

    def close(self) -> None:
        """Twice does no harm."""
        tls, self._tls = self._tls, None
        if tls is not None:
            lib.pc_tls_free(tls)
        self.fd.close()


def detach(stream: trio.SocketStream | TlsStream) -> DataChannel:
    """The connection of a stream, blocking, for the core; the stream must not be used any more."""
    return stream.detach() if isinstance(stream, TlsStream) else DataChannel(_detach(stream.socket))


def stream_of(fd: int, tls: Any = None) -> trio.SocketStream | TlsStream:
    """The other way: a stream of what `DataChannel.detach` has said, which owns both."""
    socket = trio.socket.from_stdlib_socket(stdlib_socket.socket(fileno=fd))
    return trio.SocketStream(socket) if tls is None else TlsStream.adopt(socket, tls)


def _as_in_certificate(name: str) -> bytes:
    try:
        if name.isprintable():
            return name.removesuffix(".").encode("idna")
    except UnicodeError:
        pass
    raise _no_name(name)


def _no_name(name: str) -> TlsError:
    return TlsError(f"{name[:80]!r} is no name that a certificate could have")


def _detach(socket: trio.socket.SocketType) -> FdHolder:
    if socket.fileno() < 0:
        raise trio.ClosedResourceError("it was closed here")
    fd = FdHolder(socket.detach())
    os.set_blocking(fd.fd, True)
    return fd


def _lost(error: OSError) -> trio.BrokenResourceError | trio.ClosedResourceError:
    if error.errno == errno.EBADF:
        return trio.ClosedResourceError("it was closed here")
    broken = trio.BrokenResourceError(str(error))
    broken.__cause__ = error
    return broken


def _text(array: Any) -> str:
    raw: Any = ffi.string(array)
    return bytes(raw).decode("utf-8", "replace")
