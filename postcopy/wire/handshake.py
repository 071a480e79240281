# SPDX-License-Identifier: Apache-2.0
"""Opening a connection: preamble and `hello` one way, preamble and `welcome` or `refused` the other way.

The handshake finds out which version is spoken: the older one of the two. It proves that both know the token of the
migration that the hello names; ids are no secret (they are in logs), tokens are.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Final, cast

from postcopy.errors import PeerError, ProtocolError
from postcopy.wire.codec import MessageBuffer, encode, shown
from postcopy.wire.messages import (
    MAGIC,
    OLDEST_VERSION,
    PREAMBLE,
    PROTOCOL_VERSION,
    Ended,
    Hello,
    Message,
    Refused,
    Welcome,
)

_HTTP_CLIENT: Final = "an HTTP client"
_TLS: Final = "; if that is postcopy, give --tls DIR on both hosts"
_OTHERS: Final = {  # what may be at the other end by mistake, by what it says first
    b"HTTP/": "an HTTP server",
    **dict.fromkeys((b"GET ", b"HEAD ", b"POST ", b"PUT ", b"OPTIONS ", b"CONNECT ", b"PRI * HT"), _HTTP_CLIENT),
    b"\x15\x03": "a TLS server",  # an alert: it was not greeted in TLS
    b"\x16\x03": "a TLS client",
    b"SSH-": "SSH",
    b"QEVM": "a QEMU migration stream",
    b'{"QMP"': "a QEMU monitor (QMP)",
}


class RefusedError(PeerError):
    """The peer answered hello with `refused`. Who it was is not known, unless it is `proven`: it knows the token."""

    def __init__(self, text: str, reason: str, code: str = "other", proven: bool = False) -> None:
        super().__init__(text)
        self.reason = reason
        self.code = code
        self.proven = proven

    @property
    def ended(self) -> Ended | None:
        """How the migration has ended there, when the real peer says so."""
        return Ended(self.code) if self.proven and self.code in set(Ended) else None


class EndedElsewhere(PeerError):
    """The peer has proven to be the real one, and says that the migration is over there: see `peer_ended`."""

    def __init__(self, how: Ended, text: str = "") -> None:
        super().__init__(text or f"the peer says that the migration has ended there: {how}")
        self.how = how


class OlderPeerError(PeerError):
    """The listening side speaks an older version that is spoken here too: connect again, with that one."""

    def __init__(self, version: int) -> None:
        super().__init__(f"speaks version {version} of the postcopy protocol")
        self.version = version


class _Handshake:
    """Preamble and one message each way. `wanted()` never asks for a byte that comes after the handshake: on a data
    channel that byte is a frame, and belongs to the core."""

    _KINDS: ClassVar[Collection[str]]

    def __init__(self) -> None:
        self._preamble = bytearray()
        self._messages = MessageBuffer()
        self._message: Message | None = None

    @property
    def version(self) -> int:
        """What is spoken on this connection; known when the peer's preamble is."""
        return self._messages.version

    def wanted(self) -> int:
        """How many bytes may be read now; 0 when the handshake needs no more."""
        if self._message is not None:
            return 0
        if len(self._preamble) < len(PREAMBLE):
            return len(PREAMBLE) - len(self._preamble)
        return self._messages.missing(self._KINDS)

    def receive_data(self, data: bytes) -> None:
        """Takes up to `wanted()` bytes; b"" is the end of the stream. `ProtocolError` as soon as something is wrong."""
        if not data:
            raise PeerError(
                "closed the connection before saying anything"
                if not self._preamble
                else "closed the connection during the handshake"
            )
        if len(data) > self.wanted():
            raise ValueError("more bytes than were wanted")
        if len(self._preamble) < len(PREAMBLE):
            self._preamble += data
            self._check_preamble()
            return
        self._messages.feed(data)
        self._messages.missing(self._KINDS)  # refuses a bad length before its bytes come
        message = self._messages.take(self._KINDS)
        if message is not None:
            self._check_message(message)
            self._message = message

    def _check_preamble(self) -> None:
        got = bytes(self._preamble)
        if not MAGIC.startswith(got[: len(MAGIC)]):
            for beginning, who in _OTHERS.items():
                if got.startswith(beginning):
                    raise ProtocolError(f"this is {who}, not a postcopy peer{_TLS * ('a TLS' in who)}")
                if beginning.startswith(got):
                    return  # it may be: the rest will say
            raise ProtocolError(f"this is not a postcopy peer: it began with {shown(got)}")
        if len(got) == len(PREAMBLE):
            if got[-1] < OLDEST_VERSION:
                self._wrong_version(got[-1])
            self._check_version(got[-1])

    def _wrong_version(self, version: int) -> None:
        raise ProtocolError(
            f"speaks version {version} of the postcopy protocol, this is version {PROTOCOL_VERSION}, which speaks"
            f" {OLDEST_VERSION} too; use releases of postcopy on both hosts that are not that far apart"
        )

    def _check_version(self, version: int) -> None:
        raise NotImplementedError

    def _check_message(self, message: Message) -> None:
        raise NotImplementedError


class ClientHandshake(_Handshake):
    """The connecting side's, which speaks first. `OlderPeerError` when it should have spoken another version.

    A hello that names a migration is for its peer only, but any host may answer: one that does not know the token, or
    speaks an older version than that migration does (the oldest would get the token in clear), is not that peer."""

    _KINDS = frozenset({"welcome", "refused"})

    def __init__(self, hello: Hello, token: bytes = b"", version: int = PROTOCOL_VERSION) -> None:
        """`token` of the migration that `hello` names, if it names one."""
        super().__init__()
        self._messages.version = version
        self._hello = hello.signed(token, version)
        self._token = token

    def send_hello(self) -> bytes:
        return MAGIC + bytes([self.version]) + encode(self._hello, self.version)

    def _check_version(self, version: int) -> None:
        if version > self.version:
            self._wrong_version(version)  # it must not answer with more than it was asked for
        if version < self.version and self._token:
            raise ProtocolError(f"speaks version {version} of the protocol, the migration is of version {self.version}")
        if version < self.version:
            raise OlderPeerError(version)

    def _check_message(self, message: Message) -> None:
        if isinstance(message, Refused):
            proven = self.version >= 3 and message.is_signed(self._token, self._hello)
            text = f"refused the connection: {message.reason}"
            raise RefusedError(text, message.reason, message.code, proven)
        if not isinstance(message, Welcome):
            raise ProtocolError(f"answered hello with {message.TYPE}")
        if self._token and self.version >= 3 and not message.is_signed(self._token, self._hello):
            raise ProtocolError("welcomed us without knowing the token of the migration")


class ServerHandshake(_Handshake):
    """The listening side's, which answers: `send_preamble` when the client's is there, `send_welcome` or `send_refused`
    when `hello` is there and the acceptor has decided."""

    _KINDS = frozenset({"hello"})

    @property
    def has_preamble(self) -> bool:
        """The client's preamble is there."""
        return len(self._preamble) == len(PREAMBLE)

    @property
    def newer(self) -> bool:
        """The client speaks a newer version: it closes when it has seen our preamble, and comes again with ours."""
        return self.has_preamble and self._preamble[-1] > self.version

    def send_preamble(self) -> bytes:
        return MAGIC + bytes([self.version])

    @property
    def hello(self) -> Hello | None:
        return cast("Hello | None", self._message)

    def send_welcome(self, token: bytes = b"") -> bytes:
        """With `token`, of the migration that the hello names, it is proven to come from the peer."""
        return self._answer(Welcome(), token)

    def send_refused(self, reason: str, code: str = "other", token: bytes = b"") -> bytes:
        """With `token`, of the migration that the hello names, it is proven to come from the peer."""
        return self._answer(Refused(reason, code), token)

    def _answer(self, answer: Welcome | Refused, token: bytes) -> bytes:
        return encode(answer if self.hello is None else answer.signed(token, self.hello), self.version)

    def _check_version(self, version: int) -> None:
        self._messages.version = min(version, PROTOCOL_VERSION)

    def _check_message(self, message: Message) -> None:
        if not isinstance(message, Hello):
            raise ProtocolError(f"began with {message.TYPE}, not with hello")
