# SPDX-License-Identifier: Apache-2.0
"""A microVM that runs in a Firecracker of the user's, as a machine that can leave.

Firecracker is driven over its API and watched from outside: it is not changed, not restarted, and needs no other right
than the one that its user has over it.

**Memory** is read by another process, this one, while Firecracker knows nothing of it (`RemoteMemory`). What is there
is told by its page tables. Where a page fault handler still serves it, or it was restored from a memory file, the pages
that are absent are there: all pages count as present then, and one that is read is brought by that handler, or by the
kernel. A handler that does not bring it keeps the thread that reads waiting, as it does the guest.

**State.** Firecracker has no call that writes the state of a microVM alone. It writes the state file first and the
memory file then; so it is told a memory file that cannot be opened: it refuses, and the state file is complete. That
this is what has happened is checked: the refusal is about the memory file, the state file is new and ends in the CRC of
what is in it. This belongs to the pause, since Firecracker completes block requests and resets vsock connections in it,
in the guest's memory: what that has changed must be looked at after it.

**While it runs** (precopy) its memory can be sent where it was itself restored through a userfaultfd, by whoever: that
tells what is written (`WriteLog`).

**The end.** `close` lets go of it and ends nothing; when the microVM runs elsewhere, `destroy` kills what is left of it
here. A process that dies as the source, in the pause, leaves a paused microVM, which the user resumes if he knows that
it does not run elsewhere; one that dies in precopy leaves one that waits at its next write: the next source of it lifts
that.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import trio

from postcopy._blocking import run_sync
from postcopy._fd import FdHolder
from postcopy._native import ffi, lib
from postcopy.errors import ConfigurationError, MigrationError, PostcopyError, ResourceError
from postcopy.machines._peer import Process
from postcopy.machines.base import MachineState, RamBlock, TellEarly
from postcopy.machines.firecracker._process import (
    Exchange,
    find_regions,
    guest_areas,
    region_sizes,
    userfaultfd_of,
)
from postcopy.machines.firecracker.api import (
    REQUEST_TIMEOUT_S,
    Api,
    FirecrackerInDoubt,
    FirecrackerRefused,
    Refusal,
)
from postcopy.machines.firecracker.handshake import Region
from postcopy.machines.process import ProcessMachine
from postcopy.memory import DirtyLog, Extent, RemoteMemory, WriteLog
from postcopy.units import format_size

BLOCK_NAME = "memory"
MAX_STATE_BYTES = 8 << 20
"""A state has some 15 KB for each vCPU."""
OLDEST = (1, 5)
"""The first version that writes state and memory in this order."""
FIRST_WITH_REMOVE_EVENTS = (1, 11)
"""The first version whose balloon gives memory back in a way that its userfaultfd tells."""
_CRC_BYTES = 8

log = logging.getLogger(__name__)


class _Drive(msgspec.Struct):
    drive_id: str
    path_on_host: str | None = None
    is_read_only: bool | None = None
    socket: str | None = None


class _Net(msgspec.Struct):
    iface_id: str
    host_dev_name: str


class _Vsock(msgspec.Struct):
    uds_path: str


class _Machine(msgspec.Struct):
    vcpu_count: int
    mem_size_mib: int


class _Config(
    msgspec.Struct, rename={"machine": "machine-config", "nets": "network-interfaces", "hotplug": "memory-hotplug"}
):
    """Of what ``GET /vm/config`` answers."""

    machine: _Machine
    drives: list[_Drive] = []
    nets: list[_Net] = []
    vsock: _Vsock | None = None
    hotplug: dict[str, Any] | None = None


class FirecrackerMachine(ProcessMachine):
    """Made by `create`, at the source; `prepare` finds what it is. Where it arrives a subclass says where its memory is
    (`found`), and from then on it is the same."""

    kind = "firecracker"
    program = "Firecracker"

    def __init__(self, api_socket: str, block_bytes: int, page_bytes: int) -> None:
        """`block_bytes`, `page_bytes`: of its memory, or 0 where that is not known yet."""
        super().__init__()
        self._api = Api(api_socket)
        self._memory = RemoteMemory(block_bytes, page_bytes) if block_bytes else None
        self._uffd: FdHolder | None = None
        self._regions: tuple[Region, ...] = ()
        self._version = ""
        self._config: _Config | None = None
        self._exchange: Exchange | None = None
        self._log: WriteLog | None = None
        self._saved: bytes | None = None

    @classmethod
    def create(cls, api_socket: str) -> FirecrackerMachine:
        """The one whose API is at that path. Nothing is asked yet."""
        return cls(api_socket, 0, 0)

    # ---- finding it

    async def prepare(self) -> None:
        """Finds the process behind the API socket and what it runs. Changes nothing there. A `PostcopyError` says what
        it cannot be moved for."""
        process = await self._hold_process()
        state, self._version = await self._api.instance()
        _check_runs(state)
        number = version_of(self._version)
        if number < OLDEST:
            raise ConfigurationError(
                f"a Firecracker of version {self._version or 'unknown'} cannot be moved: that needs 1.5 or newer"
            )
        self._config = _checked_config(await self._api.get("/vm/config"))
        sizes = region_sizes(number, self._config.machine.mem_size_mib << 20)
        areas = await run_sync(guest_areas, process.pid)
        regions = find_regions(process.pid, sizes, areas)
        self._memory = RemoteMemory(sum(sizes), regions[0].page_bytes)
        self._memory.incomplete = any(area.absent for area in areas)
        self.found(regions, await run_sync(userfaultfd_of, process.pid, process.pidfd.fileno()))
        await run_sync(self._open_exchange)
        if any(area.protected for area in areas) and not self._memory.incomplete:
            # Nobody else is its source: one that was has died, and nobody answers who writes.
            log.warning("a source of this microVM has died and left its memory write-protected: that is lifted")
            await run_sync(lambda: self._open_log().close())
        self._state = MachineState.RUNNING

    async def _hold_process(self) -> Process:
        """The process behind the API socket, which is this object's until `close`. `BusyError` when another one has
        it."""
        process = await self._api.process()
        self._hold(process)
        return process

    def found(self, regions: Sequence[Region], uffd: FdHolder | None) -> None:
        """Where the memory is. `uffd`, its userfaultfd, is this object's from now on, also when this fails."""
        assert self._memory is not None
        assert self._pidfd is not None
        self._uffd = uffd
        extents = [Extent(region.address, region.offset, region.size_bytes) for region in regions]
        self._memory.found(self._pid, self._pidfd.fileno(), extents)
        self._regions = tuple(regions)

    def _open_exchange(self) -> Exchange:
        if self._exchange is None:
            self._exchange = Exchange.open(self._pid)
        return self._exchange

    # ---- what it is

    @property
    def blocks(self) -> Sequence[RamBlock]:
        """None before `prepare`."""
        return (RamBlock(BLOCK_NAME, self._memory, 0),) if self._memory is not None else ()

    def config(self) -> dict[str, Any]:
        assert self._config is not None
        config = self._config
        said: dict[str, Any] = {
            "regions": [region.size_bytes for region in self._regions],
            "vcpus": config.machine.vcpu_count,
            "version": self._version,
            "drives": {
                drive.drive_id: {"path": drive.path_on_host, "read-only": bool(drive.is_read_only)}
                for drive in config.drives
            },
            "nets": {net.iface_id: net.host_dev_name for net in config.nets},
        }
        if config.vsock is not None:
            said["vsock"] = config.vsock.uds_path
        return said

    @property
    def process(self) -> tuple[int, str] | None:
        return (self._pid, self._api.path) if self._pid else None

    # ---- running it

    def _runs(self) -> None:
        super()._runs()
        self._saved = None
        if self._log is not None:
            self._log.stopped = False

    async def resume(self) -> None:
        """Only what was paused here. `FirecrackerInDoubt` when it does not say whether it runs."""
        if self._state is not MachineState.PAUSED:
            await trio.lowlevel.checkpoint()
            return
        await self._set_running(REQUEST_TIMEOUT_S)
        self._runs()

    async def _set_running(self, timeout_s: float) -> None:
        try:
            await self._api.patch("/vm", {"state": "Resumed"}, timeout_s)
        except FirecrackerInDoubt:
            if not self._is_alive():
                raise MigrationError(f"{self._name} has ended") from None
            if (await self._api.instance(timeout_s))[0] != "Running":
                await self._api.patch("/vm", {"state": "Resumed"}, timeout_s)

    async def before_pause(self, early: TellEarly | None = None) -> None:
        """Asks Firecracker something, so that neither its code nor ours has to come into the processor's caches in the
        pause: that halves what the first request takes."""
        await run_sync(self._open_exchange)
        await self._api.get("/")

    async def pause(self, timeout_s: float = 10.0) -> None:
        """Pauses it, and takes its state. When that fails it is told to run again."""
        if self._state is MachineState.PAUSED:
            await trio.lowlevel.checkpoint()
            return
        with trio.CancelScope(shield=True):
            exchange = self._open_exchange()
            try:
                await self._api.patch("/vm", {"state": "Paused"}, timeout_s)
                self._paused_ns = time.monotonic_ns()
                self._saved = await self._take_state(exchange, timeout_s)
            except BaseException as error:
                await self._undo_pause(error, timeout_s)
                raise
            self._state = MachineState.PAUSED
            if self._log is not None:
                self._log.stopped = True
            self._tell()
        await trio.lowlevel.checkpoint_if_cancelled()

    async def _undo_pause(self, why: BaseException, timeout_s: float) -> None:
        if isinstance(why, FirecrackerRefused) and why.refusal is Refusal.NOT_STARTED:
            return
        try:
            await self._set_running(timeout_s)
        except PostcopyError as error:
            log.error(
                "the microVM could not be paused, and whether it runs is not known: %s; tell it to (PATCH /vm, state"
                " Resumed)",
                error,
            )

    async def _take_state(self, exchange: Exchange, timeout_s: float) -> bytes:
        name = exchange.new_name()
        request = {
            "snapshot_type": "Full",
            "snapshot_path": f"{exchange.path}/{name}",
            "mem_file_path": f"{exchange.path}/no-directory/memory",
        }
        try:
            await self._api.put("/snapshot/create", request, timeout_s)
        except FirecrackerRefused as error:
            if error.refusal is not Refusal.NO_MEMORY_FILE:
                raise MigrationError(f"the state of the microVM cannot be had: {error}") from error
        else:
            raise MigrationError("Firecracker has written memory to a file that cannot be there")
        try:
            state = exchange.take(name, MAX_STATE_BYTES)
        except OSError as error:
            raise MigrationError(f"the state that Firecracker has written cannot be read: {error.strerror}") from error
        if len(state) <= _CRC_BYTES or lib.pc_crc64(0, ffi.from_buffer("char[]", state), len(state)):
            raise MigrationError("the state that Firecracker has written is not complete")
        return state

    async def save_state(self) -> bytes:
        """What `pause` has taken."""
        await trio.lowlevel.checkpoint()
        if self._saved is None:
            raise MigrationError("a microVM has a state to be sent while it is paused")
        return self._saved

    async def load_state(self, state: bytes) -> None:
        raise MigrationError("this microVM runs already")

    # ---- what it writes

    def dirty_log(self) -> DirtyLog:
        assert self._memory is not None
        leave_it_out = "leave precopy out (--precopy off)"
        if self._uffd is None:
            raise ResourceError(
                "this microVM was not restored through a userfaultfd: what it writes cannot be seen from outside",
                leave_it_out,
            )
        if self._memory.incomplete:
            raise ResourceError(
                "the memory of this microVM is still served by a page fault handler, which alone is told what is"
                " written",
                leave_it_out,
            )
        if version_of(self._version) < FIRST_WITH_REMOVE_EVENTS:
            raise ResourceError(
                f"a Firecracker of version {self._version} does not tell what its balloon gives back (1.11 does)",
                leave_it_out,
            )
        return self._open_log()

    def _open_log(self) -> WriteLog:
        assert self._memory is not None
        assert self._uffd is not None
        self._log = WriteLog(self._memory, self._uffd.fileno())
        return self._log

    # ---- the end

    async def _release(self) -> None:
        if self._log is not None:
            await run_sync(self._log.close)
        if self._exchange is not None:
            await run_sync(self._exchange.close)
        if self._uffd is not None:
            self._uffd.close()
        if self._memory is not None:
            self._memory.drop()


def version_of(text: str) -> tuple[int, int]:
    """Major and minor; (0, 0) for what is no version."""
    found = re.match(r"v?([0-9]{1,9})\.([0-9]{1,9})(?![0-9])", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _check_runs(state: str) -> None:
    if state == "Running":
        return
    if state == "Paused":
        raise ConfigurationError(
            "the microVM is paused; resume it first (PATCH /vm, state Resumed), if you know that it does not run"
            " elsewhere: one that was moved, and whose source has died, is left paused"
        )
    raise ConfigurationError(f"there is no microVM that runs in that Firecracker: it is {state[:40]!r}")


def _checked_config(said: object) -> _Config:
    try:
        config = msgspec.convert(said, _Config)
    except msgspec.ValidationError as error:
        raise MigrationError(f"what Firecracker says of the microVM makes no sense: {str(error)[:200]}") from error
    if not 0 < config.machine.mem_size_mib < 1 << 24:
        raise MigrationError(f"Firecracker says that the microVM has {config.machine.mem_size_mib} MiB of memory")
    if config.hotplug is not None:
        raise ConfigurationError(
            f"the microVM has memory that is plugged while it runs ({format_size(config.machine.mem_size_mib << 20)} at"
            " boot): that cannot be moved"
        )
    if any(drive.socket is not None for drive in config.drives):
        raise ConfigurationError("the microVM has a vhost-user drive: Firecracker makes no snapshot of it")
    return config
