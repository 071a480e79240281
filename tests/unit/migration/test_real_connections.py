# SPDX-License-Identifier: Apache-2.0
"""Both engines over real connections: taken back, in doubt, and told, whichever side it is that connects."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from postcopy.dataplane.pager import ChannelKind, EventType, Pager
from postcopy.dataplane.pageserver import PageServer
from postcopy.errors import MigrationError, PeerError
from postcopy.machines import MachineState
from postcopy.migration import source as source_module
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.net import LOCAL, Acceptor, Address, CallingLink, Protection
from postcopy.tls import Credentials
from postcopy.tls._authority import issue, new_authority
from postcopy.wire import State
from tests.unit.migration._engines import (
    FakeMachine,
    FakePager,
    FakeServer,
)

HEARTBEAT_S = 1.0  # three of them are silence, which a busy host must not be taken for


class Hosts:
    """One of them listens, the other one connects."""

    source: SourceMigration
    dest: DestinationMigration

    def __init__(self) -> None:
        self.machine, self.twin, self.pager = FakeMachine(), FakeMachine(), FakePager()
        self.machine.state = MachineState.RUNNING
        self.server = FakeServer(0)
        self.stop_source, self.stop_dest, self.go = trio.Event(), trio.Event(), trio.Event()
        self.changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.changed.wait()

    def change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def lose(self) -> None:
        """Both notice that a data channel has broken."""
        for engine in (self.server, self.pager):
            engine.channel.tell(EventType.CHANNEL_DOWN, ChannelKind.URGENT, 0, "reset")


@contextlib.asynccontextmanager
async def hosts(calls: str, protection: Protection = LOCAL) -> AsyncIterator[Hosts]:
    """`calls`: which side connects. Past the point of no return."""
    pair = Hosts()
    listens = "dest" if calls == "source" else "source"
    with trio.fail_after(60):
        acceptor = await Acceptor.open(Address("127.0.0.1", 0), listens, lambda asking: "", protection=protection)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(acceptor.serve)
                await _meet(pair, calls, acceptor, nursery, protection)
                try:
                    yield pair
                finally:
                    pair.stop_source.set()
                    pair.stop_dest.set()
                    nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await acceptor.close()
                await pair.dest.close()
                await pair.server.close()
                await pair.machine.close()
                if not pair.twin.closed:
                    await pair.twin.close()


async def _meet(pair: Hosts, calls: str, acceptor: Acceptor, nursery: trio.Nursery, protection: Protection) -> None:
    async def source(link: Any) -> None:
        pair.source = SourceMigration(
            pair.machine,
            link,
            SourceOptions(bulk_channels=1, heartbeat_s=HEARTBEAT_S),
            peer=acceptor.addresses[0],
            make_server=lambda _: cast(PageServer, pair.server),
            on_change=pair.change,
        )
        await pair.source.run(pair.go, pair.stop_source)

    async def dest(link: Any) -> None:
        pair.dest = DestinationMigration(
            link,
            heartbeat_s=HEARTBEAT_S,
            make_machine=lambda *_: pair.twin,
            make_pager=lambda: cast(Pager, pair.pager),
            on_change=pair.change,
        )
        await pair.dest.run(pair.stop_dest)

    async def call() -> CallingLink:
        return await CallingLink.open(acceptor.addresses[0], calls, protection=protection)

    async def call_and_receive() -> None:
        await dest(await call())

    if calls == "source":
        nursery.start_soon(source, call)
        nursery.start_soon(dest, await acceptor.next_link())
    else:
        nursery.start_soon(call_and_receive)
        nursery.start_soon(source, await acceptor.next_link())
    pair.go.set()
    await pair.until(lambda: hasattr(pair, "dest") and pair.dest.state is State.POSTCOPY)
    await pair.until(lambda: pair.source.state is State.POSTCOPY)


CALLS = pytest.mark.parametrize("calls", ["source", "dest"])


@CALLS
async def test_lost_and_found(calls: str) -> None:
    async with hosts(calls) as pair:
        for number in range(1, 4):
            pair.lose()
            await pair.until(lambda: pair.source.recoveries.count == number == pair.dest.recoveries.count)  # noqa: B023
        pair.pager.channel.tell(EventType.COMPLETE)
        await pair.until(lambda: pair.source.state is pair.dest.state is State.COMPLETED)


@CALLS
@pytest.mark.usefixtures("patient_tls")
async def test_lost_and_found_under_tls(calls: str, tmp_path: Path) -> None:
    """Every connection after the first one resumes its session. Certificates that are renewed while it is paused are
    used from then on."""
    new_authority(tmp_path / "ca")
    issue(tmp_path / "ca", ["old", "127.0.0.1"], tmp_path / "host")
    protection = Protection(Credentials(tmp_path / "host"))
    async with hosts(calls, protection) as pair:
        both = (pair.source, pair.dest)
        assert [(side.identity, side.certificate and side.certificate.resumed) for side in both] == [("old", False)] * 2
        pair.lose()
        await pair.until(lambda: pair.source.recoveries.count == 1 == pair.dest.recoveries.count)
        assert [side.certificate and side.certificate.resumed for side in both] == [True] * 2
        pair.source.pause()
        await pair.until(lambda: pair.source.status == pair.dest.status == "postcopy-paused")
        issue(tmp_path / "ca", ["new", "127.0.0.1"], tmp_path / "host")
        pair.source.recover()
        await pair.until(lambda: pair.source.recoveries.count == 2 == pair.dest.recoveries.count)
        assert [side.identity for side in both] == ["new"] * 2
        pair.pager.channel.tell(EventType.COMPLETE)
        await pair.until(lambda: pair.source.state is pair.dest.state is State.COMPLETED)


@CALLS
async def test_a_destination_that_answers_keeps_its_machine(calls: str) -> None:
    """Also one whose operator has cut the connection, as far as that can be seen: by a source that connects."""
    async with hosts(calls) as pair:
        pair.source.pause()
        await pair.until(lambda: pair.source.status == pair.dest.status == "postcopy-paused")
        if calls == "source":
            pair.dest.pause()
        with pytest.raises(MigrationError, match="the destination answers"):
            await pair.source.reclaim()
        assert pair.machine.resumed == 0


@CALLS
@pytest.mark.slow
async def test_a_destination_cut_off_learns_of_the_reclaim(calls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The destination was only cut off. It is told as soon as it can be reached, and stops its machine at once."""
    monkeypatch.setattr(source_module, "RECLAIM_PROBE_S", 0.5)
    async with hosts(calls) as pair:
        pair.dest.pause()
        await pair.until(lambda: pair.source.status == pair.dest.status == "postcopy-paused")
        if calls == "source":  # nobody is there to answer
            monkeypatch.setattr("postcopy.net.connecting.Caller.connect", _unreachable)
        await pair.source.reclaim()
        assert pair.machine.state is MachineState.RUNNING
        monkeypatch.undo()
        await pair.until(lambda: pair.source.state is State.RECLAIMED)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.source.announce)
            pair.dest.recover()
            await pair.until(lambda: pair.dest.state is State.ABORTED)
        await pair.until(lambda: pair.dest.over)
        assert pair.twin.state is MachineState.PAUSED
        assert not pair.dest.may_run


async def _unreachable(*_: object, **__: object) -> Any:

    await trio.sleep(0.05)
    raise PeerError("no route to host")


@CALLS
async def test_a_source_hears_that_every_page_is_there(calls: str) -> None:
    """The last page came with the cut: the machine does not wait for the source, which is told later."""
    async with hosts(calls) as pair:
        pair.source.pause()
        pair.pager.channel.tell(EventType.COMPLETE)
        await pair.until(lambda: pair.source.status == "postcopy-paused")
        await pair.until(lambda: pair.dest.state is State.COMPLETED)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.dest.announce)
            assert await pair.dest.hand_over() is pair.twin
            pair.source.recover()
            await pair.until(lambda: pair.source.state is State.COMPLETED)
        assert pair.machine.resumed == 0


@CALLS
async def test_a_side_that_gives_up_says_so(calls: str) -> None:
    """The source knows then that it may take the machine back at once."""
    async with hosts(calls) as pair:
        pair.dest.pause()
        await pair.until(lambda: pair.source.status == pair.dest.status == "postcopy-paused")
        pair.stop_dest.set()
        await pair.until(lambda: pair.dest.over)
        pair.dest._reconnector.recover()  # type: ignore[union-attr]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.dest.announce)
            await pair.until(lambda: pair.source.status == "postcopy-failed")
            await pair.source.reclaim()
            nursery.cancel_scope.cancel()
        assert pair.machine.state is MachineState.RUNNING
