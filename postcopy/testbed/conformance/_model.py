# SPDX-License-Identifier: Apache-2.0
"""What a case is, and how it ends."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from postcopy.testbed.conformance._kit import Kit

Json = dict[str, Any]


class Failed(Exception):
    """The handler is wrong; the text says what happened."""


class NotApplicable(Exception):
    """The case cannot be tried here, or not against this handler; the text says why."""


class Outcome(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    NOT_APPLICABLE = "not-applicable"


@dataclass(frozen=True)
class Case:
    name: str
    """Number and word, as ``18-removed``; the number is that of docs/conformance.md."""
    what: str
    right: str
    run: Callable[[Kit], Awaitable[str | None]]
    """What it returns is a note for the report."""
    needs: frozenset[str]
    """Of ``command`` (a handler that can be started), ``slow`` (a mount), ``root``, ``huge``."""


@dataclass(frozen=True)
class Result:
    case: Case
    outcome: Outcome
    text: str
    seconds: float

    def as_json(self) -> Json:
        return {
            "case": self.case.name,
            "what": self.case.what,
            "right": self.case.right,
            "outcome": str(self.outcome),
            "text": self.text,
            "seconds": round(self.seconds, 3),
        }
