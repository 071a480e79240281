# SPDX-License-Identifier: Apache-2.0
"""A process that is a VMM to a page fault handler, as Firecracker is one: memory, a userfaultfd, a handshake.

Run as a script it reads orders from standard input, one a line, and answers each with a line: ``read FIRST COUNT`` (the
CRC32 of these pages), ``write PAGE BYTE``, ``remove FIRST COUNT`` (MADV_DONTNEED, which ends when the handler has read
the event), ``byte PAGE`` (the first one). `Vmm` is the other end.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import select
import signal
import socket
import sys
import threading
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

PAGE = 4096
DEADLINE_S = 30.0


class Vmm:
    """To be made by `start_vmm`."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.pid = process.pid
        self._buffer = bytearray()

    async def ask(self, *words: object) -> str:
        """An order, and its answer. It waits for as long as pages are missing, up to a deadline."""
        await self.send(*words)
        return await self.answer()

    async def send(self, *words: object) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all((" ".join(map(str, words)) + "\n").encode())

    async def answer(self) -> str:
        assert self.process.stdout is not None
        with trio.fail_after(DEADLINE_S):
            while b"\n" not in self._buffer:
                data = await self.process.stdout.receive_some()
                if not data:
                    raise EOFError(f"the VMM has ended, status {await self.process.wait()}")
                self._buffer += data
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        return line.decode()

    async def reads(self, content: bytes, first: int, count: int) -> bool:
        """Whether it reads these pages of the content."""
        return await self.ask("read", first, count) == str(zlib.crc32(content[first * PAGE : (first + count) * PAGE]))


@asynccontextmanager
async def start_vmm(path: str | Path, pages: int, *, second: int = 0, wait: bool = True) -> AsyncIterator[Vmm]:
    """One that has connected to the handler at `path`, unless it is not to be waited for: it may be killed at once.
    `second`: so many of its pages are a second region, which lies below the first."""
    command = [sys.executable, __file__, str(path), str(pages), str(second)]
    process = await trio.lowlevel.open_process(command, stdin=-1, stdout=-1)
    vmm = Vmm(process)
    try:
        if wait:
            assert await vmm.answer() == "connected"
        yield vmm
    finally:
        process.send_signal(signal.SIGKILL)
        with trio.CancelScope(shield=True):
            await process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            await trio.aclose_forcefully(pipe)


# ---- in the process


def _end_with(pid: int) -> None:
    """Ends this process with another one, also while its main thread waits for a page."""
    ended = os.pidfd_open(pid)

    def watch() -> None:
        select.select([ended], [], [])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Memory:
    """What the guest has, in the order of the memory file: its second region lies below the first."""

    def __init__(self, pages: int, second: int) -> None:
        from postcopy import Memory, Userfaultfd
        from postcopy.uffd import How, RegisterMode, UffdFeature

        self._memory = Memory.create("anon", pages * PAGE)
        self._pages, self._second = pages, second
        self._libc = ctypes.CDLL(None, use_errno=True)  # which lets other threads run meanwhile
        self._libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self._libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        self._libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.uffd = Userfaultfd.open(How.ANY, UffdFeature.EVENT_REMOVE)
        self.uffd.register(self._memory.address, pages * PAGE, RegisterMode.MISSING)

    @property
    def regions(self) -> list[dict[str, int]]:
        low, first = self._memory.address, self._pages - self._second
        regions = [{"base_host_virt_addr": low + self._second * PAGE, "size": first * PAGE, "offset": 0}]
        if self._second:
            regions.append({"base_host_virt_addr": low, "size": self._second * PAGE, "offset": first * PAGE})
        return [region | {"page_size": PAGE, "page_size_kib": PAGE} for region in regions]

    def address(self, page: int) -> int:
        first = self._pages - self._second
        return self._memory.address + (page + self._second if page < first else page - first) * PAGE

    def read(self, page: int) -> bytes:
        content = ctypes.create_string_buffer(PAGE)
        self._libc.memcpy(content, self.address(page), PAGE)
        return content.raw

    def write(self, page: int, byte: int) -> None:
        self._libc.memset(self.address(page), byte, 1)

    def remove(self, page: int) -> None:
        if self._libc.madvise(self.address(page), PAGE, mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")


def _main(path: str, pages: int, second: int) -> None:
    _end_with(os.getppid())
    memory = _Memory(pages, second)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    socket.send_fds(connection, [json.dumps(memory.regions).encode()], [memory.uffd.fileno()])
    print("connected", flush=True)
    for line in sys.stdin:
        order, *words = line.split()
        page, more = int(words[0]), int(words[1]) if len(words) > 1 else 1
        answer: object = "done"
        if order == "read":
            answer = 0
            for number in range(page, page + more):
                answer = zlib.crc32(memory.read(number), int(answer))
        elif order == "byte":
            answer = memory.read(page)[0]
        elif order == "write":
            memory.write(page, more)
        elif order == "remove":
            for number in range(page, page + more):
                memory.remove(number)
        print(answer, flush=True)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
