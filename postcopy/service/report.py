# SPDX-License-Identifier: Apache-2.0
"""Results and progress as JSON objects.

Names and units follow QEMU's ``query-migrate`` where it has them: times in milliseconds, memory in bytes, pages as
numbers. `fault-latency-us` is in microseconds. docs/results.md lists them all.
"""

from __future__ import annotations

from typing import Any

from postcopy.machines import Check, Machine, MachineStatistics
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.source import SourceMigration, offered
from postcopy.migration.statistics import as_json, milliseconds

Json = dict[str, Any]
Migration = SourceMigration | DestinationMigration


def outcome(migration: Migration) -> Json:
    """Which migration it is, and how it stands."""
    return {
        "migration": migration.migration_id,
        "peer": str(migration.peer),
        "status": migration.status,
        "error": str(migration.failure) if migration.failure else None,
    }


def direction(migration: Migration) -> str:
    return "outgoing" if isinstance(migration, SourceMigration) else "incoming"


def ended(migration: Migration) -> Json:
    """How one migration has ended, in short."""
    side = "source" if isinstance(migration, SourceMigration) else "dest"
    return {"side": side, "direction": direction(migration)} | outcome(migration)


def counted(migration: Migration) -> Json:
    """All that both sides count."""
    statistics = migration.statistics()
    return as_json(statistics, ram=False) | {
        "ram": as_json(statistics),
        "fault-latency-us": statistics.latency.as_json(),
        "recoveries": as_json(migration.recoveries),
    }


def _result(migration: Migration) -> Json:
    """The part of a result that is the same on both sides."""
    blocked = migration.statistics().blocktime_ns
    return outcome(migration) | counted(migration) | {"blocktime-ms": [milliseconds(ns) for ns in blocked]}


def pager(process: tuple[int, int] | None) -> Json:
    """Where the pager lives; see `DestinationMigration.pager_process`."""
    if process is None:
        return {"where": "thread"}
    return {"where": "process", "pid": process[0] or None, "deaths": process[1]}


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
        "disk": _part(statistics, "disk_"),
    }
    if machine.network is not None:
        result["network"] = machine.network | _part(statistics, "net_")
    return result


def _part(statistics: MachineStatistics, prefix: str) -> Json:
    return {name.removeprefix(prefix): n for name, n in vars(statistics).items() if name.startswith(prefix)}


def source_progress(machine: Machine, migration: SourceMigration | None) -> Json:
    return {
        "side": "source",
        "status": "setup" if migration is None else migration.status,
        "guest": guest(machine, machine.statistics()),
        "ram": as_json(offered(machine) if migration is None else migration.statistics()),
    }


def source_result(machine: Machine, statistics: MachineStatistics, migration: SourceMigration | None) -> Json:
    result: Json = {"side": "source", "status": "failed", "machine": machine.kind, "guest": guest(machine, statistics)}
    if migration is None:
        return result
    result |= _result(migration) | {
        "setup-ms": milliseconds(max(0, migration.ready_ns - migration.started_ns)),
        "paused-at-ns": migration.paused_ns,
        "verified": None,
        "verification": [],
    }
    if migration.at_pause is not None:
        result["guest-at-pause"] = guest(machine, migration.at_pause)
    return result


def destination_progress(migration: DestinationMigration | None) -> Json:
    result: Json = {"side": "dest", "status": "setup" if migration is None else migration.status}
    if migration is None or migration.machine is None:
        return result
    now = counted(migration)
    return result | {
        "guest": guest(migration.machine, migration.machine.statistics()),
        "ram": now["ram"],
        "pending-faults": now["pending-faults"],
        "recoveries": migration.recoveries.count,
        "pager": pager(migration.pager_process),
    }


def destination_result(
    migration: DestinationMigration | None, statistics: MachineStatistics | None, check: Check | None, dump: str | None
) -> Json:
    """`statistics`: the machine's last ones; `check`: the verdict over its memory, when it was asked for."""
    result: Json = {"side": "dest", "status": "failed", "machine": None}
    if migration is None:
        return result
    machine = migration.machine
    verification = []
    if check is not None:
        verification.append(check.as_dict())
    if machine is not None and machine.live and migration.state.value == "completed":
        verification.append(
            {
                "ok": not migration.machine_failure,
                "what": migration.machine_failure or "the guest found no stale, torn or zeroed page here",
                "how": "the guest checks what it touches, and reports through a port",
                "counts": {},
            }
        )
    result |= _result(migration) | {
        "machine": machine.kind if machine else None,
        "resume-ms": milliseconds(max(0, migration.running_ns - migration.committed_ns)),
        "pager": pager(migration.pager_process),
        "verified": all(item["ok"] for item in verification) if check is not None else None,
        "verification": verification,
        "dump": dump,
    }
    result["error"] = result["error"] or migration.machine_failure or None
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
