# SPDX-License-Identifier: Apache-2.0
"""A pager in a process of its own: when that dies, the machine waits, and another process takes over.

The same methods as `pager.Pager`. What must survive the pager's process stays here, in the machine's: the userfaultfds
(the kernel fills memory with zeros when the last descriptor of one is closed), the memory, the page states
(csrc/memory/states.c), the counters (csrc/core/metrics.c), and the list of what was set up. The pager's process gets
copies of the descriptors. A crash of one of its threads, SIGKILL, or a call that is not answered within
`CALL_TIMEOUT_S` ends that process, and nothing else:

- `events()` reports `EventType.DIED`; the data connections died with it, so for a migration it is a lost connection;
- `disconnect()`, or `watch_over()`, waits until the old process has left the kernel, determines which of the pages
  that it was placing are there, starts the next process, gives it everything, and wakes all waiting threads: their
  faults are reported again.

What it costs: a Python process of some 12 MB, and 30 ms to start it; nothing on the path of a fault.

Threads and cancellation: as for `Pager`. Only asynchronous methods wait for the other process, so one that does not
answer delays its own migration and no other. A plain method sends what is to be done, and returns; `confirm()` waits
until all of it has been done, and raises what went wrong in setting up. Without `confirm`, `events()` reports it as
`EventType.FATAL`, and a channel that could not be attached as one that went down. Counters are read from memory that
both processes share.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import socket
import subprocess
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import trio

from postcopy._blocking import END_TIMEOUT_S, no_thread
from postcopy._child import python
from postcopy._fd import FdHolder
from postcopy._native import ffi, lib
from postcopy.dataplane._base import BlockInUse, ForeignMemory
from postcopy.dataplane._events import ChannelKind, Event, EventType
from postcopy.dataplane._pager_child import MESSAGE_BYTES
from postcopy.dataplane.ahead import NO_PREFETCH, Prefetch
from postcopy.dataplane.compression import Compression
from postcopy.dataplane.pager import PagerCounters, PagerStatistics
from postcopy.dataplane.recorder import Recorder
from postcopy.errors import BusyError, CoreError, MigrationError, PostcopyError, check
from postcopy.memory import Memory
from postcopy.memory.bitmap import Bitmap
from postcopy.tls import DataChannel
from postcopy.uffd import How, Userfaultfd, parse_how, probe

__all__ = ["CALL_TIMEOUT_S", "PagerDied", "ProcessPager"]

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 3.0
"""A process that does not answer for so long is killed. What it is asked takes microseconds."""
START_TIMEOUT_S = 15.0
"""The same for the first answer, before which an interpreter starts, perhaps on a busy host."""
PING_PERIOD_S = 1.0
"""A process that has nothing to answer is pinged so often, while a task follows its events."""
DEATHS_IN_A_ROW = 5
"""Without a page placed in between: then every process that is started gets killed, and the pager gives up."""


class PagerDied(MigrationError):
    """The pager's process is gone. What waits for a page waits on; `ProcessPager.disconnect` starts another one."""


@dataclass
class _Shard:
    uffd: int
    features: int
    busy_poll_us: int


_SET_UP = ("add_block", "set_zero", "adopt_shard", "arm")
"""Calls whose failure is fatal."""


class _Call:
    """Something the process is to do, and its answer once there is one."""

    def __init__(self, what: str, name: str, arguments: tuple[Any, ...], fds: tuple[int, ...]) -> None:
        self.what = what
        self.name = name
        self.message = json.dumps([name, arguments]).encode()
        self.fds: list[int] = []  # this call's own until it is sent
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            for fd in fds:
                self.fds.append(os.dup(fd))
            on_failure.pop_all()
        self.timeout_s = CALL_TIMEOUT_S
        self.awaited = False  # a task waits for it and takes its error
        self.channel: tuple[ChannelKind, int] | None = None  # that it attaches
        self.done = False
        self.error: PostcopyError | None = None

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


def _map_call(what: str, name: str, block: int, bitmap: Bitmap) -> _Call:
    """One with a page map, in a memfd."""
    words = bytes(bitmap)
    return _file_call(what, name, (block, len(words) // 8), words)


def _file_call(what: str, name: str, arguments: tuple[int, ...], content: Any) -> _Call:
    """One with so much beside it that it takes a memfd."""
    with open(os.memfd_create("postcopy-map", os.MFD_CLOEXEC), "w+b") as file:
        file.write(content)
        file.flush()
        return _Call(what, name, arguments, (file.fileno(),))


class _Readable:
    """A descriptor that several tasks wait for. Trio allows one task a descriptor, and a copy for each task might be
    refused in the middle of a migration, when the process has no descriptors left."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._turn: trio.Event | None = None

    async def wait(self) -> None:
        """Until there may be something to read, or it was closed, or another task has given up waiting."""
        if self._turn is not None:
            await self._turn.wait()
            return
        turn = self._turn = trio.Event()
        try:
            with contextlib.suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(self._fd)
        finally:
            self._turn = None
            turn.set()

    def close(self) -> None:
        """Before the descriptor is."""
        trio.lowlevel.notify_closing(self._fd)


class _Process:
    """One process of the pager, and the socket to it. Only what is asynchronous waits here."""

    def __init__(self, metrics_fd: int) -> None:
        with contextlib.ExitStack() as on_failure:
            try:
                self._link, its_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                on_failure.callback(self._link.close)
                with its_link:
                    fds = (its_link.fileno(), metrics_fd)
                    command = python("-m", "postcopy.dataplane._pager_child", *map(str, fds))
                    self._process = subprocess.Popen(
                        command, pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True
                    )
                on_failure.callback(self._process.wait)
                on_failure.callback(self._process.kill)
                self._pidfd = os.pidfd_open(self._process.pid)
            except OSError as error:
                raise MigrationError(f"cannot start a process for the pager: {error.strerror}") from error
            on_failure.pop_all()
        self._link.setblocking(False)
        self._readable = _Readable(self._link.fileno())
        self._exited = _Readable(self._pidfd)
        self._unsent: deque[_Call] = deque()
        self._unanswered: deque[_Call] = deque()
        self._since = time.monotonic()  # when the oldest of these became so
        self._answers = 0
        self._killed_for = ""
        self._closed = False
        self.events: deque[Event] = deque()
        self.failure: PostcopyError | None = None  # of the first call that failed and that no task awaited
        self.dead = False  # nothing more is asked of it; its threads may still be in the kernel
        self.reported = False  # its end, as an event

    @property
    def pid(self) -> int:
        return self._process.pid

    # ---- calls

    def post(self, call: _Call) -> _Call:
        """Sends a call, now or as soon as the process takes it. `PagerDied` when it is known to be dead."""
        if self.dead:
            call.close()
            raise PagerDied(self.exit_reason())
        self._unsent.append(call)
        self.pump()
        return call

    def is_asked(self, name: str) -> bool:
        """Whether such a call has not been answered yet."""
        return any(call.name == name for call in (*self._unsent, *self._unanswered))

    @property
    def idle(self) -> bool:
        return not self._unsent and not self._unanswered

    def pump(self) -> None:
        """Sends and receives what can be without waiting, and kills a process that takes too long."""
        # By turns: when all that was sent has been answered, no answer is left that would have the rest sent.
        while not self.dead and (self._send_one() or self._receive_one()):
            pass
        if not self.dead and self._remaining_s() <= 0:
            limit_s = self._limit_s()
            self.kill(f"the pager's process has not answered for {limit_s:g} s and was killed")

    def _send_one(self) -> bool:
        if not self._unsent:
            return False
        call = self._unsent[0]
        try:
            socket.send_fds(self._link, [call.message], call.fds)
        except BlockingIOError:
            return False
        except OSError:
            self.kill()
            return False
        self._unsent.popleft()
        call.close()
        if not self._unanswered:
            self._since = time.monotonic()
        self._unanswered.append(call)
        return True

    def _receive_one(self) -> bool:
        try:
            message = self._link.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            message = b""
        if not message:
            self.kill()
            return False
        what, *rest = json.loads(message)
        if what:
            kind, channel_kind, channel, error, text = rest
            self.events.append(Event(EventType(kind), ChannelKind(channel_kind), channel, error, text))
        else:
            self._answered(*rest)
        return True

    def _answered(self, result: int, text: str) -> None:
        call = self._unanswered.popleft()
        self._since = time.monotonic()
        self._answers += 1
        try:
            check(result, call.what, text)
        except PostcopyError as error:
            call.error = error
            if not call.awaited:
                self._failed(call, error)
        call.done = True

    def _failed(self, call: _Call, error: PostcopyError) -> None:
        """A call failed that no task awaits."""
        if call.channel is not None:  # as if the channel had gone down at once
            number = getattr(error, "errno", None) or errno.EIO
            self.events.append(Event(EventType.CHANNEL_DOWN, *call.channel, number, str(error)))
        elif call.name in _SET_UP and self.failure is None:
            self.failure = error
            self.events.append(Event(EventType.FATAL, text=str(error)))
        else:
            log.warning("%s", error)

    def _limit_s(self) -> float:
        limit_s = self._unanswered[0].timeout_s if self._unanswered else CALL_TIMEOUT_S
        return limit_s if self._answers else max(limit_s, START_TIMEOUT_S)

    def _remaining_s(self) -> float:
        return float("inf") if not self._unanswered else self._since + self._limit_s() - time.monotonic()

    async def wait_message(self) -> None:
        """Until the process has said something, has died, or has been killed since it said nothing."""
        # Real time, whatever clock Trio runs on: another process is waited for.
        with trio.move_on_after(PING_PERIOD_S if self.idle else max(0.0, self._remaining_s())) as scope:
            await self._readable.wait()
        self.pump()
        if scope.cancelled_caught and self.idle and not self.dead:
            self.post(_Call("pinging the pager's process", "ping", (), ()))

    async def finish(self, call: _Call) -> None:
        """Until a posted call has been done; raises its error, or `PagerDied`."""
        while not call.done and not self.dead:
            await self.wait_message()
        if not call.done:
            raise await self.death()
        if call.error is not None:
            raise call.error

    # ---- its end

    def kill(self, why: str = "") -> None:
        """Counts as dead from now on; its threads may be in the kernel until `gone` has returned. Never waits."""
        if not self.dead:
            self._killed_for = why
            self.dead = True
            for call in (*self._unsent, *self._unanswered):
                call.close()
            self._unsent.clear()
            self._unanswered.clear()
        self._process.kill()  # harmless when it has been waited for

    @property
    def ended(self) -> bool:
        """Whether nothing of it is left. Never waits."""
        return self._process.poll() is not None

    async def gone(self, timeout_s: float = END_TIMEOUT_S) -> bool:
        """Waits until a killed process has ended: from then on it places no page. False when it has not in time."""
        deadline = time.monotonic() + timeout_s
        while not self.ended and not self._closed and time.monotonic() < deadline:
            with trio.move_on_after(deadline - time.monotonic()):
                await self._exited.wait()
        return self.ended

    async def death(self) -> PagerDied:
        """The error for what was asked of it, once it has ended."""
        await self.gone()
        return PagerDied(self.exit_reason())

    def exit_reason(self) -> str:
        """Why it has ended, in one line."""
        if self._killed_for:
            return self._killed_for
        status = self._process.poll()
        if status is None:
            return "the pager's process was killed and has not ended yet"
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"the pager's process has died ({signal.Signals(-status).name})"
        return f"the pager's process has died (status {status})"

    def close(self) -> None:
        """After `kill`: closes the descriptors."""
        if not self._closed:
            self._closed = True
            self._readable.close()
            self._link.close()
            self._exited.close()
            os.close(self._pidfd)


class ProcessPager(PagerCounters):
    """See the head of this file, and `Pager`."""

    COUNTERS = "pc_metrics"

    def __init__(self) -> None:
        self._shards: list[_Shard] = []
        self._armed: list[tuple[int, int, int, int]] = []
        self._pending: deque[Event] = deque()  # events that do not come from the process
        self._replaced = trio.Event()
        self._compression = Compression(0)
        self._prefetch = NO_PREFETCH
        self._touches = -1  # where first touches are logged
        self._runs: Any = ()
        self._disarmed = False
        self._deaths_in_a_row = 0
        self._received_at_death = 0
        self.deaths = 0
        pointer: Any = ffi.new("struct pc_metrics **")
        check(lib.pc_metrics_new(pointer), "making a pager's counters")
        self._counters = pointer[0]
        try:
            self._process = self._start()
        except BaseException:
            lib.pc_metrics_free(self._counters)
            raise
        super().__init__()

    # ---- setting it up: as `Pager`, and remembered for the next process

    def add_block(self, memory: Memory) -> int:
        states_fd = check(lib.pc_states_new(memory.pages), "making page states")
        try:
            number = self._add_block(memory, memory.pages, lambda: self._give_block(memory, states_fd), states_fd)
        except BaseException:
            os.close(states_fd)
            raise
        result = lib.pc_metrics_add_states(self._counters, states_fd, memory.pages, memory.page_bytes)
        if result < 0:  # which is for those who look, and ends no migration
            log.warning("RAM block %d is missing in what is shown of the memory: %s", number, os.strerror(-result))
        return number

    def set_zero(self, block: int, zero: Bitmap) -> None:
        self._check_length(block, zero)
        self._check_open()
        self._process.post(_map_call("marking zero pages", "set_zero", block, zero))

    def expect_push(self) -> None:
        self._post("expecting a push", "expect_push")

    def accept_compression(self, ways: Compression) -> None:
        self._give_compression(ways)
        self._compression = ways

    def record_touches(self, fd: int) -> None:
        self._check_open()
        if self._touches >= 0:
            raise BusyError("first touches are recorded already")
        self._touches = os.dup(fd)
        self._give_touches()

    def set_prefetch(self, policy: Prefetch) -> None:
        self._give_prefetch(policy)
        self._prefetch = policy

    async def _forget(self, block: int, stale: Bitmap) -> None:
        """`PagerDied` when the process does: what it had received is not to be used then."""
        with trio.CancelScope(shield=True):  # bounded: `finish` is
            async with self._ending:
                self._check_open()
                await self._finish(_map_call("forgetting pages", "forget", block, stale))

    def add_shard(self, how: How | str = How.ANY, busy_poll_us: int = 0) -> int:
        self._check_open()
        api = probe(parse_how(how))
        features = int(lib.pc_pager_features(int(api.features)))
        shard = _Shard(Userfaultfd.open(api.how, features).detach(), features, busy_poll_us)
        try:
            self._give_shard(shard)
        except BaseException:
            os.close(shard.uffd)
            raise
        self._shards.append(shard)
        return len(self._shards) - 1

    def arm(self, shard: int, block: int, first_page: int, pages: int) -> None:
        self._give_arming(shard, block, first_page, pages)
        self._armed.append((shard, block, first_page, pages))

    def attach_urgent(self, shard: int, fd: int, *, tls: Any = None) -> None:
        self._attach(ChannelKind.URGENT, shard, fd, tls)

    def attach_bulk(self, channel: int, fd: int, *, tls: Any = None) -> None:
        self._attach(ChannelKind.BULK, channel, fd, tls)

    async def confirm(self) -> None:
        """As `Pager.confirm`: everything asked of the process so far has been done. `PagerDied` when it has died."""
        self._check_open()
        process = self._process
        while not process.idle and not process.dead:
            await process.wait_message()
        if process.dead:
            raise await process.death()
        if process.failure is not None:
            raise process.failure
        await trio.lowlevel.checkpoint()

    # ---- while it runs

    def request_missing(self, limit: int) -> int:
        self._check_open()
        # While one is unanswered, a second request would only add to what the process is behind with.
        if self._process.dead or not self._process.is_asked("request_missing"):
            self._post("requesting missing pages", "request_missing", limit)
        return min(limit, sum(block.pages for block in self._blocks) - self._received_pages())

    def request_range(self, block: int, first_page: int, pages: int) -> int:
        self._check_range(block, first_page, pages)
        self._post("requesting pages", "request_range", block, first_page, pages)
        return pages - self.received(block).part(first_page, pages).count()

    def request_runs(self, runs: Any) -> None:
        self._give_runs(runs)
        self._runs = runs

    def statistics(self) -> PagerStatistics:
        """As `Pager.statistics`, over all processes there were."""
        pages = [(block.memory.page_bytes, block.pages, self._received_of(block)) for block in self._blocks]
        return replace(
            super().statistics(),
            total_pages=sum(total for _, total, _ in pages),
            total_bytes=sum(unit * total for unit, total, _ in pages),
            resident_pages=sum(received for _, _, received in pages),
            resident_bytes=sum(unit * received for unit, _, received in pages),
        )

    def received(self, block: int) -> Bitmap:
        """A copy of the map of pages that are there; also while there is no process."""
        entry = self._block(block)
        bitmap = Bitmap(entry.pages)
        check(lib.pc_states_received(entry.states_fd, len(bitmap), bitmap.words), "reading the received map")
        return bitmap

    def _fill_bins(self, bins: Any, count: int) -> int:
        return int(lib.pc_metrics_bins(self._counters, bins, count))

    def _give_to(self, recorder: Recorder) -> None:
        recorder.take("metrics", self._counters)

    def take_event(self) -> Event | None:
        self._check_open()
        return self._pending.popleft() if self._pending else self._poll_event()

    def _poll_event(self) -> Event | None:
        """The next event of the process, or that it has ended."""
        process = self._process
        process.pump()
        if process.events:
            return process.events.popleft()
        if not process.dead or process.reported or not process.ended:
            return None
        process.reported = True
        return Event(EventType.DIED, text=process.exit_reason())

    async def wait_event(self) -> None:
        process = self._process
        if not process.dead:
            await process.wait_message()
        elif process.reported:  # until the next process is there, or this pager is closed
            await self._replaced.wait()
        elif not await process.gone():
            process.reported = True
            self._pending.append(Event(EventType.DIED, text=process.exit_reason()))
        self._check_open()

    async def watch_over(self) -> None:
        """Starts the next process whenever one dies, for a time in which no task follows `events`. Never returns by
        itself; raises when no process stays alive."""
        while True:
            event = self._poll_event()
            if event is not None and event.type is not EventType.DIED:
                self._pending.append(event)  # for the next task that follows events
            elif self._process.dead:
                async with self._ending:
                    if self._process.dead:
                        await self._replace()
            else:
                await self.wait_event()

    @property
    def pid(self) -> int:
        """Of the pager's process, as it is now."""
        return self._process.pid

    @property
    def process(self) -> tuple[int, int]:
        """The pager's process as it is now, and how many have died before it."""
        return self.pid, self.deaths

    # ---- the end

    async def disconnect(self) -> None:
        """As `Pager.disconnect`; a process that has died is replaced by the next one."""
        with trio.CancelScope(shield=True):
            async with self._ending:
                self._check_open()
                try:
                    await self._do("closing the pager's channels", "disconnect")
                except PagerDied:
                    await self._replace()

    async def disarm(self) -> None:
        with trio.CancelScope(shield=True):
            async with self._ending:
                self._check_open()
                await self._do_in_some_process("unregistering memory", "disarm")
                self._disarmed = True

    async def _end(self) -> None:
        self._deaths_in_a_row = 0  # however many there were: poisoning what is missing is worth new attempts
        try:
            if self._disarmed or not self._armed:
                with contextlib.suppress(PagerDied):
                    await self._do("ending the pager", "free")
            else:
                # A ping first: one that does not answer is found out in less time than `free` is given.
                await self._do_in_some_process("pinging the pager's process", "ping")
                await self._do_in_some_process("ending the pager", "free")
        except (MigrationError, CoreError) as error:
            raise BusyError(f"{error}; missing pages stay missing, their userfaultfds open") from error
        finally:
            self._closed = True
            self._replaced.set()
            self._process.kill()
            if not await self._process.gone():
                log.error("%s", self._process.exit_reason())
            self._process.close()
        for shard in self._shards:
            os.close(shard.uffd)
        for block in self._blocks:
            os.close(block.states_fd)
        if self._touches >= 0:
            os.close(self._touches)
        lib.pc_metrics_free(self._counters)

    # ---- private

    def _start(self) -> _Process:
        return _Process(lib.pc_metrics_fd(self._counters))

    def _received_of(self, block: BlockInUse) -> int:
        return check(int(lib.pc_states_count(block.states_fd, block.pages)), "counting the pages that are here")

    def _received_pages(self) -> int:
        return sum(map(self._received_of, self._blocks))

    def _post(self, what: str, name: str, *arguments: Any, fds: tuple[int, ...] = ()) -> None:
        self._check_open()
        self._process.post(_Call(what, name, arguments, fds))

    def _attach(self, kind: ChannelKind, index: int, fd: int, tls: Any) -> None:
        name = kind.name.lower()
        try:
            self._check_open()
            if index < 0:
                raise ValueError(f"there is no {name} channel {index}")
            if tls is not None:  # which another process cannot have: a thread here carries what goes over it
                relayed, fd, tls = (fd, tls), -1, None
                what = f"relaying {name} channel {index}"
                result = int(lib.pc_tls_relay(*relayed, kind is ChannelKind.URGENT))
                if result == -errno.EAGAIN:
                    raise no_thread(what)
                fd = check(result, what)
            call = _Call(f"attaching {name} channel {index}", f"attach_{name}", (index,), (fd,))
            call.channel = (kind, index)
            self._process.post(call)
        finally:
            if fd >= 0:
                DataChannel(FdHolder(fd), tls).close()

    async def _do(self, what: str, name: str) -> None:
        call = _Call(what, name, (), ())
        if name == "free" and not self._disarmed:
            call.timeout_s = END_TIMEOUT_S  # it may poison every missing page, one by one
        await self._finish(call)

    async def _finish(self, call: _Call) -> None:
        call.awaited = True
        process = self._process
        await process.finish(process.post(call))

    async def _do_in_some_process(self, what: str, name: str) -> None:
        """In the next one when one dies of it."""
        for _ in range(DEATHS_IN_A_ROW):
            try:
                await self._do(what, name)
            except PagerDied:
                await self._replace()
            else:
                return
        raise PagerDied(f"{what}: no process of the pager stays alive")

    def _give_block(self, memory: Memory | ForeignMemory, states_fd: int) -> None:
        fds = (states_fd, memory.fd) if memory.fd >= 0 else (states_fd,)
        where = (memory.address, memory.size_bytes, memory.page_bytes, int(memory.struct.kind))
        self._post("giving memory to the pager", "add_block", *where, fds=fds)

    def _give_shard(self, shard: _Shard) -> None:
        what = "giving a userfaultfd to the pager"
        self._post(what, "adopt_shard", shard.features, shard.busy_poll_us, fds=(shard.uffd,))

    def _give_compression(self, ways: Compression) -> None:
        self._post("accepting compression", "accept_compression", ways.value)

    def _give_prefetch(self, policy: Prefetch) -> None:
        self._post("setting the prefetch policy", "set_prefetch", policy.way, policy.pages)

    def _give_touches(self) -> None:
        self._post("recording first touches", "record_touches", fds=(self._touches,))

    def _give_runs(self, runs: Any) -> None:
        self._check_open()
        self._process.post(_file_call("requesting pages", "request_runs", (len(runs),), ffi.buffer(runs)))

    def _give_arming(self, *armed: int) -> None:
        self._post("registering memory with a userfaultfd", "arm", *armed)

    async def _replace(self) -> None:
        """Starts the dead process's successor. Threads that wait for a page go on waiting; their faults are reported
        again."""
        while True:
            received = await self._end_process()
            self._process = self._start()
            # Before the first wait: a task that is cancelled there leaves a pager that has been given everything.
            self._pending.clear()
            if self._blocks and received == sum(block.pages for block in self._blocks):
                self._pending.append(Event(EventType.COMPLETE, text="every page is here"))
            replaced, self._replaced = self._replaced, trio.Event()
            replaced.set()
            try:
                for block in self._blocks:
                    self._give_block(block.memory, block.states_fd)
                for shard in self._shards:
                    self._give_shard(shard)
                self._give_compression(self._compression)
                self._give_prefetch(self._prefetch)
                if self._touches >= 0:
                    self._give_touches()
                for armed in () if self._disarmed else self._armed:
                    self._give_arming(*armed)
                if len(self._runs) and not self._disarmed:  # what has arrived of them is asked for no second time
                    self._give_runs(self._runs)
                await self.confirm()
            except PagerDied:
                continue  # counted when it is ended
            break

    async def _end_process(self) -> int:
        """Ends a process for good, and determines which of the pages that it was placing are there. How many pages
        are."""
        process = self._process
        process.kill()
        if not await process.gone():
            raise MigrationError(
                f"{process.exit_reason()}: it may still place pages; the machine waits where it needs one"
            )
        log.error("%s; another one takes over", process.exit_reason())
        process.close()
        self.deaths += 1
        for number, block in enumerate(self._blocks):
            # An error here is the end: without knowing what was placed nothing may be placed.
            try:
                what = "determining what a dead pager has placed"
                check(int(lib.pc_states_settle(block.states_fd, block.memory.struct)), what)
            except CoreError as error:
                raise MigrationError(
                    f"RAM block {number}: cannot tell what the dead pager has placed ({error}); what is missing is not "
                    "fetched again, since that might undo what the machine has written"
                ) from error
        received = self._received_pages()
        self._deaths_in_a_row = self._deaths_in_a_row + 1 if received == self._received_at_death else 1
        self._received_at_death = received
        if self._deaths_in_a_row > DEATHS_IN_A_ROW:
            raise MigrationError(
                f"{process.exit_reason()}, as did those before it; the machine waits where it needs a page"
            )
        return received
