# SPDX-License-Identifier: Apache-2.0
"""What `postcopy.testbed.qemu` promises to other tests: its guests find what is wrong, and say so."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from postcopy.errors import MigrationError, ResourceError
from postcopy.testbed.qemu import MonitorClosed, Qemu, QmpError, _process, linux

GUEST = "pages=1024 spread=1 disk=512"
ZEROS = bytes(4096)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, 16 << 20)
    return path


def overwrite(path: Path, wanted: Callable[[bool], bool]) -> None:
    """Those pages of a file of which this is true, asked by whether they have any content."""
    with path.open("r+b", buffering=0) as file:
        content = file.read()
        for at in range(0, len(content), 4096):
            if wanted(content[at : at + 4096] != ZEROS):
                os.pwrite(file.fileno(), b"\x55" * 4096, at)


@pytest.mark.needs("qemu")
def test_the_guest_goes_on_in_another_qemu_with_its_memory_and_disk(disk: Path) -> None:
    with (
        Qemu.start(64, GUEST, disk=disk, balloon=True) as source,
        Qemu.start(64, GUEST, disk=disk, balloon=True, incoming=True) as dest,
    ):
        assert source.wait_ready().values["pages"] == 1024
        source.wait_line("pages from the disk", lambda line: line.values.get("loaded", 0) > 256)
        source.inflate(2)
        source.wait_line("balloon", lambda line: line.values.get("ballooned") == 512)
        source.inflate(0)
        source.wait_line("no balloon", lambda line: line.values.get("ballooned") == 0, after=len(source.lines()))
        source.capabilities("events", "x-ignore-shared", "pause-before-switchover")
        dest.capabilities("events", "x-ignore-shared")
        ends = socket.socketpair()
        for qemu, end in zip((source, dest), ends, strict=True):
            with end:
                qemu.execute("getfd", fdname="state", fd=end.fileno())
        dest.execute("migrate-incoming", uri="fd:state")
        source.execute("migrate", uri="fd:state")
        source.wait_event("MIGRATION", "pre-switchover")
        dest.ram_paths[0].write_bytes(source.ram_paths[0].read_bytes())
        source.execute("migrate-continue", state="pre-switchover")
        dest.wait_event("MIGRATION", "completed")
        assert (source.status(), dest.status()) == ("postmigrate", "paused")
        with pytest.raises(QmpError, match="lock"):
            source.execute("cont")  # the disk is the other one's now
        dest.execute("cont")
        before = source.passes()[-1].values
        after = dest.wait_passes(10)[-1].values
        assert after["pass"] >= before["pass"] + 10
        assert after["loaded"] > before["loaded"]
        assert (after["errors"], after["stale"]) == (0, 0)
        assert not [line for line in dest.lines() if line.kind != "pass"]


@pytest.mark.needs("qemu")
def test_the_guest_says_what_is_wrong(disk: Path) -> None:
    with Qemu.start(64, GUEST, disk=disk, balloon=True) as qemu:
        qemu.wait_line("pages on the disk", lambda line: line.values.get("saved", 0) >= 1024)
        # Where the balloon has taken pages away, something is when they come back: that is not theirs, nor zero.
        qemu.inflate(2)
        qemu.wait_line("balloon", lambda line: line.values.get("ballooned") == 512)
        qemu.execute("stop")
        overwrite(qemu.ram_paths[0], lambda content: not content)
        qemu.execute("cont")
        qemu.inflate(0)
        found = qemu.wait_line("no balloon", lambda line: line.values.get("ballooned") == 0, after=len(qemu.passes()))
        assert (found.values["stale"], found.values["errors"]) == (512, 0)
        # The disk gives what it was never given. (Pages are loaded before anything looks at them.)
        qemu.execute("stop")
        overwrite(disk, bool)
        qemu.execute("cont")
        qemu.wait_line("errors", lambda line: line.values.get("errors", 0) > 0)
        assert {line.kind for line in qemu.lines()} == {"ready", "pass", "stale"}  # the first 8 of all are told


@pytest.mark.needs("qemu")
@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_memory_in_several_objects(machine: str) -> None:
    """The guest is the same on each machine; a page that is not as it was shows."""
    backend = "memory-backend-file,share=on"
    with Qemu.start(64, "pages=1024 spread=1", machine=machine, backends=[backend, backend]) as qemu:
        assert qemu.wait_passes(3)[-1].values["errors"] == 0
        qemu.execute("stop")
        overwrite(qemu.ram_paths[1], bool)
        qemu.execute("cont")
        qemu.wait_line("errors", lambda line: line.values.get("errors", 0) > 0)


@pytest.mark.needs("qemu")
def test_what_cannot_be_started_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MigrationError, match="no-such-option"):
        Qemu.start(64, arguments=["-no-such-option"])
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ResourceError, match=r"cannot be started: .*qemu-system"):
        Qemu.start(64)
    monkeypatch.setattr(_process, "guest_path", no_guest)
    before = open_files()
    with pytest.raises(ResourceError, match="no guest here"):
        Qemu.start(64)
    assert open_files() == before


def no_guest() -> str:
    raise ResourceError("no guest here")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.needs("qemu")
def test_one_that_has_ended_is_an_error_to_all_who_ask() -> None:
    with Qemu.start(64, "pages=1024") as qemu:
        qemu.wait_ready()
        qemu.kill()
        for ask in (qemu.status, lambda: qemu.wait_event("STOP")):
            with pytest.raises(MonitorClosed):
                ask()
        with pytest.raises(MigrationError, match="has ended"):
            qemu.wait_passes(1000)


START = """
import sys
from postcopy.testbed.qemu import Qemu
qemu = Qemu.start(64, "pages=1024")
print(qemu.pid, qemu.directory, flush=True)
sys.stdin.read()
"""


@pytest.mark.needs("qemu")
def test_it_dies_with_the_process_that_has_started_it() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        try:
            pid, directory = parent.stdout.readline().split()
            pidfd = os.pidfd_open(int(pid))
        finally:
            parent.kill()
    with open(pidfd, "rb", buffering=0):
        deadline = time.monotonic() + 30
        while runs(int(pid)):
            assert time.monotonic() < deadline
            time.sleep(0.005)
    # Its memory goes when another one is started.
    with Qemu.start(64, "pages=1024") as qemu:
        assert not Path(directory).exists()
        with Qemu.start(64, "pages=1024"):
            assert qemu.ram_paths


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.needs("linux-guest")
def test_linux_works_and_answers(disk: Path) -> None:
    guest = linux.build()
    words = "work=2 disk=512 churn=1"
    with Qemu.start(linux.MEMORY_MIB, machine="pc", disk=disk, balloon=True, **guest.boot(words)) as qemu:
        assert qemu.wait_ready().values["pages"] == 512
        assert qemu.shell("uname -r").strip() == guest.version
        with pytest.raises(MigrationError, match="exit status 3"):
            qemu.shell("exit 3")
        first = qemu.ask("status").values
        qemu.wait_line("pages from the disk", lambda line: line.values.get("loaded", 0) > 0)
        second = qemu.ask("check").values
        assert (second["errors"], second["stale"]) == (0, 0)
        assert second["passes"] > first["passes"]
        third = qemu.ask("status").values
        assert third["nonce"] == first["nonce"]
        assert third["clock_ns"] > first["clock_ns"]
        qemu.execute("stop")
        overwrite(disk, bool)
        qemu.execute("cont")
        qemu.wait_line("errors", lambda line: line.values.get("errors", 0) > 0)
        qemu.process.send_signal(signal.SIGTERM)
        assert qemu.process.wait(30) == 0


def test_without_debians_tools_there_is_no_linux_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    (linux.cache() / ".fetch-killed").mkdir(parents=True)
    with pytest.raises(ResourceError, match="Debian's packages"):
        linux.build()
    assert {path.name for path in linux.cache().iterdir()} == {"lock"}


def test_installations_share_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another one boots from is not taken away from it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    packages = linux.cache() / "packages"
    (packages / "modules").mkdir(parents=True)
    for name in ("vmlinuz", "busybox", "version"):
        (packages / name).write_text(name)
    theirs = Path(linux.build().initrd)
    (packages / "busybox").write_text("another one")
    assert Path(linux.build().initrd) != theirs
    assert theirs.exists()
    os.utime(theirs, (0, 0))
    linux.build()
    assert not theirs.exists()
