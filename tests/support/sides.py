# SPDX-License-Identifier: Apache-2.0
"""Sources and destinations as the real processes that a user starts, seen through their JSON lines."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import warm
from lines import Json, parse_answer, parse_control_line, parse_lines

DEADLINE_S = 60.0


class Side:
    """One `postcopy` process; killed with its test by `spawn_child`."""

    parse = staticmethod(parse_lines)

    def __init__(
        self,
        spawn_child: Callable[..., Any],
        *arguments: str | os.PathLike[str],
        command: Sequence[str] = (sys.executable, "-m", "postcopy"),
    ) -> None:
        self._child = spawn_child([*command, *arguments])
        self._lines: list[Json] = []  # each is parsed once
        self._parsed = 0

    @property
    def lines(self) -> list[Json]:
        text = self._child.output()
        size = text.rfind("\n") + 1
        self._lines += self.parse(text[self._parsed : size])
        self._parsed = size
        return self._lines

    def events(self, name: str) -> list[Json]:
        return [line for line in self.lines if line["event"] == name]

    def wait_for(self, what: str, found: Callable[[Json], bool], deadline_s: float = DEADLINE_S) -> Json:
        """The first line of which `found` is true."""
        deadline = time.monotonic() + deadline_s
        while True:
            ended = self._child.process.poll() is not None
            for line in self.lines:
                if found(line):
                    return line
            assert not ended, f"ended before {what}:\n{self._child.output()[-2000:]}\n{self._child.errors()}"
            assert time.monotonic() < deadline, f"no {what}:\n{self._child.output()[-2000:]}\n{self._child.errors()}"
            time.sleep(0.005)

    def wait_for_errors(self, text: str, deadline_s: float = DEADLINE_S) -> None:
        """Until it has said `text` on standard error."""
        deadline = time.monotonic() + deadline_s
        while text not in self._child.errors():
            assert time.monotonic() < deadline, f"no {text!r}:\n{self._child.errors()}"
            time.sleep(0.005)

    def wait_status(self, status: str) -> Json:
        """The first line of progress, or the result, that has it."""
        return self.wait_for(
            f"status {status}", lambda line: line["event"] in ("progress", "result") and line.get("status") == status
        )

    @property
    def address(self) -> str:
        line = self.wait_for("address", lambda line: line["event"] == "listening")
        return str(line["address"])

    def operations_after(self, line: Json) -> int:
        """The machine's counter, once it is larger here than in `line`, of this process or of where it came from."""
        before = line["guest"]["operations"]
        later = self.wait_for(
            f"more than {before} operations",
            lambda other: other["event"] == "progress" and other.get("guest", {}).get("operations", 0) > before,
        )
        return int(later["guest"]["operations"])

    @property
    def pid(self) -> int:
        return int(self._child.pid)

    def signal(self, number: int) -> None:
        self._child.send_signal(number)

    def abandon(self, number: int = 15, send: Callable[[], None] | None = None) -> None:
        """Asks it to end, and insists when it has said what would be lost. `send`: how a signal reaches it, where its
        process is not the one that was started here."""
        ask = send or partial(self.signal, number)
        ask()
        self.wait_for_errors("again within")
        deadline = time.monotonic() + DEADLINE_S
        while "Abandoning" not in self._child.errors():  # what comes right after the first one is part of it
            ask()
            assert time.monotonic() < deadline, f"it was not abandoned:\n{self._child.errors()}"
            time.sleep(0.02)

    def end(self, deadline_s: float = DEADLINE_S) -> tuple[int, Json, str]:
        """Exit status, result, standard error."""
        done = self._child.wait(deadline_s)
        assert "Traceback" not in done.stderr, done.stderr
        results = self.events("result")
        assert len(results) <= 1
        return done.returncode, results[0] if results else {}, done.stderr


class Operator:
    """`postcopy ctl` on one socket, of a process that may have been started just now."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _until_it_listens(self) -> None:
        """Its path is there a moment before connections are taken."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            with socket.socket(socket.AF_UNIX) as attempt:
                if not attempt.connect_ex(str(self.path)):
                    return
            time.sleep(0.01)

    def ask(self, *arguments: object, status: int = 0) -> tuple[str, str]:
        """What it says on stdout and stderr."""
        words = ["ctl", "--control", str(self.path), *(str(one) for one in arguments)]
        if not status:
            self._until_it_listens()
        done = warm.run(words, deadline_s=DEADLINE_S)
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout, done.stderr

    def tell(self, *arguments: object) -> Json:
        return parse_answer(self.ask(*arguments, "--json")[0], [str(one) for one in arguments])

    def request(self, command: str, **arguments: object) -> Json:
        """Its answer, without a process in between: for what is asked often, or has to be there in time."""
        self._until_it_listens()
        with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as file:
            connection.settimeout(DEADLINE_S)
            connection.connect(str(self.path))
            file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            file.flush()
            assert "postcopy" in parse_control_line(file.readline())
            answer = parse_control_line(file.readline(), command)
            assert "return" in answer, answer
            returned: Json = answer["return"]
            return returned

    def machines(self) -> dict[str, Json]:
        return {machine["name"]: machine for machine in self.request("status")["machines"]}

    def wait(self, what: str, found: Callable[[dict[str, Json]], bool]) -> dict[str, Json]:
        """Until `found` is true of the machines here. What it looks for may not be there yet: a machine that comes, a
        field that only a migration that is paused has."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            machines = self.machines()
            why = ""
            try:
                if found(machines):
                    return machines
            except (KeyError, TypeError) as error:
                why = f" ({error!r})"
            assert time.monotonic() < deadline, f"no {what}: {machines}{why}"
            time.sleep(0.01)
