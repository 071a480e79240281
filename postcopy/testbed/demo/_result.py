# SPDX-License-Identifier: Apache-2.0
"""Both results as one: the checks that need both sides, and the table for a person."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console

from postcopy.output.tables import Span, print_line, print_table, row
from postcopy.output.words import AT_DESTINATION, AT_SOURCE, format_count, format_duration, format_parts
from postcopy.records import as_json
from postcopy.records.commands import DemoResult
from postcopy.records.events import DestResult, SourceResult
from postcopy.records.migration import Check
from postcopy.testbed.demo._qemu import table
from postcopy.units import format_size


def check(ok: bool, good: str, bad: str, how: str) -> Check:
    """An entry of `verification`."""
    return Check(ok=ok, what=good if ok else bad, how=how)


def merge(source: SourceResult, dest: DestResult) -> DemoResult:
    """Both results as one, with the checks that need both."""
    verification = list(dest.verification)
    here, there = dest.guest, source.guest_at_pause
    nonce = here.nonce if here is not None else None
    if there is not None and there.nonce and (nonce or dest.verified is not None):
        verification.append(
            check(
                nonce == there.nonce,
                f"the machine is the one that was booted at the source (nonce {there.nonce})",
                f"the nonce was {there.nonce} at the source, and is {nonce} at the destination",
                "made by the guest at boot, kept in its memory only; announced by the guest, or read from there",
            )
        )
    if there is not None and there.operations is not None:
        before, after = there.operations, (here.operations if here is not None else None) or 0
        what = f"it went on where it was: {before} operations at the pause, {after} at the end"
        verification.append(check(after >= before, what, what, "counters of the guest, by vCPU, which move with it"))
    completed = source.status == dest.status == "completed"
    good = all(item.ok for item in verification)
    asked = dest.verified is not None
    return DemoResult(
        side="demo",
        status="completed" if completed else next(s for s in (dest.status, source.status) if s != "completed"),
        error=dest.error or source.error,
        migration_id=dest.migration_id,
        attempts=source.attempts,
        mode=source.mode,
        peer=dest.peer,
        kind=dest.kind or source.kind,
        downtime_ms=source.downtime_ms,
        total_ms=source.total_ms,
        downtime_breakdown_us=dest.downtime_breakdown_us,
        ram=dest.ram,
        pending_faults=dest.pending_faults,
        fault_latency_us=dest.fault_latency_us,
        blocktime_ms=dest.blocktime_ms,
        recoveries=dest.recoveries,
        pager=dest.pager,
        dump=dest.dump,
        verified=completed and good if asked or not (completed and good) else None,
        verification=verification,
        source=source,
        dest=dest,
    )


def show(result: DemoResult, subject: str, console: Console) -> None:
    """The result for a person, without its error, which the command ends with."""
    error = result.error or ""
    rows = [row(label, text) for label, text in _rows(result)]
    if rows:
        verified = "was not asked for" if result.verified is None else "yes" if result.verified else "NO"
        rows.append(row("verified", verified))
    for item in result.verification:
        if item.ok or item.what not in error:
            rows.append(row(Span("  ok", "good") if item.ok else Span("  FAILED", "bad"), item.what))
    if rows:
        print_line(console, f"postcopy demo: {subject}: {result.status}", "bold")
        print_table(console, (), rows)
    if result.qemu is not None:
        print_line(console, "")
        print_table(console, *table(result.qemu))


def _rows(result: DemoResult) -> Iterator[tuple[str, str]]:
    if result.downtime_ms:
        yield "downtime", _ms(result.downtime_ms)
    if result.downtime_breakdown_us is not None:
        parts = as_json(result.downtime_breakdown_us)
        for label, names in (("of it, in µs", AT_SOURCE), ("there, in µs", AT_DESTINATION)):
            if shown := format_parts(parts, names):
                yield label, shown
    if pings := result.pings:
        gap_ms = pings.switchover_gap_ms
        gap = "no answers" if gap_ms is None else f"{_ms(gap_ms)} between two answers"
        yield "network gap", f"{gap}; with the cut cable {_ms(pings.longest_gap_ms)}"
    if result.total_ms:
        yield "total time", _ms(result.total_ms)
    if ram := result.ram:
        yield "memory", f"{format_size(ram.total or 0)}, {format_size(ram.transferred or 0)} transferred"
        again = f" ({ram.duplicate_pages} twice)" if ram.duplicate_pages else ""
        background = f"{ram.background_pages} in background{again}"
        hits = f" ({ram.prefetch_hits} hits known)" if ram.prefetch_hits else ""
        ahead = f"{ram.prefetched_pages} ahead{hits}, " if ram.prefetched_pages else ""
        yield "pages", f"{ram.demand_pages} on demand, {ahead}{background}, {ram.zero_pages} zero"
        if ram.iteration:
            after = f"{format_size(ram.postcopy_bytes)} after it" if ram.postcopy_bytes else "nothing after it"
            rounds = format_count(ram.iteration, "round")
            yield "precopy", f"{rounds}, {format_size(ram.precopy_bytes or 0)} before the switchover, {after}"
        if ram.compressed_bytes and ram.uncompressed_bytes:
            yield "compressed", f"{format_size(ram.uncompressed_bytes)} to {format_size(ram.compressed_bytes)}"
    if result.source is not None and result.source.ram is not None and result.source.ram.released:
        yield "released at the source", format_size(result.source.ram.released)
    if (result.attempts or 1) > 1:
        lost = format_count((result.attempts or 1) - 1, "connection")
        yield "attempts", f"{result.attempts}: {lost} lost before the switchover, the machine ran on"
    if (latency := result.fault_latency_us) is not None and latency.count:
        times = (("median", latency.p50), ("99 % within", latency.p99), ("longest", latency.max))
        yield "fault latency", ", ".join(f"{word} {format_duration(us / 1e6)}" for word, us in times)
    if result.blocktime_ms:
        yield "blocked, by vCPU", ", ".join(_ms(ms) for ms in result.blocktime_ms)
    if (recovered := result.recoveries) is not None and recovered.count:
        yield "recoveries", f"{recovered.count}, the longest took {_ms(recovered.max_ms)}"
    if result.pager is not None and result.pager.deaths:
        yield "pager", f"its process died {format_count(result.pager.deaths, 'time')}, and another one took over"
    if chaos := result.chaos:
        cuts = ", ".join(f"{count} by {way}" for way, count in (chaos.cuts or {}).items())
        yield "network", f"{chaos.plan}, seed {chaos.seed}: {f'disconnected: {cuts}' if cuts else 'never cut'}"
    if (tls := result.demo_tls) and tls.ciphertext is not None:
        carried = f"{format_size(tls.ciphertext)} encrypted in {format_count(tls.connections or 0, 'connection')}"
        yield "TLS", f"{carried}, {format_size(tls.opening or 0)} to open and end them, {tls.readable} bytes in clear"
    if lab := result.lab:
        cut, hosts = lab.cut, " to ".join(f"{host.name} ({host.ipv4})" for host in lab.hosts.values())
        rate = f", {format_size(lab.rate_bytes_per_s)}/s" if lab.rate_bytes_per_s else ""
        yield "laboratory", f"{hosts}, MTU {lab.mtu}{rate}"
        yield (
            "cable",
            f"cut when {cut.at_percent:g} % had arrived, noticed after {_ms(cut.noticed_ms)}, connected again",
        )


def _ms(milliseconds: float) -> str:
    return format_duration(milliseconds / 1e3)
