# SPDX-License-Identifier: Apache-2.0
"""A memory image: RAM without a CPU.

The source reads a file (raw, sparse or not) that must not change meanwhile; the destination gathers it in memory. Since
nothing runs, there is nothing to pause or resume. Several migrations may share one source.

The source reads the file once at `boot` for a digest, which travels as the machine's state; the destination compares it
with the digest of what has arrived. So an image that is overwritten while it is served is noticed as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from postcopy._blocking import run_sync
from postcopy.errors import MigrationError, ProtocolError
from postcopy.machines.base import (
    CLOSE_TIMEOUT_S,
    BlockLayout,
    Check,
    Machine,
    MachineState,
    MachineStatistics,
    RamBlock,
)
from postcopy.memory import Memory, MemoryKind, check_memory, page_bytes_of
from postcopy.uffd import explain_unavailable

BLOCK_NAME = "image"


@dataclass(frozen=True)
class ImageOptions:
    image: str = ""  # path


class ImageMachine(Machine):
    """Made by `from_file` at the source, `for_destination` at the destination."""

    kind = "image"
    live = False
    kernel_faults = False

    def __init__(self, memory: Memory, file_bytes: int, verify: bool, path: str) -> None:
        self._memory = memory
        self._blocks: Sequence[RamBlock] = (RamBlock(BLOCK_NAME, memory, 0),)
        self._file_bytes = file_bytes
        self._path = path
        self._verify = verify
        self._digest: int | None = None
        self._stamp = self._file_stamp()
        self._booting = trio.Lock()
        self._state = MachineState.CREATED
        self._closed = trio.Event()
        self._owns_memory = True

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, verify: bool = True) -> ImageMachine:
        """The source. `verify`: read it once at `boot` for the digest. `ConfigurationError` for an unusable file."""
        memory = Memory.from_file(path)
        return cls(memory, memory.file_bytes, verify, os.fspath(path))

    @classmethod
    def for_destination(
        cls,
        config: Mapping[str, Any],
        layout: Sequence[BlockLayout],
        backing: str,
        disk: str | None = None,
        net: str | None = None,
    ) -> ImageMachine:
        """The twin of what a source offers. `ProtocolError` for an offer that makes no sense, `ResourceError` for one
        that this host cannot take."""
        unavailable = explain_unavailable(kernel_faults=False)
        if unavailable is not None:
            raise unavailable
        file_bytes = config.get("file-bytes")
        if type(file_bytes) is not int or len(layout) != 1 or layout[0].name != BLOCK_NAME:
            raise ProtocolError("an offer of an image must have its file-bytes and one block")
        if not 0 < file_bytes <= layout[0].size_bytes:
            raise ProtocolError(f"an image of {file_bytes} bytes in a block of {layout[0].size_bytes}")
        if layout[0].size_bytes - file_bytes >= max(layout[0].page_bytes, 1):
            raise ProtocolError(f"an image of {file_bytes} bytes does not fill a block of {layout[0].size_bytes}")
        unit = page_bytes_of(backing)
        size_bytes = -(-layout[0].size_bytes // unit) * unit
        check_memory(backing, size_bytes)
        memory = Memory.create(backing, size_bytes)
        return cls(memory, file_bytes, verify=True, path="")

    @property
    def blocks(self) -> Sequence[RamBlock]:
        return self._blocks

    @property
    def file_bytes(self) -> int:
        """The image's true size; its block is rounded up to whole pages."""
        return self._file_bytes

    @property
    def digest(self) -> int | None:
        """Of the source's file; None: it has not said it (yet)."""
        return self._digest

    @property
    def dump_bytes(self) -> int:
        return self._file_bytes

    def config(self) -> dict[str, Any]:
        return {"file-bytes": self._file_bytes}

    async def boot(self) -> None:
        """Reads the file for its digest, unless `verify` is false; once, also when several migrations ask. Cancellable:
        the worker thread then finishes, and its result is dropped."""
        async with self._booting:
            if self._state is not MachineState.CREATED:
                return
            if self._verify:
                self._digest = await run_sync(self._memory.digest, self._file_bytes, abandon_on_cancel=True)
            self._state = MachineState.PAUSED

    async def resume(self) -> None:
        await trio.lowlevel.checkpoint()

    async def pause(self, timeout_s: float = 10.0) -> None:
        await trio.lowlevel.checkpoint()

    async def save_state(self) -> bytes:
        """The digest. `MigrationError` when the file has changed since it was opened."""
        await self.boot()
        if self._file_stamp() != self._stamp:
            raise MigrationError(f"image {self._path} has changed since it was opened")
        return msgspec.msgpack.encode({"digest": self._digest})

    async def load_state(self, state: bytes) -> None:
        await trio.lowlevel.checkpoint()
        try:
            fields = msgspec.msgpack.decode(state)
        except (ValueError, RecursionError) as error:
            raise ProtocolError("the image's state is damaged") from error
        digest = fields.get("digest") if isinstance(fields, dict) else False
        if digest is not None and (type(digest) is not int or not 0 <= digest < 1 << 64):
            raise ProtocolError("the image's state is damaged: no digest in it")
        self._digest = digest
        self._state = MachineState.PAUSED

    def vcpu_threads(self) -> list[int]:
        return []

    def statistics(self) -> MachineStatistics:
        return MachineStatistics(self._state)

    async def verify(self) -> Check:
        how = "one digest of the CRC32Cs of all blocks: the source's file, read before, against the memory"
        if self._digest is None:
            return Check(False, "nothing: the source gave no digest", how)
        found = await run_sync(self._memory.digest, self._file_bytes, abandon_on_cancel=True)
        counts = {"bytes-checked": self._file_bytes}
        if found != self._digest:
            return Check(False, f"the digest is {found:#x} and should be {self._digest:#x}", how, counts)
        return Check(True, f"all {self._file_bytes} bytes of the image", how, counts)

    async def wait_ready(self) -> None:
        await trio.lowlevel.checkpoint()

    async def wait_changed(self) -> None:
        """Nothing changes but by its end."""
        await self._closed.wait()
        raise trio.ClosedResourceError("the machine was closed")

    def detach_memory(self) -> Memory:
        """The memory, the caller's from now on: `close` does not unmap it."""
        self._owns_memory = False
        return self._memory

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        if not self._closed.is_set():
            self._closed.set()
            if self._owns_memory:
                self._memory.drop()
            else:  # not left to the end of this object, which the frames of cancelled tasks may hold for a while
                self._blocks = ()
                del self._memory
        await trio.lowlevel.checkpoint()

    def _file_stamp(self) -> tuple[int, int]:
        if self._memory.kind is not MemoryKind.FILE:
            return 0, 0
        status = os.fstat(self._memory.fd)
        return status.st_size, status.st_mtime_ns
