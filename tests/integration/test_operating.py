# SPDX-License-Identifier: Apache-2.0
"""Operating real processes through their control sockets, with the command that an operator has."""

from __future__ import annotations

import os
import random
import re
import secrets
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from lines import parse_control_line, parse_log_line
from prometheus_client.parser import text_string_to_metric_families

from postcopy.service import ControlClient, ControlError
from postcopy.testbed.chaos import ChaosPlan, ChaosProxy, open_chaos_proxy

MIB = 1 << 20
DEADLINE_S = 60.0
Json = dict[str, Any]


Operator = Any  # tests/support/sides.py


# Under KVM, whose guest asks for its pages one by one, a migration with a small bandwidth lasts for many seconds.
SLOW = ("--machine", "kvm", "--memory", "32MiB", "--vcpus", "2", "--workload", "random", "--max-bandwidth", "64KiB/s")
RV64 = ("--machine", "rv64", "--memory", "16MiB", "--workload", "random", "--used-memory", "4MiB")


@pytest.mark.needs("uffd-user")
class TestBothSides:
    @pytest.mark.needs("kvm", "uffd")
    def test_from_beginning_to_end(
        self, side: Callable[..., Any], operator: Callable[[str], Operator], tmp_path: Path
    ) -> None:
        dest = side("dest", "--json", "--control", tmp_path / "d", "--listen", "127.0.0.1:0")
        address = dest.address
        to, at = operator("d"), operator("s")
        assert to.tell("status")["machines"] == []
        assert to.ask("set", "--max-bandwidth", "1MiB/s", status=2)[1].count("\n") == 1
        source = side("source", "--json", "--control", tmp_path / "s", *SLOW, "--connect", address)
        source.wait_status("postcopy-active")
        status = at.tell("status", "--machine", "kvm")
        assert status["side"] == "source"
        assert status["settings"] == {
            "max-bandwidth": 64 << 10, "bulk-channels": 2, "recover-for": "forever",
            "mode": "postcopy", "precopy": 0.0, "max-downtime": 0.3, "push-after": 0.0,
        }  # fmt: skip
        job = status["machines"][0]["migration"]
        assert (job["status"], job["direction"]) == ("postcopy-active", "outgoing")
        assert to.machines()["kvm"]["migration"]["migration-id"] == job["migration-id"]
        text, _ = at.ask("status")
        assert "Postcopy-active, outgoing" in text
        assert {len(line) - len(line.partition(":")[2].lstrip()) for line in text.splitlines() if line} == {19}

        # Past the point of no return: not cancelled, not left alone, but cut and connected again.
        assert "belongs to the destination" in at.ask("migrate-cancel", status=1)[1]
        assert "there is no precopy to end: the migration is postcopy-active" in at.ask("switchover", status=1)[1]
        assert "has not received all of the memory" in at.ask("quit", status=1)[1]
        assert "have not arrived: wait" in to.ask("quit", status=1)[1]
        at.ask("migrate-pause")
        at.wait("pause", lambda here: here["kvm"]["migration"]["status"] == "postcopy-paused")
        to.wait("pause", lambda here: here["kvm"]["migration"]["status"] == "postcopy-paused")
        at.ask("migrate-recover")
        to.wait("recovery", lambda here: here["kvm"]["migration"]["recoveries"]["count"] == 1)
        to.ask("migrate-pause")  # and from the side that listens
        at.wait("pause", lambda here: here["kvm"]["migration"]["status"] == "postcopy-paused")
        assert "listens" in to.ask("migrate-recover", "127.0.0.1:9", status=2)[1]
        to.ask("migrate-recover")
        to.wait("recovery", lambda here: here["kvm"]["migration"]["recoveries"]["count"] == 2)

        at.ask("set", "--max-bandwidth", "none")  # which would have taken minutes
        status, result, errors = source.end()
        assert status == 0, errors
        assert result["recoveries"]["count"] == 2
        to.wait("all", lambda here: here["kvm"]["migration"]["status"] == "completed")
        to.ask("quit")
        status, result, errors = dest.end()
        assert status == 0, errors
        assert result["verified"] is True
        assert not list(tmp_path.iterdir())  # the sockets are gone

    @pytest.mark.needs("kvm", "uffd")
    def test_recover_at_another_address(
        self, side: Callable[..., Any], operator: Callable[[str], Operator], tmp_path: Path
    ) -> None:
        """The network between the two dies for good; there is another one."""
        dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--run-for", "0")
        address = dest.address
        proxy = side("chaos", "none", "--json", "--listen", "127.0.0.1:0", "--to", address)
        source = side("source", "--json", "--control", tmp_path / "s", *SLOW, "--connect", proxy.address)
        source.wait_status("postcopy-active")
        proxy.signal(signal.SIGKILL)
        source.wait_status("postcopy-paused")
        at = operator("s")
        at.ask("migrate-recover", address)
        at.wait("recovery", lambda here: here["kvm"]["migration"]["recoveries"]["count"] == 1)
        at.ask("set", "--max-bandwidth", "none")
        for one in (source, dest):
            status, result, errors = one.end()
            assert status == 0, errors
        assert result["verified"] is True

    def test_cancel_and_events(
        self, side: Callable[..., Any], spawn_child: Callable[..., Any], operator: Callable[[str], Operator],
        tmp_path: Path,
    ) -> None:  # fmt: skip
        dest = side("dest", "--json", "--listen", "127.0.0.1:0")
        address = dest.address
        source = side(
            "source", "--json", "--control", tmp_path / "s", *RV64, "--connect", address, "--migrate-after", "600"
        )
        source.wait_status("active")
        at = operator("s")
        watcher = spawn_child([sys.executable, "-m", "postcopy", "ctl", "--control", str(at.path), "events", "--json"])
        deadline = time.monotonic() + DEADLINE_S
        while "progress" not in watcher.output():
            assert time.monotonic() < deadline
        at.ask("migrate-cancel")
        failed = source.wait_for("end", lambda line: line["event"] == "migration-ended")
        assert failed["status"] == "cancelled"
        dest.wait_for_errors("waiting for the next one")
        dest.signal(signal.SIGTERM)
        assert dest.end()[0] == 1
        here = at.wait("going on", lambda here: here["rv64"]["guest"]["state"] == "running")
        before = here["rv64"]["guest"]["operations"]
        at.wait("operations", lambda here: here["rv64"]["guest"]["operations"] > before)
        assert "no migration is going on" in at.ask("migrate-cancel", status=1)[1]
        at.ask("quit")
        assert source.end()[0] == 1  # it did not do what it was started for
        watched = watcher.wait(DEADLINE_S)  # ends with the process that it watched
        assert watched.returncode == 0
        seen = [parse_control_line(line) for line in watched.stdout.splitlines()]
        assert [event["data"]["status"] for event in seen if event["event"] == "migration-ended"] == ["cancelled"]
        assert seen[-1]["event"] == "result"

    def test_second_process_with_the_same_socket(self, side: Callable[..., Any], tmp_path: Path) -> None:
        first = side("dest", "--json", "--control", tmp_path / "d", "--listen", "127.0.0.1:0")
        assert first.address
        status, _, errors = side("dest", "--control", tmp_path / "d", "--listen", "127.0.0.1:0").end()
        assert status == 1
        assert "a running process has this socket" in errors
        first.signal(signal.SIGKILL)
        first.end()
        third = side("dest", "--json", "--control", tmp_path / "d", "--listen", "127.0.0.1:0")
        assert third.address  # in place of the dead one's


def _machine(kind: str, *more: object) -> tuple[object, ...]:
    return ("--machine", kind, "--memory", "32MiB", "--vcpus", "2", "--workload", "random", *more)


@pytest.mark.needs("uffd-user")
class TestDaemon:
    @pytest.mark.parametrize(
        ("kind", "backing", "pager", "precopy", "times"),
        [
            ("rv64", "memfd", "thread", "off", 10),
            ("kvm", "memfd", "thread", "0.2", 10),
            ("kvm", "anon", "thread", "off", 3),
            ("kvm", "memfd", "process", "off", 3),
        ],
    )
    def test_ten_migrations_back_and_forth(
        self, daemon: Callable[..., Any], side: Callable[..., Any], operator: Callable[[str], Operator],
        require: Callable[..., None], kind: str, backing: str, pager: str, precopy: str, times: int,
    ) -> None:  # fmt: skip
        """The machine is never restarted, its counter never goes back, and in the end all of its memory is right."""
        if kind == "kvm":
            require("kvm", "uffd")
        engine = ("--backing", backing, "--pager", pager, "--precopy", precopy, "--max-downtime", "1ms")
        first = daemon("a", *_machine(kind, "--used-memory", "8MiB"), *engine, "--name", "traveller")
        second = daemon("b", *engine)
        here, there = (operator("a"), first), (operator("b"), second)
        assert first.address  # it is there, and can be asked
        operations = 0
        ids = set()
        for _ in range(times):
            (at, _), (to, target) = here, there
            moved = at.tell("migrate", target.address)
            assert moved["status"] == "completed"
            assert moved["downtime-ms"] > 0
            ids.add(moved["migration-id"])
            assert at.machines() == {}
            arrived = to.wait("arrival", lambda here: here["traveller"]["migration"]["status"] == "completed")
            guest = arrived["traveller"]["guest"]
            assert guest["state"] == "running"
            assert guest["failures"] == 0
            assert guest["operations"] >= operations
            operations = _operations(to.wait("progress", _more_than(guest["operations"])))
            assert bool(arrived["traveller"]["migration"]["ram"]["iteration"]) is (precopy != "off")
            here, there = there, here
        assert len(ids) == times
        # Every operation since it was started is replayed, and compared with all memory.
        last = side("dest", "--json", "--listen", "127.0.0.1:0", "--run-for", "0.1")
        here[0].ask("migrate", last.address)
        status, result, errors = last.end()
        assert status == 0, errors
        assert result["verified"] is True
        assert result["guest"]["operations"] >= operations
        for at, one in (here, there):
            at.ask("quit")
            status, result, errors = one.end()
            assert status == 0, errors
        assert "error" not in errors

    async def test_back_at_once(self, daemon: Callable[..., Any], tmp_path: Path) -> None:
        """Sent back in the moment in which the other side says that it has left: that answer may come first."""
        first, second = daemon("a", *RV64, "--name", "x"), daemon("b")
        addresses = {"a": first.address, "b": second.address}
        here, there = "a", "b"
        for _ in range(8):
            assert await _try_to_move(tmp_path / here, addresses[there]) == "completed"
            here, there = there, here

    @pytest.mark.needs("kvm", "uffd")
    async def test_back_and_forth_over_a_network_that_is_cut(
        self, daemon: Callable[..., Any], side: Callable[..., Any], tmp_path: Path
    ) -> None:
        """What fails before the point of no return is begun again, what comes after it recovers. The
        network counts what it carries, and is cut by that: on a slow host too it finds both under way."""
        seed = int(os.environ.get("POSTCOPY_SEED", "0"), 0) or secrets.randbits(32)
        print(f"POSTCOPY_SEED={seed}")
        first = daemon("a", *_machine("kvm", "--used-memory", "16MiB"), "--name", "x")
        second = daemon("b")
        async with (
            open_chaos_proxy(second.address, ChaosPlan()) as there,
            open_chaos_proxy(first.address, ChaosPlan()) as back,
            trio.open_nursery() as nursery,
        ):
            for number, proxy in enumerate((there, back)):
                nursery.start_soon(_cut_by_bytes, proxy, random.Random(seed + number))
            with trio.fail_after(2 * DEADLINE_S):
                await self._back_and_forth(tmp_path, side, {"a": str(there.address), "b": str(back.address)})
            nursery.cancel_scope.cancel()

    async def _back_and_forth(self, tmp_path: Path, side: Callable[..., Any], paths: dict[str, str]) -> None:
        here, there = "a", "b"
        operations = trips = recoveries = 0
        while trips < 4:
            status = await _try_to_move(tmp_path / here, paths[here])
            if status != "completed":
                continue
            async with ControlClient.open(str(tmp_path / there)) as client:
                (machine,) = (await client.execute("status", {"machine": "x"}))["machines"]
            assert machine["guest"]["failures"] == 0
            assert machine["guest"]["operations"] >= operations
            operations = machine["guest"]["operations"]
            recoveries += machine["migration"]["recoveries"]["count"]
            trips += 1
            here, there = there, here
        assert recoveries > 0
        last = side("dest", "--json", "--listen", "127.0.0.1:0", "--run-for", "0")
        assert await _try_to_move(tmp_path / here, last.address) == "completed"
        status, result, errors = last.end()
        assert status == 0, errors
        assert result["verified"] is True
        assert result["guest"]["operations"] >= operations

    @pytest.mark.needs("kvm", "uffd")
    def test_two_machines_share_a_bandwidth(
        self, daemon: Callable[..., Any], operator: Callable[[str], Operator]
    ) -> None:
        """Counted in what was pushed of each while both were under way, not in time."""
        limit = 4 * MIB
        first = daemon("a", "--max-bandwidth", f"{limit // MIB}MiB/s")
        target = daemon("b").address
        assert first.address  # after which its control socket is there
        at = operator("a")
        names = ["one", "two"]
        for name in names:
            at.tell("start", "kvm", "--name", name, "--memory", "32MiB", "--workload", "random", "--seed", "1")
        at.wait("work", lambda here: all(here[name]["guest"]["operations"] > 0 for name in names))
        for name in names:
            at.tell("migrate", target, "--machine", name, "--detach")

        def pushed(here: dict[str, Json]) -> list[int]:
            return [here[name]["migration"]["ram"].get("background-pages", 0) for name in names]

        begun = pushed(
            at.wait("both", lambda here: all(here[n]["migration"]["status"] == "postcopy-active" for n in names))
        )
        later = pushed(at.wait("more", lambda here: min(map(int.__sub__, pushed(here), begun)) > 300))
        grown = [after - before for before, after in zip(begun, later, strict=True)]
        assert max(grown) < 2 * min(grown) + 100, (begun, later)
        at.ask("set", "--max-bandwidth", "none")
        to = operator("b")
        to.wait("both", lambda here: {here[n]["migration"]["status"] for n in here} == {"completed"} and len(here) == 2)
        at.ask("quit")
        assert first.end()[1]["machines-sent"] == 2

    def test_what_is_refused(self, daemon: Callable[..., Any], operator: Callable[[str], Operator]) -> None:
        first, second = daemon("a", *RV64, "--name", "x"), daemon("b", *RV64, "--name", "x")
        at, to = operator("a"), operator("b")
        target = second.address
        assert first.address
        assert "already" in at.ask("migrate", target, status=1)[1]  # b has an x of its own
        assert f"{first.address}: this address is this daemon itself" in at.ask("migrate", first.address, status=1)[1]
        assert at.machines()["x"]["guest"]["state"] == "running"
        assert "no machine 'y'" in at.ask("migrate", target, "--machine", "y", status=2)[1]
        assert "refused" in at.ask("migrate", "127.0.0.1:1", status=1)[1]
        assert "not an address" in at.ask("migrate", "nowhere", status=2)[1]
        assert "here already" in at.ask("start", "rv64", "--name", "x", status=2)[1]
        assert re.search(r"KIND: kvm, rv64.*, not 'image'", at.ask("start", "image", "--name", "y", status=2)[1])
        assert "x: the machine runs only here" in at.ask("quit", status=1)[1]
        assert "x: the machine runs only here" in to.ask("end", status=1)[1]
        assert to.machines()["x"]["guest"]["state"] == "running"
        to.ask("end", "--force")
        at.ask("migrate", target)
        assert list(to.machines()) == ["x"]
        at.ask("quit")
        to.ask("quit", "--force")
        for one in (first, second):
            assert one.end()[0] == 0

    @pytest.mark.needs("kvm", "uffd")
    def test_destination_killed(
        self, daemon: Callable[..., Any], operator: Callable[[str], Operator], side: Callable[..., Any]
    ) -> None:
        """Before the point of no return the machine runs on here; after it, it is kept and does not."""
        first = daemon("a", *SLOW, "--name", "x")
        at = operator("a")
        victim = daemon("b")
        assert first.address  # it can be asked now
        at.tell("migrate", victim.address, "--detach")
        at.wait("it", lambda here: here["x"]["migration"]["status"] == "postcopy-active")
        victim.signal(signal.SIGKILL)
        here = at.wait("pause", lambda here: here["x"]["migration"]["status"] == "postcopy-paused")
        assert here["x"]["guest"]["state"] == "paused"
        assert "is being moved already" in at.ask("migrate", "127.0.0.1:1", status=1)[1]
        assert "has not received all of the memory" in at.ask("end", status=1)[1]
        at.ask("end", "--force")
        assert at.machines() == {}
        first.signal(signal.SIGTERM)
        assert first.end()[0] == 0

    @pytest.mark.needs("kvm", "uffd")
    def test_signal_sees_a_decided_migration_through(
        self, daemon: Callable[..., Any], operator: Callable[[str], Operator]
    ) -> None:
        first, second = daemon("a", *SLOW, "--name", "x"), daemon("b")
        at = operator("a")
        at.tell("migrate", second.address, "--detach")
        at.wait("it", lambda here: here["x"]["migration"]["status"] == "postcopy-active")
        first.signal(signal.SIGTERM)
        at.ask("set", "--max-bandwidth", "none")
        status, result, errors = first.end()
        assert status == 0
        assert "x: the destination has not received all of the memory" in errors
        assert "Still needed" in errors
        assert result["machines-sent"] == 1
        to = operator("b")
        assert to.machines()["x"]["migration"]["status"] == "completed"
        assert to.machines()["x"]["guest"]["failures"] == 0

    def test_source_that_holds(
        self, side: Callable[..., Any], operator: Callable[[str], Operator], tmp_path: Path
    ) -> None:
        source = side("source", "--json", "--hold", "--control", tmp_path / "s", *RV64)
        source.wait_for("start", lambda line: line["event"] == "machine-started")
        at = operator("s")
        (name,) = at.machines()
        dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--run-for", "0")
        text, _ = at.ask("migrate", dest.address)
        assert text.startswith(f"{name} has moved to 127.0.0.1:")
        assert dest.end()[1]["verified"] is True
        status, result, _ = source.end()  # it takes no machines: without one there is nothing left to do
        assert (status, result["machines-sent"]) == (0, 1)
        assert not (tmp_path / "s").exists()


async def _cut_by_bytes(proxy: ChaosProxy, choose: random.Random) -> None:
    """Again and again: within what is said before the point of no return, or in the middle of the pages."""
    while True:
        early = choose.random() < 0.3
        at = proxy.statistics.bytes_out + (choose.randrange(200, 3000) if early else choose.randrange(2 * MIB, 6 * MIB))
        while proxy.statistics.bytes_out < at:  # noqa: ASYNC110 -- it counts without saying so
            await trio.sleep(0.001)
        proxy.cut()


async def _try_to_move(control: Path, to: str) -> str:
    """The status in which the migration has ended; "refused" when it could not begin."""
    async with ControlClient.open(str(control)) as client:
        await client.execute("events")
        try:
            moved = (await client.execute("migrate", {"to": to}))["migration-id"]
        except ControlError:
            return "refused"
        while True:
            event = await client.next_event()
            what, data = event["event"], event["data"]
            if what == "migration-status" and data["direction"] == "outgoing" and data["attempts"] > 1:
                moved = data["migration-id"]  # begun again
            if what == "migration-ended" and data["migration-id"] == moved:
                return str(data["status"])


def _more_than(operations: int) -> Callable[[dict[str, Json]], bool]:
    return lambda here: _operations(here) > operations


def _operations(here: dict[str, Json]) -> int:
    return int(here["traveller"]["guest"]["operations"])


@pytest.mark.needs("uffd-user")
class TestObserving:
    def test_metrics_logs_and_notifications(
        self, side: Callable[..., Any], operator: Callable[[str], Operator], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(tmp_path / "notify"))
            manager.settimeout(DEADLINE_S)
            monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
            dest = side(
                "dest", "--json", "--log-json", "-v", "--listen", "127.0.0.1:0", "--metrics", ":0",
                "--metrics-file", tmp_path / "dest.prom", "--run-for", "0",
            )  # fmt: skip
            assert manager.recv(4096) == b"STATUS=setup"
            assert manager.recv(4096) == b"READY=1"
        monkeypatch.delenv("NOTIFY_SOCKET")
        metrics = dest.wait_for("metrics", lambda line: line["event"] == "metrics")["address"]
        text = urllib.request.urlopen(f"http://{metrics}/metrics", timeout=DEADLINE_S).read()
        assert _sample(text, "postcopy_build_info") == 1
        source = side("source", "--json", *RV64, "--connect", dest.address)
        migration = source.end()[1]["migration-id"]
        status, result, errors = dest.end()
        assert status == 0
        text = (tmp_path / "dest.prom").read_bytes()
        assert _sample(text, "postcopy_migrations_total", direction="incoming", status="completed") == 1
        assert _sample(text, "postcopy_migration_status", status="completed") == 1
        assert _sample(text, "postcopy_migration_remaining_bytes") == 0
        assert _sample(text, "postcopy_migration_pages_total", kind="background") == result["ram"]["background-pages"]
        latency = "postcopy_migration_fault_latency_seconds_count"
        assert _sample(text, latency) == result["fault-latency-us"]["count"]
        lines = [parse_log_line(line) for line in errors.splitlines()]
        assert lines
        assert all(line.keys() >= {"time", "level", "logger", "message"} for line in lines)
        assert {line["migration-id"] for line in lines if "migration-id" in line} == {migration}
        assert lines[-1]["migration-id"] == migration  # what came of it, for a person


def _sample(text: bytes, name: str, **labels: str) -> float:
    found = [
        sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, (name, labels, found)
    return found[0]
