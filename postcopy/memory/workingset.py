# SPDX-License-Identifier: Apache-2.0
"""Working sets: which pages a machine has touched, in the order of first touch, as a file.

The format, version 1 (docs/prefetch.md has it too): 8 bytes ``pcwset01``; the CRC32C of all that follows, as 4
bytes, the lowest first; a map in MessagePack:

| key | value |
|---|---|
| ``blocks`` | of a machine that has arrived: its RAM blocks, each its name and its size in bytes |
| ``image-bytes``, ``image-mtime``, ``image-sample`` | of a virtual machine that is restored from an image: which one, its size, the time of its last change in whole seconds since 1970, the SHA-256 of pieces of 4096 bytes at equal distances (at most 511) |
| ``page-bytes`` | the unit of what follows: 4096, or 2097152 |
| ``pages`` | how many pages there are in it |
| ``runs`` | bytes: for each run of pages two numbers, where it begins, counted from the end of the run before (from page 0 at first), and how many pages it has. Each number is in LEB128; the first one of a run may be negative, and is doubled, less one if it is negative, before (zigzag) |

Pages of a machine are counted over all its blocks. No page comes twice. The distance between two pieces of the sample is the 256th part of the image, in whole pieces, and
at least 4096 bytes.

The file is not trusted: its size, number of runs and every page are checked before a page is used.
"""  # noqa: E501

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import msgspec

from postcopy._files import read_regular, replacing, write_all
from postcopy._native import ffi, lib
from postcopy.errors import ConfigurationError, PostcopyError, ResourceError

MAGIC = b"pcwset01"
MAX_FILE_BYTES = 64 << 20
_HEADER_BYTES = len(MAGIC) + 4


class DamagedError(PostcopyError):
    """A file that is not, or not whole, what was written."""


@dataclass(frozen=True)
class Identity:
    """By which an image is known again: on another host too, where it was copied with its time (``cp -p``)."""

    size_bytes: int
    mtime_s: int  # whole seconds, as archives keep it
    sample: bytes  # SHA-256 of pieces of its content


class Image(Protocol):
    """One whose working set is read."""

    @property
    def path(self) -> str: ...
    @property
    def stamp(self) -> tuple[int, ...]:
        """The same for as long as it is the same file, and was not written to."""

    def identify(self) -> Identity: ...


Blocks = tuple[tuple[str, int], ...]
"""Names and sizes of a machine's RAM blocks, by which it is known again."""
Run = tuple[int, int, int]
"""Block, first page, pages."""


class _File(msgspec.Struct, rename="kebab", omit_defaults=True):
    page_bytes: int
    pages: int
    runs: bytes
    image_bytes: int = 0
    image_mtime: int = 0
    image_sample: bytes = b""
    blocks: Blocks = ()

    @property
    def size_bytes(self) -> int:
        return self.image_bytes or sum(size for _, size in self.blocks)


@dataclass(frozen=True)
class WorkingSet:
    """Runs of pages, each (first page, pages), in the order of first touch."""

    page_bytes: int
    runs: tuple[tuple[int, int], ...]

    @property
    def pages(self) -> int:
        return sum(count for _, count in self.runs)

    def in_pages_of(self, page_bytes: int) -> WorkingSet:
        """The same for memory that has pages of another size: all that have a part of it."""
        if page_bytes == self.page_bytes:
            return self
        pages: list[int] = []
        for first, count in self.runs:
            start, end = first * self.page_bytes, (first + count) * self.page_bytes
            pages.extend(range(start // page_bytes, -(-end // page_bytes)))
        return collect(page_bytes, pages)

    def in_blocks(self, blocks: Sequence[tuple[int, int]]) -> list[Run]:
        """The same for a machine's blocks, each its size and the size of its pages: all that have a part of it."""
        ends = list(accumulate(size for size, _ in blocks))
        found: list[Run] = []
        for first, count in self.runs:
            start, end = first * self.page_bytes, min((first + count) * self.page_bytes, ends[-1])
            while start < end:
                number = bisect_right(ends, start)
                begin, unit = ends[number] - blocks[number][0], blocks[number][1]
                stop = min(end, ends[number])
                low, high = (start - begin) // unit, -(-(stop - begin) // unit)
                found.append((number, low, high - low))
                start = stop
        return found


def of_machine(touches: Iterable[tuple[int, int]], blocks: Sequence[tuple[int, int]]) -> WorkingSet:
    """Of blocks and pages in the order in which they were touched. `blocks`: the size of each, and of its pages."""
    unit = min(page_bytes for _, page_bytes in blocks)
    begins = [end - size for end, (size, _) in zip(accumulate(size for size, _ in blocks), blocks, strict=True)]

    def pages() -> Iterator[int]:
        for block, page in touches:
            page_bytes = blocks[block][1]
            first = (begins[block] + page * page_bytes) // unit
            yield from range(first, first + page_bytes // unit)

    return collect(unit, pages())


def collect(page_bytes: int, touches: Iterable[int]) -> WorkingSet:
    """Of pages in the order in which they were touched; of one that comes again the first time counts."""
    runs: list[tuple[int, int]] = []
    seen: set[int] = set()
    first = end = -1
    for page in touches:
        if page in seen:
            continue
        seen.add(page)
        if page != end:
            if end > first:
                runs.append((first, end - first))
            first = page
        end = page + 1
    if end > first:
        runs.append((first, end - first))
    return WorkingSet(page_bytes, tuple(runs))


def write(path: str, found: WorkingSet, of: Identity | Blocks) -> None:
    """The whole file, or none; what was there before is replaced. Blocks on I/O. `ResourceError` when it cannot be."""
    content = _File(page_bytes=found.page_bytes, pages=found.pages, runs=_pack(found.runs))
    if isinstance(of, Identity):
        content.image_bytes, content.image_mtime, content.image_sample = of.size_bytes, of.mtime_s, of.sample
    else:
        content.blocks = of
    body = msgspec.msgpack.encode(content)
    try:
        with replacing(path) as fd:
            write_all(fd, MAGIC + _crc(body) + body)
    except OSError as error:
        raise ResourceError(f"--record-working-set {path}: {error.strerror}") from error


def read(path: str, image: Image) -> WorkingSet:
    """One that was written for this image. Blocks on I/O. `ConfigurationError` when it was written for another one, or
    is not there; `DamagedError` when it is damaged."""
    content = _read(path)
    if content.blocks:
        raise ConfigurationError(f"working set {path}: it is of a machine that has arrived, not of an image")
    identity = image.identify()
    differs = [
        name
        for name, one, other in (
            ("size", content.image_bytes, identity.size_bytes),
            ("time of last change", content.image_mtime, identity.mtime_s),
            ("content", content.image_sample, identity.sample),
        )
        if one != other
    ]
    if differs:
        raise ConfigurationError(
            f"working set {path}: it is of another image than {image.path}, which differs in {' and '.join(differs)};"
            " record it again (an image that was copied needs its time too: cp -p)"
        )
    return WorkingSet(content.page_bytes, _unpack(content, path))


def read_of_machine(path: str, blocks: Blocks) -> WorkingSet:
    """One that was written for a machine with these blocks. Blocks on I/O. Errors as of `read`."""
    content = _read(path)
    if content.blocks != blocks:
        raise ConfigurationError(
            f"working set {path}: it is of {'another machine' if content.blocks else 'an image'}: the RAM blocks of"
            " this machine have other names or sizes; record it again"
        )
    return WorkingSet(content.page_bytes, _unpack(content, path))


def check(path: str) -> None:
    """That a working set can be read there. Blocks on I/O. Errors as of `read`."""
    _unpack(_read(path), path)


def _read(path: str) -> _File:
    try:
        data = read_regular(path, MAX_FILE_BYTES)
    except OSError as error:
        raise ConfigurationError(f"working set {path}: {error.strerror}") from error
    return decode(data, path)


class Sets:
    """Those that were read, each as long as neither its file nor its image has changed: to read one takes as long as
    hundreds of faults, and the next virtual machine wants the same. To be used from any thread."""

    MAX = 16

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[int, ...], WorkingSet]] = {}

    def read(self, path: str, image: Image) -> WorkingSet:
        """As `read`."""
        try:
            status = os.stat(path)
        except OSError as error:
            raise ConfigurationError(f"working set {path}: {error.strerror}") from error
        stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, *image.stamp)
        known = self._known.get(path)
        if known is not None and known[0] == stamp:
            return known[1]
        found = read(path, image)
        if len(self._known) >= self.MAX:
            self._known.clear()
        self._known[path] = stamp, found
        return found


def decode(data: bytes, path: str) -> _File:
    """What a file has, but for its runs. `DamagedError`."""
    body = data[_HEADER_BYTES:]
    if not data.startswith(MAGIC):
        known = data.startswith(MAGIC[:-2])
        raise DamagedError(
            f"working set {path}: {'a version that is not known here' if known else 'this is no working set'}"
        )
    if data[len(MAGIC) : _HEADER_BYTES] != _crc(body):
        raise DamagedError(f"working set {path}: the checksum is wrong: it is damaged, or not whole")
    try:
        content = msgspec.msgpack.decode(body, type=_File)
    except ValueError as error:
        raise DamagedError(f"working set {path}: not what was written: {error}") from error
    if content.page_bytes not in (4096, 2 << 20, 1 << 30):
        raise DamagedError(f"working set {path}: pages of {content.page_bytes} bytes make no sense")
    sizes = [content.image_bytes] if content.image_bytes else [size for _, size in content.blocks]
    if not sizes or min(sizes) <= 0 or bool(content.image_bytes) is bool(content.blocks):
        raise DamagedError(f"working set {path}: it does not say what it is of")
    return content


def _crc(body: bytes) -> bytes:
    return int(lib.pc_crc32c(0, ffi.from_buffer("char[]", body), len(body))).to_bytes(4, "little")


def _pack(runs: Iterable[tuple[int, int]]) -> bytes:
    out = bytearray()
    end = 0
    for first, count in runs:
        step = first - end
        for number in (2 * step if step >= 0 else -2 * step - 1, count):
            while number > 0x7F:
                out.append(number & 0x7F | 0x80)
                number >>= 7
            out.append(number)
        end = first + count
    return bytes(out)


def _unpack(content: _File, path: str) -> tuple[tuple[int, int], ...]:
    limit = -(-content.size_bytes // content.page_bytes)
    runs: list[tuple[int, int]] = []
    end = pages = 0
    numbers = _numbers(content.runs)
    try:
        for step in numbers:
            count = next(numbers)
            first = end + (step >> 1 if step & 1 == 0 else -((step + 1) >> 1))
            end = first + count
            pages += count
            if first < 0 or count < 1 or end > limit or pages > min(content.pages, limit):
                raise ValueError
            runs.append((first, count))
        if pages != content.pages:
            raise ValueError
    except (ValueError, StopIteration):
        raise DamagedError(f"working set {path}: its pages make no sense") from None
    return tuple(runs)


def _numbers(packed: bytes) -> Iterator[int]:
    """ValueError for a number that is too long, or not whole."""
    number = shift = 0
    for byte in packed:
        number |= (byte & 0x7F) << shift
        shift += 7
        if shift > 63:
            raise ValueError
        if byte < 0x80:
            yield number
            number = shift = 0
    if shift:
        raise ValueError
