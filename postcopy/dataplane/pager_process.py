# SPDX-License-Identifier: Apache-2.0
"""A pager in a process of its own: when it dies, the machine waits, and another one goes on.

The same methods as `pager.Pager`. What must not die with the engine stays here, in the machine's process: the
userfaultfds (the kernel fills memory with zeros when the last descriptor of one is closed), the memory, the page
states (`csrc/memory/states.c`), the counters (`csrc/core/metrics.c`), and the list of what was set up. The engine's process gets
copies of the descriptors; a crash of one of its threads, SIGKILL, or a call that is not answered within
`CALL_TIMEOUT_S` ends it, and nothing else:

- `events()` tells `EventType.DIED`; the data connections died with it, so for a migration it is a lost connection;
- `disconnect()`, or `watch_over()`, waits for the rest of the process to leave the kernel, settles the pages that
  were under way, starts the next one, gives it everything, and wakes all who wait: their faults are reported again.

What one costs: a Python process of some 12 MB, and 30 ms to start it; nothing on the path of a fault.

Threads and cancellation: as for `Pager`. No method waits for the other process unless it is asynchronous, so that a
process which does not answer is in nobody's way but its own migration's. A plain method sends what is to be done, and
returns; `confirm()` waits until all of it has been done, and raises what went wrong in setting up; where nobody
confirms, `events()` tells it as `EventType.FATAL`, and a channel that could not be attached as one that went down.
Statistics are read from memory that both processes share. The asynchronous methods are seen through, shielded from
cancellation but bounded in time.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import msgpack
import trio

from postcopy._blocking import END_TIMEOUT_S
from postcopy._error_line import c_text
from postcopy._native import ffi, lib
from postcopy.dataplane._events import ChannelKind, Event, EventType
from postcopy.dataplane._pager_child import MESSAGE_BYTES
from postcopy.dataplane.histogram import Histogram
from postcopy.dataplane.pager import PagerStatistics, Stage
from postcopy.errors import BusyError, CoreError, MigrationError, PostcopyError, check
from postcopy.memory import Memory
from postcopy.memory.bitmap import Bitmap
from postcopy.uffd import How, open_userfaultfd, parse_how, probe

__all__ = ["CALL_TIMEOUT_S", "PagerDied", "ProcessPager"]

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 3.0
"""An engine that does not answer for so long is killed. It works by messages that take microseconds."""
START_TIMEOUT_S = 15.0
"""The same for the first answer, before which an interpreter starts, perhaps on a busy host."""
PING_PERIOD_S = 1.0
"""One that has nothing to answer is asked whether it still does, so often, while somebody follows its events."""
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


_SET_UP = ("add_block", "set_zero", "adopt_shard", "arm")
"""Calls without which nothing may go on."""


class _Call:
    """Something the process is to do, and its answer once there is one."""

    def __init__(self, what: str, name: str, arguments: tuple[Any, ...], fds: tuple[int, ...]) -> None:
        self.what = what
        self.name = name
        self.message = msgpack.packb([name, arguments])
        self.fds = tuple(os.dup(fd) for fd in fds)  # this call's own until it is sent
        self.timeout_s = CALL_TIMEOUT_S
        self.awaited = False  # somebody takes the error
        self.channel: tuple[ChannelKind, int] | None = None  # it attaches
        self.done = False
        self.error: PostcopyError | None = None

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = ()


class _Readable:
    """A descriptor that several tasks wait for. Trio lets one do so, and a copy for each might be refused in the middle
    of a migration, when there are no more descriptors."""

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
    """One incarnation: the process and the socket to it. Nothing here waits but what is asynchronous."""

    def __init__(self, metrics_fd: int) -> None:
        link, its_link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_link:
            fds = (its_link.fileno(), metrics_fd)
            # -P: never import from where this process happens to be.
            command = [sys.executable, "-P", "-m", "postcopy.dataplane._pager_child", *map(str, fds)]
            try:
                self._process = subprocess.Popen(
                    command, pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True
                )
                self._pidfd = os.pidfd_open(self._process.pid)
            except OSError as error:
                link.close()
                raise MigrationError(f"cannot start a process for the pager: {error.strerror}") from error
        link.setblocking(False)
        self._link = link
        self._said = _Readable(link.fileno())
        self._exited = _Readable(self._pidfd)
        self._unsent: deque[_Call] = deque()
        self._unanswered: deque[_Call] = deque()
        self._since = time.monotonic()  # when the oldest of these became so
        self._answers = 0
        self._killed_for = ""
        self._closed = False
        self.events: deque[Event] = deque()
        self.failure: PostcopyError | None = None  # of the first call that failed and was nobody's
        self.dead = False  # it does nothing more; its threads may still be in the kernel
        self.told = False

    @property
    def pid(self) -> int:
        return self._process.pid

    # ---- calls

    def post(self, call: _Call) -> _Call:
        """Sends a call, now or as soon as the process takes it. `PagerDied` when it is known to be dead."""
        if self.dead:
            call.close()
            raise PagerDied(self.epitaph())
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
        while not self.dead and self._send_one():
            pass
        while not self.dead and self._receive_one():
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
        what, *rest = msgpack.unpackb(message)
        if what:
            kind, channel_kind, channel, error, text = rest
            line = c_text(ffi.new("char[]", text))
            self.events.append(Event(EventType(kind), ChannelKind(channel_kind), channel, error, line))
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
        """A call failed whose error nobody takes."""
        if call.channel is not None:  # no more than a channel that goes down at once
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
        # (Real time counts, not that of Trio's clock: it is another process that is waited for.)
        with trio.move_on_after(PING_PERIOD_S if self.idle else max(0.0, self._remaining_s())) as scope:
            await self._said.wait()
        self.pump()
        if scope.cancelled_caught and self.idle and not self.dead:
            self.post(_Call("asking the pager's process whether it lives", "ping", (), ()))

    async def finish(self, call: _Call) -> None:
        """Until a posted call has been done; raises its error, or `PagerDied`."""
        while not call.done and not self.dead:
            await self.wait_message()
        if not call.done:
            await self.gone()
            raise PagerDied(self.epitaph())
        if call.error is not None:
            raise call.error

    # ---- its end

    def kill(self, why: str = "") -> None:
        """From now on it is dead; it may take until `gone` for its threads to have left the kernel. Never waits."""
        if not self.dead:
            self._killed_for = why
            self.dead = True
            for call in (*self._unsent, *self._unanswered):
                call.close()
            self._unsent.clear()
            self._unanswered.clear()
        self._process.kill()  # nothing happens to one that has been waited for

    @property
    def ended(self) -> bool:
        """Whether nothing of it is left. Never waits."""
        return self._process.poll() is not None

    async def gone(self, timeout_s: float = END_TIMEOUT_S) -> bool:
        """Waits until a killed process has ended: from then on nothing of it places a page. False when it has not in
        time."""
        ready = select.poll()
        ready.register(self._pidfd, select.POLLIN)
        deadline = time.monotonic() + timeout_s
        while not self.ended and time.monotonic() < deadline:
            if ready.poll(0):
                continue
            with trio.move_on_after(deadline - time.monotonic()):
                await self._exited.wait()
        return self.ended

    def epitaph(self) -> str:
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
        """Of one that was killed."""
        if not self._closed:
            self._closed = True
            self._said.close()
            self._link.close()
            self._exited.close()
            os.close(self._pidfd)


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
        self._slots = 0
        self._told: deque[Event] = deque()
        self._ending = trio.Lock()
        self._replaced = trio.Event()
        self._closed = False
        self._disarmed = False
        self._deaths_in_a_row = 0
        self._known_at_death = 0
        self.deaths = 0
        pointer: Any = ffi.new("struct pc_metrics **")
        check(lib.pc_metrics_new(pointer), "making a pager's counters")
        self._metrics: Any = pointer[0]
        try:
            self._process = self._start()
        except BaseException:
            lib.pc_metrics_free(self._metrics)
            raise

    # ---- setting it up: as `Pager`, and remembered

    def add_block(self, memory: Memory) -> int:
        self._alive()
        memory.acquire("pager")
        try:
            block = _Block(memory, check(lib.pc_states_new(memory.pages), "making page states"))
            try:
                self._give_block(block)
            except BaseException:
                os.close(block.states_fd)
                raise
        except BaseException:
            memory.release("pager")
            raise
        self._blocks.append(block)
        return len(self._blocks) - 1

    def set_zero(self, block: int, zero: Bitmap) -> None:
        if len(zero) != self._block(block).memory.pages:
            raise ValueError(f"a map of {len(zero)} pages for a block of {self._block(block).memory.pages}")
        words = bytes(zero)
        with open(os.memfd_create("postcopy-zero", os.MFD_CLOEXEC), "w+b") as file:
            file.write(words)
            file.flush()
            self._post("marking zero pages", "set_zero", block, len(words) // 8, fds=(file.fileno(),))

    def add_shard(self, how: How | str = How.ANY, busy_poll_us: int = 0) -> int:
        self._alive()
        api = probe(parse_how(how))
        features = int(lib.pc_pager_features(int(api.features)))
        shard = _Shard(open_userfaultfd(api.how, features).detach(), features, busy_poll_us)
        try:
            self._give_shard(shard)
        except BaseException:
            os.close(shard.uffd)
            raise
        self._shards.append(shard)
        return len(self._shards) - 1

    def arm(self, shard: int, block: int, first_page: int, pages: int) -> None:
        self._post("registering memory with a userfaultfd", "arm", shard, block, first_page, pages)
        self._armed.append((shard, block, first_page, pages))

    def attach_urgent(self, shard: int, fd: int) -> None:
        self._attach("attach_urgent", ChannelKind.URGENT, shard, fd)

    def attach_bulk(self, channel: int, fd: int) -> None:
        self._attach("attach_bulk", ChannelKind.BULK, channel, fd)

    def track_thread(self, slot: int, tid: int) -> None:
        self._alive()
        check(lib.pc_metrics_track_thread(self._metrics, slot, tid), "tracking a thread")
        self._slots = max(self._slots, slot + 1)

    async def confirm(self) -> None:
        """As `Pager.confirm`: everything asked of the process so far has been done. `PagerDied` when it has died."""
        self._alive()
        process = self._process
        while not process.idle and not process.dead:
            await process.wait_message()
        if process.dead:
            await process.gone()
            raise PagerDied(process.epitaph())
        if process.failure is not None:
            raise process.failure
        await trio.lowlevel.checkpoint()

    # ---- while it runs

    def request_missing(self, limit: int) -> int:
        self._alive()
        if self._process.dead or not self._process.is_asked(
            "request_missing"
        ):  # else it has not caught up with the last one
            self._post("requesting missing pages", "request_missing", limit)
        return min(limit, sum(block.memory.pages for block in self._blocks) - self._known())

    def request_range(self, block: int, first_page: int, pages: int) -> int:
        if first_page < 0 or pages < 0 or first_page + pages > self._block(block).memory.pages:
            raise IndexError(f"RAM block {block} has no pages {first_page} to {first_page + pages}")
        self._post("requesting pages", "request_range", block, first_page, pages)
        return pages - self.received(block).part(first_page, pages).count()

    def statistics(self) -> PagerStatistics:
        """As `Pager.statistics`, over all processes there were."""
        self._alive()
        counts: Any = ffi.new("struct pc_pager_stats *")
        check(lib.pc_metrics_stats(self._metrics, counts), "reading the pager's counters")
        values = {name: int(getattr(counts, name)) for name in PagerStatistics.__dataclass_fields__}
        for block in self._blocks:
            known = self._known_of(block)
            values["total_pages"] += block.memory.pages
            values["total_bytes"] += block.memory.size_bytes
            values["resident_pages"] += known
            values["resident_bytes"] += known * block.memory.page_bytes
        return PagerStatistics(**values)

    def latency(self, stage: Stage = Stage.TOTAL) -> Histogram:
        self._alive()
        histogram = Histogram()
        check(lib.pc_metrics_latency(self._metrics, stage, histogram.struct), "reading the pager's latencies")
        return histogram

    def blocktime_ns(self) -> list[int]:
        self._alive()
        times: Any = ffi.new("uint64_t[]", max(1, self._slots))
        slots = check(lib.pc_metrics_blocktime(self._metrics, times, self._slots), "reading blocktimes")
        return [int(times[slot]) for slot in range(slots)]

    def received(self, block: int) -> Bitmap:
        """A copy of the map of pages that are there; also while no process is."""
        entry = self._block(block)
        bitmap = Bitmap(entry.memory.pages)
        check(lib.pc_states_received(entry.states_fd, len(bitmap), bitmap.words), "reading the received map")
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
        process = self._process
        process.pump()
        if process.events:
            return process.events.popleft()
        if not process.dead or process.told or not process.ended:
            return None
        process.told = True
        return Event(EventType.DIED, text=process.epitaph())

    async def wait_event(self) -> None:
        """Until `take_event` may have something. `trio.ClosedResourceError` when closed meanwhile."""
        process = self._process
        if not process.dead:
            await process.wait_message()
        elif process.told:  # until the next one is there, or there is none any more
            await self._replaced.wait()
        elif not await process.gone():
            process.told = True
            self._told.append(Event(EventType.DIED, text=process.epitaph()))
        self._alive()

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
                        await self._replace()
            else:
                await self.wait_event()

    # ---- the end

    async def disconnect(self) -> None:
        """As `Pager.disconnect`; a process that has died is replaced by the next one."""
        with trio.CancelScope(shield=True):
            async with self._ending:
                self._alive()
                try:
                    await self._do("closing the pager's channels", "disconnect")
                except PagerDied:
                    await self._replace()

    async def disarm(self) -> None:
        with trio.CancelScope(shield=True):
            async with self._ending:
                self._alive()
                await self._do_reviving("unregistering memory", "disarm")
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
                            await self._do("ending the pager", "free")
                    else:
                        # First, since less time passes until it is known not to answer to this.
                        await self._do_reviving("asking the pager's process whether it lives", "ping")
                        await self._do_reviving("ending the pager", "free")
                except (MigrationError, CoreError) as error:
                    raise BusyError(f"{error}; missing pages stay missing, their userfaultfds open") from error
                finally:
                    self._closed = True
                    self._replaced.set()
                    self._process.kill()
                    if not await self._process.gone():
                        log.error("%s; its memory is kept", self._process.epitaph())
                    self._process.close()
                for shard in self._shards:
                    os.close(shard.uffd)
                for block in self._blocks:
                    os.close(block.states_fd)
                    block.memory.release("pager")
                self._blocks.clear()
                lib.pc_metrics_free(self._metrics)
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

    def _start(self) -> _Process:
        return _Process(lib.pc_metrics_fd(self._metrics))

    def _block(self, block: int) -> _Block:
        if not 0 <= block < len(self._blocks):
            raise IndexError(f"there is no RAM block {block}")
        return self._blocks[block]

    def _known_of(self, block: _Block) -> int:
        return check(int(lib.pc_states_count(block.states_fd, block.memory.pages)), "counting what is here")

    def _known(self) -> int:
        return sum(map(self._known_of, self._blocks))

    def _post(self, what: str, name: str, *arguments: Any, fds: tuple[int, ...] = ()) -> None:
        self._alive()
        self._process.post(_Call(what, name, arguments, fds))

    def _attach(self, name: str, kind: ChannelKind, index: int, fd: int) -> None:
        try:
            self._alive()
            call = _Call(f"attaching {kind.name.lower()} channel {index}", name, (index,), (fd,))
            call.channel = (kind, index)
            self._process.post(call)
        finally:
            os.close(fd)

    async def _do(self, what: str, name: str) -> None:
        call = _Call(what, name, (), ())
        if name == "free" and not self._disarmed:
            call.timeout_s = END_TIMEOUT_S  # it may poison every missing page, one by one
        call.awaited = True
        process = self._process
        await process.finish(process.post(call))

    async def _do_reviving(self, what: str, name: str) -> None:
        for _ in range(DEATHS_IN_A_ROW):
            try:
                await self._do(what, name)
            except PagerDied:
                await self._replace()
            else:
                return
        raise PagerDied(f"{what}: no process of the pager stays alive")

    def _give_block(self, block: _Block) -> None:
        memory = block.memory
        fds = (block.states_fd, memory.fd) if memory.fd >= 0 else (block.states_fd,)
        where = (memory.address, memory.size_bytes, memory.page_bytes, int(memory.struct.kind))
        self._post("giving memory to the pager", "add_block", *where, fds=fds)

    def _give_shard(self, shard: _Shard) -> None:
        what = "giving a userfaultfd to the pager"
        self._post(what, "adopt_shard", shard.features, shard.busy_poll_us, fds=(shard.uffd,))

    async def _replace(self) -> None:
        """The dead process's successor. What waits for a page has waited meanwhile, and faults anew."""
        while True:
            known = await self._settle()
            self._process = self._start()
            # Before anything is waited for: who cancels that leaves a pager of which everything has been told.
            self._told.clear()
            if self._blocks and known == sum(block.memory.pages for block in self._blocks):
                self._told.append(Event(EventType.COMPLETE, text="every page is here"))
            replaced, self._replaced = self._replaced, trio.Event()
            replaced.set()
            try:
                self._set_up_again()
                await self.confirm()
            except PagerDied:
                continue  # counted when it is settled
            break

    async def _settle(self) -> int:
        """Ends a process for good, and with it every page that it had under way. How many pages are there."""
        process = self._process
        process.kill()
        if not await process.gone():
            raise MigrationError(f"{process.epitaph()}: it may still place pages; the machine waits where it needs one")
        log.error("%s; another one takes over", process.epitaph())
        process.close()
        self.deaths += 1
        for number, block in enumerate(self._blocks):
            # An error here is the end: without knowing what was placed nothing may be placed.
            try:
                check(
                    int(lib.pc_states_settle(block.states_fd, block.memory.struct)), "settling what a dead pager left"
                )
            except CoreError as error:
                raise MigrationError(
                    f"RAM block {number}: cannot tell what the dead pager has placed ({error}); what is missing is not "
                    "fetched again, since that might undo what the machine has written"
                ) from error
        known = self._known()
        self._deaths_in_a_row = self._deaths_in_a_row + 1 if known == self._known_at_death else 1
        self._known_at_death = known
        if self._deaths_in_a_row > DEATHS_IN_A_ROW:
            raise MigrationError(
                f"{process.epitaph()}, as did those before it; the machine waits where it needs a page"
            )
        return known

    def _set_up_again(self) -> None:
        for block in self._blocks:
            self._give_block(block)
        for shard in self._shards:
            self._give_shard(shard)
        if not self._disarmed:
            for armed in self._armed:
                self._post("registering memory with a userfaultfd", "arm", *armed)
