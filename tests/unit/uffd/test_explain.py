# SPDX-License-Identifier: Apache-2.0
"""Calls that make no sense say what was wrong with them: which argument, or which mapping."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from postcopy import Memory, Userfaultfd
from postcopy._native import ffi, lib
from postcopy.errors import BusyError, CoreError
from postcopy.uffd import Outcome, RegisterMode

PAGE = int(lib.pc_page_bytes())
MISSING, WP, MINOR = RegisterMode.MISSING, RegisterMode.WP, RegisterMode.MINOR

pytestmark = pytest.mark.needs("uffd-user")


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    uffd = Userfaultfd.open("user-only")
    yield uffd
    uffd.close(abandon=True)


@pytest.fixture
def anon() -> Iterator[Memory]:
    with Memory.create("anon", 16 * PAGE) as memory:
        yield memory


def says(call: Callable[[], object], pattern: str, number: int = errno.EINVAL) -> None:
    with pytest.raises(CoreError, match=pattern) as caught:
        call()
    assert caught.value.errno == number
    assert "Invalid argument" not in str(caught.value)


def test_register_says_what_is_not_aligned(uffd: Userfaultfd, anon: Memory) -> None:
    at = anon.address
    says(
        lambda: uffd.register(at + 7, PAGE, MISSING),
        rf"registering memory: the address {at + 7:#x} is not a multiple of the page size, {PAGE} bytes",
    )
    says(lambda: uffd.register(at, 100, MISSING), rf"the length 100 is not a multiple of the page size, {PAGE} bytes")
    assert uffd.registered == []


def test_register_says_which_mode_is_wrong(uffd: Userfaultfd, anon: Memory) -> None:
    says(
        lambda: uffd.register(anon.address, PAGE, RegisterMode(0)),
        "mode 0x0 is no combination of RegisterMode.MISSING, WP and MINOR",
    )
    says(lambda: uffd.register(anon.address, PAGE, RegisterMode(64)), "mode 0x40 is no combination")
    says(
        lambda: uffd.register(anon.address, PAGE, MINOR),
        "is private anonymous memory, which has no page cache: RegisterMode.MINOR is for shared memory",
    )


def test_register_says_what_cannot_be_registered(uffd: Userfaultfd, tmp_path: Path) -> None:
    with mmap.mmap(-1, 4 * PAGE) as gap:
        address = int(ffi.cast("uintptr_t", ffi.from_buffer("char[]", gap)))
    says(lambda: uffd.register(address, PAGE, MISSING), f"nothing is mapped from {address:#x} to {address + PAGE:#x}")

    # A file of a file system that is not in memory: the running interpreter's extension will do.
    with open("/proc/self/maps", encoding="utf-8") as maps:
        start = next(int(line.split("-")[0], 16) for line in maps if "_native.abi3.so" in line)
    says(
        lambda: uffd.register(start, PAGE, MISSING),
        r"\(.*_native.abi3.so\) is of a file: only anonymous memory, shared",
    )


def test_register_says_that_a_shared_file_must_be_writable(uffd: Userfaultfd) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.truncate(PAGE)
        fd = os.open(file.name, os.O_RDONLY)
        with mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
            buffer = ffi.from_buffer("char[]", mapped)
            address = int(ffi.cast("uintptr_t", buffer))
            says(
                lambda: uffd.register(address, PAGE, MISSING),
                "is open for reading only: open it for writing too",
                errno.EPERM,
            )
            del buffer
        os.close(fd)


def test_register_says_that_another_one_has_it(uffd: Userfaultfd, anon: Memory) -> None:
    with Userfaultfd.open("user-only") as other:
        other.register(anon.address, PAGE, MISSING)
        with pytest.raises(BusyError, match="is registered with another userfaultfd, at least a part of it"):
            uffd.register(anon.address, 2 * PAGE, MISSING)
        other.unregister(anon.address, PAGE)


@pytest.mark.needs("hugetlb")
def test_huge_pages_are_named(uffd: Userfaultfd) -> None:
    with Memory.create("hugetlb", 2 * lib.pc_huge_page_bytes()) as memory:
        at = memory.address
        says(
            lambda: uffd.register(at + PAGE, memory.page_bytes, MISSING),
            f"is not a multiple of the huge page size, {memory.page_bytes}",
        )
        uffd.register(at, memory.size_bytes, MISSING)
        says(
            lambda: uffd.zeropage(at, memory.page_bytes),
            "has huge pages, of which the kernel has none of zeros: copy zeros",
        )
        says(lambda: uffd.copy(at, bytes(PAGE)), f"the length {PAGE} is not a multiple of the huge page size")


def test_filling_says_what_is_not_aligned(uffd: Userfaultfd, anon: Memory) -> None:
    at = anon.address
    uffd.register(at, anon.size_bytes, MISSING)
    says(lambda: uffd.copy(at, b"short"), r"placing pages: the length 5 is not a multiple")
    says(lambda: uffd.copy(at + 1, bytes(PAGE)), rf"the address {at + 1:#x} is not a multiple")
    says(lambda: uffd.copy(at, b""), "a length of 0 bytes")
    says(lambda: uffd.zeropage(at + 1, PAGE), "placing zero pages: the address")
    says(lambda: uffd.continue_(at + 1, PAGE), "mapping pages: the address")
    says(lambda: uffd.continue_(at, PAGE), r"private anonymous memory.*: continue_\(\) is for shared memory")
    says(lambda: uffd.wake(at + 1, PAGE), "waking threads: the address")
    says(lambda: uffd.unregister(at, 10), "unregistering memory: the length 10")
    says(lambda: uffd.copy(at, PAGE, PAGE), f"the source, {PAGE} bytes at {PAGE:#x}, cannot be read", errno.EFAULT)


def test_what_is_not_registered_or_there_already_is_a_result_that_says_so(uffd: Userfaultfd, anon: Memory) -> None:
    for result in (uffd.copy(anon.address, bytes(PAGE)), uffd.zeropage(anon.address, PAGE)):
        assert result.outcome is Outcome.GONE
        assert str(result).startswith("0 bytes, ENOENT: the range is not registered with this userfaultfd, its process")
    uffd.register(anon.address, PAGE, MISSING)
    uffd.zeropage(anon.address, PAGE)
    assert str(uffd.copy(anon.address, bytes(PAGE))).startswith("0 bytes, EEXIST: a page is there already")
    assert {outcome.reason for outcome in Outcome}.isdisjoint({""})


@pytest.mark.needs("uffd-minor")
def test_a_page_that_the_page_cache_lacks(uffd: Userfaultfd) -> None:
    with Memory.create("memfd", PAGE) as memory:
        uffd.register(memory.address, PAGE, MINOR)
        assert str(uffd.continue_(memory.address, PAGE)).startswith("0 bytes, EFAULT: the page cache has no page there")


def test_write_protection_wants_its_mode(uffd: Userfaultfd, anon: Memory) -> None:
    uffd.register(anon.address, anon.size_bytes, MISSING)
    says(lambda: uffd.writeprotect(anon.address, PAGE), "is not registered.*RegisterMode.WP first", errno.ENOENT)
    says(lambda: uffd.writeprotect(anon.address, 1), "the length 1 is not a multiple")


def test_filling_protected_pages_wants_its_mode(uffd: Userfaultfd, anon: Memory) -> None:
    uffd.register(anon.address, anon.size_bytes, MISSING)
    says(
        lambda: uffd.copy(anon.address, bytes(PAGE), write_protect=True),
        "placing pages: .* is not registered for write protection: register RegisterMode.WP first",
    )
    with Memory.create("memfd", PAGE) as shared:
        shared.write(0, b"x")
        uffd.register(shared.address, PAGE, MISSING)
        says(
            lambda: uffd.continue_(shared.address, PAGE, write_protect=True),
            "mapping pages: .* is not registered for write protection",
        )


def test_unregister_says_that_another_one_has_it(uffd: Userfaultfd, anon: Memory) -> None:
    uffd.register(anon.address, PAGE, MISSING)
    with Userfaultfd.open("user-only") as other:
        said = ""
        try:
            other.unregister(anon.address, PAGE)
        except CoreError as error:
            said = str(error)
        taken = not said  # as before Linux 6.17
        assert taken or "is registered with another userfaultfd, at least a part of it: unregister it there" in said


@pytest.mark.needs("uffd-move")
def test_move_says_what_is_wrong_with_its_source(uffd: Userfaultfd, anon: Memory) -> None:
    uffd.register(anon.address, anon.size_bytes, MISSING)
    with Memory.create("anon", PAGE) as source, Memory.create("memfd", PAGE) as shared:
        assert "what should be moved is not there" in str(uffd.move(anon.address, source.address, PAGE))
        source.write(0, b"x")
        shared.write(0, b"x")
        says(lambda: uffd.move(anon.address, source.address + 1, PAGE), "the source 0x[0-9a-f]+1 is not a multiple")
        says(
            lambda: uffd.move(anon.address, shared.address, PAGE),
            r"\(/memfd:.*\) is not private anonymous memory, which alone can be moved",
        )
    with mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE) as forked:
        forked[0] = 1
        buffer = ffi.from_buffer("char[]", forked)
        ended, end = os.pipe()
        if (pid := os.fork()) == 0:  # it shares the page until it has ended
            os.close(end)
            os.read(ended, 1)
            os._exit(0)
        try:
            with pytest.raises(BusyError, match=r"a page of the source, .*, is pinned, or shared since a fork"):
                uffd.move(anon.address, int(ffi.cast("uintptr_t", buffer)), PAGE)
        finally:
            del buffer
            os.close(end)
            os.close(ended)
            os.waitpid(pid, 0)


def test_no_file_for_the_explanation_does_not_hide_what_happened(run_in_child: Callable[..., Any]) -> None:
    said = run_in_child(register_without_files).value
    assert said == ("CoreError", errno.EINVAL)


def register_without_files() -> tuple[str, int | None]:
    with Memory.create("anon", PAGE) as memory, Userfaultfd.open("user-only") as uffd:
        with pytest.raises(CoreError):  # imports what it needs
            uffd.register(memory.address + 7, PAGE, MISSING)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            uffd.register(memory.address + 7, PAGE, MISSING)
        except OSError as error:
            return type(error).__name__, error.errno
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    return "", None


def test_the_kernel_s_own_mappings_are_no_files(uffd: Userfaultfd) -> None:
    with open("/proc/self/maps", encoding="utf-8") as maps:
        start = next(int(line.split("-")[0], 16) for line in maps if "[vdso]" in line)
    says(lambda: uffd.register(start, PAGE, MISSING), r"\(\[vdso\]\) is the kernel's own: only anonymous memory")


def test_of_another_process_only_the_arguments_are_looked_at(anon: Memory) -> None:
    with Userfaultfd.open("user-only") as own:
        other = Userfaultfd.adopt(os.dup(own.fileno()))
        with other:
            says(lambda: other.register(anon.address + 1, PAGE, MISSING), "the address .* is not a multiple")
            with pytest.raises(CoreError, match="registering memory: Invalid argument"):
                other.register(anon.address, PAGE, MINOR)
