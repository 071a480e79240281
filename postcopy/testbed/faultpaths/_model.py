# SPDX-License-Identifier: Apache-2.0
"""What the core knows (operations), what is asked of it (cells) and what came out (results), as plain values.

The fields of each are the keys of `--json`, with hyphens, and so are those of the lines between runner and supervisor:
msgspec writes and reads both. Reports, expectations and comparisons therefore work on recorded runs as well. The order
of the words is that of the enums in postcopy/faultpaths.h.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from msgspec import UNSET, Struct, UnsetType

Json = dict[str, Any]


class Mode(StrEnum):
    """How the page is kept from the operation: `enum pc_fp_mode`."""

    MISSING = "missing"
    MINOR = "minor"
    WP = "wp"
    WP_ASYNC = "wp-async"
    USER_ONLY = "user-only"
    SIGBUS = "sigbus"
    POISON = "poison"
    RWP = "rwp"
    RWP_ASYNC = "rwp-async"


class Backing(StrEnum):
    """What memory it is: `enum pc_fp_backing`."""

    ANON = "anon"
    MEMFD = "memfd"
    MEMFD_PRIVATE = "memfd-private"
    HUGETLB = "hugetlb"
    GUEST_MEMFD = "guest-memfd"


class Outcome(StrEnum):
    """What became of the operation: `enum pc_fp_outcome`, which says what each means."""

    UNAVAILABLE = "unavailable"
    BLOCKED = "blocked"
    PASSED = "passed"
    REFUSED = "refused"
    SIGNALLED = "signalled"
    RETRIED = "retried"
    WRONG = "wrong"
    HUNG = "hung"
    CRASHED = "crashed"


class Flag(StrEnum):
    """Of an operation: `PC_FP_WRITES` and so on."""

    WRITES = "writes"
    """The page is where data goes; else it is where data comes from."""
    NEEDS_DIR = "needs-dir"
    NEEDS_KVM = "needs-kvm"
    NOFAULT = "nofault"
    """It must not fault: passing without an event is what is right."""


class Measure(StrEnum):
    """Extra runs of a cell, each in a child of its own."""

    SIGNAL = "signal"
    KILL = "kill"
    LOCKS = "locks"


LOCK_CALLS = ("mmap", "munmap", "mprotect", "fork", "register")
"""Whose latency is measured while the fault is pending; the order of the arrays in `struct pc_fp_result`."""

WAITS_IN = "handle_userfault"
"""The function of the kernel in which a thread waits for its page."""

EVENT_THREADS = ("none", "own", "other", "kernel", "process")
"""Whose fault it was: `enum pc_fp_thread`."""


class Operation(Struct, frozen=True, rename="kebab"):
    """One way for the kernel, or user code, to touch a page."""

    name: str
    group: str
    what: str
    modes: tuple[Mode, ...] = tuple(Mode)
    backings: tuple[Backing, ...] = tuple(Backing)
    flags: tuple[Flag, ...] = ()


class Cell(Struct, frozen=True, order=True, rename="kebab"):
    """One operation on one kind of page."""

    operation: str
    mode: Mode
    backing: Backing

    def __str__(self) -> str:
        return f"{self.operation} {self.mode} {self.backing}"


class Order(Struct, frozen=True, rename="kebab"):
    """A line to the runner: run this."""

    cell: Cell
    timeout_ms: int
    measure: tuple[Measure, ...] = ()
    direct_dir: str = ""
    hand_over: int = -1
    """The number of an inherited Unix socket over which the page is served from elsewhere (see `_remote`); -1: none."""


class SignalMeasure(Struct, frozen=True, rename="kebab"):
    """What a pending signal does to the blocked operation."""

    handler_before_page: bool
    """The handler ran while the page was still withheld."""
    events: int
    """Events read between signal and page: 0 is right, more are of a copy that is restarted."""
    cpu_us: float
    """Burned by the waiting thread between signal and page."""
    window_us: float
    """How long that was."""


class KillMeasure(Struct, frozen=True, rename="kebab"):
    """SIGKILL to the blocked process."""

    killed: bool
    reaped_us: float
    """From SIGKILL to reaped."""


class LockMeasure(Struct, frozen=True, rename="kebab"):
    """Median nanoseconds of one of `LOCK_CALLS` on another thread; 0 where it cannot be measured."""

    idle: int
    elsewhere: int
    """A fault is pending, the call works on another mapping."""
    same_mapping_idle: int
    """None is, the call works in the page's mapping."""
    same_mapping: int

    @property
    def ratios(self) -> tuple[float | None, float | None]:
        """Pending against idle, elsewhere and in the same mapping; None where one of the two was not measured."""
        return _ratio(self.elsewhere, self.idle), _ratio(self.same_mapping, self.same_mapping_idle)


def _ratio(busy: int, idle: int) -> float | None:
    return round(busy / idle, 2) if busy and idle else None


class RemoteMeasure(Struct, frozen=True, rename="kebab"):
    """How a page of another host came."""

    faults: int
    """Events that the destination's engine read."""
    requests: int
    """That reached the source: one, whatever the faults."""
    pages: int
    """That the source sent in answer."""
    cuts: int
    """Of the connection, while the operation waited."""
    held_us: float
    """How long the page was certainly not there: from the fault seen pending to the new connection. 0: no fault."""
    reconnect_us: float
    """From the network's return until both sides had their new connection."""

    def wrong(self, outcome: Outcome) -> str:
        """Empty when an operation that waited led to exactly one request at the source."""
        if outcome is not Outcome.BLOCKED or self.requests == 1:
            return ""
        return f"{self.requests} requests reached the source instead of one"


class Result(Struct, frozen=True, rename="kebab"):
    """What a cell's child saw."""

    outcome: Outcome
    error: str | None = None
    """errno of the operation, such as EFAULT."""
    signal: str | None = None
    """Such as SIGBUS."""
    signal_code: int = 0
    value: int = 0
    """What the system call returned."""
    events: int = 0
    events_repeated: int = 0
    """Of `events`, how many were for the same page again."""
    event_kind: int = 0
    event_flags: int = 0
    event_offset: int | None = None
    """From the page's start; None: no event."""
    event_thread: str = "none"
    """Of `EVENT_THREADS`."""
    written: bool = False
    """Write-protected pages: afterwards the kernel counts it as written."""
    state: str | None = None
    """Of the blocked thread, as in /proc/PID/stat: S waits interruptibly, D killably; None: it never blocked."""
    wchan: str | None = None
    waited_us: float = 0.0
    """From the event to the operation's return."""
    text: str = ""
    pending_signal: SignalMeasure | UnsetType = UNSET
    kill: KillMeasure | UnsetType = UNSET
    locks_ns: dict[str, LockMeasure] | UnsetType = UNSET
    """By `LOCK_CALLS`."""
    remote: RemoteMeasure | UnsetType = UNSET

    @property
    def brief(self) -> str:
        """The outcome with what belongs to it: ``refused EFAULT``."""
        more = {Outcome.REFUSED: self.error, Outcome.SIGNALLED: self.signal}.get(self.outcome)
        return f"{self.outcome} {more or ''}".strip()


class Verdict(StrEnum):
    """A result against its expectation."""

    AS_EXPECTED = "as expected"
    CHANGED = "changed"
    """Another outcome than expected."""
    NOT_EXPECTED = "not expected"
    """No expectation matches this cell."""
    NOT_AVAILABLE = "not available here"


@dataclass(frozen=True)
class Judged:
    """A cell, its result, and what was thought of it."""

    cell: Cell
    result: Result
    verdict: Verdict
    expected: str = ""
    """What the expectation says, in words; empty without one."""
    reason: str = ""
    """Why that is to be expected; for what is not available, why not."""
    difference: str = ""
    """For `Verdict.CHANGED`: what differs."""
    uncovered: bool = False
    """A place that cannot block on a page and should have: the operation failed, retried without waiting, or went on
    without the page."""


@dataclass(frozen=True)
class Run:
    """Everything one run of `postcopy faultpaths` found."""

    system: Json
    operations: tuple[Operation, ...]
    judged: tuple[Judged, ...]
    seconds: float = 0.0
    left_out: tuple[Cell, ...] = ()
    """Chosen, but not reached in the time of a default run."""
    expectations: Json = field(default_factory=dict)
    remote: Json | None = None
    """With `--remote`: what the path to the other host did."""
    run: Json | None = None
    """Where and when (`postcopy.records.results.Run`); None in a report of a version that did not tell."""

    @property
    def good(self) -> bool:
        """Nothing changed, nothing unexpected."""
        return all(item.verdict in (Verdict.AS_EXPECTED, Verdict.NOT_AVAILABLE) for item in self.judged)
