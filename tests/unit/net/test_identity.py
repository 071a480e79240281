# SPDX-License-Identifier: Apache-2.0
"""Who is believed: ids in use, proofs of the token, and what is told to those who come back too late."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import msgpack
import pytest
import trio
from trio.testing import MockClock

from postcopy import net as c
from postcopy import wire as p
from postcopy.errors import ConfigurationError, PeerError, ProtocolError
from postcopy.net import connecting, listening
from postcopy.wire import Ended, EndedElsewhere
from tests.unit.net.support import OFFER, SESSION, hang_up, looks_again, open_acceptor
from tests.unit.wire.support import source_in

OTHER_TOKEN = c.Session(b"m" * 16, b"u" * 16, 0)


class Met(NamedTuple):
    acceptor: c.Acceptor
    address: c.Address
    here: c.Link  # of the side that calls
    there: c.Link


@asynccontextmanager
async def met(side: str = "source", endings: c.Endings | None = None) -> AsyncIterator[Met]:
    """A side that listens, and one that has called."""
    async with open_acceptor(side, endings=endings) as acceptor:
        here, there = await call(acceptor)
        yield Met(acceptor, acceptor.addresses[0], here, there)


async def call(acceptor: c.Acceptor) -> tuple[c.Link, c.Link]:
    side = "source" if acceptor._side == "dest" else "dest"
    here = await c.CallingLink.open(acceptor.addresses[0], side)
    if side == "source":
        await here.control.send_all(p.encode(OFFER))
    return here, await acceptor.next_link()


async def test_two_offers_under_one_id() -> None:
    """The second is told that the id is in use; when both have gone, nothing is left of either."""
    async with met("dest") as (acceptor, _, here, there):
        other, second = await call(acceptor)
        with there.reconnector(SESSION), there.channel_set(SESSION):
            reconnector, channel_set = (
                acceptor.reconnectors[SESSION.migration],
                acceptor.channel_sets[SESSION.migration],
            )
            for session in (SESSION, OTHER_TOKEN):
                with pytest.raises(PeerError, match="is in use here"), second.reconnector(session):
                    pass
                with pytest.raises(PeerError, match="is in use here"), second.channel_set(session):
                    pass
            await hang_up(other, second)
            assert acceptor.reconnectors == {SESSION.migration: reconnector}
            assert acceptor.channel_sets == {SESSION.migration: channel_set}
        assert not acceptor.reconnectors
        assert not acceptor.channel_sets
        await hang_up(here, there)


async def test_an_unknown_peer_who_offers_a_known_id_changes_nothing() -> None:
    """And leaves: the real peer comes back as if nobody had been there."""
    async with met("dest") as (acceptor, _, here, there):
        with here.reconnector(SESSION) as caller, there.reconnector(SESSION) as called:
            unknown, seen = await call(acceptor)
            with pytest.raises(PeerError, match="is in use here"), seen.reconnector(OTHER_TOKEN):
                pass
            await hang_up(unknown, seen, here, there)
            again, session = await caller.next_link()
            taken, other = await called.next_link()
            assert session == other
            await hang_up(again, taken)


async def test_an_id_that_has_been_here_is_not_taken_again() -> None:
    """Or whoever knows it could take the place of what is remembered of it."""
    async with met("dest") as (acceptor, _, here, there):
        with there.reconnector(SESSION) as reconnector:
            reconnector.ended(Ended.COMPLETED)
        with pytest.raises(PeerError, match="is in use here, or was"), there.reconnector(OTHER_TOKEN):
            pass
        assert acceptor.endings.find(SESSION.migration) == (SESSION.token, Ended.COMPLETED)
        await hang_up(here, there)


@pytest.mark.parametrize("token", [b"u" * 16, b""])
@pytest.mark.parametrize("ended", ["", "aborted"])
async def test_without_the_token_nobody_comes_back(token: bytes, ended: str) -> None:
    """Nor ends anything, nor uses up an epoch."""
    async with met() as (_, address, here, there):
        with there.reconnector(SESSION) as reconnector:
            hello = p.Hello("control", "dest", 0, SESSION.migration, 9, ended)
            with pytest.raises(p.RefusedError, match="wrong token") as refused:
                await connecting.Caller().connect(address, hello, token=token)
            assert not refused.value.proven
            assert isinstance(reconnector, listening.ListeningReconnector)
            assert reconnector.session == SESSION
            with trio.move_on_after(0.05) as scope:
                await reconnector.next_link()
            assert scope.cancelled_caught
        await hang_up(here, there)


async def test_a_proof_is_for_one_hello_only() -> None:
    """Whoever has seen one cannot say anything else with it."""
    hello = p.Hello("control", "dest", 0, SESSION.migration, 1).signed(SESSION.token, 3)
    assert hello.is_signed(SESSION.token, 3)
    for other in (
        p.Hello("urgent", "dest", 0, SESSION.migration, 1, "", b"", hello.proof),
        p.Hello("control", "source", 0, SESSION.migration, 1, "", b"", hello.proof),
        p.Hello("control", "dest", 1, SESSION.migration, 1, "", b"", hello.proof),
        p.Hello("control", "dest", 0, b"n" * 16, 1, "", b"", hello.proof),
        p.Hello("control", "dest", 0, SESSION.migration, 2, "", b"", hello.proof),
        p.Hello("control", "dest", 0, SESSION.migration, 1, "lost", b"", hello.proof),
    ):
        assert not other.is_signed(SESSION.token, 3)
    refused = p.Refused("over", "aborted").signed(SESSION.token, hello)
    assert refused.is_signed(SESSION.token, hello)
    assert not refused.is_signed(SESSION.token, p.Hello("control", "dest", 0, SESSION.migration, 2))
    assert not p.Refused("over", "completed", proof=refused.proof).is_signed(SESSION.token, hello)
    assert not p.Refused("over", "aborted").is_signed(SESSION.token, hello)
    assert not refused.is_signed(b"", hello)  # where no migration is named there is no token


@pytest.mark.parametrize("how", list(Ended))
async def test_a_peer_that_comes_back_too_late_learns_how_it_has_ended(how: Ended) -> None:
    async with met() as (acceptor, _, here, there):
        with here.reconnector(SESSION) as caller:
            with there.reconnector(SESSION) as reconnector:
                reconnector.ended(how)
            with pytest.raises(EndedElsewhere, match=f"the migration has ended here: {how}") as told:
                await caller.next_link()
            assert told.value.how is how
        # Somebody who only knows the id learns nothing.
        with pytest.raises(p.RefusedError, match="wrong token"):
            await connecting.Caller().connect(
                acceptor.addresses[0], p.Hello("control", "dest", 0, SESSION.migration, 9), token=OTHER_TOKEN.token
            )
        await hang_up(here, there)


async def test_a_peer_that_comes_back_while_it_ends_learns_it_too() -> None:
    """From the word on, not only when the migration has been cleared away; and the last word counts."""
    async with met() as (_, _, here, there):
        with here.reconnector(SESSION) as caller, there.reconnector(SESSION) as called:
            early, _ = await caller.next_link()
            called.ended(Ended.LOST)
            assert await early.control.receive_some() == b""  # welcome, and not let in any more
            called.ended(Ended.RECLAIMED)
            with pytest.raises(EndedElsewhere) as told:
                await caller.next_link()
            assert told.value.how is Ended.RECLAIMED
            await hang_up(early)
        await hang_up(here, there)


@pytest.mark.parametrize("code", ["aborted", "completed", "unknown", "wrong-token", "\x1b[2J"])
async def test_a_refusal_without_proof_decides_nothing(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody may answer at the peer's address, while the peer is away: it is looked for as long as before."""
    async with met() as (acceptor, _, here, there):
        with here.reconnector(SESSION) as caller, there.reconnector(SESSION) as called:
            await hang_up(here, there)
            send_refused, lies = p.ServerHandshake.send_refused, 0

            def lie(self: p.ServerHandshake, reason: str, code_: str = "", token: bytes = b"") -> bytes:
                nonlocal lies
                lies += 1
                return send_refused(self, "gone", code, OTHER_TOKEN.token)

            with monkeypatch.context() as patch:
                patch.setattr(p.ServerHandshake, "send_refused", lie)
                patch.setattr(acceptor, "reconnectors", {})
                await looks_again(caller, lambda: lies)
            again, _ = await caller.next_link()
            taken, _ = await called.next_link()
            await hang_up(again, taken)


@pytest.mark.parametrize("token", [b"", OTHER_TOKEN.token])
async def test_a_welcome_without_proof_decides_nothing(token: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is what is said after it, at the peer's address, on a control connection and on a data connection."""
    async with met() as (_, _, here, there):
        with here.reconnector(SESSION) as caller, there.reconnector(SESSION) as called:
            await hang_up(here, there)
            send_welcome, lies = p.ServerHandshake.send_welcome, 0

            def lie(self: p.ServerHandshake, token_: bytes = b"") -> bytes:
                nonlocal lies
                lies += 1
                return send_welcome(self, token)

            with monkeypatch.context() as patch:
                patch.setattr(p.ServerHandshake, "send_welcome", lie)
                await looks_again(caller, lambda: lies)
            again, session = await caller.next_link()
            taken, _ = await called.next_link()
            with (
                taken.channel_set(session),
                again.channel_set(session) as open_data,
                monkeypatch.context() as patch,
            ):
                patch.setattr(p.ServerHandshake, "send_welcome", lie)
                with pytest.raises(ProtocolError, match="without knowing the token"):
                    await open_data(1, 0)
            await hang_up(again, taken)


@pytest.mark.parametrize("proven", [True, False])
async def test_only_the_peer_answers(proven: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is paused is there, which `reclaim` asks; who cannot prove it may be anybody, and keeps no operator from
    that."""
    async with met() as (_, _, here, there):
        with here.reconnector(SESSION) as caller, there.reconnector(SESSION) as called:
            await hang_up(here, there)
            called.pause()
            send_refused, refusals = p.ServerHandshake.send_refused, 0

            def refuse(self: p.ServerHandshake, reason: str, code: str = "other", token: bytes = b"") -> bytes:
                nonlocal refusals
                refusals += 1
                assert code == "held"
                return send_refused(self, reason, code, token if proven else OTHER_TOKEN.token)

            monkeypatch.setattr(p.ServerHandshake, "send_refused", refuse)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(caller.next_link)
                with trio.fail_after(10):
                    while refusals < 3:  # noqa: ASYNC110  (a counter)
                        await trio.sleep(0.01)
                assert caller.answered.is_set() is proven
                nursery.cancel_scope.cancel()


def test_a_migration_is_never_gone_on_with_in_an_older_version() -> None:
    """The oldest sends the token itself: whoever answers with it at the peer's address would be given it."""
    client = p.ClientHandshake(p.Hello("control", "source", 0, SESSION.migration, 1), SESSION.token)
    assert SESSION.token not in client.send_hello()
    with pytest.raises(ProtocolError, match="version 2"):
        client.receive_data(p.MAGIC + b"\x02")


async def test_who_has_said_that_it_is_over_is_not_welcome_again() -> None:
    """Nobody waits for it any more: it is told so, and does not wait for nothing."""
    async with met() as (acceptor, _, here, there):
        with here.reconnector(SESSION) as caller, there.reconnector(SESSION) as called:
            await hang_up(here, there)
            await caller.announce(Ended.LOST)
            with pytest.raises(EndedElsewhere):
                await called.next_link()
            accepted = acceptor.accepted
            async with trio.open_nursery() as nursery:
                nursery.start_soon(caller.next_link)
                with trio.fail_after(10):
                    await caller.answered.wait()
                nursery.cancel_scope.cancel()
            assert acceptor.accepted == accepted


@pytest.mark.parametrize("message", [p.Reject("no room"), p.Abort("no more"), None])
@pytest.mark.parametrize("handed", [True, False])
def test_who_must_announce(message: p.Message | None, handed: bool) -> None:
    """A destination that has said no knows it, and so does one that was handed nothing."""
    source = source_in(p.State.MAPS if handed else p.State.OFFERED)
    if handed:
        source.send(p.Switchover(b"", 1))
        if isinstance(message, p.Reject):
            return  # not any more
    if message is not None:
        source.receive_data(p.encode(message))
        source.next_message()
    source.connection_lost("gone")
    assert source.state is p.State.ABORTED
    assert source.must_announce == (handed and message is None)


async def test_the_side_that_calls_can_say_that_it_has_ended() -> None:
    """To one that still believes in the old connection, to one that waits, and to one that has ended it too."""
    async with met() as (acceptor, _, here, there):
        with here.reconnector(SESSION) as caller, there.reconnector(SESSION) as called:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(called.superseded)
                await caller.announce(Ended.ABORTED)
            await caller.announce(Ended.ABORTED)  # any number of times
            with pytest.raises(EndedElsewhere) as told:
                await called.next_link()
            assert told.value.how is Ended.ABORTED
            called.pause()
            caller.pause()
            with trio.fail_after(10):
                await caller.announce(Ended.LOST)  # it makes no connection, so a pause on neither side delays it
            with pytest.raises(EndedElsewhere) as told:
                await called.next_link()
            assert told.value.how is Ended.LOST
            called.ended(Ended.COMPLETED)
        with here.reconnector(SESSION) as caller:
            await caller.announce(Ended.ABORTED)
        assert acceptor.endings.find(SESSION.migration) == (SESSION.token, Ended.COMPLETED)
        await hang_up(here, there)


async def test_the_side_that_listens_knows_when_it_was_told() -> None:
    """By a peer that knows the token, and has got the answer."""
    async with met() as (acceptor, _, here, there):
        with there.reconnector(SESSION) as called:
            called.ended(Ended.COMPLETED)
        stranger = c.Session(SESSION.migration, b"x" * 16, 0)
        with here.reconnector(stranger) as caller:
            await looks_again(caller, lambda: acceptor.refused)
        with trio.move_on_after(0) as scope:
            await called.announce(Ended.COMPLETED)
        assert scope.cancelled_caught
        with here.reconnector(SESSION) as caller, trio.fail_after(10):
            with pytest.raises(EndedElsewhere) as told:
                await caller.next_link()
            assert told.value.how is Ended.COMPLETED
            await called.announce(Ended.COMPLETED)
            await called.announce(Ended.COMPLETED)  # nobody need come again
        await hang_up(here, there)


@pytest.mark.slow
async def test_it_is_said_as_often_as_it_takes(autojump_clock: MockClock) -> None:
    """The other side may be away for long, and somebody else there meanwhile."""
    async with met() as (acceptor, _, here, there):
        with here.reconnector(SESSION) as caller, trio.move_on_after(300) as scope:
            await caller.announce(Ended.COMPLETED)
        assert scope.cancelled_caught
        assert acceptor.refused > 100
        with here.reconnector(SESSION) as caller, there.reconnector(SESSION) as called:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(caller.announce, Ended.COMPLETED)
                with pytest.raises(EndedElsewhere):
                    await called.next_link()
        await hang_up(here, there)


def test_endings_are_bounded() -> None:
    endings = c.Endings(limit=3)
    for number in range(5):
        endings.remember(c.Session(bytes([number]) * 16, b"t" * 16, 0), Ended.COMPLETED)
    assert [endings.find(bytes([number]) * 16) is not None for number in range(5)] == [False, False, True, True, True]
    endings.remember(c.Session(bytes([2]) * 16, b"t" * 16, 0), Ended.LOST)
    endings.remember(c.Session(bytes([9]) * 16, b"t" * 16, 0), Ended.LOST)
    assert endings.find(bytes([2]) * 16) == (b"t" * 16, Ended.LOST)
    assert endings.find(bytes([3]) * 16) is None


async def test_a_call_to_itself() -> None:
    """A process that listens and calls learns that it has called itself, and takes no place by it. Others are let in:
    those with another number, and those of a release that has none."""
    mine = b"i" * 16
    async with open_acceptor("dest", instance=mine) as acceptor:
        address = acceptor.addresses[0]
        with pytest.raises(ConfigurationError, match=rf"^{re.escape(str(address))}: .* this daemon itself; name"):
            await c.CallingLink.open(address, "source", mine)
        assert not acceptor._waiting
        for instance in (b"j" * 16, b""):
            other = await c.CallingLink.open(address, "source", instance)
            await other.control.send_all(p.encode(OFFER))
            await hang_up(other, await acceptor.next_link())
    async with open_acceptor("dest") as acceptor:  # one that does not call
        await hang_up(await c.CallingLink.open(acceptor.addresses[0], "source", b""))


def test_a_hello_of_a_release_without_instance() -> None:
    body = msgpack.unpackb(p.encode(p.Hello("control", "source", 0, b"", 0))[p.HEADER_BYTES :])
    del body["instance"]
    assert p.decode(msgpack.packb(body)) == p.Hello("control", "source", 0, b"", 0)
