# SPDX-License-Identifier: Apache-2.0
"""As much of an HTTP/1.1 server as a scrape needs: GET and HEAD of one path, over h11.

Resource handling: a connection has `IDLE_TIMEOUT_S` for each request with its answer and is closed after that; at most
`MAX_CONNECTIONS` are open at a time. A further one takes the place of the one that has been at its request for longest:
a scraper says all of its own at once, so it is never the one, however many there are that say it byte by byte. What is
served is made anew at most every `FRESH_S`, however often it is asked for. Whatever a client does, and whatever goes
wrong in making the page, `serve` goes on.

On loopback it is plain HTTP. Beyond, with TLS, a client needs a certificate of the same authority; the handshake is a
part of its first request.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence

import h11
import trio

from postcopy.errors import ConfigurationError, PeerError, ResourceError
from postcopy.net import (
    LOCAL,
    Address,
    LogLimit,
    Protection,
    accept_from,
    address_of,
    is_loopback,
    listening_addresses,
    open_listeners,
    parse_address,
)
from postcopy.net.acceptor import TLS_RECORD
from postcopy.service._contain import contained
from postcopy.tls import Credentials, TlsStream
from postcopy.wire import MAGIC

IDLE_TIMEOUT_S = 15.0
MAX_CONNECTIONS = 32
FRESH_S = 0.1
LOOPBACK = "127.0.0.1"

log = logging.getLogger(__name__)


def parse_metrics_address(text: str) -> Address:
    """``HOST:PORT``; without a host it is the loopback interface, ``*`` is every one."""
    return parse_address(LOOPBACK + text if text.startswith(":") else text, listening=True)


async def _begins_tls(stream: trio.SocketStream) -> bool:
    """Whether what the client says first is not plain HTTP; nothing of it is taken."""
    await trio.lowlevel.wait_readable(stream.socket)
    with contextlib.suppress(OSError):  # of a connection that is broken, which the handshake says
        return await stream.socket.recv(1, trio.socket.MSG_PEEK) in (b"", TLS_RECORD)
    return True


class HttpServer:
    """`open`, `serve` in a task, cancel that."""

    def __init__(
        self,
        listeners: list[trio.SocketListener],
        path: str,
        content_type: str,
        body: Callable[[], bytes],
        credentials: Credentials | None = None,
    ) -> None:
        self.addresses = listening_addresses(listeners)
        self._credentials = credentials
        self._log_limit = LogLimit()
        self._listeners = listeners
        self._path = path
        self._content_type = content_type
        self._body = body
        self._waiting: dict[trio.SocketStream, trio.CancelScope] = {}  # the longest at its request first
        self._made: bytes | None = None
        self._made_at = 0.0

    @classmethod
    async def open(
        cls,
        address: Address,
        path: str,
        content_type: str,
        body: Callable[[], bytes],
        protection: Protection = LOCAL,
    ) -> HttpServer:
        """`body` makes what is at `path`, at each request. `ResourceError` where it cannot listen, `ConfigurationError`
        for an address that `protection` does not allow, and certificates that cannot be used."""
        try:
            listeners = await open_listeners(address, protection)
        except ResourceError as error:
            raise ResourceError(f"--metrics: {error.message}", error.remedy) from error
        except ConfigurationError as error:
            raise ConfigurationError(f"--metrics {error}") from error
        if all(is_loopback(each.host) for each in listening_addresses(listeners)):
            protection = LOCAL
        try:
            await protection.load(listens=True)
        except BaseException:
            for listener in listeners:
                listener.socket.close()
            raise
        return cls(listeners, path, content_type, body, protection.credentials)

    @property
    def encrypted(self) -> bool:
        return self._credentials is not None

    async def serve(self) -> None:
        """Until cancelled; closes the listeners then."""
        try:
            async with trio.open_nursery() as nursery:

                def take(stream: trio.SocketStream) -> None:
                    if len(self._waiting) >= MAX_CONNECTIONS:
                        oldest = next(iter(self._waiting))
                        self._waiting.pop(oldest).cancel()
                    self._waiting[stream] = trio.CancelScope()
                    nursery.start_soon(self._connection, stream)

                await accept_from(self._listeners, "a connection for metrics", take)
        finally:
            for listener in self._listeners:
                listener.socket.close()

    async def _connection(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        peer = "a client"
        with contextlib.suppress(PeerError):
            peer = str(address_of(stream))
        secured: trio.abc.Stream | None = None if self._credentials is not None else stream
        go_on = True

        async def serve() -> None:
            nonlocal go_on, secured
            try:
                if secured is None:
                    assert self._credentials is not None
                    secured = await self._credentials.accept(stream) if await _begins_tls(stream) else stream
                go_on = await self._exchange(connection, secured)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                go_on = False  # it left
            except PeerError as error:
                go_on = False
                if self._log_limit.due():
                    log.warning("%s: no metrics for it: %s", peer, error)

        try:
            while (scope := self._waiting.get(stream)) is not None:
                scope.deadline = trio.current_time() + IDLE_TIMEOUT_S
                with scope:
                    if await contained("a request for metrics", serve) is not None or not go_on:
                        return
                if scope.cancelled_caught or stream not in self._waiting:
                    return
                del self._waiting[stream]
                self._waiting[stream] = trio.CancelScope()
                connection.start_next_cycle()
        finally:
            self._waiting.pop(stream, None)
            await trio.aclose_forcefully(secured or stream)

    def _page(self) -> bytes:
        if self._made is None or trio.current_time() - self._made_at >= FRESH_S:
            self._made, self._made_at = self._body(), trio.current_time()
        return self._made

    async def _exchange(self, connection: h11.Connection, stream: trio.abc.Stream) -> bool:
        """One request and its answer; whether there may be another one."""
        request: h11.Request | None = None

        async def answer(status: int, body: bytes, headers: Sequence[tuple[str, str]] = ()) -> None:
            await self._answer(connection, stream, status, body, headers, request)

        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    data = bytes(await stream.receive_some(16 * 1024))
                    if data.startswith(MAGIC):  # which would wait for an answer, and h11 for the end of its line
                        await answer(400, b"these are the metrics: migrate to --listen\n")
                        return False
                    connection.receive_data(data)
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.EndOfMessage):
                    break
                elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                    return False
        except h11.RemoteProtocolError as error:
            await answer(error.error_status_hint, b"this is not HTTP/1.1\n")
            return False
        assert request is not None
        if self.encrypted and not isinstance(stream, TlsStream):
            await answer(400, b"use https, and a client certificate: these metrics are served with TLS only\n")
            return False
        if request.target.partition(b"?")[0] != self._path.encode():
            await answer(404, f"the metrics are at {self._path}\n".encode())
        elif request.method not in (b"GET", b"HEAD"):
            await answer(405, b"use GET or HEAD\n", [("Allow", "GET, HEAD")])
        else:
            await answer(200, self._page())
        return connection.our_state is h11.DONE and connection.their_state is h11.DONE

    async def _answer(
        self,
        connection: h11.Connection,
        stream: trio.abc.Stream,
        status: int,
        body: bytes,
        headers: Sequence[tuple[str, str]],
        request: h11.Request | None,
    ) -> None:
        if connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        content_type = self._content_type if status == 200 else "text/plain; charset=utf-8"
        response = h11.Response(
            status_code=status,
            headers=[("Content-Type", content_type), ("Content-Length", str(len(body))), *headers],
        )
        data = connection.send(response) or b""
        if request is None or request.method != b"HEAD":
            data += connection.send(h11.Data(data=body)) or b""
        data += connection.send(h11.EndOfMessage()) or b""
        await stream.send_all(data)
