# SPDX-License-Identifier: Apache-2.0
"""`Userfaultfd`: one descriptor, its ioctls and its events.

How it ends. When the last descriptor of a userfaultfd is closed, the kernel unregisters its ranges and releases every
thread that waits in one, and each of them *reads zeros* where content was promised: silent corruption. `close`
therefore refuses with `BusyError` as long as a range that was registered here is still registered, unless called
with ``abandon=True``.

Threads. Every method may be called in any thread, and beside each other. `close` in one thread makes the calls that
others start later raise `trio.ClosedResourceError`; the descriptor itself is closed when the last call has returned, so
that no call uses a number that the kernel has given to another file meanwhile.

No buffer given to a method may lie in registered memory: the kernel would read it inside the ioctl, and wait there for
a page that only the same caller could bring.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import select
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from postcopy._native import ffi, lib
from postcopy._trio import closed, require_trio
from postcopy.errors import BusyError, CoreError, check
from postcopy.uffd._probe import How, open_descriptor
from postcopy.uffd._ranges import ADDRESSES, AddressTable

if TYPE_CHECKING:
    import trio  # imported where it is used: without it all works but what is asynchronous

MAX_EVENTS = 64  # that one read takes


class RegisterMode(enum.IntFlag):
    """Which faults of a range are reported."""

    MISSING = lib.PC_UFFD_MISSING  # no page there yet
    WP = lib.PC_UFFD_WP  # a write to a page that `writeprotect` has protected
    MINOR = lib.PC_UFFD_MINOR  # shared memory: the page exists, this mapping has not got it yet


class UffdIoctl(enum.IntFlag, boundary=enum.KEEP):
    """What can be done with a registered range: bits of the answer of UFFDIO_REGISTER."""

    REGISTER = 1 << lib.PC_UFFD_IOCTL_REGISTER
    UNREGISTER = 1 << lib.PC_UFFD_IOCTL_UNREGISTER
    WAKE = 1 << lib.PC_UFFD_IOCTL_WAKE
    COPY = 1 << lib.PC_UFFD_IOCTL_COPY
    ZEROPAGE = 1 << lib.PC_UFFD_IOCTL_ZEROPAGE
    MOVE = 1 << lib.PC_UFFD_IOCTL_MOVE
    WRITEPROTECT = 1 << lib.PC_UFFD_IOCTL_WRITEPROTECT
    CONTINUE = 1 << lib.PC_UFFD_IOCTL_CONTINUE
    POISON = 1 << lib.PC_UFFD_IOCTL_POISON
    RWPROTECT = 1 << lib.PC_UFFD_IOCTL_RWPROTECT


class FaultFlag(enum.IntFlag, boundary=enum.KEEP):
    """Of a page fault. None of them: a read of a missing page."""

    WRITE = lib.PC_UFFD_FAULT_WRITE
    WP = lib.PC_UFFD_FAULT_WP
    MINOR = lib.PC_UFFD_FAULT_MINOR


class Outcome(enum.Enum):
    """How an ioctl that fills ended. Everything else is raised."""

    DONE = "done"  # all bytes
    EXISTS = "exists"  # EEXIST: the next page is there already; the kernel has woken no thread for it
    AGAIN = "again"  # EAGAIN: go on after bytes_done; if that is 0, an event is unread
    GONE = "gone"  # ENOENT, ESRCH: the range is not registered any more, or its process has ended
    NO_SPACE = "no space"  # ENOSPC, ENOMEM: no memory for it now
    NOT_PRESENT = "not present"  # EFAULT of CONTINUE: the page cache has no page there

    @property
    def reason(self) -> str:
        """The same in words for a person."""
        return _REASONS[self.name]


_REASONS = {
    "DONE": "done",
    "EXISTS": "EEXIST: a page is there already; wake its waiters and go on behind it, as place() does",
    "AGAIN": "EAGAIN: an event of this userfaultfd is unread; read it, then go on behind bytes_done",
    "GONE": "ENOENT: the range is not registered with this userfaultfd, its process has ended, or what should be moved"
    " is not there",
    "NO_SPACE": "ENOMEM: there is no memory for it now",
    "NOT_PRESENT": "EFAULT: the page cache has no page there; write it through another mapping first",
}


@dataclass(frozen=True, slots=True)
class Result:
    """Of an ioctl that fills."""

    bytes_done: int  # from the start; also when the outcome is not DONE
    outcome: Outcome

    @property
    def done(self) -> bool:
        return self.outcome is Outcome.DONE

    def __str__(self) -> str:
        return f"{self.bytes_done} bytes, {self.outcome.reason}"


@dataclass(frozen=True, slots=True)
class PageFault:
    """A thread waits for a page."""

    address: int  # of its page; the exact one with UffdFeature.EXACT_ADDRESS
    flags: FaultFlag
    thread_id: int  # with UffdFeature.THREAD_ID; else 0


@dataclass(frozen=True, slots=True)
class Fork:
    """The process has forked; the faults of the child come here."""

    uffd: Userfaultfd  # belongs to the receiver; has the ranges of its parent


@dataclass(frozen=True, slots=True)
class Remap:
    """mremap(2) has moved a range."""

    old: int
    new: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Remove:
    """madvise(2) has emptied a range: faults there want zeros now, not the old content."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """munmap(2): the range is gone."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class UnknownEvent:
    """Of a newer kernel than this library."""

    type: int


UffdEvent = PageFault | Fork | Remap | Remove | Unmap | UnknownEvent

_OUTCOMES = {
    0: Outcome.DONE,
    errno.EEXIST: Outcome.EXISTS,
    errno.EAGAIN: Outcome.AGAIN,
    errno.ENOENT: Outcome.GONE,
    errno.ESRCH: Outcome.GONE,
    errno.ENOSPC: Outcome.NO_SPACE,
    errno.ENOMEM: Outcome.NO_SPACE,
}


class Userfaultfd:
    """Made by `open` or `adopt`. A context manager."""

    def __init__(self, fd: int, features: int, *, foreign: bool = False) -> None:
        self._fd = fd
        self._features = features
        # The memory of another process has another address space: its table is this object's, which need not be kept.
        self._addresses = AddressTable() if foreign else ADDRESSES
        self._owner = None if foreign else self
        self._lock = threading.Lock()
        self._users = 0
        self._closed = True  # until it has been made
        self._busy_poll_ns = 0
        self._buffered: deque[UffdEvent] = deque()
        self._waiting: list[trio.lowlevel.TrioToken] = []  # the Trio run of each task that waits for an event
        # Wakes `wait` in other threads when closing. Never read: once readable it stays so.
        self._closing_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closed = False

    @classmethod
    def open(cls, how: How | str = How.ANY, features: int = 0) -> Userfaultfd:
        """A new one for the memory of this process, by default in the first way that works, with `features`
        (`UffdFeature`) enabled. `ResourceError`, with the remedy, when this user may not have it or the kernel lacks a
        feature."""
        return cls.adopt(open_descriptor(how, features), features, foreign=False)

    @classmethod
    def adopt(cls, fd: int, features: int = 0, *, foreign: bool = True) -> Userfaultfd:
        """Takes over a descriptor after its handshake, as another process sends it (SCM_RIGHTS, pidfd_getfd(2)).

        It becomes non-blocking and close-on-exec, and belongs to this object, even when this raises. `foreign`: its
        memory is another process's. Ranges registered before are unknown here, so `close` cannot refuse for them.
        """
        try:
            os.set_blocking(fd, False)
            os.set_inheritable(fd, False)
            return cls(fd, features, foreign=foreign)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.close(fd)
            raise CoreError(error.errno or errno.EBADF, "taking over a userfaultfd") from error

    # ---- what it is

    @property
    def features(self) -> int:
        """The `UffdFeature` it was opened with."""
        return self._features

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def registered(self) -> list[tuple[int, int]]:
        """The ranges (start, end) registered through this object, in order, as far as its events have been read."""
        return self._addresses.of(self._owner)

    @property
    def busy_poll_us(self) -> float:
        """For how long `read_batch`, `wait` and ``async for`` look for an event before they sleep; 0 by default.

        Saves the sleep and the wake-up, the largest part of a fault's time, and costs a processor. Under Trio it holds
        up the other tasks of the thread, though not other threads: the GIL is released.
        """
        return self._busy_poll_ns / 1000

    @busy_poll_us.setter
    def busy_poll_us(self, value: float) -> None:
        if not 0 <= value <= 1_000_000:
            raise ValueError(f"cannot poll for {value} us")
        self._busy_poll_ns = int(value * 1000)

    def fileno(self) -> int:
        """The number, for select() and to be sent to another process; stays this object's."""
        if self._closed:
            raise closed("this userfaultfd is closed")
        return self._fd

    def __repr__(self) -> str:
        return f"<Userfaultfd {'closed' if self._closed else self._fd}>"

    # ---- ranges

    def register(self, address: int, size_bytes: int, mode: RegisterMode) -> UffdIoctl:
        """Reports faults on a page-aligned range from now on; what it allows. Errors: `BusyError` when another
        userfaultfd has it or Python has a buffer of it (`Memory.buffer`), `CoreError` whose text names what is wrong
        (EINVAL: address or length not aligned, nothing mapped, a mode that this kind of memory has not)."""
        ioctls: Any = ffi.new("uint64_t *")
        end = _end(address, size_bytes)
        with self._use() as fd:
            # Before the kernel has it: a buffer of it that is asked for meanwhile must be refused.
            known = self._addresses.register(self._owner, address, end)
            try:
                result = lib.pc_uffd_register(fd, address, size_bytes, mode, ioctls)
                self._check(result, "registering memory", "register", address, size_bytes, mode=mode)
            except BaseException:
                self._addresses.unregister(self._owner, address, end)
                for low, high in known:
                    self._addresses.register(self._owner, low, high)
                raise
        return UffdIoctl(int(ioctls[0]))

    def unregister(self, address: int, size_bytes: int) -> None:
        """Ends that. Threads that wait in the range go on, and find zeros where no page has been placed."""
        end = _end(address, size_bytes)
        with self._use() as fd:
            result = lib.pc_uffd_unregister(fd, address, size_bytes)
            self._check(result, "unregistering memory", "unregister", address, size_bytes)
            # The kernel wakes those who wait, and only then lets the mapping go: a thread that comes between waits on.
            lib.pc_uffd_wake(fd, address, size_bytes)
            self._addresses.unregister(self._owner, address, end)

    # ---- filling

    def copy(
        self,
        address: int,
        source: Any,
        size_bytes: int | None = None,
        *,
        dont_wake: bool = False,
        write_protect: bool = False,
    ) -> Result:
        """UFFDIO_COPY: places pages with the content of `source`, and wakes the threads that wait for them.

        `source` is bytes-like, or an address of this process, then with `size_bytes`; it must not be lazy memory.
        """
        if isinstance(source, int):
            if size_bytes is None:
                raise ValueError("a source that is an address needs size_bytes")
            data: Any = ffi.cast("void *", source)
        else:
            data = ffi.from_buffer("char[]", source)
            if size_bytes is None:
                size_bytes = len(data)
            elif not 0 <= size_bytes <= len(data):
                raise ValueError(f"{size_bytes} bytes of a source of {len(data)}")
        mode = _mode(dont_wake, write_protect)
        return self._fill(lib.pc_uffd_copy, "placing pages", "copy", address, data, size_bytes, mode)

    def zeropage(self, address: int, size_bytes: int, *, dont_wake: bool = False) -> Result:
        """UFFDIO_ZEROPAGE: places pages of zeros. Not on huge pages."""
        return self._fill(lib.pc_uffd_zeropage, "placing zero pages", "zeropage", address, size_bytes, _mode(dont_wake))

    def continue_(
        self, address: int, size_bytes: int, *, dont_wake: bool = False, write_protect: bool = False
    ) -> Result:
        """UFFDIO_CONTINUE: maps pages that are in the page cache already, written through another mapping."""
        mode = _mode(dont_wake, write_protect)
        return self._fill(lib.pc_uffd_continue, "mapping pages", "continue", address, size_bytes, mode)

    def poison(self, address: int, size_bytes: int, *, dont_wake: bool = False) -> Result:
        """UFFDIO_POISON (Linux 6.6): a thread that touches these pages gets SIGBUS, in the kernel EFAULT or
        EHWPOISON."""
        return self._fill(lib.pc_uffd_poison, "poisoning pages", "poison", address, size_bytes, _mode(dont_wake))

    def move(
        self, address: int, source: int, size_bytes: int, *, dont_wake: bool = False, allow_holes: bool = False
    ) -> Result:
        """UFFDIO_MOVE (Linux 6.8): moves private anonymous pages from the address `source` without copying them."""
        mode = _mode(dont_wake) | (int(lib.PC_UFFD_ALLOW_SRC_HOLES) if allow_holes else 0)
        return self._fill(lib.pc_uffd_move, "moving pages", "move", address, source, size_bytes, mode)

    def _fill(self, function: Any, what: str, call: str, address: int, *arguments: Any) -> Result:
        done: Any = ffi.new("uint64_t *")
        with self._use() as fd:
            result = function(fd, address, *arguments, done)
        outcome = _OUTCOMES.get(-result)
        if call == "continue" and result == -errno.EFAULT:
            outcome = Outcome.NOT_PRESENT
        if outcome is None:
            source = int(ffi.cast("uintptr_t", arguments[0])) if len(arguments) == 3 else 0
            self._check(result, what, call, address, arguments[-2], mode=arguments[-1], source=source)
        assert outcome is not None
        return Result(int(done[0]), outcome)

    def _check(self, result: int, what: str, call: str, address: int, size_bytes: int, **more: int) -> None:
        """Raises what a negative result means, with the argument that was wrong."""
        if result < 0:
            from postcopy.uffd._explain import explain

            reason = explain(call, -result, address, size_bytes, foreign=self._owner is None, **more)
            check(result, what, reason)

    def writeprotect(self, address: int, size_bytes: int, *, protect: bool = True, dont_wake: bool = False) -> None:
        """UFFDIO_WRITEPROTECT: protects a range, or lifts the protection and wakes the writers. All or nothing."""
        mode = int(lib.PC_UFFD_PROTECT) if protect else int(lib.PC_UFFD_PROTECT_DONTWAKE) if dont_wake else 0
        with self._use() as fd:
            result = lib.pc_uffd_writeprotect(fd, address, size_bytes, mode)
        self._check(result, "write-protecting memory", "writeprotect", address, size_bytes)

    def wake(self, address: int, size_bytes: int) -> None:
        """UFFDIO_WAKE: waiters in the range try again; those whose page is still missing raise a new fault."""
        with self._use() as fd:
            result = lib.pc_uffd_wake(fd, address, size_bytes)
        self._check(result, "waking threads", "wake", address, size_bytes)

    # ---- filling, with everything that can come between

    def place(self, address: int, data: Any, page_bytes: int | None = None) -> Result:
        """`copy`, page after page until the end: goes on from a partial count; skips a page that is there already, and
        wakes its waiters, which the kernel does not. `bytes_done` counts skipped pages too.

        The outcome is DONE, GONE, NO_SPACE, or AGAIN without progress: an event is unread, read it and go on from
        `bytes_done`. (Trying again here would never end where it is the caller who reads events.) `page_bytes`: of the
        memory, where it is not the system's page.
        """
        view: Any = ffi.from_buffer("char[]", data)
        base = int(ffi.cast("uintptr_t", view))
        return self._fill_all(address, len(view), page_bytes, lambda at, size: self.copy(at, base + at - address, size))

    def fill_zero(self, address: int, size_bytes: int) -> Result:
        """`zeropage`, in the way of `place`."""
        return self._fill_all(address, size_bytes, None, self.zeropage)

    def resume(self, address: int, size_bytes: int, page_bytes: int | None = None) -> Result:
        """`continue_`, in the way of `place`; NOT_PRESENT ends it too."""
        return self._fill_all(address, size_bytes, page_bytes, self.continue_)

    def fill_poison(self, address: int, size_bytes: int, page_bytes: int | None = None) -> Result:
        """`poison`, in the way of `place`: pages that are there stay."""
        return self._fill_all(address, size_bytes, page_bytes, self.poison)

    def _fill_all(
        self, address: int, size_bytes: int, page_bytes: int | None, step: Callable[[int, int], Result]
    ) -> Result:
        at, end = address, _end(address, size_bytes)
        while at < end:
            result = step(at, end - at)
            at += result.bytes_done
            if result.outcome is Outcome.EXISTS:
                skipped = min(page_bytes or int(lib.pc_page_bytes()), end - at)
                self.wake(at, skipped)
                at += skipped
            elif not result.done and not (result.outcome is Outcome.AGAIN and result.bytes_done):
                return Result(at - address, result.outcome)
        return Result(size_bytes, Outcome.DONE)

    # ---- events

    def read(self, max_events: int = MAX_EVENTS) -> list[UffdEvent]:
        """What has happened, at most `max_events` (and 64), with one system call; empty when nothing has. Never waits.

        A `Fork` in it belongs to the caller.
        """
        if max_events < 1:
            raise ValueError("at least one event")
        return self._read(max_events, 0)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits in this thread, without the GIL, for something to read: False when nothing came in time.

        `trio.ClosedResourceError` when closed meanwhile. Not for Trio's thread: there `read_batch`.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._use() as fd:
            if self._spin(fd):
                return True
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.register(self._closing_fd, select.POLLIN)
            left_ms = None if deadline_s is None else max(0.0, (deadline_s - time.monotonic()) * 1000)
            ready = poll.poll(left_ms)
            if self._closed:
                raise closed("this userfaultfd was closed while it was waited for")
            return bool(ready) or bool(self._buffered)

    async def read_batch(self, max_events: int = MAX_EVENTS) -> list[UffdEvent]:
        """At least one event; waits for it. A cancellation loses none; `trio.ClosedResourceError` when closed before or
        meanwhile. One task at a time in a Trio run (else `trio.BusyResourceError`). `RuntimeError` outside of Trio."""
        if max_events < 1:
            raise ValueError("at least one event")
        # Before the read, not after: events that were read and not returned would be lost to a cancellation. And here
        # it runs while the threads that were woken last come to their next fault.
        trio = require_trio("Userfaultfd.read_batch", "wait() and read() in a thread")
        await trio.lowlevel.checkpoint()
        spin_ns = self._busy_poll_ns
        while True:
            if events := self._read(max_events, spin_ns):
                return events
            await self._wait_readable()
            spin_ns = 0

    def __aiter__(self) -> Userfaultfd:
        return self

    async def __anext__(self) -> UffdEvent:
        """The next event, in the way of `read_batch`. Events read from the kernel together and not yet taken stay here:
        the next read returns them first."""
        event, *rest = await self.read_batch()
        with self._lock:
            self._buffered.extendleft(reversed(rest))
        return event

    async def _wait_readable(self) -> None:
        trio = require_trio("waiting for events")
        token = trio.lowlevel.current_trio_token()
        with self._use() as fd:
            # Until the end of this block the descriptor stays open, so that `close` can notify Trio of it from any
            # thread.
            with self._lock:
                self._waiting.append(token)
            try:
                await trio.lowlevel.wait_readable(fd)
            finally:
                with self._lock:
                    self._waiting.remove(token)

    def _spin(self, fd: int) -> bool:
        """Whether there is something to read that is held here already."""
        if not self._buffered and self._busy_poll_ns:
            events = self._take(fd, MAX_EVENTS, self._busy_poll_ns)
            with self._lock:
                self._buffered.extend(events)
        return bool(self._buffered)

    def _read(self, max_events: int, spin_ns: int) -> list[UffdEvent]:
        with self._use() as fd:
            if self._buffered:
                with self._lock:
                    held = [self._buffered.popleft() for _ in range(min(max_events, len(self._buffered)))]
                if held:
                    return held
            return self._take(fd, min(max_events, MAX_EVENTS), spin_ns)

    def _take(self, fd: int, capacity: int, spin_ns: int) -> list[UffdEvent]:
        structs: Any = ffi.new("struct pc_uffd_event[]", capacity)
        if spin_ns:
            count = lib.pc_uffd_read_spinning(fd, structs, capacity, spin_ns)
        else:
            count = lib.pc_uffd_read(fd, structs, capacity)
        check(count, "reading events of a userfaultfd")
        return [self._event(structs[i]) for i in range(count)]

    def _event(self, c: Any) -> UffdEvent:
        if c.type == lib.PC_UFFD_EVENT_PAGEFAULT:
            flags = _FAULT_FLAGS.get(c.flags)
            return PageFault(c.address, FaultFlag(c.flags) if flags is None else flags, c.tid)
        if c.type == lib.PC_UFFD_EVENT_FORK:
            child = Userfaultfd.adopt(int(c.uffd), self._features)
            for start, end in self.registered:
                child._addresses.register(child._owner, start, end)
            return Fork(child)
        if c.type == lib.PC_UFFD_EVENT_REMAP:
            old, new, size_bytes = int(c.address), int(c.end), int(c.bytes)
            self._addresses.move(self._owner, old, new, size_bytes)
            return Remap(old, new, size_bytes)
        if c.type == lib.PC_UFFD_EVENT_REMOVE:
            return Remove(int(c.address), int(c.end))
        if c.type == lib.PC_UFFD_EVENT_UNMAP:
            self._addresses.unregister(self._owner, int(c.address), int(c.end))
            return Unmap(int(c.address), int(c.end))
        return UnknownEvent(int(c.type))

    # ---- its life

    def detach(self) -> int:
        """Gives the descriptor away, which the caller then closes. `BusyError` while another thread or task uses it."""
        with self._lock:
            if self._closed:
                raise closed("this userfaultfd is closed")
            if self._users or self._buffered:
                raise BusyError("a userfaultfd that is in use, or of which events are held here, cannot be given away")
            self._closed = True
            fd, self._fd = self._fd, -1
        os.close(self._closing_fd)
        self._addresses.forget(self._owner)
        return fd

    def close(self, *, abandon: bool = False) -> None:
        """Closes, and raises `trio.ClosedResourceError` in what waits for events here. Twice does no harm.

        `BusyError` while ranges are registered (see above): unregister them first, or say ``abandon=True``. Then,
        unless there is another copy of the descriptor, threads that wait for a page read zeros.
        """
        with self._lock:
            if self._closed:
                return
            if not abandon and (left_ranges := self.registered):
                start, end = left_ranges[0]
                raise BusyError(
                    f"a userfaultfd with memory registered ({start:#x} to {end:#x}) cannot be closed: threads that wait"
                    " for a page would read zeros; unregister it first, or close(abandon=True)"
                )
            forks = [event.uffd for event in self._buffered if isinstance(event, Fork)]
            if not abandon and forks:
                raise BusyError(
                    "a userfaultfd with an unread fork event cannot be closed: read it, or close(abandon=True)"
                )
            self._closed = True
            self._users += 1
            waiting = list(self._waiting)
        for child in forks:
            child.close(abandon=True)
        os.eventfd_write(self._closing_fd, 1)
        if waiting:
            import trio
        for token in waiting:
            if trio.lowlevel.in_trio_run() and trio.lowlevel.current_trio_token() is token:
                trio.lowlevel.notify_closing(self._fd)
            else:
                with contextlib.suppress(trio.RunFinishedError):
                    token.run_sync_soon(self._notify, token)
        self._leave()

    def _notify(self, token: trio.lowlevel.TrioToken) -> None:
        # In the thread of the waiter: while it is still there, the number is ours.
        import trio

        if token in self._waiting:
            trio.lowlevel.notify_closing(self._fd)

    def __enter__(self) -> Userfaultfd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes. When an exception is under way and ranges are still registered, it stays open instead, so that no
        thread reads zeros; a note at the exception says so."""
        try:
            self.close()
        except BusyError:
            if value is None:
                raise
            value.add_note("a userfaultfd was left open, since memory is still registered with it")

    def __del__(self) -> None:
        if getattr(self, "_closed", True):
            return
        with contextlib.suppress(BusyError):
            self.close()
            return
        warnings.warn(f"{self!r} was left open with memory registered", ResourceWarning, stacklevel=1)

    def _use(self) -> _Use:
        """The descriptor, which stays open inside the block, also when it is closed meanwhile."""
        return _Use(self)

    def _enter(self) -> int:
        with self._lock:
            if self._closed:
                raise closed("this userfaultfd is closed")
            self._users += 1
            return self._fd

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._closed and not self._users
        if last:
            fd, self._fd = self._fd, -1
            os.close(fd)
            os.close(self._closing_fd)
            self._addresses.forget(self._owner)


class _Use:
    """By hand, since two of them are on the path of every fault and a generator would cost it a microsecond each."""

    __slots__ = ("_owner",)

    def __init__(self, owner: Userfaultfd) -> None:
        self._owner = owner

    def __enter__(self) -> int:
        return self._owner._enter()

    def __exit__(self, *_: object) -> None:
        self._owner._leave()


_FAULT_FLAGS = {value: FaultFlag(value) for value in range(8)}  # made once: an enum's constructor is slow


def _end(address: int, size_bytes: int) -> int:
    if address < 0 or size_bytes <= 0 or address + size_bytes > 1 << 64:
        raise ValueError(f"no range of addresses: {size_bytes} bytes from {address:#x}")
    return address + size_bytes


def _mode(dont_wake: bool, write_protect: bool = False) -> int:
    return (int(lib.PC_UFFD_DONTWAKE) if dont_wake else 0) | (int(lib.PC_UFFD_FILL_WP) if write_protect else 0)
