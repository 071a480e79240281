# SPDX-License-Identifier: Apache-2.0
"""What the tests of the protocol, and of what stands on it, share: messages of every type, their bytes, and sides in a
given state."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

from postcopy import wire as p
from postcopy._native import lib
from postcopy.wire import DestinationProtocol, SourceProtocol, State

SECRET = b"t" * 16
Side = SourceProtocol | DestinationProtocol
S = TypeVar("S", bound=Side)
SIDES: tuple[type[SourceProtocol] | type[DestinationProtocol], ...] = (SourceProtocol, DestinationProtocol)
HELLO = p.Hello("control", "source", 0, b"", 0)
BLOCKS = (p.Block("shared", 1 << 20, 4096), p.Block("vcpu0", 1 << 21, 4096))
OFFER = p.Offer(b"m" * 16, SECRET, "kvm", {"vcpus": 1, "nested": {"list": [1, 2]}}, BLOCKS, 1, 200)
MESSAGES: list[p.Message] = [
    HELLO,
    p.Hello("urgent", "dest", 63, b"i" * 16, 7).signed(SECRET, 3),
    p.Hello("control", "dest", 0, b"i" * 16, 7, "completed").signed(SECRET, 3),
    p.Hello("control", "source", 0, b"", 0, instance=b"n" * 16),
    p.Welcome(),
    p.Refused("busy", "busy"),
    p.Refused("it has ended", "aborted").signed(SECRET, HELLO),
    OFFER,
    p.Accept((4096, 4096), 2, 1),
    p.Reject("too large"),
    p.Ready(),
    p.PageMap(1, 0, 512, b"\x00\x80\x04"),
    p.StaleMap(1, 0, 512, b"\x00\x80\x04"),
    p.Round(3, 2, True),
    p.RoundDone(3),
    p.EarlyState(b"\x00\xff" * 100),
    p.EarlyState(b""),
    p.Switchover(b"\x00\xff" * 100, 2),
    p.Switchover(b"", 0, True),
    p.Prepared(),
    p.Commit(),
    p.Running(12345),
    p.Placed(1, 64, 512, b"\x00\x80\x04"),
    p.Complete({"demand-pages": 3, "latency": {"max": 1}, "list": [1, 2, 3]}),
    p.CompleteAck({"downtime-ns": 5}),
    p.ReceivedMap(1, 0, 512, b"\x00\x80\x04"),
    p.Recover(0, 2, 2**32 - 1),
    p.Recovered(),
    p.Abort("out of memory"),
    p.Ping(1),
    p.Pong(2**63 - 1),
]


def framed(packed: bytes, length: int | None = None, damage: int = 0) -> bytes:
    """With the header of a message; `length` and `damage` for one that is wrong."""
    head = (len(packed) if length is None else length).to_bytes(4, "big")
    crc = lib.pc_crc32c(0, head + packed, 4 + len(packed)) ^ damage
    return head + crc.to_bytes(4, "big") + packed


def body(message: p.Message, version: int = p.PROTOCOL_VERSION) -> bytes:
    """Without the header."""
    return p.encode(message, version)[p.HEADER_BYTES :]


def drain(side: Side) -> list[p.Message]:
    return list(iter(side.next_message, None))


_REACHED = {
    State.PAUSED: State.COMMITTED,
    State.RECOVER: State.COMMITTED,
    State.RECOVERING: State.COMMITTED,
    State.RECLAIMED: State.COMMITTED,
    State.IN_DOUBT: State.PREPARED,
    State.COMPLETED: State.CLOSING,
    State.ABORTED: State.PREPARED,
}


def put(side: Side, state: State, reached: State | None = None) -> None:
    """As if it had come there by messages; `reached`: how far it had come before the connection was lost."""
    side._state, side._reached = state, reached or _REACHED.get(state, state)


def side_in(side: type[S], state: State) -> S:
    made = side()
    put(made, state)
    return made


source_in = partial(side_in, SourceProtocol)
destination_in = partial(side_in, DestinationProtocol)
