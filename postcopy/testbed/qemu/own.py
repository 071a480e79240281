# SPDX-License-Identifier: Apache-2.0
"""QEMU's own postcopy between two of its processes on this host, which ours is shown and measured beside; and what of a
move both are compared by, told by QEMU itself.

Everything here blocks, as `Qemu` does.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postcopy.errors import MigrationError
from postcopy.testbed.qemu import MonitorClosed, Qemu

REQUEST, PLACED = "postcopy_ram_fault_thread_request", "postcopy_place_page"
"""Trace events of the destination: a fault was read from the userfaultfd; a page was placed."""
PAGE_BYTES = 4096
GOLDEN = 0.618
"""Of all pages, from one that the guest touches to the next one: none is near one that was touched shortly before,
where QEMU goes on to send."""
NO_LIMIT = 1 << 40  # of bandwidth, bytes/s
ANSWER_S = 60.0


@dataclass(frozen=True)
class Times:
    """What QEMU tells of a migration of its own that has completed, milliseconds."""

    total_ms: float
    """From the request until the source has completed."""
    from_pause_ms: float
    """The same from the event STOP."""
    says_ms: float
    """``downtime`` of query-migrate: until the state has been sent, without what the destination does."""
    blocktime_ms: float
    """How long its vCPUs have waited for pages, at least one of them."""


def listen(source: Qemu, dest: Qemu, *, preempt: bool) -> str:
    """Tells both what the migration is to be capable of, and has the destination listen; where, as HOST:PORT.
    `preempt`: with a connection of its own for pages that are waited for."""
    names = {
        "x-ignore-shared": False,  # of a machine that has come by ours
        "events": True,
        "postcopy-ram": True,
        "postcopy-blocktime": True,
        "postcopy-preempt": preempt,
    }
    for qemu in (source, dest):
        states = [{"capability": name, "state": state} for name, state in names.items()]
        qemu.execute("migrate-set-capabilities", capabilities=states)
        qemu.events.clear()  # they are of other moves
    source.execute("migrate-set-parameters", **{"max-bandwidth": NO_LIMIT})
    dest.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
    return f"127.0.0.1:{dest.execute('query-migrate')['socket-address'][0]['port']}"


def begin(source: Qemu, address: str) -> None:
    """All memory goes after the switchover: no page is sent before it."""
    source.execute("migrate", uri=f"tcp:{address}")
    source.execute("migrate-start-postcopy")


def limit(source: Qemu, bandwidth: int) -> None:
    """Of all but pages that are waited for, bytes/s; after the switchover, whose state would count too."""
    source.execute("migrate-set-parameters", **{"max-postcopy-bandwidth": bandwidth})


def outcome(source: Qemu, dest: Qemu, deadline_s: float = ANSWER_S) -> str:
    """Waits for both: ``completed``, as both say; ``postcopy-paused``: the connection was cut, and the destination,
    where the guest is, waits for an operator (a source of 7.2 does not always notice); ``failed``: one of them says so,
    or has ended. Where one of them says nothing in time, as when a connection is silent, which QEMU does not notice:
    what the source says then."""
    ends = ("completed", "postcopy-paused", "failed")
    try:
        for qemu in (dest, source):
            event = qemu.wait_event("MIGRATION", *ends, deadline_s=deadline_s)
            if (status := str(event["data"]["status"])) != "completed":
                return status
    except MonitorClosed:
        return "failed"
    except MigrationError:
        status = str(source.execute("query-migrate")["status"])
        return status if status != "completed" else "failed"
    return status


def completed(source: Qemu, dest: Qemu) -> Times:
    """When both say so; `MigrationError` when it fails or is cut."""
    if (status := outcome(source, dest)) != "completed":
        raise MigrationError(f"a migration of QEMU's own is {status}")
    completed_us = event_us(source, "MIGRATION", "completed")
    deadline_s = time.monotonic() + ANSWER_S
    # The total is there a moment after the event.
    while not (counted := source.execute("query-migrate")).get("total-time"):
        if time.monotonic() > deadline_s:
            raise MigrationError(f"QEMU did not tell the times of a migration within {ANSWER_S:g} s")
        time.sleep(0.001)
    # QEMU takes a downtime of postcopy below a millisecond for one that is not set, and counts from its clock's 0.
    says_ms = counted["downtime"] if counted["downtime"] <= counted["total-time"] else 0
    from_pause_ms = (completed_us - event_us(source, "STOP")) / 1e3
    blocktime_ms = dest.execute("query-migrate")["postcopy-blocktime"]
    return Times(counted["total-time"], from_pause_ms, says_ms, blocktime_ms)


def stop_to_run_ms(source: Qemu, dest: Qemu) -> float:
    """From the event STOP of the source, whose vCPUs have stopped before it, to RESUME of the destination, whose vCPUs
    run after it; of a source that was stopped before, as for a look at what it has written, the last one. It is told by
    QEMU, whoever moves it."""
    event_us(source, "STOP")
    ran_us = event_us(dest, "RESUME")
    stops = [event for event in source.events if event["event"] == "STOP"]
    return (ran_us - _stamp_us(stops[-1])) / 1e3


def event_us(qemu: Qemu, name: str, *statuses: str) -> int:
    """Waits for the first event of that name (and one of these statuses, of a migration); when it came, by the clock of
    the host. One may have come before: RESUME of a destination whose memory is small may follow ``completed``."""
    return _stamp_us(qemu.wait_event(name, *statuses))


def _stamp_us(event: dict[str, Any]) -> int:
    stamp = event["timestamp"]
    return int(stamp["seconds"]) * 1_000_000 + int(stamp["microseconds"])


# ---- its trace


def quit(qemu: Qemu) -> None:
    """Ends it in order, so that its trace is whole."""
    qemu.execute("quit")
    qemu.process.wait(ANSWER_S)


def tracing(log: Path) -> list[str]:
    """Arguments of a destination whose faults are to be found in `log`. Each page that is placed is a line there, which
    costs time."""
    events = [word for event in (REQUEST, PLACED) for word in ("-trace", f"enable={event}")]
    return ["-D", str(log), "-msg", "timestamp=on", *events]


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
    """p50 and p99; nothing of none."""
    if not latencies:
        return {}
    most = len(latencies) - 1
    return {f"p{p}": float(latencies[most * p // 100]) for p in (50, 99)}
