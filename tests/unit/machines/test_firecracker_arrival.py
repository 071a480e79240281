# SPDX-License-Identifier: Apache-2.0
"""A microVM that arrives, by a Firecracker that is none: what an offer may say, what must be there before it is
accepted, and how a load and a resume may go wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from fake_firecracker import STATE, FakeFirecracker, Orders, _crc64, fake_firecracker

from postcopy._native import ffi, lib
from postcopy.errors import ConfigurationError, MigrationError, PostcopyError, ProtocolError, ResourceError
from postcopy.machines import BlockLayout, Extent, MachineState, process
from postcopy.machines.firecracker import destination
from postcopy.machines.firecracker.api import Api
from postcopy.machines.firecracker.destination import ArrivingFirecracker, FirecrackerHost
from postcopy.machines.firecracker.opened import allows, check_opened, parse_allowed
from postcopy.machines.firecracker.state import with_disks
from postcopy.machines.kinds import HostOptions, create_destination, parse_pairs
from postcopy.memory import _admission
from postcopy.memory._admission import PROMISES, Room

MIB = 1 << 20
OFFER: dict[str, Any] = {"regions": [8 * MIB], "version": "1.12.1", "vcpus": 1, "drives": {}, "nets": {}}
LAYOUT = [BlockLayout("memory", 8 * MIB, 4096)]
EMPTY = Orders(state="Not started")


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeFirecracker]:
    with fake_firecracker(tmp_path, EMPTY) as one:
        yield one


def arriving(
    fake: FakeFirecracker | None, offer: dict[str, Any] = OFFER, drive: str = "", net: str = "", allow: str = ""
) -> ArrivingFirecracker:
    host = HostOptions(api_socket=str(fake.api_socket if fake is not None else "x"), drive=drive, net=net, allow=allow)
    machine = create_destination("firecracker", offer, LAYOUT, host)
    assert isinstance(machine, ArrivingFirecracker)
    return machine


async def adopt(uffd: int, features: int, extents: Sequence[Extent]) -> None:
    raise AssertionError("there was a userfaultfd")


@pytest.mark.parametrize(
    ("change", "layout"),
    [
        ({"regions": [4 * MIB]}, LAYOUT),
        ({"regions": [8 * MIB - 512, 512]}, LAYOUT),
        ({"regions": []}, LAYOUT),
        ({"regions": [-8 * MIB, 16 * MIB]}, LAYOUT),
        ({"regions": "all"}, LAYOUT),
        ({"version": "newest"}, LAYOUT),
        ({"version": None}, LAYOUT),
        ({"drives": {"root": {"path": "/a\0b", "read-only": False}}}, LAYOUT),
        ({"drives": {"root": "/a"}}, LAYOUT),
        ({"nets": {"eth0": "../tap"}}, LAYOUT),
        ({"vsock": ""}, LAYOUT),
        ({}, [BlockLayout("memory", 8 * MIB, 8192)]),
        ({}, [BlockLayout("other", 8 * MIB, 4096)]),
        ({}, LAYOUT * 2),
    ],
)
def test_offers_that_make_no_sense(change: dict[str, Any], layout: list[BlockLayout]) -> None:
    with pytest.raises(ProtocolError, match="offer of a Firecracker"):
        ArrivingFirecracker.for_destination(OFFER | change, layout, FirecrackerHost("x"))


def test_what_a_host_must_say() -> None:
    for host in (FirecrackerHost(), FirecrackerHost("socket", "binary")):
        with pytest.raises(ConfigurationError, match="--api-socket PATH"):
            ArrivingFirecracker.for_destination(OFFER, LAYOUT, host)
    with pytest.raises(ConfigurationError, match=r"--drive rot=.*it has root.*root"):
        arriving(None, OFFER | {"drives": {"root": {"path": "/a", "read-only": False}}}, drive="rot=/b")
    assert parse_pairs("a=/x=y,b=/z", "") == {"a": "/x=y", "b": "/z"}
    for wrong in ("a", "=b", "a=", "a=b,a=c", "a=b,", "a=\n"):
        with pytest.raises(ConfigurationError, match="write ID"):
            parse_pairs(wrong, "ID=PATH")


def drive(path: str) -> dict[str, Any]:
    return {"drives": {"root": {"path": path, "read-only": True}}}


REFUSED: list[tuple[Orders, dict[str, Any], dict[str, str], str]] = [
    (replace(EMPTY, state="Running"), {}, {}, "Running: .*start a new one"),
    (replace(EMPTY, version="1.11.0"), {}, {}, "1.12.1.*1.11.0.*use 1.12.1 here"),
    (replace(EMPTY, version="1.13.1"), {}, {}, "1.12.1.*1.13.1.*use 1.12.1 here"),
    (replace(EMPTY, version="1.17.0"), {"version": "1.18.0"}, {}, "1.18.0.*1.17.0.*use 1.18.0 here"),
    (EMPTY, drive("/missing"), {"allow": "/*"}, "--drive root=PATH"),
    (EMPTY, drive("/a"), {"drive": "root=/proc"}, "/proc is neither"),
    (EMPTY, drive("/etc/passwd"), {}, "root: /etc/passwd is what.*--drive root=/etc/passwd, --allow /etc/passwd"),
    (EMPTY, drive("/srv/vms/../../etc/passwd"), {"allow": "/srv/vms/"}, "detours"),
    (EMPTY, drive("/srv/vms/no"), {"allow": "/srv/*"}, "--allow /srv/vms/no, or --allow /srv/vms/ for all"),
    (EMPTY, {"nets": {"eth0": "tap0"}}, {}, "--net eth0=tap0, or --allow tap:tap0"),
    (EMPTY, {"nets": {"eth0": "no-such-tap"}}, {"allow": "tap:no-*"}, "no TAP device 'no-such-tap'.*--net eth0=TAP"),
    (EMPTY, {"nets": {"eth0": "tap0"}}, {"net": "eth0=no-such-tap"}, "'no-such-tap'"),
    (EMPTY, {"vsock": "/run/v.sock"}, {"allow": "/run/v"}, "vsock: /run/v.sock is what.*say --allow /run/v.sock"),
    (EMPTY, {"vsock": "/proc/version"}, {"allow": "/proc/"}, "/proc/version exists.*remove it"),
    (EMPTY, {"vsock": "/missing/v.sock"}, {"allow": "/missing/"}, "no such directory.*make it"),
]


async def test_what_must_be_there_before_it_is_accepted(fake: FakeFirecracker) -> None:
    """And what it may use, which is said before it is looked for: a source learns nothing of other files. A Firecracker
    that was told nothing is left as it was."""
    for orders, change, options, why in REFUSED:
        fake.order(orders)
        machine = arriving(fake, OFFER | change, **options)
        with pytest.raises(ConfigurationError, match=why):
            await machine.prepare()
        await machine.close()
        assert fake.process.poll() is None
        assert fake.was_told() == []


async def test_one_that_ends_while_it_is_looked_at(fake: FakeFirecracker, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(pid: int) -> None:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    monkeypatch.setattr(destination, "descriptors", ended)
    machine = arriving(fake)
    with pytest.raises(MigrationError, match="cannot be looked at: No such process"):
        await machine.prepare()
    await machine.close()


@pytest.mark.parametrize(
    ("orders", "why"),
    [
        (replace(EMPTY, load="Load snapshot error: Cannot restore devices"), "Cannot restore devices.*start a new one"),
        (EMPTY, "has not asked for its memory|a page that it needs has not come"),  # the latter on a busy host
        (replace(EMPTY, load="dies"), "has closed the connection"),
        (replace(EMPTY, hangs=["PUT /snapshot/load"]), "has not"),
    ],
    ids=["refuses", "asks nobody", "dies", "hangs"],
)
async def test_a_load_that_fails(
    fake: FakeFirecracker, orders: Orders, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of it is killed: it may hold half a machine, and nobody else could use it."""
    monkeypatch.setattr(destination, "LOAD_S", 0.5 if why.startswith("has not") else 60.0)
    machine = arriving(fake)
    await machine.prepare()
    fake.order(orders)
    with pytest.raises(MigrationError, match=why):
        await machine.load_and_map(b"state", adopt)
    await machine.close()
    assert fake.process.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize(
    "text",
    [
        "The requested operation is not supported after starting the microVM.",
        "Loading a microVM snapshot not allowed after configuring boot-specific resources.",
    ],
)
async def test_one_that_has_another_machine_is_left_alone(fake: FakeFirecracker, text: str) -> None:
    """It was told nothing when it was looked at, and something since: it is not ours to kill."""
    machine = arriving(fake)
    await machine.prepare()
    fake.order(replace(EMPTY, load=text))
    with pytest.raises(MigrationError, match="not"):
        await machine.load_and_map(b"state", adopt)
    await machine.close()
    assert fake.process.poll() is None


async def test_relative_paths_are_those_of_firecracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It opens them in its own current directory."""
    (tmp_path / "disk").touch()
    (tmp_path / "elsewhere").mkdir()
    offer = OFFER | {"vsock": "v.sock", "drives": {"root": {"path": "disk", "read-only": False}}}
    monkeypatch.chdir(tmp_path)
    with fake_firecracker(tmp_path, EMPTY) as fake:
        monkeypatch.chdir(tmp_path / "elsewhere")
        async with arriving(fake, offer, allow=f"{tmp_path}/") as machine:
            await machine.prepare()
        (tmp_path / "v.sock").touch()
        async with arriving(fake, offer, allow=f"{tmp_path}/") as machine:
            with pytest.raises(ConfigurationError, match=r"v\.sock exists"):
                await machine.prepare()


@pytest.mark.needs("root")
async def test_the_owner_of_no_other_file_is_changed(
    fake: FakeFirecracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is the Firecracker's user's, who may put a link in place of the socket."""
    other = tmp_path / "other"
    other.touch()
    chown = os.chown

    def replaced(path: Any, *arguments: Any, **options: Any) -> None:
        if str(path).endswith(destination.SOCKET):
            os.unlink(path)
            os.symlink(other, path)
        chown(path, *arguments, **options)

    monkeypatch.setattr(os, "chown", replaced)
    process = await Api(fake.api_socket).process()
    destination._Files.make(replace(process, uid=65534, gid=65534)).remove()
    process.pidfd.close()
    assert other.stat().st_uid == 0


async def test_a_resume_that_is_not_answered_and_was_done(
    fake: FakeFirecracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RESUME_S", "ANSWER_S"):
        monkeypatch.setattr(process, name, 60.0)
    machine = arriving(fake)
    await machine.prepare()
    fake.order(replace(EMPTY, state="Running", drops=["PATCH Resumed"]))
    await machine.resume()
    assert machine.statistics().state is MachineState.RUNNING
    assert fake.was_told() == ["PATCH Resumed"]
    await machine.close()


async def test_a_resume_that_is_not_answered_and_was_not_done(
    fake: FakeFirecracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told again, for a time; from then on it counts as running, and is told until it does."""
    monkeypatch.setattr(process, "RESUME_S", 0.3)
    machine = arriving(fake)
    await machine.prepare()
    fake.order(replace(EMPTY, state="Paused", drops=["PATCH Resumed"]))
    await machine.resume()
    assert machine.statistics().state is MachineState.RUNNING
    told = len(fake.was_told())
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(machine.wait_changed)
            while len(fake.was_told()) <= told + 1:  # noqa: ASYNC110 -- another process
                await trio.sleep(0.01)
            fake.order(replace(EMPTY, state="Paused"))
            while (await machine._api.get("/"))["state"] != "Running":  # noqa: ASYNC110
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    await machine.close()


async def test_a_resume_of_one_that_has_ended(fake: FakeFirecracker) -> None:
    machine = arriving(fake)
    await machine.prepare()
    fake.process.kill()
    fake.process.wait()
    with pytest.raises(PostcopyError, match="ended"):
        await machine.resume()
    await machine.close()


@pytest.mark.parametrize(("here", "there"), [("1.10.1", "1.9.0"), ("1.13.0", "1.14.2"), ("1.18.0", "1.17.0")])
async def test_versions_whose_states_are_alike(fake: FakeFirecracker, here: str, there: str) -> None:
    fake.order(replace(EMPTY, version=here))
    machine = arriving(fake, OFFER | {"version": there})
    await machine.prepare()
    assert machine.config()["version"] == here
    await machine.close()


@pytest.mark.needs("root")
def test_taps_are_looked_for_where_firecracker_is() -> None:
    """Its jailer may have given it a network namespace of its own. (`lo` is in every one, and is no TAP.)"""
    assert not destination._has_tap(os.getpid(), "lo")
    with subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b".")
        process.stdin.flush()
        process.stdout.read(1)  # it is there
        assert destination._has_tap(process.pid, "lo")
        assert not destination._has_tap(process.pid, "tap0")
        process.stdin.close()
    assert not destination._has_tap(process.pid, "lo")


async def test_no_directory_for_one_that_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    machine = ArrivingFirecracker.for_destination(OFFER, LAYOUT, FirecrackerHost(binary="/bin/true"))
    with pytest.raises(ResourceError, match=r"--firecracker .*: a directory for it"):
        await machine.prepare()
    await machine.close()


def test_disks_are_moved_in_the_state() -> None:
    def with_crc(body: bytes) -> bytes:
        return body + _crc64(body).to_bytes(8, "little")

    def name(path: bytes) -> bytes:
        return len(path).to_bytes(8, "little") + path

    before = with_crc(STATE + name(b"/a") + b"and" + name(b"/disks/b") + b"end")
    after = with_disks(before, {"/a": "/a/much/longer/name", "/disks/b": "/a"})
    assert after == with_crc(STATE + name(b"/a/much/longer/name") + b"and" + name(b"/a") + b"end")
    assert lib.pc_crc64(0, ffi.from_buffer("char[]", after), len(after)) == 0
    with pytest.raises(ProtocolError, match="names the disk /c 0 times"):
        with_disks(before, {"/c": "/d"})
    with pytest.raises(ProtocolError, match="damaged"):
        with_disks(before[:-1] + b"x", {"/a": "/d"})


@pytest.mark.parametrize(
    ("mode", "named", "found"),
    [
        ("rb", [False], ""),
        ("rb", [True], ""),
        ("r+b", [True], ""),
        ("r+b", [False, True], ""),  # two drives of one file
        ("r+b", [False], r"open .*/disk for writing, which its offer does not name"),
        ("rb", [], r"open .*/disk, which its offer does not name"),
    ],
)
def test_what_is_open_and_how(mode: str, named: list[bool], found: str, tmp_path: Path) -> None:
    """A drive that was offered read-only is not opened for writing."""
    disk, null = tmp_path / "disk", subprocess.DEVNULL
    disk.write_bytes(b"")
    with disk.open(mode) as file, subprocess.Popen(["sleep", "60"], stdin=file, stdout=null, stderr=null) as process:
        try:
            files = [(str(disk), may_be_written) for may_be_written in named]
            with pytest.raises(MigrationError, match=found) if found else nullcontext():
                check_opened(process.pid, {}, files, [], [])
        finally:
            process.kill()


def test_patterns_of_what_may_be_used() -> None:
    patterns = parse_allowed("/srv/vms/,/dev/vg/vm*,/one.img,tap:vm*")
    for name in ("/srv/vms/a", "/srv/vms/a/b", "/dev/vg/vm1", "/dev/vg/vm", "/one.img", "tap:vm1"):
        assert allows(patterns, name), name
    for name in (
        *(
            "/srv/vms",
            "/srv/vmsa",
            "/srv/vms/../../etc/passwd",
            "/srv/vms/./a",
            "//srv/vms/a",
            "srv/vms/a",
            "/srv/vms//a",
        ),
        *("/dev/vg/vm/1", "/dev/vg/vm1/../../sda", "/one.img2", "/one_img", "a/one.img", "tap:a", "vm1", "/tap:vm1"),
    ):
        assert not allows(patterns, name), name
    assert not allows((), "/a")
    for wrong in ("a", "a,", "/a,,/b", "/a/../b", "//a", "/a\n", "tap:", "tap:a/b", "~/vms/", "/a/./"):
        with pytest.raises(ConfigurationError, match="absolute path"):
            parse_allowed(wrong)


async def test_memory_of_microvms_is_promised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything of it has come, and when nothing of it is here."""
    monkeypatch.setattr(PROMISES, "_promises", [])
    monkeypatch.setattr(_admission, "find_rooms", lambda: [Room("the control group", 40 * MIB, "or raise it")])
    async with arriving(None):
        with pytest.raises(ResourceError, match="promised to machines here"):
            arriving(None)
    await arriving(None).close()
