# SPDX-License-Identifier: Apache-2.0
"""A machine that moves between two containers of one image, and what they may do; `make test-containers` runs it."""

from __future__ import annotations

from typing import Any

import pytest

FILES = ["compose.yaml", "compose.nodevice.yaml"]
both = pytest.mark.parametrize("stage", FILES, indirect=True)
no_device = pytest.mark.parametrize("stage", ["compose.nodevice.yaml"], indirect=True)

# The last value counts: what the files say would make each of these tests take long.
QUICK_SOURCE = ("--memory", "32MiB", "--used-memory", "16MiB", "--migrate-after", "0.2", "--heartbeat", "0.2")
QUICK_DEST = ("--heartbeat", "0.2")
# It lasts until `push`: the guest asks for a part of its memory, as it is in a phase. (A limit of the push promises no
# time: one that reads at random has asked for all that it uses within a second. An rv64 guest is still through all of
# its phases in 5 s.)
HELD = (
    "--memory", "128MiB", "--used-memory", "96MiB", "--vcpus", "1", "--workload", "phases", "--push-after", "forever",
)  # fmt: skip
# Where nothing is to be lost: a container that gets no processor for 0.6 s must not be given up before the switchover.
PATIENT = ("--heartbeat", "5")


def begin(stage: Any, *source: str, dest: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """Source and destination, the latter listening already."""
    destination = stage.start("dest", *QUICK_DEST, *dest)
    assert destination.address
    return stage.start("source", *QUICK_SOURCE, *source), destination


def assert_moved(stage: Any, source: Any, dest: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both have completed; the machine is the same one, computes on, and all of its memory is right."""
    status, sent, errors = source.end()
    assert status == 0, errors
    # Only then the destination is ended: a guest says what it has done in batches, after a time that nobody promises.
    dest.operations_after(sent)
    dest.wait_status("completed")
    stage.terminate("dest")
    status, received, errors = dest.end()
    assert status == 0, errors
    assert received["status"] == "completed"
    assert received["verified"] is True
    assert received["ram"]["remaining"] == 0
    assert sent["guest"]["nonce"] == received["guest"]["nonce"]
    return sent, received


def push(stage: Any) -> None:
    """What was held, from now on, where its guest has not asked for all of it meanwhile."""
    command = ("postcopy", "ctl", "--control", "/dev/shm/control.sock", "set", "--push-after", "0")
    stage.exec("source", *command, check=False)


def status_of_first_process(stage: Any, service: str) -> dict[str, str]:
    looked = stage.exec(service, "cat", "/proc/1/status")
    return dict(line.split(":\t", 1) for line in looked.splitlines() if ":\t" in line)


@both
def test_migrates(stage: Any) -> None:
    # Not all at once: a guest that gets no processor meanwhile would ask for nothing.
    source, dest = begin(stage, *PATIENT, "--max-bandwidth", "16MiB/s", dest=PATIENT)
    _, received = assert_moved(stage, source, dest)
    assert received["kind"] == ("kvm" if stage.file == "compose.yaml" else "rv64")
    assert received["ram"]["demand-pages"] > 0


@both
def test_observer_sees_both_sides(stage: Any) -> None:
    """From a third container, over the network alone."""
    dest = stage.start("dest", *QUICK_DEST, *PATIENT)
    assert dest.address
    observer = stage.start("observer")
    source = stage.start("source", *QUICK_SOURCE, *PATIENT, *HELD, "--migrate-after", "2")
    for side in ("source", "dest"):
        observer.wait_for(side, lambda line, side=side: line["of"] == side and line["event"] == "up")
    source.wait_status("postcopy-active")
    for side in ("source", "dest"):
        observer.wait_for(side, lambda line, side=side: (line["of"], line.get("status")) == (side, "postcopy-active"))
    push(stage)
    assert_moved(stage, source, dest)
    status, _, errors = observer.end()
    assert status == 0, errors
    assert {line["of"] for line in observer.lines if line["event"] == "gone"} == {"source", "dest"}


@both
def test_holds_no_rights(stage: Any) -> None:
    """Seen from inside, in the process that migrates."""
    dest = stage.start("dest")
    assert dest.address
    status = status_of_first_process(stage, "dest")
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["Uid"].split() == status["Gid"].split() == ["65010"] * 4
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"  # a filter
    assert status["Groups"].split() == ["65010", *(["65011"] if stage.file == "compose.yaml" else [])]
    stage.terminate("dest")
    dest.end()


@both
def test_root_is_read_only(stage: Any) -> None:
    for path in ("/x", "/usr/x", "/tmp/x", "/opt/postcopy/x"):
        tried = stage.run("dest", "python", "-c", f"open({path!r}, 'w')")
        assert tried.returncode == 1
        assert "Read-only file system" in tried.stderr or "Permission denied" in tried.stderr
    mounts = stage.run("dest", "cat", "/proc/mounts").stdout.splitlines()
    root = next(line.split() for line in mounts if line.split()[1] == "/")
    assert "ro" in root[3].split(",")


@both
def test_probe_says_what_the_container_may_do(stage: Any) -> None:
    has, lacks = {
        "compose.yaml": ("uffd,kvm,kernel-faults,memfd-missing,holes", "uffd-user-only"),
        "compose.nodevice.yaml": ("uffd-user-only,memfd-missing,holes", "uffd"),
    }[stage.file]
    probed = stage.run("dest", "postcopy", "probe", "--require", has)
    assert probed.returncode == 0, probed.stderr
    probed = stage.run("dest", "postcopy", "probe", "--require", lacks)
    assert probed.returncode == 1
    assert probed.stderr.startswith(f"postcopy: error: {lacks}: ")
    assert "docker run" in probed.stderr  # the remedy
    assert "Traceback" not in stage.run("dest", "postcopy", "probe").stderr


@no_device
def test_without_the_profile_nothing_can_be_received(stage: Any) -> None:
    """Docker's own profile refuses userfaultfd(2): ours is needed."""
    dest = stage.start("dest", *QUICK_DEST, seccomp=False)
    assert dest.address
    source = stage.start("source", *QUICK_SOURCE, seccomp=False)
    dest.wait_for_errors("waiting for the next one")
    stage.terminate("dest")
    status, _, errors = dest.end()
    assert status == 1
    assert "userfaultfd" in errors
    assert source.end()[0] == 1


@no_device
def test_the_profile_lets_no_other_userfaultfd_through(stage: Any) -> None:
    """Only the one that stops faults of user code: the filter answers any other call itself."""
    code = (
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
        "for flags in (0, 0o2000000, 1): print(libc.syscall(323, flags) >= 0, ctypes.get_errno())"
    )
    root = stage.run("dest", "python", "-c", code)
    assert root.stdout.splitlines() == ["False 1", "False 1", "True 1"]


@pytest.mark.parametrize("stage", ["compose.yaml"], indirect=True)
def test_root_becomes_a_user_inside(stage: Any) -> None:
    """Where the devices are root's: two capabilities for the start, and none when the first byte comes."""
    options = ("--user", "0:0", "--cap-add", "SETUID", "--cap-add", "SETGID")
    dest = stage.start("dest", *QUICK_DEST, *PATIENT, "--user", "postcopy", options=options)
    assert dest.address
    status = status_of_first_process(stage, "dest")
    assert status["Uid"].split() == status["Gid"].split() == ["65010"] * 4
    assert status["Groups"].split() == ["65010"]
    assert [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0] * 4
    source = stage.start("source", *QUICK_SOURCE, *PATIENT, "--user", "postcopy", options=options)
    assert_moved(stage, source, dest)


def test_destination_killed_before_commit(stage: Any) -> None:
    """The machine computes on at the source."""
    source, _dest = begin(stage, "--migrate-after", "600", "--recover-for", "0s")
    source.wait_status("active")
    stage.kill("dest")
    failed = source.wait_for("failure", lambda line: line["event"] == "migration-ended")
    assert "destination" in failed["error"]
    progress = source.wait_for(
        "running",
        lambda line: (
            line["event"] == "progress"
            and line["elapsed-ms"] >= failed["elapsed-ms"]
            and line["guest"]["state"] == "running"
        ),
    )
    source.operations_after(progress)
    stage.terminate("source")
    status, result, _ = source.end()
    assert status == 1
    assert result["status"] == "failed"
    assert result["guest"]["failures"] == 0


def test_source_killed_after_commit(stage: Any) -> None:
    """The destination keeps the machine, and says that its source is lost."""
    source, dest = begin(stage, *HELD)
    source.wait_status("postcopy-active")
    dest.wait_status("postcopy-active")
    stage.kill("source")
    paused = dest.wait_status("postcopy-paused")
    assert paused["ram"]["remaining"] > 0
    dest.abandon(send=lambda: stage.terminate("dest"))  # the client ends at its third signal
    status, result, errors = dest.end()
    assert status == 1
    assert result["status"] == "postcopy-paused"
    assert "PAUSED" in errors


@pytest.mark.parametrize("victim", ["source", "dest"])
def test_disconnected_and_connected_again(stage: Any, victim: str) -> None:
    """Both sides say that they are paused, and finish when the cable is back."""
    source, dest = begin(stage, *HELD)
    source.wait_status("postcopy-active")
    dest.wait_status("postcopy-active")
    address = stage.address_of(victim)
    stage.disconnect(victim)
    source.wait_status("postcopy-paused")
    dest.wait_status("postcopy-paused")
    stage.connect(victim, address)
    push(stage)
    _, received = assert_moved(stage, source, dest)
    assert received["recoveries"]["count"] >= 1
