# SPDX-License-Identifier: Apache-2.0
"""Maps of pages on their way over the control connection, in parts that fit into a message each: which pages may hold
something (`page-map`), which have changed since (`stale-map`), and which have arrived (`received-map`)."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar, TypeVarTuple

from postcopy._blocking import run_sync
from postcopy.errors import ProtocolError
from postcopy.memory.bitmap import Bitmap
from postcopy.migration.connection import SEND_BYTES, STEP_TIMEOUT_S, Control, P
from postcopy.wire import (
    PAGE_MAP_PAGES,
    EarlyState,
    Message,
    PageMap,
    ReceivedMap,
    Recover,
    Round,
    StaleMap,
    Switchover,
)

HEAVY_PAGES = 256 * 1024
"""From so many runs or pages on a map is packed, unpacked and added up in a thread: it takes a millisecond and more."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Part = PageMap | StaleMap | ReceivedMap
Last = TypeVar("Last", bound=Switchover | Round | Recover)


class Disagreement(ProtocolError):
    """The two sides do not know the same about the migration. Twice in a row, they never will."""


@contextlib.contextmanager
def disagreeing() -> Iterator[None]:
    """A `ProtocolError` inside, about the content of messages that came undamaged, is a `Disagreement`."""
    try:
        yield
    except ProtocolError as error:
        raise Disagreement(str(error)) from error


async def if_heavy(pages: int, function: Callable[[*Ts], T], *args: *Ts) -> T:
    """`function(*args)`, which looks at so many pages or runs: here, or in a thread where it would take long."""
    return await run_sync(function, *args) if pages >= HEAVY_PAGES else function(*args)


class MapCollector:
    """Bitmaps that come in parts: those of a block in order and without gaps. What the peer says is checked."""

    def __init__(self, pages: Sequence[int]) -> None:
        self.bitmaps = [Bitmap(count) for count in pages]
        self.maps = 0
        self._described = [0] * len(pages)  # pages

    def add(self, message: Part) -> None:
        """`ProtocolError` for a part that does not fit."""
        self.maps += 1
        if message.block >= len(self.bitmaps):
            raise ProtocolError(f"{message.TYPE}: there is no block {message.block}")
        whole, described = self.bitmaps[message.block], self._described[message.block]
        if message.first_page != described:
            raise ProtocolError(
                f"{message.TYPE}: block {message.block} goes on at page {message.first_page}, not at {described}"
            )
        if message.pages > len(whole) - message.first_page:
            raise ProtocolError(f"{message.TYPE}: block {message.block} has {len(whole)} pages only")
        whole.paste(message.first_page, Bitmap.rle_decode(message.runs, message.pages))
        self._described[message.block] += message.pages

    def finish(self, message: str, maps: int) -> None:
        """`message` names the one that announces `maps` parts. `ProtocolError` unless that is what came."""
        if maps != self.maps:
            raise ProtocolError(f"{message}: speaks of {maps} page maps, {self.maps} came")
        for number, bitmap in enumerate(self.bitmaps):
            if self._described[number] != len(bitmap):
                raise ProtocolError(f"{message}: the page map of block {number} ends at {self._described[number]}")


async def send_maps(
    control: Control[P], part: type[Part], bitmaps: Sequence[Bitmap], last: Callable[[int], Message]
) -> None:
    """Sends the maps of all blocks, and the message that follows so many parts. What is short goes out at once, and
    wakes the peer once."""
    send, maps, unsent = control.protocol.send, 0, b""
    for block, bitmap in enumerate(bitmaps):
        for first_page, piece in bitmap.parts(PAGE_MAP_PAGES):
            runs = await if_heavy(2 * piece.count(), piece.rle_encode)
            unsent += send(part(block, first_page, len(piece), runs))
            maps += 1
            if len(unsent) >= SEND_BYTES:
                await control.send(unsent)
                unsent = b""
    await control.send(unsent + send(last(maps)))


async def receive_maps(
    control: Control[P],
    part: type[Part],
    last: tuple[type[Last], ...],
    pages: Sequence[int],
    first_timeout_s: float,
    early: Callable[[bytes], Awaitable[None]] | None = None,
) -> tuple[list[Bitmap], Last]:
    """The maps of all blocks, of so many `pages`, and the message that follows them. `first_timeout_s`: for how long
    the first part is waited for. `early` takes an `early-state` that comes before them. `Disagreement` for maps that do
    not fit. No bitmap where a `switchover` says that what it would have had to tell was told before."""
    due = last[-1].TYPE
    collector, timeout_s = MapCollector(pages), first_timeout_s
    while isinstance(message := await control.receive_any(timeout_s, due), part | EarlyState):
        if isinstance(message, EarlyState):  # which comes before the maps
            if early is None:
                break
            await early(message.state)
            continue
        timeout_s = STEP_TIMEOUT_S
        with disagreeing():
            await if_heavy(len(message.runs), collector.add, message)
    if not isinstance(message, last):
        raise ProtocolError(f"{message.TYPE} came where {due} was due")
    if part is StaleMap and last[-1] is Switchover and not message.maps and not collector.maps:
        return [], message
    with disagreeing():
        collector.finish(message.TYPE, message.maps)
    return collector.bitmaps, message


async def digest_of(bitmaps: Sequence[Bitmap]) -> int:
    """One checksum over the maps of all blocks."""
    digest = 0
    for bitmap in bitmaps:
        digest = await if_heavy(len(bitmap), bitmap.crc32c, digest)
    return digest
