# SPDX-License-Identifier: Apache-2.0
"""What pagers and page servers have in common: memory that they keep alive, events, an end.

Resource handling: a `Memory` given to `add_block` is in use until `close()` has ended every thread that may touch it.
What is given to `attach_*`, a descriptor and the TLS of its connection (`postcopy.tls.DataChannel.detach`), belongs to
the core from the call on, also when it fails.

Threads and cancellation: to be used from the Trio thread only. Plain methods take microseconds and do not block.
Asynchronous ones run the core's blocking call in a worker thread and see it through, shielded from cancellation but
bounded in time (`_blocking.END_TIMEOUT_S`): nothing is ever left half closed. When even that time passes,
`MigrationError` is raised, and everything that the stuck thread may touch is kept for the rest of the process's life.
"""

from __future__ import annotations

import abc
import errno
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import trio

from postcopy._blocking import no_thread, run_to_end
from postcopy._fd import FdHolder
from postcopy._native import ffi, lib
from postcopy.dataplane._events import ChannelKind, Event, EventStream, EventType
from postcopy.errors import CoreError, ErrorLine, MigrationError, c_text, check
from postcopy.memory import Memory
from postcopy.memory.bitmap import Bitmap
from postcopy.tls import DataChannel

if TYPE_CHECKING:
    from postcopy.dataplane.histogram import Histogram
    from postcopy.dataplane.recorder import Recorder
SHOWN_BINS = 64
"""Of the picture of the memory that is shown while it moves."""


@dataclass(frozen=True)
class ForeignMemory:
    """Memory of another process: where it is there (0: where `Pager.arm_at` says), and the memfd it is made of (-1:
    anonymous), which stays the caller's."""

    address: int
    size_bytes: int
    page_bytes: int
    kind: int  # enum pc_memory_kind
    fd: int = -1

    @property
    def pages(self) -> int:
        return self.size_bytes // self.page_bytes

    @property
    def struct(self) -> Any:
        """A `struct pc_memory`, through which nothing may be touched here."""
        base = ffi.cast("void *", self.address)
        return ffi.new("struct pc_memory *", [base, self.size_bytes, self.page_bytes, self.kind, self.fd])


@dataclass(frozen=True)
class BlockInUse:
    """One block of memory, in use for as long as it is here."""

    memory: Memory | ForeignMemory
    pages: int  # of transfer
    states_fd: int = -1  # page states that outlive the pager, where it has them


class DataPlane(abc.ABC):
    """An asynchronous context manager: leaving it closes it."""

    NAME: ClassVar[str]

    _closed = True  # until it has been made

    def __init__(self) -> None:
        self._blocks: list[BlockInUse] = []
        self._ending = trio.Lock()
        self._recorder: Recorder | None = None
        self._closed = False

    # ---- events

    def events(self) -> EventStream:
        """What happens, as it happens: ``async for event in pager.events()``. One task at a time; see `EventStream`."""
        self._check_open()
        return EventStream(self.take_event, self.wait_event)

    def drain_events(self) -> list[Event]:
        """What `events()` has not reported yet, as after `disconnect`: the end of a channel must not be taken for that
        of the next one. Never blocks."""
        return list(iter(self.take_event, None))

    @abc.abstractmethod
    def take_event(self) -> Event | None:
        """The next event, or None. Never blocks."""

    @abc.abstractmethod
    async def wait_event(self) -> None:
        """Until `take_event` may have something. `trio.ClosedResourceError` when closed meanwhile."""

    # ---- looking at it

    def bins(self, count: int = SHOWN_BINS) -> bytes:
        """Which parts of the memory are there (of a page server: sent): as many of equal size as it has pages, at most
        `count`, in the order of the blocks; each from 0 (nothing) to 63 (all of it). Takes microseconds."""
        self._check_open()
        found = ffi.new("uint8_t[]", count)
        filled = self._fill_bins(found, count)
        return bytes(ffi.buffer(found)[0:filled])

    def _fill_bins(self, bins: Any, count: int) -> int:
        return 0  # not known

    def be_recorded(self, recorder: Recorder) -> None:
        """From here on, until `close`, which stops the recorder."""
        self._check_open()
        self._recorder = recorder
        self._give_to(recorder)

    def _give_to(self, recorder: Recorder) -> None:  # noqa: B027 -- one that the core does not have is not recorded
        """What is to be looked at."""

    def stages(self) -> list[Histogram]:
        """Latencies of demand faults by `Stage`, where there are any."""
        return []

    # ---- the end

    @abc.abstractmethod
    async def disconnect(self) -> None:
        """Closes every data channel and waits for their threads; new ones may be attached afterwards. Memory stays
        armed, and faults stay blocked."""

    async def close(self) -> None:
        """Ends all threads, closes the channels and releases the memory. Twice does no harm."""
        with trio.CancelScope(shield=True):  # bounded: all that runs under the lock is
            async with self._ending:
                if self._closed:
                    return
                if self._recorder is not None:
                    self._recorder.stop()
                try:
                    await self._end()
                finally:
                    self._closed = True
                for block in self._blocks:
                    self._release(block)
                self._blocks.clear()
        await trio.lowlevel.checkpoint_if_cancelled()

    @abc.abstractmethod
    async def _end(self) -> None:
        """When it raises, the memory stays in use."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __del__(self) -> None:
        if not self._closed:
            # Its threads run on, and its memory stays mapped: never free what may still be written to.
            warnings.warn(f"a {self.NAME} was never closed", ResourceWarning, stacklevel=2, source=self)

    # ---- for those that are one

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError(f"this {self.NAME} was closed")

    def _add_block(
        self, memory: Memory | ForeignMemory, pages: int, give: Callable[[], object], states_fd: int = -1
    ) -> int:
        """Gives the next block to the engine; its index. The memory is in use from here until `close`."""
        self._check_open()
        block = BlockInUse(memory, pages, states_fd)
        if isinstance(memory, Memory):
            memory.acquire(self.NAME)
        try:
            give()
        except BaseException:
            self._release(block)
            raise
        self._blocks.append(block)
        return len(self._blocks) - 1

    def _release(self, block: BlockInUse) -> None:
        if isinstance(block.memory, Memory):
            block.memory.release(self.NAME)

    def _block(self, block: int) -> BlockInUse:
        self._check_open()
        if not 0 <= block < len(self._blocks):
            raise IndexError(f"there is no RAM block {block}")
        return self._blocks[block]

    def _check_range(self, block: int, first_page: int, pages: int) -> None:
        if first_page < 0 or pages < 0 or first_page + pages > self._block(block).pages:
            raise IndexError(f"RAM block {block} has no pages {first_page} to {first_page + pages}")

    def _check_length(self, block: int, bitmap: Bitmap) -> None:
        if len(bitmap) != self._block(block).pages:  # the core would read past its end
            raise ValueError(f"a map of {len(bitmap)} pages for a block of {self._block(block).pages}")


class CoreDataPlane(DataPlane):
    """One that is a struct of the core, with its threads in this process."""

    PREFIX: ClassVar[str]  # of the struct's name and its functions'

    _end_by = "free"

    def __init__(self, *arguments: int) -> None:
        pointer: Any = ffi.new(f"struct {self.PREFIX} **")
        what = f"making a {self.NAME}"
        check(self._function("new")(*arguments, pointer), what)
        try:
            self._event_fd = FdHolder.duplicate(self._function("event_fd")(pointer[0]))
        except OSError as error:
            self._function("free")(pointer[0])
            raise CoreError(error.errno or 0, what) from error
        self._struct: Any = pointer[0]
        self._event: Any = ffi.new("struct pc_event *")
        self._stuck = False
        super().__init__()

    def take_event(self) -> Event | None:
        self._check_open()
        event = self._event
        if self._function("next_event")(self._struct, event) != 1:
            return None
        kind = ChannelKind(event.channel_kind)
        return Event(EventType(event.type), kind, int(event.channel), int(event.error), c_text(event.text))

    async def wait_event(self) -> None:
        await self._event_fd.wait_readable()

    async def disconnect(self) -> None:
        await self._see_through("disconnect", f"closing the {self.NAME}'s channels")

    async def _end(self) -> None:
        self._closed = True  # before another thread frees what the other methods use
        self._event_fd.close()
        await self._run(self._end_by, f"ending the {self.NAME}")

    # ---- calling the core

    def _fill_bins(self, bins: Any, count: int) -> int:
        return int(self._function("bins")(self._struct, bins, count))

    def _give_to(self, recorder: Recorder) -> None:
        recorder.take(self.PREFIX.removeprefix("pc_"), self._struct)

    def _function(self, name: str) -> Any:
        return getattr(lib, f"{self.PREFIX}_{name}")

    def _call(self, what: str, name: str, *arguments: Any) -> int:
        """Calls a function of the core, and raises what went wrong; `what` was being done."""
        self._check_open()
        return check(self._function(name)(self._struct, *arguments), what)

    def _call_explained(self, what: str, name: str, *arguments: Any) -> int:
        """The same for a function that writes a line about what went wrong."""
        self._check_open()
        line = ErrorLine()
        return line.check(self._function(name)(self._struct, *arguments, line.buffer, line.size), what)

    def _attach(self, kind: str, index: int, fd: int, tls: Any, *more: int) -> None:
        what = f"{kind} channel {index}"
        if self._closed or index < 0:
            DataChannel(FdHolder(fd), tls).close()  # ours from the call on, also when it cannot reach the core
            self._check_open()
            raise ValueError(f"there is no {what}")
        result = self._function(f"attach_{kind}")(self._struct, index, fd, ffi.NULL if tls is None else tls, *more)
        if result == -errno.EAGAIN:
            raise no_thread(f"{what} of the {self.NAME}")
        check(result, f"attaching {what}")

    async def _see_through(self, name: str, what: str) -> None:
        """A blocking call, one at a time."""
        async with self._ending:
            self._check_open()
            await self._run(name, what)

    async def _run(self, name: str, what: str) -> None:
        if self._stuck:
            raise MigrationError(f"a thread of the {self.NAME} hangs; its memory is kept")
        function, struct = self._function(name), self._struct
        try:
            result = await run_to_end(lambda: function(struct), what)
        except MigrationError:
            self._stuck = True
            raise
        check(result or 0, what)  # (a function that returns nothing cannot fail)
