# SPDX-License-Identifier: Apache-2.0
"""What a pager or a page server tells Python: events, and the stream of them."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio


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

    def __init__(self, take: Callable[[], Event | None], wait: Callable[[], Awaitable[None]]) -> None:
        self._take = take
        self._wait = wait

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        await trio.lowlevel.checkpoint()
        while (event := self._take()) is None:
            await self._wait()
        return event
