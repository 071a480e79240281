# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: I001  (the names side by side, not one a line)
"""The userfaultfd binding: what this kernel and this user have (`probe`), one descriptor with its ioctls and events
(`Userfaultfd`), and what is in a page table (`pagemap`). For use alone: nothing of postcopy above this is imported."""

# fmt: off
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from postcopy.uffd._probe import How, UffdApi, UffdFeature, explain_unavailable, parse_how, probe
from postcopy.uffd._userfaultfd import (
    MAX_EVENTS, FaultFlag, Fork, Outcome, PageFault, RegisterMode, Remap, Remove, Result, UffdEvent, UffdIoctl,
    UnknownEvent, Unmap, Userfaultfd,
)

if TYPE_CHECKING:
    from postcopy.uffd import pagemap as pagemap

__all__ = [
    "MAX_EVENTS", "FaultFlag", "Fork", "How", "Outcome", "PageFault", "RegisterMode", "Remap", "Remove", "Result",
    "UffdApi", "UffdEvent", "UffdFeature", "UffdIoctl", "UnknownEvent", "Unmap", "Userfaultfd", "explain_unavailable",
    "pagemap", "parse_how", "probe",
]


def __getattr__(name: str) -> Any:
    if name == "pagemap":  # when it is asked for
        import importlib

        return importlib.import_module("postcopy.uffd.pagemap")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
