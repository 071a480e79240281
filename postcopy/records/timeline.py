# SPDX-License-Identifier: Apache-2.0
"""One migration, or one virtual machine of a pager, over time: what `--json` and `--report` record, written once, at
its end.

Columns, not rows: each list of `series` has a value for each of `at_ms`. Two sides are put on one time by `origin`: on
one host exactly, by `monotonic_ns`; on two hosts as exactly as their wall clocks agree, by `unix_ms`. Less than 200 KiB
of JSON, whatever the size of the machine and however long it took: the longer, the further apart the columns.
"""

from __future__ import annotations

from typing import Annotated, Final

from postcopy.records._base import Record, doc
from postcopy.records.migration import Counted, Kind, Name
from postcopy.records.pager import Vm, VmName

COLUMNS: Final = 360
"""So many at most."""
BINS: Final = 128
"""Of the residency map, at most."""
FAULTS: Final = 1000
"""In the sample, at most."""
MARKS: Final = 100
DIGITS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
"""Of a residency map: A: nothing of it is there, /: all of it, the others between, in 62 equal steps."""


_DIGITS_OF = DIGITS.encode() + bytes(256 - len(DIGITS))


def residency_text(bins: bytes) -> str:
    """Bins from 0 to 63 as a text."""
    return bins.translate(_DIGITS_OF).decode()


class Origin(Record, kw_only=True):
    """When the time of a recording is 0."""

    unix_ms: Annotated[float, doc("By the wall clock of this host, since the beginning of 1970, UTC.", "ms")]
    monotonic_ns: Annotated[
        int, doc("By CLOCK_MONOTONIC of this host: the same for all processes of one host since it was booted.", "ns")
    ]


class Block(Record, kw_only=True):
    """A block of the machine's memory."""

    name: Annotated[str, doc("Of the block.")]
    bytes: Annotated[int, doc("Its size.", "bytes")]
    page_size: Annotated[int, doc("Its unit of transfer.", "bytes")]


_KIND = "Cumulative count of pages"


class Series(Record):
    """What was counted, a value for each of `at-ms`. What this side does not count is not there. Counts of pages and
    bytes are of the time from the beginning until that moment; their last values are those of the result."""

    demand: Annotated[
        list[int] | None, doc(f"{_KIND}: placed in answer to a request; at the source: requests answered.", "pages")
    ] = None
    background: Annotated[
        list[int] | None,
        doc(f"{_KIND}: placed (source: sent) without a request, since the machine is the destination's.", "pages"),
    ] = None
    precopied: Annotated[
        list[int] | None,
        doc(f"{_KIND}: the same, before that; what had changed and came again counts again. With `background` it is the"
            " result's `background-pages`.", "pages"),
    ] = None  # fmt: skip
    zero: Annotated[
        list[int] | None,
        doc(f"{_KIND}: known to be zero, and never sent as content. May fall in precopy, when they are written.",
            "pages"),
    ] = None  # fmt: skip
    prefetched: Annotated[
        list[int] | None,
        doc(f"{_KIND}: placed before a fault asked for them, since they were expected to be.", "pages"),
    ] = None
    hits: Annotated[
        list[int] | None,
        doc(f"{_KIND}: requested before a fault asked, and then reached by a thread, as far as it is known.", "pages"),
    ] = None
    duplicate: Annotated[list[int] | None, doc(f"{_KIND}: arrived again, and dropped.", "pages")] = None
    received_bytes: Annotated[list[int] | None, doc("On data channels, headers included.", "bytes")] = None
    sent_bytes: Annotated[list[int] | None, doc("On data channels, headers included.", "bytes")] = None
    released_bytes: Annotated[list[int] | None, doc("Source: memory given back to its host.", "bytes")] = None
    faults_waiting: Annotated[
        list[int] | None, doc("Threads that wait for a page: the most since the column before.", "threads")
    ] = None
    guest_operations: Annotated[
        list[int] | None, doc("Of the guest, on both hosts together: the count moves with the machine.", "operations")
    ] = None
    blocked_us: Annotated[
        list[int] | None, doc("How long all vCPUs together have waited for pages, since it runs here.", "us")
    ] = None


class Residency(Record, kw_only=True):
    """Which parts of the memory were there, and when."""

    bins: Annotated[int, doc("Parts of equal size, in the order of the blocks.", "bins")]
    columns: Annotated[
        list[str],
        doc("A text for each of `at-ms`, a character for each bin, a digit of base64: A: nothing of it is there, /: all"
            " of it; the others are 62 equal steps between. Above 2 GiB of memory each bin is an even sample of its"
            " pages."),
    ]  # fmt: skip


class Faults(Record, kw_only=True):
    """A sample of demand faults, in columns."""

    every: Annotated[int, doc("One of so many is in it, a power of two.", "faults")]
    at_ms: Annotated[list[float], doc("When its event was read.", "ms")]
    page: Annotated[list[float], doc("Where: 0 is the beginning of the memory, 1 its end.")]
    sent_us: Annotated[
        list[float | None],
        doc("From the event read until its request was sent; null, as in the next two: its page did not come in answer"
            " to a request of this fault.", "us"),
    ]  # fmt: skip
    received_us: Annotated[list[float | None], doc("From there until the page had arrived.", "us")]
    placed_us: Annotated[list[float | None], doc("From there until its thread was woken.", "us")]
    total_us: Annotated[list[float], doc("From the event read until its thread was woken.", "us")]


class Distribution(Record, kw_only=True):
    """A histogram of latencies, without its empty buckets."""

    count: Annotated[int, doc("All of them.", "faults")]
    sum_ns: Annotated[int, doc("Of all of them, exactly.", "ns")]
    max_ns: Annotated[int, doc("The longest, exactly.", "ns")]
    bucket_edges_ns: Annotated[
        list[int],
        doc("The highest value of each bucket that has any. A bucket is 3 % wide; wider where there are more than 400.",
            "ns"),
    ]  # fmt: skip
    bucket_counts: Annotated[list[int], doc("How many are in it.", "faults")]


class Stages(Record, kw_only=True):
    """How long demand faults took, by stage. Exact: all of them are in it."""

    until_sent: Annotated[Distribution, doc("From the event read until the request was sent.")]
    until_received: Annotated[Distribution, doc("From there until the page had arrived.")]
    until_placed: Annotated[Distribution, doc("From there until the thread was woken.")]
    whole: Annotated[Distribution, doc("From the event read until the thread was woken, of all faults.")]


class Mark(Record, kw_only=True):
    """Something that happened at one moment."""

    moment_ms: Annotated[float, doc("When.", "ms")]
    what: Annotated[
        str,
        doc("offer: the migration has begun. round: of precopy. pause: the machine is asked to stop. switchover: the"
            " destination has its state to load. prepared: it has been loaded. commit: the machine is the"
            " destination's. running: it runs there. lost: the connection is. recovered: all channels are there again."
            " pager-died: the pager's process has, and another one has taken over."
            " all-there: the last page has arrived. ended: the migration has.",
            of="offer|round|pause|switchover|prepared|commit|running|lost|recovered|pager-died|all-there|ended"),
    ]  # fmt: skip
    text: Annotated[str | None, doc("More about it, for a person.")] = None


class Recording(Record, kw_only=True):
    """What was recorded. All times are counted from `origin`."""

    origin: Annotated[Origin, doc("When that is.")]
    period_ms: Annotated[
        float,
        doc("How far apart the columns at the end are while something happens; a part before may be coarser or finer"
            " (`at-ms` says it), and columns while nothing happens are further apart.", "ms"),
    ]  # fmt: skip
    cost_us: Annotated[int, doc("Processor time that recording it has taken.", "us")]
    blocks: Annotated[list[Block], doc("The memory, in order.")]
    at_ms: Annotated[list[float], doc("When each column was taken.", "ms")]
    series: Annotated[Series, doc("What was counted.")]
    map: Annotated[Residency, doc("Which parts of the memory were there (source: sent).")]
    fault_sample: Annotated[Faults | None, doc("Destination: a sample of the faults.")] = None
    latency: Annotated[Stages | None, doc("Destination: the latencies of all faults.")] = None
    marks: Annotated[list[Mark], doc("What happened, in order.")]


_Recorded = Annotated[Recording, doc("How all of it came about, over time.")]


class Timeline(Counted, kw_only=True):
    """One migration as one side has seen it, a recovered one as a whole; with what was counted, so that it needs no
    other line. Written where `--json` or `--report` is given, before the migration's end is. One that is begun again
    has a line for each attempt that got as far as its data connections, written when that has ended."""

    machine: Name
    kind: Kind
    recording: _Recorded


class VmTimeline(Record, kw_only=True):
    """One virtual machine as the pager has seen it; from the takeover on where an earlier process served it."""

    side: Annotated[str, doc("Which command this is.", of="pager")]
    vm: VmName
    figures: Annotated[Vm, doc("What was counted.")]
    recording: _Recorded
