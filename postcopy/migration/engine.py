# SPDX-License-Identifier: Apache-2.0
"""One migration, seen from one side: what the source's and the destination's engine do alike.

A migration is one connection after the other. Each has a plan (the main task of `tasks.FirstFailure`) and tasks that
watch beside it; when it has ended the engine sees to where that leaves the machine. If the protocol can go on from
there, the peer is looked for:

- for `recover_for_s` (a destination in doubt has a time of its own). After that it is called no more, but a
  machine that is `PAUSED` is kept, the side that listens still lets its peer in, and `recover` searches again;
- a recovery that fails does not reset the growing pauses between attempts (`Reconnector.went_on`);
- a failure that no other connection would mend ends the search, and the machine is kept: a data plane that cannot go
  on, a proof that the migration has ended at the peer, the same disagreement twice. The status is `postcopy-failed`.

The engine owns the control connection, the data plane (`Pager` or `PageServer`) and a few threads for blocking calls
until `run` returns; the machine is the caller's at the source, and the engine's at the destination.

Error handling: `run` raises nothing that belongs to the migration: `state`, `failure` and `status` say how it ended.
Cancelling `run` is an interruption by the user.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import trio

from postcopy._blocking import Workers
from postcopy._log import about
from postcopy.dataplane._base import DataPlane
from postcopy.dataplane._events import Event, EventType
from postcopy.dataplane.recorder import Recorder
from postcopy.errors import (
    ConfigurationError,
    ConnectionLost,
    MigrationError,
    PeerError,
    PostcopyError,
    ResourceError,
)
from postcopy.migration.connection import LAST_LOOK_S, NETWORK_ERRORS, Control, P, data_silence_s
from postcopy.migration.maps import Disagreement
from postcopy.migration.statistics import Breakdown, Recoveries, Statistics
from postcopy.migration.tasks import FirstFailure, Interrupted, explained, first_of, now_ns
from postcopy.net import Address, CallingLink, Link, OpenChannels, Reconnector, Session, keep_alive
from postcopy.tls import PeerCertificate
from postcopy.wire import Ended, EndedElsewhere, RefusedError, State
from postcopy.wire.states import LOST

log = logging.getLogger(__name__)

ANNOUNCE_FOR_S = 60.0
REFUSED_PAUSE_S = 1.0
"""Pause after a connection with which the migration cannot continue, before the next one is let in."""
WORKERS = 3
"""Threads that each migration has for its blocking calls: the plan, what runs beside it, and one more."""
PEER_SAYS_WHY_S = 0.2
"""A peer that gives up says why on its control connection, and closes the others, which may be noticed first."""

STEERABLE = frozenset({State.COMMITTED, State.POSTCOPY, State.PAUSED, State.IN_DOUBT, State.RECOVER, State.RECOVERING})
"""States in which a connection may be given up without giving up the migration."""

D = TypeVar("D", bound=DataPlane)
Plan = Callable[[Control[P], Link], Awaitable[None]]


class Unrecoverable(PostcopyError):
    """No other connection would help."""


class ChannelLost(ConnectionLost):
    """A data channel has ended: of a network that fails, or because the peer gives up."""


def channel_down(event: Event, peer: str) -> PostcopyError:
    """What a data channel that has ended means. What came on it and made no sense, or what this host lacks, is a reason
    that the peer's operator needs, too, and another connection would only repeat it."""
    channel = f"data channel ({event.channel_kind.name.lower()} {event.channel})"
    text = f"a {channel} broke: {event.text}" if event.text else f"{peer} closed a {channel}"
    return (ChannelLost if not event.error or event.error in NETWORK_ERRORS else MigrationError)(text)


class Engine(abc.ABC, Generic[P, D]):
    """Make it, `run` it once; everything else may be looked at meanwhile."""

    SIDE: ClassVar[str]
    attempt = 1
    """Of its owner, who may have begun it again: see `may_try_again`."""

    def __init__(
        self,
        protocol: P,
        link: Link | None,
        peer: Address,
        *,
        heartbeat_s: float,
        recover_for_s: float,
        on_change: Callable[[], None],
    ) -> None:
        self.machine_name = ""
        # Whether its owner begins it again, now that it has ended: see `may_try_again`. It is `connecting` until then.
        self.is_begun_again: Callable[[], bool] = lambda: False
        self.peer = peer
        # Who the peer is (`Link.identity`), and its certificate where there is one: of the newest connection.
        self.identity = ""
        self.certificate: PeerCertificate | None = None
        self.failure: PostcopyError | None = None
        self.paused = trio.Event()  # set when the peer was lost behind the point of no return, the first time
        self.over = False  # there is no connection, and none is looked for
        self.recoveries = Recoveries()
        self.started_ns = now_ns()
        self.committed_ns = self.running_ns = self.completed_ns = self.ended_ns = 0  # when; 0: not yet
        self.iteration = 0  # rounds of precopy that were begun
        self.breakdown = Breakdown()  # of the downtime; the peer's parts when the migration has completed
        self._protocol: P = protocol
        self._link = link
        self._heartbeat_s = heartbeat_s
        self._recover_for_s = recover_for_s
        self._searching_since_s: float | None = None
        self.recorder: Recorder | None = None  # see `record`
        self._on_change = on_change
        self._changed = trio.Event()
        self._data: D | None = None  # from the offer accepted to the end
        self._counted = Statistics()  # by the data plane, as it was last looked at
        self._precopy_bytes: int | None = None  # transferred before the commit
        self._session: Session | None = None
        self._reconnector: Reconnector | None = None
        self._stack = contextlib.ExitStack()  # of the reconnector
        self._reachable = False  # the peer may come back
        self._cancelled = trio.Event()
        self._stop = trio.Event()  # that of `run`
        self._scope = FirstFailure()  # of the present connection
        self._disagreed = False  # twice in the same way, and `recover` was not called since
        self._probing = False  # source: the peer is looked for once more although nothing may come of it
        self._look_again = trio.Event()
        self._lost_ns = 0  # when the loss was noticed that is not recovered from

    # ---- looking at it

    @property
    def state(self) -> State:
        return self._protocol.state

    @property
    def migration_id(self) -> str:
        """In hexadecimal digits; empty until it is known."""
        return self._session.migration.hex() if self._session is not None else ""

    @property
    def connecting(self) -> bool:
        """There has been no connection yet."""
        return self._link is None

    @property
    def status(self) -> str:
        """QEMU's word (MigrationStatus) for the state. Ours are `connecting`, `in-doubt`, `reclaimed`, and
        `postcopy-failed`: paused, and no connection would help."""
        state = self.state
        if state is State.ABORTED and self.is_begun_again():
            return "connecting"
        if state is State.ABORTED:
            return "cancelled" if isinstance(self.failure, Interrupted) else "failed"
        if state is State.SETUP and self.connecting:
            return "connecting"
        if state is State.PAUSED and self._unrecoverable:
            return "postcopy-failed"
        return STATUS.get(state) or str(state.value)

    @property
    def _unrecoverable(self) -> bool:
        """No other connection would help, as far as is known."""
        return self._protocol.peer_gone or self._disagreed

    @property
    def may_run(self) -> bool:
        """Whether this side owns the machine."""
        return self._protocol.may_run

    @property
    def cancellable(self) -> bool:
        """Whether giving it up now would lose nothing."""
        return self._protocol.may_abort

    @property
    def may_try_again(self) -> bool:
        """It has ended, undecided, since a connection was lost, and for no other reason: the machine is as it was."""
        how = self.failure.how if isinstance(self.failure, EndedElsewhere) else None
        lost = isinstance(self.failure, ConnectionLost) or how is Ended.ABORTED
        return self.state is State.ABORTED and lost and not self.cancelled

    @property
    def cancelled(self) -> bool:
        """`cancel` has said that it gives it up, perhaps when it had failed already, and that was being dealt with."""
        return self._cancelled.is_set()

    def statistics(self) -> Statistics:
        """What has been counted; the last numbers when the data plane has ended."""
        if self._data is not None:
            self._counted = self._count(self._data)
        counted = self._counted
        if counted.precopy_bytes is None and (transferred := counted.transferred_bytes) is not None:
            precopy = transferred if self._precopy_bytes is None else self._precopy_bytes
            counted = replace(counted, precopy_bytes=precopy, postcopy_bytes=transferred - precopy)
        return counted

    def _count_precopy(self) -> None:
        """Now, at the commit."""
        if self._precopy_bytes is None and self._data is not None:
            self._precopy_bytes = self._count(self._data).transferred_bytes

    @abc.abstractmethod
    def _count(self, data: D) -> Statistics: ...

    def record(self, recorder: Recorder | None = None) -> None:
        """Before `run`: what happens is recorded over time, by this one where it has begun to."""
        self.recorder = recorder or Recorder.open()

    def _mark(self, what: str, text: str = "", *, at_ns: int | None = None, begins: bool = False) -> None:
        if self.recorder is not None:
            self.recorder.mark(what, text, at_ns=at_ns, begins=begins)

    def _begin_detail(self) -> None:
        """What follows is recorded in full detail."""
        if self.recorder is not None:
            self.recorder.begin()

    # ---- steering it

    def cancel(self) -> bool:
        """Gives it up if it is `cancellable`, and returns whether it was: then it will not be decided any more. Unlike
        `stop`, which ends it in any case, it does nothing to a migration that has been decided."""
        if not self.cancellable:
            return False
        self._cancelled.set()
        return True

    def set_recover_for(self, recover_for_s: float) -> None:
        """How long a peer is looked for that is lost, or has been."""
        self._recover_for_s = recover_for_s
        self._wake()

    def pause(self) -> None:
        """Gives the connection up, as a network that fails would, and takes no other one until `recover`.
        `MigrationError` where the migration could not continue later."""
        self._steered().pause()

    def recover(self, address: Address | None = None, tls_hostname: str | None = None) -> None:
        """Looks for the peer (again), at this address where one is given (see `reconnect_to`), also when it was given
        up: for as long as one that has just been lost. `MigrationError` where that would be in vain."""
        reconnector = self._steered()
        if address is not None:
            self.reconnect_to(address, tls_hostname)
        self._search_again(reconnector)

    def reconnect_to(self, address: Address, tls_hostname: str | None = None) -> None:
        """The peer is looked for there when the connection is lost, or at once when it has been. A connection that
        works is left alone. `tls_hostname`: what its certificate must name from then on. `ConfigurationError` on the
        side that listens."""
        if self._link is None:
            raise ConfigurationError("there has been no connection yet: cancel it, and migrate to the other address")
        self._link.reconnect_to(address, tls_hostname)

    def _search_again(self, reconnector: Reconnector) -> None:
        self._searching_since_s = None
        self.over = self._disagreed = False
        self._look_again.set()
        self._look_again = trio.Event()
        reconnector.recover()

    def _steered(self) -> Reconnector:
        if self._protocol.peer_gone:
            raise MigrationError(f"no other connection would help this migration: {self.failure}")
        if self._reconnector is None or self.state not in STEERABLE:
            raise MigrationError(
                "only a migration past its point of no return, and not at its end, can lose its connection"
            )
        return self._reconnector

    # ---- beginning and end

    async def _run(self, stop: trio.Event, plan: Plan[P]) -> None:
        """All of it, until `stop`; `plan` is that of the first connection."""
        self._stop = stop
        with about(self):
            try:
                try:
                    workers = Workers.open(WORKERS, f"pc-migr-{self.SIDE[:4]}", "a migration")
                except ResourceError as error:  # nothing has begun: the peer gets the reason, where there is one
                    if self._link is not None:
                        await self._connected(self._link, partial(_refuse, error))
                    raise
                try:
                    with workers.serving():
                        await self._converse(plan)
                finally:
                    await workers.close()
            except Exception as error:  # noqa: BLE001  # `explained` logs what it does not know
                # Nothing below lets an error out that belongs to a connection: this is of the beginning or the end.
                self.failure = self.failure or explained(error)
                log.error("%s", self.failure)
                self._protocol.connection_lost(str(self.failure))
            finally:
                self.over, self.ended_ns = True, now_ns()
                self._mark("ended", self.status, at_ns=self.ended_ns)
                self._change()

    async def _converse(self, plan: Plan[P]) -> None:
        """One connection after the other."""
        try:
            link = await self._connect()
            if link is None:
                return
            with self._stack:
                try:
                    self._reachable = True
                    await self._connected(link, plan)
                    await self._recover()
                finally:
                    self._reachable = False
                    if self._protocol.give_up(str(self.failure)) is State.COMPLETED:
                        self.failure = None  # every page is here: whether the peer knows changes nothing
                    if self._reconnector is not None:
                        self._reconnector.ended(self._protocol.ending)
        finally:
            await self._close_data()

    async def _connect(self) -> Link | None:
        """The first connection; None when there is none, and `failure` says why."""
        return self._link

    async def _close_data(self) -> None:
        """After the last connection."""

    def _join(self, link: Link, session: Session) -> None:
        """From here on the peer may come back on another connection. `PeerError` when the migration is known here."""
        self._session = session
        self._reconnector = self._stack.enter_context(link.reconnector(session))
        self._change()

    async def announce(self) -> None:
        """Tells the peer how the migration has ended here, where that may not know it: calls it, for a minute at most
        (less if less is the time that a lost peer is looked for), or waits until it comes (the acceptor must be
        served). Returns when the peer knows. After `run`; the machine is not needed for it. Cancellable."""
        if self._reconnector is None or not self._protocol.must_announce:
            return
        for_s = min(ANNOUNCE_FOR_S, self._recover_for_s) if self._calls else math.inf
        with about(self), trio.move_on_after(for_s):
            await self._reconnector.announce(self._protocol.ending)

    @property
    def _calls(self) -> bool:
        """Whether it is this side that connects."""
        return isinstance(self._link, CallingLink)

    def _change(self) -> None:
        """`status`, or what it depends on, may have changed."""
        self._wake()
        try:
            self._on_change()
        except Exception:
            log.exception("the callback of this migration's owner failed; the migration goes on")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    async def _contained(self, function: Callable[..., Awaitable[None]], *args: object) -> PostcopyError | None:
        """Does what must be tried whatever else fails. Returns the error, after logging it."""
        try:
            await function(*args)
        except Exception as error:  # noqa: BLE001  # `explained` logs what it does not know
            failure = explained(error)
            log.error("%s", failure)
            return failure
        return None

    # ---- the life of a connection

    async def _connected(self, link: Link, plan: Plan[P]) -> None:
        """The life of one connection: follows the plan, and sees to the machine when it has ended."""
        control: Control[P] = Control(link.control, self._protocol, self._heartbeat_s)
        self.identity, self.certificate = link.identity, link.certificate
        self._protocol.receive_data(link.received)
        scope = self._scope = FirstFailure()
        self.failure = None
        ended = False

        async def main() -> None:
            await plan(control, link)

        watchers = (control.run, self._interruption, self._superseded, self._watch_data, *self._watchers(control))
        try:
            await scope.run(main, *watchers)
            ended = True
        finally:
            with trio.CancelScope(shield=True):  # each step of it is bounded
                problem = None
                if self._protocol.state is not State.COMPLETED:
                    where = "interrupted" if ended else "ended"
                    self.failure = scope.failure or Interrupted(f"{where} at the {self.SIDE}")
                    if isinstance(self.failure, ConnectionLost) and self._protocol.peer_said_why:
                        self.failure = PeerError(self._protocol.reason)
                    problem = await self._contained(self._after_connection, control, self.failure)
                    if isinstance(scope.failure, Unrecoverable):
                        problem = scope.failure
                await self._contained(control.close)
            if problem is not None and self._protocol.recoverable:
                self._fail_for_good(problem)
            if self._protocol.state is State.COMPLETED:
                self.failure = None  # every page is there: that the peer misses our last message changes nothing
            self._change()

    async def _after_connection(self, control: Control[P], failure: PostcopyError) -> None:
        """A connection has ended of `failure`. Shielded; bounded in time."""
        self._lost_ns = self._lost_ns or now_ns()
        await self._take_back()
        if isinstance(failure, ChannelLost):  # the control connection ends without a word, too: it may be tried again
            self._protocol.connection_lost(str(failure))
        else:
            await control.give_reason(str(failure))
        if self._protocol.recoverable:
            self._mark("lost", str(failure))
            await self._suspend()

    async def _take_back(self) -> None:
        """Where the machine may run here it does, before the peer gets the reason."""

    @abc.abstractmethod
    async def _suspend(self) -> None:
        """The peer is lost behind the point of no return, or in doubt: everything is kept as it is."""

    @abc.abstractmethod
    def _watchers(self, control: Control[P]) -> Sequence[Callable[[], Awaitable[None]]]:
        """Tasks beside the plan."""

    def _check_wanted(self) -> None:
        """Raises what has ended this connection, or will as soon as the tasks that noticed it have run. Call it in one
        step with the decision that depends on it."""
        if self._scope.failure is not None:
            raise self._scope.failure
        if self._stop.is_set():
            raise Interrupted(f"interrupted at the {self.SIDE}")
        if self._cancelled.is_set():
            raise Interrupted(f"cancelled at the {self.SIDE}")

    async def _interruption(self) -> None:
        async def cancelled() -> None:
            await self._cancelled.wait()
            if not self.cancellable:  # it was decided in the meantime
                await trio.sleep_forever()

        await first_of(self._stop.wait, cancelled)
        self._check_wanted()

    async def _superseded(self) -> None:
        await self._until(lambda: self._reconnector is not None)
        assert self._reconnector is not None
        await self._reconnector.superseded()
        raise PeerError(f"{self._protocol.PEER} has come back on another connection")

    async def _watch_data(self) -> None:
        await self._until(lambda: self._data is not None)
        assert self._data is not None
        async for event in self._data.events():
            self._note(event)
            if event.type is EventType.CHANNEL_DOWN and self._needs(event):
                if not self._protocol.committed:  # it may be all that the peer could do to end it before the decision
                    for within_s in (PEER_SAYS_WHY_S, LAST_LOOK_S):
                        await trio.sleep(within_s)
                raise channel_down(event, self._protocol.PEER)

    def _needs(self, event: Event) -> bool:
        """Whether the channel that went down is still needed."""
        return True

    def _note(self, event: Event) -> None:
        """Takes note of what the data plane reports; raises what ends the connection."""
        if event.type is EventType.FATAL:
            raise Unrecoverable(f"the {self._data.NAME if self._data else 'core'} cannot go on: {event.text}")

    async def _attach(
        self,
        open_channels: OpenChannels,
        shards: int,
        bulk_channels: int,
        attach_urgent: Callable[..., None],
        attach_bulk: Callable[..., None],
    ) -> None:
        """Gives the data plane its connections."""
        try:
            channels = await open_channels(shards, bulk_channels)
        except RefusedError:
            raise
        except PeerError as error:
            raise ConnectionLost(str(error)) from error
        try:
            for (kind, index), channel in channels.items():
                keep_alive(channel.fd, data_silence_s(kind, self._heartbeat_s))
                fd, tls = channel.detach()
                (attach_urgent if kind == "urgent" else attach_bulk)(index, fd, tls=tls)
        finally:
            for channel in channels.values():
                channel.close()  # those that were not given away

    async def _disconnect(self, data: D) -> None:
        """Ends the data channels, of which no end may be taken for that of the next ones."""
        await data.disconnect()
        for event in data.drain_events():
            if event.type is not EventType.DIED:  # another process has taken over
                self._note(event)

    # ---- the way to the next connection

    def _search_for_s(self) -> float:
        """How long the peer is looked for in the present state."""
        return self._recover_for_s

    async def _search_ends(self) -> None:
        while True:
            if self._searching_since_s is None:  # it begins, or begins anew
                self._searching_since_s = trio.current_time()
            left_s = self._searching_since_s + self._search_for_s() - trio.current_time()
            if left_s <= 0:
                return
            with trio.move_on_after(left_s):
                await self._changed.wait()

    @abc.abstractmethod
    async def _go_on(self, control: Control[P], link: Link) -> None:
        """The plan of a connection after the first one."""

    async def _recover(self) -> None:
        """Continues with the peer, as often as it takes; returns when the migration cannot continue."""
        disagreed = ""
        while self._protocol.recoverable or self._protocol.peer_gone:
            found = await self._look()
            if found is None:
                return
            link, self._session = found
            self.peer = link.peer
            self._protocol.reconnected()
            self._change()
            recovered = self.recoveries.count
            await self._connected(link, self._go_on)
            if self.recoveries.count > recovered:
                disagreed = ""
                self._searching_since_s = None
            elif isinstance(self.failure, Disagreement):
                if str(self.failure) == disagreed and self._protocol.recoverable:
                    self._disagreed = True
                    log.error("this cannot be recovered, both sides disagreed twice in the same way: %s", disagreed)
                disagreed = str(self.failure)

    def _recovered(self) -> None:
        """All channels are there again."""
        assert self._reconnector is not None
        self._mark("recovered", begins=True)
        self.recoveries.add(now_ns() - self._lost_ns)
        self._lost_ns = 0
        self._reconnector.went_on()
        log.warning("recovered: %s is back after %.0f ms", self._protocol.PEER, self.recoveries.last_ns / 1e6)
        self._change()

    async def _look(self) -> tuple[Link, Session] | None:
        """The next connection; None when the migration cannot continue."""
        reconnector = self._reconnector
        assert reconnector is not None
        found: list[tuple[Link, Session]] = []

        async def come() -> None:
            found.append(await reconnector.next_link())

        async def reclaimed() -> None:
            await self._until(lambda: self.state not in LOST)

        while not self._stop.is_set():
            if self._unrecoverable and not self.over and not self._stop_looking():
                return None
            waits: list[Callable[[], Awaitable[object]]] = [self._stop.wait, reclaimed, self._look_again.wait]
            if not self._unrecoverable:
                waits += self._while_lost()
            has_ended = isinstance(self.failure, EndedElsewhere)  # at the peer, which will not come
            if not has_ended and (not self.over or not self._calls or self._probing):
                waits.append(come)
            if not self.over:
                waits.append(self._search_ends)
            again, first = self._look_again, None
            try:
                first = await first_of(*waits)
            except EndedElsewhere as error:
                if self.state in LOST:  # it was not reclaimed in this moment
                    self.failure = error
                    await self._ended_elsewhere(error, self._protocol.peer_ended(error.how))
                    self._change()
            except Exception as error:  # noqa: BLE001  # `explained` logs what it does not know
                if self.state in LOST:
                    self._fail_for_good(explained(error))
            except BaseException:  # cancelled in the moment in which the peer came
                for link, _ in found:
                    link.control.socket.close()
                raise
            if found and self._protocol.recoverable and not self._unrecoverable:
                self.over = False
                return found[0]
            for link, _ in found:  # the peer is there, and the migration cannot continue
                link.control.socket.close()
            if self.state not in LOST:
                return None
            if found:
                found.clear()
                reconnector.answered.set()
                await trio.sleep(REFUSED_PAUSE_S)
            elif first == self._search_ends and not again.is_set() and not self._stop_looking():
                return None
        return None

    def _stop_looking(self) -> bool:
        """The peer is called no more. Whether the machine is kept, and the peer let in if it comes by itself."""
        self.over = True
        until = "until this is ended" if self._protocol.peer_gone else "until it is back, or this is ended"
        keep = self._peer_lost(until)
        self._change()
        return keep

    @abc.abstractmethod
    def _peer_lost(self, until: str) -> bool:
        """The peer is looked for no more, because of `failure`. Whether the machine is kept, `until` what (to log)."""

    def _fail_for_good(self, error: PostcopyError) -> None:
        """No other connection would help."""
        self.failure = error
        if self._protocol.recoverable:
            self._protocol.beyond_recovery(str(error))
        log.error("this cannot be recovered: %s", error)
        self._change()

    def _while_lost(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """Tasks beside the looking."""
        return ()

    @abc.abstractmethod
    async def _ended_elsewhere(self, error: EndedElsewhere, state: State) -> None:
        """The peer has proved that the migration has ended there, which leads this side to `state`."""


async def _refuse(error: PostcopyError, control: Control[Any], link: Link) -> None:
    raise error


STATUS = {
    state: word
    for word, states in {
        "setup": (State.SETUP, State.OFFERED, State.CHANNELS),
        "active": (State.READY, State.MAPS, State.ROUND, State.HANDED, State.PREPARED),
        "postcopy-active": (State.COMMITTED, State.POSTCOPY, State.CLOSING),
        "postcopy-paused": (State.PAUSED,),
        "postcopy-recover": (State.RECOVER, State.RECOVERING),
    }.items()
    for state in states
}
"""QEMU's words for states, where they are not those of the state; see `Engine.status`."""
