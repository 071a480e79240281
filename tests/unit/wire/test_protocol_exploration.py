# SPDX-License-Identifier: Apache-2.0
"""Every state that the two protocol objects can get into, by whole messages, cuts that lose any tail, ends that each
side notices at its own time, deaths, patience that runs out, and operators.

Hypothesis (`test_protocol_stateful`) looks for bytes that do harm; this looks everywhere, a message at a time. In none
of the states both sides may run the machine, from each of them an end can be reached, and where that needs an operator,
the state is in the list in docs/protocol.md, with the command that ends it.
"""

from __future__ import annotations

import copy
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from postcopy import wire as p
from postcopy.wire import DestinationProtocol, Ended, SourceProtocol, State, codec

OFFER = p.Offer(b"m" * 16, b"t" * 16, "kvm", {}, (p.Block("ram", 4096, 4096),), 0, 0)
FINAL = frozenset({State.COMPLETED, State.ABORTED, State.RECLAIMED})
OPERATOR = frozenset({"reclaim", "lie", "end source", "end dest"})
DEATH = frozenset({"kill source", "kill dest"})

Side = SourceProtocol | DestinationProtocol


@dataclass(frozen=True)
class World:
    """Frozen: each step copies what it changes."""

    source: SourceProtocol
    dest: DestinationProtocol
    to_source: tuple[bytes, ...] = ()  # messages on their way
    to_dest: tuple[bytes, ...] = ()
    cut: bool = False  # nothing more gets through
    told: bool = False  # on this connection: what is at the destination
    gone: frozenset[str] = frozenset()  # sides whose process has ended, and that answer nobody
    left: frozenset[str] = frozenset()  # sides whose operator has ended them; what that means is remembered

    def side(self, name: str) -> Side:
        return self.source if name == "source" else self.dest

    def acts(self, name: str) -> bool:
        return name not in self.gone and name not in self.left

    def may_run(self, name: str) -> bool:
        return self.acts(name) and self.side(name).may_run

    def key(self) -> tuple[object, ...]:
        return (
            *(key_of(side) for side in (self.source, self.dest)),
            self.to_source, self.to_dest, self.cut, self.told, self.gone, self.left,
        )  # fmt: skip

    def settled(self, name: str) -> bool:
        return not self.acts(name) or self.side(name).state in FINAL

    def label(self, name: str) -> str:
        """As docs/protocol.md calls it."""
        if not self.acts(name):
            return "ended"
        return self.side(name).state.value + (", peer gone" if self.side(name).peer_gone else "")


def key_of(side: Side) -> tuple[object, ...]:
    return tuple(value for name, value in vars(side).items() if name not in ("_buffer", "_reason", "_error", "_eof"))


def other(name: str) -> str:
    return "dest" if name == "source" else "source"


def on(world: World, name: str, act: Callable[[Any], object]) -> World:
    """The world after one side has done something; what that returns is sent, where it is bytes."""
    side = copy.copy(world.side(name))
    side._buffer = codec.MessageBuffer()
    data = act(side)
    world = replace(world, source=side) if isinstance(side, SourceProtocol) else replace(world, dest=side)
    if isinstance(data, bytes) and not world.cut:
        queue = (*queue_to(world, other(name)), data)
        world = with_queue(world, other(name), queue)
    return world


def queue_to(world: World, name: str) -> tuple[bytes, ...]:
    return world.to_source if name == "source" else world.to_dest


def with_queue(world: World, name: str, queue: tuple[bytes, ...]) -> World:
    return replace(world, to_source=queue) if name == "source" else replace(world, to_dest=queue)


SAYS: dict[str, dict[State, list[Callable[[Any], bytes]]]] = {
    "source": {
        State.SETUP: [lambda side: side.send(OFFER)],
        State.READY: [
            lambda side: side.send(p.PageMap(0, 0, 1, b"\x01")),
            lambda side: side.send(p.StaleMap(0, 0, 1, b"\x01")),
            lambda side: side.send(p.Switchover(b"", 0)),
        ],
        State.MAPS: [
            lambda side: side.send(p.Round(0, 1, False)),
            lambda side: side.send(p.Switchover(b"", 1)),
        ],
        State.PREPARED: [lambda side: side.send(p.Commit())],
        State.RECOVERING: [lambda side: side.send(p.Recovered())],
        State.CLOSING: [lambda side: side.send(p.CompleteAck({}))],
    },
    "dest": {
        State.OFFERED: [lambda side: side.send(p.Accept((4096,), 1, 0)), lambda side: side.send(p.Reject("no"))],
        State.CHANNELS: [lambda side: side.send(p.Ready())],
        State.ROUND: [lambda side: side.send(p.RoundDone(0))],
        State.HANDED: [lambda side: side.send(p.Prepared())],
        State.COMMITTED: [lambda side: side.send(p.Running(1))],
        State.POSTCOPY: [lambda side: side.send(p.Complete({}))],
    },
}


def steps(world: World, caller: str, lies: bool) -> Iterator[tuple[str, World]]:
    """Everything that can happen next, by what it is."""
    for name in ("source", "dest"):
        if not world.acts(name):
            continue
        side = world.side(name)
        for say in SAYS[name].get(side.state, ()):
            yield "says", on(world, name, say)
        if name == "dest" and side.state is State.RECOVER:
            if not world.told:
                yield "says", replace(on(world, name, lambda side: side.send(p.ReceivedMap(0, 0, 1, b""))), told=True)
            else:
                yield (
                    "says",
                    on(
                        world,
                        name,
                        lambda side: side.send(p.Recover(int(side._reached in (State.POSTCOPY, State.CLOSING)), 1, 0)),
                    ),
                )
        if side.may_abort:
            yield "aborts", on(world, name, lambda side: side.send(p.Abort("no")))
        if queue := queue_to(world, name):
            yield "hears", with_queue(on(world, name, partial(hear, queue[0])), name, queue[1:])
        elif world.cut and not side.ended:
            yield "notices", on(world, name, lambda side: side.connection_lost("cut"))
        if name == "source" and side.state is State.RECOVER:
            # What it hears now is what it cannot agree with.
            lost = on(
                replace(world, cut=True), name, lambda side: (side.connection_lost("no"), side.beyond_recovery("no"))
            )
            yield "disagrees", lost
        yield f"kill {name}", replace(world, gone=world.gone | {name}, cut=True)
        if side.state in (State.PAUSED, State.IN_DOUBT):
            yield f"end {name}", replace(on(world, name, lambda side: side.give_up("ended")), left=world.left | {name})
        if side.state is State.IN_DOUBT or (side.state is State.PAUSED and side._reached is State.CLOSING):
            yield "gives up", on(world, name, lambda side: side.give_up("nobody there"))
    if not world.cut:
        for arrives in range(len(world.to_source) + 1):
            for leaves in range(len(world.to_dest) + 1):
                cut = replace(world, cut=True, to_source=world.to_source[:arrives], to_dest=world.to_dest[:leaves])
                yield "cut", cut
    yield from meetings(world, caller)
    if world.acts("source") and world.source.state is State.PAUSED:
        dead = not world.acts("dest")
        if dead or lies:
            yield "reclaim" if dead else "lie", on(world, "source", lambda side: side.reclaim())


def meetings(world: World, caller: str) -> Iterator[tuple[str, World]]:
    """The side that calls does so: to come back, or to say that it has ended. A side that has ended remembers."""
    callee = other(caller)
    if caller in world.gone or callee in world.gone:
        return
    calls = world.side(caller)
    over = world.settled(caller)
    if not (over or calls.recoverable):
        return
    # The one that is called takes it for lost, at the latest now.
    there = on(replace(world, cut=True), callee, lambda side: side.connection_lost("superseded"))
    there = with_queue(there, callee, ()) if there.key() != world.key() or queue_to(world, callee) else there
    called = there.side(callee)
    if over:
        if called.state in (State.PAUSED, State.IN_DOUBT) and there.acts(callee):
            yield "announces", on(there, callee, lambda side: side.peer_ended(calls.ending))
        return
    if called.recoverable and there.acts(callee):
        welcome = on(there, callee, lambda side: side.reconnected())
        yield "welcomes", replace(welcome, told=False, to_source=(), to_dest=())  # which is lost on its way
        both = on(welcome, caller, lambda side: side.reconnected())
        yield "comes back", replace(both, cut=False, told=False, to_source=(), to_dest=())
    elif there.settled(callee):  # otherwise it is up to its operator, and the caller has to wait
        yield "is told", on(there, caller, lambda side: side.peer_ended(called.ending))


def hear(data: bytes, side: Side) -> None:
    """Whatever the other one could say, in whatever order, is never an error."""
    side.receive_data(data)
    side.next_message()


@dataclass(frozen=True)
class Explored:
    worlds: dict[tuple[object, ...], World]
    after: dict[tuple[object, ...], list[tuple[str, tuple[object, ...]]]]

    def reach(self, ends: set[tuple[object, ...]], without: frozenset[str]) -> set[tuple[object, ...]]:
        """From where one of these can be reached, without some kinds of steps."""
        before: dict[tuple[object, ...], list[tuple[object, ...]]] = {}
        for key, nexts in self.after.items():
            for what, then in nexts:
                if what not in without:
                    before.setdefault(then, []).append(key)
        reached, todo = set(ends), deque(ends)
        while todo:
            for key in before.get(todo.popleft(), ()):
                if key not in reached:
                    reached.add(key)
                    todo.append(key)
        return reached


@cache
def explore(caller: str, lies: bool = False) -> Explored:
    first = World(SourceProtocol(), DestinationProtocol())
    worlds, todo = {first.key(): first}, deque([first])
    after: dict[tuple[object, ...], list[tuple[str, tuple[object, ...]]]] = {}
    while todo:
        world = todo.popleft()
        nexts = after[world.key()] = []
        for what, then in steps(world, caller, lies):
            key = then.key()
            nexts.append((what, key))
            if key not in worlds:
                worlds[key] = then
                todo.append(then)
    return Explored(worlds, after)


@pytest.mark.parametrize("caller", ["source", "dest"])
def test_never_two_owners(caller: str) -> None:
    explored = explore(caller)
    assert len(explored.worlds) > 500
    for world in explored.worlds.values():
        assert not (world.may_run("source") and world.may_run("dest"))


def test_whatever_moves_a_side_is_sent() -> None:
    """A new message that moves the state and is missing in `SAYS` would leave states unexplored."""
    packed = {data for world in explore("source").worlds.values() for data in (*world.to_source, *world.to_dest)}
    sent = {codec.decode(data[p.HEADER_BYTES :]).TYPE for data in packed}
    moves = {
        event.removeprefix("send ")
        for side in (SourceProtocol, DestinationProtocol)
        for (state, event), after in side.TABLE.items()
        if event.startswith("send ") and after is not state
    }
    assert moves <= sent


@pytest.mark.parametrize("caller", ["source", "dest"])
def test_an_end_can_be_reached(caller: str) -> None:
    """As long as both live and nobody has ended one of them by hand: without an operator, unless they disagree."""
    explored = explore(caller)
    ends = {key for key, world in explored.worlds.items() if world.settled("source") and world.settled("dest")}
    reached = explored.reach(ends, OPERATOR | DEATH)
    for key, world in explored.worlds.items():
        if not world.gone and not world.left and not world.source.peer_gone:
            assert key in reached, (world.label("source"), world.label("dest"))
    assert explored.reach(ends, DEATH) == set(explored.worlds)  # and with one always


@pytest.mark.parametrize("caller", ["source", "dest"])
def test_operators_end_what_nobody_else_can(caller: str) -> None:
    """Where nothing happens any more by itself, and one side is not at its end, is in docs/protocol.md."""
    assert at_rest(caller) <= set(documented())
    assert at_rest("source") | at_rest("dest") == set(documented())


def at_rest(caller: str) -> set[tuple[str, str]]:
    explored = explore(caller)
    return {
        (world.label("source"), world.label("dest"))
        for key, world in explored.worlds.items()
        if not (world.settled("source") and world.settled("dest"))
        and all(then == key or what in OPERATOR | DEATH for what, then in explored.after[key])
    }


def documented() -> dict[tuple[str, str], str]:
    """The table of states that are left to an operator: source, destination, and the command."""
    text = (Path(__file__).parents[3] / "docs/protocol.md").read_text()
    table = text.split("## What is left to an operator", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|.*\| ([^|]+) \|$", table, re.MULTILINE)
    assert all("`postcopy " in command for _, _, command in rows)
    return {(source, dest): command for source, dest, command in rows}


@pytest.mark.parametrize("caller", ["source", "dest"])
def test_a_machine_can_be_taken_back_from_the_dead(caller: str) -> None:
    """From wherever the destination has died for good behind the decision, the source can get to where it may run."""
    explored = explore(caller)
    ends = {key for key, world in explored.worlds.items() if world.may_run("source") or world.settled("source")}
    dead = {key for key, world in explored.worlds.items() if "dest" in world.gone and world.acts("source")}
    assert dead
    runs = {key for key in ends if explored.worlds[key].may_run("source")}
    runs |= {key for key in ends if explored.worlds[key].source.state is State.COMPLETED}  # it had every page
    assert dead <= explored.reach(runs, DEATH | {"end source"})


@pytest.mark.parametrize("caller", ["source", "dest"])
def test_an_operator_who_is_wrong(caller: str) -> None:
    """Who takes a machine back from a destination that lives makes two of one. There is no other way to do that, and
    the destination stops as soon as it hears of it; but not one that had every page, and was done."""
    explored = explore(caller, lies=True)
    two = {key for key, world in explored.worlds.items() if world.may_run("source") and world.may_run("dest")}
    assert two
    assert all(explored.worlds[key].source.state is State.RECLAIMED for key in two)
    told = explored.reach(set(explored.worlds) - two, OPERATOR | DEATH)
    assert {explored.worlds[key].dest.state for key in two - told} <= {State.COMPLETED}
    for key in two:
        for what, then in explored.after[key]:
            if what in ("is told", "announces") and caller_hears(explored.worlds[then]):
                assert explored.worlds[then].dest.state is State.ABORTED


def caller_hears(world: World) -> bool:
    return not world.dest.recoverable and world.dest.state is not State.COMPLETED


def test_what_each_ending_does() -> None:
    """Of every state in which a side can hear that the other one has ended."""
    for caller in ("source", "dest"):
        for world in explore(caller).worlds.values():
            for name in ("source", "dest"):
                side = world.side(name)
                if side.state not in (State.PAUSED, State.IN_DOUBT):
                    continue
                for how in Ended:
                    then = copy.copy(side)
                    state = then.peer_ended(how)
                    assert state in (State.PAUSED, State.ABORTED, State.COMPLETED)
                    assert not then.recoverable
                    assert then.may_run <= side.may_run or (name == "source" and how is Ended.ABORTED)
                    if name == "dest":
                        assert not (how is Ended.RECLAIMED and then.may_run)
                        assert state is not State.COMPLETED or side._reached is State.CLOSING
