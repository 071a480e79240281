# SPDX-License-Identifier: Apache-2.0
"""Progress in the words of a person: durations, rates, and what a migration does at the moment."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

from postcopy.records import Json
from postcopy.units import format_size

WINDOW_S = 3.0
"""A rate is that of the last so many seconds: a push comes in bursts, and a reader wants to know when it ends."""
_MINUTE, _HOUR = 60, 3600


def format_duration(seconds: float) -> str:
    """With the unit that fits: ``80 µs``, ``19.8 ms``, ``3.2 s``, ``2 min 5 s``, ``1 h 3 min``."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        return f"{_three_digits(seconds * 1e3)} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"


def format_coarsely(seconds: float) -> str:
    """Of a time that is still counting: in seconds at least, as ``0.0 s``."""
    return f"{seconds:.1f} s" if seconds < 59.95 else format_duration(seconds)


def format_whole_seconds(seconds: float) -> str:
    """Of a time that is shown again and again: ``12 s``."""
    return f"{seconds:.0f} s" if seconds < 2 * _MINUTE else format_duration(seconds)


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def format_speed(bytes_per_s: float) -> str:
    return f"{format_size(round(bytes_per_s))}/s"


def format_count(count: int, one: str, many: str = "") -> str:
    """``1 page``, ``3 pages``."""
    return f"{count} {one if count == 1 else many or one + 's'}"


class Rate:
    """Of a counter of bytes, over the last `WINDOW_S`; before that, since it began to move."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def of(self, value: int, now_s: float | None = None) -> float:
        """Bytes a second, with the counter's value now."""
        now_s = time.monotonic() if now_s is None else now_s
        seen = self._seen
        if seen and value < seen[-1][1]:
            seen.clear()  # another migration
        if len(seen) == 1 and seen[0][1] == value:
            seen.clear()  # it has not begun to move
        seen.append((now_s, value))
        while len(seen) > 2 and seen[1][0] <= now_s - WINDOW_S:
            seen.popleft()
        elapsed_s = now_s - seen[0][0]
        return (value - seen[0][1]) / elapsed_s if elapsed_s > 0 else 0.0


def format_parts(parts: Json, names: Iterable[str]) -> str:
    """Of `downtime-breakdown-us`, those that are known, without their unit: ``stop 90, state 460``."""
    return ", ".join(f"{name} {parts[name]:.0f}" for name in names if parts.get(name) is not None)


AT_SOURCE = ("stop", "dirty", "state", "send", "prepared", "commit")
AT_DESTINATION = ("arm", "load", "first-run")


def in_round(status: str, ram: Json) -> str:
    """What precopy does at the moment: ``round 3: 12 MiB left, 5.1 MiB/s dirtied``; empty where there is none."""
    if status != "active" or not ram.get("iteration"):
        return ""
    left = f"{format_size(ram['remaining'])} left" if ram.get("remaining") is not None else ""
    rate = (ram.get("dirty-pages-rate") or 0) * (ram.get("page-size") or 0)
    dirtied = f"{format_speed(rate)} dirtied" if ram.get("dirty-sync-count") else ""  # it has been looked
    known = ", ".join(filter(None, (left, dirtied)))
    return f"round {ram['iteration']}{known and ': '}{known}"


def phase(now: Json) -> str:
    """What a migration of this status (docs/results.md) does at the moment. `now`: its progress, as `--json` has it."""
    side, status, guest = str(now["side"]), str(now["status"]), now.get("guest") or {}
    if (now.get("attempts") or 1) > 1 and status in ("connecting", "setup"):
        return f"connection lost; the machine has stayed here; trying again (attempt {now['attempts']})"
    if side == "source" and (copying := in_round(status, now.get("ram") or {})):
        return f"copying, {copying}"
    starts_in_s = (now.get("starts-in-ms") or 0) / 1e3
    live = "operations" in guest or not guest
    if live and side == "source" and status in ("setup", "active") and guest.get("state") in ("created", "running"):
        if guest["state"] == "created":
            return "booting the machine"
        if starts_in_s:
            return f"waiting {format_coarsely(starts_in_s)} before migrating"
        return "waiting for the destination" if status == "setup" else "waiting until the machine is ready"
    words = _PHASES.get((side, status)) or _PHASES.get(("", status)) or status
    return words if live else words.partition("; the machine")[0]


_PHASES = {
    ("source", "connecting"): "connecting to the destination",
    ("dest", "connecting"): "connecting to the source",
    ("source", "setup"): "waiting for the destination",
    ("dest", "setup"): "waiting for the source",
    ("", "setup"): "setting up",
    ("source", "active"): "switching over",
    ("dest", "active"): "receiving; the machine runs at the source",
    ("source", "postcopy-active"): "sending pages; the machine runs at the destination",
    ("dest", "postcopy-active"): "fetching pages; the machine runs here",
    ("source", "postcopy-paused"): "disconnected; waiting for the destination",
    ("dest", "postcopy-paused"): "disconnected; waiting for the source",
    ("", "postcopy-recover"): "connected again; comparing what has arrived",
    ("", "postcopy-failed"): "disconnected for good: it needs an operator",
    ("", "in-doubt"): "disconnected; asking the source which host has the machine",
    ("source", "completed"): "completed; the machine runs at the destination",
    ("dest", "completed"): "completed; the machine runs here",
    ("", "reclaimed"): "taken back; the machine runs here",
}


def arrived_bytes(ram: Json) -> int | None:
    """How much of the memory has arrived; at a source, which does not know that, how much was sent. None: not known."""
    total = ram.get("total")
    if not total:
        return None
    if ram.get("remaining") is not None:
        return int(min(total, max(0, total - ram["remaining"])))
    counts = [ram.get(f"{kind}-pages") for kind in ("demand", "background", "zero")]
    if not ram.get("page-size") or all(count is None for count in counts):
        return None
    return min(int(total), sum(count or 0 for count in counts) * int(ram["page-size"]))
