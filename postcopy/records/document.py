# SPDX-License-Identifier: Apache-2.0
"""The schema of all that is written as JSON, made from the records: JSON Schema 2020-12, or a page of Markdown.

Only `postcopy schema` and tests import it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from msgspec import json

from postcopy.records import control, events, log
from postcopy.records._base import VERSION, Json, Record
from postcopy.records.figures import OF_PROCESS, Figure, Metric, figures, metrics
from postcopy.records.migration import STATUSES, Machine
from postcopy.records.reading import EVENTS
from postcopy.records.reports import REPORTS

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_STAMP: Json = {
    "schema": {"const": VERSION, "description": "Version of all that is described here."},
    "event": {"description": "What happened."},
    "elapsed-ms": {"type": "number", "description": "Since the command began.", "unit": "ms"},
}
"""What every line of `--json` has, before what its event says."""


def document(version: str) -> Json:
    """The JSON Schema, as this version of postcopy has it. An instance is a line: of `--json`, of `--log-json`, of the
    control socket; or a report."""
    records = [kind for kinds in EVENTS.values() for kind in kinds]
    records += [*control.ANSWERS.values(), control.Greeting, control.Refusal, control.Timestamp, log.LogLine, *REPORTS]
    _, definitions = json.schema_components(dict.fromkeys(records), ref_template="#/$defs/{name}")
    defs = {name: _plain(definition) for name, definition in sorted(definitions.items())}
    defs["Event"] = {
        "title": "A line of --json",
        "oneOf": [_line(event, kind, defs) for event, kinds in EVENTS.items() for kind in kinds],
    }
    defs["ControlEvent"] = {
        "title": "An event of the control socket",
        "oneOf": [_control_event(event, kinds) for event, kinds in events.EVENTS.items()],
    }
    defs["Answer"] = {
        "title": "An answer of the control socket",
        "description": "What `return` has depends on the request: " + _requests() + ".",
        **_object({"return": {"anyOf": _refs(control.ANSWERS.values())}, "id": {}}, ["return"]),
    }
    lines = ("Event", "LogLine", "Greeting", "Answer", "Refusal", "ControlEvent")
    return {
        "$schema": DIALECT,
        "$id": f"urn:postcopy:schema:{VERSION}",
        "title": "Lines of JSON that postcopy writes",
        "description": f"As of postcopy {version}. Fields, events and requests may be added without a new version:"
        " ignore what you do not know.",
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in (*lines, *(report.__name__ for report in REPORTS))],
        "$defs": defs,
        "metrics": [
            {"name": metric.name, "type": metric.type, "help": metric.help, "labels": metric.all_labels}
            for metric in all_metrics()
        ],
    }


def all_metrics() -> list[Metric]:
    return [*OF_PROCESS, *metrics(Machine)]


def _requests() -> str:
    return ", ".join(f"{request}: {record.__name__}" for request, record in control.ANSWERS.items())


def _refs(records: Iterable[type[Record]]) -> list[Json]:
    return [{"$ref": f"#/$defs/{record.__name__}"} for record in dict.fromkeys(records)]


def _object(properties: Json, required: list[str]) -> Json:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _line(event: str, kind: type[Record], defs: Json) -> Json:
    """An event's record with what every line has."""
    record = defs[kind.__name__]
    stamp = {**_STAMP, "event": {"const": event, **_STAMP["event"]}}
    return {
        "title": event,
        "description": record["description"],
        **_object(stamp | record["properties"], [*stamp, *record.get("required", [])]),
    }


def _control_event(event: str, kinds: tuple[type[Record], ...]) -> Json:
    properties = {
        "event": {"const": event},
        "timestamp": {"$ref": "#/$defs/Timestamp"},
        "data": {"anyOf": _refs(kinds)},
    }
    return {"title": event, **_object(properties, ["event", "timestamp", "data"])}


def _plain(value: Any) -> Any:
    """Without what only says how records are written: a field that may be left out is never null, and has no default.
    A description that msgspec leaves inside of a choice belongs to the field."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: _plain(item) for key, item in value.items()}
    if "enum" in value:
        value.pop("pattern", None)  # says the same, in Python's regular expressions
    if "default" in value:
        left_out = value.pop("default") is None
        if left_out and "anyOf" in value:
            value["anyOf"] = [item for item in value["anyOf"] if item != {"type": "null"}]
    if "anyOf" in value and len(value["anyOf"]) == 1:
        (only,) = value.pop("anyOf")
        value = {**only, **value}
    elif "anyOf" in value:
        for word in ("title", "description", "unit", "metric"):
            found = [item.pop(word) for item in value["anyOf"] if word in item]
            if found:
                value.setdefault(word, found[0])
    return value


# ---- a page


def markdown() -> str:
    """docs/schema.md, without its last newline."""
    return "\n".join(_page())


def _page() -> Iterator[str]:
    yield from _HEAD.format(version=VERSION).splitlines()
    yield from ("", "## Lines of `--json`", "")
    yield "| event | record | what happened |"
    yield "|---|---|---|"
    for event, kinds in EVENTS.items():
        for kind in kinds:
            yield f"| `{event}` | {_link(kind)} | {_first_sentence(kind)} |"
    yield from ("", "## Answers of the control socket", "")
    yield "| request | `return` | what it says |"
    yield "|---|---|---|"
    for request, kind in control.ANSWERS.items():
        yield f"| `{request}` | {_link(kind)} | {_first_sentence(kind)} |"
    yield from ("", "## Reports", "", "`probe`, `lab` and `bench` print objects without `event`.", "")
    yield from ("| record | |", "|---|---|")
    for kind in REPORTS:
        yield f"| {_link(kind)} | {_first_sentence(kind)} |"
    yield from ("", "## Records", "")
    yield "*always*: the field is there in every such record. The others are left out where they are not known."
    for kind in all_records():
        yield from ("", f"### {kind.__name__}", "", " ".join((kind.__doc__ or "").split()), "")
        if rows := [_row(figure) for figure in figures(kind)]:
            yield "| field | type | unit | | meaning |"
            yield "|---|---|---|---|---|"
            yield from rows
    yield from ("", "## Metrics", "")
    yield (
        "In Prometheus' text format ([operating.md](operating.md)). `process_*` is there too, as every client has it."
        " The id of a migration is no label: each would leave a series behind."
    )
    yield from ("", "| metric | type | labels | meaning |", "|---|---|---|---|")
    for metric in all_metrics():
        labels = ", ".join(f"`{label}`" for label in metric.all_labels)
        yield f"| `{metric.name}` | {metric.type} | {labels} | {metric.help} |"


_HEAD = """\
# Schema of the JSON output

(Made by `postcopy schema --markdown` from the records that the program writes, `postcopy/records/`; `postcopy schema`
prints the same as JSON Schema 2020-12, with units as `unit`. What a status means, and how a command ends:
[results.md](results.md).)

**Version {version}.** Every line of `--json` and `--log-json` has it as `schema`, and so has the greeting of the
control socket. It is raised when a field, an event or a request that was there goes away or means something else. What
is added does not raise it: a program that reads these lines ignores what it does not know.

A command that goes on writes lines: each has `schema`, `event` and `elapsed-ms` (ms since the command began), and the
fields of its event's record. The control socket sends the same records as `data` of
`{{"event": ..., "timestamp": ..., "data": ...}}`, where `timestamp` has `seconds` and `microseconds` since the
beginning of 1970. A line of `--log-json` is a [LogLine](#logline)."""


def all_records() -> list[type[Record]]:
    """Each once, what is made of others first."""
    found: dict[type[Record], None] = {}

    def add(kind: type[Record]) -> None:
        if kind not in found:
            found[kind] = None
            for figure in figures(kind):
                if figure.record is not None:
                    add(figure.record)

    for kinds in (
        *EVENTS.values(),
        control.ANSWERS.values(),
        (control.Greeting, control.Refusal, log.LogLine),
        REPORTS,
    ):
        for kind in kinds:
            add(kind)
    return list(found)


def _link(kind: type[Record]) -> str:
    return f"[{kind.__name__}](#{kind.__name__.lower()})"


def _first_sentence(kind: type[Record]) -> str:
    return " ".join((kind.__doc__ or "").split()).partition(". ")[0].removesuffix(".")


def _row(figure: Figure) -> str:
    always = "*always*" if figure.required else ""
    unit = {"us": "µs"}.get(figure.unit, figure.unit)
    return f"| `{figure.key}` | {_type(figure)} | {unit} | {always} | {figure.text}{_words(figure)} |"


def _words(figure: Figure) -> str:
    if figure.words == STATUSES:
        return " What each status means: [results.md](results.md)."
    return f" One of {', '.join(f'`{word}`' for word in figure.words)}." if figure.words else ""


def _type(figure: Figure) -> str:
    return figure.kind if figure.record is None else figure.kind.replace(figure.record.__name__, _link(figure.record))
