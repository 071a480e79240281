# SPDX-License-Identifier: Apache-2.0
"""What stands around a command that somebody operates: the control socket, metrics, and word to systemd."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from postcopy.output import Output
from postcopy.service import notify
from postcopy.service._contain import contained, contained_call
from postcopy.service.handler import ControlHandler
from postcopy.service.schema import Json
from postcopy.service.server import ControlServer

if TYPE_CHECKING:
    from postcopy.service.metrics import Metrics, MetricsFile

Run = Callable[[trio.Event], Awaitable[bool]]


@dataclass(frozen=True)
class ServiceOptions:
    control: str | None = None  # path of the socket
    metrics: str | None = None  # HOST:PORT
    metrics_file: str | None = None
    ready_on: str = "progress"  # the event that says that the process can be used


class Service:
    """Runs a command with all that around it. `run` is what the command line runs in place of the command's own."""

    def __init__(self, run: Run, handler: ControlHandler, output: Output, options: ServiceOptions) -> None:
        self._run = run
        self._handler = handler
        self._output = output
        self._options = options
        self._server: ControlServer | None = None
        self._metrics: Metrics | None = None
        self._file: MetricsFile | None = None
        self._notifier = notify.Notifier()
        self._last_status = ""

    async def run(self, stop: trio.Event) -> bool:
        """As the command's own `run`; what cannot be served is an error before anything else has begun."""
        self._handler.stop = stop
        options = self._options
        done = False
        async with contextlib.AsyncExitStack() as stack:
            tasks: list[Callable[[], Awaitable[None]]] = [self._say_stopping]
            if options.control is not None:
                self._server = await ControlServer.open(options.control, self._handler.side, self._handler.execute)
                stack.callback(self._server.close)
                tasks.append(self._server.serve)
            if options.metrics is not None or options.metrics_file is not None:
                tasks += await self._open_metrics()
            self._output.listeners.append(self._hear)
            stack.callback(self._output.listeners.remove, self._hear)
            stack.callback(self._notifier.close)
            if self._file is not None:
                stack.push_async_callback(self._file.close)
            async with trio.open_nursery() as nursery:
                for task in tasks:
                    # Whoever only looks on takes nothing with him.
                    nursery.start_soon(contained, "the service around the command", task)
                done = await self._run(stop)
                nursery.cancel_scope.cancel()
        return done

    async def _open_metrics(self) -> list[Callable[[], Awaitable[None]]]:
        # Loaded only where they are asked for: a daemon's megabytes are counted.
        from postcopy.service.http import HttpServer, parse_metrics_address
        from postcopy.service.metrics import CONTENT_TYPE, Metrics, MetricsFile

        self._metrics = Metrics(self._handler.all_machines)
        tasks: list[Callable[[], Awaitable[None]]] = []
        if self._options.metrics_file is not None:
            self._file = MetricsFile(self._options.metrics_file)
            tasks.append(self._file.run)
        if self._options.metrics is None:
            return tasks
        server = await HttpServer.open(
            parse_metrics_address(self._options.metrics), "/metrics", CONTENT_TYPE, self._metrics.text
        )
        for address in server.addresses:
            self._output.emit("metrics", {"address": str(address)})
            self._output.say(f"{self._handler.side}: metrics at http://{address}/metrics")
        return [*tasks, server.serve]

    async def _say_stopping(self) -> None:
        await self._handler.stop.wait()
        self._notifier.stopping()

    def _hear(self, event: str, fields: Json) -> None:
        # Called from the middle of migrations.
        contained_call(f"telling of {event}", partial(self._tell, event, fields))

    def _tell(self, event: str, fields: Json) -> None:
        status = str(fields.get("status", ""))
        if event == self._options.ready_on:
            self._notifier.ready()
        if event == "progress" and status != self._last_status:
            if self._server is not None:
                self._server.publish("status", {"side": self._handler.side, "from": self._last_status, "to": status})
            self._notifier.status(status)
            self._last_status = status
        if self._server is not None:
            self._server.publish(event, fields)
        if self._metrics is not None and event in ("migration-ended", "result"):
            if event == "migration-ended":
                self._metrics.ended(str(fields["direction"]), status)
            if self._file is not None:
                self._file.put(self._metrics.text())
