# SPDX-License-Identifier: Apache-2.0
"""Memory that can be missing, image files that stand for memory, and how much of it can be promised.

Python never touches the content: a page of it may be missing, the access would then sleep in the kernel with the GIL
held, and no Python thread could run any more, among them the one that brings the page. Content is moved, compared and
written out by C functions, which run without the GIL. They block (on disk I/O, on large amounts of memory); in Trio
call them as ``await trio.to_thread.run_sync(memory.digest)``.

A `Memory` counts its users. `close()` refuses with `BusyError` while a pager, a page server or a machine works on it,
or while a call is still running in another thread: what the core may still write to is never unmapped.

Modules: `_memory` the memory itself, `bitmap` a bit for each page, `_dirty` which of them were written, `_remote`
memory of another process, `_admission` what machines of this process have been promised. Above `postcopy.uffd`, below
everything that moves memory.
"""

from __future__ import annotations

from postcopy.memory._admission import check_memory
from postcopy.memory._dirty import FEATURES_OF_PROCESS, DirtyLog
from postcopy.memory._memory import Memory, MemoryKind, page_bytes_of
from postcopy.memory._remote import Extent, RemoteMemory, WriteLog
from postcopy.memory.bitmap import Bitmap

__all__ = [
    "FEATURES_OF_PROCESS",
    "Bitmap",
    "DirtyLog",
    "Extent",
    "Memory",
    "MemoryKind",
    "RemoteMemory",
    "WriteLog",
    "check_memory",
    "page_bytes_of",
]
