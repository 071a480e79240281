# SPDX-License-Identifier: Apache-2.0
"""From JSON back to records, strictly: what no record has is an error, and so is what is not as it says."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import ValidationError, convert

from postcopy.records import commands, events
from postcopy.records._base import VERSION, Json, Record
from postcopy.records.control import ANSWERS, Greeting, Refusal, Timestamp
from postcopy.records.log import LogLine
from postcopy.records.reports import REPORTS

EVENTS = {
    event: (*events.EVENTS.get(event, ()), *commands.EVENTS.get(event, ()))
    for event in (*events.EVENTS, *(event for event in commands.EVENTS if event not in events.EVENTS))
}
"""The records that an event may have."""


def read_line(line: Json) -> Record:
    """A line of `--json`. `ValidationError` where it is none."""
    rest = dict(line)
    event, schema, elapsed_ms = (rest.pop(key, None) for key in ("event", "schema", "elapsed-ms"))
    if schema != VERSION:
        raise ValidationError(f"schema {schema!r}, not {VERSION}")
    if not isinstance(elapsed_ms, int | float):
        raise ValidationError(f"elapsed-ms {elapsed_ms!r}")
    return read_event(event, rest)


def read_event(event: object, data: Json) -> Record:
    """What an event says."""
    return _one_of(EVENTS.get(str(event), ()), data, f"event {event}")


def read_log_line(line: Json) -> LogLine:
    """A line of `--log-json`."""
    return convert(line, LogLine)


def read_answer(request: str, value: Json) -> Record:
    """What the control socket returns."""
    return convert(value, ANSWERS[request])


def read_control_line(line: Json, request: str) -> Record:
    """A line of the control socket: greeting, event, refusal, or the answer to `request`."""
    if "postcopy" in line:
        return convert(line, Greeting)
    if "error" in line:
        return convert(line, Refusal)
    rest = {key: value for key, value in line.items() if key not in ("event", "timestamp", "data", "return", "id")}
    if rest or ("event" in line) == ("return" in line):
        raise ValidationError(f"no line of the control socket: {line}")
    if "event" in line:
        convert(line.get("timestamp"), Timestamp)
        return read_event(line["event"], line["data"])
    return read_answer(request, line["return"])


def read_report(report: Json) -> Record:
    """What a command prints as one object."""
    return _one_of(REPORTS, report, "report")


def _one_of(kinds: Iterable[type[Record]], data: Json, what: str) -> Record:
    """As the record that it is; the error says what each of them lacks."""
    errors = []
    for kind in kinds:
        try:
            return convert(data, kind)
        except ValidationError as error:
            errors.append(f"{kind.__name__}: {error}")
    raise ValidationError(f"{what}: {'; '.join(errors) or 'unknown'}: {data}")
