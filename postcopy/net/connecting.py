# SPDX-License-Identifier: Apache-2.0
"""Connections to a side that listens, from the call to the welcome.

The handshake reads exactly as many bytes as it asks for: a data connection is given to the core afterwards, and the
byte behind the welcome is a frame. Errors: `PeerError` and `ProtocolError` for the other host, with its address;
`ResourceError` for this one, `ConfigurationError` for an address that `Protection` does not allow.

Under TLS each connection resumes the session of an earlier one to the same peer, where there is one: no certificate is
sent and no key is signed. A session is used only with the credentials, and for the name, that it was made with.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
from dataclasses import dataclass, replace

import trio

from postcopy._fd import FdHolder
from postcopy.errors import NO_FILES, PeerError, PostcopyError, ProtocolError, out_of_files
from postcopy.net.addresses import Address
from postcopy.net.link import Stream
from postcopy.net.protection import LOCAL, Protection
from postcopy.net.sockets import address_of, open_stream
from postcopy.tls import Action, Context, TlsError, TlsStream
from postcopy.wire import PROTOCOL_VERSION, ClientHandshake, Hello, OlderPeerError, RefusedError, one_line

HANDSHAKE_TIMEOUT_S = 10.0
DOES: dict[Action, str] = {"send": "send a machine to here", "take": "take a machine from here"}


@dataclass(frozen=True)
class _Secured:
    """How connections to the peer are made from now on."""

    context: Context | None  # None: plain
    name: str  # that the peer's certificate must have
    session: bytes = b""

    def over(self, stream: trio.SocketStream) -> Stream:
        """Its handshake is still to be done."""
        return stream if self.context is None else TlsStream(stream.socket, self.context, self.name, self.session)


class Opening:
    """A data connection on its way, up to where something can be said on it. `stream` may be cancelled, and called
    again: nothing is lost by that. Owns its socket until `stream` has returned."""

    def __init__(self, address: Address, secured: _Secured) -> None:
        """Begins it; `address` is a number. `PeerError`, `ResourceError`."""
        self._address = address
        self.secured = secured
        self._stream: Stream | None = None
        try:
            [(family, kind, _, _, name), *_] = socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
            )
            self._socket = trio.socket.socket(family, kind)
        except OSError as error:
            if error.errno in NO_FILES:
                raise out_of_files(error.errno or 0, f"cannot connect to {address}") from error
            raise PeerError(f"{address}: {error.strerror}") from error  # as when an interface is gone
        handle = socket.socket(fileno=self._socket.fileno())
        try:
            number = handle.connect_ex(name)
        finally:
            handle.detach()
        if number not in (0, errno.EINPROGRESS):
            self._socket.close()
            raise self._failed(number)

    async def stream(self) -> Stream:
        """`PeerError`; `trio.BrokenResourceError`."""
        if self._stream is None:
            await trio.lowlevel.wait_writable(self._socket)
            if number := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise self._failed(number)
            self._stream = self.secured.over(trio.SocketStream(self._socket))
        if isinstance(self._stream, TlsStream):
            await self._stream.handshake()
        return self._stream

    def _failed(self, number: int | None) -> PeerError:
        return PeerError(f"{self._address}: {os.strerror(number or 0)}")

    def close(self) -> None:
        self._socket.close()


class Caller:
    """Makes the connections of one migration to a peer, and keeps what speeds up the next ones. Trio thread only."""

    def __init__(self, protection: Protection = LOCAL) -> None:
        self.protection = protection
        self.early = 0  # how many data connections there were last time
        self._name = ""  # of the peer, as it was called last
        self._context: Context | None = None  # of the last control connection: its data connections have the same
        self._last: _Secured | None = None
        self._early: list[Opening] = []

    async def connect(
        self,
        address: Address,
        hello: Hello,
        timeout_s: float = HANDSHAKE_TIMEOUT_S,
        *,
        name: str = "",
        token: bytes = b"",
        version: int = PROTOCOL_VERSION,
        early: int = 0,
    ) -> tuple[Stream, int]:
        """A connection on which the peer has said welcome, and the version that is spoken there: an older one than
        `version` where the peer has no newer one. `token` is that of the migration that the hello names. Every address
        that a host name has is tried. `name`: that the peer's certificate must have, where it is not the address's
        host.

        `early`: so many data connections are begun beside the handshake; see `take_early`.

        Bounded by `timeout_s` for the connection and again for the handshake. Cancellable. Errors: `PeerError`,
        `ProtocolError`, `ResourceError`, `ConfigurationError`.
        """
        self.close_early()
        self._name = name or address.host.partition("%")[0]
        while True:
            secured = await self._looked_up()
            plain = await open_stream(address, timeout_s, self.protection)
            try:
                if early:
                    self._begin_early(address_of(plain), secured, early)
                stream = secured.over(plain)
                await self._beside_early(stream, secured, hello, timeout_s, token, version)
            except BaseException as error:
                self.close_early()
                await trio.aclose_forcefully(plain)
                if isinstance(error, OlderPeerError):
                    version = error.version  # lower each time
                    continue
                if isinstance(error, PeerError | ProtocolError):
                    raise _named(error, address) from error
                raise
            return stream, version

    async def connect_data(
        self, address: Address, hello: Hello, *, token: bytes, version: int, early: Opening | None = None
    ) -> Stream:
        """The same for a data connection, to where `connect` has found the peer. `early`: one that was begun, which is
        taken over. Bounded by the caller."""
        if early is not None:
            try:
                return await self._open_data(early, hello, token, version)
            except RefusedError as error:
                raise _named(error, address) from error
            except (PeerError, ProtocolError):
                pass  # the peer may have closed it, which has waited: another one
        opening = Opening(address, self._secured())
        try:
            return await self._open_data(opening, hello, token, version)
        except (PeerError, ProtocolError) as error:
            raise _named(error, address) from error

    async def _open_data(self, opening: Opening, hello: Hello, token: bytes, version: int) -> Stream:
        try:
            stream = await opening.stream()
            await self._greet(stream, opening.secured, hello, token, version)
        except BaseException as error:
            opening.close()
            if isinstance(error, trio.BrokenResourceError):
                raise broken(error) from error
            raise
        return stream

    # ---- connections that are begun before they are needed

    def take_early(self) -> list[Opening]:
        """The data connections that were begun with the control connection; the caller's from then on."""
        taken, self._early = self._early, []
        return taken

    def close_early(self) -> None:
        for opening in self.take_early():
            opening.close()

    def _begin_early(self, address: Address, secured: _Secured, count: int) -> None:
        try:
            for _ in range(count):
                self._early.append(Opening(address, secured))
        except PostcopyError:
            pass  # those that are needed are begun again

    async def _beside_early(
        self, stream: Stream, secured: _Secured, hello: Hello, timeout_s: float, token: bytes, version: int
    ) -> None:
        """The handshake, while those that were begun come as far as they can."""
        failures: list[Exception] = []

        async def greet() -> None:
            try:
                with trio.fail_after(timeout_s):
                    await self._greet(stream, secured, hello, token, version)
            except trio.TooSlowError:
                failures.append(PeerError(f"no handshake within {timeout_s:g} s; is that a postcopy port?"))
            except Exception as error:  # noqa: BLE001  # raised outside of the nursery, which would wrap it
                failures.append(error)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(greet)
            for opening in self._early:
                nursery.start_soon(_advance, opening)
        for failure in failures:
            raise failure

    # ---- the handshakes

    async def _looked_up(self) -> _Secured:
        """With the certificates as they are now."""
        if (credentials := self.protection.credentials) is not None:
            self._context = await credentials.context(server=False)
        return self._secured()

    def _secured(self) -> _Secured:
        assert (self._context is None) == (self.protection.credentials is None)
        last = self._last
        if last is not None and last.context is self._context and last.name == self._name:
            return last
        return _Secured(self._context, self._name)

    async def _greet(self, stream: Stream, secured: _Secured, hello: Hello, token: bytes, version: int) -> None:
        """`PeerError`, `ProtocolError`."""
        resumed = False
        try:
            if isinstance(stream, TlsStream):
                await stream.handshake()
                resumed = stream.peer.resumed
                self._check_authorised(stream, "take" if hello.side == "source" else "send")
            await _say_hello(stream, hello, token, version)
        except BaseException as error:
            if resumed and self._last is secured and not isinstance(error, RefusedError):
                # The session may be why: a peer of an older version that does not take it closes without a word. (Cut
                # before it was resumed, a connection says nothing about that, and the next one is as quick.)
                self._last = None
            if isinstance(error, trio.BrokenResourceError):
                raise broken(error) from error
            raise
        if isinstance(stream, TlsStream) and (session := stream.session):
            self._last = replace(secured, session=session)

    def _check_authorised(self, stream: TlsStream, action: Action) -> None:
        """The peer, to do what it does where we call it."""
        assert self.protection.credentials is not None
        if not self.protection.credentials.authorisation.allows(action, stream.peer):
            raise TlsError(
                f"{one_line(stream.peer.known_as, 300)} may not {DOES[action]}, as far as --tls-authz of this host says"
            )


def _named(error: PeerError | ProtocolError, address: Address) -> PeerError | ProtocolError:
    """The same, with the address of the peer."""
    text = f"{address}: {error}"
    if isinstance(error, RefusedError):
        return RefusedError(text, error.reason, error.code, error.proven)
    return type(error)(text)


async def _advance(opening: Opening) -> None:
    with contextlib.suppress(PostcopyError, trio.BrokenResourceError, trio.ClosedResourceError, OSError):
        await opening.stream()  # what fails is seen when it is needed


async def _say_hello(stream: Stream, hello: Hello, token: bytes, version: int) -> None:
    handshake = ClientHandshake(hello, token, version)
    await stream.send_all(handshake.send_hello())
    while wanted := handshake.wanted():
        handshake.receive_data(await stream.receive_some(wanted))


def broken(error: trio.BrokenResourceError) -> PeerError:
    """What it was. Under TLS 1.3 a client has done its handshake before it hears that its certificate is refused."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno == errno.EPROTO:
        return TlsError(str(cause.strerror))  # it says all there is to say
    reason = f" ({cause.strerror})" if isinstance(cause, OSError) and cause.strerror else ""
    return PeerError(f"the connection broke during the handshake{reason}")


def keep_alive(fd: FdHolder, silence_s: float) -> FdHolder:
    """Lets the kernel end a data connection that has been dead for `silence_s`, idle or not (tcp(7)); passes it on."""
    handle = socket.socket(fileno=fd.fd)
    try:
        seconds = max(1, math.ceil(silence_s / 3))
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
        handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds)
        handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
        handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(silence_s * 1000))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOPROTOOPT):  # of a socket that is no TCP connection
            raise
    finally:
        handle.detach()  # the descriptor stays its holder's
    return fd
