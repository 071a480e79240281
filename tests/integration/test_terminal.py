# SPDX-License-Identifier: Apache-2.0
"""What a person sees: a terminal of 80 columns, or plain lines where there is none."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from screen import Screen
from sessions import end_session

pytestmark = [pytest.mark.needs("uffd-user"), pytest.mark.slow]
DEADLINE_S = 60.0
POSTCOPY = (sys.executable, "-P", "-m", "postcopy")
MACHINE = ("--machine", "rv64", "--memory", "16MiB", "--vcpus", "1")
DEMO = ("demo", *MACHINE, "--run-for", "0.2")
_CONTROLS = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]|\r")
_PICTURE = re.compile(r"\x1b\[\?7l(.*?)\x1b\[\?7h", re.DOTALL)
SHELL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
if not (job := os.fork()):
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execv(sys.argv[1], sys.argv[1:])
while True:
    status = os.waitpid(job, os.WUNTRACED)[1]
    os.tcsetpgrp(0, os.getpgrp())
    if not os.WIFSTOPPED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
    print("stopped", flush=True)
    assert sys.stdin.readline() == "fg\\n"
    os.tcsetpgrp(0, job)
    os.killpg(job, signal.SIGCONT)
"""
"""As much of one as Ctrl-Z needs."""


class Terminal:
    """A process on a terminal of its own, and all that it has written there."""

    def __init__(
        self, *arguments: str, columns: int = 80, rows: int = 40, shell: bool = False, **environment: str
    ) -> None:
        """`shell`: it is a job of one, `process` is the shell."""
        self._controlling, terminal = os.openpty()
        self._size = columns, rows
        self.resize(columns, rows)
        self.mode_before = self.mode  # of its process
        given = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
        self.process = subprocess.Popen(
            [*((sys.executable, "-c", SHELL) if shell else ()), *POSTCOPY, *arguments],
            stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
            env={**given, "TERM": "xterm", **environment},
        )  # fmt: skip
        os.close(terminal)
        self.raw = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has it open any more
            while more := os.read(self._controlling, 65536):
                self.raw += more.decode()

    @property
    def text(self) -> str:
        return _CONTROLS.sub("", self.raw)

    def wait_for(self, text: str, count: int = 1) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while self.text.count(text) < count:
            assert self.process.poll() is None or self._reader.is_alive(), self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.01)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._controlling, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self._controlling, keys)

    @property
    def mode(self) -> list[Any]:
        """How it treats keys: as its process has asked for it."""
        return termios.tcgetattr(self._controlling)

    @property
    def screen(self) -> Screen:
        """What is seen on it, if it was never resized."""
        screen = Screen(*self._size)
        screen.feed(self.raw)
        return screen

    def wait_for_picture(self, found: Callable[[list[str]], bool], since: int = 0) -> list[str]:
        """The rows of one that is drawn after so many characters."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for picture in _PICTURE.findall(self.raw, since):
                rows: list[str] = _CONTROLS.sub("", picture).split("\n")
                if found(rows):
                    return rows
            assert time.monotonic() < deadline, self.raw[since:]
            time.sleep(0.01)

    def end(self) -> tuple[int, str]:
        status = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        return status, self.text

    def close(self) -> None:
        end_session(self.process)
        self._reader.join(DEADLINE_S)
        os.close(self._controlling)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **more: Any) -> Terminal:
            opened = Terminal(*arguments, **more)
            stack.callback(opened.close)
            return opened

        yield start


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*POSTCOPY, *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_a_demo_on_a_terminal(terminal: Callable[..., Terminal]) -> None:
    # On such a network the memory takes at least 4 s, however fast the guest asks for it: many pictures. (What lasts
    # for less than one, as booting may, is not always seen.)
    network = ("--bulk-channels", "1", "--chaos", "slow:rate=2MiB/s")
    one = terminal(*DEMO, "--migrate-after", "1.5", *network)
    status, text = one.end()
    assert status == 0, text
    screen = one.screen
    assert screen.as_it_was
    assert "elapsed" not in screen.text  # nothing is left of the view
    for words in ("before migrating", "fetching pages; the machine runs here", "elapsed"):
        assert words in text
    assert re.search(r"about +\d+ s remaining", text)
    assert re.search(r"^map      [·░▒▓█]{64}$", text, re.MULTILINE)
    assert re.search(r"faults   median +\d+(\.\d+)? [mµ]?s", text)
    assert not re.search(r"\d\.\d+e[+-]\d", text)
    _, title, result = text.partition("postcopy demo: rv64, 16 MiB, 1 vCPU, workload random: completed")
    assert title
    assert all(len(line) <= 80 for line in result.splitlines())
    assert "fault latency" in result
    assert "marks" not in text
    assert "n/a" not in text


def test_a_demo_without_a_terminal() -> None:
    done = run(*DEMO, "--migrate-after", "0", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("source: ")
    assert all(re.match(r"(source|dest): [a-z]", line) and "; time: " in line for line in lines), lines
    assert len(lines) == len(set(lines))
    assert done.stdout.startswith("postcopy demo: rv64, 16 MiB, 1 vCPU, workload random: completed\n")
    assert "\x1b" not in done.stdout + done.stderr
    # No word is broken: all that a wide terminal shows is there.
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert "the machine is the one that was booted at the source" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    "environment",
    [{"NO_COLOR": "1"}, {"TERM": "dumb", "LANG": "C", "LC_ALL": ""}, {"TERM": "vt100", "LANG": "C", "LC_ALL": ""}],
)
def test_colours_are_not_forced_on_anybody(environment: dict[str, str], terminal: Callable[..., Terminal]) -> None:
    one = terminal(*DEMO, "--migrate-after", "0", **environment)
    status, text = one.end()
    assert status == 0, text
    assert not re.search(r"\x1b\[[0-9;]*(3|4|9)[0-7]m", one.raw)  # a colour
    assert ("\x1b" in one.raw) is (environment.get("TERM") != "dumb")
    if environment.get("LANG") == "C":
        assert text.isascii()


@pytest.mark.parametrize(
    ("arguments", "reason", "status"),
    [
        (("--memory", "4MiB"), "16 MiB", 2),
        (("--deadline", "0.2"), "--deadline", 1),
        (("--machine", "image", "--image", "/nonexistent/file"), "/nonexistent", 2),
    ],
)
def test_a_demo_that_fails_says_why_once(arguments: tuple[str, ...], reason: str, status: int) -> None:
    done = run("demo", "--machine", "rv64", *arguments)
    assert done.returncode == status
    said = [
        line for line in (done.stdout + done.stderr).splitlines() if reason in line and not line.startswith("source: ")
    ]
    assert len(said) == 1, said
    assert said[0].startswith("postcopy: error: ")
    assert "Traceback" not in done.stderr


def test_the_view_fits_whatever_the_size(
    terminal: Callable[..., Terminal], daemon: Callable[..., Any], operator: Any
) -> None:
    """Below the lines, and on the whole terminal."""
    assert daemon("a", *MACHINE, "--name", "vm1" * 20).address
    at = str(operator("a").path)
    waiting = terminal("dest", "--insecure", "--listen", "127.0.0.1:0")
    top = terminal("ctl", "--control", at, "top")
    waiting.wait_for("waiting for the source")
    top.wait_for("vm1vm1")
    for columns, rows in ((40, 10), (200, 60), (20, 3), (1, 1), (80, 24)):
        seen = [len(one.raw) for one in (waiting, top)]
        for one in (waiting, top):
            one.resize(columns, rows)

        def fits(picture: list[str], columns: int = columns, rows: int = rows) -> bool:
            return len(picture) <= max(2, rows) and all(len(row) < columns or not row for row in picture)

        for one, since in zip((waiting, top), seen, strict=True):
            one.wait_for_picture(fits, since)
    waiting.process.send_signal(signal.SIGTERM)
    top.process.send_signal(signal.SIGTERM)
    assert top.end()[0] == 0
    assert waiting.end()[0] == 1


@pytest.mark.parametrize("whole", [False, True])
def test_a_terminal_is_given_back_while_it_is_not_needed(
    whole: bool, terminal: Callable[..., Terminal], daemon: Callable[..., Any], operator: Any
) -> None:
    """Ctrl-Z, `fg`, Ctrl-C."""
    if whole:
        assert daemon("a").address
        one = terminal("ctl", "--control", str(operator("a").path), "top", shell=True)
        shown = "0 machines"
    else:
        one = terminal("dest", "--insecure", "--listen", "127.0.0.1:0", shell=True)
        shown = "waiting for the source"
    one.wait_for(shown)
    assert (one.mode != one.mode_before) is whole
    assert one.screen.alternate is whole
    for count in (1, 2):
        one.type(b"\x1a")
        one.wait_for("stopped", count)
        assert one.screen.as_it_was
        assert shown not in one.screen.text
        assert one.mode == one.mode_before
        drawn = len(one.raw)
        one.type(b"fg\n")
        one.wait_for_picture(lambda picture: shown in "".join(picture), drawn)
    if whole:
        one.type(b"\x1c")  # Ctrl-\, which is no key here
    one.type(b"\x03")
    assert one.end()[0] == (0 if whole else 1)
    assert one.screen.as_it_was
    assert shown not in one.screen.text
    assert one.mode == one.mode_before


def test_a_pager_has_a_view_too(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    """Its keeper is the job of the shell, and it is another process."""
    image = tmp_path / "vm.mem"
    image.write_bytes(bytes(1 << 20))
    one = terminal("pager", "--socket", str(tmp_path / "vm.sock"), "--image", str(image), shell=True)
    shown = "pager  0 virtual machines"
    one.wait_for_picture(lambda picture: shown in "".join(picture))
    # Ctrl-Z stops the keeper only: the engine goes on, and takes away what is left of its picture.
    one.type(b"\x1a")
    one.wait_for("stopped")
    deadline = time.monotonic() + DEADLINE_S
    while shown in one.screen.text:
        assert time.monotonic() < deadline, one.screen.text
        time.sleep(0.01)
    assert "stopped" in one.screen.text
    assert one.screen.as_it_was
    drawn = len(one.raw)
    one.type(b"fg\n")
    one.wait_for_picture(lambda picture: shown in "".join(picture), drawn)
    one.type(b"\x03")
    assert one.end()[0] == 0
    assert one.screen.as_it_was
    assert "0 virtual machines" not in one.screen.text


@pytest.fixture
def two(
    daemon: Callable[..., Any], operator: Callable[[str], Any], slow_way: Callable[[str], str]
) -> tuple[Any, Any, str]:
    """Two daemons, of which the first has a machine `vm1`, and an address at which that takes long to move."""
    there = daemon("b")
    here = daemon("a", *MACHINE, "--workload", "random", "--name", "vm1")
    assert here.address  # once it listens
    operator("a").wait("machine", lambda machines: "vm1" in machines)
    return here, there, slow_way(there.address)


def test_migrate_shows_progress_and_what_came_of_it(
    two: tuple[Any, Any, str], operator: Callable[[str], Any], terminal: Callable[..., Terminal]
) -> None:
    *_, address = two
    one = terminal("ctl", "--control", str(operator("a").path), "migrate", address, "--machine", "vm1")
    status, text = one.end()
    assert status == 0, text
    assert "sending pages; the machine runs at the destination" in text
    assert re.search(r"memory +\d+ % .* of 16 MiB +[█·]{20}", text)
    assert re.search(r"vm1 has moved to 127\.0\.0\.1:\d+: downtime [0-9.]+ ms, total time [0-9.]+ m?s", text)


def test_ctrl_c_in_migrate_says_that_it_goes_on(
    two: tuple[Any, Any, str], operator: Callable[[str], Any], terminal: Callable[..., Terminal]
) -> None:
    """Before the point of no return, how to stop it; after it, that this cannot be."""
    _, there, address = two
    at = operator("a")
    there.signal(signal.SIGSTOP)  # it cannot answer
    try:
        early = terminal("ctl", "--control", str(at.path), "migrate", address, "--machine", "vm1", columns=200)
        early.wait_for("connecting to the destination")
        at.wait("migration", lambda machines: machines["vm1"]["migration"] is not None)
        early.process.send_signal(signal.SIGINT)
        status, text = early.end()
        at.ask("migrate-cancel", "--machine", "vm1")
        at.wait("end", lambda machines: machines["vm1"]["migration"]["status"] == "cancelled")
    finally:
        there.signal(signal.SIGCONT)
    assert status == 1
    assert "postcopy: the migration of vm1 goes on" in text
    assert f"postcopy ctl --control {at.path} migrate-cancel --machine vm1" in text

    late = terminal("ctl", "--control", str(at.path), "migrate", address, columns=200)
    late.wait_for("sending pages")
    late.process.send_signal(signal.SIGINT)
    status, text = late.end()
    assert status == 1
    assert "the migration of vm1 goes on" in text
    assert "cannot be stopped any more: it is past its point of no return" in text
    at.wait("departure", lambda machines: "vm1" not in machines)


def test_top(
    two: tuple[Any, Any, str], operator: Callable[[str], Any], terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    here, _, address = two
    at = operator("a")
    live = terminal("ctl", "--control", str(at.path), "top", columns=120)  # where no cell is broken into lines
    live.wait_for("1 machine, 0 migrating")
    shown, said = tmp_path / "shown", tmp_path / "said"
    with shown.open("w") as out, said.open("w") as errors:
        plain = subprocess.Popen([*POSTCOPY, "ctl", "--control", str(at.path), "top"], stdout=out, stderr=errors)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not re.search(r"^vm1 +16 MiB +running", shown.read_text(), re.MULTILINE):  # it has booted
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.02)
        at.ask("migrate", address, "--detach")
        live.wait_for("postcopy-active")
        live.wait_for("arrived")
        at.wait("departure", lambda machines: "vm1" not in machines)
        live.wait_for("0 machines, 0 migrating")
        assert live.screen.alternate
        live.type(b"q")
        assert live.end()[0] == 0
        assert live.screen.as_it_was
        assert live.screen.text == ""
        here.signal(signal.SIGTERM)
        assert plain.wait(DEADLINE_S) == 0  # the process has ended, which is an end in order
    finally:
        plain.kill()
        plain.wait()
    assert "has ended" in said.read_text()
    text = shown.read_text()
    assert "daemon  1 machine, " in text
    assert "\x1b" not in text


def test_top_ends_where_there_is_no_room_for_it(daemon: Callable[..., Any], operator: Callable[[str], Any]) -> None:
    assert daemon("a").address
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*POSTCOPY, "ctl", "--control", str(operator("a").path), "top"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "standard output: No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_top_goes_on_with_the_next_process(
    daemon: Callable[..., Any], operator: Callable[[str], Any], terminal: Callable[..., Terminal]
) -> None:
    first = daemon("a", *MACHINE, "--name", "vm1")
    assert first.address
    at = operator("a")
    live = terminal("ctl", "--control", str(at.path), "top")
    live.wait_for("vm1")
    first.signal(signal.SIGTERM)
    first.end()
    live.wait_for("ago: the process has ended")
    gone = len(live.raw)
    assert "vm1" in "".join(live.screen.lines)  # how it was
    assert daemon("a", *MACHINE, "--name", "vm2").address
    live.wait_for_picture(lambda picture: "vm2" in "".join(picture) and "ended" not in "".join(picture), gone)
    live.process.send_signal(signal.SIGTERM)
    assert live.end()[0] == 0
    assert live.screen.as_it_was


def test_sigquit_gives_the_terminal_back(
    daemon: Callable[..., Any], operator: Callable[[str], Any], terminal: Callable[..., Terminal]
) -> None:
    """From outside: the key is for keys."""
    assert daemon("a").address
    live = terminal("ctl", "--control", str(operator("a").path), "top")
    live.wait_for("0 machines")
    resource.prlimit(live.process.pid, resource.RLIMIT_CORE, (0, 0))
    live.process.send_signal(signal.SIGQUIT)
    assert live.end()[0] == -signal.SIGQUIT
    assert live.screen.as_it_was
    assert live.mode == live.mode_before
