# SPDX-License-Identifier: Apache-2.0
"""The one owner of a process's machines and their migrations. What it does with them is a policy, a subclass:
`source.Source` sends one machine away, `destination.Destination` receives one, `daemon.Daemon` has any number of them,
comes and goes.

The owner has a table of machines (`machines`), each with its present or last migration and one `Phase`. An image that
is sent to several destinations has a row for each. Here is what all policies need: listening, a migration in either
direction, the settings that may be changed meanwhile, what is shown. `control.ControlHandler` answers for any of them.

**The end.** `stop` asks for it (`Stop`). A migration that is not decided is given up; so is one by which nothing is
lost that cannot be had again (`Owned.loses`). Any other one is seen through (`see_through`), however long that takes,
unless it is asked for again and so insisted on.

Resource handling: a policy's `run` closes the machines that it owns, however it ends.
Error handling: an error that ends a policy is kept in `failure`, and raised when the result has been emitted.
"""

from __future__ import annotations

import abc
import contextlib
import enum
import logging
import math
import os
import secrets
import shlex
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import trio

from postcopy._files import absolute, check_new_file, explain_unwritable
from postcopy._stop import INSIST_S, Stop
from postcopy.dataplane.pager import Pager
from postcopy.errors import (
    ConfigurationError,
    MigrationError,
    PeerError,
    PostcopyError,
    known_error,
    out_of_memory,
)
from postcopy.machines import BlockLayout, Machine, MachineState
from postcopy.machines.kinds import HostOptions, create_destination
from postcopy.memory import workingset
from postcopy.memory.bitmap import Bitmap
from postcopy.migration import salvage
from postcopy.migration.ahead import Ahead
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.precopy import Mode
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.migration.tasks import Interrupted, first_of, now_ns
from postcopy.net import LOCAL, Acceptor, Address, Asking, CallingLink, Link, Protection, Route, everywhere
from postcopy.output import Output
from postcopy.output.words import format_count
from postcopy.records import Record
from postcopy.records.events import Listening, SideResult
from postcopy.service import report
from postcopy.service._attempts import Attempts
from postcopy.service._contain import contained, contained_call
from postcopy.service.config import ArrivalOptions
from postcopy.service.options import record, sending
from postcopy.service.report import Json, Migration
from postcopy.units import format_size
from postcopy.wire import ID_BYTES, State

Row = tuple[str, Machine | None, Migration | None]
Request = Callable[[Json], Awaitable[Record]]

OVER = frozenset({State.COMPLETED, State.ABORTED, State.RECLAIMED})
_NO_END = frozenset({"connecting", "setup", "active"})
"""Statuses that cannot be the last one: what ends there has failed."""

SALVAGE_AGAIN_S = 5.0
"""Pause before a salvage that could not be written is tried again."""

log = logging.getLogger(__name__)


class Phase(enum.Enum):
    """What is being done with a machine."""

    STARTING = "started"
    HERE = "here"  # nothing
    LEAVING = "moved"
    ARRIVING = "received"
    ENDING = "ended"
    GONE = "gone"  # not in the table any more


class Owned:
    """A machine that is here, on its way to here, or on its way from here."""

    def __init__(self, name: str, phase: Phase, machine: Machine | None = None) -> None:
        self.name = name
        self.phase = phase
        self.machine = machine  # once it is this process's
        self.peer = ""  # who has connected for it (`Link.identity`)
        self.offered_bytes = 0  # its memory, where it was sent here
        self.migration: Migration | None = None  # the present one, or the last
        self.sending: SourceOptions | None = None  # how it was sent away last
        self.attempts: Attempts | None = None  # of a migration that calls its destination
        self.stop = trio.Event()  # gives the migration up, whatever is lost by it
        self.unwanted = False  # an operator ends it: nothing of it is to run on
        self.announced = ""  # the migration's status, as it was last announced

    @property
    def shown(self) -> Machine | None:
        """The machine, also while it arrives."""
        if self.machine is None and isinstance(self.migration, DestinationMigration):
            return self.migration.machine
        return self.machine

    @property
    def busy(self) -> bool:
        """Whether a task works on it."""
        return self.phase not in (Phase.HERE, Phase.GONE)

    @property
    def moving(self) -> Migration | None:
        """The migration that a task works on."""
        return self.migration if self.phase in (Phase.LEAVING, Phase.ARRIVING) else None

    @property
    def undecided(self) -> Migration | None:
        """... and that has not come to its end."""
        return self.moving if self.moving is not None and self.moving.state not in OVER else None

    @property
    def has_left(self) -> bool:
        return isinstance(self.migration, SourceMigration) and self.migration.state is State.COMPLETED

    @property
    def pushing(self) -> bool:
        """Whether its pages are pushed to another host."""
        job = self.undecided
        if not isinstance(job, SourceMigration):
            return False
        early = self.sending is not None and self.sending.mode is not Mode.POSTCOPY
        return job.state in (State.COMMITTED, State.POSTCOPY) or (early and job.ready_ns > 0 and not job.committed_ns)

    def set_sending(self, given: Json) -> None:
        """What can be changed of how the migration under way sends, `given` by the fields' names. `MigrationError`
        where it does not (any more)."""
        job = self.undecided
        if not isinstance(job, SourceMigration) or self.sending is None:
            raise MigrationError(f"{self.name} is not on its way from here: it is its source that sends in rounds")
        if "push_after_s" in given:
            job.set_push_after(given["push_after_s"])
            self.sending = replace(self.sending, push_after_s=given["push_after_s"])
        changed = {name: given[name] for name in ("max_downtime_s", "precopy_s") if name in given}
        if "max_downtime_s" in changed and not job.mode.has_rounds:
            raise MigrationError(
                f"--max-downtime goes with --precopy: the migration of {self.name} is of mode {job.mode}"
            )
        if changed and job.paused_ns:
            raise MigrationError(f"the precopy of {self.name} is over: its migration is {job.status}")
        if "precopy_s" in changed:
            job.set_precopy(changed["precopy_s"])
        if "max_downtime_s" in changed:
            job.set_max_downtime(changed["max_downtime_s"])
        self.sending = replace(self.sending, **changed)

    @property
    def finishing(self) -> bool:
        """Whether its migration has come to its end, and something of it has not been closed yet."""
        job = self.moving
        return job is not None and (job.state in OVER or (isinstance(job, DestinationMigration) and job.complete))

    @property
    def lost(self) -> bool:
        """Whether it was sent to a host that does not answer any more."""
        return self.phase is Phase.LEAVING and self.migration is not None and self.migration.state is State.PAUSED

    @property
    def decided(self) -> bool:
        """Whether its migration is past its point of no return, and not at its end."""
        job = self.undecided
        return job is not None and not job.cancellable

    @property
    def tries_for_s(self) -> float:
        """How long its migration, which has been lost before the machine had left, is begun again; 0: it is not."""
        job, attempts = self.migration, self.attempts
        if attempts is None or job is None or self.sending is None or self.stop.is_set():
            return 0.0
        if self.phase is not Phase.LEAVING or job.state is not State.ABORTED or job.cancelled:
            return 0.0
        if attempts.in_vain(_paused_s(job)):
            return 0.0
        return attempts.left_s(job.failure, job.may_try_again, not job.connecting, self.sending.recover_for_s)

    @property
    def is_begun_again(self) -> bool:
        """Whether its migration has ended, and another attempt follows."""
        return self.tries_for_s > 0

    def cancel(self) -> bool:
        """Gives its migration up, also between two attempts. False: that cannot be done any more, or there is none."""
        if self.is_begun_again:
            self.stop.set()
            return True
        return self.undecided is not None and self.undecided.cancel()

    @property
    def loses(self) -> str:
        """What would be lost if it ended now, and could not be had again; empty when nothing would. An image is still
        a file at its source; a machine that has failed does not run anywhere."""
        machine, job = self.shown, self.migration
        if machine is None or self.has_left or not machine.live or _is_dead(machine):
            return ""
        if job is None or job.state in OVER or job.cancellable:
            # (a process of its own runs on)
            return "the machine runs only here" if self.machine is not None and not machine.outlives else ""
        return still_missing(job)

    @property
    def stays(self) -> str:
        """As what a machine that is a process of its own stays here when this process ends: its state; empty for all
        others."""
        machine = self.machine
        if machine is None or not machine.outlives or self.has_left or _is_dead(machine):
            return ""
        return machine.statistics().state.value


def _paused_s(job: Migration) -> float:
    """For how long an attempt to send a machine away, which has ended, had paused it."""
    paused_ns = job.paused_ns if isinstance(job, SourceMigration) and job.state is State.ABORTED else 0
    return ((job.ended_ns or now_ns()) - paused_ns) / 1e9 if paused_ns else 0.0


def _is_dead(machine: Machine) -> bool:
    """Whether it has failed, or was closed."""
    try:
        return machine.statistics().state is MachineState.FAILED
    except trio.ClosedResourceError:
        return True


def describe(machine: Machine) -> str:
    """As ``kvm, 256 MiB, 2 vCPUs, workload random``."""
    config, words = machine.config(), [machine.kind, format_size(machine.memory_bytes)]
    if "workload" in config:
        words += [format_count(config["vcpus"], "vCPU"), f"workload {config['workload']}"]
    return ", ".join(words)


def still_missing(job: Migration) -> str:
    """What a migration past its point of no return is not at its end for."""
    if isinstance(job, SourceMigration):
        lost = "is lost, and " if job.state is State.PAUSED else ""
        return f"the destination {lost}has not received all of the memory"
    if not job.may_run:
        return "it is not known yet whether the machine was given to this host"
    if job.complete:
        return "the source does not know yet that all of the memory has arrived"
    return f"{format_size(job.statistics().remaining_bytes or 0)} have not arrived"


class Service(abc.ABC):
    """Make one of its policies, and `run` it."""

    pushes: ClassVar[bool] = True
    """Whether it sends machines away, and so has a bandwidth."""
    names_machines: ClassVar[bool] = False
    """Whether its machines have names of their own."""

    def __init__(
        self,
        side: str,
        listens: bool,
        output: Output,
        options: SourceOptions,
        arrival: ArrivalOptions,
        protection: Protection = LOCAL,
    ) -> None:
        """`options`: of the migrations to come, those of arrivals too as far as they have a meaning there.
        `protection`: of all connections with other hosts."""
        self.side = side
        self.listens = listens
        self.output = output
        self.options = options
        self.arrival = arrival
        self.protection = protection
        self.stop = Stop()
        self.control: str | None = None  # the path of its control socket
        self.salvage_to: str | None = None  # where what is here is written when a lost migration ends
        self.abandoned = ""  # what was lost by insisting
        self.machines: list[Owned] = []
        self.listening: list[Address] = []
        self.instance = secrets.token_bytes(ID_BYTES)  # by which it knows itself at an address that it calls
        self.failure: PostcopyError | None = None
        self.changes = trio.Event()  # replaced at each change
        self._acceptor: Acceptor | None = None  # the one that it has, or has had
        self._overhead_bytes = 0

    @abc.abstractmethod
    async def run(self, stop: Stop) -> bool:
        """Until it is done, or `stop`; whether what was asked has happened. Errors that end it are `PostcopyError`s."""

    # ---- what is here

    def rows(self) -> list[Row]:
        """By name: the machine, and the migration that it is in or was in last."""
        return [(owned.name, owned.shown, owned.migration) for owned in self.machines]

    def all_rows(self) -> list[Row]:
        """`rows`, and those that have left lately, for metrics."""
        return self.rows()

    @property
    def unauthorised(self) -> int:
        """How many connections were refused since `--tls-authz` does not allow their peers."""
        return self._acceptor.unauthorised if self._acceptor is not None else 0

    def requests(self) -> Mapping[str, Request]:
        """What may be asked of this policy only, by the request's name."""
        return {}

    def changed(self) -> None:
        """Something may have changed in a migration, or in the table."""
        # Called from the middle of migrations, which are not to suffer from what is shown of them.
        contained_call("announcing what has changed", self._announce_changes)
        self.output.kick()
        self.changes.set()
        self.changes = trio.Event()

    def _announce_changes(self) -> None:
        for owned in self.machines:
            job = owned.migration
            if job is not None and job.status != owned.announced and not owned.is_begun_again:
                event = report.changed(owned.name, job, owned.announced)
                owned.announced = job.status
                self.output.emit("migration-status", event)

    def share_bandwidth(self) -> None:
        """Gives the migrations under way what `options` say."""
        for owned in self.machines:
            if isinstance(owned.moving, SourceMigration):
                owned.moving.set_bandwidth(self.options.max_bandwidth_bytes_per_s)

    def set_options(self, given: Json) -> None:
        """From now on (`given` by the fields' names), also for the migrations under way, as far as it can be changed
        there."""
        self.options = sending(given, self.options)
        for owned in self.machines:
            if owned.moving is not None:
                owned.moving.set_recover_for(self.options.recover_for_s)
                if owned.sending is not None:  # the next attempt
                    owned.sending = replace(
                        owned.sending,
                        recover_for_s=self.options.recover_for_s,
                        max_bandwidth_bytes_per_s=self.options.max_bandwidth_bytes_per_s,
                    )
                with contextlib.suppress(MigrationError):  # it comes, has no precopy, or is past it
                    owned.set_sending(given)
        self.share_bandwidth()

    # ---- the end

    def needed(self) -> str:
        """What `see_through` waits for: what would be lost by an end now, of migrations that were decided. Empty when
        nothing would be."""
        waits = [
            f"{owned.name}: {what}" if self.names_machines else what
            for owned in self.machines
            if (what := self._needed_of(owned))
        ]
        return "; ".join(waits)

    def lost_by_quitting(self) -> str:
        """What `quit` refuses to lose; empty when there is nothing of the kind."""
        return self.needed()

    def _needed_of(self, owned: Owned) -> str:
        if not owned.decided:
            return ""
        assert owned.migration is not None
        salvaged = self.salvage_to is not None and owned.migration.state is State.PAUSED
        return "" if salvaged else owned.loses

    async def see_through(self) -> None:
        """From `stop` on gives up the migrations by which nothing is lost, in one step with the question whether they
        are decided; the others only when that is insisted on. Says what it waits for. Until cancelled."""
        await self.stop.wait()
        if self.pushes:  # what is waited for is not held back
            self.set_options({"push_after_s": 0.0})
        while True:
            needed = self.needed()
            if self.stop.insisted and needed and not self.abandoned:
                self.abandoned = needed
                self.output.say(f"{self.side}: Abandoning what was still needed: {needed}")
            for owned in self.machines:
                if self.stop.insisted or not self._needed_of(owned):
                    owned.stop.set()
            if not needed:
                self.stop.settled()
            elif not self.stop.insisted and not self.stop.has_warned:
                self.stop.warned()
                self.output.say(f"{self.side}: Still needed: {needed}. {self._how_to_insist()}")
            await first_of(self.changes.wait, self.stop.changes.wait)

    def _how_to_insist(self) -> str:
        several = sum(bool(self._needed_of(owned)) for owned in self.machines) > 1
        way = f"{self.stop.by} again within {INSIST_S:g} s"
        if self.control is not None:
            quit = f"`postcopy ctl --control {shlex.quote(self.control)} quit --force`"
            way = f"{way}, or {quit}," if self.stop.by else quit
        return f"{way} abandons {'these machines' if several else 'the machine'}."

    def check_arrival(self) -> None:
        """`ConfigurationError` for what would have every machine refused that arrives. A disk need not be there yet:
        its source may make it."""
        if (disk := self.arrival.disk) is None:
            return
        directory = os.path.dirname(absolute(disk))
        try:
            os.close(os.open(disk, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            if isinstance(error, FileNotFoundError) and os.path.isdir(directory):
                return
            why = explain_unwritable(error, directory) if isinstance(error, FileNotFoundError) else error.strerror
            raise ConfigurationError(f"--disk {disk}: {why}; it must be the file that the source uses") from error

    def check_sets(self) -> None:
        """`ConfigurationError` for working sets that cannot be read, or written."""
        arrival = self.arrival
        for option, path in (("working-set", arrival.working_set), ("record-working-set", arrival.record_working_set)):
            if path is not None and self.names_machines and not os.path.isdir(path):
                raise ConfigurationError(
                    f"--{option} {path}: it must be a directory that exists, in which each machine NAME has its NAME.ws"
                )
        if self.names_machines:
            return
        if arrival.working_set is not None:
            try:
                workingset.check(arrival.working_set)
            except workingset.DamagedError as error:
                raise ConfigurationError(f"{error}; record it again") from error
        if arrival.record_working_set is not None:
            check_new_file("--record-working-set", arrival.record_working_set)

    # ---- listening

    @asynccontextmanager
    async def listen(
        self, address: Address, side: str, why_refused: Callable[[Asking], str]
    ) -> AsyncIterator[Acceptor]:
        """Open for as long as the block lasts; its `serve` is the caller's to run. `why_refused` as for `Acceptor`."""
        acceptor = await Acceptor.open(address, side, why_refused, instance=self.instance, protection=self.protection)
        self._acceptor = acceptor
        self.listening = list(acceptor.addresses)
        try:
            yield acceptor
        finally:
            with trio.CancelScope(shield=True):  # bounded
                await contained("the end of listening", acceptor.close)

    def announce_listening(self) -> None:
        encrypted = self.protection.credentials is not None
        for address in self.listening:
            self.output.emit("listening", Listening(side=self.side, address=str(address), encrypted=encrypted))
        where = ", ".join(map(str, self.listening))
        if families := everywhere(self.listening):  # to which one cannot connect
            where = f"port {self.listening[0].port} of every address of this host ({families})"
        how = ", with TLS" if encrypted else ", without TLS" if self.protection.insecure else ""
        self.output.say(f"{self.side}: listening on {where}{how}")

    # ---- migrations

    async def call(self, route: Route, side: str) -> Link:
        """A connection to a side that listens. `side` is what we are."""
        return await CallingLink.open(route, side, self.instance, protection=self.protection)

    def leave(
        self, owned: Owned, to: Link | Route, name: str = "", how: SourceOptions | None = None
    ) -> SourceMigration:
        """The migration with which a machine leaves, over this connection or one to be made; `send` runs it. `name`
        goes with the machine; `how`, where it is not as `options` say."""
        owned.sending = replace(self.options if how is None else how, name=name)
        owned.attempts = Attempts(self.options.heartbeat_s) if isinstance(to, Route) else None
        migration = self._make_leaving(owned, partial(self.call, to, "source") if isinstance(to, Route) else to, to)
        owned.migration, owned.phase, owned.stop, owned.announced = migration, Phase.LEAVING, trio.Event(), ""
        return migration

    def _make_leaving(
        self, owned: Owned, link: Link | Callable[[], Awaitable[Link]], to: Link | Route
    ) -> SourceMigration:
        assert owned.machine is not None
        assert owned.sending is not None
        peer = to.address if isinstance(to, Route) else None
        migration = SourceMigration(owned.machine, link, owned.sending, peer=peer, on_change=self.changed)
        migration.is_begun_again = lambda: owned.migration is migration and owned.is_begun_again
        if self.output.records:
            migration.record()
        return migration

    async def send(
        self,
        owned: Owned,
        to: Link | Route,
        go: trio.Event,
        *beside: Callable[[Owned], Awaitable[None]],
        keep: bool = True,
    ) -> SourceMigration:
        """The whole of a migration that `leave` has made; with a `Route` it is begun again as often as it is lost
        before the machine has left. Returns the last one. `beside`: tasks for as long as each; `keep` as for
        `SourceMigration.run`."""
        while True:
            migration = owned.migration
            assert isinstance(migration, SourceMigration)
            self.changed()
            async with trio.open_nursery() as nursery:
                for task in beside:
                    nursery.start_soon(task, owned)
                await migration.run(go, owned.stop, keep=keep)
                nursery.cancel_scope.cancel()
            left_s = owned.tries_for_s
            if left_s <= 0 or not isinstance(to, Route):
                attempts = owned.attempts
                if attempts is not None and migration.may_try_again and attempts.in_vain(_paused_s(migration)):
                    log.error(
                        "%s: not begun again: %d attempts that were lost have paused the machine for %.0f s",
                        owned.name,
                        attempts.count,
                        attempts.paused_s + _paused_s(migration),
                    )
                self.changed()  # its end may not have been announced yet
                return migration
            assert owned.attempts is not None
            owned.attempts.paused_s += _paused_s(migration)
            pause_s = owned.attempts.again(migration.may_try_again)
            if owned.attempts.said.due():
                self.output.say(
                    f"{self.side}: {owned.name}: {migration.failure}; the machine has stayed here, and the migration is"
                    f" begun again (attempt {owned.attempts.count})",
                    about=migration,
                )
            again = self._make_leaving(owned, partial(self._open_again, to, migration, pause_s, left_s), to)
            again.attempt, again.failure = owned.attempts.count, migration.failure
            owned.migration = again
            self.emit_timeline(owned, migration)  # it is the present one no more, and tells that it has failed

    async def _open_again(self, route: Route, last: SourceMigration, pause_s: float, within_s: float) -> Link:
        """A connection for a new attempt. The destination may wait to learn that the last one is over."""
        with trio.move_on_after(within_s):
            await trio.sleep(pause_s)
            await last.announce()
            route.refresh()
            return await self.call(route, "source")
        raise PeerError(f"{route.address}: not reached again within {within_s:g} s (--recover-for)")

    def arrive(self, owned: Owned, link: Link) -> DestinationMigration:
        """The migration with which a machine comes; its `run` and `close` are the caller's."""
        migration = owned.migration = DestinationMigration(
            link,
            busy_poll_us=self.arrival.busy_poll_us,
            heartbeat_s=self.options.heartbeat_s,
            recover_for_s=self.options.recover_for_s,
            kill_when_lost=self.arrival.kill_when_lost,
            make_machine=partial(self.make_arriving, owned),
            make_pager=_process_pager if self.arrival.pager_process else Pager,
            make_ahead=lambda: self.make_ahead(owned),
            on_change=self.changed,
        )
        owned.announced = ""
        if self.output.records:
            migration.record()
        return migration

    def emit_timeline(self, owned: Owned, migration: Migration) -> None:
        """How a migration came about, where that was recorded: once, when it has ended."""

        def emit() -> None:
            machine = migration.machine or owned.machine
            if (record := report.timeline(owned.name, machine.kind if machine else None, migration)) is not None:
                self.output.emit("timeline", record)

        contained_call("telling how a migration came about", emit)  # what comes after it is needed

    def emit_ended(self, owned: Owned, migration: Migration) -> None:
        self.emit_timeline(owned, migration)
        self.output.emit("migration-ended", report.ended(owned.name, migration))

    def make_arriving(
        self, owned: Owned, kind: str, config: Mapping[str, Any], layout: Sequence[BlockLayout]
    ) -> Machine:
        """The machine that a source offers. Errors as for `create_destination`."""
        arrival = self.arrival
        owned.name = self.name_arriving(owned, kind, config)
        host = record(HostOptions, vars(arrival), name=owned.name)
        machine = create_destination(kind, config, layout, host)
        if machine.lends and arrival.pager_process:
            raise ConfigurationError(
                f"--pager process: a machine of kind {kind} is a process of its own, which lives when this one crashes;"
                " leave it out"
            )
        return machine

    def make_ahead(self, owned: Owned) -> Ahead:
        """What is asked for of an arriving machine before it is touched."""

        def file(path: str | None) -> str | None:
            return os.path.join(path, f"{owned.name}.ws") if path is not None and self.names_machines else path

        arrival = self.arrival
        return Ahead(arrival.prefetch, file(arrival.working_set), file(arrival.record_working_set))

    def name_arriving(self, owned: Owned, kind: str, config: Mapping[str, Any]) -> str:
        """`ConfigurationError` for a machine that cannot be taken."""
        return kind

    # ---- one machine and its result

    async def run_to_result(
        self, function: Callable[[], Awaitable[bool]], end: Callable[[bool], Awaitable[None]]
    ) -> bool:
        """What `function` returns. However it ends, `end` emits the result and closes what is owned, before an error is
        raised."""
        done = False
        try:
            done = await function()
        except PostcopyError as error:
            self.failure = self.failure or error
        except MemoryError:
            self.failure = self.failure or out_of_memory()
        except BaseExceptionGroup as group:
            self.failure = self.failure or known_error(group)
        finally:
            if not done and self.abandoned:
                self.failure = Interrupted(f"abandoned: {self.abandoned}")
            if trio.current_effective_deadline() == -math.inf:  # ended from outside: no signal comes any more
                self.stop.insist()
            with trio.CancelScope(shield=True):
                await end(done)
        if not done and self.failure is not None:
            raise self.failure
        return done

    def measure_overhead(self, machine: Machine | None) -> None:
        self._overhead_bytes = max(self._overhead_bytes, report.overhead_bytes(machine))

    def emit_result(self, result: SideResult, done: bool) -> None:
        """The last event, completed with what all results have."""
        result.overhead_bytes = self._overhead_bytes
        if self.failure is not None and not done:
            result.error = str(self.failure)
            if result.status in _NO_END:
                result.status = "failed"
        self.output.emit("result", result)

    async def write_salvage(self, machine: Machine, migration: Migration, maps: list[Bitmap]) -> None:
        """What this side has, where that was asked for. A machine is lost without it: where it cannot be written (the
        disk is full) that is tried again, until it has been, or an end without it is insisted on."""
        path = self.salvage_to
        if path is None:
            return
        asked: trio.Event | None = None
        self.stop.warned()  # to ask again is to insist from here on: what ends it from outside ends no shielded step
        while True:
            changes = self.stop.changes
            try:
                paused = await salvage.write(path, machine, migration.migration_id, self.side, maps)
                break
            except PostcopyError as error:
                why = str(error)
            except MemoryError:
                why = f"salvage to {path}: {out_of_memory()}"
            if self.stop.insisted or not machine.live:  # an image can be fetched again
                self.stop.settled()
                log.error("%s", why)
                return
            if changes is not asked:  # for the first time, or it was asked to end again
                asked = changes
                log.error("%s", why)
                how = self._how_to_insist() if self.stop.by else "Ctrl-C twice abandons the machine."
                self.stop.warned()
                self.output.say(
                    f"{self.side}: Still needed: the salvage, which is tried again every {SALVAGE_AGAIN_S:g} s. {how}"
                )
            with trio.move_on_after(SALVAGE_AGAIN_S):
                await changes.wait()
        self.stop.settled()  # to ask again ends what still takes time
        self.output.say(
            f"{self.side}: salvage written to {path}"
            + ("" if paused else "; the machine could not be paused while it was written"),
            about=migration,
        )

    async def close_machine(self, owned: Owned) -> None:
        """Lets go of it, and ends it where it has left or is not wanted any more. Raises nothing that is a matter of
        the machine."""
        if owned.machine is not None:
            try:
                await (owned.machine.destroy() if owned.has_left or owned.unwanted else owned.machine.close())
            except PostcopyError as error:
                log.error("%s: %s", owned.name, error)


def why_not_completed(migration: Migration) -> PostcopyError:
    if migration.failure is not None:
        return migration.failure
    if migration.state is State.RECLAIMED:
        return MigrationError("the machine was taken back from its destination, and is here")
    return MigrationError(f"the migration has ended: {migration.status}")


def _process_pager() -> Any:
    from postcopy.dataplane.pager_process import ProcessPager  # megabytes that only it needs

    return ProcessPager()
