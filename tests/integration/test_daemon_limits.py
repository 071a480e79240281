# SPDX-License-Identifier: Apache-2.0
"""Daemons as real processes at the end of what there is: memory, threads, a peer that is frozen or dead. What cannot be
taken is refused by name before it is decided, and nothing that is there already pays for it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cgroups import Group, group_of

MIB = 1 << 20
POSTCOPY = (sys.executable, "-P", "-m", "postcopy")
RV64 = ("--machine", "rv64", "--memory", "16MiB", "--workload", "random", "--used-memory", "4MiB")
# Under KVM, whose guest asks for its pages one by one, a migration with a small bandwidth lasts for many seconds.
SLOW = ("--machine", "kvm", "--memory", "32MiB", "--vcpus", "2", "--workload", "random", "--max-bandwidth", "64KiB/s")

Start = Callable[..., Any]


@pytest.fixture
def memory_group() -> Iterator[Group]:
    with group_of("memory", 1 << 30) as group:
        yield group


@pytest.fixture
def pids_group() -> Iterator[Group]:
    with group_of("pids", "max") as group:
        yield group


@pytest.mark.needs("root", "uffd-user")
def test_five_machines_in_a_small_group(
    side: Start, daemon: Start, operator: Callable[[str], Any], tmp_path: Path, memory_group: Group
) -> None:
    """Each would fit alone. Those for which there is room come, whole; the others are refused and run on at home."""
    home = daemon("a")
    assert home.address
    at = operator("a")
    names = [f"m{number}" for number in range(5)]
    for name in names:
        at.tell("start", "rv64", "--name", name, "--memory", "64MiB", "--workload", "random")
    memory_group.limit(300 * MIB)
    small = side(
        "daemon",
        "--json",
        "--control",
        tmp_path / "b",
        "--listen",
        "127.0.0.1:0",
        command=[*memory_group.enter(), *POSTCOPY],
    )
    address = small.address
    sent = [subprocess.Popen(
        [*POSTCOPY, "ctl", "--control", str(tmp_path / "a"), "migrate", address, "--machine", name],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) for name in names]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in sent]
    came = {name for name, process in zip(names, sent, strict=True) if process.returncode == 0}
    assert 2 <= len(came) < 5, errors
    for name, error in zip(names, errors, strict=True):
        assert name in came or "promised to machines here" in error or "available" in error, error
    to = operator("b")
    to.wait("them", lambda here: all(here[name]["guest"] is not None for name in came))
    assert set(to.machines()) == came
    assert set(at.machines()) == set(names) - came
    before = {name: machine["guest"]["operations"] for name, machine in {**to.machines(), **at.machines()}.items()}
    for name in names:
        (to if name in came else at).wait(name, lambda here: here[name]["guest"]["operations"] > before[name])  # noqa: B023
    # What has ended is not promised any more.
    gone = sorted(came)[0]
    to.ask("end", "--machine", gone, "--force")
    staying = next(name for name in names if name not in came)
    at.ask("migrate", address, "--machine", staying)
    for process in (home, small):
        process.signal(signal.SIGTERM)
        assert process.end()[0] == 0


@pytest.mark.needs("root", "uffd-user")
def test_no_more_threads(
    side: Start, daemon: Start, operator: Callable[[str], Any], tmp_path: Path, pids_group: Group
) -> None:
    idle = (*RV64, "--workload", "idle")  # what interprets them takes no processor from what is looked at
    home = daemon("a", *idle, "--name", "x")
    assert home.address
    at = operator("a")
    full = side(
        "daemon", "--json", "--control", tmp_path / "b", "--listen", "127.0.0.1:0", *idle, "--name", "y",
        command=[*pids_group.enter(), *POSTCOPY],
    )  # fmt: skip
    address = full.address
    to = operator("b")
    to.wait("y", lambda here: here["y"]["guest"]["operations"] > 0)
    pids_group.limit(pids_group.used())
    for more in range(9):  # one more each time: it fails at another step
        pids_group.limit(pids_group.used() + more if more else pids_group.used())
        before = at.machines()["x"]["guest"]["operations"] if "x" in at.machines() else None
        if before is None:
            break
        arguments = [*POSTCOPY, "ctl", "--control", str(tmp_path / "a"), "migrate", address]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=90, check=False)
        assert "Traceback" not in done.stderr
        if done.returncode == 0:
            break
        assert done.stderr.strip()
        at.wait("x", lambda here: here["x"]["guest"]["operations"] > before)  # noqa: B023
        y = to.machines()["y"]["guest"]["operations"]
        to.wait("y", lambda here: here["y"]["guest"]["operations"] > y)  # noqa: B023
        assert set(to.machines()) == {"y"}
    pids_group.limit("max")
    if "x" in at.machines():
        at.ask("migrate", address)
    to.wait("x", lambda here: here["x"]["migration"]["status"] == "completed")
    full.signal(signal.SIGTERM)
    status, _, errors = full.end()
    assert status == 0
    assert "Traceback" not in errors


@pytest.mark.needs("uffd-user")
@pytest.mark.parametrize("end", ["cancel", "end", "quit", "signal"])
def test_frozen_peer(
    daemon: Start, operator: Callable[[str], Any], spawn_child: Start, tmp_path: Path, end: str
) -> None:
    first, frozen = daemon("a", *RV64, "--name", "x"), daemon("b")
    assert first.address
    at, address = operator("a"), frozen.address
    frozen.signal(signal.SIGSTOP)
    command = [*POSTCOPY, "ctl", "--control", str(tmp_path / "a"), "migrate", address]
    migrate = spawn_child(command)
    at.wait("it", lambda here: (here["x"]["migration"] or {}).get("status") == "connecting")
    if end == "cancel":
        assert [one["machine"] for one in at.request("migrate-cancel")["migrations"]] == ["x"]
        done = migrate.wait(60)
        assert done.returncode == 1
        assert "cancelled" in done.stderr
        before = at.machines()["x"]["guest"]["operations"]
        at.wait("x", lambda here: here["x"]["guest"]["operations"] > before)
        first.signal(signal.SIGTERM)
    elif end == "end":
        at.request("end", force=True)
        assert at.machines() == {}
        first.signal(signal.SIGTERM)
    elif end == "quit":
        at.request("quit", force=True)
    else:
        first.signal(signal.SIGTERM)
    assert first.end()[0] == 0
    # A connection that had been waited for to its time limit would have failed instead.
    assert [line["status"] for line in first.events("migration-ended")] == ["cancelled"]
    frozen.signal(signal.SIGCONT)


@pytest.mark.needs("kvm", "uffd")
class TestReclaim:
    def test_destination_that_is_dead(self, daemon: Start, operator: Callable[[str], Any]) -> None:
        patient = ("--heartbeat", "3")  # a dead one is seen at once, by its connection
        first, victim = daemon("a", *SLOW, "--name", "x", *patient), daemon("b", *patient)
        assert first.address
        at = operator("a")
        assert "has not been sent away" in at.ask("reclaim", status=1)[1]
        at.tell("migrate", victim.address, "--detach")
        at.wait("it", lambda here: here["x"]["migration"]["status"] == "postcopy-active")
        assert "destination" in at.ask("reclaim", "--force", status=1)[1]
        victim.signal(signal.SIGKILL)
        here = at.wait("pause", lambda here: here["x"]["migration"]["status"] == "postcopy-paused")
        assert here["x"]["guest"]["state"] == "paused"
        before = here["x"]["guest"]["operations"]
        text = at.ask("reclaim", status=1)[1]
        assert "since is lost" in text
        assert "--force" in text
        assert at.machines()["x"]["guest"]["state"] == "paused"
        text = at.ask("reclaim", "--force", "--machine", "x")[0]
        assert text.startswith("x runs here again: ")
        here = at.wait("x", lambda here: here["x"]["guest"]["operations"] > before)
        assert here["x"]["migration"]["status"] == "reclaimed"
        again = daemon("c")
        at.ask("set", "--max-bandwidth", "none")
        at.ask("migrate", again.address)
        to = operator("c")
        assert to.machines()["x"]["guest"]["failures"] == 0

    def test_destination_that_answers_keeps_it(self, daemon: Start, operator: Callable[[str], Any]) -> None:
        first, second = daemon("a", *SLOW, "--name", "x"), daemon("b")
        assert first.address
        at, to = operator("a"), operator("b")
        at.tell("migrate", second.address, "--detach")
        to.wait("it", lambda here: here.get("x", {}).get("migration", {}).get("status") == "postcopy-active")
        at.ask("migrate-pause")
        at.wait("pause", lambda here: here["x"]["migration"]["status"] == "postcopy-paused")
        assert "answers" in at.ask("reclaim", "--force", status=1)[1]
        at.wait("it", lambda here: here["x"]["migration"]["status"] == "postcopy-active")


@pytest.mark.needs("kvm", "uffd")
def test_recover_after_the_search_has_ended(daemon: Start, operator: Callable[[str], Any]) -> None:
    first, second = daemon("a", *SLOW, "--name", "x"), daemon("b")
    assert first.address
    assert second.address
    at, to = operator("a"), operator("b")
    for one in (at, to):
        one.ask("set", "--recover-for", "0.5")
    at.tell("migrate", second.address, "--detach")
    at.wait("it", lambda here: here["x"]["migration"]["status"] == "postcopy-active")
    to.ask("migrate-pause")
    for one in (at, to):
        one.wait("end of the search", lambda here: here["x"]["migration"]["looking-for-peer"] is False)
        assert "not looked for" in one.ask("status")[0]
    for one in (to, at):
        one.ask("migrate-recover")
    at.wait("it", lambda here: here["x"]["migration"]["recoveries"]["count"] == 1)
