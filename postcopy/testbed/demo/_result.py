# SPDX-License-Identifier: Apache-2.0
"""Both results as one: the checks that need both sides, and the table for a person."""

from __future__ import annotations

import contextlib
from typing import Any

from rich.console import Console
from rich.table import Table

from postcopy.units import format_size

Json = dict[str, Any]


def check(ok: bool, good: str, bad: str, how: str) -> Json:
    """An entry of `verification`."""
    return {"ok": ok, "what": good if ok else bad, "how": how}


def merge(source: Json, dest: Json) -> Json:
    """Both results as one, with the checks that need both."""
    verification = list(dest.get("verification") or [])
    here, there = dest.get("guest") or {}, source.get("guest-at-pause") or {}
    if there.get("nonce"):
        verification.append(
            check(
                here.get("nonce") == there["nonce"],
                f"the machine is the one that was booted at the source (nonce {there['nonce']})",
                f"the nonce was {there['nonce']} at the source, and is {here.get('nonce')} at the destination",
                "made by the guest at boot, kept in its memory only, announced by the guest on both hosts",
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


def show(result: Json, console: Console) -> None:
    """The table at the end."""
    table = Table(title="postcopy demo", show_header=False, title_justify="left")
    ram, latency = result.get("ram") or {}, result.get("fault-latency-us") or {}
    table.add_row("status", str(result["status"]))
    if "downtime-ms" in result:
        table.add_row("downtime", f"{result['downtime-ms']:g} ms")
        if pings := result.get("pings"):
            gap_ms = pings["switchover-gap-ms"]
            gap = "no answers" if gap_ms is None else f"{gap_ms:g} ms between two answers"
            table.add_row("network gap", f"{gap}; with the cut cable {pings['longest-gap-ms']:g} ms")
        table.add_row("total", f"{result['total-ms']:g} ms")
    if ram:
        table.add_row("memory", f"{format_size(ram['total'])}, {format_size(ram['transferred'])} transferred")
        table.add_row("pages on demand", f"{ram['demand-pages']}")
        table.add_row("pages in background", f"{ram['background-pages']} ({ram['duplicate-pages']} came twice)")
        table.add_row("pages of zeros", f"{ram['zero-pages']}")
    if released := ((result.get("source") or {}).get("ram") or {}).get("released"):
        table.add_row("given back at the source", format_size(released))
    if latency.get("count"):
        numbers = ", ".join(f"{name} {latency[name]:g} us" for name in ("p50", "p99", "max"))
        table.add_row("demand fault", numbers)
    if result.get("recoveries", {}).get("count"):
        recovered = result["recoveries"]
        table.add_row("recoveries", f"{recovered['count']}, the longest took {recovered['max-ms']:g} ms")
    if deaths := (result.get("pager") or {}).get("deaths"):
        table.add_row("pager", f"its process died {deaths} times, and another one took over")
    if chaos := result.get("chaos"):
        cuts = ", ".join(f"{count} by {way}" for way, count in chaos.get("cuts", {}).items())
        table.add_row("network", f"{chaos['plan']}, seed {chaos['seed']}: {cuts or 'nothing was cut'}")
    if lab := result.get("lab"):
        cut, hosts = lab["cut"], " to ".join(f"{host['name']} ({host['ipv4']})" for host in lab["hosts"].values())
        table.add_row("laboratory", f"{hosts}, MTU {lab['mtu']}, {format_size(lab['rate-bytes-per-s'])}/s")
        table.add_row("cable", f"cut at {cut['at-percent']:g} %, noticed after {cut['noticed-ms']:g} ms, healed")
    if result.get("blocktime-ms"):
        table.add_row("blocked, by vCPU", ", ".join(f"{ms:g} ms" for ms in result["blocktime-ms"]))
    table.add_row("verified", {True: "yes", False: "NO"}.get(result["verified"], "was not asked for"))
    for item in result.get("verification", []):
        table.add_row("  " + ("✓" if item["ok"] else "✗"), item["what"])
    with contextlib.suppress(OSError):
        console.print(table)
