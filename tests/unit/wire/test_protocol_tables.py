# SPDX-License-Identifier: Apache-2.0
"""The tables of states: what follows from them, and that docs/protocol.md shows them as they are.

Where that differs: print(message_table()) and print(event_table()), and put them there."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest

from postcopy.wire import DestinationProtocol, Ended, SourceProtocol, State
from postcopy.wire.messages import MESSAGES
from postcopy.wire.states import DESTINATION, SOURCE, Table

DOCS = Path(__file__).parents[3] / "docs/protocol.md"
EVENTS = ("lost", "given up", *(f"peer {how}" for how in Ended), "go on")


def message_table() -> str:
    lines = ["| state | the source may send | the destination may send |", "|---|---|---|"]
    for state in State:
        cells = [
            ", ".join(
                f"`{event.removeprefix('send ')}` → {after.value}"
                for (before, event), after in table.items()
                if before is state and event.startswith("send ")
            )
            for table in (SOURCE, DESTINATION)
        ]
        if any(cells):
            lines.append(f"| {state.value} | {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines)


def event_table() -> str:
    lines = [f"| side | it had come to | {' | '.join(EVENTS)} |", "|---" * (len(EVENTS) + 2) + "|"]
    for name, table in (("source", SOURCE), ("destination", DESTINATION)):
        rows = [(state, cells(table, state)) for state in State if any(cells(table, state))]
        for same, group in groupby(rows, key=lambda row: row[1]):
            states = ", ".join(state.value for state, _ in group)
            lines.append(f"| {name} | {states} | {' | '.join(same)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines)


def cells(table: Table, state: State) -> list[str]:
    return [after.value if (after := table.get((state, event))) else "" for event in EVENTS]


@pytest.mark.parametrize("table", [message_table, event_table])
def test_documented(table: object) -> None:
    assert callable(table)
    assert table() in DOCS.read_text()


def test_every_event_is_known() -> None:
    for table in (SOURCE, DESTINATION):
        for _, event in table:
            verb, _, kind = event.partition(" ")
            assert event in EVENTS or (verb in ("send", "receive") and kind in MESSAGES)


def test_whatever_is_sent_may_be_received() -> None:
    """In the same state, with the same outcome: two sides that hear each other stay together."""
    for table, other in ((SOURCE, DESTINATION), (DESTINATION, SOURCE)):
        for (state, event), after in table.items():
            if event.startswith("send "):
                assert other[state, event.replace("send", "receive")] is after


@pytest.mark.parametrize("side", [SourceProtocol, DestinationProtocol])
def test_what_may_be_received(side: type[SourceProtocol] | type[DestinationProtocol]) -> None:
    for state in State:
        for kind in MESSAGES:
            allowed = (state, f"receive {kind}") in side.TABLE or kind in ("ping", "pong")
            assert (kind in side.RECEIVES[state]) == allowed
