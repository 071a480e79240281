# SPDX-License-Identifier: Apache-2.0
"""A real, unmodified QEMU for tests and measurements: `check` looks for its binary, `Qemu` runs one, with a guest of
ours (`guest_path`, csrc/machine/guest/vmm.c) that checks its own memory and says so on the serial port.

Everything here blocks, and knows nothing of the machine `qemu`: what is tested is driven by other code than its own.
From Trio call it in a worker thread. A `Qemu` owns its process and its directory, until `close`.
"""

from __future__ import annotations

from postcopy.testbed._guest import GuestLine, lines_of
from postcopy.testbed.qemu._find import QEMU, check, guest_path
from postcopy.testbed.qemu._process import Monitor, MonitorClosed, Qemu, QmpError, command_line

__all__ = [
    "QEMU",
    "GuestLine",
    "Monitor",
    "MonitorClosed",
    "Qemu",
    "QmpError",
    "check",
    "command_line",
    "guest_path",
    "lines_of",
]
