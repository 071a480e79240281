# SPDX-License-Identifier: Apache-2.0
"""The C half (csrc/faultpaths) in terms of `_model`: which operations there are, and one cell run.

`run` forks; it is called from the runner process only, which has one thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from postcopy._native import ffi, lib
from postcopy.errors import CoreError, c_text, check
from postcopy.testbed.faultpaths._model import (
    BACKINGS,
    EVENT_THREADS,
    MODES,
    NO_FLAGS,
    OUTCOMES,
    Backing,
    Cell,
    Flag,
    KillMeasure,
    LockMeasure,
    Measure,
    Mode,
    Operation,
    Outcome,
    Result,
    SignalMeasure,
)

HOLD_US = 3000
"""How long a page is withheld, so that the state of the blocked thread can be read."""

_MEASURES = {
    Measure.SIGNAL: lib.PC_FP_MEASURE_SIGNAL,
    Measure.KILL: lib.PC_FP_MEASURE_KILL,
    Measure.LOCKS: lib.PC_FP_MEASURE_LOCKS,
}
_FLAGS = {
    lib.PC_FP_WRITES: Flag.WRITES,
    lib.PC_FP_NEEDS_DIR: Flag.NEEDS_DIR,
    lib.PC_FP_NEEDS_KVM: Flag.NEEDS_KVM,
    lib.PC_FP_NOFAULT: Flag.NOFAULT,
}


def operations() -> tuple[Operation, ...]:
    """All that the core knows, in its order."""
    found = []
    struct: Any = ffi.new("struct pc_faultpath *")
    for index in range(lib.pc_faultpath_count()):
        check(lib.pc_faultpath_get(index, struct), f"reading operation {index}")
        flags = NO_FLAGS
        for bit, flag in _FLAGS.items():
            if struct.flags & bit:
                flags |= flag
        found.append(
            Operation(
                c_text(struct.name),
                c_text(struct.group),
                c_text(struct.what),
                tuple(mode for bit, mode in enumerate(MODES) if struct.modes >> bit & 1),
                tuple(backing for bit, backing in enumerate(BACKINGS) if struct.backings >> bit & 1),
                flags,
                index,
            )
        )
    return tuple(found)


def content(size_bytes: int) -> bytes:
    """What every page holds once it is given."""
    page = ffi.new("uint8_t[]", size_bytes)
    lib.pc_fp_content(page, size_bytes)
    return bytes(ffi.buffer(page, size_bytes))


def run(
    operation: int,
    cell: Cell,
    measure: Iterable[Measure] = (),
    *,
    timeout_ms: int,
    direct_dir: str = "",
    hand_over_fd: int = -1,
    hold_us: int = HOLD_US,
) -> Result:
    """One cell, in children of its own. Blocks up to `timeout_ms` for each of them. A failure of the machinery itself
    (no fork, no memory) is a result too: the next cell may fare better."""
    spec: Any = ffi.new("struct pc_fp_spec *")
    spec.operation, spec.mode, spec.backing = operation, MODES.index(cell.mode), BACKINGS.index(cell.backing)
    spec.measure = 0
    for item in measure:
        spec.measure |= _MEASURES[item]
    spec.hold_us, spec.timeout_ms, spec.hand_over_fd = hold_us, timeout_ms, hand_over_fd
    spec.direct_dir = os.fsencode(direct_dir)
    result: Any = ffi.new("struct pc_fp_result *")
    try:
        check(lib.pc_faultpath_run(spec, result), f"running {cell}")
    except CoreError as error:
        return Result(Outcome.CRASHED, str(error), error.errno or 0)
    return Result(
        OUTCOMES[result.outcome],
        c_text(result.text),
        result.error,
        result.signal_number,
        result.signal_code,
        result.value,
        result.events,
        result.repeated,
        result.event_kind,
        result.event_flags,
        result.event_offset,
        EVENT_THREADS[result.event_thread],
        bool(result.written),
        "" if result.state == b"\0" else result.state.decode(errors="replace"),
        c_text(result.wchan),
        result.waited_ns,
        SignalMeasure(
            bool(result.handler_before_page), result.signal_events, result.signal_cpu_ns, result.signal_window_ns
        )
        if result.signal_measured
        else None,
        KillMeasure(bool(result.killed), result.kill_ns) if result.kill_measured else None,
        LockMeasure(
            tuple(result.lock_idle_ns),
            tuple(result.lock_elsewhere_ns),
            tuple(result.lock_idle_same_ns),
            tuple(result.lock_same_ns),
        )
        if result.locks_measured
        else None,
    )


def cell_of(order: dict[str, Any]) -> Cell:
    """The cell that a line to the runner names."""
    return Cell(order["operation"], Mode(order["mode"]), Backing(order["backing"]))
