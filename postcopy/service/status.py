# SPDX-License-Identifier: Apache-2.0
"""What `status` answers: the names of docs/results.md. How it reads is in `render`."""

from __future__ import annotations

import contextlib

import trio

from postcopy.machines import Machine
from postcopy.migration.statistics import milliseconds
from postcopy.migration.tasks import now_ns
from postcopy.service import report
from postcopy.service.report import Json, Migration

LOST = frozenset({"postcopy-paused", "in-doubt"})


def machine_status(name: str, machine: Machine | None, migration: Migration | None) -> Json:
    """One machine, and the migration that it is in, was in last, or null."""
    status: Json = {"name": name, "machine": machine.kind if machine else None, "memory": 0, "guest": None}
    if machine is not None:
        status["memory"] = machine.memory_bytes
        with contextlib.suppress(trio.ClosedResourceError):  # it has ended, what it was in has not
            status["guest"] = report.guest(machine, machine.statistics())
    status["migration"] = None if migration is None else _migration(migration)
    return status


def _migration(migration: Migration) -> Json:
    status = report.outcome(migration) | report.counted(migration)
    done_ns = migration.completed_ns or now_ns()
    return (
        {"id": status.pop("migration")}
        | status
        | {
            "direction": report.direction(migration),
            "looking-for-peer": not migration.over if migration.status in LOST else None,
            "elapsed-ms": milliseconds(done_ns - migration.started_ns),
        }
    )
