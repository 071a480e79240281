# SPDX-License-Identifier: Apache-2.0
"""Log records that say which migration they are about.

One process may have many migrations, and the code that logs seldom knows whose it is. So the engine says it once, in a
context variable, which every task and worker thread that it starts inherits; `add_migration`, a filter on a handler,
writes it into each record as `migration`, and as `machine` the machine's name, where it has one; "" where not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Protocol

from postcopy.records import VERSION, as_json


class Loggable(Protocol):
    """A migration, as far as a log line says which one it is."""

    machine_name: str

    @property
    def migration_id(self) -> str: ...


_current: ContextVar[Loggable | None] = ContextVar("migration", default=None)


@contextmanager
def about(migration: Loggable) -> Iterator[None]:
    """What this task, and those that it starts, log inside the block is about `migration`, which may not know its id
    yet."""
    token = _current.set(migration)
    try:
        yield
    finally:
        _current.reset(token)


def add_migration(record: logging.LogRecord) -> bool:
    """A filter for handlers."""
    migration = _current.get()
    record.migration = migration.migration_id if migration is not None else ""
    record.machine = migration.machine_name if migration is not None else ""
    return True


def json_line(level: str, logger: str, message: str, when_s: float, **more: Any) -> str:
    """A log line as an object (`LogLine`), with what else is known."""
    from postcopy.records.log import LogLine  # milliseconds at every start

    time = datetime.fromtimestamp(when_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    known = {name: value for name, value in more.items() if value}
    line = LogLine(schema=VERSION, time=time, level=level, logger=logger, message=message, **known)
    return json.dumps(as_json(line))


def plain_record(record: logging.LogRecord) -> str:
    """A record that went through `add_migration`, for a person; with its traceback where it has one."""
    name = getattr(record, "machine", "")
    message = "".join(char if char.isprintable() else " " for char in record.getMessage())  # some of it is a peer's
    line = f"postcopy: {record.levelname.lower()}: {name and name + ': '}{message}"
    exception = _exception(record)
    return f"{line}\n{exception}" if exception else line


def _exception(record: logging.LogRecord) -> str | None:
    if record.exc_info and record.exc_info[0] is not None:
        return logging.Formatter().formatException(record.exc_info)
    return None


def json_record(record: logging.LogRecord) -> str:
    """A record that went through `add_migration`."""
    exception = _exception(record)
    return json_line(
        record.levelname.lower(),
        record.name,
        record.getMessage(),
        record.created,
        migration_id=getattr(record, "migration", ""),
        machine=getattr(record, "machine", ""),
        exception=exception,
    )
