# SPDX-License-Identifier: Apache-2.0
"""Asks the preload library of a program (csrc/preload/preload.h) for its memory and for a userfaultfd that guards it.

A connection for each request, bounded in time; nothing is kept between them. The program is not trusted: what it says
of its mappings is compared with what the kernel says of the descriptors that came, and of the process's addresses.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import enum
import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import trio

from postcopy._blocking import run_sync
from postcopy._fd import FdHolder
from postcopy.errors import (
    NO_FILES,
    BusyError,
    ConfigurationError,
    CoreError,
    MigrationError,
    ProtocolError,
    ResourceError,
    out_of_files,
)
from postcopy.machines._maps import Area, areas
from postcopy.machines._peer import MAX_SOCKET_PATH_BYTES, Process, connected, pid_of, process_of
from postcopy.machines.firecracker.handshake import userfaultfd_features
from postcopy.uffd import UffdFeature

TIMEOUT_S = 5.0
MAX_MAPPINGS = 128
VARIABLE = "POSTCOPY_PRELOAD"
"""In the environment of such a program: the path of its socket."""

_MAGIC, _VERSION = 0x52504350, 1
_REQUEST = struct.Struct("=IHHIIQQ")
_RANGE = struct.Struct("=QQ")
_REPLY = struct.Struct("=IHHiIIIIIQ")
_MAPPING = struct.Struct("=QQQQQI4x208s")
_REPLY_BYTES = _REPLY.size + MAX_MAPPINGS * _MAPPING.size
_IN_MEMORY = {0x01021994, 0x958458F6}  # the file systems tmpfs (memfd too) and hugetlbfs, in statfs(2)
_MAX_PAGE_BYTES = 1 << 34


class _Op(enum.IntEnum):
    LIST = 1
    ARM = 2
    TAKE = 3
    DISARM = 4


_KEEP = 1  # a flag of ARM


class _Step(enum.IntEnum):
    DONE = 0
    REQUEST = 1
    PEER = 2
    RANGE = 3
    KEPT = 4
    OPEN = 5
    FEATURES = 6
    REGISTER = 7
    GUARDED = 8


class State(enum.IntFlag, boundary=enum.KEEP):
    """Of a program, at the time of the last answer."""

    KEPT = 1  # its memory is guarded, by a userfaultfd that it keeps
    LAZY = 2  # it is guarded since it was mapped, and nobody has asked for the userfaultfd yet
    LOST = 4  # it has mappings that the library does not know


@dataclass(frozen=True)
class Mapping:
    """A shared, writable mapping of a file in memory, at the addresses of the program. The owner of a list of them
    closes each `fd`."""

    address: int
    size_bytes: int
    offset: int  # in the file
    page_bytes: int
    device: int  # st_dev
    inode: int
    name: str  # of the file: its path, or "/memfd:NAME (deleted)"
    fd: FdHolder


@dataclass(frozen=True)
class Armed:
    """What guards memory of a program: in the program, by addresses of the program."""

    uffd: FdHolder
    features: UffdFeature  # that it was opened with


@dataclass(frozen=True)
class _Reply:
    state: State
    features: int
    mappings: Sequence[tuple[int, int, int, int, int, int, bytes]]
    descriptors: list[FdHolder]  # the caller's


class Preload:
    """The library in one process. It keeps nothing open, and needs no end."""

    def __init__(self, pid: int, path: str) -> None:
        self.pid = pid
        self.path = path
        self.state = State(0)

    @classmethod
    async def of_process(cls, pid: int, path: str | None = None) -> Preload:
        """`path`: of its socket; where it is None, the process's environment tells. `ResourceError` for a process
        without the library, `MigrationError` for a socket that is another process's."""
        at: str = path if path is not None else await run_sync(_path_of, pid)
        with await _connect(at) as connection:
            if (found := pid_of(connection)) != pid:
                raise MigrationError(f"{at} is the socket of process {found}, not of process {pid}")
        return cls(pid, at)

    async def mappings(self) -> list[Mapping]:
        """All of them, in the order in which they were made. `ProtocolError` for what the kernel does not confirm."""
        reply = await self._ask(_Op.LIST)
        with _closing_on_error(reply.descriptors):
            if State.LOST in reply.state:
                raise MigrationError(
                    f"process {self.pid} has more mappings of files in memory than its preload library knows: more than"
                    f" {MAX_MAPPINGS}, or it had no descriptor left for one"
                )
            found = [
                Mapping(address, size, offset, page_bytes, device, inode, _name(name), fd)
                for (address, size, offset, device, inode, page_bytes, name), fd in zip(
                    reply.mappings, reply.descriptors, strict=True
                )
            ]
            await run_sync(_check, self.pid, found)
        return found

    async def arm(self, mappings: Sequence[Mapping], *, features: int, mode: int, keep: bool) -> Armed:
        """A new userfaultfd of that process, with the mappings registered, if any; of a program that was started with
        ``--lazy``, the one that guards them already, with the features that it has.

        `features`: of `UffdFeature`; `mode`: of `RegisterMode`. `keep`: the process keeps a copy until `disarm`, so
        that it waits when this process dies; without it the end of the last copy undoes it all. `BusyError` when the
        process keeps one already; `ConfigurationError` where one of the mappings has its file mapped elsewhere, too.

        Where this fails, or is cancelled, after the request has gone, it may have happened: `take` tells.
        """
        armed = await self._userfaultfd(_Op.ARM, _KEEP if keep else 0, mappings, features, mode)
        with _closing_on_error([armed.uffd]):
            await run_sync(_check_mapped_once, self.pid, mappings)
        return armed

    async def take(self) -> Armed:
        """The userfaultfd that the process keeps, once more: its owner has ended. `MigrationError` where it keeps
        none."""
        return await self._userfaultfd(_Op.TAKE)

    async def disarm(self) -> None:
        """The process keeps its userfaultfd no longer. `BusyError` where memory is registered with it still: what is
        missing there would read as zeros."""
        _close((await self._ask(_Op.DISARM)).descriptors)

    async def _userfaultfd(
        self, op: _Op, flags: int = 0, mappings: Sequence[Mapping] = (), features: int = 0, mode: int = 0
    ) -> Armed:
        reply = await self._ask(op, flags, mappings, features, mode)
        with _closing_on_error(reply.descriptors):
            if len(reply.descriptors) != 1:
                raise ProtocolError(f"{self}: {len(reply.descriptors)} descriptors came where one was expected")
            (uffd,) = reply.descriptors
            found = userfaultfd_features(uffd.fileno())
            if features & ~found:
                raise ProtocolError(f"{self}: the userfaultfd that came lacks {_features(features & ~found)}")
            os.set_blocking(uffd.fileno(), False)
            return Armed(uffd, UffdFeature(found))

    async def _ask(
        self, op: _Op, flags: int = 0, mappings: Sequence[Mapping] = (), features: int = 0, mode: int = 0
    ) -> _Reply:
        message = _REQUEST.pack(_MAGIC, _VERSION, op, flags, len(mappings), features, mode)
        message += b"".join(_RANGE.pack(mapping.address, mapping.size_bytes) for mapping in mappings)
        descriptors: list[FdHolder] = []
        with _closing_on_error(descriptors):
            with await _connect(self.path) as connection:
                if (pid := pid_of(connection)) != self.pid:
                    raise MigrationError(f"{self} has ended: process {pid} has its socket now")
                with trio.move_on_after(TIMEOUT_S) as scope:
                    data = await _exchange(connection, message, descriptors, self)
            if scope.cancelled_caught:
                raise MigrationError(f"{self} has not answered within {TIMEOUT_S:g} s: is it stopped?")
            reply = self._decode(data, op, descriptors, mappings, features)
        self.state = reply.state
        return reply

    def _decode(
        self, data: bytes, op: _Op, descriptors: list[FdHolder], mappings: Sequence[Mapping], features: int
    ) -> _Reply:
        if len(data) < _REPLY.size:
            raise ProtocolError(f"{self}: an answer of {len(data)} bytes")
        magic, version, of, error, step, index, count, state, _, said = _REPLY.unpack_from(data)
        if magic != _MAGIC:
            raise ProtocolError(f"{self}: what came is no answer of a preload library")
        if version != _VERSION:
            raise ResourceError(
                f"{self} is of another version ({version}, here {_VERSION})", "start the program with this postcopy"
            )
        if error:
            raise self._refusal(error, step, mappings[index] if index < len(mappings) else None, features & ~said)
        if of != op or count > MAX_MAPPINGS or len(data) != _REPLY.size + count * _MAPPING.size:
            raise ProtocolError(f"{self}: an answer that makes no sense")
        if op is _Op.LIST and len(descriptors) != count:
            raise ProtocolError(f"{self}: {len(descriptors)} descriptors for {count} mappings")
        return _Reply(State(state), said, list(_MAPPING.iter_unpack(data[_REPLY.size :])), descriptors)

    def _refusal(self, number: int, step: int, mapping: Mapping | None, lacking: int) -> Exception:
        reason = os.strerror(number)
        where = f"the mapping at {mapping.address:#x} of {mapping.name}" if mapping else "a mapping"
        if step == _Step.PEER:
            return ResourceError(f"{self} answers its own user and root only", "run as one of them")
        if step == _Step.RANGE:
            return MigrationError(f"{self}: {where} is not there any more")
        if step == _Step.KEPT and number == errno.EBUSY:
            return BusyError(f"{self}: its memory is guarded for another migration")
        if step == _Step.KEPT:
            return MigrationError(f"{self}: it keeps no userfaultfd")
        if step == _Step.GUARDED:
            return BusyError(f"{self}: its memory is guarded still, so it may not all be there")
        if step == _Step.OPEN:
            return ResourceError(
                f"{self} can have no userfaultfd that stops faults raised inside the kernel: {reason}",
                "start it with `postcopy run` as a user who may open /dev/userfaultfd (docs/privileges.md)",
            )
        if step == _Step.FEATURES and number == errno.EINVAL:
            return ResourceError(f"the userfaultfd of {self} lacks {_features(lacking) or 'a feature'}")
        if step == _Step.REGISTER and number == errno.EBUSY:
            return BusyError(f"{self}: {where} is guarded by another userfaultfd")
        return CoreError(number, f"{self}: guarding {where}")

    def __str__(self) -> str:
        return f"the preload library of process {self.pid}"


def _features(bits: int) -> str:
    return UffdFeature(bits).name or hex(bits) if bits else ""


def _name(raw: bytes) -> str:
    text = raw.split(b"\0", 1)[0].decode("utf-8", "replace")
    return "".join(char if char.isprintable() else "?" for char in text)


# ---- the socket


def _path_of(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            content = file.read()
    except PermissionError as error:
        raise ResourceError(
            f"this user may not look at process {pid}", "run as the user of that process, or as root"
        ) from error
    except OSError as error:
        raise MigrationError(f"process {pid} has ended") from error
    for variable in content.split(b"\0"):
        name, _, value = variable.partition(b"=")
        if name == VARIABLE.encode() and value:
            return os.fsdecode(value)
    raise ResourceError(f"process {pid} was not started by `postcopy run`", "start it with `postcopy run -- COMMAND`")


async def process_at(path: str) -> Process:
    """The process that has this socket; its pidfd is the caller's. Errors as for `Preload.of_process`."""
    with await _connect(path) as connection:
        return process_of(connection, path, "the program")


async def _connect(path: str) -> trio.socket.SocketType:
    """Within `TIMEOUT_S`."""
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise out_of_files(error.errno or 0) if error.errno in NO_FILES else error from error
    try:
        with trio.move_on_after(TIMEOUT_S):
            while not connected(connection, path):  # noqa: ASYNC110 -- it has one connection after the other
                await trio.sleep(0.01)
            return trio.socket.from_stdlib_socket(connection)
        raise MigrationError(f"the preload library at {path} has not answered within {TIMEOUT_S:g} s")
    except BaseException as error:
        connection.close()
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            raise ResourceError(
                f"{path}: no preload library answers there; the program has ended, or has mapped no file in memory yet",
                "start it with `postcopy run`",
            ) from error
        if isinstance(error, PermissionError):
            raise ResourceError(
                f"{path}: this user may not connect", "run as the user of that program, or as root"
            ) from error
        if isinstance(error, OSError) and error.errno == errno.EPROTOTYPE:
            raise ConfigurationError(f"{path} is another program's socket, and no preload library's") from error
        if isinstance(error, OSError):  # without a number: of a path that is too long
            why = error.strerror or f"the path of a socket has at most {MAX_SOCKET_PATH_BYTES} bytes"
            raise ResourceError(f"{path}: {why}") from error
        raise


async def _exchange(
    connection: trio.socket.SocketType, message: bytes, descriptors: list[FdHolder], who: Preload
) -> bytes:
    space = socket.CMSG_SPACE(MAX_MAPPINGS * array.array("i").itemsize)
    try:
        await connection.send(message)
        data, ancillary, flags, _ = await connection.recvmsg(_REPLY_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise MigrationError(f"{who} has ended the connection: {error.strerror}") from error
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
            descriptors.extend(map(FdHolder, numbers))
    if flags & socket.MSG_CTRUNC:
        raise ResourceError(f"not all descriptors of {who} fit into this process", "raise its limit (ulimit -n)")
    if flags & socket.MSG_TRUNC:
        raise ProtocolError(f"{who}: an answer of more than {_REPLY_BYTES} bytes")
    if not data:
        raise MigrationError(f"{who} has ended the connection")
    return bytes(data)


def _close(descriptors: Sequence[FdHolder]) -> None:
    for holder in descriptors:
        holder.close()


@contextlib.contextmanager
def _closing_on_error(descriptors: Sequence[FdHolder]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _close(descriptors)
        raise


# ---- what the kernel says


def _check(pid: int, mappings: Sequence[Mapping]) -> None:
    seen = areas(pid, f"process {pid}")
    for mapping in mappings:
        status = os.fstat(mapping.fd.fileno())
        page_bytes = mapping.page_bytes
        if not stat.S_ISREG(status.st_mode) or not is_in_memory(mapping.fd.fileno()):
            raise ProtocolError(f"process {pid}: {mapping.name} is no file in memory")
        if (status.st_dev, status.st_ino) != (mapping.device, mapping.inode) or _page_bytes(mapping) != page_bytes:
            raise ProtocolError(f"process {pid}: {mapping.name} is another file than was said")
        if fcntl.fcntl(mapping.fd.fileno(), fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            raise ProtocolError(f"process {pid}: {mapping.name} is not open for writing")
        if not 0 < page_bytes <= _MAX_PAGE_BYTES or (
            (mapping.address | mapping.size_bytes | mapping.offset) % page_bytes or not mapping.size_bytes
        ):
            raise ProtocolError(f"process {pid}: the mapping of {mapping.name} is not whole pages")
        if mapping.offset + mapping.size_bytes > status.st_size:
            raise MigrationError(
                f"process {pid} has mapped {mapping.size_bytes} bytes of {mapping.name}, which is shorter"
                f" ({status.st_size} bytes)"
            )
        if not _is_mapped(mapping, seen):
            raise ProtocolError(f"process {pid} does not have {mapping.name} mapped at {mapping.address:#x}")


def _check_mapped_once(pid: int, mappings: Sequence[Mapping]) -> None:
    """The library keeps the program from mapping what waits once more; what was mapped before, it may not know."""
    seen = areas(pid, f"process {pid}")
    for mapping in mappings:
        end = mapping.address + mapping.size_bytes
        for area in seen:
            if (area.device, area.inode) == (mapping.device, mapping.inode) and not mapping.address <= area.start < end:
                raise ConfigurationError(
                    f"process {pid} has mapped {mapping.name} a second time, at {area.start:#x} ({area.rights}): there"
                    " it would read zeros where pages have not arrived; it must map it once"
                )


def _is_mapped(mapping: Mapping, seen: Sequence[Area]) -> bool:
    at, end = mapping.address, mapping.address + mapping.size_bytes
    for area in seen:
        if at < end and area.shared and area.start <= at < area.end:
            same = (area.device, area.inode) == (mapping.device, mapping.inode)
            if not same or at - area.start + area.offset != at - mapping.address + mapping.offset:
                return False
            at = area.end
    return at >= end


def is_in_memory(fd: int) -> bool:
    """Whether a file is on a tmpfs (as a memfd is) or a hugetlbfs, by the type that fstatfs(2) tells, which Python does
    not."""
    found = (ctypes.c_long * 32)()  # longer than struct statfs, whose first field it is
    if _libc.fstatfs(fd, ctypes.byref(found)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found[0]) in _IN_MEMORY


def _page_bytes(mapping: Mapping) -> int:
    """(`st_blksize` is larger on a tmpfs that is mounted with huge=.)"""
    return os.fstatvfs(mapping.fd.fileno()).f_bsize


_libc = ctypes.CDLL(None, use_errno=True)
