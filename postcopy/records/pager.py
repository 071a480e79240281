# SPDX-License-Identifier: Apache-2.0
"""What `pager` writes: the virtual machines whose page faults it serves, and what happens to them."""

from __future__ import annotations

from typing import Annotated

from postcopy.records._base import Record, doc
from postcopy.records.migration import Error, Latency, Recent

_PAGES = "Pages by how they came: demand, prefetched (before a fault asked), background (pushed by a source), zero."

VmName = Annotated[str, doc("Of the virtual machine in this process: its image's name and the process that has it.")]
Side = Annotated[str, doc("Which command this is.", of="pager")]
Socket = Annotated[str, doc("Path of the socket that a VMM connects to.")]
Pid = Annotated[int, doc("Of the process.")]
Reason = Annotated[str, doc("Why, in one line.")]
Killed = Annotated[bool, doc("Whether its process was killed (`--on-lost kill`).")]


class WorkingSet(Record, kw_only=True):
    """A working set that is replayed (`--working-set`)."""

    set_pages: Annotated[
        int,
        doc("Pages of it that were looked at so far.", "pages", label="Working set",
            metric="postcopy_vm_working_set_pages"),
    ]  # fmt: skip
    set_hits: Annotated[
        int,
        doc("Of them, placed before a fault asked: faults that were prevented.", "pages", label="Faults prevented",
            metric="postcopy_vm_working_set_hits"),
    ]  # fmt: skip
    hit_rate: Annotated[float | None, doc("The share of them.", "%", label="Hit rate")] = None


class Vm(Record, kw_only=True):
    """A virtual machine whose page faults are served."""

    name: VmName
    pid: Pid
    status: Annotated[
        str,
        doc("serving: pages are missing. complete: all of its memory is there. lost: its pages cannot be had, and it is"
            " held where it needs them. ended: its process has.", of="serving|complete|lost|ended"),
    ]  # fmt: skip
    error: Error
    image: Annotated[str | None, doc("Where its pages come from; null: from a program.")]
    socket: Socket
    elapsed_ms: Annotated[float, doc("Since it connected.", "ms")]
    memory: Annotated[
        int, doc("Memory of the virtual machine.", "bytes", label="Memory", metric="postcopy_vm_memory_bytes")
    ]
    page_size: Annotated[int, doc("Of its pages, as they are mapped.", "bytes")]
    resident: Annotated[
        int,
        doc("Memory that is there, or known to be zero.", "bytes", label="Resident",
            metric="postcopy_vm_resident_bytes"),
    ]  # fmt: skip
    faults: Annotated[
        int, doc("Page faults that were read.", "faults", label="Faults", metric="postcopy_vm_faults_total")
    ]
    pending_faults: Annotated[
        int, doc("Threads that wait for a page now.", "threads", label="Blocked threads",
                 metric="postcopy_vm_blocked_threads")
    ]  # fmt: skip
    demand_pages: Annotated[
        int, doc("Placed in answer to a fault.", "pages", label="Demand pages", help=_PAGES,
                 metric="postcopy_vm_pages_total", kind="demand")
    ]  # fmt: skip
    prefetched_pages: Annotated[
        int, doc("Placed before a fault asked.", "pages", label="Prefetched pages", help=_PAGES,
                 metric="postcopy_vm_pages_total", kind="prefetched")
    ]  # fmt: skip
    background_pages: Annotated[
        int, doc("Pushed by a source.", "pages", help=_PAGES, metric="postcopy_vm_pages_total", kind="background")
    ]
    zero_pages: Annotated[
        int, doc("Known to be zero.", "pages", label="Zero pages", help=_PAGES,
                 metric="postcopy_vm_pages_total", kind="zero")
    ]  # fmt: skip
    image_waits: Annotated[
        int,
        doc("Faults on pages that were not in the page cache of this host.", "faults", label="Waits for the image",
            metric="postcopy_vm_image_waits_total"),
    ]  # fmt: skip
    removes: Annotated[
        int,
        doc("Ranges that the virtual machine has thrown away, as with a balloon.", "ranges", label="Removes",
            metric="postcopy_vm_removes_total"),
    ]  # fmt: skip
    removed_pages: Annotated[
        int, doc("Pages in them: zero from then on.", "pages", metric="postcopy_vm_removed_pages_total")
    ]
    retries: Annotated[
        int,
        doc("Placements that the kernel refused for a moment.", "placements", metric="postcopy_vm_retries_total"),
    ]
    fault_latency_us: Annotated[
        Latency,
        doc("How long demand faults took.", "us", metric="postcopy_vm_fault_latency_seconds",
            help="Of demand faults, event read until thread woken."),
    ]  # fmt: skip
    recent: Annotated[Recent | None, doc("Demand faults of the last moment.")] = None
    residency: Annotated[
        str | None,
        doc("Which parts of the memory are there: as `residency` of a migration's memory (Ram)."),
    ] = None
    postcopy_latency_dist: Annotated[
        list[int],
        doc("The same as QEMU counts them: the number at place N is that of faults that took 2^N to 2^(N+1) us, the"
            " first with all that were faster, the last with all that were slower; exact within 1 %.", "faults"),
    ]  # fmt: skip
    faults_served_ms: Annotated[
        dict[str, float],
        doc("From its connection until it had been served 1, 100, 1000 and 10000 faults, as far as it has.", "ms"),
    ]
    working_set: Annotated[WorkingSet | None, doc("What was replayed.")] = None
    recoveries_of_source: Annotated[
        int | None,
        doc("Connections to the source that were lost and replaced.", "recoveries", label="Recoveries",
            metric="postcopy_vm_recoveries_total"),
    ] = None  # fmt: skip
    encrypted: Annotated[
        bool | None,
        doc("Whether the connection to its source is under TLS; only with `--connect`.", label="Encrypted",
            metric="postcopy_vm_encrypted"),
    ] = None  # fmt: skip
    engine_deaths: Annotated[
        int,
        doc("How often the process that served it has died, and another one went on.", "processes",
            label="Engine deaths", metric="postcopy_vm_engine_deaths_total"),
    ]  # fmt: skip


class Keeper(Record, kw_only=True):
    """What holds the descriptors of the virtual machines when the process that serves them ends."""

    store: Annotated[str, doc("What it is; none: nothing outlives the process.")]
    deaths: Annotated[
        int,
        doc("Processes that have died while they served.", "processes", metric="postcopy_pager_engine_deaths_total"),
    ]
    spare: Annotated[bool, doc("Whether another process waits to go on.")]


class PagerStatus(Record, kw_only=True):
    """How a pager and its virtual machines are. As an event: twice a second, when something has changed."""

    side: Side
    pid: Pid
    listening: Annotated[list[str], doc("Addresses: of a pager, paths of its sockets.")]
    keeper: Annotated[Keeper, doc("What goes on when this process ends.")]
    refused: Annotated[int, doc("Connections that were refused.", "connections", metric="postcopy_pager_refused_total")]
    ended: Annotated[int, doc("Virtual machines that have ended.", "machines", metric="postcopy_pager_vms_ended_total")]
    vms: Annotated[list[Vm], doc("Those that are served.")]


class PagerListening(Record, kw_only=True):
    """A VMM may connect from now on."""

    side: Side
    socket: Socket
    image: Annotated[str | None, doc("Where its pages come from; null: from a program.")]


class VmConnected(Record, kw_only=True):
    """A virtual machine has connected, or another process has taken over: its page faults are served from now on."""

    vm: VmName
    pid: Pid
    socket: Socket
    memory: Annotated[int, doc("Memory of the virtual machine.", "bytes")]
    taken_over: Annotated[bool, doc("Whether a process before this one has served it.")]


class VmRefused(Record, kw_only=True):
    """A connection was closed: no page fault of its virtual machine is served."""

    pid: Pid
    socket: Socket
    reason: Reason
    killed: Killed


class VmLost(Record, kw_only=True):
    """The pages of a virtual machine cannot be had any more: it is held where it needs them, or was killed."""

    vm: VmName
    reason: Reason
    killed: Killed


class VmRecovered(Record, kw_only=True):
    """The pages of a virtual machine that was lost can be had again."""

    vm: VmName


class VmEnded(Record, kw_only=True):
    """A virtual machine is not served any more."""

    vm: VmName
    reason: Reason
    figures: Annotated[Vm, doc("What was counted.")]


class WorkingSetRecorded(Record, kw_only=True):
    """A working set was written (`--record-working-set`)."""

    vm: VmName
    path: Annotated[str, doc("The file.")]
    set_pages: Annotated[int, doc("Pages of it.", "pages")]


class PagerResult(Record, kw_only=True):
    """The last line of `pager`."""

    side: Side
    status: Annotated[str, doc("How it ended.", of="completed|failed")]
    error: Error
    served: Annotated[int, doc("Virtual machines that were served.", "machines")]
    left: Annotated[int, doc("Of them, those that were not complete at its end, and are held.", "machines")]


EVENTS: dict[str, tuple[type[Record], ...]] = {
    "listening": (PagerListening,),
    "progress": (PagerStatus,),
    "vm-connected": (VmConnected,),
    "vm-refused": (VmRefused,),
    "vm-lost": (VmLost,),
    "vm-recovered": (VmRecovered,),
    "vm-ended": (VmEnded,),
    "working-set": (WorkingSetRecorded,),
    "result": (PagerResult,),
}
"""The records that an event of `pager` may have."""
