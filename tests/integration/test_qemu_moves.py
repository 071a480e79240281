# SPDX-License-Identifier: Apache-2.0
"""The guest of a real QEMU moves between processes of ours, and finds its memory and its disk as it left them."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import qemu_faults
import trio
from lines import Json
from qemus import DEADLINE_S, UNDER_RUN, UNNAMED_FILE, Host, check_went_on, start

from postcopy.testbed.chaos import ChaosPlan, open_chaos_proxy
from postcopy.testbed.qemu import Qemu

pytestmark = pytest.mark.needs("qemu", "uffd")

GUEST = "pages=1024 spread=1 disk=64"
MEMORY_MIB = 64
# The disk is opened with cache=none: what the guest reads goes by O_DIRECT into pages that have not arrived.
MACHINE = {"machine": "microvm", "balloon": True, "backends": (UNNAMED_FILE,)}
MODES: list[Json] = [{}, {"precopy": "auto"}, {"mode": "precopy"}, {"mode": "stop-and-copy"}, {"precopy": 0.05}]


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, Any]:
    """Options of every QEMU of a test: they share a disk."""
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    return {**MACHINE, "disk": disk}


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


def test_rollback_at_each_step(host: Callable[..., Host], machine: dict[str, Any], tmp_path: Path) -> None:
    """Whatever happens to the destination's QEMU before the decision: the guest goes on at the source, and can be moved
    after that."""
    seed = int(os.environ.get("POSTCOPY_SEED", "0"), 0) or secrets.randbits(32)
    print(f"POSTCOPY_SEED={seed}")
    cuts = [random.Random(seed).randrange(4, 1 << 30) for _ in range(3)]
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
            assert first.status() == "running", step
            now = first.wait_passes(1)[-1].values
            check_went_on(seen, now)
            seen = now
            to.wait_gone()
            assert to.runs() == [], step
        at.send(to)
        check_went_on(seen, to.wait_pass(seen["pass"]))
