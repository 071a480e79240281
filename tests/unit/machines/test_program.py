# SPDX-License-Identifier: Apache-2.0
"""A program as a machine, without an engine: found, looked at, stopped, guarded, and let go or ended."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from programs import PAGE, Program, program, threads_run

from postcopy.errors import (
    BusyError,
    ConfigurationError,
    MigrationError,
    PostcopyError,
    ProtocolError,
    ResourceError,
)
from postcopy.machines import program as program_module
from postcopy.machines.base import Extent
from postcopy.machines.kinds import HostOptions, MachineOptions, create_destination, create_source
from postcopy.machines.preload.client import Preload, State
from postcopy.machines.program import STATE, ArrivingProgram, ProgramMachine
from postcopy.memory import Bitmap
from postcopy.uffd import RegisterMode, Userfaultfd

pytestmark = pytest.mark.needs("uffd")

TWO = (("arena", 16 * PAGE, 0), ("other", 4 * PAGE, 0))


def source_of(found: Program) -> ProgramMachine:
    machine = create_source("program", MachineOptions(preload=found.socket))
    assert isinstance(machine, ProgramMachine)
    return machine


def arriving(source: ProgramMachine, found: Program, **offer: Any) -> ArrivingProgram:
    config = source.config() | {"boot": "another host"} | offer
    machine = create_destination("program", config, source.layout, HostOptions(preload=found.socket))
    assert isinstance(machine, ArrivingProgram)
    return machine


@contextlib.asynccontextmanager
async def prepared(machine: ProgramMachine) -> AsyncIterator[ProgramMachine]:
    async with machine:
        await machine.prepare()
        yield machine


def pages_of(bitmap: Bitmap) -> list[int]:
    return [page for page in range(len(bitmap)) if bitmap[page]]


def is_asleep(found: Program) -> bool:
    """Whether its main thread waits, as for a page."""
    text = Path(f"/proc/{found.pid}/stat").read_text()
    return text.rpartition(")")[2].split()[0] in "SD"


async def until(what: Callable[[], bool]) -> None:
    with trio.fail_after(30):
        while not what():  # noqa: ASYNC110 -- another process's state
            await trio.sleep(0.005)


async def test_stops_with_all_its_threads_and_goes_on(tmp_path: Path) -> None:
    with program(tmp_path, "a") as one:
        one.ask("threads 3")
        async with prepared(source_of(one)) as machine:
            assert [(block.name, block.size_bytes) for block in machine.layout] == [("mapping0", 16 * PAGE)]
            assert machine.process == (one.pid, one.socket)
            for _ in range(5):
                await machine.pause()
                assert not threads_run(one.pid)
                await machine.resume()
                await until(lambda: threads_run(one.pid))
            with pytest.raises(BusyError):
                await source_of(one).prepare()
        assert one.ask("write 0 1 7") == "written"  # let go, as it was


async def test_its_memory_is_looked_at_in_place(tmp_path: Path) -> None:
    with program(tmp_path, "a", TWO) as one:
        one.ask("write 1 2 9")
        async with prepared(source_of(one)) as machine:
            first, second = (block.memory for block in machine.blocks)
            assert pages_of(first.present()) == []
            assert pages_of(second.present()) == [2]
            assert os.pread(second.fd, 1, 2 * PAGE) == b"\x09"
            log = await trio.to_thread.run_sync(machine.dirty_log)
            for number in (0, 1):
                await trio.to_thread.run_sync(log.collect, number)
            one.ask("write 0 5 1")
            assert pages_of(await trio.to_thread.run_sync(log.collect, 0)) == [5]
            assert pages_of(await trio.to_thread.run_sync(log.collect, 1)) == []
            log.close()
            one.ask("write 0 6 1")


async def test_waits_for_its_memory_until_it_is_there(tmp_path: Path) -> None:
    with program(tmp_path, "a") as one, program(tmp_path, "b", lazy=True) as two:
        async with prepared(source_of(one)) as source:
            two.tell("read 0 3")
            await until(partial(is_asleep, two))
            library = Preload(two.pid, two.socket)
            for mapping in await library.mappings():
                with mapping.fd as fd:  # as a file that was there before
                    os.pwrite(fd.fd, b"old" * 4 * PAGE, 2 * PAGE)
            machine = arriving(source, two)
            async with prepared(machine):
                await until(lambda: not threads_run(two.pid))
                assert pages_of(machine.blocks[0].memory.present()) == []
                lent = list[tuple[Userfaultfd, Extent]]()

                async def adopt(uffd: int, features: int, extents: Sequence[Extent]) -> None:
                    lent.append((Userfaultfd.adopt(uffd, features), extents[0]))

                await machine.lend(adopt)
                ((uffd, extent),) = lent
                assert (extent.block, extent.first_page, extent.pages) == (0, 0, 16)
                with pytest.raises(ProtocolError):
                    await machine.load_state(b"something else")
                await machine.load_state(STATE)
                await machine.resume()
                await until(lambda: threads_run(two.pid))
                for page in range(16):
                    uffd.place(extent.address + page * PAGE, bytes([page + 40]) * PAGE)
                assert two.answer() == "43"
                uffd.unregister(extent.address, 16 * PAGE)
                uffd.close()
                await machine.made_whole()
                # It can leave again.
                log = await trio.to_thread.run_sync(machine.dirty_log)
                log.close()
                await machine.pause()
                await machine.resume()
        assert two.ask("read 0 4") == "44"
        for mapping in await library.mappings():
            mapping.fd.close()
        assert library.state == State(0)


async def test_what_has_not_all_arrived_is_not_sent(tmp_path: Path) -> None:
    with program(tmp_path, "a") as one, program(tmp_path, "b", lazy=True) as two:
        async with source_of(two) as machine:
            with pytest.raises(BusyError, match="waits for its memory"):
                await machine.prepare()
        library = Preload(one.pid, one.socket)
        (mapping,) = await library.mappings()
        mapping.fd.close()
        armed = await library.arm([mapping], features=0, mode=RegisterMode.MISSING, keep=True)
        with Userfaultfd.adopt(armed.uffd.detach(), int(armed.features)) as guard:
            async with source_of(one) as machine:
                with pytest.raises(BusyError, match="waits for its memory"):
                    await machine.prepare()
            guard.unregister(mapping.address, mapping.size_bytes)
        # What has ended between that and the last step has left nothing that matters.
        async with prepared(source_of(one)) as machine:
            log = await trio.to_thread.run_sync(machine.dirty_log)
            log.close()


async def test_one_that_cannot_be_seen_to_stop_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(task: Path) -> str:
        monkeypatch.undo()
        raise ProcessLookupError  # of read(2), from a thread that ends between that and open(2)

    def fails(pid: int) -> bool:
        raise OSError(errno.EMFILE, "Too many open files")

    with program(tmp_path, "a") as one:
        async with prepared(source_of(one)) as machine:
            monkeypatch.setattr(program_module, "_state_of", ends)
            await machine.pause()
            await machine.resume()
            monkeypatch.setattr(program_module, "_stands", fails)
            with pytest.raises(MigrationError, match="Too many open files"):
                await machine.pause()
            assert one.ask("write 0 0 1") == "written"


@pytest.mark.parametrize("lent", [False, True])
async def test_what_was_emptied_and_is_not_whole_is_ended(tmp_path: Path, lent: bool) -> None:
    with program(tmp_path, "a") as one, program(tmp_path, "b", lazy=True) as two:
        async with prepared(source_of(one)) as source:
            two.tell("read 0 3")
            machine = arriving(source, two)
            async with prepared(machine):
                if lent:
                    await machine.load_state(STATE)
        assert two.process.wait(30) == -signal.SIGKILL
        assert two.answer() == ""
        assert one.ask("read 0 0") == "0"


_MAPS: dict[str, tuple[Sequence[tuple[str, int, int]], str]] = {
    "nothing": ([], "has mapped no file in memory yet"),
    "twice": ([("arena", 8 * PAGE, 0), ("arena", 8 * PAGE, 0)], "more than once"),
    "a-part": ([("arena", 8 * PAGE, PAGE)], "as a whole"),
    "no-whole-pages": ([("arena", 8 * PAGE - 5, 0)], "shorter"),
}


@pytest.mark.parametrize("maps", _MAPS)
async def test_memory_that_cannot_be_moved_is_refused(tmp_path: Path, maps: str) -> None:
    given, why = _MAPS[maps]
    with program(tmp_path, "a", given) as one:
        async with source_of(one) as machine:
            with pytest.raises(PostcopyError, match=why):
                await machine.prepare()
        one.process.poll()
        assert one.process.returncode is None


async def test_a_program_that_does_not_fit_is_refused_and_left_alone(tmp_path: Path) -> None:
    with (
        program(tmp_path, "a") as one,
        program(tmp_path, "b", TWO, lazy=True) as larger,
        program(tmp_path, "c") as runs,
    ):
        async with prepared(source_of(one)) as source:
            async with arriving(source, larger) as machine:
                with pytest.raises(ConfigurationError, match="must map the same"):
                    await machine.prepare()
            async with arriving(source, runs) as machine:
                with pytest.raises(ConfigurationError, match="does not wait for its memory"):
                    await machine.prepare()
            assert runs.ask("write 0 0 1") == "written"
            async with arriving(source, larger) as machine:
                pass
            library = Preload(larger.pid, larger.socket)
            mappings = await library.mappings()
            for mapping in mappings:
                mapping.fd.close()
            assert library.state == State.LAZY
            # It has the very file of the source.
            config = {"boot": source.config()["boot"], "files": [[one.device, one.inode] for one in mappings[:1]]}
            async with arriving(source, larger, **config) as machine:
                with pytest.raises(ConfigurationError, match="a file of the source's program itself"):
                    await machine.prepare()


@contextlib.contextmanager
def mapped_elsewhere(fd: int) -> Iterator[int]:
    code = "import mmap, sys; m = mmap.mmap(int(sys.argv[1]), 4096); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-I", "-c", code, str(fd)], pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process.pid
        process.kill()


async def test_memory_that_another_process_has_too_is_left_alone(tmp_path: Path) -> None:
    with program(tmp_path, "a") as one, program(tmp_path, "b", lazy=True) as two:
        async with prepared(source_of(one)) as source:
            (mapping,) = await Preload(two.pid, two.socket).mappings()
            with mapping.fd as fd, mapped_elsewhere(fd.fd) as pid:
                os.pwrite(fd.fd, b"kept", 0)
                for refused in (arriving(source, two), source_of(two)):  # a child of it would go on there, unseen
                    async with refused as machine:
                        with pytest.raises(ConfigurationError, match=f"process {pid}, python.* has mapped, too"):
                            await machine.prepare()
                assert os.pread(fd.fd, 4, 0) == b"kept"
        assert two.process.poll() is None


async def test_offers_and_options_that_make_no_sense(tmp_path: Path) -> None:
    with program(tmp_path, "a") as one:
        async with prepared(source_of(one)) as source:
            wrong: list[dict[str, Any]] = [{"files": []}, {"files": [[1, 2], [3, 4]]}, {"files": [[1]]}, {"boot": 1}]
            for offer in wrong:
                with pytest.raises(ProtocolError):
                    arriving(source, one, **offer)
            with pytest.raises(ConfigurationError, match="--preload"):
                create_destination("program", source.config(), source.layout, HostOptions())
    with pytest.raises(ConfigurationError, match="--preload"):
        create_source("program", MachineOptions())
    with pytest.raises(ResourceError, match="no preload library answers"):
        await create_source("program", MachineOptions(preload=str(tmp_path / "none"))).prepare()


async def test_its_end_is_seen(tmp_path: Path) -> None:
    with program(tmp_path, "a") as one:
        async with prepared(source_of(one)) as machine:
            one.process.kill()
            with trio.fail_after(30):
                await machine.wait_changed()
            assert "has ended" in machine.statistics().failure_text
            with pytest.raises(PostcopyError, match="has ended"):
                await machine.pause()
