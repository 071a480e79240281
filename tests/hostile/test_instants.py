# SPDX-License-Identifier: Apache-2.0
"""Signals at random instants of a migration between two daemons: never two owners, no machine lost to one end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable

import pytest

from hostile._program import RV64, Control, Json, Program, Refusal, verify, wait_until

Start = Callable[..., Program]
Daemon = Callable[..., tuple[Program, Control]]
ROUNDS = int(os.environ.get("POSTCOPY_ROUNDS", "4"))
END_S = 90.0

pytestmark = pytest.mark.timeout(ROUNDS * 60 + 120)


class Pair:
    """Two daemons; `x` leaves the first one for the second one."""

    def __init__(self, daemon: Daemon, number: int, *more: object) -> None:
        self.source, self.at_source = daemon(f"a{number}", *RV64, "--name", "x", "--heartbeat", "0.5", *more)
        self.dest, self.at_dest = daemon(f"b{number}", "--heartbeat", "0.5", *more)
        self.at_source.ask("set", max_bandwidth="16MiB/s")
        self.asked = self.at_source.begin("migrate", machine="x", to=self.dest.where)

    def guest(self, control: Control) -> Json:
        with contextlib.suppress(OSError, ValueError, Refusal, AssertionError):
            for machine in control.machines(5).values():
                found: Json = machine.get("guest") or {}
                return found
        return {}

    def one_owner(self) -> None:
        """Looked at twice, the other one between: it cannot have moved meanwhile and back."""
        first = self.guest(self.at_source).get("state") == "running"
        second = self.guest(self.at_dest).get("state") == "running"
        third = self.guest(self.at_source).get("state") == "running"
        assert not (first and second and third), "the machine runs on both sides"

    def watch_until(self, what: str, found: Callable[[], object]) -> None:
        def look() -> object:
            self.one_owner()
            return found()

        wait_until(what, look, END_S)

    def describe(self) -> str:
        return json.dumps([self.guest(self.at_source), self.guest(self.at_dest)])


def instant(choose: random.Random) -> float:
    wait_s = choose.random() ** 2 * 1.5
    print(f"after {wait_s:.3f} s")
    return wait_s


OVER = (None, "none", "failed", "cancelled", "reclaimed")


def is_free(control: Control, name: str = "x") -> bool:
    machine = control.machines().get(name)
    return machine is None or (machine["migration"] or {}).get("status") in OVER


def stays(pair: Pair) -> bool:
    """It has failed, and the machine is where it was."""
    return is_free(pair.at_source) and pair.guest(pair.at_source).get("state") == "running"


def arrived(pair: Pair) -> bool:
    there = list(pair.at_dest.machines().values())
    return bool(there) and (there[0]["migration"] or {}).get("status") == "completed"


def test_the_source_is_told_to_end(daemon: Daemon, start: Start, seeded: random.Random) -> None:
    """It takes its machine with it, which was undecided; or the machine has moved, whole."""
    for number in range(ROUNDS):
        pair = Pair(daemon, number)
        time.sleep(instant(seeded))
        pair.source.signal(seeded.choice((signal.SIGTERM, signal.SIGINT)))
        pair.watch_until("end", lambda: not pair.source.alive())  # noqa: B023
        assert pair.source.end() == 0, pair.source.tail()
        if pair.source.result()["machines-sent"]:
            (name,) = pair.at_dest.machines()
            pair.at_dest.wait_status(name, "completed")
            verify(start, pair.at_dest, name)
        else:
            wait_until("nothing there", lambda: not pair.at_dest.machines(), END_S)  # noqa: B023
        pair.dest.kill()
        pair.source.kill()


def test_the_destination_is_told_to_end(daemon: Daemon, start: Start, seeded: random.Random) -> None:
    """The machine is where it was, and whole; or all of it has come before the destination ended."""
    for number in range(ROUNDS):
        pair = Pair(daemon, number)
        time.sleep(instant(seeded))
        pair.dest.signal(seeded.choice((signal.SIGTERM, signal.SIGINT)))
        pair.watch_until("end", lambda: not pair.dest.alive())  # noqa: B023
        assert pair.dest.end() == 0, pair.dest.tail()
        if pair.dest.result()["machines-received"]:
            wait_until("no machine", lambda: pair.at_source.migration("x").get("status") in (None, "completed"))  # noqa: B023
        else:
            wait_until("run", lambda: pair.guest(pair.at_source).get("state") == "running", END_S)  # noqa: B023
            with contextlib.suppress(Refusal, AssertionError):
                pair.asked.answer()
            wait_until("place", lambda: is_free(pair.at_source))  # noqa: B023
            verify(start, pair.at_source, "x")
        pair.dest.kill()
        pair.source.kill()


@pytest.mark.parametrize("side", ["source", "dest"])
def test_one_of_them_stands_still(daemon: Daemon, start: Start, seeded: random.Random, side: str) -> None:
    """SIGSTOP, for less or more than three heartbeats, and SIGCONT: the machine is whole, on one side."""
    for number in range(ROUNDS):
        pair = Pair(daemon, number)
        program = pair.source if side == "source" else pair.dest
        time.sleep(instant(seeded))
        program.signal(signal.SIGSTOP)
        time.sleep(seeded.choice((0.3, 2.5, 5.0)))
        program.signal(signal.SIGCONT)
        with contextlib.suppress(Refusal):
            pair.asked.answer()
        pair.watch_until("decision", lambda: stays(pair) or arrived(pair))  # noqa: B023
        if arrived(pair):
            verify(start, pair.at_dest, *pair.at_dest.machines())
        else:
            wait_until("end of the other one", lambda: not pair.at_dest.machines(), END_S)  # noqa: B023
            verify(start, pair.at_source, "x")
        pair.dest.kill()
        pair.source.kill()


@pytest.mark.parametrize("side", ["source", "dest"])
def test_one_of_them_is_killed(daemon: Daemon, start: Start, seeded: random.Random, side: str) -> None:
    """SIGKILL: the machine runs on at the source, or is paused on both sides for ever, and is reclaimed; the
    destination never runs what it was not given."""
    for number in range(ROUNDS):
        pair = Pair(daemon, number)
        time.sleep(instant(seeded))
        if side == "source":
            seen = pair.guest(pair.at_source).get("state")
            pair.source.signal(signal.SIGKILL)
            time.sleep(2)
            for name, machine in pair.at_dest.machines().items():
                status = machine["migration"]["status"]
                print(seen, status, machine["guest"])
                assert status in ("in-doubt", "postcopy-paused", "completed", "setup", "active", "device"), machine
                if status != "completed":
                    assert pair.at_dest.ask("end", machine=name, force=True) is not None
        else:
            pair.dest.signal(signal.SIGKILL)
            wait_until(
                "decision",
                lambda: (
                    pair.guest(pair.at_source).get("state") == "running"  # noqa: B023
                    or pair.at_source.migration("x").get("status") in (None, "postcopy-paused", "completed")  # noqa: B023
                ),
            )
            time.sleep(2)
            here = pair.at_source.machines().get("x")
            if here is not None and (here["migration"] or {}).get("status") == "postcopy-paused":
                pair.at_source.ask("reclaim", machine="x", force=True)
                print(pair.at_source.machines())
            if here is not None:
                wait_until("run", lambda: pair.guest(pair.at_source).get("state") == "running", END_S)  # noqa: B023
                wait_until("place", lambda: is_free(pair.at_source))  # noqa: B023
                verify(start, pair.at_source, "x")
        pair.dest.kill()
        pair.source.kill()
