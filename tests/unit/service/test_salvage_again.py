# SPDX-License-Identifier: Apache-2.0
"""A salvage is all that is left of a machine: one that cannot be written is no reason to end."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from postcopy._stop import TOGETHER_S
from postcopy.errors import MigrationError
from postcopy.machines import Machine
from postcopy.migration import salvage
from postcopy.migration.source import SourceOptions
from postcopy.output import Output
from postcopy.service.config import ArrivalOptions
from postcopy.service.report import Migration
from postcopy.service.service import SALVAGE_AGAIN_S, Service


class Policy(Service):
    async def run(self, stop: Any) -> bool:
        raise NotImplementedError


class Disk:
    """One that is full for so many attempts."""

    def __init__(self, full: float) -> None:
        self.full = full
        self.attempts = 0

    async def write(self, path: str, *_: object) -> bool:
        await trio.lowlevel.checkpoint()
        self.attempts += 1
        if self.attempts <= self.full:
            raise MigrationError(f"salvage to {path}: No space left on device")
        return True


class Lost:
    migration_id = "ff"
    machine_name = "vm1"


def service() -> tuple[Policy, io.StringIO]:
    text = io.StringIO()
    policy = Policy("dest", True, Output(False, io.StringIO(), text), SourceOptions(), ArrivalOptions())
    policy.salvage_to = "DIR"
    return policy, text


async def write(policy: Policy) -> None:
    await policy.write_salvage(cast(Machine, SimpleNamespace(live=True)), cast(Migration, Lost()), [])


async def test_disk_that_is_full_for_a_while(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    disk = Disk(3)
    monkeypatch.setattr(salvage, "write", disk.write)
    policy, text = service()
    began_s = trio.current_time()
    await write(policy)
    assert disk.attempts == 4
    assert trio.current_time() - began_s == pytest.approx(3 * SALVAGE_AGAIN_S)
    assert text.getvalue().count("Still needed: the salvage") == 1
    assert "dest: salvage written to DIR" in text.getvalue()
    policy.stop.ask("SIGTERM")
    await trio.sleep(2 * TOGETHER_S)
    assert policy.stop.ask("SIGTERM")  # nothing would be lost any more


async def test_ended_from_outside(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    """Nothing would end it any more."""
    disk = Disk(float("inf"))
    monkeypatch.setattr(salvage, "write", disk.write)
    policy, _ = service()

    async def end(done: bool) -> None:
        await write(policy)

    async def run() -> bool:
        await trio.sleep_forever()
        return True

    with trio.fail_after(1000), trio.move_on_after(1):
        await policy.run_to_result(run, end)
    assert disk.attempts == 1


async def test_asked_again_while_it_is_tried(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    policy, _ = service()

    async def slow(*_: object) -> bool:
        await trio.sleep(1)
        assert not policy.stop.ask("SIGTERM")  # which would cancel, and no signal would come any more
        raise MigrationError("no")

    monkeypatch.setattr(salvage, "write", slow)
    policy.stop.ask("SIGTERM")
    with trio.fail_after(1000):
        await write(policy)
    assert policy.stop.insisted


async def test_giving_it_up(monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock) -> None:
    """One signal loses nothing; the next one after the warning does."""
    disk = Disk(float("inf"))
    monkeypatch.setattr(salvage, "write", disk.write)
    policy, text = service()
    policy.stop.ask("SIGTERM")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, policy)
        await trio.sleep(100)
        assert "SIGTERM again within 10 s" in text.getvalue()
        assert not policy.stop.ask("SIGTERM")  # long after: it is said again
        await trio.sleep(2 * TOGETHER_S)
        assert text.getvalue().count("Still needed: the salvage") == 2
        assert not policy.stop.ask("SIGTERM")
        assert policy.stop.insisted
    assert not policy.stop.has_warned
    assert "salvage written" not in text.getvalue()
