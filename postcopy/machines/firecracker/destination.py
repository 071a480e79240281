# SPDX-License-Identifier: Apache-2.0
"""A microVM that arrives: loaded into a Firecracker that was started and told nothing yet, or into one that we start.

| step | what is done |
|---|---|
| `prepare` | it is found, or started; what its state will name must be here; a socket listens for its page faults |
| `load_and_map` | ``PUT /snapshot/load``: it hands over its userfaultfd, and touches a page before it answers |
| | what it has opened for that is looked at |
| `resume` | ``PATCH /vm`` Resumed |
| `made_whole` | its memory is complete and not registered any more: Firecracker runs on without us |

What it needs as files, the state and the socket, is in a directory of our own until it has loaded, inside its root
directory: a jailed one sees no other.

Resource handling: as for any `ArrivingProcess`.

**Trust.** Firecracker opens what the state names, as its user, and offer and state both come from a peer. So it must be
what this side has named (`--drive`, `--net`) or allows (`--allow`), and the process is asked for that when it has
loaded (`opened`). In a jail it may be whatever is there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import msgspec
import trio
from msgspec import Meta

from postcopy._blocking import run_sync
from postcopy._fd import FdHolder
from postcopy._files import absolute
from postcopy.errors import ConfigurationError, MigrationError, PostcopyError, ProtocolError, ResourceError
from postcopy.machines._peer import Process
from postcopy.machines.base import Adopt, BlockLayout, Extent, MachineState
from postcopy.machines.firecracker._process import Exchange
from postcopy.machines.firecracker.api import (
    Api,
    FirecrackerInDoubt,
    FirecrackerRefused,
    FirecrackerUnreachable,
    Refusal,
)
from postcopy.machines.firecracker.handshake import Handshake, peer_credentials, receive_handshake
from postcopy.machines.firecracker.opened import TAP, allows, check_opened, descriptors
from postcopy.machines.firecracker.source import BLOCK_NAME, FirecrackerMachine, version_of
from postcopy.machines.firecracker.state import with_disks
from postcopy.machines.process import ArrivingProcess, Started
from postcopy.memory import check_memory
from postcopy.units import did_you_mean, format_size

START_S = 10.0
"""How long one that we start may take to answer."""
LOAD_S = 10.0
"""How long it may take to load the state; it takes some 10 ms."""
STATE, SOCKET, API = "state", "memory.sock", "api.sock"
PAGE_SIZES = {4096: "anon", 2 << 20: "hugetlb"}
MAX_REGIONS = 32
NOTHING_LOADED = (Refusal.ALREADY_STARTED, Refusal.CONFIGURED)
"""Refusals of a load after which Firecracker is as it was: it may have a microVM of somebody else."""

# The state's format by Firecracker's version: a state of any other format is not loaded, be it older or newer.
_FORMATS = dict(zip([(1, minor) for minor in range(7, 17)], [1, 2, 3, 3, 5, 6, 8, 8, 9, 10], strict=True))

log = logging.getLogger(__name__)

_Path = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"\A[^\x00-\x1f]+\Z")]
_Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"\A[!-.0-~]+\Z")]


class _Drive(msgspec.Struct, rename="kebab"):
    path: _Path
    read_only: bool


class Config(msgspec.Struct):
    """What an offer says of a microVM (`FirecrackerMachine.config`). What is not known is ignored."""

    regions: Annotated[list[Annotated[int, Meta(ge=4096, le=1 << 44)]], Meta(min_length=1, max_length=MAX_REGIONS)]
    version: Annotated[str, Meta(max_length=64, pattern=r"\A[0-9]+\.[0-9]+(\.[!-~]*)?\Z")]
    drives: Annotated[dict[_Name, _Drive], Meta(max_length=64)] = {}
    nets: Annotated[dict[_Name, _Name], Meta(max_length=64)] = {}
    vsock: _Path | None = None
    vcpus: Annotated[int, Meta(ge=0, le=1024)] = 0


@dataclass(frozen=True)
class FirecrackerHost:
    """What a microVM that comes finds on this host."""

    api_socket: str | None = None  # of a Firecracker that was told nothing yet
    binary: str | None = None  # started for each one that comes
    drives: Mapping[str, str] = field(default_factory=dict)  # path by drive's id, where it is another one here
    nets: Mapping[str, str] = field(default_factory=dict)  # TAP by interface's id
    allowed: Sequence[str] = ()  # patterns of what may be used under the name that it has at the source


class ArrivingFirecracker(ArrivingProcess, FirecrackerMachine):
    """Made by `for_destination`; once it is whole it can leave again, as any `FirecrackerMachine`."""

    lends = True

    def __init__(self, config: Config, page_bytes: int, host: FirecrackerHost) -> None:
        super().__init__(host.api_socket or "", sum(config.regions), page_bytes)
        self._offered = config
        self._host = host
        self._files: _Files | None = None
        self._process: Process | None = None
        self._connection: trio.socket.SocketType | None = None  # on which its memory came
        self._descriptors: Mapping[int, str] = {}  # of the process, before it loads
        # What it may open, as this process sees it, and whether to write there; None: whatever it sees.
        self._disks: list[tuple[str, bool]] | None = []

    @classmethod
    def for_destination(
        cls, config: Mapping[str, Any], layout: Sequence[BlockLayout], host: FirecrackerHost
    ) -> ArrivingFirecracker:
        """`ProtocolError` for an offer that makes no sense, `ConfigurationError` and `ResourceError` for one that
        cannot be taken here."""
        try:
            known = msgspec.convert(config, Config)
        except msgspec.ValidationError as error:
            raise ProtocolError(f"the offer of a Firecracker makes no sense: {str(error)[:200]}") from error
        if len(layout) != 1 or layout[0].name != BLOCK_NAME:
            raise ProtocolError(f"the offer of a Firecracker must have one block, {BLOCK_NAME!r}")
        (block,) = layout
        if (kind := PAGE_SIZES.get(block.page_bytes)) is None:
            raise ProtocolError(f"the offer of a Firecracker has pages of {block.page_bytes} bytes")
        if any(size % block.page_bytes for size in known.regions) or sum(known.regions) != block.size_bytes:
            raise ProtocolError("the offer of a Firecracker has regions that do not make up its memory")
        if (host.api_socket is None) is (host.binary is None):
            raise ConfigurationError(
                "this side has no Firecracker to load it into: say --api-socket PATH of one that was started and told"
                " nothing yet, or --firecracker BINARY to have it started"
            )
        _check_names("--drive", host.drives, known.drives)
        _check_names("--net", host.nets, known.nets)
        check_memory(kind, block.size_bytes)
        return cls(known, block.page_bytes, host)

    # ---- before anything is accepted

    async def prepare(self) -> None:
        if self._host.binary is not None:
            name, binary = f"--firecracker {self._host.binary}", absolute(self._host.binary)
            self._own = await Started.start(
                name, lambda directory: [binary, "--level", "Warning", "--api-sock", f"{directory}/{API}"]
            )
            self._api = Api(self._own.path(API))
            await self._own.until_it_answers(name, self._answers, START_S)
        process = self._process = await self._hold_process()
        state, version = await self._api.instance()
        if state != "Not started":
            raise ConfigurationError(
                f"the Firecracker at {self._api.path} is {state[:40]}: a state can be loaded only into one"
                " that was told nothing yet; start a new one there"
            )
        self._check_version(version)
        self._files = await run_sync(_Files.make, process)
        try:
            await run_sync(self._check_devices, process)
        except OSError as error:  # it has ended
            raise MigrationError(f"{self._name} cannot be looked at: {error.strerror}") from error

    async def _answers(self) -> bool:
        with contextlib.suppress(FirecrackerUnreachable):
            await self._api.get("/")
            return True
        return False

    def _check_version(self, here: str) -> None:
        there = self._offered.version
        self._version = here or there
        if not _loads(version_of(here), version_of(there)):
            raise ConfigurationError(
                f"the source's Firecracker is of version {there}, the one here of {here or 'an unknown one'}, which"
                f" does not load its state; use {there} here"
            )
        if self._other_taps and version_of(here) < (1, 12):
            raise ConfigurationError(
                f"--net: Firecracker {here} cannot be given other TAPs than at the source; that is possible from 1.12"
                " on"
            )

    def _check_devices(self, process: Process) -> None:
        """What the state names must be there, since a load that fails in the pause costs the pause; and it must be
        allowed."""
        jailed = _another_root(process.pid)
        root = f"/proc/{process.pid}/root" if jailed else ""

        def seen(path: str) -> str:  # by Firecracker, whose current directory is not ours
            return root + path if os.path.isabs(path) else f"/proc/{process.pid}/cwd/{path}"

        def check_allowed(what: str, path: str, remedy: str) -> None:
            name = os.path.join(os.readlink(f"/proc/{process.pid}/cwd"), path)
            if os.path.normpath(path) != path:
                raise ConfigurationError(f"{what}: {path}: a path with detours, as `..`, is not used here")
            if not jailed and not allows(self._host.allowed, name):
                raise ConfigurationError(
                    f"{what}: {path} is what the source calls it, and this side has not said that it may be used: say"
                    f" {remedy}--allow {name}, or --allow {os.path.dirname(name).rstrip('/')}/ for all that is there"
                )

        for name, drive in self._offered.drives.items():
            path = self._path_here(name)
            if name not in self._host.drives:
                check_allowed(f"drive {name}", path, f"--drive {name}={path}, ")
            try:
                status = os.stat(seen(path))
            except OSError as error:
                raise ConfigurationError(
                    f"drive {name}: {path}: {error.strerror}; the disk must be on this host, under the same name or"
                    f" where --drive {name}=PATH says"
                ) from error
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
                raise ConfigurationError(f"drive {name}: {path} is neither a file nor a block device")
            if not root and not os.access(seen(path), os.R_OK if drive.read_only else os.R_OK | os.W_OK):
                raise ConfigurationError(f"drive {name}: {path}: this user may not use it; Firecracker must")
        for name, tap in self._taps().items():
            if name not in self._host.nets and _our_network(process.pid) and not allows(self._host.allowed, TAP + tap):
                raise ConfigurationError(
                    f"interface {name}: {tap} is the TAP device at the source, and this side has not said that it may"
                    f" be used: say --net {name}={tap}, or --allow {TAP}{tap}"
                )
            if not _has_tap(process.pid, tap):
                raise ConfigurationError(
                    f"interface {name}: there is no TAP device {tap!r} on this host; make it (ip tuntap add {tap} mode"
                    f" tap), or name another one with --net {name}=TAP"
                )
        if (vsock := self._offered.vsock) is not None:
            check_allowed("vsock", vsock, "")
            if os.path.lexists(seen(vsock)):
                raise ConfigurationError(
                    f"vsock: {vsock} exists on this host, and Firecracker would have to make it; remove it"
                )
            if not os.path.isdir(os.path.dirname(seen(vsock))):
                raise ConfigurationError(f"vsock: {vsock}: there is no such directory on this host; make it")
        drives = self._offered.drives.items()
        self._disks = None if jailed else [(seen(self._path_here(name)), not one.read_only) for name, one in drives]
        self._descriptors = descriptors(process.pid)

    def _taps(self) -> dict[str, str]:
        """By interface's id: where it is attached here."""
        return {**self._offered.nets, **self._host.nets}

    def _check_opened(self, files: _Files) -> None:
        """Before the guest can use any of it."""
        assert self._process is not None
        vsock = self._offered.vsock
        known = None if self._disks is None else [*self._disks, (files.state_seen, False)]
        sockets = [] if vsock is None else [vsock]
        try:
            check_opened(self._process.pid, self._descriptors, known, sockets, set(self._taps().values()))
        except OSError as error:
            raise MigrationError(f"what {self._name} has opened cannot be seen: {error.strerror}") from error

    def _path_here(self, drive: str) -> str:
        return self._host.drives.get(drive, self._offered.drives[drive].path)

    def config(self) -> dict[str, Any]:
        """What is true here: it may leave again."""
        here = msgspec.structs.replace(
            self._offered,
            version=self._version,
            drives={
                name: _Drive(self._path_here(name), drive.read_only) for name, drive in self._offered.drives.items()
            },
            nets=self._taps(),
        )
        return {name: value for name, value in msgspec.to_builtins(here).items() if value is not None}

    # ---- its state

    async def load_state(self, state: bytes) -> None:
        raise MigrationError("a microVM is loaded only where its userfaultfd is served (load_and_map)")

    async def load_and_map(self, state: bytes, adopt: Adopt) -> None:
        files, failures, answered = self._files, list[PostcopyError | OSError](), trio.Event()
        assert files is not None
        assert self._process is not None
        disks = {drive.path: self._path_here(name) for name, drive in self._offered.drives.items()}
        if moved := {old: new for old, new in disks.items() if old != new}:
            state = with_disks(state, moved)
        files.write_state(state)
        self._touched = True
        with trio.move_on_after(LOAD_S) as deadline:
            async with trio.open_nursery() as nursery:

                async def step(function: Callable[[], Awaitable[None]]) -> None:
                    try:
                        await function()
                    except (PostcopyError, OSError) as error:  # of the system: no descriptor is left
                        failures.append(error)
                        nursery.cancel_scope.cancel()

                async def load() -> None:
                    try:
                        await self._api.put("/snapshot/load", self._load_request(files), LOAD_S)
                    except FirecrackerRefused as error:
                        self._touched = error.refusal not in NOTHING_LOADED
                        raise
                    answered.set()

                nursery.start_soon(step, load)
                nursery.start_soon(step, partial(self._take_memory, files, adopt))
        if failures:
            raise MigrationError(f"{failures[0]}; {self._what_is_left()}") from failures[0]
        if deadline.cancelled_caught:
            why = "it has not asked for its memory" if answered.is_set() else "a page that it needs has not come"
            raise MigrationError(
                f"Firecracker has not loaded the state within {LOAD_S:g} s: {why}; {self._what_is_left()}"
            )
        await run_sync(self._check_opened, files)
        files.remove()
        self._state = MachineState.PAUSED

    def _what_is_left(self) -> str:
        return "start a new one here for another attempt" if self._own is None else "it is ended"

    def _load_request(self, files: _Files) -> dict[str, object]:
        request: dict[str, object] = {
            "snapshot_path": files.state_path,
            "mem_backend": {"backend_type": "Uffd", "backend_path": files.socket_path},
            "resume_vm": False,
        }
        if other := self._other_taps:
            request["network_overrides"] = [{"iface_id": name, "host_dev_name": tap} for name, tap in other.items()]
        return request

    @property
    def _other_taps(self) -> dict[str, str]:
        return {name: tap for name, tap in self._host.nets.items() if self._offered.nets[name] != tap}

    async def _take_memory(self, files: _Files, adopt: Adopt) -> None:
        """The handshake that comes in the middle of the load."""
        process = self._process
        assert process is not None
        while True:
            connection, _ = await files.listener.accept()
            if peer_credentials(connection).pid == process.pid:
                break
            connection.close()
        self._connection = connection  # its end is that of the process (from 1.12 on)
        with await receive_handshake(connection, LOAD_S) as handshake:
            self._check_regions(handshake)
            self.found(handshake.regions, FdHolder.duplicate(handshake.uffd))
            extents = [
                Extent(0, region.offset // region.page_bytes, region.size_bytes // region.page_bytes, region.address)
                for region in handshake.regions
            ]
            await adopt(handshake.detach(), handshake.features, extents)

    def _check_regions(self, handshake: Handshake) -> None:
        expected, offset = [], 0
        for size in self._offered.regions:
            expected.append((offset, size, self.blocks[0].memory.page_bytes))
            offset += size
        found = [(region.offset, region.size_bytes, region.page_bytes) for region in handshake.regions]
        if found != expected:
            raise ProtocolError(
                f"Firecracker has loaded memory of other regions than were offered: {_shown(found)}, not"
                f" {_shown(expected)} (size and pages)"
            )

    # ---- running

    UNANSWERED = (FirecrackerUnreachable, FirecrackerInDoubt)

    async def _tell_to_run(self, timeout_s: float) -> None:
        await self._api.patch("/vm", {"state": "Resumed"}, timeout_s)

    async def _is_running(self, timeout_s: float) -> bool | None:
        state, _ = await self._api.instance(timeout_s)
        return {"Running": True, "Paused": False}.get(state)

    async def _release(self) -> None:
        if self._files is not None:
            self._files.remove()
        if self._connection is not None:
            self._connection.close()
        await super()._release()


class _Files:
    """What Firecracker is told to open: the state, and the socket on which it asks for its memory. Until `remove`."""

    def __init__(self, exchange: Exchange, listener: socket.socket, owner: tuple[int, int]) -> None:
        self._exchange = exchange
        self._owner = owner
        self.listener = trio.socket.from_stdlib_socket(listener)
        self.state_path = f"{exchange.path}/{STATE}"  # as Firecracker sees it,
        self.state_seen = exchange.inside(STATE)  # and as this process does
        self.socket_path = f"{exchange.path}/{SOCKET}"

    @classmethod
    def make(cls, process: Process) -> _Files:
        exchange = Exchange.open(process.pid)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        owner = (process.uid, process.gid) if os.geteuid() == 0 else (-1, -1)
        try:
            path = exchange.inside(SOCKET)
            listener.bind(path)
            os.chown(path, *owner, follow_symlinks=False)  # in a directory of another user, who may replace it
            listener.listen(4)
        except OSError as error:
            listener.close()
            exchange.close()
            raise ResourceError(f"a socket for Firecracker (process {process.pid}): {error.strerror}") from error
        return cls(exchange, listener, owner)

    def write_state(self, state: bytes) -> None:
        """Of some 20 KB: it stays in memory until it is removed."""
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(self._exchange.inside(STATE), flags, 0o600), "wb") as file:
                os.fchown(file.fileno(), *self._owner)
                file.write(state)
        except OSError as error:
            raise ResourceError(f"the state for Firecracker cannot be written: {error.strerror}") from error

    def remove(self) -> None:
        """Twice does no harm."""
        if self.listener.fileno() >= 0:
            self.listener.close()
            for name in (STATE, SOCKET):
                with contextlib.suppress(OSError):
                    os.unlink(self._exchange.inside(name))
            self._exchange.close()


def _another_root(pid: int) -> bool:
    try:
        return not os.path.samefile(f"/proc/{pid}/root", "/")
    except OSError:
        return False


def _has_tap(pid: int, name: str) -> bool:
    """In the network namespace of that process. What its devices are can be seen only in that of this one."""
    with contextlib.suppress(OSError):
        if _our_network(pid):
            return os.path.exists(f"/sys/class/net/{name}/tun_flags")
        with open(f"/proc/{pid}/net/dev") as file:
            return any(line.partition(":")[0].strip() == name for line in file)
    return False


def _our_network(pid: int) -> bool:
    """Where a process has a network namespace of its own, what is there was put there for it."""
    return os.path.samefile(f"/proc/{pid}/ns/net", "/proc/self/ns/net")


def _loads(here: tuple[int, int], there: tuple[int, int]) -> bool:
    """Whether a Firecracker of one version loads a state of the other one, as far as that is known before it tries."""
    formats = _FORMATS.get(here), _FORMATS.get(there)
    return here >= there if None in formats else formats[0] == formats[1]


def _check_names(option: str, given: Mapping[str, str], known: Mapping[str, object]) -> None:
    for name in given:
        if name not in known:
            has = f"it has {', '.join(sorted(known))}" if known else "it has none"
            raise ConfigurationError(
                f"{option} {name}=...: the microVM has no {name!r}; {has}{did_you_mean(name, known)}"
            )


def _shown(regions: Sequence[tuple[int, int, int]]) -> str:
    return ", ".join(f"{format_size(size)} of {format_size(page)}" for _, size, page in regions)
