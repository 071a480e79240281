# SPDX-License-Identifier: Apache-2.0
"""QEMU's own postcopy, beside which ours is measured: what is refused, and how what it tells is read."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from postcopy.cli import main
from postcopy.errors import MigrationError, ResourceError
from postcopy.testbed.qemu import QEMU, Monitor, Qemu, check, own
from postcopy.testbed.qemu.own import PLACED, REQUEST


@pytest.mark.parametrize(
    ("says", "complaint"),
    [
        (None, "QEMU is not installed"),
        ("QEMU emulator version 6.2.0 (Debian 1:6.2)", "is too old: version 6.2"),
        ("something else", "is too old: it does not tell its version"),
    ],
)
def test_a_qemu_that_cannot_be_used(
    says: str | None, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if says is not None:
        (tmp_path / QEMU).write_text(f"#!/bin/sh\necho '{says}'\n")
        (tmp_path / QEMU).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match=complaint) as raised:
        check()
    assert "qemu-system-x86" in raised.value.remedy


def test_a_qemu_that_is_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / QEMU).write_text("#!/bin/sh\necho 'QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)'\n")
    (tmp_path / QEMU).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    check()


def test_without_qemu_nothing_is_measured_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("postcopy.testbed.bench._processes.run", None)
    assert main(["bench", "fault", "qemu-move"]) == 1
    assert "QEMU is not installed" in capsys.readouterr().err


@contextmanager
def monitor(*events: tuple[str, int, str | None], answers: Sequence[Any] | None = None) -> Iterator[Qemu]:
    """Of a QEMU that sends these: name, microseconds, status; then it ends, or has these answers to commands."""
    ours, its = socket.socketpair()
    with ours, its, its.makefile("rw") as file, ThreadPoolExecutor(1) as qemu:

        def answer() -> None:
            for value, request in zip(answers or (), file, strict=False):
                file.write(json.dumps({"return": value, "id": json.loads(request)["id"]}) + "\n")
                file.flush()

        for name, us, status in events:
            event: dict[str, Any] = {"event": name, "timestamp": {"seconds": 1, "microseconds": us}}
            file.write(json.dumps(event | ({"data": {"status": status}} if status else {})) + "\n")
        file.flush()
        if answers is None:
            its.shutdown(socket.SHUT_WR)
        qemu.submit(answer)
        yield cast(Qemu, Monitor(ours))
        ours.shutdown(socket.SHUT_RDWR)


def test_events_in_any_order() -> None:
    came = [("MIGRATION", 1, "active"), ("MIGRATION", 2, "completed"), ("RESUME", 3, None)]
    with monitor(*came) as qemu, monitor(("STOP", 1, None)) as source:
        assert own.event_us(qemu, "MIGRATION", "completed") == 1_000_002
        assert own.stop_to_run_ms(source, qemu) == 0.002
        assert [event["event"] for event in qemu.events] == ["MIGRATION", "MIGRATION", "RESUME"]
        with pytest.raises(MigrationError, match="STOP"):
            own.event_us(qemu, "STOP")


def test_the_pause_begins_with_the_last_stop() -> None:
    """A source with disks that use O_DIRECT is stopped for each look at what it has written."""
    looks = [("STOP", 1000, None), ("RESUME", 1500, None), ("STOP", 9000, None)]
    with monitor(*looks) as source, monitor(("RESUME", 9700, None)) as dest:
        assert own.stop_to_run_ms(source, dest) == 0.7


def test_an_answer_that_comes_late_is_not_that_of_the_next_command() -> None:
    ours, its = socket.socketpair()
    with ours, its:
        qemu = Monitor(ours)
        with pytest.raises(MigrationError, match="no answer in time: first"):
            qemu.execute("first", timeout_s=0.001)
        its.sendall(b'{"return": 1, "id": 1}\n{"return": 2, "id": 2}\n')
        assert qemu.execute("second") == 2


@pytest.mark.parametrize(
    ("here", "there", "said"),
    [
        ("completed", "completed", "completed"),
        ("postcopy-paused", "completed", "postcopy-paused"),
        ("completed", "postcopy-paused", "postcopy-paused"),
        ("postcopy-active", "postcopy-paused", "postcopy-paused"),
        ("failed", "completed", "failed"),
        ("completed", "failed", "failed"),
        ("postcopy-active", "completed", "failed"),  # the source has ended
    ],
)
def test_how_it_ends(here: str, there: str, said: str) -> None:
    ends = [("MIGRATION", 1, "postcopy-active"), ("MIGRATION", 2, here)]
    with monitor(*ends) as source, monitor(("MIGRATION", 3, there)) as dest:
        assert own.outcome(source, dest) == said


@pytest.mark.parametrize(
    ("status", "said"), [("postcopy-active", "postcopy-active"), ("completed", "failed"), ("failed", "failed")]
)
def test_a_destination_that_says_nothing(status: str, said: str) -> None:
    """What the source says counts then, but that it has sent all is not that all has come."""
    with monitor(("MIGRATION", 2, "completed"), answers=[{"status": status}]) as source, monitor(answers=()) as dest:
        assert own.outcome(source, dest, deadline_s=0.01) == said


def test_a_source_that_has_ended_has_failed() -> None:
    with monitor() as source, monitor(("MIGRATION", 3, "completed"), answers=()) as dest:
        assert own.outcome(source, dest) == "failed"


def test_latencies_of_a_trace() -> None:
    ask = f"{REQUEST} Request for HVA=0x7f000000%s000 rb=pc.ram offset=0x1000 pid=7"
    log = "\n".join(
        [
            f"7@100.999990:{PLACED} host=0x7f0000001000",  # in the background
            f"7@100.999990:{ask % 2}",
            f"7@100.999995:{ask % 3}",
            f"7@100.999999:{ask % 2}",  # raised again while it waits
            f"7@101.000010:{PLACED} host=0x7f0000002000",
            f"7@101.000100:{PLACED} host=0x7f0000003000",
            f"7@101.000200:{PLACED} host=0x7f0000002000",
        ]
    )
    assert own.latencies_us(log) == [20, 105]
    assert own.percentiles_us([1, 2, 3]) == {"p50": 2.0, "p99": 2.0}
    assert own.percentiles_us(own.latencies_us("")) == {}
