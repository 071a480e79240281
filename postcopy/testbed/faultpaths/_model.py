# SPDX-License-Identifier: Apache-2.0
"""What the core knows (operations), what is asked of it (cells) and what came out (results), as plain values.

Everything here can be made from JSON as well, so that reports, expectations and comparisons work on recorded runs. The
words are those of `--json`; their order is that of the enums in postcopy/faultpaths.h.
"""

from __future__ import annotations

import errno
import signal
from dataclasses import dataclass, field, fields
from enum import IntFlag, StrEnum
from typing import Any

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


class Backing(StrEnum):
    """What memory it is: `enum pc_fp_backing`."""

    ANON = "anon"
    MEMFD = "memfd"
    MEMFD_PRIVATE = "memfd-private"
    HUGETLB = "hugetlb"


class Outcome(StrEnum):
    """What became of the operation: `enum pc_fp_outcome`, which says what each means."""

    UNAVAILABLE = "unavailable"
    BLOCKED = "blocked"
    PASSED = "passed"
    REFUSED = "refused"
    SIGNALLED = "signalled"
    SPUN = "spun"
    WRONG = "wrong"
    HUNG = "hung"
    CRASHED = "crashed"


class Flag(IntFlag):
    """Of an operation: `PC_FP_WRITES` and so on."""

    WRITES = 1
    """The page is where data goes; else it is where data comes from."""
    NEEDS_DIR = 2
    NEEDS_KVM = 4
    NOFAULT = 8
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

NO_FLAGS = Flag(0)
_ERROR_NAMES: dict[int, str] = {133: "EHWPOISON", **errno.errorcode}  # Python does not know that one everywhere
_ERROR_NUMBERS = {name: number for number, name in _ERROR_NAMES.items()}
MODES, BACKINGS, OUTCOMES = tuple(Mode), tuple(Backing), tuple(Outcome)


@dataclass(frozen=True)
class Operation:
    """One way for the kernel, or user code, to touch a page."""

    name: str
    group: str
    what: str
    modes: tuple[Mode, ...] = MODES
    backings: tuple[Backing, ...] = BACKINGS
    flags: Flag = NO_FLAGS
    index: int = -1
    """Its number in the core that listed it."""

    def as_json(self) -> Json:
        return {
            "name": self.name,
            "group": self.group,
            "what": self.what,
            "modes": list(self.modes),
            "backings": list(self.backings),
            "flags": flag_names(self.flags),
        }

    @classmethod
    def from_json(cls, value: Json) -> Operation:
        return cls(
            value["name"],
            value["group"],
            value["what"],
            tuple(Mode(mode) for mode in value["modes"]),
            tuple(Backing(backing) for backing in value["backings"]),
            flags_of(value["flags"]),
        )


def flag_names(flags: Flag) -> list[str]:
    return [str(flag.name).lower().replace("_", "-") for flag in Flag if flag in flags]


def flags_of(names: list[str]) -> Flag:
    flags = NO_FLAGS
    for name in names:
        flags |= Flag[name.upper().replace("-", "_")]
    return flags


@dataclass(frozen=True, order=True)
class Cell:
    """One operation on one kind of page."""

    operation: str
    mode: Mode
    backing: Backing

    def __str__(self) -> str:
        return f"{self.operation} {self.mode} {self.backing}"


@dataclass(frozen=True)
class SignalMeasure:
    """What a pending signal does to the blocked operation."""

    handler_before_page: bool
    """The handler ran while the page was still withheld."""
    events: int
    """Events read between signal and page: 0 is right, more are of a copy that is restarted."""
    cpu_ns: int
    """Burned by the waiting thread between signal and page."""
    window_ns: int
    """How long that was."""


@dataclass(frozen=True)
class KillMeasure:
    """SIGKILL to the blocked process."""

    killed: bool
    ns: int
    """From SIGKILL to reaped."""


@dataclass(frozen=True)
class LockMeasure:
    """Median nanoseconds of `LOCK_CALLS` on another thread; 0 where it cannot be measured."""

    idle_ns: tuple[int, ...]
    elsewhere_ns: tuple[int, ...]
    """A fault is pending, the call works on another mapping."""
    idle_same_ns: tuple[int, ...]
    """None is, the call works in the page's mapping."""
    same_ns: tuple[int, ...]

    def ratios(self) -> tuple[list[float | None], list[float | None]]:
        """Pending against idle, elsewhere and in the same mapping, in the order of `LOCK_CALLS`; None where one of the
        two was not measured."""
        pairs = ((self.elsewhere_ns, self.idle_ns), (self.same_ns, self.idle_same_ns))
        first, second = (
            [round(busy / idle, 2) if busy and idle else None for busy, idle in zip(*pair, strict=True)]
            for pair in pairs
        )
        return first, second


@dataclass(frozen=True)
class RemoteMeasure:
    """How a page of another host came."""

    faults: int
    """Events that the destination's engine read."""
    requests: int
    """That reached the source: one, whatever the faults."""
    pages: int
    """That the source sent in answer."""
    cuts: int
    """Of the connection, while the operation waited."""
    held_ns: int
    """How long the page was certainly not there: from the fault seen pending to the new connection. 0: no fault."""
    reconnect_ns: int
    """From the network's return until both sides had their new connection."""

    def wrong(self, outcome: Outcome) -> str:
        """Empty when an operation that waited led to exactly one request at the source."""
        if outcome is not Outcome.BLOCKED or self.requests == 1:
            return ""
        return f"{self.requests} requests reached the source instead of one"


@dataclass(frozen=True)
class Result:
    """What a cell's child saw."""

    outcome: Outcome
    text: str = ""
    error: int = 0
    """errno of the operation."""
    signal_number: int = 0
    signal_code: int = 0
    value: int = 0
    """What the system call returned."""
    events: int = 0
    repeated: int = 0
    """Of `events`, how many were for the same page again."""
    event_kind: int = 0
    event_flags: int = 0
    event_offset: int = -1
    """From the page's start; -1: no event."""
    event_thread: str = "none"
    """Of `EVENT_THREADS`."""
    written: bool = False
    """Write-protected pages: afterwards the kernel counts it as written."""
    state: str = ""
    """Of the blocked thread, as in /proc/PID/stat: S waits interruptibly, D killably; empty: it never blocked."""
    wchan: str = ""
    waited_ns: int = 0
    """From the event to the operation's return."""
    signal: SignalMeasure | None = None
    kill: KillMeasure | None = None
    locks: LockMeasure | None = None
    remote: RemoteMeasure | None = None

    @property
    def error_name(self) -> str:
        """Such as EFAULT; empty when there is none."""
        return _ERROR_NAMES.get(self.error, str(self.error)) if self.error else ""

    @property
    def signal_name(self) -> str:
        """Such as SIGBUS; empty when there is none."""
        if not self.signal_number:
            return ""
        try:
            return signal.Signals(self.signal_number).name
        except ValueError:
            return f"signal {self.signal_number}"

    @property
    def brief(self) -> str:
        """The outcome with what belongs to it: ``refused EFAULT``."""
        more = {Outcome.REFUSED: self.error_name, Outcome.SIGNALLED: self.signal_name}.get(self.outcome, "")
        return f"{self.outcome} {more}".strip()

    def as_json(self) -> Json:
        answer: Json = {
            "outcome": self.outcome.value,
            "error": self.error_name or None,
            "signal": self.signal_name or None,
            "signal-code": self.signal_code,
            "value": self.value,
            "events": self.events,
            "events-repeated": self.repeated,
            "event-kind": self.event_kind,
            "event-flags": self.event_flags,
            "event-offset": None if self.event_offset < 0 else self.event_offset,
            "event-thread": self.event_thread,
            "written": self.written,
            "state": self.state or None,
            "wchan": self.wchan or None,
            "waited-us": round(self.waited_ns / 1e3, 1),
            "text": self.text,
        }
        if self.signal is not None:
            answer["pending-signal"] = {
                "handler-before-page": self.signal.handler_before_page,
                "events": self.signal.events,
                "cpu-us": round(self.signal.cpu_ns / 1e3, 1),
                "window-us": round(self.signal.window_ns / 1e3, 1),
            }
        if self.kill is not None:
            answer["kill"] = {"killed": self.kill.killed, "reaped-us": round(self.kill.ns / 1e3, 1)}
        if self.locks is not None:
            answer["locks-ns"] = {
                call: dict(zip(_LOCK_KEYS, values, strict=True))
                for call, *values in zip(LOCK_CALLS, *vars(self.locks).values(), strict=True)
            }
        if self.remote is not None:
            answer["remote"] = {
                "faults": self.remote.faults,
                "requests": self.remote.requests,
                "pages": self.remote.pages,
                "cuts": self.remote.cuts,
                "held-us": round(self.remote.held_ns / 1e3, 1),
                "reconnect-us": round(self.remote.reconnect_ns / 1e3, 1),
            }
        return answer

    @classmethod
    def from_json(cls, value: Json) -> Result:
        """What `as_json` wrote. KeyError, ValueError or TypeError when it did not."""
        storm, kill, locks = value.get("pending-signal"), value.get("kill"), value.get("locks-ns")
        remote = value.get("remote")
        offset = value["event-offset"]
        return cls(
            Outcome(value["outcome"]),
            str(value["text"]),
            _number_of_error(value["error"]),
            _number_of_signal(value["signal"]),
            int(value["signal-code"]),
            int(value["value"]),
            int(value["events"]),
            int(value["events-repeated"]),
            int(value["event-kind"]),
            int(value["event-flags"]),
            -1 if offset is None else int(offset),
            str(value["event-thread"]),
            bool(value["written"]),
            value["state"] or "",
            value["wchan"] or "",
            round(value["waited-us"] * 1e3),
            storm
            and SignalMeasure(
                storm["handler-before-page"],
                storm["events"],
                round(storm["cpu-us"] * 1e3),
                round(storm["window-us"] * 1e3),
            ),
            kill and KillMeasure(kill["killed"], round(kill["reaped-us"] * 1e3)),
            locks and LockMeasure(*(tuple(locks[call][key] for call in LOCK_CALLS) for key in _LOCK_KEYS)),
            remote
            and RemoteMeasure(
                remote["faults"],
                remote["requests"],
                remote["pages"],
                remote["cuts"],
                round(remote["held-us"] * 1e3),
                round(remote["reconnect-us"] * 1e3),
            ),
        )

    def as_wire(self) -> Json:
        """Exactly what is in it, for the runner's line."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _NESTED} | {
            name: vars(part) for name in _NESTED if (part := getattr(self, name)) is not None
        }

    @classmethod
    def from_wire(cls, value: Json) -> Result:
        """What `as_wire` made, after JSON."""
        made = dict(value)
        made["outcome"] = Outcome(made["outcome"])
        for name, kind in _NESTED.items():
            if name in made:
                made[name] = kind(**{key: tuple(x) if isinstance(x, list) else x for key, x in made[name].items()})
        return cls(**made)


_LOCK_KEYS = ("idle", "elsewhere", "same-mapping-idle", "same-mapping")  # in the order of `LockMeasure`
_NESTED: dict[str, type[Any]] = {
    "signal": SignalMeasure,
    "kill": KillMeasure,
    "locks": LockMeasure,
    "remote": RemoteMeasure,
}


def _number_of_error(name: str | None) -> int:
    if name is None:
        return 0
    return int(name) if name.isdigit() else _ERROR_NUMBERS[name]


def _number_of_signal(name: str | None) -> int:
    if name is None:
        return 0
    return int(name.removeprefix("signal ")) if name.startswith("signal ") else int(signal.Signals[name])


class Verdict(StrEnum):
    """A result against its expectation."""

    AS_EXPECTED = "as expected"
    CHANGED = "changed"
    """Another outcome than expected."""
    NOT_EXPECTED = "not expected"
    """Nothing is known of this cell: no expectation matches."""
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
    """A place that cannot block on a page and should have: the operation failed, spun or went on without it."""


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

    @property
    def good(self) -> bool:
        """Nothing changed, nothing unexpected."""
        return all(item.verdict in (Verdict.AS_EXPECTED, Verdict.NOT_AVAILABLE) for item in self.judged)
