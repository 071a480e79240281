# SPDX-License-Identifier: Apache-2.0
"""Memory that fills itself when it is looked at: of another host, or of anything that can give pages.

docs/lazy-memory.md is the guide. The names here are those of `postcopy` itself, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from postcopy.errors import naming_missing_packages

with naming_missing_packages("postcopy.lazy (attach, attach_source, serve)"):
    from postcopy.lazy._attach import attach, attach_source
    from postcopy.lazy._memory import LazyBlock, LazyMemory
    from postcopy.lazy._serve import Server, serve
    from postcopy.lazy._source import PageSource, SourceBlock

if TYPE_CHECKING:
    from postcopy.lazy import blocking as blocking

__all__ = [
    "LazyBlock",
    "LazyMemory",
    "PageSource",
    "Server",
    "SourceBlock",
    "attach",
    "attach_source",
    "blocking",
    "serve",
]


def __getattr__(name: str) -> Any:
    if name == "blocking":  # when it is asked for
        import importlib

        return importlib.import_module("postcopy.lazy.blocking")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
