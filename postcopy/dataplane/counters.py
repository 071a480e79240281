# SPDX-License-Identifier: Apache-2.0
"""The counters of the core as frozen dataclasses, with the names of its structs: the header has the only list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

from postcopy._native import ffi


class Counters:
    """What was counted since a pager or page server was made: integers; csrc/include/postcopy/engine.h says of what."""

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Any]]

        def __init__(self, *values: int, **named: int) -> None: ...
        def __getattr__(self, name: str) -> int: ...

    STRUCT: ClassVar[str]

    def __init_subclass__(cls, struct: str) -> None:
        cls.STRUCT = struct
        cls.__annotations__ = {name: "int" for name, _ in ffi.typeof(struct).fields}
        dataclass(frozen=True)(cls)

    @classmethod
    def read(cls, fill: Callable[[Any], object]) -> Self:
        """Those that `fill` writes into a struct."""
        struct: Any = ffi.new(f"{cls.STRUCT} *")
        fill(struct)
        return cls(*(int(getattr(struct, each.name)) for each in fields(cls)))


class PagerStatistics(Counters, struct="struct pc_pager_stats"):
    pass


class PageServerStatistics(Counters, struct="struct pc_pageserver_stats"):
    pass
