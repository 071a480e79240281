# SPDX-License-Identifier: Apache-2.0
"""A migration, and the machine that it moves."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, field

from postcopy.records._base import Record, doc

STATUSES: Final = (
    "connecting", "setup", "active", "in-doubt", "postcopy-active", "postcopy-paused", "postcopy-recover",
    "postcopy-failed", "completed", "failed", "cancelled", "reclaimed",
)  # fmt: skip
"""Of a migration; docs/results.md says what each means."""
LOST: Final = frozenset({"postcopy-paused", "in-doubt"})
"""Those in which a peer is looked for."""

_SENT = "What was sent before the machine was given to the destination, and after it."
_PART = "Where the downtime went."
_PAGES = "Pages by how they came: demand, background, zero (never sent), duplicate."

Side = Annotated[str, doc("Which side of the migration this is about.", of="source|dest")]
Process = Annotated[str, doc("What the process is; `source` with --hold, too.", of="source|dest|daemon")]
Name = Annotated[
    str, doc("The machine's name; in `source` and `dest`, where machines have none, its kind; empty until it is known.")
]
Kind = Annotated[str | None, doc("Kind of the machine, as --machine names it; null where none has come.")]
MigrationId = Annotated[str, doc("Of the migration: 32 hexadecimal digits, the same on both hosts.")]
Peer = Annotated[str, doc("Address of the other side, as HOST:PORT.")]
Direction = Annotated[str, doc("Whether the machine leaves or comes.", of="outgoing|incoming")]
Status = Annotated[
    str,
    doc("Where the migration is.", of="|".join(STATUSES), metric="postcopy_migration_status", status="STATUS",
        help="1 for the status that the migration has, 0 for the others."),
]  # fmt: skip
SentAs = Annotated[
    str, doc("Source: when the memory is sent, as `--mode`.", of="stop-and-copy|precopy|postcopy|hybrid")
]
Error = Annotated[str | None, doc("What went wrong, in one line; null when nothing has.")]


class Ram(Record):
    """The memory that a migration moves. A number that this side does not know is not there."""

    total: Annotated[
        int | None,
        doc("All memory blocks of the machine.", "bytes", label="Data total", metric="postcopy_migration_memory_bytes"),
    ] = None
    remaining: Annotated[
        int | None,
        doc("Memory that has not arrived; a source knows it in precopy, and when all has.", "bytes",
            label="Data remaining", metric="postcopy_migration_remaining_bytes"),
    ] = None  # fmt: skip
    transferred: Annotated[
        int | None,
        doc("On data channels, both ways, headers included.", "bytes", label="Data processed",
            metric="postcopy_migration_transferred_bytes_total"),
    ] = None  # fmt: skip
    page_size: Annotated[
        int | None, doc("The destination's page: the unit of transfer, and of the counts of pages.", "bytes")
    ] = None
    demand_pages: Annotated[
        int | None,
        doc("Placed in answer to a request for a thread that waits.", "pages", label="Demand pages", help=_PAGES,
            metric="postcopy_migration_pages_total", kind="demand"),
    ] = None  # fmt: skip
    prefetched_pages: Annotated[
        int | None,
        doc("Placed in answer to a request before any thread waited: by `--prefetch`, of a working set, or since the"
            " push had ended.", "pages", label="Prefetched pages", help=_PAGES,
            metric="postcopy_migration_pages_total", kind="prefetched"),
    ] = None  # fmt: skip
    prefetch_hits: Annotated[
        int | None,
        doc("Pages that were requested so and that a thread has then reached, each once, as far as faults show it: it"
            " came to wait for one, or faulted beyond it in the same stream.", "pages", label="Prefetch hits",
            metric="postcopy_migration_prefetch_hits_total"),
    ] = None  # fmt: skip
    background_pages: Annotated[
        int | None,
        doc("Placed without having been requested.", "pages", label="Background pages", help=_PAGES,
            metric="postcopy_migration_pages_total", kind="background"),
    ] = None  # fmt: skip
    zero_pages: Annotated[
        int | None,
        doc("Known to be zero, and never sent as content.", "pages", label="Zero pages", help=_PAGES,
            metric="postcopy_migration_pages_total", kind="zero"),
    ] = None  # fmt: skip
    duplicate_pages: Annotated[
        int | None,
        doc("Arrived again, and dropped.", "pages", help=_PAGES,
            metric="postcopy_migration_pages_total", kind="duplicate"),
    ] = None  # fmt: skip
    postcopy_requests: Annotated[
        int | None,
        doc("Requests for pages.", "requests", label="Page requests",
            metric="postcopy_migration_page_requests_total"),
    ] = None  # fmt: skip
    iteration: Annotated[
        int | None,
        doc("Rounds of precopy that were begun.", "rounds", label="Rounds",
            metric="postcopy_migration_precopy_rounds"),
    ] = None  # fmt: skip
    dirty_sync_count: Annotated[
        int | None,
        doc("How often it was looked which pages had been written.", "looks", label="Dirty sync count",
            metric="postcopy_migration_dirty_syncs_total"),
    ] = None  # fmt: skip
    dirty_pages_rate: Annotated[
        int | None,
        doc("Pages that the machine has written in a second, in the last round.", "pages/s", label="Dirty pages rate",
            metric="postcopy_migration_dirty_pages_per_second"),
    ] = None  # fmt: skip
    precopy_bytes: Annotated[
        int | None,
        doc("Sent before the machine was given to the destination.", "bytes", label="Precopy data", help=_SENT,
            metric="postcopy_migration_sent_bytes_total", phase="precopy"),
    ] = None  # fmt: skip
    postcopy_bytes: Annotated[
        int | None,
        doc("Sent after that.", "bytes", label="Postcopy data", help=_SENT,
            metric="postcopy_migration_sent_bytes_total", phase="postcopy"),
    ] = None  # fmt: skip
    compressed_bytes: Annotated[
        int | None,
        doc("Pages that were compressed, as they were on the wire.", "bytes", label="Compressed to",
            metric="postcopy_migration_compressed_bytes_total"),
    ] = None  # fmt: skip
    uncompressed_bytes: Annotated[
        int | None,
        doc("The same pages, as they are in memory.", "bytes", label="Compressed from",
            metric="postcopy_migration_uncompressed_bytes_total"),
    ] = None  # fmt: skip
    released: Annotated[
        int | None,
        doc("Memory that `--release-ram` has given back to the source's host.", "bytes",
            metric="postcopy_migration_released_bytes"),
    ] = None  # fmt: skip
    residency: Annotated[
        str | None,
        doc("Which parts of the memory are there (source: sent): up to 64 parts of equal size, in the order of the"
            " blocks, a digit of base64 for each: A: nothing of it, /: all of it; the others are 62 equal steps"
            " between. Above 2 GiB of memory each is an even sample of its pages."),
    ] = None  # fmt: skip


class Latency(Record, kw_only=True):
    """Of demand faults, from the event read until the thread was woken. Counts threads, so `count` may be above
    `demand-pages`: two threads may wait for one page, and a page may come by push while its request is under way."""

    count: Annotated[int, doc("Faults.", "faults")]
    p50: Annotated[float, doc("Not exceeded by 50 % of them.", "us")]
    p99: Annotated[float, doc("Not exceeded by 99 % of them.", "us")]
    p99_9: Annotated[float, doc("Not exceeded by 99.9 % of them.", "us")] = field(name="p99.9")
    max: Annotated[float, doc("The longest.", "us")]


class Recent(Record, kw_only=True):
    """Demand faults of the newest interval, of half a second at least, that was looked at."""

    interval_ms: Annotated[float, doc("How long it was.", "ms")]
    count: Annotated[int, doc("Faults that ended in it.", "faults")]
    p50: Annotated[float, doc("Not exceeded by 50 % of them.", "us")]
    p99: Annotated[float, doc("Not exceeded by 99 % of them.", "us")]


def _part(text: str, part: str) -> Meta:
    return doc(text, "us", help=_PART, metric="postcopy_migration_downtime_part_seconds", part=part)


class Breakdown(Record, kw_only=True):
    """Where the downtime went. The parts of the source follow each other, and are all of it; those of the destination,
    by its own clock, lie within `prepared` (arm, load) and `commit` (first-run). What is not known is not there."""

    stop: Annotated[float | None, _part("Source: until the machine stood still.", "stop")] = None
    dirty: Annotated[float | None, _part("Source: until it was known what it had written since.", "dirty")] = None
    state: Annotated[float | None, _part("Source: until its state was saved.", "state")] = None
    send: Annotated[float | None, _part("Source: until that was sent.", "send")] = None
    prepared: Annotated[
        float | None, _part("Source: until the destination was prepared, with pages sent meanwhile.", "prepared")
    ] = None
    commit: Annotated[
        float | None, _part("Source: from the decision until it was known that the machine runs there.", "commit")
    ] = None
    arm: Annotated[float | None, _part("Destination: what had been written was made missing.", "arm")] = None
    load: Annotated[float | None, _part("Destination: the state was loaded.", "load")] = None
    first_run: Annotated[
        float | None, _part("Destination: from the decision until a vCPU was in the machine.", "first-run")
    ] = None


class Recoveries(Record, kw_only=True):
    """How often a migration was cut and went on, and how long each recovery took: from the loss noticed until all
    channels were there again."""

    count: Annotated[
        int,
        doc("Cuts after which both sides went on by themselves.", "recoveries",
            metric="postcopy_migration_recoveries_total"),
    ]  # fmt: skip
    last_ms: Annotated[float, doc("Duration of the last one.", "ms")]
    max_ms: Annotated[float, doc("Duration of the longest one.", "ms")]
    total_ms: Annotated[
        float,
        doc("Duration of all of them.", "ms", metric="postcopy_migration_recovery_seconds_total",
            help="From losses noticed until all channels were there again."),
    ]  # fmt: skip


class Tls(Record, kw_only=True):
    """Who the other side is, by the certificate with which its newest control connection was made."""

    peer_name: Annotated[str, doc("The first name in its certificate; its subject where that has none.")]
    subject: Annotated[str, doc("Of its certificate, as RFC 2253 writes it.")]
    resumed: Annotated[
        bool,
        doc("Whether that connection has taken up an earlier session: no certificate was sent for it.",
            metric="postcopy_migration_tls_resumed",
            help="1: the newest control connection has taken up an earlier session; no certificate was sent for it."),
    ]  # fmt: skip
    expires_at: Annotated[
        int,
        doc("When its certificate ends, counted from the beginning of 1970, UTC.", "s",
            metric="postcopy_migration_peer_certificate_expiry_timestamp_seconds",
            help="When the certificate of the other side ends, since the beginning of 1970, UTC."),
    ]  # fmt: skip


class OfMigration(Record, kw_only=True):
    """Which migration it is, and how it stands."""

    side: Side
    direction: Direction | None = None
    migration_id: MigrationId | None = None
    peer: Peer | None = None
    attempts: Annotated[
        int | None,
        doc("How often it was begun: again when a connection was lost before the machine had left.", "attempts"),
    ] = None
    encrypted: Annotated[
        bool | None,
        doc("Whether its connections are under TLS; not there before the first one.",
            metric="postcopy_migration_encrypted", help="1: the connections of the migration are under TLS."),
    ] = None  # fmt: skip
    tls: Annotated[Tls | None, doc("Who the other side is; only where it is encrypted.")] = None
    status: Status
    error: Error


class Counted(OfMigration, kw_only=True):
    """... and all that both sides count."""

    downtime_ms: Annotated[
        float | None,
        doc("At the source, from the request to pause until the destination said `running`. The destination has it"
            " when the source has told it, with its last message.", "ms",
            label="Downtime", metric="postcopy_migration_downtime_seconds"),
    ] = None  # fmt: skip
    total_ms: Annotated[
        float | None,
        doc("At the source, from the request to pause until every page had arrived. Destination: as"
            " `downtime-ms`.", "ms",
            label="Total time", metric="postcopy_migration_duration_seconds"),
    ] = None  # fmt: skip
    downtime_breakdown_us: Annotated[Breakdown | None, doc("Where the downtime went.", "us")] = None
    mode: SentAs | None = None
    ram: Annotated[Ram | None, doc("Memory and pages.")] = None
    pending_faults: Annotated[
        int | None,
        doc("Destination: threads that wait for a page now.", "threads", label="Blocked threads",
            metric="postcopy_migration_blocked_threads"),
    ] = None  # fmt: skip
    fault_latency_us: Annotated[
        Latency | None,
        doc("How long demand faults took.", "us", metric="postcopy_migration_fault_latency_seconds",
            help="Of demand faults, event read until thread woken."),
    ] = None  # fmt: skip
    blocktime_ms: Annotated[
        list[float] | None,
        doc("How long each vCPU was blocked on missing pages.", "ms",
            metric="postcopy_migration_vcpu_blocked_seconds_total", vcpu="NUMBER",
            help="How long a vCPU has waited for pages."),
    ] = None  # fmt: skip
    recoveries: Annotated[Recoveries | None, doc("Connections lost and replaced.")] = None


class Migration(Counted, kw_only=True):
    """The migration that a machine is in, or was in last."""

    looking_for_peer: Annotated[bool | None, doc("Whether the peer is still looked for; only where it was lost.")] = (
        None
    )
    elapsed_ms: Annotated[float, doc("Since the migration began, until its end.", "ms")]
    recent: Annotated[Recent | None, doc("Destination: demand faults of the last moment.")] = None


class Vcpu(Record, kw_only=True):
    """One virtual CPU."""

    activity: Annotated[str, doc("Where it is.", of="parked|guest|device|halted|disk|net|gone")]
    operations: Annotated[int, doc("Of the guest; moves with the machine.", "operations")]
    reports: Annotated[int, doc("Progress reports of the guest, through its port.", "reports")]
    exits: Annotated[int, doc("From the guest, on this host.", "exits")]


class Disk(Record, kw_only=True):
    """The machine's disk, as the guest has used it on this host."""

    reads: Annotated[int, doc("Read requests.", "requests")]
    writes: Annotated[int, doc("Write requests.", "requests")]
    bytes: Annotated[int, doc("Read and written.", "bytes")]
    errors: Annotated[int, doc("Requests that failed.", "requests")]


class Network(Record, kw_only=True):
    """The machine's network device on this host."""

    net: Annotated[str, doc("What it is connected to, as `--net` has it.")]
    mac: Annotated[str, doc("Its MAC address.")]
    address: Annotated[str, doc("Its IPv4 address.")]
    received: Annotated[int, doc("Frames that the guest has received.", "frames")]
    sent: Annotated[int, doc("Frames that the guest has sent.", "frames")]
    dropped: Annotated[int, doc("Frames too long, or not taken by the host.", "frames")]
    errors: Annotated[int, doc("Requests that were refused.", "requests")]


class Guest(Record, kw_only=True):
    """What a machine says of itself. One that does not run (`image`) has a state only; one that is a process of its
    own (`firecracker`, `qemu`, `program`) has that and its process."""

    state: Annotated[str, doc("Of the machine on this host.", of="created|paused|running|failed")]
    nonce: Annotated[
        str | None,
        doc("Made by the guest at boot, kept in its memory only: 0x and 16 hexadecimal digits; not there until the"
            " guest has announced it on this host, or its memory was verified here."),
    ] = None  # fmt: skip
    operations: Annotated[
        int | None,
        doc("Of the guest; the count moves with it.", "operations", metric="postcopy_guest_operations_total"),
    ] = None
    reports: Annotated[int | None, doc("Progress reports of the guest, through its port.", "reports")] = None
    failures: Annotated[
        int | None, doc("Failures that the guest reported.", "failures", metric="postcopy_guest_failures_total")
    ] = None
    failure: Annotated[str | None, doc("The first of these failures.")] = None
    vcpus: Annotated[list[Vcpu] | None, doc("By number.")] = None
    disk: Annotated[Disk | None, doc("Its disk.")] = None
    network: Annotated[Network | None, doc("Its network device, where it has one.")] = None
    pid: Annotated[int | None, doc("Of the process that runs it, on this host.")] = None
    api_socket: Annotated[str | None, doc("Path at which it is spoken to: API socket, monitor.")] = None


class Machine(Record, kw_only=True):
    """One machine, and the migration that it is in or was in last."""

    name: Name
    kind: Kind
    memory: Annotated[int, doc("Memory of the machine.", "bytes", metric="postcopy_machine_memory_bytes")]
    guest: Annotated[Guest | None, doc("What it says of itself; null until there is one, and after its end.")]
    migration: Annotated[Migration | None, doc("The migration that it is in, or was in last; null: none.")]


class Pager(Record, kw_only=True):
    """Where the destination's pager lives (`--pager`)."""

    where: Annotated[str, doc("In a thread of `dest`, or in a process of its own.", of="thread|process")]
    pid: Annotated[int | None, doc("Of its process, while there is one.")] = None
    deaths: Annotated[int | None, doc("Processes that died and were replaced.", "processes")] = None


class Check(Record, kw_only=True):
    """Something that was verified."""

    ok: Annotated[bool, doc("Whether it held.")]
    what: Annotated[str, doc("What was verified, or what is wrong, in one line.")]
    how: Annotated[str, doc("By what means.")]
    counts: Annotated[dict[str, int] | None, doc("Numbers that belong to it, by name.")] = None
