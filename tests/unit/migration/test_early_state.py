# SPDX-License-Identifier: Apache-2.0
"""What a machine's state begins with goes to the destination before the machine stands, where both sides know that."""

from __future__ import annotations

import pytest

from postcopy import wire as p
from postcopy.errors import MigrationError
from postcopy.machines import MachineState, TellEarly
from tests.unit.migration._engines import FakeLink, Pair, assert_back_at_source, lone_destination, make_pair, running

ROMS = bytes(range(256)) * 12_000  # three messages long


def give_away(pair: Pair, monkeypatch: pytest.MonkeyPatch, *, takes: bool = True, fails: bool = False) -> list[bytes]:
    """The machine has an early state. What of it the twin has loaded, and at the end "" for the rest."""
    loaded: list[bytes] = []
    load_state = pair.twin.load_state

    async def before_pause(early: TellEarly | None = None) -> None:
        assert pair.machine.state is MachineState.RUNNING
        if early is not None:
            early(b"")
            early(ROMS)
        if fails:
            raise MigrationError("it does not stop")

    async def load_early(state: bytes) -> None:
        loaded.append(state)

    async def load_rest(state: bytes) -> None:
        loaded.append(b"the rest")
        await load_state(state)

    monkeypatch.setattr(pair.machine, "before_pause", before_pause)
    monkeypatch.setattr(pair.twin, "load_state", load_rest)
    if takes:
        monkeypatch.setattr(pair.twin, "load_early", load_early)
    return loaded


async def test_it_is_loaded_in_order_and_before_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair()
    loaded = give_away(pair, monkeypatch)
    async with running(pair):
        await pair.move()
        assert (loaded[0], loaded[-1]) == (b"", b"the rest")
        assert b"".join(loaded[:-1]) == ROMS
        assert max(map(len, loaded)) == p.EARLY_STATE_BYTES
        pair.stop_source.set()
        pair.stop_dest.set()


async def test_an_older_peer_gets_all_of_it_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLink, "version", property(lambda _: 4, lambda *_: None), raising=False)
    pair = make_pair()
    loaded = give_away(pair, monkeypatch)
    async with running(pair):
        await pair.move()
        assert loaded == [b"the rest"]
        pair.stop_source.set()
        pair.stop_dest.set()


async def test_a_machine_that_has_none_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair()
    give_away(pair, monkeypatch, takes=False)
    async with running(pair):
        pair.go.set()
    assert_back_at_source(pair)
    assert "early-state: a machine of kind fake has none" in str(pair.source.failure)


async def test_a_pause_that_fails_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair()
    give_away(pair, monkeypatch, fails=True)
    async with running(pair):
        pair.go.set()
    assert_back_at_source(pair)
    assert "it does not stop" in str(pair.source.failure)
    assert "it does not stop" in str(pair.dest.failure)


async def test_it_does_not_come_before_the_first_round() -> None:
    """Memory is not armed by then."""
    async with lone_destination() as (peer, dest, _):
        await peer.say(p.EarlyState(b"rom"))
        assert "early-state came where" in (await peer.read(p.Abort)).reason
    assert "early-state came where" in str(dest.failure)
