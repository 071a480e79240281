# SPDX-License-Identifier: Apache-2.0
"""What the engines of both sides do alike: the life of a connection, and the way to the next one.

A migration is one connection after the other. Each has a plan (`FirstFailure`'s main task) and watchers, and when it
has ended the engine of the side *settles* where that leaves the machine. If the protocol can go on from there, the
peer is looked for:

- for as long as the user's patience lasts (`Patience`; a destination in doubt has one of its own). What comes after it
  is not the end: a machine that is `PAUSED` is kept, whoever comes to the side that listens is welcome, and `recover`
  has the peer looked for again.
- A recovery that fails tells its reconnector nothing, whose pauses go on growing; only one that succeeds does.
- What can never succeed is found out and ends the looking: a core that cannot go on, an answer that proves that the
  migration has ended over there, two sides that disagree about what was acknowledged. The status says so (`peer_gone`),
  the machine is kept.

Error handling: nothing that happens to a migration leaves `run`, whatever it is (`_session.FirstFailure`).
"""

from __future__ import annotations

import abc
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import ClassVar, Generic

import trio

from postcopy._blocking import Workers
from postcopy._log import about
from postcopy.errors import ConfigurationError, MigrationError, PeerError, PostcopyError, ProtocolError
from postcopy.migration._session import (
    STEERABLE,
    Control,
    FirstFailure,
    Interrupted,
    P,
    Patience,
    Recoveries,
    explained,
    first_of,
    now_ns,
    status_of,
)
from postcopy.net import Address, CallingLink, Link, Reconnector, Session
from postcopy.wire import Ended, EndedElsewhere, State

log = logging.getLogger(__name__)

ANNOUNCE_FOR_S = 60.0
SHOWN_OUT_S = 1.0
"""Pause after a peer that is back and cannot be gone on with, before the next one is let in."""
WORKERS = 3
"""Threads that each migration has for its blocking calls: the plan, what runs beside it, and one more."""

Plan = Callable[[Control[P], Link], Awaitable[None]]


PEER_SAYS_WHY_S = 0.2
"""A peer that gives up says why on its control connection and closes the others, which may be heard first."""


class Hopeless(PostcopyError):
    """No other connection would help."""


class Disagreement(ProtocolError):
    """The two sides do not know the same about the migration. Twice in a row, they never will."""


@contextlib.contextmanager
def disagreeing() -> Iterator[None]:
    """What is wrong inside, in messages that have come undamaged, is a `Disagreement`."""
    try:
        yield
    except ProtocolError as error:
        raise Disagreement(str(error)) from error


class Engine(abc.ABC, Generic[P]):
    """One migration, seen from one side."""

    SIDE: ClassVar[str]
    PEER: ClassVar[str]

    def __init__(
        self,
        protocol: P,
        link: Link | None,
        *,
        heartbeat_s: float,
        recover_for_s: float,
        on_change: Callable[[], None],
    ) -> None:
        self.machine_name = ""
        self.failure: PostcopyError | None = None
        self.paused = trio.Event()  # set when the peer was lost behind the point of no return, the first time
        self.over = False  # there is no connection, and none is looked for
        self.recoveries = Recoveries()
        self.started_ns = now_ns()
        self._protocol: P = protocol
        self._link = link
        self._heartbeat_s = heartbeat_s
        self._patience = Patience(recover_for_s)
        self._told_change = on_change
        self._changed = trio.Event()
        self._session: Session | None = None
        self._reconnector: Reconnector | None = None
        self._cancelled = trio.Event()
        self._stop = trio.Event()  # that of `run`
        self._scope = FirstFailure()
        self._hopeless: PostcopyError | None = None  # why no other connection would help
        self._disagreed: Disagreement | None = None  # twice, and nobody has wanted it tried again
        self._gone_for: Ended | None = None  # how the migration has ended for the peer, as far as it has said so
        self._look_again = trio.Event()
        self._lost_ns = 0
        self._probing = False  # source: the peer is looked for once more although nothing may come of it

    # ---- looking at it

    @property
    def state(self) -> State:
        return self._protocol.state

    @property
    @abc.abstractmethod
    def migration_id(self) -> str:
        """In hexadecimal digits; empty until it is known."""

    @property
    def connecting(self) -> bool:
        """There has been no connection yet."""
        return self._link is None

    @property
    def status(self) -> str:
        """QEMU's word for the state."""
        return status_of(
            self.state,
            interrupted=isinstance(self.failure, Interrupted),
            connecting=self.connecting,
            hopeless=self._gone,
        )

    @property
    def _gone(self) -> bool:
        """No other connection would help, as far as is known."""
        return self._protocol.peer_gone or self._disagreed is not None

    @property
    def may_run(self) -> bool:
        """Whether this side owns the machine."""
        return self._protocol.may_run

    @property
    @abc.abstractmethod
    def cancellable(self) -> bool:
        """Whether giving it up now would lose nothing."""

    # ---- steering it

    def cancel(self) -> bool:
        """Gives it up if it is `cancellable`, and says whether it was: then it will not be decided any more. Unlike
        `stop`, which ends it in any case, it does nothing to a migration that has been decided."""
        if not self.cancellable:
            return False
        self._cancelled.set()
        return True

    def set_recover_for(self, recover_for_s: float) -> None:
        """How long a peer is looked for that is lost, or has been."""
        self._patience.set(recover_for_s)

    def pause(self) -> None:
        """Gives the connection up, as a network that fails would, and takes no other one until `recover`.
        `MigrationError` where nothing could be gone on with."""
        self._steered().pause()

    def recover(self, address: Address | None = None) -> None:
        """Looks for the peer (again), at this address where one is given (see `reconnect_to`), also when it was given
        up: for as long as one that has just been lost. `MigrationError` where that would be in vain."""
        reconnector = self._steered()
        if address is not None:
            self.reconnect_to(address)
        self._again(reconnector)

    def reconnect_to(self, address: Address) -> None:
        """The peer is looked for there when the connection is lost, or at once when it has been. A connection that
        works is left alone. `ConfigurationError` on the side that listens."""
        if self._link is None:
            raise ConfigurationError("there has been no connection yet: cancel it, and migrate to the other address")
        self._link.reconnect_to(address)

    def _again(self, reconnector: Reconnector) -> None:
        for patience in self._patiences():
            if patience.begun:
                patience.begin()
        self.over, self._disagreed = False, None
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

    # ---- the life of a connection

    def _change(self) -> None:
        """`status`, or what it depends on, may have changed."""
        self._changed.set()
        self._changed = trio.Event()
        try:
            self._told_change()
        except Exception:
            log.exception("whoever follows this migration has made a mistake; it goes on")

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _check_wanted(self) -> None:
        """Raises what has ended this connection, or will as soon as the tasks that noticed have been heard. Call it in
        one step with the decision that depends on it."""
        if self._scope.failure is not None:
            raise self._scope.failure
        if self._stop.is_set():
            raise Interrupted(f"interrupted at the {self.SIDE}")
        if self._cancelled.is_set():
            raise Interrupted(f"cancelled at the {self.SIDE}")

    async def _connected(self, link: Link, plan: Plan[P]) -> None:
        """The life of one connection: follows the plan, and settles where its end has left the machine."""
        control = Control(link.control, self._protocol, self._heartbeat_s)
        scope = self._scope = FirstFailure()
        self.failure = None
        ended = False

        async def main() -> None:
            await plan(control, link)

        async def interruption() -> None:
            await self._stop.wait()
            raise Interrupted(f"interrupted at the {self.SIDE}")

        async def cancellation() -> None:
            await self._cancelled.wait()
            if not self.cancellable:
                await trio.sleep_forever()
            raise Interrupted(f"cancelled at the {self.SIDE}")

        try:
            await scope.run(main, control.run, interruption, cancellation, self._replaced, *self._watchers(control))
            ended = True
        finally:
            if self._protocol.state is not State.COMPLETED:
                where = "interrupted" if ended else "ended"
                self.failure = scope.failure or Interrupted(f"{where} at the {self.SIDE}")
                if isinstance(self.failure, Hopeless):
                    self._hopeless = self.failure
            with trio.CancelScope(shield=True):  # each step of it is bounded
                await self._contained(self._settle, control)
                await self._contained(control.close, fatal=False)
            if self._hopeless is not None and self._protocol.recoverable:
                self.failure = self._hopeless
                self._protocol.beyond_recovery(str(self._hopeless))
                log.error("this cannot be recovered: %s", self._hopeless)
            if self._protocol.state is State.COMPLETED:
                self.failure = None  # every page is there: that nobody hears our last word changes nothing
            self._change()

    async def _let_peer_say_why(self) -> None:
        """A data connection has ended, which may be all that the peer could do to make an end before the decision."""
        if not self._protocol.committed:
            await trio.sleep(PEER_SAYS_WHY_S)

    async def _replaced(self) -> None:
        await self._until(lambda: self._reconnector is not None)
        assert self._reconnector is not None
        await self._reconnector.superseded()
        raise PeerError(f"the {self.PEER} has come back on another connection")

    @abc.abstractmethod
    def _watchers(self, control: Control[P]) -> Sequence[Callable[[], Awaitable[None]]]:
        """Tasks beside the plan."""

    @abc.abstractmethod
    async def _settle(self, control: Control[P]) -> None:
        """A connection has ended, of `failure` or because all is done. Shielded; bounded in time."""

    async def _contained(self, function: Callable[..., Awaitable[None]], *args: object, fatal: bool = True) -> None:
        """What must be done whatever else fails. `fatal`: when it fails itself, there is no going on from there."""
        try:
            await function(*args)
        except Exception as error:  # noqa: BLE001  # `explained` logs what it does not know
            what = explained(error)
            log.error("%s", what)
            if fatal:
                self._hopeless = self._hopeless or what
                self.failure = self.failure or what

    # ---- the way to the next connection

    def _patiences(self) -> list[Patience]:
        return [self._patience]

    def _patience_now(self) -> Patience:
        """The one that counts in the present state."""
        return self._patience

    @abc.abstractmethod
    async def _go_on(self, control: Control[P], link: Link) -> None:
        """The plan of a connection after the first one."""

    async def _recover(self) -> None:
        """Goes on with the peer, as often as it takes; returns when nothing is to be gone on with."""
        self._lost_ns = now_ns()
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
                self._lost_ns = now_ns()
                disagreed = ""
                for patience in self._patiences():
                    patience.end()
            elif isinstance(self.failure, Disagreement):
                if str(self.failure) == disagreed and self._protocol.recoverable:
                    self._disagreed = self.failure
                    log.error("this cannot be recovered: twice: %s", disagreed)
                disagreed = str(self.failure)

    def _recovered(self) -> None:
        """All channels are there again."""
        assert self._reconnector is not None
        self.recoveries.add(now_ns() - self._lost_ns)
        self._reconnector.went_on()
        log.warning("recovered: the %s is back after %.0f ms", self.PEER, self.recoveries.last_ns / 1e6)
        self._change()

    async def _look(self) -> tuple[Link, Session] | None:
        """The next connection; None when there is nothing to be gone on with any more."""
        reconnector = self._reconnector
        assert reconnector is not None
        found: list[tuple[Link, Session]] = []

        async def come() -> None:
            found.append(await reconnector.next_link())

        async def settled() -> None:  # by somebody else: reclaimed
            await self._until(lambda: self._protocol.state not in (State.PAUSED, State.IN_DOUBT))

        while not self._stop.is_set():
            gone = self._gone
            if gone and not self.over and not self._keep_on():
                return None
            waits: list[Callable[[], Awaitable[object]]] = [self._stop.wait, settled, self._look_again.wait]
            if not gone:
                waits += self._while_lost()
            if self._gone_for is None and (not self.over or not self._calls or self._probing):
                waits.append(come)
            if not self.over:
                patience = self._patience_now()
                if not patience.begun:
                    patience.begin()
                waits.append(patience.run_out)
            again = self._look_again
            try:
                await first_of(*waits)
            except EndedElsewhere as error:
                self._gone_for = error.how
                self.failure = error
                await self._ended_elsewhere(error)
                self._change()
                if self._protocol.state is not State.PAUSED:
                    return None
            except Exception as error:  # noqa: BLE001  # `explained` logs what it does not know
                self._doom(explained(error))
            except BaseException:  # cancelled in the moment in which somebody came
                for link, _ in found:
                    link.control.socket.close()
                raise
            if found and self._protocol.recoverable and not self._gone:
                self.over = False
                return found[0]
            for link, _ in found:  # it is there, and cannot be gone on with
                link.control.socket.close()
            if not self._protocol.recoverable and not self._protocol.peer_gone:
                return None
            if found:
                found.clear()
                reconnector.answered.set()
                await trio.sleep(SHOWN_OUT_S)
            elif not (self.over or again.is_set() or self._gone or self._stop.is_set() or self._keep_on()):
                return None
        return None

    def _keep_on(self) -> bool:
        """Nobody is looked for any more. Whether the machine is kept, and whoever comes is welcome."""
        self.over = True
        keep = self._give_up()
        self._change()
        return keep

    def _doom(self, error: PostcopyError) -> None:
        """No other connection would help."""
        self.failure = self._hopeless = error
        if self._protocol.recoverable:
            self._protocol.beyond_recovery(str(error))
        log.error("this cannot be recovered: %s", error)
        self._change()

    def _while_lost(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """Tasks beside the looking."""
        return ()

    @abc.abstractmethod
    def _give_up(self) -> bool:
        """Nobody is looked for any more, of `failure`. Whether the machine is kept, and whoever comes is welcome."""

    @abc.abstractmethod
    async def _ended_elsewhere(self, error: EndedElsewhere) -> None:
        """The peer has proved that the migration has ended there."""

    # ---- beginning and end

    @property
    def _calls(self) -> bool:
        """Whether it is this side that connects."""
        return isinstance(self._link, CallingLink)

    def _open_workers(self) -> Workers:
        """`ResourceError` when this host has no threads left: before anything has begun, it costs nothing."""
        return Workers.open(WORKERS, f"pc-migr-{self.SIDE[:4]}", "a migration")

    async def announce(self) -> None:
        """Tells the peer how the migration has ended here, where that may not know it and would not come and ask: on
        the side that connects. For a minute at most (less if less is the time that a lost peer is looked for), or until
        it has heard it. After `run`; the machine is not needed for it. Cancellable."""
        if self._reconnector is None or not self._calls or not self._protocol.must_announce:
            return
        with about(self), trio.move_on_after(min(ANNOUNCE_FOR_S, self._patience.seconds)):
            await self._reconnector.announce(self._protocol.ending)
