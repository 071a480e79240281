# SPDX-License-Identifier: Apache-2.0
"""What `demo`, `chaos`, `merge` and `bench` report, and what `chaos` does meanwhile."""

from __future__ import annotations

from typing import Annotated

from postcopy.records._base import Record, doc
from postcopy.records.events import DestResult, SourceResult
from postcopy.records.migration import Check, Counted, Kind, MigrationId, Pager
from postcopy.records.results import Comparison, Measurement


class ChaosListening(Record, kw_only=True):
    """The proxy takes connections from now on."""

    side: Annotated[str, doc("Which command this is.", of="chaos")]
    address: Annotated[str, doc("As HOST:PORT, with the port that the system chose.")]
    to: Annotated[str, doc("Where it connects to, as HOST:PORT.")]
    seed: Annotated[int, doc("Repeats what was drawn.")]


class Cut(Record, kw_only=True):
    """Connections were cut."""

    way: Annotated[str, doc("How, as in the plan.")]
    connections: Annotated[int, doc("How many there were.", "connections")]


class Unreachable(Record, kw_only=True):
    """The other side could not be connected to."""

    connection: Annotated[int, doc("Number of the connection for which it was tried.")]
    error: Annotated[str | None, doc("Why.")]


class ChaosResult(Record, kw_only=True):
    """The last line of `chaos`."""

    side: Annotated[str, doc("Which command this is.", of="chaos")]
    seed: Annotated[int, doc("Repeats what was drawn.")]
    connections: Annotated[int, doc("That were carried.", "connections")]
    refused: Annotated[int, doc("While the network was down.", "connections")]
    cuts: Annotated[dict[str, int], doc("How often connections were cut, by way.", "cuts")]
    bytes_out: Annotated[int, doc("From the side that connects to the side that listens.", "bytes")]
    bytes_back: Annotated[int, doc("From the side that listens to the side that connects.", "bytes")]
    flipped: Annotated[int, doc("Bits that were changed.", "bits")]


class Chaos(Record, kw_only=True):
    """The bad network of `demo --chaos`."""

    plan: Annotated[str, doc("As it was given.")]
    seed: Annotated[int, doc("Repeats what was drawn.")]
    connections: Annotated[int | None, doc("That were carried.", "connections")] = None
    refused: Annotated[int | None, doc("While the network was down.", "connections")] = None
    cuts: Annotated[dict[str, int] | None, doc("How often connections were cut, by way.", "cuts")] = None


class LabCut(Record, kw_only=True):
    """The cable that was pulled out."""

    host: Annotated[str, doc("Name of its host.")]
    at_percent: Annotated[float, doc("Of the memory was at the destination then.", "%")]
    noticed_ms: Annotated[float, doc("Until both sides were paused.", "ms")]
    healed_ms: Annotated[float, doc("Until the cable was whole.", "ms")]


class LabHost(Record, kw_only=True):
    """A host of the laboratory."""

    name: Annotated[str, doc("Of the host.")]
    ipv4: Annotated[str, doc("Its IPv4 address.")]
    ipv6: Annotated[str | None, doc("Its IPv6 address; null: the kernel has none.")]


class DemoLab(Record, kw_only=True):
    """The laboratory of `demo --lab`."""

    name: Annotated[str, doc("Of the laboratory.")]
    mtu: Annotated[int, doc("Of its cables.", "bytes")]
    rate_bytes_per_s: Annotated[int | None, doc("Of its cables, each way; null: no limit.", "bytes/s")]
    hosts: Annotated[dict[str, LabHost], doc("By side: `source`, `dest`.")]
    cut: Annotated[LabCut, doc("What happened to the cable.")]


class Pings(Record, kw_only=True):
    """Echoes from a third host to the machine (`demo --lab --workload echo`)."""

    address: Annotated[str, doc("Of the machine.")]
    observer: Annotated[str, doc("Name of the host that asks.")]
    switchover_gap_ms: Annotated[
        float | None, doc("The longest time between two answers that touches the downtime; null: no answers.", "ms")
    ]
    sent: Annotated[int, doc("Datagrams.", "datagrams")]
    answered: Annotated[int, doc("Datagrams that were answered.", "datagrams")]
    duplicates: Annotated[int, doc("Answers to what had been answered before.", "datagrams")]
    not_increasing: Annotated[
        int,
        doc("Answers whose number another one had, or that was not above one known when it was asked.", "datagrams"),
    ]
    reordered: Annotated[
        int, doc("Answers that one to a later datagram has overtaken: the network does that.", "datagrams")
    ]
    longest_gap_ms: Annotated[float, doc("The longest time between two answers, so with the cut cable.", "ms")]


class Stranger(Record, kw_only=True):
    """Somebody without a certificate of ours who has tried to send something to the destination (`demo --tls`)."""

    how: Annotated[str, doc("How it connected.")]
    let_in: Annotated[bool, doc("Whether it was not refused.")]
    said: Annotated[str, doc("What it made of that.")]


class DemoTls(Record, kw_only=True):
    """What was seen of TLS (`demo --tls`, `--lab`)."""

    strangers: Annotated[list[Stranger], doc("Who was to be refused.")]
    connections: Annotated[
        int | None, doc("That a relay between both sides has carried; null: there was none.", "connections")
    ] = None
    ciphertext: Annotated[int | None, doc("In encrypted records of TLS.", "bytes")] = None
    opening: Annotated[int | None, doc("In records of TLS that open a connection or end one.", "bytes")] = None
    readable: Annotated[int | None, doc("All the rest: in clear.", "bytes")] = None


class DemoMove(Record, kw_only=True):
    """A move of `demo --machine qemu`: by postcopy, or by QEMU's own postcopy."""

    status: Annotated[
        str, doc("How it ended, as `status` of a migration; `postcopy-paused`: QEMU's own was cut, and waits.")
    ]
    stop_to_run_ms: Annotated[
        float, doc("From QEMU's event STOP at the source to RESUME at the destination, by QEMU's clock.", "ms")
    ]
    total_ms: Annotated[float | None, doc("From the pause until every page had arrived.", "ms")] = None
    fault_p50_us: Annotated[
        float | None, doc("Not exceeded by 50 % of the faults, read to placed; QEMU's own by its trace.", "us")
    ] = None
    fault_p99_us: Annotated[float | None, doc("Not exceeded by 99 % of them.", "us")] = None
    recovered: Annotated[int, doc("Cuts after which it went on by itself.", "cuts")] = 0
    passes: Annotated[int | None, doc("That the guest has made since; null: it did not answer.", "passes")] = None
    errors: Annotated[int | None, doc("Wrong pages that it has found.", "pages")] = None


class DemoQemu(Record, kw_only=True):
    """Both moves of `demo --machine qemu`: the same virtual machine, by postcopy and by QEMU's own postcopy."""

    version: Annotated[str, doc("Of QEMU.")]
    system: Annotated[str, doc("What the guest is, with its version.")]
    postcopy: Annotated[DemoMove, doc("The move by postcopy.")]
    own: Annotated[DemoMove, doc("The move by QEMU's own postcopy, with postcopy-preempt.")]


class DemoResult(Counted, kw_only=True):
    """The last line of `demo`: the numbers of the destination, with checks that need both sides, and both results."""

    side: Annotated[str, doc("Which command this is.", of="demo")]
    kind: Kind
    pager: Annotated[Pager | None, doc("Where the pager was.")] = None
    dump: Annotated[str | None, doc("The file that the memory was written to.")] = None
    verified: Annotated[bool | None, doc("Whether all that was verified held; null: it was not asked for.")]
    verification: Annotated[list[Check], doc("What was verified.")]
    chaos: Annotated[Chaos | None, doc("With `--chaos`.")] = None
    lab: Annotated[DemoLab | None, doc("With `--lab`.")] = None
    demo_tls: Annotated[DemoTls | None, doc("With `--tls`, and with `--lab` unless `--insecure`.")] = None
    pings: Annotated[Pings | None, doc("With `--lab --workload echo`.")] = None
    qemu: Annotated[DemoQemu | None, doc("With `--machine qemu`.")] = None
    source: Annotated[SourceResult | None, doc("The result of the source.")] = None
    dest: Annotated[DestResult | None, doc("The result of the destination.")] = None


class DoubtfulRange(Record, kw_only=True):
    """Pages of which it is not known which host has had them last."""

    block: Annotated[str, doc("Name of the memory block.")]
    first_page: Annotated[int, doc("Number of the first page in the block.", "pages")]
    pages: Annotated[int, doc("How many.", "pages")]
    page_bytes: Annotated[int, doc("Size of a page.", "bytes")]


class MergeResult(Record, kw_only=True):
    """The last line of `merge`."""

    side: Annotated[str, doc("Which command this is.", of="merge")]
    migration_id: MigrationId
    image: Annotated[str | None, doc("The file that was made; null: a directory was.")]
    directory: Annotated[str | None, doc("The directory that was made; null: a file was.")]
    from_dest: Annotated[int, doc("Memory of the destination's salvage.", "bytes")]
    from_source: Annotated[int, doc("Memory of the source's salvage.", "bytes")]
    in_doubt: Annotated[int, doc("Memory in the ranges in doubt.", "bytes")]
    ranges_in_doubt: Annotated[list[DoubtfulRange], doc("Where this memory is: the first 10000 of them.")]
    torn: Annotated[bool, doc("Whether the machine ran on while the destination's pages were written.")]
    device_state: Annotated[
        bool, doc("Whether there is a state of the machine's devices, without which it cannot start.")
    ]


EVENTS: dict[str, tuple[type[Record], ...]] = {
    "listening": (ChaosListening,),
    "cut": (Cut,),
    "unreachable": (Unreachable,),
    "measurement": (Measurement,),
    "comparison": (Comparison,),
    "result": (DemoResult, ChaosResult, MergeResult),
}
"""The records that an event of these commands may have."""
