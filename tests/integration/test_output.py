# SPDX-License-Identifier: Apache-2.0
"""Nobody reads what a process says: its work, its orders and its end do not notice."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MIB = 1 << 20
DEADLINE_S = 60.0
POSTCOPY = (sys.executable, "-P", "-m", "postcopy")


@pytest.fixture
def full() -> Iterator[int]:
    """A pipe without room, whose reader never reads."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    for size in (4096, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write_fd, b"." * size)
    os.set_blocking(write_fd, True)
    yield write_fd
    os.close(read_fd)
    os.close(write_fd)


@pytest.fixture
def unread(full: int) -> Iterator[Callable[..., Any]]:
    """``unread(*arguments)``: a `postcopy` process that says much, and is not read."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: object) -> subprocess.Popen[bytes]:
            command = [*POSTCOPY, *(str(argument) for argument in arguments), "--json", "--log-level", "debug"]
            process = stack.enter_context(subprocess.Popen(command, stdout=full, stderr=full, start_new_session=True))
            stack.callback(process.kill)
            return process

        yield start


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _wait_listening(port: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _ctl(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    deadline = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return subprocess.run(
        [*POSTCOPY, "ctl", "--control", str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.mark.needs("uffd-user")
def test_a_migration_completes(unread: Callable[..., Any], tmp_path: Path) -> None:
    image, dump = tmp_path / "image", tmp_path / "dump"
    image.write_bytes(os.urandom(4 * MIB))
    port = _free_port()
    dest = unread("dest", "--listen", f"127.0.0.1:{port}", "--dump", dump)
    _wait_listening(port)
    source = unread(
        "source", "--machine", "image", "--image", image, "--connect", f"127.0.0.1:{port}", "--max-bandwidth", "2MiB/s"
    )
    assert source.wait(DEADLINE_S) == 0
    assert dest.wait(DEADLINE_S) == 0
    assert dump.read_bytes() == image.read_bytes()


@pytest.mark.needs("uffd-user")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_both_sides(unread: Callable[..., Any], number: signal.Signals) -> None:
    port = _free_port()
    dest = unread("dest", "--listen", f"127.0.0.1:{port}")
    _wait_listening(port)
    source = unread("source", "--machine", "rv64", "--memory", "16MiB", "--listen", "127.0.0.1:0")
    for one in (source, dest):
        one.send_signal(number)
    for one in (source, dest):
        assert one.wait(DEADLINE_S) in (1, -number)  # the signal itself: it came before there was a receiver


def test_a_daemon_takes_orders(unread: Callable[..., Any], tmp_path: Path) -> None:
    at = tmp_path / "control"
    daemon = unread("daemon", "--control", at, "--machine", "rv64", "--memory", "16MiB", "--name", "vm")
    assert "vm" in _ctl(at, "status").stdout
    assert _ctl(at, "start", "rv64", "--name", "other", "--memory", "16MiB").returncode == 0
    assert _ctl(at, "end", "--machine", "other", "--force").returncode == 0
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(DEADLINE_S) == 0


def test_an_error_is_no_reason_to_stay(unread: Callable[..., Any]) -> None:
    for arguments in (("dest", "--listen", "nonsense"), ("source", "--nonsense")):
        assert unread(*arguments).wait(DEADLINE_S) == 2


def test_descriptors_that_are_closed(tmp_path: Path) -> None:
    """Nothing that the process opens gets their numbers."""
    at = tmp_path / "control"
    command = [*POSTCOPY, "daemon", "--control", str(at), "--machine", "rv64", "--memory", "16MiB"]
    closed = subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command])
    try:
        assert _ctl(at, "status").returncode == 0
        for fd in (0, 1, 2):
            assert os.readlink(f"/proc/{closed.pid}/fd/{fd}") == "/"
        closed.send_signal(signal.SIGTERM)
        assert closed.wait(DEADLINE_S) == 0
    finally:
        closed.kill()
        closed.wait()


ANSWERS = (  # of commands that print and end
    ("--help",),
    ("source", "--help"),
    ("probe", "--require", "root,netns", "--json"),
    ("lab", "status"),
    ("faultpaths", "--list"),
    ("faultpaths", "--list", "--json"),
)


@pytest.mark.parametrize("arguments", ANSWERS, ids=" ".join)
def test_an_answer_without_room(arguments: tuple[str, ...]) -> None:
    """As `postcopy probe >/dev/full`."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*POSTCOPY, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=False
        )
    assert (
        done.stderr == "postcopy: error: standard output: No space left on device: the result is not complete there\n"
    )
    assert done.returncode == 1


@pytest.mark.parametrize("arguments", ANSWERS, ids=" ".join)
def test_an_answer_for_nobody(arguments: tuple[str, ...]) -> None:
    """As `postcopy probe >&-`, and `postcopy probe | true`."""
    command = [*POSTCOPY, *arguments]
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command],
        stderr=subprocess.PIPE,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (closed.returncode, closed.stderr) == (0, "")
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with os.fdopen(write_fd, "wb") as gone:
        broken = subprocess.run(
            command, stdout=gone, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=False
        )
    assert broken.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_answer_that_is_not_read_can_be_given_up(number: signal.Signals) -> None:
    """As `postcopy schema | less`, whose reader has not come to its end."""
    process = subprocess.Popen([*POSTCOPY, "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        deadline = time.monotonic() + DEADLINE_S
        while int.from_bytes(fcntl.ioctl(process.stdout, termios.FIONREAD, bytes(4)), sys.byteorder) < 1 << 15:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        while process.poll() is None:  # also when it was not at its end yet
            assert time.monotonic() < deadline
            process.send_signal(number)
            time.sleep(0.05)
        assert process.returncode in (1, -number)  # the signal itself: another one came after its end
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def nobody() -> Iterator[int]:
    """A pipe whose reader has gone."""
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    yield write_fd
    os.close(write_fd)


@pytest.mark.needs("uffd-user")
def test_a_demo_for_nobody(nobody: int) -> None:
    """As `postcopy demo | true`: its status is that of the migration."""
    demo = ("demo", "--machine", "rv64", "--memory", "16MiB", "--migrate-after", "0", "--run-for", "0")
    done = subprocess.run(
        [*POSTCOPY, *demo], stdout=nobody, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S, check=False
    )
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("request_name", ["events", "top"])
def test_what_goes_on_ends_when_nobody_reads(request_name: str, nobody: int, tmp_path: Path) -> None:
    """As `postcopy ctl top | head -1`."""
    at = tmp_path / "control"
    with subprocess.Popen([*POSTCOPY, "daemon", "--control", str(at)], stderr=subprocess.DEVNULL) as daemon:
        try:
            assert _ctl(at, "status").returncode == 0
            shown = subprocess.Popen(
                [*POSTCOPY, "ctl", "--control", str(at), request_name], stdout=nobody, stderr=subprocess.PIPE
            )
            deadline = time.monotonic() + DEADLINE_S
            while shown.poll() is None:  # something to tell: machines come and go
                assert time.monotonic() < deadline
                assert _ctl(at, "start", "rv64", "--name", "vm", "--memory", "16MiB").returncode == 0
                assert _ctl(at, "end", "--machine", "vm", "--force").returncode == 0
            assert (shown.returncode, shown.communicate()[1]) == (0, b"")
        finally:
            daemon.kill()


@pytest.mark.parametrize(
    ("encoding", "environment"),
    [
        ("latin1", {"PYTHONIOENCODING": "latin1"}),
        ("ascii", {"LANG": "C", "LC_ALL": ""}),
        ("ascii", {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}),
    ],
)
@pytest.mark.needs("uffd-user")
def test_characters_that_the_terminal_does_not_have(encoding: str, environment: dict[str, str]) -> None:
    for arguments in (
        ("demo", "--machine", "rv64", "--memory", "16MiB", "--migrate-after", "0", "--run-for", "0"),
        ("probe",),
        ("demo", "--help"),
    ):
        done = subprocess.run(
            [*POSTCOPY, *arguments],
            capture_output=True,
            timeout=DEADLINE_S,
            check=False,
            env={**os.environ, **environment},
        )
        assert done.returncode == 0, done
        said = (done.stdout + done.stderr).decode(encoding)
        assert "Traceback" not in said
        assert "\\u" not in said
