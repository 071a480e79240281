# SPDX-License-Identifier: Apache-2.0
"""Lines whose reader does not read, has gone, or has no room."""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import logging
import os
import select
import signal
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import pytest
import trio
from lines import parse_line
from screen import Screen

from postcopy.errors import ResourceError
from postcopy.output import LogHandler, Output, _writer
from postcopy.output._frame import Frames
from postcopy.output._live import Live
from postcopy.output._writer import Kind, QueuedStream, Writer
from postcopy.records.events import DaemonResult, Progress

RESULT = DaemonResult(side="daemon", status="completed", error=None, machines_sent=0, machines_received=0)


class _Stream(io.StringIO):
    """A standard stream, as far as a writer cares."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def fileno(self) -> int:
        return self._fd


class Pipe:
    """A pipe that has no room left, until somebody reads."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe()
        os.set_blocking(self.write_fd, False)
        self.stuffing = 0
        for size in (4096, 1):
            try:
                while True:
                    self.stuffing += os.write(self.write_fd, b"." * size)
            except BlockingIOError:
                pass
        os.set_blocking(self.write_fd, True)
        self.stream = _Stream(self.write_fd)

    def unstuff(self) -> None:
        while self.stuffing:
            self.stuffing -= len(os.read(self.read_fd, self.stuffing))

    def read_until(self, found: Callable[[str], bool]) -> str:
        """Everything, up to a text of which `found` is true."""
        text = ""
        deadline = time.monotonic() + 30
        while not found(text):
            assert time.monotonic() < deadline, text[-2000:]
            text += os.read(self.read_fd, 65536).decode()
        return text


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.unstuff()  # not closed: a writer's thread must not find another file under that number


def _writer_on(stream: TextIO) -> Writer:
    writer = Writer(stream, lambda count: f"{count} dropped\n")
    writer.start()
    return writer


def test_nobody_waits_for_a_reader(pipe: Pipe) -> None:
    """What there is no room for is dropped by its kind, and counted; the rest comes, in order, when somebody reads."""
    writer = _writer_on(pipe.stream)
    line = "p" * 999 + "\n"
    taken = [writer.put(line, Kind.PROGRESS) for _ in range(100)]
    assert taken[0]
    assert not taken[-1]
    logged = [writer.put("l" * 999 + "\n", Kind.LOG) for _ in range(2000)]
    assert logged[0]
    assert not logged[-1]
    assert writer.put("the result\n", Kind.LASTING)
    pipe.unstuff()
    text = pipe.read_until(lambda text: text.endswith("dropped\n"))
    lines = text.splitlines()
    assert lines[-2:] == ["the result", f"{taken.count(False) + logged.count(False)} dropped"]
    assert lines.count("p" * 999) == taken.count(True)
    assert lines.count("l" * 999) == logged.count(True)
    assert writer.close()


def test_its_end_is_bounded(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_writer, "STALLED_S", 0.1)
    writer = _writer_on(pipe.stream)
    writer.put("the result\n", Kind.LASTING)
    assert not writer.close()  # and returns


def test_a_reader_that_is_slow_gets_all_of_it(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = _writer_on(pipe.stream)
    for number in range(1000):
        writer.put(f"{number:0999}\n", Kind.LASTING)
    closed: list[bool] = []
    end = threading.Thread(target=lambda: closed.append(writer.close()))
    end.start()
    pipe.unstuff()
    text = pipe.read_until(lambda text: text.endswith(f"{999:0999}\n"))
    end.join(30)
    assert closed == [True]
    assert [int(line) for line in text.splitlines()] == list(range(1000))


def test_a_reader_that_has_gone() -> None:
    read_fd, write_fd = os.pipe()
    stream = _Stream(write_fd)
    writer = _writer_on(stream)
    os.close(read_fd)
    writer.put("a line\n", Kind.LASTING)
    assert writer.close()
    assert writer.gone
    assert not writer.put("another\n", Kind.LASTING)
    with pytest.raises(BrokenPipeError):
        QueuedStream(writer, stream, loss_is_error=True).write("as a program would print it\n")
    QueuedStream(writer, stream, loss_is_error=False).write("said beside the work\n")


async def test_a_terminal_that_hangs_up_ends_nothing() -> None:
    """What is drawn there goes nowhere; what was going on goes on."""
    controlling, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stream:
        output = Output(False, None, stream)
        output.start()
        os.close(controlling)
        output.say("a word")
        shown = 0

        def progress() -> Progress:
            nonlocal shown
            shown += 1
            return Progress(side="dest", status=f"{shown}", error=None)

        with trio.move_on_after(1.0) as scope:
            await output.follow(progress)
        assert scope.cancelled_caught
        output.say("another one")
        output.close()


def test_no_thread_for_the_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that says so must come through all the same."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    read_fd, write_fd = os.pipe()
    output = Output(False, None, _Stream(write_fd))
    with pytest.raises(ResourceError):
        output.start()
    output.complain("no thread for the output")
    output.complain("x" * 2000)
    output.close()
    os.close(write_fd)
    with os.fdopen(read_fd) as file:
        assert file.read() == f"postcopy: error: no thread for the output\npostcopy: error: {'x' * 2000}\n"


def test_no_thread_and_no_reader(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no thread")))
    monkeypatch.setattr(_writer, "STALLED_S", 0.05)
    writer = Writer(pipe.stream, lambda count: "")
    writer.put("a line\n", Kind.LASTING)
    assert not writer.close()
    assert writer.lost == 1


@pytest.mark.slow
def test_results_that_could_not_be_written_are_named() -> None:
    read_fd, write_fd = os.pipe()
    with open("/dev/full", "w") as full:
        output = Output(True, full, _Stream(write_fd))
        output.start()
        output.emit("result", RESULT)
        output.close()
    os.close(write_fd)
    with os.fdopen(read_fd) as file:
        assert "standard output: No space left on device" in file.readline()


def test_a_result_that_nobody_reads_is_named(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the only one, which the thread has taken out of the queue and cannot write."""
    monkeypatch.setattr(_writer, "STALLED_S", 0.1)
    stderr = io.StringIO()
    output = Output(True, pipe.stream, stderr)
    output.start()
    output.emit("result", RESULT)
    assert output.close()  # what was asked has happened all the same
    assert stderr.getvalue() == (
        "postcopy: error: standard output: nobody reads it: the result is not complete there\n"
    )


def test_an_answer_without_end_is_not_waited_for(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `ctl events`: an interrupted command must not wait for a reader that does not read."""
    monkeypatch.setattr(_writer, "STALLED_S", 0.1)
    output = Output(False, pipe.stream, io.StringIO())
    output.start()
    output.patient = False
    with output.standard_streams():
        print("an event")
    assert output.close()


def test_an_interrupted_answer_is_not_written_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    read_fd, write_fd = os.pipe()
    os_write = os.write

    def write(fd: int, data: bytes) -> int:
        if len(data) < len(b"an answer\n"):
            raise KeyboardInterrupt
        return os_write(fd, data[:3])

    output = Output(False, _Stream(write_fd), io.StringIO())
    monkeypatch.setattr(os, "write", write)
    with output.standard_streams(), pytest.raises(KeyboardInterrupt):
        print("an answer")
    monkeypatch.undo()
    output.close()
    os.close(write_fd)
    with os.fdopen(read_fd) as file:
        assert file.read() == "an "


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TextIO, TextIO, Callable[[str], Screen]]]:
    """Two streams of one terminal, and a way to wait until a text has been written to it: what is seen then."""
    monkeypatch.setenv("TERM", "xterm")
    controlling, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    screen = Screen(80, 24)

    def wait_for(text: str) -> Screen:
        deadline = time.monotonic() + 30
        while text not in screen.text or not screen.breaks_lines:  # a picture that has come in part
            assert select.select([controlling], [], [], max(0, deadline - time.monotonic()))[0], screen.text
            screen.feed(os.read(controlling, 4096).decode())
        return screen

    with os.fdopen(terminal, "w") as stdout, os.fdopen(os.dup(terminal), "w") as stderr:
        yield stdout, stderr, wait_for
    os.close(controlling)


Terminal = tuple[TextIO, TextIO, Callable[[str], Screen]]
NOW = {"side": "dest", "status": "postcopy-active"}


@pytest.mark.parametrize("whole", [False, True])
async def test_the_terminal_is_given_back(terminal: Terminal, whole: bool) -> None:
    """Also where it was stopped (Ctrl-S), and only the newest picture is drawn when it goes on."""
    stdout, stderr, wait_for = terminal
    output = Output(False, stdout, stderr)
    output.start()
    async with output.open_live(whole=whole) as (live, frames):
        for number in range(2000):  # more than it takes before it is read
            output.view.subject = f"number {number} {'x' * 1000}"
            live.draw(frames.below(NOW, *live.size))
        screen = wait_for("number 1999")
        assert screen.alternate is whole
        assert screen.cursor_shown is not whole
        assert screen.cursor == (0, 0) or whole
        assert screen.breaks_lines
        assert all(len(line) < 80 for line in screen.lines)
    output.say("the end")
    assert wait_for("the end").text == "the end"
    assert screen.as_it_was
    assert output.close()


async def test_nothing_is_drawn_when_the_job_of_the_shell_has_ended(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a keeper that was killed, while its engine goes on: the terminal is the shell's again."""
    monkeypatch.setattr(os, "tcgetpgrp", lambda fd: 7)
    jobs = {8: 7}
    monkeypatch.setattr(os, "getpgid", lambda pid: jobs[pid] if pid in jobs else os.kill(2**22 + 1, 0))  # ESRCH
    output = Output(False, *terminal[:2])
    output.job = 8
    async with output.open_live() as (live, frames):
        live.draw(frames.below(NOW, *live.size))
        assert output._stderr._wanted is not None
        jobs.clear()
        live.draw(frames.below(NOW, *live.size))
        assert output._stderr._wanted is None


async def test_nothing_is_drawn_while_the_terminal_is_given_back(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-Z, while its task that draws goes on: another picture would stay there as long as it is stopped."""
    stdout, stderr, wait_for = terminal
    output = Output(False, stdout, stderr)
    output.start()
    send, receive = trio.open_memory_channel[int](1)
    monkeypatch.setattr(trio, "open_signal_receiver", lambda *_: contextlib.nullcontext(receive))
    wanted: list[object] = []
    monkeypatch.setattr(signal, "raise_signal", lambda _: wanted.append(output._stderr._wanted))
    async with output.open_live(whole=True) as (live, frames):
        live.draw(frames.whole({"side": "daemon", "machines": []}, *live.size))
        wait_for("0 machines")

        def draws(writer: Writer) -> bool:
            live.draw(frames.whole({"side": "pager", "vms": []}, *live.size))
            with writer._changed:
                return not writer._busy

        monkeypatch.setattr(Writer, "settled", property(draws))
        await send.send(signal.SIGTSTP)
        with trio.fail_after(30):
            while not wanted:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert wanted == [None]
        live.draw(frames.whole({"side": "daemon", "machines": []}, *live.size))  # it goes on
        assert output._stderr._wanted is not None
    output.close()


async def test_no_line_is_torn_by_a_picture_or_tears_it(terminal: Terminal) -> None:
    """Whoever writes it: what is said, events, what is printed, longer than a row or not; and a result comes last."""
    stdout, stderr, wait_for = terminal
    output = Output(True, stdout, stderr)
    output.start()
    long = "a line that is longer than the terminal is wide: " + "x" * 150
    with output.standard_streams():
        async with output.open_live() as (live, frames):
            for number in range(100):
                output.view.subject = f"number {number}"
                live.draw(frames.below(NOW, *live.size))
                output.say(f"said {number}")
                if number % 10 == 0:
                    output.emit("progress", Progress(side="dest", status=f"{number}", error=None))
                    print(long)
                    wait_for(f"number {number}")
            screen = wait_for("number 99")
            assert screen.text.count("number ") == 1  # whole, and below all lines
            assert screen.lines[screen.cursor[1] + 1].startswith("dest     fetching pages")
        output.emit("result", RESULT)
    assert output.close()
    screen = wait_for('"result"')
    lines = screen.text.replace(long[:80] + "\n" + long[80:160] + "\n" + long[160:], long).splitlines()
    assert [line for line in lines if line.startswith("said")] == [f"said {number}" for number in range(100)]
    assert lines.count(long) == 10
    assert "number" not in screen.text
    assert "fetching" not in screen.text


async def test_what_is_the_same_is_not_drawn_again(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, stderr, wait_for = terminal
    output = Output(False, stdout, stderr)
    output.start()
    written: list[bytes] = []
    write = output._stderr._write

    def note(data: bytes) -> None:
        written.append(data)
        write(data)

    monkeypatch.setattr(output._stderr, "_write", note)
    async with output.open_live() as (live, frames):
        for _ in range(100):
            live.draw(frames.whole({"side": "daemon", "machines": []}, *live.size))
            wait_for("0 machines, 0 migrating")
    output.close()
    assert len(written) == 2  # and taken away


async def test_pictures_are_at_most_ten_a_second(
    terminal: Terminal, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often something happens; and what has happened is told at the same time as ever."""
    output = Output(True, *terminal[:2])
    drawn: list[float] = []
    monkeypatch.setattr(Live, "draw", lambda live, rows: drawn.append(trio.current_time()))

    async def kick() -> None:
        while True:
            output.kick()
            await trio.sleep(0.01)

    with trio.move_on_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kick)
            await output.follow(lambda: NOW)
    gaps = [later - sooner for sooner, later in itertools.pairwise(drawn)]
    assert 50 < len(drawn) <= 101
    assert min(gaps) > 0.099


async def test_what_changes_all_the_time_is_told_in_a_tenth_of_the_time(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little each look costs; and the first of them at once."""
    used_s, told = 0.0, []
    monkeypatch.setattr("postcopy.output._output.time.monotonic", trio.current_time)
    monkeypatch.setattr("postcopy.output._output.time.thread_time", lambda: used_s)
    output = Output(False, None, None)

    def progress() -> Progress:
        nonlocal used_s
        used_s += 0.001
        told.append(trio.current_time())
        return Progress(side="daemon", status="active", error=None)

    async def kick() -> None:
        while True:
            output.kick()
            await trio.sleep(0.001)

    began_s = trio.current_time()
    with trio.move_on_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kick)
            await output.follow(progress)
    assert 950 < len(told) < 1010
    assert told[4] - began_s < 0.01


async def test_a_view_that_fails_does_no_harm(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken away, and there are plain lines instead."""
    stdout, stderr, wait_for = terminal
    output = Output(False, stdout, stderr)
    output.start()
    logger = logging.getLogger("postcopy.output")
    monkeypatch.setattr(logger, "propagate", False)
    handler = LogHandler(output)
    logger.addHandler(handler)
    try:
        status = ["active"]

        async def go_wrong() -> None:
            await trio.to_thread.run_sync(wait_for, "switching over")
            monkeypatch.setattr(Frames, "below", lambda *_: 1 / 0)
            await trio.to_thread.run_sync(wait_for, "ZeroDivisionError")
            status[0] = "completed"
            output.kick()
            await trio.to_thread.run_sync(wait_for, "source: completed")
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(output.follow, lambda: {"side": "source", "status": status[0]})
            nursery.start_soon(go_wrong)
    finally:
        logger.removeHandler(handler)
    output.close()
    text = wait_for("the live view has failed").text
    assert "ZeroDivisionError" in text
    assert "switching over" not in text.partition("source: completed")[2]


def test_no_room_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried again, whole, as long as there is time; progress is dropped."""
    monkeypatch.setattr(_writer, "STALLED_S", 0.1)
    writer = _writer_on(_Stream(os.open("/dev/full", os.O_WRONLY)))
    writer.put("progress\n", Kind.PROGRESS)
    writer.put("the result\n", Kind.LASTING)
    assert not writer.close()
    assert not writer.gone


def test_a_descriptor_that_does_not_block(pipe: Pipe) -> None:
    os.set_blocking(pipe.write_fd, False)
    writer = _writer_on(pipe.stream)
    writer.put("the result\n", Kind.LASTING)
    pipe.unstuff()
    assert pipe.read_until(lambda text: text.endswith("\n")) == "the result\n"


def test_no_stream_at_all() -> None:
    output = Output(True, None, None)
    output.start()
    output.emit("result", RESULT)
    output.say("a word")
    output.close()


def test_nothing_is_written_before_the_start(pipe: Pipe) -> None:
    """By then there must be one thread only, where a user is to be changed."""
    before = threading.active_count()
    writer = Writer(pipe.stream, str)
    writer.put("early\n", Kind.LASTING)
    assert threading.active_count() == before
    pipe.unstuff()
    assert writer.close()
    assert pipe.read_until(lambda text: text.endswith("\n")) == "early\n"


def test_output_says_once_that_nobody_reads(pipe: Pipe) -> None:
    """And logging, from any thread, and events do not wait either."""
    stderr = io.StringIO()
    output = Output(True, pipe.stream, stderr)
    output.start()
    for number in range(1000):
        output.emit("progress", Progress(side="dest", status="active", error=f"{number} {'x' * 200}"))
    output.emit("result", RESULT)
    assert stderr.getvalue().count("nobody reads") == 1
    pipe.unstuff()
    lines = pipe.read_until(lambda text: "output-dropped" in text and text.endswith("\n")).splitlines()
    events = [parse_line(line) for line in lines]
    assert [event["event"] for event in events[-2:]] == ["result", "output-dropped"]
    assert events[-1]["lines"] + len(events) - 2 == 1000


def test_a_long_line_takes_no_room_of_progress(pipe: Pipe) -> None:
    """As the timeline of a migration, which is longer than all progress may be: nobody has been slow."""
    stderr = io.StringIO()
    output = Output(True, pipe.stream, stderr)
    output.start()
    output.emit("timeline", {"text": "x" * (100 << 10)})
    output.emit("timeline", {"text": "x" * (100 << 10)})  # in the queue, whatever the thread has taken out of it
    output.emit("progress", Progress(side="dest", status="active", error=None))
    assert stderr.getvalue() == ""
    pipe.unstuff()
    assert pipe.read_until(lambda text: text.endswith("}\n") and '"progress"' in text).count("\n") == 3


def test_progress_that_may_have_been_dropped_is_told_again(pipe: Pipe) -> None:
    output = Output(True, pipe.stream, io.StringIO())
    output.start()
    last = Progress(side="dest", status="postcopy-paused", error=None)
    for number in range(1000):
        output.emit("progress", Progress(side="dest", status="active", error=f"{number} {'x' * 200}"))
    output.emit("progress", last)
    pipe.unstuff()
    pipe.read_until(lambda text: "output-dropped" in text and text.endswith("\n"))
    output.emit("progress", last)
    assert parse_line(pipe.read_until(lambda text: text.endswith("\n")))["status"] == "postcopy-paused"
    output.emit("progress", last)
    output.emit("result", RESULT)
    assert parse_line(pipe.read_until(lambda text: text.endswith("\n")))["event"] == "result"


def test_progress_that_says_the_same_is_left_out() -> None:
    stdout = io.StringIO()
    output = Output(True, stdout, None)
    told: list[str] = []
    output.listeners.append(lambda event, data: told.append(data["status"]))
    for side, status in (("source", "active"), ("dest", "active"), ("source", "active"), ("source", "completed")):
        output.emit("progress", Progress(side=side, status=status, error=None))
    output.emit("result", RESULT)
    output.emit("result", RESULT)
    said = [(line["event"], line["side"], line["status"]) for line in map(parse_line, stdout.getvalue().splitlines())]
    assert said[:3] == [("progress", side, "active") for side in ("source", "dest")] + [
        ("progress", "source", "completed")
    ]
    assert len(said) == 5
    assert told == ["active", "active", "completed", "completed", "completed"]


def test_logging_from_threads_does_not_wait(pipe: Pipe) -> None:
    output = Output(False, io.StringIO(), pipe.stream)
    output.start()
    logger = logging.getLogger("postcopy.test_output")
    logger.propagate = False
    logger.addHandler(LogHandler(output))
    try:

        def say_much() -> None:
            for _ in range(300):
                logger.warning("x" * 5000)

        threads = [threading.Thread(target=say_much) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        logger.error("the end")
    finally:
        logger.handlers.clear()
    pipe.unstuff()
    text = pipe.read_until(lambda text: "lines are missing" in text and text.endswith("\n"))
    assert "postcopy: error: the end" in text


def test_a_traceback_is_said_in_plain_text_too() -> None:
    stderr = io.StringIO()
    output = Output(False, io.StringIO(), stderr)
    logger = logging.getLogger("postcopy.test_output")
    logger.propagate = False
    logger.addHandler(LogHandler(output))
    try:
        raise RuntimeError("on purpose")
    except RuntimeError:
        logger.exception("it failed")
    finally:
        logger.handlers.clear()
    assert "RuntimeError: on purpose" in stderr.getvalue()
