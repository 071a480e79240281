# SPDX-License-Identifier: Apache-2.0
"""What outlives the process that serves page faults: the descriptors of its VMs, under names.

The *engine* (the process that serves) may be killed at any instruction. Whatever it would be missed for lies in memory
files and other descriptors, and a `Store` holds a copy of each, so that the next engine goes on with them. There are
two: that of the keeper, a small process which runs the engine (`postcopy.handler._keeper`), and `LocalStore` for a
process without one, where nothing outlives anything.

**Ownership.** Descriptors in `taken` and those that `accept` returns are the caller's, to close; those in `listeners`
are the store's. `put` stores copies; the caller keeps its own.

**Names** are of printable ASCII without space and colon, and have at most `MAX_NAME_BYTES`. A connection that was
accepted has a name already, under which the store holds it: what belongs to its VM is `put` to the same name.

**The order that loses nothing.** A connection is in the store before the engine sees it. Its first message, with the
userfaultfd, is looked at with MSG_PEEK, which gives a copy of the descriptor too; then everything is `put` in one call;
then the message is received, and the first fault answered. An engine that is killed in between leaves either a
connection with its message unread, or a VM that is whole.
"""

from __future__ import annotations

import collections
import itertools
import os
import re
import socket
from collections.abc import Sequence
from typing import Protocol

import trio

from postcopy._native import lib
from postcopy.errors import ConfigurationError
from postcopy.net.sockets import accept_from

MAX_NAME_BYTES: int = lib.PC_KEEPER_NAME_BYTES
MAX_FDS: int = lib.PC_KEEPER_FDS
"""Of one `put`, and of one name."""

_NAME = re.compile(rf"[!-9;-~]{{1,{MAX_NAME_BYTES}}}")


class Store(Protocol):
    """See the head of this module. All methods belong to the Trio thread."""

    taken: dict[str, list[int]]
    """What was there when this process began to serve, but for listeners and for connections that are still as they
    were accepted. In no certain order: told apart by `kind_of`."""
    listeners: dict[str, int]
    """The listening sockets. The store accepts on them; the engine must not."""
    deaths: int
    """How many engines have died or been killed before this one, since the keeper was started. One that an upgrade has
    replaced is not counted."""
    reason: str
    """Why the one before this ended, for a person; empty for the first."""
    outlives: bool
    """Whether what is kept is there for another process when this one and its keeper have ended in order."""
    restarts: bool
    """Whether another engine goes on when this one ends otherwise than in order."""
    on_trial: bool
    """Whether this engine is another command's than the one before it, which is started again if it ends before it is
    `ready`."""
    leave: trio.Event
    """Set when another engine is to go on from here: let go of everything as it is (`pc_pager_leave`) and end the
    process with status 0."""

    async def accept(self) -> tuple[str, int]:
        """The next connection, in the store already: its name, and a descriptor of it (with O_NONBLOCK and O_CLOEXEC).
        Also those that an engine before this one had accepted when it died, and had not `put` anything to."""
        ...

    async def put(self, name: str, fds: Sequence[int]) -> None:
        """Adds copies of these to what the name has; returns when nothing that happens to this process can lose them.
        All or none: `ResourceError` where there is no room. A listening socket is accepted on from now on."""
        ...

    async def drop(self, name: str) -> None:
        """Closes what the name has. Nothing where there is no such name."""
        ...

    async def ready(self) -> None:
        """This engine serves."""
        ...

    async def upgrade(self, command: Sequence[str]) -> None:
        """Has another engine, started with this command, go on from here. Returns when that is ready to; `leave` is set
        then. `ConfigurationError` with the reason when it does not come so far, and this one goes on."""
        ...

    def status(self) -> dict[str, object]:
        """For people: ``store`` (who keeps it: ``none``, ``keeper``, ``keeper and systemd``), ``deaths``, ``spare``
        (whether an engine waits to go on)."""
        ...


def check_name(name: str) -> str:
    """`ValueError` for one that no store takes."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"not a name of something that is kept: {name!r}")
    return name


def kind_of(fd: int) -> str:
    """What a descriptor is: ``userfaultfd``, ``pidfd``, ``socket``, ``listener``, ``memfd:NAME``, ``eventfd``, or a
    path."""
    link = os.readlink(f"/proc/self/fd/{fd}")
    if link.startswith("socket:"):
        return "listener" if is_listening(fd) else "socket"
    if link.startswith("/memfd:"):
        return link[1:].removesuffix(" (deleted)")
    if link.startswith("pidfd:"):  # since Linux 6.9
        return "pidfd"
    return link.removeprefix("anon_inode:").strip("[]")


def is_listening(fd: int) -> bool:
    """Whether it is a socket that listens."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    finally:
        sock.detach()


class LocalStore:
    """For a process without a keeper: it accepts by itself, and nothing outlives it."""

    def __init__(self) -> None:
        self.taken: dict[str, list[int]] = {}
        self.listeners: dict[str, int] = {}
        self.deaths = 0
        self.reason = ""
        self.outlives = self.restarts = self.on_trial = False
        self.leave = trio.Event()
        self._numbers = itertools.count(1)
        self._send, self._receive = trio.open_memory_channel[tuple[str, int]](0)
        self._accepting: dict[str, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accepts until it is cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def _accept(self, name: str, fd: int) -> None:
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        waiting = collections.deque[trio.SocketStream]()

        def take(stream: trio.SocketStream) -> None:
            waiting.append(stream)
            accepting.cancel()

        try:
            with trio.CancelScope() as self._accepting[name]:
                while True:
                    # One after the other: those that nobody takes wait in the socket's own queue.
                    with trio.CancelScope() as accepting:
                        await accept_from([listener], f"connections of {name}", take)
                    while waiting:
                        await self._send.send((f"{name}.{next(self._numbers)}", waiting[0].socket.fileno()))
                        waiting.popleft().socket.detach()
        finally:
            for stream in waiting:
                stream.socket.close()
            listener.socket.close()

    async def accept(self) -> tuple[str, int]:
        return await self._receive.receive()

    async def put(self, name: str, fds: Sequence[int]) -> None:
        check_name(name)
        await trio.lowlevel.checkpoint()
        if is_listening(fds[0]) and self._nursery is not None:
            self._nursery.start_soon(self._accept, name, os.dup(fds[0]))

    async def drop(self, name: str) -> None:
        await trio.lowlevel.checkpoint()
        if name in self._accepting:
            self._accepting.pop(name).cancel()

    async def ready(self) -> None:
        await trio.lowlevel.checkpoint()

    async def upgrade(self, command: Sequence[str]) -> None:
        raise ConfigurationError("this process has no keeper, so another one cannot go on from it")

    def status(self) -> dict[str, object]:
        return {"store": "none", "deaths": 0, "spare": False}
