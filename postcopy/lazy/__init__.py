# SPDX-License-Identifier: Apache-2.0
"""Memory that fills itself when it is looked at: of another host, or of anything that can give pages.

docs/lazy-memory.md is the guide. The names here are those of `postcopy` itself, too.
"""

from __future__ import annotations

from postcopy.lazy._attach import attach, attach_source
from postcopy.lazy._memory import LazyBlock, LazyMemory
from postcopy.lazy._serve import Server, serve
from postcopy.lazy._source import PageSource, SourceBlock

__all__ = ["LazyBlock", "LazyMemory", "PageSource", "Server", "SourceBlock", "attach", "attach_source", "serve"]
