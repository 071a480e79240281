# SPDX-License-Identifier: Apache-2.0
"""`postcopy ctl`: a person's way to the control socket."""

from __future__ import annotations

import argparse
import json
import sys

import trio

from postcopy.errors import ConfigurationError, MigrationError, PeerError
from postcopy.output import Output
from postcopy.service.client import ControlClient
from postcopy.service.schema import ControlError, Json
from postcopy.service.status import render_answer


class CtlCommand:
    """One request, its answer on stdout: for people, or with `--json` as it came."""

    def __init__(self, args: argparse.Namespace, output: Output) -> None:
        self._args = args
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
                async with ControlClient.open(self._args.socket) as client:
                    done = await self._do(client)
            except ControlError as error:
                if error.kind in ("BadArguments", "CommandNotFound"):
                    raise ConfigurationError(str(error)) from error
                raise
            nursery.cancel_scope.cancel()
        # Events are followed until interrupted: that is how it succeeds.
        return done or (self._args.request == "events" and stop.is_set())

    async def _do(self, client: ControlClient) -> bool:
        args = self._args
        arguments = {name.replace("_", "-"): getattr(args, name) for name in args.sent}
        arguments = {name: value for name, value in arguments.items() if value is not None}
        if args.request == "events":
            return await self._follow(client)
        if args.request == "migrate" and not args.detach:
            return await self._migrate(client, arguments)
        answer = await client.execute(args.request, arguments)
        text = json.dumps(answer) if args.json else render_answer(args.request, answer)
        if text:
            self._print(text)
        return True

    async def _migrate(self, client: ControlClient, arguments: Json) -> bool:
        """Until it has ended, one way or the other."""
        await client.execute("events", {"enable": True})
        migration = (await client.execute("migrate", arguments))["migration"]
        while True:
            event = await client.next_event()
            data = event["data"]
            # (sent to where it is, it has one of each direction)
            if data.get("migration") != migration or data.get("direction") != "outgoing":
                continue
            if event["event"] == "migration-status":
                self._output.say(
                    f"{data['machine']}: {data['status']}" + (f": {data['error']}" if data["error"] else "")
                )
            elif event["event"] == "migration-ended":
                if self._args.json:
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
            if self._args.json:
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
