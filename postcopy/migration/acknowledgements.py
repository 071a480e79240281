# SPDX-License-Identifier: Apache-2.0
"""Acknowledgements of pages, for ``--release-ram``: the source gives memory back as soon as, and only as far as, the
destination has said that it has the pages.

The destination sends in `placed` what has arrived since it last did (`PlacedReporter`), the source frees it
(`Releaser`). An acknowledgement that is lost only delays that: the received maps of the next recovery say everything.

A request may cross an acknowledgement: the page came by push while the request for it was on its way on another
connection, and the source would have nothing to answer it with. So it keeps what was acknowledged for a moment longer
(`GRACE_S`). A request that is later than even that ends its connection, and the two sides recover.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import trio

from postcopy._blocking import run_sync
from postcopy.dataplane.pageserver import PageServer
from postcopy.errors import CoreError, ProtocolError
from postcopy.memory.bitmap import Bitmap
from postcopy.migration.connection import Control
from postcopy.wire import PLACED_PAGES, DestinationProtocol, Placed, State

PLACED_EVERY_MS = 200
"""How often a source asks for acknowledgements. They come less often where that would take more than `SHARE` of the
time."""
GRACE_S = 0.2
SHARE = 0.05

log = logging.getLogger(__name__)


class PlacedReporter:
    """The destination's half."""

    def __init__(self) -> None:
        self._acknowledged: list[Bitmap] = []

    def acknowledged(self, maps: Sequence[Bitmap]) -> None:
        """What the source knows to be here, a map a RAM block: zero pages, or the received maps of a recovery."""
        self._acknowledged = list(maps)

    async def run(
        self, control: Control[DestinationProtocol], received: Callable[[int], Bitmap], every_s: float
    ) -> None:
        """Sends acknowledgements, until cancelled. `received`: the pager's, called in a worker thread. `PeerError` when
        the connection breaks."""
        pause_s = every_s
        while True:
            await trio.sleep(pause_s)
            began_s = trio.current_time()
            for number in range(len(self._acknowledged)):
                await self._acknowledge(control, number, await run_sync(received, number))
            pause_s = max(every_s, (trio.current_time() - began_s) / SHARE)

    async def _acknowledge(self, control: Control[DestinationProtocol], number: int, received: Bitmap) -> None:
        protocol, before = control.protocol, self._acknowledged[number]
        news = await run_sync(received.without, before)
        first_page = news.next(0)
        while first_page < len(news):
            part = news.part(first_page, min(PLACED_PAGES, len(news) - first_page))
            runs = part.rle_encode()
            # Checked for each message: the connection may end, and `complete` says all the rest.
            if protocol.state is not State.POSTCOPY:
                return
            await control.send(protocol.send(Placed(number, first_page, len(part), runs)))
            first_page = news.next(first_page + len(part))
        if self._acknowledged[number] is before:
            self._acknowledged[number] = received


class Releaser:
    """The source's half: takes acknowledgements, and frees their pages a moment later. For one page server."""

    def __init__(self, server: PageServer, blocks: int) -> None:
        self._server = server
        self._blocks = blocks
        self._fresh: list[tuple[int, int, Bitmap]] = []  # block, first page, map
        self._due: list[tuple[int, int, Bitmap]] = []
        self._failed = False

    def discarded(self) -> list[Bitmap]:
        """For each RAM block the pages (of transfer) that have been given back."""
        return [self._server.discarded(number) for number in range(self._blocks)]

    def take(self, message: Placed) -> None:
        """`ProtocolError` for one that does not fit."""
        if message.block >= self._blocks:
            raise ProtocolError(f"placed: there is no block {message.block}")
        pages = self._server.block_pages(message.block)
        if message.first_page + message.pages > pages:
            raise ProtocolError(f"placed: block {message.block} has {pages} pages only")
        placed = Bitmap.rle_decode(message.runs, message.pages)
        self._fresh.append((message.block, message.first_page, placed))

    def check(self, maps: Sequence[Bitmap]) -> None:
        """`ProtocolError` when a recovery's received maps lack a page that was given back."""
        for number, received in enumerate(maps):
            missing = self._server.released(number).without(received)
            if missing.count():
                raise ProtocolError(
                    f"recover: the received map of block {number} lacks {missing.count()} pages that were acknowledged"
                    f" as placed and have been given back here, the first of them page {missing.next(0)}"
                )

    def take_maps(self, maps: Sequence[Bitmap]) -> None:
        """The received maps of a recovery replace all that was acknowledged before."""
        self._fresh = [(number, 0, received) for number, received in enumerate(maps)]
        self._due = []

    async def run(self) -> None:
        """Frees what was acknowledged at least `GRACE_S` ago, until cancelled."""
        while True:
            await trio.sleep(GRACE_S)
            due, self._due, self._fresh = self._due, self._fresh, []
            await self._release(due)

    async def release_all(self) -> None:
        """Every page is at the destination. With the page server's channels closed."""
        whole = [(number, 0, Bitmap.full(self._server.block_pages(number))) for number in range(self._blocks)]
        await self._release(whole)

    async def _release(self, parts: Sequence[tuple[int, int, Bitmap]]) -> None:
        for block, first_page, placed in parts:
            if self._failed:
                return
            try:
                # (not abandoned when cancelled: the page server must not be closed meanwhile)
                await run_sync(partial(self._server.release, block, first_page, placed))
            except CoreError as error:
                self._failed = True
                log.warning("--release-ram: %s; the rest is kept until the end", error)
