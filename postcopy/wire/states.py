# SPDX-License-Identifier: Apache-2.0
"""The control protocol, without a socket: bytes in, messages out, and who may run the machine.

Nothing here reads, writes or waits. A handshake opens a connection, a `SourceProtocol` or a `DestinationProtocol` then
carries one migration over the control connection. They are fed what arrived (`receive_data`, `receive_eof`), asked
what it meant (`next_message`), and asked for the bytes to send (`send_*`, each of which returns them). So everything
that can go wrong between two hosts can be tried in a unit test: every cut, every order, every byte.

**Who may run the machine.** That is what this module is really about. A migration has one dangerous moment: the
machine has one owner before it, another one after it, and the network may fail in the middle. The rule is as old as
two-phase commit. The destination says `prepared` when nothing can go wrong any more on its side; the source then
*decides*, and its decision is the message `commit`:

- The source may run the machine until it has *decided to send* `commit`: `send_commit` gives the right away before it
  returns the bytes, whether they ever leave the host or not.
- The destination may run it once it has *received* `commit`, and not a byte earlier.

Those two events are ordered by causality, so `may_run` is never true at both ends, whatever the network cuts,
delays or loses. What remains possible is that neither may, for a while: `commit` was sent and has not arrived. No
protocol can exclude that (the two generals); it has names here. The source is `PAUSED`, keeps the machine's memory and
says so aloud. The destination, having said `prepared`, may no longer abort by itself, since an `abort` could meet the
`commit` on its way: it is `IN_DOUBT`, and asks. The source's answer is either `recovered`, which means that it had
decided, or that the migration has ended there, so it had not. One that nobody answers gives up, and never runs it.

**Recovery.** A connection that is lost behind the point of no return ends nothing. The side that had connected connects
again, with the migration's id and token and a higher *epoch*; `reconnected` puts the same protocol object onto the new
connection. The destination tells what it has (`received-map`, a digest over all of them in `recover`), the source
answers `recovered`, and both go on where they were. Whatever else comes on the way (another cut, at any byte) leads
back to where it began, any number of times. An epoch is used once: who brings an old one is refused.

**When it has ended on one side only.** The other one cannot know; so each side, while its connection is lost, can be
told how it has ended over there (`peer_ended`): by somebody who has proven to be the peer, since it may end a machine
here, or start one. What a side has to tell is its `ending`. There is one way to two machines, and it needs an operator:
`reclaim` lets the source go on from the switchover, for which the destination has to be dead. One that is not stops
when it hears of it. What else is left to operators is listed in docs/protocol.md, and an exploration of all states in
the unit tests shows that there is nothing more.

**Giving memory back.** A source that wants to free memory as it goes asks for it in the offer (`placed_every_ms`). The
destination then says in `placed`, while the machine runs there, what has become known since it last said so. That is a
promise: the source may free these pages, and a `received-map` that lacks one of them later is refused. A `placed` that
is lost costs nothing but time, since a recovery tells everything anew; nothing is ever acknowledged twice as a duty.

States of the source (s: it sends, r: it receives)::

    SETUP --s offer--> OFFERED --r accept--> CHANNELS --r ready--> READY
                                                                     | s page-map
      before COMMITTED: s abort, r abort or reject,              SWITCHOVER  (s page-map, again and again)
      or the connection lost --> ABORTED                             | s switchover
      (the machine runs on here)                                  HANDED
                                                                     | r prepared
    - - - - - - - - - - - - - - - - - - - - - - - - - - - -       PREPARED
      from here on never again here                                  | s commit      <- point of no return
                                                                 COMMITTED
      connection lost --> PAUSED                                     | r running
                            |   ^                                POSTCOPY    (r placed, again and again)
                reconnected |   | connection lost                    | r complete
                            v   |                                 CLOSING --s complete-ack--> COMPLETED
                          RECOVER  (r received-map, again and again)
                            | r recover
                       RECOVERING --s recovered--> COMMITTED, or POSTCOPY when `recover` said that the machine runs

The destination's are the same with s and r exchanged, and the line that divides them lies at *r commit*. Its
connection lost in PREPARED means IN_DOUBT, from where *r recovered* is worth a *r commit*. Lost in CLOSING it is PAUSED
too: every page is here, but the source does not know it yet; `give_up` makes COMPLETED of that, and ABORTED of
IN_DOUBT. `reclaim` makes RECLAIMED of the source's PAUSED.

**Trust.** Whoever can connect can send anything. A message is length-prefixed, so its length is checked before its
first byte is kept: against what may come in this state, and against its type as soon as that is there. How deep it is,
and of how many parts, is measured before one of them is made; and it is turned into a frozen dataclass only when each
field is there, has its type and lies in its range. Whatever a peer sends, nothing but `ProtocolError` (or, when it
refused or hung up, `PeerError`) leaves this module, and after that the connection takes no more.

**Versions.** Each field knows the versions that have it; the handshake finds out which one is spoken. From 3 on what a
peer says beyond that is ignored.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import ClassVar, Final, TypeVar

from postcopy.errors import ProtocolError
from postcopy.wire.codec import MessageBuffer, encode
from postcopy.wire.messages import (
    PROTOCOL_VERSION,
    Abort,
    Accept,
    Commit,
    Complete,
    CompleteAck,
    Ended,
    Message,
    Offer,
    Ping,
    Placed,
    Pong,
    Recover,
    Recovered,
    Reject,
    Running,
    Switchover,
    one_line,
)


class State(enum.Enum):
    SETUP = "setup"
    OFFERED = "offered"
    CHANNELS = "channels"  # accepted; data channels are being opened
    READY = "ready"  # all is there; the machine still runs at the source
    SWITCHOVER = "switchover"  # paused; the page maps are on their way
    HANDED = "handed"  # the destination has the device state and loads it
    PREPARED = "prepared"
    COMMITTED = "committed"
    POSTCOPY = "postcopy"  # the machine runs at the destination
    CLOSING = "closing"  # every page has come
    COMPLETED = "completed"
    PAUSED = "paused"  # connection lost after commit
    IN_DOUBT = "in-doubt"  # destination: connection lost while it waited for commit
    RECOVER = "recover"  # connected again; the received maps are on their way
    RECOVERING = "recovering"  # the source has them and answers
    ABORTED = "aborted"
    RECLAIMED = "reclaimed"  # source: taken back by its operator, who knows that the destination is dead


Moves = Mapping[str, State]
S = State

_SOURCE_SENDS: Final[Mapping[State, Moves]] = {
    S.SETUP: {"offer": S.OFFERED, "abort": S.ABORTED},
    S.OFFERED: {"abort": S.ABORTED},
    S.CHANNELS: {"abort": S.ABORTED},
    S.READY: {"page-map": S.SWITCHOVER, "abort": S.ABORTED},
    S.SWITCHOVER: {"page-map": S.SWITCHOVER, "switchover": S.HANDED, "abort": S.ABORTED},
    S.HANDED: {"abort": S.ABORTED},
    S.PREPARED: {"commit": S.COMMITTED, "abort": S.ABORTED},
    S.CLOSING: {"complete-ack": S.COMPLETED},
    S.RECOVERING: {"recovered": S.COMMITTED},  # or POSTCOPY, see _move
}
_DESTINATION_SENDS: Final[Mapping[State, Moves]] = {
    S.SETUP: {"abort": S.ABORTED},
    S.OFFERED: {"accept": S.CHANNELS, "reject": S.ABORTED, "abort": S.ABORTED},
    S.CHANNELS: {"ready": S.READY, "abort": S.ABORTED},
    S.READY: {"abort": S.ABORTED},
    S.SWITCHOVER: {"abort": S.ABORTED},
    S.HANDED: {"prepared": S.PREPARED, "abort": S.ABORTED},
    S.COMMITTED: {"running": S.POSTCOPY},
    S.POSTCOPY: {"placed": S.POSTCOPY, "complete": S.CLOSING},  # `placed` only where the offer asked for it
    S.RECOVER: {"received-map": S.RECOVER, "recover": S.RECOVERING},
}
# What a side may receive is what the other one may send in the same state. That one may be further back when it sends:
# an abort crosses messages of ours on its way. But each state in which it could not have sent an abort any more begins
# with something that it has said.
_AFTER_COMMIT: Final = frozenset(
    {S.COMMITTED, S.POSTCOPY, S.CLOSING, S.COMPLETED, S.PAUSED, S.RECOVER, S.RECOVERING}
)  # in the last two a destination may still be in doubt
_LOST: Final = frozenset({S.PAUSED, S.IN_DOUBT})
_ENDED: Final = frozenset({S.COMPLETED, S.ABORTED, S.RECLAIMED}) | _LOST
_ANY_STATE: Final = frozenset({"ping", "pong"})

M = TypeVar("M", bound=Message)


class _ControlProtocol:
    """What both sides share. Not thread-safe."""

    SIDE: ClassVar[str]
    _SENDS: ClassVar[Mapping[State, Moves]]
    _RECEIVES: ClassVar[Mapping[State, Moves]]
    _LOST: ClassVar[Mapping[State, State]]  # where a lost connection leads, when it is not ABORTED

    def __init__(self, version: int = PROTOCOL_VERSION) -> None:
        self.version = version  # as it was spoken in the handshake; may be set until the first message
        self._state = State.SETUP
        self._buffer = MessageBuffer()
        self._eof = False
        self._error: ProtocolError | None = None
        self._reason = ""
        self._in_doubt = False  # destination: `commit` may have been sent, and has not come
        self._complete_said = False  # destination: every page is here, and `complete` has been sent at least once
        self._placed_wanted = False  # the offer asked for `placed`
        self._machine_runs = False  # at the destination: `running` has been said, or `recover` with it
        self._decided = False  # `commit` has been sent, or heard
        self._no_way_back = False  # the peer has given up, or cannot be gone on with
        self._untold = False

    @property
    def state(self) -> State:
        return self._state

    @property
    def ended(self) -> bool:
        """Nothing more will happen on this connection."""
        return self._state in _ENDED

    @property
    def reason(self) -> str:
        """Why the state is ABORTED, PAUSED or IN_DOUBT, as far as known; one line."""
        return self._reason

    @property
    def committed(self) -> bool:
        """Behind the point of no return, as far as this side knows."""
        return self._state in _AFTER_COMMIT and not self._in_doubt

    @property
    def recoverable(self) -> bool:
        """The connection is lost, and a new one could go on: see `reconnected`."""
        return self._state in _LOST and not self._no_way_back

    @property
    def peer_gone(self) -> bool:
        """PAUSED, and no connection will ever end that: the peer has said that it has given up what it had, or the two
        cannot agree. What is left is up to an operator."""
        return self._state in _LOST and self._no_way_back

    @property
    def may_run(self) -> bool:
        """Whether the machine may run on this side *now*. Never true at both ends."""
        raise NotImplementedError

    # ---- receiving

    def receive_data(self, data: bytes) -> None:
        """Takes what has arrived. Afterwards call `next_message` until it returns None."""
        if data and not self.ended and self._error is None:
            self._buffer.feed(data)

    def receive_eof(self) -> None:
        """The peer closed the connection. Takes effect when `next_message` has returned what came before."""
        self._eof = True

    def next_message(self) -> Message | None:
        """The next message, checked against the state, which it moves; None when more bytes are needed.

        What is malformed or not allowed now is a `ProtocolError`, again on each later call: this connection is then
        no longer understood; say `send_abort` if that `may_abort`, and `connection_lost`. In an ended state
        everything is ignored, since the peer may have sent it before it knew.
        """
        if self.ended:
            return None
        if self._error is not None:
            raise self._error
        try:
            self._buffer.version = self.version
            message = self._buffer.take(self._RECEIVES.get(self._state, {}).keys() | _ANY_STATE)
            if message is not None:
                self._move(message, self._RECEIVES, "received")
                if isinstance(message, Abort | Reject | Complete | CompleteAck):
                    self._untold = False
                if isinstance(message, Abort | Reject):
                    self._reason = (
                        f"{self._peer()} {'aborted' if isinstance(message, Abort) else 'declined'}: {message.reason}"
                    )
        except ProtocolError as error:
            self._error = error
            raise
        if message is None and self._eof:
            cut = " in the middle of a message" if len(self._buffer) else ""
            self.connection_lost(f"{self._peer()} closed the control connection{cut}")
        return message

    def connection_lost(self, reason: str) -> State:
        """The connection has ended, or is given up: where that leaves this side. Harmless in an ended state."""
        if not self.ended:
            self._state = State.IN_DOUBT if self._in_doubt else self._LOST.get(self._state, State.ABORTED)
            self._in_doubt = self._state is State.IN_DOUBT
            self._reason = one_line(reason)
            self._buffer = MessageBuffer()
        return self._state

    def reconnected(self) -> None:
        """A new connection with the same peer is there; only while `recoverable`. What the old one held is void."""
        if not self.recoverable:
            raise ProtocolError(f"nothing to recover in state {self._state.value}")
        self._state = State.RECOVER
        self._eof = False
        self._error = None

    def give_up(self, reason: str) -> State:
        """Nobody will connect again: what IN_DOUBT comes to is ABORTED, and PAUSED where every page has come COMPLETED.
        A machine that is PAUSED stays so."""
        if self._state is State.IN_DOUBT:
            self._state, self._in_doubt = State.ABORTED, False
            self._reason = one_line(reason)
        elif self._state is State.PAUSED and self._complete_said:
            self._state = State.COMPLETED
        return self._state

    def peer_ended(self, how: Ended) -> State:
        """The peer has said and proven that the migration is over on its side: where that leaves this one. Only while
        the connection is lost (`recoverable` or `peer_gone`). A machine that is the destination's ends nowhere by that,
        unless the source has been told to run it again."""
        if self._state not in _LOST:
            raise ProtocolError(f"nothing to end in state {self._state.value}")
        self._state = self._after_peer(how)
        self._in_doubt = self._untold = False
        self._no_way_back = True
        self._reason = f"{self._peer()} says that the migration has ended there: {how}"
        return self._state

    def beyond_recovery(self, reason: str) -> State:
        """The two sides do not agree about what there is, and no other connection would change that. Only while
        `recoverable`; a destination IN_DOUBT is given up by it."""
        if not self.recoverable:
            raise ProtocolError(f"nothing to recover in state {self._state.value}")
        self.give_up(reason)
        self._no_way_back = True
        self._reason = one_line(reason)
        return self._state

    @property
    def untold(self) -> bool:
        """Whether the peer may believe something else than `ending`, and wait for it, unless it is told."""
        return self._untold

    @property
    def ending(self) -> Ended:
        """What the peer is to be told when it comes back later, if this side leaves the migration as it is now."""
        raise NotImplementedError

    def _after_peer(self, how: Ended) -> State:
        raise NotImplementedError

    # ---- sending

    @property
    def may_abort(self) -> bool:
        return "abort" in self._SENDS.get(self._state, {})

    def send(self, message: Message) -> bytes:
        """The bytes of a message, which moves the state. The point of no return is the *call* with `Commit`: from its
        return on `may_run` of the source is false, for ever. `ProtocolError` for what the state does not allow, and for
        an offer without bulk channels to a peer that needs one: see `version`."""
        if isinstance(message, Offer | Accept) and not message.bulk_channels and self.version < 3:
            raise ProtocolError(f"{self._peer()} speaks version {self.version}, which needs a bulk channel")
        data = encode(message, self.version)  # first: what cannot be encoded must not move the state
        self._move(message, self._SENDS, "sent")
        if isinstance(message, Abort | Reject):
            self._reason = message.reason
        elif isinstance(message, Complete):
            self._complete_said = True
        return data

    # ---- private

    def _move(self, message: Message, table: Mapping[State, Moves], verb: str) -> None:
        if isinstance(message, Ping | Pong) and not self.ended:
            return
        after = table.get(self._state, {}).get(message.TYPE)
        if after is None:
            raise ProtocolError(f"{message.TYPE} must not be {verb} by the {self.SIDE} in state {self._state.value}")
        if isinstance(message, Placed) and not self._placed_wanted:
            raise ProtocolError(f"placed must not be {verb} by the {self.SIDE}: the offer did not ask for it")
        if isinstance(message, Offer):
            self._placed_wanted = bool(message.placed_every_ms)
        if isinstance(message, Running) or (isinstance(message, Recover) and message.resume_ns):
            self._machine_runs = True
        elif isinstance(message, Recovered):
            self._in_doubt = False
            self._decided = True
            if self._machine_runs:
                after = State.POSTCOPY
        if isinstance(message, Commit):
            self._decided = True
        if isinstance(message, Switchover):
            self._untold = True  # it has been handed over, and may be prepared
        self._state = after

    def _peer(self) -> str:
        return "the destination" if self.SIDE == "source" else "the source"


class SourceProtocol(_ControlProtocol):
    """The control connection as the source sees it."""

    SIDE = "source"
    _SENDS = _SOURCE_SENDS
    _RECEIVES = _DESTINATION_SENDS
    _LOST: ClassVar[Mapping[State, State]] = {
        S.COMMITTED: S.PAUSED,
        S.POSTCOPY: S.PAUSED,
        S.RECOVER: S.PAUSED,
        S.RECOVERING: S.PAUSED,
        S.CLOSING: S.COMPLETED,  # the destination has every page: that our acknowledgement is lost changes nothing
    }

    @property
    def may_run(self) -> bool:
        return self._state not in _AFTER_COMMIT

    def reclaim(self) -> State:
        """The operator, who knows that the destination is dead, lets the machine go on here from the switchover.
        Only while PAUSED; final. Should the destination live, there are two machines until it hears of it: it must be
        told, whenever it comes back (`ending`)."""
        if self._state is not State.PAUSED:
            raise ProtocolError(f"nothing to reclaim in state {self._state.value}")
        self._state = State.RECLAIMED
        self._untold = True
        self._reason = "taken back at the source"
        return self._state

    @property
    def ending(self) -> Ended:
        if self._state is State.RECLAIMED:
            return Ended.RECLAIMED
        if self._state is State.COMPLETED:
            return Ended.COMPLETED
        return Ended.ABORTED if self.may_run else Ended.LOST

    def _after_peer(self, how: Ended) -> State:
        if how is Ended.COMPLETED:
            return State.COMPLETED
        if how is Ended.ABORTED and not self._machine_runs:
            return State.ABORTED  # `commit` was never heard, and never will be: the machine goes on here
        return State.PAUSED


class DestinationProtocol(_ControlProtocol):
    """The control connection as the destination sees it."""

    SIDE = "destination"
    _SENDS = _DESTINATION_SENDS
    _RECEIVES = _SOURCE_SENDS
    _LOST: ClassVar[Mapping[State, State]] = {
        S.PREPARED: S.IN_DOUBT,
        S.COMMITTED: S.PAUSED,
        S.POSTCOPY: S.PAUSED,
        S.RECOVER: S.PAUSED,
        S.RECOVERING: S.PAUSED,
        S.CLOSING: S.PAUSED,  # every page is here, but the source keeps them until it knows that
    }

    @property
    def may_run(self) -> bool:
        return self.committed

    @property
    def ending(self) -> Ended:
        if self._state is State.COMPLETED:
            return Ended.COMPLETED
        return Ended.LOST if self._decided else Ended.ABORTED

    def _after_peer(self, how: Ended) -> State:
        if self._state is State.IN_DOUBT or how is Ended.RECLAIMED:
            return State.ABORTED  # it has not run here; or it runs at the source again, and must not run here any more
        return State.COMPLETED if self._complete_said else State.PAUSED

    def every_page_is_here(self) -> None:
        """Nothing is missing any more, though the source could not be told yet: `give_up` then means COMPLETED."""
        self._complete_said = True
