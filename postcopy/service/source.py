# SPDX-License-Identifier: Apache-2.0
"""`postcopy source`: boots one machine, lets it compute, sends it away; and keeps running it when that fails."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import trio

from postcopy._blocking import run_sync
from postcopy._stop import Stop
from postcopy.dataplane.recorder import Recorder
from postcopy.errors import ConfigurationError
from postcopy.machines import Machine
from postcopy.machines.kinds import HostOptions, create_destination, create_source, is_live
from postcopy.migration import salvage
from postcopy.migration.source import SourceMigration, check_releasable
from postcopy.migration.tasks import Interrupted, first_of
from postcopy.net import Acceptor, Asking, Link, Route
from postcopy.output import Output
from postcopy.output.words import format_duration
from postcopy.records.events import Progress
from postcopy.service import report
from postcopy.service.config import ArrivalOptions, SourceConfig
from postcopy.service.service import Owned, Phase, Service, describe, still_missing, why_not_completed
from postcopy.wire import State

MAX_SESSIONS = 32  # destinations served at the same time
MAX_SESSIONS_OF_ONE = 16  # of these, of one peer
MAX_LOST = 16  # destinations of an image that were lost, and that may still come back

_HOW_TO_START = {
    "firecracker": "a microVM is not started from here: what the directory has is a snapshot, which a Firecracker loads"
    " (PUT /snapshot/load, snapshot_path {0}/state, mem_backend File {0}/00.memory)",
    "qemu": "a QEMU is not started from here: give one the files {0}/NN.memory as mem-path= of its memory backends, by"
    " their names in {0}/manifest.json, and -incoming defer; then migrate-set-capabilities x-ignore-shared, and"
    ' migrate-incoming "exec:cat {0}/state"',
    "program": "a program is not started from here: give it the files {0}/NN.memory as its own",
}
"""What a salvage of a machine that is a process of its own is good for."""


class Source(Service):
    def __init__(self, config: SourceConfig, output: Output) -> None:
        super().__init__(
            "source", config.listen is not None, output, config.migration, ArrivalOptions(), config.protection
        )
        self._config = config
        self._go = trio.Event()  # the machine is ready to leave
        self._restored: salvage.Restorable | None = None
        self._latest: SourceMigration | None = None
        self._lead: Recorder | None = None  # of what the guest has done before its migration
        self._was_ready = False  # before the latest
        self._starts_at_s = 0.0  # the migration, when the machine has computed for long enough
        self._completed = 0
        self.salvage_to = config.salvage_to

    async def run(self, stop: Stop) -> bool:
        self.stop = stop
        if self.salvage_to is not None:
            salvage.check_target(self.salvage_to)
        return await self.run_to_result(self._run, self._end)

    async def _run(self) -> bool:
        config = self._config
        machine = await self._make_machine()
        self.machines.append(Owned(machine.kind, Phase.HERE, machine))
        if self.options.release_ram:
            check_releasable(machine)
        async with AsyncExitStack() as stack:
            acceptor = None
            if config.listen is not None:
                # Before the machine is booted: an address that does not work should not cost that.
                acceptor = await stack.enter_async_context(self.listen(config.listen, "source", self._why_refused))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.output.follow, self._progress)
                nursery.start_soon(self.see_through)
                if acceptor is None:
                    done = await self._connect(machine)
                else:
                    nursery.start_soon(self._prepare, machine)
                    nursery.start_soon(acceptor.serve)
                    self.announce_listening()
                    done = await self._serve(machine, acceptor)
                self.measure_overhead(machine)
                nursery.cancel_scope.cancel()
        return done

    async def _end(self, done: bool) -> None:
        """The result, and the end of the machine."""
        owned = self.machines[-1] if self.machines else None
        if owned is None or owned.machine is None:
            self.emit_result(report.source_result(None, None, 0), done)
            return
        machine, latest = owned.machine, self._latest
        if latest is not None and latest.state is State.PAUSED:
            # The machine has been paused since it was given to the destination: its memory is as old as that, and
            # whole, but for what the destination had acknowledged.
            await self.write_salvage(machine, latest, latest.kept())
        result = report.source_result(machine, latest, self._completed)
        if done and latest is None:
            result.status = "completed"
        self.emit_result(result, done)
        if done:
            times = (
                f"{name} {format_duration(ms / 1e3)}"
                for name, ms in (("downtime", result.downtime_ms), ("total time", result.total_ms))
                if ms
            )
            self.output.say("; ".join([f"source: {describe(machine)}: {result.status}", *times]), about=latest)
        self.machines.clear()
        await self.close_machine(owned)

    def _progress(self) -> Progress:
        machine = self.machines[-1].machine
        assert machine is not None
        self.measure_overhead(machine)
        now = report.progress("source", machine, self._latest)
        if (starts_in_s := self._starts_at_s - trio.current_time()) > 0:
            now.starts_in_ms = round(1e3 * starts_in_s)
        return now

    # ---- the machine

    async def _make_machine(self) -> Machine:
        config, origin = self._config, self._config.origin
        if origin is None:
            machine = create_source(config.kind, config.machine)
            try:
                await machine.prepare()
            except BaseException:
                with trio.CancelScope(shield=True):  # bounded
                    await machine.close()
                raise
            return machine
        found = await run_sync(partial(salvage.examine, origin.path, reclaim=origin.reclaim, is_live=is_live))
        if found.doubts and not origin.force:
            raise ConfigurationError(
                f"--from {origin.path}: in doubt: {'; '.join(found.doubts)}; --force starts the machine all the same"
            )
        for doubt in found.doubts:
            self.output.say(f"source: in doubt: {doubt}")
        if how := _HOW_TO_START.get(found.salvage.manifest.machine):
            raise ConfigurationError(f"--from {origin.path}: {how.format(origin.path)}")
        options = config.machine
        make = partial(create_destination, host=HostOptions(options.backing or "memfd", options.disk, options.net))
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
            since = " of the switchover" if origin.manifest.side == salvage.SOURCE else ""
            self.output.say(f"source: the machine goes on from {origin.path}, in the state{since} it was in")
        await machine.resume()
        if self.output.records and self._latest is None and machine.live:
            self._lead = Recorder.open()
            if self._lead is not None:
                machine.be_recorded(self._lead)
        await machine.wait_ready()
        if machine.live:
            self._starts_at_s = trio.current_time() + self._config.migrate_after_s
            await trio.sleep_until(self._starts_at_s)
        self._go.set()

    # ---- one migration

    def _begin(self, machine: Machine, to: Link | Route) -> tuple[Owned, SourceMigration]:
        """A row of the table that is free, and the migration that takes it."""
        owned = self.machines[-1]
        if owned.busy:  # an image is sent to several destinations at the same time
            owned = Owned(machine.kind, Phase.HERE, machine)
            self.machines.append(owned)
        return owned, self.leave(owned, to)

    def _make_leaving(self, *arguments: Any) -> SourceMigration:
        self._was_ready = self._was_ready or (self._latest is not None and self._latest.ready_ns > 0)
        self._latest = super()._make_leaving(*arguments)
        if self._lead is not None:
            self._latest.record(self._lead)
            self._lead = None
        return self._latest

    async def _migrate(self, owned: Owned, to: Link | Route) -> SourceMigration:
        assert owned.machine is not None
        keep = owned.machine.live or self._config.connect is not None
        try:
            migration = await self.send(owned, to, self._go, self._announce, keep=keep)
        finally:
            owned.phase = Phase.HERE
            if len(self.machines) > 1:
                self.machines.remove(owned)
        self.emit_ended(owned, migration)
        return migration

    async def _announce(self, owned: Owned) -> None:
        """Says that the machine is paused here while it is not known what became of it there, and that it was taken
        back."""
        migration = owned.migration
        assert migration is not None
        await migration.paused.wait()
        if not owned.stop.is_set():  # it was not abandoned
            self.output.say(
                f"source: PAUSED: {migration.failure}. Still needed: {still_missing(migration)}. It is kept here until"
                " the destination is back",
                about=migration,
            )
        while migration.state is not State.RECLAIMED:
            await self.changes.wait()
        self.output.say(
            "source: the machine was taken back; it goes on here until interrupted, or migrated again", about=migration
        )

    # ---- connecting

    async def _connect(self, machine: Machine) -> bool:
        assert self._config.connect is not None
        owned, first = self._begin(machine, self._config.connect)
        async with trio.open_nursery() as nursery:

            async def prepare() -> None:
                await first.connected.wait()  # before that a machine need not be booted
                if not first.connecting:
                    await self._prepare(machine)

            nursery.start_soon(prepare)
            migration = await self._migrate(owned, self._config.connect)
            if migration.state is State.COMPLETED:
                self._completed += 1
                return True
            reclaimed = migration.state is State.RECLAIMED
            self.failure = why_not_completed(migration)
            was_ready = self._was_ready or migration.ready_ns > 0  # in any attempt
            keep = reclaimed or (migration.may_run and was_ready and self._config.keep)
            if machine.outlives and migration.may_run:
                self.output.say(f"source: migration failed: {self.failure}; the machine goes on", about=migration)
            elif keep and machine.live and not self.stop.is_set():
                if not reclaimed:
                    self.output.say(
                        f"source: migration failed: {self.failure}; the machine goes on here until interrupted",
                        about=migration,
                    )
                await self.stop.wait()
            nursery.cancel_scope.cancel()
        return False

    # ---- listening

    def _leaving(self) -> list[Owned]:
        """The oldest first."""
        return [owned for owned in self.machines if owned.phase is Phase.LEAVING]

    def _lost(self) -> list[Owned]:
        """Destinations of an image that were lost, and that are waited for although nothing depends on it; the oldest
        first."""
        return [owned for owned in self.machines if owned.lost and owned.machine is not None and not owned.machine.live]

    def _why_refused(self, asking: Asking) -> str:
        # A destination of an image that was lost takes no place: it may come back, or has begun anew. Nor does one
        # from which the machine was taken back: it is waited for only to say so to it.
        lost = self._lost()
        active = [
            one
            for one in self._leaving()
            if one not in lost and (one.migration is None or one.migration.state is not State.RECLAIMED)
        ]
        busy = len(active) + len(asking.waiting)
        if busy + self._completed >= self._config.serve:
            return "busy with another destination" if busy else "everything has been served"
        of_one = sum(one.peer == asking.identity for one in active) + asking.waiting.count(asking.identity)
        if busy >= MAX_SESSIONS or of_one >= MAX_SESSIONS_OF_ONE:
            return "too many destinations at the same time"
        return ""

    async def _serve(self, machine: Machine, acceptor: Acceptor) -> bool:
        """Until as many destinations have been served as were asked for."""
        serve = self._config.serve
        enough = trio.Event()

        async def session(owned: Owned, link: Link) -> None:
            migration = await self._migrate(owned, link)
            if migration.state is State.COMPLETED:
                self._completed += 1
                if self._completed >= serve:
                    enough.set()
            elif migration.state is not State.RECLAIMED and not self.stop.is_set():
                waits = migration.may_try_again and machine.live and (self._config.keep or self.options.recover_for_s)
                waiting = "; waiting for it to come again" if waits else ""
                self.output.say(
                    f"source: migration to {migration.peer} failed: {migration.failure}{waiting}", about=migration
                )
            keep = migration.state is State.RECLAIMED or (migration.may_run and self._config.keep)
            if machine.live and migration.may_try_again and not keep:
                self.changed()
                with trio.move_on_after(self.options.recover_for_s):
                    while self._latest is migration and not self.stop.is_set():
                        await first_of(self.changes.wait, self.stop.wait)
                    return
            if machine.live and migration.state is not State.COMPLETED and not keep:
                self.failure = why_not_completed(migration)
                enough.set()
            self.changed()

        async def take() -> None:
            while True:
                link = await acceptor.next_link()
                owned, _ = self._begin(machine, link)
                owned.peer = link.identity
                sessions.start_soon(session, owned, link)
                for owned in self._lost()[:-MAX_LOST]:  # each keeps a page server
                    owned.stop.set()

        async def give_up_lost() -> None:
            """Of an image, those that were waited for while there was something else to do, also one that is lost only
            now. A machine that runs is seen through."""
            while self._leaving():
                for owned in self._lost():
                    owned.stop.set()
                await self.changes.wait()

        async with trio.open_nursery() as sessions:  # each ends by itself, or by `stop`
            await first_of(take, enough.wait, self.stop.wait)
            sessions.start_soon(give_up_lost)
        if serve == float("inf"):
            return self.failure is None
        done = self._completed >= serve
        if not done and self.failure is None:
            self.failure = Interrupted(f"interrupted after {self._completed} of {serve:g} destinations")
        return done
