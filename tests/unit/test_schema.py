# SPDX-License-Identifier: Apache-2.0
"""The records are what the program writes, what `postcopy schema` prints, what docs/schema.md says, and what the
metrics are made of. That lines are as they say is checked wherever a test sees one (`tests/support/lines.py`)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from lines import parse_control_line, parse_line, parse_lines, parse_log_line
from msgspec import ValidationError

from postcopy.migration.engine import STATUS
from postcopy.records import VERSION
from postcopy.records.control import ANSWERS
from postcopy.records.document import all_metrics, definitions, type_of
from postcopy.records.migration import STATUSES
from postcopy.service.schema import COMMANDS
from postcopy.wire import State

ROOT = Path(__file__).parents[2]
LINE: dict[str, Any] = {"schema": VERSION, "event": "output-dropped", "elapsed-ms": 1.5, "lines": 3}
NO_UNIT = {"pid", "holder", "user", "seed", "schema", "connection", "bulk-channels"}
"""Numbers that are names, and a setting that counts what it is named for."""
SEVERAL_TYPES = {"error", "host", "state"}
"""A sentence, but for a refusal of the control socket, which QMP has made an object; a machine's, and the time that it
takes to save it; the name of one of a laboratory, and what this one is."""


def _postcopy(*arguments: str) -> str:
    command = [sys.executable, "-m", "postcopy", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60, text=True).stdout


def _fields() -> Iterator[tuple[str, dict[str, Any]]]:
    """All fields of all records."""
    for record in definitions().values():
        yield from record["properties"].items()


class TestFields:
    def test_each_says_what_it_is(self) -> None:
        for record in definitions().values():
            assert record["description"], record
            for key, field in record["properties"].items():
                assert field["description"], (record["title"], key)

    def test_each_number_has_a_unit(self) -> None:
        missing = {
            key
            for key, field in _fields()
            if type_of(field).split()[0] in ("integer", "number") and not field.get("unit")
        }
        assert missing == NO_UNIT

    def test_one_type_for_each_name(self) -> None:
        """Whatever record it is in; and in one unit, where it is a measure (a count may be of different things)."""
        types: dict[str, set[str]] = defaultdict(set)
        units: dict[str, set[str]] = defaultdict(set)
        for key, field in _fields():
            # (of several records, which one depends on what has it)
            types[key].add(re.sub(r"\[\w+\]\(#\w+\)", "object", type_of(field)).removesuffix(" or null"))
            if field.get("unit") in ("ms", "us", "ns", "s", "bytes", "bytes/s", "%"):
                units[key].add(field["unit"])
        assert {key for key, found in types.items() if len(found) > 1} == SEVERAL_TYPES
        assert not [key for key, found in units.items() if len(found) > 1]

    def test_the_unit_is_in_the_name_of_a_time(self) -> None:
        for key, field in _fields():
            if key.endswith(("-ms", "-us", "-ns")):
                assert field["unit"] == key[-2:], key

    def test_requests_and_statuses(self) -> None:
        assert ANSWERS.keys() == COMMANDS.keys()
        words = {STATUS.get(state, state.value) for state in State} - {State.ABORTED.value}
        assert words | {"connecting", "postcopy-failed", "failed", "cancelled"} == set(STATUSES)


class TestCommand:
    @pytest.mark.slow
    def test_json_schema(self) -> None:
        """As a program that validates lines would use it."""
        schema = json.loads(_postcopy("schema"))
        jsonschema.Draft202012Validator.check_schema(schema)
        validator = jsonschema.Draft202012Validator(schema)
        good: list[dict[str, Any]] = [
            LINE,
            {"schema": VERSION, "time": "2026-01-01T00:00:00.000Z", "level": "info", "logger": "x", "message": "y"},
            {"postcopy": {"version": "1", "schema": VERSION, "side": "daemon", "pid": 1}},
            {"return": {"migrations": [{"machine": "a", "migration-id": "ff"}]}, "id": 7},
            {"return": {"recover-for": "forever"}},
            {"error": {"class": "NotNow", "desc": "no"}, "id": "a"},
            {"return": {}, "id": 1},
            {"event": "machine-ended", "timestamp": {"seconds": 1, "microseconds": 2}, "data": {"machine": "a"}},
        ]
        # What a later release may add without a new version.
        good += [
            {**LINE, "more": 1},
            {**LINE, "event": "unheard-of"},
            {"return": {"migrations": [{"machine": "a", "migration-id": "ff", "more": 1}]}},
            {"event": "unheard-of", "timestamp": {"seconds": 1, "microseconds": 2}, "data": {"more": 1}},
        ]
        for line in good:
            validator.validate(line)
        for wrong in (
            {**LINE, "lines": "3"},
            {key: value for key, value in LINE.items() if key != "lines"},
            {**LINE, "schema": VERSION - 1},
            {key: value for key, value in good[1].items() if key != "schema"},
            {**good[1], "schema": VERSION + 1},
            {"return": {"recover-for": "never"}},
            {"return": {"more": 1}},
            {"event": "machine-ended", "timestamp": {"seconds": 1, "microseconds": 2}, "data": {}},
            {"error": {"class": "Whatever", "desc": "no"}},
        ):
            assert not validator.is_valid(wrong), wrong

    @pytest.mark.slow
    @pytest.mark.needs("uffd-user")
    def test_lines_of_a_demo(self) -> None:
        """By both: the schema that is shipped, and the records that tests use."""
        text = _postcopy("demo", "--json", "--machine", "rv64", "--memory", "16MiB", "--run-for", "0.2")
        validator = jsonschema.Draft202012Validator(json.loads(_postcopy("schema")))
        lines = parse_lines(text)
        assert lines[-1]["event"] == "result"
        for line in lines:
            validator.validate(line)
        said = [json.dumps({key: value for key, value in line.items() if key != "elapsed-ms"}) for line in lines]
        last: dict[str, str] = {}
        for line, content in zip(lines, said, strict=True):  # no progress says what the last one of that side has said
            side = str(line.get("side"))
            assert last.get(side) != content
            last[side] = content
        ids = {line["migration-id"] for line in lines if "migration-id" in line}
        assert len(ids) == 1

    def test_each_result_is_of_its_own_command(self) -> None:
        """A result with a mistake in it is not taken for that of another command, which has fewer fields."""
        validator = jsonschema.Draft202012Validator(json.loads(_postcopy("schema")))
        line: dict[str, Any] = {"schema": VERSION, "event": "result", "elapsed-ms": 1.5}
        line |= {"status": "completed", "error": None, "kind": "kvm", "verified": None, "verification": []}
        source = {**line, "side": "source", "overhead-bytes": 1, "served": 1}
        validator.validate(source)
        assert not validator.is_valid(source | {"served": "1"})
        assert not validator.is_valid(source | {"side": "merge"})

    def test_page(self) -> None:
        """`postcopy schema --markdown > docs/schema.md` brings it up to date."""
        assert _postcopy("schema", "--markdown") == (ROOT / "docs" / "schema.md").read_text()

    def test_annotations_are_not_evaluated_by_a_daemon(self) -> None:
        """A daemon does not pay for the schema."""
        code = (
            "import sys, postcopy.service.daemon, postcopy.service.control, postcopy.service.server;"
            "print([name for name in sys.modules if name in"
            " ('postcopy.records.figures', 'postcopy.records.document', 'postcopy.records.commands')])"
        )
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, timeout=60, text=True)
        assert done.stdout == "[]\n"


class TestReading:
    """What `tests/support/lines.py` catches."""

    def test_good(self) -> None:
        assert parse_line(json.dumps(LINE)) == LINE

    @pytest.mark.parametrize(
        "change",
        [{"lines": "3"}, {"lines": None}, {"more": 1}, {"event": "unheard-of"}, {"schema": 0}, {"elapsed-ms": "1"}],
    )
    def test_not_as_it_says(self, change: dict[str, object]) -> None:
        with pytest.raises(ValidationError):
            parse_line(json.dumps(LINE | change))

    @pytest.mark.parametrize(
        "line",
        [
            {"return": {"a": 1}},
            {"return": {}, "more": 1},
            {"event": "machine-ended", "data": {"machine": "a"}},
            {"error": {"class": "Other", "desc": ""}},
            {},
        ],
    )
    def test_no_line_of_the_control_socket(self, line: dict[str, object]) -> None:
        with pytest.raises((ValidationError, KeyError)):
            parse_control_line(json.dumps(line), "quit")

    def test_no_log_line(self) -> None:
        with pytest.raises(ValidationError):
            parse_log_line('{"schema": 3, "time": "", "level": "loud", "logger": "x", "message": "y"}')


class TestAlerts:
    RULES = ROOT / "examples" / "prometheus" / "postcopy.rules.yml"

    def test_names_that_there_are(self) -> None:
        """A metric or a label that is not there makes an alert that never fires."""
        known = {metric.name: metric for metric in all_metrics()}
        known |= {f"{name}_bucket": metric for name, metric in known.items() if metric.type == "histogram"}
        rules = [rule for group in yaml.safe_load(self.RULES.read_text())["groups"] for rule in group["rules"]]
        assert len({rule["alert"] for rule in rules}) == len(rules) > 0
        for rule in rules:
            used = _metrics_in(rule["expr"])
            assert used, rule
            for name, matched in used:
                assert name in known or name == "up", rule["alert"]
                assert matched <= {*(known[name].all_labels if name in known else ()), "job", "le"}, rule["alert"]
            assert rule["annotations"].keys() == {"summary", "description"}, rule["alert"]

    def test_statuses_that_there_are(self) -> None:
        for words in re.findall(r'status=~?"([^"]*)"', self.RULES.read_text()):
            assert set(words.split("|")) <= set(STATUSES), words


def _metrics_in(expression: str) -> list[tuple[str, set[str]]]:
    """The names in a PromQL expression, each with the labels that it is selected by."""
    found = re.findall(r"\b(postcopy_\w+|process_\w+|up)\b(?:\{([^}]*)\})?", expression)
    return [(name, set(re.findall(r"(\w+)\s*=", labels))) for name, labels in found]
