# SPDX-License-Identifier: Apache-2.0
"""The toy machine: a small guest that computes, and checks itself (docs/machines.md, csrc/machine/). Either of two
engines executes it, KVM on x86-64 or an interpreter of RISC-V, with the same devices, memory and workloads.

Memory is split into a block that all vCPUs share and one for each vCPU alone, so that a destination can give each its
own userfaultfd: vCPUs then do not wait for each other's faults. Shard 0 is the shared block's, shard n + 1 that of vCPU
n.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import trio

from postcopy._blocking import BRIEF_S, END_TIMEOUT_S, no_thread, run_briefly, run_sync, run_to_end
from postcopy._fd import FdHolder
from postcopy._files import explain_no_access
from postcopy._native import ffi, lib
from postcopy.errors import (
    BusyError,
    ConfigurationError,
    CoreError,
    ErrorLine,
    MigrationError,
    PostcopyError,
    ProtocolError,
    ResourceError,
    c_text,
    check,
)
from postcopy.machines.base import (
    CLOSE_TIMEOUT_S,
    Activity,
    BlockLayout,
    Check,
    Machine,
    MachineState,
    MachineStatistics,
    RamBlock,
    VcpuStatistics,
)
from postcopy.machines.toy.disk import Disk
from postcopy.memory import DirtyLog, Memory, check_memory, page_bytes_of
from postcopy.uffd import explain_unavailable
from postcopy.units import format_exact_size, format_size, whole_units

if TYPE_CHECKING:
    from postcopy.dataplane.recorder import Recorder
    from postcopy.machines.toy.tap import Network

WORKLOADS: Mapping[str, int] = {
    name: getattr(lib, f"PC_WORKLOAD_{name.upper()}")
    for name in ("idle", "dirty", "random", "disk", "echo", "sequential", "zipf", "phases")
}
_STATES = {getattr(lib, f"PC_MACHINE_{state.name}"): state for state in MachineState}
_ACTIVITIES = {getattr(lib, f"PC_VCPU_{activity.name}"): activity for activity in Activity}
# The counters that have the same name here and in C.
_COUNTERS, _VCPU_COUNTERS = (
    tuple(field.name for field in fields(table) if field.type == "int") for table in (MachineStatistics, VcpuStatistics)
)
_MAX_STATE_BYTES = 1 << 20  # eight vCPUs with as much of everything as the core takes
_STATE_BYTES = 16384  # of one vCPU, as a rule
LOAD_TIMEOUT_S = 10.0
"""How long KVM may take over a state: a part of a millisecond, unless it waits for guest memory that does not come."""
_MAX_TIMEOUT_MS = 3_600_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """What executes a machine, and where one differs from the other."""

    kind: str
    number: int  # enum pc_engine_kind
    kernel_faults: bool  # as `Machine.kernel_faults`


KVM = Engine("kvm", lib.PC_ENGINE_KVM, kernel_faults=True)
RV64 = Engine("rv64", lib.PC_ENGINE_RV64, kernel_faults=False)
"""Needs no /dev/kvm and no rights: missing memory is touched by user-mode code only, so that any user's userfaultfd can
stop its vCPUs. And it is deterministic: `run_until` stops at an exact instruction, and a machine of one vcpu is then
the same to the bit, whether or not it was moved on the way."""


@dataclass(frozen=True)
class ToyOptions:
    """A machine as the user wants it."""

    memory_bytes: int = 256 << 20
    vcpus: int = 1
    workload: str = "random"
    backing: str = "memfd"
    used_memory_bytes: int = 0  # over all blocks; 0: all memory
    seed: int | None = None  # of the workload's choices; None: a random one
    disk: str | None = None  # backing file for the workload `disk`; None: a temporary one, removed at close
    disk_bytes: int = 16 << 20
    net: str | None = None  # tap:NAME, for the workload `echo`, which needs it
    net_mac: int | None = None  # None: follows from the seed, as the next one
    net_address: int | None = None  # IPv4


class ToyMachine(Machine):
    """Made by `create` at the source, `for_destination` at the destination."""

    live = True

    def __init__(
        self,
        engine: Engine,
        blocks: Sequence[tuple[str, int]],
        backing: str,
        workload: str,
        used_memory_bytes: int,
        seed: int,
        disk: Disk | None,
        network: Network | None = None,
    ) -> None:
        """Takes over `disk` and `network`, also when it raises."""
        self.kind, self.kernel_faults = engine.kind, engine.kernel_faults
        self._engine = engine
        self._workload = workload
        self._used_memory_bytes = used_memory_bytes
        self._seed = seed
        self._disk = disk
        self._network = network
        self._machine: Any = None
        self._closing = False
        self._ending = trio.Lock()
        with contextlib.ExitStack() as undo:
            if disk is not None:
                undo.callback(disk.close)
            if network is not None:
                undo.callback(network.close)
            self._blocks: list[RamBlock] = []
            for number, (name, size_bytes) in enumerate(blocks):
                memory = Memory.create(backing, size_bytes)
                undo.callback(memory.drop)
                self._blocks.append(RamBlock(name, memory, number))
            machine = self._open()
            undo.callback(lib.pc_machine_close, machine, round(CLOSE_TIMEOUT_S * 1000))
            self._event_fd = SharedEventFd(lib.pc_machine_event_fd(machine))
            undo.pop_all()
        for block in self._blocks:
            block.memory.acquire("machine")
        self._machine = machine
        self._recorder: Recorder | None = None

    @classmethod
    def create(cls, engine: Engine, options: ToyOptions) -> Self:
        """The source. Errors: `ConfigurationError` for numbers that make no sense, `ResourceError` for what the host
        lacks (memory, /dev/kvm or the right to it)."""
        if options.workload not in WORKLOADS:
            raise ConfigurationError(f"unknown workload {options.workload!r}; there are {', '.join(WORKLOADS)}")
        if not 1 <= options.vcpus <= lib.PC_MACHINE_MAX_VCPUS:
            raise ConfigurationError(
                f"a {engine.kind} machine has 1 to {lib.PC_MACHINE_MAX_VCPUS} vcpus, not {options.vcpus}"
            )
        if not 0 <= options.used_memory_bytes < 1 << 64:
            raise ConfigurationError("--used-memory cannot be less than 0 bytes")
        if options.seed is not None and not 0 <= options.seed < 1 << 64:
            raise ConfigurationError("a seed is a number from 0 to 2^64 - 1")
        unit = page_bytes_of(options.backing)
        if options.memory_bytes > 0 and options.memory_bytes % unit:
            raise ConfigurationError(
                f"--memory: {options.memory_bytes} bytes are not a multiple of the page size, {format_size(unit)};"
                f" did you mean {whole_units(options.memory_bytes, unit)}?"
            )
        check_memory(options.backing, options.memory_bytes)
        if options.used_memory_bytes > options.memory_bytes:
            raise ConfigurationError(
                f"--used-memory {format_exact_size(options.used_memory_bytes)} is more than --memory"
                f" {format_exact_size(options.memory_bytes)}; write at most that, or leave --used-memory out"
            )
        shared_bytes, private_bytes = split_memory(options.memory_bytes, options.vcpus, unit)
        blocks = [("shared", shared_bytes)] + [(f"vcpu{number}", private_bytes) for number in range(options.vcpus)]
        disk = None
        if options.workload == "disk":
            disk = Disk(options.disk, options.disk_bytes)
        elif options.disk is not None:
            raise ConfigurationError(f"--disk has no meaning for --workload {options.workload}")
        seed = secrets.randbits(64) if options.seed is None else options.seed
        network = None
        if options.workload == "echo":
            network = _open_network(options, seed)
        elif (options.net, options.net_mac, options.net_address) != (None, None, None):
            raise ConfigurationError(f"--net has no meaning for --workload {options.workload}")
        workload, used_memory_bytes = options.workload, options.used_memory_bytes
        return cls(engine, blocks, options.backing, workload, used_memory_bytes, seed, disk, network)

    @classmethod
    def for_destination(
        cls,
        engine: Engine,
        config: Mapping[str, Any],
        layout: Sequence[BlockLayout],
        backing: str,
        disk: str | None = None,
        net: str | None = None,
    ) -> Self:
        """The twin of what a source offers; what the peer says is checked. `disk` and `net`: where its disk is on this
        host, and where its network device is attached."""
        unavailable = explain_unavailable(kernel_faults=engine.kernel_faults)
        if unavailable is not None:
            raise unavailable
        vcpus, workload = config.get("vcpus"), config.get("workload")
        if type(vcpus) is not int or not 1 <= vcpus <= lib.PC_MACHINE_MAX_VCPUS:
            raise ProtocolError(f"an offer of a {engine.kind} machine must have a number of vcpus")
        if not isinstance(workload, str) or workload not in WORKLOADS:
            raise ProtocolError(f"an offer of a {engine.kind} machine must have a workload")
        names = ["shared"] + [f"vcpu{number}" for number in range(vcpus)]
        if [block.name for block in layout] != names:
            raise ProtocolError(f"a {engine.kind} machine of {vcpus} vcpus must have the blocks {', '.join(names)}")
        if any(block.size_bytes <= 0 for block in layout):
            raise ProtocolError("an offer of a block without a size")
        unit = page_bytes_of(backing)
        for block in layout:
            if block.size_bytes % unit:
                raise ConfigurationError(
                    f"block {block.name} of {format_size(block.size_bytes)} is not a whole number of"
                    f" {format_size(unit)} pages: --backing {backing} cannot hold this machine"
                )
        check_memory(backing, sum(block.size_bytes for block in layout))
        used_memory_bytes, seed = _natural(config, "working-set-bytes"), _natural(config, "seed")
        twin_disk = network = None
        if workload == "disk":
            twin_disk = Disk.of_twin(disk, config.get("disk"), _natural(config, "disk-bytes"))
        elif workload == "echo":
            network = _twin_network(config, net)
        blocks = [(block.name, block.size_bytes) for block in layout]
        return cls(engine, blocks, backing, workload, used_memory_bytes, seed, twin_disk, network)

    # ---- what it is

    @property
    def blocks(self) -> Sequence[RamBlock]:
        return self._blocks

    @property
    def vcpus(self) -> int:
        return len(self._blocks) - 1

    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "vcpus": self.vcpus,
            "workload": self._workload,
            "working-set-bytes": self._used_memory_bytes,
            "seed": self._seed,
        }
        if self._disk is not None:
            config["disk"] = self._disk.path
            config["disk-bytes"] = self._disk.size_bytes
        if self._network is not None:
            config["net-mac"] = self._network.mac
            config["net-address"] = self._network.address
        return config

    @property
    def network(self) -> dict[str, str] | None:
        if self._network is None:
            return None
        from postcopy.machines.toy.tap import format_ipv4, format_mac

        network = self._network
        return {"net": network.net, "mac": format_mac(network.mac), "address": format_ipv4(network.address)}

    async def claim_network(self) -> None:
        if self._network is not None:
            try:
                self._network.claim()
            except (PostcopyError, trio.ClosedResourceError) as error:
                log.error("the machine runs, but is not on the network: %s", error)

    async def release_network(self) -> None:
        if self._network is not None:
            try:
                self._network.release()
            except (PostcopyError, trio.ClosedResourceError) as error:
                # It reads and answers nothing any more, and the destination's announcement moves its address.
                log.warning("the machine has left, but its link stays up: %s", error)

    # ---- running

    async def boot(self) -> None:
        machine = self._alive()
        check(await run_sync(lib.pc_machine_boot, machine), "booting the machine")
        await self.claim_network()

    # In a pause every wake-up of a thread counts. What cannot block is therefore called in the Trio thread: `resume`
    # only wakes the vCPUs, `save_state` reads registers of vCPUs that are parked. `pause` waits for them there for as
    # long as one that is computing or halted may need.

    async def resume(self) -> None:
        result = lib.pc_machine_resume(self._alive())
        if result == -errno.EIO:
            raise MigrationError(f"the machine has failed: {self.statistics().failure_text}")
        check(result, "resuming the machine")

    async def pause(self, timeout_s: float = 10.0) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        if lib.pc_machine_pause(self._alive(), round(min(timeout_s, BRIEF_S) * 1000), ffi.NULL, 0) != 0:
            await self._until("pausing the machine", timeout_s, lib.pc_machine_pause, self._alive())

    async def run_until(self, instructions: int, timeout_s: float = 60.0) -> None:
        """rv64, from paused to paused: each vcpu runs until it has executed `instructions` since its boot, in all.
        `MigrationError` when the machine fails, or is not there in time: it is then paused where it was. Seen through
        when cancelled."""
        await self._until("running the machine", timeout_s, lib.pc_rv64_run_until, self._alive(), instructions)

    def instructions(self) -> list[int]:
        """rv64: executed by each vcpu since its boot, wherever that was; exact when paused, a moment old while it
        runs."""
        machine = self._alive()
        count = ffi.new("uint64_t *")
        found = []
        for vcpu in range(self.vcpus):
            check(lib.pc_rv64_instructions(machine, vcpu, count), "reading the count of instructions")
            found.append(int(count[0]))
        return found

    async def _until(self, what: str, timeout_s: float, function: Callable[..., int], *args: Any) -> None:
        """A call that ends with the machine paused, or not in time."""
        line = ErrorLine()
        timeout_ms = max(0, min(round(timeout_s * 1000), _MAX_TIMEOUT_MS))
        result = int(await run_sync(function, *args, timeout_ms, line.buffer, line.size))
        if result in (-errno.ETIMEDOUT, -errno.EIO):
            raise MigrationError(f"{what}: {line}")
        line.check(result, what)

    def dirty_log(self) -> DirtyLog:
        def tell(log: Any) -> None:
            if self._machine is not None:  # closed meanwhile, it writes nothing
                check(lib.pc_machine_set_dirty_log(self._machine, log), "having the disk mark what it writes")

        self._alive()
        return DirtyLog([block.memory for block in self._blocks], tell)

    async def save_state(self) -> bytes:
        machine, line = self._alive(), ErrorLine()
        room = _STATE_BYTES * (1 + self.vcpus)
        while True:
            buffer = ffi.new("uint8_t[]", room)
            used = lib.pc_machine_save_state(machine, buffer, room, line.buffer, line.size)
            line.check(used, "saving the machine's state")
            if used <= room:
                return bytes(ffi.buffer(buffer, used))
            room = used

    async def load_state(self, state: bytes) -> None:
        machine = self._alive()
        if len(state) > _MAX_STATE_BYTES:
            raise ProtocolError(f"a machine state of {format_size(len(state))}")
        line = ErrorLine()

        def call() -> int:
            return int(lib.pc_machine_load_state(machine, state, len(state), line.buffer, line.size))

        # A load that hangs in the kernel is left there, when it is late or this is cancelled: `close` waits for it.
        what = "loading the machine's state"
        result = None
        with trio.move_on_after(LOAD_TIMEOUT_S):
            # A load of rv64 copies registers; one of KVM is a row of system calls, which a state that was not thought
            # of could have wait for memory.
            result = await run_briefly(call, abandon_on_cancel=True) if self.kernel_faults else call()
        if result is None:
            raise MigrationError(f"{what}: not done after {LOAD_TIMEOUT_S:g} s; it hangs in the kernel")
        if result in (-errno.EBADMSG, -errno.EPROTO, -errno.EINVAL):
            raise ProtocolError(f"{what}: {line}")
        if result == -errno.ENOTSUP:
            raise ResourceError(f"{what}: {line}", "use a host with the same or a newer CPU and kernel")
        line.check(result, what)

    # ---- looking at it

    def vcpu_threads(self) -> list[int]:
        return [vcpu.tid for vcpu in self.statistics().vcpus]

    def statistics(self) -> MachineStatistics:
        stats: Any = ffi.new("struct pc_machine_stats *")
        check(lib.pc_machine_stats(self._alive(), stats), "reading the machine's counters")
        return MachineStatistics(
            state=_STATES[stats.state],
            vcpus=tuple(
                VcpuStatistics(
                    activity=_ACTIVITIES[vcpu.activity],
                    **{name: int(getattr(vcpu, name)) for name in _VCPU_COUNTERS},
                )
                for vcpu in stats.vcpu[0 : stats.vcpus]
            ),
            ready=bool(stats.ready),
            failure_text=c_text(stats.failure_text),
            **{name: int(getattr(stats, name)) for name in _COUNTERS},
        )

    async def verify(self) -> Check:
        machine = self._alive()
        struct: Any = ffi.new("struct pc_machine_check *")
        # How much there is to check, guest memory says. Abandoned it goes on until `close` calls it off.
        result = await run_sync(lib.pc_machine_verify, machine, struct, abandon_on_cancel=True)
        if result == -errno.ECANCELED:
            raise trio.ClosedResourceError("this machine was closed")
        check(result, "verifying the machine")
        return Check(
            ok=bool(struct.ok),
            what=c_text(struct.text),
            how=f"every page of the paused machine, recomputed from seed and counters of the workload {self._workload}",
            counts={
                "pages-checked": int(struct.pages_checked),
                "pages-zero": int(struct.pages_zero),
                "bad-pages": int(struct.bad_pages),
                "operations": int(struct.operations),
                "disk-bytes-checked": int(struct.disk_bytes_checked),
            },
            nonce=int(struct.nonce),
        )

    async def wait_ready(self) -> None:
        while True:
            statistics = self.statistics()
            if statistics.state is MachineState.FAILED or statistics.failures:
                raise MigrationError(f"the machine failed before it was ready: {statistics.failure_text}")
            if statistics.ready:
                return await trio.lowlevel.checkpoint()
            await self.wait_changed()

    async def wait_changed(self) -> None:
        await self._event_fd.wait()

    def be_recorded(self, recorder: Recorder) -> None:
        if self._recorder is not None and self._recorder is not recorder:
            self._recorder.take("machine", ffi.NULL)  # `close` knows of one only
        recorder.take("machine", self._alive())
        self._recorder = recorder

    # ---- the end

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        with trio.CancelScope(shield=True):  # bounded: pc_machine_close is
            async with self._ending:
                if self._machine is None:
                    return
                machine, self._machine = self._machine, None  # whose end does not return can never be freed
                self._closing = True
                if self._recorder is not None:
                    self._recorder.take("machine", ffi.NULL)
                self._event_fd.close()
                timeout_ms = max(1, min(round(timeout_s * 1000), _MAX_TIMEOUT_MS))

                def call() -> int:
                    return int(lib.pc_machine_close(machine, timeout_ms))

                result = await run_to_end(call, "ending the machine", timeout_s + END_TIMEOUT_S)
                if result == -errno.ETIMEDOUT:
                    self._machine = machine
                    raise MigrationError(
                        "a vCPU is blocked where no signal reaches it, on a missing page; the machine's memory is kept"
                    )
                for block in self._blocks:
                    block.memory.release("machine")
                    block.memory.drop()
                if self._disk is not None:
                    self._disk.close()
                if self._network is not None:
                    self._network.close()
                check(result, "ending the machine")
        await trio.lowlevel.checkpoint_if_cancelled()

    def __del__(self) -> None:
        if getattr(self, "_machine", None) is not None:
            # Its vCPUs run on, and its memory stays mapped.
            warnings.warn(f"a {self.kind} machine was never closed", ResourceWarning, stacklevel=2, source=self)

    # ---- private

    def _alive(self) -> Any:
        if self._machine is None or self._closing:
            raise trio.ClosedResourceError("this machine was closed")
        return self._machine

    def _open(self) -> Any:
        config: Any = ffi.new("struct pc_machine_config *")
        config.engine = self._engine.number
        config.vcpus = self.vcpus
        config.workload = WORKLOADS[self._workload]
        config.shared = self._blocks[0].memory.struct[0]
        for number, block in enumerate(self._blocks[1:]):
            config.private_[number] = block.memory.struct[0]
        config.working_set_bytes = self._used_memory_bytes
        config.seed = self._seed
        config.disk_fd = -1 if self._disk is None else self._disk.fd
        config.disk_bytes = 0 if self._disk is None else self._disk.size_bytes
        if self._network is not None:
            config.has_net = 1
            config.net_fd = self._network.fd
            config.net_mac = self._network.mac
            config.net_address = self._network.address
        pointer: Any = ffi.new("struct pc_machine **")
        line = ErrorLine()
        result = lib.pc_machine_open(config, pointer, line.buffer, line.size)
        if result < 0:
            raise _open_error(-result, str(line))
        return pointer[0]


def explain_no_kvm() -> ResourceError | None:
    """None when this user may use /dev/kvm on this host, else why not. Makes nothing, does not block."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ResourceError("the kvm machine is for x86-64 hosts", "use --machine rv64")
    fd = lib.pc_device_open(lib.PC_DEVICE_KVM)
    if fd < 0:
        error = _open_error(-fd, f"/dev/kvm: {os.strerror(-fd)}")
        return error if isinstance(error, ResourceError) else ResourceError(str(error), "use --machine rv64")
    os.close(fd)
    return None


def split_memory(memory_bytes: int, vcpus: int, page_bytes: int) -> tuple[int, int]:
    """(shared, private of each vCPU): about half is shared, and together they are all of `memory_bytes`.
    `ConfigurationError` when that is too small or not a whole number of pages."""
    shared, private = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    line = ErrorLine()
    result = lib.pc_machine_split_memory(memory_bytes, vcpus, page_bytes, shared, private, line.buffer, line.size)
    if result < 0:
        raise ConfigurationError(f"{format_size(memory_bytes)} for {vcpus} vcpus: {str(line) or os.strerror(-result)}")
    return int(shared[0]), int(private[0])


def _open_error(number: int, text: str) -> PostcopyError:
    text = text or os.strerror(number)
    if number == errno.ENOENT:
        return ResourceError(
            text,
            "enable virtualization (load kvm_intel or kvm_amd; in a virtual machine, nested virtualization), and in a"
            " container pass the device in: --device /dev/kvm; --machine rv64 needs no such device",
        )
    if number in (errno.EACCES, errno.EPERM):
        why, remedy = explain_no_access("/dev/kvm")
        return ResourceError(why, f"{remedy}; or use --machine rv64")
    if number in (errno.ENOTSUP, errno.ENODEV, errno.ENXIO):
        return ResourceError(text, "use an x86-64 host whose KVM offers it, or --machine rv64")
    if number == errno.EINVAL:
        return ConfigurationError(text)
    if number == errno.EBUSY:
        return BusyError(text)
    if number == errno.ENOMEM:
        return ResourceError(text, "ask for less memory, or use a host with more")
    if number == errno.EAGAIN:
        return no_thread(f"a machine ({text})")
    return CoreError(number, "making a machine", text)


def _natural(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ProtocolError(f"an offer of a machine must have a number as {name}")
    return value


def _open_network(options: ToyOptions, seed: int) -> Network:
    from postcopy.machines.toy.tap import Network, default_ipv4, default_mac

    if options.net is None:
        raise ConfigurationError("--workload echo needs --net tap:NAME, where its network device is attached")
    mac = default_mac(seed) if options.net_mac is None else options.net_mac
    address = default_ipv4(seed) if options.net_address is None else options.net_address
    return Network.open(options.net, mac, address)


def _twin_network(config: Mapping[str, Any], net: str | None) -> Network:
    from postcopy.machines.toy.tap import Network

    mac, address = _natural(config, "net-mac"), _natural(config, "net-address")
    if mac >= 1 << 48 or address >= 1 << 32:
        raise ProtocolError("an offer of a machine with addresses that cannot be")
    if net is None:
        raise ConfigurationError(
            "the machine has a network device; say --net tap:NAME where it is attached on this host"
        )
    return Network.open(net, mac, address)


class SharedEventFd:
    """Lets any number of tasks wait for the machine's eventfd, which only one may read.

    It says only that something may have changed: a task that was woken looks at the counters, before waiting and after.
    """

    def __init__(self, event_fd: int) -> None:
        self._fd = FdHolder.duplicate(event_fd)
        self._others = trio.lowlevel.ParkingLot()
        self._is_polled = False

    async def wait(self) -> None:
        self._fd.fileno()
        if self._is_polled:
            await self._others.park()
            self._fd.fileno()
            return
        self._is_polled = True
        try:
            await self._fd.wait_readable()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._fd.fileno())
        finally:
            # Also when cancelled: one of the others must take over.
            self._is_polled = False
            self._others.unpark_all()

    def close(self) -> None:
        self._fd.close()
        self._others.unpark_all()
