# SPDX-License-Identifier: Apache-2.0
"""Moves the memory of a running machine after the machine has moved.

The parts can be used alone: `postcopy.memory` and `postcopy.uffd` for memory that is filled on demand,
`postcopy.pager` and `postcopy.pageserver` for an engine that brings it over a network, `postcopy.migration` for a
machine as a whole.
"""

from __future__ import annotations

from ._native import ffi as _ffi
from ._native import lib as _lib

# From the core, which CMake tells it: reading the metadata of an installed package costs two megabytes.
__version__ = _ffi.string(_lib.pc_version()).decode()

__all__ = ["__version__"]
