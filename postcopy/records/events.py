# SPDX-License-Identifier: Apache-2.0
"""What happens: the lines of `--json`, and the events of the control socket."""

from __future__ import annotations

from typing import Annotated

from msgspec import field

from postcopy.records import pager
from postcopy.records._base import Record, doc
from postcopy.records.control import ProcessStatus
from postcopy.records.migration import (
    Check,
    Counted,
    Error,
    Guest,
    Kind,
    MigrationId,
    Name,
    OfMigration,
    Pager,
    Process,
    Ram,
    Recent,
    Recoveries,
)
from postcopy.records.results import Run
from postcopy.records.timeline import Timeline, VmTimeline

_Ended = Annotated[str, doc("How it ended.", of="completed|failed")]


class Listening(Record, kw_only=True):
    """It takes connections from now on."""

    side: Process
    address: Annotated[str, doc("As HOST:PORT, with the port that the system chose.")]
    encrypted: Annotated[bool | None, doc("Whether connections are under TLS.")] = None


class MetricsAddress(Record, kw_only=True):
    """Metrics are served from now on."""

    side: Process
    address: Annotated[str, doc("As HOST:PORT, with the port that the system chose.")]
    encrypted: Annotated[bool | None, doc("Whether it is https, and a client needs a certificate.")] = None


class OutputDropped(Record, kw_only=True):
    """Lines of progress are missing here, since they were not read in time."""

    lines: Annotated[int, doc("How many.", "lines")]


class Progress(OfMigration, kw_only=True):
    """How a migration stands: twice a second and whenever something has changed, as long as something changes."""

    starts_in_ms: Annotated[
        int | None, doc("Source: until it begins to migrate, while it waits (`--migrate-after`).", "ms")
    ] = None
    guest: Annotated[Guest | None, doc("What the machine says of itself, once it is there.")] = None
    ram: Annotated[Ram | None, doc("Memory and pages.")] = None
    pending_faults: Annotated[int | None, doc("Destination: threads that wait for a page now.", "threads")] = None
    recent: Annotated[Recent | None, doc("Destination: demand faults of the last moment.")] = None
    recoveries: Annotated[Recoveries | None, doc("Connections lost and replaced.")] = None
    pager: Annotated[Pager | None, doc("Destination: where its pager lives.")] = None


class MigrationStatus(OfMigration, kw_only=True):
    """The status of a migration has changed."""

    machine: Name
    from_: Annotated[str, doc("The status before; empty at first.")] = field(name="from")


class MigrationEnded(OfMigration, kw_only=True):
    """A migration has ended, one way or the other; a source or daemon may go on after it."""

    machine: Name
    downtime_ms: Annotated[
        float | None,
        doc("From the request to pause until the destination said `running`; not there where it did not, or this side"
            " was not told.", "ms"),
    ] = None  # fmt: skip
    total_ms: Annotated[
        float | None,
        doc("From the request to pause until every page had arrived; not there where they did not, or this side was"
            " not told.", "ms"),
    ] = None  # fmt: skip


class MachineStarted(Record, kw_only=True):
    """A machine was made, and runs."""

    machine: Name
    kind: Kind


class MachineReceived(Record, kw_only=True):
    """A machine has come, and all of it is here."""

    machine: Name
    kind: Kind
    migration_id: MigrationId


class MachineLeft(Record, kw_only=True):
    """A machine has gone, and all of it is there."""

    machine: Name
    migration_id: MigrationId


class MachineEnded(Record, kw_only=True):
    """A machine was ended on request."""

    machine: Name


class SideResult(Counted, kw_only=True):
    """What `source` and `dest` report at their end."""

    kind: Kind
    guest: Annotated[Guest | None, doc("What the machine says of itself, at the end.")] = None
    verified: Annotated[bool | None, doc("Whether all that was verified held; null: it was not asked for.")]
    verification: Annotated[list[Check], doc("What was verified.")]
    overhead_bytes: Annotated[int, doc("Peak of the process's own memory beside the machine's.", "bytes")]


class SourceResult(SideResult, kw_only=True):
    """The last line of `source`."""

    side: Annotated[str, doc("Which side this is.", of="source")]
    served: Annotated[int, doc("Destinations that have got everything.", "destinations")]
    setup_ms: Annotated[float | None, doc("From the offer until all channels were there.", "ms")] = None
    paused_at_ns: Annotated[
        int | None, doc("The request to pause, by CLOCK_MONOTONIC of this host; 0 when there was none.", "ns")
    ] = None
    guest_at_pause: Annotated[Guest | None, doc("What the machine said of itself when it was paused.")] = None


class DestResult(SideResult, kw_only=True):
    """The last line of `dest`."""

    side: Annotated[str, doc("Which side this is.", of="dest")]
    resume_ms: Annotated[float | None, doc("From `commit` received to the first vCPU in the machine.", "ms")] = None
    pager: Annotated[Pager | None, doc("Where the pager was.")] = None
    dump: Annotated[str | None, doc("The file that the memory was written to; null: that was not asked for.")]
    guest_at_switchover: Annotated[
        Guest | None, doc("What the machine said of itself when its state had been loaded.")
    ] = None


class DaemonResult(Record, kw_only=True):
    """The last line of `daemon` and of `source --hold`."""

    side: Annotated[str, doc("What the process is.", of="source|daemon")]
    status: _Ended
    error: Error
    machines_sent: Annotated[int, doc("Since it began.", "machines")]
    machines_received: Annotated[int, doc("Since it began.", "machines")]


_OF_MACHINES: dict[str, tuple[type[Record], ...]] = {
    "run": (Run,),
    "listening": (Listening,),
    "metrics": (MetricsAddress,),
    "progress": (Progress, ProcessStatus),
    "migration-status": (MigrationStatus,),
    "migration-ended": (MigrationEnded,),
    "timeline": (Timeline, VmTimeline),
    "machine-started": (MachineStarted,),
    "machine-received": (MachineReceived,),
    "machine-left": (MachineLeft,),
    "machine-ended": (MachineEnded,),
    "output-dropped": (OutputDropped,),
    "result": (SourceResult, DestResult, DaemonResult),
}
EVENTS = {event: (*_OF_MACHINES.get(event, ()), *pager.EVENTS.get(event, ())) for event in _OF_MACHINES | pager.EVENTS}
"""The records that an event of `source`, `dest`, `daemon` and `pager` may have."""
