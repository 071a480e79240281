# SPDX-License-Identifier: Apache-2.0
"""Lines on their way to a descriptor whose reader may be slow, or gone.

A terminal that was stopped with Ctrl-S, a pager, a log collector that hangs, a pipe that is not read: a write to any
of them can wait forever, and the writer with it. So each descriptor has one thread that does nothing but write to it.
All others put their lines into its queue, from any thread, and never wait.

**What is dropped.** The queue has room for a little progress, for more log lines, and for very many lines of what must
not be lost (results, endings, errors); a kind that has used up its room is dropped, and counted. When the
reader goes on, it gets one line that says how many are missing.

**The end.** `close` waits for what is queued as long as it is read, for `STALLED_S` when it is not, and for
`CLOSE_S` in all. Then the thread is left in its write: it is a daemon thread, for which the end of the process does not
wait. Where the system gives no thread, `close` itself writes, with the same bounds.

A descriptor whose reader is gone is given up. One with no room (a full disk) is not: what must not be lost is tried
again, other lines are dropped.

**A picture.** On a terminal something may be shown below the lines (`show`). It is state, not a line: the thread draws
the newest one whenever it has no line to write, and takes it away before it writes one. So no line is torn, whoever
writes it; a terminal that is slow gets fewer pictures, and none is ever queued or dropped.

**Without the thread.** A command that prints its answer and ends needs no thread, and some must have one only (`lab`
enters namespaces). What is printed (`QueuedStream`) before `start` is written at once by whoever prints it, who waits
for the reader as any program does. Where that fails it is counted as lost, and `close` says so.

**Characters.** What the stream's encoding does not have is written with characters that every encoding has.
"""

from __future__ import annotations

import codecs
import enum
import errno
import io
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TextIO

STALLED_S = 2.0
CLOSE_S = 10.0
RETRY_S = 1.0
_SURE_BYTES = 512  # _POSIX_PIPE_BUF: what can be written to whatever poll(2) says has room, without waiting
_READER_IS_GONE = frozenset({errno.EPIPE, errno.EBADF, errno.EIO, errno.ENXIO, errno.ECONNRESET})

_IN_ASCII = {
    "█": "#",
    "░": ".",
    "▒": ":",
    "▓": "+",
    "✓": "+",
    "✗": "-",
    "µ": "u",
    "μ": "u",
    "→": ">",
    "…": "...",
    "–": "-",
    "—": "-",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "·": ".",
    "•": "*",
    "×": "x",
}


def _write_plainly(error: UnicodeError) -> tuple[str, int]:
    """An error handler of `str.encode`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(
        _IN_ASCII.get(char) or char.encode("ascii", "backslashreplace").decode() for char in missing
    ), error.end


codecs.register_error("postcopy-plain", _write_plainly)


def encoding_of(stream: object) -> str:
    """The encoding for what is written to `stream`: ASCII where the environment asks for the C locale, else that of the
    stream. Python has UTF-8 in both cases: in the C locale it sets LC_CTYPE to C.UTF-8 (PEP 538), or takes UTF-8
    without that (PEP 540). Where the environment asks for no locale, as in a container, UTF-8 is right."""
    encoding: str = getattr(stream, "encoding", None) or "utf-8"
    given = os.environ
    if given.get("PYTHONUTF8") == "1" or given.get("PYTHONIOENCODING"):
        return encoding
    ctype = given.get("LC_CTYPE", "")
    locale = given.get("LC_ALL") or (ctype if ctype != "C.UTF-8" else "") or given.get("LANG")
    return "ascii" if locale in ("C", "POSIX") else encoding


def in_encoding(text: str, encoding: str) -> str:
    """As it will be written; it may be longer then."""
    return text.encode(encoding, "postcopy-plain").decode(encoding)


class Kind(enum.IntEnum):
    """How much of a queue lines like it may use, with those that matter less; the value is that room, in bytes."""

    PROGRESS = 64 << 10  # the next one says the same, newer
    LOG = 1 << 20
    LASTING = 16 << 20  # results, endings, errors: tens of thousands of them


@dataclass(frozen=True)
class Picture:
    """What a terminal shows below the lines that were written, in its own control sequences."""

    text: str
    """Draws it, also where another one is drawn."""
    leave: str
    """Takes it away: a line may be written then."""
    enter: str = ""
    """Where none is drawn, before it."""


class Writer:
    """Takes lines for one stream. All methods from any thread."""

    def __init__(self, stream: TextIO | None, dropped: Callable[[int], str]) -> None:
        """`dropped` makes the line that says how many are missing.

        A stream that has no descriptor (a `StringIO`) never waits: it is written to at once. None: there is no reader,
        as where a process was started with the descriptor closed.
        """
        self._stream: TextIO | None = None
        self._fd = -1
        try:
            self._fd = stream.fileno() if stream is not None else -1
        except (OSError, ValueError, AttributeError):
            self._stream = stream
        self.encoding = encoding_of(stream)
        self._dropped_line = dropped
        self._changed = threading.Condition()
        self._queue: deque[tuple[bytes, Kind]] = deque()
        self._queued_bytes = dict.fromkeys(Kind, 0)
        self._wanted: Picture | None = None
        self._shown: Picture | None = None
        self._in_line = False  # what was written last goes on in the same line
        self._dropped = 0
        self._lost = 0  # of those dropped, what should have lasted
        self._error: OSError | None = None  # of the last write: no use in saying how many were dropped
        self._torn = False  # the last line was written in part only
        self._gone = self._fd < 0 and self._stream is None
        # Of the line that the thread has taken out of the queue, until it is written; a picture is progress.
        self._writing: Kind | None = None
        self._progressed_s = time.monotonic()
        self._thread: threading.Thread | None = None

    def put(self, text: str, kind: Kind) -> bool:
        """Queues `text` as it is. False when it was dropped: there was no room, or there is no reader."""
        if self._stream is not None:
            return self._put_at_once(self._stream, text)
        data = self._encode(text)
        with self._changed:
            if self._gone:
                return False
            if self._error is not None and self._thread is None:  # `write_here` has failed, and is not tried again
                self._lost += kind is Kind.LASTING
                return False
            # (of what is more important there may be much for a moment: a timeline alone is larger than this room)
            if sum(self._queued_bytes[one] for one in Kind if one <= kind) + len(data) > kind:
                self._dropped += 1
                self._lost += kind is Kind.LASTING
                return False
            self._queue.append((data, kind))
            self._queued_bytes[kind] += len(data)
            self._changed.notify_all()
        return True

    def show(self, picture: Picture | None) -> None:
        """From now on this is what is to be seen below the lines; None: nothing. Only once it was started."""
        with self._changed:
            self._wanted = picture
            self._changed.notify_all()

    def give_up(self, leave: str) -> None:
        """Another program has the terminal: `leave` takes away what is left of the picture there."""
        with self._changed:
            self._wanted = None
            if self._shown is not None:
                self._shown = replace(self._shown, leave=leave)
                self._changed.notify_all()

    @property
    def settled(self) -> bool:
        """Whether all is written, and the picture is the one that was given last."""
        with self._changed:
            return self._gone or not self._busy

    def start(self) -> None:
        """Begins to write; until then lines are queued. A process that is to change its user, which must have one
        thread, starts it afterwards. Twice does no harm. RuntimeError when the system gives no thread."""
        if not self._gone and self._stream is None and self._thread is None:
            thread = threading.Thread(target=self._run, name="pc-output", daemon=True)
            thread.start()
            self._thread = thread

    def write_here(self) -> None:
        """Writes what is queued, unless there is a thread that does: waits for the reader, for as long as it takes.
        `lost` and `error` say what came of it."""
        with self._changed:  # others that print wait too
            if self._thread is not None:
                return
            try:
                while self._queue:
                    self._write(self._queue[0][0])
                    self._queue.popleft()
            except OSError as error:
                self._error = error
                self._gone = error.errno in _READER_IS_GONE
                self._lost += sum(kind is Kind.LASTING for _, kind in self._queue)
            finally:  # after Ctrl-C too: a line that was written in part is not written again
                self._queue.clear()
                self._queued_bytes = dict.fromkeys(Kind, 0)

    def close(self, deadline_s: float = CLOSE_S, stalled_s: float | None = None) -> bool:
        """Waits for what is queued, as long as it says above; starts it where that was not done. False when something
        was left. `stalled_s`: how long a reader may pause, if not `STALLED_S`."""
        if not self._queue and self._thread is None:
            return True
        began_s = time.monotonic()
        try:
            self.start()
        except RuntimeError:
            return self._write_until(began_s + min(STALLED_S, deadline_s))
        with self._changed:
            while self._busy and not self._gone:
                # (where there is no room, it is not the reader who is slow)
                pause_s = STALLED_S if stalled_s is None or self._error is not None else stalled_s
                give_up_s = min(max(began_s, self._progressed_s) + pause_s, began_s + deadline_s)
                if give_up_s <= time.monotonic():
                    return False
                self._changed.wait(min(RETRY_S, give_up_s - time.monotonic()))
        return True

    @property
    def gone(self) -> bool:
        """Whether the reader has gone for good."""
        return self._gone

    @property
    def error(self) -> OSError | None:
        """Of the last write, when it failed."""
        return self._error

    @property
    def lost(self) -> int:
        """Of the lines that should have lasted, how many have not been written and, after `close`, never will be."""
        with self._changed:
            kinds = [kind for _, kind in self._queue] + [self._writing]
            return self._lost + kinds.count(Kind.LASTING)

    # ---- private

    def _put_at_once(self, stream: TextIO, text: str) -> bool:
        if self._gone:
            return False
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError):
            self._gone = True
        return not self._gone

    def _write_until(self, deadline_s: float) -> bool:
        """What is queued, by the thread that calls, which must not wait for longer."""
        try:
            while self._queue:
                self._write(self._queue[0][0], deadline_s)
                self._queue.popleft()
        except OSError:
            return False
        return True

    @property
    def _busy(self) -> bool:
        return bool(self._queue) or self._writing is not None or self._shown != self._wanted

    def _run(self) -> None:
        while True:
            data, kind, note = self._next()
            try:
                self._write(data)
            except OSError as error:
                if not self._failed(error, data, kind, note):
                    return
            else:
                self._error = None

    def _next(self) -> tuple[bytes, Kind, int]:
        """What is to be written next, and how many lines are lost when it is."""
        with self._changed:
            while True:
                if self._queue:
                    data, kind = self._queue.popleft()
                    self._queued_bytes[kind] -= len(data)
                    self._writing = kind
                    self._in_line = not data.endswith(b"\n")
                    return self._uncovered() + data, kind, 1
                if self._dropped and self._error is None:
                    # They came after what was queued, all of which is written.
                    note, self._dropped = self._dropped, 0
                    self._writing = Kind.LOG
                    self._in_line = False
                    return self._uncovered() + self._encode(self._dropped_line(note)), Kind.LOG, note
                if self._shown != self._wanted and self._error is None and not (self._in_line and self._wanted):
                    self._writing = Kind.PROGRESS
                    return self._next_picture(), Kind.PROGRESS, 0
                self._writing = None
                self._changed.notify_all()
                self._changed.wait()

    def _uncovered(self) -> bytes:
        """What makes room for a line."""
        shown, self._shown = self._shown, None
        return self._encode(shown.leave) if shown is not None else b""

    def _next_picture(self) -> bytes:
        shown, self._shown = self._shown, self._wanted
        if self._wanted is None:
            return self._encode(shown.leave if shown is not None else "")
        return self._encode(("" if shown is not None else self._wanted.enter) + self._wanted.text)

    def _encode(self, text: str) -> bytes:
        return text.encode(self.encoding, "postcopy-plain")

    def _write(self, data: bytes, deadline_s: float | None = None) -> None:
        """TimeoutError where there is a deadline that has passed."""
        rest = memoryview(b"\n" + data if self._torn else data)
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        while rest:
            if deadline_s is not None and not poll.poll(max(0, round((deadline_s - time.monotonic()) * 1000))):
                raise TimeoutError
            try:
                rest = rest[os.write(self._fd, rest if deadline_s is None else rest[:_SURE_BYTES]) :]
            except BlockingIOError:  # a process that shares the descriptor has made it so
                poll.poll(RETRY_S * 1000)
                continue
            self._torn = True  # until all of it is there
            self._progressed_s = time.monotonic()
        self._torn = False

    def _failed(self, error: OSError, data: bytes, kind: Kind, note: int) -> bool:
        """False when the reader has gone for good."""
        with self._changed:
            self._error = error
            if error.errno in _READER_IS_GONE:
                self._gone = True
                self._queue.clear()
                self._writing = None
                self._changed.notify_all()
                return False
            if kind is Kind.LASTING:
                self._queue.appendleft((data, kind))
                self._queued_bytes[kind] += len(data)
                self._writing = None
                self._changed.wait(RETRY_S)
            else:
                self._dropped += note
        return True


class QueuedStream(io.TextIOBase):
    """Stands in for a standard stream whose lines go through a `Writer`: for Rich, and for what is printed. A line, or
    what was written before a `flush`, is queued in one piece."""

    def __init__(self, writer: Writer, stream: TextIO | None, *, loss_is_error: bool) -> None:
        """`loss_is_error`: printing raises BrokenPipeError when the reader has gone for good; else it does nothing. A
        stream that was never there has no reader that could go."""
        self.writer = writer
        self.used = False
        self._stream = stream
        self._loss_is_error = loss_is_error and stream is not None
        self._local = threading.local()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.writer.encoding

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("there is no such stream")
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._local.text = getattr(self._local, "text", "") + text
        if text.endswith("\n"):
            self.flush()
        return len(text)

    def flush(self) -> None:
        text, self._local.text = getattr(self._local, "text", ""), ""
        if not text:
            return
        self.used = True
        self.writer.put(text, Kind.LASTING)
        self.writer.write_here()
        if self._loss_is_error and self.writer.gone:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
