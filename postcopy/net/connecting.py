# SPDX-License-Identifier: Apache-2.0
"""Connections to a side that listens, from the call to the welcome.

The handshake reads exactly as many bytes as it asks for: a data connection is given to the core afterwards, and the
byte behind the welcome is a frame. Errors: `PeerError` and `ProtocolError` for the other host, with its address;
`ResourceError` for this one.
"""

from __future__ import annotations

import errno
import math
import os
import socket

import trio

from postcopy._fd import FdHolder
from postcopy.errors import PeerError, ProtocolError
from postcopy.net.addresses import Address
from postcopy.net.protection import LOCAL, Protection
from postcopy.net.sockets import open_stream
from postcopy.wire import PROTOCOL_VERSION, ClientHandshake, Hello, OlderPeerError, RefusedError

HANDSHAKE_TIMEOUT_S = 10.0


async def connect(
    address: Address,
    hello: Hello,
    timeout_s: float = HANDSHAKE_TIMEOUT_S,
    *,
    token: bytes = b"",
    version: int = PROTOCOL_VERSION,
    protection: Protection = LOCAL,
) -> tuple[trio.SocketStream, int]:
    """A connection on which the peer has said welcome, and the version that is spoken there: an older one than
    `version` where the peer has no newer one. `token` is that of the migration that the hello names. Every address that
    a host name has is tried.

    Bounded by `timeout_s` for the connection and again for the handshake. Cancellable. Errors: `PeerError`,
    `ProtocolError`, `ResourceError`, `ConfigurationError` for an address that `protection` does not allow.
    """
    while True:
        stream = await open_stream(address, timeout_s, protection)
        try:
            return await client_handshake(stream, hello, timeout_s, token=token, version=version), version
        except OlderPeerError as older:
            version = older.version  # lower each time
        except RefusedError as error:
            raise RefusedError(f"{address}: {error}", error.reason, error.code, error.proven) from error
        except (PeerError, ProtocolError) as error:
            raise type(error)(f"{address}: {error}") from error


async def client_handshake(
    stream: trio.SocketStream,
    hello: Hello,
    timeout_s: float,
    *,
    token: bytes = b"",
    version: int = PROTOCOL_VERSION,
) -> trio.SocketStream:
    """Says hello and waits for the welcome. Closes the stream unless it succeeds."""
    handshake = ClientHandshake(hello, token, version)
    try:
        with trio.fail_after(timeout_s):
            await stream.send_all(handshake.send_hello())
            while wanted := handshake.wanted():
                handshake.receive_data(await stream.receive_some(wanted))
    except BaseException as error:
        await trio.aclose_forcefully(stream)
        if isinstance(error, trio.TooSlowError):
            raise PeerError(f"no handshake within {timeout_s:g} s; is that a postcopy port?") from None
        if isinstance(error, trio.BrokenResourceError):
            raise PeerError(broken(error)) from error
        raise
    return stream


def broken(error: trio.BrokenResourceError) -> str:
    cause = error.__cause__
    reason = f" ({cause.strerror})" if isinstance(cause, OSError) and cause.strerror else ""
    return f"the connection broke during the handshake{reason}"


def detach(stream: trio.SocketStream) -> FdHolder:
    """The stream's socket, blocking, for the core; the stream must not be used any more."""
    fd = FdHolder(stream.socket.detach())
    os.set_blocking(fd.fd, True)
    return fd


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
