# SPDX-License-Identifier: Apache-2.0
"""The installed program as processes that are watched from outside: their lines, their memory, their end.

POSTCOPY_COMMAND names the program that is attacked (default: the one beside this interpreter), so that the same tests
can be run against another installation.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lines import parse_control_line, parse_line
from sessions import end_session

Json = dict[str, Any]
DEADLINE_S = 60.0
"""For whatever is certain to come; long, since it is waited for beside other tests."""
POLL_S = 0.005
MIB = 1 << 20
ADDRESS_SPACE_BYTES = 16 << 30
"""No process here may take the machine with it, whatever it is made to do."""

RV64 = ("--machine", "rv64", "--memory", "16MiB", "--workload", "random", "--used-memory", "4MiB")


def command() -> list[str]:
    if given := os.environ.get("POSTCOPY_COMMAND"):
        return shlex.split(given)
    beside = Path(sys.executable).with_name("postcopy")
    return [str(beside)] if beside.exists() else [sys.executable, "-P", "-m", "postcopy"]


def python() -> str:
    """The interpreter that the attacked program runs in, for attacks through its library."""
    beside = Path(command()[0]).with_name("python")
    return str(beside) if beside.exists() else sys.executable


def wait_until(what: str, found: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    """What `found` returns, once that is true."""
    deadline = time.monotonic() + deadline_s
    while not (value := found()):
        assert time.monotonic() < deadline, f"no {what} within {deadline_s:g} s"
        time.sleep(POLL_S)
    return value


class Program:
    """One process in a session of its own, which is killed with all that it has left behind."""

    def __init__(
        self,
        *arguments: object,
        before: Sequence[str] = (),
        argv: Sequence[str] | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int | None = None,
        stderr: int | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """``before``: a command that runs the rest; ``argv``: instead of `postcopy`; ``stdout``, ``stderr``: a
        descriptor instead of a file that can be read here."""
        self._files = contextlib.ExitStack()
        self._stdout = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # closed with the others
        self._stderr = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self._parsed: list[Json] = []
        self._parsed_bytes = 0
        self.argv = [*before, *(command() if argv is None else argv), *map(str, arguments)]
        self.process = subprocess.Popen(
            self.argv,
            stdin=stdin,
            stdout=self._stdout if stdout is None else stdout,
            stderr=self._stderr if stderr is None else stderr,
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            start_new_session=True,
        )
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it may have a lower limit already
            resource.prlimit(self.pid, resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
            resource.prlimit(self.pid, resource.RLIMIT_CORE, (0, 0))

    # ---- what it says

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        return _read(self._stdout)

    def errors(self) -> str:
        return _read(self._stderr)

    def error_bytes(self) -> int:
        return os.fstat(self._stderr.fileno()).st_size

    def lines(self) -> list[Json]:
        """The JSON lines so far; each is parsed once."""
        size = os.fstat(self._stdout.fileno()).st_size
        if size > self._parsed_bytes:
            whole, newline, _ = os.pread(
                self._stdout.fileno(), size - self._parsed_bytes, self._parsed_bytes
            ).rpartition(b"\n")
            self._parsed += [parse_line(line) for line in whole.split(b"\n") if line]
            self._parsed_bytes += len(whole) + len(newline)
        return self._parsed

    def events(self, name: str) -> list[Json]:
        return [line for line in self.lines() if line["event"] == name]

    def wait_for(
        self, what: str, found: Callable[[Json], bool], deadline_s: float = DEADLINE_S, after: int = 0
    ) -> Json:
        """The first line, after so many, of which `found` is true."""
        deadline = time.monotonic() + deadline_s
        seen = after
        while True:
            ended = self.process.poll() is not None
            lines = self.lines()
            for line in lines[seen:]:
                if found(line):
                    return line
            seen = len(lines)
            assert not ended, f"{self} ended before {what}:\n{self.tail()}"
            assert time.monotonic() < deadline, f"{self}: no {what}:\n{self.tail()}"
            time.sleep(POLL_S)

    def wait_status(self, *statuses: str, deadline_s: float = DEADLINE_S, after: int = 0) -> Json:
        """The first line of progress, or the result, that has one of them."""
        return self.wait_for(
            f"status {' or '.join(statuses)}",
            lambda line: line["event"] in ("progress", "result") and line.get("status") in statuses,
            deadline_s,
            after,
        )

    def wait_errors(self, text: str, deadline_s: float = DEADLINE_S) -> None:
        wait_until(f"{text!r} from {self}", lambda: text in self.errors(), deadline_s)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = str(self.where).rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def where(self) -> str:
        return str(self.wait_for("address", lambda line: line["event"] == "listening")["address"])

    def operations_go_on(self, after: int = 0) -> None:
        """The machine computes: its counter grows."""
        first: int | None = None

        def grew(line: Json) -> bool:
            nonlocal first
            count = (line.get("guest") or {}).get("operations")
            if count is None or (line.get("guest") or {}).get("state") != "running":
                return False
            first = count if first is None else first
            return bool(count > first)

        self.wait_for("operations", grew, after=after)

    def tail(self) -> str:
        return f"{self.output()[-2000:]}\n{self.errors()[-4000:]}"

    def __str__(self) -> str:
        return f"[{self.pid}] {' '.join(self.argv)[-160:]}"

    # ---- what it is

    def alive(self) -> bool:
        return self.process.poll() is None

    def _status(self, key: str) -> int:
        try:
            text = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return 0
        return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{key}:")), 0)

    def rss_bytes(self) -> int:
        return self._status("VmRSS") * 1024

    def peak_bytes(self) -> int:
        """The most memory that it has had, since `forget_peak`."""
        return self._status("VmHWM") * 1024

    def forget_peak(self) -> int:
        """The peak counts anew from what it has now, which is returned."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        return self.rss_bytes()

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def children(self) -> list[int]:
        found = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += [int(pid) for pid in (task / "children").read_text().split()]
        return found

    # ---- its end

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def abandon(self, number: int = 15) -> None:
        """Asks it to end, and insists when it has said what would be lost."""
        self.signal(number)
        self.wait_errors("again within")

        def insisted() -> bool:
            self.signal(number)  # what comes right after the first one is part of it
            return "Abandoning" in self.errors()

        wait_until(f"{self} gives up", insisted)

    def end(self, deadline_s: float = DEADLINE_S) -> int:
        """Its exit status. It has ended by itself, in time, and without a traceback."""
        try:
            status = self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self} has not ended in {deadline_s:g} s:\n{self.tail()}") from None
        self.check()
        return status

    def result(self) -> Json:
        results = self.events("result")
        assert len(results) == 1, self.tail()
        return results[0]

    def check(self) -> None:
        """A traceback is a mistake in the program, whatever was done to it."""
        assert "Traceback" not in self.errors(), f"{self}:\n{self.errors()[-8000:]}"

    def kill(self) -> None:
        """Harmless when it has ended."""
        for pid in self.children() if self.alive() else []:  # a pager's process has a session of its own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        end_session(self.process)

    def close(self) -> None:
        with self._files:
            self.kill()


def _read(file: IO[bytes]) -> str:
    # pread: the offset is the program's own
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


# ---- The control socket, by a client of our own


class Refusal(Exception):
    def __init__(self, error: Json) -> None:
        super().__init__(f"{error.get('class')}: {error.get('desc')}")
        self.kind = str(error.get("class"))


class Control:
    """Asks one thing at a time, each on a connection of its own, so that a client that was hung up on shows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def ask(self, execute: str, deadline_s: float = DEADLINE_S, **arguments: object) -> Json:
        """`Refusal` where the answer is an error."""
        request = {"execute": execute, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.path))  # blocking: without, a full backlog is an error at once (unix(7))
            connection.settimeout(deadline_s)
            with connection.makefile("rwb") as file:
                assert "postcopy" in parse_control_line(file.readline())
                file.write(json.dumps(request).encode() + b"\n")
                file.flush()
                said = file.readline()
                answer = parse_control_line(said, execute) if said else {"error": {"class": "HungUp"}}
        if "return" not in answer:
            raise Refusal(answer["error"])
        returned: Json = answer["return"]
        return returned

    def begin(self, execute: str, **arguments: Any) -> Asking:
        return Asking(self, execute, arguments)

    def refused(self, execute: str, **arguments: Any) -> str:
        """Why."""
        try:
            answer = self.ask(execute, **arguments)
        except Refusal as refusal:
            return str(refusal)
        raise AssertionError(f"{execute} was not refused: {answer}")

    def machines(self, deadline_s: float = DEADLINE_S) -> dict[str, Json]:
        return {machine["name"]: machine for machine in self.ask("status", deadline_s)["machines"]}

    def migration(self, name: str) -> Json:
        machine = self.machines().get(name) or {}
        migration: Json = machine.get("migration") or {}
        return migration

    def wait_status(self, name: str, *statuses: str, deadline_s: float = DEADLINE_S) -> Json:
        deadline = time.monotonic() + deadline_s
        while True:
            here = self.machines()
            migration: Json = (here.get(name) or {}).get("migration") or {}
            if migration.get("status") in statuses:
                return migration
            assert time.monotonic() < deadline, f"{name} is not {' or '.join(statuses)}: {here}"
            time.sleep(0.02)


class Asking(threading.Thread):
    """A request whose answer is waited for meanwhile."""

    def __init__(self, control: Control, execute: str, arguments: Mapping[str, Any]) -> None:
        super().__init__(daemon=True)
        self._control = control
        self._execute = execute
        self._arguments = arguments
        self._answer: Json | Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._answer = self._control.ask(self._execute, DEADLINE_S, **self._arguments)
        except (OSError, ValueError, AssertionError, Refusal) as error:
            self._answer = error

    def answer(self, deadline_s: float = DEADLINE_S) -> Json:
        """`Refusal` where it is an error."""
        self.join(deadline_s)
        assert self._answer is not None, f"{self._execute} is not answered in {deadline_s:g} s"
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


class Pulse(threading.Thread):
    """Asks a process how it is, again and again: the longest answer tells how long nothing else was done there."""

    def __init__(self, control: Control) -> None:
        super().__init__(daemon=True)
        self._control = control
        self._over = threading.Event()
        self.longest_s = 0.0
        self.failure: BaseException | None = None
        self.answers = 0

    def run(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            try:
                self._control.ask("status")
            except (OSError, ValueError, AssertionError, Refusal) as error:
                self.failure = error
                return
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            self.answers += 1
            self._over.wait(0.02)

    def __enter__(self) -> Pulse:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join(DEADLINE_S)

    def check(self, at_most_s: float) -> None:
        assert self.failure is None, f"a client was not answered: {self.failure!r}"
        assert self.answers
        assert self.longest_s < at_most_s, f"a client waited {self.longest_s:.2f} s for its answer"


def verify(start: Callable[..., Program], control: Control, name: str) -> None:
    """Moves a daemon's machine to a destination that replays all that it has done, and compares its memory."""
    last = start("dest", "--json", "--listen", "127.0.0.1:0", "--run-for", "0.1")
    control.ask("migrate", machine=name, to=last.where)
    assert last.end() == 0, last.tail()
    assert last.result()["verified"] is True


@contextlib.contextmanager
def starter() -> Iterator[Callable[..., Program]]:
    """``start(*arguments)``: a `Program` that ends with the block; no program may have shown a traceback."""
    programs: list[Program] = []
    with contextlib.ExitStack() as stack:

        def start(*arguments: object, **keywords: Any) -> Program:
            program = Program(*arguments, **keywords)
            stack.callback(program.close)
            programs.append(program)
            return program

        yield start
        for program in programs:
            program.check()
