# SPDX-License-Identifier: Apache-2.0
"""One migration between two QEMU processes, in a process of its own: what it took, as JSON.

QEMU emulates the processor (TCG), the guest is `_qemu_guest.S`, and the memory goes over loopback TCP with no limit of
bandwidth. Each QEMU is asked by QMP (its JSON monitor protocol) over a socket that it inherits: a dozen requests, one
at a time, for which a client with tasks of its own (qemu.qmp, which runs on asyncio) would be more than what it does.

Resource handling: there is no file and no port with a name. Both QEMUs are killed at the end; they also die with this
process (PR_SET_PDEATHSIG), which ends when its parent does.
"""

from __future__ import annotations

import functools
import json
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import msgspec

from postcopy.testbed import _linux

QEMU = "qemu-system-x86_64"
GUEST = Path(__file__).with_name("_qemu_guest.bin")
REQUEST, PLACED = "postcopy_ram_fault_thread_request", "postcopy_place_page"
"""Trace events of the destination: a fault was read from the userfaultfd; a page was placed."""
PAGE_BYTES = 4096
WORKING = 4  # lines that the guest writes before it is migrated, a quarter of a million pages changed
NO_LIMIT = 1 << 40  # of bandwidth, bytes/s
ANSWER_S = 60.0


class Run(msgspec.Struct, frozen=True):
    """What is to be done."""

    memory_bytes: int
    mode: str  # "postcopy", "preempt", "precopy"
    traced: bool = False  # the latency of faults, which costs time: each page that is placed is a line of a file


class Qemu:
    """A QEMU process and its monitor."""

    def __init__(self, run: Run, incoming: bool, log: IO[bytes] | None) -> None:
        ours, its = socket.socketpair()
        command = [
            QEMU,
            *("-machine", "pc,accel=tcg", "-cpu", "qemu64", "-smp", "1", "-m", f"{run.memory_bytes >> 10}K"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-kernel", str(GUEST)),
            *("-chardev", "stdio,id=console,signal=off", "-device", "isa-debugcon,chardev=console,iobase=0xe9"),
            *("-chardev", f"socket,id=monitor,fd={its.fileno()}", "-mon", "chardev=monitor,mode=control"),
        ]
        fds = [its.fileno()]
        if incoming:
            command += ["-incoming", "defer"]
        if log is not None:
            fds.append(log.fileno())
            command += ["-D", f"/proc/self/fd/{log.fileno()}", "-msg", "timestamp=on"]
            command += ["-trace", f"enable={REQUEST}", "-trace", f"enable={PLACED}"]
        self.events: list[dict[str, Any]] = []
        self._who = f"QEMU, {'destination' if incoming else 'source'}"
        with its:
            self._process = subprocess.Popen(
                command,
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                preexec_fn=functools.partial(_linux.die_with, os.getpid()),
            )
        ours.settimeout(ANSWER_S)
        self._monitor = ours.makefile("rwb")
        ours.close()  # the file has it now

    def start(self, capabilities: list[str]) -> None:
        """Reads the greeting, and says what the migration is to be capable of."""
        self._read()
        self.execute("qmp_capabilities")
        states = [{"capability": name, "state": True} for name in capabilities]
        self.execute("migrate-set-capabilities", capabilities=states)

    def execute(self, command: str, **arguments: Any) -> Any:
        """The answer; events that come before it are kept."""
        self._monitor.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._monitor.flush()
        while True:
            message = self._read()
            if "error" in message:
                raise self._failed(f"{command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]

    def event_us(self, name: str, status: str | None = None) -> int:
        """Waits for the first event of that name (and status, of a migration); when it came, by the clock of the host.

        A memory that is small may have come before the machine runs: RESUME of a destination may follow ``completed``.
        """
        at = 0
        while True:
            while at == len(self.events):
                self._read()
            event = self.events[at]
            found = event.get("data", {}).get("status")
            if event["event"] == name and status in (None, found):
                stamp = event["timestamp"]
                return int(stamp["seconds"]) * 1_000_000 + int(stamp["microseconds"])
            if event["event"] == "MIGRATION" and found in ("failed", "postcopy-paused"):
                raise self._failed(f"the migration is {found}")
            at += 1

    def wait_for_guest(self, line: bytes, count: int = 1) -> None:
        """Until the guest has written that line so often."""
        assert self._process.stdout is not None
        while count:
            said = self._process.stdout.readline().strip()
            if said == b"X":
                raise self._failed("the guest found a page that is not as it left it")
            if not said:
                raise self._failed("has ended")
            count -= said == line

    def _read(self) -> dict[str, Any]:
        line = self._monitor.readline()
        if not line:
            raise self._failed("has ended")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self.events.append(message)
        return message

    def _failed(self, what: str) -> SystemExit:
        assert self._process.stderr is not None
        self._process.kill()
        said = self._process.stderr.read().decode("utf-8", "replace").strip().splitlines()
        return SystemExit(f"{self._who}: {what}" + (f" ({said[-1]})" if said else ""))

    def quit(self) -> None:
        """Ends it in order, so that its log is whole."""
        self.execute("quit")
        self._process.wait(ANSWER_S)

    def close(self) -> None:
        """Kills it; harmless when it has ended."""
        with self._monitor, self._process:
            self._process.kill()


def measure(run: Run) -> dict[str, float]:
    """`downtime-ms`, `total-ms` as QEMU counts them; from the event STOP of the source `stop-to-run-ms`, to RESUME of
    the destination, and `from-pause-ms`, until the source has completed; `blocktime-ms` of its one vCPU; where it is
    traced `p50` and `p99` of its faults, microseconds."""
    postcopy = run.mode != "precopy"
    capabilities = [
        "events",
        *(["postcopy-ram", "postcopy-blocktime"] if postcopy else []),
        *(["postcopy-preempt"] if run.mode == "preempt" else []),
    ]
    parent = os.pidfd_open(os.getppid())
    with tempfile.TemporaryFile() as log:
        qemus = []
        try:
            for incoming in (False, True):
                qemus.append(Qemu(run, incoming, log if incoming and run.traced else None))
            source, dest = qemus
            # Not before: a process of one thread is forked.
            threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
            for qemu in qemus:
                qemu.start(capabilities)
            source.execute("migrate-set-parameters", **{"max-bandwidth": NO_LIMIT})
            dest.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
            port = dest.execute("query-migrate")["socket-address"][0]["port"]
            source.wait_for_guest(b"p", WORKING)
            source.execute("migrate", uri=f"tcp:127.0.0.1:{port}")
            if postcopy:
                source.execute("migrate-start-postcopy")
            completed_us = [qemu.event_us("MIGRATION", "completed") for qemu in qemus]
            stopped_us = source.event_us("STOP")
            # The total is there a moment after the event.
            counted = _until(lambda: source.execute("query-migrate"), lambda answer: bool(answer.get("total-time")))
            # QEMU takes one of postcopy below a millisecond for one that is not set, and counts from its clock's 0.
            downtime_ms = counted["downtime"] if counted["downtime"] <= counted["total-time"] else 0
            result: dict[str, float] = {
                "downtime-ms": downtime_ms,
                "total-ms": counted["total-time"],
                "stop-to-run-ms": (dest.event_us("RESUME") - stopped_us) / 1e3,
                "from-pause-ms": (completed_us[0] - stopped_us) / 1e3,
            }
            if postcopy:
                result["blocktime-ms"] = dest.execute("query-migrate")["postcopy-blocktime"]
            dest.wait_for_guest(b"p", 2)  # it works on, and finds its pages as it left them
            dest.quit()
            if run.traced:
                result |= percentiles_us(latencies_us(log.read().decode()))
            return result
        finally:
            for qemu in qemus:
                qemu.close()


def latencies_us(log: str) -> list[int]:
    """From a fault read to its page placed, of each page that was asked for, sorted; `log`: lines as
    ``PID@SECONDS.MICROSECONDS:EVENT ...``."""
    asked: dict[int, int] = {}
    found = []
    for match in re.finditer(r"@(\d+)\.(\d{6}):(\w+) .*?(?:HVA|host)=0x([0-9a-f]+)", log):
        at_us, page = int(match[1] + match[2]), int(match[4], 16) // PAGE_BYTES
        if match[3] == REQUEST:
            asked.setdefault(page, at_us)
        elif page in asked:
            found.append(at_us - asked.pop(page))
    return sorted(found)


def percentiles_us(latencies: list[int]) -> dict[str, float]:
    """p50 and p99; 0 of none."""
    if not latencies:
        return {"p50": 0.0, "p99": 0.0}
    most = len(latencies) - 1
    return {f"p{p}": float(latencies[most * p // 100]) for p in (50, 99)}


def _until(ask: Callable[[], Any], enough: Callable[[Any], bool]) -> Any:
    deadline_s = time.monotonic() + ANSWER_S
    while not enough(answer := ask()):
        if time.monotonic() > deadline_s:
            raise SystemExit(f"QEMU did not tell the times of a migration within {ANSWER_S:g} s")
        time.sleep(0.001)
    return answer


def _end_with(parent: int) -> None:
    select.select([parent], [], [])
    os._exit(1)


def main(argument: str) -> None:
    """Does one `Run`, given as JSON; see the head of this file."""
    try:
        print(json.dumps(measure(msgspec.json.decode(argument, type=Run))))
    except TimeoutError:
        sys.exit(f"QEMU did not answer within {ANSWER_S:g} s")
