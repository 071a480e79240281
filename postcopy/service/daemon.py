# SPDX-License-Identifier: Apache-2.0
"""`postcopy daemon`: a process that owns machines, sends them away on request, and takes those that come.

A source ends when its machine has left, a destination has one machine and waits for it: neither can have the machine
that it sent away come back. So this is the union of both. A machine is *here* from its start or arrival until it has
left or ended; each has at most one migration at a time, and that is an engine of its own (`SourceMigration`,
`DestinationMigration`), which knows nothing of the others. What they share is the listening port, where the handshake
sends each connection to its migration, and the bandwidth.

**Bandwidth.** One limit for all that is pushed, divided in equal parts among the migrations that push, again whenever
one begins or ends. Requested pages are never held up by it.

**Names.** A machine keeps its name wherever it goes: the source sends it with the machine's configuration. A machine
whose name is taken here is refused, and so goes on where it is.

**Places.** An arriving machine has one of `MAX_INCOMING` from its offer until it is here, as far as it is not lost:
one whose source is gone after its commit waits for it and moves nothing. Memory is promised once (`_admission`), and
some descriptors are there for each before it is let in: what PREPARED promises must be possible.

**Peers.** None can take all of that: each has a share of the places (`_peers`).

**Failures.** Each migration, and each machine's end, is contained (`contain`): whatever goes wrong in one, also a
mistake of ours, is logged and ends that one. A machine that is this host's is never ended by it: it stays as it is, to
be looked at, until an operator ends it.

**The end.** Machines that are here end with this process, which says which ones; see `Service` for those that are on
their way.

Resource handling: `run` owns the machines and closes all of them, beside each other, each in the order that its state
demands, and bounded in time.
"""

from __future__ import annotations

import logging
import os
import resource
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import trio

from postcopy import machines
from postcopy._blocking import keep_reserve
from postcopy._stop import Stop
from postcopy.errors import ConfigurationError, PostcopyError
from postcopy.machines import BlockLayout
from postcopy.machines.kinds import MachineOptions, create_source, is_live
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.source import SourceMigration
from postcopy.migration.tasks import first_of
from postcopy.net import Acceptor, Asking, Link, Route
from postcopy.output import Output
from postcopy.records.control import EndedMachine, ProcessStatus, Steered
from postcopy.records.events import (
    DaemonResult,
    MachineEnded,
    MachineLeft,
    MachineReceived,
    MachineStarted,
)
from postcopy.records.migration import Machine
from postcopy.service import report
from postcopy.service._contain import contained, contained_call
from postcopy.service._peers import Shares
from postcopy.service.config import DaemonConfig
from postcopy.service.control import find, given_by_key, no_machine, peer_address, process_status
from postcopy.service.options import ONE_WAY, check_sending, is_name, record, sending
from postcopy.service.report import Json, Migration
from postcopy.service.schema import COMMANDS, ControlError
from postcopy.service.service import Owned, Phase, Request, Row, Service
from postcopy.wire import State, one_line

MAX_INCOMING = 32
MAX_INCOMING_OF_ONE = 16
"""Of one peer: it cannot take the places of all others."""
MAX_MACHINES = 256
MAX_LEFT = 16
"""Machines that have left of which the last numbers are kept for metrics."""
DESCRIPTORS = 96
"""That must be free for each machine that is let in: the largest side has some 80."""
MANY_DESCRIPTORS = 65536
AGAIN_S = 1.0
"""Pause before what should never end, and has, is begun again."""
FORCED_END_S = 45.0
"""How long a migration may take to end when it has to: its longest shielded step is `END_TIMEOUT_S`."""

log = logging.getLogger(__name__)


class Daemon(Service):
    """Everything but its beginning and end is asked through the control socket."""

    names_machines = True

    def __init__(self, config: DaemonConfig, output: Output) -> None:
        super().__init__(
            config.side, config.listen is not None, output, config.migration, config.arrival, config.protection
        )
        if config.name is not None and config.kind is None:
            raise ConfigurationError("--name goes with --machine")
        self._config = config
        self._nursery: trio.Nursery | None = None
        self._left: OrderedDict[str, Owned] = OrderedDict()
        self._sent = self._received = 0
        self._shares = Shares(MAX_INCOMING_OF_ONE, config.max_machines_per_peer, config.max_memory_per_peer_bytes)

    # ---- running

    async def run(self, stop: Stop) -> bool:
        """Until `stop`. True: that is how it succeeds."""
        self.stop = stop
        self.check_sets()
        if self._config.kind is None:  # whose machine makes the file
            self.check_arrival()
        _raise_descriptor_limit()
        keep_reserve()
        return await self.run_to_result(self._run, self._end)

    async def _run(self) -> bool:
        config, stop = self._config, self.stop
        async with AsyncExitStack() as stack:
            acceptor = None
            if config.listen is not None:
                acceptor = await stack.enter_async_context(self.listen(config.listen, "dest", self._why_refused))
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if config.kind is not None:
                    name = config.name or _new_name(config.kind)
                    await self._start(name, config.kind, config.machine or MachineOptions())
                if acceptor is not None:
                    receive = partial(self._receive_all, acceptor, nursery)
                    nursery.start_soon(_for_ever, "accepting connections", acceptor.serve)
                    nursery.start_soon(_for_ever, "receiving machines", receive)
                    self.announce_listening()
                nursery.start_soon(_for_ever, "showing progress", partial(self.output.follow, self._progress))
                nursery.start_soon(_for_ever, "giving up migrations", self.see_through)
                await stop.wait()
                await self._drain()
                if here := [owned.name for owned in self.machines if owned.loses and not owned.stays]:
                    self.output.say(f"{self.side}: machines that end with this process: {', '.join(here)}")
                if live := [f"{owned.name} ({owned.stays})" for owned in self.machines if owned.stays]:
                    self.output.say(f"{self.side}: machines that stay without this process: {', '.join(live)}")
                nursery.cancel_scope.cancel()
        return True

    async def _end(self, done: bool) -> None:
        """The end of all machines, and the result."""
        async with trio.open_nursery() as nursery:
            for owned in list(self.machines):
                nursery.start_soon(self._close, owned)  # bounded
        result = DaemonResult(
            side=self.side,
            status="completed" if done else "failed",
            error=None if done or self.failure is None else str(self.failure),
            machines_sent=self._sent,
            machines_received=self._received,
        )
        self.output.emit("result", result)

    async def _drain(self) -> None:
        """Until no machine is on its way any more."""
        deadline = trio.CancelScope()
        with deadline:
            while busy := [owned for owned in self.machines if owned.busy]:
                if self.stop.insisted:
                    deadline.deadline = min(deadline.deadline, trio.current_time() + FORCED_END_S)
                await first_of(self.changes.wait, self.stop.changes.wait)
        if deadline.cancelled_caught:
            log.error("these do not end: %s", ", ".join(owned.name for owned in busy))

    def _progress(self) -> ProcessStatus:
        return process_status(self)

    def changed(self) -> None:
        # Called from the middle of migrations, which are not to suffer from what is shown of them.
        contained_call("sharing the bandwidth", self.share_bandwidth)
        super().changed()

    def share_bandwidth(self) -> None:
        """One limit for all that push."""
        limit = self.options.max_bandwidth_bytes_per_s
        pushing = sum(owned.pushing for owned in self.machines)
        for owned in self.machines:
            if isinstance(owned.moving, SourceMigration):
                # One that does not push yet is given the part that it will have when it begins.
                parts = pushing + (not owned.pushing)
                owned.moving.set_bandwidth(max(1, limit // parts) if limit else 0)

    # ---- machines here

    def rows(self) -> list[Row]:
        """Without the machines of which it is not known yet what they are: their source says it within moments."""
        return [row for row in super().rows() if row[0]]

    def all_rows(self) -> list[Row]:
        here = self.rows()
        names = {name for name, _, _ in here}
        return here + [(name, None, owned.migration) for name, owned in self._left.items() if name not in names]

    async def _start(self, name: str, kind: str, options: MachineOptions) -> Owned:
        """`ConfigurationError` and `ResourceError` as `create_source`."""
        if not is_live(kind):
            raise ConfigurationError("a daemon has machines that run; `postcopy source` serves an image")
        owned = self._add(name, Phase.STARTING)
        try:
            owned.machine = create_source(kind, options)
            await owned.machine.prepare()
            await owned.machine.boot()
            await owned.machine.resume()
            owned.phase = Phase.HERE
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._close(owned)
            raise
        finally:
            self.changed()
        self.output.emit("machine-started", MachineStarted(machine=name, kind=kind))
        return owned

    def _add(self, name: str, phase: Phase) -> Owned:
        """A new row of the table."""
        self._check_name(name)
        if len(self.machines) >= MAX_MACHINES:
            raise ConfigurationError(f"there are {MAX_MACHINES} machines here already")
        owned = Owned(name, phase)
        self.machines.append(owned)
        return owned

    def _check_name(self, name: str, owned: Owned | None = None) -> None:
        """Whether this one may be called so."""
        if name and any(other.name == name and other is not owned and not other.has_left for other in self.machines):
            raise ConfigurationError(f"there is a machine {name!r} here already")

    async def _close(self, owned: Owned) -> None:
        """Ends a machine, and with it its row. Raises nothing that is a matter of the machine."""
        try:
            await contained(f"the end of {owned.name}", partial(self.close_machine, owned))
        finally:
            self._forget(owned)

    def _forget(self, owned: Owned) -> None:
        owned.phase = Phase.GONE
        if owned in self.machines:
            self.machines.remove(owned)
        if owned.migration is not None and owned.name:
            self._left[owned.name] = owned
            self._left.move_to_end(owned.name)
            while len(self._left) > MAX_LEFT:
                self._left.popitem(last=False)
        self.changed()

    # ---- sending

    async def _send(self, owned: Owned, to: Route) -> None:
        """One machine's way from here; contained."""
        go = trio.Event()

        async def ready(owned: Owned) -> None:
            assert owned.machine is not None
            try:
                await owned.machine.wait_ready()
                go.set()
            except PostcopyError as error:
                log.error("%s", error)
                assert owned.migration is not None
                owned.migration.cancel()

        try:
            await contained(f"sending {owned.name}", partial(self.send, owned, to, go, ready))
            migration = owned.migration  # the last attempt
            assert isinstance(migration, SourceMigration)
            if owned.has_left:
                self._sent += 1
                await self._close(owned)
            contained_call(f"announcing the end of sending {owned.name}", partial(self._ended, owned, migration))
        finally:
            if owned.phase is Phase.LEAVING:
                owned.phase = Phase.HERE
            self.changed()
        # Nothing waits for it: the machine can be sent again, or has been forgotten.
        await contained(f"telling the destination of {owned.name}", migration.announce)
        self._end_when_empty()

    def _end_when_empty(self) -> None:
        """A `source --hold` takes no machines: without one there is nothing left to do."""
        if self.side == "source" and not self.machines:
            self.stop.set()

    # ---- receiving

    def _why_refused(self, asking: Asking) -> str:
        waiting = len(asking.waiting)
        if self.stop.is_set():
            return "this daemon is about to end"
        arriving = [owned for owned in self.machines if owned.phase is Phase.ARRIVING]
        # One that is lost after its commit waits for its source, and takes no place.
        active = [one for one in arriving if one.migration is None or one.migration.state is not State.PAUSED]
        if waiting + len(active) >= MAX_INCOMING:
            return "too many machines are on their way to here"
        if len(self.machines) + waiting >= MAX_MACHINES:
            return f"there are {MAX_MACHINES} machines here already"
        of_it = asking.waiting.count(asking.identity)
        if reason := self._shares.why_refused(asking.identity, of_it, self.machines, active):
            return reason
        undecided = waiting + sum(not owned.decided for owned in arriving)
        if _free_descriptors() < DESCRIPTORS * (undecided + 1):
            return "this daemon has too few file descriptors left (ulimit -n, LimitNOFILE= of the unit)"
        return ""

    async def _receive_all(self, acceptor: Acceptor, nursery: trio.Nursery) -> None:
        while True:
            link = await acceptor.next_link()
            # Counted in this very step: the next one may be let in before its task has begun.
            try:
                owned = self._add("", Phase.ARRIVING)  # which its source names
            except ConfigurationError as error:
                log.error("%s: %s", link.peer, error)
                link.control.socket.close()
                continue
            owned.peer = link.identity
            nursery.start_soon(self._receive, owned, link)

    async def _receive(self, owned: Owned, link: Link) -> None:
        """One machine's way to here; contained."""
        try:
            await contained(f"receiving a machine from {link.peer}", partial(self._take, owned, link))
            migration = owned.migration
            ours = owned.machine is None and migration is not None and migration.may_run
            if ours and not owned.stop.is_set():
                log.error("%s: kept as it is, until it is ended with force", owned.name)
                await owned.stop.wait()
        finally:
            with trio.CancelScope(shield=True):  # bounded
                migration = owned.migration
                if owned.machine is None:
                    if isinstance(migration, DestinationMigration):
                        await contained(f"the end of what came from {link.peer}", migration.close)
                    link.control.socket.close()  # where the migration has not come to it
                    self._forget(owned)
                    self._shares.came_to_nothing(owned.peer)
                else:
                    owned.phase = Phase.HERE
                    self.changed()
        if migration is not None:
            contained_call(f"announcing the end of what came from {link.peer}", partial(self._ended, owned, migration))

    async def _take(self, owned: Owned, link: Link) -> None:
        migration = self.arrive(owned, link)
        await migration.run(owned.stop)
        machine = migration.machine
        if migration.state is not State.COMPLETED or machine is None:
            return
        # It is complete and runs: from here on it is this host's, whatever becomes of its pager.
        owned.machine = machine
        self._received += 1
        try:
            await migration.hand_over()
        except PostcopyError as error:
            log.error("%s: the machine runs on, what is stuck of its pager is kept: %s", owned.name, error)

    def make_arriving(
        self, owned: Owned, kind: str, config: Mapping[str, Any], layout: Sequence[BlockLayout]
    ) -> machines.Machine:
        size_bytes = sum(block.size_bytes for block in layout)
        self._shares.check_memory(owned.peer, size_bytes, self.machines)
        owned.offered_bytes = size_bytes
        return super().make_arriving(owned, kind, config, layout)

    def name_arriving(self, owned: Owned, kind: str, config: Mapping[str, Any]) -> str:
        """The name that its source says."""
        if not is_live(kind):
            raise ConfigurationError("a daemon takes machines that run; `postcopy dest` takes an image")
        name = config.get("name")
        if name is None:
            name = _new_name(kind)
        elif not is_name(name):
            raise ConfigurationError(f"{one_line(str(name), 80)!r} is no machine's name")
        self._check_name(name, owned)
        if owned.migration is not None:
            owned.migration.machine_name = name
        return str(name)

    def _ended(self, owned: Owned, migration: Migration) -> None:
        if owned.has_left:
            self.output.emit("machine-left", MachineLeft(machine=owned.name, migration_id=migration.migration_id))
        elif isinstance(migration, DestinationMigration) and owned.machine is not None:
            kind, id = owned.machine.kind, migration.migration_id
            self.output.emit("machine-received", MachineReceived(machine=owned.name, kind=kind, migration_id=id))
        self.emit_ended(owned, migration)
        if migration.state is not State.COMPLETED:
            why = f": {migration.failure}" if migration.failure is not None else ""  # none: it was taken back
            what = owned.name or f"a machine from {migration.peer}"
            self.output.say(f"{self.side}: {what}: {migration.status}{why}", about=migration)

    # ---- what only a daemon may be asked, or is asked in another sense

    def lost_by_quitting(self) -> str:
        """Also the machines that are here."""
        return "; ".join(f"{owned.name}: {owned.loses}" for owned in self.machines if owned.loses)

    def requests(self) -> Mapping[str, Request]:
        return {
            "start": self._request_start,
            "end": self._request_end,
            "migrate": self._request_migrate,
        }

    async def _request_start(self, arguments: Json) -> Machine:
        given = {COMMANDS["start"].arguments[name].key: value for name, value in arguments.items()}
        kind = given["kind"]
        self._check_not_ending()
        owned = await self._start(given.get("name") or _new_name(kind), kind, record(MachineOptions, given))
        return report.machine_status(owned.name, owned.machine, None)

    async def _request_end(self, arguments: Json) -> EndedMachine:
        owned = find(self.machines, arguments.get("machine"))
        while True:
            lost = owned.loses or (f"it is {owned.stays}" if owned.stays else "")
            if not arguments.get("force") and lost:
                raise ControlError(
                    "NotNow", f"{owned.name}: {lost}, and would be destroyed: wait, send it away, or say end --force"
                )
            if not owned.busy:
                break
            owned.stop.set()
            await self.changes.wait()
        if owned.phase is Phase.HERE:
            owned.unwanted = True
            owned.phase = Phase.ENDING  # so that no other request sends it away, or ends it, meanwhile
            try:
                await self._close(owned)
            finally:  # it has ended, also when the client has left meanwhile
                self.output.emit("machine-ended", MachineEnded(machine=owned.name))
            self._end_when_empty()
        return EndedMachine(machine=owned.name)

    async def _request_migrate(self, arguments: Json) -> Steered:
        owned = find(self.machines, arguments.get("machine"))
        address = await peer_address(self, arguments)
        # The last migration has ended, as `status` says, and only something of it has not been closed yet.
        while owned.finishing:
            await self.changes.wait()
        self._check_not_ending()
        if owned.phase is Phase.GONE:
            raise no_machine(owned.name)
        if owned.busy or owned.machine is None:
            raise ControlError("NotNow", f"{owned.name} is being {owned.phase.value} already")
        if isinstance(owned.migration, SourceMigration) and not owned.migration.may_run:
            raise ControlError("NotNow", f"{owned.name} belongs to the destination that it was sent to")
        given = given_by_key(ONE_WAY, arguments)
        try:
            how = sending(given, self.options)
            check_sending(given, how)
        except ConfigurationError as error:
            raise ControlError("BadArguments", str(error)) from error
        to = Route(address, tls_hostname=arguments.get("tls-hostname"))
        migration = self.leave(owned, to, owned.name, how)
        assert self._nursery is not None
        self._nursery.start_soon(self._send, owned, to)
        self.changed()
        while owned.phase is Phase.LEAVING and migration.connecting:
            await self.changes.wait()
        if migration.connecting:  # and never will be
            raise ControlError("Failed", f"{owned.name} is not on its way: {migration.status}: {migration.failure}")
        return Steered(machine=owned.name, migration_id=migration.migration_id)

    def _check_not_ending(self) -> None:
        if self.stop.is_set():
            raise ControlError("NotNow", "this process is about to end")


async def _for_ever(what: str, task: Callable[[], Awaitable[None]]) -> None:
    """What must go on as long as the process does, also when it has failed: the machines are here."""
    while True:
        await contained(what, task)
        await trio.sleep(AGAIN_S)


def _raise_descriptor_limit() -> None:
    """As far as it may: a machine of eight vCPUs takes some 80 descriptors, and the usual limit is 1024 for the sake of
    select(2), which nothing here uses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MANY_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _free_descriptors() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MANY_DESCRIPTORS
    try:
        return soft - len(os.listdir("/proc/self/fd"))
    except OSError:  # not even for that
        return 0


def _new_name(kind: str) -> str:
    return f"{kind if is_name(kind) else 'machine'}-{secrets.token_hex(3)}"
