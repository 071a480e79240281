# SPDX-License-Identifier: Apache-2.0
"""Who answers the control socket: a handler knows one process, what it does, and what may be asked of it."""

from __future__ import annotations

import abc
import os
from collections.abc import Awaitable, Callable, Mapping

import trio

from postcopy.machines import Machine
from postcopy.service.report import Migration
from postcopy.service.schema import COMMANDS, ControlError, Json, Request
from postcopy.service.status import machine_status

Handler = Callable[[Json], Awaitable[Json]]


class ControlHandler(abc.ABC):
    """What one process can be asked. Commands that it has no handler for are refused by name."""

    side: str

    def __init__(self) -> None:
        self.stop = trio.Event()  # set when the process is to end

    @abc.abstractmethod
    def handlers(self) -> Mapping[str, Handler]:
        """By command; beside `commands`, `status` and `events`, which everybody has."""

    @abc.abstractmethod
    def machines(self) -> list[tuple[str, Machine | None, Migration | None]]:
        """What is here, by name."""

    def all_machines(self) -> list[tuple[str, Machine | None, Migration | None]]:
        """`machines`, and those that have left lately, for metrics."""
        return self.machines()

    def settings(self) -> Json:
        return {}

    def listening(self) -> list[str]:
        return []

    def status(self, name: str | None = None) -> Json:
        """Of the process and all machines, or of the one with this name."""
        machines = [
            machine_status(*item) for item in self.machines() if name is None or item[0] == name
        ]  # fmt: skip
        if name is not None and not machines:
            raise ControlError("BadArguments", f"there is no machine {name!r} here")
        return {
            "side": self.side,
            "pid": os.getpid(),
            "listening": self.listening(),
            "settings": self.settings(),
            "machines": machines,
        }

    async def execute(self, request: Request) -> Json:
        """For `ControlServer`."""
        await trio.lowlevel.checkpoint()
        if request.command == "status":
            return self.status(request.arguments.get("machine"))
        handlers = self.handlers()
        if request.command == "commands":
            known = {"commands", "status", "events"} | handlers.keys()
            return {
                "commands": [
                    {"name": name, "help": command.help, "arguments": list(command.arguments)}
                    for name, command in COMMANDS.items()
                    if name in known
                ]
            }
        handler = handlers.get(request.command)
        if handler is None:
            raise ControlError("CommandNotFound", f"{request.command} has no meaning for {self._called()}")
        return await handler(request.arguments)

    def _called(self) -> str:
        return {
            "source": "a source that migrates once: `postcopy source --hold` takes orders",
            "dest": "a destination",
        }.get(self.side, f"a {self.side}")
