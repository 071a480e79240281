# SPDX-License-Identifier: Apache-2.0
"""The kinds of machines that can be migrated, and how one is made on either side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from postcopy.errors import ConfigurationError, ProtocolError
from postcopy.machines.base import BlockLayout, Machine
from postcopy.machines.image import ImageMachine, ImageOptions
from postcopy.machines.toy.machine import KVM, RV64, Engine, ToyMachine, ToyOptions
from postcopy.memory import MemoryKind
from postcopy.memory._admission import PROMISES

BACKINGS = (MemoryKind.MEMFD.value, MemoryKind.ANON.value, MemoryKind.HUGETLB.value)


@dataclass(frozen=True)
class MachineOptions:
    """What a user may say about a machine at the source; None is "not said". A kind refuses what it has no use for."""

    memory_bytes: int | None = None
    vcpus: int | None = None
    workload: str | None = None
    backing: str | None = None
    used_memory_bytes: int | None = None
    seed: int | None = None
    disk: str | None = None  # path of the backing file
    disk_bytes: int | None = None
    image: str | None = None  # path
    net: str | None = None  # tap:NAME
    net_mac: int | None = None
    net_address: int | None = None  # IPv4
    api_socket: str | None = None  # path
    qmp: str | None = None  # path
    preload: str | None = None  # path


@dataclass(frozen=True)
class HostOptions:
    """What a machine that comes finds on this host; None is "not said". A kind ignores what it has no use for."""

    backing: str = "memfd"
    disk: str | None = None
    net: str | None = None  # tap:NAME, or for firecracker IFACE=TAP,...
    api_socket: str | None = None  # firecracker: path, of one that was told nothing yet
    firecracker: str | None = None  # path of the binary, which is started for each machine
    drive: str | None = None  # firecracker: ID=PATH,...
    allow: str | None = None  # firecracker: PATTERN,...: what may be used under the name that it has at the source
    qmp: str | None = None  # qemu: path of the monitor of one that waits for a machine
    qemu: tuple[str, ...] | None = None  # qemu: the command line with which one is started for each machine
    preload: str | None = None  # qemu, program: path of the preload library's socket
    name: str = ""  # of the machine, for what is started for it


@dataclass(frozen=True)
class FirecrackerOptions:
    api_socket: str = ""


@dataclass(frozen=True)
class QemuOptions:
    qmp: str = ""
    preload: str | None = None


@dataclass(frozen=True)
class ProgramOptions:
    preload: str = ""


def _image_from_file(options: ImageOptions) -> Machine:
    if not options.image:
        raise ConfigurationError("--machine image needs --image FILE")
    return ImageMachine.from_file(options.image)


def _firecracker_source(options: FirecrackerOptions) -> Machine:
    from postcopy.machines.firecracker.source import FirecrackerMachine  # with what only it needs

    if not options.api_socket:
        raise ConfigurationError("--machine firecracker needs --api-socket PATH")
    return FirecrackerMachine.create(options.api_socket)


def _firecracker_destination(config: Mapping[str, Any], layout: Sequence[BlockLayout], host: HostOptions) -> Machine:
    from postcopy.machines.firecracker.destination import ArrivingFirecracker, FirecrackerHost
    from postcopy.machines.firecracker.opened import parse_allowed

    drives, nets = parse_pairs(host.drive or "", "--drive ID=PATH"), parse_pairs(host.net or "", "--net IFACE=TAP")
    return ArrivingFirecracker.for_destination(
        config,
        layout,
        FirecrackerHost(host.api_socket, host.firecracker, drives, nets, parse_allowed(host.allow or "")),
    )


def _qemu_source(options: QemuOptions) -> Machine:
    from postcopy.machines.qemu.source import QemuMachine

    if not options.qmp:
        raise ConfigurationError("--machine qemu needs --qmp PATH")
    return QemuMachine.create(options.qmp, options.preload)


def _qemu_destination(config: Mapping[str, Any], layout: Sequence[BlockLayout], host: HostOptions) -> Machine:
    from postcopy.machines.qemu.destination import ArrivingQemu, QemuHost

    return ArrivingQemu.for_destination(config, layout, QemuHost(host.qmp, host.qemu, host.preload, host.name))


def _program_source(options: ProgramOptions) -> Machine:
    from postcopy.machines.program import ProgramMachine

    if not options.preload:
        raise ConfigurationError("--machine program needs --preload PATH")
    return ProgramMachine.create(options.preload)


def _program_destination(config: Mapping[str, Any], layout: Sequence[BlockLayout], host: HostOptions) -> Machine:
    from postcopy.machines.program import ArrivingProgram

    if not host.preload:
        raise ConfigurationError(
            "this side has no program to take the memory: say --preload PATH, the socket of one that was started with"
            " postcopy run --lazy"
        )
    return ArrivingProgram.for_destination(config, layout, host.preload)


@dataclass(frozen=True)
class _Kind:
    live: bool
    options: type[Any]  # a dataclass: what may be said about such a machine
    source: Callable[[Any], Machine]
    destination: Callable[[Mapping[str, Any], Sequence[BlockLayout], HostOptions], Machine]


def _toy(engine: Engine) -> _Kind:
    def destination(config: Mapping[str, Any], layout: Sequence[BlockLayout], host: HostOptions) -> Machine:
        return ToyMachine.for_destination(engine, config, layout, host.backing, host.disk, host.net)

    return _Kind(ToyMachine.live, ToyOptions, partial(ToyMachine.create, engine), destination)


def _image_destination(config: Mapping[str, Any], layout: Sequence[BlockLayout], host: HostOptions) -> Machine:
    return ImageMachine.for_destination(config, layout, host.backing)


_KINDS = {
    "kvm": _toy(KVM),
    "rv64": _toy(RV64),
    "image": _Kind(ImageMachine.live, ImageOptions, _image_from_file, _image_destination),
    "firecracker": _Kind(True, FirecrackerOptions, _firecracker_source, _firecracker_destination),
    "qemu": _Kind(True, QemuOptions, _qemu_source, _qemu_destination),
    "program": _Kind(True, ProgramOptions, _program_source, _program_destination),
}

KINDS = tuple(_KINDS)


def is_live(kind: str) -> bool:
    """Whether machines of this kind run (`Machine.live`). One that is not known is refused where it is made."""
    return kind not in _KINDS or _KINDS[kind].live


def create_source(kind: str, options: MachineOptions) -> Machine:
    """A machine as it is before it is booted. Takes milliseconds. `ConfigurationError` for options that make no sense,
    `ResourceError` for what the host lacks, or has promised to other machines of this process."""
    if kind not in _KINDS:
        raise ConfigurationError(f"unknown kind of machine {kind!r}; there are {', '.join(KINDS)}")
    given = {name: value for name, value in vars(options).items() if value is not None}
    known = {field.name for field in fields(_KINDS[kind].options)}
    for name in given:
        if name not in known:
            flag = "--" + name.removesuffix("_bytes").replace("_", "-")
            raise ConfigurationError(f"{flag} has no meaning for --machine {kind}")
    return _promised(_KINDS[kind].source(_KINDS[kind].options(**given)))


def create_destination(
    kind: str,
    config: Mapping[str, Any],
    block_layout: Sequence[BlockLayout],
    host: HostOptions | None = None,
) -> Machine:
    """The twin of the machine that a source offers, its memory empty. `host`: this side's own choices, and where on
    this host is what the machine needs.

    Takes milliseconds. What the peer says is checked: `ProtocolError` for an offer that makes no sense, `ResourceError`
    and `ConfigurationError` for one that cannot be taken here. Its memory is this machine's from now on until it is
    closed: nothing else that is made here counts on it.
    """
    if kind not in _KINDS:
        raise ProtocolError(f"the source offers an unknown kind of machine {kind[:40]!r}")
    return _promised(_KINDS[kind].destination(config, block_layout, host or HostOptions()))


def parse_pairs(text: str, what: str) -> dict[str, str]:
    """``ID=VALUE``, several with commas between them; `what` it is, to a person. `ConfigurationError` for anything
    else."""
    pairs: dict[str, str] = {}
    for part in text.split(",") if text else ():
        name, _, value = part.partition("=")
        if not name or not value or name in pairs or not part.isprintable():
            raise ConfigurationError(f"{part[:80]!r}: write {what}, several with commas between them, each once")
        pairs[name] = value
    return pairs


def _promised(machine: Machine) -> Machine:
    # In the same step as the check, without a checkpoint between them.
    PROMISES.add(block.memory for block in machine.blocks)
    return machine
