# SPDX-License-Identifier: Apache-2.0
"""`postcopy source` and `postcopy dest`: the engines, with a beginning and an end around them.

A command's `run` takes the event that the first signal sets, and returns whether what was asked has happened.
Errors that end it are `PostcopyError`s; the result has then been emitted already.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from postcopy._blocking import run_sync
from postcopy._files import check_new_file
from postcopy._writer import Kind
from postcopy.dataplane.pager import Pager
from postcopy.errors import ConfigurationError, MigrationError, PostcopyError, known_error, out_of_memory
from postcopy.machines import Check, Machine, MachineStatistics
from postcopy.machines.kinds import MachineOptions, create_destination, create_source
from postcopy.memory.bitmap import Bitmap
from postcopy.migration import salvage
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.source import SourceMigration, SourceOptions, check_releasable
from postcopy.migration.tasks import Interrupted, first_of, now_ns
from postcopy.net import Acceptor, Address, CallingLink, Link, Route
from postcopy.output import Output
from postcopy.service import report
from postcopy.wire import State

if TYPE_CHECKING:
    from postcopy.dataplane.pager_process import ProcessPager

log = logging.getLogger(__name__)

UNENDED = frozenset({"connecting", "setup", "active"})
"""Statuses that cannot be the last one: what ends there has failed."""
MAX_SESSIONS = 16  # destinations served at the same time
MAX_LOST = 16  # destinations of an image that were lost, and that may still come back


@contextlib.asynccontextmanager
async def _acceptor(acceptor: Acceptor, output: Output, side: str) -> AsyncIterator[Acceptor]:
    """An acceptor that serves as long as the block lasts."""
    for address in acceptor.addresses:
        output.emit("listening", {"side": side, "address": str(address)})
        output.say(f"{side}: listening on {address}")
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(acceptor.serve)
            yield acceptor
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await acceptor.close()


@dataclass(frozen=True)
class Origin:
    """A salvage, or what `merge` has made, that a machine is to be started from; see `salvage.examine`."""

    path: str
    reclaim: bool = False
    force: bool = False


class SourceCommand:
    """Boots the machine, lets it compute, migrates it; and keeps running it when that fails."""

    def __init__(
        self,
        kind: str,
        machine_options: MachineOptions,
        options: SourceOptions,
        output: Output,
        *,
        origin: Origin | None = None,
        listen: Address | None,
        connect: Address | Route | None,
        migrate_after_s: float,
        serve: float,
        keep: bool,
        salvage_to: str | None = None,
    ) -> None:
        """`origin`: where the machine comes from, in place of `kind` and most of `machine_options`."""
        self._kind = kind
        self._origin = origin
        self._machine_options = machine_options
        self._options = options
        self._output = output
        self._listen = listen
        self._connect = connect
        self._migrate_after_s = migrate_after_s
        self._serve = serve
        self._keep = keep
        self._salvage_to = salvage_to
        self._go = trio.Event()
        self._changed = trio.Event()
        self.machine: Machine | None = None
        self._restored: salvage.Restorable | None = None
        self._shown: SourceMigration | None = None  # the latest migration
        self._active = 0
        self._stops: dict[SourceMigration, trio.Event] = {}  # of the migrations that are going on
        self._completed = 0
        self._failure: PostcopyError | None = None
        self._overhead_bytes = 0

    async def run(self, stop: trio.Event) -> bool:
        machine: Machine | None = None
        done = False
        if self._salvage_to is not None:
            salvage.check_target(self._salvage_to)
        try:
            machine = self.machine = await self._make_machine()
            if self._options.release_ram:
                check_releasable(machine)
            done = await self._run(machine, stop)
        except PostcopyError as error:
            self._failure = self._failure or error
        except MemoryError:
            self._failure = self._failure or out_of_memory()
        except BaseExceptionGroup as group:
            self._failure = self._failure or known_error(group)
        finally:
            if machine is not None:
                with trio.CancelScope(shield=True):
                    if self._shown is not None and self._shown.state is State.PAUSED:
                        # It has been paused since it gave the right to run away: as old as that, and whole, but for
                        # what the destination had acknowledged.
                        name, maps = self._shown.migration_id, self._shown.kept()
                        await _salvage(self._salvage_to, machine, name, "source", maps, self._output)
                    statistics = machine.statistics()
                    self._emit_result(machine, statistics, done)
                    self.machine = None
                    try:
                        await machine.close()
                    except PostcopyError as error:
                        log.error("%s", error)
            else:
                self._output.emit("result", {"side": "source", "status": "failed", "error": str(self._failure)})
        if not done and self._failure is not None:
            raise self._failure
        return done

    async def _run(self, machine: Machine, stop: trio.Event) -> bool:
        acceptor: Acceptor | None = None
        if self._listen is not None:
            # Before the machine is booted: an address that does not work should not cost that.
            acceptor = await Acceptor.open(self._listen, "source", lambda waiting: self._why_refused(machine, waiting))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._output.follow, lambda: self._progress(machine))
            if acceptor is None:
                done = await self._single(machine, stop)
            else:
                nursery.start_soon(self._prepare, machine)
                async with _acceptor(acceptor, self._output, "source"):
                    done = await self._serve_all(machine, acceptor, stop)
            self._overhead_bytes = max(self._overhead_bytes, report.overhead_bytes(machine))
            nursery.cancel_scope.cancel()
        return done

    # ---- for who operates it

    def migrations(self) -> list[SourceMigration]:
        """Those that are going on; else the latest one, if there was one."""
        return list(self._stops) or ([self._shown] if self._shown is not None else [])

    @property
    def options(self) -> SourceOptions:
        """What the next migration will be made with."""
        return self._options

    @options.setter
    def options(self, options: SourceOptions) -> None:
        self._options = options
        for migration in self._stops:
            migration.set_bandwidth(options.max_bandwidth_bytes_per_s)
            migration.set_recover_for(options.recover_for_s)

    def _progress(self, machine: Machine) -> report.Json:
        self._overhead_bytes = max(self._overhead_bytes, report.overhead_bytes(machine))
        return report.source_progress(machine, self._shown)

    def _emit_result(self, machine: Machine, statistics: MachineStatistics, done: bool) -> None:
        result = report.source_result(machine, statistics, self._shown)
        result["overhead-bytes"] = self._overhead_bytes
        result["served"] = self._completed
        if done and self._shown is None:
            result["status"] = "completed"
        if self._failure is not None and not done:
            result["error"] = str(self._failure)
            if result["status"] in UNENDED:
                result["status"] = "failed"
        self._output.emit("result", result)
        if done:
            self._output.say(f"source: {result['status']}, down for {result.get('downtime-ms', 0):g} ms")

    async def _make_machine(self) -> Machine:
        if self._origin is None:
            return create_source(self._kind, self._machine_options)
        origin = self._origin
        found = await run_sync(partial(salvage.examine, origin.path, reclaim=origin.reclaim))
        if found.doubts and not origin.force:
            raise ConfigurationError(
                f"--from {origin.path}: in doubt: {'; '.join(found.doubts)}; --force starts the machine all the same"
            )
        for doubt in found.doubts:
            self._output.say(f"source: in doubt: {doubt}")
        options = self._machine_options
        make = partial(create_destination, backing=options.backing or "memfd", disk=options.disk, net=options.net)
        machine = await salvage.restore(found, make)
        self._restored = found
        return machine

    async def _prepare(self, machine: Machine) -> None:
        """From created to computing, ready to be migrated."""
        if self._restored is None:
            await machine.boot()
        else:
            await run_sync(salvage.note_start, self._restored)
            await machine.claim_network()
            origin = self._restored.salvage
            since = " of the switchover" if origin.side == salvage.SOURCE else ""
            self._output.say(f"source: the machine goes on from {origin.path}, in the state{since} it was in")
        await machine.resume()
        await machine.wait_ready()
        if machine.live:
            await trio.sleep(self._migrate_after_s)
        self._go.set()

    def _why_refused(self, machine: Machine, waiting: int) -> str:
        # A destination of an image that was lost takes nobody's place: it may come back, or has begun anew.
        reclaimed = sum(one.state is State.RECLAIMED for one in self._stops)  # only says so to whom it may concern
        busy = self._active - len(self._lost(machine)) - reclaimed + waiting
        if busy + self._completed >= self._serve:
            return "busy with another destination" if busy else "everything has been served"
        return "too many destinations at the same time" if busy >= MAX_SESSIONS else ""

    def _lost(self, machine: Machine) -> list[SourceMigration]:
        """Those that nothing depends on any more, and that are waited for all the same; the oldest first."""
        return [] if machine.live else [one for one in self._stops if one.state is State.PAUSED]

    def _make_room(self, machine: Machine) -> None:
        """Each of those that were lost keeps a page server: a few are waited for."""
        for migration in self._lost(machine)[:-MAX_LOST]:
            self._stops[migration].set()

    # ---- connecting

    async def _single(self, machine: Machine, stop: trio.Event) -> bool:
        assert self._connect is not None
        route = self._connect if isinstance(self._connect, Route) else Route(self._connect)
        migration = SourceMigration(
            machine,
            partial(CallingLink.open, route, "source"),
            self._options,
            peer=route.address,
            on_change=self._change,
        )
        async with trio.open_nursery() as nursery:

            async def prepare() -> None:
                await migration.connected.wait()  # before that a machine need not be booted
                if migration.failure is None:
                    await self._prepare(machine)

            nursery.start_soon(prepare)
            await self._migrate(migration, stop)
            if migration.state is State.COMPLETED:
                return True
            reclaimed = migration.state is State.RECLAIMED
            self._failure = _why(migration)
            keep = reclaimed or (migration.may_run and migration.ready_ns > 0 and self._keep)
            if keep and machine.live and not stop.is_set():
                if not reclaimed:
                    self._output.say(
                        f"source: migration failed: {self._failure}; the machine goes on here until interrupted"
                    )
                await stop.wait()
            nursery.cancel_scope.cancel()
        return False

    async def _migrate(self, migration: SourceMigration, stop: trio.Event) -> None:
        machine = migration.machine
        self._shown = migration
        self._output.kick()
        hold = machine.live or self._connect is not None
        own_stop = self._stops[migration] = trio.Event()
        try:
            async with trio.open_nursery() as nursery:

                async def interruption() -> None:
                    await stop.wait()
                    own_stop.set()

                nursery.start_soon(interruption)
                nursery.start_soon(self._announce, migration)
                await migration.run(self._go, own_stop, hold=hold)
                nursery.cancel_scope.cancel()
        finally:
            del self._stops[migration]
        if migration.failure is not None:
            fields = {"side": "source", "status": migration.status, "error": str(migration.failure)}
            self._output.emit("migration-failed", fields)
        self._output.emit("migration-ended", report.ended("outgoing", migration))

    async def _announce(self, migration: SourceMigration) -> None:
        """Says aloud when nobody may run the machine any more here and nobody can say what became of it there; and when
        it was taken back, which the destination is told for a while afterwards, should it be there after all."""
        await migration.paused.wait()
        self._output.say(
            f"postcopy: PAUSED: {migration.failure}; the machine belongs to the destination, its missing pages are kept"
            " here until the destination is back, or this process is interrupted"
        )
        while migration.state is not State.RECLAIMED:
            await self._changed.wait()
        self._output.say("source: the machine was taken back; it goes on here until interrupted, or migrated again")

    def _change(self) -> None:
        """In a migration."""
        self._output.kick()
        self._changed.set()
        self._changed = trio.Event()

    # ---- listening

    async def _serve_all(self, machine: Machine, acceptor: Acceptor, stop: trio.Event) -> bool:
        """Until as many destinations have been served as were asked for."""
        enough = trio.Event()

        async def session(link: Link) -> None:
            migration = SourceMigration(machine, link, self._options, on_change=self._change)
            try:
                await self._migrate(migration, stop)
            finally:
                self._active -= 1
                self._change()
            if migration.state is State.COMPLETED:
                self._completed += 1
                if self._completed >= self._serve:
                    enough.set()
            elif migration.state is not State.RECLAIMED and not stop.is_set():
                self._output.say(f"source: migration to {link.peer} failed: {migration.failure}")
            keep = migration.state is State.RECLAIMED or (migration.may_run and self._keep)
            if machine.live and migration.state is not State.COMPLETED and not keep:
                self._failure = _why(migration)
                enough.set()

        async def interruption() -> None:
            await stop.wait()
            enough.set()

        async def give_up_lost() -> None:
            """Those that were waited for while there was something else to do, also one that is lost now only."""
            while self._active:
                for migration, own_stop in self._stops.items():
                    if migration.state is State.PAUSED:
                        own_stop.set()
                await self._changed.wait()

        async with trio.open_nursery() as sessions:  # each ends by itself, or by `stop`

            async def take() -> None:
                while True:
                    link = await acceptor.next_link()
                    self._active += 1
                    self._make_room(machine)
                    sessions.start_soon(session, link)

            async with trio.open_nursery() as handler:
                handler.start_soon(take)
                handler.start_soon(interruption)
                await enough.wait()
                handler.cancel_scope.cancel()
            sessions.start_soon(give_up_lost)
        if self._serve == float("inf"):
            return self._failure is None
        done = self._completed >= self._serve
        if not done and self._failure is None:
            self._failure = Interrupted(f"interrupted after {self._completed} of {self._serve:g} destinations")
        return done


def _why(migration: SourceMigration | DestinationMigration) -> PostcopyError:
    """Why it was not completed."""
    if migration.failure is not None:
        return migration.failure
    if migration.state is State.RECLAIMED:
        return MigrationError("the machine was taken back from its destination, and is here")
    return MigrationError(f"the migration has ended: {migration.status}")


def _process_pager() -> ProcessPager:
    from postcopy.dataplane.pager_process import ProcessPager  # by those who ask for it: see `cli`

    return ProcessPager()


class DestinationCommand:
    """Receives one machine and, when all of it is here, does with it what was asked."""

    def __init__(
        self,
        output: Output,
        *,
        listen: Address | None,
        connect: Address | Route | None,
        backing: str,
        disk: str | None,
        net: str | None = None,
        busy_poll_us: int,
        pager_process: bool,
        heartbeat_s: float,
        recover_for_s: float,
        kill_when_lost: bool,
        run_for_s: float | None,
        dump: str | None,
        verify: bool,
        salvage_to: str | None = None,
    ) -> None:
        self._output = output
        self._listen = listen
        self._connect = connect
        self._backing = backing
        self._disk = disk
        self._net = net
        self._busy_poll_us = busy_poll_us
        self._pager_process = pager_process
        self._heartbeat_s = heartbeat_s
        self._recover_for_s = recover_for_s
        self._kill_when_lost = kill_when_lost
        self._run_for_s = run_for_s
        self._dump = dump
        self._verify = verify
        self._salvage_to = salvage_to
        self._migration: DestinationMigration | None = None
        self._taken = False
        self._came_to_nothing = ""  # why the last one did
        self._check: Check | None = None
        self._dumped: str | None = None
        self._failure: PostcopyError | None = None
        self._overhead_bytes = 0

    async def run(self, stop: trio.Event) -> bool:
        done = False
        statistics: MachineStatistics | None = None
        if self._dump is not None:
            check_new_file("--dump", self._dump)
        if self._salvage_to is not None:
            salvage.check_target(self._salvage_to)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._output.follow, self._progress)
                try:
                    done = await self._run(stop)
                except PostcopyError as error:
                    self._failure = error
                except MemoryError:
                    self._failure = out_of_memory()
                except BaseExceptionGroup as group:
                    self._failure = known_error(group)
                if self._migration is not None and self._migration.machine is not None:
                    statistics = self._migration.machine.statistics()
                nursery.cancel_scope.cancel()
        finally:
            if self._migration is not None:
                if self._migration.state is State.PAUSED and self._migration.machine is not None:
                    with trio.CancelScope(shield=True):
                        maps = self._migration.received()
                        machine, name = self._migration.machine, self._migration.migration_id
                        await _salvage(self._salvage_to, machine, name, "dest", maps, self._output)
                await self._migration.close()
            self._emit_result(statistics, done)
        if not done and self._failure is not None:
            raise self._failure
        return done

    @property
    def migration(self) -> DestinationMigration | None:
        return self._migration

    @property
    def recover_for_s(self) -> float:
        return self._recover_for_s

    @recover_for_s.setter
    def recover_for_s(self, recover_for_s: float) -> None:
        self._recover_for_s = recover_for_s
        if self._migration is not None:
            self._migration.set_recover_for(recover_for_s)

    def _progress(self) -> report.Json:
        machine = self._migration.machine if self._migration else None
        self._overhead_bytes = max(self._overhead_bytes, report.overhead_bytes(machine))
        return report.destination_progress(self._migration)

    def _emit_result(self, statistics: MachineStatistics | None, done: bool) -> None:
        result = report.destination_result(self._migration, statistics, self._check, self._dumped)
        result["overhead-bytes"] = self._overhead_bytes
        if self._failure is not None and not done:
            result["error"] = str(self._failure)
            if result["status"] in UNENDED:
                result["status"] = "failed"
        self._output.emit("result", result)
        if done:
            self._output.say(f"dest: {result['status']}, verified: {result['verified']}")

    async def _run(self, stop: trio.Event) -> bool:
        if self._connect is not None:
            migration = await self._receive(await self._call(self._connect, stop), stop)
        else:
            assert self._listen is not None
            acceptor = await Acceptor.open(self._listen, "dest", self._why_refused)
            async with _acceptor(acceptor, self._output, "dest"):
                migration = await self._take(acceptor, stop)
        if migration.state is not State.COMPLETED:
            raise _why(migration)
        assert migration.machine is not None
        return await self._afterwards(migration, migration.machine, stop)

    async def _call(self, where: Address | Route, stop: trio.Event) -> Link:
        found: list[Link] = []

        async def connect() -> None:
            found.append(await CallingLink.open(where, "dest"))

        await first_of(connect, stop.wait)
        if not found:
            raise Interrupted("interrupted before there was a connection")
        return found[0]

    async def _take(self, acceptor: Acceptor, stop: trio.Event) -> DestinationMigration:
        """The first migration that was decided, or was cancelled here: one that comes to nothing before is its source's
        affair, which may come again, or another one. `Interrupted` when `stop` comes before."""
        while True:
            link = await self._next_link(acceptor, stop)
            migration = await self._receive(link, stop)
            # (one that has run here, and was taken back by its source, is no reason to wait for another one)
            decided = migration.state is not State.ABORTED or migration.committed_ns
            if decided or isinstance(migration.failure, Interrupted):
                return migration
            self._output.say(f"dest: nothing came of {migration.peer}: {migration.failure}; waiting for the next one")
            self._came_to_nothing = str(migration.failure)
            self._migration = None
            await migration.close()  # before somebody else may have the memory that it had
            self._taken = False

    async def _next_link(self, acceptor: Acceptor, stop: trio.Event) -> Link:
        """The next control connection, which has the only place from then on."""
        found: list[Link] = []

        async def wait() -> None:
            found.append(await acceptor.next_link())
            self._taken = True

        await first_of(wait, stop.wait)
        if not found:
            last = f" (the last one that was offered: {self._came_to_nothing})" if self._came_to_nothing else ""
            raise Interrupted(f"interrupted before a machine came{last}")
        return found[0]

    def _why_refused(self, waiting: int) -> str:
        return "busy with another source" if self._taken or waiting else ""

    async def _receive(self, link: Link, stop: trio.Event) -> DestinationMigration:
        migration = self._migration = DestinationMigration(
            link,
            make_machine=partial(create_destination, backing=self._backing, disk=self._disk, net=self._net),
            busy_poll_us=self._busy_poll_us,
            heartbeat_s=self._heartbeat_s,
            recover_for_s=self._recover_for_s,
            kill_when_lost=self._kill_when_lost,
            make_pager=_process_pager if self._pager_process else Pager,
            on_change=self._output.kick,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce, migration)
            await migration.run(stop)
            nursery.cancel_scope.cancel()
        self._output.emit("migration-ended", report.ended("incoming", migration))
        return migration

    async def _announce(self, migration: DestinationMigration) -> None:
        await migration.paused.wait()
        if migration.state is State.IN_DOUBT:
            self._output.say(
                f"postcopy: IN DOUBT: {migration.failure}; the source is asked whether the machine belongs to this"
                " host, which does not run it meanwhile"
            )
            return
        self._output.say(
            f"postcopy: PAUSED: {migration.failure}; the machine is kept, {migration.statistics().remaining_bytes}"
            " bytes of it are missing, and whatever touches them waits until the source is back, or this process is"
            " interrupted"
        )

    async def _afterwards(self, migration: DestinationMigration, machine: Machine, stop: trio.Event) -> bool:
        """The whole machine is here: let it run as long as was asked, look at it, write it out."""
        in_time = True
        if machine.live:
            ran_s = (now_ns() - migration.running_ns) / 1e9
            with trio.move_on_after(float("inf") if self._run_for_s is None else max(0.0, self._run_for_s - ran_s)):
                await stop.wait()
                # Until interrupted: that was what was asked for, unless a time had been set.
                in_time = self._run_for_s is None
        if not in_time:
            raise Interrupted(f"interrupted before it had run here for {self._run_for_s:g} s")
        await machine.pause()
        if self._verify:
            self._output.say("dest: checking all memory")
            self._check = await machine.verify()
        if self._dump is not None:
            await machine.dump(self._dump)
            self._dumped = self._dump
        migration.check_machine()
        if migration.machine_failure:
            raise MigrationError(f"the machine reports a failure: {migration.machine_failure}")
        if self._check is not None and not self._check.ok:
            raise MigrationError(f"the memory is not as it must be: {self._check.what}")
        return True


class MergeCommand:
    """Joins salvages, and says exactly what nobody can speak for."""

    def __init__(self, paths: list[str], image: str | None, directory: str | None, output: Output) -> None:
        """Into an image, or into a directory that a machine can be started from."""
        self._paths = paths
        self._image = image
        self._directory = directory
        self._output = output

    async def run(self, stop: trio.Event) -> bool:
        """True when no page is in doubt, and a machine could be started from what was to be one. What was made is there
        in either case, but not when it was interrupted."""
        merged = await self._merge(stop)
        target = self._image if self._image is not None else self._directory
        self._output.emit(
            "result",
            {
                "image": self._image,
                "directory": self._directory,
                "from-dest": merged.from_dest_bytes,
                "from-source": merged.from_source_bytes,
                "in-doubt": merged.doubtful_bytes,
                "ranges-in-doubt": merged.doubtful,
                "torn": merged.torn,
                "state": merged.has_state,
            },
        )
        self._output.say(
            f"merge: {target}: {merged.from_dest_bytes} bytes of the destination,"
            f" {merged.from_source_bytes} of the source, {merged.doubtful_bytes} in doubt"
        )
        for item in merged.doubtful:
            self._output.say(
                f"merge: in doubt: block {item['block']}, pages {item['first-page']}"
                f" to {item['first-page'] + item['pages'] - 1} of {item['page-bytes']} bytes",
                Kind.LOG,  # ten thousand of them, all in the result
            )
        if merged.torn:
            self._output.say("merge: the destination's machine ran on while it was salvaged: its pages may be torn")
        startable = merged.has_state or self._directory is None
        if not startable:
            self._output.say("merge: there is no state of the machine's devices: it cannot be started from there")
        return not merged.doubtful_bytes and not merged.torn and startable

    async def _merge(self, stop: trio.Event) -> salvage.Merged:
        """`Interrupted` by `stop`: nothing is left of it then."""

        def give_up() -> None:
            if stop.is_set():
                raise Interrupted("interrupted; nothing was written")

        return await run_sync(partial(salvage.merge, self._paths, self._image, self._directory, give_up=give_up))


async def _salvage(
    path: str | None, machine: Machine, migration: str, side: str, maps: list[Bitmap], output: Output
) -> None:
    """Writes what this side has, where that was asked for."""
    if path is None:
        return
    try:
        paused = await salvage.write(path, machine, migration, side, maps)
    except PostcopyError as error:
        log.error("%s", error)
        return
    except MemoryError:
        log.error("salvage to %s: %s", path, out_of_memory())
        return
    output.say(
        f"{side}: what is here is in {path}"
        + ("" if paused else "; the machine could not be paused while it was written")
    )
