# SPDX-License-Identifier: Apache-2.0
"""Expectations: a file that says what becomes of an operation on which kernel, and why; and verdicts from it.

The file is TOML (expectations.toml in this package; `--expectations FILE` for another one). A table ``[[expect]]`` has

- ``operation``, ``mode``, ``backing``: a pattern of a shell, or a list of them; ``backing`` may be left out.
- ``kernel``: versions, as ``">=6.1, <6.6"``; ``kvm``: hardware, emulated or none, or a list;
  ``config``: a table of CONFIG_ names to y, m, n or a value, or a list. All may be left out. A kernel that does not
  tell its configuration satisfies no ``config``.
- ``file-system``: a pattern of a shell, or a list of them, for the type of the one that files for O_DIRECT are on.
- ``writes``: true or false: only operations that write the page, or only those that do not.
- ``outcome``: one of `Outcome`, or a list of those that are right; ``error``, ``signal``, ``state``, ``thread``:
  what must be so beside, likewise, where it is given. ``error`` and ``signal`` count only where there is one, ``state``
  only where the thread was seen in userfaultfd's wait.
- ``reason``: one sentence, for a person.

The most specific of the tables that match is the one that holds: the longer name of the operation (patterns count by
their literal characters) before the mode, the mode before the backing, both before the conditions; of equals the last.
What is not available here is judged by none of them.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from postcopy.errors import ConfigurationError
from postcopy.testbed.faultpaths._model import (
    WAITS_IN,
    Backing,
    Cell,
    Flag,
    Json,
    Judged,
    Mode,
    Operation,
    Outcome,
    Result,
    Verdict,
)
from postcopy.testbed.faultpaths._system import System, version_of

SCHEMA = 1
_COMPARISON = re.compile(r"(<=|>=|<|>|=)\s*(\d+(?:\.\d+)*)")

Word = Annotated[str, Meta(min_length=1)]
Words = Annotated[tuple[Word, ...], Meta(min_length=1)]


class Expectation(Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """One table of the file."""

    operation: Words
    mode: Words
    outcome: Annotated[tuple[Outcome, ...], Meta(min_length=1)]
    reason: Word
    backing: Words = ("*",)
    kernel: str = ""
    kvm: tuple[Literal["hardware", "emulated", "none"], ...] = ()
    config: dict[Annotated[str, Meta(pattern="^CONFIG_")], Words] = {}
    file_system: Words = ()
    writes: bool | None = None
    error: Words = ()
    signal: Words = ()
    state: Words = ()
    thread: tuple[Literal["none", "own", "other", "kernel", "process"], ...] = ()

    def __post_init__(self) -> None:
        for key, patterns, known in (("mode", self.mode, list(Mode)), ("backing", self.backing, list(Backing))):
            for pattern in patterns:
                if not any(fnmatchcase(item, pattern) for item in known):
                    raise ValueError(f"{key} {pattern!r} is none of {', '.join(known)}")
        _versions(self.kernel)

    @property
    def words(self) -> str:
        """What it says, short: ``blocked or refused EFAULT, state D``."""
        parts = [
            f"{outcome} {'/'.join(more)}" if (more := self._more(outcome)) else str(outcome) for outcome in self.outcome
        ]
        text = " or ".join(parts)
        if self.state:
            text += f", state {'/'.join(self.state)}"
        if self.thread:
            text += f", fault of {'/'.join(self.thread)} thread"
        return text

    @property
    def brief(self) -> str:
        """The same as a result is told: ``blocked D``, ``refused EFAULT``."""
        parts = []
        for outcome in self.outcome:
            more = self.state if outcome is Outcome.BLOCKED else self._more(outcome)
            parts.append(f"{outcome} {'/'.join(more)}".strip())
        return " or ".join(parts)

    def _more(self, outcome: Outcome) -> tuple[str, ...]:
        return {Outcome.REFUSED: self.error, Outcome.SIGNALLED: self.signal}.get(outcome, ())

    def matches(self, operation: Operation, cell: Cell, system: System) -> bool:
        """Whether it is about this cell on that kernel."""
        return (
            self.writes in (None, Flag.WRITES in operation.flags)
            and any(fnmatchcase(cell.operation, pattern) for pattern in self.operation)
            and any(fnmatchcase(cell.mode, pattern) for pattern in self.mode)
            and any(fnmatchcase(cell.backing, pattern) for pattern in self.backing)
            and self.holds_on(system)
        )

    def holds_on(self, system: System) -> bool:
        """Whether it is about any cell of that kernel."""
        return (
            all(_compare(system.version, how, version) for how, version in _versions(self.kernel))
            and (not self.kvm or system.kvm in self.kvm)
            and (not self.file_system or any(fnmatchcase(system.file_system, pattern) for pattern in self.file_system))
            and all(system.option(name) in values for name, values in self.config.items())
        )

    def specificity(self, cell: Cell) -> tuple[int, int, int, int]:
        """Orders expectations that match a cell, the one that holds last."""
        conditions = len(_versions(self.kernel)) + len(self.config) + (self.writes is not None)
        conditions += bool(self.kvm) + bool(self.file_system)
        return (
            _literal(self.operation, cell.operation),
            _literal(self.mode, cell.mode),
            _literal(self.backing, cell.backing),
            conditions,
        )

    def difference(self, result: Result) -> str:
        """What of the result is otherwise, in words; empty when nothing is."""
        if result.outcome not in self.outcome:
            return f"{result.brief} instead of {self.words}"
        seen = {
            "error": result.error,
            "signal": result.signal,
            "state": result.state if result.wchan == WAITS_IN else "",
            "thread": result.event_thread if result.events else "",
        }
        for name, value in seen.items():
            wanted: tuple[str, ...] = getattr(self, name)
            if wanted and value and value not in wanted:
                return f"{name} {value} instead of {'/'.join(wanted)}"
        return ""


def _literal(patterns: Sequence[str], value: str) -> int:
    return max(len(pattern.replace("*", "").replace("?", "")) for pattern in patterns if fnmatchcase(value, pattern))


def _compare(version: tuple[int, ...], how: str, other: tuple[int, ...]) -> bool:
    # "=6.1" means 6.1 with any third number; "<6.6" excludes 6.6 with any.
    version = version[: len(other)] + (0,) * (len(other) - len(version))
    return {
        "<": version < other,
        "<=": version <= other,
        "=": version == other,
        ">=": version >= other,
        ">": version > other,
    }[how]


@dataclass(frozen=True)
class Expectations:
    """A file of them."""

    name: str
    """Where they are from, for a report."""
    rules: tuple[Expectation, ...]

    def find(self, operation: Operation, cell: Cell, system: System) -> Expectation | None:
        """The one that holds."""
        # Of equals the last: max finds the first of them.
        matching = [rule for rule in reversed(self.rules) if rule.matches(operation, cell, system)]
        return max(matching, key=lambda rule: rule.specificity(cell), default=None)

    def on(self, system: System) -> Expectations:
        """Those about that kernel: fewer, where many cells of it are looked up."""
        return Expectations(self.name, tuple(rule for rule in self.rules if rule.holds_on(system)))

    def waits(self, operation: Operation, cell: Cell, system: System) -> bool:
        """Whether the operation may wait for its page, as far as is known."""
        rule = self.find(operation, cell, system)
        return Flag.NOFAULT not in operation.flags if rule is None else Outcome.BLOCKED in rule.outcome

    def judge(self, operation: Operation, cell: Cell, result: Result, system: System) -> Judged:
        """The verdict."""
        rule = self.find(operation, cell, system)
        expected, reason = (rule.words, " ".join(rule.reason.split())) if rule is not None else ("", "")
        if result.outcome is Outcome.UNAVAILABLE:
            return Judged(cell, result, Verdict.NOT_AVAILABLE, expected, result.text or "no reason was given")
        uncovered = is_uncovered(operation, cell, result)
        if rule is None:
            return Judged(cell, result, Verdict.NOT_EXPECTED, uncovered=uncovered)
        difference = rule.difference(result) or (result.remote.wrong(result.outcome) if result.remote else "")
        verdict = Verdict.CHANGED if difference else Verdict.AS_EXPECTED
        return Judged(cell, result, verdict, expected, reason, difference, uncovered)

    def begins_at(self) -> list[tuple[int, ...]]:
        """The versions of the kernel at which an expectation begins to hold."""
        found = {version for rule in self.rules for how, version in _versions(rule.kernel) if how == ">="}
        return sorted(found)

    def as_json(self) -> Json:
        return {"file": self.name, "rules": len(self.rules)}


def is_uncovered(operation: Operation, cell: Cell, result: Result) -> bool:
    """A place that should block on the page, and cannot: the series' "few places that remain uncovered".

    The modes that ask for an error (user-only, sigbus, poison) and the one that never blocks (wp-async) have none, nor
    have operations that must not fault. Going on without the page counts, since the content was not the source's; a
    write-protected or present-but-unmapped page that is read without an event was there, and does not.
    """
    if Flag.NOFAULT in operation.flags or result.outcome in (Outcome.BLOCKED, Outcome.UNAVAILABLE):
        return False
    if result.outcome is Outcome.PASSED:
        return cell.mode is Mode.MISSING
    return cell.mode in (Mode.MISSING, Mode.MINOR, Mode.WP, Mode.RWP)


# ---- the file


def load(path: str | None = None) -> Expectations:
    """Of a file, or the ones that come with postcopy. `ConfigurationError` with the place of what is wrong in it."""
    try:
        if path is None:
            name = "built in"
            text = resources.files(__package__).joinpath("expectations.toml").read_text("utf-8")
        else:
            name = path
            with open(path, encoding="utf-8") as file:
                text = file.read()
        return parse(text, name)
    except OSError as error:
        raise ConfigurationError(f"--expectations: cannot read {path!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"--expectations: {path!r} is not UTF-8 text") from None


class _File(Struct):
    expect: tuple[Expectation, ...]


_LISTS = {"operation", "mode", "backing", "outcome", "kvm", "file-system", "error", "signal", "state", "thread"}
"""Keys whose single value is a list of one."""


def parse(text: str, name: str) -> Expectations:
    """`ConfigurationError` with the place of what is wrong."""
    try:
        document = tomllib.loads(text)
        if document.get("schema") != SCHEMA:
            raise ConfigurationError(f"{name}: schema = {SCHEMA} is what this version reads")
        tables = document.get("expect", [])
        if isinstance(tables, list):
            tables = [_with_lists(table) for table in tables]
        return Expectations(name, msgspec.convert({"expect": tables}, _File).expect)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigurationError(f"{name}: {error}") from None


def _with_lists(table: Any) -> Any:
    if not isinstance(table, dict):
        return table
    made = {key: [value] if key in _LISTS and isinstance(value, str) else value for key, value in table.items()}
    if isinstance(config := made.get("config"), dict):
        made["config"] = {name: [value] if isinstance(value, str) else value for name, value in config.items()}
    return made


@functools.cache
def _versions(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    conditions = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _COMPARISON.fullmatch(part)
        if match is None:
            raise ValueError(f"kernel {part!r}: it is <, <=, =, >= or > and a version")
        conditions.append((match[1], version_of(match[2])))
    return tuple(conditions)
