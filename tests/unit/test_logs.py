# SPDX-License-Identifier: Apache-2.0
"""Log records say which migration they are about, and may be JSON."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest
import trio
from lines import parse_log_line

from postcopy._log import about
from postcopy.output import LogHandler, Output


class Job:
    def __init__(self, migration_id: str, machine_name: str = "") -> None:
        self.migration_id = migration_id
        self.machine_name = machine_name


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    logger = logging.getLogger("postcopy.test_logs")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    yield logger
    logger.handlers.clear()


def _output(log: logging.Logger, *, log_json: bool) -> tuple[Output, io.StringIO]:
    stderr = io.StringIO()
    output = Output(False, io.StringIO(), stderr, log_json=log_json)
    log.addHandler(LogHandler(output))
    return output, stderr


def _lines(stderr: io.StringIO) -> list[dict[str, str]]:
    return [parse_log_line(line) for line in stderr.getvalue().splitlines()]


def test_json_lines(log: logging.Logger) -> None:
    output, stderr = _output(log, log_json=True)
    log.warning("%s:\nof %d", "two lines", 1)
    output.say("a word to a person")
    output.say("a word about a migration", about=Job("ab", "vm1"))
    output.say("another one, which has no connection yet", about=Job(""))
    first, second, third, fourth = _lines(stderr)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert first.items() >= {"level": "warning", "logger": log.name, "message": "two lines:\nof 1"}.items()
    assert "migration-id" not in first.keys() | second.keys() | fourth.keys()
    assert second["message"] == "a word to a person"
    assert (third["migration-id"], third["machine"]) == ("ab", "vm1")


def test_exception_in_json(log: logging.Logger) -> None:
    _, stderr = _output(log, log_json=True)
    try:
        raise RuntimeError("on purpose")
    except RuntimeError:
        log.exception("it failed")
    (line,) = _lines(stderr)
    assert "RuntimeError: on purpose" in line["exception"]


async def test_each_task_logs_its_own_migration(log: logging.Logger) -> None:
    """In tasks that it starts, in worker threads, and although the id becomes known only later."""
    _, stderr = _output(log, log_json=True)

    async def child(text: str) -> None:
        await trio.to_thread.run_sync(log.info, text)

    async def engine(job: Job, text: str) -> None:
        with about(job):
            job.migration_id = text
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child, text)
        log.info("after")

    async with trio.open_nursery() as nursery:
        for text in ("one", "two"):
            nursery.start_soon(engine, Job("", machine_name="m" + text), text)
    lines = _lines(stderr)
    said = {(line["message"], line.get("migration-id"), line.get("machine")) for line in lines}
    assert said == {("one", "one", "mone"), ("two", "two", "mtwo"), ("after", None, None)}


def test_plain_lines(log: logging.Logger) -> None:
    _, stderr = _output(log, log_json=False)
    log.warning("without")
    with about(Job("abc", "vm1")):
        log.warning("with")
    assert stderr.getvalue() == "postcopy: warning: without\npostcopy: warning: vm1: with\n"
