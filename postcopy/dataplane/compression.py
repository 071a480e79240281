# SPDX-License-Identifier: Apache-2.0
"""Compression of pages that are pushed: what this host can do. The libraries are loaded when they are asked for."""

from __future__ import annotations

import enum
from collections.abc import Collection

from postcopy._native import lib
from postcopy.errors import ErrorLine, ResourceError

__all__ = ["Compression", "available", "require"]


class Compression(enum.Flag):
    """A set of ways to compress; empty: none."""

    LZ4 = lib.PC_COMPRESSION_LZ4
    ZSTD = lib.PC_COMPRESSION_ZSTD


ALL = Compression.LZ4 | Compression.ZSTD


def available(wanted: Compression = ALL) -> Compression:
    """Those that this host has a library for."""
    line = ErrorLine()
    return Compression(lib.pc_compression_available(wanted.value, line.buffer, line.size))


def require(wanted: Compression) -> None:
    """`ResourceError` where one of them cannot be used here."""
    line = ErrorLine()
    if lib.pc_compression_available(wanted.value, line.buffer, line.size) != wanted.value:
        problem, _, remedy = str(line).partition("; Debian: ")
        raise ResourceError(f"compression: {problem}", remedy)


def names(ways: Compression) -> tuple[str, ...]:
    """As they are called on the wire."""
    return tuple(each.name.lower() for each in Compression if each in ways and each.name is not None)


def named(words: Collection[str]) -> Compression:
    """Those of these names; one that is not known here is left out."""
    found = Compression(0)
    for each in Compression:
        if each.name is not None and each.name.lower() in words:
            found |= each
    return found
