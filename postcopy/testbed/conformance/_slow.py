# SPDX-License-Identifier: Apache-2.0
"""An image that answers when it is told to: one file, served through /dev/fuse by this process.

For a handler it is a file on a slow disk: pread waits, preadv2(RWF_NOWAIT) says EAGAIN, an error is EIO. Only what is
needed of the protocol (linux/fuse.h, 7.31), without its library. Resource handling: a `SlowImage` is a mount and the
connection; when the latter is closed every reader is let go with an error, so that no process hangs in it afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from postcopy.testbed import _linux
from postcopy.testbed.conformance._model import NotApplicable

_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _RELEASE, _FLUSH = 1, 2, 3, 14, 15, 18, 25
_INIT, _OPENDIR, _INTERRUPT, _BATCH_FORGET = 26, 27, 36, 42
_HEADER = struct.Struct("<IIQQIIII")
_FOREVER_S = 1 << 31
_FILE = 2
_AHEAD_BYTES = 64 << 10  # a page that is held keeps those beside it, which are asked for with it
_FLAGS = 1 | 1 << 22  # FUSE_ASYNC_READ, FUSE_MAX_PAGES


class SlowImage:
    def __init__(self, image: int, connection: int, path: str) -> None:
        self.path = path
        self._image = image
        self._connection = connection
        self._held: set[int] = set()
        self._changed = trio.Event()
        self._serving = trio.CancelScope(shield=True)
        self.failing = False
        self.waiting = trio.Event()
        """Somebody reads a page that is held."""

    def hold(self, *pages: int) -> None:
        """Who reads one of these waits."""
        self._held.update(pages)
        self.waiting = trio.Event()

    def release(self) -> None:
        self._held.clear()
        self._changed.set()
        self._changed = trio.Event()

    def fail(self) -> None:
        """From now on every read fails, also those that wait."""
        self.failing = True
        self.release()

    def end(self) -> None:
        """Nobody has the file open any more."""
        self._serving.cancel()

    async def serve(self, nursery: trio.Nursery) -> None:
        """Until `end`, also when cancelled: a process that is killed closes its files, and cannot end before that is
        answered."""
        with self._serving:
            await self._serve(nursery)

    async def _serve(self, nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._connection)
            try:
                request = os.read(self._connection, 1 << 17)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EINTR, errno.ENOENT):
                    continue
                return  # unmounted
            _, opcode, unique, node, *_ = _HEADER.unpack_from(request)
            body = request[_HEADER.size :]
            if opcode == _READ:
                nursery.start_soon(self._read, unique, *struct.unpack_from("<QI", body, 8))
            elif opcode == _INIT:
                self._reply(
                    unique,
                    struct.pack(
                        "<IIIIHHIIHHII24x", 7, 31, _AHEAD_BYTES, _FLAGS, 64, 48, 4096, 1, _AHEAD_BYTES // 4096, 0, 0, 0
                    ),
                )
            elif opcode == _LOOKUP and body.rstrip(b"\0") == b"image":
                head = struct.pack("<QQQQII", _FILE, 1, _FOREVER_S, _FOREVER_S, 0, 0)
                self._reply(unique, head + self._attributes(_FILE))
            elif opcode == _LOOKUP:
                self._reply(unique, b"", errno.ENOENT)
            elif opcode == _GETATTR:
                self._reply(unique, struct.pack("<QII", _FOREVER_S, 0, 0) + self._attributes(node))
            elif opcode in (_OPEN, _OPENDIR):
                self._reply(unique, struct.pack("<QIi", 1, 0, 0))
            elif opcode in (_RELEASE, _FLUSH):
                self._reply(unique, b"")
            elif opcode not in (_FORGET, _BATCH_FORGET, _INTERRUPT):
                self._reply(unique, b"", errno.ENOSYS)

    def _attributes(self, node: int) -> bytes:
        size = os.fstat(self._image).st_size if node == _FILE else 0
        mode = stat.S_IFREG | 0o444 if node == _FILE else stat.S_IFDIR | 0o555
        return struct.pack("<QQQQQQIIIIIIIIII", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    async def _read(self, unique: int, offset: int, size: int) -> None:
        pages = set(range(offset // 4096, (offset + size + 4095) // 4096))
        try:
            while pages & self._held and not self.failing:
                self.waiting.set()
                await self._changed.wait()
        except trio.Cancelled:
            self._reply(unique, b"", errno.EIO)  # a process whose request is not answered cannot even be killed
            raise
        if self.failing:
            self._reply(unique, b"", errno.EIO)
        else:
            self._reply(unique, os.pread(self._image, size, offset))

    def _reply(self, unique: int, body: bytes, error: int = 0) -> None:
        with contextlib.suppress(OSError):  # who asked has been killed
            os.write(self._connection, struct.pack("<IiQ", 16 + len(body), -error, unique) + body)


@asynccontextmanager
async def open_slow_image(image: str, directory: str) -> AsyncIterator[SlowImage]:
    """`NotApplicable` where nothing can be mounted."""
    try:
        connection = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise NotApplicable(f"no slow image: cannot open /dev/fuse: {error.strerror}") from None
    original = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    mounted = False
    try:
        os.mkdir(directory)
        options = f"fd={connection},rootmode=40000,user_id=0,group_id=0,allow_other"
        try:
            _linux.call("mount", b"postcopy", directory.encode(), b"fuse", 0, options.encode())
        except OSError as error:
            raise NotApplicable(f"no slow image: cannot mount it: {error.strerror}") from None
        mounted = True
        async with trio.open_nursery() as nursery:
            slow = SlowImage(original, connection, os.path.join(directory, "image"))
            nursery.start_soon(slow.serve, nursery)
            try:
                yield slow
            finally:
                slow.end()
                nursery.cancel_scope.cancel()
    finally:
        trio.lowlevel.notify_closing(connection)
        os.close(connection)
        os.close(original)
        if mounted:
            _linux.call("umount2", directory.encode(), _linux.MNT_DETACH)
