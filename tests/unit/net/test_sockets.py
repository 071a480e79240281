# SPDX-License-Identifier: Apache-2.0
"""Listening in both families, in one, and without the other; what is said when nothing answers."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from postcopy import net as c
from postcopy.errors import PeerError, ResourceError
from postcopy.testbed import _linux
from tests.unit.net.support import INSECURE, open_acceptor

EVERYWHERE = ["", "::"]  # :PORT and [::]:PORT


async def called(acceptor: c.Acceptor, host: str) -> str:
    """Calls it at that address; where the other side sees the caller."""
    link = await c.CallingLink.open(c.Address(host, acceptor.addresses[0].port), "dest")
    there = await acceptor.next_link()
    await trio.aclose_forcefully(link.control)
    await trio.aclose_forcefully(there.control)
    return str(there.peer).rpartition(":")[0]


# ---- on this host


@pytest.mark.needs("ipv6")
@pytest.mark.parametrize("host", EVERYWHERE)
async def test_everywhere_is_both_families(host: str) -> None:
    async with open_acceptor(host=host) as acceptor:
        port = acceptor.addresses[0].port
        assert list(map(str, acceptor.addresses)) == [f"0.0.0.0:{port}", f"[::]:{port}"]
        assert c.everywhere(acceptor.addresses) == "IPv4 and IPv6"
        assert await called(acceptor, "127.0.0.1") == "127.0.0.1"
        assert await called(acceptor, "::1") == "[::1]"


@pytest.mark.needs("ipv6")
@pytest.mark.parametrize(("host", "refused"), [("127.0.0.1", "::1"), ("0.0.0.0", "::1"), ("::1", "127.0.0.1")])
async def test_one_family_is_one(host: str, refused: str) -> None:
    async with open_acceptor(host=host) as acceptor:
        with pytest.raises(PeerError, match=r"^\S+: connection refused; start the other side first"):
            await called(acceptor, refused)
    assert c.everywhere(acceptor.addresses) == ("IPv4" if host == "0.0.0.0" else "")


@pytest.mark.needs("ipv6")
async def test_a_name_with_two_addresses_has_one_port() -> None:
    found = {name[4][0] for name in await trio.socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    async with open_acceptor(host="localhost") as acceptor:
        assert {address.host for address in acceptor.addresses} == found
        assert len({address.port for address in acceptor.addresses}) == 1


@pytest.mark.needs("ipv6")
@pytest.mark.parametrize("host", EVERYWHERE)
async def test_a_port_that_has_an_owner_in_one_family(host: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as owner:
        address = c.Address(host, owner.getsockname()[1])
        with pytest.raises(ResourceError, match=r"\(IPv4 and IPv6\): Address already in use.*choose another port"):
            await c.open_listeners(address, INSECURE)


async def test_a_port_of_the_system_that_is_taken_in_the_other_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is chosen, and nothing is left open of the first."""
    real, chosen = c.sockets._listener, list[trio.SocketListener]()

    async def listener(family: int, host: str, port: int, *, both: bool = False) -> trio.SocketListener:
        if port and len(chosen) == 1:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        one = await real(family, "127.0.0.1", port if len(chosen) == 1 else 0)
        chosen.append(one)
        return one

    async def resolve(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(socket.AF_INET, 1, 6, "", (host, 0)) for host in ("127.0.0.1", "127.0.0.2")]

    monkeypatch.setattr(c.sockets, "_listener", listener)
    monkeypatch.setattr(trio.socket, "getaddrinfo", resolve)
    listeners = await c.open_listeners(c.Address("here", 0))
    assert listeners == chosen[1:]
    assert chosen[0].socket.fileno() == -1
    for one in listeners:
        await one.aclose()


async def test_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, with all that a name stands for."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]

        async def resolve(*_: object, **__: object) -> list[tuple[object, ...]]:
            return [(socket.AF_INET, 1, 6, "", (host, port)) for host in hosts]

        monkeypatch.setattr(trio.socket, "getaddrinfo", resolve)
        hosts = ["127.0.0.1", "127.0.0.2"]
        with pytest.raises(PeerError) as caught:
            await c.CallingLink.open(c.Address("there", port), "dest", protection=INSECURE)
    start = "; start the other side first, with --listen"
    assert str(caught.value) == f"there:{port}: connection refused (tried 127.0.0.1 and 127.0.0.2){start}"
    hosts = ["127.0.0.1", "255.255.255.255"]
    with pytest.raises(PeerError) as caught:
        await c.CallingLink.open(c.Address("there", port), "dest", protection=INSECURE)
    assert str(caught.value) == (
        f"there:{port}: connection refused (127.0.0.1), Network is unreachable (255.255.255.255){start}"
    )


async def test_the_second_address_answers() -> None:
    """As with a host that has an address of IPv6 which leads nowhere."""
    async with open_acceptor(host="127.0.0.2") as acceptor:
        port, tried = acceptor.addresses[0].port, dict[str, OSError | None]()
        stream = await c.sockets._first_stream(["127.0.0.1", "127.0.0.2"], port, tried)
        assert stream is not None
        assert stream.socket.getpeername() == ("127.0.0.2", port)
        await stream.aclose()
        assert isinstance(tried["127.0.0.1"], ConnectionRefusedError)


@asynccontextmanager
async def answers(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[trio.Event, list[trio.SocketStream]]]:
    """Every address but 192.0.2.1, which never answers, answers when the event is set; the connections made so."""
    event, made = trio.Event(), list[trio.SocketStream]()
    peers = []

    async def connect(host: str, port: int) -> trio.SocketStream:
        await (trio.Event() if host == "192.0.2.1" else event).wait()
        ours, theirs = trio.socket.socketpair()
        made.append(trio.SocketStream(ours))
        peers.append(theirs)
        return made[-1]

    monkeypatch.setattr(trio, "open_tcp_stream", connect)
    yield event, made
    for sock in (*peers, *(stream.socket for stream in made)):
        sock.close()


async def test_an_address_that_leads_nowhere(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    """The next one is tried beside it, soon."""
    async with answers(monkeypatch) as (event, made):
        event.set()
        began_s = trio.current_time()
        assert await c.sockets._first_stream(["192.0.2.1", "192.0.2.2"], 7, {}) is made[0]
        assert trio.current_time() - began_s == pytest.approx(c.sockets.NEXT_ATTEMPT_S)


async def test_two_that_answer_in_one_moment(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    async with answers(monkeypatch) as (event, made), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def both() -> None:
            await trio.sleep(2 * c.sockets.NEXT_ATTEMPT_S)
            event.set()

        stream = await c.sockets._first_stream(["192.0.2.2", "192.0.2.3"], 7, {})
        assert [one.socket.fileno() >= 0 for one in made] == [one is stream for one in made]
        assert (len(made), stream in made) == (2, True)


async def test_cancelled_in_the_moment_of_the_answer(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with answers(monkeypatch) as (event, made):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def both() -> None:
                    await trio.sleep(3 * c.sockets.NEXT_ATTEMPT_S)
                    event.set()
                    scope.cancel()

                await c.sockets._first_stream(["192.0.2.1", "192.0.2.2", "192.0.2.3"], 7, {})
        assert [one.socket.fileno() for one in made] == [-1, -1]


def test_the_interface_of_a_link_local_address() -> None:
    """Without it the peer could not be called again."""
    for name, shown in {
        ("fe80::1", 7, 0, 3): "[fe80::1%3]:7",
        ("2001:db8::1", 7, 0, 0): "[2001:db8::1]:7",
        ("::ffff:192.0.2.1", 7, 0, 0): "192.0.2.1:7",
        ("192.0.2.1", 7): "192.0.2.1:7",
    }.items():
        stream = SimpleNamespace(socket=SimpleNamespace(getpeername=lambda name=name: name))
        address = c.sockets.address_of(cast("trio.SocketStream", stream))
        assert str(address) == shown
        assert c.parse_address(shown) == address


# ---- on hosts without IPv6


def refuse_ipv6() -> None:
    """From now on socket(2) has no AF_INET6 for this process, as in a kernel without it or under systemd's
    RestrictAddressFamilies."""
    number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
    statement = struct.Struct("=HBBI")
    load, equal, result = 0x20, 0x15, 0x06
    filters = b"".join(
        (
            statement.pack(load, 0, 0, 0),
            statement.pack(equal, 0, 3, number),
            statement.pack(load, 0, 0, 16),  # the first argument
            statement.pack(equal, 0, 1, socket.AF_INET6),
            statement.pack(result, 0, 0, 0x00050000 | errno.EAFNOSUPPORT),
            statement.pack(result, 0, 0, 0x7FFF0000),
        )
    )
    code = ctypes.create_string_buffer(filters)
    program = ctypes.create_string_buffer(struct.pack("@HP", len(filters) // 8, ctypes.addressof(code)))
    _linux.call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    assert _linux.libc.prctl(22, 2, program) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


async def _without_the_family() -> None:
    refuse_ipv6()
    for host in ("", "localhost"):
        async with open_acceptor(host=host) as acceptor:
            assert len(acceptor.addresses) == 1
            assert await called(acceptor, "127.0.0.1") == "127.0.0.1"
            assert c.everywhere(acceptor.addresses) == ("" if host else "IPv4")
    with (
        socket.create_server(("0.0.0.0", 0)) as owner,
        pytest.raises(ResourceError, match=r"\*:\d+ \(IPv4\): Address alr"),
    ):
        await c.open_listeners(c.Address("", owner.getsockname()[1]), INSECURE)
    for host in ("::", "::1"):
        with pytest.raises(ResourceError, match=r"cannot listen on \[\S*\]:7: this host has no IPv6 .*: :7, or"):
            await c.open_listeners(c.Address(host, 7), INSECURE)
    with pytest.raises(PeerError, match=r"^\[::1\]:7: Address family not supported by protocol$"):
        await c.CallingLink.open(c.Address("::1", 7), "dest")


def test_without_the_family(passes: Callable[..., None]) -> None:
    passes(_without_the_family)


def enter_network_without_ipv6() -> None:
    try:
        os.close(_linux.new_network())
    except PermissionError:
        _linux.new_user()
        os.close(_linux.new_network())
    for what in ("all", "lo"):
        Path(f"/proc/sys/net/ipv6/conf/{what}/disable_ipv6").write_text("1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP


async def _without_addresses() -> None:
    enter_network_without_ipv6()
    for host in (*EVERYWHERE, "localhost"):
        async with open_acceptor(host=host) as acceptor:
            assert await called(acceptor, "127.0.0.1") == "127.0.0.1"
    with pytest.raises(ResourceError, match=r"Cannot assign requested address.*name an address of this host"):
        await c.open_listeners(c.Address("::1", 0))
    with pytest.raises(PeerError, match=r"^\[::1\]:7: "):
        await c.CallingLink.open(c.Address("::1", 7), "dest")


@pytest.mark.needs("netns")
def test_without_addresses(passes: Callable[..., None]) -> None:
    """A network namespace in which IPv6 is switched off."""
    passes(_without_addresses)
