# SPDX-License-Identifier: Apache-2.0
"""Both results as one: the checks that need both sides, and the table for a person."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console

from postcopy.output.tables import Span, print_line, print_table, row
from postcopy.output.words import format_count, format_duration
from postcopy.units import format_size

Json = dict[str, Any]


def check(ok: bool, good: str, bad: str, how: str) -> Json:
    """An entry of `verification`."""
    return {"ok": ok, "what": good if ok else bad, "how": how}


def merge(source: Json, dest: Json) -> Json:
    """Both results as one, with the checks that need both."""
    verification = list(dest.get("verification") or [])
    here, there = dest.get("guest") or {}, source.get("guest-at-pause") or {}
    if there.get("nonce") and (here.get("nonce") or dest.get("verified") is not None):
        verification.append(
            check(
                here.get("nonce") == there["nonce"],
                f"the machine is the one that was booted at the source (nonce {there['nonce']})",
                f"the nonce was {there['nonce']} at the source, and is {here.get('nonce')} at the destination",
                "made by the guest at boot, kept in its memory only; announced by the guest, or read from there",
            )
        )
    if "operations" in there:
        before, after = there["operations"], here.get("operations", 0)
        what = f"it went on where it was: {before} operations at the pause, {after} at the end"
        verification.append(check(after >= before, what, what, "counters of the guest, by vCPU, which move with it"))
    completed = source["status"] == dest["status"] == "completed"
    status = "completed" if completed else next(s for s in (dest["status"], source["status"]) if s != "completed")
    result: Json = {"status": status, "kind": dest.get("kind") or source.get("kind")}
    for name in (
        "migration-id",
        "peer",
        "downtime-ms",
        "total-ms",
        "ram",
        "pending-faults",
        "fault-latency-us",
        "blocktime-ms",
        "recoveries",
        "pager",
        "dump",
    ):
        result[name] = dest.get(name)
    asked = dest.get("verified") is not None
    good = all(item["ok"] for item in verification)
    result["verified"] = (good if asked else None) if completed else False
    result["verification"] = verification
    result["error"] = dest.get("error") or source.get("error")
    result["source"], result["dest"] = source, dest
    return result


def show(result: Json, subject: str, console: Console) -> None:
    """The result for a person, without its error, which the command ends with."""
    error = str(result.get("error") or "")
    rows = [row(label, text) for label, text in _rows(result)]
    if rows:
        rows.append(row("verified", {True: "yes", False: "NO"}.get(result["verified"], "was not asked for")))
    for item in result.get("verification", []):
        if item["ok"] or item["what"] not in error:
            rows.append(row(Span("  ok", "good") if item["ok"] else Span("  FAILED", "bad"), item["what"]))
    if rows:
        print_line(console, f"postcopy demo: {subject}: {result['status']}", "bold")
        print_table(console, (), rows)


def _rows(result: Json) -> Iterator[tuple[str, str]]:
    ram, latency = result.get("ram") or {}, result.get("fault-latency-us") or {}
    if result.get("downtime-ms"):
        yield "downtime", _ms(result["downtime-ms"])
    if pings := result.get("pings"):
        gap_ms = pings["switchover-gap-ms"]
        gap = "no answers" if gap_ms is None else f"{_ms(gap_ms)} between two answers"
        yield "network gap", f"{gap}; with the cut cable {_ms(pings['longest-gap-ms'])}"
    if result.get("total-ms"):
        yield "total time", _ms(result["total-ms"])
    if ram:
        yield "memory", f"{format_size(ram['total'])}, {format_size(ram['transferred'])} transferred"
        again = f" ({ram['duplicate-pages']} twice)" if ram["duplicate-pages"] else ""
        yield (
            "pages",
            (
                f"{ram['demand-pages']} on demand, {ram['background-pages']} in background{again},"
                f" {ram['zero-pages']} zero"
            ),
        )
    if released := ((result.get("source") or {}).get("ram") or {}).get("released"):
        yield "released at the source", format_size(released)
    if latency.get("count"):
        times = (f"{word} {format_duration(latency[key] / 1e6)}" for key, word in _LATENCY.items())
        yield "fault latency", ", ".join(times)
    if result.get("blocktime-ms"):
        yield "blocked, by vCPU", ", ".join(_ms(ms) for ms in result["blocktime-ms"])
    if (recovered := result.get("recoveries") or {}).get("count"):
        yield "recoveries", f"{recovered['count']}, the longest took {_ms(recovered['max-ms'])}"
    if deaths := (result.get("pager") or {}).get("deaths"):
        yield "pager", f"its process died {format_count(deaths, 'time')}, and another one took over"
    if chaos := result.get("chaos"):
        cuts = ", ".join(f"{count} by {way}" for way, count in chaos.get("cuts", {}).items())
        yield "network", f"{chaos['plan']}, seed {chaos['seed']}: {f'disconnected: {cuts}' if cuts else 'never cut'}"
    if lab := result.get("lab"):
        cut, hosts = lab["cut"], " to ".join(f"{host['name']} ({host['ipv4']})" for host in lab["hosts"].values())
        yield "laboratory", f"{hosts}, MTU {lab['mtu']}, {format_size(lab['rate-bytes-per-s'])}/s"
        yield (
            "cable",
            (f"cut when {cut['at-percent']:g} % had arrived, noticed after {_ms(cut['noticed-ms'])}, connected again"),
        )


_LATENCY = {"p50": "median", "p99": "99 % within", "max": "longest"}


def _ms(milliseconds: float) -> str:
    return format_duration(milliseconds / 1e3)
