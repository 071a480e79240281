# SPDX-License-Identifier: Apache-2.0
"""As much of an HTTP/1.1 server as a scrape needs: GET and HEAD of one path, over h11.

Resource handling: a connection has `IDLE_TIMEOUT_S` for each request and is closed after that; at most
`MAX_CONNECTIONS` are served at a time, further ones are closed at once. Whatever a client does, `serve` goes on.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import h11
import trio

from postcopy._errors import ResourceError
from postcopy.migration.channels import Address, parse_address

IDLE_TIMEOUT_S = 15.0
MAX_CONNECTIONS = 16
LOOPBACK = "127.0.0.1"


def parse_metrics_address(text: str) -> Address:
    """``HOST:PORT``; without a host it is the loopback interface, ``*`` is every one."""
    return parse_address(LOOPBACK + text if text.startswith(":") else text, listening=True)


class HttpServer:
    """`open`, `serve` in a task, cancel that."""

    def __init__(
        self, listeners: list[trio.SocketListener], path: str, content_type: str, body: Callable[[], bytes]
    ) -> None:
        self._listeners = listeners
        self._path = path
        self._content_type = content_type
        self._body = body
        self._connections = 0

    @classmethod
    async def open(cls, address: Address, path: str, content_type: str, body: Callable[[], bytes]) -> HttpServer:
        """`body` makes what is at `path`, at each request. `ResourceError` where it cannot listen."""
        try:
            listeners = await trio.open_tcp_listeners(address.port, host=address.host or None)
        except (OSError, UnicodeError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise ResourceError(f"--metrics {address}: {reason}", "choose another address or port") from error
        return cls(listeners, path, content_type, body)

    @property
    def addresses(self) -> list[Address]:
        names = [listener.socket.getsockname() for listener in self._listeners]
        return [Address(str(name[0]), int(name[1])) for name in names]

    async def serve(self) -> None:
        """Until cancelled; closes the listeners then."""
        try:
            async with trio.open_nursery() as nursery:
                for listener in self._listeners:
                    nursery.start_soon(self._accept, listener, nursery)
        finally:
            for listener in self._listeners:
                listener.socket.close()

    async def _accept(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    raise
                await trio.sleep(0.1)
                continue
            if self._connections >= MAX_CONNECTIONS:
                stream.socket.close()
                continue
            self._connections += 1
            nursery.start_soon(self._connection, stream)

    async def _connection(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        try:
            while True:
                with trio.move_on_after(IDLE_TIMEOUT_S) as waiting:
                    if not await self._exchange(connection, stream):
                        return
                if waiting.cancelled_caught:
                    return
                connection.start_next_cycle()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it left
        finally:
            self._connections -= 1
            stream.socket.close()

    async def _exchange(self, connection: h11.Connection, stream: trio.SocketStream) -> bool:
        """One request and its answer; whether there may be another one."""
        request: h11.Request | None = None
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(bytes(await stream.receive_some(16 * 1024)))
                elif isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.EndOfMessage):
                    break
                elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                    return False
        except h11.RemoteProtocolError as error:
            await self._answer(connection, stream, error.error_status_hint, b"what was that?\n")
            return False
        assert request is not None
        if request.target.partition(b"?")[0] != self._path.encode():
            await self._answer(connection, stream, 404, f"the metrics are at {self._path}\n".encode())
        elif request.method not in (b"GET", b"HEAD"):
            await self._answer(connection, stream, 405, b"GET, please\n", [("Allow", "GET, HEAD")])
        else:
            await self._answer(connection, stream, 200, self._body(), head=request.method == b"HEAD")
        return connection.our_state is h11.DONE and connection.their_state is h11.DONE

    async def _answer(
        self,
        connection: h11.Connection,
        stream: trio.SocketStream,
        status: int,
        body: bytes,
        headers: list[tuple[str, str]] | None = None,
        head: bool = False,
    ) -> None:
        if connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        content_type = self._content_type if status == 200 else "text/plain; charset=utf-8"
        response = h11.Response(
            status_code=status,
            headers=[("Content-Type", content_type), ("Content-Length", str(len(body))), *(headers or [])],
        )
        data = connection.send(response) or b""
        data += (b"" if head else connection.send(h11.Data(data=body))) or b""
        data += connection.send(h11.EndOfMessage()) or b""
        await stream.send_all(data)
