# SPDX-License-Identifier: Apache-2.0
"""Every line of JSON that a test sees is checked here against the records that the schema is made from: a key that no
record has, a value of another type or a word that is none fails the test that saw it. (The schema that is shipped lets
keys and events pass that it does not know.)"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from msgspec import ValidationError

from postcopy.records import VERSION, Record
from postcopy.records.control import ANSWERS, Greeting, Refusal, Timestamp
from postcopy.records.document import EVENTS
from postcopy.records.log import LogLine
from postcopy.records.reports import REPORTS

Json = dict[str, Any]


def convert(value: Any, kind: Any) -> None:
    """That it is one, with no key beside those that one has, which a reader would ignore."""
    read = msgspec.to_builtins(msgspec.convert(value, kind))
    if read != value:
        raise ValidationError(f"{value} is read as {read}")


def parse_lines(text: str | bytes) -> list[Json]:
    """The whole lines of `--json`."""
    whole = text.decode() if isinstance(text, bytes) else text
    return [parse_line(line) for line in whole[: whole.rfind("\n") + 1].splitlines() if line]


def parse_line(text: str | bytes) -> Json:
    """A line of `--json`."""
    line: Json = json.loads(text)
    rest = dict(line)
    event, schema, elapsed_ms = (rest.pop(key, None) for key in ("event", "schema", "elapsed-ms"))
    if schema != VERSION:
        raise ValidationError(f"schema {schema!r}, not {VERSION}")
    convert(elapsed_ms, float)
    _check_event(event, rest)
    return line


def parse_log_line(text: str | bytes) -> Json:
    """A line of `--log-json`."""
    line: Json = json.loads(text)
    convert(line, LogLine)
    return line


def parse_control_line(text: str | bytes, request: str = "") -> Json:
    """A line of the control socket; where it is an answer, that to `request`."""
    line: Json = json.loads(text)
    if "postcopy" in line:
        convert(line, Greeting)
    elif "error" in line:
        convert(line, Refusal)
    elif line.keys() == {"event", "timestamp", "data"}:
        convert(line["timestamp"], Timestamp)
        _check_event(line["event"], line["data"])
    elif line.keys() - {"id"} == {"return"}:
        _check(line["return"], ANSWERS[request], f"answer to {request}")
    else:
        raise ValidationError(f"no line of the control socket: {line}")
    return line


def parse_answer(text: str | bytes, request: Sequence[str]) -> Json:
    """What `postcopy ctl` prints with these arguments and --json."""
    answer: Json = json.loads(text)
    if request[0] == "migrate" and "--detach" not in request:
        _check_event("migration-ended", answer)
    else:
        _check(answer, ANSWERS[request[0]], f"answer to {request[0]}")
    return answer


def parse_report(text: str | bytes) -> Json:
    """What `probe`, `lab` and `bench` print with --json."""
    report: Json = json.loads(text)
    _check(report, REPORTS, "report")
    return report


def _check_event(event: object, data: Json) -> None:
    _check(data, EVENTS.get(str(event), ()), f"event {event}")


def _check(data: Json, kinds: Iterable[type[Record]], what: str) -> None:
    """That it is one of these records; the error says what each of them lacks."""
    errors = []
    for kind in kinds:
        try:
            convert(data, kind)
        except ValidationError as error:
            errors.append(f"{kind.__name__}: {error}")
        else:
            return
    raise ValidationError(f"{what}: {'; '.join(errors) or 'unknown'}: {data}")
