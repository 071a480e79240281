# SPDX-License-Identifier: Apache-2.0
"""A laboratory: hosts as network namespaces, joined by cables and a switch, on one machine.

Each host is a network namespace with a bridge ``br0``, which has the host's addresses, and on it a port ``eth0``: the
cable, a veth pair whose other end is a port, named like the host, of the bridge ``switch`` in a namespace of its own.
The network of the machine itself is not touched: nothing of the laboratory is ever in it.

`Lab` and `Host` block; `open_lab` is for Trio. `command` is ``postcopy lab``; see docs/lab.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from postcopy.testbed.lab._lab import Host, Lab, down, names
    from postcopy.testbed.lab._plan import MAX_RATE, HostPlan, LabPlan, format_rate, parse_rate
    from postcopy.testbed.lab._trio import open_lab

__all__ = ["MAX_RATE", "Host", "HostPlan", "Lab", "LabPlan", "down", "format_rate", "names", "open_lab", "parse_rate"]

_WHERE = {"open_lab": "_trio"} | dict.fromkeys(
    ("MAX_RATE", "HostPlan", "LabPlan", "format_rate", "parse_rate"), "_plan"
)


def __getattr__(name: str) -> Any:
    # Only when asked for: the holder, which stays for long, is a module of this package and needs none of it.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f".{_WHERE.get(name, '_lab')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
