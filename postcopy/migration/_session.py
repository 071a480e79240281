# SPDX-License-Identifier: Apache-2.0
"""What both engines stand on: the control connection as two tasks, and a scope that ends at the first failure.

An engine is one main task that follows the plan, and beside it a few that watch: the control connection, the data
plane, the machine, the user. The first thing that goes wrong in any of them is kept as the reason, the others are
stopped, and only when all of them have ended does the engine decide what that means. So there is one place where a
migration fails, and it has the state of the protocol to decide by. That holds for what nobody has thought of, too: an
exception that is no `PostcopyError` is a mistake in this package; it is logged with its traceback, and fails the one
migration that it happened in.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, TypeVarTuple

import trio

from postcopy._blocking import run_sync
from postcopy.errors import MigrationError, PeerError, PostcopyError, ProtocolError
from postcopy.memory.bitmap import Bitmap
from postcopy.wire import (
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
MISSED_HEARTBEATS = 3
RECOVER_UNOWNED_S = 60.0
"""How long somebody is waited for on whom nothing depends: the destination of an image, which can begin anew."""
STEP_TIMEOUT_S = 30.0
"""How long a peer may take for one step of the set-up."""
SEND_BYTES = 256 * 1024
"""The peer has `STEP_TIMEOUT_S` for so much of a message: a slow network is not taken for a peer that hangs."""
MESSAGES_PER_S = 2000
"""More than a peer has to say: who sends more has to wait."""
LAST_WORDS_S = 0.5
"""How long saying goodbye may take; a machine may be waiting to go on."""
IN_DOUBT_FOR_S = 60.0
"""How long a destination that does not know whether it was given the machine looks for the one who does."""
BULK_SILENCE_S = 30.0
HEAVY_PAGES = 256 * 1024
"""From so many on a page map is packed, unpacked and added up in a thread: a millisecond and more of the event loop."""
_NETWORK = frozenset(
    {
        errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, errno.ECONNABORTED, errno.ENETRESET, errno.ENETDOWN,
        errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ESHUTDOWN, errno.EPROTO,
        errno.ENONET, errno.EACCES, errno.EPERM,  # the last two: of a firewall
    }
)  # fmt: skip
"""What the system says of a connection that the peer, or something on the way to it, has ended. Anything else is
trouble of this host."""

P = TypeVar("P", SourceProtocol, DestinationProtocol)
M = TypeVar("M", bound=Message)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Interrupted(PostcopyError):
    """The user ended it."""


def now_ns() -> int:
    """CLOCK_MONOTONIC, the clock that the core uses too."""
    return time.monotonic_ns()


def data_silence_s(kind: str, heartbeat_s: float) -> float:
    """For how long nothing may be acknowledged on a data connection before the kernel gives it up.

    The kernel counts the time for which the other end reads nothing, too (TCP_USER_TIMEOUT, in tcp(7)). Who reads an
    urgent channel always reads. Pages that are pushed may have to wait where they come in: for memory, for a processor
    that others use. That the other end is dead is heard on the control connection long before."""
    silence_s = MISSED_HEARTBEATS * heartbeat_s
    return silence_s if kind == "urgent" else max(silence_s, BULK_SILENCE_S)


async def if_heavy(pages: int, function: Callable[[*Ts], T], *args: *Ts) -> T:
    """`function(*args)`, which looks at a map of so many pages: here, or in a thread where it would take long."""
    return await run_sync(function, *args) if pages >= HEAVY_PAGES else function(*args)


class Control(Generic[P]):
    """Carries the protocol's bytes. `run` must be running for anything to arrive.

    `send` takes what a `send_*` of the protocol has just returned: call both in one expression, so that the order
    on the wire is the order of the protocol's states.
    """

    def __init__(self, stream: trio.abc.HalfCloseableStream, protocol: P, heartbeat_s: float = HEARTBEAT_S) -> None:
        self.protocol: P = protocol
        self._stream = stream
        self._heartbeat_s = heartbeat_s
        self._silence_s = MISSED_HEARTBEATS * heartbeat_s
        self._sending = trio.Lock()
        # A peer that sends more than we take has to wait: each of these may be megabytes.
        self._arrived, self._messages = trio.open_memory_channel[Message](8)
        self._pong_for: Ping | None = None
        self._something_to_say = trio.Event()
        self._heard = 0  # messages, since then
        self._second_s = -math.inf
        self._torn = False  # a message was sent in part: nothing that follows would be understood

    async def send(self, data: bytes) -> None:
        """`PeerError` when the connection is broken, or the peer takes nothing: signs of life are not enough while a
        machine is paused for it. One that is cancelled may leave a part of the message behind: this connection can then
        only be closed."""
        async with self._sending:
            if self._torn:
                raise PeerError(self.protocol.reason or "the control connection is broken: a message was sent in part")
            await trio.lowlevel.checkpoint_if_cancelled()  # here, where nothing is torn by it
            self._torn = True
            try:
                for at in range(0, len(data), SEND_BYTES):
                    with trio.fail_after(STEP_TIMEOUT_S):
                        await self._stream.send_all(data[at : at + SEND_BYTES])
            except trio.TooSlowError:
                slow = PeerError(f"{self._peer} has taken nothing of a message within {STEP_TIMEOUT_S:g} s")
                self.protocol.connection_lost(str(slow))  # so that the receiver ends too, at the next sign of life
                raise slow from None
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._lost(error) from error
            self._torn = False

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
                await self._take_turns()
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
                    lost = self._lost(error)
                    protocol.connection_lost(str(lost))
                    raise lost from error
            if scope.cancelled_caught:
                protocol.connection_lost(f"no sign of life from {self._peer} for {self._silence_s:g} s")
            elif data:
                protocol.receive_data(bytes(data))
            else:
                protocol.receive_eof()

    async def _take_turns(self) -> None:
        """At every message. One read may hold thousands that say nothing, and a peer may send nothing else: the others
        here get their turn, and the peer no more than its share."""
        now_s = trio.current_time()
        if now_s >= self._second_s + 1:
            self._second_s, self._heard = now_s, 0
        self._heard += 1
        if self._heard > MESSAGES_PER_S:
            await trio.sleep_until(self._second_s + 1)
        elif not self._heard % 64:
            await trio.lowlevel.checkpoint()

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
            data = self.protocol.send(Pong(ping.nonce)) if ping else self.protocol.send(Ping(nonce))
            # The receiver sees it too, and after what was still to be read.
            with contextlib.suppress(PeerError, MigrationError):
                await self.send(data)

    @property
    def _peer(self) -> str:
        return "the destination" if isinstance(self.protocol, SourceProtocol) else "the source"

    async def say_goodbye(self, reason: str) -> None:
        """Tells the peer why it ends, when the protocol still lets us, and closes. Bounded in time, never raises."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + LAST_WORDS_S):
            try:
                if self.protocol.may_abort and not self._torn:
                    await self.send(self.protocol.send(Abort(reason)))
            except (PeerError, MigrationError):
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

    def _lost(self, error: trio.BrokenResourceError | trio.ClosedResourceError) -> PeerError | MigrationError:
        """Of the peer and the network, or of this host: a descriptor that somebody has closed, no memory."""
        cause = error.__cause__
        reason = cause.strerror if isinstance(cause, OSError) else None
        if isinstance(error, trio.ClosedResourceError) or (isinstance(cause, OSError) and cause.errno not in _NETWORK):
            where = f"the control connection with {self._peer}"
            return MigrationError(f"this host has lost {where}: {reason or 'it was closed here'}")
        return PeerError(f"the control connection with {self._peer} broke{f' ({reason})' if reason else ''}")


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


class Patience:
    """How long something is waited for, counted from `begin`; may be changed meanwhile. Trio thread only."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._since_s: float | None = None
        self._changed = trio.Event()

    @property
    def begun(self) -> bool:
        return self._since_s is not None

    def begin(self) -> None:
        """Counts from now on (again)."""
        self._since_s = trio.current_time()
        self._wake()

    def end(self) -> None:
        """There is nothing to be waited for any more."""
        self._since_s = None

    def set(self, seconds: float) -> None:
        """Also for what is being waited for."""
        self.seconds = seconds
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def run_out(self) -> None:
        """Returns when it is over. `begin` must have been called."""
        while self._since_s is not None:
            left_s = self._since_s + self.seconds - trio.current_time()
            if left_s <= 0:
                return
            with trio.move_on_after(left_s):
                await self._changed.wait()
        await trio.sleep_forever()


async def first_of(*waits: Callable[[], Awaitable[object]]) -> None:
    """Returns when one of them has returned; the others are cancelled. What one raises comes out as it is."""
    failures: list[Exception] = []
    async with trio.open_nursery() as nursery:

        async def run(wait: Callable[[], Awaitable[object]]) -> None:
            try:
                await wait()
            except Exception as error:  # noqa: BLE001  # raised below, outside of the nursery, which would wrap it
                failures.append(error)
            nursery.cancel_scope.cancel()

        for wait in waits:
            nursery.start_soon(run, wait)
    if failures:
        raise failures[0]


UNDECIDED = frozenset({State.SETUP, State.OFFERED, State.CHANNELS, State.READY, State.SWITCHOVER, State.HANDED})
"""States in which either side can give a migration up without loss. The source still can in `PREPARED`; the destination
does not know there whether it has been decided."""
STEERABLE = frozenset({State.COMMITTED, State.POSTCOPY, State.PAUSED, State.IN_DOUBT, State.RECOVER, State.RECOVERING})
"""States in which a connection may be given up without giving up the migration."""


class FirstFailure:
    """Runs tasks until one says `done` or fails; `failure` is then the first error."""

    def __init__(self) -> None:
        self.failure: PostcopyError | None = None
        self._scope = trio.CancelScope()

    async def run(self, *tasks: Callable[[], Awaitable[None]]) -> None:
        """The first of the tasks is the main one: when it returns, all is done. Raises nothing but what ends the caller
        himself (`trio.Cancelled`, `KeyboardInterrupt`)."""
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
        except Exception as error:  # noqa: BLE001  # contained: see the top
            self.fail(explained(error))
        except BaseExceptionGroup as group:  # of a nursery inside of the task, with what is not to be contained
            known, _ = group.split(Exception)
            if known is not None:
                self.fail(explained(known))
            raise


def explained(error: Exception) -> PostcopyError:
    """What a migration fails with. An exception that no part of this package should have let out is logged here, with
    its traceback."""
    errors = list(_leaves(error))
    for each in errors:
        if not isinstance(each, PostcopyError | OSError):
            log.error("a mistake in postcopy: this migration fails of it", exc_info=error)
            return MigrationError(f"a mistake in postcopy ({type(each).__name__}: {each}); the log has its traceback")
    first = next((each for each in errors if isinstance(each, PostcopyError)), errors[0])
    if isinstance(first, PostcopyError):
        return first
    return MigrationError(f"{type(first).__name__}: {first}")  # a system call that nobody expected to fail


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error


def status_of(state: State, *, interrupted: bool = False, connecting: bool = False, hopeless: bool = False) -> str:
    """QEMU's word (MigrationStatus) for a state. Ours are `connecting`, `in-doubt`, `reclaimed`, and `postcopy-failed`:
    paused, and no connection would help."""
    if state is State.ABORTED:
        return "cancelled" if interrupted else "failed"
    if state is State.SETUP and connecting:
        return "connecting"
    if state is State.PAUSED and hopeless:
        return "postcopy-failed"
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
        State.PAUSED: "postcopy-paused",
        State.IN_DOUBT: "in-doubt",
        State.RECLAIMED: "reclaimed",
        State.RECOVER: "postcopy-recover",
        State.RECOVERING: "postcopy-recover",
    }[state]
