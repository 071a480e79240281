# SPDX-License-Identifier: Apache-2.0
"""One virtual machine: its descriptors, its pager, and its end.

All that is needed to serve it lies in descriptors (`Descriptors`), which the store holds a copy of before its first
fault is answered: the userfaultfd, page states, counters, the order of first touch, a record of what it is, its
process, the connection it came by, and its image. So another process goes on from them at any instant, and `Vm` does
not know whether it is the first one.

**Threads.** Each virtual machine has a pager of its own, with threads of its own in C; a slow image, or a virtual
machine that faults without end, delays no other one.

**The end.** Its process ends (by the pidfd, or the kernel says so to the pager): then all of it is closed. This process
ends: where no page is missing, the memory is unregistered, and the virtual machine needs nobody any more. Else it is
left as it is (`Pager.leave`): it waits where it needs a page, until another process serves it.

**Lost.** An image that cannot be read never turns into zeros. The virtual machine is killed, or held: then the image is
looked at again every few seconds, and when it can be read all that wait go on.
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import msgspec
import trio

from postcopy._blocking import run_sync
from postcopy._native import lib
from postcopy.dataplane.histogram import Histogram, Recent, RecentWindow
from postcopy.dataplane.pager import (
    Event,
    EventType,
    ForeignMemory,
    Pager,
    PagerStatistics,
    new_metrics,
    new_states,
    new_touches,
    read_touches,
)
from postcopy.dataplane.recorder import Recorder
from postcopy.errors import (
    NO_FILES,
    BusyError,
    ConnectionLost,
    CoreError,
    PostcopyError,
    ProtocolError,
    out_of_files,
)
from postcopy.handler._source import Source
from postcopy.handler._store import kind_of
from postcopy.machines.firecracker.handshake import Credentials, Handshake
from postcopy.memory import workingset

_SO_PEERPIDFD = 77  # <asm-generic/socket.h>, Linux 6.5
_RECORD = "postcopy-vm"
RECORD_VERSION = 2
"""Of all that is kept: of `About`, and of the page states, counters and touches, as C lays them out. An engine that
does not know it is refused as a successor."""
OLDEST_VERSION = 1
"""The first one that is gone on from. Its counters are laid out in another way: they begin anew."""
_MAX_RECORD_BYTES = 64 << 10
WRITE_S = 30.0
"""How long writing a working set may take."""

log = logging.getLogger(__name__)


class About(msgspec.Struct, frozen=True):
    """What a virtual machine is, as it is kept beside its descriptors."""

    version: int
    name: str
    pid: int
    uid: int
    socket: str
    image: str | None
    page_bytes: int
    memory_bytes: int
    features: int
    regions: list[tuple[int, int, int]]  # address, bytes, offset
    connected_ns: int  # CLOCK_MONOTONIC of this host
    deaths: int  # of processes that have served, before it connected

    @classmethod
    def of(
        cls, handshake: Handshake, peer: Credentials, name: str, socket_path: str, image: str | None, deaths: int
    ) -> About:
        return cls(
            version=RECORD_VERSION,
            name=name,
            pid=peer.pid,
            uid=peer.uid,
            socket=socket_path,
            image=image,
            page_bytes=handshake.regions[0].page_bytes,
            memory_bytes=handshake.memory_bytes,
            features=handshake.features,
            regions=[(region.address, region.size_bytes, region.offset) for region in handshake.regions],
            connected_ns=time.monotonic_ns(),
            deaths=deaths,
        )

    @property
    def pages(self) -> int:
        return self.memory_bytes // self.page_bytes


@dataclass
class Descriptors:
    """Those of a virtual machine; -1: it has none. `close` closes them."""

    uffd: int = -1
    states: int = -1
    metrics: int = -1
    touches: int = -1
    record: int = -1
    pidfd: int = -1
    image: int = -1
    connection: int = -1

    @classmethod
    def make(cls, about: About, **given: int) -> Descriptors:
        """Copies of those that were given, and the others. `ResourceError` or `CoreError` when there cannot be one."""
        made = cls()
        try:
            for name, fd in given.items():
                if fd >= 0:
                    setattr(made, name, os.dup(fd))
            made.states = new_states(about.pages)
            made.metrics = new_metrics()
            made.touches = new_touches(about.pages)
            made.record = os.memfd_create(_RECORD, os.MFD_CLOEXEC)
            os.pwrite(made.record, msgspec.json.encode(about), 0)
        except BaseException as error:
            made.close()
            if isinstance(error, OSError):
                raise _explained(error, "making what outlives this process") from error
            raise
        return made

    @classmethod
    def sort(cls, fds: Sequence[int]) -> tuple[Descriptors, About]:
        """Those that another process has made, which belong to it from now on. `ProtocolError` where some are missing;
        then all are closed."""
        known = {
            "userfaultfd": "uffd",
            "memfd:postcopy-states": "states",
            "memfd:postcopy-metrics": "metrics",
            "memfd:postcopy-touches": "touches",
            f"memfd:{_RECORD}": "record",
            "pidfd": "pidfd",
            "socket": "connection",
        }
        found = cls()
        for fd in fds:
            name = known.get(kind_of(fd), "image")
            if getattr(found, name) >= 0:
                os.close(fd)
            else:
                setattr(found, name, fd)
        try:
            if min(found.uffd, found.states, found.metrics, found.touches, found.record) < 0:
                raise ValueError("descriptors are missing")
            about = msgspec.json.decode(os.pread(found.record, _MAX_RECORD_BYTES, 0), type=About)
            if not OLDEST_VERSION <= about.version <= RECORD_VERSION:
                raise ValueError(f"its record is of version {about.version}")
            if about.version < RECORD_VERSION:
                os.close(found.metrics)
                found.metrics = -1
                found.metrics = new_metrics()
        except (ValueError, OSError, PostcopyError) as error:
            found.close()
            raise ProtocolError(f"a virtual machine cannot be taken over: {error}") from error
        return found, about

    @property
    def kept(self) -> list[int]:
        """What the store is to hold beside the connection."""
        return [fd for fd in (getattr(self, item.name) for item in fields(self)) if fd not in (-1, self.connection)]

    def close(self) -> None:
        for item in fields(self):
            fd = getattr(self, item.name)
            setattr(self, item.name, -1)
            if fd >= 0:
                os.close(fd)


def open_peer(connection: socket.socket | trio.socket.SocketType, peer: Credentials) -> int:
    """A pidfd of the process at the other end of a connection. -1 where there can be none, since it is outside of this
    process's pid namespace. `ConnectionLost` when it has ended."""
    try:
        (fd,) = array.array("i", connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL):
            raise ConnectionLost("the process has ended") from error
        if peer.pid <= 0:
            return -1
        try:  # before Linux 6.5: by its number, which it still has if it has not ended
            return os.pidfd_open(peer.pid)
        except ProcessLookupError as gone:
            raise ConnectionLost("the process has ended") from gone
        except OSError as failed:
            raise CoreError(failed.errno or 0, "opening the process of a virtual machine") from failed
    return int(fd)


def _explained(error: OSError, what: str) -> PostcopyError:
    if error.errno in NO_FILES:
        return out_of_files(error.errno, what)
    return CoreError(error.errno or 0, what)


class Vm:
    """`run` it in a task. What happens is told by the calls that `VmOptions` names."""

    def __init__(self, key: str, descriptors: Descriptors, about: About, source: Source, options: VmOptions) -> None:
        """`key`: its name in the store. The descriptors belong to it."""
        self.key = key
        self.about = about
        self.fds = descriptors
        self.error: str | None = None
        self.ended = ""  # why it is not served any more
        self.killed = False
        self.taken_over = False  # from a process before this one
        self.lost = trio.Event()  # replaced when it can be served again
        self.served = trio.Event()  # its faults are answered, from now on
        self.recoveries: int | None = None
        self.encrypted: bool | None = None  # the connection to its source
        self.source = source
        self.limiter = trio.CapacityLimiter(2)  # of threads that may wait for its disk, beside those of its pager
        self._options = options
        self._pager: Pager | None = None
        self._scope = trio.CancelScope()  # of all that serves it
        self._statistics: PagerStatistics | None = None
        self._latency = Histogram()
        self._window = RecentWindow()
        self.recorder: Recorder | None = None
        self.bins = b""  # which parts of its memory are there, see `DataPlane.bins`
        self.replays = False
        self._set: workingset.WorkingSet | None = None
        self._set_is_read = trio.Event()

    # ---- what is shown

    @property
    def complete(self) -> bool:
        """Whether all of its memory is there."""
        count = self.statistics()
        return count is not None and 0 < count.total_pages == count.resident_pages

    @property
    def is_recorded(self) -> bool:
        """Whether it is recorded over time, or will be."""
        return self._options.records

    @property
    def status(self) -> str:
        if self.ended:
            return "ended"
        return "lost" if self.error else "complete" if self.complete else "serving"

    def statistics(self) -> PagerStatistics | None:
        """None before its pager is there."""
        if self._pager is not None:
            self._statistics = self._pager.statistics()
            self._latency = self._pager.latency()
            self._window.look(self._latency)
            self.bins = self._pager.bins()
        return self._statistics

    @property
    def latency(self) -> Histogram:
        return self._latency

    @property
    def recent(self) -> Recent | None:
        return self._window.recent

    # ---- its life

    async def run(self) -> None:
        """Until its process has ended, or cancelled. Closes everything. Never raises for what happens to it."""
        if self.taken_over and self._left_to_record_s() < 0:
            self._options.record_to = None  # a process before this one has written it
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    if self.fds.pidfd >= 0:
                        nursery.start_soon(self._watch_process)
                    try:
                        await self._serve(nursery)
                    except PostcopyError as error:
                        if not self.ended:
                            self.lose(str(error), for_good=True)
                            self.served.set()  # as far as it will be
                            if self.fds.pidfd < 0:
                                self._scope.cancel()
        finally:
            try:
                with trio.CancelScope(shield=True):  # each step of it is bounded
                    await self._end_pager()
                    if self._options.record_to is not None and (self.ended or not self._options.leave()):
                        await self._write_working_set(self._options.record_to)
            finally:
                self.fds.close()

    def kill(self) -> str:
        """Kills its process; what is in the way of that, or nothing."""
        if self.fds.pidfd < 0:
            return "its process is outside of this process's pid namespace" if not self.ended else ""
        try:
            signal.pidfd_send_signal(self.fds.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except OSError as error:
            return f"its process {self.about.pid} cannot be killed: {error.strerror}"
        self.killed = True
        return ""

    async def _watch_process(self) -> None:
        await trio.lowlevel.wait_readable(self.fds.pidfd)
        self._end()

    def _end(self) -> None:
        """Its process has ended."""
        self.ended = "its process was killed" if self.killed else "its process has ended"
        self._scope.cancel()

    async def _serve(self, nursery: trio.Nursery) -> None:
        pager = self._pager = Pager(self.fds.metrics)
        self._begin_recording()
        if self._options.working_set is not None:  # read while the rest is set up
            nursery.start_soon(self._read_working_set, self._options.working_set)
        try:
            await self._set_up(pager)
        except CoreError as error:
            if error.errno == errno.ESRCH:
                self._end()
            raise
        except OSError as error:
            raise _explained(error, "serving a virtual machine") from error
        self.served.set()
        nursery.start_soon(self.source.run, self, pager)
        nursery.start_soon(self._prefetch, pager)
        if self._options.record_to is not None and self._options.record_for_s < float("inf"):
            nursery.start_soon(self._record_for_a_while, self._options.record_to)
        async for event in pager.events():
            self.take(event)

    def _begin_recording(self) -> None:
        if self._options.records:
            self.recorder = Recorder.open()
            if self.taken_over:
                self._mark("pager-died", "this process has taken over")

    def _mark(self, what: str, text: str = "", *, begins: bool = False) -> None:
        if self.recorder is not None:
            self.recorder.mark(what, text, begins=begins)

    async def _set_up(self, pager: Pager) -> None:
        about = self.about
        kind = lib.PC_MEMORY_ANON if about.page_bytes == int(lib.pc_page_bytes()) else lib.PC_MEMORY_HUGETLB
        pager.set_readers(self._options.readers, self._options.readers)
        pager.add_block(ForeignMemory(0, about.memory_bytes, about.page_bytes, kind), self.fds.states)
        if self.recorder is not None:
            self.recorder.follow(pager, [("ram", about.memory_bytes, about.page_bytes)])
        pager.record_touches(self.fds.touches)
        try:
            await self.source.prepare(pager)
        except CoreError as error:
            self.lose(str(error))
        shard = pager.adopt_shard(os.dup(self.fds.uffd), about.features, self._options.busy_poll_us)
        self.source.attach(pager, shard)

        def arm() -> None:
            for address, size_bytes, offset in about.regions:
                pager.arm_at(shard, 0, offset // about.page_bytes, size_bytes // about.page_bytes, address)

        await run_sync(arm)  # which waits for as long as the process's memory map is locked

    def take(self, event: Event) -> None:
        """An event of its pager."""
        if event.error == errno.ESRCH:
            self._end()
            return
        self.source.take(event, self)
        if event.type is EventType.COMPLETE:
            self._mark("all-there", begins=True)
            self._options.changed()

    def lose(self, reason: str, *, for_good: bool = False) -> None:
        """Its pages cannot be had any more, for now, or `for_good`."""
        if self.error is None:
            self.error = reason
            self._mark("lost", reason)
            if not for_good:
                self.lost.set()
            self._options.lost(self)

    def found_again(self) -> None:
        if self.error is not None:
            self.error = None
            self._mark("recovered", begins=True)
            self.lost = trio.Event()
            self._options.recovered(self)

    async def _end_pager(self) -> None:
        pager = self._pager
        if pager is None:
            return
        self.statistics()
        self._mark("ended", self.ended)
        self._pager = None
        try:
            if not self.ended and not self._options.leave():
                with contextlib.suppress(BusyError):  # a page is missing
                    await pager.disarm()
        except PostcopyError as error:
            log.warning("%s: its memory stays registered: %s", self.about.name, error)
        try:
            await pager.leave()
        except PostcopyError as error:
            log.error("%s: %s", self.about.name, error)

    # ---- working sets

    async def _read_working_set(self, path: str) -> None:
        try:
            self._set = await self.source.working_set(self, path)
        except (RuntimeError, MemoryError) as error:  # no thread can be started: the microVM is served all the same
            log.warning("%s: --working-set %s is not read: %s", self.about.name, path, error)
        self._set_is_read.set()

    async def _prefetch(self, pager: Pager) -> None:
        try:
            await self._begin_prefetch(pager)
        except PostcopyError as error:  # as when there can be no thread: pages still come when they are touched
            log.warning("%s: nothing is prefetched: %s", self.about.name, error)

    async def _begin_prefetch(self, pager: Pager) -> None:
        if self._options.working_set is not None:
            await self._set_is_read.wait()
            found = self._set
            if found is not None and found.runs:
                self.replays = True
                # What a process before this one has looked at is not looked at, and counted, again.
                runs = _within(found.runs, self.about.pages, pager.statistics().set_pages)
                pager.prefetch_runs([(0, first, count) for first, count in runs])
        if self._options.prefetch_all:
            self.source.prefetch_all(pager)

    def _left_to_record_s(self) -> float:
        return self._options.record_for_s - (time.monotonic_ns() - self.about.connected_ns) / 1e9

    async def _record_for_a_while(self, path: str) -> None:
        await trio.sleep(max(0.0, self._left_to_record_s()))
        await self._write_working_set(path)  # which is done at the end where this is cancelled
        self._options.record_to = None

    async def _write_working_set(self, path: str) -> None:
        """Bounded in time: a disk may hang."""
        about, image = self.about, self.source.image
        if image is None:
            return

        def write() -> int:
            # Abandoned, it finds that both descriptors are -1.
            found = workingset.collect(about.page_bytes, (page for _, page in read_touches(self.fds.touches)))
            workingset.write(path, found, image.identify())
            return found.pages

        with trio.move_on_after(WRITE_S) as scope:
            try:
                pages = await trio.to_thread.run_sync(write, limiter=self.limiter, abandon_on_cancel=True)
            except (PostcopyError, RuntimeError, MemoryError) as error:  # the latter: no thread can be started
                log.error("%s: %s", about.name, error)
            else:
                self._options.recorded(self, path, pages)
        if scope.cancelled_caught:
            log.error("%s: --record-working-set %s: not written within %g s", about.name, path, WRITE_S)


def _within(runs: Sequence[tuple[int, int]], pages: int, skipped: int) -> list[tuple[int, int]]:
    """Those parts that memory of so many pages has: an image may be longer; without the first pages, `skipped`."""
    found = []
    for first, whole in runs:
        count = min(whole, pages - first)
        gone = min(max(count, 0), skipped)
        skipped -= gone
        if count > gone:
            found.append((first + gone, count - gone))
    return found


@dataclass
class VmOptions:
    """How it is served, and whom to tell."""

    readers: int
    busy_poll_us: int
    prefetch_all: bool
    working_set: str | None
    record_to: str | None
    record_for_s: float
    changed: Callable[[], None]
    lost: Callable[[Vm], None]
    recovered: Callable[[Vm], None]
    recorded: Callable[[Vm, str, int], None]
    records: bool  # whether it is recorded over time
    leave: Callable[[], bool]
    """Whether this process ends so that another one goes on."""
