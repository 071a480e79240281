# SPDX-License-Identifier: Apache-2.0
"""What a pager asks for before it is touched: the policies of the core, and their words (``--prefetch``)."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from postcopy._native import lib
from postcopy.errors import ConfigurationError
from postcopy.units import check_word, parse_whole

DEFAULT_PAGES = 8


class Way(enum.IntEnum):
    NONE = lib.PC_PREFETCH_NONE
    FORWARD = lib.PC_PREFETCH_FORWARD
    BOTH = lib.PC_PREFETCH_BOTH
    ADAPTIVE = lib.PC_PREFETCH_ADAPTIVE

    @property
    def counts(self) -> bool:
        """Whether it is a matter of so many pages."""
        return self in (Way.FORWARD, Way.BOTH)


_WAYS = {way.name.lower(): way for way in Way}


@dataclass(frozen=True)
class Prefetch:
    way: Way = Way.NONE
    pages: int = 0  # behind a fault, or around it; 0 where the way has no number

    @classmethod
    def parse(cls, text: str) -> Prefetch:
        """`ConfigurationError` for what is no policy."""
        word, colon, number = text.partition(":")
        check_word(word, _WAYS)
        way = _WAYS[word]
        if not way.counts:
            if colon:
                raise ConfigurationError(f"{word} has no number of pages")
            return cls(way)
        return cls(way, parse_whole(number, 1, lib.PC_PREFETCH_MAX_PAGES) if colon else DEFAULT_PAGES)

    def __str__(self) -> str:
        return self.way.name.lower() + (f":{self.pages}" if self.pages else "")


NO_PREFETCH = Prefetch()
