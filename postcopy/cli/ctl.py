# SPDX-License-Identifier: Apache-2.0
"""`postcopy ctl`: a person's way to the control socket."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

import trio

from postcopy.cli._parser import add_option
from postcopy.cli.sides import Run
from postcopy.errors import ConfigurationError, MigrationError, PeerError
from postcopy.output import Output
from postcopy.service.client import ControlClient
from postcopy.service.options import CONTROL, default_control, flag
from postcopy.service.render import render_answer
from postcopy.service.schema import COMMANDS, ControlError, Json, plain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A parser for each request. What it may be given is checked here as it is by the process that is asked."""
    add_option(parser, CONTROL)
    requests = parser.add_subparsers(dest="request", required=True, metavar="REQUEST")
    for name, command in COMMANDS.items():
        help = "show what happens until it ends, or Ctrl-C" if name == "events" else command.help
        request = requests.add_parser(name, help=help, allow_abbrev=False)
        add_option(request, CONTROL)
        add_option(request, flag("json", "the answer in JSON, as it came"))
        for option in command.options if name != "events" else ():
            bare = option.name == command.bare
            nargs = "?" if bare and option.name != command.required else None
            add_option(request, replace(option, field=option.name, positional=bare, nargs=nargs))
        if name == "migrate":
            add_option(request, flag("detach", "do not wait until it has moved"))


def make(given: dict[str, Any], output: Output) -> Run:
    return CtlCommand(given, output).run


class CtlCommand:
    """One request, its answer on stdout: for people, or with `--json` as it came."""

    def __init__(self, given: dict[str, Any], output: Output) -> None:
        self._request = str(given["request"])
        self._socket = str(given.get("control") or default_control())
        self._json = "json" in given
        self._detach = "detach" in given
        self._arguments = {name: plain(given[name]) for name in COMMANDS[self._request].arguments if name in given}
        self._output = output

    async def run(self, stop: trio.Event) -> bool:
        """True when it was done. `ConfigurationError` for what the process does not understand."""
        done = False
        async with trio.open_nursery() as nursery:

            async def interruption() -> None:
                await stop.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(interruption)
            try:
                async with ControlClient.open(self._socket) as client:
                    done = await self._do(client)
            except ControlError as error:
                if error.kind in ("BadArguments", "CommandNotFound"):
                    raise ConfigurationError(str(error)) from error
                raise
            nursery.cancel_scope.cancel()
        # Events are followed until interrupted: that is how it succeeds.
        return done or (self._request == "events" and stop.is_set())

    async def _do(self, client: ControlClient) -> bool:
        if self._request == "events":
            return await self._follow(client)
        if self._request == "migrate" and not self._detach:
            return await self._migrate(client)
        answer = await client.execute(self._request, self._arguments)
        text = json.dumps(answer) if self._json else render_answer(self._request, answer)
        if text:
            self._print(text)
        return True

    async def _migrate(self, client: ControlClient) -> bool:
        """Until it has ended, one way or the other."""
        await client.execute("events", {"enable": True})
        migration = (await client.execute("migrate", self._arguments))["migration"]
        while True:
            event = await client.next_event()
            data = event["data"]
            # (sent to where it is, it has one of each direction)
            if data.get("migration") != migration or data.get("direction") != "outgoing":
                continue
            if event["event"] == "migration-status":
                why = f": {data['error']}" if data["error"] else ""
                self._output.say(f"{data['machine']}: {data['status']}{why}")
            elif event["event"] == "migration-ended":
                if self._json:
                    self._print(json.dumps(data))
                elif data["status"] == "completed":
                    self._print(
                        f"{data['machine']} has moved to {data['peer']}: down for {data['downtime-ms']:.1f} ms,"
                        f" all of it there after {data['total-ms']:.1f} ms"
                    )
                if data["status"] != "completed":
                    raise MigrationError(f"{data['machine']}: {data['status']}: {data['error']}")
                return True

    async def _follow(self, client: ControlClient) -> bool:
        """Until the process ends, which is an end in order, or this one is interrupted."""
        await client.execute("events", {"enable": True})
        while True:
            try:
                event = await client.next_event()
            except PeerError:
                return True
            if self._json:
                self._print(json.dumps(event))
            elif event["event"] != "progress":
                self._print(_event_line(event))

    def _print(self, text: str) -> None:
        try:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            raise PeerError("nobody reads the output any more") from None


def _event_line(event: Json) -> str:
    data = event.get("data", {})
    shown = {key: value for key, value in data.items() if isinstance(value, str | int | float) and value != ""}
    return f"{event['event']}: " + ", ".join(f"{key} {value}" for key, value in shown.items())
