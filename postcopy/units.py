# SPDX-License-Identifier: Apache-2.0
"""Sizes, rates, times and whole numbers as people write them: one parser for each, and what writes them back.

A parser takes text and returns a number. `ConfigurationError` says what was wrong with the text and what to write in
its place; the caller adds whose value it was.

A size or a rate has its unit: 64 could be bytes or MiB, and 100 MiB/s or Mbit/s, so that a number alone is refused.
Where only one unit can be meant (SECONDS, a number in JSON) a number alone is read in that one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from postcopy.errors import ConfigurationError

T = TypeVar("T")

MAX_SIZE = 1 << 62
MAX_RATE = (1 << 63) - 1  # bytes a second
MAX_SECONDS = 1e9
FOREVER = "forever"
NO_LIMIT = ("none", "off")

_NUMBER = re.compile(r"\d+(?:\.\d+)?", re.ASCII)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?", re.IGNORECASE | re.ASCII)
_BITS = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt])?bit(?:/s)?", re.IGNORECASE | re.ASCII)
_TIME = re.compile(r"([-+.\deE]*?)\s*(us|ms|s|min|h)?", re.ASCII)
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
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


def parse_percent(text: str) -> float:
    """``10``, ``2.5%``: not less than 0."""
    if not _NUMBER.fullmatch(number := text.removesuffix("%").strip()) or len(number) > _MAX_CHARS:
        raise _wrong(text, "a number of percent, as 10 or 2.5%")
    return float(number)


def parse_size(text: str, low: int = 0, high: int = MAX_SIZE) -> int:
    """Bytes of ``4096B``, ``512MiB``, ``1.5GiB``; ``K M G T`` alone are binary, as QEMU reads them, ``kB MB GB TB``
    decimal. Of numbers alone only ``0`` is a size."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or len(text) > _MAX_CHARS:
        raise _wrong(text, "a size, as 512MiB, 1.5GiB or 4096B")
    number, prefix, suffix = match.groups()
    if _is_bare(text):
        small = float(number) < 1 << 20
        readings = f"{number}MiB, or {number}B for bytes" if small else f"{number}B for bytes"
        raise ConfigurationError(f"{_shown(text)} has no unit; write {readings}")
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


def format_exact_size(size_bytes: int) -> str:
    """What `parse_size` reads, of the same value, in the largest unit that has no fraction."""
    power = next(power for power in (4, 3, 2, 1, 0) if not size_bytes % 1024**power) if size_bytes else 0
    return f"{size_bytes // 1024**power}{('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def whole_units(size_bytes: int, unit_bytes: int) -> str:
    """A size of whole units for one that is not: that with a binary unit where it has a decimal one (1GiB for 1 GB),
    else the next larger one."""
    for power in (4, 3, 2, 1):
        meant, rest = divmod(size_bytes * 1024**power, 1000**power)
        if size_bytes % 1000**power == rest == meant % unit_bytes == 0:
            return format_exact_size(meant)
    return format_exact_size(-(-size_bytes // unit_bytes) * unit_bytes)


def parse_rate(text: str, low: int = 0, high: int = MAX_RATE) -> int:
    """Bytes a second of ``10MiB/s`` (bytes; the ``/s`` may be left out) or ``100mbit`` (bits, as tc(8) reads it). No
    limit is ``none``, ``off`` or ``0``, and 0."""
    if text in NO_LIMIT:
        return 0
    if len(text) <= _MAX_CHARS and _is_bare(text):
        raise ConfigurationError(f"{_shown(text)} has no unit; write {text}MiB/s (bytes) or {text}mbit (bits)")
    try:
        if (match := _BITS.fullmatch(text)) and len(text) <= _MAX_CHARS:
            bits, rest = _times(match[1], 1000 ** _power(match[2]))
            value = -(-(bits + bool(rest)) // 8)  # rounded up: 0 would be no limit
        else:
            value = parse_size(text.removesuffix("/s"))
    except ConfigurationError:
        raise _wrong(text, "a rate, as 100MiB/s or 100mbit, or none") from None
    if value and not low <= value <= high:
        raise _wrong(text, f"a rate from {format_rate(max(1, low))} to {format_rate(high)}, or none")
    return value


def format_rate(rate: int) -> str:
    """What `parse_rate` reads, of the same value: in bits or bytes, whichever is shorter."""
    if not rate:
        return NO_LIMIT[0]
    bits = rate * 8
    power = next(power for power in (4, 3, 2, 1, 0) if bits >= 1000**power)
    whole, rest = divmod(bits, 1000**power)
    fraction = str(rest).zfill(3 * power).rstrip("0")
    in_bits = f"{whole}{fraction and '.' + fraction}{' kmgt'[power].strip()}bit"
    return min(in_bits, f"{format_exact_size(rate)}/s", key=len) if rate <= MAX_SIZE else in_bits


def parse_seconds(text: str, low: float = 0.0, high: float = MAX_SECONDS, *, forever: bool = False) -> float:
    """Seconds of ``2.5``, ``2.5s``, ``200ms``, ``50us``, ``5min`` or ``1h``; with `forever` also that word, which is
    infinity."""
    if forever and text == FOREVER:
        return math.inf
    match = _TIME.fullmatch(text.strip())
    try:
        value = float(match[1]) * _SECONDS[match[2] or "s"] if match is not None else math.nan
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        bounds = f" from {low:g} to {high:g}" if (low, high) != (0.0, MAX_SECONDS) else ""
        raise _wrong(text, f'seconds{bounds} or "{FOREVER}"' if forever else f"seconds{bounds}, as 2.5 or 200ms")
    return value


def parse_microseconds(text: str, high: int) -> int:
    """Whole microseconds of ``50``, ``50us`` or ``0.05ms``. A number alone is not read as seconds."""
    try:
        if not text[-1:].isalpha():
            return parse_whole(text, 0, high)
        return round(parse_seconds(text, high=high / 1e6) * 1e6)
    except ConfigurationError:
        raise _wrong(text, f"microseconds from 0 to {high}, as 50, 50us or 0.05ms") from None


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


def check_word(text: str, known: Iterable[str]) -> str:
    """`text`, which is one of the `known` words; `ConfigurationError` otherwise."""
    words = tuple(known)
    if text not in words:
        raise ConfigurationError(f"{any_of(words)}, not {_shown(text)}{did_you_mean(text, words)}")
    return text


def any_of(words: Iterable[str]) -> str:
    """``a, b or c``."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def among(known: Iterable[str]) -> str:
    """``"; there are a, b, c"``, for a word that is none of them."""
    words = tuple(known)
    return f"; there {'are' if len(words) > 1 else 'is only'} {', '.join(words)}"


def did_you_mean(text: str, known: Iterable[str], prefix: str = "") -> str:
    """``"; did you mean X?"`` for the known word that is most like `text`, or nothing where none is. `prefix`: what the
    words begin with, `text` too, and what is left out of both, since it would make all of them alike."""
    from difflib import get_close_matches  # where something is wrong already

    words = list(known)
    close = get_close_matches(text, words, n=1) or [word for word in words if len(text) > 2 and text in word]
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _is_bare(text: str) -> bool:
    """A number without a unit; 0 is the same in all of them."""
    return _NUMBER.fullmatch(text.strip()) is not None and float(text) != 0


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
    return ConfigurationError(f"{what}, not {_shown(text)}")
