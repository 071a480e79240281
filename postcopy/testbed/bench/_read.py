# SPDX-License-Identifier: Apache-2.0
"""What a file of JSON lines has to compare: measurements of `bench`, times of migrations that have completed, and of
`faultpaths`. Whoever has it may have changed it: all is checked, bounded, and printable.

Several runs in one file, as ``cat`` joins them, are more rounds; so is each migration, and each report of `faultpaths`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import msgspec

from postcopy.errors import ConfigurationError
from postcopy.records import VERSION, Json
from postcopy.records.results import Measurement, Run, Value
from postcopy.testbed.faultpaths import _report as faultpaths
from postcopy.testbed.faultpaths._model import Outcome
from postcopy.wire import one_line

MAX_BYTES = 256 << 20
MAX_LINE_BYTES = 16 << 20
MAX_NAME_CHARACTERS = 200
MAX_NUMBER = 1e30
"""Of what is measured; what is less than one divided by this is nothing."""
MAX_VALUES = 20_000
MAX_ROUNDS = 1_000_000
"""Of all values together."""

_OF_MIGRATION = {
    "downtime": ("ms", ("downtime-ms",)),
    "total time": ("ms", ("total-ms",)),
    "fault p50": ("us", ("fault-latency-us", "p50")),
    "fault p99": ("us", ("fault-latency-us", "p99")),
    "fault p99.9": ("us", ("fault-latency-us", "p99.9")),
    "longest fault": ("us", ("fault-latency-us", "max")),
}
"""Less of each is better; and where it is in a line."""


@dataclass
class Results:
    """What one file says."""

    path: str
    values: dict[str, Value] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    failed: int = 0
    """Migrations that have not completed: they are no rounds."""
    rounds: int = 0

    def add(self, name: str, unit: str, better: str, rounds: list[float]) -> None:
        """More rounds of a value. `ConfigurationError` where it is another quantity than before, or too much."""
        name, unit = one_line(name, MAX_NAME_CHARACTERS), one_line(unit, MAX_NAME_CHARACTERS)
        value = self.values.setdefault(name, Value(unit=unit, rounds=[], better=better))
        if (value.unit, value.better) != (unit, better):
            raise ConfigurationError(
                f"{name!r} is in {unit} ({better} is better), and in an earlier line in {value.unit} ({value.better})"
            )
        if any(abs(each) > MAX_NUMBER for each in rounds):
            raise ConfigurationError(f"{name!r} has a value beyond {MAX_NUMBER:g}")
        value.rounds += rounds
        self.rounds += len(rounds)
        if len(self.values) > MAX_VALUES or self.rounds > MAX_ROUNDS:
            raise ConfigurationError(f"more than {MAX_VALUES} values, or {MAX_ROUNDS} rounds of them")


def read(path: str) -> Results:
    """`ConfigurationError` with the file's name, and the line, when it is none of ours or has nothing to compare."""
    results, number = Results(path), 0
    migrations: dict[str, dict[str, float]] = {}
    try:
        # (without O_NONBLOCK a FIFO would wait for somebody who writes to it)
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            _check(file)
            while text := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(text) > MAX_LINE_BYTES:
                    raise ConfigurationError(f"it is longer than {MAX_LINE_BYTES >> 20} MiB")
                if text.strip():
                    _take(_object(text), results, migrations)
        number = 0
        for known in migrations.values():
            _take_migration(known, results)
        if not results.values:
            failed = f" ({results.failed} migrations have not completed)" if results.failed else ""
            raise ConfigurationError(
                f"nothing in it can be compared: no measurement of `bench`, no result of a migration, no report of"
                f" `faultpaths`{failed}"
            )
    except OSError as error:
        raise ConfigurationError(f"cannot read {path!r}: {error.strerror}") from None
    except ConfigurationError as error:
        raise ConfigurationError(f"{path!r}{f', line {number}' if number else ''}: {error}") from None
    return results


def _check(file: BinaryIO) -> None:
    state = os.fstat(file.fileno())
    if not stat.S_ISREG(state.st_mode):
        raise ConfigurationError("not a regular file")
    if not 0 < state.st_size <= MAX_BYTES:
        raise ConfigurationError("it is empty" if not state.st_size else f"it has more than {MAX_BYTES >> 20} MiB")


def _object(text: bytes) -> Json:
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ConfigurationError("not JSON; give a file of lines that `--json` has written") from None
    if not isinstance(value, dict):
        raise ConfigurationError("not a JSON object; give a file of lines that `--json` has written")
    return value


def _take(line: Json, results: Results, migrations: dict[str, dict[str, float]]) -> None:
    event = line.get("event")
    if event is None and "cells" in line:
        _take_report(line, results)
        return
    if (schema := line.get("schema")) != VERSION:
        if schema is None:
            raise ConfigurationError("not a line that postcopy has written: it has no schema")
        raise ConfigurationError(f"it is of schema {str(schema)[:20]}, and this version reads {VERSION}")
    try:
        if event == "run":
            results.runs.append(msgspec.convert(line, Run))
        elif event == "measurement":
            _take_measurement(msgspec.convert(line, Measurement), results)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{event}: {error}") from None
    if results.runs and results.runs[-1].command == "bench":
        return  # its migrations are of as many kinds as it has measurements, which say all of them
    # What a migration says last of itself is all that there is to say: of both sides, and of a demo, it is one round.
    if event in ("migration-ended", "timeline", "result") and (name := line.get("migration-id")):
        known = migrations.setdefault(one_line(str(name), MAX_NAME_CHARACTERS), {})
        known["completed"] = line.get("status") == "completed"
        for value, (_, where) in _OF_MIGRATION.items():
            found: Any = line
            for key in where:
                found = found.get(key) if isinstance(found, dict) else None
            if isinstance(found, (int, float)):
                known[value] = float(max(-MAX_NUMBER, min(found, 2 * MAX_NUMBER)))
        if len(migrations) > MAX_ROUNDS:
            raise ConfigurationError(f"more than {MAX_ROUNDS} migrations")


def _take_measurement(measurement: Measurement, results: Results) -> None:
    values, of, to = measurement.values, measurement.of, measurement.to
    for name, value in values.items():
        if value.better is None:
            continue
        found, unit, whole = value.rounds, value.unit, f"{measurement.name}: {name}"
        if name == of:
            whole = measurement.name
            if to is not None and to in values:  # what is wanted of both is that they differ by so much
                unit = "1"
                pairs = zip(value.rounds, values[to].rounds, strict=False)
                found = [a / b for a, b in pairs if a is not None and b is not None and b > 1 / MAX_NUMBER]
        results.add(whole, unit, value.better, [each for each in found if each is not None])


def _take_migration(known: Mapping[str, float], results: Results) -> None:
    if not known["completed"]:
        results.failed += 1
        return
    for name, (unit, _) in _OF_MIGRATION.items():
        if (found := known.get(name, 0.0)) > 0:  # 0: there was none
            results.add(f"migration: {name}", unit, "less", [found])


def _take_report(report: Json, results: Results) -> None:
    for item in faultpaths.from_json(report).judged:
        if item.result.outcome is Outcome.BLOCKED and item.result.waited_us > 0:
            results.add(f"faultpaths: {item.cell}: woken", "us", "less", [item.result.waited_us])
        if item.result.kill and item.result.kill.killed:
            results.add(f"faultpaths: {item.cell}: killed", "us", "less", [item.result.kill.reaped_us])
        for call, lock in (item.result.locks_ns or {}).items():
            if (ratio := lock.ratios[0]) is not None:
                results.add(f"faultpaths: {item.cell}: {call} beside it / idle", "1", "less", [ratio])
