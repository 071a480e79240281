# SPDX-License-Identifier: Apache-2.0
"""What is left of a migration whose other side is lost for good: each side writes what it has, `merge` joins the two,
and a machine can be started again from it (`restore`).

When the network fails after the point of no return and one host never comes back, the machine's memory is in two
places: what has arrived is at the destination, where the machine may have changed it; the rest is at the source, as it
was at the pause. A *salvage* is a directory with the memory of one side and a map of the pages for which that side can
speak. A page of the destination's map comes from there, every other one from the source. A page for which neither
can speak is *in doubt*, and named.

Beside the memory is the state of the machine's devices, where the machine could be paused. State and memory must be of
the same moment: that of the destination goes with what both sides have together, that of the source with the source's
memory alone, which is the machine as it was at the switchover.

A salvage is written beside its name and renamed when it is complete and on the disk: one that is there is whole.
Nothing that was there before is overwritten. What is read from one is checked like what comes from a peer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import trio
from msgspec import Meta, Struct, structs

from postcopy._blocking import run_sync
from postcopy._files import (
    check_new_directory,
    check_new_file,
    locked_directory,
    new_directory,
    open_regular,
    read_regular,
    replacing,
    write_all,
    write_new,
)
from postcopy.errors import ConfigurationError, PostcopyError, ProtocolError, ResourceError
from postcopy.machines import BlockLayout, Machine
from postcopy.memory import MemoryKind
from postcopy.memory.bitmap import Bitmap
from postcopy.migration.destination import MakeMachine
from postcopy.units import format_size
from postcopy.wire import one_line
from postcopy.wire.messages import MAX_BLOCKS

VERSION = 1
SOURCE, DEST, MERGED = "source", "dest", "merged"  # sides
STARTED = "started"  # a file in one that a machine has been started from
PAUSE_TIMEOUT_S = 2.0
COPY_BYTES = 4 << 20
MAX_RANGES = 10_000  # of pages in doubt that are listed; their number is always given
MAX_MANIFEST_BYTES = 1 << 20
MAX_STATE_BYTES = 16 << 20
MAX_STARTED_BYTES = 1000


def check_target(path: str) -> None:
    """`ConfigurationError` when no salvage could be written there: to be found out while nothing is lost yet."""
    check_new_directory("--salvage", path)


async def write(path: str, machine: Machine, migration: str, side: str, maps: Sequence[Bitmap]) -> bool:
    """Writes what this side has: the memory's content as far as it is there, and `maps`, a bitmap a RAM block in the
    memory's own pages, of what it can speak for. Touches no page that is missing.

    The machine is paused if that is possible. True when it was, and its state is there too: a machine with a vCPU that
    waits for a page which never comes cannot always be paused; what it still writes meanwhile may be torn. Blocks on
    I/O in a worker thread, which sees it through when cancelled. `PostcopyError` when it cannot be written.
    """
    state: bytes | None = None
    with contextlib.suppress(PostcopyError):  # the manifest says so
        await machine.pause(PAUSE_TIMEOUT_S)
        state = await machine.save_state()
    blocks = tuple(
        Block(block.name, block.memory.size_bytes, block.memory.page_bytes, known.count())
        for block, known in zip(machine.blocks, maps, strict=True)
    )
    manifest = Manifest(
        format="postcopy-salvage",
        version=VERSION,
        migration=migration,
        side=side,
        machine=machine.kind,
        config=machine.config(),
        paused=state is not None,
        blocks=blocks,
    )
    call = partial(_write, path, machine, maps, manifest, state)
    try:
        await run_sync(call)
    except ResourceError:  # no thread: nothing else is left here that would have to wait
        call()
    return state is not None


def _write(path: str, machine: Machine, maps: Sequence[Bitmap], manifest: Manifest, state: bytes | None) -> None:
    with _writing(f"salvage to {path}"), new_directory(path) as part:
        for number, (block, known) in enumerate(zip(machine.blocks, maps, strict=True)):
            with write_new(_memory_of(part, number)) as file:
                if block.memory.kind is MemoryKind.FILE:
                    _copy(block.memory.fd, 0, block.memory.file_bytes, file, 0)
                else:
                    block.memory.dump(file)
                os.ftruncate(file, block.memory.size_bytes)
            _write_file(_map_of(part, number), known.rle_encode())
        _write_rest(part, manifest, state)


@contextlib.contextmanager
def _writing(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PostcopyError(f"{what}: {error.strerror or error}") from error
    except MemoryError:
        raise ResourceError(f"{what}: out of memory", "allow this process more") from None


def _write_rest(part: Path, manifest: Manifest, state: bytes | None) -> None:
    if state is not None:
        _write_file(part / "state", state)
    _write_file(part / "manifest.json", msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def _write_file(path: Path, data: bytes) -> None:
    with write_new(path) as fd:
        write_all(fd, data)


def _memory_of(path: Path, number: int) -> Path:
    return path / f"{number:02}.memory"


def _map_of(path: Path, number: int) -> Path:
    return path / f"{number:02}.map"


# ---- reading them, and joining two


_Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"\A[ -.0-~]+\Z")]
"""ASCII without ``/``."""


class Block(Struct, frozen=True, rename="kebab"):
    name: _Name
    size_bytes: Annotated[int, Meta(ge=1, le=1 << 44)]
    page_bytes: Annotated[int, Meta(ge=512, le=1 << 30)]
    pages: int = 0  # that are known, as the manifest says; the map counts

    def __post_init__(self) -> None:
        if self.page_bytes & (self.page_bytes - 1):
            raise ValueError(f"{self.page_bytes} is no power of two")

    @property
    def all_pages(self) -> int:
        return -(-self.size_bytes // self.page_bytes)


class _Head(Struct, frozen=True):
    """What manifests of every version have."""

    format: Literal["postcopy-salvage"]
    version: int


class Manifest(_Head, frozen=True, kw_only=True):
    migration: _Name
    side: Annotated[str, Meta(pattern=r"\A(source|dest|merged)\Z")]
    machine: _Name
    config: dict[str, Any]
    paused: bool
    blocks: Annotated[tuple[Block, ...], Meta(min_length=1, max_length=MAX_BLOCKS)]


@dataclass(frozen=True)
class Salvage:
    """One that was read and checked; the memory stays in its files."""

    path: Path
    manifest: Manifest

    def known(self, number: int) -> Bitmap:
        """The pages of a block for which it can speak."""
        pages = self.manifest.blocks[number].all_pages
        with self._reading(f"the map of block {number}"):
            # Every other page is the worst case, of about two bytes a page.
            runs = read_regular(_map_of(self.path, number), 4 * pages + 64, follow=False)
            return Bitmap.rle_decode(runs, pages)

    def open_memory(self, number: int) -> int:
        """A descriptor, the caller's, of a block's memory."""
        with self._reading(f"the memory of block {number}"):
            fd = open_regular(_memory_of(self.path, number), follow=False)
            found_bytes, size_bytes = os.fstat(fd).st_size, self.manifest.blocks[number].size_bytes
            if found_bytes != size_bytes:
                os.close(fd)
                raise PostcopyError(f"{found_bytes} bytes, not {size_bytes}")
            return fd

    def state(self) -> bytes | None:
        """Of the machine's devices, where it could be paused."""
        with self._reading("the machine's state"):
            return read_regular(self.path / "state", MAX_STATE_BYTES, follow=False) if self.manifest.paused else None

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, PostcopyError) as error:
            raise ConfigurationError(f"{self.path}: {what} is unusable: {_reason(error)}") from error


def read(path: str) -> Salvage:
    """`ConfigurationError` for anything that is not a whole salvage of this version. Does not wait, whatever is there
    in place of its files."""
    try:
        text = read_regular(Path(path) / "manifest.json", MAX_MANIFEST_BYTES, follow=False)
        if msgspec.json.decode(text, type=_Head).version != VERSION:
            raise ConfigurationError(f"{path}: a salvage of another version; use the postcopy that wrote it")
        salvage = Salvage(Path(path), msgspec.json.decode(text, type=Manifest))
    except PermissionError as error:  # what is there cannot be seen, or not read
        raise ConfigurationError(f"{path} cannot be read: {_reason(error)}") from error
    except OSError as error:
        if not os.path.isdir(path):
            what = "is not a directory" if os.path.lexists(path) else "does not exist"
            raise ConfigurationError(f"{path} {what}; name a directory that --salvage has written") from error
        why = "it has no" if isinstance(error, FileNotFoundError) else f"{_reason(error)}:"
        raise ConfigurationError(
            f"{path} is not a directory that --salvage has written: {why} manifest.json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: its manifest is damaged: {error}") from error
    for number in range(len(salvage.manifest.blocks)):
        os.close(salvage.open_memory(number))
    return salvage


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


@dataclass(frozen=True)
class Merged:
    """What became of two salvages. Pages are the smaller ones of the two sides."""

    migration_id: str
    from_dest_bytes: int
    from_source_bytes: int
    doubtful_bytes: int
    doubtful: list[dict[str, Any]]  # block, first-page, pages, page-bytes
    torn: bool  # the destination's machine could not be paused
    has_state: bool  # a machine can be started from it; always false for an image


def check_merge_target(output: str | None, into: str | None) -> None:
    """`ConfigurationError` when `merge` could not write there."""
    if output is not None:
        if os.path.lexists(output):
            raise ConfigurationError(f"{output}: exists already; name a file that does not")
        check_new_file("--output", output)
    if into is not None:
        check_new_directory("--into", into)


def merge(
    paths: Sequence[str],
    output: str | None = None,
    into: str | None = None,
    *,
    give_up: Callable[[], None] = lambda: None,
) -> Merged:
    """Joins the salvages of both sides, or takes what a single one has: into an image (`output`), the RAM blocks one
    after the other, sparse; or into a directory (`into`) from which the machine can be started again. Blocks on I/O.
    `ConfigurationError` when they do not belong together. `give_up` is called every few megabytes; what it raises ends
    it, and nothing is left."""
    check_merge_target(output, into)
    salvages = {salvage.manifest.side: salvage for salvage in map(read, paths)}
    if len(salvages) != len(paths):
        raise ConfigurationError(
            "both salvages are of the same side; name one of the source and one of the destination"
        )
    if MERGED in salvages and len(salvages) > 1:
        raise ConfigurationError(f"{salvages[MERGED].path} has been merged already; name what it was made of")
    first = next(iter(salvages.values()))
    for other in salvages.values():
        one, two = first.manifest, other.manifest
        if one.migration != two.migration:
            raise ConfigurationError("the salvages are of different migrations; only those of one belong together")
        if [(block.name, block.size_bytes) for block in one.blocks] != [(b.name, b.size_bytes) for b in two.blocks]:
            raise ConfigurationError("the salvages are of machines with different memory")
        if (one.machine, one.config.keys()) != (two.machine, two.config.keys()):
            raise ConfigurationError("the salvages are of different machines")
    with _writing(f"merge into {output if output is not None else into}"):
        if output is not None:
            with replacing(output) as image:
                return _merge(salvages, partial(_into_image, image, first.manifest.blocks), give_up)
        assert into is not None
        with new_directory(into) as part:
            return _merge_into(salvages, part, give_up)


Place = Callable[[int], "contextlib.AbstractContextManager[tuple[int, int]]"]
"""Where a block's memory is to be written: descriptor and offset."""


@contextlib.contextmanager
def _into_image(image: int, blocks: Sequence[Block], number: int) -> Iterator[tuple[int, int]]:
    yield image, sum(block.size_bytes for block in blocks[:number])
    os.ftruncate(image, sum(block.size_bytes for block in blocks[: number + 1]))


@contextlib.contextmanager
def _into_directory(part: Path, blocks: Sequence[Block], number: int) -> Iterator[tuple[int, int]]:
    with write_new(_memory_of(part, number)) as fd:
        yield fd, 0
        os.ftruncate(fd, blocks[number].size_bytes)


def _merge_into(salvages: dict[str, Salvage], part: Path, give_up: Callable[[], None]) -> Merged:
    """A directory like a salvage, of no side."""
    # The newest state, and only if it is of the same moment as the memory that goes with it.
    newest = salvages.get(DEST) or next(iter(salvages.values()))
    side = newest.manifest.side if len(salvages) == 1 else MERGED
    state = newest.state()
    known: list[Bitmap] = []
    merged = _merge(salvages, partial(_into_directory, part, newest.manifest.blocks), give_up, known)
    blocks = []
    for number, (block, bitmap) in enumerate(zip(newest.manifest.blocks, known, strict=True)):
        _write_file(_map_of(part, number), bitmap.rle_encode())
        blocks.append(Block(block.name, block.size_bytes, _unit(salvages, number), bitmap.count()))
    started = "; ".join(filter(None, map(_started, salvages.values())))
    if started:
        _write_file(part / STARTED, f"{started}\n".encode())
    manifest = structs.replace(newest.manifest, side=side, paused=state is not None, blocks=tuple(blocks))
    _write_rest(part, manifest, state)
    return replace(merged, has_state=state is not None)


def _unit(salvages: dict[str, Salvage], number: int) -> int:
    return min(salvage.manifest.blocks[number].page_bytes for salvage in salvages.values())


def _merge(
    salvages: dict[str, Salvage], place: Place, give_up: Callable[[], None], known: list[Bitmap] | None = None
) -> Merged:
    counts = dict.fromkeys((DEST, SOURCE, MERGED), 0)
    doubtful: list[dict[str, Any]] = []
    doubtful_bytes = 0
    first_manifest = next(iter(salvages.values())).manifest
    for number, block in enumerate(first_manifest.blocks):
        unit = _unit(salvages, number)
        left = Bitmap.full(-(-block.size_bytes // unit))
        with place(number) as (image, start):
            for side in (MERGED, DEST, SOURCE):  # what the destination has is newer
                if side not in salvages:
                    continue
                salvage = salvages[side]
                take = left & salvage.known(number).rescaled(salvage.manifest.blocks[number].page_bytes, unit)
                memory = salvage.open_memory(number)
                try:
                    for first, pages in take.runs():
                        end = min((first + pages) * unit, block.size_bytes)
                        _copy(memory, first * unit, end, image, start, give_up)
                finally:
                    os.close(memory)
                counts[side] += take.count() * unit
                left = left & take.inverted()
        for first, pages in left.runs():
            doubtful_bytes += pages * unit
            if len(doubtful) < MAX_RANGES:
                doubtful.append({"block": block.name, "first-page": first, "pages": pages, "page-bytes": unit})
        if known is not None:
            known.append(left.inverted())
    torn = DEST in salvages and not salvages[DEST].manifest.paused
    from_dest_bytes = counts[DEST] + counts[MERGED]
    return Merged(
        first_manifest.migration, from_dest_bytes, counts[SOURCE], doubtful_bytes, doubtful, torn, has_state=False
    )


# ---- starting a machine from one


@dataclass(frozen=True)
class Restorable:
    """A salvage from which a machine can be started, and what speaks against it."""

    salvage: Salvage
    doubts: tuple[str, ...]  # what needs the user's `force`
    started: str  # when and where it was started before; empty when it was not


def examine(path: str, *, reclaim: bool, is_live: Callable[[str], bool]) -> Restorable:
    """Reads a salvage, or what `merge` has made. Blocks on I/O.

    `ConfigurationError` for one that no machine can be started from, and for a source's without `reclaim`: its machine
    was committed to the destination, may be running there, and only the user can know that it is not. `is_live` says
    whether machines of a kind run.
    """
    salvage = read(path)
    if not is_live(kind := salvage.manifest.machine):
        raise ConfigurationError(
            f"{path}: a machine of kind {kind} does not run; `postcopy merge {path} --output FILE`, and serve that with"
            " --machine image --image FILE"
        )
    if not salvage.manifest.paused:
        raise ConfigurationError(
            f"{path}: the machine could not be paused while it was salvaged: there is no state of its devices, and it"
            " cannot be started; `postcopy merge --output` gives its memory"
        )
    if salvage.manifest.side == SOURCE and not reclaim:
        raise ConfigurationError(
            f"{path}: the machine was committed to its destination, and may be running there; when that host is dead"
            " for good, --reclaim lets it go on from the switchover, without what it has done since"
        )
    if salvage.manifest.side != SOURCE and reclaim:
        what = "was merged of both sides" if salvage.manifest.side == MERGED else "is of a destination"
        raise ConfigurationError(f"{path}: --reclaim is for the salvage of a source; this one {what}")
    doubts = []
    missing_bytes = 0
    for number, block in enumerate(salvage.manifest.blocks):
        missing_bytes += (block.all_pages - salvage.known(number).count()) * block.page_bytes
    if missing_bytes:
        of_dest = salvage.manifest.side == DEST
        what = "the source's salvage has them (`postcopy merge`)" if of_dest else "no side has them"
        doubts.append(f"{format_size(missing_bytes)} of its memory are not there, and would be zeros: {what}")
    started = _started(salvage)
    if started:
        doubts.append(f"it has been started before ({started}), and may be running")
    return Restorable(salvage, tuple(doubts), started)


def _started(salvage: Salvage) -> str:
    """When and where its machine was started from it; empty when it was not."""
    try:
        text = read_regular(salvage.path / STARTED, MAX_STARTED_BYTES, follow=False).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigurationError(f"{salvage.path}: {STARTED}: {_reason(error)}") from error
    return one_line(text, 200) or "when is not known"


async def restore(found: Restorable, make_machine: MakeMachine) -> Machine:
    """The machine, paused where it was; `note_start` before it is resumed. Errors as for `make_machine` and
    `Machine.load_state`; nothing is left of it then."""
    salvage = found.salvage
    state = salvage.state()
    assert state is not None
    layout = [BlockLayout(block.name, block.size_bytes, block.page_bytes) for block in salvage.manifest.blocks]
    try:
        machine = make_machine(salvage.manifest.machine, salvage.manifest.config, layout)
    except ProtocolError as error:  # as if a peer had offered it
        raise PostcopyError(f"{salvage.path}: its manifest makes no sense: {error}") from error
    try:
        await run_sync(_load, salvage, machine)
        await machine.load_state(state)
    except BaseException:
        with trio.CancelScope(shield=True):  # bounded
            await machine.close()
        raise
    return machine


def _load(salvage: Salvage, machine: Machine) -> None:
    try:
        for number, block in enumerate(machine.blocks):
            fd = salvage.open_memory(number)
            try:
                block.memory.load(fd)
            finally:
                os.close(fd)
    except OSError as error:
        raise PostcopyError(f"{salvage.path}: reading the machine's memory: {_reason(error)}") from error


def note_start(found: Restorable) -> None:
    """Notes in a salvage that its machine has been started, so that this does not happen twice unnoticed. Blocks on
    I/O. `ConfigurationError` when it has been since `examine` looked, `PostcopyError` when it cannot be noted."""
    path = found.salvage.path
    text = f"{datetime.now(UTC).isoformat(timespec='microseconds')} on {socket.gethostname()}\n"
    try:
        with locked_directory(path):
            started = _started(found.salvage)
            if started != found.started:
                raise ConfigurationError(f"{path}: the machine has been started from there meanwhile ({started})")
            with replacing(str(path / STARTED)) as fd:
                write_all(fd, text.encode())
    except BlockingIOError as error:
        raise ConfigurationError(f"{path}: another process starts the machine from there at this moment") from error
    except OSError as error:
        raise PostcopyError(
            f"{path}: cannot note that the machine has been started from there ({_reason(error)}), and without"
            " that it might be started twice; copy it to where this user may write"
        ) from error


def _copy(
    source: int, begin: int, end: int, image: int, start: int, give_up: Callable[[], None] = lambda: None
) -> None:
    """[begin, end) of one file to `start` further on in the other; holes stay holes."""
    at = begin
    while at < end:
        try:
            data = os.lseek(source, at, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole to the end
            return
        if data >= end:
            return
        at = max(at, data)
        stop = min(end, os.lseek(source, at, os.SEEK_HOLE))
        while at < stop:
            give_up()
            copied = _copy_range(source, at, image, start + at, min(COPY_BYTES, stop - at))
            if not copied:
                raise PostcopyError("a salvage became shorter while it was read")
            at += copied


def _copy_range(source: int, at: int, image: int, to: int, size_bytes: int) -> int:
    """How many bytes were copied; 0 at the end of the source."""
    try:
        return os.copy_file_range(source, image, size_bytes, at, to)
    except OSError as error:
        # Between two file systems: some kernels and file systems cannot, and say it in one of these ways.
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return os.pwrite(image, os.pread(source, size_bytes, at), to)
