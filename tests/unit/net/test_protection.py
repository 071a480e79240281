# SPDX-License-Identifier: Apache-2.0
"""Which connections may be plain."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import trio

from postcopy.errors import ConfigurationError
from postcopy.net import (
    LOCAL,
    Address,
    Protection,
    is_loopback,
    listening_addresses,
    open_listeners,
    open_stream,
)
from postcopy.tls import Credentials
from tests.unit.net.support import INSECURE


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    LOCAL.check(Address(host, 7777), [host])


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "fe80::1%lo", "::ffff:192.0.2.7", "128.0.0.1"])
def test_beyond_loopback_it_is_refused_with_what_would_help(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigurationError) as caught:
        LOCAL.check(Address(host, 7777), [host])
    for part in (
        host,
        "postcopy tls new-ca CA",
        "postcopy tls issue CA --host NAME --out DIR",
        "--tls DIR",
        "--insecure",
    ):
        assert part in str(caught.value)
    INSECURE.check(Address(host, 7777), [host])
    Protection(credentials=Credentials(".")).check(Address(host, 7777), [host])


@pytest.mark.parametrize("host", ["", "*", "::", "0.0.0.0"])
async def test_listening_everywhere_is_refused_before_it_listens(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trio.socket, "socket", _no_socket)
    with pytest.raises(ConfigurationError, match="without TLS"):
        await open_listeners(Address(host.replace("*", ""), 0))


async def test_listening_everywhere_insecurely() -> None:
    listeners = await open_listeners(Address("", 0), INSECURE)
    addresses = listening_addresses(listeners)
    for listener in listeners:
        await listener.aclose()
    assert addresses


async def test_a_name_is_looked_up_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that it stands for counts, not only what is tried first."""

    async def found(host: str, port: int, **_: Any) -> list[Any]:
        hosts = {"here": ["127.0.0.1"], "there": ["127.0.0.1", "192.0.2.7"]}[host]
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (number, port)) for number in hosts]

    (listener,) = await open_listeners(Address("127.0.0.1", 0))
    async with listener:
        port = listening_addresses([listener])[0].port
        monkeypatch.setattr(trio.socket, "getaddrinfo", found)
        await (await open_stream(Address("here", port), 5)).aclose()
        monkeypatch.setattr(trio.socket, "socket", _no_socket)
        with pytest.raises(ConfigurationError, match=r"there:\d+ \(192\.0\.2\.7\): refused without TLS"):
            await open_stream(Address("there", port), 5)
        with pytest.raises(ConfigurationError, match="without TLS"):
            await open_listeners(Address("there", 0))


def _no_socket(*_: object) -> None:
    raise AssertionError("a socket was made")
