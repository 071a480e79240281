# SPDX-License-Identifier: Apache-2.0
"""`postcopy ctl top`: all machines of a process, again and again. It asks, and changes nothing.

On a terminal it takes all of it, with one machine in detail, which keys choose; it stays when the process ends, and
goes on with the next one that listens on the socket. Else it is one plain table after the other, until it ends.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

import trio

from postcopy.errors import PeerError
from postcopy.output import Output
from postcopy.output.words import format_whole_seconds
from postcopy.records import Json
from postcopy.service.client import ControlClient, ProcessGoneError
from postcopy.service.schema import ControlError
from postcopy.wire import one_line

if TYPE_CHECKING:
    # Loaded only where there is a terminal.
    from postcopy.output._frame import Frames
    from postcopy.output._live import Live

ASK_EVERY_S = 1.0
PRINT_EVERY_S = 2.0
LATE_S = 3.0
"""An answer that is older is said to be so."""
_DRAW_EVERY_S = 0.25
_LEAST_DRAW_S = 0.1
_LEAVES = frozenset({"q", "Q", "\x04"})  # Ctrl-D


class Top:
    """Of the process that listens on a control socket."""

    def __init__(self, path: str, output: Output) -> None:
        self._path = path
        self._output = output
        self._now: Json = {}
        self._answered_s = 0.0
        self._problem = ""
        self._kick = trio.Event()

    async def run(self) -> bool:
        """Until a person has had enough of it; without a terminal, until the process ends or nobody reads the tables,
        or, which is False, there is no room for them. `PeerError` where there is no such process to begin with."""
        self._output.patient = False
        draws = self._output.draws and sys.stdout.isatty()
        async with ControlClient.open(self._path, checks=True) as client:
            await self._ask(client)
            if not draws:
                await self._print_until_it_ends(client)
                return not self._output.stdout_failed
        async with self._output.open_live(whole=True) as (live, frames), trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_asking)
            nursery.start_soon(self._keep_drawing, live, frames)
            while (key := await live.key()) not in _LEAVES:
                frames.press(key, live.size[1])
                self._kick.set()
            nursery.cancel_scope.cancel()
        return True

    async def _ask(self, client: ControlClient) -> None:
        self._now = await client.execute("status")
        self._answered_s, self._problem = trio.current_time(), ""
        self._kick.set()

    async def _keep_asking(self) -> None:
        while True:
            try:
                async with ControlClient.open(self._path, checks=True) as client:
                    while True:
                        await self._ask(client)
                        await trio.sleep(ASK_EVERY_S)
            except ProcessGoneError:
                self._problem = "the process has ended"
            except (PeerError, ControlError) as error:
                self._problem = one_line(str(error).partition("; ")[0], 200)  # without what is to be done
            self._kick.set()
            await trio.sleep(ASK_EVERY_S)

    async def _keep_drawing(self, live: Live, frames: Frames) -> None:
        while True:
            self._kick = trio.Event()
            live.draw(frames.whole(self._now, *live.size, self._note(), keys=live.has_keyboard))
            await trio.sleep(_LEAST_DRAW_S)
            with trio.move_on_after(_DRAW_EVERY_S - _LEAST_DRAW_S):
                await self._kick.wait()

    def _note(self) -> str:
        age_s = trio.current_time() - self._answered_s
        if not self._problem and age_s < LATE_S:
            return ""
        return f"as it was {format_whole_seconds(age_s)} ago: {self._problem or 'the process does not answer'}"

    async def _print_until_it_ends(self, client: ControlClient) -> None:
        async with trio.open_nursery() as nursery:

            async def show() -> None:
                with contextlib.suppress(BrokenPipeError):
                    await self._print_tables()
                nursery.cancel_scope.cancel()

            nursery.start_soon(show)
            while True:
                await trio.sleep(ASK_EVERY_S)
                try:
                    await self._ask(client)
                except ProcessGoneError:
                    self._output.say(f"postcopy: the process at {self._path} has ended")
                    break
            nursery.cancel_scope.cancel()

    async def _print_tables(self) -> None:
        """Until there is no room for them; BrokenPipeError when nobody reads them."""
        from postcopy.output._frame import Frames, Glyphs
        from postcopy.output._writer import encoding_of
        from postcopy.output.tables import PLAIN_WIDTH

        frames = Frames(self._output.view, Glyphs.of(encoding_of(sys.stdout)))
        while not self._output.stdout_failed:  # which is said at the end
            print("\n".join([*frames.plain(self._now, PLAIN_WIDTH), ""]))
            await trio.sleep(PRINT_EVERY_S)
