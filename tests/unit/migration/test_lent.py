# SPDX-License-Identifier: Apache-2.0
"""Both engines, over real connections, with a machine that is a process of its own: its memory is lent to the pager
before its state is loaded, and what it writes is logged from outside."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator

import pytest
import trio
from lender import PAGE, Lender

from postcopy.dataplane.pager import Pager
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.precopy import Mode
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.net import Acceptor, Address, CallingLink
from postcopy.wire import State

pytestmark = pytest.mark.needs("uffd")

PAGES = 512


@contextlib.contextmanager
def lenders(count: int) -> Iterator[list[Lender]]:
    made: list[Lender] = []
    try:
        made.extend(Lender(PAGES) for _ in range(count))
        yield made
    finally:
        for lender in made:
            lender.end()


async def move(source: Lender, twin: Lender, options: SourceOptions) -> tuple[SourceMigration, DestinationMigration]:
    """Until it has ended, however. A machine that has arrived is handed over."""
    acceptor = await Acceptor.open(Address("127.0.0.1", 0), "dest", lambda waiting: "")
    go, never, stop = trio.Event(), trio.Event(), trio.Event()
    go.set()
    found: list[DestinationMigration] = []

    async def call() -> CallingLink:
        return await CallingLink.open(acceptor.addresses[0], "source")

    leaving = SourceMigration(source, call, options, peer=acceptor.addresses[0])

    async def arrive() -> None:
        arriving = DestinationMigration(await acceptor.next_link(), make_machine=lambda *_: twin, make_pager=Pager)
        found.append(arriving)
        try:
            await arriving.run(never)
            if arriving.state is State.COMPLETED:
                await arriving.hand_over()
        finally:
            await arriving.close()
        if arriving.state is State.PAUSED:
            stop.set()

    with trio.fail_after(60):
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(acceptor.serve)
                async with trio.open_nursery() as both:
                    both.start_soon(leaving.run, go, stop)
                    both.start_soon(arrive)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await acceptor.close()
    return leaving, found[0]


def content(lender: Lender) -> int:
    """As the file has it, from outside."""
    return zlib.crc32(os.pread(lender.memory.fd, PAGES * PAGE, 0))


@pytest.mark.parametrize("precopy_s", [0.0, 0.2])
async def test_it_moves_while_it_writes_and_leaves_again(precopy_s: float) -> None:
    mode = Mode.HYBRID if precopy_s else Mode.POSTCOPY
    with lenders(3) as (first, second, third):
        await first.prepare()
        await first.resume()
        await first.ask("run", 1)
        for source, twin in ((first, second), (second, third)):
            seen: list[int] = []

            async def look(twin: Lender, seen: list[int]) -> None:
                """Through its own mapping, while pages come."""
                await twin.resumed.wait()
                seen.append(await twin.ask("crc"))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(look, twin, seen)
                leaving, arriving = await move(source, twin, SourceOptions(mode=mode, precopy_s=precopy_s))
            assert leaving.state is arriving.state is State.COMPLETED
            assert seen == [content(source)] == [content(twin)]
            assert source.looks == (leaving.iteration + 1 if precopy_s else 0)  # and one when the log was made
            assert twin.whole
            await twin.ask("run", 2)  # where no pager is any more


@pytest.mark.parametrize(("fault", "said"), [("refuses", "takes no state"), ("errs", "cannot be at")])
async def test_what_was_lent_is_given_back_when_it_fails(fault: str, said: str) -> None:
    with lenders(2) as (source, twin):
        await source.prepare()
        await source.resume()
        await source.ask("run", 1)
        setattr(twin, fault, True)
        leaving, arriving = await move(source, twin, SourceOptions())
        assert leaving.state is arriving.state is State.ABORTED
        assert said in str(leaving.failure)
        assert source.statistics().state.value == "running"
        assert twin.memory.closed
        assert await twin.ask("crc") == zlib.crc32(bytes(PAGES * PAGE))  # nobody serves it, and it does not wait


async def test_one_that_ends_before_it_is_whole() -> None:
    """Nobody has to end what is left of it."""
    with lenders(2) as (source, twin):
        await source.prepare()
        await source.resume()
        for page in range(PAGES):
            await source.ask("write", page)

        async def kill() -> None:
            await twin.resumed.wait()
            twin.kill()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            leaving, arriving = await move(source, twin, SourceOptions(max_bandwidth_bytes_per_s=1 << 20))
        assert leaving.state is arriving.state is State.PAUSED
        assert "is lost: its process has ended" in str(arriving.failure)
        assert arriving.over
