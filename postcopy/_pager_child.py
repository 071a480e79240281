# SPDX-License-Identifier: Apache-2.0
"""The process of a pager that lives apart from its machine (`pager_process` has the other end).

It has no page of the machine mapped: what it gets over a Unix socket are userfaultfds, memfds, page states and
connected sockets. Everything that happens for a page happens in the core's threads; this loop only passes on what it
is told, one message an answer, and what the core tells, one message an event. It ends when the other end is gone.
Nothing but the core and msgpack is imported: the machine may be waiting for this process to begin.

Messages: ``[name, arguments]`` with descriptors beside it; the answer is ``[result, text, value]``, `result` as the
core's functions return it. The names are those of the functions below.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import socket
import sys
from collections.abc import Callable
from typing import Any

import msgpack

from ._native import ffi, lib

MESSAGE_BYTES = 128 * 1024
DESCRIPTORS = 4


class PagerChild:
    """One `struct pc_pager`, by messages."""

    def __init__(self) -> None:
        pointer: Any = ffi.new("struct pc_pager **")
        result = lib.pc_pager_new(pointer)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        self._pager: Any = pointer[0]
        self._error: Any = ffi.new("char[]", lib.PC_ERROR_BYTES)
        self._keep: list[Any] = []
        self.event_fd: int = lib.pc_pager_event_fd(self._pager)
        self.calls: dict[str, Callable[..., Any]] = {
            "add_block": self._add_block,
            "set_zero": self._set_zero,
            "adopt_shard": self._adopt_shard,
            "arm": self._arm,
            "attach_urgent": lambda fds, index: lib.pc_pager_attach_urgent(self._pager, index, fds.pop()),
            "attach_bulk": lambda fds, index: lib.pc_pager_attach_bulk(self._pager, index, fds.pop()),
            "track_thread": lambda _, slot, tid: lib.pc_pager_track_thread(self._pager, slot, tid),
            "request_missing": lambda _, limit: lib.pc_pager_request_missing(self._pager, limit),
            "request_range": lambda _, block, first, pages: lib.pc_pager_request_range(
                self._pager, block, first, pages
            ),
            "statistics": self._statistics,
            "latency": self._latency,
            "blocktime": self._blocktime,
            "disconnect": lambda _: lib.pc_pager_disconnect(self._pager),
            "disarm": lambda _: lib.pc_pager_disarm(self._pager),
            "free": lambda _: lib.pc_pager_free(self._pager),
        }

    def answer(self, message: bytes, fds: list[int]) -> bytes:
        name, arguments = msgpack.unpackb(message)
        value: Any = None
        self._error[0] = b"\0"
        try:
            result = self.calls[name](fds, *arguments)
        finally:
            for fd in fds:  # those that nobody has taken
                os.close(fd)
        if isinstance(result, tuple):
            result, value = result
        packed: bytes = msgpack.packb([result, ffi.string(self._error).decode("utf-8", "replace"), value])
        return packed

    def next_event(self) -> bytes | None:
        event: Any = ffi.new("struct pc_event *")
        if lib.pc_pager_next_event(self._pager, event) != 1:
            return None
        text = ffi.string(event.text)
        packed: bytes = msgpack.packb([event.type, event.channel_kind, event.channel, event.error, text])
        return packed

    # ---- calls that take more than numbers

    def _add_block(self, fds: list[int], address: int, size_bytes: int, page_bytes: int, kind: int) -> int:
        """Descriptors: the states, and the memory's where it has one."""
        memory_fd = fds.pop() if len(fds) > 1 else -1
        base = ffi.cast("void *", address)
        memory: Any = ffi.new("struct pc_memory *", [base, size_bytes, page_bytes, kind, memory_fd])
        result: int = lib.pc_pager_add_block_with_states(self._pager, memory, fds[0])
        if result < 0 and memory_fd >= 0:
            os.close(memory_fd)
        return result

    def _set_zero(self, fds: list[int], block: int, words: int) -> int:
        """Descriptor: a memfd with the map."""
        with mmap.mmap(fds[0], 8 * words, prot=mmap.PROT_READ) as view:
            copy: Any = ffi.new("uint64_t[]", words)
            ffi.memmove(copy, view, 8 * words)
        result: int = lib.pc_pager_set_zero(self._pager, block, copy)
        return result

    def _adopt_shard(self, fds: list[int], features: int, busy_poll_us: int) -> int:
        result: int = lib.pc_pager_adopt_shard(
            self._pager, fds.pop(), features, busy_poll_us, self._error, len(self._error)
        )
        return result

    def _arm(self, _: list[int], shard: int, block: int, first_page: int, pages: int) -> int:
        result: int = lib.pc_pager_arm(self._pager, shard, block, first_page, pages, self._error, len(self._error))
        return result

    def _statistics(self, _: list[int]) -> tuple[int, dict[str, int]]:
        stats: Any = ffi.new("struct pc_pager_stats *")
        result = lib.pc_pager_stats(self._pager, stats)
        return result, {name: int(getattr(stats, name)) for name, _ in ffi.typeof("struct pc_pager_stats").fields}

    def _latency(self, _: list[int], stage: int) -> tuple[int, bytes]:
        histogram: Any = ffi.new("struct pc_histogram *")
        result = lib.pc_pager_latency(self._pager, stage, histogram)
        return result, bytes(ffi.buffer(histogram))

    def _blocktime(self, _: list[int], slots: int) -> tuple[int, list[int]]:
        times: Any = ffi.new("uint64_t[]", max(1, slots))
        result = lib.pc_pager_blocktime(self._pager, times, slots)
        return result, [int(times[slot]) for slot in range(slots)]


def main() -> None:
    calls = socket.socket(fileno=int(sys.argv[1]))
    events = socket.socket(fileno=int(sys.argv[2]))
    child = PagerChild()
    poll = select.poll()
    poll.register(calls, select.POLLIN)
    poll.register(child.event_fd, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if child.event_fd in ready:
            while (event := child.next_event()) is not None:
                events.send(event)
        if calls.fileno() in ready:
            message, fds, _, _ = socket.recv_fds(calls, MESSAGE_BYTES, DESCRIPTORS)
            if not message:
                break  # the machine's process is gone, or has closed this pager
            calls.send(child.answer(message, fds))
    # No clean-up: the process that made the userfaultfds has them, and decides what becomes of who waits there.
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ECONNRESET):  # the other end went first
            raise
