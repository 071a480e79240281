# SPDX-License-Identifier: Apache-2.0
"""A microVM in a real Firecracker moves between processes of ours, and its guest, which checks its own memory and
counts, never sees that it was somewhere else."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lines import Json

from postcopy.testbed.firecracker import Firecracker, find

pytestmark = pytest.mark.needs("firecracker")

DEADLINE_S = 60.0
# Whole: a guest that is moved in the middle of a line writes the rest of it elsewhere.
_PASS = re.compile(
    r"^guest: pass=(?P<number>\d+) errors=(?P<errors>\d+) stale=(?P<stale>\d+) touched=(?P<touched>\d+) ballooned=.*"
    r" max=\d+$",
    re.MULTILINE,
)

Pass = dict[str, int]


class Host:
    """A daemon that starts a Firecracker for each machine that comes; what their guests write is kept."""

    def __init__(self, name: str, directory: Path, daemon: Callable[..., Any], operator: Callable[[str], Any]) -> None:
        self._serial = directory / f"{name}-serial"
        self._serial.mkdir()
        binary = directory / f"{name}-firecracker"
        binary.write_text(f'#!/bin/sh\nexec {find()} "$@" > {self._serial}/$$\n')
        binary.chmod(0o755)
        self.daemon = daemon(name, "--firecracker", binary)
        self.at, self.address = operator(name), self.daemon.address
        self.ask = self.at.request  # without a process in between

    def runs(self) -> list[int]:
        """The Firecrackers that it has started and that have not ended."""
        return [pid for pid in map(int, os.listdir(self._serial)) if self._is_one(pid)]

    def _is_one(self, pid: int) -> bool:
        try:
            return b"--api-sock" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    def wait_pass(self, after: int) -> Pass:
        """The first pass that ended here and has a higher number."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            text = "\n".join(file.read_text(errors="replace") for file in self._serial.iterdir())
            passes = [{name: int(value) for name, value in match.groupdict().items()} for match in _PASS.finditer(text)]
            if later := [one for one in passes if one["number"] > after]:
                return min(later, key=lambda one: one["number"])
            assert time.monotonic() < deadline, f"no pass after {after}: {self.daemon._child.errors()}"
            time.sleep(0.01)


@pytest.fixture
def host(daemon: Callable[..., Any], operator: Callable[[str], Any], tmp_path: Path) -> Iterator[Callable[[str], Host]]:
    """``host(name)``: a `Host`, whose Firecrackers end with the test: they live on without it."""
    hosts: list[Host] = []

    def start(name: str) -> Host:
        hosts.append(Host(name, tmp_path, daemon, operator))
        return hosts[-1]

    yield start
    for one in hosts:
        for pid in one.runs():
            os.kill(pid, signal.SIGKILL)


def check_went_on(before: Pass, now: Pass) -> None:
    assert (now["errors"], now["stale"]) == (0, 0)
    assert now["touched"] > before["touched"]


def boot(vm: Firecracker, arguments: str = "pages=1024 spread=1", memory_mib: int = 64) -> Pass:
    vm.boot(memory_mib, arguments)
    vm.wait_ready()
    values = vm.wait_passes(2)[-1].values
    return {"number": values["pass"], **values}


MODES: list[Json] = [{}, {"precopy": "auto"}, {"mode": "precopy"}, {"mode": "stop-and-copy"}, {"precopy": 0.05}]


def test_ten_moves_there_and_back(host: Callable[[str], Host]) -> None:
    """In every mode: once it has been restored by a pager, what it writes is known."""
    at, to = host("a"), host("b")
    with Firecracker.start() as first:
        seen = boot(first)
        at.ask("start", kind="firecracker", name="vm", **{"api-socket": first.api_path})
        _, why = at.at.ask("migrate", to.address, "--machine", "vm", "--precopy", "auto", status=1)
        assert "was not restored through a userfaultfd" in why
        for number in range(10):
            at.ask("migrate", to=to.address, machine="vm", **MODES[number % len(MODES)])
            arrived = to.at.wait(
                "arrival",
                lambda machines: (machines.get("vm", {}).get("migration") or {}).get("status") == "completed",
            )["vm"]["migration"]
            at.at.wait("departure", lambda machines: "vm" not in machines)
            assert (arrived["ram"]["iteration"] > 0) is ("precopy" in json.dumps(MODES[number % len(MODES)]))
            now = to.wait_pass(seen["number"])
            check_went_on(seen, now)
            seen, at, to = now, to, at
        assert first.process.wait(DEADLINE_S) == -signal.SIGKILL
    at.at.ask("end", "--machine", "vm", status=1)  # it runs
    at.daemon.signal(signal.SIGTERM)
    status, _, errors = at.daemon.end()
    assert status == 0
    assert "machines that stay without this process: vm (running)" in errors
    check_went_on(seen, at.wait_pass(seen["number"] + 1))  # and so it does


def test_a_load_that_fails_and_a_cut_later(
    side: Callable[..., Any], host: Callable[[str], Host], tmp_path: Path
) -> None:
    """It goes on at the source where it cannot be loaded. Given away, it waits for pages that do not come, and goes on
    when they do; the source's Firecracker is killed only then."""
    at, to = host("a"), host("b")

    def wait_status(one: Host, status: str) -> dict[str, Json]:
        machines: dict[str, Json] = one.at.wait(
            status, lambda machines: (machines.get("vm", {}).get("migration") or {}).get("status") == status
        )
        return machines

    with Firecracker.start() as first:
        boot(first)
        at.ask("start", kind="firecracker", name="vm", **{"api-socket": first.api_path})

        small = tmp_path / "small-firecracker"  # in which 64 MiB have no room
        small.write_text(f'#!/bin/sh\nulimit -v 60000\nexec {find()} "$@"\n')
        small.chmod(0o755)
        dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--firecracker", small)
        _, why = at.at.ask("migrate", dest.address, "--machine", "vm", status=1)
        assert "Load snapshot error" in why
        assert first.state() == "Running"
        values = first.wait_passes(2)[-1].values
        seen = {"number": values["pass"], **values}

        at.ask("set", **{"max-bandwidth": "1MiB/s"})
        at.ask("migrate", to=to.address, machine="vm")
        wait_status(at, "postcopy-active")
        at.ask("migrate-pause", machine="vm")
        wait_status(to, "postcopy-paused")
        assert first.process.poll() is None
        assert first.state() == "Paused"
        at.ask("set", **{"max-bandwidth": 0})
        at.ask("migrate-recover", machine="vm")
        moved = wait_status(to, "completed")["vm"]["migration"]
        assert moved["recoveries"]["count"] == 1
        assert first.process.wait(DEADLINE_S) == -signal.SIGKILL
        check_went_on(seen, to.wait_pass(seen["number"]))
    to.ask("end", machine="vm", force=True)
    assert not to.runs()
