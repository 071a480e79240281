# SPDX-License-Identifier: Apache-2.0
"""`RemoteMemory`: memory of another process, read from outside (csrc/memory/remote.c); `WriteLog`: which pages of it
are written meanwhile (csrc/memory/writelog.c)."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postcopy._native import ffi, lib
from postcopy.errors import ErrorLine, MigrationError, ResourceError, check
from postcopy.memory._admission import proc_numbers
from postcopy.memory._dirty import DirtyLog
from postcopy.memory._memory import CORE_KINDS, Memory, MemoryKind, checked_size
from postcopy.memory.bitmap import Bitmap


@dataclass(frozen=True)
class Extent:
    """A piece of memory that lies in one."""

    address: int  # in its process
    first_byte: int  # of the memory
    size_bytes: int


class RemoteMemory(Memory):
    """Memory that is another process's. Its size is known from the beginning, where it lies from `found` on: until then
    it has no content here.

    A pager takes it as memory without an address, a page server reads it. `resident_bytes`, `digest` and `dump` look at
    it from outside, and what they take is what that process has in its page tables; nothing here ends with it, but they
    raise `CoreError` (ESRCH) then."""

    def __init__(self, size_bytes: int, page_bytes: int) -> None:
        """`page_bytes`: as mapped there."""
        kind = MemoryKind.ANON if page_bytes == int(lib.pc_page_bytes()) else MemoryKind.HUGETLB
        self._remote: Any = ffi.NULL
        self._incomplete = False
        self._pid = 0  # of whose memory it is; 0: not known yet
        struct = ffi.new("struct pc_memory *", [ffi.NULL, checked_size(size_bytes), page_bytes, CORE_KINDS[kind], -1])
        super().__init__(struct, kind, size_bytes, mapped=False)

    def found(self, pid: int, pidfd: int, extents: Sequence[Extent]) -> None:
        """Where it lies. Once. `ResourceError` without the right to look at that process, `MigrationError` when it has
        ended."""
        pieces = ffi.new(
            "struct pc_remote_extent[]", [(one.address, one.first_byte, one.size_bytes) for one in extents]
        )
        pointer: Any = ffi.new("struct pc_remote **")
        line = ErrorLine()
        result = lib.pc_remote_new(pid, pidfd, pieces, len(extents), self.page_bytes, pointer, line.buffer, line.size)
        if result in (-errno.EPERM, -errno.EACCES):
            raise ResourceError(
                str(line),
                "run as the user of that process, or as root; for a user of his own sysctl kernel.yama.ptrace_scope"
                " must be 0",
            )
        if result in (-errno.ESRCH, -errno.ENOENT):
            raise MigrationError(str(line))
        line.check(result, f"memory of process {pid}")
        if sum(one.size_bytes for one in extents) != self.size_bytes:
            lib.pc_remote_free(pointer[0])
            raise ValueError("the extents are not as large as the memory")
        self._remote = self.struct.remote = pointer[0]
        self._pid = pid
        self.incomplete = self._incomplete

    @property
    def incomplete(self) -> bool:
        """Whether pages that are absent are elsewhere (have not arrived yet, or are in a file): none counts as zero."""
        return self._incomplete

    @incomplete.setter
    def incomplete(self, incomplete: bool) -> None:
        self._incomplete = incomplete
        if self._remote:
            lib.pc_remote_set_incomplete(self._remote, incomplete)

    @property
    def remote(self) -> Any:
        """The `struct pc_remote *`."""
        if not self._remote:
            raise ValueError("where this memory lies is not known")
        return self._remote

    def present(self, page_bytes: int | None = None, known: Bitmap | None = None) -> Bitmap:
        if not self._remote:
            return Bitmap.full(self.size_bytes // (page_bytes or self.page_bytes))
        return super().present(page_bytes, known)

    def present_more(self, known: Bitmap, page_bytes: int | None = None) -> Bitmap:
        return self._compared(known, page_bytes or self.page_bytes)

    def unpopulated_bytes(self) -> int:
        """Of a process that has ended nothing. (Its page tables would say it to the page, in a time that grows with
        them.)"""
        if self._kind is MemoryKind.HUGETLB:
            return 0
        if not self._pid:
            return self.size_bytes
        numbers = proc_numbers(Path(f"/proc/{self._pid}/status"))
        given_kib = numbers.get("RssAnon", 0) + numbers.get("VmSwap", 0)
        return max(0, self.size_bytes - given_kib * 1024) if numbers else 0

    def close(self) -> None:
        super().close()
        remote, self._remote = self._remote, ffi.NULL
        if remote:
            self._struct.remote = ffi.NULL
            lib.pc_remote_free(remote)


class WriteLog(DirtyLog):
    """The dirty log of a `RemoteMemory`, by a userfaultfd of its process, with which nothing is registered and which
    nobody else reads: see csrc/include/postcopy/memory.h. The log of one memory.

    A thread here answers each first write to a page; should this process die meanwhile, that process waits at its next
    one, until another log is made for it, and closed."""

    def __init__(self, memory: RemoteMemory, uffd: int) -> None:
        """`uffd` is duplicated. `BusyError` where another userfaultfd has a part of the memory."""
        self.stopped = False
        """Whether nobody writes any more: what is collected then is not protected again."""
        self._memory = memory
        self._log: Any = None
        pointer: Any = ffi.new("struct pc_write_log **")
        line = ErrorLine()
        memory.acquire("write log")
        try:
            result = lib.pc_write_log_new(uffd, memory.remote, pointer, line.buffer, line.size)
            if result == -errno.ENOTTY:
                raise ResourceError(
                    "this kernel cannot tell what is written (PAGEMAP_SCAN, Linux 6.7)",
                    "use a kernel from 6.7 on, or --precopy off",
                )
            line.check(result, "logging what is written")
        except BaseException:
            memory.release("write log")
            raise
        self._log = pointer[0]

    def collect(self, index: int) -> Bitmap:
        if self._log is None or index:
            raise ValueError("this log is closed, or of one memory only")
        written = Bitmap(self._memory.pages)
        result = lib.pc_write_log_collect(self._log, written.words, self.stopped)
        if result == -errno.ESRCH:
            raise MigrationError("the process whose memory is sent has ended")
        if result == -errno.ETIMEDOUT:
            raise MigrationError("what is written cannot be seen: that process gives its memory back all the time")
        check(result, "reading the write log")
        return written

    def mark(self, index: int, first_page: int, pages: int) -> None:
        raise NotImplementedError("nothing is written to that memory from here")

    def close(self) -> None:
        log, self._log = self._log, None
        if log is not None:
            lib.pc_write_log_free(log)
            self._memory.release("write log")
