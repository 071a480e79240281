# SPDX-License-Identifier: Apache-2.0
"""From lines of ``--json`` to migrations: of one side or of both, of one migration or of many, in any order of files.

What one migration was is told by its id: both sides have the same. Each line that knows it adds to what is known, a
later one wins. Bounded: lines of other events pass unread, and of more than `MAX_MIGRATIONS` migrations the first ones
are forgotten.
"""

from __future__ import annotations

import itertools
from typing import Any, BinaryIO

import msgspec

from postcopy.errors import ConfigurationError
from postcopy.records import VERSION, Json
from postcopy.report._model import (
    MAX_CELLS,
    MAX_FIELDS,
    MAX_LIST,
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
        foreign = False
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
                if (schema := fields.get("schema", VERSION)) != VERSION and not foreign:
                    foreign = True
                    said = f"of schema {text_of(schema, 20) or '?'}, and this version reads {VERSION}"
                    self.problems.add(f"{name}, line {number}: {said}; what it says may mean something else")
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
            kept = {key: fields[key] for key in _OF_LATENCY if key in fields}
            self.latencies.append(kept | ({"recording": part} if event == "timeline" else {}))
        if event == "run":
            self._run = {key: _short(fields[key]) for key in _OF_RUN if key in fields}
            return
        if event == "measurement":
            if (cell := cell_of(fields)) is not None and len(self.cells) < MAX_CELLS:
                self.cells[cell.workload, cell.policy] = cell
            elif fields.get("figure") == "migrate":
                self.conditions = text_of(fields.get("note"), 1000)
            return
        if "vm" in fields:  # of a pager
            figures = object_of(fields.get("figures"))
            ram = {"total": figures.get("memory"), "page-size": figures.get("page-size")}
            fields = {**fields, **figures, "side": "pager", "machine": fields["vm"], "ram": ram}
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
        one.facts.update((key, _short(fields[key])) for key in _OF_SIDE if fields.get(key) is not None)


# What a page is made of, beside the recording: a line may be made of anything, and the last one of each side is kept.
_OF_SIDE = (
    "status", "error", "mode", "machine", "name", "kind", "memory", "peer", "encrypted", "pager", "downtime-ms",
    "total-ms", "attempts", "resident", "downtime-breakdown-us", "ram", "recoveries", "fault-latency-us",
    "blocktime-ms",
)  # fmt: skip
_OF_RUN = ("command", "version", "started", "options", "host")
_OF_LATENCY = ("event", "started", "side", "machine", "vm", "figure", "name", "distributions", "elapsed-ms")


def _short(value: Any) -> Any:
    """As much of it as a page can show: numbers, texts, and an object or a list of these."""
    if isinstance(value, dict):
        found = ((key[:MAX_TEXT], _short(one)) for key, one in value.items() if isinstance(one, str | int | float))
        return dict(itertools.islice(found, MAX_FIELDS))
    if isinstance(value, list):
        return [one for one in value[:MAX_LIST] if isinstance(one, int | float)]
    return value[: MAX_TEXT + 1] if isinstance(value, str) else value
