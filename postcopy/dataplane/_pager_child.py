# SPDX-License-Identifier: Apache-2.0
"""The process of a pager that lives apart from its machine (`pager_process` has the other end).

It has no page of the machine mapped: what it gets over a Unix socket are userfaultfds, memfds, page states and
connected sockets. Everything that happens for a page happens in the core's threads; this loop only passes on calls, and
sends a message for each answer and for each event of the core. It ends when the other end is gone. Only what costs
little is imported: the machine may be waiting for this process to begin.

Messages, in JSON: ``[name, arguments]`` with descriptors beside it; the answer is ``[0, result, text]``, `result` as
the core's functions return it, in the order of the calls. ``[1, type, kind, channel, error, text]`` is an event. The
names are those of the core's functions, without ``pc_pager_``. Of what the other end has not received yet, one event
waits here, while the core coalesces the others.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import select
import socket
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

from postcopy._native import ffi, lib
from postcopy.errors import c_text

MESSAGE_BYTES = 128 * 1024
DESCRIPTORS = 4
OUTBOX = 64
"""With so many answers and events that the other end has not received, no more calls are answered."""


class PagerChild:
    """One `struct pc_pager`, by messages."""

    def __init__(self, metrics_fd: int) -> None:
        pointer: Any = ffi.new("struct pc_pager **")
        result = lib.pc_pager_new(metrics_fd, pointer)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        self._pager: Any = pointer[0]
        self._error: Any = ffi.new("char[]", lib.PC_ERROR_BYTES)
        self.freed = False
        self.event_fd: int = lib.pc_pager_event_fd(self._pager)

    def answer(self, message: bytes, fds: list[int]) -> bytes:
        name, arguments = json.loads(message)
        self._error[0] = b"\0"
        try:
            result = self._call(name, arguments, fds)
        finally:
            for fd in fds:  # those that no call has taken
                os.close(fd)
        return json.dumps([0, result, c_text(self._error)]).encode()

    def next_event(self) -> bytes | None:
        event: Any = ffi.new("struct pc_event *")
        if lib.pc_pager_next_event(self._pager, event) != 1:
            return None
        fields = [event.type, event.channel_kind, event.channel, event.error, c_text(event.text)]
        return json.dumps([1, *fields]).encode()

    # ---- calls

    def _call(self, name: str, arguments: list[int], fds: list[int]) -> int:
        """The function of the core, with a descriptor behind the numbers where there is one; or that of these below
        which takes more."""
        special: Callable[..., int] | None = getattr(self, f"_{name}", None)
        if special is not None:
            return special(fds, *arguments)
        result: int = getattr(lib, f"pc_pager_{name}")(self._pager, *arguments, *(fds.pop() for _ in fds[:1]))
        return result

    def _add_block(self, fds: list[int], address: int, size_bytes: int, page_bytes: int, kind: int) -> int:
        """Descriptors: the states, and the memory's where it has one."""
        memory_fd = fds.pop() if len(fds) > 1 else -1
        base = ffi.cast("void *", address)
        memory: Any = ffi.new("struct pc_memory *", [base, size_bytes, page_bytes, kind, memory_fd])
        result = lib.pc_pager_add_block(self._pager, memory, fds[0])
        if result < 0 and memory_fd >= 0:
            os.close(memory_fd)
        return result

    def _attach_urgent(self, fds: list[int], shard: int) -> int:
        return lib.pc_pager_attach_urgent(self._pager, shard, fds.pop(), ffi.NULL)  # TLS stays where its state is

    def _attach_bulk(self, fds: list[int], channel: int) -> int:
        return lib.pc_pager_attach_bulk(self._pager, channel, fds.pop(), ffi.NULL)

    def _set_zero(self, fds: list[int], block: int, words: int) -> int:
        return lib.pc_pager_set_zero(self._pager, block, _map(fds[0], words))

    def _forget(self, fds: list[int], block: int, words: int) -> int:
        return lib.pc_pager_forget(self._pager, block, _map(fds[0], words))

    def _record_touches(self, fds: list[int]) -> int:
        return lib.pc_pager_record_touches(self._pager, fds[0])

    def _request_runs(self, fds: list[int], count: int) -> int:
        runs: Any = ffi.new("struct pc_page_run[]", count)
        size = ffi.sizeof(runs)
        with mmap.mmap(fds[0], size, prot=mmap.PROT_READ) as view:
            ffi.memmove(runs, view, size)
        return lib.pc_pager_request_runs(self._pager, runs, count)

    def _adopt_shard(self, fds: list[int], features: int, busy_poll_us: int) -> int:
        fd, error = fds.pop(), self._error
        return lib.pc_pager_adopt_shard(self._pager, fd, features, busy_poll_us, error, len(error))

    def _arm(self, _: list[int], shard: int, block: int, first_page: int, pages: int) -> int:
        return lib.pc_pager_arm(self._pager, shard, block, first_page, pages, self._error, len(self._error))

    def _ping(self, _: list[int]) -> int:
        return 0

    def _free(self, _: list[int]) -> int:
        result = lib.pc_pager_free(self._pager)
        self.freed = result >= 0
        return result


def _map(fd: int, words: int) -> Any:
    """A copy of the page map in a memfd."""
    with mmap.mmap(fd, 8 * words, prot=mmap.PROT_READ) as view:
        copy: Any = ffi.new("uint64_t[]", words)
        ffi.memmove(copy, view, 8 * words)
    return copy


def main() -> None:
    link = socket.socket(fileno=int(sys.argv[1]))
    metrics_fd = int(sys.argv[2])
    child = PagerChild(metrics_fd)
    os.close(metrics_fd)
    link.setblocking(False)
    outbox: deque[bytes] = deque()
    poll = select.poll()
    poll.register(link, select.POLLIN)
    poll.register(child.event_fd, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if not outbox and child.event_fd in ready and (event := child.next_event()) is not None:
            outbox.append(event)
        if link.fileno() in ready and len(outbox) < OUTBOX:
            with contextlib.suppress(BlockingIOError):
                message, fds, _, _ = socket.recv_fds(link, MESSAGE_BYTES, DESCRIPTORS)
                if not message:
                    break  # the machine's process is gone, or has closed this pager
                outbox.append(child.answer(message, fds))
        with contextlib.suppress(BlockingIOError):
            while outbox:
                link.send(outbox[0])
                outbox.popleft()
        if child.freed:
            break  # if the answer could not be sent, the end of this process is the answer
        wanted = (select.POLLOUT if outbox else 0) | (select.POLLIN if len(outbox) < OUTBOX else 0)
        poll.modify(link, wanted)
        poll.modify(child.event_fd, 0 if outbox else select.POLLIN)
    # No clean-up: the process that made the userfaultfds still has them, and decides about the threads that wait there.
    os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ECONNRESET):  # the other end went first
            raise
