# SPDX-License-Identifier: Apache-2.0
"""The pager's process when it does not answer, and where it takes its modules from.

Everything runs in a child with a deadline: what waits for a frozen process may wait for ever.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from tls import connect

from postcopy._blocking import END_TIMEOUT_S
from postcopy._native import ffi, lib
from postcopy.dataplane import pager_process
from postcopy.dataplane._events import ChannelKind, EventType
from postcopy.dataplane.ahead import Prefetch
from postcopy.dataplane.pager import new_touches, page_runs, read_touches
from postcopy.dataplane.pager_process import PagerDied, ProcessPager
from postcopy.errors import BusyError, ErrorLine, MigrationError, PostcopyError
from postcopy.lazy._bridge import pack_frame
from postcopy.memory import Memory, page_bytes_of
from postcopy.memory.bitmap import Bitmap
from postcopy.tls import Credentials, TlsStream, detach
from postcopy.tls._authority import issue, new_authority

PAGE = page_bytes_of("memfd")
DEADLINE_S = 60


async def armed(memory: Memory) -> ProcessPager:
    pager = ProcessPager()
    pager.add_block(memory)
    pager.add_shard()
    pager.arm(0, 0, 0, memory.pages)
    await pager.confirm()
    return pager


async def died(pager: ProcessPager) -> str:
    async for event in pager.events():
        if event.type is EventType.DIED:
            return event.text
    raise AssertionError("the stream of events has ended")


# ---- in the child


async def frozen() -> None:
    pager_process.CALL_TIMEOUT_S = 0.5
    with Memory.create("memfd", 300 * PAGE) as memory, Memory.create("memfd", 300 * PAGE) as other_memory:
        pager, other = await armed(memory), await armed(other_memory)
        turns = 0
        os.kill(pager.pid, signal.SIGSTOP)
        # None of these waits for it.
        pager.track_thread(0, 1)
        assert pager.request_missing(7) == pager.request_missing(7) == 7
        assert pager.request_range(0, 10, 20) == 20
        assert pager.statistics().total_pages == 300
        assert pager.latency().count == 0
        assert pager.blocktime_ns() == [0]
        assert pager.received(0).count() == 0
        assert pager.take_event() is None
        async with trio.open_nursery() as nursery:

            async def the_rest_of_the_daemon() -> None:
                nonlocal turns
                while True:
                    other.request_range(0, 10, 20)
                    await other.confirm()
                    turns += 1

            nursery.start_soon(the_rest_of_the_daemon)
            with pytest.raises(PagerDied, match="has not answered"):
                await pager.confirm()
            assert turns > 20
            assert "has not answered for 0.5 s" in await died(pager)
            with pytest.raises(PagerDied):
                pager.request_missing(1)
            await pager.disconnect()
            nursery.cancel_scope.cancel()
        assert pager.deaths == 1
        assert other.deaths == 0
        everything = Bitmap.full(300)
        for each in (pager, other):
            each.set_zero(0, everything)
            await each.confirm()
            assert each.statistics().resident_pages == 300
            async for event in each.events():
                assert event.type is EventType.COMPLETE
                break
            await each.disarm()
            await each.close()


async def idle() -> None:
    """That it does not answer is noticed although nothing is asked of it."""
    pager_process.CALL_TIMEOUT_S = 0.5
    pager_process.PING_PERIOD_S = 0.2
    with Memory.create("memfd", 300 * PAGE) as memory:
        pager = await armed(memory)
        os.kill(pager.pid, signal.SIGSTOP)
        assert "has not answered" in await died(pager)
        await pager.close()


async def disconnected() -> None:
    """One that freezes just before its channels are to be closed holds that up no longer than any other call."""
    pager_process.CALL_TIMEOUT_S = 0.5
    with Memory.create("memfd", 300 * PAGE) as memory:
        for end in ("disconnect", "disarm", "close"):
            pager = await armed(memory)
            if end == "disarm":
                pager.set_zero(0, Bitmap.full(300))
                await pager.confirm()
            os.kill(pager.pid, signal.SIGSTOP)
            began = time.monotonic()
            await getattr(pager, end)()
            assert time.monotonic() - began < END_TIMEOUT_S / 2
            assert pager.deaths == 1
            await pager.close()


async def overtaken() -> None:
    """The task in `watch_over` is cancelled while the next process starts: no event of that process is lost."""
    with Memory.create("memfd", 300 * PAGE) as memory:
        pager = await armed(memory)
        known = bytes(Bitmap.full(300))
        os.pwrite(pager._blocks[0].states_fd, known + known, 4096)  # claimed and known, and it dies before it says so
        killed = pager.pid
        os.kill(killed, signal.SIGKILL)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pager.watch_over)
            for _ in range(DEADLINE_S * 1000):
                if pager.pid != killed:
                    break
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()
        event = pager.take_event()
        assert event is not None
        assert event.type is EventType.COMPLETE
        await pager.disarm()
        await pager.close()


async def forgetful() -> None:
    """One that dies before it has forgotten: nothing is discarded, so that no page that counts as received is zero."""
    pager_process.CALL_TIMEOUT_S = 0.5
    with Memory.create("memfd", 300 * PAGE) as memory:
        pager = await armed(memory)
        pager.set_zero(0, Bitmap.full(300))
        await pager.confirm()
        memory.write(7 * PAGE, b"old")
        os.kill(pager.pid, signal.SIGSTOP)
        with pytest.raises(PagerDied, match="has not answered"):
            await pager.forget(0, Bitmap.full(300))
        assert memory.read(7 * PAGE, 3) == b"old"
        await pager.disconnect()
        assert pager.received(0).count() == 300
        some = Bitmap(300)
        some.set_range(7, 2)
        await pager.forget(0, some)
        assert pager.received(0) == some.inverted()
        assert memory.present().count() == 0
        pager.set_zero(0, some)
        await pager.disarm()
        await pager.close()


async def ahead() -> None:
    """The next process knows what is to be asked for ahead of faults, and logs first touches where the last one did."""
    with Memory.create("memfd", 300 * PAGE) as memory:
        touches = new_touches(300)
        pager = ProcessPager()
        pager.add_block(memory)
        pager.add_shard()
        pager.set_prefetch(Prefetch.parse("forward:2"))
        pager.record_touches(touches)
        with pytest.raises(BusyError):
            pager.record_touches(touches)
        pager.arm(0, 0, 0, memory.pages)
        pager.request_runs(page_runs([(0, 40, 2), (0, 7, 1)]))
        await pager.confirm()
        os.kill(pager.pid, signal.SIGKILL)
        await died(pager)
        await pager.disconnect()
        assert pager.deaths == 1
        with socket.create_server(("127.0.0.1", 0)) as listener:
            here = socket.create_connection(listener.getsockname())
            there, _ = listener.accept()
        with there:
            pager.attach_urgent(0, here.detach())
            await pager.confirm()
            assert await trio.to_thread.run_sync(_requested, there, 3) == [40, 41, 7]
            reader = threading.Thread(target=memory.read, args=(100 * PAGE, 1), daemon=True)
            reader.start()
            assert await trio.to_thread.run_sync(_requested, there, 3) == [100, 101, 102]
            assert read_touches(touches) == [(0, 100)]
        os._exit(0)  # the reader waits


def _requested(source: socket.socket, count: int) -> list[int]:
    """The pages of so many requests (docs/protocol.md)."""
    data = b""
    while len(data) < count * lib.PC_FRAME_HEADER_BYTES:
        data += source.recv(4096)
    assert len(data) == count * lib.PC_FRAME_HEADER_BYTES
    return [struct.unpack_from("<Q", data, at)[0] for at in range(8, len(data), lib.PC_FRAME_HEADER_BYTES)]


async def no_descriptors() -> None:
    """Once it is set up it needs no further descriptor: neither to be followed, nor to lose its channels."""
    pager_process.PING_PERIOD_S = 0.2
    with Memory.create("memfd", 300 * PAGE) as memory:
        pager = await armed(memory)
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        unused = os.dup(0)
        os.close(unused)
        resource.setrlimit(resource.RLIMIT_NOFILE, (unused, hard))
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        async with trio.open_nursery() as nursery:

            async def follow() -> None:
                async for event in pager.events():
                    raise AssertionError(event)

            nursery.start_soon(follow)
            nursery.start_soon(pager.confirm)
            await trio.sleep(pager_process.PING_PERIOD_S * 1.5)  # it is asked whether it lives
            await pager.disconnect()
            nursery.cancel_scope.cancel()
        assert pager.deaths == 0
        await pager.close()


async def unattached() -> None:
    """A channel that cannot be attached is one that has gone down."""
    with Memory.create("memfd", 300 * PAGE) as memory:
        pager = await armed(memory)
        for attach, index, kind in (
            (pager.attach_urgent, 5, ChannelKind.URGENT),
            (pager.attach_bulk, 0, ChannelKind.BULK),
        ):
            ours, theirs = os.pipe()  # no socket
            attach(index, ours)
            os.close(theirs)
            await pager.confirm()
            event = pager.take_event()
            assert event is not None
            assert (event.type, event.channel_kind, event.channel) == (EventType.CHANNEL_DOWN, kind, index)
            assert event.error
        await pager.close()


async def under_tls() -> None:
    """Its process has no part in that: what it asks for, and its answer, are relayed."""
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        new_authority(where / "ca")
        issue(where / "ca", ["host-a"], where / "host")
        credentials = Credentials(where / "host")
        for server in (True, False):
            await credentials.context(server=server)
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    ends: list[TlsStream] = []

    async def accept() -> None:
        ends.append(await credentials.accept(theirs))

    with Memory.create("memfd", 300 * PAGE) as memory:
        pager = await armed(memory)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            fd, tls = detach(await connect(credentials, ours, "host-a")).detach()
        [source] = ends
        pager.attach_urgent(0, fd, tls=tls)
        await pager.confirm()
        assert pager.request_missing(1) == 1
        request = await source.receive_some(100)
        assert request[:4] == b"PCPF"
        frame = ffi.new("struct pc_frame *")
        line = ErrorLine()
        line.check(lib.pc_frame_decode(request, frame, line.buffer, line.size), "reading the request")
        answer = bytearray()
        pack_frame(answer, lib.PC_FRAME_PAGES, 0, frame.first_page, 1, frame.request_id, b"\x07" * PAGE)
        await source.send_all(answer)
        while not pager.received(0).count():  # noqa: ASYNC110  (page states of another process)
            await trio.sleep(0.01)
        await source.aclose()
        event = await anext(aiter(pager.events()))
        assert (event.type, event.channel_kind) == (EventType.CHANNEL_DOWN, ChannelKind.URGENT)
        await pager.close()


async def full() -> None:
    """More is asked than the socket to a frozen process takes: it waits here."""
    with Memory.create("memfd", 300 * PAGE) as memory:
        pager = await armed(memory)
        process = pager.pid
        os.kill(process, signal.SIGSTOP)
        for _ in range(3000):
            pager.request_range(0, 10, 20)
        everything = Bitmap.full(300)
        pager.set_zero(0, everything)
        os.kill(process, signal.SIGCONT)
        await pager.confirm()
        assert pager.statistics().resident_pages == 300
        assert pager.deaths == 0
        await pager.disarm()
        await pager.close()


async def closed() -> None:
    """An end is possible, and in time, with a process that does not answer."""
    pager_process.CALL_TIMEOUT_S = 0.5
    vars(pager_process)["END_TIMEOUT_S"] = 1.0
    with Memory.create("memfd", 300 * PAGE) as memory:
        pager = await armed(memory)
        os.kill(pager.pid, signal.SIGSTOP)
        await pager.close()  # the next one does what this one would not: it poisons what is missing
        assert pager.deaths == 1


async def closed_while_waited_for() -> None:
    """A task that waits for the end of a process does not use its descriptors once they are closed."""
    with Memory.create("memfd", 300 * PAGE) as memory:
        pager = await armed(memory)
        process = pager._process
        os.kill(process.pid, signal.SIGSTOP)  # it does not end when its socket is closed
        gone: list[bool] = []

        async def wait() -> None:
            gone.append(await process.gone())

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                process.close()
        assert gone == [False]
        process.kill()
        process._process.wait()
        await pager.close()


async def not_started() -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    for more in range(1, 6):  # one step after the other fails
        resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + more, limit[1]))
        with pytest.raises(PostcopyError):
            ProcessPager()
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    last_free = os.dup(0)
    os.close(last_free)
    assert last_free == first_free


async def failing() -> None:
    """What went wrong is raised by `confirm`, and reported to the task that follows the events."""
    with Memory.create("memfd", 300 * PAGE) as memory:
        pager = await armed(memory)
        pager.arm(0, 0, 0, 10)  # a second time
        with pytest.raises(PostcopyError, match="armed already") as caught:
            await pager.confirm()
        assert not isinstance(caught.value, PagerDied)
        event = pager.take_event()
        assert event is not None
        assert event.type is EventType.FATAL
        assert "armed already" in event.text
        await pager.close()


class NotMapped:
    """The core, where there is no memory to map page states for who looks at them."""

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: -errno.ENOMEM) if name == "pc_metrics_add_states" else getattr(lib, name)


async def not_shown() -> None:
    """What cannot be shown is moved none the less."""
    vars(pager_process)["lib"] = NotMapped()
    with Memory.create("memfd", 300 * PAGE) as memory:
        pager = await armed(memory)
        assert pager.bins() == b""
        assert pager.received(0).count() == 0
        await pager.close()


async def in_doubt() -> None:
    """A page that may have been placed and swapped out is not fetched again."""
    with Memory.create("memfd", 300 * PAGE) as memory:
        pager = await armed(memory)
        block = pager._blocks[0]
        os.pwrite(memory.fd, b"x", 5 * PAGE)
        os.pwrite(block.states_fd, bytes([1 << 5]), 4096)  # claimed, and not known
        os.kill(pager.pid, signal.SIGKILL)
        with pytest.raises(MigrationError, match="cannot tell what the dead pager has placed"):
            await pager.disconnect()
        os._exit(17)


async def elsewhere(where: str) -> None:
    os.chdir(where)
    pager = ProcessPager()
    try:
        await pager.confirm()
    finally:
        with contextlib.suppress(MigrationError):
            await pager.close()
    assert pager.deaths == 0


# ---- the tests


@pytest.mark.needs("uffd")
@pytest.mark.parametrize(
    "case",
    [
        frozen,
        idle,
        disconnected,
        overtaken,
        forgetful,
        ahead,
        no_descriptors,
        unattached,
        pytest.param(under_tls, marks=pytest.mark.needs("tls")),
        full,
        closed,
        closed_while_waited_for,
        not_started,
        not_shown,
        failing,
    ],
)
@pytest.mark.slow
def test_it_delays_no_other(passes: Callable[..., None], case: Callable[..., Any]) -> None:
    passes(case)


@pytest.mark.needs("uffd")
def test_a_page_in_doubt_is_not_fetched_again(run_in_child: Callable[..., Any]) -> None:
    result = run_in_child(in_doubt, deadline_s=DEADLINE_S)
    assert result.returncode == 17, f"{result.stdout}{result.stderr}"


def test_it_imports_nothing_from_where_it_is_started(passes: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "select.py").write_text("raise SystemExit('another select was imported')\n")
    (tmp_path / "postcopy").mkdir()
    (tmp_path / "postcopy" / "__init__.py").write_text("raise SystemExit('another postcopy was imported')\n")
    passes(elsewhere, str(tmp_path))


def test_a_call_that_gets_one_descriptor_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps none of the others."""
    made, dup = list[int](), os.dup

    def scarce(fd: int) -> int:
        if made:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        made.append(dup(fd))
        return made[0]

    monkeypatch.setattr(os, "dup", scarce)
    with pytest.raises(OSError, match="Too many open files"):
        pager_process._Call("giving memory", "add_block", (), (0, 0))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(made[0])
