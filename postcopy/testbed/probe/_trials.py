# SPDX-License-Identifier: Apache-2.0
"""What `postcopy probe` tries for real, in a process of its own that may hang, or be killed, without loss.

`run` prints one JSON line before each trial (``{"begin": name}``) and one after it. The parent reads both, so it knows
which trial a dead or hung child was in. Nothing here outlives the process: no file, no namespace, no queue, no memory.

A trial returns its facts; it raises `Lacking` for what this host does not have, `Unknown` where it could not be told.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import json
import mmap
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from postcopy._native import ffi, lib
from postcopy.errors import PostcopyError
from postcopy.memory import Memory, page_bytes_of
from postcopy.testbed import _linux
from postcopy.testbed._linux import libc
from postcopy.uffd import UffdFeature

Facts = dict[str, Any]

EVENT_DEADLINE_S = 3.0
"""For a fault that is on its way: a healthy one takes microseconds, a kernel that never tells takes for ever."""

SYS_IO_URING_SETUP = 425  # the same number on every architecture
TCP_ULP = 31
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
KVM_GET_API_VERSION, KVM_CREATE_VM = 0xAE00, 0xAE01
PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg), twelve words of 64 bits
PM_SCAN_WP_MATCHING, PM_SCAN_CHECK_WPASYNC = 1, 2
PAGE_IS_WRITTEN = 1 << 1
SOFT_DIRTY = 1 << 55  # of an entry of /proc/PID/pagemap


class Lacking(Exception):
    """This host does not have it; the text says what it said."""


class Unknown(Exception):
    """Could not be told; the text says why."""


def _reason(number: int) -> str:
    return f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"


def _core(result: int, what: str) -> int:
    if result < 0:
        raise Lacking(f"{what}: {_reason(-result)}")
    return result


def _system(result: int, what: str) -> int:
    if result < 0:
        raise Lacking(f"{what}: {_reason(ctypes.get_errno())}")
    return result


# ---- userfaultfd: pages really served


@contextlib.contextmanager
def _userfaultfd(features: int = 0) -> Iterator[tuple[int, int]]:
    """A userfaultfd of the best kind this user may have, and which kind."""
    api: Any = ffi.new("struct pc_uffd_api *")
    fd = _core(lib.pc_uffd_open(lib.PC_UFFD_ANY, features, api), "opening a userfaultfd")
    try:
        yield fd, int(api.how)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _memory(kind: str) -> Iterator[tuple[Memory, int]]:
    """Memory of one page, and its address. Not a context manager's own: a thread that still sleeps in it must not make
    closing wait."""
    try:
        memory = Memory.create(kind, page_bytes_of(kind))
    except PostcopyError as error:
        raise Lacking(getattr(error, "message", str(error))) from error
    with memory:
        yield memory, int(ffi.cast("uintptr_t", memory.struct.base))


class _Access(threading.Thread):
    """One byte read or written through C, without the GIL: the page may be missing. A daemon, since it may never
    return."""

    def __init__(self, address: int, write: int | None = None) -> None:
        super().__init__(daemon=True)
        self._address = address
        self._write = write
        self._buffer = ctypes.create_string_buffer(1)
        if write is not None:
            self._buffer[0] = bytes([write])
        self.start()

    def run(self) -> None:
        if self._write is None:
            libc.memcpy(self._buffer, ctypes.c_void_p(self._address), ctypes.c_size_t(1))
        else:
            libc.memcpy(ctypes.c_void_p(self._address), self._buffer, ctypes.c_size_t(1))

    def done(self) -> int:
        """The byte."""
        self.join(EVENT_DEADLINE_S)
        if self.is_alive():
            raise Lacking("the page was placed, but the access never went on")
        return self._buffer.raw[0]


class _KernelAccess(threading.Thread):
    """The same inside the kernel: write(2) of one byte into a pipe."""

    def __init__(self, address: int) -> None:
        super().__init__(daemon=True)
        self._address = address
        self._pipe = os.pipe()
        self._result = 0
        self._errno = 0
        self.start()

    def run(self) -> None:
        self._result = libc.write(self._pipe[1], ctypes.c_void_p(self._address), ctypes.c_size_t(1))
        self._errno = ctypes.get_errno()

    def done(self) -> int:
        """The byte, or the negative errno."""
        self.join(EVENT_DEADLINE_S)
        if self.is_alive():
            raise Lacking("the page was placed, but the system call never went on")
        try:
            return -self._errno if self._result < 0 else os.read(self._pipe[0], 1)[0]
        finally:
            for fd in self._pipe:
                os.close(fd)


def _fault(fd: int) -> int:
    """The next pagefault's flags."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(EVENT_DEADLINE_S * 1000):
        raise Lacking("registered, but an access to the missing page raised no fault")
    events: Any = ffi.new("struct pc_uffd_event[4]")
    if _core(lib.pc_uffd_read(fd, events, 4), "reading the fault") < 1:
        raise Lacking("the userfaultfd was readable, but had no fault")
    if events[0].type != lib.PC_UFFD_EVENT_PAGEFAULT:
        raise Lacking(f"an event {events[0].type:#x} where a fault was expected")
    return int(events[0].flags)


def _register(fd: int, address: int, size: int, mode: int) -> int:
    ioctls: Any = ffi.new("uint64_t *")
    _core(lib.pc_uffd_register(fd, address, size, mode, ioctls), "registering the memory")
    return int(ioctls[0])


def _equal(seen: int, expected: int) -> None:
    if seen != expected:
        raise Lacking(f"the access went on, but saw {seen:#x} in place of {expected:#x}")


def _missing(kind: str) -> Facts:
    with _userfaultfd() as (fd, _), _memory(kind) as (memory, address):
        size = memory.size_bytes
        ioctls = _register(fd, address, size, lib.PC_UFFD_MISSING)
        access = _Access(address)
        _fault(fd)
        _core(lib.pc_uffd_copy(fd, address, b"\x5a" * size, size, 0, ffi.new("uint64_t *")), "UFFDIO_COPY")
        _equal(access.done(), 0x5A)
    return {"ioctls": ioctl_names(ioctls), "page-bytes": size}


def _minor(kind: str) -> Facts:
    with _userfaultfd() as (fd, _), _memory(kind) as (memory, address):
        size = memory.size_bytes
        with mmap.mmap(memory.struct.fd, size) if memory.struct.fd >= 0 else contextlib.nullcontext(None) as alias:
            ioctls = _register(fd, address, size, lib.PC_UFFD_MINOR)
            if alias is None:
                raise Lacking("registered, but there is no second mapping to fill it through")
            alias[0] = 0x5B
            access = _Access(address)
            if not _fault(fd) & lib.PC_UFFD_FAULT_MINOR:
                raise Lacking("the fault was not a minor one")
            _core(lib.pc_uffd_continue(fd, address, size, 0, ffi.new("uint64_t *")), "UFFDIO_CONTINUE")
            _equal(access.done(), 0x5B)
    return {"ioctls": ioctl_names(ioctls), "page-bytes": size}


def _wp(kind: str) -> Facts:
    with _userfaultfd() as (fd, _), _memory(kind) as (memory, address):
        size = memory.size_bytes
        ctypes.memset(address, 1, 1)
        ioctls = _register(fd, address, size, lib.PC_UFFD_WP)
        _core(lib.pc_uffd_writeprotect(fd, address, size, lib.PC_UFFD_PROTECT), "UFFDIO_WRITEPROTECT")
        access = _Access(address, write=0x5C)
        if not _fault(fd) & lib.PC_UFFD_FAULT_WP:
            raise Lacking("the fault was not one of write protection")
        _core(lib.pc_uffd_writeprotect(fd, address, size, 0), "lifting the write protection")
        access.done()
        _equal(ctypes.string_at(address, 1)[0], 0x5C)
    return {"ioctls": ioctl_names(ioctls), "page-bytes": size}


def _kernel_faults() -> Facts:
    with _userfaultfd() as (fd, how), _memory("memfd") as (memory, address):
        size = memory.size_bytes
        _register(fd, address, size, lib.PC_UFFD_MISSING)
        if how == lib.PC_UFFD_USER_ONLY:
            if (seen := _KernelAccess(address).done()) == -errno.EFAULT:
                raise Lacking("faults of system calls get EFAULT (UFFD_USER_MODE_ONLY)")
            raise Lacking(f"a userfaultfd for user-mode faults only let write(2) return {seen}")
        access = _KernelAccess(address)
        _fault(fd)
        _core(lib.pc_uffd_copy(fd, address, b"\x5d" * size, size, 0, ffi.new("uint64_t *")), "UFFDIO_COPY")
        _equal(access.done(), 0x5D)
    return {}


def _poison() -> Facts:
    with _userfaultfd() as (fd, _), _memory("memfd") as (memory, address):
        size = memory.size_bytes
        _register(fd, address, size, lib.PC_UFFD_MISSING)
        _core(lib.pc_uffd_poison(fd, address, size, 0, ffi.new("uint64_t *")), "UFFDIO_POISON")
        # An access by this process would be a SIGBUS; the kernel's own gets an error.
        if (seen := _KernelAccess(address).done()) != -errno.EFAULT:
            raise Lacking(f"a poisoned page let write(2) return {seen}")
    return {}


def _move() -> Facts:
    with _userfaultfd() as (fd, _), _memory("anon") as (memory, address), _memory("anon") as (_, source):
        size = memory.size_bytes
        ctypes.memset(source, 0x5E, size)
        _register(fd, address, size, lib.PC_UFFD_MISSING)
        access = _Access(address)
        _fault(fd)
        _core(lib.pc_uffd_move(fd, address, source, size, 0, ffi.new("uint64_t *")), "UFFDIO_MOVE")
        _equal(access.done(), 0x5E)
    return {}


# ---- dirty tracking


def _wp_async() -> Facts:
    class Scan(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in (
            "size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages",
            "category_inverted", "category_mask", "category_anyof_mask", "return_mask",
        )]  # fmt: skip

    features = UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED | UffdFeature.WP_HUGETLBFS_SHMEM
    with _userfaultfd(features) as (fd, _), _memory("memfd") as (memory, address):
        size = memory.size_bytes
        ctypes.memset(address, 1, 1)
        _register(fd, address, size, lib.PC_UFFD_WP)
        _core(lib.pc_uffd_writeprotect(fd, address, size, lib.PC_UFFD_PROTECT), "UFFDIO_WRITEPROTECT")
        regions = (ctypes.c_uint64 * 3)()

        def written(pagemap: int) -> bool:
            scan = Scan(
                ctypes.sizeof(Scan), PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, address, address + size, 0,
                ctypes.addressof(regions), 1, 0, 0, PAGE_IS_WRITTEN, 0, PAGE_IS_WRITTEN,
            )  # fmt: skip
            return _system(libc.ioctl(pagemap, ctypes.c_ulong(PAGEMAP_SCAN), ctypes.byref(scan)), "PAGEMAP_SCAN") > 0

        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            clean = written(pagemap)
            libc.memset(ctypes.c_void_p(address), 2, ctypes.c_size_t(1))  # the kernel resolves it: no fault to serve
            if clean or not written(pagemap) or written(pagemap):
                raise Lacking("a write was not seen once and only once")
        finally:
            os.close(pagemap)
    return {}


def _soft_dirty() -> Facts:
    page = mmap.PAGESIZE
    with mmap.mmap(-1, page) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

        def dirty() -> bool:
            with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
                entry = os.pread(pagemap.fileno(), 8, address // page * 8)
            return bool(struct.unpack("=Q", entry)[0] & SOFT_DIRTY)

        states = []
        for step in (1, 2):
            memory[0] = step
            states.append(dirty())
            with open("/proc/self/clear_refs", "w") as file:
                file.write("4")
            states.append(dirty())
    if states != [True, False, True, False]:
        raise Lacking("a write is not seen in /proc/self/pagemap: the kernel has no CONFIG_MEM_SOFT_DIRTY")
    return {}


# ---- KVM


def _kvm() -> Facts:
    with open("/dev/kvm", "r+b", buffering=0) as device:
        version = fcntl.ioctl(device, KVM_GET_API_VERSION)
        os.close(fcntl.ioctl(device, KVM_CREATE_VM, 0))
    return {"api-version": version, "vm-made": True}


# ---- the network and the rest of the kernel


def _new_network(user: bool) -> None:
    """This process, from now on, in a network of its own (and, with `user`, root in a user namespace of its own)."""
    if user:
        _linux.new_user()  # as root there: an unmapped user would lose its capabilities by executing tc
    os.close(_linux.new_network())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


def _forked(trial: Callable[[], Facts]) -> Facts:
    """The trial in a process of its own: it changes what its process is."""
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writable, json.dumps(_attempt(trial)).encode())
        finally:
            os._exit(0)
    os.close(writable)
    with open(readable, "rb") as pipe:
        answer = json.loads(pipe.read() or b"null")
    os.waitpid(pid, 0)
    if answer is None:
        raise Unknown("the trial died")
    if answer["state"] != "yes":
        raise (Lacking if answer["state"] == "no" else Unknown)(answer["reason"])
    return dict(answer["facts"])


def _netns(user: bool) -> Facts:
    def trial() -> Facts:
        _new_network(user)
        return {}

    return _forked(trial)


QDISCS = {
    "netem": ("netem", "delay", "1ms"),
    "tbf": ("tbf", "rate", "10mbit", "burst", "32k", "latency", "10ms"),
    "htb": ("htb", "default", "1"),
}


def _qdisc(name: str) -> Facts:
    tc = shutil.which("tc", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if tc is None:
        raise Unknown("there is no tc command to try it with")

    def trial() -> Facts:
        try:
            _new_network(user=False)
        except OSError:
            try:
                _new_network(user=True)
            except OSError as error:
                raise Unknown(f"no network of its own to try it in ({_words(error)})") from error
        arguments = [tc, "qdisc", "add", "dev", "lo", "root", *QDISCS[name]]
        made = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if made.returncode:
            words = " ".join(made.stderr.split()) or f"tc ended with status {made.returncode}"
            raise Lacking(words.removeprefix("Error: "))
        return {}

    return _forked(trial)


def _io_uring() -> Facts:
    parameters = ctypes.create_string_buffer(120)
    fd = _system(libc.syscall(ctypes.c_long(SYS_IO_URING_SETUP), ctypes.c_uint(1), parameters), "io_uring_setup(2)")
    os.close(fd)
    return {"features": struct.unpack_from("=I", parameters, 20)[0]}


def _tun() -> Facts:
    path = "/dev/net/tun"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise Lacking(f"{path}: {_reason(error.errno or 0)}") from error
    return {}


def _ktls() -> Facts:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        listener.settimeout(EVENT_DEADLINE_S)
        client.settimeout(EVENT_DEADLINE_S)
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with accepted:
            try:
                client.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
            except OSError as error:
                raise Lacking(f"setting TCP_ULP to tls: {_reason(error.errno or 0)}") from error
    return {}


def _holes() -> Facts:
    directory = os.environ.get("TMPDIR", "/tmp")
    fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)  # without a name: gone when closed
    try:
        os.pwrite(fd, b"x" * 4096, 1 << 20)
        if os.lseek(fd, 0, os.SEEK_DATA) == 0:
            raise Lacking(f"the file system of {directory} does not tell holes")
    finally:
        os.close(fd)
    return {"directory": directory}


def _ipv6() -> Facts:
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as listener:
        listener.bind(("::1", 0))
    return {}


# ---- names

_IOCTLS = {
    int(getattr(lib, f"PC_UFFD_IOCTL_{name}")): name
    for name in ("REGISTER", "UNREGISTER", "WAKE", "COPY", "ZEROPAGE", "MOVE", "WRITEPROTECT", "CONTINUE", "POISON")
} | {0x3F: "API"}


def ioctl_names(mask: int) -> list[str]:
    """Of a mask that UFFDIO_API or UFFDIO_REGISTER returned; a bit of a newer kernel has its number."""
    return [_IOCTLS.get(bit, f"bit {bit}") for bit in range(64) if mask >> bit & 1]


_KINDS = ("anon", "memfd", "hugetlb")
TRIALS: dict[str, Callable[[], Facts]] = {
    **{f"{kind}-missing": functools.partial(_missing, kind) for kind in _KINDS},
    **{f"{kind}-minor": functools.partial(_minor, kind) for kind in _KINDS},
    **{f"{kind}-wp": functools.partial(_wp, kind) for kind in _KINDS},
    "kernel-faults": _kernel_faults,
    "uffd-poison": _poison,
    "uffd-move": _move,
    "kvm": _kvm,
    "soft-dirty": _soft_dirty,
    "pagemap-scan": _wp_async,
    "netns": functools.partial(_netns, user=False),
    "user-netns": functools.partial(_netns, user=True),
    **{name: functools.partial(_qdisc, name) for name in QDISCS},
    "tun": _tun,
    "io-uring": _io_uring,
    "ktls": _ktls,
    "holes": _holes,
    "ipv6": _ipv6,
}


def _attempt(trial: Callable[[], Facts]) -> Facts:
    try:
        return {"state": "yes", "facts": trial()}
    except Lacking as error:
        return {"state": "no", "reason": str(error)}
    except Unknown as error:
        return {"state": "unknown", "reason": str(error)}
    except OSError as error:
        return {"state": "no", "reason": _words(error)}


def _words(error: OSError) -> str:
    return (f"{error.filename}: " if error.filename else "") + _reason(error.errno or 0)


def run(names: list[str], parent: int) -> None:
    """Tries each; lines on standard output. Dies with `parent`."""
    _linux.die_with(parent)
    for name in names:
        print(json.dumps({"begin": name}), flush=True)
        print(json.dumps({"name": name, **_attempt(TRIALS[name])}), flush=True)
    sys.stdout.flush()
    os._exit(0)  # a thread that still sleeps in a page must not be waited for
