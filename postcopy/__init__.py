# SPDX-License-Identifier: Apache-2.0
"""Moves the memory of a running machine after the machine has moved.

`Userfaultfd` and `Memory` (`postcopy.uffd`, `postcopy.memory`) are memory that is filled on demand; they need cffi and
nothing else. `attach`, `attach_source` and `serve` (`postcopy.lazy`) are memory that fills itself, from another host or
by a coroutine. `postcopy.migration` moves a machine as a whole, `postcopy.dataplane` is the engine that brings its
pages.

Names and submodules are imported when they are first used. What is asynchronous runs under Trio.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from postcopy._native import ffi as _ffi
from postcopy._native import lib as _lib

if TYPE_CHECKING:
    from postcopy import dataplane as dataplane
    from postcopy import errors as errors
    from postcopy import lazy as lazy
    from postcopy import machines as machines
    from postcopy import memory as memory
    from postcopy import migration as migration
    from postcopy import net as net
    from postcopy import uffd as uffd
    from postcopy import units as units
    from postcopy import wire as wire
    from postcopy.errors import PostcopyError
    from postcopy.lazy import LazyMemory, PageSource, SourceBlock, attach, attach_source, serve
    from postcopy.memory import Memory
    from postcopy.uffd import Userfaultfd

# From the core, which has it from CMake: reading the metadata of an installed package costs two megabytes.
__version__ = _ffi.string(_lib.pc_version()).decode()

__all__ = [
    "LazyMemory",
    "Memory",
    "PageSource",
    "PostcopyError",
    "SourceBlock",
    "Userfaultfd",
    "__version__",
    "attach",
    "attach_source",
    "serve",
]

_WHERE = {"Memory": "memory", "PostcopyError": "errors", "Userfaultfd": "uffd"}  # everything else is in `lazy`
_SUBMODULES = ("dataplane", "errors", "lazy", "machines", "memory", "migration", "net", "uffd", "units", "wire")


def __getattr__(name: str) -> Any:
    # Only when asked for: a command that needs none of it should not pay for the import.
    if name not in __all__ and name not in _SUBMODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from postcopy.errors import naming_missing_packages

    with naming_missing_packages(f"{__name__}.{name}"):
        if name in _SUBMODULES:
            return import_module(f".{name}", __name__)
        return getattr(import_module(f".{_WHERE.get(name, 'lazy')}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES])
