# SPDX-License-Identifier: Apache-2.0
"""Metrics beyond this host: over https, to clients of the same authority only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import tls
import trio

from postcopy.errors import ConfigurationError
from postcopy.net import LOCAL, Address, Protection
from postcopy.service import http
from postcopy.service.http import HttpServer
from postcopy.tls import Credentials, TlsStream

pytestmark = pytest.mark.needs("tls")

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = REQUEST.replace(b"Host", b"Connection: close\r\nHost")


def protection(directory: Path | None = None) -> Protection:
    return Protection.of(os.fspath(directory or tls.directory()))


@pytest.fixture
def _beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loopback interface stands for another one."""
    monkeypatch.setattr(http, "is_loopback", lambda host: False)


@asynccontextmanager
async def served(how: Protection) -> AsyncIterator[HttpServer]:
    server = await HttpServer.open(Address("127.0.0.1", 0), "/metrics", "text/plain", lambda: b"the metrics\n", how)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve)
        yield server
        nursery.cancel_scope.cancel()


async def answered(server: HttpServer, *requests: bytes, directory: Path | None = None) -> bytes:
    """All that comes over TLS until the server hangs up."""
    context = await Credentials(directory or tls.directory()).context(server=False)
    stream = await trio.open_tcp_stream("127.0.0.1", server.addresses[0].port)
    secured = TlsStream(stream.socket, context, "127.0.0.1")
    answer = b""
    async with secured:
        await secured.handshake()
        for request in requests:
            await secured.send_all(request)
        with trio.fail_after(30):
            while data := await secured.receive_some():
                answer += data
    return answer


async def plain(server: HttpServer) -> bytes:
    answer = b""
    async with await trio.open_tcp_stream("127.0.0.1", server.addresses[0].port) as stream:
        await stream.send_all(LAST)
        with trio.fail_after(30), contextlib.suppress(trio.BrokenResourceError):
            while data := await stream.receive_some():
                answer += data
    return answer


@pytest.mark.usefixtures("_beyond")
async def test_a_scraper_with_a_certificate() -> None:
    """One connection for several requests, and its end in order."""
    async with served(protection()) as server:
        assert server.encrypted
        answer = await answered(server, REQUEST, LAST)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.endswith(b"the metrics\n")


@pytest.mark.usefixtures("_beyond")
async def test_all_others_learn_nothing() -> None:
    async with served(protection()) as server:
        told = await plain(server)
        assert told.startswith(b"HTTP/1.1 400 ")
        assert b"use https" in told
        assert b"the metrics\n" not in told
        impostor = Credentials(tls.other_site().issue("scraper"))
        stream = await trio.open_tcp_stream("127.0.0.1", server.addresses[0].port)
        # It trusts the authority of the server, and has a certificate of another one.
        mixed = Path(impostor.directory)
        (mixed / "ca-cert.pem").write_bytes((tls.directory() / "ca-cert.pem").read_bytes())
        async with TlsStream(stream.socket, await impostor.context(server=False), "127.0.0.1") as secured:
            await secured.handshake()
            await secured.send_all(LAST)
            with pytest.raises(trio.BrokenResourceError), trio.fail_after(30):
                await secured.receive_some()
        assert b"HTTP/1.1 200" in await answered(server, LAST)


async def test_on_loopback_nothing_changes() -> None:
    async with served(protection()) as server:
        assert not server.encrypted
        assert b"HTTP/1.1 200" in await plain(server)


async def test_beyond_it_without_tls() -> None:
    everywhere = Address("", 0)
    with pytest.raises(ConfigurationError, match=r"--metrics \*:0: refused without TLS.*--tls DIR.*--insecure"):
        await HttpServer.open(everywhere, "/metrics", "text/plain", bytes, LOCAL)
    server = await HttpServer.open(everywhere, "/metrics", "text/plain", bytes, Protection(insecure=True))
    assert not server.encrypted
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve)
        assert b"HTTP/1.1 200" in await plain(server)
        nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("_beyond")
async def test_certificates_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"server-cert\.pem|ca-cert\.pem"):
        await HttpServer.open(Address("127.0.0.1", 0), "/metrics", "text/plain", bytes, protection(tmp_path))
