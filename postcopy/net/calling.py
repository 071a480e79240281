# SPDX-License-Identifier: Apache-2.0
"""The side that connects: it opens the control connection and all data channels, and calls again when they are lost.

A lost peer is called at once, then several times a second, after a minute less often, at another address when one is
named (`Route`). What counts is not that a connection came about but that the migration *went on* over it: where calls
only connect, the pauses still grow. Any host may answer there: one that does not prove that it knows the token decides
nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import trio

from postcopy.errors import ConfigurationError, PeerError, PostcopyError, ProtocolError, ResourceError
from postcopy.net import backoff
from postcopy.net.addresses import Address, Route
from postcopy.net.connecting import Caller
from postcopy.net.endings import Code, Session
from postcopy.net.link import (
    CHANNELS_TIMEOUT_S,
    PAUSED_BY_OPERATOR,
    ChannelKey,
    Link,
    OpenChannels,
    Reconnector,
    Stream,
    channel_keys,
)
from postcopy.net.protection import LOCAL, Protection
from postcopy.net.sockets import address_of
from postcopy.tls import DataChannel, TlsError, detach
from postcopy.wire import Ended, EndedElsewhere, Hello, RefusedError

log = logging.getLogger(__name__)

AT_A_TIME = 16
"""So many data connections are opened beside each other."""
RECONNECT_ATTEMPT_S = 1.0
"""An attempt that is not answered is begun anew: the network may have come back just after the kernel asked."""


class CallingLink(Link):
    def __init__(
        self,
        control: Stream,
        route: Route,
        asked: Address,
        side: str,
        version: int,
        replaceable: bool,
        caller: Caller,
    ) -> None:
        """`asked`: the address of the route that has answered. `PeerError` when the peer is gone already; the stream
        is then closed."""
        try:
            super().__init__(control, address_of(control), version)
        except PeerError:
            control.socket.close()
            raise
        self._route = route
        self._side = side
        self._replaceable = replaceable
        self._caller = caller
        route.answered(asked, self.peer)

    @classmethod
    async def open(
        cls,
        where: Address | Route,
        side: str,
        instance: bytes = b"",
        *,
        replaceable: bool = False,
        protection: Protection = LOCAL,
    ) -> CallingLink:
        """Connects to a listening peer. `side` is what we are: ``source`` or ``dest``. `instance`: that of the
        `Acceptor` of the same process, where there is one; `ConfigurationError` when it is what answers. `replaceable`:
        a new migration is as good as this one, so that a peer which does not know it, as one that was started anew,
        ends it."""
        route = where if isinstance(where, Route) else Route(where)
        asked, caller = route.address, Caller(protection)
        try:
            hello = Hello("control", side, 0, b"", 0, instance=instance)
            stream, version = await caller.connect(asked, hello, name=route.tls_name)
        except RefusedError as error:
            if instance and error.code == Code.ITSELF:
                raise ConfigurationError(
                    f"{asked}: this address is this daemon itself; name the address of another host"
                ) from error
            raise
        return cls(stream, route, asked, side, version, replaceable, caller)

    def reconnect_to(self, address: Address, tls_hostname: str | None = None) -> None:
        self._route.change(address, tls_hostname)

    @contextlib.contextmanager
    def channel_set(self, session: Session) -> Iterator[OpenChannels]:
        try:
            yield partial(self._open_channels, session)
        finally:
            self._caller.close_early()

    @contextlib.contextmanager
    def reconnector(self, session: Session) -> Iterator[Reconnector]:
        caller = self._caller
        try:
            yield CallingReconnector(self._route, self._side, session, self.version, self._replaceable, caller)
        finally:
            caller.close_early()

    async def _open_channels(self, session: Session, shards: int, bulk_channels: int) -> dict[ChannelKey, DataChannel]:
        """Beside each other: one round trip for all, where the network can take them."""
        caller = self._caller
        opened: dict[ChannelKey, DataChannel] = {}
        failures: list[Exception] = []
        keys = iter(channel_keys(shards, bulk_channels))
        early = caller.take_early()

        async def open_some() -> None:
            try:
                for kind, index in keys:  # (shared by these tasks)
                    hello = Hello(kind, self._side, index, session.migration, session.epoch)
                    begun = early.pop(0) if early else None
                    stream = await caller.connect_data(
                        self.peer, hello, token=session.token, version=self.version, early=begun
                    )
                    opened[kind, index] = detach(stream)
            except Exception as error:  # noqa: BLE001  # raised outside of the nursery, which would wrap it
                failures.append(error)
                nursery.cancel_scope.cancel()

        try:
            with trio.fail_after(CHANNELS_TIMEOUT_S):
                async with trio.open_nursery() as nursery:
                    for _ in range(AT_A_TIME):
                        nursery.start_soon(open_some)
            for failure in failures:
                raise failure
        except BaseException as error:
            for channel in opened.values():
                channel.close()
            if isinstance(error, trio.TooSlowError):
                raise PeerError(f"{self.peer}: the data channels took more than {CHANNELS_TIMEOUT_S:g} s") from None
            raise
        finally:
            for opening in early:
                opening.close()
        caller.early = min(len(opened), AT_A_TIME)
        return opened


class CallingReconnector(Reconnector):
    def __init__(
        self,
        route: Route,
        side: str,
        session: Session,
        version: int,
        replaceable: bool = False,
        caller: Caller | None = None,
    ) -> None:
        super().__init__()
        self._route = route
        self._side = side
        self._session = session
        self._version = version
        self._replaceable = replaceable
        self._caller = caller or Caller()
        self._in_vain = False  # the last attempt was refused
        self._pause_s = 0.0  # before the next attempt
        self._lost_s = math.inf  # when the search began
        self._log_limit = backoff.LogLimit()

    def went_on(self) -> None:
        super().went_on()
        self._pause_s = min(self._pause_s, backoff.CAP_S)
        self._lost_s = math.inf

    def recover(self) -> None:
        super().recover()
        self._route.wake()

    async def next_link(self) -> tuple[Link, Session]:
        if self._has_lasted():
            self._pause_s, self._log_limit = 0.0, backoff.LogLimit()
        self._route.refresh()
        while True:
            asked, stream = await self._attempt()
            if stream is None:
                continue
            with contextlib.suppress(PeerError):
                link = CallingLink(
                    stream, self._route, asked, self._side, self._version, self._replaceable, self._caller
                )
                return link, self._session

    async def announce(self, how: Ended) -> None:
        if self._version < 3:
            return  # it could not be understood
        with contextlib.suppress(EndedElsewhere):
            while True:
                _, stream = await self._attempt(how)
                if stream is not None:
                    stream.socket.close()
                    return

    async def superseded(self) -> None:
        while not self.paused:  # only this side connects
            await self._changed.wait()
        raise PeerError(PAUSED_BY_OPERATOR)

    async def _attempt(self, how: Ended | None = None) -> tuple[Address, Stream | None]:
        """When it is due, one call: which address was asked, and what it has answered. `EndedElsewhere`."""
        self._caller.close_early()  # no peer keeps them for as long as a pause may be
        now_s = trio.current_time()
        self._lost_s = min(self._lost_s, now_s)
        if self._pause_s and await self._route.pause(self._pause_s * random.uniform(0.5, 1)):
            self._pause_s, self._lost_s, self._log_limit = 0.0, trio.current_time(), backoff.LogLimit()
        # (also where this one is answered: that is no success yet, see `went_on`)
        self._pause_s = min(max(2 * self._pause_s, backoff.FIRST_S), backoff.cap_s(self._lost_s))
        while self.paused and how is None:  # what is said with `how` makes no connection
            await self._changed.wait()
        # Each attempt has an epoch of its own: one that was lost on its way must not be taken for the next one.
        session = self._session = replace(self._session, epoch=self._session.epoch + 1)
        hello = Hello("control", self._side, 0, session.migration, session.epoch, how or "")
        asked = self._route.address
        early = 0 if self._in_vain or how is not None else self._caller.early
        try:
            stream, _ = await self._caller.connect(
                asked,
                hello,
                RECONNECT_ATTEMPT_S,
                name=self._route.tls_name,
                token=session.token,
                version=self._version,
                early=early,
            )
            self._in_vain = False
            if not self.paused or how is not None:
                return asked, stream
            stream.socket.close()
        except (PeerError, ProtocolError, ResourceError, ConfigurationError) as error:
            # (one that was only cut may be the next to succeed, and is short with all that can be begun early)
            self._in_vain = isinstance(error, RefusedError | ProtocolError | TlsError)
            self._explain(error)  # (an address of a peer file may be one that is refused)
        return asked, None

    def _explain(self, error: PostcopyError) -> None:
        wrong = False
        if isinstance(error, RefusedError):
            if error.ended is not None:
                raise EndedElsewhere(error.ended, str(error)) from error
            if self._replaceable and error.code == Code.UNKNOWN:
                raise error
            if error.proven:
                self.answered.set()
            wrong = error.reason != PAUSED_BY_OPERATOR
        if self._log_limit.due():
            # (what only an operator can mend is told one who looks at warnings)
            level = logging.WARNING if wrong or isinstance(error, TlsError | ConfigurationError) else logging.INFO
            log.log(level, "not connected again yet: %s%s", error, "; is that the right address?" * wrong)
