# SPDX-License-Identifier: Apache-2.0
"""The service behind `postcopy pager`, with processes that are VMMs to it, and no keeper."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import tls
import trio
from lines import _check_event
from vmm import PAGE, Vmm, start_vmm

import postcopy
from postcopy import _files
from postcopy._stop import Stop
from postcopy.dataplane.ahead import NO_PREFETCH
from postcopy.dataplane.pager import ChannelKind, Event, EventType, Pager
from postcopy.errors import ConfigurationError, CoreError, PostcopyError, ProtocolError, ResourceError
from postcopy.handler import About, Handler, _handler, _vm, serve
from postcopy.handler._connect import ConnectSource, _KnownImage, _LentPager
from postcopy.handler._handler import check
from postcopy.handler._image import Image
from postcopy.handler._metrics import VmMetrics
from postcopy.handler._source import ImageSource
from postcopy.handler._store import LocalStore, kind_of
from postcopy.handler._vm import Descriptors
from postcopy.lazy._source import SourceBlock
from postcopy.machines.firecracker.handshake import Credentials
from postcopy.memory import workingset
from postcopy.net import LOCAL, Protection, Route, parse_address
from postcopy.output._frame import Frames, Glyphs
from postcopy.output._view import View
from postcopy.records import Json, Record, as_json
from postcopy.service.config import PagerConfig
from postcopy.service.render import render
from postcopy.service.schema import ControlError, Request

PAGES = 256
DEADLINE_S = 30.0

pytestmark = [pytest.mark.needs("uffd"), pytest.mark.slow]


def content(seed: int = 1, pages: int = PAGES) -> bytes:
    """No page is zero, but for every eighth one."""
    draw = random.Random(seed)
    return b"".join(bytes(PAGE) if page % 8 == 7 else draw.randbytes(PAGE - 1) + b"\1" for page in range(pages))


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


class Said:
    """What a handler tells."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Json]] = []
        self._news = trio.Event()

    def say(self, text: str) -> None:
        assert text.isprintable()

    records = True

    def kick(self) -> None:
        pass

    def emit(self, event: str, record: Record) -> None:
        fields = as_json(record)
        _check_event(event, fields)
        self.events.append((event, fields))
        self._news.set()
        self._news = trio.Event()

    async def wait(self, event: str, count: int = 1) -> Json:
        """The one of this number among those of this name."""
        with trio.fail_after(DEADLINE_S):
            while len(found := [fields for name, fields in self.events if name == event]) < count:
                await self._news.wait()
        return found[count - 1]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Looks again and again: what is counted in C tells nobody."""
    with trio.fail_after(DEADLINE_S):
        while not await condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


class Served:
    """A handler that runs."""

    def __init__(self, handler: Handler, said: Said, stop: Stop, socket: Path) -> None:
        self.handler, self.said, self.stop, self.socket = handler, said, stop, socket

    async def ask(self, command: str, **arguments: Any) -> Json:
        return as_json(await self.handler.execute(Request(command, arguments)))

    async def figures(self) -> Json:
        (vm,) = (await self.ask("status"))["vms"]
        return dict(vm)

    async def until(self, condition: Callable[[Json], bool]) -> Json:
        await self.said.wait("vm-connected")
        found: list[Json] = []

        async def look() -> bool:
            found[:] = [await self.figures()]
            return condition(found[0])

        await until(look)
        return found[0]


class KeptStore(LocalStore):
    """Keeps copies, as a keeper does."""

    def __init__(self, *, outlives: bool = False) -> None:
        super().__init__()
        self.outlives = outlives
        self.kept: dict[str, list[int]] = {}
        self.dropped: list[str] = []
        self.restarts = True
        self.takes = trio.Event()  # virtual machines
        self.takes.set()

    async def put(self, name: str, fds: Sequence[int]) -> None:
        if len(fds) > 1:
            await self.takes.wait()
        self.kept.setdefault(name, []).extend(os.dup(fd) for fd in fds)
        await super().put(name, fds)

    async def drop(self, name: str) -> None:
        self.dropped.append(name)
        for fd in self.kept.pop(name, []):
            os.close(fd)
        await super().drop(name)


@asynccontextmanager
async def served(directory: Path, store: LocalStore | None = None, **options: Any) -> AsyncIterator[Served]:
    socket = directory / "s"
    config = PagerConfig(socket=str(socket), **options)
    said, stop = Said(), Stop()
    store = LocalStore() if store is None else store
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        handler = Handler(config, said, store)
        ended = trio.Event()

        async def run() -> None:
            try:
                assert await handler.run(stop)
            finally:
                ended.set()

        nursery.start_soon(run)
        await said.wait("listening")
        try:
            yield Served(handler, said, stop, socket)
        finally:
            if not store.leave.is_set():
                stop.insist()
            with trio.CancelScope(shield=True):
                await ended.wait()
            nursery.cancel_scope.cancel()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vm.mem"
    path.write_bytes(content())
    return path


async def test_a_vm_has_the_pages_of_the_image(tmp_path: Path, image: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with served(tmp_path, image=str(image)) as pager:
        async with start_vmm(pager.socket, PAGES, second=64) as vmm:
            connected = await pager.said.wait("vm-connected")
            assert connected["pid"] == vmm.pid
            assert connected["memory"] == PAGES * PAGE
            assert await vmm.reads(content(), 0, PAGES)
            figures = await pager.until(lambda vm: vm["status"] == "complete")
            assert figures["demand-pages"] + figures["zero-pages"] >= PAGES
            assert figures["faults"] >= PAGES
            assert 0 < figures["faults-served-ms"]["1"] <= figures["faults-served-ms"]["100"]
            shown = render(await pager.ask("status"))
            assert f"process {vmm.pid}" in shown
            assert "Resident:            1 MiB" in shown  # below each other, whatever the label
            assert "Waits for the image: " in shown
            now = await pager.ask("status")
            assert " complete " in Frames(View(), Glyphs()).plain(now, 160)[2]
            assert sum(figures["postcopy-latency-dist"]) == figures["fault-latency-us"]["count"]
            # What it throws away is zero from then on.
            await vmm.ask("remove", 8, 4)
            assert await vmm.ask("byte", 9) == "0"
            assert await vmm.reads(content(), 16, 8)
        ended = await pager.said.wait("vm-ended")
        recorded = await pager.said.wait("timeline")
        assert recorded["vm"] == ended["vm"]
        for name, field in (("demand", "demand-pages"), ("zero", "zero-pages"), ("prefetched", "prefetched-pages")):
            assert recorded["recording"]["series"][name][-1] == ended["figures"][field] == recorded["figures"][field]
        assert recorded["recording"]["marks"][-1]["what"] == "ended"
        assert ended["reason"] == "its process has ended"
        assert ended["figures"]["removes"] == 4
        status = await pager.ask("status")
        assert (status["vms"], status["ended"]) == ([], 1)
    assert not pager.socket.exists()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_what_is_thrown_away_before_it_came_is_zero(tmp_path: Path, image: Path) -> None:
    async with served(tmp_path, image=str(image)) as pager, start_vmm(pager.socket, PAGES) as vmm:
        await vmm.ask("remove", 0, 16)
        assert [await vmm.ask("byte", page) for page in (0, 3, 15)] == ["0"] * 3
        assert await vmm.reads(content(), 16, 16)


async def test_vms_do_not_touch_each_other(tmp_path: Path, image: Path) -> None:
    async with (
        served(tmp_path, image=str(image)) as pager,
        start_vmm(pager.socket, PAGES) as one,
        start_vmm(pager.socket, PAGES) as other,
    ):
        await one.ask("write", 5, 77)
        assert await other.reads(content(), 0, 32)
        await other.ask("remove", 0, 8)
        assert await one.ask("byte", 5) == "77"
        one.process.send_signal(signal.SIGKILL)
        await pager.said.wait("vm-ended")
        assert await other.reads(content(), 32, 32)
        assert len((await pager.ask("status"))["vms"]) == 1


class TestRefused:
    async def test_memory_that_the_image_has_not(self, tmp_path: Path, image: Path) -> None:
        async with served(tmp_path, image=str(image)) as pager, start_vmm(pager.socket, PAGES) as good:
            async with start_vmm(pager.socket, PAGES + 8):
                refused = await pager.said.wait("vm-refused")
                assert "another snapshot" in refused["reason"]
                assert not refused["killed"]
            assert await good.reads(content(), 0, 8)
            assert (await pager.ask("status"))["refused"] == 1

    async def test_one_more_than_allowed_is_killed_where_that_is_the_policy(self, tmp_path: Path, image: Path) -> None:
        options: dict[str, Any] = {"max_vms": 1, "kill_when_lost": True}
        async with (
            served(tmp_path, image=str(image), **options) as pager,
            start_vmm(pager.socket, PAGES) as good,
        ):
            await pager.said.wait("vm-connected")
            async with start_vmm(pager.socket, PAGES, wait=False) as other:
                refused = await pager.said.wait("vm-refused")
                assert refused["killed"]
                with trio.fail_after(DEADLINE_S):
                    assert await other.process.wait() == -signal.SIGKILL
            assert await good.reads(content(), 0, 8)

    async def test_two_at_once_where_one_is_allowed(self, tmp_path: Path, image: Path) -> None:
        store = KeptStore()
        store.takes = trio.Event()
        async with (
            served(tmp_path, store, image=str(image), max_vms=1) as pager,
            start_vmm(pager.socket, PAGES),
            start_vmm(pager.socket, PAGES),
        ):
            assert "--max-vms" in (await pager.said.wait("vm-refused"))["reason"]
            store.takes.set()
            await pager.said.wait("vm-connected")
            assert len((await pager.ask("status"))["vms"]) == 1

    async def test_more_memory_than_allowed(self, tmp_path: Path, image: Path) -> None:
        async with served(tmp_path, image=str(image), max_memory_bytes=3 * PAGES * PAGE // 2) as pager:
            async with start_vmm(pager.socket, PAGES):
                await pager.said.wait("vm-connected")
                async with start_vmm(pager.socket, PAGES):
                    assert "--max-memory" in (await pager.said.wait("vm-refused"))["reason"]
            await pager.said.wait("vm-ended")
            async with start_vmm(pager.socket, PAGES):  # there is room again
                await pager.said.wait("vm-connected", 2)

    async def test_another_user(self, tmp_path: Path, image: Path) -> None:
        async with served(tmp_path, image=str(image), allow_uid=(4001,)) as pager:
            assert pager.socket.stat().st_mode & 0o777 == 0o666
            pager.handler._check_peer(Credentials(1, 4001, 1))
            with pytest.raises(ProtocolError, match="--allow-uid"):
                pager.handler._check_peer(Credentials(1, 4002, 1))
            pager.stop.set()
            with pytest.raises(ResourceError, match="ending"):
                pager.handler._check_peer(Credentials(1, 4001, 1))
        async with served(tmp_path, image=str(image)) as pager:
            assert pager.socket.stat().st_mode & 0o777 == 0o600

    async def test_the_silent_make_room(self, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_handler, "MAX_ARRIVING", 2)
        async with served(tmp_path, image=str(image)) as pager:
            silent = []
            for _ in range(3):
                silent.append(await trio.open_unix_socket(pager.socket))
            assert "needed" in (await pager.said.wait("vm-refused"))["reason"]
            async with start_vmm(pager.socket, PAGES) as good:
                assert await good.reads(content(), 0, 8)
            for stream in silent:
                await stream.aclose()

    async def test_nonsense_hurts_nobody(self, tmp_path: Path, image: Path) -> None:
        async with served(tmp_path, image=str(image)) as pager, start_vmm(pager.socket, PAGES) as good:
            for number, text in enumerate((b"hello", b"[]", b'[{"size": 1}]'), 1):
                async with await trio.open_unix_socket(str(pager.socket)) as stream:
                    await stream.send_all(text)
                    await pager.said.wait("vm-refused", number)
            async with await trio.open_unix_socket(str(pager.socket)):
                assert await good.reads(content(), 0, PAGES)


class TestLost:
    async def test_a_file_that_is_cut_short_holds_the_vm_until_it_is_whole(self, tmp_path: Path, image: Path) -> None:
        async with served(tmp_path, image=str(image)) as pager, start_vmm(pager.socket, PAGES) as vmm:
            assert await vmm.reads(content(), 0, 8)
            os.truncate(image, 16 * PAGE)
            await vmm.send("read", 128, 8)
            lost = await pager.said.wait("vm-lost")
            assert not lost["killed"]
            assert (await pager.figures())["status"] == "lost"
            write(image, content())
            await pager.said.wait("vm-recovered")
            assert await vmm.answer()
            assert await vmm.reads(content(), 0, PAGES)

    async def test_or_it_is_killed(self, tmp_path: Path, image: Path) -> None:
        async with served(tmp_path, image=str(image), kill_when_lost=True) as pager:
            async with start_vmm(pager.socket, PAGES) as vmm:
                assert await vmm.reads(content(), 0, 8)
                os.truncate(image, 16 * PAGE)
                await vmm.send("read", 128, 8)
                assert (await pager.said.wait("vm-lost"))["killed"]
                with trio.fail_after(DEADLINE_S):
                    assert await vmm.process.wait() == -signal.SIGKILL
            assert (await pager.said.wait("vm-ended"))["reason"] == "its process was killed"


class TestEnd:
    async def test_a_vm_that_has_all_of_its_memory_needs_nobody(self, tmp_path: Path, image: Path) -> None:
        async with trio.open_nursery() as nursery:
            vms: list[Vmm] = []
            async with served(tmp_path, image=str(image)) as pager:
                vmm = await _hold(nursery, pager.socket)
                vms.append(vmm)
                assert await vmm.reads(content(), 0, PAGES)
                await pager.until(lambda vm: vm["status"] == "complete")
                with pytest.raises(ControlError, match="no meaning for a pager"):
                    await pager.ask("migrate")
                assert await pager.ask("quit") == {}
                assert (await pager.said.wait("vm-ended"))["reason"] == "it needs nobody any more"
            await vms[0].ask("remove", 0, 8)
            assert await vms[0].ask("byte", 3) == "0"
            assert (await pager.said.wait("result"))["left"] == 0
            nursery.cancel_scope.cancel()

    async def test_one_that_has_not_is_waited_for_until_that_is_insisted_on(self, tmp_path: Path, image: Path) -> None:
        async with served(tmp_path, image=str(image)) as pager, start_vmm(pager.socket, PAGES) as vmm:
            assert await vmm.reads(content(), 0, 8)
            with pytest.raises(ControlError, match="1 virtual machine with missing pages"):
                await pager.ask("quit")
            pager.stop.set()
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert await vmm.reads(content(), 8, 8)
            assert await pager.ask("quit", force=True) == {}
            assert (await pager.said.wait("result"))["left"] == 1

    async def test_or_it_is_killed_and_not_left(self, tmp_path: Path, image: Path) -> None:
        async with (
            served(tmp_path, image=str(image), kill_when_lost=True) as pager,
            start_vmm(pager.socket, PAGES) as vmm,
        ):
            assert await vmm.reads(content(), 0, 8)
            assert await pager.ask("quit", force=True) == {}
            assert (await pager.said.wait("vm-ended"))["reason"] == "its process was killed"
            assert (await pager.said.wait("result"))["left"] == 0
            with trio.fail_after(DEADLINE_S):
                assert await vmm.process.wait() == -signal.SIGKILL

    async def test_ctl_end(self, tmp_path: Path, image: Path) -> None:
        async with served(tmp_path, image=str(image)) as pager, start_vmm(pager.socket, PAGES) as vmm:
            name = (await pager.said.wait("vm-connected"))["vm"]
            with pytest.raises(ControlError, match="--force"):
                await pager.ask("end", machine=name)
            with pytest.raises(ControlError, match="no virtual machine"):
                await pager.ask("end", machine="other")
            assert await pager.ask("end", machine=name, force=True) == {"machine": name}
            with trio.fail_after(DEADLINE_S):
                assert await vmm.process.wait() == -signal.SIGKILL
            await pager.said.wait("vm-ended")


async def _hold(nursery: trio.Nursery, socket: Path) -> Vmm:
    """A VMM that outlives the block in which it was made."""

    async def run(task_status: trio.TaskStatus[Vmm] = trio.TASK_STATUS_IGNORED) -> None:
        async with start_vmm(socket, PAGES) as vmm:
            task_status.started(vmm)
            await trio.sleep_forever()

    vmm: Vmm = await nursery.start(run)
    return vmm


async def test_another_process_goes_on(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the first one has put into the store; the image's name is gone meanwhile, and its disk may hang."""
    inode, fstat = os.stat(image).st_ino, os.fstat

    def fstat_elsewhere(fd: int) -> os.stat_result:
        status = fstat(fd)
        assert status.st_ino != inode or threading.current_thread() is not threading.main_thread()
        return status

    async with trio.open_nursery() as nursery:
        store = KeptStore()
        async with served(tmp_path, store, image=str(image)) as first:
            vmm = await _hold(nursery, first.socket)
            assert await vmm.reads(content(), 0, 64)
            await vmm.ask("write", 5, 77)
            await vmm.ask("remove", 16, 8)
            before = await first.figures()
            store.leave.set()
        assert "result" not in [event for event, _ in first.said.events]
        (kept,) = (fds for name, fds in store.kept.items() if len(fds) > 1)
        os.unlink(image)
        second = LocalStore()
        second.taken, second.deaths, store.kept = {"vm": kept}, 1, {}
        os.unlink(tmp_path / "s")
        monkeypatch.setattr(os, "fstat", fstat_elsewhere)
        async with served(tmp_path, second, image=str(image)) as after:
            assert (await after.said.wait("vm-connected"))["taken-over"]
            write(image, content(2))
            assert await vmm.ask("byte", 5) == "77"
            assert await vmm.ask("byte", 17) == "0"
            assert await vmm.reads(content(), 64, PAGES - 64)
            figures = await after.figures()
            assert figures["faults"] > before["faults"]
            assert figures["name"] == before["name"]
            assert (before["engine-deaths"], figures["engine-deaths"]) == (0, 1)
            async with start_vmm(after.socket, PAGES) as new:
                assert await new.reads(content(2), 0, 8)
        nursery.cancel_scope.cancel()


async def test_another_version_goes_on_from_version_1(tmp_path: Path, image: Path) -> None:
    """Which had counters of another size: they begin anew."""
    async with trio.open_nursery() as nursery:
        store = KeptStore()
        async with served(tmp_path, store, image=str(image)) as first:
            vmm = await _hold(nursery, first.socket)
            assert await vmm.reads(content(), 0, 64)
            store.leave.set()
        (kept,) = (fds for fds in store.kept.values() if len(fds) > 1)
        for fd in kept:
            if kind_of(fd) == "memfd:postcopy-vm":
                about = msgspec.json.decode(os.pread(fd, 1 << 16, 0)) | {"version": 1}
                os.ftruncate(fd, 0)
                os.pwrite(fd, msgspec.json.encode(about), 0)
            elif kind_of(fd) == "memfd:postcopy-metrics":
                older = os.memfd_create("postcopy-metrics")
                os.ftruncate(older, 65536)
                os.dup2(older, fd)
                os.close(older)
        second = KeptStore()
        second.taken, store.kept = {"vm": kept}, {}
        os.unlink(tmp_path / "s")
        async with served(tmp_path, second, image=str(image)) as after:
            assert (await after.said.wait("vm-connected"))["taken-over"]
            assert await vmm.reads(content(), 0, PAGES)
            figures = await after.until(lambda vm: vm["resident"] == PAGES * PAGE)  # counted when it is woken, or later
            assert 0 < figures["faults"] <= PAGES - 64
        nursery.cancel_scope.cancel()


async def test_so_many_are_recorded_at_once(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those that are taken over, all in one moment."""
    monkeypatch.setattr(_handler, "MOST_RECORDED", 1)
    async with trio.open_nursery() as nursery:
        store = KeptStore()
        async with served(tmp_path, store, image=str(image)) as first:
            for number in (1, 2):
                await _hold(nursery, first.socket)
                await first.said.wait("vm-connected", number)
            store.leave.set()
        second = LocalStore()
        second.taken = {f"vm{number}": fds for number, fds in enumerate(store.kept.values()) if len(fds) > 1}
        store.kept = {}
        os.unlink(tmp_path / "s")
        async with served(tmp_path, second, image=str(image)) as after:
            await after.said.wait("vm-connected", 2)
            assert sum(vm.recorder is not None for vm in after.handler.vms) == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kill", [False, True])
async def test_one_that_cannot_be_taken_over(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, kill: bool
) -> None:
    """It is held, for the process after this one, or killed, as for every other reason."""
    async with trio.open_nursery() as nursery:
        store = KeptStore()
        async with served(tmp_path, store, image=str(image)) as first:
            vmm = await _hold(nursery, first.socket)
            await first.said.wait("vm-connected")
            store.leave.set()
        (kept,) = (fds for fds in store.kept.values() if len(fds) > 1)
        second = KeptStore()
        second.taken, store.kept = {"vm": kept}, {}
        os.unlink(tmp_path / "s")

        def broken(*_: object) -> None:
            raise ResourceError("no more of them")

        monkeypatch.setattr(_handler, "ImageSource", broken)
        async with served(tmp_path, second, image=str(image), kill_when_lost=kill) as after:
            lost = await after.said.wait("vm-lost")
            assert (lost["killed"], lost["reason"]) == (kill, "no more of them")
            if kill:
                with trio.fail_after(DEADLINE_S):
                    assert await vmm.process.wait() == -signal.SIGKILL
            assert second.dropped == (["vm"] if kill else [])
        nursery.cancel_scope.cancel()


class NotReadyStore(KeptStore):
    """Of an engine on trial, which must not become ready."""

    def __init__(self) -> None:
        super().__init__()
        self.on_trial = True

    async def ready(self) -> None:
        raise AssertionError("it cannot serve")


@pytest.mark.parametrize("part", ["reading", "opening", "serving", "serving later"])
async def test_an_upgrade_that_cannot_serve_kills_nothing(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """It gives way to the engine before it, which gets all that there was."""
    async with trio.open_nursery() as nursery:
        store = KeptStore()
        async with served(tmp_path, store, image=str(image)) as first:
            vmms = [await _hold(nursery, first.socket) for _ in range(2)]
            await first.said.wait("vm-connected", 2)
            store.leave.set()
        kept = {name: fds for name, fds in store.kept.items() if len(fds) > 1}
        os.unlink(tmp_path / "s")

        def copies() -> dict[str, list[int]]:
            return {name: [os.dup(fd) for fd in fds] for name, fds in kept.items()}

        trial = NotReadyStore()
        trial.taken = copies()
        why = "its record is of version" if part == "reading" else "no more of them"
        with monkeypatch.context() as patch:
            if part == "reading":
                patch.setattr(_vm, "RECORD_VERSION", 0)
            elif part == "opening":
                real, numbers = ImageSource, itertools.count(1)

                def second_fails(*arguments: Any) -> Any:
                    if next(numbers) == 2:
                        raise ResourceError("no more of them")
                    return real(*arguments)

                patch.setattr(_handler, "ImageSource", second_fails)
            else:
                numbers, given_up = itertools.count(1), threading.Event()

                def refuses(*_: object) -> None:
                    if part == "serving later" and next(numbers) == 2:
                        assert given_up.wait(DEADLINE_S)  # in a thread, which nothing ends before
                    raise CoreError(errno.EINVAL, "no more of them")

                pass_trial = Handler._pass_trial

                async def passes(*arguments: Any) -> None:
                    try:
                        await pass_trial(*arguments)
                    finally:
                        given_up.set()

                patch.setattr(Pager, "arm_at", refuses)
                patch.setattr(Handler, "_pass_trial", passes)
            config = PagerConfig(socket=str(tmp_path / "s"), image=str(image), kill_when_lost=True)
            with pytest.raises(ExceptionGroup) as raised:
                await Handler(config, Said(), trial).run(Stop())
            assert raised.group_contains(ResourceError, match=f"gives way to the one before: .*{why}")
        assert trial.dropped == []
        assert not (tmp_path / "s").exists()

        again = KeptStore()
        again.taken, store.kept = copies(), {}
        for fds in kept.values():
            for fd in fds:
                os.close(fd)
        async with served(tmp_path, again, image=str(image), kill_when_lost=True):
            for vmm in vmms:
                assert await vmm.reads(content(), 0, PAGES)
            again.leave.set()
        nursery.cancel_scope.cancel()


async def test_what_a_mistake_ends_is_left_to_the_next_process(tmp_path: Path, image: Path) -> None:
    class Broken(KeptStore):
        breaks = trio.Event()

        async def accept(self) -> tuple[str, int]:
            with trio.CancelScope() as accepting:
                async with trio.open_nursery() as nursery:

                    @nursery.start_soon
                    async def end() -> None:
                        await self.breaks.wait()
                        accepting.cancel()

                    found = await super().accept()
                    nursery.cancel_scope.cancel()
            if self.breaks.is_set():
                raise RuntimeError("a mistake")
            return found

    store = Broken()
    async with trio.open_nursery() as nursery:

        async def serve_until_it_breaks() -> None:
            async with served(tmp_path, store, image=str(image)) as pager:
                vmm = await _hold(nursery, pager.socket)
                assert await vmm.reads(content(), 0, PAGES)  # it is complete: nobody would have to serve it
                store.breaks.set()
                await trio.sleep_forever()

        with pytest.raises(BaseExceptionGroup) as raised:
            await serve_until_it_breaks()
        assert raised.group_contains(RuntimeError, match="a mistake")
        assert store.dropped == []
        assert (tmp_path / "s").exists()
        nursery.cancel_scope.cancel()
    for name in list(store.kept):
        await store.drop(name)


async def test_an_image_on_a_disk_that_hangs_keeps_no_process_from_its_end(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    opening, answers, opened = threading.Event(), threading.Event(), threading.Event()
    real = Image.open

    def hangs(path: str) -> Image:
        opening.set()
        answers.wait(DEADLINE_S)
        opened.set()
        return real(path)

    async with served(tmp_path, image=str(image)) as pager:
        monkeypatch.setattr(Image, "open", hangs)
        async with start_vmm(pager.socket, PAGES):
            await until(lambda: _async(opening.is_set()))
            assert await pager.ask("quit", force=True) == {}
            await pager.said.wait("result")
    assert not opened.is_set()
    answers.set()
    await until(lambda: _async(len(os.listdir("/proc/self/fd")) <= before))


async def test_a_store_that_outlives_the_process_keeps_nothing_of_those_that_are_gone(
    tmp_path: Path, image: Path
) -> None:
    """As systemd's: what is left to the next process is what runs when this one ends, and nothing else."""
    store, path = KeptStore(outlives=True), tmp_path / "vm.ws"
    async with trio.open_nursery() as nursery:
        async with served(tmp_path, store, image=str(image), record_working_set=str(path)) as pager:
            async with start_vmm(pager.socket, PAGES + 8):
                await pager.said.wait("vm-refused")
                await until(lambda: _async(len(store.dropped) == 1))
            async with start_vmm(pager.socket, PAGES) as vmm:
                assert await vmm.reads(content(), 0, 8)
            await pager.said.wait("vm-ended")
            await until(lambda: _async(len(store.dropped) == 2))
            assert path.exists()
            vmm = await _hold(nursery, pager.socket)
            assert await vmm.reads(content(), 0, 8)
            with pytest.raises(ControlError, match="1 virtual machine with missing pages"):
                await pager.ask("quit")  # which is no restart
            pager.stop.set()
            await pager.said.wait("result")
        assert len(store.dropped) == 2
        assert sorted(len(fds) for fds in store.kept.values()) == [1, 7]  # the listening socket, and the one that runs
        nursery.cancel_scope.cancel()
    for name in list(store.kept):
        await store.drop(name)


async def _async(value: bool) -> bool:
    return value


def test_descriptors_are_made_as_a_whole_or_not_at_all() -> None:
    about = About(1, "vm", 1, 0, "/s", None, PAGE, PAGES * PAGE, 0, [(0, PAGES * PAGE, 0)], 0, 0)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(CoreError, match="Bad file descriptor"):
        Descriptors.make(about, uffd=0, pidfd=1, image=1_000_000, connection=2)
    assert os.listdir("/proc/self/fd") == before


class TestWorkingSets:
    @pytest.fixture(autouse=True)
    def disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that others keep busy may take as long for one fsync as a test waits for all."""
        monkeypatch.setattr(_files, "_sync", lambda fd: None)

    async def test_a_recording_that_is_over_is_left_alone_by_the_next_process(
        self, tmp_path: Path, image: Path
    ) -> None:
        path, store = tmp_path / "vm.ws", KeptStore()
        options: dict[str, Any] = {"image": str(image), "record_working_set": str(path), "record_for_s": 0.05}
        async with trio.open_nursery() as nursery:
            async with served(tmp_path, store, **options) as first:
                vmm = await _hold(nursery, first.socket)
                await first.said.wait("working-set")
                store.leave.set()
            path.unlink()
            (kept,) = (fds for fds in store.kept.values() if len(fds) > 1)
            second = LocalStore()
            second.taken, store.kept = {"vm": kept}, {}
            os.unlink(tmp_path / "s")
            async with served(tmp_path, second, **options) as after:
                assert await vmm.reads(content(), 0, 8)
                vmm.process.kill()
                await after.said.wait("vm-ended")
            assert not path.exists()
            nursery.cancel_scope.cancel()

    async def test_a_vm_that_ends_while_its_recording_is_written(
        self, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, writing, answers = tmp_path / "vm.ws", threading.Event(), threading.Event()
        real = workingset.write

        def slow(*arguments: Any) -> None:
            if not writing.is_set():
                writing.set()
                answers.wait(DEADLINE_S)
                raise ResourceError("the first one is abandoned")
            real(*arguments)

        monkeypatch.setattr(workingset, "write", slow)
        options: dict[str, Any] = {"record_working_set": str(path), "record_for_s": 0.05}
        async with served(tmp_path, image=str(image), **options) as pager:
            async with start_vmm(pager.socket, PAGES) as vmm:
                assert await vmm.reads(content(), 0, 8)
                await until(lambda: _async(writing.is_set()))
            assert (await pager.said.wait("working-set"))["set-pages"] == 8
            assert path.exists()
            answers.set()

    async def test_recorded_and_replayed(self, tmp_path: Path, image: Path) -> None:
        path = tmp_path / "vm.ws"
        touched = [40, 41, 42, 7, 100, 9]
        async with served(tmp_path, image=str(image), record_working_set=str(path)) as pager:
            async with start_vmm(pager.socket, PAGES) as vmm:
                for page in touched:
                    await vmm.ask("byte", page)
            assert (await pager.said.wait("working-set"))["set-pages"] == len(touched)
        opened = Image.open(str(image))
        assert workingset.read(str(path), opened).runs == ((40, 3), (7, 1), (100, 1), (9, 1))
        opened.close()
        async with (
            served(tmp_path, image=str(image), working_set=str(path)) as pager,
            start_vmm(pager.socket, PAGES) as vmm,
        ):
            figures = await pager.until(lambda vm: vm.get("working-set", {}).get("set-pages") == len(touched))
            for page in touched:
                await vmm.ask("byte", page)
            assert figures["working-set"]["hit-rate"] == 100
            assert (await pager.figures())["faults"] == 0
            assert await vmm.reads(content(), 0, PAGES)

    async def test_all_is_placed_behind(self, tmp_path: Path, image: Path) -> None:
        async with served(tmp_path, image=str(image), prefetch="all") as pager, start_vmm(pager.socket, PAGES) as vmm:
            figures = await pager.until(lambda vm: vm["status"] == "complete")
            assert figures["prefetched-pages"] > 0
            assert await vmm.reads(content(), 0, PAGES)

    async def test_one_of_another_image_is_refused(self, tmp_path: Path, image: Path) -> None:
        path, opened = tmp_path / "vm.ws", Image.open(str(image))
        workingset.write(str(path), workingset.WorkingSet(PAGE, ((0, 4),)), opened.identify())
        opened.close()
        write(image, content(3))
        with pytest.RaisesGroup(pytest.RaisesExc(ConfigurationError, match="another image"), flatten_subgroups=True):
            async with served(tmp_path, image=str(image), working_set=str(path)):
                pass

    async def test_a_damaged_one_is_ignored(
        self, tmp_path: Path, image: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "vm.ws"
        path.write_bytes(workingset.MAGIC + b"nothing of the kind")
        async with (
            served(tmp_path, image=str(image), working_set=str(path)) as pager,
            start_vmm(pager.socket, PAGES) as vmm,
        ):
            assert await vmm.reads(content(), 0, 8)
            assert "working-set" not in await pager.figures()
        assert "the checksum is wrong" in caplog.text


async def test_a_directory_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_handler, "SCAN_S", 0.01)
    images, sockets = tmp_path / "images", tmp_path / "sockets"
    images.mkdir()
    sockets.mkdir()
    (images / "one.mem").write_bytes(content(1))
    (images / "last.mem").write_bytes(content(3))
    (sockets / "last.sock").touch()  # in the way
    (images / "other.txt").write_bytes(content(1))
    said, stop, store = Said(), Stop(), LocalStore()
    config = PagerConfig(socket=str(sockets), images=str(images))
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        nursery.start_soon(Handler(config, said, store).run, stop)
        assert (await said.wait("listening"))["image"] == str(images / "one.mem")
        (images / "two.mem").write_bytes(content(2))
        await said.wait("listening", 2)
        (sockets / "last.sock").unlink()
        await said.wait("listening", 3)
        async with start_vmm(sockets / "one.sock", PAGES) as one, start_vmm(sockets / "two.sock", PAGES) as two:
            assert await one.reads(content(1), 0, 8)
            assert await two.reads(content(2), 0, 8)
        (images / "two.mem").unlink()

        async def gone() -> bool:
            return "two.sock" not in os.listdir(sockets)

        await until(gone)
        stop.insist()
        await said.wait("result")
        nursery.cancel_scope.cancel()
    assert list(sockets.iterdir()) == []


class Pages:
    """A page source."""

    def __init__(self, about: About) -> None:
        self.blocks = (SourceBlock("memory", about.memory_bytes, about.page_bytes),)

    async def fetch(self, block: int, first_page: int, count: int) -> bytes:
        await trio.lowlevel.checkpoint()
        if first_page >= 128:
            raise OSError("gone")
        return content()[first_page * PAGE : (first_page + count) * PAGE]


async def test_pages_of_a_program(tmp_path: Path) -> None:
    said: list[str] = []
    lost = trio.Event()

    def on_event(event: str, fields: Json) -> None:
        said.append(event)
        if event == "vm-lost":
            lost.set()

    async with trio.open_nursery() as nursery:
        serving: Callable[..., Any] = serve
        await nursery.start(
            lambda task_status: serving(str(tmp_path / "s"), Pages, on_event=on_event, task_status=task_status)
        )
        async with start_vmm(tmp_path / "s", PAGES) as vmm:
            assert await vmm.reads(content(), 0, 64)
            await vmm.send("read", 128, 1)
            with trio.fail_after(DEADLINE_S):
                await lost.wait()
        nursery.cancel_scope.cancel()
    assert "vm-connected" in said
    assert not (tmp_path / "s").exists()


class MorePages(Pages):
    """It has more than the virtual machine."""

    def __init__(self, about: About) -> None:
        self.blocks = (SourceBlock("memory", about.memory_bytes + 8 * PAGE, about.page_bytes),)

    async def fetch(self, block: int, first_page: int, count: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return content()[first_page * PAGE : (first_page + count) * PAGE]


async def test_pages_of_a_program_that_are_prefetched(tmp_path: Path) -> None:
    serving: Callable[..., Any] = serve
    async with trio.open_nursery() as nursery:
        await nursery.start(
            lambda task_status: serving(str(tmp_path / "s"), MorePages, prefetch="all", task_status=task_status)
        )
        async with start_vmm(tmp_path / "s", PAGES) as vmm:
            assert await vmm.reads(content(), 0, PAGES)
        nursery.cancel_scope.cancel()


async def test_a_page_source_that_cannot_be_made(tmp_path: Path) -> None:
    refused = trio.Event()
    said: list[Json] = []

    def on_event(event: str, fields: Json) -> None:
        if event == "vm-refused":
            said.append(fields)
            refused.set()

    def make(about: About) -> Pages:
        raise LookupError("no such snapshot")

    serving: Callable[..., Any] = serve
    async with trio.open_nursery() as nursery:
        await nursery.start(
            lambda task_status: serving(str(tmp_path / "s"), make, on_event=on_event, task_status=task_status)
        )
        async with start_vmm(tmp_path / "s", PAGES):
            with trio.fail_after(DEADLINE_S):
                await refused.wait()
        nursery.cancel_scope.cancel()
    assert "LookupError: no such snapshot" in said[0]["reason"]


async def test_the_end_of_a_connection_is_not_that_of_the_next_one() -> None:
    """What the virtual machine has not read yet goes through it all the same."""
    down, complete = Event(EventType.CHANNEL_DOWN, ChannelKind.URGENT), Event(EventType.COMPLETE)
    taken: list[Event] = []
    attached: list[int] = []

    class Fake:
        async def disconnect(self) -> None:
            await trio.lowlevel.checkpoint()

        def drain_events(self) -> list[Event]:
            return [down, complete]

        def attach_urgent(self, shard: int, fd: int, **_: object) -> None:
            attached.append(fd)
            os.close(fd)

    def take(event: Event) -> None:
        taken.append(event)
        lent.pass_on(event)

    lent = _LentPager(cast(Pager, Fake()), take)
    lent.pass_on(down)
    held = os.dup(0)
    lent.attach_urgent(0, held)
    await lent.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(held)
    assert taken == [down, complete]
    assert lent.take_event() is None
    again = os.dup(0)
    lent.attach_urgent(0, again)
    assert attached == []
    lent.image_is_known()
    assert attached == [again]


class TestOfAnotherHost:
    """Its image is served by this process; each VM has a migration of its own."""

    @pytest.mark.parametrize("prefetch", ["none", "all", "adaptive", "both:16"])
    async def test_pages_come(self, tmp_path: Path, prefetch: str) -> None:
        async with trio.open_nursery() as nursery:
            server = await nursery.start(postcopy.serve, content())
            route = Route(parse_address(server.address))
            async with (
                served(tmp_path, connect=route, prefetch=prefetch) as pager,
                start_vmm(pager.socket, PAGES, second=64) as one,
                start_vmm(pager.socket, PAGES) as other,
            ):
                await one.ask("remove", 0, 8)
                assert await one.reads(content(), 8, PAGES - 8)
                assert await one.ask("byte", 3) == "0"
                assert await other.reads(content(), 0, PAGES)
            nursery.cancel_scope.cancel()

    @pytest.mark.parametrize("prefetch", ["none", "adaptive", "forward:4"])
    async def test_pages_are_asked_for_ahead(self, tmp_path: Path, prefetch: str) -> None:
        """Of a guest that walks through its memory; one that nothing is asked for ahead of waits for each page."""
        async with trio.open_nursery() as nursery:
            server = await nursery.start(postcopy.serve, content())
            route = Route(parse_address(server.address))
            async with (
                served(tmp_path, connect=route, prefetch=prefetch) as pager,
                start_vmm(pager.socket, PAGES) as vmm,
            ):
                assert await vmm.reads(content(), 0, PAGES)
                figures = await pager.until(lambda vm: vm["status"] == "complete")
            nursery.cancel_scope.cancel()
        ahead, waited = figures["prefetched-pages"], figures["demand-pages"]
        assert ahead + waited + figures["zero-pages"] == PAGES
        assert ahead == 0 if prefetch == "none" else ahead > waited > 0

    @pytest.mark.needs("tls")
    async def test_pages_come_under_tls(self, tmp_path: Path) -> None:
        """From a source whose certificate has another name than its address."""
        named, directory = str(tls.site().issue("pages", "pages.example")), str(tls.directory())
        async with trio.open_nursery() as nursery:
            server = await nursery.start(lambda **more: postcopy.serve(content(), tls=named, **more))
            route = Route(parse_address(server.address), tls_hostname="pages.example")
            async with (
                served(tmp_path, connect=route, protection=Protection.of(directory)) as pager,
                start_vmm(pager.socket, PAGES) as vmm,
            ):
                assert await vmm.reads(content(), 0, PAGES)
                assert (await pager.figures())["encrypted"]
                assert "Encrypted:           yes" in render(as_json(await pager.handler.execute(Request("status", {}))))
            nursery.cancel_scope.cancel()

    async def test_the_vm_is_held_while_its_source_is_gone(self, tmp_path: Path) -> None:
        async with trio.open_nursery() as nursery:
            gone = await nursery.start(_serve_until_cancelled)
            route = Route(parse_address(gone[1].address))
            async with (
                served(tmp_path, connect=route, recover_for_s=0.2) as pager,
                start_vmm(pager.socket, PAGES) as vmm,
            ):
                assert await vmm.reads(content(), 0, 8)
                gone[0].cancel()
                await vmm.send("read", 8, 8)
                assert not (await pager.said.wait("vm-lost"))["killed"]
                back = await nursery.start(_serve_until_cancelled)
                route.change(parse_address(back[1].address))
                await pager.said.wait("vm-recovered")
                assert await vmm.answer()
                assert await vmm.reads(content(), 0, PAGES)
            nursery.cancel_scope.cancel()

    async def test_a_source_that_is_started_anew_costs_no_vm(self, tmp_path: Path) -> None:
        """The migration before has ended for good then."""
        async with trio.open_nursery() as nursery:
            gone = await nursery.start(_serve_until_cancelled)
            route = Route(parse_address(gone[1].address))
            async with (
                served(tmp_path, connect=route, kill_when_lost=True) as pager,
                start_vmm(pager.socket, PAGES) as vmm,
            ):
                assert await vmm.reads(content(), 0, 8)
                gone[0].cancel()
                await vmm.send("read", 8, 8)
                back = await nursery.start(_serve_until_cancelled)
                route.change(parse_address(back[1].address))
                assert await vmm.answer()
                assert await vmm.reads(content(), 0, PAGES)
                assert "vm-lost" not in [event for event, _ in pager.said.events]
            nursery.cancel_scope.cancel()

    async def test_one_that_is_complete_needs_no_source(self, tmp_path: Path) -> None:
        """Also in the next process, when the source has ended."""
        store = KeptStore()
        async with trio.open_nursery() as nursery:
            server = await nursery.start(_serve_until_cancelled)
            options: dict[str, Any] = {"connect": Route(parse_address(server[1].address)), "kill_when_lost": True}
            async with served(tmp_path, store, recover_for_s=0, **options) as first:
                vmm = await _hold(nursery, first.socket)
                assert await vmm.reads(content(), 0, PAGES)
                await first.until(lambda vm: vm["status"] == "complete")
                store.leave.set()
            server[0].cancel()
            (kept,) = (fds for fds in store.kept.values() if len(fds) > 1)
            second = LocalStore()
            second.taken, store.kept = {"vm": kept}, {}
            os.unlink(tmp_path / "s")
            async with served(tmp_path, second, recover_for_s=0, **options) as after:
                await after.said.wait("vm-connected")
                await trio.testing.wait_all_tasks_blocked(0.1)
                assert "vm-lost" not in [event for event, _ in after.said.events]
                assert await vmm.reads(content(), 0, PAGES)
            nursery.cancel_scope.cancel()

    async def test_the_image_is_the_one_that_it_was(self) -> None:
        """Nothing is asked of a source, or taken from it, before that is known."""
        about = About(1, "vm", 1, 0, "/s", None, PAGE, PAGES * PAGE, 0, [(0, PAGES * PAGE, 0)], 0, 0)
        digests: set[int | None] = set()
        known: list[bool] = []

        async def offer(digest: int | None) -> None:
            machine = _KnownImage(about, digests, lambda: known.append(True))
            await machine.load_state(msgspec.msgpack.encode({"digest": digest}))

        await offer(7)
        await offer(7)
        for other in (8, None):
            with pytest.raises(ConfigurationError, match="another image"):
                await offer(other)
        assert known == [True, True]

    async def test_memory_that_no_host_has_is_refused(self) -> None:
        source = ConnectSource(
            Route(parse_address("[::1]:1")), LOCAL, recover_for_s=0, background=False, policy=NO_PREFETCH
        )
        for region, words in (((0, PAGE, (1 << 56) - PAGE), "gaps"), ((0, 1 << 56, 0), "16 times what this host has")):
            with pytest.raises(ConfigurationError, match=words):
                source.check(About(1, "vm", 1, 0, "/s", None, PAGE, 1 << 56, 0, [region], 0, 0))

    async def test_memory_of_another_size_is_never_filled(self, tmp_path: Path) -> None:
        async with trio.open_nursery() as nursery:
            server = await nursery.start(postcopy.serve, content(pages=PAGES + 8))
            options: dict[str, Any] = {"connect": Route(parse_address(server.address)), "kill_when_lost": True}
            async with served(tmp_path, recover_for_s=0, **options) as pager, start_vmm(pager.socket, PAGES) as vmm:
                lost = await pager.said.wait("vm-lost")
                assert "of another snapshot" in lost["reason"]
                with trio.fail_after(DEADLINE_S):
                    assert await vmm.process.wait() == -signal.SIGKILL
            nursery.cancel_scope.cancel()


async def _serve_until_cancelled(
    task_status: trio.TaskStatus[tuple[trio.CancelScope, Any]] = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            task_status.started((scope, await nursery.start(postcopy.serve, content())))


async def test_metrics(tmp_path: Path, image: Path) -> None:
    async with served(tmp_path, image=str(image)) as pager, start_vmm(pager.socket, PAGES) as vmm:
        assert await vmm.reads(content(), 0, 8)
        name = (await pager.figures())["name"]
        page: VmMetrics = pager.handler.make_metrics()
        text = page.text().decode()
        assert f'postcopy_vm_memory_bytes{{vm="{name}"}} 1.048576e+06' in text
        assert f'postcopy_vm_fault_latency_seconds_count{{vm="{name}"}}' in text
        assert f'postcopy_vm_pages_total{{kind="demand",vm="{name}"}}' in text
        assert "postcopy_pager_engine_deaths_total 0.0" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": "/nowhere/x"}, "No such file"),
        ({"images": "/nowhere"}, "--images /nowhere"),
        ({"image": "IMAGE", "prefetch": "working-set"}, "--working-set FILE"),
        ({"image": "IMAGE", "prefetch": "both:4"}, "--prefetch both:4 goes with --connect"),
        ({"image": "IMAGE", "record_for_s": 3.0}, "--record-for goes with"),
        ({"image": "IMAGE", "record_working_set": "/nowhere/x"}, "--record-working-set"),
        ({"image": "IMAGE", "record_working_set": "IMAGE"}, "which would be replaced"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(image: Path, options: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {name: str(image) if value == "IMAGE" else value for name, value in options.items()}
    with pytest.raises(PostcopyError, match=words):
        check(replace(PagerConfig(), **given))
