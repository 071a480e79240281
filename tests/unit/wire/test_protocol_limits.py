# SPDX-License-Identifier: Apache-2.0
"""What a peer sends is bounded before anything is made of it: by its length, in this state and for its type, by its
depth, and by how many objects it would become."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import msgpack
import msgspec
import pytest

from postcopy import wire as p
from postcopy.errors import ProtocolError
from postcopy.wire import DestinationProtocol, SourceProtocol, State, codec, messages
from tests.unit.wire.support import OFFER, destination_in, framed, side_in

MIB = 1 << 20


def offer_with(config: object) -> bytes:
    body = msgpack.unpackb(p.encode(OFFER)[p.HEADER_BYTES :])
    return msgpack.packb({**body, "config": config})


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def pieces(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 65536):
        yield data[start : start + 65536]


def taken(protocol: SourceProtocol | DestinationProtocol, data: bytes) -> int:
    """How many bytes it takes before it says no. Its memory is looked at, too."""
    tracemalloc.start()
    try:
        for number, piece in enumerate(pieces(data), start=1):
            protocol.receive_data(piece)
            try:
                protocol.next_message()
            except ProtocolError:
                return 65536 * number
            finally:
                _, peak = tracemalloc.get_traced_memory()
                assert peak < 3 * 65536 * number + MIB
        raise AssertionError("it takes all of it")
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (offer_with({"a": [[]] * 5000}), "more than 4096 elements"),
        (offer_with({"a": {str(number): 0 for number in range(3000)}}), "more than 4096 elements"),
        (offer_with({"a": nested(codec.MAX_DEPTH)}), "more than 8 levels"),
        (b"\x91" * 10_000, "more than 8 levels"),
        (b"\x81" * 10_000, "more than 8 levels"),
        (b"\xdd\xff\xff\xff\xff" + b"\x90" * 10_000, "more than 4096 elements"),
        (b"\xdf\xff\xff\xff\xff" + b"\x90" * 10_000, "more than 4096 elements"),
        (b"\x81\xa4type\xc6\x7f\xff\xff\xff", "its end is not where it should be"),
        (b"\x82\xa4type\xa4ping", "it ends too early"),
        (b"\x81\xa4type\xa4ping\x00", "its end is not where it should be"),
        (b"\x81\xa4type\xd6\x00\x00\x00\x00\x00", "unknown tag 0xd6"),
    ],
)
def test_shape(packed: bytes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused without one object being made of it."""

    def unpack(*arguments: object, **options: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(msgspec.msgpack, "decode", unpack)
    with pytest.raises(ProtocolError, match=reason):
        p.decode(packed)


def test_what_is_taken() -> None:
    config = {
        "a": nested(codec.MAX_DEPTH - 2),
        "b": [[]] * 4000,
        "c": {"d": [1.5, None, True, "text", b"bytes", -5, 2**40]},
    }
    message = p.decode(offer_with(config))
    assert isinstance(message, p.Offer)
    assert message.config == config


@pytest.mark.parametrize("side", [SourceProtocol, DestinationProtocol])
@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("length", [17 * MIB, 16 * MIB - 1, 5 * MIB, 70_000, 17_000])
def test_long_messages_need_a_state(
    side: type[SourceProtocol] | type[DestinationProtocol], state: State, length: int
) -> None:
    """What is longer than anything that may come now is refused with its first bytes."""
    protocol = side_in(side, state)
    allowed = max([messages.MESSAGES[kind].MAX_BYTES for kind in side.RECEIVES[state]], default=0)
    protocol.receive_data(length.to_bytes(4, "big") + b"\x00\x00\x00")
    if protocol.ended or length <= allowed:
        assert protocol.next_message() is None
        return
    with pytest.raises(ProtocolError, match=f"a message of {length} bytes"):
        protocol.next_message()
    protocol.receive_data(b"x" * MIB)  # nothing is kept of what comes afterwards
    assert len(protocol._buffer) < 100


def test_before_an_offer_is_accepted_only_small_messages() -> None:
    for state in (State.SETUP, State.OFFERED, State.CHANNELS):
        for side in (SourceProtocol, DestinationProtocol):
            kinds = {*side.RECEIVES[state], "ping", "pong"}
            assert max(messages.MESSAGES[kind].MAX_BYTES for kind in kinds) <= 64 * 1024


@pytest.mark.parametrize(
    ("side", "state", "body"),
    [
        (DestinationProtocol, State.MAPS, {"type": "ping", "nonce": 1}),
        (DestinationProtocol, State.MAPS, {"type": "abort", "reason": "x"}),
        (DestinationProtocol, State.MAPS, {"type": "offer"}),
        (DestinationProtocol, State.PREPARED, {"type": "switchover", "maps": 1}),  # a long one, at the wrong time
        (SourceProtocol, State.RECOVER, {"type": "recover", "maps": 1}),
        (SourceProtocol, State.POSTCOPY, {"type": "complete", "stats": {}}),
        (SourceProtocol, State.POSTCOPY, {"type": "received-map"}),
        (DestinationProtocol, State.MAPS, {"nonce": 1, "type": "ping"}),
        (DestinationProtocol, State.MAPS, {"typo": "page-map"}),
        (DestinationProtocol, State.MAPS, {"type": 5}),
        (DestinationProtocol, State.MAPS, {"type": "x" * 200}),
    ],
)
def test_each_type_has_its_length(
    side: type[SourceProtocol] | type[DestinationProtocol], state: State, body: dict[str, object]
) -> None:
    """Where a long type may come, its name has to come first: another one is refused long before it is complete."""
    length = max(messages.MESSAGES[kind].MAX_BYTES for kind in side.RECEIVES[state])
    data = framed(msgpack.packb({**body, "more": b"x" * (length - 300)}))
    assert taken(side_in(side, state), data) <= 65536


def test_long_lists_are_refused_where_long_bytes_may_come() -> None:
    """16 MiB of empty lists in the place of a device state: a gigabyte of objects, if somebody made them."""
    packed = b"\x82\xa4type\xaaswitchover\xa5state\xdd" + (15 * MIB).to_bytes(4, "big") + b"\x90" * (15 * MIB)
    protocol = destination_in(State.MAPS)
    taken(protocol, framed(packed))
    with pytest.raises(ProtocolError, match="more than 4096 elements"):
        protocol.next_message()


@pytest.mark.parametrize("kind", [p.PageMap, p.ReceivedMap, p.Placed])
def test_a_map_is_no_longer_than_its_pages(kind: type[p.PageMap] | type[p.ReceivedMap] | type[p.Placed]) -> None:
    assert p.decode(p.encode(kind(0, 0, 10, b"\x01" * 11))[p.HEADER_BYTES :]) == kind(0, 0, 10, b"\x01" * 11)
    with pytest.raises(ProtocolError, match=f"{kind.TYPE}: field runs must have at most 11 bytes for 10 pages, not 12"):
        p.decode(p.encode(kind(0, 0, 10, b"\x01" * 12))[p.HEADER_BYTES :])


def test_nothing_is_kept_of_a_lost_connection() -> None:
    dest = destination_in(State.MAPS)
    dest.receive_data(p.encode(p.Switchover(b"x" * MIB, 1))[:-1])
    assert dest.next_message() is None
    dest.connection_lost("cut")
    assert not len(dest._buffer)
