# SPDX-License-Identifier: Apache-2.0
"""Moves the memory of a running machine after the machine has moved.

The parts can be used alone: `postcopy.memory` and `postcopy.uffd` for memory that is filled on demand,
`postcopy.dataplane` for an engine that brings it over a network, `postcopy.migration` for a machine as a whole.
`attach`, `serve` and `attach_source` (`postcopy.lazy`) are lazily mapped memory for Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from postcopy._native import ffi as _ffi
from postcopy._native import lib as _lib

if TYPE_CHECKING:
    from postcopy.lazy import LazyMemory, PageSource, SourceBlock, attach, attach_source, serve
    from postcopy.memory import Memory
    from postcopy.uffd import Userfaultfd

# From the core, which has it from CMake: reading the metadata of an installed package costs two megabytes.
__version__ = _ffi.string(_lib.pc_version()).decode()

__all__ = [
    "LazyMemory",
    "Memory",
    "PageSource",
    "SourceBlock",
    "Userfaultfd",
    "__version__",
    "attach",
    "attach_source",
    "serve",
]

_WHERE = {"Memory": "memory", "Userfaultfd": "uffd"}  # everything else is in `lazy`


def __getattr__(name: str) -> Any:
    # Only when asked for: a command that needs none of it should not pay for the import.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f".{_WHERE.get(name, 'lazy')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
