# SPDX-License-Identifier: Apache-2.0
"""The schema of all that is written as JSON, made from the records: JSON Schema 2020-12, or a page of Markdown.

Only `postcopy schema` and tests import it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from msgspec import json

from postcopy.records import commands, control, events, log
from postcopy.records._base import VERSION, Json, Record
from postcopy.records.figures import OF_PROCESS, Metric, figures, metrics
from postcopy.records.migration import STATUSES, Machine
from postcopy.records.pager import PagerStatus
from postcopy.records.reports import REPORTS

DIALECT = "https://json-schema.org/draft/2020-12/schema"

EVENTS = {
    event: (*events.EVENTS.get(event, ()), *commands.EVENTS.get(event, ())) for event in events.EVENTS | commands.EVENTS
}
"""The records that a line of `--json` may be, by its event."""

_STAMP: Json = {
    "schema": {"const": VERSION, "description": "Version of all that is described here."},
    "event": {"description": "What happened."},
    "elapsed-ms": {"type": "number", "description": "Since the command began.", "unit": "ms"},
}
"""What every line of `--json` has, before what its event says."""


def document(version: str) -> Json:
    """The JSON Schema, as this version of postcopy has it. An instance is a line: of `--json`, of `--log-json`, of the
    control socket; or a report. What may be added without a new version passes: fields and events."""
    defs = definitions()
    defs["Event"] = {
        "title": "A line of --json",
        "anyOf": [
            *(_line(event, kind, defs) for event, kinds in EVENTS.items() for kind in kinds),
            {"title": "An event that was added", **_object(_STAMP | {"event": _added(EVENTS)}, [*_STAMP])},
        ],
    }
    defs["ControlEvent"] = {
        "title": "An event of the control socket",
        "anyOf": [
            *(_control_event({"const": event}, _refs(kinds)) for event, kinds in events.EVENTS.items()),
            {"title": "An event that was added", **_control_event(_added(events.EVENTS), [{"type": "object"}])},
        ],
    }
    defs["Answer"] = {
        "title": "An answer of the control socket",
        "description": "What `return` has depends on the request, and `postcopy ctl REQUEST --json` prints only that: "
        + ", ".join(
            f"{request}: {' or '.join(kind.__name__ for kind in kinds)}" for request, kinds in control.ANSWERS.items()
        )
        + ".",
        **_object({"return": {"anyOf": _refs(itertools.chain(*control.ANSWERS.values()))}, "id": {}}, ["return"]),
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


def definitions() -> Json:
    """The schema of each record, by its name, in the order of `all_records`."""
    records = all_records()
    _, found = json.schema_components(records, ref_template="#/$defs/{name}")
    return {record.__name__: _plain(found[record.__name__]) for record in records}


def all_metrics() -> list[Metric]:
    return [*OF_PROCESS, *metrics(Machine), *metrics(PagerStatus)]


def _refs(records: Iterable[type[Record]]) -> list[Json]:
    return [{"$ref": f"#/$defs/{record.__name__}"} for record in dict.fromkeys(records)]


def _object(properties: Json, required: list[str]) -> Json:
    return {"type": "object", "properties": properties, "required": required}


def _added(known: Iterable[str]) -> Json:
    """The name of an event that is none of these."""
    return {"type": "string", "not": {"enum": [*known]}}


def _line(event: str, kind: type[Record], defs: Json) -> Json:
    """An event's record with what every line has."""
    record = defs[kind.__name__]
    stamp = _STAMP | {"event": {"const": event, **_STAMP["event"]}}
    return {
        "title": event,
        "description": record["description"],
        **_object(stamp | record["properties"], [*stamp, *record["required"]]),
    }


def _control_event(name: Json, data: list[Json]) -> Json:
    properties = {"event": name, "timestamp": {"$ref": "#/$defs/Timestamp"}, "data": {"anyOf": data}}
    return _object(properties, [*properties])


def _plain(schema: Json) -> Json:
    """A schema that msgspec has made, without what only says how records are written and read here: a field that may be
    left out is never null, and has no default; one that is not known passes. A field's description may be inside of
    what it may be, where msgspec leaves it: it belongs to the field."""
    plain = dict(schema)
    if "properties" in plain:
        plain["properties"] = {key: _plain(field) for key, field in plain["properties"].items()}
    for word in ("items", "additionalProperties"):
        if isinstance(plain.get(word), dict):
            plain[word] = _plain(plain[word])
    if plain.get("additionalProperties") is False and plain["properties"]:  # (without fields it would be anything)
        del plain["additionalProperties"]
    if "enum" in plain:
        plain.pop("pattern", None)  # says the same, in Python's regular expressions
    left_out = plain.pop("default", ...) is None
    if "anyOf" in plain:
        choice = [_plain(item) for item in plain.pop("anyOf") if not (left_out and item == {"type": "null"})]
        if len(choice) == 1:
            return {**choice[0], **plain}
        for word in ("title", "description", "unit", "metric"):
            found = [item.pop(word) for item in choice if word in item]
            if found:
                plain.setdefault(word, found[0])
        plain["anyOf"] = choice
    return plain


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
    yield "`postcopy ctl REQUEST --json` prints what `return` has. `ctl migrate --json` waits for the end, and prints a"
    yield "[MigrationEnded](#migrationended); `ctl events --json` prints events as they come."
    yield ""
    yield "| request | `return` | what it says |"
    yield "|---|---|---|"
    for request, kinds in control.ANSWERS.items():
        for kind in kinds:
            yield f"| `{request}` | {_link(kind)} | {_first_sentence(kind)} |"
    yield from ("", "## Reports", "")
    yield from (*_REPORTS_HEAD.splitlines(), "")
    yield from ("| record | |", "|---|---|")
    for kind in REPORTS:
        yield f"| {_link(kind)} | {_first_sentence(kind)} |"
    yield from ("", "## Records", "")
    yield "*always*: the field is there in every such record. The others are left out where they are not known."
    for name, record in definitions().items():
        yield from ("", f"### {name}", "", " ".join(record["description"].split()), "")
        if rows := [_row(key, field, key in record["required"]) for key, field in record["properties"].items()]:
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
control socket. It is raised when a field, an event, a request or one of the words that a field may be goes away or
means something else, and when such a word is added. Fields, events and requests that are added do not raise it: a
program that reads these lines ignores those that it does not know, and the JSON Schema lets them pass.

A command that goes on writes lines: each has `schema`, `event` and `elapsed-ms` (ms since the command began), and the
fields of its event's record. The control socket sends the same records as `data` of
`{{"event": ..., "timestamp": ..., "data": ...}}`, where `timestamp` has `seconds` and `microseconds` since the
beginning of 1970. A line of `--log-json` is a [LogLine](#logline)."""


_REPORTS_HEAD = """\
`probe`, `lab` and `conformance` print objects without `event`. That of `faultpaths`, which follows its line `run`, is
not one of them: it is a file that is kept, and compared with those of other kernels. So its `schema` is a number of its
own, which changes only when such a file can no longer be read; [faultpaths.md](faultpaths.md#--json) has its fields.
"""


def all_records() -> list[type[Record]]:
    """Each once, what is made of others first."""
    found: dict[type[Record], None] = {}

    def add(kind: type[Record]) -> None:
        if kind not in found:
            found[kind] = None
            for figure in figures(kind):
                if figure.record is not None:
                    add(figure.record)

    greeting = (control.Greeting, control.Refusal, control.Timestamp)
    kinds: Iterable[type[Record]] = itertools.chain(
        *EVENTS.values(), *control.ANSWERS.values(), greeting, (log.LogLine,), REPORTS
    )
    for kind in kinds:
        add(kind)
    return list(found)


def _link(kind: type[Record]) -> str:
    return f"[{kind.__name__}](#{kind.__name__.lower()})"


def _first_sentence(kind: type[Record]) -> str:
    return " ".join((kind.__doc__ or "").split()).partition(". ")[0].removesuffix(".")


def _row(key: str, field: Json, required: bool) -> str:
    always = "*always*" if required else ""
    unit = "µs" if field.get("unit") == "us" else field.get("unit", "")
    return f"| `{key}` | {type_of(field)} | {unit} | {always} | {field['description']}{_words(field.get('enum', ()))} |"


def _words(words: Sequence[str]) -> str:
    if tuple(words) == STATUSES:
        return " What each status means: [results.md](results.md)."
    return f" One of {', '.join(f'`{word}`' for word in words)}." if words else ""


def type_of(schema: Json) -> str:
    """In words; of a record with a link to it."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(map(type_of, schema["anyOf"]))
    kind = schema.get("type")
    if kind == "array":
        return f"list of {type_of(schema['items'])}"
    if kind == "object":
        return f"map of text to {type_of(schema.get('additionalProperties', {}))}"
    if kind is None and "enum" in schema:
        return f'"{schema["enum"][0]}"'
    return {None: "any", "string": "text"}.get(kind) or str(kind)
