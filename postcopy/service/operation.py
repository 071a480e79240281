# SPDX-License-Identifier: Apache-2.0
"""What is around a service that is operated: the control socket, metrics, and notifications to systemd."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from postcopy._stop import Stop
from postcopy.errors import PostcopyError
from postcopy.net import Protection, everywhere
from postcopy.output import Output, count_machines
from postcopy.output.words import format_count
from postcopy.records import Record
from postcopy.records.events import MetricsAddress
from postcopy.service import notify, report
from postcopy.service._contain import contained, contained_call
from postcopy.service.config import OperatingOptions
from postcopy.service.control import ControlHandler
from postcopy.service.report import Json
from postcopy.service.schema import Request
from postcopy.service.server import ControlServer
from postcopy.service.service import Service

if TYPE_CHECKING:
    from postcopy.service.metrics import MetricsFile

Task = Callable[[], Awaitable[None]]

OPEN_AGAIN_S = 1.0
EXTEND_S = 60.0
EXTEND_EVERY_S = 5.0

log = logging.getLogger(__name__)


class Operated(Protocol):
    """What is operated as a `Service` is, and is none."""

    side: str
    listens: bool
    control: str | None
    protection: Protection

    async def run(self, stop: Stop) -> bool: ...
    def needed(self) -> str: ...
    async def execute(self, request: Request) -> Record: ...
    def make_metrics(self) -> PageOfMetrics: ...


class PageOfMetrics(Protocol):
    """As `metrics.Metrics`."""

    def text(self) -> bytes: ...
    def ended(self, direction: str, status: str) -> None: ...


class Operation:
    """Its `run` is what the command line runs in place of the service's own."""

    def __init__(
        self, service: Service | Operated, options: OperatingOptions, output: Output, *, patient: bool = False
    ) -> None:
        """`patient`: something depends on the service already, so it runs in any case, and at once; what is around it
        comes when it can be had."""
        self._service = service
        self._patient = patient
        self._side = service.side
        self._output = output
        self._options = options
        self._server: ControlServer | None = None
        self._metrics: PageOfMetrics | None = None
        self._file: MetricsFile | None = None
        self._notifier = notify.Notifier()
        self._last_status = ""
        self._ending = False  # which is what the service manager is told from then on

    async def run(self, stop: Stop) -> bool:
        """As the service's own `run`; what cannot be served is an error before anything else has begun."""
        options = self._options
        done = False
        async with contextlib.AsyncExitStack() as stack:
            tasks: list[Task] = [partial(self._say_stopping, stop)]
            parts: list[Callable[[], Awaitable[list[Task]]]] = []
            if options.control is not None:
                self._service.control = options.control
                parts.append(partial(self._open_control, options.control, stack))
            if options.metrics is not None or options.metrics_file is not None:
                parts.append(self._open_metrics)
            for part in parts:
                tasks += [partial(self._run_when_open, part)] if self._patient else await part()
            self._output.listeners.append(self._on_event)
            stack.callback(self._output.listeners.remove, self._on_event)
            stack.callback(self._notifier.close)
            stack.push_async_callback(self._close_file)
            async with trio.open_nursery() as nursery:
                for task in tasks:
                    # What only shows the process must not end it.
                    nursery.start_soon(contained, "the service around the command", task)
                done = await self._service.run(stop)
                nursery.cancel_scope.cancel()
        return done

    async def _run_when_open(self, part: Callable[[], Awaitable[list[Task]]]) -> None:
        told = ""
        while True:
            try:
                tasks = await part()
                break
            except PostcopyError as error:
                if str(error) != told:
                    told = str(error)
                    log.error("%s; trying again", error)
                await trio.sleep(OPEN_AGAIN_S)
        async with trio.open_nursery() as nursery:
            for task in tasks:
                nursery.start_soon(contained, "the service around the command", task)

    async def _open_control(self, path: str, stack: contextlib.AsyncExitStack) -> list[Task]:
        service = self._service
        execute = ControlHandler(service).execute if isinstance(service, Service) else service.execute
        self._server = await ControlServer.open(path, self._side, execute)
        stack.callback(self._server.close)
        return [self._server.serve]

    async def _close_file(self) -> None:
        if self._file is not None:
            await self._file.close()

    async def _open_metrics(self) -> list[Task]:
        # Loaded only where they are asked for: a daemon's megabytes are counted.
        from postcopy.service.http import HttpServer, parse_metrics_address
        from postcopy.service.metrics import CONTENT_TYPE, Metrics, MetricsFile

        service = self._service
        if isinstance(service, Service):
            certificates = partial(report.certificates, service.protection)
            self._metrics = Metrics(service.all_rows, certificates, lambda: service.unauthorised)
        else:
            self._metrics = service.make_metrics()
        tasks: list[Task] = []
        if self._options.metrics_file is not None:
            self._file = MetricsFile(self._options.metrics_file)
            tasks.append(self._file.run)
        if self._options.metrics is None:
            return tasks
        server = await HttpServer.open(
            parse_metrics_address(self._options.metrics),
            "/metrics",
            CONTENT_TYPE,
            self._metrics.text,
            service.protection,
        )
        for address in server.addresses:
            self._output.emit(
                "metrics", MetricsAddress(side=self._side, address=str(address), encrypted=server.encrypted)
            )
        families = everywhere(server.addresses)
        where = f"HOST:{server.addresses[0].port}" if families else server.addresses[0]
        note = f", on every address of this host ({families})" if families else ""
        self._output.say(f"{self._side}: metrics at http{'s' * server.encrypted}://{where}/metrics{note}")
        return [*tasks, server.serve]

    async def _say_stopping(self, stop: Stop) -> None:
        """That it ends, and from then on that it still does: what is seen through may take longer than the service
        manager allows. A process whose event loop is stuck does not say it, and is killed."""
        await stop.wait()
        self._ending = True
        self._notifier.stopping()
        while True:
            self._notifier.extend(EXTEND_S)
            needed = self._service.needed()
            self._notifier.status(f"ending, still needed: {needed}" if needed else "ending")
            await trio.sleep(EXTEND_EVERY_S)

    def _on_event(self, event: str, fields: Json) -> None:
        # Called from the middle of migrations.
        contained_call(f"publishing {event}", partial(self._publish, event, fields))

    def _publish(self, event: str, fields: Json) -> None:
        if event == "timeline":  # as long as all that may wait for a client that does not read
            return
        status = count_machines(fields) if "machines" in fields else str(fields.get("status", ""))
        if "vms" in fields:
            status = format_count(len(fields["vms"]), "virtual machine")
        if event == ("listening" if self._service.listens else "progress"):  # the process can be used
            self._notifier.ready()
        if event == "progress" and status != self._last_status and not self._ending:
            self._notifier.status(status)
            self._last_status = status
        if self._server is not None:
            self._server.publish(event, fields)
        if self._metrics is not None and event in ("migration-ended", "vm-ended", "result"):
            if event == "migration-ended":
                self._metrics.ended(str(fields["direction"]), status)
            if self._file is not None:
                self._file.put(self._metrics.text())
