# SPDX-License-Identifier: Apache-2.0
"""How progress looks to a person where nothing can be drawn: plain lines."""

from __future__ import annotations

import math
import time

from postcopy.output.words import (
    Rate,
    arrived_bytes,
    format_coarsely,
    format_count,
    format_speed,
    phase,
)
from postcopy.records import Json
from postcopy.units import format_size


class View:
    """Of one migration, or of a process with several."""

    def __init__(self, subject: str = "") -> None:
        """`subject`: what is migrated, in words."""
        self.subject = subject
        self._told: list[tuple[str, str]] = []
        self._began_s = time.monotonic()
        self._rate = Rate()

    def _rows(self, now: Json) -> list[tuple[str, str]]:
        """A label and its text for each thing that can be said. The first one says what is done."""
        if "vms" in now:
            return [(str(now["side"]), format_count(len(now["vms"]), "virtual machine"))]
        if "machines" in now:
            return [(str(now["side"]), count_machines(now))]
        side, ram, guest = str(now["side"]), now.get("ram") or {}, now.get("guest") or {}
        result = [(str(now.get("name", side)), phase(now))]
        if self.subject:
            result.append(("machine", self.subject))
        arrived, total, transferred = arrived_bytes(ram), ram.get("total") or 0, ram.get("transferred") or 0
        rate, remaining = 0.0, None
        if transferred:
            rate = self._rate.of(transferred)
            if arrived is not None:
                percent, remaining = math.floor(100 * arrived / total), total - arrived
                result.append(("memory", f"{percent} %, {format_size(arrived)} of {format_size(total)}"))
            speed = f", {format_speed(rate)}" if rate else ""  # not known yet, or nothing moves
            result.append(("network", f"{format_size(transferred)} transferred{speed}"))
        result.append(("time", self._time(rate, remaining)))
        if ram.get("demand-pages") or ram.get("background-pages"):
            demand = f"{ram.get('demand-pages') or 0} on demand"
            if now.get("pending-faults"):
                demand += f" ({format_count(now['pending-faults'], 'thread')} waiting)"
            result.append(("pages", f"{demand}, {ram.get('background-pages') or 0} in background"))
        gone = side == "source" and str(now["status"]).startswith(("postcopy", "completed"))
        if guest.get("operations") and not gone:
            failures = f", {format_count(guest['failures'], 'FAILURE')}" if guest.get("failures") else ""
            result.append(("guest", f"{guest['state']}, {format_count(guest['operations'], 'operation')}{failures}"))
        return result

    def _time(self, rate: float, remaining: int | None) -> str:
        elapsed = f"{format_coarsely(time.monotonic() - self._began_s)} elapsed"
        return f"{elapsed}, about {format_coarsely(remaining / rate)} remaining" if remaining and rate else elapsed

    def line(self, now: Json) -> str:
        """The plain line: the same in one; empty when nothing has happened since the last one."""
        rows = self._rows(now)
        news = [row for row in rows if row[0] not in ("time", "guest")]
        if news == self._told:
            return ""
        first, self._told = not self._told, news
        (side, doing), *rest = rows if first else (row for row in rows if row[0] != "machine")
        return f"{side}: {doing}" + "".join(f"; {label}: {text}" for label, text in rest)


def count_machines(now: Json) -> str:
    """A process in a few words."""
    jobs = [machine.get("migration") or {} for machine in now["machines"]]
    moving = sum(job.get("status", "").startswith(("connecting", "setup", "active", "postcopy")) for job in jobs)
    return f"{format_count(len(jobs), 'machine')}, {moving} migrating"
