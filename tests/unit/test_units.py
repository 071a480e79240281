# SPDX-License-Identifier: Apache-2.0
"""Sizes, rates, times and whole numbers, as people write them and not."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import ConfigurationError
from postcopy.units import (
    MAX_RATE,
    MAX_SECONDS,
    among,
    check_word,
    format_exact_size,
    format_rate,
    format_seconds,
    format_size,
    parse_microseconds,
    parse_rate,
    parse_seconds,
    parse_seconds_range,
    parse_size,
    parse_whole,
    whole_units,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096B", 4096),
        ("1k", 1024),
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("2 TiB", 2 << 40),
        ("1G", 1 << 30),
        ("1gib", 1 << 30),
        ("100MB", 100_000_000),
        (" 16MiB ", 16 << 20),
    ],
)
def test_parse_size(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "1.2.3", "1e9", "0x10", "1 2", "1PiB", "٣", "nan", "1" * 50, "0.3B", "0.3"]
)
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 bytes"),
        (1000, "1000 bytes"),
        (4096, "4 KiB"),
        (1536 << 20, "1536 MiB"),
        (1 << 30, "1 GiB"),
        (1_500_000, "1.4 MiB"),
        (5 << 40, "5 TiB"),
    ],
)
def test_format_size(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("none", 0),
        ("0", 0),
        ("off", 0),
        ("100mbit", 12_500_000),
        ("1.5Mbit/s", 187_500),
        ("8000bit", 1000),
        ("7bit", 1),
        ("0.9bit", 1),
        ("0bit", 0),
        ("10MiB/s", 10 << 20),
        ("1000B/s", 1000),
        ("100 Mbit", 12_500_000),
    ],
)
def test_parse_rate(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "-1mbit", "1e3bit", "nanbit", "/s", "1" * 30, "1" * 50 + "bit", "٣"])
def test_parse_rate_refuses(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"a rate, as .*, not '|has no unit"):
        parse_rate(text)


@pytest.mark.parametrize(
    ("parse", "text", "readings"),
    [
        (parse_size, "64", "'64' has no unit; write 64MiB, or 64B for bytes"),
        (parse_size, "1.5", "'1.5' has no unit; write 1.5MiB, or 1.5B for bytes"),
        (parse_size, "1073741824", "'1073741824' has no unit; write 1073741824B for bytes"),
        (parse_rate, "100", "'100' has no unit; write 100MiB/s (bytes) or 100mbit (bits)"),
    ],
)
def test_a_bare_number_is_refused_with_its_readings(parse: Callable[[str], int], text: str, readings: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse(text)
    assert str(caught.value) == readings


@given(st.integers(0, 1 << 62) | st.integers(0, 1 << 22).map(lambda pages: pages << 12))
def test_size_that_is_shown_can_be_written(size_bytes: int) -> None:
    assert parse_size(format_exact_size(size_bytes)) == size_bytes


@pytest.mark.parametrize(("text", "us"), [("0", 0), ("20", 20), ("20us", 20), ("0.5ms", 500)])
def test_parse_microseconds(text: str, us: int) -> None:
    assert parse_microseconds(text, 1000) == us
    for wrong in ("-1", "1s", "x", "1001", "0.5", ""):
        with pytest.raises(ConfigurationError, match=r"microseconds from 0 to 1000, as 50, 50us or 0\.05ms, not"):
            parse_microseconds(wrong, 1000)


def test_a_word_that_is_none() -> None:
    check_word("anon", ("memfd", "anon"))
    with pytest.raises(ConfigurationError, match=r"^memfd or anon, not 'annon'; did you mean anon\?$"):
        check_word("annon", ("memfd", "anon"))
    with pytest.raises(ConfigurationError, match=r"^memfd or anon, not 'tape'$"):
        check_word("tape", ("memfd", "anon"))


def test_words_that_there_are() -> None:
    assert among(("a", "b")) == "; there are a, b"
    assert among(["a"]) == "; there is only a"


@pytest.mark.parametrize(
    ("size_bytes", "unit_bytes", "text"),
    [
        (10**9, 4096, "1GiB"),
        (1_500_000_000, 4096, "1500MiB"),
        (12345, 4096, "16KiB"),
        (10**6, 2 << 20, "2MiB"),
        (3 << 20, 2 << 20, "4MiB"),
    ],
)
def test_size_of_whole_pages(size_bytes: int, unit_bytes: int, text: str) -> None:
    assert whole_units(size_bytes, unit_bytes) == text


def test_a_rate_is_shown_as_it_was_written() -> None:
    for text in ("60MiB/s", "1500KiB/s", "100mbit", "1.5gbit", "none"):
        assert format_rate(parse_rate(text)) == text


@given(st.integers(0, MAX_RATE))
def test_rate_that_is_shown_can_be_written(rate: int) -> None:
    assert parse_rate(format_rate(rate)) == rate


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("2.5", 2.5),
        ("2.5s", 2.5),
        ("200ms", 0.2),
        ("1e-3", 0.001),
        ("1e9", 1e9),
        ("50us", 50e-6),
        ("5 min", 300.0),
        ("1h", 3600.0),
    ],
)
def test_parse_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "ms", "s", "-1", "-1ms", "nan", "inf", "1e10", "soon", "forever", "1_0", "x" * 100]
)
def test_parse_seconds_refuses(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"seconds.*, as 2\.5 or 200ms, not") as caught:
        parse_seconds(text)
    assert len(str(caught.value)) < 160


def test_bounds_are_said() -> None:
    with pytest.raises(ConfigurationError, match=r"seconds from 0\.05 to 3600, as 2\.5 or 200ms, not '4000'"):
        parse_seconds("4000", 0.05, 3600)
    with pytest.raises(ConfigurationError, match="a whole number from 1 to 16, not '0'"):
        parse_whole("0", 1, 16)
    with pytest.raises(ConfigurationError, match="a rate from 8kbit to 80kbit, or none, not '8bit'"):
        parse_rate("8bit", 1000, 10_000)


@given(st.just(math.inf) | st.integers(0, 10**12).map(lambda ms: ms / 1000))
def test_seconds_that_are_shown_can_be_written(seconds: float) -> None:
    assert parse_seconds(format_seconds(seconds), forever=True) == seconds <= max(MAX_SECONDS, seconds)


def test_parse_seconds_range() -> None:
    assert parse_seconds_range("0.1..500ms") == (0.1, 0.5)
    assert parse_seconds_range("2") == (2, 2)
    for text in ("", "..", "1..", "2..1"):
        with pytest.raises(ConfigurationError):
            parse_seconds_range(text)


@pytest.mark.parametrize("text", ["", "-1", "+1", "1.0", "1e1", " 1", "1_0", "٣", "9" * 30, "x"])
def test_parse_whole_refuses(text: str) -> None:
    with pytest.raises(ConfigurationError, match="a whole number from 0 to 100, not"):
        parse_whole(text, 0, 100)


@pytest.mark.slow
@given(st.sampled_from([parse_size, parse_rate, parse_seconds, parse_seconds_range]), st.text(max_size=60))
def test_any_text(parse: Callable[[str], object], text: str) -> None:
    with suppress(ConfigurationError):
        parse(text)
