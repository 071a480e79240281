# SPDX-License-Identifier: Apache-2.0
"""calling."""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Iterator
from dataclasses import replace

import trio

from postcopy._fd import FdHolder
from postcopy.errors import PeerError, ProtocolError, ResourceError
from postcopy.net.addresses import Address, Route, address_of
from postcopy.net.backoff import (
    RECONNECT_CAP_S,
    RECONNECT_FIRST_S,
    RECONNECT_PATIENT_AFTER_S,
    RECONNECT_PATIENT_CAP_S,
    Sparing,
)
from postcopy.net.connecting import connect, detach
from postcopy.net.endings import Session
from postcopy.net.link import CHANNELS_TIMEOUT_S, HELD, ChannelKey, ChannelSet, Link, Reconnector, channel_keys
from postcopy.wire import Ended, EndedElsewhere, Hello, RefusedError

log = logging.getLogger(__name__)

RECONNECT_ATTEMPT_S = 1.0
"""An attempt that is not answered is begun anew: the network may have come back just after the kernel asked."""


class CallingLink(Link):
    """We have connected, so we open the data channels too."""

    def __init__(self, control: trio.SocketStream, route: Route, asked: Address, side: str, version: int) -> None:
        """`asked`: the address of the route that has answered."""
        super().__init__(control, address_of(control), version)
        self._route = route
        self._side = side
        route.answered(asked, self.peer)

    @classmethod
    async def open(cls, where: Address | Route, side: str) -> CallingLink:
        """Connects to a listening peer. `side` is what we are: ``source`` or ``dest``."""
        route = where if isinstance(where, Route) else Route(where)
        asked = route.address
        stream, version = await connect(asked, Hello("control", side, 0, b"", 0))
        try:
            return cls(stream, route, asked, side, version)
        except PeerError:
            await trio.aclose_forcefully(stream)
            raise

    def reconnect_to(self, address: Address) -> None:
        self._route.change(address)

    @contextlib.contextmanager
    def channel_set(self, session: Session) -> Iterator[ChannelSet]:
        yield CallingChannelSet(self.peer, self._side, session, self.version)

    @contextlib.contextmanager
    def reconnector(self, session: Session) -> Iterator[Reconnector]:
        yield CallingReconnector(self._route, self._side, session, self.version)


class CallingReconnector(Reconnector):
    def __init__(self, route: Route, side: str, session: Session, version: int) -> None:
        super().__init__()
        self._route = route
        self._side = side
        self._session = session
        self._version = version
        self._pause_s = 0.0  # before the next attempt
        self._lost_s = math.inf  # when the search began
        self._spare = Sparing()

    def went_on(self) -> None:
        super().went_on()
        self._pause_s = min(self._pause_s, RECONNECT_CAP_S)
        self._lost_s = math.inf

    def recover(self) -> None:
        super().recover()
        self._route.wake()

    async def next_link(self) -> tuple[Link, Session]:
        if self._has_lasted():
            self._pause_s, self._spare = 0.0, Sparing()
        self._route.refresh()
        while True:
            await self._pause()
            found = await self._attempt()
            if found is not None:
                stream, asked, session = found
                try:
                    link = CallingLink(stream, self._route, asked, self._side, self._version)
                except PeerError:
                    stream.socket.close()
                    continue
                # Whether that was a success is not known yet: see `went_on`.
                self._pause_s = min(max(2 * self._pause_s, RECONNECT_FIRST_S), RECONNECT_PATIENT_CAP_S)
                return link, session

    async def announce(self, how: Ended) -> None:
        if self._version < 3:
            return  # it could not be understood
        with contextlib.suppress(EndedElsewhere):
            while True:
                await self._pause()
                if (found := await self._attempt(how)) is not None:
                    found[0].socket.close()
                    return

    async def _pause(self) -> None:
        """Until the next attempt is due."""
        now_s = trio.current_time()
        self._lost_s = min(self._lost_s, now_s)
        if self._pause_s and await self._route.pause(self._pause_s * random.uniform(0.5, 1)):
            self._pause_s, self._lost_s, self._spare = 0.0, trio.current_time(), Sparing()
        while self.is_paused():
            await self._changed.wait()

    async def _attempt(self, how: Ended | None = None) -> tuple[trio.SocketStream, Address, Session] | None:
        """One call, and the pause that follows it when nobody has answered. `EndedElsewhere`."""
        # Each attempt has an epoch of its own: one that was lost on its way must not be taken for the next one.
        session = self._session = replace(self._session, epoch=self._session.epoch + 1)
        hello = Hello("control", self._side, 0, session.migration, session.epoch, how or "")
        asked = self._route.address
        try:
            stream, _ = await connect(asked, hello, RECONNECT_ATTEMPT_S, token=session.token, version=self._version)
            if not self.is_paused() or how is not None:
                return stream, asked, session
            stream.socket.close()
        except (PeerError, ProtocolError, ResourceError) as error:
            if isinstance(error, RefusedError) and error.ended is not None:
                raise EndedElsewhere(error.ended, str(error)) from error
            # Anybody may answer there: whatever else is said decides nothing.
            if isinstance(error, RefusedError) and error.proven:
                self.answered.set()
            if self._spare.due():
                answered = isinstance(error, RefusedError) and error.reason != HELD
                level = logging.WARNING if answered else logging.INFO
                log.log(level, "not connected again yet: %s%s", error, "; is that the right address?" * answered)
        patient = trio.current_time() - self._lost_s > RECONNECT_PATIENT_AFTER_S
        cap_s = RECONNECT_PATIENT_CAP_S if patient else max(RECONNECT_CAP_S, self._pause_s)
        self._pause_s = min(max(2 * self._pause_s, RECONNECT_FIRST_S), cap_s)
        return None

    async def superseded(self) -> None:
        while not self.is_paused():  # nobody but this side connects
            await self._changed.wait()
        raise PeerError(HELD)


class CallingChannelSet(ChannelSet):
    def __init__(self, peer: Address, side: str, session: Session, version: int) -> None:
        self._peer = peer
        self._side = side
        self._session = session
        self._version = version

    async def channels(self, shards: int, bulk_channels: int) -> dict[ChannelKey, FdHolder]:
        opened: dict[ChannelKey, FdHolder] = {}
        session = self._session
        try:
            with trio.fail_after(CHANNELS_TIMEOUT_S):
                for kind, index in channel_keys(shards, bulk_channels):
                    hello = Hello(kind, self._side, index, session.migration, session.epoch)
                    stream, _ = await connect(self._peer, hello, token=session.token, version=self._version)
                    opened[kind, index] = detach(stream)
        except BaseException as error:
            for fd in opened.values():
                fd.close()
            if isinstance(error, trio.TooSlowError):
                raise PeerError(f"{self._peer}: the data channels took more than {CHANNELS_TIMEOUT_S:g} s") from None
            raise
        return opened
