# SPDX-License-Identifier: Apache-2.0
"""What tests do with two machines, in place of a migration."""

from __future__ import annotations

import tempfile

import msgpack

from postcopy.machines import Machine
from postcopy.machines.kinds import HostOptions, create_destination
from postcopy.machines.toy.machine import ToyMachine


def twin_of(machine: Machine, backing: str = "memfd") -> ToyMachine:
    """What a destination makes of the machine's offer, its memory empty."""
    config = msgpack.unpackb(msgpack.packb(machine.config()))
    disk = config.get("disk")  # by name: a destination takes no file that only the source names
    twin = create_destination(machine.kind, config, machine.layout, HostOptions(backing, disk))
    assert isinstance(twin, ToyMachine)
    return twin


def copy_memory(source: Machine, destination: Machine) -> None:
    with tempfile.TemporaryFile() as file:
        for here, there in zip(source.blocks, destination.blocks, strict=True):
            here.memory.dump(file.fileno())
            there.memory.load(file.fileno())
            assert here.memory.digest() == there.memory.digest()
