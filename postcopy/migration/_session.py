# SPDX-License-Identifier: Apache-2.0
"""What both engines stand on: the control connection as two tasks, and a scope that ends at the first failure.

An engine is one main task that follows the plan, and beside it a few that watch: the control connection, the data
plane, the machine, the user. Whatever goes wrong in any of them is a `PostcopyError`; the first one is kept as the
reason, the others are stopped, and only when all of them have ended does the engine decide what that means. So
there is one place where a migration fails, and it has the state of the protocol to decide by.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from postcopy._errors import MigrationError, PeerError, PostcopyError, ProtocolError
from postcopy.bitmap import Bitmap
from postcopy.migration.channels import Link, Membership, Session
from postcopy.migration.protocol import (
    Abort,
    DestinationProtocol,
    Message,
    PageMap,
    Ping,
    Pong,
    ReceivedMap,
    Reject,
    SourceProtocol,
    State,
)

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""How often each side gives a sign of life. A peer of which nothing was heard for three times as long is lost."""
SILENCES = 3
RECOVER_UNOWNED_S = 60.0
"""How long somebody is waited for on whom nothing depends: the destination of an image, which can begin anew."""
STEP_TIMEOUT_S = 30.0
"""How long a peer may take for one step of the set-up."""
LAST_WORDS_S = 0.5
"""How long saying goodbye may take; a machine may be waiting to go on."""

P = TypeVar("P", SourceProtocol, DestinationProtocol)
M = TypeVar("M", bound=Message)


class Interrupted(PostcopyError):
    """The user ended it."""


def now_ns() -> int:
    """CLOCK_MONOTONIC, the clock that the core uses too."""
    return time.monotonic_ns()


class Control(Generic[P]):
    """Carries the protocol's bytes. `run` must be running for anything to arrive.

    `send` takes what a `send_*` of the protocol has just returned: call both in one expression, so that the order
    on the wire is the order of the protocol's states.
    """

    def __init__(self, stream: trio.abc.HalfCloseableStream, protocol: P, heartbeat_s: float = HEARTBEAT_S) -> None:
        self.protocol: P = protocol
        self._stream = stream
        self._heartbeat_s = heartbeat_s
        self._silence_s = SILENCES * heartbeat_s
        self._sending = trio.Lock()
        # A peer that sends more than we take has to wait: bounded, but enough for all that a good peer sends ahead.
        self._arrived, self._messages = trio.open_memory_channel[Message](64)
        self._pong_for: Ping | None = None
        self._something_to_say = trio.Event()

    async def send(self, data: bytes) -> None:
        """`PeerError` when the connection is broken."""
        async with self._sending:
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise PeerError(self._lost("the control connection broke", error)) from error

    async def receive(self, kind: type[M], timeout_s: float = float("inf")) -> M:
        """The next message, which must be of this kind. `PeerError` when it does not come in time."""
        with trio.move_on_after(timeout_s):
            message: Message = await self.receive_any()
            if isinstance(message, kind):
                return message
            raise ProtocolError(f"{message.TYPE} came where {kind.TYPE} was due")
        raise PeerError(f"{self._peer} did not say {kind.TYPE} within {timeout_s:g} s")

    async def receive_any(self, timeout_s: float = float("inf")) -> Message:
        """The next message, of any kind. `PeerError` when none will come any more, or not in time."""
        try:
            with trio.fail_after(timeout_s):
                return await self._messages.receive()
        except trio.EndOfChannel:
            raise PeerError(self.protocol.reason or "the control connection has ended") from None
        except trio.TooSlowError:
            raise PeerError(f"{self._peer} said nothing within {timeout_s:g} s") from None

    async def run(self) -> None:
        """Receives, and keeps the connection alive, until the migration has ended in order. Raises `PeerError` or
        `ProtocolError` when it has not."""
        failure: PostcopyError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._heartbeat)
            try:
                await self._receive()
            except PostcopyError as error:
                failure = error  # raised outside of the nursery, which would wrap it
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        await self._arrived.aclose()  # only now: a receiver must not be told of an end before its reason is

    async def _receive(self) -> None:
        protocol = self.protocol
        while True:
            while (message := protocol.next_message()) is not None:
                if isinstance(message, Ping):
                    # Said by the other task: a receiver that waits to send can meet a sender that waits to be received.
                    self._pong_for = message
                    self._something_to_say.set()
                elif not isinstance(message, Pong | Abort | Reject):  # those two are told by the state
                    await self._arrived.send(message)
            if protocol.state is State.ABORTED or protocol.recoverable:
                raise PeerError(protocol.reason)
            if protocol.ended:
                return
            data: bytes | bytearray = b""
            with trio.move_on_after(self._silence_s) as scope:
                try:
                    data = await self._stream.receive_some(64 * 1024)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    protocol.connection_lost(self._lost("the control connection broke", error))
                    continue
            if scope.cancelled_caught:
                protocol.connection_lost(f"no sign of life from the peer for {self._silence_s:g} s")
            elif data:
                protocol.receive_data(bytes(data))
            else:
                protocol.receive_eof()

    async def _heartbeat(self) -> None:
        nonce = 0
        while not self.protocol.ended:
            with trio.move_on_after(self._heartbeat_s):
                await self._something_to_say.wait()
            if self.protocol.ended:
                return
            ping, self._pong_for = self._pong_for, None
            self._something_to_say = trio.Event()
            nonce += 1
            data = self.protocol.send_pong(ping) if ping else self.protocol.send_ping(nonce)
            with contextlib.suppress(PeerError):  # the receiver sees it too, and after what was still to be read
                await self.send(data)

    @property
    def _peer(self) -> str:
        return "the destination" if isinstance(self.protocol, SourceProtocol) else "the source"

    async def say_goodbye(self, reason: str) -> None:
        """Tells the peer why it ends, when the protocol still lets us, and closes. Bounded in time, never raises."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + LAST_WORDS_S):
            try:
                if self.protocol.may_abort:
                    await self.send(self.protocol.send_abort(reason))
            except PeerError:
                pass  # it is gone; it will come to the same conclusion
        self.protocol.connection_lost(reason)
        await self.close()

    async def close(self) -> None:
        """Closes so that the peer still gets what was sent last. Bounded in time. `run` must have ended."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + LAST_WORDS_S):
            # A socket closed with unread bytes in it (a ping is enough) resets the connection, and a reset takes back
            # what the peer has not read yet. So: say that no more comes, and read until the peer says so too.
            try:
                await self._stream.send_eof()
                while await self._stream.receive_some(64 * 1024):
                    pass
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # that has been said already, the hard way
        await trio.aclose_forcefully(self._stream)

    def _lost(self, what: str, error: BaseException) -> str:
        cause = error.__cause__
        return f"{what} ({cause.strerror})" if isinstance(cause, OSError) and cause.strerror else what


class MapCollector:
    """Bitmaps that come in parts: those of a block in order and without gaps. What the peer says is checked."""

    def __init__(self, pages: Sequence[int]) -> None:
        self.bitmaps = [Bitmap(count) for count in pages]
        self.maps = 0
        self._described = [0] * len(pages)  # pages

    def add(self, message: PageMap | ReceivedMap) -> None:
        """`ProtocolError` for a part that does not fit."""
        self.maps += 1
        if message.block >= len(self.bitmaps):
            raise ProtocolError(f"{message.TYPE}: there is no block {message.block}")
        whole, described = self.bitmaps[message.block], self._described[message.block]
        if message.first_page != described:
            raise ProtocolError(
                f"{message.TYPE}: block {message.block} goes on at page {message.first_page}, not at {described}"
            )
        if message.pages > len(whole) - message.first_page:
            raise ProtocolError(f"{message.TYPE}: block {message.block} has {len(whole)} pages only")
        whole.paste(message.first_page, Bitmap.rle_decode(message.runs, message.pages))
        self._described[message.block] += message.pages

    def finish(self, told: str, maps: int) -> None:
        """`told` names the message that speaks of `maps` parts. `ProtocolError` unless that is what came."""
        if maps != self.maps:
            raise ProtocolError(f"{told}: speaks of {maps} page maps, {self.maps} came")
        for number, bitmap in enumerate(self.bitmaps):
            if self._described[number] != len(bitmap):
                raise ProtocolError(f"{told}: the page map of block {number} ends at {self._described[number]}")


@dataclass
class Recoveries:
    """How often a migration was cut and went on, and how long that took: from the loss noticed to all channels anew."""

    count: int = 0
    last_ns: int = 0
    max_ns: int = 0
    total_ns: int = 0

    def add(self, duration_ns: int) -> None:
        self.count += 1
        self.last_ns = duration_ns
        self.max_ns = max(self.max_ns, duration_ns)
        self.total_ns += duration_ns


async def next_link(
    membership: Membership, stop: trio.Event, recover_for_s: float
) -> tuple[Link, Session] | PeerError | None:
    """The connection to go on with; the peer's refusal; or None when `stop` was set or the time is over."""
    found: tuple[Link, Session] | PeerError | None = None
    with trio.move_on_after(recover_for_s):
        async with trio.open_nursery() as nursery:

            async def interruption() -> None:
                await stop.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(interruption)
            try:
                found = await membership.next_link()
            except PeerError as error:
                found = error
            nursery.cancel_scope.cancel()
    return found


UNDECIDED = frozenset({State.SETUP, State.OFFERED, State.CHANNELS, State.READY, State.SWITCHOVER, State.HANDED})
"""States in which either side can give a migration up without loss. The source still can in `PREPARED`; the destination
does not know there whether it has been decided."""
STEERABLE = frozenset({State.COMMITTED, State.POSTCOPY, State.PAUSED, State.IN_DOUBT, State.RECOVER, State.RECOVERING})
"""States in which a connection may be given up without giving up the migration."""


def steered(membership: Membership | None, state: State) -> Membership:
    """The membership of a migration that can be held and let go. `MigrationError` where it cannot be."""
    if membership is None or state not in STEERABLE:
        raise MigrationError(
            "only a migration past its point of no return, and not at its end, can lose its connection"
        )
    return membership


class FirstFailure:
    """Runs tasks until one says `done` or fails; `failure` is then the first error.

    Errors that are not `PostcopyError`s are mistakes in this package and pass through, with their tracebacks.
    """

    def __init__(self) -> None:
        self.failure: PostcopyError | None = None
        self._scope = trio.CancelScope()

    async def run(self, *tasks: Callable[[], Awaitable[None]]) -> None:
        """The first of the tasks is the main one: when it returns, all is done."""
        main, *watchers = tasks
        with self._scope:
            async with trio.open_nursery() as nursery:
                for watcher in watchers:
                    nursery.start_soon(self._guard, watcher)
                await self._guard(main)
                nursery.cancel_scope.cancel()

    def fail(self, error: PostcopyError) -> None:
        """Ends it all, unless it has ended already."""
        if self.failure is None:
            self.failure = error
        self._scope.cancel()

    async def _guard(self, task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except PostcopyError as error:
            self.fail(error)
        except BaseExceptionGroup as group:  # of a nursery inside of the task
            known, others = group.split(PostcopyError)
            if known is None or others is not None:
                raise
            self.fail(first_error(known))
        except OSError as error:  # a system call that nobody expected to fail: no file, no memory
            self.fail(MigrationError(f"{type(error).__name__}: {error}"))


def first_error(group: BaseExceptionGroup[PostcopyError]) -> PostcopyError:
    """The first error in a group of nothing but such errors."""
    first = group.exceptions[0]
    return first_error(first) if isinstance(first, BaseExceptionGroup) else first


def status_of(state: State, *, interrupted: bool) -> str:
    """QEMU's word (MigrationStatus) for a state."""
    if state is State.ABORTED:
        return "cancelled" if interrupted else "failed"
    return {
        State.SETUP: "setup",
        State.OFFERED: "setup",
        State.CHANNELS: "setup",
        State.READY: "active",
        State.SWITCHOVER: "active",
        State.HANDED: "active",
        State.PREPARED: "active",
        State.COMMITTED: "postcopy-active",
        State.POSTCOPY: "postcopy-active",
        State.CLOSING: "postcopy-active",
        State.COMPLETED: "completed",
        State.RECLAIMED: "reclaimed",
        State.PAUSED: "postcopy-paused",
        State.IN_DOUBT: "postcopy-paused",
        State.RECOVER: "postcopy-recover",
        State.RECOVERING: "postcopy-recover",
    }[state]
