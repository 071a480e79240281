# SPDX-License-Identifier: Apache-2.0
"""Every line of JSON that a test sees is checked here against the records that the schema is made from: a key that no
record has, a value of another type or a word that is none fails the test that saw it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from postcopy.records import reading

Json = dict[str, Any]


def parse_lines(text: str | bytes) -> list[Json]:
    """The whole lines of `--json`."""
    whole = text.decode() if isinstance(text, bytes) else text
    return [parse_line(line) for line in whole[: whole.rfind("\n") + 1].splitlines() if line]


def parse_line(text: str | bytes) -> Json:
    """A line of `--json`."""
    line: Json = json.loads(text)
    reading.read_line(line)
    return line


def parse_log_line(text: str | bytes) -> Json:
    """A line of `--log-json`."""
    line: Json = json.loads(text)
    reading.read_log_line(line)
    return line


def parse_control_line(text: str | bytes, request: str = "") -> Json:
    """A line of the control socket; where it is an answer, that to `request`."""
    line: Json = json.loads(text)
    reading.read_control_line(line, request)
    return line


def parse_answer(text: str | bytes, request: Sequence[str]) -> Json:
    """What `postcopy ctl` prints with these arguments and --json."""
    answer: Json = json.loads(text)
    if request[0] == "migrate" and "--detach" not in request:
        reading.read_event("migration-ended", answer)
    else:
        reading.read_answer(request[0], answer)
    return answer


def parse_report(text: str | bytes) -> Json:
    """What `probe`, `lab` and `bench` print with --json."""
    report: Json = json.loads(text)
    reading.read_report(report)
    return report
