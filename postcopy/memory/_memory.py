# SPDX-License-Identifier: Apache-2.0
"""`Memory`: what it is made of, what is in it, its bytes, and its users."""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import stat
import threading
from collections.abc import Iterator
from typing import Any

from postcopy._native import ffi, lib
from postcopy._trio import require_trio
from postcopy.errors import BusyError, ConfigurationError, CoreError, ErrorLine, PostcopyError, ResourceError, check
from postcopy.memory.bitmap import Bitmap
from postcopy.uffd._ranges import ADDRESSES
from postcopy.units import format_size


class MemoryKind(enum.StrEnum):
    """What the memory is made of, and by that how a page gets there."""

    MEMFD = "memfd"  # a second mapping is filled, then UFFDIO_CONTINUE
    ANON = "anon"  # UFFDIO_COPY
    HUGETLB = "hugetlb"  # whole huge pages from the host's pool
    FILE = "file"  # an image file, read only; no mapping
    BUFFER = "buffer"  # bytes that another object owns, at any address; read only, nothing is known of its zeros


_DIGEST_BLOCK_BYTES = 4096

CORE_KINDS = {
    MemoryKind.MEMFD: lib.PC_MEMORY_MEMFD,
    MemoryKind.ANON: lib.PC_MEMORY_ANON,
    MemoryKind.HUGETLB: lib.PC_MEMORY_HUGETLB,
    MemoryKind.FILE: 0,
    MemoryKind.BUFFER: lib.PC_MEMORY_ANON,
}


_READ_ONLY = frozenset({MemoryKind.FILE, MemoryKind.BUFFER})
_BUFFER = "buffer"


class Memory:
    """Made by `create`, `from_fd`, `from_shared_file`, `from_address`, `from_buffer` or `from_file`. A context manager;
    `close()` unmaps. Methods may run in any thread, and beside each other as far as they only read."""

    def __init__(
        self, struct: Any, kind: MemoryKind, file_bytes: int, *, mapped: bool = True, owner: object = None
    ) -> None:
        """`mapped`: the mapping is this object's, `close` unmaps it. `owner`: of another one, kept until then."""
        self._struct = struct
        self._kind = kind
        self._file_bytes = file_bytes
        self._mapped = mapped
        self._owner = owner
        self._lock = threading.Lock()
        self._users: dict[str, int] = {}
        self._closed = False
        self._dropped = False

    @classmethod
    def create(cls, kind: str, size_bytes: int) -> Memory:
        """New memory, all zero, nothing populated.

        `kind` is ``memfd``, ``anon`` or ``hugetlb``; `size_bytes` a multiple of its page size. Errors:
        `ConfigurationError` for an unknown kind or an impossible size, `ResourceError` where the host cannot give it.
        """
        memory_kind = mapped_kind(kind)
        struct: Any = ffi.new("struct pc_memory *")
        line = ErrorLine()
        size_bytes = checked_size(size_bytes)
        result = lib.pc_memory_create(CORE_KINDS[memory_kind], size_bytes, struct, line.buffer, line.size)
        if result < 0:
            raise memory_error(result, line)
        return cls(struct, memory_kind, size_bytes)

    @classmethod
    def from_file(cls, file: int | str | os.PathLike[str], page_bytes: int | None = None) -> Memory:
        """An image file as memory that is read with pread(2) and never mapped: a file that shrinks meanwhile gives a
        named error, where a mapping would give SIGBUS.

        `file` is a path, or a descriptor that is duplicated. `size_bytes` is rounded up to whole pages, the rest of the
        last one reads as zeros; `file_bytes` is the true size. `ConfigurationError` for anything but a regular file
        with something in it.
        """
        unit = page_bytes or int(lib.pc_page_bytes())
        name = f"image (descriptor {file})" if isinstance(file, int) else f"image {os.fspath(file)}"
        try:
            # O_NONBLOCK: opening a FIFO must not wait for a writer; for regular files it means nothing.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            fd = os.dup(file) if isinstance(file, int) else os.open(file, flags)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigurationError(f"{name}: {reason}") from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigurationError(f"{name}: not a regular file")
            if status.st_size == 0:
                raise ConfigurationError(f"{name}: the file is empty")
        except BaseException:
            os.close(fd)
            raise
        # The exact size: by it the core distinguishes a short last page from a file that has shrunk.
        struct = _struct(ffi.NULL, status.st_size, unit, MemoryKind.FILE, fd)
        return cls(struct, MemoryKind.FILE, status.st_size, mapped=False)

    @classmethod
    def from_address(cls, address: int, size_bytes: int, owner: object = None, page_bytes: int | None = None) -> Memory:
        """Memory that other code has mapped in this process; `close` leaves it mapped.

        `owner`: kept until then, so that an ``mmap.mmap`` or a CFFI object outlives this. `page_bytes`: where the pages
        are not the system's. It must have been mapped with MADV_NOHUGEPAGE. `ConfigurationError` for what is not whole
        pages; whether anything is mapped there is not looked at.
        """
        unit = page_bytes or int(lib.pc_page_bytes())
        if address <= 0 or address % unit or size_bytes % unit or checked_size(size_bytes) + address > 1 << 63:
            raise ConfigurationError(f"memory: {size_bytes} bytes at {address:#x} are not whole pages of {unit} bytes")
        base = ffi.cast("void *", address)
        struct = _struct(base, size_bytes, unit, MemoryKind.ANON)
        return cls(struct, MemoryKind.ANON, size_bytes, mapped=False, owner=owner)

    @classmethod
    def from_buffer(cls, buffer: Any) -> Memory:
        """A C-contiguous buffer of whole system pages, at any address, to be read in place. Kept until `close`."""
        owner: Any = ffi.from_buffer("char[]", buffer)  # holds the export
        struct = _struct(owner, len(owner), int(lib.pc_page_bytes()), MemoryKind.BUFFER)
        return cls(struct, MemoryKind.BUFFER, len(owner), mapped=False, owner=owner)

    @classmethod
    def without_content(cls, size_bytes: int, page_bytes: int) -> Memory:
        """The size of memory whose content is not in this process: for an owner that has to say how large it is."""
        struct = _struct(ffi.NULL, size_bytes, page_bytes, MemoryKind.BUFFER)
        return cls(struct, MemoryKind.BUFFER, size_bytes, mapped=False)

    @classmethod
    def from_fd(cls, fd: int, page_bytes: int | None = None) -> Memory:
        """A memfd, as another process sends it, mapped shared as a whole. The descriptor is duplicated.

        `page_bytes`: of a memfd of huge pages. `ConfigurationError` when it is no memory file of whole pages;
        `CoreError` where it cannot be mapped. A peer that shrinks the file makes an access SIGBUS: ask for
        F_SEAL_SHRINK, which `create` sets.
        """
        unit = page_bytes or int(lib.pc_page_bytes())
        try:
            status = os.fstat(fd)
        except OSError as error:
            raise ConfigurationError(f"memory (descriptor {fd}): {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode) or not status.st_size or status.st_size % unit:
            raise ConfigurationError(f"memory (descriptor {fd}): not a memory file of whole pages of {unit} bytes")
        struct: Any = ffi.new("struct pc_memory *")
        kind = MemoryKind.MEMFD if unit == int(lib.pc_page_bytes()) else MemoryKind.HUGETLB
        check(lib.pc_memory_map(fd, status.st_size, unit, CORE_KINDS[kind], struct), "mapping a memory file")
        return cls(struct, kind, status.st_size)

    @classmethod
    def from_shared_file(cls, fd: int, size_bytes: int, page_bytes: int | None = None) -> Memory:
        """The first `size_bytes` of a memory file (memfd, tmpfs, hugetlbfs) that other processes have mapped: looked at
        and read by its descriptor alone, and never mapped here. So nothing is populated by looking, and a process that
        cuts the file short makes a `CoreError` (ENODATA) and no SIGBUS. The descriptor stays the caller's.

        `page_bytes`: as mapped there. `ConfigurationError` when it is no memory file of so many whole pages.
        """
        unit = page_bytes or int(lib.pc_page_bytes())
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or not 0 < size_bytes <= status.st_size or size_bytes % unit:
                raise ConfigurationError(
                    f"memory (descriptor {fd}): not a memory file of {size_bytes} bytes in whole pages of {unit}"
                )
            kind = MemoryKind.MEMFD if unit == int(lib.pc_page_bytes()) else MemoryKind.HUGETLB
            return cls(_struct(ffi.NULL, size_bytes, unit, kind, _open_again(fd)), kind, size_bytes)
        except OSError as error:
            raise ConfigurationError(f"memory (descriptor {fd}): {error.strerror}") from error

    def alias(self) -> Memory:
        """A second mapping of the same memory file: pages written there can be handed over here with UFFDIO_CONTINUE.
        ValueError for memory without a file."""
        if self.fd < 0 or self._kind is MemoryKind.FILE:
            raise ValueError("only a memfd can be mapped twice")
        with self.in_use("alias"):
            return Memory.from_fd(self.fd, self.page_bytes)

    # ---- what it is

    @property
    def struct(self) -> Any:
        """The `struct pc_memory *`; hold `in_use` as long as the core has it."""
        if self._closed:
            raise ValueError("this memory is closed")
        return self._struct

    @property
    def kind(self) -> MemoryKind:
        return self._kind

    @property
    def size_bytes(self) -> int:
        """A multiple of `page_bytes`."""
        return self.pages * self.page_bytes

    @property
    def file_bytes(self) -> int:
        """Of an image file the size as it was when opened; else `size_bytes`."""
        return self._file_bytes

    @property
    def page_bytes(self) -> int:
        """What one fault brings: the system's page, or the huge page."""
        return int(self._struct.page_bytes)

    @property
    def pages(self) -> int:
        return -(-int(self._struct.size_bytes) // self.page_bytes)

    @property
    def fd(self) -> int:
        """The memfd or the image file, -1 for anonymous memory. Stays this object's."""
        return -1 if self._closed else int(self._struct.fd)

    @property
    def address(self) -> int:
        """Where it is mapped in this process; 0 when it is not."""
        return 0 if self._closed else int(ffi.cast("uintptr_t", self._struct.base))

    @property
    def closed(self) -> bool:
        return self._closed

    def __repr__(self) -> str:
        return f"<Memory: {format_size(self.size_bytes)} {self._kind}{', closed' if self._closed else ''}>"

    # ---- what is in it

    def present(self, page_bytes: int | None = None, known: Bitmap | None = None) -> Bitmap:
        """Which pages may hold something other than zeros, found without touching or populating any. In units of
        `page_bytes`, by default the memory's own. `known`: pages that do, in the same units; to ask again then takes
        as long as there are others. Blocks on I/O."""
        unit = page_bytes or self.page_bytes
        with self.in_use("present"):
            if self._kind is MemoryKind.FILE:
                bitmap = Bitmap(-(-self._file_bytes // unit))
                what = "looking for data in an image file"
                check(lib.pc_file_present(self._struct.fd, self._file_bytes, unit, bitmap.words), what)
                return bitmap
            if self._kind is MemoryKind.BUFFER:  # looking for holes would mean reading all of it
                return Bitmap.full(-(-self.size_bytes // unit))
            bitmap = known.rescaled(unit, self.page_bytes) if known is not None else Bitmap(self.pages)
            check(lib.pc_memory_present(self._struct, bitmap.words), "looking for populated memory")
        return bitmap if unit == self.page_bytes else bitmap.rescaled(self.page_bytes, unit)

    def present_more(self, known: Bitmap, page_bytes: int | None = None) -> Bitmap:
        """The pages that hold something now and are not in `known`, a map that `present` gave in the same units; they
        are added to it. Of a memfd this takes as long as there are others."""
        unit = page_bytes or self.page_bytes
        if self._kind is MemoryKind.MEMFD and unit == self.page_bytes:
            more = Bitmap(self.pages)
            with self.in_use("present"):
                result = lib.pc_memory_present_more(self._struct, known.words, more.words)
            check(result, "looking for populated memory")
            return more
        return self._compared(known, unit)

    def _compared(self, known: Bitmap, unit: int) -> Bitmap:
        now = self.present(unit, known)
        more = now.without(known)
        known.paste(0, now)
        return more

    def unpopulated_bytes(self) -> int:
        """How much of it the kernel has not given yet, and will when it is touched. Of huge pages, which it reserves,
        and of a file nothing."""
        if self._kind is MemoryKind.MEMFD:
            with self.in_use("statistics"):
                return max(0, self.size_bytes - os.fstat(self._struct.fd).st_blocks * 512)  # swapped out ones included
        if self._kind is MemoryKind.ANON and self._mapped:
            return self.size_bytes - self.present().count() * self.page_bytes
        return 0

    def dump(self, fd: int, offset: int = 0) -> None:
        """Writes the content to a file from byte `offset` on, leaving holes where it is zero; the file is made long
        enough. No page may be missing: the thread would wait for it. Blocks on I/O."""
        with self.in_use("dump"):
            check(lib.pc_memory_dump(self.struct, fd, offset), "writing memory to a file")

    def load(self, fd: int, offset: int = 0, size_bytes: int | None = None) -> None:
        """Fills the memory, which must not be registered with a userfaultfd, from a file; holes stay holes. Blocks."""
        size_bytes = self.size_bytes if size_bytes is None else size_bytes
        if not 0 <= size_bytes <= self.size_bytes:
            raise ValueError(f"{size_bytes} bytes do not fit into memory of {self.size_bytes}")
        if self._kind in _READ_ONLY:
            raise ValueError("this memory is read only")
        with self.in_use("load"):
            check(lib.pc_memory_load(self._struct, fd, offset, size_bytes), "reading memory from a file")

    def digest(self, size_bytes: int | None = None) -> int:
        """A digest of the content, or of its first `size_bytes`, rounded up to blocks of 4 KiB: equal sizes and
        contents give equal digests, whatever is populated and whatever the pages are. No page may be missing. Blocks on
        I/O."""
        size_bytes = self.size_bytes if size_bytes is None else size_bytes
        if not 0 < size_bytes <= self.size_bytes:
            raise ValueError(f"no digest of {size_bytes} bytes of {self.size_bytes}")
        rounded = -(-size_bytes // _DIGEST_BLOCK_BYTES) * _DIGEST_BLOCK_BYTES
        digest: Any = ffi.new("uint64_t *")
        with self.in_use("digest"):
            if self._kind is MemoryKind.FILE:
                result = lib.pc_file_digest(self._struct.fd, rounded, self.page_bytes, digest)
            elif rounded == self.size_bytes:
                result = lib.pc_memory_digest(self._struct, digest)
            else:
                # A view of the first part, in the digest's own blocks; huge pages as the plain file they are, too.
                part: Any = ffi.new("struct pc_memory *", self._struct[0])
                part.size_bytes = rounded
                part.page_bytes = _DIGEST_BLOCK_BYTES
                part.kind = CORE_KINDS[MemoryKind.MEMFD if self._kind is MemoryKind.HUGETLB else self._kind]
                result = lib.pc_memory_digest(part, digest)
        check(result, "computing a digest")
        return int(digest[0])

    def resident_bytes(self) -> int:
        """How much is populated, found without touching any of it; 0 for an image file."""
        if self._kind is MemoryKind.FILE:
            return 0
        resident: Any = ffi.new("uint64_t *")
        with self.in_use("resident"):
            check(lib.pc_memory_resident(self._struct, resident), "asking what memory is populated")
        return int(resident[0])

    # ---- bytes

    def read(self, offset: int, size_bytes: int) -> bytes:
        """A copy of the content, made without the GIL; blocks for as long as a page of it is missing (in Trio:
        `aread`)."""
        with self.in_use("read"):
            address = self._checked(offset, size_bytes, reading=True)
            buffer: Any = ffi.new("char[]", size_bytes)  # plain memory, which is never lazy
            lib.pc_bytes_copy(int(ffi.cast("uintptr_t", buffer)), address, size_bytes)
        return bytes(ffi.buffer(buffer, size_bytes))

    def write(self, offset: int, data: Any) -> None:
        """Writes bytes-like `data`, without the GIL; blocks for as long as a page is missing (in Trio: `awrite`).

        `data` must not be lazy memory itself. ValueError past the end and for an image file.
        """
        source: Any = ffi.from_buffer("char[]", data)
        with self.in_use("write"):
            address = self._checked(offset, len(source))
            lib.pc_bytes_copy(address, int(ffi.cast("uintptr_t", source)), len(source))

    async def aread(self, offset: int, size_bytes: int) -> bytes:
        """`read` in a worker thread. Cancelled, it raises at once; the thread is left behind until the page comes, and
        the memory stays in use (`close` refuses) until then."""
        require_trio("Memory.aread", "read() in a thread")
        from postcopy._blocking import run_sync

        return await run_sync(self.read, offset, size_bytes, abandon_on_cancel=True)

    async def awrite(self, offset: int, data: Any) -> None:
        """`write` in a worker thread. Cancelled, it raises at once; the thread is left behind, and may still write when
        the page comes: `data` must not change until then, so bytes are best."""
        require_trio("Memory.awrite", "write() in a thread")
        from postcopy._blocking import run_sync

        await run_sync(self.write, offset, data, abandon_on_cancel=True)

    def discard(self, offset: int, size_bytes: int) -> None:
        """Gives whole pages back: they read as zeros, or are missing again where they are registered. For a memfd in
        every mapping of it. Blocks until the event of it has been read, where UffdFeature.EVENT_REMOVE is enabled."""
        if offset % self.page_bytes or size_bytes % self.page_bytes:
            raise ValueError(f"not whole pages of {self.page_bytes} bytes")
        with self.in_use("discard"):
            address = self._checked(offset, size_bytes)
            check(lib.pc_memory_discard(self._struct, address, size_bytes), "discarding memory")

    def discard_pages(self, pages: Bitmap) -> None:
        """The same for every page in a map."""
        if len(pages) != self.pages:
            raise ValueError(f"a map of {len(pages)} pages for memory of {self.pages}")
        if self._kind in _READ_ONLY or (not self.address and self.fd < 0):
            raise ValueError("this memory is read only, or not mapped")
        with self.in_use("discard"):
            check(lib.pc_memory_discard_pages(self._struct, pages.words), "discarding memory")

    @contextlib.contextmanager
    def buffer(self) -> Iterator[memoryview]:
        """The memory itself as a writable buffer, for numpy and the like, inside the block.

        `BusyError` while it is registered with a `Userfaultfd` of this process or anything else works on it (a pager, a
        machine): Python would touch a missing page with the GIL held, and no Python thread could run any more, among
        them the one that serves the fault. Registering refuses for as long as the block lasts. At its end the view is
        released; `BusyError` when something still has it, and then it stays noted. Userfaultfds that C code or another
        process registered are not known here.
        """
        address, size_bytes = self._checked(0, self.size_bytes), self.size_bytes
        with self._lock:
            if self._closed:
                raise ValueError("this memory is closed")
            if others := sorted(set(self._users) - {_BUFFER}):
                raise BusyError(f"Python cannot have a buffer of memory that is in use: {', '.join(others)}")
            ADDRESSES.touch(address, address + size_bytes)
            self._users[_BUFFER] = self._users.get(_BUFFER, 0) + 1
        view = memoryview(ffi.buffer(self._struct.base, size_bytes)).cast("B")
        try:
            yield view
        finally:
            try:
                view.release()
            except BufferError:
                raise BusyError("something still has the buffer of this memory, which stays in use") from None
            ADDRESSES.untouch(address, address + size_bytes)
            self.release(_BUFFER)

    def _checked(self, offset: int, size_bytes: int, *, reading: bool = False) -> int:
        """The address of a range of bytes inside, which may be changed, or `reading` only read."""
        if self._closed:
            raise ValueError("this memory is closed")
        if not self.address:
            raise ValueError("this memory is not mapped")
        if self._kind in _READ_ONLY and not reading:
            raise ValueError("this memory is read only")
        if offset < 0 or size_bytes < 0 or offset + size_bytes > self.size_bytes:
            raise ValueError(f"{size_bytes} bytes at {offset} are not inside memory of {self.size_bytes} bytes")
        return self.address + offset

    # ---- its life

    def acquire(self, user: str) -> None:
        """Notes that `user` (a word for the error message) works on this memory until it calls `release`. `BusyError`
        for one that makes it lazy while Python has a buffer of it."""
        with self._lock:
            if self._closed:
                raise ValueError("this memory is closed")
            if user == "pager" and _BUFFER in self._users:  # it would make pages missing behind the buffer
                raise BusyError(f"no {user} can have this memory while Python has a buffer of it")
            self._users[user] = self._users.get(user, 0) + 1

    def release(self, user: str) -> None:
        with self._lock:
            self._users[user] -= 1
            if not self._users[user]:
                del self._users[user]
            last = self._dropped and not self._users
        if last:
            self.close()

    @contextlib.contextmanager
    def in_use(self, user: str) -> Iterator[Memory]:
        """Keeps the memory from being closed inside the block."""
        self.acquire(user)
        try:
            yield self
        finally:
            self.release(user)

    def close(self) -> None:
        """Unmaps and closes. Twice does no harm. `BusyError` while it is in use."""
        with self._lock:
            if self._closed:
                return
            if self._users:
                raise BusyError(f"memory cannot be closed, it is in use: {', '.join(sorted(self._users))}")
            self._closed = True
        if self._kind is MemoryKind.FILE:
            os.close(self._struct.fd)
            self._struct.fd = -1
        elif self._mapped:
            lib.pc_memory_destroy(self._struct)
        else:
            self._struct.base = ffi.NULL
            self._owner = None

    def drop(self) -> None:
        """Closes now, or when the last user releases it. For an owner that ends before, say, the pager of its
        memory."""
        with self._lock:
            self._dropped = True
            in_use = bool(self._users)
        if not in_use:
            self.close()

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Only what is not in use: leaking memory is better than unmapping what a fault thread still writes to.
        if not getattr(self, "_closed", True) and not self._users:
            self.close()


def page_bytes_of(kind: str) -> int:
    """The page size of a kind of memory, asked of the system. `ResourceError` for hugetlb on a kernel without it."""
    if kind != MemoryKind.HUGETLB:
        return int(lib.pc_page_bytes())
    size_bytes = int(lib.pc_huge_page_bytes())
    if not size_bytes:
        raise ResourceError("this kernel has no huge pages", "use --backing memfd")
    return size_bytes


def mapped_kind(kind: str) -> MemoryKind:
    """One of the kinds that can be made. `ConfigurationError` for any other word."""
    if kind in (MemoryKind.MEMFD, MemoryKind.ANON, MemoryKind.HUGETLB):
        return MemoryKind(kind)
    raise ConfigurationError(f"unknown kind of memory {kind!r}; there are memfd, anon and hugetlb")


def checked_size(size_bytes: int) -> int:
    """The same number. `ConfigurationError` for one that no memory has."""
    if not 0 < size_bytes < 1 << 62:  # more does not fit the types of the core
        raise ConfigurationError(f"memory cannot have {size_bytes} bytes")
    return size_bytes


def memory_error(result: int, line: ErrorLine) -> PostcopyError:
    """What went wrong in making memory, or would."""
    text, _, remedy = (str(line) or f"memory: {os.strerror(-result)}").partition("; remedy: ")
    if result == -errno.EINVAL:
        return ConfigurationError(text)
    if result == -errno.ENOMEM:
        return ResourceError(text, remedy or "ask for less memory, or free some")
    if result == -errno.ENOTSUP:
        return ResourceError(text, remedy or "use --backing memfd")
    return CoreError(-result, "memory", text)


def _open_again(fd: int) -> int:
    """The same file with a position of its own, which looking for data moves: that of a copy is also the other
    process's. Where this user may not open the file it is a copy all the same."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return os.dup(fd)


def _struct(base: Any, size_bytes: int, page_bytes: int, kind: MemoryKind, fd: int = -1) -> Any:
    return ffi.new("struct pc_memory *", [base, size_bytes, page_bytes, CORE_KINDS[kind], fd])
