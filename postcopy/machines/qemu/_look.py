# SPDX-License-Identifier: Apache-2.0
"""What a QEMU has, as it and the kernel say, and what of it cannot be moved.

**Memory.** With capability ``x-ignore-shared`` QEMU leaves blocks of memory that are shared out of its stream: these
are ours. All others, as ROMs, travel in the stream, in the pause, and so must be small. A block that is ours is a
memory backend whose file we can open: which file that is is told by the mappings of the process, since the path that
QEMU was given may be a directory, or gone. Memory that somebody else writes to as well (vhost-user, ivshmem), or that
comes and goes in pieces (virtio-mem), is refused by name.

Both sides look, before anything is changed. Nothing here changes QEMU, and nothing that it says is trusted.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from postcopy._blocking import run_sync
from postcopy._fd import FdHolder
from postcopy._native import lib
from postcopy.errors import ConfigurationError, MigrationError, PostcopyError
from postcopy.machines._maps import Area, areas, may_not
from postcopy.machines._memory_files import boot_id
from postcopy.machines._peer import Process, one_line
from postcopy.machines.preload.client import is_in_memory
from postcopy.machines.qemu.qmp import Monitor, QemuAnswer
from postcopy.memory import Memory
from postcopy.units import format_size

OLDEST = (4, 0)
"""The first version that can leave shared memory out."""
MEMFD_TRAVELS = (8, 0)
"""Memory that has no named file travels though it is shared: since 8.0 or 8.1 (seen in 10.0, not in 7.2)."""
MAX_OWN_BYTES = 32 << 20
"""The largest block that may travel in QEMU's own stream: video memory has 16 MiB, nearly all of them zeros."""
MAX_BLOCKS = 64
PAGE_SIZES = (int(lib.pc_page_bytes()), 2 << 20)
FILE_BACKEND = "memory-backend-file"

# They write to pages that were pinned before, whatever the cache: as a SCSI device that is passed through does.
_PINNING_DRIVERS = frozenset(
    {"host_device", "nvme", "io_uring", "nvme-io_uring", "virtio-blk-vfio-pci", "virtio-blk-vhost-vdpa"}
)
# What has a RAM block or gives the guest's memory to others, in a way that is not known here to be moved right.
_REFUSED_DEVICES = (
    (r"vhost-user-.*", "another process reads and writes the guest's memory for it"),
    (r"vhost-vdpa-.*|vfio-.*", "hardware writes to the guest's memory for it"),
    (r"ivshmem-.*", "its memory is shared with others"),
    (r"virtio-mem(-.*)?", "its memory is plugged in pieces while it runs"),
    (r"virtio-pmem(-.*)?|nvdimm|nvdimm-.*", "its memory is persistent, and belongs to this host"),
)
_REFUSED_NETS = re.compile(r"type=(vhost-user|vhost-vdpa)\b")
_ONLY_NAME = os.O_PATH | os.O_CLOEXEC
_CHILD = re.compile(r"child<(.*)>")
_MEMFD = "/memfd:"

_Text = Annotated[str, Meta(max_length=4096)]
_Version = Annotated[str, Meta(pattern=r"\A[0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4}\Z")]


class FileIdentity(msgspec.Struct, frozen=True):
    """Which file a block's memory is in."""

    device: int
    inode: int


class Config(msgspec.Struct, frozen=True):
    """What a source offers, beside the layout of its memory."""

    version: _Version  # as 7.2.22
    machine: _Text  # with its version, as pc-i440fx-7.2
    accelerator: _Text
    cpu: _Text  # its model, as qemu64-x86_64-cpu
    vcpus: Annotated[int, Meta(ge=1, le=1 << 16)]
    boot: _Text  # which host that is: the kernel's boot id
    files: Annotated[list[FileIdentity], Meta(max_length=MAX_BLOCKS)]  # of the blocks, in their order


@dataclass(frozen=True)
class Backend:
    """A memory backend of QEMU's that is ours to move."""

    name: str
    size_bytes: int
    page_bytes: int
    address: int  # in QEMU
    identity: FileIdentity
    path: str  # as the kernel shows it
    registered: frozenset[str]
    """What is registered with a userfaultfd: missing pages ("um", "ui"), writes ("uw")."""
    _pid: int

    def open(self) -> Memory:
        """The same file, here. Blocks."""
        fd = _open_file(self._pid, self.identity, os.O_RDWR)
        try:
            return Memory.from_shared_file(fd, self.size_bytes, self.page_bytes)
        finally:
            os.close(fd)


@dataclass(frozen=True)
class Look:
    config: Config
    backends: tuple[Backend, ...]  # by name
    threads: tuple[int, ...]  # of the vCPUs, by number
    blocks: tuple[tuple[str, int], ...]
    """All of QEMU's blocks of memory that travel, in the stream or by us: names and sizes."""
    has_disks: bool
    pins: tuple[str, ...]
    """Block nodes that write to pages of the guest's memory which were pinned before (O_DIRECT)."""


async def look(monitor: Monitor, process: Process) -> Look:
    """All that has to be known of a QEMU. A `PostcopyError` says what of it cannot be moved, and what to do."""
    if monitor.version < OLDEST:
        raise ConfigurationError(
            f"a QEMU of version {_dotted(monitor.version)} cannot be moved: that needs 4.0 or newer"
        )
    threads, cpu = await _vcpus(monitor, process)
    await _check_devices(monitor)
    blocks = await ram_blocks(monitor)
    wanted = await _shared_backends(monitor, blocks)
    backends = await run_sync(_find, process.pid, wanted)
    has_disks, pins = await look_at_disks(monitor)
    kvm = _convert(await monitor.execute("query-kvm"), _Kvm, "query-kvm")
    machine = _text(await monitor.execute("qom-get", {"path": "/machine", "property": "type"}))
    config = Config(
        _dotted(monitor.version),
        machine.removesuffix("-machine"),
        "kvm" if kvm.enabled else "tcg",
        cpu,
        len(threads),
        await run_sync(boot_id),
        [backend.identity for backend in backends],
    )
    return Look(config, backends, threads, blocks, has_disks, pins)


class _Kvm(msgspec.Struct):
    enabled: bool


class _Vcpu(msgspec.Struct, rename={"index": "cpu-index", "thread": "thread-id", "path": "qom-path"}):
    index: int
    thread: int
    path: str


class _Memdev(msgspec.Struct):
    size: int
    share: bool = False
    id: str = ""


class _Cache(msgspec.Struct):
    direct: bool = False


class _Node(msgspec.Struct, rename={"node": "node-name"}):
    drv: str
    file: str
    node: str = ""
    cache: _Cache | None = None


class _Child(msgspec.Struct):
    name: str
    type: str

    @property
    def kind(self) -> str:
        """Its type, when it is an object of its own."""
        found = _CHILD.fullmatch(self.type)
        return found[1] if found else ""


def _convert(said: object, kind: Any, command: str) -> Any:
    try:
        return msgspec.convert(said, kind)
    except msgspec.ValidationError as error:
        raise QemuAnswer(f"QEMU answers {command} with what makes no sense: {one_line(error)[:200]}") from error


def _text(said: object) -> str:
    return one_line(said) if isinstance(said, str) else ""


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


# ---- what QEMU says


async def _vcpus(monitor: Monitor, process: Process) -> tuple[tuple[int, ...], str]:
    """The threads of the vCPUs, and their model."""
    vcpus = _convert(await monitor.execute("query-cpus-fast"), list[_Vcpu], "query-cpus-fast")
    threads = tuple(one.thread for one in sorted(vcpus, key=lambda one: one.index))
    if not threads:
        raise QemuAnswer("QEMU says that it has no CPU")
    if not _has_threads(process.pid, threads):
        raise ConfigurationError(
            f"the monitor at {monitor.path} is served by process {process.pid}, which is not the QEMU: give QEMU a"
            " monitor of its own (-qmp unix:PATH,server=on,wait=off), and run this in its pid namespace"
        )
    return threads, _text(await monitor.execute("qom-get", {"path": vcpus[0].path, "property": "type"}))


def _has_threads(pid: int, threads: Iterable[int]) -> bool:
    return all(os.path.exists(f"/proc/{pid}/task/{thread}") for thread in threads)


async def _check_devices(monitor: Monitor) -> None:
    for path in ("/machine/peripheral", "/machine/peripheral-anon", "/objects"):
        for child in _convert(await monitor.execute("qom-list", {"path": path}), list[_Child], "qom-list"):
            for pattern, why in _REFUSED_DEVICES:
                if re.fullmatch(pattern, child.kind):
                    raise ConfigurationError(
                        f"QEMU has the device {one_line(child.name)} ({child.kind}), which cannot be moved: {why}; take"
                        " it out, or use another device"
                    )
    nets = await _human(monitor, "info network")
    if found := _REFUSED_NETS.search(nets):
        raise ConfigurationError(
            f"QEMU has a network of type {found[1]}, which cannot be moved: another process, or hardware, writes to the"
            " guest's memory for it; use -netdev tap"
        )


async def _human(monitor: Monitor, command: str) -> str:
    said = await monitor.execute("human-monitor-command", {"command-line": command})
    return said if isinstance(said, str) else ""


async def ram_blocks(monitor: Monitor) -> tuple[tuple[str, int], ...]:
    """Names and sizes of QEMU's blocks of memory. One without a name belongs to no device, and does not travel."""
    found = map(_ram_block, (await _human(monitor, "info ramblock")).splitlines())
    blocks = tuple((name.removeprefix("/objects/"), size_bytes) for name, size_bytes in found if name)
    if not blocks:
        raise QemuAnswer("QEMU does not say what blocks of memory it has (info ramblock)")
    return blocks


def _ram_block(line: str) -> tuple[str, int]:
    """Of a row "NAME 4 KiB 0xOFFSET 0xUSED 0xTOTAL ..."; no name for any other line. (Not by a regular expression: what
    goes back and forth over blanks takes minutes for a line of some thousand of them.)"""
    before, *numbers = line.split(" 0x")
    *name, number, unit = ["", "", *before.rsplit(None, 2)]
    size = numbers[2].strip() if len(numbers) > 2 else ""
    if not re.fullmatch("[0-9a-f]{1,16}", size) or not number.isdecimal() or not unit.endswith("B"):
        return "", 0
    return "".join(name).strip(), int(size, 16)


@dataclass(frozen=True)
class _Wanted:
    name: str
    size_bytes: int
    kind: str
    path: str  # mem-path: of a file, or of a directory


async def _shared_backends(monitor: Monitor, blocks: Iterable[tuple[str, int]]) -> list[_Wanted]:
    """The backends that QEMU leaves out of its stream. `ConfigurationError` for what it cannot be told to."""
    said = _convert(await monitor.execute("query-memdev"), list[_Memdev], "query-memdev")
    backends = {one.id: one for one in said if one.id}
    children = _convert(await monitor.execute("qom-list", {"path": "/objects"}), list[_Child], "qom-list")
    kinds = {child.name: child.kind for child in children}
    wanted: list[_Wanted] = []
    for name, size_bytes in blocks:
        backend = backends.get(name)
        kind = kinds.get(name, "")
        if backend is None or not backend.share:
            # Of `-m` alone QEMU says that it is a backend, too, of a name that no -object has.
            _check_own_block(name, size_bytes, is_backend=backend is not None and kind != "memory-backend-ram")
            continue
        if len(wanted) == MAX_BLOCKS:
            raise ConfigurationError(f"QEMU has more than {MAX_BLOCKS} memory backends, which cannot be moved")
        if backend.size != size_bytes:
            raise QemuAnswer(f"QEMU says that {name} has {backend.size} bytes, and {size_bytes}")
        _check_backend(name, size_bytes, kind, monitor.version)
        path = ""
        if kind == FILE_BACKEND:
            asked = {"path": f"/objects/{name}", "property": "mem-path"}
            path = str(await monitor.execute("qom-get", asked))
            for flag in ("pmem", "readonly"):
                if await monitor.execute("qom-get", {"path": f"/objects/{name}", "property": flag}) is True:
                    raise ConfigurationError(
                        f"memory backend {name} has {flag}=on, which cannot be moved: leave it out"
                    )
        wanted.append(_Wanted(name, size_bytes, kind, path))
    if not wanted:
        raise ConfigurationError(_remedy("no memory of this QEMU is shared", "ram0", sum(size for _, size in blocks)))
    return sorted(wanted, key=lambda one: one.name)


def _check_own_block(name: str, size_bytes: int, *, is_backend: bool) -> None:
    """A block that travels in QEMU's stream."""
    if size_bytes <= MAX_OWN_BYTES:
        return
    size, shown = format_size(size_bytes), one_line(name)
    if is_backend:
        raise ConfigurationError(
            f"memory backend {shown} of {size} is private to QEMU, so that it would be sent in the pause: add share=on"
            f" to its -object {FILE_BACKEND},id={shown},..."
        )
    if "/" in shown:
        raise ConfigurationError(
            f"a device has {size} of memory of its own ({shown}), which would be sent in the pause: give it no more"
            f" than {format_size(MAX_OWN_BYTES)} (as -device VGA,vgamem_mb=16), or leave it out"
        )
    raise ConfigurationError(_remedy(f"memory of {size} ({shown}) is private to QEMU", "ram0", size_bytes))


def _remedy(what: str, name: str, size_bytes: int) -> str:
    return (
        f"{what}: start it with -object {FILE_BACKEND},id={name},size={size_bytes >> 20}M,mem-path=/dev/shm/NAME,"
        f"share=on -machine ...,memory-backend={name}"
    )


def _check_backend(name: str, size_bytes: int, kind: str, version: tuple[int, ...]) -> None:
    unnamed = kind == "memory-backend-memfd" and version < MEMFD_TRAVELS
    if kind != FILE_BACKEND and not unnamed:
        raise ConfigurationError(
            f"memory {one_line(name)} of {format_size(size_bytes)} is a {kind or 'backend of an unknown kind'}, which"
            f" QEMU {_dotted(version)} sends itself, in the pause: use -object {FILE_BACKEND},id={one_line(name)},"
            f"size={size_bytes >> 20}M,mem-path=/dev/shm/NAME,share=on"
        )


async def look_at_disks(monitor: Monitor) -> tuple[bool, tuple[str, ...]]:
    """Whether QEMU has files that it reads and writes, and which of them write to memory that was pinned before."""
    said = await monitor.execute("query-named-block-nodes", {"flat": True} if monitor.version >= (5, 0) else None)
    nodes = _convert(said, list[_Node], "query-named-block-nodes")
    pins = {
        one_line(node.file or node.node)
        for node in nodes
        if node.drv in _PINNING_DRIVERS or (node.cache is not None and node.cache.direct)
    }
    return any(node.file for node in nodes), tuple(sorted(pins))


# ---- what the kernel says


def _find(pid: int, wanted: Iterable[_Wanted]) -> tuple[Backend, ...]:
    """The files of the backends. Blocks, as long as QEMU's page tables are large."""
    mappings = list(_shared_files(pid))
    backends = []
    for one in wanted:
        fitting = [mapping for mapping in mappings if mapping.size_bytes == one.size_bytes and mapping.offset == 0]
        found = [mapping for mapping in fitting if _is_of(pid, mapping, one)]
        if len(found) != 1:
            shown = ", ".join(mapping.path for mapping in found or fitting) or "none that is as large"
            raise ConfigurationError(
                f"in which file QEMU (process {pid}) has memory {one.name} of {format_size(one.size_bytes)} is not"
                f" certain ({one_line(shown)}): give each memory backend a mem-path= of its own, a file of just this"
                " size"
            )
        backends.append(_backend(pid, one, found[0]))
    if len({backend.identity for backend in backends}) != len(backends):
        raise ConfigurationError("two memory backends of this QEMU are in the same file: give each one of its own")
    return tuple(backends)


def _backend(pid: int, wanted: _Wanted, mapping: Area) -> Backend:
    identity = FileIdentity(mapping.device, mapping.inode)
    fd = _open_file(pid, identity, os.O_RDWR)
    try:
        size_bytes, page_bytes, in_memory = os.fstat(fd).st_size, os.fstatvfs(fd).f_bsize, is_in_memory(fd)
    finally:
        os.close(fd)
    if not in_memory:
        raise ConfigurationError(
            f"memory {wanted.name} of QEMU is the file {one_line(mapping.path)} on a disk: put it on a tmpfs, as"
            " /dev/shm, or on a hugetlbfs"
        )
    if page_bytes not in PAGE_SIZES:
        raise ConfigurationError(
            f"memory {wanted.name} of QEMU has pages of {format_size(page_bytes)}, which cannot be moved: use a"
            " hugetlbfs of 2 MiB pages, or a tmpfs"
        )
    if size_bytes != wanted.size_bytes:
        raise ConfigurationError(
            f"memory {wanted.name} of QEMU has {format_size(wanted.size_bytes)}, and its file {one_line(mapping.path)}"
            f" {format_size(size_bytes)}: give it a file of just this size"
        )
    return Backend(
        wanted.name,
        size_bytes,
        page_bytes,
        mapping.start,
        identity,
        mapping.path,
        mapping.flags & {"um", "ui", "uw"},
        pid,
    )


def _shared_files(pid: int) -> Iterator[Area]:
    """The files that QEMU has mapped shared and writable; one for what the kernel has cut in several."""
    last: Area | None = None
    for one in areas(pid, f"QEMU (process {pid})", flags=True):
        if one.rights != "rw-s" or not one.inode:
            continue
        if last is not None and (last.end, last.offset + last.size_bytes, last.device, last.inode) == (
            one.start,
            one.offset,
            one.device,
            one.inode,
        ):
            last = replace(last, end=one.end, flags=last.flags | one.flags)
            continue
        if last is not None:
            yield last
        last = one
    if last is not None:
        yield last


def _is_of(pid: int, mapping: Area, wanted: _Wanted) -> bool:
    """Whether a mapping is that of a backend."""
    if wanted.kind != FILE_BACKEND:
        return mapping.path.startswith(_MEMFD)
    path = re.sub(r"^/(?:dev|proc/(?:self|\d+))/fd/(?=\d+$)", f"/proc/{pid}/fd/", wanted.path)
    try:
        status = os.stat(path if path.startswith(f"/proc/{pid}/fd/") else _inside(pid, path))
    except (OSError, ValueError):  # it was removed since
        return mapping.path == f"{wanted.path} (deleted)"
    if stat.S_ISDIR(status.st_mode):  # QEMU has made a file there, and removed its name
        name = re.escape(wanted.name.replace("/", "_"))
        return (
            re.fullmatch(rf"qemu_back_mem\.(_objects_)?{name}\.\S+ \(deleted\)", os.path.basename(mapping.path))
            is not None
        )
    return (status.st_dev, status.st_ino) == (mapping.device, mapping.inode)


def _inside(pid: int, path: str) -> str:
    """A path as that process sees it."""
    directory = "root" if path.startswith("/") else "cwd"
    return f"/proc/{pid}/{directory}/{path.lstrip('/')}"


def _open_file(pid: int, identity: FileIdentity, flags: int) -> int:
    """A descriptor of a file that the process has open."""
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            # O_PATH opens nothing yet: by its name it could be a device by then, which root may open and QEMU may not.
            with (
                contextlib.suppress(FileNotFoundError),
                FdHolder(os.open(f"/proc/{pid}/fd/{name}", _ONLY_NAME)) as file,
            ):
                if _is_file(os.fstat(file.fd), identity):
                    return os.open(f"/proc/self/fd/{file.fd}", flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        raise may_not(f"QEMU (process {pid})") from error
    except (FileNotFoundError, ProcessLookupError):
        raise MigrationError(f"QEMU (process {pid}) has ended") from None
    except OSError as error:
        raise PostcopyError(f"the file of the memory of QEMU (process {pid}): {error.strerror}") from error
    raise MigrationError(f"QEMU (process {pid}) has its memory in a file that it has not open any more")


def _is_file(status: os.stat_result, identity: FileIdentity) -> bool:
    return stat.S_ISREG(status.st_mode) and FileIdentity(status.st_dev, status.st_ino) == identity


def same_host_and_file(mine: Config, other: Config) -> bool:
    """Whether two QEMUs have a file of memory in common."""
    return mine.boot == other.boot and bool(set(mine.files) & set(other.files))
