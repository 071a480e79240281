# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from postcopy._native import lib
from postcopy.errors import BusyError, ConfigurationError, CoreError, PostcopyError, ResourceError
from postcopy.memory import Memory, MemoryKind, check_memory, page_bytes_of
from postcopy.memory.bitmap import Bitmap

PAGE = page_bytes_of("memfd")
KINDS = ["memfd", "anon"]


def write_image(path: Path, pages: dict[int, bytes], size_bytes: int) -> None:
    """A sparse file with these pages."""
    with path.open("wb") as file:
        for page, content in pages.items():
            file.seek(page * PAGE)
            file.write(content)
        file.truncate(size_bytes)


def page(number: int) -> bytes:
    return random.Random(number).randbytes(PAGE)


# ---- making it


@pytest.mark.parametrize("kind", KINDS)
def test_new_memory_is_zero_and_absent(kind: str) -> None:
    with Memory.create(kind, 64 * PAGE) as memory:
        assert (memory.kind, memory.size_bytes, memory.page_bytes, memory.pages) == (kind, 64 * PAGE, PAGE, 64)
        assert memory.address % PAGE == 0
        assert (memory.fd >= 0) == (kind == "memfd")
        assert memory.present() == Bitmap(64)
        assert memory.resident_bytes() == 0
    assert memory.closed
    assert (memory.address, memory.fd) == (0, -1)


@pytest.mark.parametrize("size_bytes", [0, -PAGE, PAGE + 1, 1 << 62, 1 << 80])
def test_impossible_sizes(size_bytes: int) -> None:
    for function in (Memory.create, check_memory):
        with pytest.raises((ConfigurationError, ResourceError)) as caught:
            function("memfd", size_bytes)
        assert "\n" not in str(caught.value)


def test_more_than_the_host_has() -> None:
    with pytest.raises(ResourceError) as caught:
        Memory.create("anon", 1 << 60)
    assert caught.value.remedy
    assert caught.value.remedy in str(caught.value)


@pytest.mark.parametrize("kind", ["file", "", "MEMFD", "disk"])
def test_unknown_kinds(kind: str) -> None:
    with pytest.raises(ConfigurationError, match="memfd, anon and hugetlb"):
        Memory.create(kind, PAGE)


def test_hugetlb_without_a_pool_says_how_to_get_one() -> None:
    if not lib.pc_huge_page_bytes():
        pytest.skip("this kernel has no huge pages")
    with pytest.raises(ResourceError) as caught:
        Memory.create("hugetlb", page_bytes_of("hugetlb") << 20)
    assert "vm.nr_hugepages" in caught.value.remedy


# ---- content


@pytest.mark.parametrize("kind", KINDS)
def test_asked_again_it_tells_what_was_added(kind: str, tmp_path: Path) -> None:
    image, random_ = tmp_path / "image", random.Random(5)
    content: dict[int, bytes] = {}
    with Memory.create(kind, 4096 * PAGE) as memory:
        known = memory.present(2 * PAGE)
        for part in range(3):
            content |= {number: page(part) for number in random_.sample(range(4096), 300)}
            write_image(image, content, 4096 * PAGE)
            with image.open("rb") as file:
                memory.load(file.fileno())
            known = memory.present(2 * PAGE, known)
            assert known == memory.present(2 * PAGE)
            assert memory.present(PAGE, memory.present()) == memory.present()
    assert known.count() > 500


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", [PAGE, 2 * PAGE])
def test_what_was_added_is_told_and_known_from_then_on(kind: str, unit: int) -> None:
    random_ = random.Random(7)
    with Memory.create(kind, 4096 * PAGE) as memory:
        known = memory.present(unit)
        for count in (300, 1, 0, 200, 1):
            before = known.copy()
            for number in [*random_.sample(range(4096), count), *[4095] * (count == 1)]:
                memory.write(number * PAGE, b"x")
            more = memory.present_more(known, unit)
            assert known == memory.present(unit)
            assert more == known.without(before)
            assert not memory.present_more(known, unit).count()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_added_beside_much_that_is_known(kind: str) -> None:
    """Before it, behind it, and where nothing is; a hole in it is one."""
    with Memory.create(kind, 2048 * PAGE) as memory:
        memory.write(300 * PAGE, b"x" * (700 * PAGE))
        known = memory.present()
        added = [*range(10, 13), *range(290, 295), *range(297, 300), *range(1000, 1200), 2047]
        for number in added:
            memory.write(number * PAGE, b"x")
        more = memory.present_more(known)
        assert [number for number in range(2048) if more[number]] == added
        assert known == memory.present()


@pytest.mark.parametrize("kind", KINDS)
def test_load_and_dump_give_the_same_file_and_the_same_holes(kind: str, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    write_image(source, {0: page(1), 7: page(2), 8: bytes(PAGE), 40: page(3)}, 256 * PAGE)
    with Memory.create(kind, 256 * PAGE) as memory:
        with source.open("rb") as file:
            memory.load(file.fileno())
        assert [first for first, _ in memory.present().runs()] == [0, 7, 40]
        assert memory.resident_bytes() == 3 * PAGE
        with copy.open("wb") as file:
            memory.dump(file.fileno())
        with Memory.from_file(source) as image:
            assert image.digest() == memory.digest()
    assert copy.read_bytes() == source.read_bytes()
    assert copy.stat().st_blocks * 512 <= 3 * PAGE


def test_digest_depends_on_content_place_and_size(tmp_path: Path) -> None:
    digests = set()
    cases = [({}, 64), ({0: page(1)}, 64), ({1: page(1)}, 64), ({0: page(2)}, 64), ({0: page(1)}, 65)]
    for number, (pages, size) in enumerate(cases):
        path = tmp_path / str(number)
        write_image(path, pages, size * PAGE)
        with Memory.from_file(path) as image:
            digests.add(image.digest())
    assert len(digests) == len(cases)


@pytest.mark.parametrize("kind", KINDS)
def test_digest_of_a_part_is_that_of_an_image_of_this_size(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image"
    size_bytes = 5 * PAGE + 123
    path.write_bytes(random.Random(9).randbytes(size_bytes))
    with Memory.from_file(path) as image, Memory.create(kind, 512 * PAGE) as memory:
        assert (image.file_bytes, image.size_bytes, image.pages) == (size_bytes, 6 * PAGE, 6)
        with path.open("rb") as file:
            memory.load(file.fileno(), 0, size_bytes)
        assert memory.digest(size_bytes) == image.digest(size_bytes)
        assert memory.digest() != image.digest()
        with pytest.raises(ValueError, match="no digest"):
            memory.digest(513 * PAGE)


def test_load_refuses_more_than_fits_and_files_that_are_too_short(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x" * PAGE)
    with Memory.create("memfd", 4 * PAGE) as memory, path.open("rb") as file:
        with pytest.raises(ValueError, match="do not fit"):
            memory.load(file.fileno(), 0, 5 * PAGE)
        with pytest.raises(CoreError):
            memory.load(file.fileno(), 0, 4 * PAGE)


# ---- image files


def test_present_of_an_image_looks_at_holes(tmp_path: Path) -> None:
    path = tmp_path / "image"
    write_image(path, {3: page(1), 600: page(2)}, 1024 * PAGE)
    with Memory.from_file(path) as image:
        assert image.kind is MemoryKind.FILE
        assert list(image.present().runs()) == [(3, 1), (600, 1)]
        assert list(image.present(512 * PAGE).runs()) == [(0, 2)]
        assert image.resident_bytes() == 0


def test_from_file_takes_a_descriptor_and_leaves_it_open(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x")
    with path.open("rb") as file:
        Memory.from_file(file.fileno()).close()
        assert file.read() == b"x"


def test_a_file_that_has_shrunk_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(8 * PAGE))
    with Memory.from_file(path) as image:
        os.truncate(path, 2 * PAGE)
        for function in (image.digest, image.present):
            with pytest.raises(CoreError):
                function()


def test_unusable_files(tmp_path: Path) -> None:
    empty, fifo = tmp_path / "empty", tmp_path / "fifo"
    empty.touch()
    os.mkfifo(fifo)
    cases = {
        tmp_path / "nowhere": "No such file",
        empty: "empty",
        tmp_path: "not a regular file",
        fifo: "not a regular file",
        Path("/dev/null"): "not a regular file",
        Path("a\0b"): "null",
    }
    for path, reason in cases.items():
        with pytest.raises(ConfigurationError, match=reason) as caught:
            Memory.from_file(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="Bad file descriptor"):
        Memory.from_file(1 << 20)


# ---- its life


def test_close_is_refused_while_in_use() -> None:
    memory = Memory.create("memfd", PAGE)
    with memory.in_use("test"):
        with pytest.raises(BusyError, match="test"):
            memory.close()
        assert memory.digest()
    memory.close()
    memory.close()
    for function in (memory.present, memory.digest, memory.resident_bytes):
        with pytest.raises(ValueError, match="closed"):
            function()


def test_drop_closes_with_the_last_user() -> None:
    memory = Memory.create("memfd", PAGE)
    memory.acquire("one")
    memory.acquire("two")
    memory.drop()
    closed = []
    for user in ("one", "two"):
        memory.release(user)
        closed.append(memory.closed)
    assert closed == [False, True]
    memory.drop()


def test_reading_in_many_threads() -> None:
    digests: set[int] = set()
    with Memory.create("memfd", 1024 * PAGE) as memory:
        threads = [threading.Thread(target=lambda: digests.add(memory.digest())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(digests) == 1


def test_every_error_is_one_of_ours() -> None:
    assert issubclass(CoreError, PostcopyError)
    assert issubclass(CoreError, OSError)
    error = CoreError(2, "opening x")
    assert (error.errno, str(error)) == (2, "opening x: No such file or directory")


def test_a_buffer_is_read_where_it_is_and_never_changed() -> None:
    content = bytearray(os.urandom(3 * PAGE + 1))
    with memoryview(content)[1:] as view, Memory.from_buffer(view) as memory:
        assert (memory.kind, memory.pages, memory.file_bytes) == (MemoryKind.BUFFER, 3, 3 * PAGE)
        assert memory.read(PAGE, 2 * PAGE) == content[1 + PAGE :]
        assert memory.present() == Bitmap.full(3)
        with Memory.create("memfd", 3 * PAGE) as other:
            other.write(0, bytes(view))
            assert memory.digest() == other.digest()
            assert memory.digest(PAGE) == other.digest(PAGE)
        with pytest.raises(ValueError, match="read only"):
            memory.write(0, b"x")
        with pytest.raises(ValueError, match="read only"):
            memory.discard(0, PAGE)
        with pytest.raises(ValueError, match="read only"):
            memory.load(0)
        with pytest.raises(ValueError, match="read only"), memory.buffer():
            pass
        with pytest.raises(BufferError):  # the memory has it
            content.append(0)
    content.append(0)


def test_memory_without_content_says_how_large_it_is() -> None:
    with Memory.without_content(3 * PAGE + 1, PAGE) as memory:
        assert (memory.pages, memory.file_bytes, memory.address) == (4, 3 * PAGE + 1, 0)
        assert memory.present() == Bitmap.full(4)
        with pytest.raises(ValueError, match="not mapped"):
            memory.read(0, 1)


def test_a_shared_file_is_looked_at_by_its_descriptor(tmp_path: Path) -> None:
    """Nothing of it is mapped or populated, and it may be longer; who cuts it short makes an error."""
    with Memory.create("memfd", 8 * PAGE) as memory:
        memory.write(2 * PAGE, b"content")
        with Memory.from_shared_file(memory.fd, 4 * PAGE) as shared:
            assert (shared.address, shared.size_bytes, shared.kind) == (0, 4 * PAGE, "memfd")
            assert [page for page in range(4) if shared.present()[page]] == [2]
            assert shared.digest() == memory.digest(4 * PAGE)
            with (tmp_path / "dump").open("w+b") as file:
                shared.dump(file.fileno())
                assert file.read().rstrip(b"\0").lstrip(b"\0") == b"content"
            os.lseek(memory.fd, 5, os.SEEK_SET)  # as the process that has mapped it may do
            assert shared.unpopulated_bytes() == 3 * PAGE
            assert os.lseek(memory.fd, 0, os.SEEK_CUR) == 5
            with pytest.raises(ValueError, match="not mapped"):
                shared.read(0, 1)
            shared.discard_pages(Bitmap.full(4))
            assert memory.read(2 * PAGE, 7) == bytes(7)
        for size_bytes in (0, 9 * PAGE, PAGE + 1):
            with pytest.raises(ConfigurationError, match="whole pages"):
                Memory.from_shared_file(memory.fd, size_bytes)
    fd = os.memfd_create("short")
    try:
        os.truncate(fd, 4 * PAGE)
        with Memory.from_shared_file(fd, 4 * PAGE) as shared:
            os.truncate(fd, 2 * PAGE)
            with pytest.raises(CoreError):
                shared.present()
            with pytest.raises(CoreError):
                shared.digest()
    finally:
        os.close(fd)
    with pytest.raises(ConfigurationError, match="Bad file descriptor"):
        Memory.from_shared_file(fd, PAGE)
