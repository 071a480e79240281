# SPDX-License-Identifier: Apache-2.0
"""The userfaultfd binding: what this kernel and this user have (`probe`), one descriptor with its ioctls and events
(`Userfaultfd`), and what is in a page table (`pagemap`). For use alone: nothing of postcopy above this is imported."""

from __future__ import annotations

from postcopy.uffd._probe import How, UffdApi, UffdFeature, explain_unavailable, parse_how, probe
from postcopy.uffd._userfaultfd import (
    MAX_EVENTS,
    FaultFlag,
    Fork,
    Outcome,
    PageFault,
    RegisterMode,
    Remap,
    Remove,
    Result,
    UffdEvent,
    UffdIoctl,
    UnknownEvent,
    Unmap,
    Userfaultfd,
)

__all__ = [
    "MAX_EVENTS",
    "FaultFlag",
    "Fork",
    "How",
    "Outcome",
    "PageFault",
    "RegisterMode",
    "Remap",
    "Remove",
    "Result",
    "UffdApi",
    "UffdEvent",
    "UffdFeature",
    "UffdIoctl",
    "UnknownEvent",
    "Unmap",
    "Userfaultfd",
    "explain_unavailable",
    "parse_how",
    "probe",
]
