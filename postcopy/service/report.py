# SPDX-License-Identifier: Apache-2.0
"""Results and progress as JSON objects.

Names and units follow QEMU's ``query-migrate`` where it has them: times in milliseconds, memory in bytes, pages as
numbers. `fault-latency-us` is in microseconds. docs/results.md lists them all.
"""

from __future__ import annotations

from typing import Any

from postcopy.dataplane.pageserver import PageServerStatistics
from postcopy.machines import Check, Machine, MachineStatistics
from postcopy.migration._session import Recoveries
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.figures import Figures
from postcopy.migration.source import SourceMigration

Json = dict[str, Any]


def milliseconds(ns: int) -> float:
    return round(ns / 1e6, 3)


def microseconds(ns: int) -> float:
    return round(ns / 1e3, 1)


def ram(figures: Figures) -> Json:
    return {
        "total": figures.total_bytes,
        "transferred": figures.transferred_bytes,
        "remaining": figures.total_bytes - figures.resident_bytes,
        "page-size": figures.page_bytes,
        "demand-pages": figures.demand_pages,
        "background-pages": figures.background_pages,
        "zero-pages": figures.zero_pages,
        "duplicate-pages": figures.duplicate_pages,
        "postcopy-requests": figures.requests,
    }


def fault_latency(figures: Figures) -> Json:
    latency = figures.latency
    return {
        "count": latency.count,
        "p50": microseconds(latency.p50_ns),
        "p99": microseconds(latency.p99_ns),
        "p99.9": microseconds(latency.p999_ns),
        "max": microseconds(latency.max_ns),
    }


def recoveries(counted: Recoveries) -> Json:
    return {
        "count": counted.count,
        "last-ms": milliseconds(counted.last_ns),
        "max-ms": milliseconds(counted.max_ns),
        "total-ms": milliseconds(counted.total_ns),
    }


def ended(direction: str, migration: SourceMigration | DestinationMigration) -> Json:
    """How one migration has ended, in short."""
    return {
        "side": "source" if direction == "outgoing" else "dest",
        "direction": direction,
        "migration": migration.migration_id,
        "peer": str(migration.peer),
        "status": migration.status,
        "error": str(migration.failure) if migration.failure else None,
    }


def pager(process: tuple[int, int] | None) -> Json:
    """Where the pager lives; see `DestinationMigration.pager_process`."""
    if process is None:
        return {"where": "thread"}
    return {"where": "process", "pid": process[0] or None, "deaths": process[1]}


def served(machine: Machine, statistics: PageServerStatistics | None) -> Json:
    """`ram` as the source alone can tell it, while the destination has not reported."""
    result: Json = {"total": machine.memory_bytes, "page-size": machine.blocks[0].memory.page_bytes}
    if statistics is not None:
        result |= {
            "transferred": statistics.bytes_sent + statistics.bytes_received,
            "demand-pages": statistics.demand_pages,
            "background-pages": statistics.background_pages,
            "zero-pages": statistics.zero_pages,
            "postcopy-requests": statistics.requests,
            "released": statistics.released_bytes,
        }
    return result


def guest(machine: Machine, statistics: MachineStatistics) -> Json:
    """What the machine says of itself."""
    if not machine.live:
        return {"state": statistics.state.value}
    result: Json = {
        "state": statistics.state.value,
        "nonce": f"{statistics.nonce:#018x}" if statistics.nonce else None,
        "operations": statistics.operations,
        "marks": statistics.marks,
        "failures": statistics.failures,
        "failure": statistics.failure_text or None,
        "vcpus": [
            {"activity": vcpu.activity.value, "operations": vcpu.operations, "marks": vcpu.marks, "exits": vcpu.exits}
            for vcpu in statistics.vcpus
        ],
        "disk": {
            "reads": statistics.disk_reads,
            "writes": statistics.disk_writes,
            "bytes": statistics.disk_bytes,
            "errors": statistics.disk_errors,
        },
    }
    if machine.network is not None:
        result["network"] = machine.network | {
            "received": statistics.net_received,
            "sent": statistics.net_sent,
            "dropped": statistics.net_dropped,
            "errors": statistics.net_errors,
        }
    return result


def source_progress(machine: Machine, migration: SourceMigration | None) -> Json:
    statistics = machine.statistics()
    result: Json = {"side": "source", "status": "setup" if migration is None else migration.status}
    result["guest"] = guest(machine, statistics)
    result["ram"] = served(machine, migration.statistics() if migration else None)
    return result


def source_result(machine: Machine, statistics: MachineStatistics, migration: SourceMigration | None) -> Json:
    result: Json = {"side": "source", "status": "failed", "machine": machine.kind, "guest": guest(machine, statistics)}
    if migration is None:
        return result
    figures = migration.figures
    result |= {
        "status": migration.status,
        "migration": migration.migration_id,
        "peer": str(migration.peer),
        "setup-ms": milliseconds(max(0, migration.ready_ns - migration.started_ns)),
        "paused-at-ns": migration.paused_ns,
        "downtime-ms": milliseconds(migration.downtime_ns),
        "total-ms": milliseconds(migration.total_ns),
        "ram": ram(figures) if figures else served(machine, migration.statistics()),
        "fault-latency-us": fault_latency(figures or Figures()),
        "blocktime-ms": [milliseconds(ns) for ns in figures.blocktime_ns] if figures else [],
        "recoveries": recoveries(migration.recoveries),
        "verified": None,
        "verification": [],
        "error": str(migration.failure) if migration.failure else None,
    }
    if served_pages := migration.statistics():
        result["ram"]["released"] = served_pages.released_bytes
    if migration.at_pause is not None:
        result["guest-at-pause"] = guest(machine, migration.at_pause)
    return result


def destination_progress(migration: DestinationMigration | None) -> Json:
    result: Json = {"side": "dest", "status": "setup" if migration is None else migration.status}
    if migration is None or migration.machine is None:
        return result
    figures = migration.figures()
    result["guest"] = guest(migration.machine, migration.machine.statistics())
    result["ram"] = ram(figures)
    result["pending-faults"] = figures.pending_faults
    result["recoveries"] = migration.recoveries.count
    result["pager"] = pager(migration.pager_process)
    return result


def destination_result(
    migration: DestinationMigration | None, statistics: MachineStatistics | None, check: Check | None, dump: str | None
) -> Json:
    """`statistics`: the machine's last ones; `check`: the verdict over its memory, when it was asked for."""
    result: Json = {"side": "dest", "status": "failed", "machine": None}
    if migration is None:
        return result
    figures = migration.figures()
    machine = migration.machine
    verification = []
    if check is not None:
        verification.append({"ok": check.ok, "what": check.what, "how": check.how, "counts": dict(check.counts)})
    if machine is not None and machine.live and migration.state.value == "completed":
        verification.append(
            {
                "ok": not migration.machine_failure,
                "what": migration.machine_failure or "the guest found no stale, torn or zeroed page here",
                "how": "the guest checks what it touches, and reports through a port",
                "counts": {},
            }
        )
    result |= {
        "status": migration.status,
        "migration": migration.migration_id,
        "peer": str(migration.peer),
        "machine": machine.kind if machine else None,
        "downtime-ms": milliseconds(migration.downtime_ns),
        "resume-ms": milliseconds(max(0, migration.running_ns - migration.committed_ns)),
        "total-ms": milliseconds(migration.total_ns),
        "ram": ram(figures),
        "fault-latency-us": fault_latency(figures),
        "blocktime-ms": [milliseconds(ns) for ns in figures.blocktime_ns],
        "recoveries": recoveries(migration.recoveries),
        "pager": pager(migration.pager_process),
        "verified": all(item["ok"] for item in verification) if check is not None else None,
        "verification": verification,
        "dump": dump,
        "error": str(migration.failure) if migration.failure else migration.machine_failure or None,
    }
    if machine is not None and statistics is not None:
        result["guest"] = guest(machine, statistics)
    if machine is not None and migration.at_switchover is not None:
        result["guest-at-switchover"] = guest(machine, migration.at_switchover)
    return result


def overhead_bytes(machine: Machine | None) -> int:
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
    if machine is not None:
        own -= sum(block.memory.resident_bytes() for block in machine.blocks if block.memory.kind == "anon")
    return max(0, own)
