# SPDX-License-Identifier: Apache-2.0
"""What can be moved. Here is what an engine sees of any machine; the kinds that there are, and how one of them is made,
are in `postcopy.machines.kinds`, which the engine does not know."""

from __future__ import annotations

from postcopy.machines.base import (
    Activity,
    Adopt,
    BlockLayout,
    Check,
    Extent,
    Machine,
    MachineState,
    MachineStatistics,
    RamBlock,
    TellEarly,
    VcpuStatistics,
)

__all__ = [
    "Activity",
    "Adopt",
    "BlockLayout",
    "Check",
    "Extent",
    "Machine",
    "MachineState",
    "MachineStatistics",
    "RamBlock",
    "TellEarly",
    "VcpuStatistics",
]
