# SPDX-License-Identifier: Apache-2.0
"""A pager in a process of its own: when it dies, the machine waits, and another one goes on.

The same methods as `pager.Pager`. What must not die with the engine stays here, in the machine's process: the
userfaultfds (the kernel fills memory with zeros when the last descriptor of one is closed), the memory, the page
states (`csrc/states.c`), and the list of what was set up. The engine's process gets copies of the descriptors; a crash
of one of its threads, SIGKILL, or a call that is not answered within `CALL_TIMEOUT_S` ends it, and nothing else:

- `events()` tells `EventType.DIED`; the data connections died with it, so for a migration it is a lost connection;
- `disconnect()`, or `watch_over()`, waits for the rest of the process to leave the kernel, settles the pages that
  were under way, starts the next one, gives it everything, and wakes all who wait: their faults are reported again.

Counters go on across processes, except for what happened since they were last read here. What one costs: a Python
process of some 12 MB, and 30 ms to start it; nothing on the path of a fault.

Threads and cancellation: as for `Pager`. A plain method waits for the other process's answer, usually some 50 us, at
most `CALL_TIMEOUT_S`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass, fields, replace
from typing import Any

import msgpack
import trio

from ._blocking import END_TIMEOUT_S, run_to_end
from ._error_line import c_text
from ._errors import BusyError, MigrationError, check
from ._events import ChannelKind, Event, EventType
from ._native import ffi, lib
from ._pager_child import MESSAGE_BYTES
from .bitmap import Bitmap
from .histogram import Histogram
from .memory import Memory
from .pager import PagerStatistics, Stage
from .uffd import How, open_userfaultfd, parse_how, probe

__all__ = ["CALL_TIMEOUT_S", "PagerDied", "ProcessPager"]

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 3.0
"""An engine that does not answer for so long is killed. It works by messages that take microseconds."""
DEATHS_IN_A_ROW = 5
"""Without a page placed in between: then something kills whatever is started, and the pager gives up."""


class PagerDied(MigrationError):
    """The engine's process is gone. What waits for a page waits on; `ProcessPager.disconnect` starts another one."""


@dataclass
class _Block:
    memory: Memory
    states_fd: int


@dataclass
class _Shard:
    uffd: int
    features: int
    busy_poll_us: int


class _Process:
    """One incarnation: the process and the two sockets. A failing call means that it is dead, and makes it so."""

    def __init__(self) -> None:
        calls, its_calls = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        events, its_events = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_calls, its_events:
            fds = (its_calls.fileno(), its_events.fileno())
            command = [sys.executable, "-m", "postcopy._pager_child", *map(str, fds)]
            try:
                self._process = subprocess.Popen(
                    command, pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True
                )
            except OSError as error:
                calls.close()
                events.close()
                raise MigrationError(f"cannot start a process for the pager: {error.strerror}") from error
        calls.settimeout(CALL_TIMEOUT_S)
        events.setblocking(False)
        self.events = events
        self._calls = calls
        self.lock = threading.Lock()
        self.dead = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, name: str, *arguments: Any, fds: tuple[int, ...] = (), timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """(result, text, value). `PagerDied` when there is no answer."""
        with self.lock:
            if self.dead:
                raise PagerDied(self.epitaph())
            try:
                self._calls.settimeout(timeout_s)
                socket.send_fds(self._calls, [msgpack.packb([name, arguments])], fds)
                answer = self._calls.recv(MESSAGE_BYTES)
            except TimeoutError:
                self.end()
                raise PagerDied(f"the pager's process has not answered for {timeout_s:g} s and was killed") from None
            except OSError:
                answer = b""
            if not answer:
                self.end()
                raise PagerDied(self.epitaph())
            return msgpack.unpackb(answer)

    def end(self) -> None:
        """Kills it and waits until its threads have left the kernel: from then on nothing of it places a page."""
        self.dead = True
        self._process.kill()
        self._process.wait()

    def epitaph(self) -> str:
        status = self._process.returncode
        if status is not None and status < 0:
            with contextlib.suppress(ValueError):
                return f"the pager's process has died ({signal.Signals(-status).name})"
        return f"the pager's process has died (status {status})"

    def close(self) -> None:
        self.end()
        self._calls.close()
        trio.lowlevel.notify_closing(self.events)
        self.events.close()


class _Events:
    """An endless asynchronous iterator over the events of all incarnations; see `EventStream`."""

    def __init__(self, pager: ProcessPager) -> None:
        self._pager = pager

    def __aiter__(self) -> _Events:
        return self

    async def __anext__(self) -> Event:
        await trio.lowlevel.checkpoint()
        while True:
            event = self._pager.take_event()
            if event is not None:
                return event
            await self._pager.wait_event()


class ProcessPager:
    """See the head of this file, and `Pager`."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._shards: list[_Shard] = []
        self._armed: list[tuple[int, int, int, int]] = []
        self._threads: dict[int, int] = {}
        self._told: deque[Event] = deque()
        self._before = _no_statistics()  # of those that died
        self._now = _no_statistics()  # of this one, when it was last asked
        self._latency_before = {stage: Histogram() for stage in Stage}
        self._latency_now = {stage: Histogram() for stage in Stage}
        self._blocktime_before: list[int] = []
        self._blocktime_now: list[int] = []
        self._ending = trio.Lock()
        self._closed = False
        self._disarmed = False
        self._deaths_in_a_row = 0
        self._known_at_death = 0
        self.deaths = 0
        self._process = _Process()

    # ---- setting it up: as `Pager`, and remembered

    def add_block(self, memory: Memory) -> int:
        self._alive()
        memory.acquire("pager")
        try:
            states_fd = check(lib.pc_states_new(memory.pages), "making page states")
            try:
                index = self._give_block(_Block(memory, states_fd))
            except BaseException:
                os.close(states_fd)
                raise
        except BaseException:
            memory.release("pager")
            raise
        self._blocks.append(_Block(memory, states_fd))
        return index

    def set_zero(self, block: int, zero: Bitmap) -> None:
        if len(zero) != self._block(block).memory.pages:
            raise ValueError(f"a map of {len(zero)} pages for a block of {self._block(block).memory.pages}")
        words = bytes(zero)
        with open(os.memfd_create("postcopy-zero", os.MFD_CLOEXEC), "w+b") as file:
            file.write(words)
            file.flush()
            self._call("marking zero pages", "set_zero", block, len(words) // 8, fds=(file.fileno(),))

    def add_shard(self, how: How | str = How.ANY, busy_poll_us: int = 0) -> int:
        self._alive()
        api = probe(parse_how(how))
        features = int(lib.pc_pager_features(int(api.features)))
        shard = _Shard(open_userfaultfd(api.how, features).detach(), features, busy_poll_us)
        try:
            index = self._give_shard(shard)
        except BaseException:
            os.close(shard.uffd)
            raise
        self._shards.append(shard)
        return index

    def arm(self, shard: int, block: int, first_page: int, pages: int) -> None:
        self._call("registering memory with a userfaultfd", "arm", shard, block, first_page, pages)
        self._armed.append((shard, block, first_page, pages))

    def attach_urgent(self, shard: int, fd: int) -> None:
        self._attach("attach_urgent", shard, fd)

    def attach_bulk(self, channel: int, fd: int) -> None:
        self._attach("attach_bulk", channel, fd)

    def track_thread(self, slot: int, tid: int) -> None:
        self._call("tracking a thread", "track_thread", slot, tid)
        self._threads[slot] = tid

    # ---- while it runs

    def request_missing(self, limit: int) -> int:
        return self._call("requesting missing pages", "request_missing", limit)

    def request_range(self, block: int, first_page: int, pages: int) -> int:
        if first_page < 0 or pages < 0 or first_page + pages > self._block(block).memory.pages:
            raise IndexError(f"RAM block {block} has no pages {first_page} to {first_page + pages}")
        return self._call("requesting pages", "request_range", block, first_page, pages)

    def statistics(self) -> PagerStatistics:
        """As `Pager.statistics`, over all processes there were; the last known ones while there is none."""
        value = self._ask("statistics")
        if value is not None:
            self._now = PagerStatistics(**value)
        return _added(self._before, self._now)

    def latency(self, stage: Stage = Stage.TOTAL) -> Histogram:
        value = self._ask("latency", int(stage))
        if value is not None:
            histogram = Histogram()
            ffi.memmove(histogram.struct, value, ffi.sizeof("struct pc_histogram"))
            self._latency_now[stage] = histogram
        total = Histogram()
        total.merge(self._latency_before[stage])
        total.merge(self._latency_now[stage])
        return total

    def blocktime_ns(self) -> list[int]:
        slots = max(self._threads, default=-1) + 1
        value = self._ask("blocktime", slots)
        if value is not None:
            self._blocktime_now = list(value)
        return _sums(self._blocktime_before, self._blocktime_now)

    def received(self, block: int) -> Bitmap:
        """A copy of the map of pages that are there; also while no process is."""
        entry = self._block(block)
        bitmap = Bitmap(entry.memory.pages)
        check(lib.pc_states_known(entry.states_fd, len(bitmap), bitmap.words), "reading the received map")
        return bitmap

    def events(self) -> _Events:
        """As `Pager.events`, and `EventType.DIED`."""
        self._alive()
        return _Events(self)

    def drain_events(self) -> list[Event]:
        return list(iter(self.take_event, None))

    def take_event(self) -> Event | None:
        """The next event, or None. Never blocks."""
        self._alive()
        return self._told.popleft() if self._told else self._hear()

    def _hear(self) -> Event | None:
        """What the process has to say, or that it can say nothing any more."""
        if self._process.dead:
            return None
        try:
            message = self._process.events.recv(MESSAGE_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            message = b""
        if message:
            kind, channel_kind, channel, error, text = msgpack.unpackb(message)
            return Event(EventType(kind), ChannelKind(channel_kind), channel, error, c_text(ffi.new("char[]", text)))
        self._process.end()
        return Event(EventType.DIED, text=self._process.epitaph())

    async def wait_event(self) -> None:
        """Until `take_event` may have something. `trio.ClosedResourceError` when closed meanwhile."""
        process = self._process
        if process.dead:  # and DIED was told, or nobody had to be told: until the next one is there
            await trio.sleep(0.01)
            return
        try:
            await trio.lowlevel.wait_readable(process.events)
        except trio.ClosedResourceError:
            self._alive()  # or replaced meanwhile

    async def watch_over(self) -> None:
        """Starts the next process whenever one dies, for a time in which nobody follows `events`. Never returns by
        itself; raises when no process stays alive."""
        while True:
            event = self._hear()
            if event is not None and event.type is not EventType.DIED:
                self._told.append(event)  # for who follows events, when it does again
            elif self._process.dead:
                async with self._ending:
                    if self._process.dead:
                        log.error("%s; another one takes over", self._process.epitaph())
                        self._replace()
            else:
                await self.wait_event()

    # ---- the end

    async def disconnect(self) -> None:
        """As `Pager.disconnect`; a process that has died is replaced by the next one."""
        async with self._ending:
            self._alive()
            try:
                await self._call_to_end("closing the pager's channels", "disconnect")
            except PagerDied as error:
                log.error("%s; another one takes over", error)
                self._replace()

    async def disarm(self) -> None:
        async with self._ending:
            self._alive()
            await self._call_reviving("unregistering memory", "disarm")
            self._disarmed = True

    async def close(self) -> None:
        """As `Pager.close`. Where missing pages cannot be poisoned the userfaultfds stay open, and `BusyError` says
        so."""
        with trio.CancelScope(shield=True):
            async with self._ending:
                if self._closed:
                    return
                self._deaths_in_a_row = 0  # whatever there was: for this it is worth trying again
                try:
                    if self._disarmed or not self._armed:
                        with contextlib.suppress(PagerDied):
                            await self._call_to_end("ending the pager", "free")
                    else:
                        await self._call_reviving("ending the pager", "free")
                except MigrationError as error:
                    raise BusyError(f"{error}; missing pages stay missing, their userfaultfds open") from error
                finally:
                    self._closed = True
                    self._process.close()
                for shard in self._shards:
                    os.close(shard.uffd)
                for block in self._blocks:
                    os.close(block.states_fd)
                    block.memory.release("pager")
                self._blocks.clear()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def __aenter__(self) -> ProcessPager:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ---- private

    @property
    def pid(self) -> int:
        """Of the engine's process, as it is now."""
        return self._process.pid

    @property
    def process(self) -> tuple[int, int]:
        """The engine's process as it is now, and how many have died before it."""
        return self.pid, self.deaths

    def _alive(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this pager was closed")

    def _block(self, block: int) -> _Block:
        if not 0 <= block < len(self._blocks):
            raise IndexError(f"there is no RAM block {block}")
        return self._blocks[block]

    def _call(self, what: str, name: str, *arguments: Any, fds: tuple[int, ...] = ()) -> int:
        self._alive()
        result, text, _ = self._process.call(name, *arguments, fds=fds)
        return check(result, what, text)

    def _ask(self, name: str, *arguments: Any) -> Any:
        """A value, or None when nobody can tell it now: the process is dead, or ending."""
        if self._closed or self._process.dead or self._process.lock.locked():
            return None
        try:
            return self._process.call(name, *arguments)[2]
        except PagerDied as error:
            self._told.append(Event(EventType.DIED, text=str(error)))
            return None

    def _attach(self, name: str, index: int, fd: int) -> None:
        try:
            self._call(name.replace("_", "ing ") + f" channel {index}", name, index, fds=(fd,))
        finally:
            os.close(fd)

    async def _call_to_end(self, what: str, name: str) -> None:
        process = self._process
        answers: list[Any] = []

        def call() -> int:
            try:
                answers.append(process.call(name, timeout_s=END_TIMEOUT_S))
            except PagerDied as error:
                answers.append(error)
            return 0

        await run_to_end(call, what, END_TIMEOUT_S + 5)
        if isinstance(answers[0], PagerDied):
            raise answers[0]
        check(answers[0][0], what, answers[0][1])

    async def _call_reviving(self, what: str, name: str) -> None:
        for _ in range(DEATHS_IN_A_ROW):
            try:
                await self._call_to_end(what, name)
            except PagerDied:
                self._replace()
            else:
                return
        raise PagerDied(f"{what}: no process of the pager stays alive")

    def _give_block(self, block: _Block) -> int:
        memory = block.memory
        fds = (block.states_fd, memory.fd) if memory.fd >= 0 else (block.states_fd,)
        where = (memory.address, memory.size_bytes, memory.page_bytes, int(memory.struct.kind))
        return self._call("giving memory to the pager", "add_block", *where, fds=fds)

    def _give_shard(self, shard: _Shard) -> int:
        what = "giving a userfaultfd to the pager"
        return self._call(what, "adopt_shard", shard.features, shard.busy_poll_us, fds=(shard.uffd,))

    def _replace(self) -> None:
        """The dead process's successor. What waits for a page has waited meanwhile, and faults anew."""
        while True:
            known = self._settle()
            try:
                self._process = _Process()
                self._set_up_again()
            except PagerDied:
                continue  # counted when it is settled
            break
        self._told.clear()
        if self._blocks and known == sum(block.memory.pages for block in self._blocks):
            self._told.append(Event(EventType.COMPLETE, text="every page is here"))

    def _settle(self) -> int:
        """Ends a process for good, and with it every page that it had under way. How many pages are there."""
        process = self._process
        process.end()
        self.deaths += 1
        for block in self._blocks:
            # An error here is the end: without knowing what was placed nothing may be placed.
            check(int(lib.pc_states_settle(block.states_fd, block.memory.struct)), "settling what a dead pager left")
        known = sum(self.received(number).count() for number in range(len(self._blocks)))
        self._deaths_in_a_row = self._deaths_in_a_row + 1 if known == self._known_at_death else 1
        self._known_at_death = known
        if self._deaths_in_a_row > DEATHS_IN_A_ROW:
            raise MigrationError(
                f"{process.epitaph()}, as did those before it; the machine waits where it needs a page"
            )
        self._bury()
        process.close()
        return known

    def _set_up_again(self) -> None:
        for block in self._blocks:
            self._give_block(block)
        for shard in self._shards:
            self._give_shard(shard)
        for slot, tid in self._threads.items():
            self._call("tracking a thread", "track_thread", slot, tid)
        if not self._disarmed:
            for armed in self._armed:
                self._call("registering memory with a userfaultfd", "arm", *armed)

    def _bury(self) -> None:
        """Adds the dead one's counters, as far as they were read, to those of all before it."""
        self._before = _added(self._before, self._now)
        self._now = _no_statistics()
        for stage in Stage:
            self._latency_before[stage].merge(self._latency_now[stage])
            self._latency_now[stage] = Histogram()
        self._blocktime_before = _sums(self._blocktime_before, self._blocktime_now)
        self._blocktime_now = []


_STATES = {"total_pages", "total_bytes", "resident_pages", "resident_bytes", "pending_faults", "oldest_pending_ns"}
"""What is not counted but is so: it is that of the process there is."""


def _no_statistics() -> PagerStatistics:
    return PagerStatistics(**{field.name: 0 for field in fields(PagerStatistics)})


def _added(before: PagerStatistics, now: PagerStatistics) -> PagerStatistics:
    counted = [field.name for field in fields(PagerStatistics) if field.name not in _STATES]
    return replace(now, **{name: getattr(before, name) + getattr(now, name) for name in counted})


def _sums(one: list[int], other: list[int]) -> list[int]:
    length = max(len(one), len(other))
    padded = [values + [0] * (length - len(values)) for values in (one, other)]
    return [sum(pair) for pair in zip(*padded, strict=True)]
