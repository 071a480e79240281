# SPDX-License-Identifier: Apache-2.0
"""How progress looks to a person: in a live view, and as a plain line."""

from __future__ import annotations

import time
from typing import Any

from postcopy.units import format_size

Json = dict[str, Any]
LIVE_PERIOD_S = 0.1


class Rate:
    """Bytes a second between two looks at a counter."""

    def __init__(self) -> None:
        self._when = time.monotonic()
        self._value = 0
        self._rate = 0.0

    def of(self, value: int) -> float:
        now = time.monotonic()
        if now - self._when >= LIVE_PERIOD_S:
            self._rate = max(0, value - self._value) / (now - self._when)
            self._when, self._value = now, value
        return self._rate


def rows(now: Json, rate: Rate) -> list[tuple[str, str]]:
    """The live view: one line each."""
    ram = now.get("ram") or {}
    result = [(now["side"], now.get("status") or now["summary"])]
    if "remaining" in ram and ram["total"]:
        resident = ram["total"] - ram["remaining"]
        share = resident / ram["total"]
        bar = "█" * round(30 * share) + "░" * (30 - round(30 * share))
        result.append(
            ("resident", f"{bar} {100 * share:5.1f} %  {format_size(resident)} of {format_size(ram['total'])}")
        )
    if "transferred" in ram:
        speed = format_size(round(rate.of(ram["transferred"])))
        result.append(("network", f"{format_size(ram['transferred'])}, {speed}/s"))
    if "demand-pages" in ram:
        waiting = f", {now['pending-faults']} waiting" if now.get("pending-faults") else ""
        result.append(("pages", f"{ram['demand-pages']} on demand{waiting}, {ram['background-pages']} in background"))
    guest = now.get("guest") or {}
    if "operations" in guest:
        failures = f", {guest['failures']} FAILURES" if guest["failures"] else ""
        result.append(
            ("machine", f"{guest['state']}, {guest['operations']} operations, {guest['reports']} reports{failures}")
        )
    return result


def summary(now: Json, rate: Rate) -> str:
    """The plain line: the same in one."""
    (side, status), *rest = rows(now, rate)
    return f"{side}: {status}" + "".join(
        f"; {name}: {text.lstrip('█░ ')}" if name == "resident" else f"; {text}" for name, text in rest
    )
