# SPDX-License-Identifier: Apache-2.0
"""A QEMU that arrives: its state is loaded into one that waits for it (``-incoming defer``) under the preload library,
and its memory is placed there page by page.

| step | what is done |
|---|---|
| `prepare` | it is found, or started; it must fit to the offer; its memory is emptied, and guarded by a userfaultfd |
| `lend` | that userfaultfd is the engine's from here on |
| `load_early` | ``migrate-incoming``, and what it may load before it is known which pages there are |
| `load_state` | its disks are taken, then it loads the rest: it touches pages of its memory, which are served |
| `resume` | ``cont`` |
| `made_whole` | nothing is registered any more, and the library keeps nothing: QEMU runs on without us |

**Disks.** QEMU up to 9 says of a disk that somebody else has locked only on its standard error, and goes on; from 10 on
one under ``-S`` locks nothing before it runs. Either would be found out after the decision. So disks are taken while
nothing is decided: by ``blockdev-set-active`` after the load where there is that, else by ``cont`` while it waits for
its state, which does that and starts nothing, and ``stop``, which takes back what ``cont`` has noted for later.

Resource handling: as for any `ArrivingProcess`. A QEMU that was told nothing yet is let go as it was, and can be used
again: its memory is not guarded any more.

**Trust.** QEMU's command line is the operator's, on this host too: none comes from a peer, since it could name any file
or program here.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import outcome
import trio

from postcopy._fd import FdHolder
from postcopy.errors import (
    BusyError,
    ConfigurationError,
    MigrationError,
    PostcopyError,
    ProtocolError,
    ResourceError,
)
from postcopy.machines._guarded import GuardedProcess
from postcopy.machines._memory_files import check_nobody_else_has, empty, promise_room
from postcopy.machines.base import BlockLayout, MachineState
from postcopy.machines.preload.client import Mapping as Mapped
from postcopy.machines.preload.client import Preload
from postcopy.machines.preload.start import environment
from postcopy.machines.process import Started
from postcopy.machines.qemu._look import (
    PAGE_SIZES,
    Backend,
    Config,
    Look,
    look,
    same_host_and_file,
)
from postcopy.machines.qemu.qmp import Asked, QemuError, QemuInDoubt, QemuUnreachable
from postcopy.machines.qemu.source import EVENTS, IGNORE_SHARED, QemuMachine, open_pipe
from postcopy.memory import Memory, MemoryKind, check_memory
from postcopy.uffd import UffdFeature, Userfaultfd
from postcopy.units import format_size

START_S = 10.0
"""How long one that we start may take to answer."""
LOAD_S = 30.0
"""How long it may take to load the state; it takes some 10 ms."""
MONITOR, PRELOAD, STATE = "qmp.sock", "preload.sock", "postcopy-state"
NAME_VARIABLE = "POSTCOPY_MACHINE"
"""By which a command that is started for any machine that comes knows for which one it is."""
SET_ACTIVE = "blockdev-set-active"
EXIT_ON_ERROR = (9, 1)
"""The first version that can be told to stay when it cannot load, and so to say why."""
FEATURES = (
    UffdFeature.MISSING_SHMEM
    | UffdFeature.MISSING_HUGETLBFS
    | UffdFeature.MINOR_SHMEM
    | UffdFeature.MINOR_HUGETLBFS
    | UffdFeature.EVENT_REMOVE  # the balloon
    | UffdFeature.THREAD_ID
)
ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
"""As QEMU does it by itself: so many frames, and pauses between them in ms."""
NOT_TO_BE_SAID = ("incoming", "daemonize")
HAVE_RUN = {"running", "debug", "internal-error", "io-error", "shutdown", "suspended", "watchdog", "guest-panicked"}
"""What QEMU says of a guest that runs, or has run and was stopped by what it did."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QemuHost:
    """What a QEMU that comes finds on this host."""

    qmp: str | None = None  # the monitor of one that waits for its state
    command: Sequence[str] | None = None  # with which one is started
    preload: str | None = None  # the library's socket, where it is not as the process's environment says
    name: str = ""  # of the machine, which the command finds in its environment


class ArrivingQemu(GuardedProcess, QemuMachine):
    """Made by `for_destination`; once it is whole it can leave again, as any `QemuMachine`."""

    UNANSWERED = (QemuError,)

    def __init__(self, offered: Config, layout: Sequence[BlockLayout], host: QemuHost) -> None:
        super().__init__(host.qmp or "", host.preload)
        self._offered = offered
        self._layout = layout
        self._command = host.command
        self._machine_name = host.name
        self._takes_disks_late = False
        self._feed: _Feed | None = None  # once it loads
        self._loads: Asked | None = None

    @classmethod
    def for_destination(cls, config: Mapping[str, Any], layout: Sequence[BlockLayout], host: QemuHost) -> ArrivingQemu:
        """`ProtocolError` for an offer that makes no sense, `ConfigurationError` for one that cannot be taken here."""
        try:
            known = msgspec.convert(config, Config)
        except msgspec.ValidationError as error:
            raise ProtocolError(f"the offer of a QEMU makes no sense: {str(error)[:200]}") from error
        names = [block.name for block in layout]
        if not names or names != sorted(set(names)) or len(known.files) != len(names):
            raise ProtocolError("the offer of a QEMU must have blocks by name, each with a file of its own")
        if any(block.page_bytes not in PAGE_SIZES for block in layout):
            raise ProtocolError("the offer of a QEMU has pages of a size that is not known here")
        if (host.qmp is None) is (host.command is None):
            raise ConfigurationError(
                "this side has no QEMU to load it into: say --qmp PATH of one that `postcopy run` has started with"
                " -incoming defer -S, or --qemu COMMAND to have it started"
            )
        return cls(known, layout, host)

    # ---- before anything is accepted

    async def prepare(self) -> None:
        if self._command is not None:
            # Before anything is started for an offer that cannot be held; what QEMU then has is promised below.
            if small := sum(one.size_bytes for one in self._layout if one.page_bytes == PAGE_SIZES[0]):
                check_memory(MemoryKind.MEMFD, small)
            await self._start(self._command)
        else:
            await self._connect()
        await self._check_waits()
        monitor = self._monitor
        assert monitor is not None
        seen = await look(monitor, monitor.process)
        _check_fits(seen, self._offered, self._layout, self._qmp)
        files = [(one.device, one.inode) for one in seen.config.files]
        await check_nobody_else_has(f"the QEMU at {self._qmp}", self._pid, files)
        commands = await self._execute("query-commands")
        self._takes_disks_late = isinstance(commands, list) and {"name": SET_ACTIVE} in commands
        library = await Preload.of_process(self._pid, self._preload)
        await self._found(seen)
        promise_room("QEMU", self._memories)
        await self._execute("stop")  # it does not run by itself when it has loaded, also where -S is missing
        await self._set_up_migration(frozenset({EVENTS, IGNORE_SHARED}), {"announce-rounds": 0})
        mappings = await library.mappings()
        try:
            chosen = [_mapping_of(backend, mappings, library) for backend in seen.backends]
            await empty(self._memories)
            await self._arm_or_take_over(library, chosen)
            await empty(self._memories)
        finally:
            for mapping in mappings:
                mapping.fd.close()

    async def _start(self, command: Sequence[str]) -> None:
        name = f"--qemu {command[0]}"
        for option in NOT_TO_BE_SAID:
            if f"-{option}" in command or f"--{option}" in command:
                raise ConfigurationError(f"{name}: leave -{option} out of the command: it is started as it has to be")
        self._own = await Started.start(
            name,
            lambda directory: [
                *command,
                *("-qmp", f"unix:{directory.replace(',', ',,')}/{MONITOR},server=on,wait=off"),
                *("-incoming", "defer", "-S"),
            ],
            self._environment,
        )
        self._qmp = self._own.path(MONITOR)
        await self._own.until_it_answers(name, self._answers, START_S)

    @contextlib.contextmanager
    def _environment(self, directory: str) -> Iterator[Mapping[str, str]]:
        with environment(f"{directory}/{PRELOAD}") as variables:
            yield {**variables, NAME_VARIABLE: self._machine_name}

    async def _answers(self) -> bool:
        with contextlib.suppress(QemuUnreachable, QemuInDoubt):  # it may be about to end
            await self._connect()
            return True
        return False

    async def _check_waits(self) -> None:
        """That it waits for a state, and has not begun to load one."""
        status = await self._status()
        if status != "inmigrate":
            raise ConfigurationError(
                f"the QEMU at {self._qmp} is {status!r}: a guest can be loaded only into one that was started with"
                " -incoming defer -S; start a new one there"
            )
        said = await self._execute("query-migrate")
        if isinstance(said, dict) and said.get("status"):
            raise ConfigurationError(
                f"the QEMU at {self._qmp} has begun to load a guest ({str(said['status'])[:40]}), and can be used no"
                " more: end it, and start a new one with -incoming defer -S"
            )

    @property
    def _memories(self) -> list[Memory]:
        return [block.memory for block in self.blocks]

    async def _arm_or_take_over(self, library: Preload, mappings: Sequence[Mapped]) -> None:
        try:
            await self._arm(library, mappings, FEATURES)
        except BusyError:
            # Whoever guarded it has ended, since nobody else has this QEMU, and has told it nothing.
            if not await self._stop_guarding(library):
                raise
            await self._arm(library, mappings, FEATURES)

    def _block_addresses(self) -> Sequence[int]:
        return [backend.address for backend in self._seen.backends]

    # ---- its state

    async def load_early(self, state: bytes) -> None:
        with self._failing_to_load():
            await self._begin_to_load()
            assert self._feed is not None
            self._feed.add(state)

    async def load_state(self, state: bytes) -> None:
        assert self._monitor is not None
        disks = self._seen.has_disks
        with self._failing_to_load():
            if not state:  # for which QEMU would wait
                raise ProtocolError("QEMU has not loaded the state: the source has sent an empty one")
            with trio.fail_after(LOAD_S):
                await self._begin_to_load()
                if disks and not self._takes_disks_late:
                    # Not before QEMU has let go of them at the source; done before the last of the state is there.
                    taken = [await self._monitor.ask(command, timeout_s=LOAD_S) for command in ("cont", "stop")]
                    for asked in taken:
                        await self._monitor.answer_to(asked)
                    self._stopped = True
                await self._load(state)
                if disks and self._takes_disks_late:
                    await self._execute(SET_ACTIVE, {"active": True}, timeout_s=LOAD_S)
        self._state = MachineState.PAUSED

    @contextlib.contextmanager
    def _failing_to_load(self) -> Iterator[None]:
        self._touched = True
        try:
            yield
        except trio.TooSlowError:
            raise MigrationError(
                f"QEMU has not loaded the state within {LOAD_S:g} s: a page that it needs has not come, or a disk does"
                f" not answer; {self._what_is_left}"
            ) from None
        except QemuInDoubt as error:
            raise MigrationError(
                f"QEMU has not loaded the state, and why it has not is on its standard error: {error};"
                f" {self._what_is_left}"
            ) from error
        except QemuError as error:
            raise MigrationError(f"QEMU has not loaded the state: {error}; {self._what_is_left}") from error

    async def _begin_to_load(self) -> None:
        """It loads what comes through a pipe from here on."""
        assert self._monitor is not None
        if self._feed is not None:
            return
        self._feed, theirs = _Feed.open()
        request: dict[str, Any] = {"uri": f"fd:{STATE}"}
        if self._monitor.version >= EXIT_ON_ERROR:
            request["exit-on-error"] = False
        self._migration, self._stopped = "", True
        with theirs:
            given = await self._monitor.ask("getfd", {"fdname": STATE}, fd=theirs.fileno(), timeout_s=LOAD_S)
            self._loads = await self._monitor.ask("migrate-incoming", request, timeout_s=LOAD_S)
            await self._monitor.answer_to(given)

    async def _load(self, rest: bytes) -> None:
        assert self._monitor is not None
        assert self._feed is not None
        assert self._loads is not None
        self._feed.add(rest)
        if self._feed.is_empty:
            self._feed.close()
            await self._until_loaded(self._loads)
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._feed.end)
                ended = await outcome.acapture(self._until_loaded, self._loads)
                nursery.cancel_scope.cancel()
            ended.unwrap()
        if self._migration != "completed":
            said = await self._execute("query-migrate")
            why = said.get("error-desc", "") if isinstance(said, dict) else ""
            raise MigrationError(f"QEMU has not loaded the state: {str(why)[:300] or self._migration}")
        if not self._stopped:
            raise MigrationError(
                "QEMU has loaded the state, and runs already: another client has told it to; it is ended"
            )

    async def _until_loaded(self, asked: Asked) -> None:
        assert self._monitor is not None

        def over() -> bool:
            return self._migration in ("completed", "failed")

        self._monitor.hurry(over)
        await self._monitor.answer_to(asked)
        await self._monitor.wait_until(over, math.inf)

    @property
    def _what_is_left(self) -> str:
        return "start a new one here for another attempt" if self._own is None else "it is ended"

    # ---- running

    async def _tell_to_run(self, timeout_s: float) -> None:
        monitor = await self._mended()
        await monitor.answer_to(await monitor.ask("cont", timeout_s=timeout_s), hurry=True)

    async def _is_running(self, timeout_s: float) -> bool | None:
        with trio.move_on_after(timeout_s):
            status = await self._status()
            return True if status in HAVE_RUN else False if status in ("paused", "prelaunch") else None
        return None

    async def claim_network(self) -> None:
        try:
            await self._execute("announce-self", ANNOUNCE)
        except QemuError as error:
            log.warning("where the guest is now was not announced to its networks: %s", error)

    async def made_whole(self) -> None:
        try:
            await super().made_whole()
        finally:
            await self._restore()

    async def _release(self) -> None:
        if self._feed is not None:
            self._feed.close()
        if not self._whole and not self._touched and self._library is not None and self._is_alive():
            try:
                await self._stop_guarding(self._library)
            except PostcopyError as error:
                log.error("%s waits at its memory, and cannot be used: end it (%s)", self._name, error)
        await super()._release()

    async def _stop_guarding(self, library: Preload) -> bool:
        """It was told nothing, and has touched nothing: it can be used again. Whether it was guarded."""
        guard = self._guard
        if guard is None:
            try:
                left = await library.take()
            except MigrationError:
                return False
            guard = Userfaultfd.adopt(left.uffd.detach(), int(left.features))
        with guard:
            for backend in self._seen.backends:
                guard.unregister(backend.address, backend.size_bytes)
        await library.disarm()
        return True


def _check_fits(seen: Look, offered: Config, layout: Sequence[BlockLayout], qmp: str) -> None:
    """What is different would fail in the pause, or after it."""
    here = seen.config
    if same_host_and_file(here, offered):
        raise ConfigurationError(
            f"the QEMU at {qmp} has its memory in the same file as the one that is to be moved here: give each a"
            " mem-path of its own"
        )
    if _version(here.version) < _version(offered.version):
        raise ConfigurationError(
            f"the source's QEMU is of version {offered.version}, the one here of {here.version}: QEMU loads no state of"
            " a newer version than its own; use at least the same here"
        )
    for what, option, there, mine_is in (
        ("machine type", "-machine", offered.machine, here.machine),
        ("CPU", "-cpu", offered.cpu, here.cpu),
        ("accelerator", "-accel", offered.accelerator, here.accelerator),
        ("number of vCPUs", "-smp", str(offered.vcpus), str(here.vcpus)),
    ):
        if there != mine_is:
            raise ConfigurationError(
                f"the source's QEMU has {what} {_shown(there)}, the one here {_shown(mine_is)}: start it with the same"
                f" {option}"
            )
    wanted = {block.name: block for block in layout}
    found = {backend.name: backend for backend in seen.backends}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found or name not in wanted:
            which = "the source's QEMU" if name in wanted else "the one here"
            raise ConfigurationError(
                f"only {which} has the memory backend {_shown(name)}: start the one here with the same -object and"
                " -device options, also for what was plugged in meanwhile"
            )
        block, backend = wanted[name], found[name]
        if (block.size_bytes, block.page_bytes) != (backend.size_bytes, backend.page_bytes):
            raise ConfigurationError(
                f"memory backend {_shown(name)} has {_size(block)} at the source, and {_size(backend)} here: start the"
                " one here with the same size=, and a mem-path= of the same kind"
            )


def _shown(text: str) -> str:
    return repr(text[:80])


def _size(block: BlockLayout | Backend) -> str:
    return f"{format_size(block.size_bytes)} in pages of {format_size(block.page_bytes)}"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _mapping_of(backend: Backend, mappings: Sequence[Mapped], library: Preload) -> Mapped:
    for mapping in mappings:
        if (mapping.device, mapping.inode) == (backend.identity.device, backend.identity.inode) and (
            mapping.address,
            mapping.size_bytes,
        ) == (backend.address, backend.size_bytes):
            return mapping
    raise ResourceError(
        f"{library} does not know memory backend {backend.name}", "start that QEMU with `postcopy run -- COMMAND`"
    )


class _Feed:
    """The end of a pipe out of which QEMU loads its state. Until `close`, or `end`."""

    def __init__(self, holder: FdHolder) -> None:
        self._fd = holder
        self._unwritten = bytearray()

    @classmethod
    def open(cls) -> tuple[_Feed, FdHolder]:
        """Ours, and QEMU's end."""
        theirs, ours = open_pipe()
        os.set_blocking(ours.fd, False)
        return cls(ours), theirs

    def add(self, piece: bytes) -> None:
        """What the pipe cannot hold waits for `end`, or the next piece."""
        self._unwritten += piece
        self._write()

    def _write(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._unwritten:
                try:
                    written = os.write(self._fd.fileno(), self._unwritten)
                except BrokenPipeError:  # QEMU says itself why it reads no more
                    written = len(self._unwritten)
                del self._unwritten[:written]

    @property
    def is_empty(self) -> bool:
        """Whether all was written."""
        return not self._unwritten

    async def end(self) -> None:
        """Writes what waits; nothing comes after it."""
        self._write()
        while self._unwritten:
            await trio.lowlevel.wait_writable(self._fd.fileno())
            self._write()
        self.close()

    def close(self) -> None:
        self._fd.close()
