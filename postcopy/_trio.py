# SPDX-License-Identifier: Apache-2.0
"""Trio, for modules that do without it until something asynchronous is called: `postcopy.uffd` and `postcopy.memory`
can be used by threads, with cffi alone."""

from __future__ import annotations

import sys
from typing import Any

from postcopy.errors import naming_missing_packages


def require_trio(what: str, instead: str = "") -> Any:
    """Trio, which must be what runs the task that has called `what`: `RuntimeError` otherwise, `MissingPackageError`
    where it is not installed. `instead`: what there is for other programs. Costs 0.2 us, as the path of a fault wants
    it."""
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        return trio
    with naming_missing_packages(what):
        import trio
    asyncio = sys.modules.get("asyncio")
    here = "this task is asyncio's" if asyncio and asyncio._get_running_loop() else "Trio does not run here"
    raise RuntimeError(
        f"{what} needs a Trio task, but {here}: start the program with trio.run(main)"
        + (f", or use {instead}" if instead else "")
    )


def closed(text: str) -> Exception:
    """The error for the use of what was closed: `trio.ClosedResourceError`; where Trio is not installed the ValueError
    that Python's own files raise."""
    try:
        from trio import ClosedResourceError
    except ModuleNotFoundError:
        return ValueError(text)
    return ClosedResourceError(text)
