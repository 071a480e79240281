# SPDX-License-Identifier: Apache-2.0
"""Distributions of times as a log of HdrHistogram, for the tools of others (hdrhistogram.org: HistogramLogProcessor and
its plotters): format 1.3 of the log, V2 of the histograms, values in nanoseconds.

Our histograms have 32 buckets in each power of two, HdrHistogram's here at least 1000 (three significant digits): a
bucket of ours becomes one value, the highest that is in it, and the highest of all is exact.
"""

from __future__ import annotations

import base64
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from postcopy._files import write_output
from postcopy.errors import ConfigurationError
from postcopy.records import Json
from postcopy.records.timeline import Distribution

_DIGITS = 3
_HALF_BITS = 10  # 2 ** 11 values of one bucket size are the fewest that have three significant digits
_MAX_VALUE = (1 << 62) - 1
_MAX_MS = 100 * 365.25 * 86400e3
_COUNTS, _COMPRESSED = 0x1C849303 | 0x10, 0x1C849304 | 0x10  # cookies of V2, with the word size of its counts
_LEGEND = '"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"'


@dataclass(frozen=True)
class Interval:
    """One distribution: a line of the log."""

    tag: str
    start_s: float
    """By the wall clock, since the beginning of 1970."""
    length_s: float
    distribution: Distribution


def intervals(lines: Iterable[Json]) -> Iterator[Interval]:
    """Of lines of `--json`: the stages of the faults of each `timeline`, and what a `measurement` has. Others pass.
    `ConfigurationError` for a distribution that is none."""
    began_s = 0.0
    for line in lines:
        event, name = line.get("event"), ""
        try:
            if event == "run":
                began_s = datetime.fromisoformat(line["started"]).timestamp()
            elif event == "timeline":
                recording = line["recording"]
                name = ":".join(str(line[key]) for key in ("side", "machine", "vm") if key in line)
                start_s, at_ms = _time_s(recording["origin"]["unix-ms"]), recording["at-ms"]
                for stage, found in recording.get("latency", {}).items():
                    length_s = _time_s(at_ms[-1]) if at_ms else 0.0
                    yield Interval(f"{name}:{stage}", start_s, length_s, _checked(found))
            elif event == "measurement":
                name = f"{line['figure']}:{line['name']}"
                for value, found in line.get("distributions", {}).items():
                    length_s = _time_s(line["elapsed-ms"])
                    yield Interval(f"{name}:{value}", began_s, length_s, _checked(found))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ConfigurationError(
                f"a line of {event} {name[:100]!r} is not as postcopy writes it: {error}"
            ) from None


def write_hdr(path: str, found: Iterable[Interval]) -> None:
    """The log as the file that `--hdr` names, whole or not at all. `ConfigurationError` where there is nothing to
    write, `ResourceError` where it cannot be written."""
    write_output("--hdr", path, hdr_log(found))


def hdr_log(found: Iterable[Interval]) -> str:
    """The text of a log."""
    kept = [each for each in found if each.distribution.bucket_counts]
    if not kept:
        raise ConfigurationError("no line has a distribution of times: there is nothing for an HdrHistogram log")
    base_s = min(each.start_s for each in kept)
    when = datetime.fromtimestamp(base_s, UTC).isoformat(timespec="seconds")
    head = [
        "#[Histogram log format version 1.3]",
        f"#[StartTime: {base_s:.3f} (seconds since epoch), {when}]",
        f"#[BaseTime: {base_s:.3f} (seconds since epoch)]",
        _LEGEND,
    ]
    return "\n".join([*head, *(_line(each, base_s) for each in kept), ""])


def _line(interval: Interval, base_s: float) -> str:
    tag = re.sub(r"[^\w.:/+=()-]+", "_", interval.tag, flags=re.ASCII)
    values = _values(interval.distribution)
    start_s, longest_ms = interval.start_s - base_s, values[-1][0] / 1e6
    return f"Tag={tag},{start_s:.3f},{interval.length_s:.3f},{longest_ms:.3f},{encode(values)}"


def _time_s(ms: Any) -> float:
    """Of one in milliseconds, which a log can have: as a date, too."""
    if not 0 <= ms < _MAX_MS:
        raise ValueError("a time is out of range")
    return float(ms) / 1e3


def _checked(found: Any) -> Distribution:
    distribution = msgspec.convert(found, Distribution)
    edges, counts = distribution.bucket_edges_ns, distribution.bucket_counts
    if len(edges) != len(counts) or edges != sorted(set(edges)):
        raise ValueError("its buckets are not rising, or not as many as their counts")
    if not all(0 <= edge <= _MAX_VALUE for edge in edges) or min(counts, default=1) <= 0 or sum(counts) > _MAX_VALUE:
        raise ValueError("a bucket is out of range")
    return distribution


def _values(distribution: Distribution) -> list[tuple[int, int]]:
    edges, most = distribution.bucket_edges_ns, distribution.max_ns
    if not (edges[-2] + 1 if len(edges) > 1 else 0) <= most <= edges[-1]:
        most = edges[-1]
    return list(zip([*edges[:-1], most], distribution.bucket_counts, strict=True))


def encode(values: Iterable[tuple[int, int]]) -> str:
    """Rising values and how often each was seen, as HdrHistogram's V2 has them, compressed, in base64."""
    counts = bytearray()
    at = highest = 0
    pending = 0  # of the last index: several values may have one
    for value, count in values:
        index = _index(value)
        if index >= at and pending:
            counts += _zigzag(pending)
            pending = 0
        if index > at:
            counts += _zigzag(at - index)  # a run of so many zeros
        at, pending, highest = index + 1, pending + count, value
    counts += _zigzag(pending)
    head = struct.pack(">iiiiqqd", _COUNTS, len(counts), 0, _DIGITS, 1, max(2, highest), 1.0)
    packed = zlib.compress(head + counts)
    return base64.b64encode(struct.pack(">ii", _COMPRESSED, len(packed)) + packed).decode()


def _index(value: int) -> int:
    """Of the count of a value: the buckets of each power of two follow each other, all but the first half as long."""
    bucket = max(0, value.bit_length() - _HALF_BITS - 1)
    return (bucket << _HALF_BITS) + (value >> bucket)


def _zigzag(number: int) -> bytes:
    """LEB128 with the sign in the lowest bit; a ninth byte has eight bits of its own."""
    rest = (number << 1) ^ (number >> 63)
    written = bytearray()
    while rest > 0x7F and len(written) < 8:
        written.append(rest & 0x7F | 0x80)
        rest >>= 7
    written.append(rest)
    return bytes(written)
