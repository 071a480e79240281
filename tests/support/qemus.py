# SPDX-License-Identifier: Apache-2.0
"""A host on which QEMUs run: a daemon that starts one for each machine that comes, and what their guests say."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lines import Json

from postcopy.testbed.qemu import GuestLine, Qemu, command_line, lines_of

DEADLINE_S = 60.0
UNDER_RUN = (sys.executable, "-m", "postcopy", "run", "--")
"""What to put before the command of a QEMU: `Qemu.start(prefix=UNDER_RUN)`."""
UNNAMED_FILE = "memory-backend-file,share=on,mem-path=/dev/shm"
"""A backend whose file is gone from its directory at once; so any number of QEMUs can have the same command line."""

SANDBOX = ("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
"""QEMU's seccomp filter, as libvirt has it."""


class Host:
    """`options` as of `Qemu.start`; `command` and `arguments`: of the daemon."""

    def __init__(
        self,
        name: str,
        directory: Path,
        side: Callable[..., Any],
        operator: Callable[[str], Any],
        arguments: Sequence[object] = (),
        **options: Any,
    ) -> None:
        command = options.pop("command", None)
        self._mark = f"{directory}/{name}-guest"
        line = [*command_line(directory, **options), *SANDBOX, "-name", self._mark]
        listen = ("--control", directory / name, "--listen", "127.0.0.1:0")
        self.daemon = side(
            "daemon",
            "--json",
            *listen,
            "--qemu",
            shlex.join(line),
            *arguments,
            **({"command": command} if command else {}),
        )
        self.at, self.address = operator(name), self.daemon.address
        self.ask = self.at.request  # without a process in between

    def runs(self) -> list[int]:
        """The QEMUs that it has started and that have not ended."""
        return [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if self._is_one(pid)]

    def _is_one(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            return self._mark.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return False

    def end(self) -> None:
        """Those that live on without the daemon."""
        for pid in self.runs():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def migration(self, machine: str = "vm") -> Json:
        """Empty where there is none."""
        found: Json = self.at.machines().get(machine, {}).get("migration") or {}
        return found

    def send(self, to: Host, *, machine: str = "vm", **how: Any) -> Json:
        """Moves it to another host. What that says of the migration when all has arrived, and nothing is left here."""
        self.ask("migrate", to=to.address, machine=machine, **how)
        return self.wait_arrived(to, machine)

    def fails_to_send(self, to: Host, machine: str = "vm") -> str:
        """Why it has not moved."""
        before = self.migration(machine).get("migration-id")
        self.ask("migrate", to=to.address, machine=machine)
        deadline = time.monotonic() + DEADLINE_S
        while not ((now := self.migration(machine)).get("error") and now["migration-id"] != before):
            assert now.get("status") != "completed", now
            assert time.monotonic() < deadline, (now, self.daemon._child.errors()[-2000:])
            time.sleep(0.01)
        return str(now["error"])

    def wait_arrived(self, to: Host, machine: str = "vm") -> Json:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            here, there = self.migration(machine), to.migration(machine)
            if there.get("status") == "completed" and machine not in self.at.machines():
                return there
            errors = (self.daemon._child.errors()[-2000:], to.daemon._child.errors()[-2000:])
            assert here.get("status") != "failed", (here, *errors)
            assert time.monotonic() < deadline, (here, there, *errors)
            time.sleep(0.01)

    def wait_decided(self, machine: str = "vm") -> None:
        """Until a machine that comes is given to this host."""
        deadline = time.monotonic() + DEADLINE_S
        while not str(found := self.migration(machine).get("status")).startswith(("postcopy-", "completed")):
            assert time.monotonic() < deadline, f"not decided: {found}: {self.daemon._child.errors()[-2000:]}"
            time.sleep(0.002)

    def wait_gone(self, machine: str = "vm") -> None:
        self.at.wait("departure", lambda machines: machine not in machines)

    def wait_pass(self, after: int) -> dict[str, int]:
        """The first pass that ended here and has a higher number."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            if later := [one for one in self.passes() if one["pass"] > after]:
                return min(later, key=lambda one: one["pass"])
            assert time.monotonic() < deadline, f"no pass after {after}: {self.daemon._child.errors()[-2000:]}"
            time.sleep(0.01)

    def passes(self) -> list[dict[str, int]]:
        """All that ended here."""
        return [line.values for line in lines_of(self.daemon._child.errors()) if line.kind == "pass" and is_whole(line)]


def is_whole(line: GuestLine) -> bool:
    """A guest that is moved in the middle of a line writes the rest of it elsewhere."""
    return {"pass", "errors", "stale", "touched", "saved", "loaded", "max"} <= line.values.keys()


def check_went_on(before: dict[str, int], now: dict[str, int]) -> None:
    assert (now["errors"], now["stale"]) == (0, 0)
    assert now["touched"] > before["touched"]


def start(host: Host, qemu: Qemu, name: str = "vm") -> dict[str, int]:
    """`host` has it from now on. What its guest has done so far."""
    qemu.wait_ready()
    host.ask("start", kind="qemu", name=name, qmp=qemu.qmp_path)
    return qemu.wait_passes(1)[-1].values
