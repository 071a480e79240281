# SPDX-License-Identifier: Apache-2.0
"""Lazily mapped memory under TLS: what the options do. (How connections behave under it is tested in `net`.)"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tls
import trio

import postcopy
from postcopy.errors import ConfigurationError, PeerError
from postcopy.lazy import blocking

CONTENT = os.urandom(3 * 4096) + b"end"
BEYOND = "192.0.2.7:7777"

pytestmark = pytest.mark.needs("tls", "uffd-user")


class Source:
    """As `CONTENT`."""

    blocks = (postcopy.SourceBlock("content", len(CONTENT)),)

    async def fetch(self, block: int, first_page: int, count: int) -> bytes:
        return CONTENT[first_page * 4096 : (first_page + count) * 4096]


async def attached(address: str, **options: Any) -> bytes:
    async with postcopy.attach(address, how="user-only", **options) as memory:
        return await memory.read()


@pytest.mark.parametrize("served", [CONTENT, Source()], ids=["memory", "page source"])
async def test_what_is_served_comes(served: Any) -> None:
    directory = os.fspath(tls.directory())
    async with trio.open_nursery() as nursery:
        server = await nursery.start(lambda **more: postcopy.serve(served, tls=directory, **more))
        assert await attached(server.address, tls=directory) == CONTENT
        with pytest.raises(PeerError, match="TLS"):
            await attached(server.address)
        nursery.cancel_scope.cancel()


async def test_without_trio() -> None:
    def read() -> bytes:
        directory = os.fspath(tls.directory())
        with (
            blocking.serve(CONTENT, tls=directory) as server,
            blocking.attach(server.address, how="user-only", tls=directory) as memory,
        ):
            return memory.read()

    assert await trio.to_thread.run_sync(read) == CONTENT


async def test_the_name_of_the_host(tmp_path: Path) -> None:
    """Another one than the address only where it is said."""
    directory = os.fspath(tls.site().issue("named", "named.example"))
    async with trio.open_nursery() as nursery:
        server = await nursery.start(lambda **more: postcopy.serve(CONTENT, tls=directory, **more))
        with pytest.raises(PeerError, match=r"named\.example.*--tls-hostname"):
            await attached(server.address, tls=directory)
        assert await attached(server.address, tls=directory, tls_hostname="named.example") == CONTENT
        nursery.cancel_scope.cancel()


async def test_who_may_take_it() -> None:
    directory = os.fspath(tls.directory())
    async with trio.open_nursery() as nursery:

        async def serve(*patterns: str) -> Any:
            return await nursery.start(
                lambda **more: postcopy.serve(CONTENT, tls=directory, tls_authz=patterns, **more)
            )

        for_others = await serve("take:other.example", "send:*")
        with pytest.raises(PeerError, match="may not take"):
            await attached(for_others.address, tls=directory)
        for_us = await serve("take:localhost")
        assert await attached(for_us.address, tls=directory, tls_authz=["send:localhost"]) == CONTENT
        with pytest.raises(PeerError, match="may not send"):
            await attached(for_us.address, tls=directory, tls_authz=["take:localhost"])
        nursery.cancel_scope.cancel()


async def test_beyond_this_host_without_it() -> None:
    with pytest.raises(ConfigurationError, match=r"in Python: tls=DIR.*insecure=True"):
        await attached(BEYOND)
    with pytest.raises(ConfigurationError, match=r"in Python: tls=DIR.*insecure=True"):
        await postcopy.serve(CONTENT, "0.0.0.0:0")
    async with trio.open_nursery() as nursery:
        server = await nursery.start(lambda **more: postcopy.serve(CONTENT, "0.0.0.0:0", insecure=True, **more))
        port = server.address.rpartition(":")[2]
        assert await attached(f"127.0.0.1:{port}", insecure=True) == CONTENT
        nursery.cancel_scope.cancel()


async def test_what_is_asked_for_in_a_way_that_makes_no_sense(tmp_path: Path) -> None:
    directory = os.fspath(tls.directory())
    for options in (
        {"tls": os.fspath(tmp_path / "none")},
        {"tls": directory, "insecure": True},
        {"tls_authz": ["*"]},
        {"tls": directory, "tls_authz": ["take:"]},
    ):
        with pytest.raises(ConfigurationError):
            await postcopy.serve(CONTENT, **options)
        with pytest.raises(ConfigurationError):
            await attached("127.0.0.1:9", **options)
    with pytest.raises(ConfigurationError, match="goes with --tls"):
        await attached("127.0.0.1:9", tls_hostname="a")
