# SPDX-License-Identifier: Apache-2.0
"""Moves the memory of a running machine after the machine has moved.

The parts can be used alone: `postcopy.memory` and `postcopy.uffd` for memory that is filled on demand,
`postcopy.pager` and `postcopy.pageserver` for an engine that brings it over a network, `postcopy.migration` for a
machine as a whole.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("postcopy")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "unknown"

__all__ = ["__version__"]
