# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: I001  (the names side by side, not one a line)
"""The control protocol, without a socket: messages, their bytes, the handshake, and who may run the machine.

Sans-IO: nothing here reads, writes or waits, and nothing imports Trio. It owns no resource; a protocol object ends with
its migration. From the bottom up: `messages`, `codec`, `handshake`, `states`. The format is in docs/protocol.md.
"""

# fmt: off
from __future__ import annotations

from postcopy.wire.messages import (
    Abort, Accept, Block, Commit, Complete, CompleteAck, EARLY_STATE_BYTES, EarlyState, Ended, Hello, ID_BYTES,
    MAGIC, MAX_BULK_CHANNELS, MAX_MESSAGE_BYTES, MAX_REASON_CHARS, Message, Offer, PAGE_MAP_PAGES, PLACED_PAGES,
    PREAMBLE, PROTOCOL_VERSION, PageMap, Ping, Placed, Pong, Prepared, Ready, ReceivedMap, Recover, Recovered,
    Refused, Reject, Round, RoundDone, Running, SMALL_MESSAGE_BYTES, StaleMap, Switchover, Welcome, one_line,
    same_secret,
)
from postcopy.wire.codec import HEADER_BYTES, decode, encode
from postcopy.wire.handshake import ClientHandshake, EndedElsewhere, OlderPeerError, RefusedError, ServerHandshake
from postcopy.wire.states import DestinationProtocol, SourceProtocol, State

__all__ = [
    "EARLY_STATE_BYTES", "HEADER_BYTES", "ID_BYTES", "MAGIC", "MAX_BULK_CHANNELS", "MAX_MESSAGE_BYTES",
    "MAX_REASON_CHARS", "PAGE_MAP_PAGES", "PLACED_PAGES", "PREAMBLE", "PROTOCOL_VERSION", "SMALL_MESSAGE_BYTES",
    "Abort", "Accept", "Block", "ClientHandshake", "Commit", "Complete", "CompleteAck", "DestinationProtocol",
    "EarlyState", "Ended", "EndedElsewhere", "Hello", "Message", "Offer", "OlderPeerError", "PageMap", "Ping",
    "Placed", "Pong", "Prepared", "Ready", "ReceivedMap", "Recover", "Recovered", "Refused", "RefusedError",
    "Reject", "Round", "RoundDone", "Running", "ServerHandshake", "SourceProtocol", "StaleMap", "State",
    "Switchover", "Welcome", "decode", "encode", "one_line", "same_secret",
]
