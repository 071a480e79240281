# SPDX-License-Identifier: Apache-2.0
"""What `postcopy probe` tries for real, in a process of its own that may hang, or be killed, without loss.

`run` prints one JSON line before each trial (``{"begin": name}``) and one after it. The parent reads both, so it knows
which trial a dead or hung child was in. Nothing here outlives the process: no file, no namespace, no queue, no memory.

A trial returns its facts; it raises `Lacking` for what this host does not have, `Unknown` where that could not be
found out.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from postcopy._native import ffi
from postcopy.errors import CoreError, PostcopyError
from postcopy.memory import DirtyLog, Memory, page_bytes_of
from postcopy.testbed import _linux
from postcopy.testbed._linux import libc
from postcopy.testbed.probe import _host
from postcopy.uffd import (
    FaultFlag,
    How,
    PageFault,
    RegisterMode,
    Result,
    UffdIoctl,
    Userfaultfd,
    explain_unavailable,
    probe,
)

Facts = dict[str, Any]

EVENT_DEADLINE_S = 10.0
"""For a fault that is on its way: a healthy one takes microseconds, a kernel that never tells takes for ever."""

SYS_IO_URING_SETUP = 425  # the same number on every architecture
TCP_ULP = 31
SIOCSIFFLAGS = 0x8914
IFF_UP = 1
KVM_GET_API_VERSION, KVM_CREATE_VM = 0xAE00, 0xAE01
SOFT_DIRTY = 1 << 55  # of an entry of /proc/PID/pagemap


class Lacking(Exception):
    """This host does not have it; the text says what it said. `number`: the errno that said so, 0: none."""

    def __init__(self, text: str = "", number: int = 0) -> None:
        super().__init__(text)
        self.number = number


class Unknown(Lacking):
    """It could not be found out; the text says why."""


def _reason(number: int) -> str:
    return f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"


# ---- userfaultfd: pages really served


@dataclass
class _Watched:
    """Memory of one page, and the userfaultfd that watches it."""

    uffd: Userfaultfd
    memory: Memory
    address: int
    size: int
    ioctls: int = 0

    def register(self, mode: RegisterMode) -> None:
        self.ioctls = self.uffd.register(self.address, self.size, mode)

    def fault(self) -> FaultFlag:
        """The next pagefault's flags."""
        if not self.uffd.wait(EVENT_DEADLINE_S):
            raise Lacking("registered, but an access to the missing page raised no fault")
        event = next(iter(self.uffd.read()), None)
        if not isinstance(event, PageFault):
            raise Lacking(f"{event} where a fault was expected")
        return event.flags

    def facts(self) -> Facts:
        return {"ioctls": ioctl_names(self.ioctls), "page-bytes": self.size}


@contextlib.contextmanager
def _watched(kind: str, mode: RegisterMode | None = None, features: int = 0) -> Iterator[_Watched]:
    """Registered where a mode is given. By the best userfaultfd that this user may have."""
    with contextlib.ExitStack() as stack:
        uffd = Userfaultfd.open(How.ANY, features)
        stack.callback(uffd.close, abandon=True)  # whatever still waits there is not to make closing wait
        memory = Memory.create(kind, page_bytes_of(kind))
        try:
            watched = _Watched(uffd, memory, int(ffi.cast("uintptr_t", memory.struct.base)), memory.size_bytes)
            if mode is not None:
                watched.register(mode)
            yield watched
        except BaseException:
            _KEPT.append(memory)  # a thread that waits there goes on when `uffd` closes, and must find an address
            raise
        memory.close()


_KEPT: list[Memory] = []
"""Of trials that gave up; until their process ends."""


def _done(result: Result, what: str) -> None:
    if not result.done:
        raise Lacking(f"{what}: {result.outcome.value}")


class _Access(threading.Thread):
    """One byte read or written through C, without the GIL: the page may be missing. A daemon, since it may never
    return."""

    def __init__(self, address: int, write: int | None = None) -> None:
        super().__init__(daemon=True)
        self._address = ctypes.c_void_p(address)
        self._writes = write is not None
        self._buffer = ctypes.create_string_buffer(bytes([write or 0]), 1)
        self.start()

    def run(self) -> None:
        to, source = (self._address, self._buffer) if self._writes else (self._buffer, self._address)
        libc.memcpy(to, source, ctypes.c_size_t(1))

    def done(self) -> int:
        """The byte."""
        self._wait("access")
        return self._buffer.raw[0]

    def _wait(self, what: str) -> None:
        self.join(EVENT_DEADLINE_S)
        if self.is_alive():
            raise Lacking(f"the page was placed, but the {what} never went on")


class _KernelAccess(_Access):
    """The same inside the kernel: write(2) of one byte into a pipe."""

    def __init__(self, address: int) -> None:
        self._pipe = os.pipe()
        super().__init__(address)

    def run(self) -> None:
        self._result = libc.write(self._pipe[1], self._address, ctypes.c_size_t(1))
        self._errno = ctypes.get_errno()

    def done(self) -> int:
        """The byte, or the negative errno."""
        self._wait("system call")
        try:
            return -self._errno if self._result < 0 else os.read(self._pipe[0], 1)[0]
        finally:
            for fd in self._pipe:
                os.close(fd)


def _equal(seen: int, expected: int) -> None:
    if seen != expected:
        raise Lacking(f"the access went on, but saw {seen:#x} in place of {expected:#x}")


def _missing(kind: str) -> Facts:
    with _watched(kind, RegisterMode.MISSING) as page:
        access = _Access(page.address)
        page.fault()
        _done(page.uffd.copy(page.address, b"\x5a" * page.size), "UFFDIO_COPY")
        _equal(access.done(), 0x5A)
        return page.facts()


def _minor(kind: str) -> Facts:
    with _watched(kind) as page:
        fd = page.memory.struct.fd
        with mmap.mmap(fd, page.size) if fd >= 0 else contextlib.nullcontext(None) as alias:
            page.register(RegisterMode.MINOR)
            if alias is None:
                raise Lacking("registered, but there is no second mapping to fill it through")
            alias[0] = 0x5B
            access = _Access(page.address)
            if not page.fault() & FaultFlag.MINOR:
                raise Lacking("the fault was not a minor one")
            _done(page.uffd.continue_(page.address, page.size), "UFFDIO_CONTINUE")
            _equal(access.done(), 0x5B)
        return page.facts()


def _wp(kind: str) -> Facts:
    with _watched(kind) as page:
        ctypes.memset(page.address, 1, 1)
        page.register(RegisterMode.WP)
        page.uffd.writeprotect(page.address, page.size)
        access = _Access(page.address, write=0x5C)
        if not page.fault() & FaultFlag.WP:
            raise Lacking("the fault was not one of write protection")
        page.uffd.writeprotect(page.address, page.size, protect=False)
        access.done()
        _equal(ctypes.string_at(page.address, 1)[0], 0x5C)
        return page.facts()


def _kernel_faults() -> Facts:
    user_only = probe().how is How.USER_ONLY
    with _watched("memfd", RegisterMode.MISSING) as page:
        access = _KernelAccess(page.address)
        if user_only:
            if (seen := access.done()) == -errno.EFAULT:
                raise Lacking("faults of system calls get EFAULT (UFFD_USER_MODE_ONLY)")
            raise Lacking(f"a userfaultfd for user-mode faults only let write(2) return {seen}")
        page.fault()
        _done(page.uffd.copy(page.address, b"\x5d" * page.size), "UFFDIO_COPY")
        _equal(access.done(), 0x5D)
    return {}


def _poison() -> Facts:
    with _watched("memfd", RegisterMode.MISSING) as page:
        _done(page.uffd.poison(page.address, page.size), "UFFDIO_POISON")
        # An access by this process would be a SIGBUS; the kernel's own gets an error.
        if (seen := _KernelAccess(page.address).done()) != -errno.EFAULT:
            raise Lacking(f"a poisoned page let write(2) return {seen}")
    return {}


def _move() -> Facts:
    with _watched("anon", RegisterMode.MISSING) as page, Memory.create("anon", page.size) as other:
        source = int(ffi.cast("uintptr_t", other.struct.base))
        ctypes.memset(source, 0x5E, page.size)
        access = _Access(page.address)
        page.fault()
        _done(page.uffd.move(page.address, source, page.size), "UFFDIO_MOVE")
        _equal(access.done(), 0x5E)
    return {}


def _fault_path(mode: str, backing: str) -> Facts:
    """What `postcopy faultpaths` tries: a load of such a page waited, and went on with the right content."""
    from postcopy.testbed.faultpaths import _core
    from postcopy.testbed.faultpaths._model import Backing, Cell, Mode, Order, Outcome

    cell = Cell("user.load", Mode(mode), Backing(backing))
    result = _core.run(Order(cell, timeout_ms=round(EVENT_DEADLINE_S * 1e3)))
    if result.outcome is not Outcome.BLOCKED:
        raise Lacking(result.text or f"a load of such a page: {result.brief}")
    return {}


# ---- dirty tracking


def _wp_async() -> Facts:
    with Memory.create("memfd", 4 * page_bytes_of("memfd")) as memory, DirtyLog([memory]) as log:
        seen = [log.collect(0).count()]
        libc.memset(ctypes.c_void_p(memory.address), 1, ctypes.c_size_t(1))  # no fault has to be served for it
        seen += [log.collect(0).count(), log.collect(0).count()]
    if seen != [0, 1, 0]:
        raise Lacking("a write was not seen once and only once")
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
    return {"api-version": version, "vm-made": True, "hardware": _linux.cpu_virtualization()}


# ---- the network and the rest of the kernel


def _new_network(user: bool) -> None:
    """This process, from now on, in a network of its own (and, with `user`, root in a user namespace of its own)."""
    if user:
        _linux.new_user()
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
        raise (Lacking if answer["state"] == "no" else Unknown)(answer["reason"], answer["errno"])
    return dict(answer["facts"])


def _netns(user: bool) -> Facts:
    def trial() -> Facts:
        _new_network(user)
        return {}

    return _forked(trial)


def _qdisc(kind: str) -> Facts:
    from postcopy.testbed.lab import _netlink  # pyroute2, which nothing else here needs

    def trial() -> Facts:
        try:
            _new_network(user=False)
        except OSError:
            try:
                _new_network(user=True)
            except OSError as error:
                why = f"no network of its own to try it in ({_words(error)})"
                raise Unknown(why, error.errno or 0) from error
        answer = _netlink.answer_to({"user": None, "actions": [["has-qdisc", "/proc/self/ns/net", kind]]})
        if "error" in answer:
            raise Unknown(answer["error"])
        if answer["results"] == [False]:
            raise Lacking(f"this kernel has no {kind}")
        return {}

    return _forked(trial)


def _io_uring() -> Facts:
    parameters = ctypes.create_string_buffer(120)
    fd = libc.syscall(ctypes.c_long(SYS_IO_URING_SETUP), ctypes.c_uint(1), parameters)
    if fd < 0:
        raise Lacking(f"io_uring_setup(2): {_reason(ctypes.get_errno())}", ctypes.get_errno())
    os.close(fd)
    return {"features": struct.unpack_from("=I", parameters, 20)[0]}


def _tun() -> Facts:
    os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
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


def ioctl_names(mask: int) -> list[str]:
    """Of a mask that UFFDIO_API or UFFDIO_REGISTER returned; a bit of a newer kernel has its number."""
    known = {int(ioctl): str(ioctl.name) for ioctl in UffdIoctl} | {1 << 0x3F: "API"}
    return [known.get(1 << bit, f"bit {bit}") for bit in range(64) if mask >> bit & 1]


# ---- the table


class Trial(NamedTuple):
    """One thing to try, and what is said of the answer."""

    run: Callable[[], Facts]
    needed_for: str
    remedy: Callable[[int], str]
    """By the errno that was met; 0: none."""
    yes: str = ""


def _served(kind: str, mode: str, run: Callable[[str], Facts], use: str) -> Trial:
    def remedy(number: int) -> str:
        if (kind, mode) == ("anon", "minor"):
            return "none: anonymous memory has no page cache; use --backing memfd"
        if explain_unavailable(kernel_faults=False) is not None:
            return _host.uffd_remedy(number)
        return _host.huge_remedy() if kind == "hugetlb" else f"Linux {'5.14' if mode == 'minor' else '5.19'} or newer"

    return Trial(lambda: run(kind), f"--backing {kind}: {use}", remedy, "a page was served")


def _newer(version: str) -> Callable[[int], str]:
    """The remedy for what came with a version of the kernel; without any userfaultfd, that first."""
    return lambda number: _host.uffd_remedy(number) if number in _host.DENIED else f"Linux {version} or newer"


_MODES: dict[str, tuple[Callable[[str], Facts], str]] = {
    "missing": (_missing, "a page that has not arrived"),
    "minor": (_minor, "placing pages by UFFDIO_CONTINUE, without a copy"),
    "wp": (_wp, "write protection with events, for programs"),
}

# fmt: off
TRIALS: dict[str, Trial] = {
    **{f"{kind}-{mode}": _served(kind, mode, *what) for kind in ("anon", "memfd", "hugetlb")
       for mode, what in _MODES.items()},
    **{f"{kind}-rwp": Trial(partial(_fault_path, "rwp", kind), "not used yet (pages that were not accessed)",
                            _newer("7.3"), "a page was served") for kind in ("anon", "memfd", "hugetlb")},
    **{f"guest-memfd-{mode}": Trial(partial(_fault_path, mode, "guest-memfd"), "not used yet (KVM's own memory files)",
                                    _host.guest_memfd_remedy, "a page was served") for mode in ("missing", "minor")},
    "kernel-faults": Trial(_kernel_faults, "--machine kvm; O_DIRECT into memory", _host.uffd_remedy,
                           "a fault of write(2) was served"),
    "uffd-poison": Trial(_poison, "pages that can never come", _newer("6.6"), "a poisoned page gives EFAULT"),
    "uffd-move": Trial(_move, "not used yet (pages moved without a copy)", _newer("6.8"), "a page was moved"),
    "kvm": Trial(_kvm, "--machine kvm", _host.kvm_remedy),
    "soft-dirty": Trial(_soft_dirty, "nothing: --precopy uses pagemap-scan",
                        lambda _: "a kernel with CONFIG_MEM_SOFT_DIRTY=y"),
    "pagemap-scan": Trial(_wp_async, "--precopy: what a machine writes is seen", _newer("6.7"), "a write was seen"),
    "netns": Trial(lambda: _netns(user=False), "postcopy lab, and demo --lab, as root", _host.netns_remedy),
    "user-netns": Trial(lambda: _netns(user=True), "the same without root", _host.user_netns_remedy),
    "netem": Trial(lambda: _qdisc("netem"), "networks with delay and loss", partial(_host.qdisc_remedy, "netem")),
    "tbf": Trial(lambda: _qdisc("tbf"), "networks with a rate", partial(_host.qdisc_remedy, "tbf")),
    "htb": Trial(lambda: _qdisc("htb"), "networks with shared rates", partial(_host.qdisc_remedy, "htb")),
    "tun": Trial(_tun, "the network device of a machine", partial(_host.device_remedy, "/dev/net/tun"),
                 "can be opened"),
    "io-uring": Trial(_io_uring, "a dozen rows of postcopy faultpaths", _host.io_uring_remedy),
    "ktls": Trial(_ktls, "not used yet (TLS of data channels in the kernel)",
                  lambda _: _host.module_remedy("tls", "CONFIG_TLS")),
    "holes": Trial(_holes, "sparse images and dumps", lambda _: "export TMPDIR=/dev/shm"),
    "ipv6": Trial(_ipv6, "addresses of IPv6", _host.ipv6_remedy),
}
# fmt: on


def _attempt(trial: Callable[[], Facts]) -> Facts:
    try:
        return {"state": "yes", "facts": trial()}
    except Lacking as error:
        state = "unknown" if isinstance(error, Unknown) else "no"
        return {"state": state, "reason": str(error), "errno": error.number}
    except (PostcopyError, OSError) as error:
        return {"state": "no", "reason": _words(error), "errno": getattr(error, "errno", None) or 0}


def _words(error: PostcopyError | OSError) -> str:
    if isinstance(error, CoreError):
        return f"{error.what}: {error.reason or _reason(error.errno or 0)}"
    if isinstance(error, OSError):
        return (f"{error.filename}: " if error.filename else "") + _reason(error.errno or 0)
    return getattr(error, "message", str(error))  # its remedy is not the probe's


def run(names: list[str], parent: int) -> None:
    """Tries each; lines on standard output. Dies with `parent`."""
    _linux.die_with(parent)
    for name in names:
        print(json.dumps({"begin": name}), flush=True)
        print(json.dumps({"name": name, **_attempt(TRIALS[name].run)}), flush=True)
    sys.stdout.flush()
    os._exit(0)  # a thread that still sleeps in a page must not be waited for
