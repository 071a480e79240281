# SPDX-License-Identifier: Apache-2.0
"""One migration over the control connection: what may be said when, and who may run the machine.

Both objects are fed what arrived (`receive_data`, `receive_eof`), asked what it meant (`next_message`), and asked for
the bytes to send (`send`). They read and write nothing, so every cut, order and byte can be tried in a unit test.

**Who may run the machine.** The machine has one owner before a migration and another one after it, and the network may
fail in between. As in two-phase commit, the destination says `prepared` when nothing can fail any more on its side, and
the source decides by sending `commit`:

- The source may run the machine until it has *decided to send* `commit`, whether the bytes ever leave the host or not.
- The destination may run it once it has *received* `commit`, and not a byte earlier.

The first comes before the second, so `may_run` is never true at both ends, whatever the network cuts, delays or loses.
For a while neither may: `commit` was sent and has not arrived. The source is then PAUSED and keeps the memory. The
destination, which has said `prepared`, may not abort by itself, since its `abort` could cross the `commit`: it is
IN_DOUBT, and asks. `recovered` means that the source had decided; else the source tells that it has aborted. A
destination that gets no answer gives up, and never runs the machine.

**Rounds.** Before that decision is due the destination learns, while the machine runs at the source, which pages there
are (`page-map`), gets some of them, and is told which it has to forget since they have changed (`stale-map`). Each
`round` is answered by `round-done`. The beginning of the machine's state can come then, too (`early-state`). Nothing of
it moves the right to run the machine, and after `prepared` there is none.

**Recovery.** A connection that is lost after the commit ends nothing. The side that had connected connects again, with
the migration's id, its token and a higher epoch; `reconnected` puts the same object onto the new connection. The
destination says what it has (`received-map`, then `recover` with a digest over all of them), the source answers
`recovered`, and both go on where they were. A recovery may be cut anywhere, any number of times.

**The end of one side.** The other side cannot know of it. While its connection is lost, a peer that has proven who it
is can tell it how the migration has ended there (`peer_ended`). Two machines are possible in one way only: an operator
calls `reclaim` at the source although the destination lives; that one stops when it hears of it.

**Giving memory back.** A source that frees memory as it goes asks for `placed` in its offer. With `placed` the
destination promises to have these pages: the source may free them, and refuses a later `received-map` that lacks one.

`SOURCE` and `DESTINATION` are the tables of states. What may be received, how long it may be, and the tables in
docs/protocol.md, which has a diagram too, follow from them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import ClassVar, Final

from postcopy.errors import ProtocolError
from postcopy.wire import messages as m
from postcopy.wire.codec import MessageBuffer, encode, prepare
from postcopy.wire.messages import PROTOCOL_VERSION, Ended, Message, one_line


class State(enum.Enum):
    # In this order, up to CLOSING: how far a migration has come.
    SETUP = "setup"
    OFFERED = "offered"
    CHANNELS = "channels"  # accepted; data channels are being opened
    READY = "ready"  # all is there; the machine still runs at the source
    MAPS = "maps"  # maps of pages are on their way: of a round, or of the switchover
    ROUND = "round"  # the destination takes the maps of a round
    HANDED = "handed"  # the destination has the device state and loads it
    PREPARED = "prepared"
    COMMITTED = "committed"
    POSTCOPY = "postcopy"  # the machine runs at the destination
    CLOSING = "closing"  # every page has come
    # The connection was lost, and what came before is remembered.
    PAUSED = "paused"  # after commit
    IN_DOUBT = "in-doubt"  # destination: while it waited for commit
    RECOVER = "recover"  # connected again; the received maps are on their way
    RECOVERING = "recovering"  # the source has them and answers
    # The end.
    COMPLETED = "completed"
    ABORTED = "aborted"
    RECLAIMED = "reclaimed"  # source: taken back by its operator, who knows that the destination is dead


S = State
Table = Mapping[tuple[State, str], State]  # of a state and an event, the state that follows

_ORDER: Final = {state: number for number, state in enumerate(State)}
_BEFORE_PREPARED: Final = (S.SETUP, S.OFFERED, S.CHANNELS, S.READY, S.MAPS, S.ROUND, S.HANDED)
_BEFORE_COMMIT: Final = (*_BEFORE_PREPARED, S.PREPARED)

# What a side may receive is what the other one may send in the same state. That one may be further back when it sends:
# an abort crosses messages of ours on its way. But each state in which it could not have sent an abort any more begins
# with something that it has said.
_SAID_BY_SOURCE: Final[Table] = {
    (S.SETUP, "offer"): S.OFFERED,
    **{(state, f"{kind}-map"): S.MAPS for state in (S.READY, S.MAPS) for kind in ("page", "stale")},
    (S.READY, "early-state"): S.READY,
    (S.MAPS, "round"): S.ROUND,
    (S.MAPS, "switchover"): S.HANDED,
    (S.READY, "switchover"): S.HANDED,  # what had changed was told in a round just before
    (S.PREPARED, "commit"): S.COMMITTED,  # the point of no return
    (S.CLOSING, "complete-ack"): S.COMPLETED,
    (S.RECOVERING, "recovered"): S.COMMITTED,  # or POSTCOPY: see "go on" below
    **{(state, "abort"): S.ABORTED for state in _BEFORE_COMMIT},
}
_SAID_BY_DESTINATION: Final[Table] = {
    (S.OFFERED, "accept"): S.CHANNELS,
    (S.OFFERED, "reject"): S.ABORTED,
    (S.CHANNELS, "ready"): S.READY,
    (S.ROUND, "round-done"): S.READY,  # the machine runs on at the source
    (S.HANDED, "prepared"): S.PREPARED,
    (S.COMMITTED, "running"): S.POSTCOPY,
    (S.POSTCOPY, "placed"): S.POSTCOPY,  # only where the offer asked for it
    (S.POSTCOPY, "complete"): S.CLOSING,
    (S.RECOVER, "received-map"): S.RECOVER,
    (S.RECOVER, "recover"): S.RECOVERING,
    **{(state, "abort"): S.ABORTED for state in _BEFORE_PREPARED},
}

# Events that are no messages. They depend on how far the migration had come before the connection was lost.
_SOURCE_EVENTS: Final[Table] = {
    **{(state, "lost"): S.ABORTED for state in _BEFORE_COMMIT},
    (S.COMMITTED, "lost"): S.PAUSED,
    (S.POSTCOPY, "lost"): S.PAUSED,
    (S.CLOSING, "lost"): S.COMPLETED,  # the destination has every page: that `complete-ack` is lost changes nothing
    **{(state, f"peer {how}"): S.PAUSED for state in (S.COMMITTED, S.POSTCOPY) for how in Ended},
    (S.COMMITTED, "peer completed"): S.COMPLETED,
    (S.POSTCOPY, "peer completed"): S.COMPLETED,
    (S.COMMITTED, "peer aborted"): S.ABORTED,  # `commit` never arrived, and never will: the machine goes on here
    (S.COMMITTED, "go on"): S.COMMITTED,
    (S.POSTCOPY, "go on"): S.POSTCOPY,
}
_DESTINATION_EVENTS: Final[Table] = {
    **{(state, "lost"): S.ABORTED for state in _BEFORE_PREPARED},
    (S.PREPARED, "lost"): S.IN_DOUBT,
    (S.COMMITTED, "lost"): S.PAUSED,
    (S.POSTCOPY, "lost"): S.PAUSED,
    (S.CLOSING, "lost"): S.PAUSED,  # every page is here, but the source keeps them until it knows that
    (S.PREPARED, "given up"): S.ABORTED,
    (S.CLOSING, "given up"): S.COMPLETED,
    **{(S.PREPARED, f"peer {how}"): S.ABORTED for how in Ended},  # it has not run here
    **{(state, f"peer {how}"): S.PAUSED for state in (S.COMMITTED, S.POSTCOPY) for how in Ended},
    **{(S.CLOSING, f"peer {how}"): S.COMPLETED for how in Ended},
    # It runs at the source again, and must not run here any more.
    **{(state, "peer reclaimed"): S.ABORTED for state in (S.COMMITTED, S.POSTCOPY, S.CLOSING)},
    (S.PREPARED, "go on"): S.COMMITTED,  # for a destination in doubt, `recovered` is the commit
    (S.COMMITTED, "go on"): S.COMMITTED,
    (S.POSTCOPY, "go on"): S.POSTCOPY,
    (S.CLOSING, "go on"): S.POSTCOPY,  # `complete` has to be said again
}


def _table(sends: Table, receives: Table, events: Table) -> Table:
    return {
        **{(state, f"send {kind}"): after for (state, kind), after in sends.items()},
        **{(state, f"receive {kind}"): after for (state, kind), after in receives.items()},
        **events,
    }


SOURCE: Final = _table(_SAID_BY_SOURCE, _SAID_BY_DESTINATION, _SOURCE_EVENTS)
DESTINATION: Final = _table(_SAID_BY_DESTINATION, _SAID_BY_SOURCE, _DESTINATION_EVENTS)

LOST: Final = frozenset({S.PAUSED, S.IN_DOUBT})
_CONNECTED: Final = frozenset(state for state, _ in (*_SAID_BY_SOURCE, *_SAID_BY_DESTINATION))


def receivable(table: Table) -> dict[State, frozenset[str]]:
    """By state, the types of the messages that may come in it."""
    kinds = {state: {"ping", "pong"} for state in State}
    for state, event in table:
        verb, _, kind = event.partition(" ")
        if verb == "receive":
            kinds[state].add(kind)
    return {state: frozenset(kinds[state]) for state in State}


class _ControlProtocol:
    """What both sides share. Not thread-safe."""

    SIDE: ClassVar[str]
    PEER: ClassVar[str]
    TABLE: ClassVar[Table]
    RECEIVES: ClassVar[Mapping[State, frozenset[str]]]

    def __init__(self, version: int = PROTOCOL_VERSION) -> None:
        prepare()
        self.version = version  # as it was spoken in the handshake; may be set until the first message
        self._state = State.SETUP
        self._reached = State.SETUP  # how far it has come: of the states up to CLOSING the furthest one
        self._buffer = MessageBuffer()
        self._eof = False
        self._error: ProtocolError | None = None
        self._reason = ""
        self._placed_wanted = False  # the offer asked for `placed`
        self._state_bytes = 0  # that were told
        self.peer_said_why = False  # it has sent `abort` or `reject`: `reason` is its word
        self._no_way_back = False  # the peer has ended it, or the two do not agree
        self.must_announce = False  # the peer may wait for this side in vain, unless it learns of `ending`

    @property
    def state(self) -> State:
        return self._state

    @property
    def ended(self) -> bool:
        """Nothing more will happen on this connection."""
        return self._state not in _CONNECTED

    @property
    def reason(self) -> str:
        """Why the state is ABORTED, PAUSED or IN_DOUBT, as far as known; one line."""
        return self._reason

    @property
    def committed(self) -> bool:
        """The machine is the destination's, as far as this side knows."""
        return self._has_reached(State.COMMITTED) and self._state not in (State.ABORTED, State.RECLAIMED)

    @property
    def recoverable(self) -> bool:
        """The connection is lost, and a new one could go on: see `reconnected`."""
        return self._state in LOST and not self._no_way_back

    @property
    def peer_gone(self) -> bool:
        """PAUSED, and no connection will ever end that: the peer has given up what it had, or the two do not agree.
        What is left is up to an operator."""
        return self._state in LOST and self._no_way_back

    @property
    def may_run(self) -> bool:
        """Whether the machine may run on this side *now*. Never true at both ends."""
        return self.committed is (self.SIDE == "destination")

    @property
    def ending(self) -> Ended:
        """The answer to a peer that comes back later, if this side leaves the migration as it is now."""
        if self._state in (State.COMPLETED, State.RECLAIMED):
            return Ended(self._state.value)
        return Ended.LOST if self.committed else Ended.ABORTED

    # ---- receiving

    def receive_data(self, data: bytes) -> None:
        """Takes what has arrived. Afterwards call `next_message` until it returns None."""
        if data and not self.ended and self._error is None:
            self._buffer.feed(data)

    @property
    def unread(self) -> bool:
        """Whether there may be more for `next_message`."""
        return len(self._buffer) > 0

    def receive_eof(self) -> None:
        """The peer closed the connection. Takes effect when `next_message` has returned what came before."""
        self._eof = True

    def next_message(self) -> Message | None:
        """The next message, checked against the state, which it moves; None when more bytes are needed.

        What is malformed or not allowed now is a `ProtocolError`, again on each later call: this connection is then
        no longer understood; send `Abort` if that `may_abort`, and call `connection_lost`. In an ended state
        everything is ignored, since the peer may have sent it before it knew.
        """
        if self.ended:
            return None
        if self._error is not None:
            raise self._error
        try:
            self._buffer.version = self.version
            message = self._buffer.take(self.RECEIVES[self._state])
            if message is not None:
                self._move(message, "receive")
        except ProtocolError as error:
            self._error = error
            raise
        if isinstance(message, m.Abort | m.Reject | m.Complete | m.CompleteAck):
            self.must_announce = False  # the peer's last word
        if isinstance(message, m.Abort | m.Reject):
            self.peer_said_why = True
            self._reason = f"{self.PEER} {'aborted' if isinstance(message, m.Abort) else 'declined'}: {message.reason}"
        if message is None and self._eof:
            cut = " in the middle of a message" if len(self._buffer) else ""
            self.connection_lost(f"{self.PEER} closed the control connection{cut}")
        return message

    # ---- sending

    @property
    def may_abort(self) -> bool:
        return (self._state, "send abort") in self.TABLE

    def send(self, message: Message) -> bytes:
        """The bytes of a message, which moves the state. The point of no return is the *call* with `Commit`: from its
        return on `may_run` of the source is false, for ever. `ProtocolError` for what the state does not allow, and for
        an offer without bulk channels to a peer that needs one, a message that it does not know: see `version`."""
        if isinstance(message, m.Offer | m.Accept) and not message.bulk_channels and self.version < 3:
            raise ProtocolError(f"{self.PEER} speaks version {self.version}, which needs a bulk channel")
        data = encode(message, self.version)  # first: what cannot be encoded must not move the state
        self._move(message, "send")
        if isinstance(message, m.Abort | m.Reject):
            self._reason = message.reason
        return data

    # ---- what else happens

    def connection_lost(self, reason: str) -> State:
        """The connection has ended, or is given up: where that leaves this side. Harmless in an ended state."""
        if not self.ended:
            self._state = self.TABLE[self._reached, "lost"]
            self._reason = one_line(reason)
            self._buffer = MessageBuffer()
        return self._state

    def reconnected(self) -> None:
        """A new connection with the same peer is there; only while `recoverable`. What the old one held is void."""
        self._check_recoverable()
        self._state = State.RECOVER
        self._eof = False
        self._error = None

    def give_up(self, reason: str) -> State:
        """No other connection will come: IN_DOUBT becomes ABORTED, and PAUSED becomes COMPLETED where every page has
        come. Else a machine that is PAUSED stays so."""
        if self._state is State.IN_DOUBT:
            self._reason = one_line(reason)
        if self._state in LOST:
            self._state = self.TABLE.get((self._reached, "given up"), self._state)
        return self._state

    def peer_ended(self, how: Ended) -> State:
        """The peer has said and proven that the migration is over on its side: where that leaves this one. Only while
        the connection is lost (`recoverable` or `peer_gone`)."""
        if self._state not in LOST:
            raise ProtocolError(f"nothing to end in state {self._state.value}")
        self._state = self.TABLE[self._reached, f"peer {how}"]
        self.must_announce = False
        self._no_way_back = True
        self._reason = f"{self.PEER} says that the migration has ended there: {how}"
        return self._state

    def beyond_recovery(self, reason: str) -> State:
        """The two sides do not agree about what there is, and no other connection would change that. Only while
        `recoverable`; a destination IN_DOUBT is given up by it."""
        self._check_recoverable()
        self.give_up(reason)
        self._no_way_back = True
        self._reason = one_line(reason)
        return self._state

    # ---- private

    def _has_reached(self, state: State) -> bool:
        return _ORDER[self._reached] >= _ORDER[state]

    def _check_recoverable(self) -> None:
        if not self.recoverable:
            raise ProtocolError(f"nothing to recover in state {self._state.value}")

    def _move(self, message: Message, verb: str) -> None:
        if isinstance(message, m.Ping | m.Pong) and not self.ended:
            return
        after = self.TABLE.get((self._state, f"{verb} {message.TYPE}"))
        said = "sent" if verb == "send" else "received"
        if after is None:
            raise ProtocolError(f"{message.TYPE} must not be {said} by the {self.SIDE} in state {self._state.value}")
        if self.version < message.SINCE:
            raise ProtocolError(f"{message.TYPE} must not be {said}: version {self.version} is spoken, which has none")
        if isinstance(message, m.Placed) and not self._placed_wanted:
            raise ProtocolError(f"placed must not be {said} by the {self.SIDE}: the offer did not ask for it")
        if isinstance(message, m.EarlyState | m.Switchover):
            if self._state_bytes + len(message.state) > m.MAX_STATE_BYTES:
                raise ProtocolError(f"{message.TYPE} must not be {said}: the state has more than 16 MiB with it")
            self._state_bytes += len(message.state)
        if isinstance(message, m.Offer):
            self._placed_wanted = bool(message.placed_every_ms)
        elif isinstance(message, m.Switchover):
            self.must_announce = True  # the destination has it all, and may be prepared
        elif isinstance(message, m.Recover) and message.resume_ns and self._reached is State.COMMITTED:
            self._reached = State.POSTCOPY  # the machine runs there, though `running` was lost
        elif isinstance(message, m.Recovered):
            after = self.TABLE[self._reached, "go on"]
        self._state = after
        if _ORDER[self._reached] < _ORDER[after] <= _ORDER[S.CLOSING]:
            self._reached = after


class SourceProtocol(_ControlProtocol):
    """The control connection as the source sees it."""

    SIDE = "source"
    PEER = "the destination"
    TABLE = SOURCE
    RECEIVES = receivable(SOURCE)

    def reclaim(self) -> State:
        """The operator, who knows that the destination is dead, lets the machine go on here from the switchover.
        Only while PAUSED; final. Should the destination live, there are two machines until it learns of that: whenever
        it comes back, it is answered so (`ending`)."""
        if self._state is not State.PAUSED:
            raise ProtocolError(f"nothing to reclaim in state {self._state.value}")
        self._state = State.RECLAIMED
        self.must_announce = True
        self._reason = "taken back at the source"
        return self._state


class DestinationProtocol(_ControlProtocol):
    """The control connection as the destination sees it."""

    SIDE = "destination"
    PEER = "the source"
    TABLE = DESTINATION
    RECEIVES = receivable(DESTINATION)

    def every_page_is_here(self) -> None:
        """Nothing is missing any more, though the source does not know: `give_up` then means COMPLETED. Only of
        a machine that runs here."""
        self._reached = State.CLOSING
