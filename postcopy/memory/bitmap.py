# SPDX-License-Identifier: Apache-2.0
"""One bit for each page: which pages are present, received, zero.

The words live in C memory, so that the core reads and writes them in place, and every operation that walks over pages
runs in C without the GIL. A bitmap is a private copy, which the core does not change later. It is not thread-safe.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

from postcopy._native import ffi, lib
from postcopy.errors import ProtocolError, check


class Bitmap:
    """`bits` bits, all clear at first. ``len()`` is the number of bits, ``bytes()`` the little-endian words."""

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __init__(self, bits: int) -> None:
        if bits < 0:
            raise ValueError("a bitmap cannot have a negative length")
        self._bits = bits
        self._word_count: int = lib.pc_bitmap_words(bits)
        self._words: Any = ffi.new("uint64_t[]", max(1, self._word_count))

    # ---- making one

    @classmethod
    def from_bytes(cls, words: bytes, bits: int) -> Bitmap:
        """The inverse of ``bytes(bitmap)``. Bits past the end are dropped; a wrong length is a `ValueError`."""
        bitmap = cls(bits)
        if len(words) != 8 * bitmap._word_count:
            raise ValueError(f"{len(words)} bytes for a bitmap of {bits} bits")
        ffi.memmove(bitmap._words, words, len(words))
        past_end = 8 * len(words) - bits
        lib.pc_bitmap_clear_range(bitmap._words, bits, past_end)
        return bitmap

    @classmethod
    def full(cls, bits: int) -> Bitmap:
        bitmap = cls(bits)
        bitmap.set_range(0, bits)
        return bitmap

    @classmethod
    def rle_decode(cls, data: bytes, bits: int) -> Bitmap:
        """Reads the run-length form (docs/protocol.md). `data` may come from a peer: a malformed or overlong map is a
        `ProtocolError`. `bits` must not come from the peer unchecked, since it is allocated."""
        bitmap = cls(bits)
        result = lib.pc_bitmap_rle_decode(data, len(data), bitmap._words, bits)
        if result == -errno.EBADMSG:
            raise ProtocolError(f"malformed page map: {len(data)} bytes do not describe {bits} pages")
        check(result, "decoding a page map")
        return bitmap

    def copy(self) -> Bitmap:
        other = Bitmap(self._bits)
        ffi.memmove(other._words, self._words, 8 * self._word_count)
        return other

    # ---- looking at it

    @property
    def words(self) -> Any:
        """The `uint64_t *` that the core takes; valid as long as the bitmap lives."""
        return self._words

    def __len__(self) -> int:
        return self._bits

    def crc32c(self, crc: int = 0) -> int:
        """CRC32C of the words in memory order, continuing `crc`: two copies of a map can be compared by it."""
        return int(lib.pc_crc32c(crc, self._words, 8 * self._word_count))

    def __bytes__(self) -> bytes:
        return bytes(ffi.buffer(self._words, 8 * self._word_count))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bitmap):
            return NotImplemented
        return self._bits == other._bits and bytes(self) == bytes(other)

    def __getitem__(self, bit: int) -> bool:
        if not 0 <= bit < self._bits:
            raise IndexError(f"bit {bit} of {self._bits}")
        return bool(self._words[bit // 64] >> (bit % 64) & 1)

    def __repr__(self) -> str:
        return f"<Bitmap: {self.count()} of {self._bits} set>"

    def count(self) -> int:
        """How many bits are set."""
        return int(lib.pc_bitmap_count(self._words, self._bits))

    def next(self, start: int, value: bool = True) -> int:
        """The first bit at or after `start` that equals `value`; ``len(bitmap)`` when there is none."""
        if start >= self._bits:
            return self._bits
        return int(lib.pc_bitmap_next(self._words, self._bits, max(0, start), int(value)))

    def runs(self, value: bool = True) -> Iterator[tuple[int, int]]:
        """(first, count) of each run of bits that equal `value`, in order."""
        end = 0
        while (first := self.next(end, value)) < self._bits:
            end = self.next(first, not value)
            yield first, end - first

    def rle_encode(self) -> bytes:
        """The run-length form: cheap where pages come in runs, never much longer than the words."""
        bytes_needed = check(lib.pc_bitmap_rle_encode(self._words, self._bits, ffi.NULL, 0), "encoding a page map")
        out = ffi.new("uint8_t[]", max(1, bytes_needed))
        check(lib.pc_bitmap_rle_encode(self._words, self._bits, out, bytes_needed), "encoding a page map")
        return bytes(ffi.buffer(out, bytes_needed))

    # ---- changing it, or making another of it

    def set_range(self, first: int, count: int) -> None:
        self._check_range(first, count)
        lib.pc_bitmap_set_range(self._words, first, count)

    def clear_range(self, first: int, count: int) -> None:
        self._check_range(first, count)
        lib.pc_bitmap_clear_range(self._words, first, count)

    def __and__(self, other: Bitmap) -> Bitmap:
        """The pages that are in both maps, which must be of the same length."""
        return self.without(other.inverted())

    def without(self, other: Bitmap) -> Bitmap:
        """The pages of this map that are not in the other one, which must be of the same length."""
        if len(other) != self._bits:
            raise ValueError(f"a map of {self._bits} pages and one of {len(other)}")
        rest = self.copy()
        lib.pc_bitmap_clear_those(rest._words, other._words, self._bits)
        return rest

    def inverted(self) -> Bitmap:
        """Every bit the other way round: the zero pages, of a map of those present."""
        return Bitmap.full(self._bits).without(self)

    def part(self, first: int, count: int) -> Bitmap:
        """A copy of `count` bits from `first` on, renumbered from 0."""
        self._check_range(first, count)
        part = Bitmap(count)
        lib.pc_bitmap_copy(part._words, 0, self._words, first, count)
        return part

    def parts(self, bits: int) -> Iterator[tuple[int, Bitmap]]:
        """(first, part) pieces of at most `bits` bits that together are the whole, as `page-map` messages carry it."""
        if bits <= 0:
            raise ValueError("parts need at least one bit")
        for first in range(0, self._bits, bits):
            yield first, self.part(first, min(bits, self._bits - first))

    def paste(self, first: int, part: Bitmap) -> None:
        """Replaces the bits from `first` on by `part`; beyond the end is an `IndexError`."""
        self._check_range(first, len(part))
        lib.pc_bitmap_copy(self._words, first, part._words, 0, len(part))

    def rescaled(self, from_page_bytes: int, to_page_bytes: int) -> Bitmap:
        """The same map for another page size, one a multiple of the other. A large page is set when any of its small
        ones is (right for "may hold something"; do not use it for "has arrived")."""
        if from_page_bytes == to_page_bytes:
            return self.copy()
        if max(from_page_bytes, to_page_bytes) % min(from_page_bytes, to_page_bytes):
            raise ValueError(f"page sizes {from_page_bytes} and {to_page_bytes} do not divide each other")
        other = Bitmap(-(-self._bits * from_page_bytes // to_page_bytes))
        lib.pc_bitmap_rescale(other._words, to_page_bytes, self._words, from_page_bytes, self._bits)
        return other

    # ---- private

    def _check_range(self, first: int, count: int) -> None:
        # In C this would be a write past the end.
        if first < 0 or count < 0 or first + count > self._bits:
            raise IndexError(f"bits {first} to {first + count} of {self._bits}")
