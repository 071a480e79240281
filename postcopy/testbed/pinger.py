# SPDX-License-Identifier: Apache-2.0
"""A stream of UDP echoes to a machine, which shows for how long it did not answer.

Each datagram has a number, and the guest program `echo` (docs/machines.md) answers it with one of its own, kept
in its memory and raised with each answer, and with the nonce that it made when it booted. So the stream shows more than
the gap: that the same machine answers in the end as in the beginning, and that its numbers only increase.

    python -m postcopy.testbed.pinger ADDRESS [--interval SECONDS] [--seconds SECONDS]

prints one JSON line when its time is over or when it gets SIGTERM or SIGINT, for use in another network namespace;
`open_ping_process` does that.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import itertools
import json
import math
import secrets
import signal
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from postcopy._child import python
from postcopy.errors import MigrationError
from postcopy.testbed._processes import Child, Json, parse
from postcopy.units import argument, parse_seconds, parse_whole

COUNT_PORT = 2007
"""Where `echo` answers with a number and its nonce (csrc/machine/guest/abi.h: PCG_UDP_COUNT)."""
INTERVAL_S = 0.005
LINGER_S = 0.5  # after the last datagram, for answers under way
_HEAD = struct.Struct("<QQQQ")  # our number; the machine's number and nonce; what only this stream can have sent


class PingStatistics(msgspec.Struct):
    """Of one stream. Times are by this host's monotonic clock."""

    sent: int = 0
    answered: int = 0
    duplicates: int = 0  # answers to what was answered before
    not_increasing: int = (
        0  # answers whose number another one had, or one that was here before this was asked had passed
    )
    reordered: int = 0  # answers that one to a later datagram has overtaken, somewhere on its way or on theirs
    longest_gap_ms: float = 0.0  # between two answers that follow each other
    longest_loss_ms: float = 0.0  # the longest of those gaps in which a datagram was lost, and not only late
    gap_after: int = 0  # how many had been answered when the longest gap began
    unanswered_in_gap: int = 0  # datagrams sent in it and never answered
    silent_at_end_ms: float = 0.0  # from the last answer to the last datagram, when that was not answered
    nonces: list[str] = []  # of the machines that answered: of one, if it is the same

    @property
    def same_machine(self) -> bool:
        return len(self.nonces) == 1

    def as_dict(self) -> dict[str, Any]:
        return {**msgspec.to_builtins(self), "same_machine": self.same_machine}


async def ping_stream(
    address: str,
    *,
    port: int = COUNT_PORT,
    interval_s: float = INTERVAL_S,
    stop: trio.Event | None = None,
    seconds: float = math.inf,
    on_answer: Callable[[PingStatistics], None] = lambda _: None,
) -> PingStatistics:
    """Sends a datagram every `interval_s` until `stop` is set or `seconds` are over, and tells what was answered.

    `on_answer` is called, in the Trio thread, after each answer, with the figures so far (the gap not among them).
    Errors of the network (no route, no neighbour) are what is measured: they count as datagrams that were not answered.
    Cancellable.
    """
    if interval_s <= 0:
        raise ValueError("an interval must be positive")
    stop = trio.Event() if stop is None else stop
    stream = _Stream()
    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind(("", 0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive, sock, (address, port), on_answer)
            with trio.move_on_after(seconds) as sending:

                async def heed_stop() -> None:
                    await stop.wait()
                    sending.cancel()

                nursery.start_soon(heed_stop)
                await stream.send(sock, (address, port), interval_s)
            await stream.linger()
            nursery.cancel_scope.cancel()
    return stream.figures()


class _Stream:
    def __init__(self) -> None:
        self._statistics = PingStatistics()
        self._mark = secrets.randbits(64)
        self._sent_at: list[float] = []
        self._answered: dict[int, float] = {}  # by number, in the order of arrival
        self._counts: dict[int, int] = {}  # the machine's number for each of ours
        self._all = trio.Event()
        self._is_over = False

    async def send(self, sock: trio.socket.SocketType, to: tuple[str, int], interval_s: float) -> None:
        due = trio.current_time()
        while True:
            number = len(self._sent_at)
            self._sent_at.append(trio.current_time())
            with contextlib.suppress(OSError):  # no route, no room: counted as not answered
                await sock.sendto(_HEAD.pack(number, 0, 0, self._mark), to)
            # By a timetable, so that a late one does not delay the rest; what was missed is not made up for.
            due = max(due + interval_s, trio.current_time() - interval_s)
            await trio.sleep_until(due)

    async def receive(
        self, sock: trio.socket.SocketType, peer: tuple[str, int], on_answer: Callable[[PingStatistics], None]
    ) -> None:
        statistics = self._statistics
        while True:
            data, sender = await sock.recvfrom(65536)
            now = trio.current_time()
            if sender != peer or len(data) != _HEAD.size:
                continue
            number, count, nonce, mark = _HEAD.unpack(data)
            if mark != self._mark or number >= len(self._sent_at):
                continue
            name = f"{nonce:#018x}"
            if name not in statistics.nonces:
                statistics.nonces.append(name)
            if number in self._answered:
                statistics.duplicates += 1
                continue
            self._answered[number] = now
            self._counts[number] = count
            statistics.sent, statistics.answered = len(self._sent_at), len(self._answered)
            on_answer(statistics)
            if self._is_over and len(self._answered) == len(self._sent_at):
                self._all.set()

    async def linger(self) -> None:
        self._is_over = True
        if len(self._answered) < len(self._sent_at):
            with trio.move_on_after(LINGER_S):
                await self._all.wait()

    def _not_increasing(self) -> int:
        """A network may overtake itself, on the way there and back: what holds all the same is that no number is given
        twice, and that who asks after an answer has come gets a higher number than was in it."""
        came = [*self._answered.values()]
        highest = list(itertools.accumulate((self._counts[number] for number in self._answered), max))
        found = len(self._counts) - len(set(self._counts.values()))
        for number, count in self._counts.items():
            before = bisect.bisect_right(came, self._sent_at[number])
            found += before > 0 and highest[before - 1] > count
        return found

    def figures(self) -> PingStatistics:
        statistics = self._statistics
        statistics.sent, statistics.answered = len(self._sent_at), len(self._answered)
        statistics.not_increasing = self._not_increasing()
        latest = itertools.accumulate(self._answered, max)
        statistics.reordered = sum(number < most for number, most in zip(self._answered, latest, strict=True))
        arrivals = [*self._answered.values()]
        if arrivals and len(self._sent_at) - 1 not in self._answered:
            statistics.silent_at_end_ms = round(max(0.0, self._sent_at[-1] - arrivals[-1]) * 1e3, 3)
        lost = [at for number, at in enumerate(self._sent_at) if number not in self._answered]
        longest = longest_loss = 0.0
        for place, (sooner, later) in enumerate(itertools.pairwise(arrivals)):
            unanswered = bisect.bisect_right(lost, later) - bisect.bisect_left(lost, sooner)
            if later - sooner > longest:
                longest = later - sooner
                statistics.gap_after, statistics.unanswered_in_gap = place + 1, unanswered
            if unanswered:
                longest_loss = max(longest_loss, later - sooner)
        statistics.longest_gap_ms, statistics.longest_loss_ms = round(longest * 1e3, 3), round(longest_loss * 1e3, 3)
        return statistics


class PingProcess:
    """The stream in a process of its own, as another network namespace needs it. Made by `open_ping_process`."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._last: Json = {}
        self._answers_ns: list[int] = []  # when each came
        self._ended = trio.Event()
        self._news = trio.Event()  # replaced by each line

    @property
    def answered(self) -> int:
        """So far."""
        return int(self._last.get("answered", 0))

    async def wait_answered(self, count: int) -> None:
        """Returns when so many have been answered, in all; `MigrationError` when the stream ends before. Cancellable;
        does not end by itself. One task at a time."""
        while self.answered < count:
            if self._ended.is_set():
                raise MigrationError(f"the stream of echoes ended after {self.answered} answers")
            self._news = trio.Event()
            await self._news.wait()

    def gap_ms(self, begin_ns: int, end_ns: int) -> float | None:
        """The longest time between two answers that touches this stretch of CLOCK_MONOTONIC (the same in every network
        namespace of a host); None when there is none, as the stream began later or ended sooner."""
        gaps = [
            later - sooner
            for sooner, later in itertools.pairwise(self._answers_ns)
            if sooner <= end_ns and later >= begin_ns
        ]
        return round(max(gaps) / 1e6, 3) if gaps else None

    async def stop(self) -> PingStatistics:
        """Ends the stream, and what it has seen. `MigrationError` when it has seen nothing to its end."""
        self._child.signal(signal.SIGTERM)
        await self._ended.wait()
        if "same_machine" not in self._last:
            raise MigrationError("the stream of echoes ended without its figures")
        return msgspec.convert(self._last, PingStatistics)

    async def _read(self) -> None:
        async for line in self._child.stdout:
            self._last = parse(line)
            if at_ns := self._last.get("at_ns"):
                self._answers_ns.append(at_ns)
            self._news.set()
        self._ended.set()
        self._news.set()


@asynccontextmanager
async def open_ping_process(
    address: str, *, interval_s: float = INTERVAL_S, wrap: Callable[[list[str]], list[str]] = lambda command: command
) -> AsyncIterator[PingProcess]:
    """Starts a stream to `address`; `wrap` makes the command one that runs elsewhere, as in a host of a laboratory. No
    process is left afterwards. `MigrationError` when it cannot be started."""
    command = python("-m", "postcopy.testbed.pinger", address, "--interval", f"{interval_s:g}", "--verbose")
    try:
        child = await Child.start(wrap(command))
    except OSError as error:
        raise MigrationError(f"cannot start the stream of echoes: {error}") from error
    pings = PingProcess(child)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pings._read)
            yield pings
            nursery.cancel_scope.cancel()
    finally:
        await child.end()


async def _main(arguments: argparse.Namespace) -> int:
    stop = trio.Event()
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def heed() -> None:
                async for _ in signals:
                    stop.set()

            nursery.start_soon(heed)

            def tell(statistics: PingStatistics) -> None:
                if arguments.verbose:
                    line = {"sent": statistics.sent, "answered": statistics.answered, "at_ns": time.monotonic_ns()}
                    print(json.dumps(line), flush=True)

            statistics = await ping_stream(
                arguments.address,
                port=arguments.port,
                interval_s=arguments.interval,
                seconds=arguments.seconds,
                stop=stop,
                on_answer=tell,
            )
            nursery.cancel_scope.cancel()
    print(json.dumps(statistics.as_dict()), flush=True)
    return 0 if statistics.answered else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("address", help="IPv4 address of the machine")
    parser.add_argument("--port", type=argument(parse_whole, 1, 65535), default=COUNT_PORT)
    parser.add_argument("--interval", type=argument(parse_seconds), default=INTERVAL_S, metavar="SECONDS")
    parser.add_argument("--seconds", type=argument(parse_seconds), default=math.inf)
    parser.add_argument("--verbose", action="store_true", help="a line for each answer, too")
    return trio.run(_main, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
