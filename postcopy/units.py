# SPDX-License-Identifier: Apache-2.0
"""Sizes, rates, times and whole numbers as people write them: one parser for each, and what writes them back.

A parser takes text and returns a number. `ConfigurationError` says what was wrong with the text and what to write in
its place; the caller adds whose value it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

from postcopy.errors import ConfigurationError

T = TypeVar("T")

MAX_SIZE = 1 << 62
MAX_RATE = (1 << 63) - 1  # bytes a second
MAX_SECONDS = 1e9
FOREVER = "forever"
NO_LIMIT = ("none", "off")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?", re.IGNORECASE | re.ASCII)
_BITS = re.compile(r"(\d+(?:\.\d+)?)([kmgt])?bit(?:/s)?", re.IGNORECASE | re.ASCII)
_MAX_CHARS = 40


def argument(parse: Callable[..., T], *bounds: Any, **more: Any) -> Callable[[str], T]:
    """A parser with its bounds as the `type` of an argparse argument: the error is then one of argparse, which adds the
    argument's name."""

    def typed(text: str) -> T:
        try:
            return parse(text, *bounds, **more)
        except ConfigurationError as error:
            from argparse import ArgumentTypeError

            raise ArgumentTypeError(str(error)) from error

    return typed


def parse_whole(text: str, low: int, high: int) -> int:
    """A whole number, in decimal digits only."""
    if not (text.isascii() and text.isdigit() and len(text) < 21 and low <= int(text) <= high):
        raise _wrong(text, f"a whole number from {low} to {high}")
    return int(text)


def parse_size(text: str, low: int = 0, high: int = MAX_SIZE) -> int:
    """Bytes of ``4096``, ``512MiB``, ``1.5GiB``; ``K M G T`` alone are binary, as QEMU reads them, ``kB MB GB TB``
    decimal."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or len(text) > _MAX_CHARS:
        raise _wrong(text, "a size; write for instance 4096, 512MiB or 1.5GiB")
    number, prefix, suffix = match.groups()
    value, rest = _times(number, (1000 if suffix and suffix.lower() == "b" else 1024) ** _power(prefix))
    if rest:
        raise _wrong(text, "a whole number of bytes")
    if not low <= value <= high:
        raise _wrong(text, f"a size from {format_size(low)} to {format_size(high)}")
    return value


def format_size(size_bytes: int) -> str:
    """The shortest exact form with a binary unit (``1536 MiB``), else rounded to one digit (``1.4 GiB``)."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while power + 1 < len(units) and size_bytes >= 1024 ** (power + 1):
        power += 1
    below = 1024 ** (power - 1) if power else 1
    if size_bytes % 1024**power and size_bytes % below == 0 and size_bytes < 10 * 1024**power:
        power -= 1
    if size_bytes % 1024**power == 0:
        return f"{size_bytes // 1024**power} {units[power]}"
    return f"{size_bytes / 1024**power:.1f} {units[power]}"


def parse_rate(text: str, low: int = 0, high: int = MAX_RATE) -> int:
    """Bytes a second of ``10MiB/s`` (bytes; the ``/s`` may be left out) or ``100mbit`` (bits, as tc(8) reads it). No
    limit is ``none``, ``off`` or ``0``, and 0."""
    if text in NO_LIMIT:
        return 0
    try:
        if (match := _BITS.fullmatch(text)) and len(text) <= _MAX_CHARS:
            value = _times(match[1], 1000 ** _power(match[2]))[0] // 8
        else:
            value = parse_size(text.removesuffix("/s"))
    except ConfigurationError:
        raise _wrong(text, "a rate; write for instance 100MiB/s, 100mbit or none") from None
    if value and not low <= value <= high:
        raise _wrong(text, f"a rate from {format_rate(max(1, low))} to {format_rate(high)}, or none")
    return value


def format_rate(rate: int) -> str:
    """What `parse_rate` reads, of the same value, in bits."""
    if not rate:
        return NO_LIMIT[0]
    bits = rate * 8
    power = next(power for power in (4, 3, 2, 1, 0) if bits >= 1000**power)
    whole, rest = divmod(bits, 1000**power)
    fraction = str(rest).zfill(3 * power).rstrip("0")
    return f"{whole}{fraction and '.' + fraction}{' kmgt'[power].strip()}bit"


def parse_seconds(text: str, low: float = 0.0, high: float = MAX_SECONDS, *, forever: bool = False) -> float:
    """Seconds of ``2.5``, ``2.5s`` or ``200ms``; with `forever` also that word, which is infinity."""
    if forever and text == FOREVER:
        return math.inf
    number, factor = (text[:-2], 1e-3) if text.endswith("ms") else (text.removesuffix("s"), 1.0)
    try:
        value = float(number) * factor
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        bounds = f" from {low:g} to {high:g}" if (low, high) != (0.0, MAX_SECONDS) else ""
        examples = f"2.5, 200ms or {FOREVER}" if forever else "2.5 or 200ms"
        raise _wrong(text, f"a number of seconds{bounds}; write for instance {examples}")
    return value


def format_seconds(seconds: float) -> str:
    """What `parse_seconds` reads, of the same value."""
    return FOREVER if math.isinf(seconds) else f"{seconds:.12g}"


def parse_seconds_range(text: str) -> tuple[float, float]:
    """Of ``0.1..0.5``, or of one time."""
    low, dots, high = text.partition("..")
    first = parse_seconds(low)
    last = parse_seconds(high) if dots else first
    if last < first:
        raise ConfigurationError(f"{_shown(text)}: the second time is before the first")
    return first, last


def _power(prefix: str | None) -> int:
    return " kmgt".index(prefix.lower()) if prefix else 0


def _times(number: str, unit: int) -> tuple[int, int]:
    """A decimal number times `unit`: the whole part, and what is not 0 when there is more. Exact, which floats are
    not."""
    whole, _, fraction = number.partition(".")
    scale: int = 10 ** len(fraction)
    return divmod(int(whole + fraction) * unit, scale)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + "...")


def _wrong(text: str, what: str) -> ConfigurationError:
    return ConfigurationError(f"{_shown(text)} is not {what}")
