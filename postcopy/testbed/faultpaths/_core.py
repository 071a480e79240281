# SPDX-License-Identifier: Apache-2.0
"""The C half (csrc/faultpaths) in terms of `_model`: which operations there are, and one cell run.

`run` forks: only a process that has one thread calls it, the runner or one of `probe`'s trials.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
from typing import Any

from msgspec import UNSET

from postcopy._native import ffi, lib
from postcopy.errors import CoreError, c_text, check
from postcopy.testbed.faultpaths._model import (
    EVENT_THREADS,
    LOCK_CALLS,
    Backing,
    Flag,
    KillMeasure,
    LockMeasure,
    Measure,
    Mode,
    Operation,
    Order,
    Outcome,
    Result,
    SignalMeasure,
)

HOLD_US = 3000
"""How long a page is withheld, so that the state of the blocked thread can be read."""

TEST_OPERATIONS = {f"test.{name}": getattr(lib, f"PC_FP_TEST_{name.upper()}") for name in ("hang", "crash", "wrong")}
"""Not in `operations`: for tests of the machinery."""
_MEASURES = {measure: getattr(lib, f"PC_FP_MEASURE_{measure.name}") for measure in Measure}
_FLAGS = {getattr(lib, f"PC_FP_{flag.name}"): flag for flag in Flag}
_MODES, _BACKINGS, _OUTCOMES = tuple(Mode), tuple(Backing), tuple(Outcome)
_ERRORS = {133: "EHWPOISON", **errno.errorcode}  # Python does not know that one everywhere


@functools.cache
def operations() -> tuple[Operation, ...]:
    """All that the core knows, in its order."""
    found = []
    struct: Any = ffi.new("struct pc_faultpath *")
    for index in range(lib.pc_faultpath_count()):
        check(lib.pc_faultpath_get(index, struct), f"reading operation {index}")
        found.append(
            Operation(
                c_text(struct.name),
                c_text(struct.group),
                c_text(struct.what),
                tuple(mode for bit, mode in enumerate(Mode) if struct.modes >> bit & 1),
                tuple(backing for bit, backing in enumerate(Backing) if struct.backings >> bit & 1),
                tuple(flag for bit, flag in _FLAGS.items() if struct.flags & bit),
            )
        )
    return tuple(found)


@functools.cache
def _numbers() -> dict[str, int]:
    return {operation.name: index for index, operation in enumerate(operations())} | TEST_OPERATIONS


def content(size_bytes: int) -> bytes:
    """What every page holds once it is given."""
    page = ffi.new("uint8_t[]", size_bytes)
    lib.pc_fp_content(page, size_bytes)
    return bytes(ffi.buffer(page, size_bytes))


def run(order: Order) -> Result:
    """One cell, in children of its own. Blocks up to `timeout_ms` for each of them. A failure of the machinery itself
    (no fork, no memory) is a result too: the next cell may fare better."""
    cell = order.cell
    spec: Any = ffi.new("struct pc_fp_spec *")
    spec.operation = _numbers()[cell.operation]
    spec.mode, spec.backing = _MODES.index(cell.mode), _BACKINGS.index(cell.backing)
    spec.measure = sum(_MEASURES[measure] for measure in order.measure)
    spec.hold_us, spec.timeout_ms, spec.hand_over_fd = HOLD_US, order.timeout_ms, order.hand_over
    spec.direct_dir = os.fsencode(order.direct_dir)
    result: Any = ffi.new("struct pc_fp_result *")
    try:
        check(lib.pc_faultpath_run(spec, result), f"running {cell}")
    except CoreError as error:
        return Result(Outcome.CRASHED, _error(error.errno or 0), text=str(error))
    return Result(
        outcome=_OUTCOMES[result.outcome],
        error=_error(result.error),
        signal=_signal(result.signal_number),
        signal_code=result.signal_code,
        value=result.value,
        events=result.events,
        events_repeated=result.repeated,
        event_kind=result.event_kind,
        event_flags=result.event_flags,
        event_offset=None if result.event_offset < 0 else result.event_offset,
        event_thread=EVENT_THREADS[result.event_thread],
        written=bool(result.written),
        state=None if result.state == b"\0" else result.state.decode(errors="replace"),
        wchan=c_text(result.wchan) or None,
        waited_us=_us(result.waited_ns),
        text=c_text(result.text),
        pending_signal=SignalMeasure(
            bool(result.handler_before_page),
            result.signal_events,
            _us(result.signal_cpu_ns),
            _us(result.signal_window_ns),
        )
        if result.signal_measured
        else UNSET,
        kill=KillMeasure(bool(result.killed), _us(result.kill_ns)) if result.kill_measured else UNSET,
        locks_ns={
            call: LockMeasure(
                result.lock_idle_ns[number],
                result.lock_elsewhere_ns[number],
                result.lock_idle_same_ns[number],
                result.lock_same_ns[number],
            )
            for number, call in enumerate(LOCK_CALLS)
        }
        if result.locks_measured
        else UNSET,
    )


def _us(ns: int) -> float:
    return round(ns / 1e3, 1)


def _error(number: int) -> str | None:
    return _ERRORS.get(number, str(number)) if number else None


def _signal(number: int) -> str | None:
    try:
        return signal.Signals(number).name if number else None
    except ValueError:
        return f"signal {number}"
