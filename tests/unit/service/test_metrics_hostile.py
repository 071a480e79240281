# SPDX-License-Identifier: Apache-2.0
"""The metrics' port against clients that only take its connections."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from postcopy.errors import ProtocolError
from postcopy.net import Address, CallingLink, sockets
from postcopy.service import http as http_module
from postcopy.service.http import MAX_CONNECTIONS, HttpServer
from postcopy.wire import PREAMBLE

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@asynccontextmanager
async def serving(body: Callable[[], bytes]) -> AsyncIterator[tuple[Address, HttpServer]]:
    server = await HttpServer.open(Address("127.0.0.1", 0), "/metrics", "text/plain", body)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve)
            yield server.addresses[0], server
            nursery.cancel_scope.cancel()


async def ask(address: Address, request: bytes = REQUEST) -> bytes:
    async with await trio.open_tcp_stream(address.host, address.port) as stream:
        await stream.send_all(request)
        answer = b""
        try:
            while data := await stream.receive_some(65536):
                answer += data
        except trio.BrokenResourceError:
            pass
        return answer


@pytest.mark.parametrize("says", [b"", b"GET /metrics HTTP/1.1\r\nHost:", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"])
async def test_slow_clients_do_not_keep_a_scraper_out(says: bytes) -> None:
    """Each of them says something and never the rest, or keeps its connection for the next request."""
    async with AsyncExitStack() as stack, serving(lambda: b"the page") as (address, _):
        for _ in range(3):
            for _ in range(MAX_CONNECTIONS):
                stream = await trio.open_tcp_stream(address.host, address.port)
                stack.push_async_callback(trio.aclose_forcefully, stream)
                await stream.send_all(says)
            assert (await ask(address)).endswith(b"the page")


async def test_client_that_does_not_read_a_long_page(monkeypatch: pytest.MonkeyPatch) -> None:
    page = b"x" * (16 << 20)
    monkeypatch.setattr(http_module, "IDLE_TIMEOUT_S", 60)
    async with AsyncExitStack() as stack, serving(lambda: page) as (address, _):
        for _ in range(MAX_CONNECTIONS):
            stream = await trio.open_tcp_stream(address.host, address.port)
            stack.push_async_callback(trio.aclose_forcefully, stream)
            await stream.send_all(REQUEST)
        assert len(await ask(address)) > len(page)
    monkeypatch.setattr(http_module, "IDLE_TIMEOUT_S", 0.1)
    async with (
        serving(lambda: page) as (address, server),
        await trio.open_tcp_stream(address.host, address.port) as stream,
    ):
        await stream.send_all(REQUEST)
        await stream.receive_some(1)
        while server._waiting:  # noqa: ASYNC110 -- not read from: it is disconnected in the middle of the page
            await trio.sleep(0.01)
        count = 0
        with pytest.raises(trio.BrokenResourceError):  # noqa: PT012
            while data := await stream.receive_some(1 << 20):
                count += len(data)
            raise trio.BrokenResourceError
        assert count < len(page)


async def test_page_is_not_made_for_everybody() -> None:
    made = []

    def make() -> bytes:
        made.append(1)
        return b"the page"

    async with serving(make) as (address, _):
        began = trio.current_time()
        for _ in range(200):
            await ask(address)
        assert len(made) <= 2 + (trio.current_time() - began) / http_module.FRESH_S


async def test_no_descriptors_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One line for all attempts; a scraper is served when there are descriptors again."""
    failures = [errno.EMFILE, errno.ENFILE, errno.EPROTO] * 5
    accept = trio.SocketListener.accept

    async def failing(self: trio.SocketListener) -> trio.SocketStream:
        if failures:
            number = failures.pop()
            raise OSError(number, os.strerror(number))
        return await accept(self)

    monkeypatch.setattr(sockets, "ACCEPT_PAUSE_S", 0.001)
    monkeypatch.setattr(trio.SocketListener, "accept", failing)
    async with serving(lambda: b"the page") as (address, _):
        assert (await ask(address)).endswith(b"the page")
    (record,) = caplog.records
    assert record.getMessage().startswith("cannot accept a connection for metrics: ")
    assert record.exc_info is None


async def test_page_that_cannot_be_made_ends_one_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    broken = [True]

    def make() -> bytes:
        if broken:
            raise KeyError(broken.pop())
        return b"the page"

    async with serving(make) as (address, _):
        assert b"the page" not in await ask(address)
        assert "KeyError" in caplog.text
        assert (await ask(address)).endswith(b"the page")


async def test_migration_that_is_sent_to_the_metrics() -> None:
    """Both are told at once, and not when a request has taken too long."""
    async with serving(lambda: b"the page") as (address, _):
        with pytest.raises(ProtocolError, match="this is an HTTP server, not a postcopy peer"):
            await CallingLink.open(address, "source")
        assert b"400" in await ask(address, PREAMBLE)
