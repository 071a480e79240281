# SPDX-License-Identifier: Apache-2.0
"""Versions 5, 4 and 3, and version 2: what is said first, and a peer of version 2 that is played from its bytes.

The bytes of version 2 below are written down by hand, as docs/protocol.md of that version has them, and not made by the
package.
"""

from __future__ import annotations

import socket

import msgpack
import pytest
import trio
from trio.testing import MockClock

from postcopy import net as c
from postcopy import wire as p
from postcopy.errors import PeerError, ProtocolError
from postcopy.net import connecting
from postcopy.wire import DestinationProtocol, SourceProtocol, State
from postcopy.wire.messages import MAX_STATE_BYTES, OLDEST_VERSION
from tests.unit.net.support import SESSION, open_acceptor
from tests.unit.wire.support import MESSAGES, body, framed

OLD = b"postcpy\x02"
HELLO_2 = {
    "type": "hello", "channel": "control", "side": "dest", "index": 0, "migration": b"", "epoch": 0, "token": b"",
}  # fmt: skip
OFFER_2 = {
    "type": "offer", "migration": b"m" * 16, "token": b"t" * 16, "machine": "kvm", "config": {"vcpus": 1},
    "blocks": [{"name": "ram", "size-bytes": 8192, "page-bytes": 4096}], "bulk-channels": 1, "placed-every-ms": 0,
}  # fmt: skip


HELLO_3 = {"channel", "side", "index", "migration", "epoch", "ended", "proof", "instance"}
OFFER_3 = {"migration", "token", "machine", "config", "blocks", "bulk-channels", "placed-every-ms"}
ACCEPT_3 = {"page-bytes", "shards", "bulk-channels"}
DIFFERENT = {
    "hello": {2: set(HELLO_2) - {"type"}, 3: HELLO_3},
    "welcome": {2: set[str](), 3: {"proof"}},
    "refused": {2: {"reason"}, 3: {"reason", "code", "proof"}},
    "offer": {2: OFFER_3, 4: OFFER_3 | {"compress"}},
    "accept": {2: ACCEPT_3, 4: ACCEPT_3 | {"compress"}},
    "switchover": {2: {"state", "maps"}, 4: {"state", "maps", "whole"}},
    "running": {2: {"resume-ns"}, 4: {"resume-ns", "ago-ns"}},
}
"""The fields of those messages that are not the same in all versions, from which version on, as docs/protocol.md has
them."""


@pytest.mark.parametrize("version", range(OLDEST_VERSION, p.PROTOCOL_VERSION + 1))
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: str(message.TYPE))
def test_the_fields_of_each_version(message: p.Message, version: int) -> None:
    """What is said has these and no others, and what is heard may have these and no others."""
    if version < message.SINCE:
        return
    fields = msgpack.unpackb(body(message, version), strict_map_key=False)
    every = set(message.__struct_encode_fields__)
    by_version = DIFFERENT.get(message.TYPE, {version: every})
    assert set(fields) - {"type"} == by_version[max(since for since in by_version if since <= version)]
    assert isinstance(p.decode(msgpack.packb(fields), version), type(message))
    assert not set(message.FIELDS_FROM) - every
    assert not set(message.FIELDS_UNTIL) - every


def said(fields: dict[str, object]) -> bytes:
    return framed(msgpack.packb(fields))


class OldPeer:
    """The other end of a connection, in version 2."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.data = b""

    async def bytes(self, count: int) -> bytes:
        while len(self.data) < count:
            data = await self.stream.receive_some()
            if not data:
                raise EOFError
            self.data += data
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    async def hear(self) -> dict[str, object]:
        length = int.from_bytes((await self.bytes(8))[:4], "big")
        heard: dict[str, object] = msgpack.unpackb(await self.bytes(length))
        return heard

    async def say(self, **fields: object) -> None:
        await self.stream.send_all(said(fields))


async def dial(acceptor: c.Acceptor) -> trio.SocketStream:
    return await trio.open_tcp_stream(acceptor.addresses[0].host, acceptor.addresses[0].port)


# ---- one of version 2 calls


async def call_2(acceptor: c.Acceptor, **hello: object) -> OldPeer:
    peer = OldPeer(await dial(acceptor))
    await peer.stream.send_all(OLD + said({**HELLO_2, **hello}))
    assert await peer.bytes(8) == OLD
    return peer


async def test_an_old_destination_calls() -> None:
    """From hello to the data channels of a recovery, in its own words and in nothing but them."""
    async with open_acceptor("source") as acceptor:
        peer = await call_2(acceptor)
        assert await peer.hear() == {"type": "welcome"}
        link = await acceptor.next_link()
        assert link.version == 2
        source = SourceProtocol(link.version)
        offer = p.Offer(b"m" * 16, b"t" * 16, "kvm", {"vcpus": 1}, (p.Block("ram", 8192, 4096),), 1, 0)
        await link.control.send_all(source.send(offer))
        assert await peer.hear() == OFFER_2
        with link.reconnector(SESSION) as reconnector, link.channel_set(SESSION):
            urgent = await call_2(acceptor, channel="urgent", migration=b"m" * 16, token=b"t" * 16)
            assert await urgent.hear() == {"type": "welcome"}
            wrong = await call_2(acceptor, channel="bulk", migration=b"m" * 16, token=b"u" * 16)
            assert await wrong.hear() == {"type": "refused", "reason": "wrong token"}
            again = await call_2(acceptor, migration=b"m" * 16, token=b"t" * 16, epoch=1)
            assert await again.hear() == {"type": "welcome"}
            back, session = await reconnector.next_link()
            assert (back.version, session.epoch) == (2, 1)
            reconnector.ended(p.Ended.ABORTED)
            late = await call_2(acceptor, migration=b"m" * 16, token=b"t" * 16, epoch=2)
            assert await late.hear() == {"type": "refused", "reason": "no such migration here"}
        for stream in (peer.stream, urgent.stream, wrong.stream, again.stream, late.stream, link.control, back.control):
            await trio.aclose_forcefully(stream)


async def test_a_migration_does_not_change_its_version() -> None:
    """Who knows the token of one of version 3 cannot go on in version 2, nor the other way round."""
    async with open_acceptor("source") as acceptor:
        new = await c.CallingLink.open(acceptor.addresses[0], "dest")
        link = await acceptor.next_link()
        with link.reconnector(SESSION), link.channel_set(SESSION):
            for channel, epoch in (("control", 1), ("urgent", 0)):
                old = await call_2(acceptor, channel=channel, migration=b"m" * 16, token=b"t" * 16, epoch=epoch)
                assert await old.hear() == {"type": "refused", "reason": "wrong token"}
                await trio.aclose_forcefully(old.stream)
        for stream in (new.control, link.control):
            await trio.aclose_forcefully(stream)


# ---- one of version 2 listens


async def listen_2(listener: trio.SocketListener) -> tuple[OldPeer, bytes]:
    """It says its preamble at once, then reads the other one."""
    peer = OldPeer(await listener.accept())
    await peer.stream.send_all(OLD)
    return peer, await peer.bytes(8)


async def refuse_newer(peer: OldPeer) -> None:
    """As it does: with what it has not read still in the socket, so that the connection is reset."""
    await peer.say(type="refused", reason="speaks version 3 of the postcopy protocol, this is version 2")
    await trio.aclose_forcefully(peer.stream)


async def test_an_old_source_listens() -> None:
    """It is found out with the first connection, and every other one is made in its version at once."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = c.Address("127.0.0.1", listener.socket.getsockname()[1])
    streams: list[trio.SocketStream] = []

    async def expect(**hello: object) -> OldPeer:
        peer, preamble = await listen_2(listener)
        assert preamble == OLD
        assert await peer.hear() == {**HELLO_2, **hello}
        await peer.say(type="welcome")
        streams.append(peer.stream)
        return peer

    async def old() -> None:
        peer, preamble = await listen_2(listener)
        assert preamble == p.PREAMBLE
        await refuse_newer(peer)
        peer = await expect()
        await peer.stream.send_all(said(OFFER_2))
        accepted = await peer.hear()
        assert accepted == {"type": "accept", "page-bytes": [4096], "shards": 1, "bulk-channels": 1}
        await expect(channel="urgent", migration=b"m" * 16, token=b"t" * 16)
        await expect(channel="bulk", migration=b"m" * 16, token=b"t" * 16)
        await expect(migration=b"m" * 16, token=b"t" * 16, epoch=1)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(old)
            link = await c.CallingLink.open(address, "dest")
            assert link.version == 2
            dest = DestinationProtocol(link.version)
            while dest.state is State.SETUP:
                dest.receive_data(await link.control.receive_some())
                dest.next_message()
            with pytest.raises(ProtocolError, match="the source speaks version 2, which needs a bulk channel"):
                dest.send(p.Accept((4096,), 1, 0))
            await link.control.send_all(dest.send(p.Accept((4096,), 1, 1)))
            with link.channel_set(SESSION) as open_channels, link.reconnector(SESSION) as reconnector:
                for fd in (await open_channels(1, 1)).values():
                    fd.close()
                back, _ = await reconnector.next_link()
            assert back.version == 2
            await reconnector.announce(p.Ended.COMPLETED)  # which could not be understood: it is not even tried
    for stream in (*streams, link.control, back.control):
        await trio.aclose_forcefully(stream)
    await listener.aclose()


# ---- other versions


async def test_a_newer_caller_gets_the_version() -> None:
    """And no byte that it has said is in the way of that: it hangs up itself, and comes again. No place is taken."""
    async with open_acceptor("dest") as acceptor:
        stream = await dial(acceptor)
        await stream.send_all(b"postcpy\x09" + b"whatever that version says" * 100)
        peer = OldPeer(stream)
        assert await peer.bytes(8) == p.PREAMBLE
        with trio.move_on_after(0.05) as scope:
            await peer.bytes(1)
        assert scope.cancelled_caught
        await stream.send_eof()
        with pytest.raises(EOFError):
            await peer.bytes(1)
        assert not acceptor.bad_handshakes
        assert not acceptor.refused
        await stream.aclose()


@pytest.mark.parametrize("version", [0, 1])
async def test_a_version_that_is_too_old_is_refused_by_name(version: int) -> None:
    async with open_acceptor("source") as acceptor:
        peer = OldPeer(await dial(acceptor))
        await peer.stream.send_all(b"postcpy" + bytes([version]))
        assert await peer.bytes(8) == p.PREAMBLE
        assert f"speaks version {version}" in str((await peer.hear())["reason"])
        await peer.stream.aclose()


@pytest.mark.parametrize("answer", [b"postcpy\x01", b"postcpy\x06", b"postcpy\xff"])
def test_answers_that_make_no_sense(answer: bytes) -> None:
    """A listening side may go down to what is spoken here, and never up: that would go round in circles."""
    client = p.ClientHandshake(p.Hello("control", "dest", 0, b"", 0))
    with pytest.raises(ProtocolError, match=f"speaks version {answer[-1]}"):
        client.receive_data(answer)


def test_down_and_not_further() -> None:
    hello = p.Hello("control", "dest", 0, b"", 0)
    with pytest.raises(p.OlderPeerError) as older:
        p.ClientHandshake(hello).receive_data(OLD)
    assert older.value.version == 2
    client = p.ClientHandshake(hello, version=2)
    client.receive_data(OLD)
    with pytest.raises(ProtocolError):
        p.ClientHandshake(hello, version=2).receive_data(p.PREAMBLE)


async def test_a_host_that_goes_back_while_it_is_called(autojump_clock: MockClock) -> None:
    """Each answer older than the last one: bounded, and an error that names it."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def old() -> None:
        while True:
            peer, _ = await listen_2(listener)
            await peer.stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(old)
        with pytest.raises(PeerError, match=r"(closed the connection|broke) during the handshake"):
            await c.CallingLink.open(c.Address("127.0.0.1", listener.socket.getsockname()[1]), "dest")
        nursery.cancel_scope.cancel()
    await listener.aclose()


# ---- the timing


async def test_equals_need_one_round_trip() -> None:
    """The caller says all it has to say before it has heard anything, the other one nothing before that."""
    async with open_acceptor("source") as acceptor:
        stream = await dial(acceptor)
        with trio.move_on_after(0.05) as scope:
            await stream.receive_some()
        assert scope.cancelled_caught
        await stream.send_all(p.ClientHandshake(p.Hello("control", "dest", 0, b"", 0)).send_hello())
        answer = b""
        while len(answer) < len(p.PREAMBLE + p.encode(p.Welcome())):
            answer += await stream.receive_some()
        assert answer == p.PREAMBLE + p.encode(p.Welcome())
        await trio.aclose_forcefully((await acceptor.next_link()).control)
        await stream.aclose()


async def test_the_caller_waits_for_nothing() -> None:
    mine, theirs = socket.socketpair()
    here = trio.SocketStream(trio.socket.from_stdlib_socket(mine))
    there = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    handshake = p.ClientHandshake(p.Hello("control", "dest", 0, b"", 0))
    async with trio.open_nursery() as nursery:
        plain = connecting._Secured(None, "")
        hello = p.Hello("control", "dest", 0, b"", 0)
        nursery.start_soon(connecting.Caller()._greet, here, plain, hello, b"", p.PROTOCOL_VERSION)
        assert await OldPeer(there).bytes(len(handshake.send_hello())) == handshake.send_hello()
        await there.send_all(p.PREAMBLE + p.encode(p.Welcome()))
    await here.aclose()
    await there.aclose()


# ---- fields


def test_unknown_fields() -> None:
    """Ignored from version 3 on, whatever is in them; an error in version 2."""
    ready = {"type": "ready", "more": {"and": [1, 2, None]}, "5": b"x"}
    packed = msgpack.packb(ready)
    assert p.decode(packed, 3) == p.Ready()
    with pytest.raises(ProtocolError, match="ready: unknown field 'more'"):
        p.decode(packed, 2)


def test_what_version_2_does_not_have() -> None:
    hello = p.Hello("control", "dest", 0, b"m" * 16, 1, "aborted").signed(b"t" * 16, 3)
    assert msgpack.unpackb(p.encode(hello, 2)[p.HEADER_BYTES :]) == {**HELLO_2, "migration": b"m" * 16, "epoch": 1}
    refused = p.Refused("over", "aborted").signed(b"t" * 16, hello)
    assert p.decode(p.encode(refused, 2)[p.HEADER_BYTES :], 2) == p.Refused("over")
    assert set(msgpack.unpackb(p.encode(refused, 3)[p.HEADER_BYTES :])) == {"type", "reason", "code", "proof"}
    for version in (3, 4):
        assert b"token" not in p.encode(hello, version)  # it is never said there, nor asked for


def test_no_bulk_channel_where_it_is_not_understood() -> None:
    offer = p.Offer(b"m" * 16, b"t" * 16, "kvm", {}, (p.Block("ram", 8192, 4096),), 0, 0)
    source = SourceProtocol(2)
    with pytest.raises(ProtocolError, match="the destination speaks version 2, which needs a bulk channel"):
        source.send(offer)
    assert source.state is State.SETUP
    dest = DestinationProtocol()
    dest.receive_data(SourceProtocol().send(offer))
    assert dest.next_message() == offer
    source = SourceProtocol()
    source.send(offer)
    source.receive_data(dest.send(p.Accept((4096,), 1, 0)))
    assert source.next_message() == p.Accept((4096,), 1, 0)


def test_a_later_release_may_say_more() -> None:
    """Also about a block."""
    newer = {**OFFER_2, "colour": 1, "blocks": [{**OFFER_2["blocks"][0], "numa-node": 1}]}  # type: ignore[index]
    assert p.decode(msgpack.packb(newer), 3) == p.decode(msgpack.packb(OFFER_2), 3)


@pytest.mark.parametrize("version", [2, 3])
def test_no_rounds_before_version_4(version: int) -> None:
    """Neither said nor taken; what was added to messages that are older is not said, and the migration is as before."""
    source, dest = SourceProtocol(version), DestinationProtocol(version)
    offer = p.Offer(b"m" * 16, b"t" * 16, "kvm", {}, (p.Block("ram", 8192, 4096),), 1, 0, ("lz4",))
    dest.receive_data(source.send(offer))
    taken = dest.next_message()
    assert isinstance(taken, p.Offer)
    assert taken.compress == ()
    for message in (p.Accept((4096,), 1, 1, ("lz4",)), p.Ready()):
        source.receive_data(dest.send(message))
        heard = source.next_message()
        assert heard == (p.Accept((4096,), 1, 1) if isinstance(message, p.Accept) else message)
    for said in (p.StaleMap(0, 0, 2, b"\x01"), p.Round(0, 1, False)):
        with pytest.raises(ProtocolError, match=rf"(version {version} is spoken, which has none|in state ready)"):
            source.send(said)
        assert source.state is State.READY
    dest.receive_data(p.encode(p.StaleMap(0, 0, 2, b"\x01")))
    with pytest.raises(ProtocolError, match=f"stale-map must not be received: version {version} is spoken"):
        dest.next_message()
    dest = DestinationProtocol(version)
    dest._state = State.READY
    for last in (p.PageMap(0, 0, 2, b"\x01"), p.Switchover(b"", 1, True)):
        dest.receive_data(source.send(last))
        heard = dest.next_message()
    assert heard == p.Switchover(b"", 1)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_no_early_state_before_version_5(version: int) -> None:
    """Neither said nor taken."""
    source, dest = SourceProtocol(version), DestinationProtocol(version)
    source._state = dest._state = State.READY
    with pytest.raises(ProtocolError, match=f"early-state must not be sent: version {version} is spoken"):
        source.send(p.EarlyState(b"rom"))
    assert source.state is State.READY
    dest.receive_data(p.encode(p.EarlyState(b"rom")))
    with pytest.raises(ProtocolError, match=f"early-state must not be received: version {version} is spoken"):
        dest.next_message()


def test_a_state_is_bounded_also_in_pieces() -> None:
    source, dest = SourceProtocol(), DestinationProtocol()
    source._state = dest._state = State.READY
    piece, pieces = bytes(p.EARLY_STATE_BYTES), MAX_STATE_BYTES // p.EARLY_STATE_BYTES
    for _ in range(pieces):
        dest.receive_data(source.send(p.EarlyState(piece)))
        assert dest.next_message() == p.EarlyState(piece)
    for last in (p.EarlyState(piece), p.Switchover(piece, 0)):
        with pytest.raises(ProtocolError, match=rf"{last.TYPE} must not be sent: the state has more than 16 MiB"):
            source.send(last)
    assert source.state is State.READY
    source.send(p.Switchover(b"", 0))
    dest.receive_data(p.encode(p.Switchover(piece, 0)))
    with pytest.raises(ProtocolError, match="switchover must not be received: the state has more than 16 MiB"):
        dest.next_message()
