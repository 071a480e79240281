# SPDX-License-Identifier: Apache-2.0
"""Moves the memory of a running machine after the machine has moved.

The parts can be used alone: `postcopy.memory` and `postcopy.uffd` for memory that is filled on demand,
`postcopy.pager` and `postcopy.pageserver` for an engine that brings it over a network, `postcopy.migration` for a
machine as a whole. `attach`, `serve` and `attach_source` (`postcopy.lazy`) are lazily mapped memory for Python.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from postcopy.lazy import LazyMemory, PageSource, SourceBlock, attach, attach_source, serve

try:
    __version__ = version("postcopy")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "unknown"

__all__ = ["LazyMemory", "PageSource", "SourceBlock", "__version__", "attach", "attach_source", "serve"]


def __getattr__(name: str) -> Any:
    # Only when asked for: a command that needs none of it should not pay for the import.
    if name in __all__:
        from postcopy import lazy

        return getattr(lazy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
