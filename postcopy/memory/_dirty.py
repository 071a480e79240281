# SPDX-License-Identifier: Apache-2.0
"""`DirtyLog`: which pages were written while a machine runs (csrc/memory/dirty.c)."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable, Iterable
from typing import Any, Self

from postcopy._native import ffi, lib
from postcopy.errors import ErrorLine, MigrationError, ResourceError, check
from postcopy.memory._memory import Memory
from postcopy.memory.bitmap import Bitmap
from postcopy.uffd import How, UffdFeature, probe

FEATURES_OF_PROCESS = (
    UffdFeature.PAGEFAULT_FLAG_WP | UffdFeature.WP_HUGETLBFS_SHMEM | UffdFeature.WP_UNPOPULATED | UffdFeature.WP_ASYNC
)
"""What a userfaultfd of another process is opened with, for `DirtyLog.of_process`."""
ENDED = "the process whose memory is sent has ended"


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
        pointer: Any = ffi.new("struct pc_dirty_log **")
        check(lib.pc_dirty_log_new(pointer), "making a dirty log")
        self._fill(pointer[0], [(memory, memory.address) for memory in memories], tell)

    @classmethod
    def of_process(cls, memories: Iterable[tuple[Memory, int]], uffd: int, pid: int, pidfd: int) -> DirtyLog:
        """The same of memory files (`Memory.from_shared_file`), each as another process has it mapped, shared and as a
        whole, at an address there. What it writes through another mapping or by its descriptor is not seen, and page
        tables do not tell of memory that it gives back by a hole in the file, unless it had been written since the last
        call: that counts as having kept its content.

        `uffd`: of that process, opened with the features of `FEATURES_OF_PROCESS` and no others; nothing is registered
        with it. Both descriptors stay the caller's. `ResourceError` without the right to look at that process (that to
        trace it), `MigrationError` when it has ended, also from `collect`."""
        line = ErrorLine()
        pointer: Any = ffi.new("struct pc_dirty_log **")
        try:
            pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):
                raise MigrationError(f"process {pid}, whose memory is to be sent, has ended") from error
            raise ResourceError(
                f"this user may not see what process {pid} writes: /proc/{pid}/pagemap: {error.strerror}",
                "run as the user of that process, or as root; for a user of his own sysctl kernel.yama.ptrace_scope"
                " must be 0; or leave precopy out (--precopy off)",
            ) from error
        try:
            if select.select([pidfd], [], [], 0)[0]:  # alive after its file was opened: it is that of this process
                raise MigrationError(f"process {pid}, whose memory is to be sent, has ended")
            result = lib.pc_dirty_log_new_of(uffd, pagemap, pointer, line.buffer, line.size)
            line.check(result, "logging what another process writes")
        finally:
            os.close(pagemap)
        log = cls.__new__(cls)
        log._fill(pointer[0], memories, None)
        return log

    def _fill(self, struct: Any, memories: Iterable[tuple[Memory, int]], tell: Callable[[Any], object] | None) -> None:
        self._struct = struct
        self._memories: list[tuple[Memory, int]] = []
        self._tell: Callable[[Any], object] | None = None
        try:
            for memory, address in memories:
                self._add(memory, address)
            if tell is not None:
                tell(self._struct)
                self._tell = tell
        except BaseException:
            self.close()
            raise

    def _add(self, memory: Memory, address: int) -> None:
        line = ErrorLine()
        memory.acquire("dirty log")
        try:
            result = lib.pc_dirty_log_add_at(self._struct, memory.struct, address, line.buffer, line.size)
            if result == -errno.EOPNOTSUPP:
                raise ResourceError(str(line), "use a kernel from 6.7 on, or --precopy off")
            if result in (-errno.EPERM, -errno.EACCES, -errno.ENOSYS):
                probe(How.ANY)  # says why there is no userfaultfd
            if result == -errno.ESRCH:
                raise MigrationError(ENDED)
            line.check(result, "logging what is written")
        except BaseException:
            memory.release("dirty log")
            raise
        self._memories.append((memory, address))

    def collect(self, index: int) -> Bitmap:
        """The pages of a memory (by its place in what was given) that were written since the last call, or since the
        log was made. One call at a time for each memory. After an error nothing is known any more."""
        struct = self._open()
        written = Bitmap(self._memories[index][0].pages)
        result = lib.pc_dirty_log_collect(struct, index, written.words)
        if result == -errno.ESRCH:
            raise MigrationError(ENDED)
        check(result, "reading the dirty log")
        return written

    def mark(self, index: int, first_page: int, pages: int) -> None:
        """Pages that were changed in a way which page tables do not show: by the kernel through pages that it had
        pinned before, by write(2) to a memfd, by giving them back. After the change."""
        struct, (memory, address) = self._open(), self._memories[index]
        if first_page < 0 or pages < 0 or first_page + pages > memory.pages:
            raise IndexError(f"pages {first_page} to {first_page + pages} of {memory.pages}")
        lib.pc_dirty_log_mark(struct, address + first_page * memory.page_bytes, pages * memory.page_bytes)

    def close(self) -> None:
        """Ends the logging: writes cost nothing any more. Twice does no harm. Nothing else may be calling."""
        struct, self._struct = self._struct, None
        if struct is not None:
            if self._tell is not None:
                self._tell(ffi.NULL)
            lib.pc_dirty_log_free(struct)
        while self._memories:
            self._memories.pop()[0].release("dirty log")

    def _open(self) -> Any:
        if self._struct is None:
            raise ValueError("this dirty log is closed")
        return self._struct

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
