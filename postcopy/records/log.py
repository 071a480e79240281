# SPDX-License-Identifier: Apache-2.0
"""A line of `--log-json`."""

from __future__ import annotations

from typing import Annotated

from postcopy.records._base import Record, Schema, doc
from postcopy.records.migration import MigrationId, Name


class LogLine(Record, kw_only=True):
    """A line on stderr with `--log-json`."""

    schema: Schema
    time: Annotated[str, doc("RFC 3339, UTC, with milliseconds.")]
    level: Annotated[str, doc("As Python's logging has it.", of="debug|info|warning|error|critical")]
    logger: Annotated[str, doc("Name of the part of the program.")]
    message: Annotated[str, doc("What is said, for a person.")]
    machine: Name | None = None
    migration_id: MigrationId | None = None
    exception: Annotated[str | None, doc("Traceback of a mistake in postcopy, several lines.")] = None
    dropped: Annotated[int | None, doc("So many lines are missing here, since they were not read.", "lines")] = None
