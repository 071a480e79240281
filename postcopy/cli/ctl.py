# SPDX-License-Identifier: Apache-2.0
"""`postcopy ctl`: a person's way to the control socket."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import trio

from postcopy._stop import Stop
from postcopy.cli._parser import add_command, add_option, with_default
from postcopy.cli.sides import Run
from postcopy.cli.top import Top
from postcopy.errors import ConfigurationError, MigrationError, known_error
from postcopy.output import Output
from postcopy.output.words import format_duration
from postcopy.records import Json
from postcopy.service import options
from postcopy.service.client import ControlClient, ProcessGoneError
from postcopy.service.options import CONTROL, default_control, flag
from postcopy.service.render import render_answer
from postcopy.service.schema import COMMANDS, ControlError
from postcopy.units import format_size

TOP = "top"
TOP_HELP = "show all machines and migrations of the process as they change, until `q` or Ctrl-C"
_REVERSIBLE = ("connecting", "setup", "active")
"""Statuses before the point of no return."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A parser for each request. What it may be given is checked here as it is by the process that is asked."""
    add_option(parser, CONTROL)
    requests = parser.add_subparsers(dest="request", required=True, metavar="REQUEST", title="requests")
    for name, command in COMMANDS.items():
        help = "show events until the process ends, or Ctrl-C" if name == "events" else command.help
        request = add_command(requests, name, help, examples=[("", command.example)])
        defaults = options.defaults("daemon") if name == "start" else {}
        for option in command.options if name != "events" else ():
            bare = option.name == command.bare
            nargs = "?" if bare and option.name != command.required else None
            help = with_default(option, defaults.get(option.key))
            add_option(request, replace(option, field=option.name, help=help, positional=bare, nargs=nargs))
        if name == "migrate":
            add_option(request, flag("detach", "do not wait until the machine has moved; `ctl top` shows it"))
        add_option(request, CONTROL)
        add_option(request, flag("json", "print the answer as JSON"))
    top = add_command(requests, TOP, TOP_HELP, examples=[("", "postcopy ctl top")])
    add_option(top, CONTROL)


def make(given: dict[str, Any], output: Output) -> Run:
    return CtlCommand(given, output).run


class CtlCommand:
    """One request, its answer on stdout: for people, or with `--json` as it came."""

    def __init__(self, given: dict[str, Any], output: Output) -> None:
        self._request = str(given["request"])
        self._socket = str(given.get("control") or default_control())
        self._json = "json" in given
        self._detach = "detach" in given
        known = COMMANDS[self._request].arguments if self._request in COMMANDS else {}
        self._arguments = {name: option.to_json(given[name]) for name, option in known.items() if name in given}
        self._output = output
        self._migration = ""  # the id of the one that is waited for
        self._now: Json = {}  # how that stands
        self._asked = f"postcopy ctl --control {self._socket}" if "control" in given else "postcopy ctl"

    async def run(self, stop: Stop) -> bool:
        """True when it was done. `ConfigurationError` for what the process does not understand."""
        done = False
        async with trio.open_nursery() as nursery:

            async def interruption() -> None:
                await stop.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(interruption)
            try:
                if self._request == TOP:
                    done = await Top(self._socket, self._output).run()
                else:
                    async with ControlClient.open(self._socket, checks=True) as client:
                        done = await self._do(client)
            except* ControlError as group:
                error = known_error(group)
                if isinstance(error, ControlError) and error.kind in ("BadArguments", "CommandNotFound"):
                    raise ConfigurationError(str(error)) from error
                raise
            nursery.cancel_scope.cancel()
        if self._request == "migrate" and self._now and not done and stop.is_set():
            self._say_that_it_goes_on()
        # What is followed until interrupted succeeds so.
        return done or (self._request in ("events", TOP) and stop.is_set())

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
        # (which machine that is, when it has but one, the process says with its answer: when it is on its way)
        self._now = {"side": "source", "name": self._arguments.get("machine", "migration"), "status": "connecting"}
        async with trio.open_nursery() as nursery:
            if not self._json:
                nursery.start_soon(self._output.follow, lambda: self._now)
            answer = await client.execute("migrate", self._arguments)
            self._migration = str(answer["migration-id"])
            self._now["name"] = self._arguments["machine"] = answer["machine"]
            ended = await self._until_ended(client)
            nursery.cancel_scope.cancel()
        name, status = ended["machine"], ended["status"]
        if self._json:
            self._print(json.dumps(ended))
        if status != "completed":
            raise MigrationError(f"{name} has not moved: {status}{': ' + ended['error'] if ended['error'] else ''}")
        if not self._json:
            times = (
                f"{what} {format_duration(ended[key] / 1e3)}"
                for what, key in (("downtime", "downtime-ms"), ("total time", "total-ms"))
                if key in ended  # else the destination has told the end of it alone
            )
            self._print(f"{name} has moved to {ended.get('peer')}: {', '.join(times) or 'its times are not known'}")
        return True

    async def _until_ended(self, client: ControlClient) -> Json:
        """Takes what is told of the migration; how it has ended."""
        while True:
            event = await client.next_event()
            kind, data = event["event"], event["data"]
            if kind == "progress":
                for machine in data.get("machines", []):
                    job = machine.get("migration") or {}
                    if self._is_it(machine["name"], job):
                        size = format_size(machine["memory"])
                        self._output.view.subject = f"{machine['name']}, {size}, to {job.get('peer')}"
                        self._now |= {key: job.get(key) for key in ("status", "ram", "attempts", "recoveries")}
                        self._now["guest"] = machine.get("guest") or {}
            elif kind == "migration-ended" and self._is_it(data["machine"], data):
                return dict(data)
            elif kind == "migration-status" and self._is_it(data["machine"], data):
                self._now |= {key: data.get(key) for key in ("status", "attempts")}
                if data["status"] == "completed":
                    self._now["ram"] = None  # as it was before: 3 % of it had been sent
                if data["error"] and data["status"] == "connecting":
                    self._output.say(f"{data['machine']}: {data['error']}; trying again (attempt {data['attempts']})")
                elif data["error"]:
                    self._output.say(f"{data['machine']}: {data['status']}: {data['error']}")
                self._output.kick()

    def _is_it(self, machine: str, data: Json) -> bool:
        # Another attempt has another id, or none yet. (Sent to where it is, a machine has a migration of each
        # direction.)
        same = data.get("migration-id") == self._migration or (data.get("attempts") or 1) > 1
        return same and machine == self._now["name"] and data.get("direction") == "outgoing"

    def _say_that_it_goes_on(self) -> None:
        name = self._arguments.get("machine", "")
        of, which = (f" of {name}", f" --machine {name}") if name else ("", "")
        known = "" if self._migration else ", if it has begun"  # (the answer comes when it is connected)
        self._output.say(f"postcopy: the migration{of} goes on{known}; `{self._asked} top` shows it")
        if self._now["status"] in _REVERSIBLE:
            self._output.say(f"postcopy: to stop it: {self._asked} migrate-cancel{which}")
        else:
            self._output.say("postcopy: it cannot be stopped any more: it is past its point of no return")

    async def _follow(self, client: ControlClient) -> bool:
        """Until the process ends, nobody reads the events, or this one is interrupted: each is an end in order."""
        self._output.patient = False
        await client.execute("events", {"enable": True})
        while True:
            try:
                event = await client.next_event()
            except ProcessGoneError:
                return True
            text = json.dumps(event) if self._json else "" if event["event"] == "progress" else _event_line(event)
            if text and not self._print(text):
                return True

    def _print(self, text: str) -> bool:
        """False when nobody reads it."""
        try:
            print(text)
        except BrokenPipeError:
            return False
        return True


def _event_line(event: Json) -> str:
    data = event.get("data", {})
    shown = {key: value for key, value in data.items() if isinstance(value, str | int | float) and value != ""}
    return f"{event['event']}: " + ", ".join(f"{key} {value}" for key, value in shown.items())
