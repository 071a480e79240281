# SPDX-License-Identifier: Apache-2.0
"""listening."""

from __future__ import annotations

import math
from dataclasses import replace

import trio

from postcopy._fd import FdHolder
from postcopy.errors import PeerError, ProtocolError
from postcopy.net.addresses import Address
from postcopy.net.backoff import FREE_RETURNS, RECONNECT_FIRST_S, RECONNECT_PATIENT_CAP_S
from postcopy.net.connecting import detach
from postcopy.net.endings import WRONG_TOKEN, Code, Endings, Refusal, Session
from postcopy.net.link import CHANNELS_TIMEOUT_S, HELD, ChannelKey, ChannelSet, Link, Reconnector, channel_keys
from postcopy.wire import Ended, EndedElsewhere, Hello


class ListeningChannelSet(ChannelSet):
    def __init__(self, session: Session, peer: Address, version: int) -> None:
        self.session = session
        self._version = version
        self._peer = peer
        self._wanted: set[ChannelKey] | None = None  # unknown until the destination has said how many shards it has
        self._reserved: set[ChannelKey] = set()
        self._arrived: dict[ChannelKey, FdHolder] = {}
        self._changed = trio.Event()

    def reserve(self, hello: Hello, version: int) -> ChannelKey:
        check_token(self.session, self._version, hello, version)
        if hello.epoch != self.session.epoch:
            raise Refusal(f"stale epoch {hello.epoch}, this is {self.session.epoch}", Code.STALE_EPOCH)
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

    def enter(self, key: ChannelKey, stream: trio.SocketStream) -> None:
        self._arrived[key] = detach(stream)
        self._changed.set()

    async def channels(self, shards: int, bulk_channels: int) -> dict[ChannelKey, FdHolder]:
        self._wanted = set(channel_keys(shards, bulk_channels))
        for kind, index in self._reserved - self._wanted:
            raise ProtocolError(f"{self._peer}: opened {kind} channel {index}, which this migration does not have")
        with trio.move_on_after(CHANNELS_TIMEOUT_S) as scope:
            while len(self._arrived) < len(self._wanted):
                self._changed = trio.Event()
                await self._changed.wait()
        if scope.cancelled_caught and len(self._arrived) < len(self._wanted):
            missing = ", ".join(f"{kind} {index}" for kind, index in sorted(self._wanted - set(self._arrived)))
            raise PeerError(f"{self._peer}: did not open these data channels in {CHANNELS_TIMEOUT_S:g} s: {missing}")
        arrived, self._arrived = self._arrived, {}
        return arrived

    def close(self) -> None:
        for fd in self._arrived.values():
            fd.close()
        self._arrived.clear()


def check_token(session: Session, spoken: int, hello: Hello, version: int) -> None:
    """`spoken`: the version of the migration, which its peer does not change."""
    if version != spoken or not hello.is_signed(session.token, version):
        raise Refusal(WRONG_TOKEN, Code.WRONG_TOKEN)


class ListeningReconnector(Reconnector):
    def __init__(self, session: Session, version: int, endings: Endings) -> None:
        super().__init__()
        self.session = session
        self._version = version
        self._endings = endings
        self._links: list[tuple[Link, Session]] = []
        self._over = False  # for us: see `Endings`
        self._ended: Ended | None = None  # as the peer has come to say
        self._returns = 0  # since it went on
        self._next_s = -math.inf  # from when on it may come again

    def went_on(self) -> None:
        super().went_on()
        # (a little less patient than the side that calls, which has such a pause too)
        self._returns = min(self._returns, FREE_RETURNS + 3)
        self._next_s = -math.inf

    def ended(self, how: Ended) -> None:
        self._endings.remember(self.session, how)
        self._over = True
        self.close()

    def is_over(self) -> bool:
        return self._over

    def reserve(self, hello: Hello, version: int) -> None:
        """`Refusal` unless the peer may come back with this. From here on its epoch is used up."""
        check_token(self.session, self._version, hello, version)
        token = self.session.token  # which it knows, so that it is told with a proof who refuses
        if hello.epoch <= self.session.epoch:
            raise Refusal(f"stale epoch {hello.epoch}, this is {self.session.epoch}", Code.STALE_EPOCH, token)
        if hello.ended:
            self.session = replace(self.session, epoch=hello.epoch)
            return
        if self._over:
            raise self._endings.refusal(hello, version)
        if self._ended is not None:  # nobody waits for it any more
            raise Refusal(f"you have said that the migration has ended there: {self._ended}", Code.UNKNOWN, token)
        if self.is_paused():
            raise Refusal(HELD, Code.HELD, token)
        if self._has_lasted():
            self._returns = 0
        now_s = trio.current_time()
        if now_s < self._next_s:
            raise Refusal("came back too often without going on", Code.TOO_OFTEN, token)
        self._returns += 1
        if self._returns > FREE_RETURNS:
            pause_s = RECONNECT_FIRST_S * 2 ** min(self._returns - FREE_RETURNS, 20)
            self._next_s = now_s + min(pause_s, RECONNECT_PATIENT_CAP_S) / 2  # as often as we would call ourselves
        self.session = replace(self.session, epoch=hello.epoch)

    def enter(self, link: Link, epoch: int) -> None:
        self.close()
        self._links = [(link, replace(self.session, epoch=epoch))]
        self._notify()

    def heard(self, how: Ended) -> None:
        """The peer has come to say that it is over there."""
        self.close()
        self._ended = how
        self._notify()

    def pause(self) -> None:
        self.close()  # one that has just come may come again
        super().pause()

    async def next_link(self) -> tuple[Link, Session]:
        while not self._links:
            if self._ended is not None:
                raise EndedElsewhere(self._ended)
            await self._changed.wait()
        return self._links.pop()

    async def superseded(self) -> None:
        while not self._links and self._ended is None:
            if self.is_paused():
                raise PeerError(HELD)
            await self._changed.wait()

    def close(self) -> None:
        for link, _ in self._links:
            link.control.socket.close()
        self._links.clear()
