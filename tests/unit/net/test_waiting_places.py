# SPDX-License-Identifier: Apache-2.0
"""A listening destination has few places: they belong to those who offer something, not to those who only say hello."""

from __future__ import annotations

import contextlib
import socket
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from postcopy import net as c
from postcopy import wire as p
from postcopy.errors import PeerError, ProtocolError
from postcopy.net import connecting
from tests.unit.net.support import OFFER, open_acceptor

HELLO = p.Hello("control", "source", 0, b"", 0)


destination = partial(open_acceptor, "dest")


def one_place(asking: c.Asking) -> str:
    return "busy with another source" if asking.waiting else ""


async def hello(acceptor: c.Acceptor) -> trio.SocketStream:
    stream, _ = await connecting.Caller().connect(acceptor.addresses[0], HELLO)
    assert isinstance(stream, trio.SocketStream)
    return stream


async def nobody_comes(acceptor: c.Acceptor) -> None:
    with trio.move_on_after(0.05) as scope:
        await acceptor.next_link()
    assert scope.cancelled_caught


async def test_a_hello_is_no_migration() -> None:
    """Neither one that is followed by nothing, nor by a part of an offer, nor by the end, takes the only place."""
    async with destination(one_place) as acceptor:
        silent, partial, gone, reset = [await hello(acceptor) for _ in range(4)]
        await partial.send_all(p.encode(OFFER)[:-1])
        await gone.send_all(p.encode(OFFER)[:20])
        await gone.send_eof()
        with contextlib.suppress(trio.BrokenResourceError):
            assert await gone.receive_some() == b""
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await trio.aclose_forcefully(reset)
        await nobody_comes(acceptor)
        honest = await hello(acceptor)
        await honest.send_all(p.encode(OFFER) + b"and more")
        link = await acceptor.next_link()
        assert link.received == p.encode(OFFER)
        assert await link.control.receive_some() == b"and more"  # not a byte of it was taken
        await partial.send_all(p.encode(OFFER)[-1:])
        second = await acceptor.next_link()
        for stream in (silent, partial, gone, honest, link.control, second.control):
            await trio.aclose_forcefully(stream)


async def test_the_second_offer_is_declined(autojump_clock: MockClock) -> None:
    """And does not wait for nothing: two were welcome, and one place is left."""
    async with destination(one_place) as acceptor:
        first, second = await hello(acceptor), await hello(acceptor)
        await first.send_all(p.encode(OFFER))
        await wait_all_tasks_blocked()
        await second.send_all(p.encode(OFFER))
        source = p.SourceProtocol()
        source.send(OFFER)
        while source.state is p.State.OFFERED:
            source.receive_data(await second.receive_some())
            source.next_message()
        assert source.state is p.State.ABORTED
        assert source.reason == "the destination declined: busy with another source"
        with pytest.raises(PeerError, match="busy with another source"):
            await hello(acceptor)
        assert trio.current_time() < 1
        link = await acceptor.next_link()
        for stream in (first, second, link.control):
            await trio.aclose_forcefully(stream)


async def test_silence_has_an_end(autojump_clock: MockClock) -> None:
    async with destination() as acceptor:
        stream = await hello(acceptor)
        began_s = trio.current_time()
        assert await stream.receive_some() == b""
        assert trio.current_time() - began_s == pytest.approx(c.OFFER_TIMEOUT_S, abs=1)
        assert acceptor.bad_handshakes == 1
        await stream.aclose()


async def test_any_number_of_silent_ones() -> None:
    """They keep nobody out, and no more of them are kept than of those who say nothing at all."""
    async with destination(one_place) as acceptor:
        silent = [await hello(acceptor) for _ in range(c.MAX_HALF_OPEN + 20)]
        honest = await hello(acceptor)
        await honest.send_all(p.encode(OFFER))
        link = await acceptor.next_link()
        assert len(acceptor._half_open) <= c.MAX_HALF_OPEN
        for stream in (*silent, honest, link.control):
            await trio.aclose_forcefully(stream)


async def test_more_than_anybody_takes() -> None:
    """Whoever comes when too many wait already is refused by name, before it is welcome."""
    async with destination() as acceptor:
        streams: list[trio.abc.HalfCloseableStream] = []
        for _ in range(c.MAX_WAITING):
            streams.append(await hello(acceptor))
            await streams[-1].send_all(p.encode(OFFER))
        while len(acceptor._waiting) < c.MAX_WAITING:  # noqa: ASYNC110  (a counter)
            await trio.sleep(0.001)
        with pytest.raises(PeerError, match="too many are waiting"):
            await hello(acceptor)
        streams.append((await acceptor.next_link()).control)
        streams.append(await hello(acceptor))
        for stream in streams:
            await trio.aclose_forcefully(stream)


async def test_places_are_free_again_when_accepting_begins_anew() -> None:
    """A daemon serves again after a mistake: connections that it closed then take no place any more."""
    acceptor = await c.Acceptor.open(c.Address("127.0.0.1", 0), "dest", one_place)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(acceptor.serve)
            untaken = await hello(acceptor)
            await untaken.send_all(p.encode(OFFER))
            while not acceptor._waiting:  # noqa: ASYNC110  (a counter)
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(acceptor.serve)
            second = await hello(acceptor)
            await second.send_all(p.encode(OFFER))
            with trio.fail_after(10):
                link = await acceptor.next_link()
            nursery.cancel_scope.cancel()
        for stream in (untaken, second, link.control):
            await trio.aclose_forcefully(stream)
    finally:
        await acceptor.close()


async def test_an_offer_that_is_too_long_is_left_to_the_protocol() -> None:
    """It is not waited for: the protocol refuses it with its first bytes."""
    async with destination() as acceptor:
        stream = await hello(acceptor)
        await stream.send_all(b"\xff" * p.HEADER_BYTES)
        link = await acceptor.next_link()
        dest = p.DestinationProtocol(link.version)
        dest.receive_data(link.received)
        with pytest.raises(ProtocolError, match="4294967295 bytes"):
            dest.next_message()
        await trio.aclose_forcefully(stream)
        await trio.aclose_forcefully(link.control)


async def test_a_mistake_of_ours_ends_one_greeting(caplog: pytest.LogCaptureFixture) -> None:
    """Logged with its traceback; the listener goes on."""
    broken = True

    def why_refused(asking: c.Asking) -> str:
        if broken:
            raise KeyError("a mistake")
        return ""

    async with destination(why_refused) as acceptor:
        with pytest.raises(PeerError, match="closed the connection"):
            await hello(acceptor)
        assert "KeyError: 'a mistake'" in caplog.text
        broken = False
        await trio.aclose_forcefully(await hello(acceptor))


async def test_a_sign_of_life_is_no_offer() -> None:
    """Whoever is welcome and only pings takes no place either."""
    async with destination(one_place) as acceptor:
        alive = await hello(acceptor)
        await alive.send_all(p.encode(p.Ping(1)) + p.encode(OFFER))
        with contextlib.suppress(trio.BrokenResourceError):
            assert await alive.receive_some() == b""
        await nobody_comes(acceptor)
        assert acceptor.bad_handshakes == 1
        await alive.aclose()


async def test_what_is_readable_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is short of memory for sockets calls one readable that has a part of the offer."""

    async def at_once(handle: object) -> None:
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(trio.lowlevel, "wait_readable", at_once)
    async with destination(one_place) as acceptor:
        slow = await hello(acceptor)
        for part in (p.encode(OFFER)[:3], p.encode(OFFER)[3:20]):
            await slow.send_all(part)
            await nobody_comes(acceptor)
        await slow.send_all(p.encode(OFFER)[20:])
        link = await acceptor.next_link()
        assert link.received == p.encode(OFFER)
        assert acceptor.bad_handshakes == 0
        for stream in (slow, link.control):
            await trio.aclose_forcefully(stream)


async def test_where_it_listened_is_known_at_its_end() -> None:
    """Whoever looks at a process that ends meets listeners that are closed already."""
    async with destination() as acceptor:
        before = list(acceptor.addresses)
        assert before[0].port
    assert acceptor.addresses == before
