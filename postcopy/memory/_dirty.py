# SPDX-License-Identifier: Apache-2.0
"""`DirtyLog`: which pages were written while a machine runs (csrc/memory/dirty.c)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import Any, Self

from postcopy._native import ffi, lib
from postcopy.errors import ErrorLine, ResourceError, check
from postcopy.memory._memory import Memory
from postcopy.memory.bitmap import Bitmap
from postcopy.uffd import How, probe


class DirtyLog:
    """Logs what is written to some memories, from here until `close`; a context manager. The memories are in use until
    then.

    It needs userfaultfd and PAGEMAP_SCAN of Linux 6.7, and no privilege: `ResourceError` where there is less.
    `BusyError` where a part of a memory is registered with a userfaultfd already, as it is until the last page of a
    machine that has come here has arrived. Making it, `collect` and `close` take as long as the kernel needs to walk
    the page tables (some 2 ns a page), without the GIL: call them in a worker thread.
    """

    def __init__(self, memories: Iterable[Memory], tell: Callable[[Any], object] | None = None) -> None:
        """`tell`: given the `struct pc_dirty_log *`, then NULL before it is freed; for a machine that marks what it
        writes in a way which page tables do not show (`pc_machine_set_dirty_log`)."""
        self._memories: list[Memory] = []
        pointer: Any = ffi.new("struct pc_dirty_log **")
        check(lib.pc_dirty_log_new(pointer), "making a dirty log")
        self._struct: Any = pointer[0]
        self._tell: Callable[[Any], object] | None = None
        try:
            for memory in memories:
                self._add(memory)
            if tell is not None:
                tell(self._struct)
                self._tell = tell
        except BaseException:
            self.close()
            raise

    def _add(self, memory: Memory) -> None:
        line = ErrorLine()
        memory.acquire("dirty log")
        try:
            result = lib.pc_dirty_log_add(self._struct, memory.struct, line.buffer, line.size)
            if result == -errno.EOPNOTSUPP:
                raise ResourceError(str(line), "use a kernel from 6.7 on, or --precopy off")
            if result in (-errno.EPERM, -errno.EACCES, -errno.ENOSYS):
                probe(How.ANY)  # says why there is no userfaultfd
            line.check(result, "logging what is written")
        except BaseException:
            memory.release("dirty log")
            raise
        self._memories.append(memory)

    def collect(self, index: int) -> Bitmap:
        """The pages of a memory (by its place in what was given) that were written since the last call, or since the
        log was made. One call at a time for each memory. After an error nothing is known any more."""
        struct = self._open()
        written = Bitmap(self._memories[index].pages)
        check(lib.pc_dirty_log_collect(struct, index, written.words), "reading the dirty log")
        return written

    def mark(self, index: int, first_page: int, pages: int) -> None:
        """Pages that were changed in a way which page tables do not show: by the kernel through pages that it had
        pinned before, by write(2) to a memfd, by giving them back. After the change."""
        struct, memory = self._open(), self._memories[index]
        if first_page < 0 or pages < 0 or first_page + pages > memory.pages:
            raise IndexError(f"pages {first_page} to {first_page + pages} of {memory.pages}")
        lib.pc_dirty_log_mark(struct, memory.address + first_page * memory.page_bytes, pages * memory.page_bytes)

    def close(self) -> None:
        """Ends the logging: writes cost nothing any more. Twice does no harm. Nothing else may be calling."""
        struct, self._struct = self._struct, None
        if struct is not None:
            if self._tell is not None:
                self._tell(ffi.NULL)
            lib.pc_dirty_log_free(struct)
        while self._memories:
            self._memories.pop().release("dirty log")

    def _open(self) -> Any:
        if self._struct is None:
            raise ValueError("this dirty log is closed")
        return self._struct

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
