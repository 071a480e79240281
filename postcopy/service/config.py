# SPDX-License-Identifier: Apache-2.0
"""What `postcopy source`, `dest` and `daemon` are asked to do, one record each, and how they are operated."""

from __future__ import annotations

import math
from dataclasses import dataclass

from postcopy.dataplane.ahead import NO_PREFETCH, Prefetch
from postcopy.machines.kinds import MachineOptions
from postcopy.migration.connection import HEARTBEAT_S
from postcopy.migration.source import SourceOptions
from postcopy.net import LOCAL, Address, Protection, Route


@dataclass(frozen=True)
class Origin:
    """A salvage, or what `merge` has made, that a machine is to be started from; see `salvage.examine`."""

    path: str
    reclaim: bool = False
    force: bool = False


@dataclass(frozen=True)
class ArrivalOptions:
    """How machines are received."""

    backing: str = "memfd"
    disk: str | None = None
    net: str | None = None  # tap:NAME or IFACE=TAP,...: where network devices are attached
    busy_poll_us: int = 0
    pager_process: bool = False  # the pager in a process of its own
    prefetch: Prefetch = NO_PREFETCH  # what is asked for before it is touched
    working_set: str | None = None  # path, of what is asked for first; for a daemon of a directory
    record_working_set: str | None = None  # the same, where to write what was waited for
    kill_when_lost: bool = False
    api_socket: str | None = None  # where a microVM is loaded: that of a Firecracker which was told nothing yet,
    firecracker: str | None = None  # or the binary, which is started
    drive: str | None = None  # ID=PATH,...
    allow: str | None = None  # PATTERN,...: what else it may use under the name that its source gives
    qmp: str | None = None  # where a QEMU's state is loaded: the monitor of one that waits for it,
    qemu: tuple[str, ...] | None = None  # or the command line with which one is started
    preload: str | None = None  # the preload library's socket of that QEMU, or of a program


@dataclass(frozen=True)
class SourceConfig:
    """One machine, and where it goes: either `listen` or `connect`."""

    kind: str  # of the machine; without meaning where `origin` is given
    machine: MachineOptions
    migration: SourceOptions
    origin: Origin | None = None
    listen: Address | None = None
    connect: Route | None = None
    migrate_after_s: float = 0.0
    serve: float = 1  # how many destinations; more than one for an image that listens
    keep: bool = True  # the machine goes on here when its migration has failed
    salvage_to: str | None = None
    protection: Protection = LOCAL


@dataclass(frozen=True)
class DestinationConfig:
    """One arrival, and what is done with the machine when all of it is here: either `listen` or `connect`."""

    arrival: ArrivalOptions
    takes: str | None = None  # machines of this kind only
    listen: Address | None = None
    connect: Route | None = None
    heartbeat_s: float = HEARTBEAT_S
    recover_for_s: float = math.inf
    run_for_s: float | None = None  # None: until interrupted
    dump: str | None = None
    verify: bool = True
    salvage_to: str | None = None
    protection: Protection = LOCAL


@dataclass(frozen=True)
class DaemonConfig:
    """A process that owns any number of machines. `migration` is for both directions as far as it has a meaning."""

    migration: SourceOptions
    arrival: ArrivalOptions
    listen: Address | None = None
    kind: str | None = None  # of a machine to begin with, and its options and name
    machine: MachineOptions | None = None
    name: str | None = None
    max_machines_per_peer: int = 128  # that it has sent here, of MAX_MACHINES
    max_memory_per_peer_bytes: int | None = None  # of these
    side: str = "daemon"  # what it is called; `source --hold` is one that takes no machines
    protection: Protection = LOCAL


PLACED = ("none", "all", "working-set")
"""What a pager places without a look at faults."""


@dataclass(frozen=True)
class PagerConfig:
    """A process that serves the page faults of virtual machines: pages of `image`, of the files in `images`, or of the
    source at `connect`. None of them: of a program."""

    socket: str | None = None  # path; with `images` a directory of sockets. None: as the service manager gives them
    image: str | None = None
    images: str | None = None
    connect: Route | None = None
    prefetch: str | None = None  # one of `PLACED`, or a policy; None: working-set where there is one, else none
    working_set: str | None = None  # path; with `images` a directory
    record_working_set: str | None = None  # the same
    record_for_s: float = math.inf
    kill_when_lost: bool = False
    allow_uid: tuple[int, ...] = ()  # beside root and this process's user
    max_vms: int = 1000
    max_memory_bytes: int | None = None  # of all virtual machines together
    readers: int = 2
    busy_poll_us: int = 0
    recover_for_s: float = math.inf
    keeper: bool = True
    restart_burst: int = 5
    protection: Protection = LOCAL

    @property
    def policy(self) -> Prefetch:
        """What is asked of another host because of faults."""
        return NO_PREFETCH if self.prefetch is None or self.prefetch in PLACED else Prefetch.parse(self.prefetch)


@dataclass(frozen=True)
class OperatingOptions:
    """What is around a service that is operated."""

    control: str | None = None  # path of the socket
    metrics: str | None = None  # HOST:PORT
    metrics_file: str | None = None
