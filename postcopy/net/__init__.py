# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: I001  (the names side by side, not one a line)
"""The connections between two hosts: who may open one, what becomes of it, and the way back after it was lost.

One host listens (`acceptor`, `listening`), the other one connects (`calling`, `connecting`), both by `sockets`; which
is the source does not matter. Every connection begins with TLS, unless it is plain (`protection`), and then with the
handshake of `postcopy.wire`. A control connection stays a Trio stream of its `Link`, while a data connection is
detached, made blocking and given to the core.

The room owns listeners, and connections until they are taken. A `Link` lives until its stream is closed, a
channel set or reconnector as long as its `with` block, an `Acceptor` until `close`.
"""

# fmt: off
from __future__ import annotations

from postcopy.net.acceptor import Acceptor, Asking, MAX_HALF_OPEN, MAX_WAITING, OFFER_TIMEOUT_S
from postcopy.net.addresses import Address, Route, parse_address, read_peer_file
from postcopy.net.backoff import LogLimit
from postcopy.net.calling import CallingLink
from postcopy.net.connecting import HANDSHAKE_TIMEOUT_S, keep_alive
from postcopy.net.endings import Code, Endings, Session
from postcopy.net.link import ChannelKey, Link, OpenChannels, PAUSED_BY_OPERATOR, Reconnector
from postcopy.net.protection import LOCAL, Protection, is_loopback
from postcopy.net.sockets import accept_from, address_of, check_reachable, everywhere, listening_addresses
from postcopy.net.sockets import open_listeners, open_stream

__all__ = [
    "HANDSHAKE_TIMEOUT_S", "LOCAL", "MAX_HALF_OPEN", "MAX_WAITING", "OFFER_TIMEOUT_S", "PAUSED_BY_OPERATOR",
    "Acceptor", "Address", "Asking", "CallingLink", "ChannelKey", "Code", "Endings", "Link", "LogLimit",
    "OpenChannels", "Protection", "Reconnector", "Route", "Session", "accept_from", "address_of",
    "check_reachable", "everywhere", "is_loopback", "keep_alive", "listening_addresses",
    "open_listeners", "open_stream", "parse_address", "read_peer_file",
]
