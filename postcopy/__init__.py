# SPDX-License-Identifier: Apache-2.0
"""Moves the memory of a running machine after the machine has moved.

The parts can be used alone: `postcopy.memory` and `postcopy.uffd` for memory that is filled on demand,
`postcopy.pager` and `postcopy.pageserver` for an engine that brings it over a network, `postcopy.migration` for a
machine as a whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._native import ffi as _ffi
from ._native import lib as _lib

if TYPE_CHECKING:
    from .memory import Memory
    from .uffd import Userfaultfd

# From the core, which CMake tells it: reading the metadata of an installed package costs two megabytes.
__version__ = _ffi.string(_lib.pc_version()).decode()

__all__ = ["Memory", "Userfaultfd", "__version__"]


def __getattr__(name: str) -> Any:
    # When asked for: a command that only prints its version needs neither Trio nor the rest.
    if name == "Memory":
        from .memory import Memory

        return Memory
    if name == "Userfaultfd":
        from .uffd import Userfaultfd

        return Userfaultfd
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
