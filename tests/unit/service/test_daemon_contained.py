# SPDX-License-Identifier: Apache-2.0
"""Whatever goes wrong with one machine of a daemon, the others hear nothing of it: with engines that make every
mistake there is, with peers that do what no peer should, and without threads, descriptors or memory."""

from __future__ import annotations

import errno
import io
import os
import resource
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from postcopy._blocking import run_sync
from postcopy._stop import Stop
from postcopy.dataplane.pager import Pager
from postcopy.errors import MigrationError, PeerError, PostcopyError
from postcopy.machines import Machine
from postcopy.machines.kinds import MachineOptions
from postcopy.machines.toy.machine import ToyMachine
from postcopy.memory import _admission
from postcopy.memory._admission import PROMISES, Room
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.net import Acceptor, Address, Asking, CallingLink
from postcopy.output import Output
from postcopy.records import as_json
from postcopy.service import daemon as daemon_module
from postcopy.service import service as service_module
from postcopy.service._contain import contained
from postcopy.service.config import ArrivalOptions, DaemonConfig
from postcopy.service.control import ControlHandler, process_status
from postcopy.service.daemon import MAX_INCOMING, MAX_INCOMING_OF_ONE, Daemon
from postcopy.service.schema import ControlError, Request, parse_arguments
from postcopy.service.service import Phase
from postcopy.wire import Block, Offer, SourceProtocol, State

pytestmark = pytest.mark.slow

DEADLINE_S = 40.0
MIB = 1 << 20
SMALL = MachineOptions(memory_bytes=16 * MIB, vcpus=1, workload="random", used_memory_bytes=1 * MIB)
MISTAKES = [KeyError("a mistake"), RuntimeError("can't start new thread"), MemoryError(), OSError(errno.EMFILE, "none")]


class Running:
    """A daemon in a task."""

    def __init__(self, daemon: Daemon, stop: Stop) -> None:
        self.daemon = daemon
        self.stop = stop
        self.ended = trio.Event()

    async def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        answer = await ControlHandler(self.daemon).execute(Request(command, parse_arguments(command, given)))
        return as_json(answer)

    @property
    def address(self) -> Address:
        return self.daemon.listening[0]

    def status(self, name: str) -> dict[str, Any] | None:
        for machine in as_json(process_status(self.daemon))["machines"]:
            if machine["name"] == name:
                return dict(machine)
        return None

    async def until(self, true: Callable[[], bool]) -> None:
        while not true():
            assert not self.ended.is_set()
            await trio.sleep(0.005)

    async def computes(self, name: str) -> None:
        """The machine goes on."""

        def operations() -> int:
            machine = self.status(name)
            assert machine is not None
            return int(machine["guest"]["operations"])

        before = operations()
        await self.until(lambda: operations() > before)


@asynccontextmanager
async def running(
    options: SourceOptions | None = None,
    *,
    with_machine: bool = True,
) -> AsyncIterator[Running]:
    """A daemon with the machine `one`, which must survive everything."""
    options = options or SourceOptions(heartbeat_s=0.5)
    config = DaemonConfig(options, ArrivalOptions(), listen=Address("127.0.0.1", 0))
    if with_machine:
        config = replace(config, kind="rv64", machine=SMALL, name="one")
    daemon = Daemon(config, Output(False, io.StringIO(), io.StringIO()))
    handle = Running(daemon, Stop())
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                try:
                    assert await daemon.run(handle.stop)
                finally:
                    handle.ended.set()

            nursery.start_soon(run)
            await handle.until(lambda: bool(daemon.listening))
            if with_machine:
                await handle.until(lambda: handle.status("one") is not None and not daemon.machines[0].busy)
            try:
                yield handle
            finally:
                while OPEN:
                    OPEN.pop().control.socket.close()
            if not handle.ended.is_set():
                if with_machine:
                    await handle.computes("one")
                handle.stop.insist()
                await handle.ended.wait()


def layout(size_bytes: int = 16 * MIB) -> tuple[Block, ...]:
    return (Block("shared", size_bytes // 2, 4096), Block("vcpu0", size_bytes // 2, 4096))


def offer(name: str, migration: bytes | None = None, token: bytes | None = None, size_bytes: int = 16 * MIB) -> Offer:
    config = {"vcpus": 1, "workload": "random", "working-set-bytes": 0, "seed": 1, "name": name}
    return Offer(
        migration or os.urandom(16), token or os.urandom(16), "rv64", config, layout(size_bytes), 1, 0
    )  # fmt: skip


async def offered(address: Address, what: Offer) -> CallingLink:
    link = await CallingLink.open(address, "source")
    OPEN.append(link)
    await link.control.send_all(SourceProtocol(link.version).send(what))
    return link


OPEN: list[CallingLink] = []


# ---- who is meant, and who is not there any more


async def test_the_only_machine_that_can_be_reclaimed_needs_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_in(*statuses: str) -> bool:
        machine = there.status("two")
        return machine is not None and machine["migration"]["status"] in statuses

    def lose_it(event: str, fields: dict[str, Any]) -> None:
        if event == "migration-status" and fields["status"] == "postcopy-active":
            here.stop.insist()

    async def resume(self: ToyMachine) -> None:
        await trio.lowlevel.checkpoint()

    options = SourceOptions(heartbeat_s=0.5, max_bandwidth_bytes_per_s=4096)
    async with running(options) as there:
        with pytest.raises(ControlError, match="one has not been sent away"):
            await there.ask("reclaim", force=True)
        await there.ask("start", name="two", kind="rv64", memory=16 * MIB, workload="random", used_memory=MIB)
        with pytest.raises(ControlError, match="no machine is here whose destination was lost"):
            await there.ask("reclaim", force=True)
        async with running(with_machine=False) as here:
            # One that ran would ask for all of its pages within milliseconds, which may be before its host ends.
            monkeypatch.setattr(ToyMachine, "resume", resume)
            here.daemon.output.listeners.append(lose_it)
            await there.ask("migrate", to=str(here.address), machine="two")
            await here.ended.wait()
        monkeypatch.undo()
        await there.until(partial(is_in, "postcopy-paused", "postcopy-failed"))
        assert (await there.ask("reclaim", force=True))["machine"] == "two"
        await there.computes("two")


async def test_a_machine_that_is_being_ended_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    closing, closed, closes = trio.Event(), trio.Event(), 0
    close = ToyMachine.close

    async def slowly(self: ToyMachine, *arguments: Any) -> None:
        nonlocal closes
        closes += 1
        closing.set()
        await closed.wait()
        await close(self, *arguments)

    async with running() as there:
        await there.ask("start", name="two", kind="rv64", memory=16 * MIB, workload="random", used_memory=MIB)
        monkeypatch.setattr(ToyMachine, "close", slowly)
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(partial(there.ask, "end", machine="two", force=True))
            await closing.wait()
            with pytest.raises(ControlError, match="is being ended"):
                await there.ask("migrate", to="127.0.0.1:1", machine="two")
            closed.set()
        assert closes == 1
        assert there.status("two") is None


async def test_a_client_that_leaves_while_its_machine_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    closing, closed = trio.Event(), trio.Event()
    close = ToyMachine.close

    async def slowly(self: ToyMachine, *arguments: Any) -> None:
        closing.set()
        with trio.CancelScope(shield=True):
            await closed.wait()
        await close(self, *arguments)

    async with running() as there:
        await there.ask("start", name="two", kind="rv64", memory=16 * MIB, workload="random", used_memory=MIB)
        said: list[tuple[str, Any]] = []
        there.daemon.output.listeners.append(lambda event, fields: said.append((event, fields.get("machine"))))
        monkeypatch.setattr(ToyMachine, "close", slowly)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(there.ask, "end", machine="two", force=True))
            await closing.wait()
            nursery.cancel_scope.cancel()
            closed.set()
        assert there.status("two") is None
        assert ("machine-ended", "two") in said


# ---- engines that make mistakes


@pytest.mark.parametrize("mistake", MISTAKES, ids=repr)
@pytest.mark.parametrize("where", ["__init__", "run", "close", "release"])
async def test_mistake_of_an_arrivals_engine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str, mistake: Exception
) -> None:
    made = []

    class Mistaken(DestinationMigration):
        def __init__(self, *args: Any, **keywords: Any) -> None:
            if where == "__init__":
                raise mistake
            super().__init__(*args, **keywords)

        async def run(self, stop: trio.Event) -> None:
            made.append(self)
            if where == "run":
                raise mistake
            await super().run(stop)

        async def close(self) -> None:
            await super().close()
            if where == "close":
                raise mistake

        async def hand_over(self) -> Machine:
            machine = await super().hand_over()
            if where == "release":
                raise mistake
            return machine

    monkeypatch.setattr(service_module, "DestinationMigration", Mistaken)
    async with running() as there:
        if where == "release":
            async with running(with_machine=False) as here:
                await here.ask("start", name="two", kind="rv64", memory=16 * MIB, workload="random", used_memory=MIB)
                await here.ask("migrate", to=str(there.address))
                await there.until(lambda: (there.status("two") or {}).get("guest") is not None)
                await there.until(lambda: not any(owned.busy for owned in there.daemon.machines))
                await there.computes("two")  # it is whole, and this daemon's
        else:
            link = await offered(there.address, offer("two"))
            if where == "close":
                await there.until(lambda: len(there.daemon.machines) == 2)
                await link.control.aclose()
            else:
                with suppress(trio.BrokenResourceError):
                    while await link.control.receive_some(65536):
                        pass
            await there.until(lambda: len(there.daemon.machines) == 1)
        await there.computes("one")
        assert "a mistake in postcopy" in caplog.text


@pytest.mark.parametrize("mistake", MISTAKES, ids=repr)
async def test_mistake_of_a_departures_engine(monkeypatch: pytest.MonkeyPatch, mistake: Exception) -> None:
    class Mistaken(SourceMigration):
        async def run(self, go: trio.Event, stop: trio.Event, *, keep: bool = True) -> None:
            await trio.lowlevel.checkpoint()
            raise mistake

    monkeypatch.setattr(service_module, "SourceMigration", Mistaken)
    async with running() as there:
        with pytest.raises(ControlError):
            await there.ask("migrate", to="127.0.0.1:1", machine="one")
        await there.computes("one")
        monkeypatch.undo()
        with pytest.raises(ControlError, match="refused"):  # it can be tried again
            await there.ask("migrate", to="127.0.0.1:1", machine="one")


async def test_mistake_past_the_point_of_no_return_keeps_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is this host's, and its pages may come: nothing is ended but by who says so."""

    class Mistaken(DestinationMigration):
        async def run(self, stop: trio.Event) -> None:
            await super().run(stop)
            self._protocol._state = State.PAUSED
            raise KeyError("a mistake")

    monkeypatch.setattr(service_module, "DestinationMigration", Mistaken)
    async with running() as there, running(with_machine=False) as here:
        await here.ask("start", name="two", kind="rv64", memory=16 * MIB, workload="random", used_memory=MIB)
        await here.ask("migrate", to=str(there.address))
        await here.until(lambda: here.status("two") is None)
        await there.computes("two")
        monkeypatch.undo()
        with pytest.raises(ControlError, match="force"):
            await there.ask("end", machine="two")
        await there.ask("end", machine="two", force=True)
        assert there.status("two") is None


async def test_accepting_goes_on_after_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    serve, mistakes = Acceptor.serve, [KeyError("a mistake")]

    async def fail_once(self: Acceptor) -> None:
        if mistakes:
            raise mistakes.pop()
        await serve(self)

    monkeypatch.setattr(daemon_module, "AGAIN_S", 0.01)
    monkeypatch.setattr(Acceptor, "serve", fail_once)
    async with running() as there:
        await offered(there.address, offer("two"))
        await there.until(lambda: len(there.daemon.machines) == 2)
        assert not mistakes


async def test_mistake_of_the_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_module, "AGAIN_S", 0.01)
    calls = []

    async def follow(self: Output, status: Any) -> None:
        calls.append(1)
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(Output, "follow", follow)
    async with running() as there:
        await there.until(lambda: len(calls) > 2)


async def test_mistake_of_what_is_shown_or_heard(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Events are told from the middle of a migration, which goes on whatever a listener does."""

    def fail(*_: Any) -> None:
        raise KeyError("a mistake")

    for what in ("changed", "ended"):
        monkeypatch.setattr(f"postcopy.service.report.{what}", fail)
    async with running() as there, running(with_machine=False) as here:
        await here.ask("start", name="two", kind="rv64", memory=16 * MIB, workload="random", used_memory=MIB)
        await here.ask("migrate", to=str(there.address))
        await there.until(lambda: there.daemon._received == 1)
        await there.until(lambda: not any(owned.busy for owned in there.daemon.machines))
        await there.computes("two")
        await here.until(lambda: here.daemon._sent == 1)
    assert "announcing what has changed: a mistake" in caplog.text


async def test_mistake_of_what_was_recorded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The end of the migration is told all the same."""

    def fail(*_: Any) -> None:
        raise KeyError("a mistake")

    monkeypatch.setattr("postcopy.service.report.timeline", fail)
    said: list[str] = []
    async with running() as there, running(with_machine=False) as here:
        here.daemon.output.listeners.append(lambda event, fields: said.append(event))
        await here.ask("start", name="two", kind="rv64", memory=16 * MIB, workload="random", used_memory=MIB)
        await here.ask("migrate", to=str(there.address))
        await here.until(lambda: "migration-ended" in said)
    assert "telling how a migration came about: a mistake" in caplog.text


# ---- peers that do what no peer should


async def test_two_connections_one_id() -> None:
    """Both offer a machine under one id, then leave, in either order: the daemon and what it has go on."""
    async with running() as there:
        for first in (0, 1):
            migration, token = os.urandom(16), os.urandom(16)
            links = [await offered(there.address, offer(f"m{n}", migration, token)) for n in range(2)]
            await trio.testing.wait_all_tasks_blocked(0.05)
            for link in (links[first], links[1 - first]):
                await trio.aclose_forcefully(link.control)
            await there.until(lambda: len(there.daemon.machines) == 1)
        await there.computes("one")


async def test_many_offers_that_come_to_nothing() -> None:
    async with running() as there:
        for number in range(3 * MAX_INCOMING):
            link = await offered(there.address, offer(f"m{number}"))
            await trio.aclose_forcefully(link.control)
        await there.until(lambda: len(there.daemon.machines) == 1)


# ---- places


async def test_places() -> None:
    from unittest.mock import Mock

    daemon = Daemon(DaemonConfig(SourceOptions(), ArrivalOptions()), Output(False, io.StringIO(), io.StringIO()))

    def arriving(state: State) -> Any:
        owned = daemon._add(f"m{len(daemon.machines)}", Phase.ARRIVING)
        owned.migration = Mock(spec=DestinationMigration)
        owned.migration.state = state
        owned.migration.status = state.value
        owned.migration.cancellable = state is State.READY
        return owned

    for number in range(MAX_INCOMING):
        arriving((State.PREPARED, State.IN_DOUBT, State.POSTCOPY, State.RECOVERING)[number % 4])
    assert "too many machines are" in daemon._why_refused(Asking("host", []))  # an undecided one counts
    for owned in daemon.machines[:4]:
        owned.migration = Mock(
            spec=DestinationMigration, state=State.PAUSED
        )  # committed to this host, and lost: it waits and takes nothing
    assert daemon._why_refused(Asking("host", [])) == ""
    assert daemon._why_refused(Asking("host", ["host"] * 3)) == ""
    assert "too many" in daemon._why_refused(Asking("host", ["host"] * 4))
    for owned in daemon.machines[-MAX_INCOMING_OF_ONE:]:
        owned.peer = "host"
    assert "too many machines of this peer" in daemon._why_refused(Asking("host", []))
    assert daemon._why_refused(Asking("other", ["host"])) == ""
    daemon._add("local", Phase.STARTING)
    assert daemon._why_refused(Asking("other", ["other"] * 3)) == ""


async def test_memory_is_promised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight machines of 64 MiB arrive together where there is room for three."""
    monkeypatch.setattr(PROMISES, "_promises", [])
    monkeypatch.setattr(_admission, "find_rooms", lambda: [Room("the control group", 255 * MIB, "or raise it")])
    async with AsyncExitStack() as stack:
        there = await stack.enter_async_context(running())
        links = []
        for number in range(8):
            links.append(await offered(there.address, offer(f"m{number}", size_bytes=64 * MIB)))
        answers: list[str] = []
        for link in links:
            protocol = SourceProtocol(link.version)
            protocol.send(offer("x"))
            while protocol.state is State.OFFERED:
                data = await link.control.receive_some(65536)
                if not data:
                    break
                protocol.receive_data(bytes(data))
                while protocol.next_message() is not None:
                    pass
            answers.append("accept" if protocol.state is State.CHANNELS else protocol.reason)
        assert answers.count("accept") == 3, answers
        assert all("promised to machines here" in text for text in answers if text != "accept"), answers
        with pytest.raises(PostcopyError, match="promised"):
            await there.ask("start", kind="rv64", memory=64 * MIB)
        for link in links:
            await trio.aclose_forcefully(link.control)
        await there.until(lambda: len(there.daemon.machines) == 1)
        await there.ask("start", name="local", kind="rv64", memory=128 * MIB)
        await there.computes("local")
        await there.ask("end", machine="local", force=True)
        await there.ask("start", name="local", kind="rv64", memory=128 * MIB)


async def test_descriptors_are_there_before_a_machine_is_let_in() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with running() as there:
        used = len(os.listdir("/proc/self/fd"))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 60, before[1]))
            with pytest.raises(PeerError, match="file descriptors"):
                await offered(there.address, offer("two"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
            with pytest.raises(PostcopyError):
                await there.ask("start", kind="rv64", memory=16 * MIB)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        await there.until(lambda: len(there.daemon.machines) == 1)
        await there.ask("start", kind="rv64", memory=16 * MIB)


async def test_no_threads_for_an_arrival(no_more_threads: list[str]) -> None:
    """Refused before anything has begun; the machine computes on where it is."""
    async with running() as there, running(with_machine=False) as here:
        await here.ask("start", name="two", kind="rv64", memory=16 * MIB, workload="random", used_memory=MIB)
        no_more_threads.append("now")
        with suppress(ControlError):
            await here.ask("migrate", to=str(there.address))
        await here.until(lambda: not any(owned.busy for owned in here.daemon.machines))
        await here.computes("two")
        no_more_threads.clear()
        await here.ask("migrate", to=str(there.address))
        await there.until(lambda: (there.status("two") or {}).get("guest") is not None)
        await there.until(lambda: not any(owned.busy for owned in there.daemon.machines))
        await there.computes("two")


# ---- connecting


@pytest.fixture
def frozen_peer() -> Iterator[Address]:
    """Connections are accepted by the kernel, and by nobody."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield Address(*listener.getsockname())


@pytest.mark.parametrize("end", ["cancel", "end", "quit", "stop"])
async def test_connecting_is_shown_and_ends_at_once(frozen_peer: Address, end: str) -> None:
    async with running() as there, trio.open_nursery() as nursery:
        refused: list[ControlError] = []

        async def migrate() -> None:
            try:
                await there.ask("migrate", to=str(frozen_peer))
            except ControlError as error:
                refused.append(error)

        nursery.start_soon(migrate)
        await there.until(lambda: ((there.status("one") or {})["migration"] or {}).get("status") == "connecting")
        began = trio.current_time()
        if end == "cancel":
            assert (await there.ask("migrate-cancel"))["migrations"][0]["machine"] == "one"
            await there.until(lambda: bool(refused))
            assert "cancelled" in str(refused[0])
            await there.computes("one")
        elif end == "end":
            await there.ask("end", machine="one", force=True)
            there.stop.insist()
            await there.ended.wait()
        elif end == "quit":
            await there.ask("quit", force=True)
            await there.ended.wait()
        else:
            there.stop.set()
            await there.ended.wait()
        assert trio.current_time() - began < 5


async def test_previous_migration_is_not_the_one_that_is_cancelled(frozen_peer: Address) -> None:
    async with running() as there, trio.open_nursery() as nursery:
        with pytest.raises(ControlError, match="refused"):
            await there.ask("migrate", to="127.0.0.1:1")
        previous = there.daemon.machines[0].migration

        async def migrate() -> None:
            with pytest.raises(ControlError, match="cancelled"):
                await there.ask("migrate", to=str(frozen_peer))

        nursery.start_soon(migrate)
        await there.until(lambda: there.daemon.machines[0].migration is not previous)
        assert (await there.ask("migrate-cancel"))["migrations"][0]["machine"] == "one"


# ---- a pager that does not end


async def test_stuck_pager_takes_no_machine_with_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stuck(Pager):
        async def close(self) -> None:
            await super().close()
            raise MigrationError("a thread of the pager hangs; its memory is kept")

    monkeypatch.setattr(service_module, "Pager", Stuck)
    async with running() as there, running(with_machine=False) as here:
        await here.ask("start", name="two", kind="rv64", memory=16 * MIB, workload="random", used_memory=MIB)
        await here.ask("migrate", to=str(there.address))
        await there.until(lambda: (there.status("two") or {}).get("guest") is not None)
        await there.until(lambda: not any(owned.busy for owned in there.daemon.machines))
        await there.computes("two")
        assert there.daemon._received == 1
        assert "hangs" in caplog.text


# ---- a load that hangs


@pytest.mark.parametrize("end", ["end", "signals"])
async def test_load_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """In the kernel, as far as Python can tell: its thread is left behind, its place is not."""
    hung, released = threading.Event(), threading.Event()

    def hang() -> None:
        hung.set()
        released.wait(DEADLINE_S)

    async def load_state(self: Machine, state: bytes) -> None:
        await run_sync(hang, abandon_on_cancel=True)

    monkeypatch.setattr(ToyMachine, "load_state", load_state)
    try:
        async with running() as there, running(with_machine=False) as here:
            await here.ask("start", name="two", kind="rv64", memory=16 * MIB, workload="random", used_memory=MIB)
            await here.ask("migrate", to=str(there.address))
            await there.until(hung.is_set)
            assert (there.status("two") or {})["migration"]["status"] == "active"
            if end == "end":
                await there.ask("end", machine="two", force=True)
                assert there.status("two") is None
                assert not any(owned.phase is Phase.ARRIVING for owned in there.daemon.machines)
                await there.computes("one")
            else:
                there.stop.set()
                await there.ask("quit", force=True)
                await there.ended.wait()
            await here.until(lambda: not any(owned.busy for owned in here.daemon.machines))
            await here.computes("two")
    finally:
        released.set()


# ---- contained itself


async def test_contained_lets_cancellation_pass(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise KeyError("x")

    async def cancelled_with_a_mistake() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise KeyError("x")

    assert isinstance(await contained("it", fail), KeyError)
    with trio.CancelScope() as scope:
        scope.cancel()
        await contained("it", trio.sleep_forever)
        pytest.fail("not reached")
    assert scope.cancelled_caught
    with trio.move_on_after(0.01) as scope:
        await contained("it", cancelled_with_a_mistake)
        pytest.fail("not reached")
    assert scope.cancelled_caught
    assert caplog.text.count("KeyError: 'x'") >= 2
