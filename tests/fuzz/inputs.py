# SPDX-License-Identifier: Apache-2.0
"""What the fuzz targets share: how an input is taken apart, a connection in memory, and time that passes at once.

An input begins with a few bytes that choose (a version, a state, how large the pieces are), and goes on with what the
peer sends. Where that has lengths and checksums, which no fuzzer guesses, it is a list of *records*: a tag, a length
and a body, of which the target makes frames with the right checksum, unless the tag says otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

import trio
from trio.testing import MockClock

from tests.unit.wire.support import framed

T = TypeVar("T")
AS_IT_IS, RAW, DAMAGED, TOO_LONG = range(4)
"""Tags of records, by their last two bits: with a frame around it, without, with a wrong checksum or length."""
FOR_EVER_S = 100_000.0
"""In virtual time: longer than any limit of the program's."""


class Input:
    """Bytes of a fuzzer; zeros when there are no more."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, size_bytes: int = 1) -> int:
        return int.from_bytes(self.take(size_bytes).ljust(size_bytes, b"\0"), "big")

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.number() % len(choices)]

    def take(self, size_bytes: int) -> bytes:
        taken = self._data[self._at : self._at + size_bytes]
        self._at += len(taken)
        return taken

    def rest(self) -> bytes:
        return self.take(len(self._data))

    def records(self) -> Iterator[tuple[int, bytes]]:
        while self._at < len(self._data):
            tag = self.number()
            yield tag, self.take(self.number(2))

    def stream(self) -> bytes:
        """What the records are on the wire of the control connection."""
        return b"".join(_on_wire(tag % 4, body) for tag, body in self.records())


def record(body: bytes, tag: int = AS_IT_IS) -> bytes:
    return bytes([tag]) + len(body).to_bytes(2, "big") + body


def _on_wire(how: int, body: bytes) -> bytes:
    if how == RAW:
        return body
    return framed(body, len(body) + 70_000 if how == TOO_LONG else None, int(how == DAMAGED))


def pieces(data: bytes, size_bytes: int) -> Iterator[bytes]:
    for at in range(0, len(data), max(size_bytes, 1)):
        yield data[at : at + max(size_bytes, 1)]


class _Socket:
    """As much of a socket as is asked for, of a connection in memory."""

    def __init__(self) -> None:
        self.closed = False

    def getpeername(self) -> tuple[str, int]:
        return "192.0.2.1", 7

    def close(self) -> None:
        self.closed = True


class Peer(trio.abc.HalfCloseableStream):
    """A connection whose other end says what it was given, in pieces of one size, and then nothing more: it closes, or
    (`stays`) it only falls silent. `sent` is what was said to it."""

    def __init__(self, says: bytes, piece_bytes: int = 1 << 16, stays: bool = False) -> None:
        self.sent = bytearray()
        self.socket = _Socket()
        self._says = says
        self._at = 0
        self._piece_bytes = max(piece_bytes, 1)
        self._stays = stays

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if self.socket.closed:
            raise trio.ClosedResourceError
        size = min(self._piece_bytes, max_bytes or self._piece_bytes)
        piece = self._says[self._at : self._at + size]
        self._at += len(piece)
        if not piece and self._stays:
            await trio.sleep_forever()
        return piece

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self.socket.closed:
            raise trio.ClosedResourceError
        self.sent += data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.socket.close()
        await trio.lowlevel.checkpoint()


class Mistakes(logging.Handler):
    """Collects what the program logs as its own mistake: a traceback, which no peer may cause. Other lines must be fit
    to be printed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.found.append(record.exc_info[1])
        line = record.getMessage()
        assert line.isprintable(), f"a line of the log is not fit to be printed: {line!r}"


_mistakes = Mistakes()
_log = logging.getLogger("postcopy")
_log.addHandler(_mistakes)
_log.propagate = False


def in_virtual_time(function: Callable[[], Awaitable[object]]) -> None:
    """Runs it to its end, with every wait over at once. What waits for ever is an error, and so is a mistake that was
    caught and logged."""
    _mistakes.found.clear()

    async def run() -> None:
        with trio.fail_after(FOR_EVER_S):
            await function()

    trio.run(run, clock=MockClock(autojump_threshold=0))
    if _mistakes.found:
        raise _mistakes.found[0]
