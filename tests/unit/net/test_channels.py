# SPDX-License-Identifier: Apache-2.0
"""Connections over real loopback sockets: good peers, and all the others."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from postcopy import net as c
from postcopy import wire as p
from postcopy.errors import ConfigurationError, PeerError, PostcopyError, ProtocolError, ResourceError
from postcopy.net import calling, connecting
from postcopy.tls import DataChannel, detach
from tests.unit.net import support
from tests.unit.net.support import INSECURE, SESSION


@asynccontextmanager
async def open_acceptor(
    side: str = "source", host: str = "127.0.0.1", reason: str = ""
) -> AsyncIterator[tuple[c.Acceptor, c.Address]]:
    async with support.open_acceptor(side, lambda waiting: reason, host=host) as acceptor:
        yield acceptor, acceptor.addresses[0]


class TestAddresses:
    @pytest.mark.parametrize(
        ("text", "host", "port"),
        [
            ("127.0.0.1:7777", "127.0.0.1", 7777),
            ("[::1]:7777", "::1", 7777),
            ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
            ("localhost:65535", "localhost", 65535),
        ],
    )
    def test_good(self, text: str, host: str, port: int) -> None:
        assert c.parse_address(text) == c.Address(host, port)
        assert str(c.parse_address(text)) == text

    @pytest.mark.parametrize("text", [":0", "*:7777", "0.0.0.0:0"])
    def test_only_to_listen(self, text: str) -> None:
        c.parse_address(text, listening=True)
        with pytest.raises(ConfigurationError):
            c.parse_address(text)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("localhost", "no port"),
            ("", "no port"),
            ("[::1]", "no port"),
            ("::1:7777", "needs brackets"),
            ("[::1:7777", "not closed"),
            ("[localhost]:7777", "not an IPv6 address"),
            ("[fe80::1]:7777", r"needs the interface .* \[fe80::1%eth0\]:PORT"),
            ("[fe80::1%]:7777", r"needs the interface"),
            ("host:http", "not a number"),
            ("host:-1", "not a number"),
            ("host:", "not a number"),
            ("host:٣", "not a number"),
            ("host:65536", "at most 65535"),
            ("host:99999999999999", "at most 65535"),
            ("a b:1", "characters"),
            ("a\nb:1", "characters"),
        ],
    )
    def test_bad(self, text: str, reason: str) -> None:
        with pytest.raises(ConfigurationError, match=reason) as caught:
            c.parse_address(text)
        assert "\n" not in str(caught.value)

    def test_a_bare_port(self) -> None:
        with pytest.raises(ConfigurationError, match=r"^'7777' is not an address: a port alone is :7777;"):
            c.parse_address("7777", listening=True)
        with pytest.raises(ConfigurationError, match="no port"):
            c.parse_address("7777")

    @given(st.text(max_size=30))
    def test_anything(self, text: str) -> None:
        for listening in (False, True):
            with contextlib.suppress(ConfigurationError):
                assert 0 <= c.parse_address(text, listening=listening).port <= 65535


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_all_channels(host: str) -> None:
    try:
        there = open_acceptor(host=host)
        async with there as (acceptor, address):
            link = await c.CallingLink.open(c.Address(host, address.port), "dest")
            seen = await acceptor.next_link()
            with link.channel_set(SESSION) as mine, seen.channel_set(SESSION) as theirs:
                results: dict[str, dict[c.ChannelKey, DataChannel]] = {}

                async def collect(name: str, open_channels: c.OpenChannels) -> None:
                    results[name] = await open_channels(2, 1)

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(collect, "theirs", theirs)
                    nursery.start_soon(collect, "mine", mine)
                assert set(results["mine"]) == set(results["theirs"]) == {("urgent", 0), ("urgent", 1), ("bulk", 0)}
                for key, fd in results["mine"].items():
                    other = results["theirs"][key]
                    assert os.get_blocking(fd.fd.fd)
                    assert os.get_blocking(other.fd.fd)
                    os.write(fd.fd.fd, repr(key).encode())  # the right one is at the other end, from the first byte on
                    assert os.read(other.fd.fd, 100) == repr(key).encode()
                    fd.close()
                    other.close()
            await link.control.aclose()
            await seen.control.aclose()
    except* ResourceError as group:
        if host == "::1":
            pytest.skip(f"no IPv6 on this host: {group.exceptions[0]}")
        raise


async def test_the_control_connection_is_ours_and_theirs() -> None:
    async with open_acceptor() as (acceptor, address):
        link = await c.CallingLink.open(address, "dest")
        seen = await acceptor.next_link()
        await link.control.send_all(b"there")
        assert await seen.control.receive_some(100) == b"there"
        await seen.control.send_all(b"back")
        assert await link.control.receive_some(100) == b"back"
        await link.control.aclose()
        await seen.control.aclose()


async def test_frames_right_behind_the_welcome_belong_to_the_core() -> None:
    """Whoever listens may send the moment it has welcomed, and its first frame may arrive in the same segment."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]

    async def eager() -> None:
        stream = await listener.accept()
        await stream.send_all(p.PREAMBLE + p.encode(p.Welcome()) + b"FRAME")
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(eager)
        hello = p.Hello("bulk", "source", 0, b"m" * 16, 0)
        fd = detach((await connecting.Caller().connect(c.Address("127.0.0.1", port), hello))[0])
    assert os.read(fd.fd.fd, 100) == b"FRAME"
    fd.close()
    await listener.aclose()


@pytest.mark.parametrize(
    ("hello", "token", "reason"),
    [
        (p.Hello("control", "source", 0, b"", 0), b"", "both hosts are sources"),
        (p.Hello("control", "dest", 0, b"x" * 16, 0), b"", "no such migration"),
        (p.Hello("control", "dest", 0, b"", 1), b"", "no such migration"),
        (p.Hello("urgent", "dest", 0, b"x" * 16, 0), b"t" * 16, "no such migration"),
        (p.Hello("urgent", "dest", 0, b"", 0), b"", "no such migration"),
        (p.Hello("urgent", "dest", 0, b"m" * 16, 0), b"u" * 16, "wrong token"),
        (p.Hello("urgent", "dest", 0, b"m" * 16, 0), b"", "wrong token"),
        (p.Hello("urgent", "dest", 0, b"m" * 16, 1), b"t" * 16, "stale epoch 1, this is 0"),
        (p.Hello("urgent", "source", 0, b"m" * 16, 0), b"t" * 16, "both hosts are sources"),
    ],
)
async def test_refused_by_name(hello: p.Hello, token: bytes, reason: str) -> None:
    async with open_acceptor() as (acceptor, address):
        link = await c.CallingLink.open(address, "dest")
        seen = await acceptor.next_link()
        with seen.channel_set(SESSION), pytest.raises(PeerError, match=reason):
            await connecting.Caller().connect(address, hello, token=token)
        await link.control.aclose()
        await seen.control.aclose()


async def test_channel_twice() -> None:
    async with open_acceptor() as (acceptor, address):
        link = await c.CallingLink.open(address, "dest")
        seen = await acceptor.next_link()
        hello = p.Hello("urgent", "dest", 0, b"m" * 16, 0)
        with seen.channel_set(SESSION):
            first, _ = await connecting.Caller().connect(address, hello, token=SESSION.token)
            with pytest.raises(PeerError, match="urgent channel 0 is connected already"):
                await connecting.Caller().connect(address, hello, token=SESSION.token)
        await first.aclose()
        await link.control.aclose()
        await seen.control.aclose()


async def test_no_free_slot() -> None:
    async with open_acceptor(reason="busy with another destination") as (acceptor, address):
        with pytest.raises(PeerError, match="refused the connection: busy with another destination"):
            await c.CallingLink.open(address, "dest")
        assert acceptor.refused == 1


async def test_refused_by_nobody() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(PeerError, match="connection refused; start the other side first"):
            await c.CallingLink.open(c.Address("127.0.0.1", port), "dest")


async def test_address_in_use() -> None:
    async with open_acceptor() as (_, address):
        with pytest.raises(ResourceError, match="choose another port"):
            await c.Acceptor.open(address, "source", lambda waiting: "")


async def test_address_of_another_host() -> None:
    with pytest.raises(ResourceError, match="name an address of this host"):
        await c.Acceptor.open(c.Address("192.0.2.1", 0), "source", lambda waiting: "", protection=INSECURE)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", "not a postcopy peer"),
        (b"postcpy\x09", "version 9"),
        (b"", "closed the connection"),
        (p.PREAMBLE + b"\xff\xff\xff\xff", "4294967295 bytes"),
    ],
)
async def test_port_of_something_else(said: bytes, reason: str) -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def other() -> None:
        stream = await listener.accept()
        if said:
            await stream.send_all(said)
        with contextlib.suppress(trio.BrokenResourceError):  # it hangs up on us
            await stream.send_eof()
            while await stream.receive_some():
                pass
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        port = listener.socket.getsockname()[1]
        with pytest.raises((ProtocolError, PeerError), match=reason) as caught:
            await c.CallingLink.open(c.Address("127.0.0.1", port), "dest")
        assert str(caught.value).startswith(f"127.0.0.1:{port}: ")
    await listener.aclose()


async def test_silent_port(autojump_clock: MockClock) -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with pytest.raises(PeerError, match="no handshake within 10 s"):
        await c.CallingLink.open(c.Address("127.0.0.1", listener.socket.getsockname()[1]), "dest")
    await listener.aclose()


async def test_random_bytes_do_not_stop_the_listener() -> None:
    async with open_acceptor() as (acceptor, address):

        async def throw(data: bytes) -> None:
            stream = await trio.open_tcp_stream(address.host, address.port)
            try:
                await stream.send_all(data)
                await stream.send_eof()
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
            await trio.aclose_forcefully(stream)

        seeds = [os.urandom(size) for size in (0, 1, 7, 8, 100, 5000)]
        for data in seeds + [p.PREAMBLE + seed for seed in seeds]:
            await throw(data)
        link = await c.CallingLink.open(address, "dest")
        assert acceptor.bad_handshakes == 12
        await (await acceptor.next_link()).control.aclose()
        await link.control.aclose()


async def test_half_open_connections_cannot_keep_others_out() -> None:
    async with open_acceptor() as (acceptor, address):
        silent = [await trio.open_tcp_stream(address.host, address.port) for _ in range(c.MAX_HALF_OPEN + 10)]
        link = await c.CallingLink.open(address, "dest")
        await (await acceptor.next_link()).control.aclose()
        await link.control.aclose()
        for stream in silent:
            await trio.aclose_forcefully(stream)


async def test_half_open_connections_end(autojump_clock: MockClock) -> None:
    async with open_acceptor() as (acceptor, address):
        stream = await trio.open_tcp_stream(address.host, address.port)
        await stream.send_all(p.PREAMBLE)
        received = b""
        with trio.fail_after(2 * c.HANDSHAKE_TIMEOUT_S):
            while data := await stream.receive_some():
                received += data
        assert received == p.PREAMBLE
        assert acceptor.bad_handshakes == 1
        await stream.aclose()


async def test_missing_channels(autojump_clock: MockClock) -> None:
    async with open_acceptor() as (acceptor, address):
        link = await c.CallingLink.open(address, "dest")
        seen = await acceptor.next_link()
        with (
            seen.channel_set(SESSION) as open_channels,
            pytest.raises(PeerError, match=r"did not open .*: bulk 0, urgent 0"),
        ):
            await open_channels(1, 1)
        await link.control.aclose()
        await seen.control.aclose()


@settings(max_examples=30)
@given(data=st.binary(max_size=200), well_begun=st.booleans())
def test_arbitrary_server(data: bytes, well_begun: bool) -> None:
    async def main() -> None:
        mine, theirs = socket.socketpair()
        there = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
        here = trio.SocketStream(trio.socket.from_stdlib_socket(mine))
        await there.send_all((p.PREAMBLE if well_begun else b"") + data)
        await there.send_eof()
        try:
            with trio.fail_after(60):
                await connecting.Caller()._greet(
                    here, connecting._Secured(None, ""), p.Hello("control", "dest", 0, b"", 0), b"", p.PROTOCOL_VERSION
                )
        except PostcopyError:
            pass
        await here.aclose()
        await there.aclose()

    trio.run(main)


async def test_coming_back() -> None:
    """The calling side comes back with a higher epoch each time, past any doubt of the listening side."""
    async with open_acceptor() as (acceptor, address):
        link: c.Link = await c.CallingLink.open(address, "dest")
        seen = await acceptor.next_link()
        with link.reconnector(SESSION) as caller, seen.reconnector(SESSION) as called:
            for epoch in (1, 2, 3):
                await link.control.aclose()
                link, session = await caller.next_link()
                await called.superseded()  # although nobody has said that the old connection is gone
                await seen.control.aclose()
                seen, other = await called.next_link()
                assert session == other == c.Session(SESSION.migration, SESSION.token, epoch)
                await link.control.send_all(b"here again")
                assert await seen.control.receive_some(100) == b"here again"
        await link.control.aclose()
        await seen.control.aclose()


@pytest.mark.parametrize(
    ("epoch", "token", "reason"),
    [
        (0, b"t" * 16, "stale epoch 0, this is 1"),
        (1, b"t" * 16, "stale epoch 1, this is 1"),
        (2, b"u" * 16, "wrong token"),
        (2, b"", "wrong token"),
    ],
)
async def test_who_may_not_come_back(epoch: int, token: bytes, reason: str) -> None:
    """Whoever has not been there, or repeats what was said before, harms nothing: the real one is taken after it."""
    async with open_acceptor() as (acceptor, address):
        link = await c.CallingLink.open(address, "dest")
        seen = await acceptor.next_link()
        with link.reconnector(SESSION) as caller, seen.reconnector(SESSION) as called:
            again, _ = await caller.next_link()
            taken, _ = await called.next_link()
            with pytest.raises(p.RefusedError, match=reason):
                await connecting.Caller().connect(
                    address, p.Hello("control", "dest", 0, SESSION.migration, epoch), token=token
                )
            await taken.control.send_all(b"still ours")
            assert await again.control.receive_some(100) == b"still ours"
            third, session = await caller.next_link()
            assert session.epoch == 2
            fourth, other = await called.next_link()
            assert other == session
            for one in (again, taken, third, fourth):
                await trio.aclose_forcefully(one.control)
        await trio.aclose_forcefully(link.control)
        await trio.aclose_forcefully(seen.control)


async def test_coming_back_to_nobody() -> None:
    """A listener that does not know the migration may be anybody's: its answer decides no more than silence."""
    async with open_acceptor() as (acceptor, address):
        link = await c.CallingLink.open(address, "dest")
        seen = await acceptor.next_link()
        with link.reconnector(SESSION) as caller:
            await support.looks_again(caller, lambda: acceptor.refused)
        await trio.aclose_forcefully(link.control)
        await trio.aclose_forcefully(seen.control)
    with link.reconnector(SESSION) as caller, trio.move_on_after(0.5) as scope:
        await caller.next_link()
    assert scope.cancelled_caught


# ---- a peer that moves


@asynccontextmanager
async def lost_pair(*hosts: str) -> AsyncIterator[tuple[list[c.Address], list[c.Reconnector]]]:
    """A listening side at each host, all of the same migration, with nobody connected."""
    async with contextlib.AsyncExitStack() as stack:
        addresses, reconnectors = [], []
        for host in hosts:
            acceptor, address = await stack.enter_async_context(open_acceptor(host=host))
            first = await c.CallingLink.open(address, "dest")
            seen = await acceptor.next_link()
            reconnectors.append(stack.enter_context(seen.reconnector(SESSION)))
            addresses.append(address)
            for link in (first, seen):
                await trio.aclose_forcefully(link.control)
        yield addresses, reconnectors


def a_caller(route: c.Route) -> c.Reconnector:
    return calling.CallingReconnector(route, "dest", SESSION, p.PROTOCOL_VERSION)


async def test_looked_for_at_a_new_address() -> None:
    """Also by one that is trying the old one in vain already; and what comes afterwards is looked for there too."""
    async with lost_pair("127.0.0.1", "127.0.0.2") as (addresses, reconnectors):
        [closed] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        dead = c.Address("127.0.0.1", closed.socket.getsockname()[1])
        await closed.aclose()
        route = c.Route(dead)
        reconnector = a_caller(route)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                found: list[tuple[c.Link, c.Session]] = []

                async def look() -> None:
                    found.append(await reconnector.next_link())
                    nursery.cancel_scope.cancel()

                nursery.start_soon(look)
                await wait_all_tasks_blocked()
                route.change(addresses[1])
            for host in (1, 0):
                link, session = found.pop() if found else await reconnector.next_link()
                assert link.peer == addresses[host]
                there, seen = await reconnectors[host].next_link()
                assert seen.epoch == session.epoch
                with (
                    link.channel_set(session) as mine,
                    there.channel_set(seen) as theirs,
                ):  # data channels go there as well
                    got: list[dict[c.ChannelKey, DataChannel]] = []

                    async def collect(
                        open_channels: c.OpenChannels, got: list[dict[c.ChannelKey, DataChannel]] = got
                    ) -> None:
                        got.append(await open_channels(1, 1))

                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(collect, mine)
                        nursery.start_soon(collect, theirs)
                for fd in (*got[0].values(), *got[1].values()):
                    fd.close()
                for one in (link, there):
                    await trio.aclose_forcefully(one.control)
                link.reconnect_to(addresses[0])


async def test_a_refusal_at_a_new_address_is_not_the_peers(caplog: pytest.LogCaptureFixture) -> None:
    """Anybody's listener knows nothing of us. Only the one that has known us can say that it does not any more."""
    async with lost_pair("127.0.0.1") as ([address], [there]), open_acceptor(host="127.0.0.2") as (_, wrong):
        route = c.Route(wrong)
        reconnector = a_caller(route)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                found: list[c.Link] = []

                async def look() -> None:
                    found.append((await reconnector.next_link())[0])
                    nursery.cancel_scope.cancel()

                nursery.start_soon(look)
                while "is that the right address?" not in caplog.text:
                    await wait_all_tasks_blocked()
                    await trio.lowlevel.checkpoint()
                route.change(address)
            seen, _ = await there.next_link()
            for one in (*found, seen):
                await trio.aclose_forcefully(one.control)


def test_route(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a file says, read again when asked to; nonsense changes nothing."""
    file = tmp_path / "peer"
    file.write_text("first:1\n")
    route = c.Route(c.read_peer_file(str(file)), lambda: c.read_peer_file(str(file)))
    assert route.address == c.Address("first", 1)
    route.answered(c.Address("first", 1), c.Address("192.0.2.1", 1))
    route.refresh()  # the same name: the address that had answered
    assert route.address == c.Address("192.0.2.1", 1)
    route.refresh(by_user=True)  # the same name, but the user knows why
    assert route.address == c.Address("first", 1)
    file.write_text("  [2001:db8::7]:7\n\n")
    route.refresh()
    assert route.address == c.Address("2001:db8::7", 7)
    route.answered(c.Address("first", 1), c.Address("192.0.2.1", 1))  # asked before it was changed
    assert route.address == c.Address("2001:db8::7", 7)
    for nonsense in (b"", b"nowhere", b"a:1\nb:2", b"\xff\xfe:1\0", b"x" * 5000, b"*:1", b"host:0"):
        file.write_bytes(nonsense)
        caplog.clear()
        route.refresh(by_user=True)
        assert route.address == c.Address("2001:db8::7", 7)
        assert "looked for at [2001:db8::7]:7 as before" in caplog.text
        with pytest.raises(ConfigurationError, match="--peer-file") as caught:
            c.read_peer_file(str(file))
        assert "\n" not in str(caught.value)
    for path in (tmp_path, tmp_path / "none", "a\0b"):
        with pytest.raises(ConfigurationError, match="--peer-file"):
            c.read_peer_file(str(path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match="not a regular file"):
        c.read_peer_file(str(tmp_path / "pipe"))
    c.Route(c.Address("first", 1)).refresh(by_user=True)  # where there is nothing to look up


async def test_a_side_that_listens_takes_no_address() -> None:
    async with open_acceptor() as (acceptor, address):
        link = await c.CallingLink.open(address, "dest")
        seen = await acceptor.next_link()
        with pytest.raises(ConfigurationError, match="this side listens"):
            seen.reconnect_to(c.Address("elsewhere", 1))
        for one in (link, seen):
            await trio.aclose_forcefully(one.control)


# ---- a connection that is paused


async def test_paused_by_the_side_that_calls() -> None:
    """It gives up what it has, makes no connection while it is paused, and then does at once."""
    async with open_acceptor() as (acceptor, address):
        link = await c.CallingLink.open(address, "dest")
        seen = await acceptor.next_link()
        with link.reconnector(SESSION) as caller, seen.reconnector(SESSION) as called:
            async with trio.open_nursery() as nursery:

                async def recover() -> None:
                    await wait_all_tasks_blocked(0.05)
                    assert acceptor.accepted == 1
                    caller.recover()

                caller.pause()
                with pytest.raises(PeerError, match=c.PAUSED_BY_OPERATOR):
                    await caller.superseded()
                nursery.start_soon(recover)
                again, session = await caller.next_link()
            assert session.epoch == 1
            taken, _ = await called.next_link()
            for one in (link, seen, again, taken):
                await trio.aclose_forcefully(one.control)


async def test_paused_by_the_side_that_listens() -> None:
    """The other one is refused, asks again, and is let in when it is let go; one that had just come must come again."""
    async with open_acceptor() as (acceptor, address):
        link: c.Link = await c.CallingLink.open(address, "dest")
        seen = await acceptor.next_link()
        with link.reconnector(SESSION) as caller, seen.reconnector(SESSION) as called:
            early, _ = await caller.next_link()
            await called.superseded()
            called.pause()
            assert await early.control.receive_some(1) == b""
            with pytest.raises(PeerError, match=c.PAUSED_BY_OPERATOR):
                await called.superseded()
            async with trio.open_nursery() as nursery:

                async def recover() -> None:
                    while not acceptor.refused:  # noqa: ASYNC110  (a counter)
                        await trio.sleep(0.001)
                    called.recover()

                nursery.start_soon(recover)
                again, session = await caller.next_link()
            taken, other = await called.next_link()
            assert session == other
            assert session.epoch > 2  # each attempt has its own
            for one in (link, seen, early, again, taken):
                await trio.aclose_forcefully(one.control)


async def test_paused_while_it_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that comes about although it was paused meanwhile is not used."""
    async with open_acceptor() as (acceptor, address):
        link = await c.CallingLink.open(address, "dest")
        seen = await acceptor.next_link()
        with link.reconnector(SESSION) as caller, seen.reconnector(SESSION) as called:
            connect = connecting.Caller.connect
            streams: list[trio.abc.AsyncResource] = []
            held = trio.Event()

            async def slow(*arguments: Any, **options: Any) -> tuple[Any, int]:
                stream, version = await connect(*arguments, **options)
                if not streams:
                    caller.pause()
                    held.set()
                streams.append(stream)
                return stream, version

            monkeypatch.setattr(connecting.Caller, "connect", slow)
            async with trio.open_nursery() as nursery:

                async def recover() -> None:
                    await held.wait()
                    caller.recover()

                nursery.start_soon(recover)
                again, session = await caller.next_link()
            assert session.epoch == len(streams) >= 2
            for one in (link, seen, again):
                await trio.aclose_forcefully(one.control)
            called.pause()
