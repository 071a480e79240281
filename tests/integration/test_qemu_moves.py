# SPDX-License-Identifier: Apache-2.0
"""The guest of a real QEMU moves between processes of ours, and finds its memory and its disk as it left them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import qemu_faults
import trio
from lines import Json
from qemus import DEADLINE_S, SANDBOX, UNDER_RUN, UNNAMED_FILE, Host, check_went_on, is_whole, start

import sides
from postcopy.testbed.chaos import ChaosPlan, open_chaos_proxy
from postcopy.testbed.qemu import Qemu, command_line, lines_of, linux

pytestmark = pytest.mark.needs("qemu", "uffd")

GUEST = "pages=1024 spread=1 disk=64"
MEMORY_MIB = 64
# The disk is opened with cache=none: what the guest reads goes by O_DIRECT into pages that have not arrived.
MACHINE: dict[str, Any] = {"machine": "microvm", "balloon": True, "backends": (UNNAMED_FILE,)}
NOBODY = 65534
AS_NOBODY = (
    "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all",
    "--no-new-privs",
)  # fmt: skip
MODES: list[Json] = [{}, {"precopy": "auto"}, {"mode": "precopy"}, {"mode": "stop-and-copy"}, {"precopy": 0.05}]


def make_disk(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(64 << 20)
    return path


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, Any]:
    """Options of every QEMU of a test: they share a disk."""
    return {**MACHINE, "disk": make_disk(tmp_path / "disk")}


@pytest.fixture
def host(
    side: Callable[..., Any], operator: Callable[[str], Any], tmp_path: Path, machine: dict[str, Any]
) -> Iterator[Callable[..., Host]]:
    """``host(name)``: a `Host`, whose QEMUs end with the test: they live on without it."""
    hosts: list[Host] = []

    def begin(name: str, *arguments: object, append: str = GUEST, **options: Any) -> Host:
        words = {"memory_mib": MEMORY_MIB, "append": append, **machine, **options}
        hosts.append(Host(name, tmp_path, side, operator, arguments, **words))
        return hosts[-1]

    yield begin
    for one in hosts:
        one.end()


def seed_of_this_run() -> int:
    """Printed, so that a failure can be had again."""
    seed = int(os.environ.get("POSTCOPY_SEED", "0"), 0) or secrets.randbits(32)
    print(f"POSTCOPY_SEED={seed}")
    return seed


def boot(machine: dict[str, Any], append: str = GUEST, **options: Any) -> Qemu:
    return Qemu.start(MEMORY_MIB, append, prefix=UNDER_RUN, **{**machine, **options})


def test_ten_moves_there_and_back(host: Callable[..., Host], machine: dict[str, Any]) -> None:
    at, to = host("a"), host("b")
    with boot(machine) as first:
        seen = start(at, first)
        for number in range(10):
            how = MODES[number % len(MODES)]
            arrived = at.send(to, **how)
            assert (arrived["ram"]["iteration"] > 0) is ("precopy" in json.dumps(how))
            now = to.wait_pass(seen["pass"])
            check_went_on(seen, now)
            seen, at, to = now, to, at
        assert first.process.wait(DEADLINE_S) in (0, -signal.SIGKILL)
    assert seen["loaded"] > 0
    at.at.ask("end", "--machine", "vm", status=1)  # it runs
    at.daemon.signal(signal.SIGTERM)
    status, _, errors = at.daemon.end()
    assert status == 0
    assert "machines that stay without this process: vm (running)" in errors
    (pid,) = at.runs()
    assert "libpostcopy-preload" in Path(f"/proc/{pid}/maps").read_text()


async def test_network_that_fails_after_the_decision(host: Callable[..., Host], machine: dict[str, Any]) -> None:
    """Every page asked for takes milliseconds, and connections end in every way: the guest waits for pages, also for
    those that its disk writes to (O_DIRECT) in its first pass here, and nothing else happens to it."""
    seed = seed_of_this_run()
    append = "pages=512 spread=1 disk=64"
    at, to = host("a", append=append), host("b", append=append)
    for one in (at, to):
        one.ask("set", **{"max-bandwidth": "1MiB/s"})
    with await trio.to_thread.run_sync(boot, machine, append) as first:
        # From then on each pass has pages that come from the disk: those that went there in an earlier round of it.
        while not (await trio.to_thread.run_sync(first.wait_passes, 1))[-1].values["loaded"]:
            pass
        seen = await trio.to_thread.run_sync(start, at, first)
        recoveries = 0
        for number in range(4):
            plan = ChaosPlan.parse("cut:ways=reset+close+truncate+corrupt,every=0.4..0.8,delay=1ms", seed + number)
            decided = trio.Event()
            async with open_chaos_proxy(to.address, plan, begin=decided) as proxy:
                await trio.to_thread.run_sync(partial(at.ask, "migrate", to=str(proxy.address), machine="vm"))
                await trio.to_thread.run_sync(to.wait_decided)
                decided.set()
                arrived = await trio.to_thread.run_sync(at.wait_arrived, to)
            recoveries += arrived["recoveries"]["count"]
            left = at.passes()[-1] if number else first.passes()[-1].values
            now = await trio.to_thread.run_sync(to.wait_pass, seen["pass"])
            check_went_on(seen, now)
            assert now["loaded"] > left["loaded"]
            seen, at, to = now, to, at
    assert recoveries > 0


def test_rollback_at_each_step(host: Callable[..., Host], machine: dict[str, Any], tmp_path: Path) -> None:
    """Whatever happens to the destination's QEMU before the decision: the guest goes on at the source, and can be moved
    after that."""
    rng = random.Random(seed_of_this_run())
    cuts = [rng.randrange(1 << 30) for _ in range(3)]
    steps = {
        "killed before": "QEMU",
        "killed after": "",
        f"locked {machine['disk']}": "lock",
        **{f"cut {at}": "has not loaded the state" for at in cuts},
    }
    faults = tmp_path / "faults"
    faults.write_text("\n".join([*steps, "nothing"]))
    at, to = host("a"), host("b", command=qemu_faults.command(faults))
    with boot(machine) as first:
        seen = start(at, first)
        for step, said in steps.items():
            why = at.fails_to_send(to)
            assert said in why, (step, why)
            now = first.wait_passes(1)[-1].values
            check_went_on(seen, now)
            seen = now
            to.wait_gone()
            assert to.runs() == [], step
        at.send(to)
        check_went_on(seen, to.wait_pass(seen["pass"]))


def both_sides(
    side: Callable[..., Any], a: str | Path, b: str | Path, *arguments: str, **how: Any
) -> tuple[sides.Side, sides.Side]:
    """`dest` and `source`, which move the guest of the QEMU with monitor `a` into that with monitor `b`."""
    dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--machine", "qemu", "--qmp", b, **how)
    connect = ("--connect", dest.address, "--machine", "qemu", "--qmp", a)
    return dest, side("source", "--json", *connect, *arguments, **how)


def results_of(*commands: sides.Side) -> list[Json]:
    """When they have ended as they should."""
    results = []
    for one in commands:
        status, result, errors = one.end()
        assert (status, result["status"]) == (0, "completed"), errors
        results.append(result)
    return results


def move(side: Callable[..., Any], a: Qemu, b: Qemu, *arguments: str, **how: Any) -> list[Json]:
    return results_of(*both_sides(side, a.qmp_path, b.qmp_path, *arguments, **how))


def wait_ballooned(qemu: Qemu, mib: int) -> None:
    """Only lines from now on."""
    before = len(qemu.lines())
    qemu.inflate(mib)
    qemu.wait_line(f"balloon of {mib} MiB", lambda line: line.values.get("ballooned") == mib * 256, after=before)


def test_balloon_while_pages_are_missing(side: Callable[..., Any], machine: dict[str, Any]) -> None:
    """What the guest gives away in that time is zero when it comes back, and nothing from the source overwrites it."""
    append = "pages=2048 spread=1 disk=64"
    with boot(machine, append) as a, boot(machine, append, incoming=True) as b:
        a.wait_ready()
        wait_ballooned(a, 2)
        dest, source = both_sides(side, a.qmp_path, b.qmp_path, "--max-bandwidth", "2MiB/s")
        dest.wait_status("postcopy-active")
        wait_ballooned(b, 6)
        wait_ballooned(b, 0)
        assert b.status() == "running"
        results_of(dest, source)
        wait_ballooned(b, 6)  # nobody is asked any more
        wait_ballooned(b, 0)
        last = b.wait_passes(3)[-1].values
        assert (last["errors"], last["stale"]) == (0, 0)
        assert a.process.wait(DEADLINE_S) in (0, -signal.SIGKILL)


def test_two_backends_in_a_sandbox_and_a_daemon(side: Callable[..., Any], tmp_path: Path) -> None:
    """The guest's memory is in two files; the QEMU that waits has made itself a daemon."""
    append = "pages=1024 spread=1"
    options: dict[str, Any] = {"machine": "pc", "backends": (UNNAMED_FILE, UNNAMED_FILE)}
    with boot(options, append, arguments=SANDBOX) as a:
        a.wait_ready()
        waiting = [
            word.replace("stdio,id=serial,signal=off", f"file,id=serial,path={tmp_path}/serial")
            for word in command_line(tmp_path, MEMORY_MIB, append, **options)
        ]
        waiting += ["-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off", "-incoming", "defer", "-S"]
        waiting += ["-daemonize", "-pidfile", str(tmp_path / "pid")]
        subprocess.run([*UNDER_RUN, *waiting], check=True, timeout=DEADLINE_S)
        pid = int((tmp_path / "pid").read_text())
        try:
            results_of(*both_sides(side, a.qmp_path, tmp_path / "qmp", "--precopy", "auto"))
            seen = a.passes()[-1].values
            deadline = time.monotonic() + DEADLINE_S
            while not (found := [line for line in lines_of((tmp_path / "serial").read_text()) if is_whole(line)][1:]):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            check_went_on(seen, found[-1].values)
        finally:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.needs("hugetlb")
def test_huge_pages(side: Callable[..., Any]) -> None:
    """The backend is a file on hugetlbfs: pages of 2 MiB are sent, placed and tracked whole."""
    append, memory_mib = "pages=512 spread=1", 8
    files = [os.memfd_create("ram", os.MFD_HUGETLB | os.MFD_HUGE_2MB) for _ in range(2)]
    try:
        a, b = (
            Qemu.start(
                memory_mib, append, machine="microvm", prefix=UNDER_RUN, pass_fds=(file,), incoming=incoming,
                backends=(f"memory-backend-file,share=on,mem-path=/proc/self/fd/{file}",),
            )
            for file, incoming in zip(files, (False, True), strict=True)
        )  # fmt: skip
        with a, b:
            a.wait_ready()
            assert {result["ram"]["page-size"] for result in move(side, a, b)} == {2 << 20}
            check_went_on(a.passes()[-1].values, b.wait_passes(2)[-1].values)
    finally:
        for file in files:
            os.close(file)


@pytest.mark.needs("root", "uffd-device")
def test_ordinary_user(side: Callable[..., Any], readable_package: list[str]) -> None:
    """Nobody, without any capability: QEMU, and both sides of the move. All that was given to QEMU is
    /dev/userfaultfd, open: by `postcopy run` as root, which starts it as nobody."""
    nobody = [*AS_NOBODY, *readable_package, "-m", "postcopy"]
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="postcopy-nobody-")))
        directory.chmod(0o777)
        disk = make_disk(directory / "disk")
        disk.chmod(0o666)

        def begin(incoming: bool) -> Qemu:
            run = ("-m", "postcopy", "run", "--socket", str(directory / f"preload-{int(incoming)}"), "--")
            prefix = (*readable_package, *run, *AS_NOBODY, "--pdeathsig=KILL")
            options: dict[str, Any] = {**MACHINE, "disk": disk, "user": NOBODY}
            return stack.enter_context(Qemu.start(MEMORY_MIB, GUEST, prefix=prefix, incoming=incoming, **options))

        a, b = begin(False), begin(True)
        a.wait_ready()
        for qemu in (a, b):
            status = Path(f"/proc/{qemu.pid}/status").read_text()
            assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
            assert re.search(rf"^Uid:\s+{NOBODY}\s", status, re.MULTILINE)
        move(side, a, b, "--precopy", "auto", command=nobody)
        check_went_on(a.passes()[-1].values, b.wait_passes(2)[-1].values)


@pytest.mark.needs("linux-guest")
def test_linux_that_reports_its_free_pages(side: Callable[..., Any], tmp_path: Path) -> None:
    """It computes, reads and writes its disk, and tells QEMU what memory it does not use, also while pages are
    missing. Then it looks at all of its memory."""
    guest = linux.build()
    options: dict[str, Any] = {
        **guest.boot("work=32 disk=256 churn=4"),
        "machine": "pc",
        "disk": make_disk(tmp_path / "disk"),
        "backends": (UNNAMED_FILE,),
        "arguments": ("-device", "virtio-balloon-pci,free-page-reporting=on"),
        "prefix": UNDER_RUN,
    }
    with Qemu.start(linux.MEMORY_MIB, **options) as a, Qemu.start(linux.MEMORY_MIB, incoming=True, **options) as b:
        a.wait_ready()
        a.wait_passes(2)
        before = a.ask("status").values
        move(side, a, b, "--precopy", "auto")
        now, looked = b.ask("status").values, b.ask("check").values
        assert now["nonce"] == before["nonce"]
        assert (looked["errors"], looked["stale"]) == (0, 0)
        assert now["clock_ns"] > before["clock_ns"]
        assert now["saved"] > before["saved"]
        assert "Linux" in b.shell("uname -a")
