# SPDX-License-Identifier: Apache-2.0
"""The proxy: see the package for what it is."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from postcopy.errors import PeerError, ResourceError
from postcopy.net import Address, Protection, listening_addresses, open_listeners, open_stream, parse_address
from postcopy.records import Record
from postcopy.records.commands import Cut, Unreachable
from postcopy.testbed.chaos._plan import ChaosPlan

CHUNK_BYTES = 64 * 1024
QUEUED_CHUNKS = 16
CONNECT_TIMEOUT_S = 10.0
_AS_IT_IS = Protection(insecure=True)  # what goes through is protected by its ends, or not
Log = Callable[[str, Record], None]
See = Callable[[int, bool, bytes], None]
"""Is called with the number of a connection, whether to its target, and what has come there."""


@dataclass
class Statistics:
    connections: int = 0
    refused: int = 0  # came while the cable was cut
    cuts: int = 0
    bytes_out: int = 0  # towards the target
    bytes_back: int = 0
    flipped: int = 0  # bits
    by_way: dict[str, int] = field(default_factory=dict)


class _Direction:
    """One half of a connection."""

    def __init__(
        self, proxy: ChaosProxy, source: trio.SocketStream, sink: trio.SocketStream, number: int, out: bool
    ) -> None:
        self._proxy = proxy
        self._source = source
        self._sink = sink
        self._number = number
        self._out = out
        self._random = random.Random(f"{proxy.plan.seed}/{number}/{'out' if out else 'back'}")
        self._due_s = 0.0
        self.frozen = False
        self.flip = False  # a bit of the next chunk
        self.left_bytes: int | None = None  # pass so many more, then end

    async def run(self) -> None:
        send, receive = trio.open_memory_channel[tuple[float, bytes]](QUEUED_CHUNKS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, receive)
            async with send:
                while data := await self._source.receive_some(CHUNK_BYTES):
                    self._proxy.see(self._number, self._out, data)
                    await send.send((self._when(len(data)), self._changed(bytes(data))))

    async def _write(self, receive: trio.MemoryReceiveChannel[tuple[float, bytes]]) -> None:
        async for due_s, data in receive:
            await trio.sleep_until(due_s)
            await self._proxy.thawed(self)
            if self.left_bytes is not None:
                await self._sink.send_all(data[: self.left_bytes])
                raise trio.BrokenResourceError("truncated")
            step = self._proxy.plan.split_bytes or len(data)
            for start in range(0, len(data), step):
                await self._sink.send_all(data[start : start + step])
            if self._out:
                self._proxy.statistics.bytes_out += len(data)
            else:
                self._proxy.statistics.bytes_back += len(data)
        await self._sink.send_eof()

    def _when(self, size_bytes: int) -> float:
        plan = self._proxy.plan
        due_s = trio.current_time() + plan.delay_s + plan.jitter_s * self._random.random()
        if plan.rate_bytes_per_s:
            due_s = max(due_s, self._due_s + size_bytes / plan.rate_bytes_per_s)
        self._due_s = max(due_s, self._due_s)  # in order
        return self._due_s

    def _changed(self, data: bytes) -> bytes:
        if not self.flip:
            return data
        self.flip = False
        self._proxy.statistics.flipped += 1
        bit = self._random.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        return bytes(flipped)


class _Connection:
    def __init__(self, proxy: ChaosProxy, near: trio.SocketStream, far: trio.SocketStream, number: int) -> None:
        self._ends = near, far
        self.directions = (
            _Direction(proxy, near, far, number, out=True),
            _Direction(proxy, far, near, number, out=False),
        )
        self.scope = trio.CancelScope()

    def reset(self) -> None:
        for stream in self._ends:
            _close_by_reset(stream)
        self.scope.cancel()


def _close_by_reset(stream: trio.SocketStream) -> None:
    """close(2) sends a reset from now on (SO_LINGER in socket(7))."""
    if stream.socket.fileno() >= 0:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class ChaosProxy:
    """Made by `open_chaos_proxy`. `address` is where to connect. Used from the Trio thread that made it."""

    def __init__(
        self,
        listeners: list[trio.SocketListener],
        target: Address,
        plan: ChaosPlan,
        begin: trio.Event | None,
        log: Log,
        see: See,
    ) -> None:
        self.plan = plan
        self.see = see
        self.statistics = Statistics()
        self._listeners = listeners
        self._target = target
        self._begin = begin
        self._log = log
        self._connections: set[_Connection] = set()
        self._random = random.Random(plan.seed)
        self._thaw = trio.Event()
        self._thaw.set()
        self._down = False

    @property
    def address(self) -> Address:
        return listening_addresses(self._listeners)[0]

    # ---- by hand

    def cut(self, way: str = "reset") -> None:
        """Does to every connection that there is now what `way` says (see `WAYS`). New ones are not affected."""
        self.statistics.cuts += 1
        self.statistics.by_way[way] = self.statistics.by_way.get(way, 0) + 1
        self._log("cut", Cut(way=way, connections=len(self._connections)))
        victims = list(self._connections)
        if way in ("truncate", "corrupt") and victims:
            victims = [self._random.choice(victims)]  # one of them lies; the cable is fine
        for connection in victims:
            if way == "reset":
                connection.reset()
            elif way == "close":
                connection.scope.cancel()
            elif way == "freeze":
                for direction in connection.directions:
                    direction.frozen = True
            elif way == "truncate":
                for direction in connection.directions:
                    direction.left_bytes = self._random.randrange(64)
            elif way == "corrupt":
                self._random.choice(connection.directions).flip = True
            else:
                raise ValueError(f"no way to cut a connection: {way!r}")

    def refuse(self) -> None:
        """New connections are reset from now on, until `heal`."""
        self._down = True

    def heal(self) -> None:
        """The cable is whole again. Connections that were frozen by `cut` stay so: nobody repairs them."""
        self._down = False

    def freeze(self) -> None:
        """Until `thaw` nothing passes, no connection is closed, and new ones are not answered."""
        self._thaw = trio.Event()

    def thaw(self) -> None:
        self._thaw.set()

    # ---- by itself

    async def serve(self) -> None:
        """Runs until cancelled."""
        async with trio.open_nursery() as nursery:
            if self.plan.cut_every_s is not None:
                nursery.start_soon(self._cut_again_and_again, self.plan.cut_every_s)
            await trio.serve_listeners(self._carry, self._listeners, handler_nursery=nursery)

    async def _cut_again_and_again(self, every_s: tuple[float, float]) -> None:
        if self._begin is not None:
            await self._begin.wait()
        while True:
            await trio.sleep(self._random.uniform(*every_s))
            way, down_s = self._random.choice(self.plan.ways), self._random.uniform(*self.plan.down_s)
            self.cut(way)
            if way in ("truncate", "corrupt"):
                continue
            if way == "freeze":
                self.freeze()
            else:
                self.refuse()
            await trio.sleep(down_s)
            self.thaw()
            self.heal()

    async def _carry(self, near: trio.SocketStream) -> None:
        """One connection, from its first byte to its end. Whatever the ends do, the proxy goes on."""
        self.statistics.connections += 1
        number = self.statistics.connections
        async with near:
            if self._down:
                self.statistics.refused += 1
                _close_by_reset(near)
                return
            await self._thaw.wait()
            try:
                far = await open_stream(self._target, CONNECT_TIMEOUT_S, _AS_IT_IS)
            except (PeerError, ResourceError) as error:
                self._log("unreachable", Unreachable(connection=number, error=str(error)))
                return
            async with far:
                for stream in (near, far):
                    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = _Connection(self, near, far, number)
                self._connections.add(connection)
                try:
                    with connection.scope:
                        async with trio.open_nursery() as nursery:
                            for direction in connection.directions:
                                nursery.start_soon(self._half, direction, connection)
                finally:
                    self._connections.discard(connection)

    async def _half(self, direction: _Direction, connection: _Connection) -> None:
        try:
            await direction.run()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            connection.scope.cancel()
        except BaseExceptionGroup as group:
            _, other = group.split((trio.BrokenResourceError, trio.ClosedResourceError))
            connection.scope.cancel()
            if other is not None:  # a cancellation, which the broken stream came together with
                raise other from None

    async def thawed(self, direction: _Direction) -> None:
        """Waits as long as nothing may pass there: for ever, where it was frozen by a cut."""
        if direction.frozen:
            await trio.sleep_forever()
        await self._thaw.wait()


@asynccontextmanager
async def open_chaos_proxy(
    target: Address | str,
    plan: ChaosPlan | None = None,
    *,
    listen: Address | str = "127.0.0.1:0",
    begin: trio.Event | None = None,
    log: Log = lambda event, fields: None,
    see: See = lambda connection, out, data: None,
) -> AsyncIterator[ChaosProxy]:
    """A proxy to `target` that serves as long as the block lasts; `ResourceError` when it cannot listen there.

    It cuts nothing by itself before `begin` is set, where one is given. `log` is called with what it does: a word, and
    fields; `see` with all that comes, before anything is done to it.
    """
    where = parse_address(listen, listening=True) if isinstance(listen, str) else listen
    there = parse_address(target) if isinstance(target, str) else target
    listeners = await open_listeners(where, _AS_IT_IS)
    proxy = ChaosProxy(listeners, there, plan or ChaosPlan(), begin, log, see)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(proxy.serve)
            yield proxy
            nursery.cancel_scope.cancel()
    finally:
        for listener in listeners:
            listener.socket.close()
