# SPDX-License-Identifier: Apache-2.0
"""What is left of a migration whose other side is lost for good: each side writes what it has, `merge` joins the two.

When the network fails after the point of no return and one host never comes back, the machine's memory is in two
places: what has arrived is at the destination, where the machine may have changed it; the rest is at the source, as it
was at the pause. A *salvage* is a directory with the memory of one side and a map of the pages for which that side can
speak. A page of the destination's map comes from there, every other one from the source. A page for which nobody can
speak is *in doubt*, and named.

A salvage is written beside its name and renamed when it is complete: one that is there is whole. Nothing that was there
before is overwritten.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from ._errors import ConfigurationError, PostcopyError
from .bitmap import Bitmap
from .machines import Machine
from .memory import MemoryKind

FORMAT, VERSION = "postcopy-salvage", 1
PAUSE_TIMEOUT_S = 2.0
COPY_BYTES = 4 << 20
MAX_RANGES = 10_000  # of pages in doubt that are listed; the number of pages is always told
MAX_BLOCK_BYTES = 1 << 50


def check_target(path: str) -> None:
    """`ConfigurationError` when no salvage could be written there: to be found out while nothing is lost yet."""
    target = Path(path)
    if target.exists():
        raise ConfigurationError(f"--salvage {path}: exists already; name a directory that does not")
    if not target.absolute().parent.is_dir():
        raise ConfigurationError(f"--salvage {path}: there is no directory {target.absolute().parent}")
    if not os.access(target.absolute().parent, os.W_OK):
        raise ConfigurationError(f"--salvage {path}: no right to write into {target.absolute().parent}")


async def write(path: str, machine: Machine, migration: str, side: str, maps: Sequence[Bitmap]) -> bool:
    """Writes what this side has: the memory's content as far as it is there, and `maps`, a bitmap a RAM block in the
    memory's own pages, of what it can speak for. Touches no page that is missing.

    The machine is paused if that is possible. True when it was, and its state is there too: a machine with a vCPU that
    waits for a page which never comes cannot always be paused; what it still writes meanwhile may be torn. Blocks on
    I/O in a worker thread, which sees it through when cancelled. `PostcopyError` when it cannot be written.
    """
    state: bytes | None = None
    try:
        await machine.pause(PAUSE_TIMEOUT_S)
        state = await machine.save_state()
    except PostcopyError:
        pass  # said by the manifest
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "migration": migration,
        "side": side,
        "machine": machine.kind,
        "config": machine.config(),
        "paused": state is not None,
        "blocks": [
            {
                "name": block.name,
                "size-bytes": block.memory.size_bytes,
                "page-bytes": block.memory.page_bytes,
                "pages": known.count(),
            }
            for block, known in zip(machine.blocks, maps, strict=True)
        ],
    }
    await trio.to_thread.run_sync(_write, path, machine, maps, manifest, state)
    return state is not None


def _write(path: str, machine: Machine, maps: Sequence[Bitmap], manifest: dict[str, Any], state: bytes | None) -> None:
    part = Path(path + ".part")
    try:
        part.mkdir(mode=0o700)
        try:
            for number, (block, known) in enumerate(zip(machine.blocks, maps, strict=True)):
                with (part / f"{number:02}.memory").open("w+b") as file:
                    if block.memory.kind is MemoryKind.FILE:
                        _copy(block.memory.fd, 0, block.memory.file_bytes, file.fileno(), 0)
                    else:
                        block.memory.dump(file.fileno())
                    file.truncate(block.memory.size_bytes)
                (part / f"{number:02}.map").write_bytes(known.rle_encode())
            if state is not None:
                (part / "state").write_bytes(state)
            (part / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
            os.rename(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except OSError as error:
        raise PostcopyError(f"salvage to {path}: {error.strerror or error}") from error


# ---- reading them, and joining two


@dataclass(frozen=True)
class Block:
    name: str
    size_bytes: int
    page_bytes: int

    @property
    def pages(self) -> int:
        return -(-self.size_bytes // self.page_bytes)


@dataclass(frozen=True)
class Salvage:
    """One that was read and checked; the memory stays in its files."""

    path: Path
    migration: str
    side: str
    machine: str
    paused: bool
    blocks: tuple[Block, ...]

    def known(self, number: int) -> Bitmap:
        """The pages of a block for which it can speak."""
        try:
            runs = (self.path / f"{number:02}.map").read_bytes()
            return Bitmap.rle_decode(runs, self.blocks[number].pages)
        except (OSError, PostcopyError) as error:
            raise ConfigurationError(f"{self.path}: the map of block {number} is unusable: {error}") from error

    def memory(self, number: int) -> Path:
        return self.path / f"{number:02}.memory"


def read(path: str) -> Salvage:
    """`ConfigurationError` for anything that is not a whole salvage of this version."""
    there = Path(path)
    try:
        manifest = json.loads((there / "manifest.json").read_text())
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise ConfigurationError(f"{path}: a salvage of another version; use the postcopy that wrote it")
        blocks = tuple(Block(str(b["name"]), int(b["size-bytes"]), int(b["page-bytes"])) for b in manifest["blocks"])
        salvage = Salvage(
            there,
            str(manifest["migration"]),
            str(manifest["side"]),
            str(manifest["machine"]),
            manifest["paused"] is True,
            blocks,
        )
    except OSError as error:
        raise ConfigurationError(f"{path}: not a salvage: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path}: its manifest is damaged ({type(error).__name__}: {error})") from error
    for number, block in enumerate(blocks):
        if not (0 < block.size_bytes <= MAX_BLOCK_BYTES and 512 <= block.page_bytes <= 1 << 30):
            raise ConfigurationError(f"{path}: block {number} of {block.size_bytes} bytes makes no sense")
        if not salvage.memory(number).is_file() or salvage.memory(number).stat().st_size != block.size_bytes:
            raise ConfigurationError(f"{path}: the memory of block {number} is not there, or of another size")
    return salvage


@dataclass(frozen=True)
class Merged:
    """What became of two salvages. Pages are the smaller ones of the two sides."""

    from_dest_bytes: int
    from_source_bytes: int
    doubtful_bytes: int
    doubtful: list[dict[str, Any]]  # block, first-page, pages, page-bytes
    torn: bool  # the destination's machine could not be paused


def merge(paths: Sequence[str], output: str) -> Merged:
    """Joins the salvages of both sides, or takes what a single one has, into an image: the RAM blocks one after the
    other, sparse. Blocks on I/O. `ConfigurationError` when they do not belong together."""
    salvages = {salvage.side: salvage for salvage in map(read, paths)}
    if len(salvages) != len(paths):
        raise ConfigurationError(
            "both salvages are of the same side; name one of the source and one of the destination"
        )
    first = next(iter(salvages.values()))
    for other in salvages.values():
        if other.migration != first.migration:
            raise ConfigurationError("the salvages are of different migrations; only those of one belong together")
        if [(b.name, b.size_bytes) for b in other.blocks] != [(b.name, b.size_bytes) for b in first.blocks]:
            raise ConfigurationError("the salvages are of machines with different memory")
    if Path(output).exists():
        raise ConfigurationError(f"{output}: exists already; name a file that does not")
    part = Path(output + ".part")
    try:
        try:
            with part.open("w+b") as image:
                merged = _merge(salvages, image.fileno())
            os.rename(part, output)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise PostcopyError(f"merge into {output}: {error.strerror or error}") from error
    return merged


def _merge(salvages: dict[str, Salvage], image: int) -> Merged:
    counts = {"dest": 0, "source": 0}
    doubtful: list[dict[str, Any]] = []
    doubtful_bytes = start = 0
    blocks = next(iter(salvages.values())).blocks
    for number, block in enumerate(blocks):
        unit = min(salvage.blocks[number].page_bytes for salvage in salvages.values())
        left = Bitmap.full(-(-block.size_bytes // unit))
        for side in ("dest", "source"):  # what the destination has is newer
            if side not in salvages:
                continue
            salvage = salvages[side]
            take = left & salvage.known(number).rescaled(salvage.blocks[number].page_bytes, unit)
            with salvage.memory(number).open("rb") as memory:
                for first, pages in take.runs():
                    end = min((first + pages) * unit, block.size_bytes)
                    _copy(memory.fileno(), first * unit, end, image, start)
            counts[side] += take.count() * unit
            left = left & take.inverted()
        for first, pages in left.runs():
            doubtful_bytes += pages * unit
            if len(doubtful) < MAX_RANGES:
                doubtful.append({"block": block.name, "first-page": first, "pages": pages, "page-bytes": unit})
        start += block.size_bytes
    os.ftruncate(image, start)
    torn = "dest" in salvages and not salvages["dest"].paused
    return Merged(counts["dest"], counts["source"], doubtful_bytes, doubtful, torn)


def _copy(source: int, begin: int, end: int, image: int, start: int) -> None:
    """[begin, end) of one file to `start` further on in the other; holes stay holes."""
    at = begin
    while at < end:
        try:
            data = os.lseek(source, at, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole to the end
            return
        if data >= end:
            return
        at = max(at, data)
        stop = min(end, os.lseek(source, at, os.SEEK_HOLE))
        while at < stop:
            copied = _copy_range(source, at, image, start + at, min(COPY_BYTES, stop - at))
            if not copied:
                raise PostcopyError("a salvage became shorter while it was read")
            at += copied


def _copy_range(source: int, at: int, image: int, to: int, size_bytes: int) -> int:
    """How many bytes were copied; 0 at the end of the source."""
    try:
        return os.copy_file_range(source, image, size_bytes, at, to)
    except OSError as error:
        # Between two file systems: some kernels and file systems cannot, and say it in one of these ways.
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return os.pwrite(image, os.pread(source, size_bytes, at), to)
