# SPDX-License-Identifier: Apache-2.0
"""The same for programs that do not use Trio: ``with blocking.attach("host:7777") as memory: memory.read(0, 4096)``.

Each of the three functions starts a thread that runs Trio for as long as its ``with`` block lasts, and what is called
inside the block is done there while the calling thread waits, without the GIL. Everything that `postcopy.lazy` says
about errors, loss of the source and closing is true here as well.

The methods may be called from any thread, several at once. Not from a thread that runs Trio: there, use the originals.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import trio

from postcopy.dataplane.pager import PagerStatistics
from postcopy.errors import PostcopyError
from postcopy.lazy import _attach, _serve
from postcopy.lazy._memory import LazyBlock, LazyMemory
from postcopy.lazy._source import PageSource
from postcopy.lazy._tasks import background_tasks
from postcopy.net import Address

__all__ = ["BlockingMemory", "attach", "attach_source", "serve"]

T = TypeVar("T")


class _Host(Generic[T]):
    """A thread that runs Trio, with one asynchronous context open in it."""

    def __init__(self, open_it: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        self._open_it = open_it
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._entered: list[T] = []
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop: trio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="postcopy-lazy", daemon=True)

    def start(self) -> T:
        """What the context gave; or raises what it raised."""
        self._thread.start()
        self._ready.wait()
        if not self._entered:
            self._join()
        return self._entered[0]

    def call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Calls it in the thread and waits."""

        async def run() -> Any:
            result = function(*arguments, **keywords)
            return await result if isinstance(result, Awaitable) else result

        return trio.from_thread.run(run, trio_token=self._token)

    def end(self) -> None:
        """Leaves the context and waits for the thread; raises what came out of it."""
        assert self._stop is not None
        with contextlib.suppress(trio.RunFinishedError):
            trio.from_thread.run_sync(self._stop.set, trio_token=self._token)
        self._join()

    def _join(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # noqa: BLE001  # raised in the thread that waits
            self._error = error
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._stop = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        async with self._open_it() as entered:
            self._entered.append(entered)
            self._ready.set()
            await self._stop.wait()


class BlockingMemory:
    """A `LazyMemory` whose methods block; they do and raise the same."""

    def __init__(self, host: _Host[LazyMemory], memory: LazyMemory) -> None:
        self._host = host
        self._memory = memory

    def __repr__(self) -> str:
        return repr(self._memory).replace("LazyMemory", "BlockingMemory", 1)

    @property
    def blocks(self) -> tuple[LazyBlock, ...]:
        return self._memory.blocks

    @property
    def size_bytes(self) -> int:
        return self._memory.size_bytes

    @property
    def address(self) -> int:
        """For C code that releases the GIL; see `LazyMemory.address`."""
        return self._memory.address

    @property
    def complete(self) -> bool:
        return self._memory.complete

    @property
    def failure(self) -> PostcopyError | None:
        return self._memory.failure

    def statistics(self) -> PagerStatistics:
        try:
            statistics: PagerStatistics = self._host.call(self._memory.statistics)
        except trio.RunFinishedError:
            statistics = self._memory.statistics()  # the last ones
        return statistics

    def prefetch(self, offset: int = 0, size: int | None = None, *, block: int | str = 0) -> int:
        missing: int = self._call(self._memory.prefetch, offset, size, block=block)
        return missing

    def ensure(self, offset: int = 0, size: int | None = None, *, block: int | str = 0) -> None:
        self._call(self._memory.ensure, offset, size, block=block)

    @contextmanager
    def resident(
        self, offset: int = 0, size: int | None = None, *, block: int | str = 0, writable: bool = False
    ) -> Iterator[memoryview]:
        self.ensure(offset, size, block=block)
        view: memoryview = self._call(self._memory._view, offset, size, block, writable)
        try:
            yield view
        finally:
            with contextlib.suppress(BufferError):  # something still looks at it, and may go on
                view.release()

    def read(self, offset: int = 0, size: int | None = None, *, block: int | str = 0) -> bytes:
        with self.resident(offset, size, block=block) as view:
            return bytes(view)

    def _call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        try:
            return self._host.call(function, *arguments, **keywords)
        except trio.RunFinishedError:
            raise trio.ClosedResourceError("this memory was closed") from None


@contextmanager
def _blocking(open_it: Callable[[], AbstractAsyncContextManager[LazyMemory]]) -> Iterator[BlockingMemory]:
    host = _Host(open_it)
    memory = BlockingMemory(host, host.start())
    try:
        yield memory
    finally:
        host.end()


def attach(address: str | Address, **options: Any) -> contextlib.AbstractContextManager[BlockingMemory]:
    """`postcopy.attach`, with its options."""
    return _blocking(partial(_attach.attach, address, **options))


def attach_source(source: PageSource, **options: Any) -> contextlib.AbstractContextManager[BlockingMemory]:
    """`postcopy.attach_source`, with its options; `source.fetch` runs in the thread with Trio."""
    return _blocking(partial(_attach.attach_source, source, **options))


@contextmanager
def serve(memory: Any, listen: str | Address = _serve.DEFAULT_LISTEN, **options: Any) -> Iterator[_serve.Server]:
    """`postcopy.serve`, with its options, for as long as the block lasts."""

    @asynccontextmanager
    async def open_it() -> Any:
        async with background_tasks() as nursery:
            yield await nursery.start(partial(_serve.serve, memory, listen, **options))

    host: _Host[_serve.Server] = _Host(open_it)
    server = host.start()
    try:
        yield server
    finally:
        host.end()
