# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import ProtocolError
from postcopy.memory.bitmap import Bitmap


def bitmap_of(bits: list[bool]) -> Bitmap:
    bitmap = Bitmap(len(bits))
    for bit, value in enumerate(bits):
        if value:
            bitmap.set_range(bit, 1)
    return bitmap


def as_list(bitmap: Bitmap) -> list[bool]:
    return [bitmap[bit] for bit in range(len(bitmap))]


bit_lists = st.lists(st.booleans(), max_size=300)


def test_empty() -> None:
    bitmap = Bitmap(0)
    assert (len(bitmap), bitmap.count(), bytes(bitmap), list(bitmap.runs())) == (0, 0, b"", [])
    assert Bitmap.rle_decode(bitmap.rle_encode(), 0) == bitmap
    assert bitmap.inverted() == bitmap
    assert list(bitmap.parts(10)) == []


@given(bit_lists)
def test_says_what_was_set(bits: list[bool]) -> None:
    bitmap = bitmap_of(bits)
    assert as_list(bitmap) == bits
    assert bitmap.count() == sum(bits)
    assert as_list(bitmap.inverted()) == [not bit for bit in bits]
    assert Bitmap.from_bytes(bytes(bitmap), len(bits)) == bitmap
    assert bitmap.copy() == bitmap
    runs = list(bitmap.runs())
    assert [bit for first, count in runs for bit in range(first, first + count)] == [i for i, b in enumerate(bits) if b]
    assert sum(count for _, count in bitmap.runs(False)) == len(bits) - sum(bits)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=300))
def test_two_maps(pairs: list[tuple[bool, bool]]) -> None:
    one, other = bitmap_of([a for a, _ in pairs]), bitmap_of([b for _, b in pairs])
    assert as_list(one & other) == [a and b for a, b in pairs]
    assert as_list(one.without(other)) == [a and not b for a, b in pairs]
    for combine in (one.without, one.__and__):
        with pytest.raises(ValueError, match="pages and one of"):
            combine(Bitmap(len(one) + 1))


@given(bit_lists)
def test_run_length_form_gives_it_back(bits: list[bool]) -> None:
    bitmap = bitmap_of(bits)
    assert Bitmap.rle_decode(bitmap.rle_encode(), len(bits)) == bitmap


@given(st.binary(max_size=64), st.integers(0, 200))
def test_any_bytes_decode_or_are_refused(data: bytes, bits: int) -> None:
    try:
        bitmap = Bitmap.rle_decode(data, bits)
    except ProtocolError:
        return
    assert len(bitmap) == bits
    assert Bitmap.from_bytes(bytes(bitmap), bits) == bitmap


def test_a_map_for_more_pages_is_refused() -> None:
    with pytest.raises(ProtocolError, match="99 pages"):
        Bitmap.rle_decode(Bitmap.full(100).rle_encode(), 99)


@given(bit_lists, st.integers(1, 130))
def test_parts_make_the_whole(bits: list[bool], size: int) -> None:
    bitmap, again = bitmap_of(bits), Bitmap(len(bits))
    again.set_range(0, len(bits))  # paste replaces, it does not add
    for first, part in bitmap.parts(size):
        assert as_list(part) == bits[first : first + size]
        again.paste(first, part)
    assert again == bitmap


@given(bit_lists, st.sampled_from([1, 2, 8, 512]))
def test_rescaled(bits: list[bool], factor: int) -> None:
    bitmap = bitmap_of(bits)
    large = bitmap.rescaled(4096, 4096 * factor)
    assert as_list(large) == [any(bits[i : i + factor]) for i in range(0, len(bits), factor)]
    small = bitmap.rescaled(4096 * factor, 4096)
    assert len(small) == factor * len(bits)
    assert small.count() == factor * bitmap.count()
    assert small.rescaled(4096, 4096 * factor) == bitmap


def test_page_sizes_that_do_not_divide_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        Bitmap(10).rescaled(4096, 6000)


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 11), (10, 1), (5, -1)])
def test_ranges_beyond_the_end_never_reach_the_core(first: int, count: int) -> None:
    bitmap = Bitmap(10)
    for function in (bitmap.set_range, bitmap.clear_range, bitmap.part):
        with pytest.raises(IndexError):
            function(first, count)
    with pytest.raises(IndexError):
        bitmap.paste(5, Bitmap(6))
    with pytest.raises(IndexError):
        bitmap[10]


def test_wrong_lengths_are_refused_and_bits_past_the_end_dropped() -> None:
    with pytest.raises(ValueError, match="bytes for a bitmap"):
        Bitmap.from_bytes(b"\0" * 7, 64)
    assert Bitmap.from_bytes(b"\xff" * 8, 3) == Bitmap.full(3)
