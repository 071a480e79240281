# SPDX-License-Identifier: Apache-2.0
"""Which cells a run has."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase

from postcopy.errors import ConfigurationError
from postcopy.testbed.faultpaths._model import Backing, Cell, Measure, Mode, Operation

DEFAULT_CELLS: tuple[tuple[Mode, tuple[Backing, ...]], ...] = (
    (Mode.MISSING, (Backing.ANON, Backing.MEMFD)),  # first: what a run that runs out of time must have
    (Mode.MISSING, (Backing.HUGETLB, Backing.MEMFD_PRIVATE)),
    (Mode.MINOR, (Backing.MEMFD,)),
    (Mode.WP, (Backing.ANON, Backing.MEMFD)),
    (Mode.USER_ONLY, (Backing.ANON,)),
    (Mode.SIGBUS, (Backing.ANON,)),
    (Mode.POISON, (Backing.ANON,)),
    (Mode.WP_ASYNC, (Backing.ANON,)),
)
"""Without `--mode`, `--backing` and `--all`; of each operation what makes sense for it."""


def chosen_operations(operations: Sequence[Operation], only: Sequence[str]) -> list[Operation]:
    """Those whose name or group a pattern of `only` matches; all without patterns. `ConfigurationError` for a pattern
    that matches none."""
    if not only:
        return list(operations)
    for pattern in only:
        if not any(_matches(operation, pattern) for operation in operations):
            groups = ", ".join(dict.fromkeys(operation.group for operation in operations))
            raise ConfigurationError(
                f"--only: no operation or group is called {pattern!r}; the groups are {groups} (names: --list)"
            )
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
        raise ConfigurationError("nothing to run: the operations chosen make no sense in that mode on that backing")
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
        if cell.mode in (Mode.MISSING, Mode.MINOR, Mode.WP) and waits(by_name[cell.operation], cell)
    ]
    if measure is not None:
        return dict.fromkeys(able, tuple(measure)) if measure else {}
    first: dict[str, Cell] = {}
    for cell in able:
        if cell.mode is Mode.MISSING:
            first.setdefault(by_name[cell.operation].group, cell)
    return dict.fromkeys(first.values(), tuple(Measure))


DIR_BYTES = 255  # of its name, for the core


def check_direct_dir(path: str) -> str:
    """The directory, absolute; `ConfigurationError` when no file can be made there."""
    if len(os.fsencode(os.path.abspath(path))) > DIR_BYTES:
        raise ConfigurationError(f"--direct-dir: a name of more than {DIR_BYTES} bytes; use a link to it")
    if not os.path.isdir(path):
        what = "is not a directory" if os.path.exists(path) else "does not exist"
        raise ConfigurationError(f"--direct-dir: {path!r} {what}; name one on the file system of interest")
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigurationError(f"--direct-dir: no file can be made in {path!r}: {error.strerror}") from None
    return os.path.abspath(path)
