# SPDX-License-Identifier: Apache-2.0
"""Each ioctl and event on a real userfaultfd. What could hang runs in a child with a deadline."""

from __future__ import annotations

import errno
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import trio

from postcopy import Memory, Userfaultfd
from postcopy._native import lib
from postcopy.errors import BusyError, CoreError
from postcopy.uffd import (
    FaultFlag,
    Fork,
    Outcome,
    PageFault,
    RegisterMode,
    Remap,
    Remove,
    Result,
    UffdFeature,
    UffdIoctl,
    Unmap,
)

PAGE = int(lib.pc_page_bytes())
MISSING = RegisterMode.MISSING

pytestmark = [pytest.mark.needs("uffd-user"), pytest.mark.slow]


def content(number: int) -> bytes:
    return bytes([number % 255 + 1]) * PAGE


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    uffd = Userfaultfd.open()
    yield uffd
    uffd.close(abandon=True)


@pytest.fixture
def anon() -> Iterator[Memory]:
    with Memory.create("anon", 16 * PAGE) as memory:
        yield memory


def test_one_that_cannot_be_made_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(os, "eventfd", refuse)
        with pytest.raises(CoreError, match="Too many open files"):
            Userfaultfd.open()
    gc.collect()
    assert os.listdir("/proc/self/fd") == before


def test_one_that_no_variable_refers_to_stays_open_while_memory_is_registered(anon: Memory) -> None:
    uffd = Userfaultfd.open()
    fd = uffd.fileno()
    uffd.register(anon.address, anon.size_bytes, MISSING)
    del uffd
    gc.collect()
    assert os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]"
    (kept,) = (owner for owner in gc.get_objects() if isinstance(owner, Userfaultfd) and owner.registered)
    kept.close(abandon=True)


def test_register_says_what_can_be_done(uffd: Userfaultfd, anon: Memory) -> None:
    allowed = uffd.register(anon.address, anon.size_bytes, MISSING)
    assert UffdIoctl.COPY | UffdIoctl.ZEROPAGE | UffdIoctl.WAKE in allowed
    assert uffd.registered == [(anon.address, anon.address + anon.size_bytes)]
    uffd.unregister(anon.address + PAGE, PAGE)
    assert uffd.registered == [
        (anon.address, anon.address + PAGE),
        (anon.address + 2 * PAGE, anon.address + 16 * PAGE),
    ]
    uffd.unregister(anon.address, anon.size_bytes)
    assert uffd.registered == []


def test_a_refused_registration_leaves_nothing_behind(uffd: Userfaultfd, anon: Memory) -> None:
    uffd.register(anon.address, PAGE, MISSING)
    with pytest.raises(CoreError) as caught:
        uffd.register(anon.address, 2 * PAGE + 1, MISSING)
    assert caught.value.errno == errno.EINVAL
    assert uffd.registered == [(anon.address, anon.address + PAGE)]
    with Userfaultfd.open() as other, pytest.raises(BusyError):
        other.register(anon.address, PAGE, MISSING)


def test_partial_count_and_exists(uffd: Userfaultfd, anon: Memory) -> None:
    uffd.register(anon.address, anon.size_bytes, MISSING)
    assert uffd.copy(anon.address + 2 * PAGE, content(9)) == Result(PAGE, Outcome.DONE)
    data = b"".join(content(i) for i in range(4))
    # The kernel says EAGAIN with the count; asked again from there it says EEXIST.
    assert uffd.copy(anon.address, data) == Result(2 * PAGE, Outcome.AGAIN)
    assert uffd.copy(anon.address + 2 * PAGE, data[2 * PAGE :]) == Result(0, Outcome.EXISTS)
    assert uffd.place(anon.address, data) == Result(4 * PAGE, Outcome.DONE)
    assert uffd.fill_zero(anon.address, anon.size_bytes) == Result(16 * PAGE, Outcome.DONE)
    expected = content(0) + content(1) + content(9) + content(3) + bytes(12 * PAGE)
    assert anon.read(0, anon.size_bytes) == expected


def test_copy_takes_an_address_and_any_buffer(uffd: Userfaultfd, anon: Memory) -> None:
    uffd.register(anon.address, anon.size_bytes, MISSING)
    with Memory.create("anon", PAGE) as source:
        source.write(0, content(5))
        assert uffd.copy(anon.address, source.address, PAGE).done
    assert uffd.copy(anon.address + PAGE, memoryview(bytearray(content(6) + content(7)))[PAGE:]).done
    assert anon.read(0, 2 * PAGE) == content(5) + content(7)
    with pytest.raises(ValueError, match="size_bytes"):
        uffd.copy(anon.address, source.address)
    with pytest.raises(ValueError, match="of a source"):
        uffd.copy(anon.address, b"short", PAGE)


def test_outside_of_a_range_is_gone(uffd: Userfaultfd, anon: Memory) -> None:
    assert uffd.copy(anon.address, content(1)) == Result(0, Outcome.GONE)
    assert uffd.fill_zero(anon.address, PAGE) == Result(0, Outcome.GONE)


def test_misuse_is_raised(uffd: Userfaultfd, anon: Memory) -> None:
    uffd.register(anon.address, anon.size_bytes, MISSING)
    with pytest.raises(CoreError) as caught:
        uffd.copy(anon.address + 1, content(1))
    assert caught.value.errno == errno.EINVAL
    for size in (0, -PAGE, 1 << 64):
        with pytest.raises(ValueError, match="no range"):
            uffd.register(anon.address, size, MISSING)


# ---- faults, in children: a mistake would leave a thread asleep for ever


def background(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call()), daemon=True)
    thread.start()
    return thread, result


def missing_under_trio() -> None:
    async def main() -> None:
        with Memory.create("anon", 8 * PAGE) as memory:
            uffd = Userfaultfd.open(features=UffdFeature.THREAD_ID)
            uffd.register(memory.address, memory.size_bytes, MISSING)
            threads: set[int] = set()

            async def serve() -> None:
                async for event in uffd:
                    assert isinstance(event, PageFault)
                    assert event.flags == FaultFlag(0)
                    threads.add(event.thread_id)
                    number = (event.address - memory.address) // PAGE
                    assert uffd.place(event.address & -PAGE, content(number)).done

            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                for number in range(8):
                    assert await memory.aread(number * PAGE, PAGE) == content(number)
                nursery.cancel_scope.cancel()
            assert threads
            assert os.getpid() not in threads
            with pytest.raises(BusyError, match="read zeros"):
                uffd.close()
            uffd.unregister(memory.address, memory.size_bytes)
            uffd.close()
            with pytest.raises(trio.ClosedResourceError):
                uffd.read()

    trio.run(main)


def exists_wakes() -> None:
    """Placed with DONTWAKE, a page has a sleeper whom only `place` wakes, since the kernel's EEXIST does not."""
    with Memory.create("anon", PAGE) as memory:
        uffd = Userfaultfd.open()
        uffd.register(memory.address, PAGE, MISSING)
        thread, result = background(lambda: memory.read(0, PAGE))
        assert uffd.wait(20)
        assert uffd.copy(memory.address, content(1), dont_wake=True).done
        assert uffd.copy(memory.address, content(2)).outcome is Outcome.EXISTS
        assert uffd.place(memory.address, content(2)) == Result(PAGE, Outcome.DONE)
        thread.join()
        assert result == [content(1)]
        uffd.unregister(memory.address, PAGE)
        uffd.close()


def minor_faults() -> None:
    with Memory.create("memfd", 4 * PAGE) as memory, memory.alias() as alias:
        uffd = Userfaultfd.open(features=UffdFeature.MINOR_SHMEM)
        uffd.register(memory.address, memory.size_bytes, RegisterMode.MINOR)
        assert uffd.continue_(memory.address, PAGE).outcome is Outcome.NOT_PRESENT
        alias.write(0, content(3) + content(4))
        thread, result = background(lambda: memory.read(0, 2 * PAGE))
        assert uffd.wait(20)
        (event,) = uffd.read()
        assert isinstance(event, PageFault)
        assert event.flags == FaultFlag.MINOR
        assert uffd.resume(memory.address, 4 * PAGE) == Result(2 * PAGE, Outcome.NOT_PRESENT)
        thread.join()
        assert result == [content(3) + content(4)]
        uffd.unregister(memory.address, memory.size_bytes)
        uffd.close()


def write_protection() -> None:
    with Memory.create("anon", 2 * PAGE) as memory:
        memory.write(0, content(1) + content(2))
        uffd = Userfaultfd.open(features=UffdFeature.PAGEFAULT_FLAG_WP)
        uffd.register(memory.address, 2 * PAGE, RegisterMode.WP)
        uffd.writeprotect(memory.address, 2 * PAGE)
        thread, _ = background(lambda: memory.write(PAGE, b"new"))
        assert uffd.wait(20)
        (event,) = uffd.read()
        assert isinstance(event, PageFault)
        assert FaultFlag.WP in event.flags
        assert event.address & -PAGE == memory.address + PAGE
        assert memory.read(PAGE, 3) == content(2)[:3]
        uffd.writeprotect(memory.address + PAGE, PAGE, protect=False)
        thread.join()
        assert memory.read(PAGE, 3) == b"new"
        uffd.unregister(memory.address, 2 * PAGE)
        uffd.close()


def move_pages() -> None:
    with Memory.create("anon", 2 * PAGE) as memory, Memory.create("anon", 2 * PAGE) as source:
        source.write(0, content(1) + content(2))
        uffd = Userfaultfd.open(features=UffdFeature.MOVE)
        uffd.register(memory.address, 2 * PAGE, MISSING)
        assert uffd.move(memory.address, source.address, 2 * PAGE) == Result(2 * PAGE, Outcome.DONE)
        assert memory.read(0, 2 * PAGE) == content(1) + content(2)
        assert source.resident_bytes() == 0
        uffd.unregister(memory.address, 2 * PAGE)
        uffd.close()


def touch_poison() -> None:
    memory = Memory.create("anon", PAGE)
    uffd = Userfaultfd.open(features=UffdFeature.POISON)
    uffd.register(memory.address, PAGE, MISSING)
    assert uffd.fill_poison(memory.address, PAGE).done
    memory.read(0, 1)


def remove_remap_unmap() -> None:
    """The calls block until their event is read: from other threads."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)  # releases the GIL
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    at = libc.mmap(None, 8 * PAGE, 3, 0x22, -1, 0)
    target = libc.mmap(None, 8 * PAGE, 0, 0x22, -1, 0)
    memory = Memory.from_address(at, 8 * PAGE)
    features = UffdFeature.EVENT_REMOVE | UffdFeature.EVENT_REMAP | UffdFeature.EVENT_UNMAP
    uffd = Userfaultfd.open(features=features)
    uffd.register(at, 8 * PAGE, MISSING)
    assert uffd.copy(at, content(1)).done

    thread, _ = background(lambda: memory.discard(0, 2 * PAGE))
    assert uffd.wait(20)
    # An unread event holds filling up: no progress, and no endless loop.
    assert uffd.place(at + PAGE, content(2)) == Result(0, Outcome.AGAIN)
    assert uffd.read() == [Remove(at, at + 2 * PAGE)]
    thread.join()

    thread, result = background(lambda: libc.mremap(at, 4 * PAGE, 4 * PAGE, 3, target))
    assert uffd.wait(20)
    seen: list[object] = []
    while thread.is_alive():  # an unmap of the old place follows, and is waited for too
        if uffd.wait(0.02):
            seen += uffd.read()
    assert seen[0] == Remap(at, target, 4 * PAGE)
    thread.join()
    assert result == [target]
    assert sorted(uffd.registered) == sorted([(at + 4 * PAGE, at + 8 * PAGE), (target, target + 4 * PAGE)])

    for start in (at + 4 * PAGE, target):
        thread, _ = background(lambda start=start: libc.munmap(start, 4 * PAGE))  # type: ignore[misc]
        assert uffd.wait(20)
        assert uffd.read() == [Unmap(start, start + 4 * PAGE)]
        thread.join()
    assert uffd.registered == []
    uffd.close()


def fork_event() -> None:
    """The parent serves its child's memory, through the userfaultfd that the event brings."""
    import mmap

    area = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    from postcopy._native import ffi

    whole: Any = area
    address = int(ffi.cast("uintptr_t", ffi.from_buffer("char[]", whole)))
    uffd = Userfaultfd.open(features=UffdFeature.EVENT_FORK)
    uffd.register(address, PAGE, MISSING)

    def fork() -> int:
        pid = os.fork()
        if pid == 0:
            data: Any = ffi.new("char[]", 1)
            lib.pc_bytes_copy(int(ffi.cast("uintptr_t", data)), address, 1)
            os._exit(data[0][0])
        return pid

    import warnings

    warnings.simplefilter("ignore")  # a fork with threads, which is what is tested
    # fork() returns when its event is read; the reader is a C call without the GIL ... which the forking thread keeps.
    event_box: list[Any] = []

    def reader() -> None:
        structs: Any = ffi.new("struct pc_uffd_event[]", 1)
        assert lib.pc_uffd_read_spinning(uffd.fileno(), structs, 1, 20 * 10**9) == 1
        event_box.append(uffd._event(structs[0]))

    thread = threading.Thread(target=reader)
    thread.start()
    clock = time.pthread_getcpuclockid(cast(int, thread.ident))
    sys.setswitchinterval(100)  # the GIL goes only when this thread waits
    while True:
        time.sleep(0.001)
        before_ns, until_ns = time.clock_gettime_ns(clock), time.monotonic_ns() + 5_000_000
        while time.monotonic_ns() < until_ns:
            pass
        if time.clock_gettime_ns(clock) - before_ns > 1_000_000:
            break  # it runs, and not with the GIL: it is in the C call
    pid = fork()
    thread.join()
    (event,) = event_box
    assert isinstance(event, Fork)
    child = event.uffd
    assert child.registered == [(address, address + PAGE)]
    assert child.wait(20)
    (fault,) = child.read()
    assert isinstance(fault, PageFault)
    assert child.place(fault.address & -PAGE, bytes([42]) * PAGE).done
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    with pytest.raises(BusyError):
        child.close()
    child.close(abandon=True)
    uffd.unregister(address, PAGE)
    uffd.close()


def as_nobody() -> None:
    os.setgid(65534)
    os.setuid(65534)
    uffd = Userfaultfd.open("user-only")
    memory = Memory.create("anon", PAGE)
    uffd.register(memory.address, PAGE, MISSING)
    thread, result = background(lambda: memory.read(0, PAGE))
    assert uffd.wait(20)
    (event,) = uffd.read()
    assert isinstance(event, PageFault)
    assert uffd.place(event.address & -PAGE, content(7)).done
    thread.join()
    assert result == [content(7)]
    uffd.unregister(memory.address, PAGE)
    uffd.close()


def cancel_and_close() -> None:
    """Events survive cancelled readers; a close, from this thread or another one, ends every waiter."""

    async def main() -> None:
        with Memory.create("anon", 64 * PAGE) as memory:
            uffd = Userfaultfd.open()
            uffd.register(memory.address, memory.size_bytes, MISSING)
            seen: list[int] = []
            turns = 0
            async with trio.open_nursery() as nursery:
                for number in range(64):
                    nursery.start_soon(memory.aread, number * PAGE, 1)
                while len(seen) < 64:
                    with trio.CancelScope() as scope:
                        async with trio.open_nursery() as inner:

                            async def reader() -> None:
                                async for event in uffd:
                                    assert isinstance(event, PageFault)
                                    seen.append(event.address)
                                    uffd.fill_zero(event.address & -PAGE, PAGE)
                                    inner.cancel_scope.cancel()

                            inner.start_soon(reader)
                            turns += 1
                            for _ in range(turns % 5):
                                await trio.lowlevel.checkpoint()
                            scope.cancel()
            assert len(set(seen)) == 64
            uffd.unregister(memory.address, memory.size_bytes)
            uffd.close()
        for from_thread in (False, True):
            uffd = Userfaultfd.open()
            ended = []

            async def waiter() -> None:
                try:
                    await uffd.read_batch()  # noqa: B023
                except trio.ClosedResourceError:
                    ended.append("trio")  # noqa: B023

            def sync_waiter() -> None:
                try:
                    uffd.wait()  # noqa: B023
                except trio.ClosedResourceError:
                    ended.append("thread")  # noqa: B023

            thread = threading.Thread(target=sync_waiter)
            thread.start()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(waiter)
                await trio.testing.wait_all_tasks_blocked()
                if from_thread:
                    await trio.to_thread.run_sync(uffd.close)
                else:
                    uffd.close()
            thread.join()
            assert sorted(ended) == ["thread", "trio"]
            assert uffd._fd == -1

    import trio.testing

    trio.run(main)


def churn(workers: int, duration_s: float) -> int:
    """Each worker registers, touches, serves, verifies and unregisters its own range; how many rounds in all."""
    import time

    end_s = time.monotonic() + duration_s
    rounds, errors = [0] * workers, []

    def work(worker: int) -> None:
        try:
            with Memory.create("anon", 4 * PAGE) as memory, Userfaultfd.open() as uffd:
                while rounds[worker] == 0 or time.monotonic() < end_s:
                    uffd.register(memory.address, memory.size_bytes, MISSING)
                    toucher, result = background(lambda: memory.read(0, memory.size_bytes))
                    expected = [content(worker + number + rounds[worker]) for number in range(4)]
                    placed = 0
                    while placed < 4:
                        assert uffd.wait(60)
                        for event in uffd.read():
                            assert isinstance(event, PageFault)
                            number = (event.address - memory.address) // PAGE
                            assert uffd.place(event.address & -PAGE, expected[number]).done
                            placed += 1
                    toucher.join()
                    assert result == [b"".join(expected)]
                    uffd.unregister(memory.address, memory.size_bytes)
                    memory.discard(0, memory.size_bytes)
                    rounds[worker] += 1
        except BaseException as error:
            errors.append(repr(error))
            raise

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert min(rounds) > 0
    return sum(rounds)


IN_CHILDREN = [
    pytest.param(missing_under_trio, marks=pytest.mark.needs("uffd")),
    pytest.param(exists_wakes, marks=pytest.mark.needs("uffd-user")),
    pytest.param(minor_faults, marks=pytest.mark.needs("uffd-minor")),
    pytest.param(write_protection, marks=pytest.mark.needs("uffd-user")),
    pytest.param(move_pages, marks=pytest.mark.needs("uffd-move")),
    pytest.param(remove_remap_unmap, marks=pytest.mark.needs("uffd-user")),
    pytest.param(fork_event, marks=pytest.mark.needs("uffd")),
    pytest.param(as_nobody, marks=pytest.mark.needs("root", "uffd-user")),
    pytest.param(cancel_and_close, marks=pytest.mark.needs("uffd-user")),
]


@pytest.mark.parametrize("what", IN_CHILDREN)
def test_in_a_child(run_in_child: Callable[..., Any], what: Callable[[], None]) -> None:
    child = run_in_child(what)
    assert child.returncode == 0, child.stderr


@pytest.mark.needs("uffd-poison")
def test_poison_kills_who_touches_it(run_in_child: Callable[..., Any]) -> None:
    import signal

    assert run_in_child(touch_poison).returncode == -signal.SIGBUS


@pytest.mark.needs("uffd-user")
def test_churn_of_64_userfaultfds(run_in_child: Callable[..., Any]) -> None:
    child = run_in_child(churn, 64, 2.0, deadline_s=90)
    assert child.returncode == 0, child.stderr
    assert child.value >= 64


# ---- who may touch


def test_python_gets_no_buffer_of_lazy_memory(uffd: Userfaultfd, anon: Memory) -> None:
    with anon.buffer() as view:
        view[0:3] = b"abc"
        with pytest.raises(BusyError, match="buffer"):
            uffd.register(anon.address, PAGE, MISSING)
        with pytest.raises(BusyError, match="buffer"):
            anon.acquire("pager")
    assert anon.read(0, 3) == b"abc"
    uffd.register(anon.address + PAGE, PAGE, MISSING)
    with pytest.raises(BusyError, match="registered"), anon.buffer():
        pass
    uffd.unregister(anon.address + PAGE, PAGE)
    with anon.in_use("pager"), pytest.raises(BusyError, match="pager"), anon.buffer():
        pass


def test_alias_and_discard() -> None:
    with Memory.create("memfd", 4 * PAGE) as memory:
        with memory.alias() as alias:
            alias.write(PAGE, content(1))
            assert memory.read(PAGE, PAGE) == content(1)
            memory.discard(PAGE, PAGE)
            assert alias.read(0, 4 * PAGE) == bytes(4 * PAGE)
        with pytest.raises(ValueError, match="inside"):
            memory.read(PAGE, 4 * PAGE)
        with pytest.raises(ValueError, match="whole pages"):
            memory.discard(1, PAGE)


@pytest.mark.parametrize("example", ["hello_userfaultfd.py", "per_thread_userfaultfds.py"])
@pytest.mark.needs("uffd-user")
def test_examples_run(run_in_child: Callable[..., Any], example: str) -> None:
    import sys
    from pathlib import Path

    child = run_in_child([sys.executable, Path(__file__).parents[3] / "examples" / example])
    assert child.returncode == 0, child.stderr
    assert child.stdout
