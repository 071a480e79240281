# SPDX-License-Identifier: Apache-2.0
"""A program whose whole state is in files that it has mapped shared: tmpfs, hugetlbfs, memfd.

Such a program survives its own end at any instruction: another process that maps the same memory goes on from there,
as a database does with its shared buffers. So there is nothing to save and to load beside memory, and the pause is a
SIGSTOP. Both sides start the program with ``postcopy run``, the destination with ``--lazy``: there it waits at the
first touch of its memory, and what it reads then is what the source's has written.

| step | what is done |
|---|---|
| `prepare` | its mappings are looked at; at the destination they are emptied and guarded, and it is stopped |
| `pause`, `resume` | SIGSTOP, until no thread of it runs; SIGCONT |
| `lend` | the userfaultfd that guards it is the engine's |
| `made_whole` | the program keeps no userfaultfd any more, and runs on without us |

Its blocks are its mappings, in the order in which it has made them: both programs must map files of the same sizes in
the same order, before they touch any.

Resource handling: a program that was emptied and is not whole is killed by `close`. It has nothing of its own, and let
go it would run beside the one that it was to become.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import trio
from msgspec import Meta

from postcopy._blocking import run_sync
from postcopy._fd import FdHolder
from postcopy.errors import BusyError, ConfigurationError, MigrationError, PostcopyError, ProtocolError, ResourceError
from postcopy.machines._guarded import GuardedProcess
from postcopy.machines._memory_files import boot_id, check_nobody_else_has, empty, promise_room
from postcopy.machines.base import BlockLayout, MachineState, RamBlock
from postcopy.machines.preload.client import Mapping as Mapped
from postcopy.machines.preload.client import Preload, State, process_at
from postcopy.machines.process import ProcessMachine
from postcopy.memory import FEATURES_OF_PROCESS, DirtyLog, Memory
from postcopy.units import format_size

STATE = b"program 1"
"""What is sent as state: what the other side is, and no more."""
_POLL_S = 0.001

log = logging.getLogger(__name__)

_Number = Annotated[int, Meta(ge=0)]


class Config(msgspec.Struct):
    """What an offer says of a program. What is not known is ignored."""

    boot: Annotated[str, Meta(max_length=64)]  # which host that is: the kernel's boot id
    files: Annotated[list[tuple[_Number, _Number]], Meta(min_length=1, max_length=128)]  # device, inode


class ProgramMachine(ProcessMachine):
    """Made by `create`, at the source."""

    kind = "program"
    program = "the program"

    def __init__(self, preload: str) -> None:
        super().__init__()
        self._path = preload
        self._library: Preload | None = None
        self._blocks: tuple[RamBlock, ...] = ()
        self._addresses: tuple[int, ...] = ()
        self._config: Config | None = None
        self._logger: FdHolder | PostcopyError | None = None  # a userfaultfd of it for the dirty log

    @classmethod
    def create(cls, preload: str) -> ProgramMachine:
        """The one whose library is asked at that path. Nothing is asked yet."""
        return cls(preload)

    async def prepare(self) -> None:
        mappings = await self._find()
        for mapping in mappings:
            mapping.fd.close()
        await self._check_whole()
        await self._open_logger()
        self._state = MachineState.RUNNING

    async def _find(self) -> list[Mapped]:
        """Holds the process, and looks at its memory. The descriptors are the caller's."""
        process = await process_at(self._path)
        self._hold(process)
        library = self._library = Preload(process.pid, self._path)
        mappings = await library.mappings()
        try:
            _check(mappings, self._name)
            files = [(one.device, one.inode) for one in mappings]
            await check_nobody_else_has(self._name, self._pid, files)
            self._config = Config(await run_sync(boot_id), files)
            self._addresses = tuple(one.address for one in mappings)
            for number, one in enumerate(mappings):
                memory = Memory.from_shared_file(one.fd.fileno(), one.size_bytes, one.page_bytes)
                self._blocks += (RamBlock(f"mapping{number}", memory, 0),)
        except BaseException:
            for one in mappings:
                one.fd.close()
            raise
        return mappings

    async def _check_whole(self) -> None:
        assert self._library is not None
        try:
            if self._library.state & (State.KEPT | State.LAZY):
                # Nobody else has this program; one that has ended may have left it a userfaultfd that guards nothing.
                await self._library.disarm()
        except BusyError as error:
            raise BusyError(
                f"{self._name} waits for its memory: what has not arrived would be sent as zeros. If the migration that"
                " brought it here has been lost, end it"
            ) from error

    async def _open_logger(self) -> None:
        assert self._library is not None
        try:
            armed = await self._library.arm((), features=FEATURES_OF_PROCESS, mode=0, keep=False)
            self._logger = armed.uffd
        except PostcopyError as error:  # which matters where precopy is asked for
            self._logger = error

    # ---- what it is

    @property
    def blocks(self) -> Sequence[RamBlock]:
        """None before `prepare`."""
        return self._blocks

    def config(self) -> dict[str, Any]:
        assert self._config is not None
        config: dict[str, Any] = msgspec.to_builtins(self._config)
        return config

    @property
    def process(self) -> tuple[int, str] | None:
        return (self._pid, self._path) if self._pid else None

    # ---- running it

    async def pause(self, timeout_s: float = 10.0) -> None:
        """Until no thread of it runs. When one does not stop in time it runs on."""
        if self._state is MachineState.PAUSED:
            await trio.lowlevel.checkpoint()
            return
        with trio.CancelScope(shield=True):
            self._signal(signal.SIGSTOP)
            why = ""
            try:
                with trio.fail_after(timeout_s):
                    while not _stands(self._pid):  # noqa: ASYNC110 -- nothing tells when it does, but to its parent
                        await trio.sleep(_POLL_S)
            except trio.TooSlowError:
                why = f"has not stopped within {timeout_s:g} s: a system call does not end"
            except OSError as error:
                why = f"cannot be looked at: {error.strerror}"
            if why:
                self._signal(signal.SIGCONT)
                raise MigrationError(f"{self._name} {why}")
            if not self._is_alive():
                raise MigrationError(f"{self._name} has ended")
            self._paused_ns = time.monotonic_ns()
            self._state = MachineState.PAUSED
            self._tell()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def resume(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._state is MachineState.PAUSED:
            self._signal(signal.SIGCONT)
            self._runs()

    def _signal(self, number: signal.Signals) -> None:
        assert self._pidfd is not None
        try:
            signal.pidfd_send_signal(self._pidfd.fileno(), number)
        except ProcessLookupError:
            raise MigrationError(f"{self._name} has ended") from None
        except PermissionError as error:
            raise ResourceError(
                f"this user may not stop {self._name}", "run as the user of that program, or as root"
            ) from error

    async def save_state(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return STATE

    async def load_state(self, state: bytes) -> None:
        raise MigrationError("this program runs already")

    # ---- what it writes

    def dirty_log(self) -> DirtyLog:
        if isinstance(self._logger, PostcopyError):
            raise self._logger
        assert self._logger is not None
        assert self._pidfd is not None
        memories = [(block.memory, address) for block, address in zip(self._blocks, self._addresses, strict=True)]
        return DirtyLog.of_process(memories, self._logger.fileno(), self._pid, self._pidfd.fileno())

    # ---- the end

    async def _release(self) -> None:
        if isinstance(self._logger, FdHolder):
            self._logger.close()
        for block in self._blocks:
            block.memory.drop()


class ArrivingProgram(GuardedProcess, ProgramMachine):
    """Made by `for_destination`; once it is whole it can leave again, as any `ProgramMachine`."""

    UNANSWERED = ()

    def __init__(self, offered: Config, layout: Sequence[BlockLayout], preload: str) -> None:
        super().__init__(preload)
        self._offered = offered
        self._layout = layout

    @classmethod
    def for_destination(cls, config: Mapping[str, Any], layout: Sequence[BlockLayout], preload: str) -> ArrivingProgram:
        """`ProtocolError` for an offer that makes no sense."""
        try:
            known = msgspec.convert(config, Config)
        except msgspec.ValidationError as error:
            raise ProtocolError(f"the offer of a program makes no sense: {str(error)[:200]}") from error
        if len(known.files) != len(layout):
            raise ProtocolError("the offer of a program must have a file for each block")
        return cls(known, layout, preload)

    async def prepare(self) -> None:
        mappings = await self._find()
        try:
            self._check_fits(mappings)
            assert self._library is not None
            memories = [block.memory for block in self._blocks]
            promise_room(self._name, memories)
            self._touched = True
            await empty(memories)
            await self._arm(self._library, mappings, 0)
            await empty(memories)
        finally:
            for mapping in mappings:
                mapping.fd.close()
        self._signal(signal.SIGSTOP)

    def _check_fits(self, mappings: Sequence[Mapped]) -> None:
        assert self._library is not None
        assert self._config is not None
        if State.LAZY not in self._library.state:
            raise ConfigurationError(
                f"{self._name} does not wait for its memory: start one with `postcopy run --lazy` for each arrival"
            )
        if self._offered.boot == self._config.boot and set(self._offered.files) & set(self._config.files):
            raise ConfigurationError(
                f"{self._name} has mapped a file of the source's program itself, which would be emptied; name another"
                " one on its command line"
            )
        here = [(one.size_bytes, one.page_bytes) for one in mappings]
        there = [(one.size_bytes, one.page_bytes) for one in self._layout]
        if here != there:
            raise ConfigurationError(
                f"{self._name} has mapped {_shown(here)}, the source's program {_shown(there)}: both must map the same,"
                " in the same order, before they touch any of it"
            )

    def _block_addresses(self) -> Sequence[int]:
        return self._addresses

    async def load_state(self, state: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if state != STATE:
            raise ProtocolError("the state of a program has something in it that is not known here")
        self._state = MachineState.PAUSED

    async def _tell_to_run(self, timeout_s: float) -> None:
        self._signal(signal.SIGCONT)

    async def _is_running(self, timeout_s: float) -> bool | None:
        return True

    async def made_whole(self) -> None:
        await super().made_whole()
        await self._open_logger()


def _check(mappings: Sequence[Mapped], who: str) -> None:
    if not mappings:
        raise ConfigurationError(f"{who} has no memory that can be moved: it must map a file in memory, shared")
    seen = set()
    for mapping in mappings:
        file_bytes = os.fstat(mapping.fd.fileno()).st_size
        if (mapping.device, mapping.inode) in seen:
            raise ConfigurationError(f"{who} has mapped {mapping.name} more than once: it must map it once, as a whole")
        if mapping.offset or mapping.size_bytes != file_bytes:
            raise ConfigurationError(
                f"{who} has mapped {format_size(mapping.size_bytes)} of {mapping.name} at offset {mapping.offset}: it"
                f" must map it as a whole ({format_size(file_bytes)})"
            )
        seen.add((mapping.device, mapping.inode))


def _shown(sizes: Sequence[tuple[int, int]]) -> str:
    return " + ".join(format_size(size) for size, _ in sizes)


def _stands(pid: int) -> bool:
    """Whether each thread of a process is stopped."""
    directory = Path(f"/proc/{pid}/task")
    try:
        tasks = sorted(directory.iterdir())
        # (One that has stopped meanwhile may have made another one before.)
        return all(_state_of(task) in "TtZX" for task in tasks) and tasks == sorted(directory.iterdir())
    except (FileNotFoundError, ProcessLookupError):  # a thread has ended: look again; so has the process, which is seen
        return not os.path.exists(f"/proc/{pid}")


def _state_of(task: Path) -> str:
    return (task / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
