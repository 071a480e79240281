# SPDX-License-Identifier: Apache-2.0
"""What a destination asks for before it is touched: the words of ``--prefetch``."""

from __future__ import annotations

from postcopy.errors import ConfigurationError
from postcopy.units import check_word, parse_whole

WAYS = ("none", "forward", "both", "adaptive")
DEFAULT_PAGES = 8
MAX_PAGES = 64


def parse_prefetch(text: str) -> tuple[str, int]:
    """The way, and of how many pages; 0 where the way has no number. `ConfigurationError`."""
    way, colon, number = text.partition(":")
    check_word(way, WAYS)
    if way in ("none", "adaptive"):
        if colon:
            raise ConfigurationError(f"{way} has no number of pages")
        return way, 0
    return way, parse_whole(number, 1, MAX_PAGES) if colon else DEFAULT_PAGES


def check_prefetch(text: str) -> str:
    parse_prefetch(text)
    return text
