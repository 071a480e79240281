# SPDX-License-Identifier: Apache-2.0
"""Messages and handshakes that are nearly right: what a peer sends ends in a message, or in an error that names it, and
in nothing else; and nobody gets to run the machine by it who may not."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from postcopy import wire as p
from postcopy.errors import PeerError, ProtocolError
from postcopy.wire import DestinationProtocol, SourceProtocol, State, codec
from tests.unit.wire import support
from tests.unit.wire.support import framed

HELLO = p.Hello("control", "dest", 0, b"m" * 16, 1)
MESSAGES: list[p.Message] = [*support.MESSAGES, HELLO.signed(support.SECRET, 3), HELLO.signed(support.SECRET, 2)]
VERSIONS = st.sampled_from([2, 3])
TAGS = bytes([0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, *range(0xC0, 0xE0), 0x7F, 0xFF])


@st.composite
def nearly(draw: st.DrawFn) -> bytes:
    """The body of a message in which a few things are not as they should be: bytes, tags, lengths, fields, types."""
    message, version = draw(st.sampled_from(MESSAGES)), draw(VERSIONS)
    packed = bytearray(p.encode(message, version)[p.HEADER_BYTES :])
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(packed) - 1)))
        how = draw(st.integers(0, 6))
        if how == 0 and packed:
            packed[at] ^= 1 << draw(st.integers(0, 7))
        elif how == 1 and packed:
            packed[at] = draw(st.sampled_from(TAGS))
        elif how == 2:
            packed[at:at] = draw(st.binary(max_size=6))
        elif how == 3:
            del packed[at : at + draw(st.integers(1, 20))]
        elif how == 4:
            packed[at:at] = bytes([draw(st.sampled_from([0xDD, 0xDF, 0xC6, 0xDB]))]) + b"\xff" * 4
        elif how == 5:
            packed[at:at] = bytes(draw(st.sampled_from([[0x91], [0x81], [0x90]]))) * draw(st.integers(1, 5000))
        else:
            with contextlib.suppress(Exception):  # it is damaged already
                body = msgpack.unpackb(bytes(packed))
                name = draw(st.sampled_from(sorted(body)))
                body[name] = draw(VALUES)
                if draw(st.booleans()):
                    del body[name]
                packed = bytearray(msgpack.packb(body))
    return bytes(packed)


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([-1, 0, 1, 63, 64, 65, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
    | st.floats()
    | st.text(max_size=40)
    | st.binary(max_size=40)
    | st.sampled_from([b"x" * 20_000, "x" * 20_000, [[]] * 300, {str(number): [] for number in range(300)}]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=500)
@given(nearly(), VERSIONS)
def test_messages(packed: bytes, version: int) -> None:
    reason = ""
    try:
        again = p.encode(p.decode(packed, version), version)
        assert p.encode(p.decode(again[p.HEADER_BYTES :], version), version) == again
    except ProtocolError as error:
        reason = str(error)
    assert not reason or reason.isprintable()
    assert len(reason) < 400


@settings(max_examples=500)
@given(nearly())
@example(b"\x81\xa4type\xa4ping\xc1")
def test_the_measure_agrees_with_the_reader(packed: bytes) -> None:
    """What the reader takes has the shape that was measured: nothing gets past the measure, or is refused by it without
    need."""
    measured = ""
    try:
        codec.check_shape(packed)
    except ProtocolError as error:
        measured = str(error)
    try:
        msgpack.unpackb(packed, raw=True, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException):  # TypeError: a key that is a list
        return
    assert not measured or "more than" in measured or "unknown tag" in measured  # of extension types


@pytest.mark.slow
@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(nearly(), st.sampled_from([None, 0, 1, 70_000, 2**24, 2**32 - 1]), st.integers(0, 20)), max_size=4
    ),
    st.sampled_from(list(State)),
    VERSIONS,
    st.integers(1, 400),
    st.booleans(),
)
def test_sessions(
    bodies: list[tuple[bytes, int | None, int]], state: State, version: int, size: int, in_doubt: bool
) -> None:
    """In every state, in pieces of every size, with lengths and checksums that are wrong now and then."""
    stream = b"".join(framed(body, length, int(damage == 0)) for body, length, damage in bodies)
    for side in (SourceProtocol(version), DestinationProtocol(version)):
        doubt = in_doubt and isinstance(side, DestinationProtocol) and state is State.RECOVERING
        support.put(side, state, State.PREPARED if doubt else None)
        before, failed = side.may_run, False
        for start in range(0, len(stream), size):
            side.receive_data(stream[start : start + size])
            assert len(side._buffer) <= p.MAX_MESSAGE_BYTES + size
            try:
                while (message := side.next_message()) is not None:
                    assert not failed
                    if isinstance(message, p.Commit | p.Recovered) and isinstance(side, DestinationProtocol):
                        before = True
                    elif isinstance(message, p.Abort | p.Reject) and side.state is State.ABORTED:
                        before = isinstance(side, SourceProtocol)
            except ProtocolError:
                failed = True
            assert side.may_run <= before


@settings(max_examples=300)
@given(
    st.lists(nearly(), min_size=1, max_size=2),
    st.sampled_from([b"", b"postcpy", b"postcpy\x02", p.PREAMBLE, b"postcpy\x04", b"postcpx\x03"]),
    VERSIONS,
    st.integers(1, 100),
)
def test_handshakes(bodies: list[bytes], preamble: bytes, version: int, size: int) -> None:
    stream = preamble + b"".join(framed(body) for body in bodies)
    for handshake in (p.ServerHandshake(), p.ClientHandshake(HELLO, b"t" * 16, version)):
        rest = stream
        with contextlib.suppress(ProtocolError, PeerError):
            while rest and (wanted := min(handshake.wanted(), size)):
                handshake.receive_data(rest[:wanted])
                rest = rest[wanted:]
                assert len(handshake._messages) <= p.SMALL_MESSAGE_BYTES + p.HEADER_BYTES
            if isinstance(handshake, p.ServerHandshake) and handshake.hello is not None:
                handshake.send_welcome()
                handshake.send_refused("no", "busy", b"t" * 16)
