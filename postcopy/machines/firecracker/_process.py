# SPDX-License-Identifier: Apache-2.0
"""What the kernel tells of a Firecracker that runs: where its guest's memory is, who guards that, and a directory in
which it can leave a file for us.

Nothing of this asks Firecracker, or is noticed by it. It takes the right to trace it: being its user, or root.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import platform
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from postcopy._fd import FdHolder
from postcopy._native import lib
from postcopy.errors import CoreError, MigrationError, PostcopyError, ResourceError
from postcopy.machines._maps import areas
from postcopy.machines.firecracker.handshake import Region
from postcopy.units import format_size

_MIB = 1 << 20
_GIB = 1 << 30
_RSDP = (0xE0000, b"RSD PTR ")  # what Firecracker puts into the first region: the ACPI tables' pointer, from 1.8 on,
_MP_TABLE = (0x9FC00, b"_MP_")  # and the MultiProcessor table, before

_HUGE_PAGES = "/anon_hugepage"  # the name of memory of huge pages, which is in no file


# ---- the guest's memory


@dataclass(frozen=True)
class Area:
    """A mapping of a process, or several that are adjacent."""

    start: int
    end: int
    page_bytes: int
    absent: frozenset[str]  # where pages that are absent are: at a page fault handler ("um", "ui"), in a "file"
    protected: bool  # writes are told to a userfaultfd

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


def region_sizes(version: tuple[int, int], memory_bytes: int) -> list[int]:
    """How Firecracker cuts guest memory into regions: it leaves out what the guest's devices have of the addresses."""
    if platform.machine() != "x86_64":
        limits = [256 * _GIB]
    elif version < (1, 13):
        limits = [3328 * _MIB, 1 << 62]
    else:
        limits = [3072 * _MIB, 252 * _GIB, 1 << 62]
    sizes = []
    for limit in limits:
        if memory_bytes:
            sizes.append(min(memory_bytes, limit))
            memory_bytes -= sizes[-1]
    if memory_bytes:
        raise MigrationError("how Firecracker lays out a guest of so much memory on this kind of CPU is not known here")
    return sizes


def guest_areas(pid: int) -> list[Area]:
    """The mappings that may be guest memory, from low to high: Firecracker maps nothing else without reserving swap
    space. Takes as long as its page tables are large."""
    return list(_joined(_guest_areas(pid)))


def _guest_areas(pid: int) -> Iterator[Area]:
    for one in areas(pid, f"Firecracker (process {pid})", flags=True):
        if one.rights == "rw-p" and "nr" in one.flags:
            of_file = one.inode and not one.path.startswith(_HUGE_PAGES)
            absent = one.flags & {"um", "ui"} | ({"file"} if of_file else set())
            yield Area(one.start, one.end, one.page_bytes, absent, "uw" in one.flags)


def _joined(found: Iterable[Area]) -> Iterator[Area]:
    """The kernel makes one mapping of two that are adjacent and alike, and cuts one in two where they are not."""
    last: Area | None = None
    for area in found:
        if last is not None and (last.end, last.page_bytes) == (area.start, area.page_bytes):
            absent, protected = last.absent | area.absent, last.protected or area.protected
            area = Area(last.start, area.end, area.page_bytes, absent, protected)
        elif last is not None:
            yield last
        last = area
    if last is not None:
        yield last


def find_regions(pid: int, sizes: Sequence[int], areas: Sequence[Area]) -> tuple[Region, ...]:
    """Where the regions of guest memory are, in the order of their guest addresses. `MigrationError` where that is not
    certain."""
    found = [[area for area in areas if area.size_bytes == size] for size in sizes]
    if all(len(fitting) == 1 for fitting in found) and len(set(sizes)) == len(sizes):
        return _placed(sizes, [fitting[0].start for fitting in found], found[0][0].page_bytes)
    whole = [area for area in areas if area.size_bytes == sum(sizes)]
    shown = " + ".join(format_size(size) for size in sizes)
    if len(sizes) == 1 or len(whole) != 1:
        have = ", ".join(format_size(area.size_bytes) for area in areas) or "none"
        raise MigrationError(
            f"where Firecracker (process {pid}) has its guest's memory of {shown} is not certain: it has mappings of"
            f" {have}"
        )
    # One mapping of all regions. In which order is seen by what Firecracker has put into the first one.
    (area,) = whole
    candidates = [
        _placed(sizes, list(_adjacent(area.start, sizes)), area.page_bytes),
        _placed(sizes, list(reversed(list(_adjacent(area.start, sizes[::-1])))), area.page_bytes),
    ]
    fitting = [regions for regions in candidates if _begins_a_guest(pid, regions[0].address)]
    if len(fitting) != 1:
        raise MigrationError(
            f"the regions of guest memory of Firecracker (process {pid}), {shown}, are adjacent, and in which order is"
            " not seen: the guest has overwritten the tables by which they are told apart"
        )
    return fitting[0]


def _adjacent(start: int, sizes: Sequence[int]) -> Iterator[int]:
    return itertools.accumulate(sizes[:-1], initial=start)


def _placed(sizes: Sequence[int], addresses: Sequence[int], page_bytes: int) -> tuple[Region, ...]:
    offsets = itertools.accumulate(sizes[:-1], initial=0)
    return tuple(
        Region(address, size, offset, page_bytes)
        for address, size, offset in zip(addresses, sizes, offsets, strict=True)
    )


def _begins_a_guest(pid: int, address: int) -> bool:
    """Whether the guest's first addresses are there."""
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for offset, text in (_RSDP, _MP_TABLE):
            with contextlib.suppress(OSError):  # a page that is missing
                if os.pread(fd, len(text), address + offset) == text:
                    return True
        return False
    finally:
        os.close(fd)


# ---- its userfaultfd


def userfaultfd_of(pid: int, pidfd: int) -> FdHolder | None:
    """A copy of the one userfaultfd that the process has; None when it has none. `PostcopyError` for several."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}") == "anon_inode:[userfaultfd]":
                    found.append(int(name))
    if not found:
        return None
    if len(found) > 1:
        raise MigrationError(f"Firecracker (process {pid}) has {len(found)} userfaultfds, where one was expected")
    got = lib.pc_remote_descriptor(pidfd, found[0])
    if got < 0:
        raise CoreError(-got, f"taking the userfaultfd of Firecracker (process {pid})")
    return FdHolder(got)


# ---- files that it writes

_PLACES = ("dev/shm", "run", "tmp")


class Exchange:
    """A directory of our own in the root directory of a process, on tmpfs where that has one: what the process is told
    to write there is read here.

    It belongs to the process's user, who is not trusted: nothing in it is followed, and what is read is bounded. Until
    `close`."""

    def __init__(self, place: int, name: str, path: str, directory: int) -> None:
        self._place = FdHolder(place)
        self._name = name
        self._directory = FdHolder(directory)
        self.path = path  # as the process sees it
        self._files = 0

    @classmethod
    def open(cls, pid: int) -> Exchange:
        """`ResourceError` where no directory can be made."""
        try:
            uid, gid = _files_belong_to(pid)
            root = FdHolder(os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as error:
            raise _no_directory(pid, error) from error
        reason = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        with root:
            tmpfs = _tmpfs_devices(pid)
            for place, any_device in [*((place, False) for place in _PLACES), ("tmp", True), ("", True)]:
                try:
                    return cls._make(root.fd, place, None if any_device else tmpfs, uid, gid)
                except OSError as error:
                    reason = error if error.errno != errno.ENOENT else reason
        raise _no_directory(pid, reason)

    @classmethod
    def _make(cls, root: int, place: str, devices: frozenset[int] | None, uid: int, gid: int) -> Exchange:
        at = _descend(root, place)
        name = f"postcopy-{secrets.token_hex(8)}"
        made = False
        try:
            if devices is not None and os.fstat(at).st_dev not in devices:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            os.mkdir(name, 0o700, dir_fd=at)
            made = True
            if os.geteuid() == 0:
                os.chown(name, uid, gid, dir_fd=at, follow_symlinks=False)
            directory = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
        except BaseException:
            if made:
                with contextlib.suppress(OSError):
                    os.rmdir(name, dir_fd=at)
            os.close(at)
            raise
        return cls(at, name, f"/{place}/{name}" if place else f"/{name}", directory)

    def inside(self, name: str) -> str:
        """A path by which this process comes to a file of that name, which it removes itself."""
        return f"/proc/self/fd/{self._directory.fileno()}/{name}"

    def new_name(self) -> str:
        """Of a file that is not there."""
        self._files += 1
        return f"state-{self._files}"

    def take(self, name: str, limit_bytes: int) -> bytes:
        """What was written to a file, which is removed. `FileNotFoundError` when there is none; `MigrationError` for
        one that is too long, or no file."""
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._directory.fileno())
        with open(fd, "rb") as file:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._directory.fileno())
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise MigrationError("what Firecracker has written is no regular file")
            content = file.read(limit_bytes + 1)
        if len(content) > limit_bytes:
            raise MigrationError(f"what Firecracker has written is longer than {limit_bytes} bytes")
        return content

    def close(self) -> None:
        """Twice does no harm. What the process has put there beside stays, with the directory."""
        if self._place.closed:
            return
        for number in range(1, self._files + 1):
            with contextlib.suppress(OSError):
                os.unlink(f"state-{number}", dir_fd=self._directory.fd)
        self._directory.close()
        with contextlib.suppress(OSError):
            os.rmdir(self._name, dir_fd=self._place.fd)
        self._place.close()


def _no_directory(pid: int, error: OSError) -> PostcopyError:
    if error.errno in (errno.ESRCH, errno.ENOENT) and not os.path.exists(f"/proc/{pid}"):
        return MigrationError(f"Firecracker (process {pid}) has ended")
    return ResourceError(
        f"no directory can be made in which Firecracker (process {pid}) writes its state: {error.strerror}",
        "run as the user of that Firecracker, or as root",
    )


def _files_belong_to(pid: int) -> tuple[int, int]:
    """User and group of files that a process makes."""
    with open(f"/proc/{pid}/status") as file:
        fields = dict(line.split(":", 1) for line in file if ":" in line)
    return int(fields["Uid"].split()[3]), int(fields["Gid"].split()[3])


def _descend(root: int, path: str) -> int:
    """A directory below, on a way without symbolic links: those of another root directory would lead into ours."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    at = os.open(".", flags, dir_fd=root)
    for name in path.split("/") if path else []:
        try:
            below = os.open(name, flags, dir_fd=at)
        finally:
            os.close(at)
        at = below
    return at


def _tmpfs_devices(pid: int) -> frozenset[int]:
    devices = set()
    with contextlib.suppress(OSError), open(f"/proc/{pid}/mountinfo") as file:
        for line in file:
            words, _, kind = line.partition(" - ")
            if kind.split(" ", 1)[0] in ("tmpfs", "ramfs"):
                major, _, minor = words.split()[2].partition(":")
                devices.add(os.makedev(int(major), int(minor)))
    return frozenset(devices)
