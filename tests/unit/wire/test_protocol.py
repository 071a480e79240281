# SPDX-License-Identifier: Apache-2.0
"""The control protocol, byte by byte."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from postcopy import wire as p
from postcopy.errors import PeerError, ProtocolError
from postcopy.memory.bitmap import Bitmap
from postcopy.wire import DestinationProtocol, SourceProtocol, State, messages
from tests.unit.wire.support import BLOCKS, HELLO, MESSAGES, OFFER, destination_in, drain, framed, put, source_in


def frame(body: object) -> bytes:
    return framed(msgpack.packb(body))


def conversation() -> list[tuple[str, bytes, SourceProtocol, DestinationProtocol]]:
    """Every message of a migration that goes well, as (sender, bytes), with both sides as they are at the end."""
    source, dest = SourceProtocol(), DestinationProtocol()
    steps: list[tuple[str, Callable[[], bytes]]] = [
        ("source", lambda: source.send(OFFER)),
        ("dest", lambda: dest.send(p.Accept((4096, 4096), 2, 1))),
        ("source", lambda: source.send(p.Ping(9))),
        ("dest", lambda: dest.send(p.Ready())),
        ("source", lambda: source.send(p.PageMap(0, 0, 256, b"\x01"))),
        ("source", lambda: source.send(p.PageMap(1, 0, 512, b"\x01"))),
        ("source", lambda: source.send(p.Switchover(b"state", 2))),
        ("dest", lambda: dest.send(p.Prepared())),
        ("source", lambda: source.send(p.Commit())),
        ("dest", lambda: dest.send(p.Running(100))),
        ("dest", lambda: dest.send(p.Placed(1, 64, 100, b"\x01\x02"))),
        ("dest", lambda: dest.send(p.Complete({}))),
        ("source", lambda: source.send(p.CompleteAck({}))),
    ]
    said = []
    for sender, send in steps:
        data = send()
        receiver = dest if sender == "source" else source
        receiver.receive_data(data)
        assert len(drain(receiver)) == 1
        said.append((sender, data, source, dest))
    assert source.state is dest.state is State.COMPLETED
    return said


class TestMessages:
    @pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.TYPE)
    def test_round_trip(self, message: p.Message) -> None:
        data = p.encode(message)
        assert int.from_bytes(data[:4], "big") == len(data) - 8
        assert p.decode(data[8:]) == message

    def test_every_message_is_tried_here(self) -> None:
        assert {message.TYPE for message in MESSAGES} == set(messages.MESSAGES)

    @pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.TYPE)
    def test_each_field_is_needed_and_typed(self, message: p.Message) -> None:
        whole = msgpack.unpackb(p.encode(message)[8:])
        for name in whole:
            if name == "type":
                continue
            without = msgpack.packb({key: value for key, value in whole.items() if key != name})
            if name in message.MAY_LACK:
                assert p.decode(without).TYPE == message.TYPE
            else:
                with pytest.raises(ProtocolError, match=rf"{message.TYPE}: field {name} is missing"):
                    p.decode(without)
            wrongs: tuple[object, ...] = (None, 1.5, True, -1, [[]], {"a": {1: 2}}, "x" * 9000, b"x" * 9000)
            for wrong in wrongs:
                if isinstance(wrong, bytes) and name == "state":
                    continue
                if isinstance(wrong, dict):
                    wrong = "\n" if name in ("config", "stats") else {"a": 1}
                if (name == "runs" and isinstance(wrong, bytes)) or (name in ("pushed", "whole") and wrong is True):
                    wrong = 1
                with pytest.raises(ProtocolError, match=rf"{message.TYPE}: field {name}[ \[.]"):
                    p.decode(msgpack.packb({**whole, name: wrong}))

    @pytest.mark.parametrize(
        ("message", "wrong", "words"),
        [
            (HELLO, {"channel": "x"}, "hello: field channel must be control, urgent or bulk, not 'x'"),
            (HELLO, {"ended": "x"}, "field ended must be empty, completed, aborted, reclaimed or lost, not 'x'"),
            (HELLO, {"side": 1}, "hello: field side must be text, not a whole number"),
            (HELLO, {"index": 64}, "hello: field index must be at most 63"),
            (HELLO, {"proof": b"x" * 33}, "hello: field proof must have at most 32 bytes"),
            (OFFER, {"machine": ""}, "offer: field machine must have at least 1 character"),
            (OFFER, {"blocks": []}, "offer: field blocks must have at least 1 element"),
            (OFFER, {"blocks": [{"name": "ram"}]}, "offer: field blocks[0] has no size-bytes"),
            (OFFER, {"config": []}, "offer: field config must be a map, not a list"),
        ],
    )
    def test_wrong_fields_in_words(self, message: p.Message, wrong: dict[str, object], words: str) -> None:
        whole = msgpack.unpackb(p.encode(message)[8:])
        with pytest.raises(ProtocolError, match=rf"{re.escape(words)}$"):
            p.decode(msgpack.packb({**whole, **wrong}))

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            ([], "not a map"),
            ({}, "unknown message type None"),
            ({"type": "explode"}, "unknown message type 'explode'"),
            ({"type": ["ready"]}, "unknown message type"),
            ({"type": "ping", "nonce": 2**63}, "field nonce must be at most 9223372036854775807$"),
            ({"type": "accept", "page-bytes": [4095], "shards": 1, "bulk-channels": 1, "compress": []}, "power of two"),
            (
                {"type": "accept", "page-bytes": [4096] * 65, "shards": 1, "bulk-channels": 1, "compress": []},
                "field page-bytes must have at most 64 elements$",
            ),
            ({"type": "ready", 1: 2}, "not valid msgpack"),
        ],
    )
    def test_refused(self, body: object, reason: str) -> None:
        with pytest.raises(ProtocolError, match=reason):
            p.decode(msgpack.packb(body))

    def test_block_that_is_not_whole_pages(self) -> None:
        whole = msgpack.unpackb(p.encode(OFFER)[8:])
        whole["blocks"][0]["size-bytes"] += 512
        with pytest.raises(ProtocolError, match=r"offer: field blocks .*not whole pages"):
            p.decode(msgpack.packb(whole))

    @pytest.mark.parametrize(
        "packed",
        [
            b"\xdd\xff\xff\xff\xff",  # a list of 4 G entries
            b"\xdf\xff\xff\xff\xff",  # a map of as many
            b"\xc6\xff\xff\xff\xff",  # bytes of as many
            b"\xc1",  # never used
            b"\x81\xa4type\xa3\xff\xff\xff",  # not UTF-8
            b"\x80\x80",  # something after the end
            b"\xd6\xff\x00\x00\x00\x00",  # an extension type
        ],
    )
    def test_malformed_msgpack(self, packed: bytes) -> None:
        with pytest.raises(ProtocolError, match="msgpack"):
            p.decode(packed)

    def test_a_reason_is_one_printable_line(self) -> None:
        message = p.decode(p.encode(p.Abort("a\x1b[2J\nb\r\x00" + "c" * 1000))[8:])
        assert isinstance(message, p.Abort)
        assert message.reason.isprintable()
        assert len(message.reason) <= p.MAX_REASON_CHARS

    @given(st.binary(max_size=200))
    def test_arbitrary_bytes(self, data: bytes) -> None:
        with contextlib.suppress(ProtocolError):
            p.decode(data)

    @pytest.mark.slow
    @given(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**63), 2**64 - 1)
            | st.floats()
            | st.text(max_size=9)
            | st.binary(max_size=20),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=8,
        ),
        st.sampled_from(MESSAGES),
        st.data(),
    )
    def test_arbitrary_values(self, value: Any, message: p.Message, data: st.DataObject) -> None:
        whole = msgpack.unpackb(p.encode(message)[8:])
        whole[data.draw(st.sampled_from(sorted(whole)))] = value
        with contextlib.suppress(ProtocolError):
            p.decode(msgpack.packb(whole))

    def test_largest_page_map_fits(self) -> None:
        data = p.encode(p.PageMap(0, 0, p.PAGE_MAP_PAGES, b"\x01" * p.PAGE_MAP_PAGES))
        assert len(data) < p.MAX_MESSAGE_BYTES

    def test_too_much_to_send(self) -> None:
        source = SourceProtocol()
        with pytest.raises(ProtocolError, match="more than it may have"):
            source.send(p.Offer(b"m" * 16, b"t" * 16, "kvm", {"x": b"x" * 65536}, BLOCKS, 1, 0))
        assert source.state is State.SETUP


class TestHandshake:
    def exchange(self, hello: p.Hello, size: int) -> tuple[p.ClientHandshake, p.ServerHandshake]:
        client, server = p.ClientHandshake(hello), p.ServerHandshake()
        to_server, to_client = client.send_hello(), b""
        while server.wanted():
            some = min(size, server.wanted())
            server.receive_data(to_server[:some])
            to_server = to_server[some:]
        assert not to_server
        to_client = server.send_preamble() + server.send_welcome() + b"FRAME"
        while client.wanted():
            some = min(size, client.wanted())
            client.receive_data(to_client[:some])
            to_client = to_client[some:]
        assert to_client == b"FRAME"  # what comes after the handshake was never asked for
        return client, server

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
    def test_welcome(self, size: int) -> None:
        _, server = self.exchange(HELLO, size)
        assert server.hello == HELLO

    def test_refused(self) -> None:
        client = p.ClientHandshake(HELLO)
        with pytest.raises(PeerError, match="refused the connection: busy now"):
            feed(client, p.PREAMBLE + p.encode(p.Refused("busy\nnow")))

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"\x00", "this is not a postcopy peer: it began with b'\\\\x00'"),
            (b"HTCPCP/1.0", "this is not a postcopy peer: it began with b'HTC"),
            (b"postcpy\x01", "speaks version 1 of the postcopy protocol, this is version 5, which speaks 2 too"),
            (p.PREAMBLE + b"\x00\x00\x40\x01", "a message of 16385 bytes"),
            (p.PREAMBLE + b"\x00\x00\x00\x00", "a message of 0 bytes"),
            (p.PREAMBLE + b"\xff\xff\xff\xff", "a message of 4294967295 bytes"),
            (p.PREAMBLE + p.encode(p.Welcome()), "began with welcome"),
            (p.PREAMBLE + p.encode(p.Hello("bulk", "dest", 16, b"", 0)), "field index must be 0 to 15"),
            (p.PREAMBLE + p.encode(p.Hello("control", "dest", 1, b"", 0)), "index must be 0"),
        ],
    )
    def test_bad_client(self, data: bytes, reason: str) -> None:
        with pytest.raises(ProtocolError, match=reason):
            feed(p.ServerHandshake(), data)

    @pytest.mark.parametrize("size", [1, 2, 100])
    @pytest.mark.parametrize(
        ("data", "who"),
        [
            (b"HTTP/1.1 400 Bad Request\r\n", "an HTTP server"),
            (b"GET / HTTP/1.1\r\n", "an HTTP client"),
            (b"PRI * HTTP/2.0\r\n", "an HTTP client"),
            (bytes.fromhex("15030100020246"), "a TLS server"),  # as OpenSSL answers a preamble
            (bytes.fromhex("16030100c8010000c40303"), "a TLS client"),
            (b"SSH-2.0-OpenSSH_9.2p1\r\n", "SSH"),
            (b"QEVM\x00\x00\x00\x03", "a QEMU migration stream"),
            (b'{"QMP": {"version":', r"a QEMU monitor \(QMP\)"),
        ],
    )
    def test_something_else_is_there(self, data: bytes, who: str, size: int) -> None:
        hint = "; if that is postcopy, give --tls DIR on both hosts" * ("TLS" in who)
        for handshake in (p.ServerHandshake(), p.ClientHandshake(HELLO)):
            with pytest.raises(ProtocolError, match=f"^this is {who}, not a postcopy peer{hint}$"):
                feed(handshake, data, size)

    def test_bad_server(self) -> None:
        with pytest.raises(ProtocolError, match="answered hello with ready"):
            feed(p.ClientHandshake(HELLO), p.PREAMBLE + p.encode(p.Ready()))

    @pytest.mark.parametrize("before", [0, 3, 8, 10, 20])
    def test_hung_up(self, before: int) -> None:
        server = p.ServerHandshake()
        feed(server, p.ClientHandshake(HELLO).send_hello()[:before])
        with pytest.raises(PeerError, match="closed the connection"):
            server.receive_data(b"")

    @given(st.binary(max_size=100), st.booleans())
    def test_arbitrary_bytes(self, data: bytes, well_begun: bool) -> None:
        for handshake in (p.ServerHandshake(), p.ClientHandshake(HELLO)):
            with contextlib.suppress(ProtocolError, PeerError):
                feed(handshake, (p.PREAMBLE if well_begun else b"") + data)

    def test_secrets(self) -> None:
        assert p.same_secret(b"a" * 16, b"a" * 16)
        assert not p.same_secret(b"a" * 16, b"b" * 16)
        assert not p.same_secret(b"", b"")


def feed(handshake: p.ClientHandshake | p.ServerHandshake, data: bytes, size: int = 1000) -> None:
    while data and (wanted := min(handshake.wanted(), size)):
        handshake.receive_data(data[:wanted])
        data = data[wanted:]


class TestStates:
    def test_conversation(self) -> None:
        conversation()

    def test_cut_at_every_byte(self) -> None:
        """The stream to one side is cut after each byte, the other direction works: never two owners, and where the
        receiver stands depends only on the whole messages that it got."""
        said = [(sender, data) for sender, data, _, _ in conversation()]
        for victim in ("source", "dest"):
            stream = b"".join(data for sender, data in said if sender != victim)
            for cut in range(len(stream) + 1):
                source, dest = SourceProtocol(), DestinationProtocol()
                replay(said, source, dest, {victim: cut})
                assert not (source.may_run and dest.may_run)
                assert source.ended
                assert dest.ended
                if dest.state is State.IN_DOUBT:
                    # `prepared` or `commit` was on its way when the cable broke. The source knows which, and is asked.
                    assert not dest.may_run
                    assert source.may_run == (source.state is State.ABORTED)
                else:
                    assert source.may_run or dest.may_run

    @pytest.mark.parametrize("size", [1, 2, 5, 1000])
    def test_pieces(self, size: int) -> None:
        said = [(sender, data) for sender, data, _, _ in conversation()]
        source, dest = SourceProtocol(), DestinationProtocol()
        for sender, data in said:
            me, other = (source, dest) if sender == "source" else (dest, source)
            act(me, data)
            for start in range(0, len(data), size):
                other.receive_data(data[start : start + size])
            assert len(drain(other)) == 1
        assert source.state is dest.state is State.COMPLETED

    @pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.TYPE)
    def test_every_message_in_every_state(self, message: p.Message) -> None:
        """What the table does not allow is an error that names message and state, and never makes an owner."""
        for side in (SourceProtocol, DestinationProtocol):
            for state in State:
                protocol = side()
                put(protocol, state)
                protocol._placed_wanted = True
                before = protocol.may_run
                protocol.receive_data(p.encode(message))
                allowed = message.TYPE in side.RECEIVES[state] or message.TYPE in ("ping", "pong")
                if protocol.ended or allowed:
                    protocol.next_message()
                else:
                    with pytest.raises(ProtocolError, match=f"{message.TYPE} must not be received .* {state.value}"):
                        protocol.next_message()
                    with pytest.raises(ProtocolError):  # for good
                        protocol.next_message()
                    assert protocol.state is state
                gained = protocol.may_run and not before
                assert gained == (side is DestinationProtocol and message == p.Commit() and state is State.PREPARED)

    def test_commit_gives_the_right_away_before_a_byte_left(self) -> None:
        source = source_in(State.PREPARED)
        assert source.may_run
        source.send(p.Commit())
        assert not source.may_run
        assert source.connection_lost("cable") is State.PAUSED
        assert not source.may_run
        assert source.reason == "cable"

    def test_no_abort_after_the_promise(self) -> None:
        dest = destination_in(State.PREPARED)
        assert not dest.may_abort
        with pytest.raises(ProtocolError, match="abort must not be sent by the destination in state prepared"):
            dest.send(p.Abort("changed my mind"))
        assert dest.connection_lost("gone") is State.IN_DOUBT
        assert not dest.may_run
        assert dest.recoverable

    @pytest.mark.parametrize("decided", [True, False])
    def test_doubt_is_resolved_by_the_source(self, decided: bool) -> None:
        dest = destination_in(State.PREPARED)
        for attempt in range(3):  # cut again, at whatever point
            dest.connection_lost(f"cut {attempt}")
            assert dest.state is State.IN_DOUBT
            dest.reconnected()
            dest.send(p.ReceivedMap(0, 0, 256, b""))
            assert not dest.may_run
            if attempt:
                dest.send(p.Recover(0, 1, 0))
                assert not dest.may_run
        if decided:
            dest.receive_data(p.encode(p.Recovered()))
            assert drain(dest) == [p.Recovered()]
            assert dest.state is State.COMMITTED
            assert dest.may_run
            assert dest.connection_lost("again") is State.PAUSED  # no doubt any more
            assert dest.may_run
        else:
            dest.connection_lost("cut")
            assert dest.give_up("the source knows no such migration") is State.ABORTED
            assert not dest.may_run
            with pytest.raises(ProtocolError, match="nothing to recover in state aborted"):
                dest.reconnected()

    def test_recovery_of_a_machine_that_runs(self) -> None:
        source, dest = source_in(State.COMMITTED), destination_in(State.COMMITTED)
        dest.send(p.Running(7))  # which is lost
        for side in (source, dest):
            assert side.connection_lost("cut") is State.PAUSED
            side.receive_data(b"what the old connection still held")
            side.reconnected()
        source.receive_data(dest.send(p.ReceivedMap(0, 0, 256, b"")) + dest.send(p.Recover(7, 1, 99)))
        assert drain(source) == [p.ReceivedMap(0, 0, 256, b""), p.Recover(7, 1, 99)]
        dest.receive_data(source.send(p.Recovered()))
        assert drain(dest) == [p.Recovered()]
        assert source.state is dest.state is State.POSTCOPY
        assert not source.may_run
        assert dest.may_run

    def test_placed_is_for_those_who_asked(self) -> None:
        for wanted in (0, 200):
            source, dest = SourceProtocol(), DestinationProtocol()
            dest.receive_data(source.send(replace(OFFER, placed_every_ms=wanted)))
            drain(dest)
            put(source, State.POSTCOPY)
            put(dest, State.POSTCOPY)
            if wanted:
                source.receive_data(dest.send(p.Placed(0, 0, 256, b"\x01")))
                assert drain(source) == [p.Placed(0, 0, 256, b"\x01")]
                assert source.state is dest.state is State.POSTCOPY
                continue
            with pytest.raises(ProtocolError, match=r"placed must not be sent .*the offer did not ask for it"):
                dest.send(p.Placed(0, 0, 256, b"\x01"))
            source.receive_data(p.encode(p.Placed(0, 0, 256, b"\x01")))
            with pytest.raises(ProtocolError, match=r"placed must not be received .*the offer did not ask for it"):
                drain(source)

    def test_largest_placed(self) -> None:
        """The worst map: every other page, from the first one on."""
        placed = Bitmap(p.PLACED_PAGES)
        for page in range(0, p.PLACED_PAGES, 2):
            placed.set_range(page, 1)
        message = p.Placed(0, 0, p.PLACED_PAGES, placed.rle_encode())
        assert p.decode(p.encode(message)[p.HEADER_BYTES :]) == message

    def test_complete_that_never_reaches_the_source(self) -> None:
        dest = destination_in(State.POSTCOPY)
        dest.send(p.Complete({}))
        assert dest.connection_lost("cut") is State.PAUSED
        assert dest.give_up("nobody there") is State.COMPLETED

    def test_messages_before_an_error_are_not_lost(self) -> None:
        source = SourceProtocol()
        source.send(OFFER)
        source.receive_data(p.encode(p.Accept((4096,), 1, 1)) + framed(b"\xc1") + p.encode(p.Ready()))
        source.receive_eof()
        assert isinstance(source.next_message(), p.Accept)
        with pytest.raises(ProtocolError, match="msgpack"):
            source.next_message()
        assert source.state is State.CHANNELS
        assert source.may_abort

    def test_end_of_stream_after_the_last_message(self) -> None:
        dest = DestinationProtocol()
        dest.receive_data(p.encode(p.Abort("changed its mind")))
        dest.receive_eof()
        assert drain(dest) == [p.Abort("changed its mind")]
        assert dest.reason == "the source aborted: changed its mind"
        dest.connection_lost("later")
        assert dest.reason == "the source aborted: changed its mind"

    def test_end_inside_a_message(self) -> None:
        dest = DestinationProtocol()
        dest.receive_data(b"\x00\x00")
        dest.receive_eof()
        assert dest.next_message() is None
        assert dest.reason == "the source closed the control connection in the middle of a message"

    def test_one_damaged_bit(self) -> None:
        """Nothing of a damaged message is believed, wherever the damage is."""
        whole = p.encode(p.PageMap(0, 0, 512, b"\x00\x80\x04"))
        for bit in range(8 * len(whole)):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            dest = destination_in(State.READY)
            dest.receive_data(bytes(data))
            longer = len(data) < p.HEADER_BYTES + int.from_bytes(data[:4], "big") <= p.PageMap.MAX_BYTES
            if longer:  # the rest of it never comes
                assert dest.next_message() is None
            else:
                with pytest.raises(ProtocolError, match=r"damaged|a message of .* bytes"):
                    dest.next_message()
            assert dest.state is State.READY

    def test_message_too_long(self) -> None:
        dest = destination_in(State.MAPS)
        dest.receive_data((p.MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"))
        with pytest.raises(ProtocolError, match="a message of 16777217 bytes"):
            dest.next_message()

    @given(st.lists(st.binary(max_size=60), max_size=5), st.sampled_from(list(State)))
    def test_arbitrary_bytes(self, pieces: list[bytes], state: State) -> None:
        for side in (SourceProtocol(), DestinationProtocol()):
            put(side, state)
            before = side.may_run
            with contextlib.suppress(ProtocolError):
                for piece in pieces:
                    side.receive_data(piece)
                    drain(side)
            assert side.may_run <= before


def act(side: SourceProtocol | DestinationProtocol, data: bytes) -> bytes:
    """Makes `side` send the very message in `data`."""
    return side.send(p.decode(data[8:]))


def replay(
    said: list[tuple[str, bytes]], source: SourceProtocol, dest: DestinationProtocol, cuts: dict[str, int]
) -> None:
    """Replays a conversation in which the stream *to* a side ends after so many bytes; both then see the end."""
    left = {"source": cuts.get("source", 1 << 30), "dest": cuts.get("dest", 1 << 30)}
    for sender, data in said:
        me, other, victim = (source, dest, "dest") if sender == "source" else (dest, source, "source")
        if me.ended or other.ended:
            break
        act(me, data)
        other.receive_data(data[: left[victim]])
        left[victim] = max(0, left[victim] - len(data))
        drain(other)
        if not left[victim]:
            other.receive_eof()
            drain(other)
    for side in (source, dest):
        side.receive_eof()
        drain(side)
