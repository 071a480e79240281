# SPDX-License-Identifier: Apache-2.0
"""`postcopy dest`: receives one machine and, when all of it is here, does with it what was asked."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar

import trio

from postcopy._files import check_new_file
from postcopy._stop import Stop
from postcopy.errors import ConfigurationError, MigrationError, PeerError, PostcopyError
from postcopy.machines import Check, Machine
from postcopy.migration import salvage
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.source import SourceOptions
from postcopy.migration.tasks import Interrupted, first_of, now_ns
from postcopy.net import Acceptor, Address, Asking, Link, Route
from postcopy.output import Output
from postcopy.records.events import MigrationEnded, Progress
from postcopy.service import report
from postcopy.service._attempts import Attempts
from postcopy.service._contain import contained
from postcopy.service.config import DestinationConfig
from postcopy.service.service import Owned, Phase, Service, describe, still_missing, why_not_completed
from postcopy.wire import State

TELLING = "telling the source how the migration has ended"
TELL_FOR_S = 10.0
"""How long the end of this process is put off for that. A source that calls does so every 2 s."""


class Destination(Service):
    pushes: ClassVar[bool] = False

    def __init__(self, config: DestinationConfig, output: Output) -> None:
        options = SourceOptions(heartbeat_s=config.heartbeat_s, recover_for_s=config.recover_for_s)
        super().__init__("dest", config.listen is not None, output, options, config.arrival, config.protection)
        self._config = config
        self._check: Check | None = None
        self._dumped: str | None = None
        self.salvage_to = config.salvage_to

    @property
    def _migration(self) -> DestinationMigration | None:
        migration = self.machines[0].migration if self.machines else None
        return migration if isinstance(migration, DestinationMigration) else None

    async def run(self, stop: Stop) -> bool:
        self.stop = stop
        self.check_arrival()
        self.check_sets()
        if self._config.dump is not None:
            check_new_file("--dump", self._config.dump)
        if self.salvage_to is not None:
            salvage.check_target(self.salvage_to)
        return await self.run_to_result(self._run, self._end)

    async def _run(self) -> bool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.output.follow, self._progress)
            nursery.start_soon(self.see_through)
            done = await self._receive_and_keep()
            nursery.cancel_scope.cancel()
        return done

    async def _receive_and_keep(self) -> bool:
        config = self._config
        async with trio.open_nursery() as nursery:
            if config.connect is not None:
                migration = await self._call(config.connect)
                nursery.start_soon(contained, TELLING, migration.announce)
            else:
                assert config.listen is not None
                migration = await nursery.start(self._listen, config.listen)
            if migration.state is not State.COMPLETED:
                raise why_not_completed(migration)
            assert migration.machine is not None
            done = await self._afterwards(migration, migration.machine)
            # Nobody else could tell a source that was lost at the very end.
            nursery.cancel_scope.deadline = trio.current_time() + TELL_FOR_S
        return done

    async def _listen(self, address: Address, task_status: trio.TaskStatus[DestinationMigration]) -> None:
        """Until a migration has ended, and its source knows how."""
        async with self.listen(address, "dest", self._why_refused) as acceptor, trio.open_nursery() as nursery:
            nursery.start_soon(acceptor.serve)
            self.announce_listening()
            migration = await self._accept(acceptor)
            task_status.started(migration)
            await contained(TELLING, migration.announce)
            nursery.cancel_scope.cancel()

    async def _end(self, done: bool) -> None:
        """The end of the machine, and the result."""
        migration = self._migration
        machine = migration.machine if migration is not None else None
        statistics = machine.statistics() if machine is not None else None
        if migration is not None:
            if migration.state is State.PAUSED and machine is not None:
                await self.write_salvage(machine, migration, migration.received())
            await migration.close()
            self.emit_timeline(self.machines[0], migration)
        result = report.destination_result(migration, statistics, self._check, self._dumped)
        self.emit_result(result, done)
        if done:
            what = describe(machine) if machine is not None else "no machine"
            verified = "all of its memory is as it must be" if result.verified else "its memory was not verified"
            if machine is not None and machine.process is not None:
                verified = "it runs on as process {}, and is spoken to at {}".format(*machine.process)
            self.output.say(f"dest: {what}: {result.status}; {verified}", about=migration)

    def _progress(self) -> Progress:
        migration = self._migration
        machine = migration.machine if migration is not None else None
        self.measure_overhead(machine)
        return report.progress("dest", machine, migration)

    # ---- arriving

    def name_arriving(self, owned: Owned, kind: str, config: Mapping[str, Any]) -> str:
        if self._config.takes not in (None, kind):
            raise ConfigurationError(f"this side takes a machine of kind {self._config.takes}, this one is {kind[:40]}")
        return super().name_arriving(owned, kind, config)

    async def _accept(self, acceptor: Acceptor) -> DestinationMigration:
        """The first migration that was decided, or was cancelled here. One that failed before is its source's affair,
        which may come again, or another one. `Interrupted` when `stop` comes before."""
        last = ""
        while True:
            migration = await self._receive(await self._link(acceptor.next_link, f"a machine came{last}"))
            self.output.emit("migration-ended", report.ended(self.machines[0].name, migration))
            # (one that has run here, and was taken back by its source, is no reason to wait for another one)
            decided = migration.state is not State.ABORTED or migration.committed_ns
            if decided or isinstance(migration.failure, Interrupted):
                return migration
            self.output.say(
                f"dest: the migration from {migration.peer} failed: {migration.failure}; waiting for the next one",
                about=migration,
            )
            last = f" (the last one that was offered: {migration.failure})"
            await self._forget(migration)

    async def _call(self, route: Route) -> DestinationMigration:
        """The migration that came of calling the source; it is called again as often as the connection is lost before
        the machine is this host's."""
        attempts, pause_s, left_s = Attempts(self.options.heartbeat_s), 0.0, math.inf
        ended: MigrationEnded | None = None  # how the last attempt has

        async def open_link() -> Link:
            with trio.move_on_after(left_s):
                await trio.sleep(pause_s)
                route.refresh()
                return await self.call(route, "dest")
            raise PeerError(f"{route.address}: not reached again within {left_s:g} s (--recover-for)")

        while True:
            migration, lost = None, False
            failure: PostcopyError | None
            try:
                link = await self._link(open_link, "there was a connection")
            except PostcopyError as error:
                failure = error
                left_s = attempts.left_s(error, False, False, self.options.recover_for_s)
                if left_s <= 0:
                    if ended is not None:
                        self.output.emit("migration-ended", ended)
                    raise
            else:
                migration = await self._receive(link, attempts)
                failure, lost = migration.failure, migration.may_try_again
                left_s = self._tries_for_s(attempts, migration)
                ended = report.ended(self.machines[0].name, migration)
                if left_s <= 0:
                    self.output.emit("migration-ended", ended)
                    return migration
            pause_s = attempts.again(lost)
            if attempts.said.due():
                self.output.say(
                    f"dest: {failure}; the machine has stayed at the source, which is called again (attempt"
                    f" {attempts.count})",
                    about=migration,
                )
            await self._forget(migration)

    def _tries_for_s(self, attempts: Attempts, migration: DestinationMigration) -> float:
        """How long the source is called again after this attempt; 0: it is not."""
        if migration.state is not State.ABORTED or migration.cancelled or self.stop.is_set():
            return 0.0
        return attempts.left_s(migration.failure, migration.may_try_again, True, self.options.recover_for_s)

    async def _forget(self, migration: DestinationMigration | None) -> None:
        """Of an arrival that did not come about: before another one may have the memory that it had."""
        if migration is not None:
            self.machines[0].migration = None
            await migration.close()
        self.machines.clear()

    async def _link(self, open_link: Callable[[], Awaitable[Link]], what: str) -> Link:
        """The next control connection, which has the only place from then on."""
        found: list[Link] = []

        async def wait() -> None:
            found.append(await open_link())
            self.machines.append(Owned("unknown", Phase.ARRIVING))

        await first_of(wait, self.stop.wait)
        if not found:
            raise Interrupted(f"interrupted before {what}")
        return found[0]

    def _why_refused(self, asking: Asking) -> str:
        return "busy with another source" if self.machines or asking.waiting else ""

    async def _receive(self, link: Link, attempts: Attempts | None = None) -> DestinationMigration:
        (owned,) = self.machines
        migration = self.arrive(owned, link)
        if attempts is not None:
            migration.attempt = attempts.count
            migration.is_begun_again = lambda: self._tries_for_s(attempts, migration) > 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._announce, owned, migration)
            await migration.run(owned.stop)
            nursery.cancel_scope.cancel()
        owned.phase = Phase.HERE
        migration.is_begun_again = lambda: False  # its record is of how it has ended
        if migration.state is not State.COMPLETED:  # else it is recorded until the end of the machine here
            self.emit_timeline(owned, migration)
        return migration

    async def _announce(self, owned: Owned, migration: DestinationMigration) -> None:
        await migration.paused.wait()
        if owned.stop.is_set():  # it was abandoned
            return
        if migration.state is State.IN_DOUBT:
            self.output.say(
                f"dest: IN DOUBT: {migration.failure}; the source is asked whether the machine belongs to this"
                " host, which does not run it meanwhile",
                about=migration,
            )
            return
        self.output.say(
            f"dest: PAUSED: {migration.failure}. Still needed: {still_missing(migration)}. What touches missing memory"
            " waits until the source is back",
            about=migration,
        )

    # ---- all of it is here

    async def _afterwards(self, migration: DestinationMigration, machine: Machine) -> bool:
        """Lets it run as long as was asked, looks at it, writes it out."""
        config = self._config
        in_time = True
        if machine.outlives:  # nothing of it depends on this process any more
            return True
        if machine.live:
            ran_s = (now_ns() - migration.running_ns) / 1e9
            with trio.move_on_after(float("inf") if config.run_for_s is None else max(0.0, config.run_for_s - ran_s)):
                await self.stop.wait()
                # Until interrupted: that was what was asked for, unless a time had been set.
                in_time = config.run_for_s is None
        if not in_time:
            raise Interrupted(f"interrupted before it had run here for {config.run_for_s:g} s")
        await machine.pause()
        if config.verify:
            self.output.say("dest: checking all memory", about=migration)
            self._check = await machine.verify()
        if config.dump is not None:
            await machine.dump(config.dump)
            self._dumped = config.dump
        migration.check_machine()
        if migration.machine_failure:
            raise MigrationError(f"the machine reports a failure: {migration.machine_failure}")
        if self._check is not None and not self._check.ok:
            raise MigrationError(f"the memory is not as it must be: {self._check.what}")
        return True
