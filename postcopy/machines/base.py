# SPDX-License-Identifier: Apache-2.0
"""What can be migrated, seen from the engine: memory blocks, a state, and a way to stop and to go on.

The engine never asks which machine it moves; all it may use is here. A machine belongs to one side of one migration (an
image at the source, which nothing changes, may be shared by several). All methods run in the Trio thread.

The pause. From `pause` at the source to the first run after `resume` at the destination nobody runs the machine, so
these calls, `save_state` and `load_state` do only what cannot be done before: what a machine can have made earlier
(threads, vCPUs, what its configuration says of them) is there when its constructor returns. They may return without a
checkpoint: other tasks run when the pause is over.

Order of the end: a machine whose memory is complete can be closed before or after its pager. One whose memory is still
missing pages must be closed *before*: a vCPU is brought out by a signal where the kernel lets it, while a pager that
ends first must poison what is missing, and a vCPU that meets a poisoned page takes the whole process with it (SIGBUS).
Where no signal reaches it (in O_DIRECT, on some hosts' KVM) `close` gives up after its time, the memory is kept, and
the pager can be closed, which lets go of what waits: then `close` again. Memory is unmapped when both have let go of
it.
"""

from __future__ import annotations

import abc
import contextlib
import enum
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from postcopy._blocking import run_sync
from postcopy._files import replacing
from postcopy.errors import PostcopyError, ProtocolError, ResourceError
from postcopy.memory import DirtyLog, Memory

if TYPE_CHECKING:
    from postcopy.dataplane.recorder import Recorder

CLOSE_TIMEOUT_S = 5.0
"""How long the end of a machine waits for its threads, by default."""


@dataclass(frozen=True)
class RamBlock:
    """One piece of a machine's memory; its index in `Machine.blocks` is its number on the wire."""

    name: str
    memory: Memory
    shard: int  # the userfaultfd that a destination registers it with


@dataclass(frozen=True)
class BlockLayout:
    """A block as the source offers it."""

    name: str
    size_bytes: int
    page_bytes: int  # of the source's memory


@dataclass(frozen=True)
class Extent:
    """Where pages of a block are mapped in the process that runs the machine."""

    block: int
    first_page: int
    pages: int
    address: int


Adopt = Callable[[int, int, Sequence[Extent]], Awaitable[None]]
"""Takes a userfaultfd (the descriptor is the callee's from then on), the features that it was opened with, and the
memory that it guards: from its return on every page that is missing there is brought. Once for each shard, in their
order."""


TellEarly = Callable[[bytes], None]
"""Takes a piece of the state that is final, to be sent to the destination meanwhile; an empty one says that some will
come."""


class MachineState(enum.StrEnum):
    CREATED = "created"  # neither booted nor loaded
    PAUSED = "paused"
    RUNNING = "running"
    FAILED = "failed"  # a vCPU stopped for good


class Activity(enum.StrEnum):
    """Where a vCPU is."""

    PARKED = "parked"
    GUEST = "guest"  # computing, or blocked on a missing page
    DEVICE = "device"
    HALTED = "halted"
    DISK = "disk"
    NET = "net"
    GONE = "gone"


@dataclass(frozen=True)
class VcpuStatistics:
    tid: int  # kernel thread
    activity: Activity
    exits: int  # from the guest, on this host
    reports: int  # this and the following move with the machine
    operations: int
    failures: int  # reported by the guest


@dataclass(frozen=True)
class MachineStatistics:
    state: MachineState
    vcpus: tuple[VcpuStatistics, ...] = ()
    ready: bool = True  # the guest has built up its working set
    nonce: int = 0  # made by the guest at boot and kept in its memory only; 0: not announced on this host
    failures: int = 0  # reported by the guest
    failure_text: str = ""  # the first of them, one line
    first_run_ns: int = 0  # CLOCK_MONOTONIC of the first entry into the guest after the last resume; 0: not yet
    paused_ns: int = 0  # CLOCK_MONOTONIC of the end of the last pause; 0: never
    disk_reads: int = 0
    disk_writes: int = 0
    disk_bytes: int = 0
    disk_errors: int = 0
    serial_bytes: int = 0  # written by the guest to its serial port
    net_received: int = 0  # frames
    net_sent: int = 0
    net_dropped: int = 0  # too long, or not taken by the host
    net_errors: int = 0  # requests refused

    @property
    def operations(self) -> int:
        return sum(vcpu.operations for vcpu in self.vcpus)

    @property
    def reports(self) -> int:
        return sum(vcpu.reports for vcpu in self.vcpus)


@dataclass(frozen=True)
class Check:
    """The verdict of `Machine.verify`."""

    ok: bool
    what: str  # what was verified, or what is wrong: one line
    how: str  # by what means
    counts: Mapping[str, int] = field(default_factory=dict)
    nonce: int = 0  # that of `MachineStatistics`, as it is in the machine's memory

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self)


class Machine(abc.ABC):
    """A machine on one side. An asynchronous context manager: leaving it closes it."""

    kind: str
    live: bool
    """Whether it has CPUs: runs, can touch memory on its own, and can fail."""
    kernel_faults: bool
    """Whether the kernel touches missing memory on its behalf, as KVM does: a userfaultfd for user-mode faults only,
    which every user may have, is then not enough."""
    outlives: ClassVar[bool] = False
    """Whether it is a process of its own, which runs on when this one lets go of it (`close`), until `destroy`."""
    lends: ClassVar[bool] = False
    """Whether a destination's memory is mapped by another process, whose userfaultfds come from there: by `lend`, or
    where memory is mapped only while the state is loaded, by `load_and_map`. (Its blocks have sizes until then, and no
    address: what arrives of them before is staged.)"""

    async def prepare(self) -> None:  # noqa: B027 -- most machines are there when they have been made
        """What takes time, or waits for others, before `blocks` are looked at and anything depends on it: at the
        destination before the offer is accepted. Once. Cancellable. Errors as for making the machine."""

    @property
    @abc.abstractmethod
    def blocks(self) -> Sequence[RamBlock]:
        """The RAM blocks, in the order of their numbers."""

    @property
    def shards(self) -> int:
        """How many userfaultfds a destination gives it."""
        return 1 + max((block.shard for block in self.blocks), default=0)

    @property
    def memory_bytes(self) -> int:
        return sum(block.memory.size_bytes for block in self.blocks)

    @property
    def layout(self) -> list[BlockLayout]:
        """The blocks as they are offered to a destination."""
        return [BlockLayout(block.name, block.memory.size_bytes, block.memory.page_bytes) for block in self.blocks]

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """What a destination needs, beside the layout, to make this machine's twin: a msgpack map."""

    @abc.abstractmethod
    async def boot(self) -> None:
        """Source only, once: from created to paused, ready to be resumed."""

    @abc.abstractmethod
    async def resume(self) -> None:
        """Lets it run. Does nothing when it runs already."""

    @contextlib.asynccontextmanager
    async def settled(self) -> AsyncIterator[None]:
        """Source, while it runs: inside, nothing is under way that writes to its memory in a way which page tables do
        not show, as a disk does to pages that were pinned before; around each look at the dirty log. It runs again
        afterwards, also after an error or when cancelled. Bounded in time; `MigrationError`."""
        yield

    async def before_pause(self, early: TellEarly | None = None) -> None:  # noqa: B027
        """Source: a `pause` follows at once. Does what would make that longer; it may have stopped when this returns,
        and then `statistics` has since when. Cancellable, and then, or after an error, it runs; bounded in time.

        What the state begins with, where it is final already, and what loading it touches no memory, can be given to
        `early`, piece by piece; `save_state` returns the rest. Where that is missing the destination knows no early
        state."""

    @abc.abstractmethod
    async def pause(self, timeout_s: float = 10.0) -> None:
        """Stops it; when this returns nothing changes its memory or state any more. `MigrationError` when it does not
        stop in time: it then runs on. Seen through when cancelled: it may then be paused, `statistics` tells."""

    @property
    def network(self) -> dict[str, str] | None:
        """Where it can be reached, for a report: `net`, `mac`, `address`. None when it has no network."""
        return None

    @property
    def process(self) -> tuple[int, str] | None:
        """Of one that `outlives`, once it is known: the number of its process, and the path of its API socket."""
        return None

    async def claim_network(self) -> None:  # noqa: B027 -- most machines have none
        """Destination, once it runs here: the link goes up, and it is announced where the machine now is. Raises
        nothing that is a matter of the network: a machine without one runs on."""

    async def release_network(self) -> None:  # noqa: B027
        """Source, once it was committed to the destination: the link goes down. Raises as little."""

    def dirty_log(self) -> DirtyLog:
        """From here on every page of `blocks` that is written, by the machine or on its behalf, is in the log, whose
        indices are those of the blocks. Source only; closed by the caller, before the machine. `ResourceError` where
        that cannot be known. Takes as long as the page tables are large: for a worker thread."""
        raise ResourceError(
            f"a machine of kind {self.kind} cannot tell what it writes: it cannot be copied while it runs",
            "leave precopy out (--precopy off)",
        )

    @abc.abstractmethod
    async def save_state(self) -> bytes:
        """All state outside of memory of the paused machine."""

    @abc.abstractmethod
    async def load_state(self, state: bytes) -> None:
        """Destination only, once: from created to paused. `state` comes from a peer and is checked; an error is a
        `PostcopyError`, after which the machine can only be closed.

        It may touch memory, as real machines do: the page server answers by then (protocol 4), and a page that is
        missing comes as any other. With an older peer it does not, and nothing says that one ever will: so it never
        runs in the Trio thread, and is bounded in time (`MigrationError`); cancellable at once, what hangs is left to
        `close`."""

    async def load_early(self, state: bytes) -> None:
        """Destination: a piece of what the state begins with, before `load_state` gets the rest; it may be loaded at
        once. Which pages the machine has is not known for good yet: the source sends nothing that depends on it.
        Otherwise as `load_state`, but that it is not waited for until it has been loaded."""
        raise ProtocolError(f"early-state: a machine of kind {self.kind} has none")

    async def lend(self, adopt: Adopt) -> None:  # noqa: B027 -- most memory is mapped here
        """Destination, of one that `lends`: gives its userfaultfds away, if it has them already. It is known by then
        which pages there are, and none has come. Nothing here reads memory that was lent before it is whole: a hole
        would become a page of zeros, and no fault."""

    async def load_and_map(self, state: bytes, adopt: Adopt) -> None:
        """`load_state` of one that `lends` and has lent nothing yet: it gives its userfaultfds away as soon as there
        are any."""
        await self.load_state(state)

    async def made_whole(self) -> None:  # noqa: B027
        """Destination: every page is there, and nothing is registered or depends on the pager any more. Shielded,
        bounded in time; what it raises is logged, and changes nothing."""

    @abc.abstractmethod
    def vcpu_threads(self) -> list[int]:
        """Kernel thread ids, by vCPU number; for `Pager.track_thread`."""

    @abc.abstractmethod
    def statistics(self) -> MachineStatistics:
        """Counters as they are now. Does not block."""

    def be_recorded(self, recorder: Recorder) -> None:  # noqa: B027 -- most machines count nothing
        """Has the recorder look at what its guest counts, until `close`."""

    @abc.abstractmethod
    async def verify(self) -> Check:
        """Checks the memory from outside, by what only this machine knows about it. Paused, all pages there."""

    @abc.abstractmethod
    async def wait_ready(self) -> None:
        """Returns when it has built up its working set; raises `MigrationError` when it fails before. Cancellable."""

    @abc.abstractmethod
    async def wait_changed(self) -> None:
        """Returns when `statistics` may say something else than before the call: the first run after a `resume`, ready,
        reports, failures, the state.
        Any number of tasks may wait. Cancellable; `trio.ClosedResourceError` when the machine is closed."""

    @abc.abstractmethod
    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Ends it and lets go of its memory (see the order above). Twice does no harm. Shielded from cancellation,
        bounded in time; `MigrationError` when a thread of it does not end within `timeout_s`, whatever it may still
        touch is then kept, and it can be called again."""

    async def destroy(self) -> None:
        """The end of a machine that has left this host, or that nobody wants any more: `close`, and nothing of it runs
        on."""
        await self.close()

    @property
    def dump_bytes(self) -> int:
        """How long a dump of its memory is."""
        return self.memory_bytes

    async def dump(self, path: str | os.PathLike[str]) -> None:
        """Writes the memory to a file, block after block, sparse where it is zero. Paused, all pages there.

        The file appears when it is complete and on the disk (`_files.replacing`). Cancellation leaves the worker thread
        to finish. `PostcopyError` when the file cannot be written.
        """
        memories = [block.memory for block in self.blocks]
        # When abandoned it finds, at the latest at the next block, that the memory is closed.
        await run_sync(_dump, memories, self.dump_bytes, os.fspath(path), abandon_on_cancel=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _dump(memories: Sequence[Memory], size_bytes: int, path: str) -> None:
    try:
        with replacing(path) as fd:
            offset = 0
            for memory in memories:
                memory.dump(fd, offset)
                offset += memory.size_bytes
            os.ftruncate(fd, size_bytes)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PostcopyError(f"dump to {path}: {reason or error}") from error
