# SPDX-License-Identifier: Apache-2.0
"""`postcopy pager` behind a real Firecracker. The guest checks every page itself, and counts in each; its counters are
in its own memory, so a page from the past shows too."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from postcopy.testbed.firecracker import Firecracker, GuestLine, find, serving_engine

pytestmark = pytest.mark.needs("firecracker")

KILLS = int(os.environ.get("POSTCOPY_KILLS", "8"))
TOUCHES = 150
"""Pages that a guest touches for the first time meanwhile."""


@dataclass(frozen=True)
class Snapshot:
    """Of a guest that has written all of its pages once, and waits for orders."""

    state: Path
    memory: Path

    def restore(self, path: Path, **options: Any) -> Firecracker:
        """A microVM whose memory comes from the handler there; paused."""
        vm = Firecracker.start(**options)
        try:
            vm.load(self.state, uffd=path)
        except BaseException:
            vm.close()
            raise
        return vm


def take_snapshot(directory: Path, memory_mib: int, arguments: str) -> Snapshot:
    snapshot = Snapshot(directory / "vm.state", directory / "vm.mem")
    with Firecracker.start() as vm:
        vm.boot(memory_mib, f"wait=1 {arguments}", balloon=True, track_dirty=True)
        vm.wait_ready()
        assert vm.order("w").values["errors"] == 0
        vm.pause()
        vm.snapshot(snapshot.state, snapshot.memory, "Diff")  # of all that was written: the rest is a hole
    return snapshot


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    return take_snapshot(tmp_path, 64, "pages=2048 spread=1")


@pytest.fixture
def pager(side: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """``pager(*arguments)``: one that listens at `tmp_path`/vm.sock. Ended in order: engines outlive a kill."""
    started = []

    def start(*arguments: object, socket: Path = tmp_path / "vm.sock", **keywords: Any) -> Any:
        one = side("pager", "--json", "--socket", socket, *arguments, **keywords)
        started.append(one)
        one.wait_for("socket", lambda line: line["event"] == "listening")
        return one

    yield start
    for one in started:
        one.signal(signal.SIGTERM)  # harmless when it has ended
        one.end()


def right(line: GuestLine) -> GuestLine:
    assert (line.values["errors"], line.values["stale"]) == (0, 0), line
    return line


def order(vm: Firecracker, byte: str) -> GuestLine:
    """One pass of a guest that is paused: one that waits for orders asks for them all the time."""
    vm.resume()
    line = right(vm.order(byte))
    vm.pause()
    return line


def figures(pager: Any, vm: Firecracker) -> Any:
    """What was counted, of one that has ended."""
    ended = pager.wait_for(
        "end of a microVM", lambda line: line["event"] == "vm-ended" and line["figures"]["pid"] == vm.pid
    )
    return ended["figures"]


def test_microvms_that_share_an_image(pager: Callable[..., Any], snapshot: Snapshot, tmp_path: Path) -> None:
    """Each has its own memory: one writes, gives pages to the balloon and has them back, and dies; the other does not
    notice."""
    serves = pager("--image", snapshot.memory)
    with snapshot.restore(tmp_path / "vm.sock") as first, snapshot.restore(tmp_path / "vm.sock") as second:
        assert order(first, "w").values["touched"] == 2 * 2048
        first.inflate(4)  # half of its pages
        assert order(first, "w").values["ballooned"] == 1024
        second.inflate(4)  # pages that had never come
        assert order(second, "r").values["ballooned"] == 1024
        for vm in (first, second):
            vm.inflate(0)
            assert order(vm, "w").values["ballooned"] == 0
        first.kill()
        counted = figures(serves, first)
        assert counted["removes"] > 0
        assert counted["removed-pages"] >= 1024
        assert counted["fault-latency-us"]["count"] == counted["demand-pages"] >= 2048
        order(second, "r")
    assert figures(serves, second)["status"] == "ended"


def test_memory_above_the_hole(pager: Callable[..., Any], tmp_path: Path) -> None:
    """Two regions, the second one mapped right below the first."""
    snapshot = take_snapshot(tmp_path, 3584, "pages=512 spread=1")
    serves = pager("--image", snapshot.memory)
    with snapshot.restore(tmp_path / "vm.sock") as vm:
        order(vm, "w")
    assert figures(serves, vm)["memory"] == 3584 << 20


def test_working_set(pager: Callable[..., Any], snapshot: Snapshot, tmp_path: Path) -> None:
    """What one run has touched is there before the next one asks."""
    working_set = tmp_path / "vm.ws"
    counted = []
    for option in ("--record-working-set", "--working-set"):
        serves = pager("--image", snapshot.memory, option, working_set)
        with snapshot.restore(tmp_path / "vm.sock") as vm:
            if option == "--working-set":
                serves.wait_for("the set", lambda line: any(
                    (one.get("working-set") or {}).get("set-pages", 0) >= 2048 for one in line.get("vms", [])
                ))  # fmt: skip
            order(vm, "r")
        counted.append(figures(serves, vm))
        serves.signal(signal.SIGTERM)
        serves.end()
    assert counted[0]["faults"] >= 2048
    assert counted[1]["faults"] <= 0.03 * counted[0]["faults"]
    assert counted[1]["working-set"]["hit-rate"] >= 0.97


@pytest.mark.needs("netns")
def test_image_of_another_host_over_a_cable_that_is_cut(
    pager: Callable[..., Any], side: Callable[..., Any], snapshot: Snapshot, tmp_path: Path
) -> None:
    """The connection is lost several times a second. The balloon goes on meanwhile."""
    image = side("source", "--machine", "image", "--image", snapshot.memory, "--listen", "127.0.0.1:0", "--json")
    cable = side("chaos", "cut", "--json", "--seed", "7", "--listen", "127.0.0.1:0", "--to", image.address)
    serves = pager("--connect", cable.address)
    with snapshot.restore(tmp_path / "vm.sock") as vm:
        order(vm, "w")
        vm.inflate(2)
        assert order(vm, "w").values["ballooned"] == 512
        vm.inflate(0)
        assert order(vm, "w").values["ballooned"] == 0
        deadline = time.monotonic() + 60
        while not vm_of(serves, vm).get("recoveries-of-source"):
            assert time.monotonic() < deadline
            order(vm, "r")


def vm_of(serves: Any, vm: Firecracker) -> Any:
    """What was said last about it."""
    said = [one for line in serves.events("progress") for one in line["vms"] if one["pid"] == vm.pid]
    return said[-1] if said else {}


def resident_pages(vm: Firecracker) -> int:
    return int(Path(f"/proc/{vm.pid}/statm").read_text().split()[1])


@pytest.mark.timeout(300)
def test_engine_killed_again_and_again(pager: Callable[..., Any], tmp_path: Path) -> None:
    """While four guests touch missing pages, each kill at another instant of a pass. (POSTCOPY_KILLS=100: so many; each
    takes the start of an engine, some seconds on a busy host.)"""
    snapshot = take_snapshot(tmp_path, 64, f"touches={TOUCHES}")
    serves = pager("--image", snapshot.memory, "--restart-burst", 1000)
    with ExitStack() as stack:
        vms = [stack.enter_context(snapshot.restore(tmp_path / "vm.sock")) for _ in range(4)]
        for kill in range(KILLS):
            engine = serving_engine(serves.pid)
            watched = vms[kill % len(vms)]
            before = resident_pages(watched)
            for vm in vms:
                vm.send("w")
                vm.resume()
            deadline = time.monotonic() + 60
            while resident_pages(watched) < before + kill * 37 % (TOUCHES - 30):
                assert time.monotonic() < deadline, watched.said()
            os.kill(engine, signal.SIGKILL)
            for vm in vms:
                right(vm.wait_pass(kill + 1))
                vm.pause()
        assert {vm.passes()[-1].values["touched"] for vm in vms} == {TOUCHES * (KILLS + 1)}
    assert [figures(serves, vm)["engine-deaths"] for vm in vms] == [KILLS] * len(vms)


AS_NOBODY = (
    "unshare", "--mount", "sh", "-c",
    'for name in kvm userfaultfd; do mount --bind "$0/$name" /dev/$name || exit; done; exec setpriv --reuid=65534'
    ' --regid=65534 --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs "$@"',
)  # fmt: skip


@pytest.mark.needs("root")
def test_ordinary_user_with_two_devices(
    readable_package: list[str], pager: Callable[..., Any], snapshot: Snapshot
) -> None:
    """Neither Firecracker nor the pager has any right but to read and write /dev/kvm and /dev/userfaultfd."""
    with tempfile.TemporaryDirectory(prefix="postcopy-nobody-") as name:
        here = Path(name)
        here.chmod(0o777)
        for device in ("kvm", "userfaultfd"):
            os.mknod(here / device, 0o600 | stat.S_IFCHR, os.stat(f"/dev/{device}").st_rdev)
            (here / device).chmod(0o666)
        prefix = [*AS_NOBODY, name]
        binary = shutil.copy(find(), here / "firecracker")
        theirs = Snapshot(here / "vm.state", here / "vm.mem")
        for mine, copy in ((snapshot.state, theirs.state), (snapshot.memory, theirs.memory)):
            shutil.copy(mine, copy)
            copy.chmod(0o644)
        command = [*prefix, *readable_package, "-m", "postcopy"]
        serves = pager("--image", theirs.memory, socket=here / "vm.sock", command=command)
        with theirs.restore(here / "vm.sock", directory=here / "vm", binary=str(binary), prefix=prefix) as vm:
            status = Path(f"/proc/{vm.pid}/status").read_text()
            assert re.search(r"^Uid:\t65534\t65534.*^CapEff:\t0+$.*^CapBnd:\t0+$", status, re.MULTILINE | re.DOTALL)
            order(vm, "w")
            engine = serving_engine(serves.pid)
            os.kill(engine, signal.SIGKILL)
            order(vm, "r")
        assert figures(serves, vm)["engine-deaths"] == 1
