# SPDX-License-Identifier: Apache-2.0
"""The rv64 machine: the kvm machine's devices, memory and workloads under an interpreter of RISC-V (docs/machines.md).

It needs no /dev/kvm and no rights: missing memory is touched by user-mode code only, so that any user's userfaultfd can
stop its harts. And it is deterministic: `run_until` stops at an exact instruction, and a machine of one vcpu is then
the same to the bit, whether or not it was moved on the way.
"""

from __future__ import annotations

import errno
from typing import ClassVar

from postcopy._blocking import run_sync
from postcopy._native import ffi, lib
from postcopy.errors import ErrorLine, MigrationError, check
from postcopy.machines.toy.kvm import KvmMachine


class Rv64Machine(KvmMachine):
    """Made by `create` at the source, `for_destination` at the destination; options as for `KvmMachine`."""

    kind: ClassVar[str] = "rv64"
    kernel_faults: ClassVar[bool] = False
    engine: ClassVar[int] = lib.PC_ENGINE_RV64

    def instructions(self) -> list[int]:
        """Executed by each vcpu since its boot, wherever that was; exact when paused, a moment old while it runs."""
        machine = self._alive()
        count = ffi.new("uint64_t *")
        found = []
        for vcpu in range(self.vcpus):
            check(lib.pc_rv64_instructions(machine, vcpu, count), "reading the count of instructions")
            found.append(int(count[0]))
        return found

    async def run_until(self, instructions: int, timeout_s: float = 60.0) -> None:
        """From paused to paused: each vcpu runs until it has executed `instructions` since its boot, in all.
        `MigrationError` when the machine fails, or is not there in time: it is then paused where it was. Seen through
        when cancelled."""
        machine = self._alive()
        line = ErrorLine()
        timeout_ms = max(0, min(round(timeout_s * 1000), 3_600_000))

        def call() -> int:
            return int(lib.pc_rv64_run_until(machine, instructions, timeout_ms, line.buffer, line.size))

        result = await run_sync(call)
        if result in (-errno.ETIMEDOUT, -errno.EIO):
            raise MigrationError(f"running the machine: {line}")
        line.check(result, "running the machine")
