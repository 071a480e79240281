# SPDX-License-Identifier: Apache-2.0
"""A source that lies about a microVM: its state has a real Firecracker open what the offer does not name. It is found
out before the guest runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from postcopy._native import ffi, lib
from postcopy.errors import MigrationError
from postcopy.machines import BlockLayout, Extent, MachineState
from postcopy.machines.kinds import HostOptions, create_destination
from postcopy.testbed.firecracker import Firecracker, find

pytestmark = [pytest.mark.needs("firecracker", "root", "tun")]

MIB = 64
PAGE = 4096
TAP_NAME = f"pc-t{os.getpid()}"

in_thread = trio.to_thread.run_sync


@contextlib.contextmanager
def tap(name: str) -> Iterator[str]:
    """That nobody has open."""

    def set_persistent(value: int) -> None:
        fd = os.open("/dev/net/tun", os.O_RDWR)
        try:
            fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))  # TUNSETIFF: tap, no_pi
            fcntl.ioctl(fd, 0x400454CB, value)  # TUNSETPERSIST
        finally:
            os.close(fd)

    set_persistent(1)
    try:
        yield name
    finally:
        set_persistent(0)


@pytest.fixture(scope="module")
def microvm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bytes, bytes]]:
    """The directory of its disk and its socket, its state and its memory."""
    directory = tmp_path_factory.mktemp("microvm")
    disk, vsock = directory / "secret.img", directory / "v.sock"
    disk.write_bytes(bytes(1 << 20))
    with tap(TAP_NAME):
        with Firecracker.start() as vm:
            vm.api("PUT", "/vsock", {"guest_cid": 3, "uds_path": str(vsock)})
            vm.api("PUT", "/network-interfaces/eth0", {"iface_id": "eth0", "host_dev_name": TAP_NAME})
            vm.boot(MIB, "wait=1 pages=256", drives={"data": str(disk)})
            vm.wait_ready()
            vm.pause()
            vm.snapshot(directory / "state", directory / "memory")
        vsock.unlink()
        yield directory, (directory / "state").read_bytes(), (directory / "memory").read_bytes()


OFFER: dict[str, Any] = {"regions": [MIB << 20], "version": "1.12.1", "vcpus": 1}


@pytest.mark.parametrize(
    ("left_out", "found"),
    [
        ("", ""),
        ("drives", r"open .*/secret\.img for writing, which its offer"),
        ("writable", r"open .*/secret\.img for writing, which its offer"),
        ("nets", "TAP device"),
        ("vsock", r"v\.sock"),
    ],
)
async def test_what_the_state_names(
    microvm: tuple[Path, bytes, bytes], left_out: str, found: str, tmp_path: Path
) -> None:
    directory, state, memory = microvm
    offer = OFFER | {
        "drives": {"data": {"path": str(directory / "secret.img"), "read-only": left_out == "writable"}},
        "nets": {"eth0": TAP_NAME},
        "vsock": str(directory / "v.sock"),
    }
    offer.pop(left_out, None)  # (a drive can be offered read-only, which is writable by the state)
    host = HostOptions(firecracker=find(), allow=f"{directory}/,tap:pc-t*")
    machine = create_destination("firecracker", offer, [BlockLayout("memory", MIB << 20, PAGE)], host)

    async def serve(uffd: int, features: int, extents: Sequence[Extent]) -> None:
        content, done = ffi.from_buffer("char[]", memory), ffi.new("uint64_t *")
        for extent in extents:
            copy = partial(lib.pc_uffd_copy, uffd, extent.address, content, extent.pages * PAGE, 0, done)
            assert await in_thread(copy) == 0
        os.close(uffd)

    try:
        with trio.fail_after(60):
            await machine.prepare()
            if found:
                with pytest.raises(MigrationError, match=found):
                    await machine.load_and_map(state, serve)
                assert machine.statistics().state is not MachineState.PAUSED
            else:
                await machine.load_and_map(state, serve)
                assert machine.statistics().state is MachineState.PAUSED
    finally:
        await machine.destroy()
        (directory / "v.sock").unlink(missing_ok=True)
