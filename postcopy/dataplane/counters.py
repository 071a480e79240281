# SPDX-License-Identifier: Apache-2.0
"""What was counted since a pager or page server was made, as frozen dataclasses of integers.

csrc/include/postcopy/engine.h has the only list of them, and says what each counts. The fields are made from its
structs: here, and for mypy in the stub (`make stub`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, make_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from postcopy._native import ffi

if TYPE_CHECKING:
    from postcopy._native import pc_pager_stats as PagerStatistics
    from postcopy._native import pc_pageserver_stats as PageServerStatistics
else:
    PagerStatistics, PageServerStatistics = (
        make_dataclass(name, [(field, int) for field, _ in ffi.typeof(f"struct {name}").fields], frozen=True)
        for name in ("pc_pager_stats", "pc_pageserver_stats")
    )

__all__ = ["PageServerStatistics", "PagerStatistics", "read"]

T = TypeVar("T", PagerStatistics, PageServerStatistics)


def read(cls: type[T], fill: Callable[[Any], object]) -> T:
    """Those that `fill` writes into a struct."""
    struct = ffi.new(f"struct {cls.__name__} *")
    fill(struct)
    return cls(*(int(getattr(struct, each.name)) for each in fields(cls)))
