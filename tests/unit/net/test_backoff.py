# SPDX-License-Identifier: Apache-2.0
"""How often two sides look for each other: counted from the last time that it went on, not from the last connection."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock

from postcopy import net as c
from postcopy import wire as p
from postcopy.net import backoff, connecting
from tests.unit.net.support import SESSION, hang_up, open_acceptor


@asynccontextmanager
async def lost_pair() -> AsyncIterator[tuple[c.Acceptor, c.Reconnector, c.Reconnector]]:
    """A calling and a listening reconnector of one migration, without a connection."""
    async with open_acceptor() as acceptor:
        here = await c.CallingLink.open(acceptor.addresses[0], "dest")
        there = await acceptor.next_link()
        with here.reconnector(SESSION) as caller, there.reconnector(SESSION) as called:
            await hang_up(here, there)
            yield acceptor, caller, called


async def meet(caller: c.Reconnector, called: c.Reconnector) -> c.Session:
    """They find each other, and the connection is lost again."""
    link, session = await caller.next_link()
    taken, _ = await called.next_link()
    for one in (link, taken):
        await trio.aclose_forcefully(one.control)
    return session


async def test_connecting_is_no_success(autojump_clock: MockClock) -> None:
    """A recovery that connects and fails, again and again, is begun a few times a second for a minute, and then less
    often; one that succeeds begins anew. So a network that cuts many recoveries in a row is tried all the time."""
    async with lost_pair() as (_, caller, called):
        for _ in range(2):
            began_s = trio.current_time()
            times_s = [0.0]
            while times_s[-1] < backoff.PATIENT_AFTER_S + 20:
                await meet(caller, called)
                times_s.append(trio.current_time() - began_s)
            assert times_s[1] < 0.02  # the first one at once
            pauses_s = [later - earlier for earlier, later in pairwise(times_s)]
            # (Twice as long where the called side has found that it was a little early.)
            soon = [pause_s for pause_s, at_s in zip(pauses_s, times_s, strict=False) if at_s < backoff.PATIENT_AFTER_S]
            assert all(pause_s < 2.5 * backoff.CAP_S for pause_s in soon[:-1])
            assert all(pause_s >= backoff.CAP_S / 2 for pause_s in soon[6:-1])
            late_s = pauses_s[len(soon) + 4 :]
            assert len(late_s) >= 3
            assert all(backoff.PATIENT_CAP_S / 2 <= pause_s < 4 * backoff.PATIENT_CAP_S for pause_s in late_s)
            for reconnector in (caller, called):
                reconnector.went_on()
            await trio.sleep(2 * backoff.LASTING_S)


async def test_recoveries_that_succeed_are_at_once(autojump_clock: MockClock) -> None:
    async with lost_pair() as (_, caller, called):
        for _ in range(50):
            began_s = trio.current_time()
            await meet(caller, called)
            assert trio.current_time() - began_s < 0.01
            for reconnector in (caller, called):
                reconnector.went_on()
            await trio.sleep(2 * backoff.LASTING_S)


async def test_recoveries_that_do_not_last(autojump_clock: MockClock) -> None:
    """All is there again, and lost again at once, every time: a few times a second, and within a fraction of one."""
    async with lost_pair() as (_, caller, called):
        times_s = []
        for _ in range(50):
            await meet(caller, called)
            times_s.append(trio.current_time())
            for reconnector in (caller, called):
                reconnector.went_on()
        pauses_s = [later - earlier for earlier, later in pairwise(times_s)]
        assert pauses_s[0] < 0.05
        assert all(backoff.CAP_S / 2 <= pause_s < 2 * backoff.CAP_S for pause_s in pauses_s[6:])


async def test_the_operator_does_not_wait(autojump_clock: MockClock) -> None:
    """Whoever says `recover` has it tried at once, whatever failed before."""
    async with lost_pair() as (_, caller, called):
        for _ in range(12):
            await meet(caller, called)
        called.went_on()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(meet, caller, called)
            await trio.testing.wait_all_tasks_blocked()
            began_s = trio.current_time()
            caller.recover()
        assert trio.current_time() - began_s < 0.1


async def test_a_peer_that_comes_back_again_and_again(autojump_clock: MockClock) -> None:
    """One that does not wait by itself, under rising epochs: it is let in less and less often."""
    async with lost_pair() as (acceptor, _, called):
        codes = set()
        for epoch in range(1, 200):
            hello = p.Hello("control", "dest", 0, SESSION.migration, epoch)
            try:
                stream, _ = await connecting.Caller().connect(acceptor.addresses[0], hello, token=SESSION.token)
            except p.RefusedError as refused:
                codes.add(refused.code)
            else:
                await trio.aclose_forcefully((await called.next_link())[0].control)
                await trio.aclose_forcefully(stream)
            await trio.sleep(0.01)
        assert codes == {c.Code.TOO_OFTEN}
        # (2 s at least, and a place for each CAP_S / 2 of them)
        assert backoff.FREE_RETURNS < acceptor.accepted - 1 < backoff.FREE_RETURNS + 40
        called.went_on()
        hello = p.Hello("control", "dest", 0, SESSION.migration, 200)
        stream, _ = await connecting.Caller().connect(acceptor.addresses[0], hello, token=SESSION.token)
        await trio.aclose_forcefully((await called.next_link())[0].control)
        await trio.aclose_forcefully(stream)


async def test_what_is_logged_meanwhile(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    """Calling in vain is a few lines, on either side."""
    caplog.set_level(logging.INFO)
    async with lost_pair() as (acceptor, caller, _):
        acceptor.reconnectors = {}
        with trio.move_on_after(120):
            await caller.next_link()
        assert 3 < sum("not connected again yet" in line for line in caplog.messages) < 12
        assert sum("control connection refused" in line for line in caplog.messages) < 12


async def test_bad_handshakes_do_not_fill_the_log(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    async with lost_pair() as (acceptor, _, _):
        for _ in range(300):
            stream = await trio.open_tcp_stream(acceptor.addresses[0].host, acceptor.addresses[0].port)
            await stream.send_all(b"GET / HTTP/1.0\r\n\r\n")
            await trio.aclose_forcefully(stream)
            await trio.sleep(0.01)
        while acceptor.bad_handshakes < 300:  # noqa: ASYNC110  (a counter)
            await trio.sleep(0.01)
        assert 1 <= sum("not a postcopy peer" in line for line in caplog.messages) < 10
