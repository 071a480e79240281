# SPDX-License-Identifier: Apache-2.0
"""From lines of ``--json`` to migrations: of one side or of both, of one migration or of many, in any order of files.

What one migration was is told by its id: both sides have the same. Each line that knows it adds to what is known, a
later one wins. Bounded: lines of other events pass unread, and of more than `MAX_MIGRATIONS` migrations the first ones
are forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, BinaryIO

import msgspec

from postcopy.errors import ConfigurationError
from postcopy.records import Json
from postcopy.report._model import (
    MAX_CELLS,
    MAX_FIELDS,
    MAX_TEXT,
    Cell,
    Migration,
    Problems,
    Side,
    cell_of,
    object_of,
    text_of,
    timeline_of,
)

MAX_LINE_BYTES = 2 << 20
MAX_BYTES = 256 << 20
MAX_MIGRATIONS = 256
_READ = frozenset({"run", "timeline", "measurement", "migration-ended", "result", "progress", "listening", "vm-ended"})


class Reader:
    """Takes lines; `migrations` are what they were about."""

    def __init__(self, *, keep_latencies: bool = False) -> None:
        self.problems = Problems()
        self.cells: dict[tuple[str, str], Cell] = {}
        """Of `bench migrate`, by workload and policy."""
        self.conditions = ""
        """Under which they were measured."""
        self.latencies: list[Json] = []
        """Of each line that has distributions, as much as says what they are of; where they are to be kept."""
        self._keep_latencies = keep_latencies
        self.forgotten = 0
        self._run: Json = {}  # of the lines that come now
        self._found: dict[str, Migration] = {}

    @property
    def migrations(self) -> list[Migration]:
        return list(self._found.values())

    def read(self, file: BinaryIO, name: str) -> None:
        """All lines of a file. `ConfigurationError` where it is no such file, or too large."""
        self._run = {}
        number = size = good = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            size += len(line)
            if len(line) > MAX_LINE_BYTES:
                raise ConfigurationError(
                    f"{name}: line {number} is longer than {MAX_LINE_BYTES >> 20} MiB: none that postcopy writes with"
                    " --json is"
                )
            if size > MAX_BYTES:
                raise ConfigurationError(
                    f"{name}: larger than {MAX_BYTES >> 20} MiB; keep the lines of its last migrations only, as with"
                    " `grep -v '\"progress\"'`"
                )
            if not line.strip():
                continue
            try:
                fields = msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                if not good and number == 1:
                    raise ConfigurationError(
                        f"{name}: its first line is no JSON; what a command has written with --json is wanted"
                    ) from error
                self.problems.add(f"{name}, line {number}: no JSON, as where the file was cut off")
                continue
            good += 1
            if isinstance(fields, dict):
                self.take(fields.get("event"), fields)

    def take(self, event: object, fields: Json) -> None:
        """A line, by its event."""
        if not isinstance(event, str) or event not in _READ:
            return
        if self._keep_latencies and event in ("run", "timeline", "measurement"):
            recording = object_of(fields.get("recording"))
            at_ms = recording.get("at-ms")
            part = {
                "origin": recording.get("origin"),
                "at-ms": at_ms[-1:] if isinstance(at_ms, list) else at_ms,
                "latency": recording.get("latency", {}),
            }
            self.latencies.append({**fields, "recording": part} if event == "timeline" else fields)
        if event == "run":
            self._run = _short(fields)
            return
        if event == "measurement":
            if (cell := cell_of(fields)) is not None and len(self.cells) < MAX_CELLS:
                self.cells[cell.workload, cell.policy] = cell
            elif fields.get("figure") == "migrate":
                self.conditions = text_of(fields.get("note"), 1000)
            return
        if "vm" in fields:  # of a pager
            fields = {**fields, **object_of(fields.get("figures")), "side": "pager", "machine": fields["vm"]}
        for machine in fields["machines"] if isinstance(fields.get("machines"), list) else ():
            job = object_of(object_of(machine).get("migration"))
            if job.get("migration-id"):
                self._add(event, {**job, "machine": object_of(machine).get("name")})
        if fields.get("side") == "demo":
            for side in ("source", "dest"):
                if isinstance(fields.get(side), dict):
                    self._add(event, fields[side])
            fields = {**fields, "side": "dest"}
            for key in ("source", "dest"):
                fields.pop(key, None)
        self._add(event, fields)

    def _add(self, event: object, fields: Json) -> None:
        side, identity = fields.get("side"), text_of(fields.get("migration-id"), 64)
        if side not in ("source", "dest", "pager") or "machines" in fields:
            return
        if side == "pager":
            identity = text_of(fields.get("machine") or fields.get("name"), 64)
        if not identity and (event != "result" or self._found):
            return  # before there is a migration
        known = self._found.pop(identity, None) or Migration(identity)
        self._found[identity] = known
        if len(self._found) > MAX_MIGRATIONS:
            del self._found[next(iter(self._found))]
            self.forgotten += 1
        one = known.sides.setdefault(str(side), Side(str(side)))
        one.run = self._run or one.run
        if event == "timeline" and (timeline := timeline_of(fields, self.problems)) is not None:
            one.timeline = timeline
        one.facts.update(
            (key, value) for key, value in _short(fields).items() if value is not None and key not in _COLUMNS
        )


_COLUMNS = frozenset({"recording", "figures"})
"""What is not kept as it is."""


def _short(value: Any, depth: int = 3) -> Any:
    """As much of it as a page can show: a line may be made of anything, and the last one of each side is kept."""
    if isinstance(value, str):
        return value[: MAX_TEXT + 1]
    if isinstance(value, dict):
        found = list(value.items())[:MAX_FIELDS] if depth else []
        return {key[:MAX_TEXT]: _short(one, depth - 1) for key, one in found}
    if isinstance(value, list):
        return [one for one in value[:MAX_FIELDS] if isinstance(one, int | float)]
    return value


def read(files: Iterable[tuple[str, BinaryIO]]) -> Reader:
    reader = Reader()
    for name, file in files:
        reader.read(file, name)
    return reader
