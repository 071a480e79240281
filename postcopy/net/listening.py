# SPDX-License-Identifier: Apache-2.0
"""The side that listens: the places that it keeps for the peers of its migrations. `Acceptor` lets them in.

A peer that knows the token of a migration and brings a higher epoch than all before gets its place, also while this
side still believes in the old connection, which may be half open. From which address it comes does not matter. A peer
that comes back without going on is let in less and less often.
"""

from __future__ import annotations

import math
from dataclasses import replace

import trio

from postcopy.errors import PeerError, ProtocolError
from postcopy.net import backoff
from postcopy.net.addresses import Address
from postcopy.net.endings import Code, Endings, Refusal, Session, check_token, stale
from postcopy.net.link import (
    CHANNELS_TIMEOUT_S,
    PAUSED_BY_OPERATOR,
    ChannelKey,
    Link,
    Reconnector,
    Stream,
    channel_keys,
)
from postcopy.tls import DataChannel, detach
from postcopy.wire import Ended, EndedElsewhere, Hello


class ListeningChannelSet:
    """What has been collected when it closes unused, it closes."""

    def __init__(self, session: Session, peer: Address, version: int) -> None:
        self.session = session
        self._version = version
        self._peer = peer
        self._wanted: set[ChannelKey] | None = None  # unknown until the destination has said how many shards it has
        self._reserved: set[ChannelKey] = set()
        self._arrived: dict[ChannelKey, DataChannel] = {}
        self._changed = trio.Event()

    def reserve(self, hello: Hello, version: int) -> ChannelKey:
        """`Refusal` unless the peer may open this channel now."""
        check_token(self.session, self._version, hello, version)
        if hello.epoch != self.session.epoch:
            raise stale(hello, self.session)
        key = (hello.channel, hello.index)
        if self._wanted is not None and key not in self._wanted:
            raise Refusal(f"this migration has no {hello.channel} channel {hello.index}", Code.NO_CHANNEL)
        if key in self._reserved:
            raise Refusal(f"{hello.channel} channel {hello.index} is connected already", Code.NO_CHANNEL)
        self._reserved.add(key)
        return key

    def release(self, key: ChannelKey) -> None:
        """The peer that had reserved it went away before it was welcome."""
        self._reserved.discard(key)

    def enter(self, key: ChannelKey, stream: Stream) -> None:
        self._arrived[key] = detach(stream)
        self._changed.set()

    async def channels(self, shards: int, bulk_channels: int) -> dict[ChannelKey, DataChannel]:
        self._wanted = set(channel_keys(shards, bulk_channels))
        for kind, index in self._reserved - self._wanted:
            raise ProtocolError(f"{self._peer}: opened {kind} channel {index}, which this migration does not have")
        with trio.move_on_after(CHANNELS_TIMEOUT_S):
            while len(self._arrived) < len(self._wanted):
                self._changed = trio.Event()
                await self._changed.wait()
        if missing := self._wanted - set(self._arrived):
            names = ", ".join(f"{kind} {index}" for kind, index in sorted(missing))
            raise PeerError(f"{self._peer}: did not open these data channels in {CHANNELS_TIMEOUT_S:g} s: {names}")
        arrived, self._arrived = self._arrived, {}
        return arrived

    def close(self) -> None:
        for channel in self._arrived.values():
            channel.close()
        self._arrived.clear()


class ListeningReconnector(Reconnector):
    def __init__(self, session: Session, version: int, endings: Endings) -> None:
        super().__init__()
        self.session = session
        self.over = False  # here: see `Endings`
        self._version = version
        self._endings = endings
        self._arrived: tuple[Link, Session] | None = None  # and was not taken yet
        self._ended: Ended | None = None  # as the peer has come to say
        self._returns = 0  # since it went on
        self._next_s = -math.inf  # from when on it may come again
        self._lost_s = math.inf  # when it came for the first time since it went on

    def went_on(self) -> None:
        super().went_on()
        # (a little less patient than the side that calls, which has such a pause too)
        self._returns = min(self._returns, backoff.FREE_RETURNS + 3)
        self._next_s = -math.inf
        self._lost_s = math.inf

    async def announce(self, how: Ended) -> None:
        if self._version >= 3:  # else it could not be understood
            await self._endings.told(self.session.migration)

    def ended(self, how: Ended) -> None:
        self._endings.remember(self.session, how)
        self.over = True
        self.close()

    def reserve(self, hello: Hello, version: int) -> None:
        """`Refusal` unless the peer may come back with this. From here on its epoch is used up."""
        check_token(self.session, self._version, hello, version)
        token = self.session.token  # which it knows, so that the refusal is proven to be ours
        if hello.epoch <= self.session.epoch:
            raise stale(hello, self.session, token)
        if not hello.ended:
            if self.over:
                raise self._endings.refusal(hello, version)
            if self._ended is not None:  # it is waited for no more
                raise Refusal(f"you have said that the migration has ended there: {self._ended}", Code.UNKNOWN, token)
            if self.paused:
                raise Refusal(PAUSED_BY_OPERATOR, Code.PAUSED, token)
            self._count_return(token)
        self.session = replace(self.session, epoch=hello.epoch)

    def _count_return(self, token: bytes) -> None:
        if self._has_lasted():
            self._returns = 0
        now_s = trio.current_time()
        self._lost_s = min(self._lost_s, now_s)
        if now_s < self._next_s:
            raise Refusal("came back too often without going on", Code.TOO_OFTEN, token)
        self._returns += 1
        if self._returns > backoff.FREE_RETURNS:
            pause_s = backoff.FIRST_S * 2 ** min(self._returns - backoff.FREE_RETURNS, 20)
            self._next_s = now_s + min(pause_s, backoff.cap_s(self._lost_s)) / 2  # as often as we would call ourselves

    def enter(self, link: Link) -> None:
        self.close()
        self._arrived = link, self.session
        self._notify()

    def peer_ended(self, how: Ended) -> None:
        """The peer has come to say that it is over there."""
        self.close()
        self._ended = how
        self._notify()

    def pause(self) -> None:
        self.close()  # one that has just come may come again
        super().pause()

    async def next_link(self) -> tuple[Link, Session]:
        while self._arrived is None:
            if self._ended is not None:
                raise EndedElsewhere(self._ended)
            await self._changed.wait()
        arrived, self._arrived = self._arrived, None
        return arrived

    async def superseded(self) -> None:
        while self._arrived is None and self._ended is None:
            if self.paused:
                raise PeerError(PAUSED_BY_OPERATOR)
            await self._changed.wait()

    def close(self) -> None:
        if self._arrived is not None:
            self._arrived[0].control.socket.close()
        self._arrived = None
