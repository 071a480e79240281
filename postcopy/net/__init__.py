# SPDX-License-Identifier: Apache-2.0
"""Connections."""

from __future__ import annotations

from postcopy.net.acceptor import (
    ACCEPT_PAUSE_S,
    EARLY_PAUSE_S,
    MAX_HALF_OPEN,
    MAX_WAITING,
    OFFER_TIMEOUT_S,
    SEE_OFF_BYTES,
    Acceptor,
)
from postcopy.net.addresses import MAX_PEER_FILE_BYTES, Address, Route, parse_address, read_peer_file
from postcopy.net.backoff import (
    FREE_RETURNS,
    LASTING_S,
    RECONNECT_CAP_S,
    RECONNECT_FIRST_S,
    RECONNECT_PATIENT_AFTER_S,
    RECONNECT_PATIENT_CAP_S,
)
from postcopy.net.calling import RECONNECT_ATTEMPT_S, CallingLink
from postcopy.net.connecting import HANDSHAKE_TIMEOUT_S, client_handshake, connect, keep_alive
from postcopy.net.endings import MAX_ENDINGS, WRONG_TOKEN, Code, Endings, Refusal, Session
from postcopy.net.link import CHANNELS_TIMEOUT_S, HELD, ChannelKey, ChannelSet, Link, Reconnector

__all__ = [
    "ACCEPT_PAUSE_S",
    "CHANNELS_TIMEOUT_S",
    "EARLY_PAUSE_S",
    "FREE_RETURNS",
    "HANDSHAKE_TIMEOUT_S",
    "HELD",
    "LASTING_S",
    "MAX_ENDINGS",
    "MAX_HALF_OPEN",
    "MAX_PEER_FILE_BYTES",
    "MAX_WAITING",
    "OFFER_TIMEOUT_S",
    "RECONNECT_ATTEMPT_S",
    "RECONNECT_CAP_S",
    "RECONNECT_FIRST_S",
    "RECONNECT_PATIENT_AFTER_S",
    "RECONNECT_PATIENT_CAP_S",
    "SEE_OFF_BYTES",
    "WRONG_TOKEN",
    "Acceptor",
    "Address",
    "CallingLink",
    "ChannelKey",
    "ChannelSet",
    "Code",
    "Endings",
    "Link",
    "Reconnector",
    "Refusal",
    "Route",
    "Session",
    "client_handshake",
    "connect",
    "keep_alive",
    "parse_address",
    "read_peer_file",
]
