# SPDX-License-Identifier: Apache-2.0
"""What Firecracker says to the handler of its page faults: one message on a connected AF_UNIX stream socket.

The message is a JSON array with an object for each region of guest memory, and with it comes one descriptor, the
userfaultfd (SCM_RIGHTS). Nothing else is ever sent, and nothing is expected back. By version the objects have

| Firecracker | fields |
|---|---|
| 1.1 to 1.6 | ``base_host_virt_addr``, ``size``, ``offset`` |
| 1.7 to 1.11 | these and ``page_size_kib`` |
| 1.12 and later | these and ``page_size`` |

Both page sizes are *bytes*, whatever the name says. They are checked, but not relied on: the kernel knows how the
memory is mapped (`mapped_page_bytes`). Fields that are not known are ignored. ``offset`` is where the region begins in
the snapshot's memory file. Two regions may be adjacent in memory in an order that is not that of the file.

Who connects is not trusted: the message is bounded in length and in time, each number is checked, descriptors are
counted, and those that are not taken are closed.

Resource handling: a `Handshake` owns its userfaultfd until `detach` or `close`.
"""

from __future__ import annotations

import array
import contextlib
import errno
import itertools
import os
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import trio

from postcopy._blocking import run_briefly
from postcopy._fd import FdHolder
from postcopy._native import ffi, lib
from postcopy.errors import ConnectionLost, PeerError, ProtocolError, out_of_files
from postcopy.uffd import RegisterMode

HANDSHAKE_S = 10.0
"""How long a peer may take to send it."""
MAX_MESSAGE_BYTES = 16 << 10
MAX_REGIONS = 32
_MAX_DESCRIPTORS = 8  # so many are received, to be counted
_ADDRESSES = 1 << 57  # of a process, with five levels of page tables
_PAGE_SIZES = (4 << 10, 2 << 20, 1 << 30)
_SO_PEEK_OFF = 42  # <asm-generic/socket.h>
_PEEK_AGAIN_S, _PEEK_AGAIN_MAX_S = 0.005, 0.2
_USERFAULTFD = "anon_inode:[userfaultfd]"
_KERNEL_FEATURES = 1 << 31  # not a feature: that there was a UFFDIO_API


class Credentials(NamedTuple):
    """Who has connected, as the kernel says (SO_PEERCRED), with ids of this process's namespaces."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True)
class Region:
    """A piece of guest memory."""

    address: int  # in the VMM
    size_bytes: int
    offset: int  # in the memory file
    page_bytes: int  # as mapped


class _Region(msgspec.Struct, rename={"address": "base_host_virt_addr", "size_bytes": "size"}):
    """As it is sent."""

    address: int
    size_bytes: int
    offset: int
    page_size_kib: int | None = None
    page_size: int | None = None


class Handshake:
    """A userfaultfd with the regions that it guards."""

    def __init__(self, uffd: int, regions: tuple[Region, ...], features: int) -> None:
        self._uffd = FdHolder(uffd)
        self.regions = regions
        self.features = features
        """What the userfaultfd was opened with (`UffdFeature`)."""

    @property
    def uffd(self) -> int:
        return self._uffd.fileno()

    @property
    def memory_bytes(self) -> int:
        """How long the memory file has to be."""
        return max(region.offset + region.size_bytes for region in self.regions)

    def detach(self) -> int:
        """Gives the userfaultfd away."""
        return self._uffd.detach()

    def close(self) -> None:
        self._uffd.close()

    def __enter__(self) -> Handshake:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def peer_credentials(connection: socket.socket | trio.socket.SocketType) -> Credentials:
    """Who is at the other end of an AF_UNIX connection."""
    fields = struct.Struct("3i")
    return Credentials(*fields.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, fields.size)))


async def receive_handshake(
    connection: trio.socket.SocketType, timeout_s: float = HANDSHAKE_S, *, peek: bool = False
) -> Handshake:
    """The handshake that comes on a connection, checked against what the kernel says about the userfaultfd.

    `peek`: it stays in the connection, so that another process that has a copy of it may receive it too; what comes of
    it has a copy of the userfaultfd. `consume_handshake` takes it out then.

    `ConnectionLost` when the peer closes it before, `ProtocolError` that names what is wrong with the message,
    `PeerError` when none has come in time. Then nothing is kept.
    """
    received = bytearray()
    descriptors: list[int] = []
    if peek:
        connection.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)  # from here on each look goes on behind the last one
    try:
        with trio.move_on_after(timeout_s):
            while (sent := _decode(received)) is None:
                received += await _receive(connection, descriptors, peek)
            if len(descriptors) != 1:
                raise ProtocolError(
                    f"{len(descriptors)} descriptors came with the handshake where one was expected, the userfaultfd:"
                    " this protocol is not that of Firecracker's releases"
                )
            return await run_briefly(_check, descriptors, sent)
        raise PeerError(f"no handshake has come within {timeout_s:g} s")
    finally:
        _close(descriptors)


def consume_handshake(connection: trio.socket.SocketType) -> None:
    """Takes a handshake that was looked at out of the connection. Never blocks."""
    descriptors: list[int] = []
    with contextlib.suppress(BlockingIOError, ProtocolError, ConnectionLost):
        while True:
            _receive_now(connection, descriptors, 0)
    others = []  # which a peer has sent since
    for fd in descriptors:
        if os.readlink(f"/proc/self/fd/{fd}") == _USERFAULTFD:
            os.close(fd)
        else:
            others.append(fd)
    if others:  # to close the last copy of a socket may take long (SO_LINGER)
        threading.Thread(target=_close, args=(others,), name="pc-close", daemon=True).start()


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


async def _receive(connection: trio.socket.SocketType, descriptors: list[int], peek: bool) -> bytes:
    pause_s = _PEEK_AGAIN_S
    while True:
        await trio.lowlevel.wait_readable(connection)
        try:
            return _receive_now(connection, descriptors, socket.MSG_PEEK if peek else 0)
        except BlockingIOError:  # (what was looked at already makes it readable)
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, _PEEK_AGAIN_MAX_S)


def _receive_now(connection: trio.socket.SocketType, descriptors: list[int], flags: int) -> bytes:
    space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
    flags |= socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
    plain = socket.socket(fileno=connection.fileno())
    try:
        data, ancillary, flags, _ = plain.recvmsg(MAX_MESSAGE_BYTES, space, flags)
    except BlockingIOError:
        raise
    except OSError as error:
        raise ConnectionLost(f"the connection was lost before the handshake: {error.strerror}") from error
    finally:
        plain.detach()
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
            descriptors.extend(numbers)
    if flags & socket.MSG_CTRUNC and len(descriptors) < _MAX_DESCRIPTORS:
        raise out_of_files(errno.EMFILE, "the userfaultfd of the handshake cannot be taken")
    if flags & socket.MSG_CTRUNC or len(descriptors) > _MAX_DESCRIPTORS:
        raise ProtocolError(f"more than {_MAX_DESCRIPTORS} descriptors came with the handshake, where one was expected")
    if not data:
        raise ConnectionLost("the connection was closed before the handshake: the load of the snapshot may have failed")
    return data


def _decode(received: bytes | bytearray) -> list[_Region] | None:
    """What was sent; None while there is more to come."""
    if not received:
        return None
    try:
        return msgspec.json.decode(received, type=list[_Region])
    except msgspec.ValidationError as error:
        raise ProtocolError(f"the handshake is wrong: {_printable(str(error))}") from error
    except RecursionError as error:  # a field that is not known is skipped, however deep
        raise ProtocolError("the handshake is not the JSON that Firecracker sends: it is nested too deep") from error
    except ValueError as error:  # as msgspec's and UnicodeDecodeError are
        if "truncated" in str(error) and len(received) < MAX_MESSAGE_BYTES:
            return None
        raise ProtocolError(
            f"the handshake is not the JSON that Firecracker sends: {_printable(str(error))}"
        ) from error


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[:120]


def _check(descriptors: list[int], sent: list[_Region]) -> Handshake:
    """In a worker: the kernel may make calls wait for as long as the peer's memory map is locked."""
    (uffd,) = descriptors
    features = userfaultfd_features(uffd)
    regions = check_regions(
        Region(region.address, region.size_bytes, region.offset, mapped_page_bytes(uffd, region.address))
        for region in _check_pages(sent)
    )
    for region in regions:  # so that a region is not said to be larger than it is: that costs memory here
        mapped_page_bytes(uffd, region.address + region.size_bytes - region.page_bytes)
    os.set_blocking(uffd, False)  # of the open file, so that it holds for the peer too, which wants it as well
    handshake = Handshake(uffd, regions, features)
    descriptors.clear()
    return handshake


def _check_pages(sent: list[_Region]) -> list[_Region]:
    """Before the kernel is asked about any of them."""
    if not 0 < len(sent) <= MAX_REGIONS:
        raise ProtocolError(f"the handshake has {len(sent)} regions, not 1 to {MAX_REGIONS}")
    for region in sent:
        if min(region.address, region.size_bytes, region.offset) < 0 or region.size_bytes == 0:
            raise ProtocolError(f"the handshake has a region with impossible numbers: {_shown(region)}")
        if max(region.address + region.size_bytes, region.offset + region.size_bytes) > _ADDRESSES:
            raise ProtocolError(f"the handshake has a region that no process can have: {_shown(region)}")
        for said in (region.page_size, region.page_size_kib):
            if said is not None and said not in _PAGE_SIZES:
                raise ProtocolError(f"the handshake has a page size of {said} bytes, which no memory has")
    return sent


def check_regions(given: Any) -> tuple[Region, ...]:
    """The regions, in the order of the memory file. `ProtocolError` for such as overlap, or are not whole pages."""
    regions: tuple[Region, ...] = tuple(sorted(given, key=lambda region: (region.offset, region.address)))
    for region in regions:
        if (region.address | region.size_bytes | region.offset) % region.page_bytes:
            raise ProtocolError(f"the handshake has a region that is not whole pages: {_shown(region)}")
    by_address = sorted(regions, key=lambda region: region.address)
    for low, high in itertools.pairwise(by_address):
        if low.address + low.size_bytes > high.address:
            raise ProtocolError(f"regions of the handshake overlap in memory: {_shown(low)}, {_shown(high)}")
    for low, high in itertools.pairwise(regions):
        if low.offset + low.size_bytes > high.offset:
            raise ProtocolError(f"regions of the handshake overlap in the memory file: {_shown(low)}, {_shown(high)}")
    return regions


def _shown(region: Region | _Region) -> str:
    return f"{region.size_bytes} bytes at {region.address:#x}, offset {region.offset}"


def userfaultfd_features(fd: int) -> int:
    """The features (`UffdFeature`) that a userfaultfd was opened with. `ProtocolError` for any other descriptor, and
    for one that has had no UFFDIO_API."""
    try:
        if os.readlink(f"/proc/self/fd/{fd}") != _USERFAULTFD:
            raise ProtocolError("the descriptor that came with the handshake is not a userfaultfd")
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        (api,) = (line for line in lines if line.startswith("API:"))
        features = int(api.split(":")[2], 16)
    except (OSError, ValueError, IndexError) as error:
        raise PeerError(f"what the userfaultfd was opened with cannot be read from /proc: {error}") from error
    if not features & _KERNEL_FEATURES:
        raise ProtocolError("the userfaultfd that came with the handshake has not had its UFFDIO_API")
    return features & ~_KERNEL_FEATURES


def mapped_page_bytes(uffd: int, address: int) -> int:
    """How large the pages at `address` are, in the process that the userfaultfd belongs to.

    The kernel is asked to register one page, as it is already: of a size that is less than that of the mapping's pages
    it refuses it (EINVAL), else nothing changes.
    """
    ioctls = ffi.new("uint64_t *")
    for size_bytes in _PAGE_SIZES:
        result = 0 if address % size_bytes == 0 else -errno.EINVAL
        if result == 0:
            result = lib.pc_uffd_register(uffd, address, size_bytes, RegisterMode.MISSING, ioctls)
        if result == 0:
            return size_bytes
        if result in (-errno.ESRCH, -errno.ENOMEM):  # the kernel says ENOMEM where there is no memory map any more
            raise ConnectionLost("the process has ended")
        if result != -errno.EINVAL:
            raise ProtocolError(
                f"the region at {address:#x} of the handshake cannot be registered: {os.strerror(-result)}"
            )
    raise ProtocolError(
        f"there is no memory at {address:#x}, where the handshake has a region, that its userfaultfd can guard"
    )
