# SPDX-License-Identifier: Apache-2.0
"""How the core tells Python what happened: a queue in C and an eventfd beside it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from postcopy._fd import FdHolder
from postcopy._native import ffi
from postcopy.errors import c_text


class EventType(enum.IntEnum):
    CHANNEL_DOWN = 1  # a data channel ended; `error` 0: the peer closed it in order
    BULK_END = 2  # every page has been offered on this bulk channel
    COMPLETE = 3  # pager: no page is missing any more
    FATAL = 4  # this pager or page server cannot go on
    DIED = 5  # pager in a process of its own: that process has ended; `disconnect` starts another one


class ChannelKind(enum.IntEnum):
    NONE = 0  # the event is not about a channel
    URGENT = 1
    BULK = 2


@dataclass(frozen=True)
class Event:
    """One `struct pc_event`."""

    type: EventType
    channel_kind: ChannelKind = ChannelKind.NONE
    channel: int = 0  # shard, or number of the bulk channel
    error: int = 0  # positive errno, 0 for none
    text: str = ""  # one line, may quote the peer

    def __str__(self) -> str:
        where = f" {self.channel_kind.name.lower()} {self.channel}" if self.channel_kind else ""
        return f"{self.type.name.lower().replace('_', '-')}{where}{': ' if self.text else ''}{self.text}"


class EventStream:
    """An endless asynchronous iterator over events.

    One task at a time. Cancellable between events; none is lost by that, the next iterator goes on. When the owner is
    closed, here or meanwhile, `trio.ClosedResourceError` is raised: an end that was asked for is not a normal end.
    """

    def __init__(self, event_fd: FdHolder, next_event: Callable[[], Event | None]) -> None:
        self._event_fd = event_fd
        self._next_event = next_event

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        await trio.lowlevel.checkpoint()
        while True:
            if self._event_fd.closed:
                raise trio.ClosedResourceError("closed while waiting for events")
            event = self._next_event()
            if event is not None:
                return event
            await self._event_fd.wait_readable()


class EventQueue:
    """The two C functions of one owner, and a copy of its eventfd."""

    def __init__(self, event_fd: int, next_event: Callable[[object], int]) -> None:
        self._event_fd = FdHolder.duplicate(event_fd)
        self._call = next_event
        self._struct: Any = ffi.new("struct pc_event *")

    def stream(self) -> EventStream:
        return EventStream(self._event_fd, self.take)

    def take(self) -> Event | None:
        """The next event, or None. Never blocks."""
        if self._event_fd.closed or self._call(self._struct) != 1:
            return None
        c = self._struct
        kind = ChannelKind(c.channel_kind)
        return Event(EventType(c.type), kind, int(c.channel), int(c.error), c_text(c.text))

    def drain(self) -> list[Event]:
        """All that has happened and was not told yet. Never blocks."""
        return list(iter(self.take, None))

    def close(self) -> None:
        self._event_fd.close()
