# SPDX-License-Identifier: Apache-2.0
"""The one-line error buffer that many functions of the core take."""

from __future__ import annotations

from typing import Any

from postcopy._native import ffi, lib
from postcopy.errors import check


class ErrorLine:
    """A buffer for one call: pass `buffer` and `size`, then `check` the result."""

    def __init__(self) -> None:
        self.size: int = lib.PC_ERROR_BYTES
        self.buffer: Any = ffi.new("char[]", self.size)

    def __str__(self) -> str:
        return c_text(self.buffer)

    def check(self, result: int, what: str) -> int:
        return check(result, what, str(self))


def c_text(array: Any) -> str:
    """The text in a `char` array. Bytes that are not UTF-8 (a peer may have sent them) become U+FFFD, control
    characters spaces: what is printed is one line."""
    raw: Any = ffi.string(array)
    text = bytes(raw).decode("utf-8", "replace")
    return "".join(char if char.isprintable() else " " for char in text).strip()
