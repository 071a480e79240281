# SPDX-License-Identifier: Apache-2.0
"""Which cells a run has."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from postcopy.errors import ConfigurationError
from postcopy.testbed.faultpaths._model import Backing, Cell, Measure, Mode, Operation
from postcopy.testbed.faultpaths._system import file_system_of
from postcopy.units import did_you_mean

DEFAULT_CELLS: tuple[tuple[Mode, tuple[Backing, ...]], ...] = (
    (Mode.MISSING, (Backing.ANON, Backing.MEMFD)),  # first: what a run that runs out of time must have
    (Mode.MISSING, (Backing.HUGETLB, Backing.MEMFD_PRIVATE)),
    (Mode.MINOR, (Backing.MEMFD,)),
    (Mode.WP, (Backing.ANON, Backing.MEMFD)),
    (Mode.USER_ONLY, (Backing.ANON,)),
    (Mode.SIGBUS, (Backing.ANON,)),
    (Mode.POISON, (Backing.ANON,)),
    (Mode.WP_ASYNC, (Backing.ANON,)),
    (Mode.RWP, (Backing.ANON, Backing.MEMFD)),
    (Mode.RWP_ASYNC, (Backing.ANON,)),
    (Mode.MISSING, (Backing.GUEST_MEMFD,)),
    (Mode.MINOR, (Backing.GUEST_MEMFD,)),
)
"""Without `--mode`, `--backing` and `--all`; of each operation what makes sense for it."""


def chosen_operations(operations: Sequence[Operation], only: Sequence[str]) -> list[Operation]:
    """Those whose name or group a pattern of `only` matches; all without patterns. `ConfigurationError` for a pattern
    that matches none."""
    if not only:
        return list(operations)
    for pattern in only:
        if not any(_matches(operation, pattern) for operation in operations):
            groups = tuple(dict.fromkeys(operation.group for operation in operations))
            hint = did_you_mean(pattern, [*groups, *(operation.name for operation in operations)])
            known = f"; the groups are {', '.join(groups)} (names: --list)"
            raise ConfigurationError(f"--only: no operation or group is called {pattern!r}{hint or known}")
    return [operation for operation in operations if any(_matches(operation, pattern) for pattern in only)]


def _matches(operation: Operation, pattern: str) -> bool:
    return fnmatchcase(operation.name, pattern) or fnmatchcase(operation.group, pattern)


def choose(
    operations: Sequence[Operation],
    only: Sequence[str] = (),
    modes: Collection[Mode] = (),
    backings: Collection[Backing] = (),
    everything: bool = False,
) -> list[Cell]:
    """The cells, the most wanted first. `modes` or `backings` given: all that make sense of these, for each operation;
    neither: `DEFAULT_CELLS`, or all that make sense with `everything`. `ConfigurationError` when there is none."""
    wanted = chosen_operations(operations, only)
    if everything or modes or backings:
        columns = [(mode, backing) for mode in modes or tuple(Mode) for backing in backings or tuple(Backing)]
    else:
        columns = [(mode, backing) for mode, several in DEFAULT_CELLS for backing in several]
    cells = [
        Cell(operation.name, mode, backing)
        for mode, backing in columns
        for operation in wanted
        if mode in operation.modes and backing in operation.backings
    ]
    if not cells:
        raise ConfigurationError("nothing to run: none of the operations chosen has that mode on that backing")
    return cells


def measured(
    cells: Sequence[Cell],
    operations: Iterable[Operation],
    measure: Collection[Measure] | None,
    waits: Callable[[Operation, Cell], bool],
) -> dict[Cell, Collection[Measure]]:
    """What to measure beside, for which cells; `waits`: whether it is to be expected that a cell's operation does.

    None, the default: everything, for the first operation of each group that waits, on the first missing page of it
    that is among `cells`: enough to fill the columns. A choice of the user: that, for each cell in which the operation
    waits.
    """
    by_name = {operation.name: operation for operation in operations}
    able = [
        cell
        for cell in cells
        if cell.mode in (Mode.MISSING, Mode.MINOR, Mode.WP, Mode.RWP) and waits(by_name[cell.operation], cell)
    ]
    if measure is not None:
        return dict.fromkeys(able, tuple(measure)) if measure else {}
    first: dict[str, Cell] = {}
    for cell in able:
        if cell.mode is Mode.MISSING:
            first.setdefault(by_name[cell.operation].group, cell)
    return dict.fromkeys(first.values(), tuple(Measure))


DIR_BYTES = 255  # of its name, for the core
COPIES = ("tmpfs", "ramfs", "btrfs")
"""File systems whose O_DIRECT pins no pages: what they tell of it is not what most do."""


def direct_dir(path: str) -> str:
    """The directory that the user has named, absolute; `ConfigurationError` when no file can be made there. For an
    empty one the current directory or, where it cannot tell, one for temporary files: `COPIES` only when all are."""
    if path:
        if reason := _no_file_in(path):
            raise ConfigurationError(f"--direct-dir: {reason}; name a directory on the file system of interest")
        return os.path.abspath(path)
    try:
        here = os.getcwd()
    except OSError:  # it has been removed
        here = "/"
    usable = [place for place in (here, tempfile.gettempdir(), "/var/tmp") if not _no_file_in(place)]
    telling = [place for place in usable if file_system_of(place) not in COPIES]
    return (telling or usable or [here])[0]


def _no_file_in(path: str) -> str:
    """Why not; empty when one can be made there."""
    if len(os.fsencode(os.path.abspath(path))) > DIR_BYTES:
        return f"{path[:40]!r}... is a name of more than {DIR_BYTES} bytes, which a symbolic link would shorten"
    if not os.path.isdir(path):
        return f"{path!r} is not a directory" if os.path.exists(path) else f"directory {path!r} does not exist"
    try:
        with tempfile.TemporaryFile(dir=path):
            return ""
    except OSError as error:
        return f"no file can be made in {path!r}: {error.strerror}"
