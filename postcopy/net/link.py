# SPDX-License-Identifier: Apache-2.0
"""What a migration sees of its connections, whichever host listens: a `Link` is the control connection, its
`channel_set` the way to data connections, its `reconnector` the way to the next control connection.

`calling` has these for the side that connects, `listening` for the other one.
"""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Awaitable, Callable

import trio

from postcopy.errors import ConfigurationError
from postcopy.net.addresses import Address
from postcopy.net.backoff import LASTING_S
from postcopy.net.endings import Session
from postcopy.tls import DataChannel, PeerCertificate, TlsStream
from postcopy.wire import PROTOCOL_VERSION, Ended

CHANNELS_TIMEOUT_S = 30.0
PAUSED_BY_OPERATOR = "paused by the operator"

ChannelKey = tuple[str, int]  # ("urgent", 3)
OpenChannels = Callable[[int, int], Awaitable[dict[ChannelKey, DataChannel]]]
"""With so many shards and bulk channels: all data channels, within `CHANNELS_TIMEOUT_S`. Called once; they are the
caller's."""
Stream = trio.SocketStream | TlsStream


def channel_keys(shards: int, bulk_channels: int) -> list[ChannelKey]:
    return [("urgent", shard) for shard in range(shards)] + [("bulk", number) for number in range(bulk_channels)]


def identity(certificate: PeerCertificate | None, peer: Address) -> str:
    return certificate.name if certificate is not None else peer.network


class Reconnector(abc.ABC):
    """A migration's place among the connections of this host, kept while it has none.

    An operator can *pause* it: the connection is then given up and none is made or let in, until `recover`. The other
    side learns that its peer is there and does not take it back yet, and asks again.
    """

    def __init__(self) -> None:
        self.answered = trio.Event()  # set when the peer is there, and only does not take us back now; may be replaced
        self.paused = False
        self._changed = trio.Event()
        self._went_on_s = math.inf

    def went_on(self) -> None:
        """A recovery over the connection of `next_link` has succeeded: the next loss is a new one, and is not made to
        wait for what failed before; but for a little, where this does not last."""
        self._went_on_s = trio.current_time()

    def _has_lasted(self) -> bool:
        """At a loss: whether it had gone on for a while since this was asked before."""
        went_on_s, self._went_on_s = self._went_on_s, math.inf
        return trio.current_time() - went_on_s >= LASTING_S

    def ended(self, how: Ended) -> None:  # noqa: B027  (only who is asked has to remember it)
        """The migration is over here: a peer that comes back for it is refused, with how it has ended. To be called
        before the reconnector ends; the last call counts."""

    async def announce(self, how: Ended) -> None:
        """Tells the peer that it is over here: calls it, or waits until it comes and asks. Takes as long as it takes;
        returns when the peer knows, has ended it itself, or speaks a version in which it cannot be told. After `ended`.
        Cancellable."""
        await trio.lowlevel.checkpoint()

    def pause(self) -> None:
        """Gives the connection up and makes no other one until `recover`."""
        self.paused = True
        self._notify()

    def recover(self) -> None:
        """Looks for the peer (again), now."""
        self.paused = False
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    @abc.abstractmethod
    async def next_link(self) -> tuple[Link, Session]:
        """The next connection with the same peer, and the session with its epoch. Waits as long as it takes;
        cancellable. `EndedElsewhere` when the peer has proven to be there and to have ended it; a refusal that proves
        nothing is no reason to end the wait."""

    @abc.abstractmethod
    async def superseded(self) -> None:
        """Returns when `next_link` has something although the present connection has not ended. `PeerError` when it is
        to be given up because the reconnector is paused."""


class Link(abc.ABC):
    """A control connection that has been welcomed, and the way to more connections with the same peer."""

    def __init__(self, control: Stream, peer: Address, version: int = PROTOCOL_VERSION, received: bytes = b"") -> None:
        """`version` of the protocol is what is spoken on it, and on all that belong to it. `received`: what the peer
        has said on it already, for the protocol object."""
        self.certificate: PeerCertificate | None = control.peer if isinstance(control, TlsStream) else None
        self.control = control
        self.received = received
        self.peer = peer
        self.version = version

    @property
    def identity(self) -> str:
        """Who the peer is, for what is counted by peer: the name in its certificate; without TLS its host, or the /64
        network of that. Another connection of the same migration may have another one, as after a renewal: what proves
        that it is the same peer is the token."""
        return identity(self.certificate, self.peer)

    def reconnect_to(self, address: Address, tls_hostname: str | None = None) -> None:
        """When the connection is lost (or has been), the peer is looked for there, under another name in its
        certificate where one is given. `ConfigurationError` on the side that listens: it takes the peer from wherever
        it comes."""
        raise ConfigurationError(
            f"this side listens, and takes its peer from any address: {address} can only be named at the other side"
        )

    @abc.abstractmethod
    def channel_set(self, session: Session) -> contextlib.AbstractContextManager[OpenChannels]:
        """Lets data channels of `session` come in as long as the block lasts. Begin it before the peer can know the
        session, since the peer may be faster than our next line. `PeerError` for an id that is in use."""

    @abc.abstractmethod
    def reconnector(self, session: Session) -> contextlib.AbstractContextManager[Reconnector]:
        """Keeps the way open for the peer, or to it, as long as the block lasts. `PeerError` for the id of a migration
        that is going on here, or was."""
