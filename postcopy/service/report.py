# SPDX-License-Identifier: Apache-2.0
"""Machines and migrations as records (`postcopy.records`, which says what each field means).

Names and units follow QEMU's ``query-migrate`` where it has them: times in milliseconds, memory in bytes, pages as
numbers.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import trio

from postcopy import records
from postcopy.dataplane.histogram import Recent as Interval
from postcopy.machines import Check, MachineStatistics
from postcopy.machines import Machine as AnyMachine
from postcopy.migration import statistics as counts
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.source import SourceMigration, offered
from postcopy.migration.statistics import Statistics, milliseconds
from postcopy.migration.tasks import now_ns
from postcopy.net import Protection
from postcopy.records.control import Certificate
from postcopy.records.events import DestResult, MigrationEnded, MigrationStatus, Progress, SourceResult
from postcopy.records.migration import (
    LOST,
    Breakdown,
    Disk,
    Guest,
    Latency,
    Machine,
    Network,
    Pager,
    Ram,
    Recent,
    Recoveries,
    Tls,
    Vcpu,
)
from postcopy.records.migration import Check as CheckRecord
from postcopy.records.migration import Migration as MigrationRecord
from postcopy.records.timeline import Timeline, residency_text
from postcopy.tls import PeerCertificate

Json = records.Json
Migration = SourceMigration | DestinationMigration


def direction(migration: Migration) -> str:
    return "outgoing" if isinstance(migration, SourceMigration) else "incoming"


# ---- what happens


def changed(machine: str, migration: Migration, before: str) -> MigrationStatus:
    """That a migration has another status than `before`."""
    return MigrationStatus(machine=machine, from_=before, **_identity(migration))


def ended(machine: str, migration: Migration) -> MigrationEnded:
    """How one migration has ended, in short."""
    known = migration.statistics()
    downtime_ms, total_ms = _ms(known.downtime_ns), _ms(known.total_ns)
    return MigrationEnded(machine=machine, downtime_ms=downtime_ms, total_ms=total_ms, **_identity(migration))


def timeline(machine: str, kind: str | None, migration: Migration) -> Timeline | None:
    """How a migration came about, once it has ended; None where it was not recorded, or nothing was moved."""
    recorder, migration.recorder = migration.recorder, None
    if recorder is None:
        return None
    recording = recorder.recording(migration.committed_ns)
    recorder.close()
    if recording is None:
        return None
    return Timeline(machine=machine, kind=kind, recording=recording, **_counted(migration))


def _identity(migration: Migration) -> dict[str, Any]:
    """The fields of `OfMigration`."""
    return {
        "side": "source" if isinstance(migration, SourceMigration) else "dest",
        "direction": direction(migration),
        "attempts": migration.attempt,
        "migration_id": migration.migration_id or None,
        "peer": str(migration.peer),
        "encrypted": migration.certificate is not None if migration.identity else None,
        "tls": tls(migration.certificate),
        "status": migration.status,
        "error": str(migration.failure) if migration.failure else None,
    }


def tls(certificate: PeerCertificate | None) -> Tls | None:
    """Who the other side is; None without TLS."""
    if certificate is None:
        return None
    return Tls(
        peer_name=certificate.name,
        subject=certificate.subject,
        resumed=certificate.resumed,
        expires_at=certificate.not_after_s,
    )


def certificates(protection: Protection) -> list[Certificate]:
    """Those that this process has read."""
    if (credentials := protection.credentials) is None:
        return []
    return [
        Certificate(role=role, file=os.path.join(credentials.directory, f"{role}-cert.pem"), expires_at=not_after_s)
        for server, role in ((True, "server"), (False, "client"))
        if (not_after_s := credentials.not_after_s(server=server)) is not None
    ]


def _nothing(side: str, status: str) -> dict[str, Any]:
    """The same, where there is no migration."""
    return {"side": side, "status": status, "error": None}


def progress(own: str, machine: AnyMachine | None, migration: Migration | None) -> Progress:
    """How the machine and the migration of a `source` or `dest` stand. `own`: which of both it is."""
    now = Progress(**_identity(migration) if migration is not None else _nothing(own, "setup"))
    if machine is not None:
        now.guest = guest(machine, machine.statistics())
        now.ram = ram(offered(machine)) if migration is None else None
    if migration is not None:
        statistics = migration.statistics()
        now.ram, now.pending_faults = ram(statistics), statistics.pending_faults
        now.recent = recent(statistics.recent)
        now.recoveries = recoveries(migration.recoveries)
        if isinstance(migration, DestinationMigration) and machine is not None:
            now.pager = pager(migration.pager_process)
    return now


# ---- machines and migrations


def machine_status(name: str, machine: AnyMachine | None, migration: Migration | None) -> Machine:
    """One machine, and the migration that it is in or was in last."""
    said = None
    if machine is not None:
        with contextlib.suppress(trio.ClosedResourceError):  # it has ended, what it was in has not
            said = guest(machine, machine.statistics())
    return Machine(
        name=name,
        kind=machine.kind if machine is not None else None,
        memory=machine.memory_bytes if machine is not None else 0,
        guest=said,
        migration=_migration(migration) if migration is not None else None,
    )


def _migration(migration: Migration) -> MigrationRecord:
    elapsed_ns = (migration.completed_ns or migration.ended_ns or now_ns()) - migration.started_ns
    return MigrationRecord(
        elapsed_ms=milliseconds(elapsed_ns),
        recent=recent(migration.statistics().recent),
        looking_for_peer=not migration.over if migration.status in LOST else None,
        **_counted(migration),
    )


def _counted(migration: Migration) -> dict[str, Any]:
    """The fields of `Counted`."""
    statistics = migration.statistics()
    return {
        **_identity(migration),
        "downtime_ms": _ms(statistics.downtime_ns),
        "total_ms": _ms(statistics.total_ns),
        "downtime_breakdown_us": breakdown(migration.breakdown),
        "mode": migration.mode.value if isinstance(migration, SourceMigration) else None,
        "ram": ram(statistics),
        "pending_faults": statistics.pending_faults,
        "fault_latency_us": latency(statistics.latency),
        "blocktime_ms": [milliseconds(ns) for ns in statistics.blocktime_ns],
        "recoveries": recoveries(migration.recoveries),
    }


def _ms(ns: int | None) -> float | None:
    return None if ns is None else milliseconds(ns)


def ram(statistics: Statistics) -> Ram:
    return Ram(
        total=statistics.total_bytes,
        remaining=statistics.remaining_bytes,
        transferred=statistics.transferred_bytes,
        page_size=statistics.page_bytes,
        demand_pages=statistics.demand_pages,
        prefetched_pages=statistics.prefetched_pages,
        prefetch_hits=statistics.prefetch_hits,
        background_pages=statistics.background_pages,
        zero_pages=statistics.zero_pages,
        duplicate_pages=statistics.duplicate_pages,
        postcopy_requests=statistics.requests,
        iteration=statistics.iteration,
        dirty_sync_count=statistics.dirty_sync_count,
        dirty_pages_rate=statistics.dirty_pages_rate,
        precopy_bytes=statistics.precopy_bytes,
        postcopy_bytes=statistics.postcopy_bytes,
        compressed_bytes=statistics.compressed_bytes,
        uncompressed_bytes=statistics.uncompressed_bytes,
        released=statistics.released_bytes,
        residency=residency_text(statistics.bins) or None,
    )


def breakdown(counted: counts.Breakdown) -> Breakdown | None:
    """None where nothing of it is known yet."""
    parts = {name.removesuffix("_ns"): round(ns / 1e3, 1) for name, ns in vars(counted).items() if ns is not None}
    return Breakdown(**parts) if parts else None


def latency(counted: counts.Latency) -> Latency:
    p50, p99, p99_9, most = (
        round(ns / 1e3, 1) for ns in (counted.p50_ns, counted.p99_ns, counted.p999_ns, counted.max_ns)
    )
    return Latency(count=counted.count, p50=p50, p99=p99, p99_9=p99_9, max=most)


def recent(counted: Interval | None) -> Recent | None:
    return None if counted is None else Recent(**counted.fields())


def recoveries(counted: counts.Recoveries) -> Recoveries:
    return Recoveries(
        count=counted.count,
        last_ms=milliseconds(counted.last_ns),
        max_ms=milliseconds(counted.max_ns),
        total_ms=milliseconds(counted.total_ns),
    )


def pager(process: tuple[int, int] | None) -> Pager:
    """Where the pager lives; see `DestinationMigration.pager_process`."""
    if process is None:
        return Pager(where="thread")
    return Pager(where="process", pid=process[0] or None, deaths=process[1])


def _nonce(nonce: int) -> str | None:
    return f"{nonce:#018x}" if nonce else None


def guest(machine: AnyMachine, statistics: MachineStatistics) -> Guest:
    """What the machine says of itself."""
    if not machine.live or machine.outlives:  # which says no more
        pid, api_socket = machine.process or (None, None)
        return Guest(state=statistics.state.value, pid=pid, api_socket=api_socket)
    network = machine.network
    return Guest(
        state=statistics.state.value,
        nonce=_nonce(statistics.nonce),
        operations=statistics.operations,
        reports=statistics.reports,
        failures=statistics.failures,
        failure=statistics.failure_text or None,
        vcpus=[
            Vcpu(activity=vcpu.activity.value, operations=vcpu.operations, reports=vcpu.reports, exits=vcpu.exits)
            for vcpu in statistics.vcpus
        ],
        disk=Disk(
            reads=statistics.disk_reads,
            writes=statistics.disk_writes,
            bytes=statistics.disk_bytes,
            errors=statistics.disk_errors,
        ),
        network=Network(
            **network,
            received=statistics.net_received,
            sent=statistics.net_sent,
            dropped=statistics.net_dropped,
            errors=statistics.net_errors,
        )
        if network is not None
        else None,
    )


# ---- results


def source_result(machine: AnyMachine | None, migration: SourceMigration | None, served: int) -> SourceResult:
    result = SourceResult(
        **_counted(migration) if migration is not None and machine is not None else _nothing("source", "failed"),
        kind=machine.kind if machine is not None else None,
        guest=guest(machine, machine.statistics()) if machine is not None else None,
        verified=None,
        verification=[],
        served=served,
        overhead_bytes=0,
    )
    if migration is not None and machine is not None:
        result.setup_ms = milliseconds(max(0, migration.ready_ns - migration.started_ns))
        result.paused_at_ns = migration.paused_ns
        if migration.at_pause is not None:
            result.guest_at_pause = guest(machine, migration.at_pause)
    return result


def destination_result(
    migration: DestinationMigration | None,
    statistics: MachineStatistics | None,
    check: Check | None,
    dump: str | None,
) -> DestResult:
    """`statistics`: the machine's last ones; `check`: the verdict over its memory, when it was asked for."""
    machine = migration.machine if migration is not None else None
    result = DestResult(
        **_counted(migration) if migration is not None else _nothing("dest", "failed"),
        kind=machine.kind if machine is not None else None,
        verified=None,
        verification=[],
        dump=dump,
        overhead_bytes=0,
    )
    if migration is None:
        return result
    result.resume_ms = milliseconds(max(0, migration.running_ns - migration.committed_ns))
    result.pager = pager(migration.pager_process)
    result.error = result.error or migration.machine_failure or None
    if check is not None:
        result.verification.append(
            CheckRecord(ok=check.ok, what=check.what, how=check.how, counts=dict(check.counts) or None)
        )
    completed = migration.state.value == "completed"
    if machine is not None and machine.outlives and completed:
        result.verification.append(
            CheckRecord(
                ok=not migration.machine_failure,
                what=migration.machine_failure or "every page has arrived, and was placed once",
                how="checksums of the frames and the map of pages; it runs, so that its memory cannot be compared",
            )
        )
    elif machine is not None and machine.live and completed:
        result.verification.append(
            CheckRecord(
                ok=not migration.machine_failure,
                what=migration.machine_failure or "the guest found no stale, torn or zeroed page here",
                how="the guest checks what it touches, and reports through a port",
            )
        )
    if check is not None:
        result.verified = all(item.ok for item in result.verification)
    if machine is not None and statistics is not None:
        result.guest = guest(machine, statistics)
        if check is not None and result.guest.nonce is None:  # it had no time to announce it
            result.guest.nonce = _nonce(check.nonce)
        if migration.at_switchover is not None:
            result.guest_at_switchover = guest(machine, migration.at_switchover)
    return result


def overhead_bytes(machine: AnyMachine | None) -> int:
    """Memory of this process beside the machine's own, now. 0 where the kernel does not say."""
    resident: dict[str, int] = {}
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as lines:
            for line in lines:
                name, _, rest = line.partition(":")
                if name in ("RssAnon", "RssFile"):
                    resident[name] = int(rest.split()[0]) * 1024
    except OSError:
        return 0
    own = sum(resident.values())  # a machine in a memfd is in RssShmem, once for each mapping
    if machine is not None and not machine.outlives:
        own -= sum(block.memory.resident_bytes() for block in machine.blocks if block.memory.kind == "anon")
    return max(0, own)
