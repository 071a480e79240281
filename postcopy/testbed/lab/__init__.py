# SPDX-License-Identifier: Apache-2.0
"""A laboratory: hosts as network namespaces, joined by cables and a switch, on one machine.

Each host is a network namespace with a bridge ``br0``, which has the host's addresses, and on it a port ``eth0``: the
cable, a veth pair whose other end is a port, named like the host, of the bridge ``switch`` in a namespace of its own.
The network of the machine itself is not touched: nothing of the laboratory is ever in it.

`Lab` and `Host` block, `open_lab` is for Trio, `LabPlan` is what they are made from. `command` is ``postcopy lab``; see
docs/lab.md. Names are imported when they are first used: the holder, which stays for long, needs little.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from postcopy.testbed.lab._lab import Host, Lab, open_lab
    from postcopy.testbed.lab._plan import LabPlan

__all__ = ["Host", "Lab", "LabPlan", "open_lab"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("._plan" if name == "LabPlan" else "._lab", __name__), name)
