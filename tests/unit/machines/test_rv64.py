# SPDX-License-Identifier: Apache-2.0
"""The rv64 machine in Python, and its guest programs as shipped. Instructions: csrc/tests/machine/test_rv64.c."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import trio
from machines import copy_memory, twin_of

from postcopy.errors import ConfigurationError, MigrationError, ProtocolError, ResourceError
from postcopy.machines import MachineState
from postcopy.machines.kinds import MachineOptions, create_destination, create_source
from postcopy.machines.toy import machine as toy
from postcopy.machines.toy.machine import WORKLOADS, ToyMachine

MIB = 1 << 20
GUEST = Path(__file__).parents[3] / "csrc/machine/guest"
CROSS = "riscv64-linux-gnu-gcc"


def source(**options: object) -> ToyMachine:
    given = {"memory_bytes": 16 * MIB, "vcpus": 1, "workload": "random", "seed": 5} | options
    machine = create_source("rv64", MachineOptions(**given))  # type: ignore[arg-type]
    assert isinstance(machine, ToyMachine)
    return machine


@pytest.mark.needs("uffd-user")
@pytest.mark.parametrize("workload", [name for name in WORKLOADS if name != "echo"])  # that one: test_network.py
async def test_a_machine_moves_and_goes_on(workload: str) -> None:
    async with source(vcpus=2, workload=workload) as here:
        assert (here.kind, here.live, here.kernel_faults, here.shards) == ("rv64", True, False, 3)
        await here.boot()
        await here.resume()
        with trio.fail_after(60):
            await here.wait_ready()
        await here.pause()
        before = here.statistics()
        async with twin_of(here) as there:
            copy_memory(here, there)
            await there.load_state(await here.save_state())
            await there.resume()
            with trio.fail_after(60):
                while there.statistics().reports <= before.reports:
                    await there.wait_changed()
            await there.pause()
            after = there.statistics()
            assert after.nonce == before.nonce != 0
            assert after.operations > before.operations
            check = await there.verify()
            assert check.ok, check.what


@pytest.mark.needs("uffd-user")
async def test_the_same_to_the_bit_whether_or_not_it_was_moved() -> None:
    found = []
    for moves in ([], [1, 1_000_000, 1_234_567]):
        machine = source()
        await machine.boot()
        for at in moves:
            await machine.run_until(at)
            twin = twin_of(machine)
            copy_memory(machine, twin)
            await twin.load_state(await machine.save_state())
            await machine.close()
            machine = twin
        await machine.run_until(2_000_000)
        assert machine.instructions() == [2_000_000]
        found.append((await machine.save_state(), [block.memory.digest() for block in machine.blocks]))
        await machine.close()
    assert found[0] == found[1]


async def test_run_until_in_vain() -> None:
    async with source() as machine:
        await machine.boot()
        with pytest.raises(MigrationError, match="not every hart came to"):
            await machine.run_until(1 << 60, timeout_s=0.05)
        assert machine.statistics().state is MachineState.PAUSED
        reached = machine.instructions()[0]
        await machine.run_until(reached + 1)
        assert machine.instructions() == [reached + 1]


@pytest.mark.needs("uffd-user")
async def test_a_failing_guest_is_told_in_one_line() -> None:
    async with source() as here, twin_of(here) as there:
        await here.boot()
        await there.load_state(await here.save_state())  # and no memory: its program is zeros
        with pytest.raises(MigrationError, match="vCPU 0: illegal instruction 0x00000000, PC 0x20000"):
            await there.run_until(100)
        assert there.statistics().state is MachineState.FAILED


def test_options_that_make_no_sense() -> None:
    with pytest.raises(ConfigurationError, match="a rv64 machine has 1 to 8 vcpus, not 9"):
        source(vcpus=9)
    with pytest.raises(ConfigurationError, match="--image has no meaning for --machine rv64"):
        source(image="x")
    with pytest.raises(ConfigurationError, match="unknown workload"):
        source(workload="nonsense")


@pytest.mark.needs("uffd-user")
async def test_state_of_another_kind_is_refused() -> None:
    async with source() as here, source(seed=6) as other:
        await here.boot()
        state = await here.save_state()
        with pytest.raises(ProtocolError, match="differ in seed"):
            await other.load_state(state)
        with pytest.raises(ProtocolError, match="damaged"):
            await other.load_state(state[:-1] + bytes([state[-1] ^ 1]))


@pytest.mark.needs("uffd-user")
async def test_a_host_with_user_faults_only_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def explain(*, kernel_faults: bool) -> ResourceError | None:
        return ResourceError("no userfaultfd for the kernel's faults") if kernel_faults else None

    monkeypatch.setattr(toy, "explain_unavailable", explain)
    async with source() as here, twin_of(here):
        pass
    with pytest.raises(ResourceError, match="kernel's faults"):
        create_destination("kvm", {}, [])


def test_the_shipped_guest_programs_are_what_their_sources_say(tmp_path: Path) -> None:
    """Byte for byte, where the compiler is the one they were built with."""
    if shutil.which(CROSS) is None:
        pytest.skip(f"{CROSS} is not installed: apt-get install gcc-riscv64-linux-gnu")
    built_with = (GUEST / "rv64/COMPILER").read_text()
    version = subprocess.run([CROSS, "--version"], capture_output=True, text=True, check=True).stdout
    if version.splitlines()[0] != built_with.strip():
        pytest.skip(f"another compiler than they were built with ({built_with.strip()})")
    subprocess.run(["sh", str(GUEST / "build_rv64.sh"), str(tmp_path)], check=True, timeout=60)
    names = sorted(path.name for path in tmp_path.glob("*.inc"))
    assert names == sorted(path.name for path in (GUEST / "rv64").glob("*.inc"))
    for name in names:
        assert (tmp_path / name).read_text() == (GUEST / "rv64" / name).read_text(), f"{name}: run `make guests-rv64`"
