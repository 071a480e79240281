# SPDX-License-Identifier: Apache-2.0
"""A TCP proxy that is a bad network: slow, jittery, cut, half open, lying.

It stands between the two hosts of a migration, in the place of the cable. What it does to *bytes* (delay, rate,
splitting, flipped bits) it does to each connection in each direction by itself; what it does to *connections* it does
to all of them at once, as a cable would. Whoever connects while the cable is cut is reset, or, where it is frozen,
accepted and never answered.

Everything random comes from one seed, and from the number of the connection, so that a failure can be had again: the
same seed decides the same delays, the same ways and times of cutting. Which byte is under way when the cable is cut
depends on the machine all the same.

Resource handling: all connections belong to the proxy and end with the block of `open_chaos_proxy`. At most
`QUEUED_CHUNKS` chunks wait in each direction of a connection: a receiver that stops reading stops the sender, as TCP
would.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from postcopy.errors import ConfigurationError
from postcopy.net.channels import Address, parse_address
from postcopy.units import parse_rate, parse_seconds, parse_seconds_range, parse_size

CHUNK_BYTES = 64 * 1024
QUEUED_CHUNKS = 16
CONNECT_TIMEOUT_S = 10.0
WAYS = ("reset", "close", "freeze", "truncate", "corrupt")
"""How a cable can be cut: with a reset, with an orderly end, without a word (half open), after a few more bytes, or by
one flipped bit, after which the connection goes on."""

Log = Callable[[str, dict[str, object]], None]


@dataclass(frozen=True)
class ChaosPlan:
    """What the network does by itself. Times in seconds; a range is drawn from uniformly."""

    seed: int = 0
    delay_s: float = 0.0  # of every byte, one way
    jitter_s: float = 0.0  # up to so much more; the order stays
    rate_bytes_per_s: int = 0  # of each connection and direction; 0: no limit
    split_bytes: int = 0  # no write is larger; 0: as they come
    cut_every_s: tuple[float, float] | None = None
    down_s: tuple[float, float] = (0.0, 0.1)  # how long it stays cut
    ways: tuple[str, ...] = ("reset",)

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> ChaosPlan:
        """Of words such as ``cut``, ``cut:every=0.2..0.5,down=0.1``, ``slow:delay=0.005,rate=10MiB``: see `KINDS`.
        `ConfigurationError` says what is wrong."""
        kind, _, rest = text.partition(":")
        if kind not in KINDS:
            raise ConfigurationError(f"no chaos called {kind!r}; there are {', '.join(KINDS)}")
        settings = dict(KINDS[kind])
        for item in filter(None, rest.split(",")):
            name, equals, value = item.partition("=")
            if not equals or name not in _SETTINGS:
                raise ConfigurationError(
                    f"chaos {text!r}: {item!r} is none of {', '.join(_SETTINGS)}, written NAME=VALUE"
                )
            attribute, parse = _SETTINGS[name]
            settings[attribute] = parse(value)
        return cls(seed=seed, **settings)  # type: ignore[arg-type]


def ways(text: str) -> tuple[str, ...]:
    """Of ``reset+freeze``."""
    words = tuple(text.split("+"))
    for word in words:
        if word not in WAYS:
            raise ConfigurationError(f"{word!r} is no way to cut a connection; there are {', '.join(WAYS)}")
    return words


_SETTINGS: dict[str, tuple[str, Callable[[str], object]]] = {
    "delay": ("delay_s", parse_seconds),
    "jitter": ("jitter_s", parse_seconds),
    "rate": ("rate_bytes_per_s", parse_rate),
    "split": ("split_bytes", parse_size),
    "every": ("cut_every_s", parse_seconds_range),
    "down": ("down_s", parse_seconds_range),
    "ways": ("ways", ways),
}
KINDS: dict[str, dict[str, object]] = {
    "none": {},
    "slow": {"delay_s": 0.005, "jitter_s": 0.002},
    "split": {"split_bytes": 7},
    "cut": {"cut_every_s": (0.1, 0.5)},
    "freeze": {"cut_every_s": (0.5, 1.0), "ways": ("freeze",)},
    "corrupt": {"cut_every_s": (0.1, 0.5), "ways": ("corrupt",), "down_s": (0.0, 0.0)},
    "all": {"cut_every_s": (0.1, 0.5), "ways": WAYS, "delay_s": 0.001, "jitter_s": 0.001},
}
"""Words for the usual kinds of trouble, each the start of a plan."""


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
            self._proxy.count(len(data), self._out)
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
    def __init__(
        self, near: trio.SocketStream, far: trio.SocketStream, directions: tuple[_Direction, _Direction]
    ) -> None:
        self.near, self.far = near, far
        self.directions = directions
        self.scope = trio.CancelScope()

    def reset(self) -> None:
        for stream in (self.near, self.far):
            with_linger = struct.pack("ii", 1, 0)  # close(2) sends a reset then (socket(7))
            if stream.socket.fileno() >= 0:
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, with_linger)
        self.scope.cancel()


class ChaosProxy:
    """Made by `open_chaos_proxy`. `address` is where to connect. Used from the Trio thread that made it."""

    def __init__(
        self, listeners: list[trio.SocketListener], target: Address, plan: ChaosPlan, begin: trio.Event | None, log: Log
    ) -> None:
        self.plan = plan
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
        name = self._listeners[0].socket.getsockname()
        return Address(str(name[0]), int(name[1]))

    # ---- by hand

    def cut(self, way: str = "reset") -> None:
        """Does to every connection that there is now what `way` says (see `WAYS`). New ones are not affected."""
        self.statistics.cuts += 1
        self.statistics.by_way[way] = self.statistics.by_way.get(way, 0) + 1
        self._log("cut", {"way": way, "connections": len(self._connections)})
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
        """From now on whoever connects is reset, until `heal`."""
        self._down = True

    def heal(self) -> None:
        """The cable is whole again. Connections that were frozen by `cut` stay so: nobody repairs them."""
        self._down = False

    def freeze(self) -> None:
        """Nothing passes any more, nobody is told, new connections are not answered, until `thaw`."""
        self._thaw = trio.Event()

    def thaw(self) -> None:
        self._thaw.set()

    # ---- by itself

    async def serve(self) -> None:
        """Runs until cancelled."""
        async with trio.open_nursery() as nursery:
            for listener in self._listeners:
                nursery.start_soon(self._accept, listener, nursery)
            if self.plan.cut_every_s is not None:
                nursery.start_soon(self._cut_again_and_again, self.plan.cut_every_s)

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

    async def _accept(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        while True:
            near = await listener.accept()
            self.statistics.connections += 1
            nursery.start_soon(self._carry, near, self.statistics.connections)

    async def _carry(self, near: trio.SocketStream, number: int) -> None:
        """One connection, from its first byte to its end. Whatever the ends do, the proxy goes on."""
        async with near:
            if self._down:
                self.statistics.refused += 1
                near.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            await self._thaw.wait()
            try:
                with trio.fail_after(CONNECT_TIMEOUT_S):
                    far = await trio.open_tcp_stream(self._target.host, self._target.port)
            except (OSError, trio.TooSlowError) as error:
                self._log("unreachable", {"connection": number, "error": str(error)})
                return
            async with far:
                for stream in (near, far):
                    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                out = _Direction(self, near, far, number, out=True)
                back = _Direction(self, far, near, number, out=False)
                connection = _Connection(near, far, (out, back))
                self._connections.add(connection)
                try:
                    with connection.scope:
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(self._half, out, connection)
                            nursery.start_soon(self._half, back, connection)
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

    def count(self, size_bytes: int, out: bool) -> None:
        if out:
            self.statistics.bytes_out += size_bytes
        else:
            self.statistics.bytes_back += size_bytes


@asynccontextmanager
async def open_chaos_proxy(
    target: Address | str,
    plan: ChaosPlan | None = None,
    *,
    listen: Address | str = "127.0.0.1:0",
    begin: trio.Event | None = None,
    log: Log = lambda event, fields: None,
) -> AsyncIterator[ChaosProxy]:
    """A proxy to `target` that serves as long as the block lasts; `OSError` when it cannot listen there.

    It cuts nothing by itself before `begin` is set, where one is given. `log` is called with what it does: a word, and
    fields.
    """
    where = parse_address(listen, listening=True) if isinstance(listen, str) else listen
    there = parse_address(target) if isinstance(target, str) else target
    listeners = await trio.open_tcp_listeners(where.port, host=where.host or None)
    proxy = ChaosProxy(listeners, there, plan or ChaosPlan(), begin, log)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(proxy.serve)
            yield proxy
            nursery.cancel_scope.cancel()
    finally:
        for listener in listeners:
            listener.socket.close()
