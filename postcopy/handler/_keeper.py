# SPDX-License-Identifier: Apache-2.0
"""The store of a process that a keeper runs: a small program (``postcopy-keeper``, csrc/keeper) that holds copies of
all descriptors, and starts another engine when this one dies.

`keep` makes the keeper of this process: the command that a user or systemd started becomes it, and runs the engine as a
child. `open_store` is what an engine calls when it has imported all that it needs. It may wait there for as long as
another engine serves.

**A keeper that was killed** (by the kernel, which lacked memory, or by a person) is replaced by the engine: it has a
copy of every descriptor too, starts another keeper, which cannot be its parent any more, and gives it everything.
Under systemd the unit ends with the keeper, and the next one gets all descriptors from systemd: there
is nothing to be done here then.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import shlex
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import NoReturn

import trio

from postcopy._child import python
from postcopy._files import installed_program
from postcopy._native import lib
from postcopy.errors import NO_FILES, ConfigurationError, ResourceError, out_of_files
from postcopy.handler._store import MAX_FDS, LocalStore, Store, check_name, is_listening, kind_of
from postcopy.records import VERSION

ENVIRONMENT, TRIAL = "POSTCOPY_KEEPER", "POSTCOPY_KEEPER_TRIAL"
PROGRAM = "keeper"
RESTART_S = 1.0
"""At least, between the starts of two keepers."""
_HEAD = struct.Struct("=Ii")
_INT = struct.Struct("=i")
_MESSAGE_BYTES: int = _HEAD.size + lib.PC_KEEPER_TEXT_BYTES
_FD_BYTES = 4

log = logging.getLogger(__name__)


# ---- before there is an engine


def in_keeper() -> bool:
    """Whether a keeper runs this process, as an engine that has not called `open_store` yet."""
    return ENVIRONMENT in os.environ


def systemd_keeps() -> bool:
    """Whether systemd has a copy of all that the keeper has, so that another process goes on after this unit was
    restarted."""
    return os.environ.get("FDSTORE", "0") not in ("", "0") and "NOTIFY_SOCKET" in os.environ


def keep(command: Sequence[str], *, spare: bool = True, log_json: bool = False, burst: int = 5) -> NoReturn:
    """Becomes the keeper, which runs `command` (the absolute path of a program first) as its engine. With the listening
    sockets that systemd has passed; with a `spare` engine while one serves. After `burst` deaths in short order the
    next engine has to wait."""
    keeper = installed_program(PROGRAM)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(keeper, [keeper, *_options(spare, log_json, burst), "--", *command])


def _options(spare: bool, log_json: bool, burst: int) -> list[str]:
    options = ["--burst", str(burst)] + ([] if spare else ["--no-spare"])
    return options + (["--log-json", str(VERSION)] if log_json else [])


# ---- in an engine


@asynccontextmanager
async def open_store(
    *, formats: tuple[int, int] = (1, 1), spare: bool = True, log_json: bool = False, burst: int = 5
) -> AsyncIterator[Store]:
    """The store of this process, from when it is to serve: under a keeper it waits here until no other engine does.

    `formats`: which formats of records it reads, the oldest, and the one that it writes. `spare`, `log_json` and
    `burst` as for `keep`, for a keeper that has to be replaced.
    """
    if not in_keeper():
        local = LocalStore()
        async with _running(local.run):
            yield local
        return
    fd = int(os.environ.pop(ENVIRONMENT))
    os.set_inheritable(fd, False)
    store = KeeperStore(socket.socket(fileno=fd), formats, _options(spare, log_json, burst))
    try:
        await store.take()
        async with _running(store.run):
            yield store
        store.say_end()
    finally:
        store.close()


@asynccontextmanager
async def _running(run: Callable[..., Awaitable[None]]) -> AsyncIterator[None]:
    """A task for as long as the block lasts; what the block raises is raised as it is, and not in a group."""
    error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        try:
            yield
        except BaseException as raised:  # noqa: BLE001  # raised again below
            error = raised
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error


class _Call:
    """What was asked of the keeper, and is answered once: by this keeper or the one after it."""

    def __init__(self, kind: int, text: bytes, fds: Sequence[int]) -> None:
        self.kind, self.text, self.fds = kind, text, fds
        self.answered = trio.Event()
        self.error = 0
        self.why = ""


class KeeperStore:
    """See `open_store`."""

    def __init__(self, sock: socket.socket, formats: tuple[int, int], options: Sequence[str]) -> None:
        self.taken: dict[str, list[int]] = {}
        self.listeners: dict[str, int] = {}
        self.deaths = 0
        self.reason = ""
        self.outlives = systemd_keeps()
        self.restarts = True
        self.on_trial = os.environ.pop(TRIAL, "") != ""
        self.leave = trio.Event()
        self._formats, self._options = formats, options
        self._kept: dict[str, list[int]] = {}  # copies of what the keeper has, for the one after it
        self._calls: dict[int, _Call] = {}
        self._number = 0
        self._spare = False
        self._serves = False
        self._keeper: subprocess.Popen[bytes] | None = None  # one that this process has started
        self._start_at_s = -math.inf  # not before, the next one
        self._arrived, self._connections = trio.open_memory_channel[tuple[str, int]](math.inf)  # the keeper has a limit
        self._sending = trio.Lock()
        self._tasks: trio.Nursery | None = None  # while it is run
        self._connect(sock)

    # -- what a `Store` does

    async def accept(self) -> tuple[str, int]:
        return await self._connections.receive()

    async def put(self, name: str, fds: Sequence[int]) -> None:
        """Cancelled, it may have been done."""
        check_name(name)
        if not 1 <= len(fds) <= MAX_FDS:
            raise ValueError(f"{len(fds)} descriptors for {name}; 1 to {MAX_FDS} can be put at once")
        copies = _duplicate(fds, name)
        self._kept.setdefault(name, []).extend(copies)
        call = await self._call(lib.PC_KEEPER_PUT, name.encode(), copies)
        if call.error:
            kept = self._kept.get(name, [])
            kept[:] = [fd for fd in kept if fd not in copies]
            if not kept:
                self._kept.pop(name, None)
            _close(copies)
            raise ResourceError(
                f"the keeper does not take what belongs to {name}: {call.why or os.strerror(call.error)}"
            )

    async def drop(self, name: str) -> None:
        self.listeners.pop(name, None)
        _close(self._kept.pop(name, []))
        await self._call(lib.PC_KEEPER_DROP, name.encode())

    async def ready(self) -> None:
        self._serves = True
        await self._send(lib.PC_KEEPER_READY)

    async def upgrade(self, command: Sequence[str]) -> None:
        call = await self._call(lib.PC_KEEPER_UPGRADE, b"".join(os.fsencode(word) + b"\0" for word in command))
        if call.error:
            why = call.why or os.strerror(call.error)
            raise ConfigurationError(f"no other engine goes on from here ({shlex.join(command)}): {why}")

    def status(self) -> dict[str, object]:
        kind = "keeper and systemd" if self.outlives else "keeper"
        return {"store": kind, "deaths": self.deaths, "spare": self._spare}

    # -- its life

    def _connect(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = trio.socket.from_stdlib_socket(sock)

    async def take(self) -> None:
        """Waits until this process is to serve, and has what there is."""
        await self._send_hello()
        while not self._serves:
            if not await self._receive():
                # A spare, of which nobody will want anything any more; it has nothing, and nobody to say that to.
                os._exit(0)
        self._serves = False  # until it is ready to

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hears what the keeper says, until it is cancelled."""
        async with trio.open_nursery() as self._tasks:
            task_status.started()
            while True:
                while await self._receive():
                    pass
                self._tasks.start_soon(await self._replace_keeper())

    def say_end(self) -> None:
        """This process ends in order, and the keeper with it, unless another engine is to go on."""
        if not self.leave.is_set():
            with contextlib.suppress(OSError):
                os.write(self._socket.fileno(), _HEAD.pack(lib.PC_KEEPER_END, 0))

    def close(self) -> None:
        self._socket.close()
        for fds in self._kept.values():
            _close(fds)
        self._kept.clear()
        with contextlib.suppress(trio.WouldBlock):
            while True:
                os.close(self._connections.receive_nowait()[1])

    # -- messages

    async def _send(self, kind: int, value: int = 0, text: bytes = b"", fds: Sequence[int] = ()) -> None:
        """What a keeper does not get that has died, the next one gets."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
        sock = self._socket
        async with self._sending:
            try:
                await sock.sendmsg([_HEAD.pack(kind, value), text], ancillary)
            except trio.ClosedResourceError:
                pass
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EBADF):  # the last one: closed meanwhile
                    raise

    async def _send_hello(self) -> None:
        await self._send(lib.PC_KEEPER_HELLO, lib.PC_KEEPER_PROTOCOL, struct.pack("=ii", *self._formats))

    async def _call(self, kind: int, text: bytes, fds: Sequence[int] = ()) -> _Call:
        number = self._number = self._number % 0x7FFFFFFF + 1
        call = self._calls[number] = _Call(kind, text, fds)
        try:
            await self._send(kind, number, text, fds)
            await call.answered.wait()
        finally:
            del self._calls[number]
        return call

    async def _receive(self) -> bool:
        """One message; False when the keeper has ended."""
        try:
            data, ancillary, flags, _ = await self._socket.recvmsg(
                _MESSAGE_BYTES, socket.CMSG_SPACE(MAX_FDS * _FD_BYTES), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:  # it has not read all; this comes once, before what it had sent
            return True
        fds: list[int] = []
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds += struct.unpack(f"={len(payload) // _FD_BYTES}i", payload[: len(payload) // _FD_BYTES * _FD_BYTES])
        if not data:
            return False
        kind, value = _HEAD.unpack_from(data)
        text = data[_HEAD.size :]
        match kind:
            case lib.PC_KEEPER_ENTRY:
                self._enter(text.decode(), fds, whole=not flags & socket.MSG_CTRUNC)
            case lib.PC_KEEPER_GO:
                self._serves = True
                self.deaths, self.reason = value, text.decode(errors="replace")
            case lib.PC_KEEPER_ANSWER:
                if (call := self._calls.get(value)) is not None:
                    (call.error,) = _INT.unpack_from(text)
                    call.why = text[_INT.size :].decode(errors="replace")
                    call.answered.set()
            case lib.PC_KEEPER_SPARE:
                self._spare = bool(value)
            case lib.PC_KEEPER_LEAVE:
                self.leave.set()
        return True

    def _enter(self, name: str, fds: list[int], *, whole: bool) -> None:
        try:
            if not whole:
                raise out_of_files(errno.EMFILE, f"this engine cannot have {name}")
            listens = is_listening(fds[0])
            copies = fds if listens else _duplicate(fds, name)
        except ResourceError as error:
            _close(fds)
            if self._tasks is None:
                raise
            # A connection that is new: its peer is told by its end, and all others are served.
            log.error("a connection is closed: %s", error)
            self._tasks.start_soon(self.drop, name)
            return
        self._kept.setdefault(name, []).extend(copies)
        if listens:
            self.listeners[name] = fds[0]
        elif len(fds) == 1 and kind_of(fds[0]) == "socket":
            self._arrived.send_nowait((name, fds[0]))
        else:
            self.taken[name] = fds

    # -- when the keeper has died

    async def _replace_keeper(self) -> Callable[[], Awaitable[None]]:
        """Returns what gives everything to the next one, to be run while this process hears it."""
        if self.outlives:
            log.error("the keeper has ended; systemd has all that it had, and ends this process too")
            os._exit(1)
        log.error("the keeper has ended; until there is another one nothing outlives this process")
        self._spare = False
        sock = None
        while sock is None:
            await trio.sleep_until(self._start_at_s)
            self._start_at_s = trio.current_time() + RESTART_S
            sock = self._start_keeper()
        self._socket.close()
        self._connect(sock)
        # What is put or dropped from here on goes to the new one; all else is in these. Listening sockets come last: it
        # accepts on them at once, and must know which names of connections are taken.
        names = sorted(self._kept, key=lambda name: is_listening(self._kept[name][0]))
        kept = {name: tuple(self._kept[name]) for name in names}
        return partial(self._give_everything, self._socket, kept, list(self._calls.values()))

    async def _give_everything(
        self, sock: trio.socket.SocketType, kept: Mapping[str, Sequence[int]], calls: Sequence[_Call]
    ) -> None:
        await self._send_hello()
        for name, fds in kept.items():
            still = [fd for fd in fds if fd in self._kept.get(name, ())]  # unless it was dropped meanwhile
            if self._socket is not sock:
                return  # that one has ended too
            if not still:
                continue
            copies = _duplicate(still, name)  # it may be dropped, and its descriptors closed, before this is sent
            try:
                call = await self._call(lib.PC_KEEPER_PUT, name.encode(), copies)
            finally:
                _close(copies)
            if call.error:
                log.error("the new keeper does not take what belongs to %s: %s", name, call.why)
        if self._socket is sock:
            log.warning("the new keeper has all that the one before it had: %d names", len(kept))
        for call in calls:
            if call.kind == lib.PC_KEEPER_UPGRADE:
                call.error, call.why = errno.ECONNRESET, "the keeper has ended meanwhile; try again"
            call.answered.set()

    def _start_keeper(self) -> socket.socket | None:
        if self._keeper is not None:
            self._keeper.poll()
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            log.error("no keeper can be started: %s; it is tried again", error.strerror)
            return None
        with theirs:
            try:
                pidfd = os.pidfd_open(os.getpid())
                try:
                    adopt = ["--adopt", f"{theirs.fileno()},{pidfd}", "--deaths", str(self.deaths)]
                    command = python(*sys.orig_argv[1:])
                    self._keeper = subprocess.Popen(
                        [installed_program(PROGRAM), *adopt, *self._options, "--", *command],
                        stdin=subprocess.DEVNULL,
                        pass_fds=[theirs.fileno(), pidfd],
                        process_group=0,
                    )
                finally:
                    os.close(pidfd)
            except (OSError, ResourceError) as error:
                log.error("no keeper can be started: %s; it is tried again", error)
                ours.close()
                return None
        log.warning("process %d is the keeper now: send signals for this service to it", self._keeper.pid)
        return ours


def _duplicate(fds: Sequence[int], name: str) -> list[int]:
    """Copies, all or none."""
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))
    except OSError as error:
        _close(copies)
        if error.errno in NO_FILES:
            raise out_of_files(error.errno, f"what belongs to {name} cannot be kept") from error
        raise
    return copies


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
