# SPDX-License-Identifier: Apache-2.0
"""`postcopy daemon`: a process that owns machines, sends them away when it is told to, and takes those that come.

A source ends when its machine has left, a destination has one machine and waits for it: neither can have the machine
that it sent away come back. So this is the union of both. A machine is *here* from its start or arrival until it has
left or ended, whoever asks; each has at most one migration at a time, and that is an engine of its own
(`SourceMigration`, `DestinationMigration`), which knows nothing of the others. What they share is the listening port,
where the handshake sends each connection to its migration, and the bandwidth.

**Bandwidth.** One limit for all that is pushed, divided in equal parts among the migrations that push, again whenever
one begins or ends. Requested pages are never held up by it.

**Names.** A machine keeps its name wherever it goes: the source tells it with the machine's configuration. A machine
whose name is taken here is refused, and so goes on where it is.

**Places.** An arriving machine has one of `MAX_INCOMING` from its offer until it is here, as far as it is not lost:
one whose source is gone after its commit waits for it and moves nothing. Memory is promised once (`_admission`), and
some descriptors are there for each before it is let in: what PREPARED says must hold.

**Failures.** Each migration, and each machine's end, is contained (`contain`): whatever goes wrong in one, also a
mistake of ours, is logged and ends that one. A machine that is this host's is never ended by it: it stays as it is, to
be looked at, until somebody ends it.

**The end.** `stop` gives up what is not decided: such a machine is still here, and ends with this process, as all
others here do. What is past its point of no return is seen through, however long that takes, since its pages are
nowhere else; unless that is asked for twice.

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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import trio

from postcopy._blocking import keep_reserve
from postcopy.errors import ConfigurationError, PostcopyError
from postcopy.machines import BlockLayout, Machine
from postcopy.machines.kinds import MachineOptions, create_destination, create_source
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.net.channels import Acceptor, Address, CallingLink, Endings, Link, parse_address
from postcopy.output import Output
from postcopy.service import report
from postcopy.service._contain import contained, contained_call
from postcopy.service.controllers import OVER, changed, reclaim, steer
from postcopy.service.handler import ControlHandler, Handler
from postcopy.service.options import is_name
from postcopy.service.schema import ControlError, Json, plain
from postcopy.service.status import Migration, machine_status
from postcopy.wire.protocol import State, one_line

MAX_INCOMING = 16
MAX_MACHINES = 256
MAX_LEFT = 16
"""Machines that have left of which the last numbers are kept for metrics."""
DESCRIPTORS = 96
"""That must be free for each machine that is let in: the largest side has some 80 (`_needs`)."""
MANY_DESCRIPTORS = 65536
AGAIN_S = 1.0
"""Pause before what should never end, and has, is begun again."""
FORCED_END_S = 45.0
"""How long a migration may take to end that was told to: its longest shielded step is `END_TIMEOUT_S`."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ArrivalOptions:
    """How machines are received."""

    make_pager: Callable[[], Any]
    backing: str = "memfd"
    disk: str | None = None
    net: str | None = None  # where the network device of one that has one is attached; for one at a time
    busy_poll_us: int = 0


class _Owned:
    """A machine that is here, on its way to here, or on its way from here."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.machine: Machine | None = None
        self.migration: Migration | None = None  # the present one, or the last
        self.busy = False  # a task works on it
        self.ending = False
        self.arriving = False  # it is not here yet, as far as this host knows
        self.stop = trio.Event()  # gives its migration up
        self.told = ""  # the migration's status, as it was said last

    @property
    def has_left(self) -> bool:
        return isinstance(self.migration, SourceMigration) and self.migration.state is State.COMPLETED

    @property
    def is_finishing(self) -> bool:
        """Whether its migration is decided to the end, and some of it has not been closed yet."""
        job = self.migration
        if not self.busy or self.ending or job is None:
            return False
        return job.state in OVER or (isinstance(job, DestinationMigration) and job.completed_ns > 0)

    @property
    def is_lost(self) -> bool:
        """Whether it was sent to a host that does not answer any more."""
        return self.busy and isinstance(self.migration, SourceMigration) and self.migration.state is State.PAUSED

    @property
    def decided(self) -> bool:
        """Whether ending it now would lose pages that are needed elsewhere, or here."""
        job = self.migration
        return self.busy and job is not None and not job.cancellable and job.state not in OVER

    @property
    def has_place(self) -> bool:
        """Whether it takes one of the places of those on their way to here."""
        return self.arriving and self.busy and (self.migration is None or self.migration.state is not State.PAUSED)

    def cancel(self) -> bool:
        """Gives up what it is in, and says whether that was still possible."""
        return self.migration is not None and self.migration.cancel()


class Daemon(ControlHandler):
    """Make it, `run` it; everything else is asked through the control socket."""

    def __init__(
        self,
        output: Output,
        options: SourceOptions,
        arrival: ArrivalOptions,
        *,
        listen: Address | None = None,
        first: tuple[str, MachineOptions] | None = None,
        name: str | None = None,
        side: str = "daemon",
    ) -> None:
        """`first`: a machine to begin with, its kind and options, called `name`."""
        super().__init__()
        self.side = side
        self._output = output
        self._options = options
        self._arrival = arrival
        self._listen = listen
        self._first = first
        self._name = name
        self._acceptor: Acceptor | None = None
        self._listening: list[str] = []  # also when that has been closed, at the end
        self._endings = Endings()
        self._nursery: trio.Nursery | None = None
        self._here: list[_Owned] = []
        self._left: OrderedDict[str, _Owned] = OrderedDict()
        self._forced = False
        self._changes = trio.Event()
        self._sent = self._received = 0

    # ---- running

    async def run(self, stop: trio.Event) -> bool:
        """Until `stop`. True: that is how it succeeds."""
        self.stop = stop
        done = False
        _raise_descriptor_limit()
        keep_reserve()
        if self._listen is not None:
            self._acceptor = await Acceptor.open(self._listen, "dest", self._why_refused, self._endings)
            self._listening = [str(address) for address in self._acceptor.addresses]
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                if self._first is not None:
                    await self._start(self._name or _new_name(self._first[0]), *self._first)
                if self._acceptor is not None:
                    nursery.start_soon(_for_ever, "accepting connections", self._acceptor.serve)
                    nursery.start_soon(
                        _for_ever, "receiving machines", partial(self._receive_all, self._acceptor, nursery)
                    )
                    for address in self._listening:
                        self._output.emit("listening", {"side": self.side, "address": address})
                        self._output.say(f"{self.side}: listening on {address}")
                nursery.start_soon(_for_ever, "showing progress", partial(self._output.follow, self._progress))
                await stop.wait()
                await self._drain()
                nursery.cancel_scope.cancel()
            done = True
        finally:
            with trio.CancelScope(shield=True):  # each close is bounded
                if self._acceptor is not None:
                    await contained("the end of listening", self._acceptor.close)
                async with trio.open_nursery() as nursery:
                    for owned in list(self._here):
                        nursery.start_soon(self._close, owned)
            counts = {"sent": self._sent, "received": self._received}
            self._output.emit("result", {"side": self.side, "status": "completed" if done else "failed", **counts})
        return done

    async def _drain(self) -> None:
        """Until no machine is on its way any more."""
        said = False
        deadline = trio.CancelScope()
        with deadline:
            while busy := [owned for owned in self._here if owned.busy]:
                if self._forced:
                    deadline.deadline = min(deadline.deadline, trio.current_time() + FORCED_END_S)
                for owned in busy:
                    if self._forced:
                        owned.stop.set()
                    elif not owned.decided:
                        owned.cancel()
                    elif not said:
                        said = True
                        self._output.say(
                            f"{self.side}: {owned.name} is past its point of no return: waiting until it has moved;"
                            " a second signal, or quit --force, ends it and loses what is missing"
                        )
                await self._changes.wait()
        if deadline.cancelled_caught:
            log.error("these do not end: %s", ", ".join(owned.name for owned in busy))

    def _progress(self) -> Json:
        busy = sum(owned.busy for owned in self._here)
        word = "machine" if len(self._here) == 1 else "machines"
        return {**self.status(), "status": f"{len(self._here)} {word}, {busy} migrating"}

    def _change(self) -> None:
        """Something may have changed in a migration: shares the bandwidth anew, says what is new."""
        # Called from the middle of migrations, which are not to suffer from what is shown of them.
        contained_call("sharing the bandwidth", self._share)
        contained_call("telling what has changed", self._tell_changes)
        self._changes.set()
        self._changes = trio.Event()

    def _tell_changes(self) -> None:
        for owned in self._here:
            job = owned.migration
            if job is not None and job.status != owned.told:
                fields = {**report.ended(_direction(job), job), "machine": owned.name, "from": owned.told}
                owned.told = job.status
                self._output.emit("migration-status", fields)
        self._output.kick()

    def _share(self) -> None:
        """One limit for all that push."""
        limit = self._options.max_bandwidth_bytes_per_s
        outgoing = [
            owned.migration for owned in self._here if owned.busy and isinstance(owned.migration, SourceMigration)
        ]
        pushing = [job for job in outgoing if job.state in (State.COMMITTED, State.POSTCOPY)]
        for job in outgoing:
            # One that does not push yet is given the part that it will have when it begins.
            parts = len(pushing) + (job not in pushing)
            job.set_bandwidth(max(1, limit // parts) if limit else 0)

    # ---- machines here

    async def _start(self, name: str, kind: str, options: MachineOptions) -> _Owned:
        """`ConfigurationError` and `ResourceError` as `create_source`."""
        if kind == "image":
            raise ConfigurationError("a daemon has machines that run; `postcopy source` serves an image")
        owned = self._claim(name)
        owned.busy = True
        try:
            owned.machine = create_source(kind, options)
            await owned.machine.boot()
            await owned.machine.resume()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._close(owned)
            raise
        finally:
            owned.busy = False
            self._change()
        self._output.emit("machine-started", {"machine": name, "kind": kind})
        return owned

    def _claim(self, name: str, owned: _Owned | None = None) -> _Owned:
        """A place for a machine of this name; or gives this name to one that has a place."""
        if any(other.name == name and other is not owned and not other.has_left for other in self._here):
            raise ConfigurationError(f"there is a machine {name!r} here already")
        if owned is None:
            if len(self._here) >= MAX_MACHINES:
                raise ConfigurationError(f"there are {MAX_MACHINES} machines here already")
            owned = _Owned(name)
            self._here.append(owned)
        owned.name = name
        return owned

    def _find(self, name: str | None) -> _Owned:
        """The machine of this name, or without one the only one. `ControlError` when there is none."""
        here = [owned for owned in self._here if not owned.has_left]
        found = [owned for owned in here if (owned.name == name if name else _machine(owned) is not None)]
        if not found:
            raise ControlError("BadArguments", f"there is no machine {name!r} here" if name else "no machine is here")
        return _only(found)

    async def _close(self, owned: _Owned) -> None:
        """Ends a machine, and with it its place here. Raises nothing that is a matter of the machine."""
        machine = owned.machine

        async def close() -> None:
            assert machine is not None
            try:
                await machine.close()
            except PostcopyError as error:
                log.error("%s: %s", owned.name, error)

        try:
            if machine is not None:
                await contained(f"the end of {owned.name}", close)
        finally:
            self._forget(owned)

    def _forget(self, owned: _Owned) -> None:
        if owned in self._here:
            self._here.remove(owned)
        if owned.migration is not None:
            self._left[owned.name] = owned
            self._left.move_to_end(owned.name)
            while len(self._left) > MAX_LEFT:
                self._left.popitem(last=False)
        self._change()

    # ---- sending

    async def _send(self, owned: _Owned, migration: SourceMigration) -> None:
        """One machine's way from here; contained."""
        try:
            await contained(f"sending {owned.name}", partial(self._migrate, owned, migration))
            if owned.has_left:
                self._sent += 1
                await self._close(owned)
            contained_call(f"telling of the end of sending {owned.name}", partial(self._ended, owned, migration))
        finally:
            owned.busy = False
            self._change()
        # Nobody waits for it: the machine has its place again, or another one has.
        await contained(f"telling what became of {owned.name}", migration.announce)

    async def _migrate(self, owned: _Owned, migration: SourceMigration) -> None:
        go = trio.Event()

        async def ready() -> None:
            try:
                await migration.machine.wait_ready()
                go.set()
            except PostcopyError as error:
                log.error("%s", error)
                owned.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ready)
            await migration.run(go, owned.stop)
            nursery.cancel_scope.cancel()

    # ---- receiving

    def _why_refused(self, waiting: int) -> str:
        if self.stop.is_set():
            return "this daemon is about to end"
        incoming = waiting + sum(owned.has_place for owned in self._here)
        if incoming >= MAX_INCOMING:
            return "too many machines are on their way to here"
        if len(self._here) + waiting >= MAX_MACHINES:
            return f"there are {MAX_MACHINES} machines here already"
        undecided = waiting + sum(owned.arriving and owned.busy and not owned.decided for owned in self._here)
        if _free_descriptors() < DESCRIPTORS * (undecided + 1):
            return "this daemon has too few file descriptors left (ulimit -n, LimitNOFILE= of the unit)"
        return ""

    async def _receive_all(self, acceptor: Acceptor, nursery: trio.Nursery) -> None:
        while True:
            link = await acceptor.next_link()
            # Counted in this very step: the next one may be let in before its task has begun.
            try:
                owned = self._claim(_new_name("arriving"))
            except ConfigurationError as error:
                log.error("%s: %s", link.peer, error)
                link.control.socket.close()
                continue
            owned.busy = owned.arriving = True
            nursery.start_soon(self._receive, owned, link)

    async def _receive(self, owned: _Owned, link: Link) -> None:
        """One machine's way to here; contained."""
        try:
            await contained(f"receiving {owned.name}", partial(self._take, owned, link))
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
                        await contained(f"the end of {owned.name}", migration.close)
                    link.control.socket.close()  # should nobody have come to that
                owned.busy = owned.arriving = False
                if owned.machine is None:
                    self._forget(owned)
                self._change()
        if migration is not None:
            contained_call(f"telling of the end of receiving {owned.name}", partial(self._ended, owned, migration))

    async def _take(self, owned: _Owned, link: Link) -> None:
        arrival = self._arrival
        migration = owned.migration = DestinationMigration(
            link,
            backing=arrival.backing,
            disk=arrival.disk,
            net=arrival.net,
            busy_poll_us=arrival.busy_poll_us,
            heartbeat_s=self._options.heartbeat_s,
            recover_for_s=self._options.recover_for_s,
            make_machine=_Maker(self._claim, owned),
            make_pager=arrival.make_pager,
            on_change=self._change,
        )
        await migration.run(owned.stop)
        machine = migration.machine
        if migration.state is not State.COMPLETED or machine is None:
            return
        # It is complete and runs: from here on it is this host's, whatever becomes of its pager.
        owned.machine = machine
        self._received += 1
        try:
            await migration.release()
        except PostcopyError as error:
            log.error("%s: the machine runs on, what is stuck of its pager is kept: %s", owned.name, error)

    def _ended(self, owned: _Owned, migration: Migration) -> None:
        if owned.has_left:
            self._output.emit("machine-left", {"machine": owned.name})
        elif isinstance(migration, DestinationMigration) and owned.machine is not None:
            self._output.emit("machine-received", {"machine": owned.name, "kind": owned.machine.kind})
        fields = {**report.ended(_direction(migration), migration), "machine": owned.name}
        fields["downtime-ms"] = report.milliseconds(migration.downtime_ns)
        fields["total-ms"] = report.milliseconds(migration.total_ns)
        self._output.emit("migration-ended", fields)
        if migration.state is not State.COMPLETED:
            why = f": {migration.failure}" if migration.failure is not None else ""  # none: it was taken back
            self._output.say(f"{self.side}: {owned.name}: {migration.status}{why}")

    # ---- what may be asked

    def machines(self) -> list[tuple[str, Machine | None, Migration | None]]:
        return [(owned.name, _machine(owned), owned.migration) for owned in self._here]

    def all_machines(self) -> list[tuple[str, Machine | None, Migration | None]]:
        here = self.machines()
        names = {name for name, _, _ in here}
        return here + [(name, None, owned.migration) for name, owned in self._left.items() if name not in names]

    def listening(self) -> list[str]:
        return self._listening

    def settings(self) -> Json:
        return {
            "max-bandwidth": self._options.max_bandwidth_bytes_per_s,
            "bulk-channels": self._options.bulk_channels,
            "recover-for": plain(self._options.recover_for_s),
        }

    def handlers(self) -> Mapping[str, Handler]:
        return {
            "start": self._do_start,
            "end": self._do_end,
            "migrate": self._do_migrate,
            "pause": self._do_pause,
            "recover": self._do_recover,
            "set": self._do_set,
            "cancel": self._do_cancel,
            "reclaim": self._do_reclaim,
            "quit": self._do_quit,
        }

    async def _do_start(self, arguments: Json) -> Json:
        kind = arguments["machine"]
        options = MachineOptions(
            memory_bytes=arguments.get("memory"),
            vcpus=arguments.get("vcpus"),
            workload=arguments.get("workload"),
            backing=arguments.get("backing"),
            working_set_bytes=arguments.get("working-set"),
            seed=arguments.get("seed"),
            disk=arguments.get("disk"),
            image=arguments.get("image"),
        )
        self._not_ending()
        owned = await self._start(arguments.get("name") or _new_name(kind), kind, options)
        return machine_status(owned.name, owned.machine, None)

    async def _do_end(self, arguments: Json) -> Json:
        owned = self._find(arguments.get("machine"))
        while owned.busy:
            if arguments.get("force"):
                owned.stop.set()
            elif owned.decided and not owned.ending:
                raise ControlError(
                    "NotNow", f"pages of {owned.name} are still on their way: wait, or end it with force"
                )
            else:
                owned.cancel()
            await self._changes.wait()
        if owned in self._here:
            owned.busy = owned.ending = True  # nobody sends it away, or ends it, meanwhile
            try:
                await self._close(owned)
            finally:
                owned.busy = False
            self._output.emit("machine-ended", {"machine": owned.name})
        return {"machine": owned.name}

    async def _do_migrate(self, arguments: Json) -> Json:
        address = parse_address(arguments["to"])
        owned = self._find(arguments.get("machine"))
        # The last one is over, as everybody can see, and only something of it has not ended yet.
        while owned.is_finishing:
            await self._changes.wait()
        self._not_ending()
        if owned not in self._here:
            raise ControlError("BadArguments", f"there is no machine {owned.name!r} here")
        if owned.busy or owned.machine is None:
            doing = "ended" if owned.ending else "moved" if owned.migration is not None else "started"
            raise ControlError("NotNow", f"{owned.name} is being {doing} already")
        if isinstance(owned.migration, SourceMigration) and not owned.migration.may_run:
            raise ControlError("NotNow", f"{owned.name} belongs to the destination that it was sent to")
        owned.stop = trio.Event()
        migration = SourceMigration(
            owned.machine,
            partial(CallingLink.open, address, "source"),
            replace(self._options, name=owned.name),
            peer=address,
            on_change=self._change,
        )
        owned.migration = migration
        owned.busy = True
        assert self._nursery is not None
        self._nursery.start_soon(self._send, owned, migration)
        self._change()
        while owned.busy and migration.connecting:
            await self._changes.wait()
        if migration.connecting:  # and never will be
            raise ControlError("Failed", f"{owned.name} is not on its way: {migration.status}: {migration.failure}")
        return {"machine": owned.name, "migration": migration.migration_id}

    def _jobs(self, arguments: Json) -> list[Migration]:
        """The migration of the machine that is named, or all that are going on."""
        here = [self._find(arguments["machine"])] if "machine" in arguments else self._here
        return [owned.migration for owned in here if owned.busy and owned.migration is not None]

    async def _do_pause(self, arguments: Json) -> Json:
        await trio.lowlevel.checkpoint()
        return steer(self._jobs(arguments), True)

    async def _do_recover(self, arguments: Json) -> Json:
        await trio.lowlevel.checkpoint()
        jobs = self._jobs(arguments)
        if "to" in arguments and len(jobs) > 1:
            raise ControlError("BadArguments", "say which machine's migration has a new address")
        return steer(jobs, False, arguments.get("to"))

    async def _do_set(self, arguments: Json) -> Json:
        await trio.lowlevel.checkpoint()
        self._options = changed(self._options, arguments)
        for owned in self._here:
            if owned.busy and owned.migration is not None:
                owned.migration.set_recover_for(self._options.recover_for_s)
        self._share()
        return self.settings()

    async def _do_cancel(self, arguments: Json) -> Json:
        await trio.lowlevel.checkpoint()
        here = [self._find(arguments["machine"])] if "machine" in arguments else self._here
        busy = [owned for owned in here if owned.busy and owned.migration is not None]
        if not busy:
            raise ControlError("NotNow", "no migration is going on")
        cancelled = [owned.name for owned in busy if owned.cancel()]
        if not cancelled:
            raise ControlError("NotNow", "the machine belongs to the destination already: that cannot be taken back")
        return {"cancelled": cancelled}

    async def _do_reclaim(self, arguments: Json) -> Json:
        await trio.lowlevel.checkpoint()
        if "machine" in arguments or len(self._here) == 1:
            owned = self._find(arguments.get("machine"))
        elif lost := [owned for owned in self._here if owned.is_lost]:
            owned = _only(lost)
        else:
            raise ControlError("NotNow", "no machine is here whose destination was lost past its point of no return")
        if not owned.busy or not isinstance(owned.migration, SourceMigration):
            raise ControlError("NotNow", f"{owned.name} has not been sent away")
        return await reclaim(owned.name, owned.migration, bool(arguments.get("force")))

    async def _do_quit(self, arguments: Json) -> Json:
        await trio.lowlevel.checkpoint()
        if arguments.get("force"):
            self._forced = True
        elif here := [owned.name for owned in self._here if not owned.has_left]:
            raise ControlError(
                "NotNow", f"these end with this process: {', '.join(here)}: migrate or end them, or quit with force"
            )
        self.stop.set()
        self._change()
        return {}

    def _not_ending(self) -> None:
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


class _Maker:
    """Makes the machine that a source offers, under the name that the source says."""

    def __init__(self, claim: Callable[[str, _Owned], _Owned], owned: _Owned) -> None:
        self._claim = claim
        self._owned = owned

    def __call__(
        self,
        kind: str,
        config: Mapping[str, Any],
        layout: Sequence[BlockLayout],
        backing: str,
        *,
        disk: str | None = None,
        net: str | None = None,
    ) -> Machine:
        if kind == "image":
            raise ConfigurationError("a daemon takes machines that run; `postcopy dest` takes an image")
        name = config.get("name")
        if name is None:
            name = _new_name(kind)
        elif not is_name(name):
            raise ConfigurationError(f"{one_line(str(name), 80)!r} is no machine's name")
        self._claim(str(name), self._owned)
        assert self._owned.migration is not None
        self._owned.migration.machine_name = self._owned.name
        rest = {key: value for key, value in config.items() if key != "name"}
        return create_destination(kind, rest, layout, backing, disk=disk, net=net)


def _only(found: list[_Owned]) -> _Owned:
    if len(found) > 1:
        raise ControlError("BadArguments", f"which of them? {', '.join(owned.name for owned in found)}")
    return found[0]


def _machine(owned: _Owned) -> Machine | None:
    if owned.machine is None and isinstance(owned.migration, DestinationMigration):
        return owned.migration.machine
    return owned.machine


def _direction(migration: Migration) -> str:
    return "outgoing" if isinstance(migration, SourceMigration) else "incoming"


def _new_name(kind: str) -> str:
    return f"{kind if is_name(kind) else 'machine'}-{secrets.token_hex(3)}"
