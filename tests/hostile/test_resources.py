# SPDX-License-Identifier: Apache-2.0
"""No memory, no threads, no descriptors, no address space: known before COMMIT, or reserved for what comes after it."""

from __future__ import annotations

import contextlib
import resource
import signal
import struct
from collections.abc import Callable, Iterator

import pytest

from cgroups import Group, group_of
from hostile import _wire as wire
from hostile._peer import Closed, Destination, Line, Machine, Neighbour, Refused, Source
from hostile._program import MIB, RV64, Control, Program, Refusal, verify

Start = Callable[..., Program]
Daemon = Callable[..., tuple[Program, Control]]
Beside = Callable[[Program, Control], Neighbour]


# A test names its group first: it is removed last, when the processes in it have ended.


@pytest.fixture
def memory() -> Iterator[Group]:
    with group_of("memory", 300 * MIB) as group:
        yield group


@pytest.fixture
def pids() -> Iterator[Group]:
    with group_of("pids", 1000) as group:
        yield group


@pytest.fixture(scope="module")
def large(version: int) -> Machine:
    """64 MiB of which nearly all has content."""
    from hostile import _program

    with _program.starter() as start:
        machine = ("--machine", "rv64", "--memory", "64MiB", "--workload", "random", "--used-memory", "56MiB")
        source = start("source", "--json", *machine, "--listen", "127.0.0.1:0")
        taken = Destination.connect(source.address, version).until("run").take_all()
        assert source.end() == 0
        return taken


@pytest.mark.needs("root")
def test_memory_is_promised_once(memory: Group, daemon: Daemon, version: int, large: Machine) -> None:
    """Eight machines of 64 MiB arrive together where there is room for four at most. Those for which there is none are
    refused before PREPARED; the others get all of it."""
    program, control = daemon("d", before=memory.enter())
    sources = [Source(program.address, large, version) for _ in range(8)]
    taken = []
    for source in sources:
        with contextlib.suppress(Closed, Refused, AssertionError):
            source.until("ready")
            taken.append(source)
    for source in list(taken):
        try:
            source.switch().prepared()
        except (Closed, AssertionError):
            taken.remove(source)
    assert taken, "none was taken"
    for source in taken:
        source.commit()
    for source in taken:  # what is asked for is answered while others push: else that is a lost connection
        source.running().serve()
    for source in taken:
        source.push_all()
        source.control.hear("complete")
        source.control.say("complete-ack", stats={})
    assert program.alive(), "killed"
    here = control.machines()
    assert len(here) == len(taken) < 8
    for name in here:
        control.wait_status(name, "completed")
        assert control.machines()[name]["guest"]["failures"] == 0


@pytest.mark.needs("root")
def test_no_threads_for_another_machine(pids: Group, daemon: Daemon, start: Start, neighbour: Beside) -> None:
    """The group of processes is full: what comes is refused, what is here is not touched, what leaves says why not."""
    program, control = daemon("d", *RV64, "--name", "x", before=pids.enter())
    beside = neighbour(program, control)
    pids.limit(pids.used())
    for _ in range(3):
        source = start("source", "--json", *RV64, "--connect", program.where, "--on-failure", "exit")
        source.end()
    dest = start("dest", "--json", "--listen", "127.0.0.1:0", "--run-for", "0")
    with contextlib.suppress(Refusal):
        control.ask("migrate", machine="x", to=dest.where)
    with contextlib.suppress(Refusal):
        control.ask("start", kind="rv64", name="y", memory="16MiB")
    assert program.alive(), program.tail()
    program.check()
    pids.limit(1000)
    beside.finish(start)
    if "x" in control.machines():
        verify(start, control, "x")


@pytest.mark.needs("root")
@pytest.mark.parametrize("pager", ["thread", "process"])
def test_no_threads_after_prepared(
    pids: Group, daemon: Daemon, start: Start, version: int, rv64: Machine, pager: str
) -> None:
    """What a migration needs from there on exists already."""
    program, control = daemon("d", "--pager", pager, before=pids.enter())
    source = Source(program.address, rv64, version).until("prepared")
    pids.limit(pids.used())
    source.commit().running().finish()
    (name,) = control.machines()
    control.wait_status(name, "completed")
    pids.limit(1000)
    verify(start, control, name)


@pytest.mark.needs("root")
def test_no_threads_at_the_source_after_prepared(pids: Group, start: Start, version: int) -> None:
    source = start("source", "--json", *RV64, "--listen", "127.0.0.1:0", before=pids.enter())
    dest = Destination.connect(source.address, version).until("handed")
    pids.limit(pids.used())
    dest.prepare().committed().run().take_all()
    assert source.end() == 0, source.tail()


def test_no_descriptors(daemon: Daemon, start: Start, neighbour: Beside) -> None:
    """EMFILE: new connections are refused, a machine on its way is not touched, and the daemon can be operated."""
    program, control = daemon("d")
    beside = neighbour(program, control)
    hard = resource.prlimit(program.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (program.descriptors() + 2, hard))
    for _ in range(3):
        start("source", "--json", *RV64, "--connect", program.where, "--on-failure", "exit").end()
    with contextlib.suppress(Refusal):
        control.ask("start", kind="rv64", name="y", memory="16MiB")
    control.ask("status")
    resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (1024, hard))
    beside.finish(start)


@pytest.mark.parametrize("step", ["ready", "running"])
def test_no_descriptors_for_a_recovery(daemon: Daemon, start: Start, version: int, rv64: Machine, step: str) -> None:
    """They are needed again when the source comes back, and there are none: it comes again when there are."""
    program, control = daemon("d")
    source = Source(program.address, rv64, version).until(step)
    hard = resource.prlimit(program.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (program.descriptors() - 1, hard))
    if step == "ready":
        source.switch().prepared().commit().running()
    source.lose()
    with contextlib.suppress(Closed, Refused, OSError):
        Line.open(program.address, version).greet("control", "dest")
    resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (1024, hard))
    source.come_back().recovered().finish()
    (name,) = control.machines()
    control.wait_status(name, "completed")
    verify(start, control, name)


@pytest.mark.parametrize("limit_mib", [90, 120, 150, 180, 220, 280])
def test_address_space(start: Start, version: int, limit_mib: int) -> None:
    """`ulimit -v`: an error in one line, or it works. Never a traceback, and never one after COMMIT."""
    limit = ["prlimit", f"--as={limit_mib * MIB}"]
    dest = start("dest", "--json", "--no-verify", "--listen", "127.0.0.1:0", "--run-for", "0", before=limit)
    with contextlib.suppress(AssertionError):
        address = dest.address
        source = Source(address, Machine.image(32 * MIB), version)
        with contextlib.suppress(Closed, Refused, AssertionError):
            source.until("running").finish()
        if dest.alive():
            source.control.close()
            dest.signal(signal.SIGTERM)
    dest.end(30)
    dest.check()


# ---- A device state that makes KVM itself touch memory

MSR_KVM_WALL_CLOCK, MSR_KVM_SYSTEM_TIME = 0x4B564D00, 0x4B564D01
STATE_HEADER_BYTES = 32


def with_msr(state: bytes, index: int, value: int) -> bytes:
    """The device state of a kvm machine with this register set; it takes the place of one that need not be there."""
    data = bytearray(state)
    at = STATE_HEADER_BYTES
    while at < len(data):
        tag, _, size = struct.unpack_from("<4sIQ", data, at)
        if tag == b"MSRS":
            entries = range(at + 16, at + 16 + size, 16)
            found = [entry for entry in entries if struct.unpack_from("<I", data, entry)[0] == index]
            struct.pack_into("<IIQ", data, found[0] if found else entries[-1], index, 0, value)
        at += 16 + -(-size // 8) * 8
    struct.pack_into("<I", data, 12, wire.crc32c(bytes(data[STATE_HEADER_BYTES:])))
    return bytes(data)


@pytest.mark.needs("kvm", "uffd")
@pytest.mark.parametrize(
    ("index", "value"),
    [(MSR_KVM_WALL_CLOCK, 0x500000), (MSR_KVM_SYSTEM_TIME, 0x500001), (0x4B564D02, 0x500001), (0x4B564D03, 0x500001)],
    ids=["wall clock", "system time", "async page faults", "steal time"],
)
def test_state_that_makes_the_kernel_write(
    daemon: Daemon, start: Start, version: int, rv64: Machine, index: int, value: int
) -> None:
    """The page that it writes to is missing, and does not come. Refused, or loaded all the same, in bounded time; and
    the daemon can be ended."""
    kvm = ("--machine", "kvm", "--memory", "16MiB", "--workload", "random", "--used-memory", "4MiB")
    original = start("source", "--json", *kvm, "--listen", "127.0.0.1:0")
    machine = Destination.connect(original.address, version).until("run").take_all()
    machine.state = with_msr(machine.state, index, value)
    program, control = daemon()
    source = Source(program.address, machine, version).until("switch")
    with contextlib.suppress(Closed):
        said = source.control.hear(timeout_s=60)
        assert said["type"] in ("prepared", "abort")
    control.ask("status", 5)
    Neighbour(program, control, rv64, version).finish()
    source.control.close()
    program.signal(signal.SIGTERM)
    program.signal(signal.SIGTERM)
    program.end(30)
