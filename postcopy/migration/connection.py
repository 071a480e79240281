# SPDX-License-Identifier: Apache-2.0
"""The control connection of a migration: it carries the protocol's bytes, shows that this side is alive, and notices
when the peer is not."""

from __future__ import annotations

import contextlib
import errno
import math
import select
import time
from typing import Generic, TypeVar

import trio

from postcopy.errors import ConnectionLost, MigrationError, PeerError, PostcopyError, ProtocolError
from postcopy.tls import InPlace, in_place
from postcopy.wire import (
    Abort,
    DestinationProtocol,
    Message,
    Ping,
    Pong,
    Reject,
    SourceProtocol,
    State,
)

HEARTBEAT_S = 1.0
"""How often each side gives a sign of life."""
MISSED_HEARTBEATS = 3
"""A peer that was silent for so many heartbeats is lost."""
STEP_TIMEOUT_S = 30.0
"""How long a peer may take for one step of the set-up."""
LAST_LOOK_S = 0.02
"""For what has come while this process did not run."""
SEND_BYTES = 256 * 1024
"""The peer has `STEP_TIMEOUT_S` for so much of a message: a slow network is not taken for a peer that hangs."""
MESSAGES_PER_S = 2000
"""More than a peer has to send; one that sends more has to wait."""
REASON_TIMEOUT_S = 0.5
"""How long giving the reason of an end may take, and closing; a machine may be waiting to go on."""
HURRY_S = 0.005
"""See `Control.hurry`."""
IN_PLACE_S = 0.002
"""How long a message may be waited for in place, with no other task running."""
PATIENCE_S = 0.05
"""That in all, on one connection: a peer may call for it again and again."""
RECEIVE_BYTES = 64 * 1024
BULK_SILENCE_S = 30.0
"""See `data_silence_s`."""
NETWORK_ERRORS = frozenset(
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


def data_silence_s(kind: str, heartbeat_s: float) -> float:
    """For how long nothing may be acknowledged on a data connection before the kernel gives it up.

    The kernel also counts the time for which the other end reads nothing (TCP_USER_TIMEOUT, in tcp(7)). The thread of
    an urgent channel always reads. Pages that are pushed may have to wait at the destination, for memory or a
    processor. That the other end is dead is noticed on the control connection long before."""
    silence_s = MISSED_HEARTBEATS * heartbeat_s
    return silence_s if kind == "urgent" else max(silence_s, BULK_SILENCE_S)


class Control(Generic[P]):
    """Carries the protocol's bytes. `run` must be running for anything to arrive.

    `send` takes what the protocol's `send` has just returned: call both in one expression, so that the order
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
        self._unanswered: Ping | None = None
        self._pinged = trio.Event()
        self._second_s = -math.inf  # when the present second began
        self._received = 0  # messages, in the present second
        self._torn = False  # a message was sent in part: nothing that follows would be understood
        self.received_ns = 0  # when something came, the last time
        self._hurry_until_s = -math.inf  # real time
        self._patience_s = PATIENCE_S
        # It is read here, in one step with handing the bytes to the protocol, so that two tasks may do so.
        self._in_place = in_place(stream)
        self._poll = select.poll()
        if self._in_place is not None:
            self._poll.register(self._in_place.socket.fileno(), select.POLLIN)
        self._at_once = False  # what came last was not waited for
        self._idle: trio.CancelScope | None = None  # of the receiver, which has delivered all and waits for the socket

    def hurry(self) -> None:
        """The pause has begun, or is about to. For `HURRY_S` from the last call messages are sent and received *in
        place*, by the task that has or wants them: each pass of the event loop, in which other tasks run, costs as much
        as a message. What does not come within `IN_PLACE_S` is waited for as ever."""
        self._hurry_until_s = time.monotonic() + HURRY_S

    def no_hurry(self) -> None:
        """The pause is over."""
        self._hurry_until_s = -math.inf

    async def send(self, data: bytes) -> None:
        """`PeerError` when the connection is broken, or the peer takes nothing: signs of life are not enough while a
        machine is paused for it. When it is cancelled a part of the message may have been sent: this connection can
        then only be closed."""
        await self._acquire_sending()
        try:
            if self._torn:
                raise PeerError(self.protocol.reason or "the control connection is broken: a message was sent in part")
            await trio.lowlevel.checkpoint_if_cancelled()  # here, where nothing is torn by it
            self._torn = True
            sent = self._send_in_place(data[:SEND_BYTES])
            try:
                for at in range(sent, len(data), SEND_BYTES):
                    with trio.fail_after(STEP_TIMEOUT_S):
                        await self._stream.send_all(data[at : at + SEND_BYTES])
            except trio.TooSlowError:
                slow = PeerError(f"{self.protocol.PEER} has taken nothing of a message within {STEP_TIMEOUT_S:g} s")
                self.protocol.connection_lost(str(slow))  # so that the receiver ends too, at the next sign of life
                raise slow from None
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._lost(error) from error
            self._torn = False
        finally:
            self._sending.release()

    def _send_in_place(self, data: bytes) -> int:
        """How much of it has been sent at once."""
        if self._in_place is None or time.monotonic() >= self._hurry_until_s:
            return 0
        try:
            return self._in_place.write_now(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):  # the stream will say so
            return 0

    async def _acquire_sending(self) -> None:
        try:
            self._sending.acquire_nowait()  # no other task need run before a message leaves
        except trio.WouldBlock:
            await self._sending.acquire()

    async def receive(self, kind: type[M], timeout_s: float = math.inf) -> M:
        """The next message, which must be of this kind. `PeerError` when none will come any more, or not in time."""
        message: Message = await self.receive_any(timeout_s, kind.TYPE)
        if not isinstance(message, kind):
            raise ProtocolError(f"{message.TYPE} came where {kind.TYPE} was due")
        return message

    async def receive_any(self, timeout_s: float = math.inf, due: str = "what comes next") -> Message:
        """The next message, of any kind; `due` is the one that is expected."""
        try:
            with contextlib.suppress(trio.WouldBlock):
                return self._messages.receive_nowait()  # several may have come at once
            if (message := self._receive_in_place()) is not None:
                return message
            with trio.fail_after(timeout_s):
                return await self._messages.receive()
        except trio.EndOfChannel:
            raise PeerError(self.protocol.reason or "the control connection has ended") from None
        except trio.TooSlowError:
            raise PeerError(f"{self.protocol.PEER} did not say {due} within {timeout_s:g} s") from None

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
        await self._arrived.aclose()  # only now: a receiver must not learn of the end before its reason

    async def _receive(self) -> None:
        protocol = self.protocol
        while True:
            while (message := protocol.next_message()) is not None:
                await self._take_turns()
                if self._sorted(message) is not None:
                    try:
                        self._arrived.send_nowait(message)
                    except trio.WouldBlock:
                        await self._arrived.send(message)
            if protocol.state is State.ABORTED:
                # Our own `abort` or `reject` may be on its way, and what is raised here ends the task that sends it.
                with trio.move_on_after(REASON_TIMEOUT_S):
                    async with self._sending:
                        pass
            if protocol.state is State.ABORTED or protocol.recoverable:
                raise (PeerError if protocol.peer_said_why else ConnectionLost)(protocol.reason)
            if protocol.ended:
                return
            if data := await self._receive_some():
                self._take(data)
            elif data is not None:
                protocol.receive_eof()

    async def _receive_some(self) -> bytes | None:
        """What comes next; empty at the end, None when something was received in place. Raises when the connection is
        broken or the peer silent; the protocol is not told here, so that the peer can still get the reason: see
        `give_reason`."""
        try:
            # A second look, since it may have been this process that has not run for so long.
            for within_s in (self._silence_s, LAST_LOOK_S):
                with trio.move_on_after(within_s):
                    if self._in_place is None:
                        return bytes(await self._stream.receive_some(RECEIVE_BYTES))
                    return await self._read(self._in_place)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise self._lost(error) from error
        raise ConnectionLost(f"no sign of life from {self.protocol.PEER} for {self._silence_s:g} s")

    async def _read(self, stream: InPlace) -> bytes | None:
        """As `_receive_some`. No task runs between the reading of bytes and the return."""
        if self._at_once:  # the others get their turn, however fast the peer sends
            self._at_once = False
            await trio.lowlevel.checkpoint()
        self._at_once = True
        while (data := stream.read_now(RECEIVE_BYTES)) is None:
            self._at_once = False
            with trio.CancelScope() as scope:
                self._idle = scope
                try:
                    await trio.lowlevel.wait_readable(stream.socket)
                finally:
                    self._idle = None
            if scope.cancel_called:
                return None
        return data

    def _take(self, data: bytes) -> None:
        self.received_ns = time.monotonic_ns()
        self.protocol.receive_data(data)

    def _receive_in_place(self) -> Message | None:
        """The next message, where it comes while there is a hurry. Only messages are taken so: ends and errors the
        receiver finds, when it runs again.

        The thread sleeps meanwhile. One that looks again and again has used up its share of a busy processor when the
        message comes."""
        receiver, stream, began_s = self._idle, self._in_place, time.monotonic()
        until_s = min(self._hurry_until_s, began_s + min(IN_PLACE_S, self._patience_s))
        if receiver is None or stream is None:
            return None
        message = None
        try:
            while message is None and not self.protocol.ended and (left_s := until_s - time.monotonic()) > 0:
                if (next_message := self.protocol.next_message()) is not None:
                    message = self._sorted(next_message)
                elif stream.pending or [event for _, event in self._poll.poll(left_s * 1000)] == [select.POLLIN]:
                    if (data := stream.read_now(RECEIVE_BYTES)) == b"":
                        break
                    if data is not None:  # (half a record is nothing yet)
                        self._take(data)
                else:
                    break
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # seen again at the next reading
        finally:
            self._patience_s -= time.monotonic() - began_s
            # What the stream itself holds, or has found to be its end, does not make the socket readable.
            with contextlib.suppress(trio.ClosedResourceError):
                if self.protocol.unread or self.protocol.ended or stream.pending:
                    receiver.cancel()  # it has to look
        return message

    def _sorted(self, message: Message) -> Message | None:
        """The message, if it is for the plan."""
        if isinstance(message, Ping):
            # Answered by the other task: a receiver that waits to send may face a peer that does the same.
            self._unanswered = message
            self._pinged.set()
        return None if isinstance(message, Ping | Pong | Abort | Reject) else message  # the state says the last two

    async def _take_turns(self) -> None:
        """At every message. One read may hold thousands of empty messages, and a peer may send nothing else: the other
        tasks get their turn, and the peer no more than its share."""
        now_s = trio.current_time()
        if now_s >= self._second_s + 1:
            self._second_s, self._received = now_s, 0
        self._received += 1
        if self._received > MESSAGES_PER_S:
            await trio.sleep_until(self._second_s + 1)
        elif not self._received % 64:
            await trio.lowlevel.checkpoint()

    async def _heartbeat(self) -> None:
        nonce = 0
        while not self.protocol.ended:
            with trio.move_on_after(self._heartbeat_s):
                await self._pinged.wait()
            if self.protocol.ended:
                return
            ping, self._unanswered = self._unanswered, None
            self._pinged = trio.Event()
            nonce += 1
            data = self.protocol.send(Pong(ping.nonce) if ping else Ping(nonce))
            # The receiver sees it too, and after what was still to be read.
            with contextlib.suppress(PeerError, MigrationError):
                await self.send(data)

    async def give_reason(self, reason: str) -> None:
        """Tells the peer why this side gives up, where the protocol still allows it. Bounded in time, never raises."""
        deadline = trio.current_time() + REASON_TIMEOUT_S
        # (What is suppressed: the peer is gone, and will conclude the same.)
        with trio.CancelScope(shield=True, deadline=deadline), contextlib.suppress(PeerError, MigrationError):
            if self.protocol.may_abort and not self._torn:
                await self.send(self.protocol.send(Abort(reason)))
        self.protocol.connection_lost(reason)

    async def close(self) -> None:
        """Closes so that the peer still gets what was sent last. Bounded in time. `run` must have ended."""
        # Closing a socket with unread bytes in it (a ping is enough) resets the connection, and a reset takes back what
        # the peer has not read yet. So: say that no more comes, and read until the peer says so too.
        broken, deadline = (trio.BrokenResourceError, trio.ClosedResourceError), trio.current_time() + REASON_TIMEOUT_S
        with trio.CancelScope(shield=True, deadline=deadline), contextlib.suppress(*broken):
            await self._stream.send_eof()
            while await self._stream.receive_some(64 * 1024):
                pass
        await trio.aclose_forcefully(self._stream)

    def _lost(self, error: trio.BrokenResourceError | trio.ClosedResourceError) -> PeerError | MigrationError:
        """The error of a lost connection: the peer's and the network's, or this host's (a closed descriptor, no
        memory)."""
        cause = error.__cause__
        reason = cause.strerror if isinstance(cause, OSError) else None
        if isinstance(error, trio.ClosedResourceError) or (
            isinstance(cause, OSError) and cause.errno not in NETWORK_ERRORS
        ):
            where = f"the control connection with {self.protocol.PEER}"
            return MigrationError(f"this host has lost {where}: {reason or 'it was closed here'}")
        return ConnectionLost(
            f"the control connection with {self.protocol.PEER} broke{f' ({reason})' if reason else ''}"
        )
