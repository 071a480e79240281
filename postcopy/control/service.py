# SPDX-License-Identifier: Apache-2.0
"""What stands around a command that somebody operates: the control socket, metrics, and word to systemd."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from postcopy.progress import Output

from .desk import Desk
from .schema import Json
from .server import ControlServer

Run = Callable[[trio.Event], Awaitable[bool]]


@dataclass(frozen=True)
class ServiceOptions:
    control: str | None = None  # path of the socket


class Service:
    """Runs a command with all that around it. `run` is what the command line runs in place of the command's own."""

    def __init__(self, run: Run, desk: Desk, output: Output, options: ServiceOptions) -> None:
        self._run = run
        self._desk = desk
        self._output = output
        self._options = options
        self._server: ControlServer | None = None
        self._last_status = ""

    async def run(self, stop: trio.Event) -> bool:
        """As the command's own `run`; what cannot be served is an error before anything else has begun."""
        self._desk.stop = stop
        done = False
        if self._options.control is not None:
            self._server = await ControlServer.open(self._options.control, self._desk.side, self._desk.execute)
        try:
            self._output.listeners.append(self._tell)
            async with trio.open_nursery() as nursery:
                if self._server is not None:
                    nursery.start_soon(self._server.serve)
                done = await self._run(stop)
                nursery.cancel_scope.cancel()
        finally:
            self._output.listeners.remove(self._tell)
            if self._server is not None:
                self._server.close()
        return done

    def _tell(self, event: str, fields: Json) -> None:
        if self._server is not None:
            status = str(fields.get("status", ""))
            if event == "progress" and status != self._last_status:
                self._server.publish("status", {"side": self._desk.side, "from": self._last_status, "to": status})
                self._last_status = status
            self._server.publish(event, fields)
